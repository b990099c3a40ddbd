"""Search good hyperparameters for a script, and validate them on fresh seeds.

    python tuner/run.py                             # a demonstration: PPO on CartPole, 20 short trials
    python tuner/run.py search ppo                  # many settings (tuner/spaces/ppo.toml), the poor ones pruned
    python tuner/run.py search ppo --env-id my_package:My-v0 --total-timesteps 300000 --minutes 480    # yours, tonight
    python tuner/run.py show LunarLander-v3__ppo    # what was tried, what mattered, plots
    python tuner/run.py narrow LunarLander-v3__ppo  # write narrow.toml: what mattered, around the best. Edit it
    python tuner/run.py search runs/tuner/LunarLander-v3__ppo/narrow.toml       # three seeds each, no pruning
    python tuner/run.py validate LunarLander-v3__ppo__narrow    # the winner against the defaults, ten fresh seeds each
    python tuner/run.py search ppo --storage postgresql://user@host/db          # the same command on many machines

Every command continues where it was when it is started again, after Ctrl-C, kill -9, or a power cut. Exit code: 0; 1 if
runs failed (three trials in a row stop a search), 2 for bad input, 130 if interrupted. docs/tuning.md has the method.
"""

import shlex
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import optuna
import pandas as pd
import tyro
from tyro.conf import Positional

from benchmark.runner import TICK, Job, Local, Runner, find_gpus, slots, uses_gpu
from benchmark.runs import RUNS, fail, read_args, shown
from benchmark.suites import SuiteError
from tuner.narrow import narrow
from tuner.spaces import Space, load, seeds_of
from tuner.study import Locks, best, importances, load_study, open_storage, open_study, ranking
from tuner.validate import choose, validate
from tuner.worker import BAD_INPUT, FAILURES, Worker, first_flags


@dataclass(kw_only=True)
class Place:
    studies: Path = RUNS / "tuner"  # folder of the studies' folders
    storage: str | None = None  # postgresql://user@host/db, a database; default: $OPTUNA_STORAGE, or a file


@dataclass(kw_only=True)
class Machine(Place):
    jobs: int | None = None  # runs side by side; default: as many as fit on the cores or GPUs
    threads: int = 1  # CPU threads of each run
    gpus: tuple[str, ...] = ()  # GPUs by number or id; default: all that are visible, if the script uses one
    runs_per_gpu: int = 1  # runs side by side on each GPU
    device: Literal["cpu", "cuda"] | None = None  # --device of every run; default: the script's own

    def runner(self, space: Space) -> Runner:
        if min(x for x in (self.jobs, self.threads, self.runs_per_gpu) if x is not None) < 1:
            fail("--jobs, --threads and --runs-per-gpu must be at least 1")
        gpus = find_gpus(self.gpus) if uses_gpu(space.path, self.device) else []
        return Runner([], slots(self.jobs, self.threads, gpus, self.runs_per_gpu), Local(), self.threads, self.device)


@dataclass(kw_only=True)
class Search(Machine):
    """Try the settings of a search space, or continue to."""

    space: Positional[str] = "demo"  # a search space by name (tuner/spaces/), or a TOML file
    env_id: str | None = None  # another environment
    total_timesteps: int | None = None  # another budget of a run
    trials: int | None = None  # another number of trials
    seeds: str | None = None  # runs per trial: 3 for seeds 101 to 103, or seeds such as 101,105-107
    pruner: str | None = None  # another pruner: asha, median or none
    name: str | None = None  # name of the study; default: {env}__{space}
    minutes: float = float("inf")  # stop after so many minutes; the same command continues
    dry_run: bool = False  # print the commands of the first trials and start nothing

    def __call__(self) -> None:
        changes = {key: getattr(self, key) for key in ("trials", "seeds", "pruner", "name")}
        changes |= {"env": self.env_id, "steps": self.total_timesteps}
        space = load(self.space, {key: value for key, value in changes.items() if value is not None})
        runner, folder = self.runner(space), self.studies / space.name
        if self.dry_run:
            for flags in first_flags(space, 10):
                print(shlex.join(["python", shown(space.path), *space.spec(flags, seeds_of(space.seeds)[0]).words]))
            return
        try_out(space, runner)
        try:
            storage = open_storage(self.storage, folder, create=True)
            study = open_study(space, storage, folder)
            worker = Worker(study, space, Locks(folder, storage), runner)
            worker.work(self.minutes)
            summarize(study, space, folder)
        except (OSError, optuna.exceptions.StorageInternalError) as error:
            fail(f"{str(error).splitlines()[0]}; nothing finished is lost, the same command resumes", code=1)
        if runner.stops:
            fail(f"stopped; to resume: {shlex.join([sys.executable, *sys.argv])}", code=130)
        if worker.failures >= FAILURES:
            fail(f"{FAILURES} trials in a row failed. To start over: another --name, or rm -r {shown(folder)}", code=1)


