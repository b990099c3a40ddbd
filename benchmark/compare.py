"""Compare two sets of runs: is B better than A, worse, or is no difference found with this many seeds?

    python benchmark/compare.py runs/baseline runs/mine             # run folders, at any depth
    python benchmark/compare.py HEAD benchmark/results              # what the runs since the last commit change
    python benchmark/compare.py a.csv b.csv                         # tables of results
    python benchmark/compare.py benchmark/results:dqn benchmark/results:dqn_per     # one script of each side

A and B are compared where both have runs of an environment with the same number of steps, and with the same script,
unless each side has one script per environment. Seeds are not paired.

The verdict is that of the exact two-sided Mann-Whitney rank test at the 5 % level. It can find a difference with 4
seeds on each side, or 3 against 5. "No difference found" is not "no difference": more seeds may find one.
"""

import io
import shutil
import subprocess
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import tyro

from benchmark import results, runs, stats
from benchmark.stats import between, form, fraction, with_interval


def git(*words: str) -> str:
    program = shutil.which("git")
    return subprocess.run([program, *words], capture_output=True, text=True, check=False).stdout if program else ""


def load(name: str) -> pd.DataFrame:
    """The runs that a name on the command line stands for."""
    where, _, script = (name, "", "") if Path(name).exists() else name.partition(":")
    path, tables = Path(where), []
    try:
        if path.is_dir() and results.find(path):
            tables = [results.read_folder(path)]
        elif path.exists():
            files = [path] if path.is_file() else [*path.glob("*.csv"), *path.glob("runs/*.csv")]
            tables = [results.read(file) for file in files]
        else:
            files = git("ls-tree", "-r", "--full-tree", "--name-only", where, "benchmark/results/").split()
            files = [file for file in files if file.endswith(".csv") and "/curves/" not in file]
            tables = [results.read(io.StringIO(git("show", f"{where}:{file}"))) for file in files]
        table = pd.concat(tables, ignore_index=True).dropna(subset="final_return")  # without files of other kinds
        table = table.drop_duplicates([*results.KEY, "steps", "flags", "code", "started"])  # a run in two suites
    except (OSError, ValueError):
        runs.fail(f"{where} is no folder or CSV file with results, nor a git revision with benchmark/results")
    table = table[table["script"] == script] if script else table
    return table if len(table) else runs.fail(f"{name} has no finished runs")


def verdict(x: np.ndarray, y: np.ndarray) -> str:
    """What can be said of y against x."""
    if not stats.can_differ(len(x), len(y)):
        return "too few seeds"
    if stats.rank_test(x, y) > stats.ALPHA:
        return "no difference found"
    return "better" if stats.wins(y, x).mean() > 0.5 else "worse"


def compare(a: pd.DataFrame, b: pd.DataFrame, measure: str = "final_return") -> tuple[pd.DataFrame, list[str]]:
    """A row for each environment and budget (and script, if a side has several) that both sides have; and notes."""
    by, rows, notes = ["env", "steps"], [], set()
    if any((side.groupby(by)["script"].nunique() > 1).any() for side in (a, b)):
        by.append("script")
    sides_b = dict(list(b.groupby(by)))
    for key, of_a in a.groupby(by):
        of_b, ids = sides_b.get(key, b[:0]), [*results.KEY, "started", "final_return"]
        of_b = of_b[~pd.MultiIndex.from_frame(of_b[ids]).isin(pd.MultiIndex.from_frame(of_a[ids]))]  # else it is A's
        x, y = (side[measure].dropna().to_numpy(float) for side in (of_a, of_b))
        if not len(x) or not len(y):
            continue
        difference, word = stats.difference_interval(x, y), verdict(x, y)
        if word == "too few seeds":
            notes.add(f"With {len(x)} against {len(y)} seeds this test can never find a difference.")
        if word in ("better", "worse") and difference[0] < 0 < difference[1]:
            word += "*"
            notes.add("*: the scores of B rank higher or lower, but a few extreme seeds leave the means undecided.")
        for side, of in (("A", of_a), ("B", of_b)):
            if of["flags"].nunique() > 1 or ("folder" in of and of["code"].nunique() > 1):
                notes.add(f"{key[0]}: the runs of {side} have different flags or versions of the script.")
        scripts = " → ".join(dict.fromkeys([of_a["script"].iloc[0], of_b["script"].iloc[0]]))
        value, above = stats.improvement([y], [x])
        row = {"runs": f"{key[0]} {scripts}", "seeds": f"{len(x)}, {len(y)}"}
        row |= {"A": with_interval(x), "B": with_interval(y), "B - A": form(y.mean() - x.mean()) + between(difference)}
        rows.append(row | {"P(B above A)": fraction(value) + between(above, fraction), "B is": word})
    return pd.DataFrame(rows), sorted(notes)


def main(a: str, b: str, /, measure: Literal["final_return", "eval_mean", "slm_score", "sps"] = "final_return") -> None:
    table, notes = compare(load(a), load(b), measure)
    if not len(table):
        runs.fail("nothing to compare: no environment has different runs with the same number of steps on both sides")
    print(f"A: {a}\nB: {b}\n{measure}: mean over seeds [95 % interval]\n")
    print(table.to_string(index=False), "", *notes, sep="\n")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
