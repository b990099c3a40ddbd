"""The search: a worker that takes trials of a study, makes their runs, and ends those that are not worth their budget.

Any number of workers may share a study, on one machine or on many. All trials wait in the storage from the beginning,
so their number is the same whoever makes them: the first has the script's defaults, the others are sampled when a
worker takes them. A worker owns what it takes:

    on its own machine      by a lock on trials/{number}.lock, which the kernel lets go of when the worker dies
    seen from another one   by a beat in the trial's attributes; after --orphaned-after seconds without one, it is over

A trial without an owner is taken up by the next worker: with --resume from the run folder's last checkpoint if the
folder is there and the script can do it, else from the beginning. Training processes die with their worker. Jobs in the
cloud (--backend dstack) do not: whoever takes up their trial finds them at work, or what they have pushed.
"""

import json
import math
import os
import socket
import statistics
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.pruners import BasePruner, MedianPruner, NopPruner, SuccessiveHalvingPruner
from optuna.samplers import TPESampler
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState
from rich.table import Table

from benchmark import run
from benchmark.run import Backend, Display, Job, Runner, clock, short, slots_of, take_lock
from benchmark.stats import trailing_means
from tuner.spaces import Space
from tuner.study import ENDED, best, best_first, shown

DIVERGED, BAD_INPUT = 3, 2  # exit codes of a script
FAILURES = 3  # failed trials in a row that stop a search