def try_out(space: Space, runner: Runner) -> None:
    """Start the script with two settings until it has made its environment and run folder. Mistakes end here."""
    runner.display = SimpleNamespace(event=lambda job: None, refresh=lambda: None)  # the worker reports trials
    with tempfile.TemporaryDirectory() as folder:
        for number, flags in enumerate(first_flags(space, 2)):
            job = Job("try-out", space.spec(flags, seeds_of(space.seeds)[0], Path(folder, str(number))))
            runner.jobs = [job]
            runner.start(job, runner.free[0])
            while job.handle:
                if read_args(job.spec.folder):
                    job.handle.stop(force=True)
                runner.watch()
                time.sleep(TICK)
            if not read_args(job.spec.folder):
                lines = (line for line in job.last_lines() if line[:2] not in ("# ", "$ "))
                lines = (line.strip("│╭╰╮╯─ ").removeprefix("error: ") for line in lines)
                why = (" " if job.code == BAD_INPUT else "\n    ").join(filter(None, lines))
                fail(f"{space.path.name} {shlex.join(job.spec.words)}: {why}", 2 if job.code == BAD_INPUT else 1)
    runner.jobs = []


def summarize(study: optuna.Study, space: Space, folder: Path) -> None:
    """Print what a search found, and write trials.csv."""
    trials, ranked, leader = study.trials_dataframe(), ranking(study), best(study)
    trials.to_csv(folder / "trials.csv", index=False)
    counts = pd.Series([x.state.name.lower() for x in study.trials], dtype=str).value_counts()
    print(f"\n{space.name}: {', '.join(f'{n} {state}' for state, n in counts.items())}; {shown(folder)}/trials.csv")
    if leader is None:
        return print("no trial is complete yet")
    shares = importances(study, space)
    flags = sorted((x.flag for x in space.dimensions), key=lambda flag: -shares.get(flag, 0))
    chosen = [x for place, x in enumerate(ranked) if place < 8 or x.number == 0]
    rows = [(x.number, x.state.name.lower(), x.value, *map(space.settings(x).get, flags)) for x in chosen]
    table = pd.DataFrame(rows, columns=["trial", "state", "value", *flags])
    print(f"\n{table.to_string(index=False, float_format=lambda x: f'{x:.4g}')}\n")
    if shares:
        print("importance:", ", ".join(f"{flag} {x:.2f}" for flag, x in shares.items()), "(a hint, not a measurement)")
    tuned = sum(not x.distribution.single() for x in space.dimensions)
    if len(ranked) < 2 * tuned or counts["complete"] < min(3, len(ranked)):
        print(f"too small to conclude: {counts['complete']} of {len(ranked)} trials are complete, for {tuned} flags.")
        print("Use 3 to 4 trials for each flag, --pruner median or none, or a larger grace.")
    command = shlex.join(space.spec(space.flags(leader), seeds_of(space.seeds)[0]).words)
    print(f"\nbest: trial {leader.number}, {leader.value:.4g}\n    python {shown(space.path)} {command}")
    if leader.number == 0:
        return print("That is the first trial: the search found nothing better than its start.")
    print(f"Its score is partly luck. To prove it on fresh seeds:\n    python tuner/run.py validate {shown(folder)}")


@dataclass(kw_only=True)
class Show(Place):
    """Show what a search tried and found; draw Optuna's plots, and write trials.csv."""

    study: Positional[str]  # a study by name or folder

    def __call__(self) -> None:
        from matplotlib import pyplot  # half a second
        from optuna.visualization import matplotlib as plots

        study, space, folder = load_study(self.study, self.studies, self.storage)
        summarize(study, space, folder)
        pyplot.switch_backend("agg")
        warnings.simplefilter("ignore")  # Optuna's plots are called experimental
        for name in ("optimization_history", "intermediate_values", "slice"):
            getattr(plots, f"plot_{name}")(study)
            pyplot.savefig(folder / f"{name}.png", dpi=120, bbox_inches="tight")
            print(f"written: {shown(folder / name)}.png")


@dataclass(kw_only=True)
class Narrow(Place):
    """Write a narrower search space from a finished search."""

    study: Positional[str]  # a study by name or folder

    def __call__(self) -> None:
        study, space, folder = load_study(self.study, self.studies, self.storage)
        path = folder / "narrow.toml"
        if path.exists():
            fail(f"{shown(path)} exists; move it away first")
        path.write_text(narrow(study, space))
        print(f"{path.read_text()}\nRead it, edit it, and run it:\n    python tuner/run.py search {shown(path)}")


@dataclass(kw_only=True)
class Validate(Machine):
    """Run the best trial and the script's defaults on fresh seeds."""

    study: Positional[str]  # a study by name or folder
    seeds: str = "10"  # of each, at least 4: 10 for 1001 to 1010, or a list such as 1001,1005-1007
    trial: int | None = None  # another trial than the best

    def __call__(self) -> None:
        study, space, folder = load_study(self.study, self.studies, self.storage)
        seeds = seeds_of(self.seeds, first=1001)
        validate(space, choose(study, space, seeds, self.trial), folder, seeds, self.runner(space))


def main() -> None:
    words = sys.argv[1:] or ["search"]
    try:
        tyro.cli(Search | Show | Narrow | Validate, args=words, prog="python tuner/run.py", description=__doc__)()
    except SuiteError as error:
        fail(str(error))
    except KeyboardInterrupt:
        fail("stopped", code=130)


if __name__ == "__main__":
    main()
