"""Two sets of results side by side: is B better than A, worse, or is no difference found at this number of seeds?

    python benchmark/compare.py HEAD benchmark/results              # what the runs since the last commit have changed
    python benchmark/compare.py v0.1 v0.2                           # two commits of benchmark/results
    python benchmark/compare.py benchmark/results other/results     # two folders, such as of two machines; or CSV files
    python benchmark/compare.py dqn dqn_per                         # two scripts of benchmark/results
    python benchmark/compare.py HEAD~3:dqn other/results:dqn_per    # two scripts, each from somewhere

A and B are compared where both have runs: on the same environment of the same suite, and with the same script unless
scripts are named. Seeds are not paired, and nothing is assumed of the scores but that runs are independent.

The verdict is that of the two-sided rank test of Mann and Whitney at the 5 % level, exact also for few seeds and for
ties: "better" or "worse" is said in at most 5 of 100 comparisons without a difference. It needs 4 seeds on each side,
or 3 against 5. (The rule that the bootstrap interval of the probability of improvement leaves out 0.5 would say it in
22 of 100 with 3 seeds and in 9 with 5.) "No difference found" is not "no difference": the last column is the difference
of means that would have been found four times out of five, were the scores normal with the spread that they have here.
"""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import tyro

from benchmark import collect, report, stats

RESULTS = report.ROOT / "benchmark" / "results"
ALPHA = 0.05


@dataclass
class Args:
    a: tyro.conf.Positional[str]
    """results folder, CSV file or commit, with `:script` behind it if wanted; or a script of benchmark/results"""
    b: tyro.conf.Positional[str]
    """the same"""
    measure: Literal["final_return", "slm_score", "eval_mean", "sps"] = "final_return"
    """which column is compared; more is better"""


def fail(message: str) -> None:
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def git(*words: str) -> str | None:
    done = subprocess.run(["git", "-C", report.ROOT, *words], capture_output=True, text=True, check=False)
    return done.stdout if done.returncode == 0 else None


def read_text(content: str, where: str, suite: str) -> list[dict[str, str]]:
    rows = collect.parse_csv(content)
    if not rows or not {"env", "script", "seed", "steps", "final_return"} <= rows[0].keys():
        fail(f"{where} is no table of results, or an empty one")
    return [row | {"suite": suite} for row in rows]


def read_side(name: str) -> list[dict[str, str]]:
    """The rows that a name on the command line stands for; `suite` is empty for those of a single file."""
    where, _, script = name.rpartition(":") if ":" in name and not Path(name).exists() else (name, "", "")
    path, rows = Path(where), []
    if not where or not path.exists() and not script and any((RESULTS.parent.parent / "algos").glob(f"{name}.py")):
        path, script = RESULTS, script or name
    try:
        if path.is_file():
            rows = read_text(path.read_text(), str(path), "")
        elif path.is_dir() or path == RESULTS:
            for file in sorted(path.glob("*.csv")):
                rows += read_text(file.read_text(), str(file), file.stem)
        elif git("rev-parse", "--verify", "--quiet", f"{where}^{{commit}}"):
            for file in (git("ls-tree", "--name-only", where, "benchmark/results/") or "").split():
                if file.endswith(".csv"):
                    rows += read_text(git("show", f"{where}:{file}"), f"{where}:{file}", Path(file).stem)
        else:
            fail(f"{where} is no results folder, CSV file, commit or script")
    except (OSError, UnicodeDecodeError) as error:
        fail(f"{path} cannot be read: {error}")
    found = [row for row in rows if not script or row["script"] == script]
    if not found:
        fail(f"{name} holds no results" + (f" of {script}; there are {', '.join(scripts(rows))}" if rows else ""))
    return found


def scripts(rows: list[dict[str, str]]) -> list[str]:
    return sorted({row["script"] for row in rows})


def groups(rows: list[dict[str, str]], by: list[str]) -> dict[tuple, list[dict[str, str]]]:
    found = {}
    for row in rows:
        found.setdefault(tuple(row[name] for name in by), []).append(row)
    return found


def scores(rows: list[dict[str, str]], measure: str) -> np.ndarray:
    try:
        values = np.array([float(row[measure]) for row in rows if row.get(measure)])
    except ValueError as error:
        fail(f"{measure} of {rows[0]['script']} on {rows[0]['env']}: {error}")
    if not np.isfinite(values).all():
        fail(f"{measure} of {rows[0]['script']} on {rows[0]['env']} is not finite")
    return values


