"""Finds good flags for a script on an environment, and proves them on seeds that the search has not seen.

    python tuner/run.py                             # a demonstration: PPO on CartPole, 20 short trials, two minutes
    python tuner/run.py search ppo                  # wide: many settings (spaces/ppo.toml), the poor ones cut short
    python tuner/run.py narrow LunarLander-v3__ppo      # writes narrow.toml: what mattered, around the best. Edit it
    python tuner/run.py search runs/tuner/LunarLander-v3__ppo/narrow.toml       # several seeds each, none cut short
    python tuner/run.py validate LunarLander-v3__ppo__narrow    # the winner against the defaults, ten fresh seeds each
    python tuner/run.py show LunarLander-v3__ppo        # what was tried, what mattered, plots, trials.csv

    python tuner/run.py search ppo --env-id my_package:My-v0 --total-timesteps 300000       # an environment of your own
    python tuner/run.py search ppo --storage postgresql://user@host/db      # started on as many machines as there are
    python tuner/run.py search ppo_atari --backend dstack --jobs 20         # each run on a rented machine, 20 at a time

Only the validation is a result: the best of many search scores is partly luck. Search spaces are described in
spaces.py, the study's folder in study.py, how workers share a study in search.py; docs/tuning.md tells the method.

Every command goes on where it was when it is started again, after Ctrl-C, kill -9 or a power cut. Exit code: 0 when it
did its work, 1 when runs failed (three trials in a row end a search), 2 for bad input, 130 when stopped.
"""

import os
import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import optuna
import tyro
from tyro.conf import Positional

from benchmark import run
from benchmark.run import backend_of, check, fail, shown
from benchmark.suites import SCRIPTS, SuiteError
from tuner import report, spaces
from tuner.search import Worker, run_folder
from tuner.study import load_study, locked, open_storage, open_study

RUNS = SCRIPTS.parent / "runs"
STUDIES = RUNS / "tuner"


@dataclass
class Place:
    """Where studies are."""

    studies: Path = STUDIES
    """folder of the studies' folders"""
    storage: str | None = field(default_factory=lambda: os.environ.get("OPTUNA_STORAGE"))
    """the database that has the trials, such as postgresql://user@host/db; by default $OPTUNA_STORAGE, else a file in
    the study's folder"""


@dataclass
class Machine:
    """How runs are made."""

    jobs: int | None = None
    """runs side by side; by default as many as cores / threads, or as fit on the GPUs; 10 in the cloud"""
    threads: int = 1
    """CPU threads of each run"""
    gpus: tuple[str, ...] = ()
    """GPUs to spread the runs over, such as 0 1; each run sees one"""
    runs_per_gpu: int = 1
    """runs side by side on each GPU"""
    device: Literal["cpu", "cuda"] | None = None
    """--device of every run; by default the script's own"""
    hang_after: float = 30.0
    """minutes without a sign in log and run folder after which a run is killed and counts as failed"""
    backend: Literal["local", "dstack"] = "local"
    """where the runs are made: on this machine, or on rented ones"""
    template: str = "auto"
    """what a rented machine is like: cpu, gpu, or a file as in cloud/; auto: by the script"""


@dataclass
class Search:
    """Try the settings of a search space; go on with the study if it is there."""

    space: Positional[str] = "demo"
    """a search space by name (tuner/spaces/), the path of a TOML file, or the folder of a study to go on with"""
    env_id: str | None = None
    """another environment than the space's"""
    total_timesteps: int | None = None
    """another budget of a run"""
    trials: int | None = None
    """another number of settings to try"""
    seeds: int | None = None
    """another number of runs per setting"""
    pruner: Literal["asha", "median", "none"] | None = None
    """another way to cut runs short"""
    name: str | None = None
    """another name of the study; by default {env}__{space}"""
    minutes: float = 1e9
    """stop after so many minutes; the same command goes on"""
    orphaned_after: float = 120.0
    """seconds without a sign from a worker on another machine after which its trials are taken over"""
    place: tyro.conf.OmitArgPrefixes[Place] = field(default_factory=Place)
    machine: tyro.conf.OmitArgPrefixes[Machine] = field(default_factory=Machine)


@dataclass
class Narrow:
    """Write a narrower search space from a finished search."""

    study: Positional[str]
    """a study by name or folder"""
    out: Path | None = None
    """the file; by default narrow.toml in the study's folder"""
    seeds: int = 3
    """runs per setting in the narrow search"""
    place: tyro.conf.OmitArgPrefixes[Place] = field(default_factory=Place)


@dataclass
class Validate:
    """Run the best setting and the script's defaults on fresh seeds."""

    study: Positional[str]
    """a study by name or folder"""
    seeds: int = 10
    """seeds of each, from --first-seed on"""
    first_seed: int = 1001
    """the first of them"""
    trial: int | None = None
    """this trial's setting instead of the best"""
    place: tyro.conf.OmitArgPrefixes[Place] = field(default_factory=Place)
    machine: tyro.conf.OmitArgPrefixes[Machine] = field(default_factory=Machine)