def machine(folder: Path) -> str:
    """What two workers have in common whose locks in this folder exclude each other for certain."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return f"{socket.gethostname()}:{boot.read_text().strip() if boot.exists() else ''}:{folder.resolve()}"


def pruner(space: Space) -> BasePruner:
    if space.pruner == "asha":
        return SuccessiveHalvingPruner(min_resource=space.grace, reduction_factor=space.reduction)
    if space.pruner == "median":
        return MedianPruner(n_startup_trials=space.startup, n_warmup_steps=space.grace)
    return NopPruner()


def read_episodes(path: Path) -> np.ndarray:
    """Steps and returns of the finished episodes in an episodes.csv, (2, E). The last row may be half written."""
    try:
        lines = path.read_text().splitlines(keepends=True)
        columns = lines[0].strip().split(",")
        step, value = columns.index("step"), columns.index("return")
        rows = [line.split(",") for line in lines[1:] if line.endswith("\n")]
        return np.array([(float(row[step]), float(row[value])) for row in rows]).reshape(-1, 2).T
    except (OSError, ValueError, IndexError):
        return np.zeros((2, 0))


def run_folder(study: Path, number: int, seed: int) -> Path:
    return study / "trials" / str(number) / f"seed-{seed}"


class Run(Job):
    """A run of a trial. The study vouches for its script and its flags, so it is never stale."""

    resumed = False  # its last attempt was begun with --resume

    def why_stale(self, scripts: Path) -> None:
        return None


@dataclass
class Trying:
    """A trial that this worker owns."""

    trial: optuna.Trial
    jobs: list[Run]
    lock: int
    beat: int
    beaten: float
    reported: set[int]
    ended: int = 0  # runs that had ended when it was last judged
    sizes: list = field(default_factory=list)  # of the episodes' files at that time
    curves: list = field(default_factory=list)

    @property
    def number(self) -> int:
        return self.trial.number

    def read(self) -> None:
        """Read the episodes of its runs, if there are new ones."""
        paths = [job.folder / "episodes.csv" for job in self.jobs]
        sizes = [path.stat().st_size if path.exists() else 0 for path in paths]
        if sizes != self.sizes:
            self.sizes, self.curves = sizes, [read_episodes(path) for path in paths]


def mean_at(curves: list[np.ndarray], step: float) -> float:
    """Mean over runs of the trailing mean of 100 episodes at a step; nan where one has finished no episode."""
    return float(np.mean([trailing_means(*curve, np.array([step]))[0] for curve in curves]))


class Worker(Runner):
    """Makes trials until none is left. What a run needs (processes, logs, locks) is the benchmark's runner's."""

    def __init__(
        self,
        study: optuna.Study,
        storage: BaseStorage,
        space: Space,
        folder: Path,
        args: run.Args,
        backend: Backend,
        patience: float,  # seconds without a beat after which a trial of another machine is taken over
        minutes: float,  # to work
    ):
        # With pruning the runs of a trial go side by side, because a milestone counts when all of them are there.
        self.together = len(space.seeds) if space.pruner != "none" else 1
        slots = slots_of(args)
        slots += [slots[i % len(slots)] for i in range(self.together - len(slots))]
        super().__init__([], slots, args, backend)
        self.study, self.storage, self.space, self.folder, self.pruner = study, storage, space, folder, pruner(space)
        self.trials, self.patience, self.until = space.trials, patience, time.monotonic() + 60 * minutes
        self.here = machine(folder)
        self.name = f"{self.here}:{os.getpid()}:{time.time_ns()}"
        self.own: dict[int, Trying] = {}
        self.seen: dict[int, tuple] = {}  # of others' trials: (owner as last read, when it was first read, moved since)
        self.over = self.broken = False
        self.failures, self.asked, self.judged = 0, -math.inf, 0.0
        self.display = Board(self)

    def has_work(self) -> bool:
        return not self.broken and time.monotonic() < self.until and bool(self.own or not self.over)

    # ---------------------------------------------------------------------------------------------- taking trials

    def fill_slots(self) -> None:
        super().fill_slots()
        while len(self.free) >= self.together and not self.stops and time.monotonic() - self.asked > run.LOOK:
            if not self.take():
                self.asked = time.monotonic()
                return
            super().fill_slots()

    def take(self) -> bool:
        """Own one more trial: one that somebody left, or the next that waits."""
        trials = [x for x in self.study.get_trials(deepcopy=False) if x.number < self.trials]
        for frozen in trials:
            if frozen.state == TrialState.RUNNING and frozen.number not in self.own and self.take_over(frozen):
                return True
        for frozen in trials:
            if frozen.state == TrialState.WAITING and self.take_waiting(frozen):
                return True
        others = [x.number for x in trials if x.state == TrialState.RUNNING and x.number not in self.own]
        self.over = all(self.seen[number][2] for number in others)
        return False

    def lock(self, number: int) -> int | None:
        path = self.folder / "trials" / f"{number}.lock"
        path.parent.mkdir(parents=True, exist_ok=True)
        return take_lock(path)

    def claim(self, frozen: FrozenTrial, beat: int) -> None:
        owner = {"worker": self.name, "machine": self.here, "beat": beat}
        self.storage.set_trial_user_attr(frozen._trial_id, "owner", owner)

    def take_waiting(self, frozen: FrozenTrial) -> bool:
        lock = self.lock(frozen.number)
        if lock is None:
            return False
        try:
            frozen = self.storage.get_trial(frozen._trial_id)
            if frozen.state == TrialState.WAITING:
                if frozen.number == 0:
                    self.storage.set_trial_system_attr(frozen._trial_id, "fixed_params", self.space.first_params())
                self.claim(frozen, 0)  # before it runs: a trial that runs has an owner
                if self.storage.set_trial_state_values(frozen._trial_id, TrialState.RUNNING):
                    self.begin(frozen, lock)
                    return True
        except UpdateFinishedTrialError:
            pass
        os.close(lock)
        return False

    def take_over(self, frozen: FrozenTrial) -> bool:
        """Take a trial that is not ours if its owner is gone."""
        owner, now = frozen.user_attrs.get("owner", {}), time.monotonic()
        had, since, moved = self.seen.get(frozen.number, (owner, now, False))
        if had != owner:
            since, moved = now, True
        is_here = owner.get("machine") == self.here
        self.seen[frozen.number] = owner, since, moved or is_here
        if not (is_here or not owner.get("worker") or now - since > self.patience):
            return False
        lock = self.lock(frozen.number)
        if lock is None:
            return False
        frozen = self.storage.get_trial(frozen._trial_id)
        if frozen.state == TrialState.RUNNING and frozen.user_attrs.get("owner", {}) == owner:
            if not is_here:  # two machines may be at this point with one trial: the later claim stands
                self.claim(frozen, 0)
                time.sleep(min(2.0, self.patience / 4))
                frozen = self.storage.get_trial(frozen._trial_id)
            if is_here or frozen.user_attrs["owner"]["worker"] == self.name:
                self.begin(frozen, lock)
                return True
        os.close(lock)
        return False

    def begin(self, frozen: FrozenTrial, lock: int) -> None:
        """Sample what the trial lacks of its flags and line up its runs."""
        number, space = frozen.number, self.space
        self.claim(frozen, 0)
        sampler = TPESampler(seed=number)  # what it draws depends on the trials so far, not on who draws
        study = optuna.Study(space.name, self.storage, sampler=sampler, pruner=self.pruner)  # a new one caches nothing
        study.get_trials(deepcopy=False)  # but of a database it only knows trials that it has seen
        trial = optuna.Trial(study, frozen._trial_id)
        known = space.first_params() if number == 0 else {x.param: None for x in space.dimensions}
        params = {x.param: x.suggest(trial) for x in space.dimensions if x.param in known}
        flags = space.flags(number, params)
        if "flags" not in frozen.user_attrs:
            trial.set_user_attr("flags", {key: "None" if x is None else x for key, x in flags.items()})
        entry, folders = space.entry(flags), [run_folder(self.folder, number, seed) for seed in space.seeds]
        jobs = [Run(f"trial {number}", entry, seed, folder) for seed, folder in zip(space.seeds, folders)]
        for job in jobs:
            job.look(self.args.scripts)
        reported = set(frozen.intermediate_values)
        self.own[number] = Trying(trial, jobs, lock, 0, time.monotonic(), reported)
        self.jobs += jobs
        self.over = False
        words = " ".join(entry.words) or "the script's defaults"
        how = "resumes" if any(job.folder.exists() for job in jobs) else "begins"
        self.display.tell(f"{how:9} trial {number}  {words}")

    # ---------------------------------------------------------------------------------------------- watching them

    def start(self, job: Run) -> None:
        super().start(job)
        job.resumed = job.note == "resumed"

    def watch(self) -> None:
        super().watch()
        if self.stopping:
            return
        is_time = time.monotonic() - self.judged > run.LOOK
        for trying in list(self.own.values()):
            ended = sum(job.state in ("done", "failed") for job in trying.jobs)
            if is_time or ended > trying.ended:
                trying.ended = ended
                self.judge(trying)
        if is_time:
            self.beat()
            self.judged = time.monotonic()
        self.jobs = [job for job in self.jobs if job.handle or any(job in x.jobs for x in self.own.values())]

    def judge(self, trying: Trying) -> None:
        """Report what is new of a trial, and see whether it is to be pruned, or over."""
        failed = next((job for job in trying.jobs if job.state == "failed"), None)
        if failed and failed.code == BAD_INPUT and failed.resumed:
            aside = next(path for i in range(1, 10**6) if not (path := failed.beside(f".old-{i}")).exists())
            self.display.tell(f"anew      {failed.name}: it could not be resumed; what was there is now {aside.name}")
            failed.folder.rename(aside)
            self.backend.forget(failed.folder)
            failed.state, failed.tried = "waiting", False
            return
        trying.read()
        done = all(job.state == "done" for job in trying.jobs)
        for step in self.reached(trying):
            value = mean_at(trying.curves, step)
            if step not in trying.reported and math.isfinite(value):
                trying.trial.report(value, step)
                trying.reported.add(step)
                is_poor = trying.trial.should_prune()  # asked of each: successive halving remembers who came so far
                if is_poor and not (done or failed or trying.number == 0):  # a search does not end below its start
                    return self.finish(trying, TrialState.PRUNED, note=f"at {step}")
        if failed and failed.code == DIVERGED:
            self.report_last(trying)
            return self.finish(trying, TrialState.PRUNED, note=f"diverged, seed {failed.seed}")
        if failed:
            note = "\n".join([f"{failed.note}, seed {failed.seed}", *failed.last_lines()])
            return self.finish(trying, TrialState.FAIL, note=note)
        if done:
            self.complete(trying)

    def reached(self, trying: Trying) -> list[int]:
        """The milestones short of the budget that all runs have left behind them."""
        ends = [
            math.inf if job.state == "done" else curve[0, -1] if curve.size else 0
            for job, curve in zip(trying.jobs, trying.curves, strict=True)
        ]
        return [step for step in self.space.grid[:-1] if step < min(ends)]

    def report_last(self, trying: Trying) -> None:
        """The value of a trial that diverged: what it last had."""
        last = min(int(curve[0, -1]) if curve.size else 0 for curve in trying.curves)
        value = mean_at(trying.curves, last)
        if math.isfinite(value) and last > max(trying.reported, default=0):
            trying.trial.report(value, last)

    def complete(self, trying: Trying) -> None:
        values = []
        for job in trying.jobs:
            with suppress(OSError, ValueError, KeyError, TypeError):
                values.append(float(json.loads((job.folder / "result.json").read_text())[self.space.metric]))
        if len(values) < len(trying.jobs) or not all(map(math.isfinite, values)):
            note = f"result.json has no finite number as {self.space.metric}; did no training episode end?"
            return self.finish(trying, TrialState.FAIL, note=note)
        value = statistics.fmean(values)
        if self.space.steps not in trying.reported:
            trying.trial.report(value, self.space.steps)
        self.finish(trying, TrialState.COMPLETE, value, values)

    def finish(self, trying: Trying, state: TrialState, value=None, values=(), note: str = "") -> None:
        """Tell the study how a trial ended, and let go of it."""
        self.stop(trying)  # first: a job that outlives its worker would else be nobody's, should we be killed here
        for job in trying.jobs:
            if job.state != "done":
                job.follow()
        steps, seconds = sum(job.step for job in trying.jobs), sum(job.seconds for job in trying.jobs)
        outcome = {"steps": steps, "seconds": round(seconds, 1), "values": list(values), "note": note}
        outcome["last"] = min((int(curve[0, -1]) if curve.size else 0 for curve in trying.curves), default=0)
        try:
            trying.trial.set_user_attr("outcome", outcome)
            told = self.study.tell(trying.trial, value, state)
        except (UpdateFinishedTrialError, ValueError):  # another machine has taken it for dead, and finished it
            return self.drop(trying, "was finished by another worker")
        self.failures = self.failures + 1 if state == TrialState.FAIL else 0
        self.broken = self.broken or self.failures >= FAILURES
        leader, about = best(self.study), f"{note}: {short(told.value)}" if note else short(told.value)
        about = note.replace("\n", "\n    ") if state == TrialState.FAIL else about
        ahead = f"  (best {short(leader.value)}, trial {leader.number})" if leader and state != TrialState.FAIL else ""
        text = f"{state.name.lower():9} trial {trying.number}  {about}{ahead}"
        self.display.tell(text, is_news=state == TrialState.FAIL)
        self.drop(trying)
        if state != TrialState.FAIL:
            for job in trying.jobs:
                self.backend.forget(job.folder)
        self.asked, self.over = -math.inf, False  # look at once whether there is more to do

    def stop(self, trying: Trying) -> None:
        """End what still runs of a trial."""
        for job in trying.jobs:
            if job.handle:
                self.backend.stop(job.handle, force=True)

    def drop(self, trying: Trying, why: str = "") -> None:
        """Let go of a trial; `why`, if another worker has it."""
        if why:
            self.display.tell(f"dropped   trial {trying.number}  {why}", is_news=True)
        for job in trying.jobs:
            if job.handle:
                self.backend.leave(job.handle)
        del self.own[trying.number]
        (self.folder / "trials" / f"{trying.number}.lock").unlink(missing_ok=True)
        os.close(trying.lock)

    def beat(self) -> None:
        """Show other machines that we are alive, and see whether they have taken a trial for dead."""
        for trying in list(self.own.values()):
            if time.monotonic() - trying.beaten > self.patience / 6:
                frozen = self.storage.get_trial(trying.trial._trial_id)
                if frozen.state in ENDED or frozen.user_attrs.get("owner", {}).get("worker") != self.name:
                    self.drop(trying, "was taken over by another worker")
                    continue
                trying.beat, trying.beaten = trying.beat + 1, time.monotonic()
                self.claim(frozen, trying.beat)

    def stop_all(self) -> None:
        super().stop_all()
        for trying in list(self.own.values()):
            with suppress(Exception):  # the storage may be what failed
                left = {"worker": "", "machine": self.here}
                self.storage.set_trial_user_attr(trying.trial._trial_id, "owner", left)
            self.drop(trying)


# --------------------------------------------------------------------------------------------------- what is shown


class Board(Display):
    """A live table of the search in a terminal; otherwise a line per event, and one on how it goes once a minute."""

    def __init__(self, worker: Worker):
        super().__init__([], len(worker.free))
        self.worker, self.began = worker, time.monotonic()

    def event(self, job: Job) -> None:
        """Runs are told of by their trials."""

    def tell(self, text: str, is_news: bool = False) -> None:
        """In a terminal the table shows what happens, but for what stays to be read."""
        if not self.live or is_news:
            self.console.print(text)

    def summary(self, total: float | None = None) -> str:
        worker = self.worker
        trials = [x for x in worker.study.get_trials(deepcopy=False) if x.number < worker.trials]
        counts, leader = Counter(x.state for x in trials), best(worker.study)
        names = {TrialState.COMPLETE: "complete", TrialState.PRUNED: "pruned", TrialState.FAIL: "failed"}
        names |= {TrialState.RUNNING: "running"}
        parts = [f"{counts[state]} {name}" for state, name in names.items() if counts[state]]
        ahead = f"; best {short(leader.value)}, trial {leader.number}" if leader else ""
        spent = clock(time.monotonic() - self.began)
        return f"{', '.join(parts) or 'none yet'} of {worker.trials} trials{ahead}; {spent}"

    def refresh(self) -> None:
        if self.live:
            self.live.update(self.board(), refresh=True)
        elif time.monotonic() - self.told > run.TELL:
            self.told = time.monotonic()
            self.console.print(self.summary())

    def board(self) -> Table:
        """What runs, the best so far, and the last that ended, as far as the terminal has lines."""
        worker, space = self.worker, self.worker.space
        trials = worker.study.get_trials(deepcopy=False)
        table = Table(box=None, pad_edge=False, caption=self.summary(), caption_justify="left")
        for title in ("trial", "", "step", "return", "flags"):
            right = title in ("trial", "step", "return")
            table.add_column(title, justify="right" if right else "left", no_wrap=True, overflow="ellipsis")

        def add(trial: FrozenTrial, state: str, step: str, value: float | None, style: str) -> None:
            settings = space.settings(trial.number, trial.params).items()
            flags = ", ".join(f"{name.replace('_', '-')} {shown(setting)}" for name, setting in settings)
            table.add_row(str(trial.number), state, step, short(value), flags, style=style)

        for trying in worker.own.values():
            step = min(job.step for job in trying.jobs)
            means = [job.trailing for job in trying.jobs if job.trailing is not None]
            value = statistics.fmean(means) if means else None
            add(trials[trying.number], "running", f"{short(step)} / {short(space.steps)}", value, "bold")
        room = max(2, self.console.height - 5 - len(worker.own))
        leaders = [x for x in best_first(worker.study) if x.state == TrialState.COMPLETE][: room // 2]
        recent = sorted((x for x in trials if x.state in ENDED), key=lambda x: x.datetime_complete, reverse=True)
        recent = [x for x in recent if x.number not in {leader.number for leader in leaders}]
        for x in leaders + recent[: room - len(leaders)]:
            style = {TrialState.COMPLETE: "green", TrialState.FAIL: "red"}.get(x.state, "dim")
            add(x, x.state.name.lower(), short(x.last_step) if x.last_step else "", x.value, style)
        return table
