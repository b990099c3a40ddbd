"""Results: finished run folders -> benchmark/results/, which is committed.

    benchmark/results/runs/{suite}.csv                      one row per run
    benchmark/results/curves/{suite}/{env}__{script}.csv    column step, then one per seed: mean return of the last 100
                                                            training episodes at each hundredth of the budget

`pd.read_csv` opens them. A run that is collected again replaces its row; rows whose run folder is gone stay.
"""

import hashlib
import math
import re
import shlex
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

from benchmark import runs, stats
from benchmark.suites import RESERVED, Entry, Suite

RESULTS, REFERENCE = runs.ROOT / "benchmark" / "results", runs.ROOT / "benchmark" / "reference.csv"
KEY = ["env", "script", "seed"]
TEXTS = ["env", "script", "flags", "torch", "cpu", "gpu", "commit", "code", "sha256", "started"]
NUMBERS = ["final_return", "slm_score", "eval_mean", "eval_std", "eval_episodes", "minutes", "sps", "memory_mb"]
COLUMNS = [*KEY, "steps", "flags", *NUMBERS, "threads", *TEXTS[3:]]
DAMAGE = OSError, ValueError, KeyError, TypeError, SyntaxError  # raised by reading a damaged run folder
MUJOCO = "Ant|HalfCheetah|Hopper|Humanoid|HumanoidStandup|Inverted(Double)?Pendulum|Pusher|Reacher|Swimmer|Walker2d"
SLM_LOGS = {"CartPole|Acrobot|Pendulum": 500, "LunarLander(Continuous)?": 1000, MUJOCO: 10_000, "ALE/.*": 10_000}


