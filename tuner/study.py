"""A study: opened, locked, and read. Its folder, runs/tuner/{name}/, has study.journal (Optuna's record of all trials,
unless they are in PostgreSQL) and trials/{number}/seed-{seed}/ (run folders, with a log beside each)."""

import fcntl
import math
import os
import time
from dataclasses import asdict
from pathlib import Path

import optuna
from optuna.importance import PedAnovaImportanceEvaluator
from optuna.pruners import MedianPruner, NopPruner, SuccessiveHalvingPruner
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from benchmark.runs import code_hash, fail, shown, take_lock
from tuner.spaces import Space, read

optuna.logging.set_verbosity(optuna.logging.ERROR)
KEEPALIVE = "-c tcp_keepalives_idle=30 -c tcp_keepalives_interval=10 -c tcp_keepalives_count=3"


class JournalLock:
    """Held by Optuna while it appends to the journal. Unlike Optuna's own it dies with its process, and the next one
    removes the line that a killed process left unfinished."""

    def __init__(self, path: Path) -> None:
        self.path, self.file = path, None

    def acquire(self) -> bool:
        self.file = self.path.with_name(self.path.name + ".lock").open("a")
        fcntl.flock(self.file, fcntl.LOCK_EX)
        os.truncate(self.path, self.path.read_bytes().rfind(b"\n") + 1)
        return True

    def release(self) -> None:
        self.file.close()


class Locks:
    """What a worker owns: trials, and the right to take one. A lock dies with its owner, however that ends.

    It is a locked file, and with PostgreSQL also an advisory lock of the server, for workers on other machines. (With
    Optuna's heartbeats, a worker that dies before the first one, or while it requeues another's trial, loses a trial.)
    """

    def __init__(self, folder: Path, storage: BaseStorage) -> None:
        self.folder, self.connection = folder, None
        if isinstance(storage, RDBStorage):
            self.connection = storage.engine.connect().execution_options(isolation_level="AUTOCOMMIT")

    def ask(self, question: str) -> bool:
        """Ask the server. An error if it is gone, and our locks with it."""
        try:
            return not self.connection or self.connection.exec_driver_sql(f"SELECT {question}").scalar()
        except Exception as error:  # of a package that is imported only where there is a server
            raise ConnectionError(str(error)) from None

    def take(self, what: int | str) -> int | None:
        """A file descriptor; None if another worker has the lock."""
        lock = take_lock(self.folder / "trials" / f"{what}.lock")
        if lock is not None and not self.ask(f"pg_try_advisory_lock(hashtextextended('{self.folder.name}/{what}', 0))"):
            os.close(lock)
            return None
        return lock

    def give(self, what: int | str, lock: int) -> None:
        self.ask(f"pg_advisory_unlock(hashtextextended('{self.folder.name}/{what}', 0))")
        (self.folder / "trials" / f"{what}.lock").unlink(missing_ok=True)
        os.close(lock)


def open_storage(url: str | None, folder: Path, create: bool = False) -> BaseStorage:
    """The PostgreSQL database at `url` or $OPTUNA_STORAGE; without one, the journal in the study's folder."""
    if not (url := url or os.environ.get("OPTUNA_STORAGE")):
        path = folder / "study.journal"
        if not path.exists() and not create:
            names = ", ".join(sorted(x.parent.name for x in folder.parent.glob("*/study.journal")))
            fail(f"no study in {shown(folder)}; there is {names or 'none'}. One in a database needs --storage")
        folder.mkdir(parents=True, exist_ok=True)
        return JournalStorage(JournalFileBackend(str(path), lock_obj=JournalLock(path)))
    url = url.replace("postgresql://", "postgresql+psycopg://", 1)
    engine = {"pool_pre_ping": True, "connect_args": {"connect_timeout": 10, "options": KEEPALIVE}}
    for _ in range(3):  # of two workers that create the tables at once, one has to try again
        try:
            return RDBStorage(url, engine_kwargs=engine)
        except Exception as error:  # of SQLAlchemy or the driver
            reason = str(error).splitlines()[0]
            time.sleep(0.3)
    fail(f"--storage: {reason}. It takes postgresql://user:password@host/database, and pip install -e '.[postgres]'")


def open_study(space: Space, storage: BaseStorage, folder: Path) -> optuna.Study:
    """The space's study, new or continued. Another search under the same name is an error."""
    pruner = {
        "asha": SuccessiveHalvingPruner(min_resource=space.grace, reduction_factor=space.reduction),
        "median": MedianPruner(n_warmup_steps=space.grace),
        "none": NopPruner(),
    }[space.pruner]
    how = {"direction": "maximize", "pruner": pruner, "load_if_exists": True}
    study = optuna.create_study(study_name=space.name, storage=storage, **how)
    ours = asdict(space) | {"code": code_hash(space.path.read_text())}
    if not study.get_trials(deepcopy=False):
        study.set_user_attr("space", ours)
    had = study.user_attrs.get("space", {})
    differs = {key for key in ours if had.get(key) != ours[key] and key not in ("script", "trials")}
    differs -= {"grace"} if differs & {"steps", "pruner", "reduction"} else set()  # they set its default
    names = {"code": space.path.name, "pruner": f"pruner (it was {had.get('pruner')}; --trials sets its default)"}
    if what := ", ".join(names.get(key, key) for key in ours if key in differs):
        fail(f"study {space.name} is another search: {what} changed. Choose another --name, or delete {shown(folder)}")
    return study


def load_study(name: str, studies: Path, url: str | None) -> tuple[optuna.Study, Space, Path]:
    """An existing study by its name or folder."""
    folder = Path(name).resolve() if Path(name).is_dir() else studies / name
    storage = open_storage(url, folder)
    if folder.name not in optuna.get_all_study_names(storage):
        fail(f"no study {folder.name} in {url or shown(folder)}")
    study = optuna.load_study(study_name=folder.name, storage=storage)
    content = {key: value for key, value in study.user_attrs["space"].items() if key != "code"}
    folder.mkdir(parents=True, exist_ok=True)  # the study may have been made on other machines
    return study, read(content, folder), folder


def ranking(study: optuna.Study) -> list[FrozenTrial]:
    """Trials that have a value: the complete ones by value, then the pruned ones by how far they came, and by value."""
    trials = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))
    trials = [x for x in trials if x.value is not None and math.isfinite(x.value)]
    return sorted(trials, key=lambda x: (x.state == TrialState.PRUNED, -x.last_step, -x.value, x.number))


def best(study: optuna.Study) -> FrozenTrial | None:
    return next((x for x in ranking(study) if x.state == TrialState.COMPLETE), None)


def importances(study: optuna.Study, space: Space) -> dict[str, float]:
    """How much each flag separates good trials from bad ones, as shares of 1 (PED-ANOVA, arXiv:2304.10255).

    Optuna looks at complete trials only, and pruning leaves few. Here all trials count, by their place in `ranking`.
    """
    trials = [x for x in ranking(study) if len(x.params) == len(space.dimensions)]
    ranks = optuna.create_study()
    for place, x in enumerate(trials):
        ranks.add_trial(optuna.create_trial(params=x.params, distributions=x.distributions, value=float(place)))
    if len(trials) < 8:
        return {}
    evaluator = PedAnovaImportanceEvaluator(target_quantile=min(0.5, max(0.1, 5 / len(trials))))
    shares = optuna.importance.get_param_importances(ranks, evaluator=evaluator)
    return {x.flag: shares[x.param] for x in sorted(space.dimensions, key=lambda x: -shares[x.param])}