def verdict(x: np.ndarray, y: np.ndarray) -> tuple[str, str]:
    """What can be said of y against x, and the difference of means that would have been found."""
    sizes = stats.detectable(len(x), len(y))
    if np.isinf(sizes):
        return "too few seeds", "–"
    spread = np.sqrt((x.var() * len(x) + y.var() * len(y)) / (len(x) + len(y) - 2))  # pooled
    if stats.rank_test(x, y) > ALPHA:
        return "no difference found", report.form(sizes * spread)
    return ("**better**" if stats.wins(y, x).mean() > 0.5 else "**worse**"), report.form(sizes * spread)


def settings(rows: list[dict[str, str]]) -> set[tuple[str, str]]:
    return {(row["steps"], row.get("flags", "")) for row in rows}


def difference_of(a: list[dict[str, str]], b: list[dict[str, str]]) -> str:
    """What is not the same of two sides with other settings: the steps, or else the flags."""
    steps = [", ".join(sorted({report.whole(int(row["steps"])) for row in rows})) for rows in (a, b)]
    if steps[0] != steps[1]:
        return f"A had {steps[0]} steps, B {steps[1]}"
    return "the flags are not the same on both sides"


def compare(args: Args) -> list[str]:
    sides = [read_side(name) for name in (args.a, args.b)]
    by = ["env"] if "" in {row["suite"] for side in sides for row in side} else ["suite", "env"]
    if not (len(scripts(sides[0])) == len(scripts(sides[1])) == 1 and scripts(sides[0]) != scripts(sides[1])):
        by.append("script")
    a, b = (groups(side, by) for side in sides)
    if not a.keys() & b.keys():
        fail(f"{args.a} and {args.b} have no environment and script in common")
    rows, pairs, verdicts, notes = [], [], [], []
    for key in (key for key in a if key in b):
        label, new = " ".join(part for part in key if part), [row for row in b[key] if row not in a[key]]
        if not new:
            notes.append(f"{label}: left out, both sides have the same runs.")
            continue
        if len(new) < len(b[key]):
            notes.append(f"{label}: {len(b[key]) - len(new)} runs are on both sides and count as A's.")
        x, y = scores(a[key], args.measure), scores(new, args.measure)
        if not (len(x) and len(y)):
            notes.append(f"{label}: left out, there is no {args.measure} for {'B' if len(x) else 'A'}.")
            continue
        if settings(a[key]) != settings(b[key]):
            notes.append(f"{label}: {difference_of(a[key], b[key])}.")
        word, found = verdict(x, y)
        value, interval = stats.improvement([y], [x])
        difference = report.form(y.mean() - x.mean()) + report.between(stats.difference_interval(x, y))
        probability = f"{value:.2f}" + report.fractions(interval)
        means = [report.with_interval(x), report.with_interval(y)]
        rows.append([label, f"{len(x)}, {len(y)}", *means, difference, probability, word, found])
        pairs.append((x, y))
        verdicts.append(word.strip("*"))
    head = ["", "seeds", "mean of A", "mean of B", "B − A", "P(B above A)", "B is", "would have been found"]
    lines = [f"A: {args.a}  ", f"B: {args.b}  ", f"measure: {args.measure}, mean [95 % interval]", ""]
    if rows:
        lines += report.table(head, rows)
    lines += [f"- {note}" for note in notes] + ([""] if notes else [])
    if len(pairs) > 1:
        value, interval = stats.improvement([y for _, y in pairs], [x for x, _ in pairs])
        words = ("better", "worse", "no difference found", "too few seeds")
        counts = ", ".join(f"{verdicts.count(word)} {word}" for word in words if word in verdicts)
        lines += [
            f"Together: P(B above A) is {value:.2f}{report.fractions(interval)} over {len(pairs)} comparisons: "
            f"{counts}. Without any difference, {ALPHA * len(pairs):.1f} would be called better or worse.",
            "",
        ]
    if not rows:
        return [*lines, "Nothing to compare."]
    return [
        *lines,
        f"Rule: better or worse if p ≤ {ALPHA:g} in the exact two-sided rank test, which needs 4 seeds on each side or "
        "3 against 5. The last column is the difference found four times out of five.",
    ]


def main() -> None:
    print("\n".join(compare(tyro.cli(Args, description=__doc__))))


if __name__ == "__main__":
    main()
