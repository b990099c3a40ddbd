"""Results: finished run folders of a suite -> benchmark/results/, which is what is published.

    benchmark/results/{suite}.csv                       one row per run
    benchmark/results/curves/{suite}/{env}__{script}.csv    column step, then one column per seed: the trailing mean of
                                                        100 training episodes at each hundredth of the budget

Run folders are large and stay at home; these files are small and are committed. A run that is collected again replaces
its row, and the rows of runs whose folders are gone are kept.
"""

import csv
import hashlib
import io
import json
import math
import re
import shlex
from pathlib import Path

import numpy as np

from benchmark import stats, suites

COLUMNS = (
    "env,script,seed,steps,final_return,slm_score,strength,efficiency,stability,eval_mean,eval_std,eval_episodes,"
    "minutes,sps,memory_mb,threads,cpu,cores,gpu,commit,clean,sha256,code,torch,flags,started"
).split(",")
POINTS = 100  # of a curve

LOG_FREQUENCY = {"CartPole": 500, "Acrobot": 500, "Pendulum": 500, "LunarLander": 1000, "LunarLanderContinuous": 1000}
MUJOCO = (
    "Ant HalfCheetah Hopper Humanoid HumanoidStandup InvertedDoublePendulum InvertedPendulum Pusher Reacher Swimmer "
    "Walker2d"
).split()
LOG_FREQUENCY |= dict.fromkeys(MUJOCO, 10_000)


def checkpoints(env: str, steps: int) -> np.ndarray:
    """The steps at which SLM-Lab would have logged, on this environment and budget."""
    every = 10_000 if env.startswith("ALE/") else LOG_FREQUENCY.get(re.sub(r"-v\d+$", "", env), max(1, steps // 200))
    return np.arange(every, steps + 1, every)


def text(number: float, digits: int = 6) -> str:
    """For a CSV: so many significant digits, nothing for nan."""
    return "" if math.isnan(number) else f"{number:.{digits}g}"


def read_run(folder: Path, entry: suites.Entry, seed: int, random: float | None) -> tuple[dict[str, str], list[str]]:
    """A finished run folder: its row and its curve."""
    described, script = json.loads((folder / "args.json").read_text()), folder / f"{entry.script}.py"
    commit = described["commit"]
    result = json.loads((folder / "result.json").read_text())
    with (folder / "episodes.csv").open(newline="") as file:
        episodes = [(int(row["step"]), float(row["return"])) for row in csv.DictReader(file)]
    steps, returns = np.array(episodes, dtype=float).reshape(-1, 2).T
    at = checkpoints(entry.env, entry.steps)
    metrics = stats.slm_metrics(at, stats.trailing_means(steps, returns, at), random)
    grid = curve_steps(entry.steps)
    row = {
        "env": entry.env,
        "script": entry.script,
        "seed": seed,
        "steps": entry.steps,
        "final_return": result["final_return"],
        **{name: text(value) for name, value in metrics.items()},
        "eval_mean": result["eval_return_mean"],
        "eval_std": result["eval_return_std"],
        "eval_episodes": result["eval_episodes"],
        "minutes": text(result["seconds"] / 60, 4),
        "sps": text(result["sps"]),
        "memory_mb": text(result["peak_memory_mb"]),
        **{name: described[name] for name in ("threads", "cpu", "gpu")},
        "cores": "",
        "commit": commit.removesuffix("-dirty"),
        "clean": commit and ("no" if commit.endswith("-dirty") else "yes"),
        "sha256": hashlib.sha256(script.read_bytes()).hexdigest(),
        "code": suites.code_hash(script.read_text()),
        "torch": described["versions"]["torch"],
        "flags": shlex.join(entry.words),
        "started": described["started"],
    }
    row = {name: "" if row[name] is None else str(row[name]) for name in COLUMNS}
    if not math.isfinite(float(row["final_return"] or "nan")):
        raise ValueError("its final_return is not a number: no training episode ended")
    return row, [text(value) for value in stats.trailing_means(steps, returns, grid)]


def curve_steps(steps: int) -> np.ndarray:
    return np.round(np.arange(1, POINTS + 1) * steps / POINTS).astype(int)


def collect(suite: suites.Suite, runs: Path, results: Path, random: dict[str, float]) -> list[str]:
    """Add the finished runs of a suite to the results; returns one line for each that could not be taken."""
    table, left_out = {key(row): row for row in read_rows(results, suite.name)}, []
    for entry in suite.entries:
        new = {}
        for folder in sorted((runs / suite.name).glob(f"{entry.name}__*")):
            seed = folder.name.rpartition("__")[2]
            if not (seed.isdecimal() and (folder / "result.json").exists()):
                continue
            reason = suites.why_stale(folder, entry, int(seed))
            if reason and reason != f"{entry.script}.py has changed":  # that one is taken, and marked on the page
                left_out.append(f"{folder}: {reason}")
                continue
            try:
                row, new[seed] = read_run(folder, entry, int(seed), random.get(entry.env))
            except (OSError, ValueError, KeyError, TypeError) as error:
                left_out.append(f"{folder}: {error!r}" if isinstance(error, KeyError) else f"{folder}: {error}")
                continue
            table[key(row)] = row
        if new:
            write_curves(results, suite.name, entry, new)
    if table:
        write_csv(results / f"{suite.name}.csv", COLUMNS, (table[k].values() for k in sorted(table)))
    return left_out


# ------------------------------------------------------------------------------------------- reading and writing them


def key(row: dict[str, str]) -> tuple[str, str, int]:
    return row["env"], row["script"], int(row["seed"])


def parse_csv(content: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(content)))


def read_csv(path: Path) -> list[dict[str, str]]:
    return parse_csv(path.read_text()) if path.exists() else []


def write_csv(path: Path, columns, rows) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(path.name + ".tmp").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(rows)
    path.with_name(path.name + ".tmp").replace(path)


def read_rows(results: Path, suite: str) -> list[dict[str, str]]:
    return read_csv(results / f"{suite}.csv")


def read_curves(results: Path, suite: str, entry: suites.Entry) -> dict[str, list[str]]:
    """{"step": [...], seed: [...]}, as text."""
    rows = read_csv(results / "curves" / suite / f"{entry.name}.csv")
    return {name: [row[name] for row in rows] for name in rows[0]} if rows else {}


def write_curves(results: Path, suite: str, entry: suites.Entry, new: dict[str, list[str]]) -> None:
    """Add these seeds' curves; curves over another budget go."""
    steps, old = [str(step) for step in curve_steps(entry.steps)], read_curves(results, suite, entry)
    curves = (old if old.get("step") == steps else {}) | new
    curves.pop("step", None)
    seeds = sorted(curves, key=int)
    rows = zip(steps, *(curves[seed] for seed in seeds), strict=True)
    write_csv(results / "curves" / suite / f"{entry.name}.csv", ["step", *seeds], rows)


# ------------------------------------------------------------------------------------------------- reference scores


def read_reference() -> list[dict[str, str]]:
    return read_csv(suites.REFERENCE)


def reference_scores(algo: str, source: str) -> dict[str, float]:
    """A score per environment: of `random` by SLM-Lab, or of `random` and `human` by DQN Zoo."""
    rows = read_reference()
    return {row["env_id"]: float(row["score"]) for row in rows if (row["algo"], row["source"]) == (algo, source)}
