"""A study on disk or in a database: opened, checked to be the same search, and read.

A study's folder is runs/tuner/{name}/:

    space.toml              what is searched, as it was read; `search` with this folder goes on from it
    study.journal           Optuna's record of all trials, unless they are in a database
    trials/{number}/        a run folder and a log per seed
    trials.csv, *.svg       what `show` makes of them

The journal is locked with flock: the lock of a worker that is killed is gone with it, and what such a worker or a power
cut left of a half-written line is removed by the next one to write.
"""

import fcntl
import math
import os
import time
from contextlib import contextmanager
from pathlib import Path

import optuna
from optuna.importance import PedAnovaImportanceEvaluator
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from benchmark.collect import write_csv
from benchmark.run import fail
from benchmark.suites import code_hash
from tuner.spaces import Space, load

optuna.logging.set_verbosity(optuna.logging.ERROR)
OURS = "folio"  # key of what we record with a study
PATIENCE = 20  # seconds that a database has to answer
ENDED = TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL


class JournalLock:
    """The lock that Optuna holds while it adds to the journal."""

    def __init__(self, path: Path):
        self.path, self.file = path, None

    def acquire(self) -> bool:
        self.file = self.path.with_name(self.path.name + ".lock").open("a")
        fcntl.flock(self.file, fcntl.LOCK_EX)
        with self.path.open("rb+") as journal:
            size = journal.seek(0, os.SEEK_END)
            journal.seek(max(0, size - 1))
            if size and journal.read() != b"\n":
                journal.seek(0)
                journal.truncate(journal.read().rfind(b"\n") + 1)
        return True

    def release(self) -> None:
        self.file.close()


def open_storage(url: str | None, folder: Path, create: bool = False) -> BaseStorage:
    """The database at this address; without one, the journal in the study's folder."""
    if not url:
        path = folder / "study.journal"
        if not path.exists() and not create:
            there = sorted(x.parent.name for x in folder.parent.glob("*/space.toml"))
            known = f"there are {', '.join(there)}" if there else "there is none yet"
            fail(f"{folder} is no study; {known}. One in a database takes --storage")
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            return JournalStorage(JournalFileBackend(str(path), lock_obj=JournalLock(path)))
        except (ValueError, KeyError) as error:
            fail(f"{path} is damaged: {error}")
    for prefix in ("postgres://", "postgresql://"):
        if url.startswith(prefix):
            url = f"postgresql+psycopg://{url.removeprefix(prefix)}"
    from sqlalchemy.exc import (
        IntegrityError,
        ProgrammingError,
        SQLAlchemyError,
    )  # 0.3 s that the journal can do without

    engine = {"pool_pre_ping": True}
    if url.startswith("postgresql"):
        engine["connect_args"] = {"connect_timeout": PATIENCE}
    for attempt in range(10):
        try:
            return RDBStorage(url, engine_kwargs=engine)
        except ImportError as error:
            fail(f"--storage needs a package that is missing: {error}. For PostgreSQL: pip install -e '.[postgres]'")
        except (
            IntegrityError,
            ProgrammingError,
        ) as error:  # of two workers that make the tables at once, the later one
            reason = error
            time.sleep(0.2 * attempt)
        except SQLAlchemyError as error:
            reason = error
            break
    fail(f"--storage cannot be opened: {str(reason).splitlines()[0]}")


def open_study(space: Space, storage: BaseStorage) -> optuna.Study:
    """The space's study, made or gone on with. Another search under the same name is an error, not a mixture."""
    try:
        study = optuna.load_study(study_name=space.name, storage=storage)
    except KeyError:
        how = {"direction": space.direction, "load_if_exists": True}  # another worker may be as far as we are
        study = optuna.create_study(study_name=space.name, storage=storage, **how)
    ours = space.described | {"code": code_hash(space.source)}
    had = study.user_attrs.get(OURS)
    if had is None and study.get_trials(deepcopy=False):
        fail(f"study {space.name} was not made by the tuner; choose another --name")
    if had is None:
        study.set_user_attr(OURS, ours)
        had = study.user_attrs[OURS]  # of two workers that begin it at once, both see the later one's
    for key, value in ours.items():
        if had.get(key) != value:
            change = "has changed since" if key == "code" else f"was {had.get(key)} and is {value} now"
            what = f"the code of {space.script.name}" if key == "code" else key
            fail(f"study {space.name} is another search: {what} {change}. Choose another --name")
    return study


