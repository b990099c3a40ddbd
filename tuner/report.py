"""What a search found: shown, narrowed, and validated."""

import json
import math
import os
import shlex
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import optuna
from optuna.trial import FrozenTrial, TrialState

from benchmark import run, stats
from benchmark.collect import write_csv
from benchmark.run import Runner, backend_of, fail, short, slots_of
from benchmark.run import shown as path_shown
from benchmark.suites import code_hash
from tuner import spaces
from tuner.search import Run
from tuner.spaces import Dimension, Space, toml
from tuner.study import OURS, best, best_first, importances, shown, write_trials

PYTHON = "uv run" if "UV" in os.environ else "python"  # how a printed command begins
TOP = 8  # trials in the table of `show`
QUARTER = 0.25  # the best trials that `narrow` looks at


def aligned(rows: list[list[str]]) -> str:
    """Columns of text, numbers to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(x.rjust(width) for x, width in zip(row, widths)).rstrip() for row in rows)


def decimals(values) -> int:
    """How many to show of scores like these, so that what sets them apart is seen: one of 93.1, three of 0.931."""
    largest = max((abs(x) for x in values if x and math.isfinite(x)), default=10.0)
    return max(1, 2 - math.floor(math.log10(largest)))


def again(verb: str, path: Path, url: str | None, studies: Path | None = None) -> str:
    """A command of the tuner on this study, as one would type it here."""
    words = [*PYTHON.split(), path_shown(Path(__file__).with_name("run.py")), verb, path_shown(path)]
    words += ["--studies", path_shown(studies)] if studies else []
    words += ["--storage", url] if url and url != os.environ.get("OPTUNA_STORAGE") else []
    return shlex.join(words)


def flag_name(flag: str) -> str:
    return flag.replace("_", "-")


def command(space: Space, trial: FrozenTrial, seed: int) -> str:
    """The trial as one would start it by hand."""
    words = ["--env-id", space.env, "--total-timesteps", str(space.steps), "--seed", str(seed)]
    words += space.entry(space.flags(trial.number, trial.params)).words
    return shlex.join([*PYTHON.split(), path_shown(space.script), *words])


# --------------------------------------------------------------------------------------------------------------- show


def show(study: optuna.Study, space: Space, folder: Path, url: str | None, figures: bool) -> None:
    """Print what a search tried and found; write trials.csv and, if wanted, the figures."""
    trials = study.get_trials(deepcopy=False)
    counts = Counter(x.state for x in trials)
    seeds = ", ".join(map(str, space.seeds))
    how = {"asha": f"asha from {space.grace:,} steps, 1 in {space.reduction} goes on", "none": "none"}
    how |= {"median": f"median from {space.grace:,} steps, after {space.startup} complete trials"}
    print(f"{space.name}: {space.script.name} on {space.env}, {space.steps:,} steps, seed {seeds}; {how[space.pruner]}")
    names = {"complete": TrialState.COMPLETE, "pruned": TrialState.PRUNED, "failed": TrialState.FAIL}
    names |= {"unfinished": TrialState.RUNNING, "waiting": TrialState.WAITING}
    print(", ".join(f"{counts[state]} {name}" for name, state in names.items() if counts[state]) or "no trial yet")
    spent = sum(x.user_attrs.get("outcome", {}).get("steps", 0) for x in trials)
    ended = counts[TrialState.COMPLETE] + counts[TrialState.PRUNED]
    whole = ended * space.steps * len(space.seeds)
    if counts[TrialState.PRUNED] and spent:
        print(f"{short(spent)} steps, not {short(whole)}: pruning made room for {whole / spent:.1f} times as many")
    where = Counter(x.user_attrs.get("outcome", {}).get("note", "") for x in trials if x.state == TrialState.PRUNED)
    if where:
        order = sorted(where, key=lambda note: (not note.startswith("at "), int(note[3:]) if note[:3] == "at " else 0))
        print("pruned: " + ", ".join(f"{where[note]} {note}" for note in order))
    for x in trials:
        if x.state == TrialState.FAIL:
            note = x.user_attrs.get("outcome", {}).get("note", "").splitlines() or ["?"]
            print(f"failed: trial {x.number}: " + ": ".join(dict.fromkeys([note[0], note[-1]])))

    ranking, leader = best_first(study), best(study)
    shares = importances(study, space)
    by_weight = sorted(space.dimensions, key=lambda x: -shares.get(x.flag, 0.0))
    digits = decimals(x.value for x in ranking)
    if ranking:
        rows = [["trial", "state", "value", *(flag_name(x.flag) for x in by_weight)]]
        listed = ranking[:TOP] + [x for x in ranking[TOP:] if x.number == 0]
        for x in listed:
            settings = space.settings(x.number, x.params)
            rows.append(
                [
                    str(x.number),
                    x.state.name.lower(),
                    f"{x.value:.{digits}f}",
                    *(shown(settings.get(d.flag, ...)) for d in by_weight),
                ]
            )
        print(f"\n{aligned(rows)}\n\ntrial 0 is {'the start' if space.start else 'the defaults'}")
    if shares:
        total = "importance: " + ", ".join(f"{flag_name(flag)} {share:.2f}" for flag, share in shares.items())
        print(f"{total} (of {len(ranking)} trials: a hint, not a measurement)")
    write_trials(study, space, folder)
    files = ["trials.csv"]
    if figures and len(ranking) > 1:
        files += draw(study, space, folder, ranking, by_weight, shares)
    print("written: " + ", ".join(path_shown(folder / name) for name in files))
    print(f"in the browser: uvx optuna-dashboard {url or path_shown(folder / 'study.journal')}")
    silent = [
        x.number for x in ranking if x.user_attrs.get("outcome", {}).get("last", math.inf) < 0.8 * (x.last_step or 0)
    ]
    if silent:
        told = f"in {len(silent)} trials, such as {silent[0]}, no episode ended in the last fifth of the steps"
        print(f"warning: {told}, so their values are old.", file=sys.stderr)
        hint = f"checkpoint-every = {space.steps} in [fixed] leaves them whole"
        print(f"    Each checkpoint cuts the running episodes, and long ones never end; {hint}", file=sys.stderr)
    if leader is None:
        print("no trial has been completed yet")
    else:
        best_is = f"best: trial {leader.number}, {leader.value:.{digits}f}"
        print(f"\n{best_is}. A search score is partly luck; the proof of it:\n    {again('validate', folder, url)}")
        print(f"as it was run:\n    {command(space, leader, space.seeds[0])}")


def draw(study, space: Space, folder: Path, ranking: list, by_weight: list[Dimension], shares: dict) -> list[str]:
    from tuner import plots  # matplotlib takes half a second

    by_number = sorted(ranking, key=lambda x: x.number)
    sign = -1 if space.direction == "minimize" else 1
    complete = [sign * x.value if x.state == TrialState.COMPLETE else -math.inf for x in by_number]
    leaders = sign * np.maximum.accumulate(complete)
    figures = {
        "history.svg": plots.history(space.name, by_number, np.where(np.isfinite(leaders), leaders, np.nan)),
        "curves.svg": plots.curves(space.name, by_number, best(study)),
        "slices.svg": plots.slices(space.name, space, by_number, by_weight, shares),
    }
    for name, drawing in figures.items():
        (folder / name).write_bytes(drawing)
    return list(figures)


# -------------------------------------------------------------------------------------------------------------- narrow


def narrow(study: optuna.Study, space: Space, seeds: int, out: Path) -> str:
    """A narrower space as TOML, for a file in the folder `out`: what mattered, in half its range around the best; the
    rest is fixed."""
    known = {x.param for x in space.dimensions}
    ranking = [x for x in best_first(study) if known <= x.params.keys()]  # not a default that lies outside
    leader = next(iter(ranking), None)
    if leader is None or leader.state != TrialState.COMPLETE or len(ranking) < 8:
        fail(f"{space.name} has {len(ranking)} trials to learn from; a search to be narrowed has at least 8", code=1)
    top = ranking[: max(4, math.ceil(QUARTER * len(ranking)))]
    shares = importances(study, space)
    values = [space.settings(x.number, x.params) for x in top]
    settings = space.settings(leader.number, leader.params)
    dimensions, settled, notes = [], {}, {}
    for x in space.dimensions:
        among, mine, share = [known[x.flag] for known in values], settings[x.flag], shares.get(x.flag, 1.0)
        told = f"importance {share:.2f}; the best {len(top)} have {span(x, among)}"
        default = space.defaults.get(x.flag, ...)
        if share < 0.5 / len(space.dimensions):
            is_fine = x.has(default) and (default in among if x.choices else min(among) <= default <= max(among))
            settled[x.flag] = default if is_fine else mine
            kept = "left at the default" if is_fine else "left at the best trial's value"
            notes[x.flag] = f"{told}: does not matter, {kept}"
        elif (new := narrowed(x, among, mine)) is None:
            settled[x.flag] = mine
            notes[x.flag] = f"{told}: they agree"
        else:
            dimensions.append(new)
            notes[x.flag] = f"{told}; it was {span(x, x.choices or [x.low, x.high])}"
    if not dimensions:
        fail(f"the best trials of {space.name} agree on everything: validate trial {leader.number}", code=1)
    first = max(space.seeds) // 100 * 100 + 101
    new = replace(
        space,
        name=f"{space.name}__narrow",
        trials=4 * len(dimensions),
        dimensions=tuple(dimensions),
        seeds=tuple(range(first, first + seeds)),
        pruner="none",
        settled=space.settled | settled,
        start={x.flag: settings[x.flag] for x in dimensions},
    )
    best_is = f"the best {leader.value:.{decimals([leader.value])}f} (trial {leader.number})"
    head = f"Narrowed from {space.name}: {len(ranking)} trials, {best_is}.\n"
    head += "To be read and edited before it runs. The first trial is the best one of that search."
    return spaces.write(new, out, notes, head)


def span(dimension: Dimension, values) -> str:
    if dimension.choices:
        return ", ".join(shown(x) for x in dimension.choices if x in values)
    return f"{shown(min(values))} to {shown(max(values))}"


def narrowed(x: Dimension, among: list, leader) -> Dimension | None:
    """Half the range, around the median of the best and with the leader in it; None where only one value is left."""
    if x.choices:
        left = tuple(choice for choice in x.choices if choice in among)
        return replace(x, choices=left) if len(left) > 1 else None
    space = x.distribution
    to_axis, back = (math.log, math.exp) if space.log else (float, float)
    points, at = [to_axis(x.to_param(value)) for value in among], to_axis(x.to_param(leader))
    low, high = to_axis(space.low), to_axis(space.high)
    width = (high - low) / 2
    begin = min(max(float(np.median(points)) - width / 2, low), high - width)
    begin = min(max(begin, at - width), at)
    ends = [back(begin), back(begin + width)]
    if isinstance(space, optuna.distributions.IntDistribution):
        ends = [max(space.low, math.floor(ends[0] + 1e-9)), min(space.high, math.ceil(ends[1] - 1e-9))]
    bottom, top = sorted(x.value(end) for end in ends)
    bottom, top = min(bottom, leader), max(top, leader)
    return replace(x, low=bottom, high=top) if bottom < top else None


# ------------------------------------------------------------------------------------------------------------ validate


def validate(study: optuna.Study, space: Space, folder: Path, seeds: range, number: int | None, args: run.Args) -> None:
    """Runs of a trial's setting and of the script's defaults on fresh seeds; the report about them."""
    told = study.user_attrs.get(OURS, {})
    if told.get("code") != code_hash(space.source):
        fail(f"the code of {space.script.name} has changed since the search; its best setting is of another script")
    if used := sorted(set(seeds) & set(space.seeds)):
        fail(f"seed {used[0]} was used in the search; choose another --first-seed")
    trials = {x.number: x for x in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))}
    if number is not None and number not in trials:
        fail(f"--trial is {number}, which is no complete trial of {space.name}")
    leader = trials[number] if number is not None else best(study)
    if leader is None:
        fail(f"{space.name} has no complete trial to validate", code=1)
    flags = space.flags(leader.number, leader.params)
    if all(key in space.fixed or space.defaults.get(key, ...) == x for key, x in flags.items()):
        print(f"the best trial of {space.name} has the script's defaults: there is nothing to validate")
        return
    arms = {"defaults": space.fixed, f"trial-{leader.number}": flags}
    jobs = [
        Run(arm, space.entry(flags), seed, folder / "validation" / arm / f"seed-{seed}")
        for seed in seeds
        for arm, flags in arms.items()
    ]
    for job in jobs:
        job.look(args.scripts)
    runner = Runner(jobs, slots_of(args), args, backend_of(args, [job.folder for job in jobs]))
    try:
        runner.work()
    except OSError as error:
        fail(f"{error}; what was made is intact, and the same command goes on", code=1)
    if not runner.display.live:
        print(runner.display.summary(None))
    for job in jobs:
        if job.state == "failed":
            print(f"failed: {job.name}: {job.note}; its log: {path_shown(job.beside('.log'))}", file=sys.stderr)
    if runner.stops:
        print(f"stopped; to go on: {shlex.join([sys.executable, *sys.argv])}", file=sys.stderr)
        raise SystemExit(130)
    if any(job.state != "done" for job in jobs):
        fail(f"{sum(job.state != 'done' for job in jobs)} runs are missing; the same command makes them", code=1)
    write_validation(space, folder, leader, arms, jobs)


def write_validation(space: Space, folder: Path, leader: FrozenTrial, arms: dict[str, dict], jobs: list[Run]) -> None:
    """validation.csv with a row per run, validation.json and validation.md; the report is printed too."""
    rows = []
    for job in jobs:
        result = json.loads((job.folder / "result.json").read_text())
        columns = (space.metric, "steps", "seconds", "eval_return_mean")
        rows.append([job.suite, job.seed, *("" if result.get(x) is None else result[x] for x in columns)])
    columns = ["setting", "seed", space.metric, "steps", "seconds", "eval_return_mean"]
    if space.metric == "eval_return_mean":
        columns, rows = columns[:-1], [row[:-1] for row in rows]
    write_csv(folder / "validation.csv", columns, rows)
    by_arm = {arm: np.array([float(row[2]) for row in rows if row[0] == arm]) for arm in arms}
    (_, defaults), (winner_name, winner) = by_arm.items()
    if not (np.isfinite(defaults).all() and np.isfinite(winner).all()):
        fail(f"{space.metric} is not finite in every run; see {path_shown(folder / 'validation.csv')}", code=1)
    sign = -1 if space.direction == "minimize" else 1
    improvement, between = stats.improvement([sign * winner], [sign * defaults])
    p = stats.rank_test(winner, defaults)
    is_better = sign * winner.mean() > sign * defaults.mean()
    verdict = "no difference found" if p > 0.05 else "better" if is_better else "worse"
    described = json.loads((jobs[0].folder / "args.json").read_text())
    found = {
        "study": space.name,
        "script": space.script.name,
        "env": space.env,
        "steps": space.steps,
        "metric": space.metric,
        "trial": leader.number,
        "search_value": leader.value,
        "search_seeds": list(space.seeds),
        "settings": {
            arm: {
                "flags": flags,
                "seeds": [job.seed for job in jobs if job.suite == arm],
                "scores": by_arm[arm].tolist(),
                "mean": by_arm[arm].mean(),
                "interval": stats.mean_interval(by_arm[arm]).tolist(),
            }
            for arm, flags in arms.items()
        },
        "difference": winner.mean() - defaults.mean(),
        "difference_interval": stats.difference_interval(defaults, winner).tolist(),
        "probability_of_improvement": improvement,
        "probability_interval": between.tolist(),
        "p": p,
        "verdict": verdict,
        "machine": {key: described.get(key) for key in ("cpu", "gpu", "commit")},
    }
    (folder / "validation.json").write_text(json.dumps(found, indent=2) + "\n")
    page = markdown(space, found, rows)
    (folder / "validation.md").write_text(page)
    print(f"\n{page}")
    files = ", ".join(path_shown(folder / f"validation.{kind}") for kind in ("md", "json", "csv"))
    print(f"written: {files}")


def markdown(space: Space, found: dict, rows: list[list]) -> str:
    """The report of a validation, for docs/."""
    (_, defaults), (name, winner) = found["settings"].items()
    seeds, digits = defaults["seeds"], decimals([*defaults["scores"], *winner["scores"]])

    def score(x: float, sign: str = "") -> str:
        return f"{x:{sign}.{digits}f}"

    def cell(numbers, digits: int = digits) -> str:
        return "[" + ", ".join(f"{x:.{digits}f}" for x in numbers) + "]"

    def line(label: str, name: str) -> str:
        arm = found["settings"][name]
        scores = arm["scores"]
        minutes = np.median([float(row[4] or 0) for row in rows if row[0] == name]) / 60
        return (
            f"| {label} | {len(scores)} | **{score(arm['mean'])}** {cell(arm['interval'])} "
            f"| {score(np.median(scores))} | {score(min(scores))} … {score(max(scores))} | {minutes:.1f} |"
        )

    new = {key: x for key, x in winner["flags"].items() if space.defaults.get(key, ...) != x}
    flags = {flag_name(key) if space.defaults else key: x for key, x in new.items()}
    entry = f'[[entry]]\nscript = "{space.script.stem}"\nenv = {toml(space.env)}\nsteps = {space.steps:_}\n'
    entry += "# target = a published score, or what counts as solved; not a score of these runs\n"
    entry += f'why = "..."\nflags = {toml(flags)}'
    differ = [
        f"| `--{flag_name(flag)}` | {shown(space.defaults.get(flag, ...))} | {shown(value)} |"
        for flag, value in new.items()
        if flag not in space.fixed
    ]
    fixed = " ".join(space.entry(space.fixed).words)
    machine = found["machine"]
    made = f"{machine['cpu'] or 'a machine that args.json does not name'}"
    if commit := machine["commit"]:
        made += f", commit `{commit[:7]}`{' with uncommitted changes' if commit.endswith('-dirty') else ''}"
    return "\n".join(
        [
            f"# {space.script.stem} on {space.env}, tuned",
            "",
            f"Trial {found['trial']} of the search `{space.name}` (value there {score(found['search_value'])}, on seed "
            f"{', '.join(map(str, found['search_seeds']))}) against the script's defaults, {space.steps:,} steps each, "
            f"on seeds {seeds[0]} to {seeds[-1]}, which the search has not seen."
            + (f" Both have `{fixed}`." if fixed else ""),
            "",
            f"| setting | seeds | {found['metric']}, mean [95 %] | median | worst … best | minutes |",
            "|---|---|---|---|---|---|",
            line(f"trial {found['trial']}", name),
            line("defaults", "defaults"),
            "",
            f"Difference {score(found['difference'], '+')} {cell(found['difference_interval'])}; probability that a "
            "run with the trial's setting scores above one with the defaults "
            f"{found['probability_of_improvement']:.2f} {cell(found['probability_interval'], 2)}; "
            f"rank test p = {found['p']:.3f}: **{found['verdict']}**.",
            "",
            "| flag | default | tuned |",
            "|---|---|---|",
            *differ,
            "",
            f"Made on {made}. The entry of a suite:",
            "",
            "```toml",
            entry,
            "```",
            "",
        ]
    )
