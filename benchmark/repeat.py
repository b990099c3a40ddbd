"""Has a change to a script left its results alone? Repeats one published run of each entry and compares all digits.

    python benchmark/repeat.py classic box2d            # the entries that the page marks "script changed since"
    python benchmark/repeat.py classic --only ppo --jobs 2

A run is decided by the script's code, its flags and its seed. So if the first seed's run, made anew with the script as
it is now, has the numbers that were published, its curve and the evaluation to the last digit, the change was one of
speed, of words or of something that these runs do not use, and the other seeds' runs are taken to be as good as new:
benchmark/repeated.csv, which is committed, gets a line with the old and the new hash of the code, the page loses its
mark, and run.py takes these runs for done. It is one seed's word for all: what only happens to others is not seen.

What differs is shown and stays marked; `run.py --rerun-stale` makes those runs anew. Only the machine and the PyTorch
that made the first run can be expected to give its digits. The exit code is 0 if all are the same, 1 if not.
"""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from benchmark import collect, report, suites

SAME = "final_return", "slm_score", "strength", "efficiency", "stability", "eval_mean", "eval_std", "eval_episodes"
COLUMNS = "script", "env", "steps", "flags", "seed", "code", "now"


@dataclass
class Args:
    suites: tyro.conf.Positional[tuple[str, ...]]
    """suites by name (benchmark/suites/), or paths of TOML files"""
    only: tuple[str, ...] = ()
    """only entries whose script, environment or folder name (CartPole-v1__ppo) fits one of these patterns"""
    jobs: int = 1
    """runs side by side"""
    runs_dir: Path = report.ROOT / "runs" / "repeated"
    """where the runs are made"""
    results_dir: Path = report.ROOT / "benchmark" / "results"
    """the results that are committed"""


def to_repeat(suite: suites.Suite, args: Args) -> list[tuple[suites.Entry, dict[str, str]]]:
    """Of each entry whose runs were made with other code, the row of the first one."""
    found = []
    for cell in report.read_table(suite, args.results_dir).cells:
        changed = sorted(filter(cell.has_changed, cell.rows), key=lambda row: int(row["seed"]))
        if changed and cell.entry.fits(args.only):
            found.append((cell.entry, changed[0]))
    return found


def make(suite: str, names: list[str], seed: str, args: Args) -> int:
    """The runs of these entries, by run.py; returns its exit code."""
    command = [sys.executable, suites.HERE / "run.py", suite, "--only", *names, "--seeds", f"{seed}-{seed}"]
    command += ["--runs-dir", args.runs_dir, "--jobs", str(args.jobs), "--rerun-stale"]
    return subprocess.run(command, check=False).returncode


def differences(old: dict[str, str], suite: suites.Suite, entry: suites.Entry, args: Args) -> list[str]:
    """What the run that was made anew has otherwise than its row and curve."""
    folder = suites.run_folder(args.runs_dir, suite.name, entry, int(old["seed"]))
    if not (folder / "result.json").exists():
        return ["it has not finished"]
    random = collect.reference_scores("random", "SLM-Lab")
    new, curve = collect.read_run(folder, entry, int(old["seed"]), random.get(entry.env))
    found = [f"{name} was {old[name]} and is {new[name]}" for name in SAME if old[name] != new[name]]
    if collect.read_curves(args.results_dir, suite.name, entry).get(old["seed"]) != curve:
        found.append("the curve is another")
    if found:
        found += [f"{name} was {old[name]} and is {new[name]}" for name in ("cpu", "torch") if old[name] != new[name]]
    return found


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    is_same = True
    for name in args.suites:
        try:
            suite = suites.load(name)
        except suites.SuiteError as error:
            print(f"error: {error}", file=sys.stderr)
            raise SystemExit(2) from None
        chosen = to_repeat(suite, args)
        for seed in sorted({row["seed"] for _, row in chosen}, key=int):
            code = make(name, [entry.name for entry, row in chosen if row["seed"] == seed], seed, args)
            if code not in (0, 1):  # 1: a run failed, which is told below
                raise SystemExit(code)
        links = {tuple(row.values()) for row in collect.read_csv(suites.REPEATED)}
        for entry, row in chosen:
            found = differences(row, suite, entry, args)
            if found:
                print(f"differs: {suite.name}/{entry.name}, seed {row['seed']}: {'; '.join(found)}")
                is_same = False
            else:
                print(f"same: {suite.name}/{entry.name}, seed {row['seed']}")
                links.add((*entry.key, row["seed"], row["code"], entry.code))
        if links:
            collect.write_csv(suites.REPEATED, COLUMNS, sorted(links))
        if not chosen:
            print(f"{suite.name}: nothing to repeat")
    raise SystemExit(0 if is_same else 1)


if __name__ == "__main__":
    main()