def load_study(folder: Path, url: str | None) -> tuple[optuna.Study, Space]:
    """A study that is there, and its space."""
    storage, space = open_storage(url, folder), load(folder)
    try:
        return optuna.load_study(study_name=space.name, storage=storage), space
    except KeyError:
        fail(f"there is no study {space.name} in {url or folder / 'study.journal'}")


# ------------------------------------------------------------------------------------------------ what the trials say


def best_first(study: optuna.Study) -> list[FrozenTrial]:
    """Trials that have a value: the complete ones by value, then the pruned ones by how far they came, and by value."""
    sign = 1 if study.direction == optuna.study.StudyDirection.MINIMIZE else -1

    def place(trial: FrozenTrial) -> tuple:
        pruned = trial.state == TrialState.PRUNED
        return pruned, -(trial.last_step or 0) if pruned else 0, sign * trial.value, trial.number

    trials = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))
    return sorted((x for x in trials if x.value is not None and math.isfinite(x.value)), key=place)


def best(study: optuna.Study) -> FrozenTrial | None:
    trials = best_first(study)
    return trials[0] if trials and trials[0].state == TrialState.COMPLETE else None


def importances(study: optuna.Study, space: Space) -> dict[str, float]:
    """How much each flag told good settings from bad ones, as shares of 1 (PED-ANOVA, arXiv:2304.10255).

    Optuna looks at complete trials alone, of which pruning leaves few. Here all count, by their place in `best_first`.
    """
    known = {x.param: x.distribution for x in space.dimensions}
    ranks, trials = optuna.create_study(), best_first(study)
    for place, trial in enumerate(trials):
        if trial.params.keys() == known.keys():
            params = {name: trial.params[name] for name in known}
            ranks.add_trial(optuna.trial.create_trial(params=params, distributions=known, value=float(place)))
    if len(ranks.trials) < 8:
        return {}
    evaluator = PedAnovaImportanceEvaluator(target_quantile=min(0.5, max(0.1, 5 / len(ranks.trials))))
    shares = optuna.importance.get_param_importances(ranks, evaluator=evaluator)
    flags = {x.param: x.flag for x in space.dimensions}
    return {flags[name]: share for name, share in sorted(shares.items(), key=lambda x: -x[1])}


def shown(value) -> str:
    """A flag's value as one would write it; ... is one that is not known."""
    return "?" if value is ... else f"{value:.6g}" if isinstance(value, float) else str(value)


@contextmanager
def locked(folder: Path):
    """What only one worker may do at a time."""
    with (folder / "study.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def write_trials(study: optuna.Study, space: Space, folder: Path) -> None:
    """trials.csv, with a row for each trial that was begun."""
    flags = [x.flag for x in space.dimensions]
    columns = ["trial", "state", "value", "last_step", "steps", "seconds", *flags, "values", "started", "note"]
    rows = []
    for x in study.get_trials(deepcopy=False):
        if x.state == TrialState.WAITING:
            continue
        outcome, settings = x.user_attrs.get("outcome", {}), space.settings(x.number, x.params)
        row = {"trial": x.number, "state": x.state.name.lower(), "value": x.value, "last_step": x.last_step}
        row |= {name: outcome.get(name) for name in ("steps", "seconds", "note")}
        row |= {"values": " ".join(map(str, outcome.get("values", [])))}
        row |= {"started": f"{x.datetime_start:%Y-%m-%d %H:%M:%S}" if x.datetime_start else None}
        row |= {flag: str(settings[flag]) if flag in settings else None for flag in flags}
        rows.append(["" if row[name] is None else row[name] for name in columns])
    with locked(folder):
        write_csv(folder / "trials.csv", columns, rows)
