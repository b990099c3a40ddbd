"""A worker of a search: it takes trials of the study, runs them, and prunes those that are not worth their budget.

Any number of workers may share a study. The first trial has the script's defaults; the others are sampled when a worker
takes them. A worker locks its trials (study.py), so a running trial without a lock is one whose worker has died: the
next worker adopts it, and resumes its runs from their checkpoints. docs/tuning.md lists how a trial ends.
"""

import math
import signal
import time
from dataclasses import dataclass

import numpy as np
import optuna
from optuna.samplers import TPESampler
from optuna.trial import TrialState
from tqdm import tqdm

from benchmark.runner import LOOK, TICK, Job, Runner, short
from benchmark.runs import read_episodes, read_result, shown, trailing_means, words_of
from tuner.spaces import Space, seeds_of
from tuner.study import Locks, best

BAD_INPUT, DIVERGED = 2, 3  # exit codes of a script
FAILURES = 3  # failed trials in a row that stop the search
EPISODES = 50  # that each seed has to finish before its trial may be pruned


def sample(trial: optuna.Trial, space: Space) -> dict:
    """The flags of a trial, sampled if it has none yet. They depend on the trials so far, not on the worker."""
    trial.study.sampler = TPESampler(seed=trial.number)
    for x in space.dimensions:
        if trial.number or x.param in space.first_params:
            trial._suggest(x.param, x.distribution)  # what `ask` does for a new trial
    return space.flags(trial)


def first_flags(space: Space, count: int) -> list[dict]:
    """The flags of the first trials of a search, without starting it."""
    study = optuna.create_study()
    study.enqueue_trial(space.first_params)
    return [sample(study.ask(), space) for _ in range(min(count, space.trials))]


@dataclass
class Owned:
    trial: optuna.Trial  # which this worker has locked
    jobs: list[Job]
    lock: int
    milestones: list[int]  # that have not been reported

    def report(self, episodes: list, step: int) -> bool:
        """Report the mean over seeds of the trailing mean return; whether it is one of enough episodes."""
        means = [trailing_means(x["step"].to_numpy(), x["return"].to_numpy(), np.array([step])) for x in episodes]
        if math.isfinite(value := float(np.mean(means))):
            self.trial.report(value, step)
        return min((x["step"] <= step).sum() for x in episodes) >= EPISODES


