"""Makes the published runs public: copies their folders from the development repository on the Hub to the public one.

    export HF_TOKEN=hf_... FOLIO_HUB=you/folio-dev FOLIO_HUB_PUBLIC=you/folio
    python benchmark/graduate.py mujoco --dry-run      # which runs, and why the others do not
    python benchmark/graduate.py mujoco                # then report.py --no-collect puts the links into the page
    python cloud/hub.py verify                         # is what the page links to still what was graduated?

Those are the runs that docs/BENCHMARKS.md shows: rows of benchmark/results/{suite}.csv with the steps and flags that
the suite has now. Of these, the ones from a clean commit graduate, if the development repository has them finished and
they say of themselves what their rows say. benchmark/results/hub.csv records address and hash of each; it is committed
with the page. What is recorded there is not copied again; a run that was made anew replaces the older one.
"""

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import tyro

from benchmark import report, suites
from cloud import hub


@dataclass
class Args:
    suites: tyro.conf.Positional[tuple[str, ...]]
    """suites by name (benchmark/suites/), or paths of TOML files"""
    source: str | None = None
    """the development repository; by default that in FOLIO_HUB"""
    target: str | None = None
    """the public repository; by default that in FOLIO_HUB_PUBLIC"""
    dry_run: bool = False
    """say what would be done and do nothing"""
    results_dir: Path = report.ROOT / "benchmark" / "results"
    """the results that are committed"""


def published(suite: suites.Suite, results: Path) -> dict[str, dict[str, str]]:
    """The rows that the page shows, by the run's name."""
    cells = report.read_table(suite, results).cells
    return {f"{suite.name}/{cell.entry.name}__{row['seed']}": row for cell in cells for row in cell.rows}


def index(rows: dict[str, dict[str, str]]) -> str:
    """The public repository's page."""
    lines = ["---", "library_name: folio", "license: mit", "tags: [reinforcement-learning]", "---", "", "# Folio: runs"]
    lines += [
        "",
        "Run folders behind the benchmark page of Folio, deep reinforcement learning in one file per algorithm.",
    ]
    lines += ["Each has its card, flags and versions, every training episode, the agent, and SHA256SUMS.", ""]
    table = []
    for name, row in sorted(rows.items()):
        scores = [row["final_return"], row["eval_mean"]]
        cells = [f"[{name}]({name}/README.md)", row["env"], row["script"], row["seed"], *scores, row["commit"][:7]]
        table.append(cells)
    head = ["run", "environment", "script", "seed", "training return", "evaluation", "commit"]
    return "\n".join([*lines, *report.table(head, table)])


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    if not args.suites:
        hub.fail("name at least one suite")
    try:
        loaded = [suites.load(name) for name in args.suites]
        everything = {suite.name: suite for suite in [*report.read_suites(suites.SUITES), *loaded]}.values()
        rows = {name: row for suite in everything for name, row in published(suite, args.results_dir).items()}
    except (suites.SuiteError, OSError, KeyError) as error:
        hub.fail(str(error))
    source, target = hub.open_hub(args.source), hub.open_hub(args.target, "FOLIO_HUB_PUBLIC")
    record = hub.read_record(args.results_dir / "hub.csv")
    wanted, there = {}, 0
    for name, row in rows.items():
        if name.partition("/")[0] not in {suite.name for suite in loaded}:
            continue
        if name in record and record[name]["started"] == row["started"]:
            there += 1
        elif row["clean"] != "yes":
            print(f"not graduated: {name}: it was made from a tree with uncommitted changes, or from none")
        else:
            wanted[name] = {"started": row["started"], "commit": row["commit"]}
            wanted[name]["final_return"] = float(row["final_return"])
    print(f"{len(wanted)} to graduate from {source.repo} to {target.repo}, {there} are there", flush=True)
    if args.dry_run or not wanted:
        print("\n".join(wanted))
        return

    def page(names: Iterable[str]) -> str:
        return index({name: row for name, row in rows.items() if name in record or name in set(names)})

    try:
        records, lines = hub.graduate(source, target, wanted, page)
    except KeyboardInterrupt:
        hub.fail("interrupted; nothing was recorded, and the same command goes on", code=130)
    except hub.ERRORS as error:
        hub.fail(f"{hub.reason(error)}; nothing was recorded, and the same command goes on", code=1)
    for line in lines:
        print(f"not graduated: {line}", file=sys.stderr)
    if records:
        hub.write_record(args.results_dir / "hub.csv", record | records)
    print(f"{len(records)} graduated{'; now: python benchmark/report.py --no-collect' if records else ''}")
    raise SystemExit(bool(lines))


if __name__ == "__main__":
    main()