def checkpoints(env: str, steps: int) -> np.ndarray:
    """The steps at which SLM-Lab logs on this environment."""
    every = [n for names, n in SLM_LOGS.items() if re.fullmatch(rf"({names})-v\d+", env)] or [max(1, steps // 200)]
    return np.arange(every[0], steps + 1, every[0])


def curve_steps(steps: int) -> np.ndarray:
    return np.round(np.arange(1, 101) * steps / 100).astype(int)


def means(folder: Path, at: np.ndarray) -> np.ndarray:
    """Mean return of the last 100 training episodes of a run at these steps."""
    episodes = runs.read_episodes(folder)
    return runs.trailing_means(episodes["step"].to_numpy(float), episodes["return"].to_numpy(float), at)


def text_of(flags: dict) -> str:
    """As a row has them."""
    return shlex.join(runs.words_of(dict(sorted(flags.items()))))


def read_run(folder: Path, flags: dict | None = None) -> dict:
    """The row of a finished run. Its flags are those of its suite, or else those that differ from the defaults."""
    about, result = runs.read_args(folder), runs.read_result(folder)
    args, script = about["args"], folder / Path(about["command"][0]).name
    env, steps, source = args["env_id"], args["total_timesteps"], script.read_text()
    if flags is None:
        usual = {k: v for k, v in runs.defaults(source).items() if k in args.keys() - runs.NEUTRAL - RESERVED}
        flags = {k: args[k] for k, v in usual.items() if runs.canonical(args[k]) != runs.canonical(v)}
    if result["final_return"] is None or not math.isfinite(result["final_return"]):
        raise ValueError("no training episode ended")
    row = {"env": env, "script": script.stem, "seed": args["seed"], "steps": steps, "flags": text_of(flags)}
    row |= {name: result[name] for name in ("final_return", "eval_episodes")}
    row |= {"eval_mean": result["eval_return_mean"], "eval_std": result["eval_return_std"]}
    row["slm_score"] = float(f"{stats.slm_score(means(folder, checkpoints(env, steps))):.6g}")
    row |= {"minutes": float(f"{result['seconds'] / 60:.4g}"), "sps": float(f"{result['sps']:.6g}")}
    row |= {"memory_mb": float(f"{result['peak_memory_mb']:.6g}"), "torch": about["versions"]["torch"]}
    row |= {name: about[name] for name in ("threads", "cpu", "commit", "started")} | {"gpu": about["gpu"] or ""}
    return row | {"code": runs.code_hash(source), "sha256": hashlib.sha256(source.encode()).hexdigest()}


def find(root: Path) -> list[Path]:
    """The run folders in or below a folder, without those that were moved aside."""
    return sorted(path.parent for path in root.rglob("args.json") if not re.search(r"\.old-\d+$", path.parent.name))


def read_folder(root: Path) -> pd.DataFrame:
    """A row for each finished run in or below a folder, with its `folder`. Damaged ones are named on stderr."""
    rows = []
    for folder in (folder for folder in find(root) if (folder / "result.json").exists()):
        try:
            rows.append(read_run(folder) | {"folder": folder})
        except DAMAGE as error:
            print(f"left out: {folder}: {error!r}", file=sys.stderr)
    same = [*KEY, "steps", "flags", "code"]  # a run that was made twice counts once
    return pd.DataFrame(rows, columns=[*COLUMNS, "folder"]).drop_duplicates(same, keep="last").sort_values(KEY)


def read(source) -> pd.DataFrame:
    """A table of runs, from a path or an open file. Columns that it does not have are empty."""
    texts = dict.fromkeys(TEXTS, "str")
    table = pd.read_csv(source, dtype=texts)
    table = table.reindex(columns=[*COLUMNS, *table.columns.difference(COLUMNS, sort=False)])
    return table.astype(texts).fillna(dict.fromkeys(TEXTS, ""))


def read_suite(suite: Suite, results: Path) -> pd.DataFrame:
    path = results / "runs" / f"{suite.name}.csv"
    return read(path) if path.exists() else pd.DataFrame(columns=COLUMNS)


def read_curves(suite: Suite, entry: Entry, results: Path) -> pd.DataFrame:
    """Index: step; a column per seed."""
    path = results / "curves" / suite.name / f"{entry.name}.csv"
    return pd.read_csv(path, index_col="step").rename(columns=int) if path.exists() else pd.DataFrame()


def write(table: pd.DataFrame, path: Path, **options) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    table.to_csv(path.with_suffix(".tmp"), lineterminator="\n", **options)
    path.with_suffix(".tmp").replace(path)


def collect(suite: Suite, folder: Path, results: Path) -> Iterator[str]:
    """Add the finished runs of a suite to its results; yields a line for each that is new, replaced, or left out."""
    table = read_suite(suite, results)
    rows = dict(zip(table[KEY].itertuples(index=False, name=None), table.to_dict("records")))
    for entry in suite.entries:
        steps, curves = curve_steps(entry.steps), read_curves(suite, entry, results)
        curves = curves if list(curves.index) == list(steps) else pd.DataFrame(index=steps)
        for run in sorted((folder / suite.name).glob(f"{entry.name}__*")):
            seed = run.name.rpartition("__")[2]
            if not seed.isdecimal() or int(seed) > 100 or not (run / "result.json").exists():
                continue  # seeds from 101 on are those on which flags were chosen
            spec = entry.spec(suite.name, int(seed), folder)
            try:  # a run of an older version of the script is taken, and marked on the page
                if reason := runs.difference(run, replace(spec, script=run / entry.script.name)):
                    raise ValueError(reason)
                row, curves[int(seed)] = read_run(run, entry.flags), means(run, steps)
            except DAMAGE as error:
                yield f"left out: {run}: {error!r}"
                continue
            key = tuple(row[name] for name in KEY)
            if rows.get(key, {}).get("started") != row["started"]:
                yield f"{'replaced' if key in rows else 'new'}: {suite.name}/{run.name}"
            rows[key] = row
        if len(curves.columns):
            path = results / "curves" / suite.name / f"{entry.name}.csv"
            write(curves.sort_index(axis=1).rename_axis("step"), path, float_format="%.6g")
    if rows:
        new = pd.DataFrame(rows.values(), columns=table.columns).sort_values(KEY)
        write(new, results / "runs" / f"{suite.name}.csv", index=False)