class Worker:
    def __init__(self, study: optuna.Study, space: Space, locks: Locks, runner: Runner) -> None:
        self.study, self.space, self.locks, self.runner = study, space, locks, runner
        self.owned: dict[int, Owned] = {}
        self.refused, self.failures = set(), 0  # numbers of trials; how many in a row
        self.began, self.looked, self.ended_before = time.monotonic(), 0.0, self.ended
        self.bar = tqdm(total=space.trials, initial=self.ended, unit="trial", disable=None)

    @property
    def ended(self) -> int:
        return sum(x.state.is_finished() for x in self.study.get_trials(deepcopy=False))

    def work(self, minutes: float) -> None:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self.runner.ask_to_stop)
        end, has_more = self.began + 60 * minutes, True
        try:
            while self.owned or has_more:
                if self.runner.stops or self.failures >= FAILURES or time.monotonic() > end:
                    break
                has_more = self.fill_slots()
                self.runner.watch()
                for owned in list(self.owned.values()):
                    self.judge(owned)
                if time.monotonic() - self.looked > LOOK:
                    self.looked = time.monotonic()
                    self.locks.ask("true")
                    self.bar.set_postfix_str(self.summary(), refresh=not self.bar.disable)
                time.sleep(TICK)
        finally:
            self.runner.stop_all()  # our trials stay unfinished, for the next worker
            self.bar.close()

    def fill_slots(self) -> bool:
        """Start what fits, runs of our own trials first. False if there is no other trial to take."""
        while self.runner.free:
            if waiting := [job for job in self.runner.jobs if job.state in ("waiting", "stale")]:
                self.runner.start(waiting[0], self.runner.free[0])
            elif (lock := self.locks.take("study")) is None:  # another worker is taking one
                break
            else:
                has_more = self.take()
                self.locks.give("study", lock)
                if not has_more:
                    return False
        return True

    def take(self) -> bool:
        """Adopt a trial whose worker has died, or begin the next one."""
        trials = self.study.get_trials(deepcopy=False)
        if not trials:
            self.study.enqueue_trial(self.space.first_params)
        for x in trials:
            if x.state == TrialState.RUNNING and x.number not in self.refused:
                if (lock := self.locks.take(x.number)) is not None:
                    trial = optuna.Trial(self.study, x._trial_id)
                    if trial.storage.get_trial(x._trial_id).state == TrialState.RUNNING:  # it has not ended meanwhile
                        return self.own(trial, lock)
                    self.locks.give(x.number, lock)
        if any(x.state == TrialState.WAITING for x in trials) or len(trials) < self.space.trials:
            trial = self.study.ask()
            return self.own(trial, self.locks.take(trial.number))
        return False

    def own(self, trial: optuna.Trial, lock: int) -> bool:
        """Line up the runs of a trial."""
        flags, folder = sample(trial, self.space), self.locks.folder / "trials" / str(trial.number)
        specs = [self.space.spec(flags, seed, folder / f"seed-{seed}") for seed in seeds_of(self.space.seeds)]
        jobs = [Job(f"trial {trial.number}, {spec.folder.name}", spec) for spec in specs]
        for job in jobs:
            job.look()
        self.runner.jobs += jobs
        reported = trial.storage.get_trial(trial._trial_id).intermediate_values
        milestones = [step for step in self.space.milestones if step not in reported]
        self.owned[trial.number] = Owned(trial, jobs, lock, milestones)
        self.say("resumes" if folder.exists() else "begins", trial.number, " ".join(words_of(flags)) or "the defaults")
        return True

    def judge(self, owned: Owned) -> None:
        """Report the milestones that a trial has passed, and end it if it is over."""
        failed = next((job for job in owned.jobs if job.state == "failed"), None)
        passed = min(math.inf if job.state == "done" else job.step for job in owned.jobs)
        due, is_poor = [step for step in owned.milestones if step < passed], False
        episodes = [read_episodes(job.spec.folder) for job in owned.jobs] if due or failed else []
        for step in due:
            owned.milestones.remove(step)
            has_enough = owned.report(episodes, step)
            is_poor = is_poor or has_enough and owned.trial.should_prune()
        if failed and failed.code == DIVERGED:
            owned.report(episodes, int(min(x["step"].max() if len(x) else 0 for x in episodes)))
            self.end(owned, TrialState.PRUNED, f"{failed.name} diverged")
        elif failed:
            lines = [f"{failed.name}: {failed.note}; log: {shown(failed.beside('.log'))}", *failed.last_lines()]
            self.end(owned, TrialState.RUNNING if failed.code == BAD_INPUT else TrialState.FAIL, "\n    ".join(lines))
        elif math.isinf(passed):
            values = [read_result(job.spec.folder).get(self.space.metric) for job in owned.jobs]
            if math.isfinite(value := float(np.mean(np.array(values, float)))):
                owned.trial.report(value, self.space.steps)
                self.end(owned, TrialState.COMPLETE, value=value)
            else:
                self.end(owned, TrialState.FAIL, f"{self.space.metric} in result.json is {values}: did an episode end?")
        elif is_poor and owned.trial.number:  # the first is not pruned, so a search does not end below its start
            self.end(owned, TrialState.PRUNED)

    def end(self, owned: Owned, state: TrialState, note: str = "", value: float | None = None) -> None:
        """Record how a trial ended, and let go of it. RUNNING: it did not end, but was refused."""
        number = owned.trial.number
        for job in owned.jobs:
            while job.handle:
                job.handle.stop(force=True)
                self.runner.watch()
        if state == TrialState.RUNNING:
            self.refused.add(number)
        else:
            owned.trial.set_user_attr("note", note)
            told = self.study.tell(owned.trial, value, state)
            at = f" at {told.last_step:,} steps" if state == TrialState.PRUNED and told.last_step else ""
            note = f"{short(told.value)}{at}  {self.summary()}  {note}"
        for job in owned.jobs if state == TrialState.PRUNED else ():
            (job.spec.folder / "checkpoint.pt").unlink(missing_ok=True)  # a replay buffer can be large
        del self.owned[number]
        self.runner.jobs = [job for x in self.owned.values() for job in x.jobs]
        self.locks.give(number, owned.lock)
        self.failures = self.failures + 1 if state in (TrialState.RUNNING, TrialState.FAIL) else 0
        self.say("refused" if state == TrialState.RUNNING else state.name.lower(), number, note)

    def summary(self) -> str:
        """(12 of 40, 14:00 left; best 231, trial 7)"""
        self.bar.n = self.ended
        how = {"initial": self.ended_before, "bar_format": "{n_fmt} of {total_fmt}, {remaining} left"}
        meter = tqdm.format_meter(self.ended, self.space.trials, time.monotonic() - self.began, **how)
        leader = best(self.study)
        return f"({meter}{f'; best {short(leader.value)}, trial {leader.number}' if leader else ''})"

    def say(self, what: str, number: int, text: str) -> None:
        self.bar.write(f"{what:9} trial {number}  {text}".rstrip())