@dataclass
class Show:
    """Tell what a search tried and found; draw it, and write trials.csv."""

    study: Positional[str]
    """a study by name or folder"""
    place: tyro.conf.OmitArgPrefixes[Place] = field(default_factory=Place)


def study_folder(name: str, place: Place) -> Path:
    return Path(name) if (Path(name) / "space.toml").exists() else place.studies / name


def runner_args(space: spaces.Space, folder: Path, machine: Machine) -> run.Args:
    """What the benchmark's runner wants to know. Runs get their names on the Hub from their place below runs/, or of a
    study that lies elsewhere from that below its --studies' parent."""
    folder = folder.resolve()
    runs_dir = RUNS if folder.is_relative_to(RUNS) else folder.parent.parent
    args = run.Args(suites=(), scripts=space.script.parent, runs_dir=runs_dir, **vars(machine))
    check(args)
    return args


def line_up(study: optuna.Study, space: spaces.Space, folder: Path) -> None:
    """Have all trials wait in the storage. Should two machines do it at once, there are more than enough, and the
    surplus is never taken."""
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        (folder / "space.toml").write_text(spaces.write(space, folder, {}))
        for _ in range(space.trials - len(study.get_trials(deepcopy=False))):
            study.enqueue_trial({})


def search(args: Search) -> None:
    for name in ("minutes", "orphaned_after"):
        if not getattr(args, name) > 0:
            fail(f"--{name.replace('_', '-')} is {getattr(args, name)}; it is above 0")
    changes = {"env": args.env_id, "steps": args.total_timesteps, "trials": args.trials, "seeds": args.seeds}
    space = spaces.load(args.space, **changes, pruner=args.pruner, name=args.name)
    is_study = (Path(args.space) / "space.toml").exists()  # which goes on where it lies
    folder = (Path(args.space).resolve().parent if is_study else args.place.studies) / space.name
    runner = runner_args(space, folder, args.machine)
    backend = backend_of(runner, [run_folder(folder, space.trials - 1, seed) for seed in space.seeds])
    dimensions = len(space.dimensions)
    if space.trials < 3 * dimensions:
        few = f"{space.trials} trials are few for {dimensions} flags; {3 * dimensions} to {4 * dimensions} are sensible"
        print(f"warning: {few}", file=sys.stderr)
    try:
        storage = open_storage(args.place.storage, folder, create=True)
        study = open_study(space, storage)
        line_up(study, space, folder)
        worker = Worker(study, storage, space, folder, runner, backend, args.orphaned_after, args.minutes)
        worker.work()
    except (OSError, optuna.exceptions.StorageInternalError) as error:
        fail(f"{error}; what was made is intact, and the same command goes on", code=1)
    print()
    report.show(study, space, folder, args.place.storage, figures=False)
    if worker.broken:
        fail("three trials in a row failed; the last lines of their logs are above. The search has stopped", code=1)
    if worker.stops:
        print(f"stopped; to go on: {shlex.join([sys.executable, *sys.argv])}", file=sys.stderr)
        raise SystemExit(130)


def narrow(args: Narrow) -> None:
    if args.seeds < 1:
        fail(f"--seeds is {args.seeds}; it is at least 1")
    folder = study_folder(args.study, args.place)
    study, space = load_study(folder, args.place.storage)
    path = args.out or folder / "narrow.toml"
    if path.exists():
        fail(f"{path} is there already; --out names another file")
    path.write_text(report.narrow(study, space, args.seeds, path.parent))
    print(path.read_text())
    print(f"written: {shown(path)}. Read it, edit it, and run it:")
    studies = folder.resolve().parent
    print(f"    {report.again('search', path, args.place.storage, studies if studies != STUDIES else None)}")


def validate(args: Validate) -> None:
    if args.seeds < 1 or args.first_seed < 0:
        fail(f"--seeds is {args.seeds} and --first-seed {args.first_seed}; they are at least 1 and 0")
    folder = study_folder(args.study, args.place)
    study, space = load_study(folder, args.place.storage)
    seeds = range(args.first_seed, args.first_seed + args.seeds)
    if args.seeds < 4:
        print(f"warning: with {args.seeds} seeds each no difference is ever found; it takes 4", file=sys.stderr)
    report.validate(study, space, folder, seeds, args.trial, runner_args(space, folder, args.machine))


def show(args: Show) -> None:
    folder = study_folder(args.study, args.place)
    study, space = load_study(folder, args.place.storage)
    report.show(study, space, folder, args.place.storage, figures=True)


def main() -> None:
    words = sys.argv[1:] or ["search"]
    commands = Search | Narrow | Validate | Show
    args = tyro.cli(commands, args=words, prog=f"python {sys.argv[0]}", description=__doc__)
    try:
        {Search: search, Narrow: narrow, Validate: validate, Show: show}[type(args)](args)
    except SuiteError as error:
        fail(str(error))
    except KeyboardInterrupt:
        fail("stopped", code=130)


if __name__ == "__main__":
    main()
