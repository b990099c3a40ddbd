"""Validation: the best trial of a search against the script's defaults, on seeds that the search has not seen.

Only this is a result. The best of many noisy scores is partly luck, so a search overestimates its winner.
"""

import shlex
from pathlib import Path

import numpy as np
import optuna
import pandas as pd
from optuna.trial import FrozenTrial, TrialState

from benchmark import stats
from benchmark.compare import verdict
from benchmark.runner import Job, Runner
from benchmark.runs import fail, move_aside, read_result, shown
from tuner.narrow import toml
from tuner.spaces import Space, seeds_of
from tuner.study import ranking


def choose(study: optuna.Study, space: Space, seeds: list[int], number: int | None) -> FrozenTrial:
    """The trial to validate. An error if that would not show anything."""
    if used := set(seeds) & set(seeds_of(space.seeds)):
        fail(f"the search has seen seed {min(used)}; choose other --seeds")
    if not stats.can_differ(len(seeds), len(seeds)):
        fail(f"{len(seeds)} seeds are too few for the rank test; give at least 4")
    complete = [x for x in ranking(study) if x.state == TrialState.COMPLETE]
    trials = [x for x in complete if number in (None, x.number)]
    if not trials:
        fail(f"{space.name} has no such trial that is complete")
    if not changed(space, trials[0]):
        other = next((f"--trial {x.number}, {x.value:.4g}" for x in complete if changed(space, x)), "none is complete")
        fail(f"trial {trials[0].number} has the script's defaults: nothing to validate. The best other trial: {other}")
    return trials[0]


def changed(space: Space, trial: FrozenTrial) -> dict:
    """The flags of a trial that differ from the script's defaults."""
    return {key: x for key, x in space.flags(trial).items() if x != (space.defaults | space.fixed)[key]}


def validate(space: Space, trial: FrozenTrial, folder: Path, seeds: list[int], runner: Runner) -> None:
    """Make the runs and write validation-{trial}.csv and validation-{trial}.md."""
    for seed in seeds:
        for arm, flags in {"defaults": space.fixed, f"trial-{trial.number}": space.flags(trial)}.items():
            spec = space.spec(flags, seed, folder / "validation" / arm / f"seed-{seed}")
            runner.jobs.append(Job(f"{arm}/seed-{seed}", spec, on_gpu=any(runner.free)))
    runner.rerun_stale = True  # of a script that has changed since; those runs are moved aside
    runner.work()
    if (code := runner.report()) or any(job.state != "done" for job in runner.jobs):
        fail("runs are missing; the same command makes them", code or 1)
    folders = {(x.folder.parent.name, x.flags["seed"]): x.folder for x in (job.spec for job in runner.jobs)}
    rows = [{"arm": arm, "seed": seed, "folder": shown(x)} | read_result(x) for (arm, seed), x in folders.items()]
    table = pd.DataFrame(rows)
    if table[space.metric].isna().any():
        fail(f"{space.metric} is missing in some runs: {shown(folder / 'validation')}", code=1)
    page = report(space, trial, table)
    print(f"\n{page}")
    for ending, text in {"csv": table.to_csv(index=False), "md": page}.items():
        path = folder / f"validation-{trial.number}.{ending}"
        if path.exists() and path.read_text() != text:  # of other seeds
            print(f"moved aside: {shown(move_aside(path))}")
        path.write_text(text)
        print(f"written: {shown(path)}")


def report(space: Space, trial: FrozenTrial, table: pd.DataFrame) -> str:
    """The page: the verdict, the flags, and how to use them."""
    arms = {arm: rows[space.metric].to_numpy(float) for arm, rows in table.groupby("arm")}
    defaults, tuned = arms.values()  # in the order of the alphabet
    difference, around = tuned.mean() - defaults.mean(), stats.difference_interval(defaults, tuned)
    chance, above = stats.improvement([tuned], [defaults])
    p = stats.rank_test(tuned, defaults)
    word, agree = verdict(defaults, tuned), (p > stats.ALPHA) == (around[0] <= 0 <= around[1])
    note = "" if agree else "\nThe test, of ranks, and the interval, of means, disagree: look at each run.\n"
    scores = []
    for arm, x in arms.items():
        median, lowest, highest = map(stats.form, np.quantile(x, [0.5, 0, 1]))
        scores.append(f"| {arm} | {len(x)} | {stats.with_interval(x)} | {median} | {lowest} to {highest} |")
    agent = table[table["arm"] != "defaults"].sort_values("eval_return_mean").iloc[-1]
    entry = {"script": space.script, "env": space.env, "steps": space.steps}
    entry["flags"] = {key.replace("_", "-"): x for key, x in (space.fixed | changed(space, trial)).items()}
    script, nl = shown(space.path), "\n"
    return f"""# {space.path.stem} on {space.env}: trial {trial.number} against the defaults

**{word.capitalize()}**: difference {stats.form(difference)}{stats.between(around)}, rank test p = {p:.3f};
probability that a run of the trial beats one with the defaults {chance:.2f}{stats.between(above, stats.fraction)}.
{note}
| arm | seeds | {space.metric}, mean [95 %] | median | lowest to highest |
|---|---|---|---|---|
{nl.join(scores)}

{space.steps:,} steps, seeds from {table["seed"].min()} on. In the search the trial had {stats.form(trial.value)}.

Train with these flags:

    python {script} {shlex.join(space.spec(space.flags(trial), 1).words)}

The best agent of the trial, from seed {agent["seed"]} (evaluation {stats.form(agent["eval_return_mean"])}):

    python {script} --evaluate {agent["folder"]}

The entry of a suite:

```toml
[[entry]]
{nl.join(f"{key} = {toml(x)}" for key, x in entry.items())}
```
"""
