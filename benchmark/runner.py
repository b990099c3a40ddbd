"""Runs side by side: as many as fit on this machine's cores and GPUs, each locked, watched, and resumable.

What happens to a run folder that exists:

    finished                        left alone
    finished, but another run       stale: shown and left alone; with `rerun_stale` moved aside and run again
    unfinished                      resumed from its last checkpoint, by the folder's own copy of the script
    unfinished, but another run     moved aside (to *.old-1) and started over
    locked by another runner        skipped, and looked at again when that runner has finished it

"Another run" is what runs.difference says: other flags, or a script whose algorithm has changed. Nothing is deleted.
"""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from benchmark import runs
from benchmark.runs import Spec, shown
from benchmark.stats import short

TICK, LOOK, LINE = 0.1, 1.0, 60.0  # seconds between looks at processes, looks at folders, and lines without a terminal
PATIENCE = 20.0  # seconds between SIGINT and SIGKILL
FAILED = "# failed: "  # the last line in the log of a run that failed
LAST_CODES = {2: "bad input", 3: "diverged (NaN or infinity)"}  # a retry would end in the same way


def cores() -> int:
    """CPUs that this process may use: its affinity, and the quota of its cgroup (a container's --cpus)."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        count = min(count, max(1, int(quota) // int(period)))
    return count


def find_gpus(wanted: tuple[str, ...] = ()) -> list[str]:
    """The GPUs to use: all that this process may see, or those of them that `wanted` names by number or id."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        with suppress(OSError, subprocess.SubprocessError):
            listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30, check=True).stdout
            visible = ",".join(re.findall(r"^GPU (\d+):", listed, re.M))
    found = [gpu.strip() for gpu in (visible or "").split(",") if gpu.strip() not in ("", "-1")]  # -1 hides them
    for gpu in wanted:
        if gpu.isdecimal() and int(gpu) >= len(found):
            runs.fail(f"there is no GPU {gpu}; this process sees {len(found)}")
    return [found[int(gpu)] if gpu.isdecimal() else gpu for gpu in wanted] or found


def uses_gpu(script: Path, device: str | None) -> bool:
    """Whether a script takes a GPU where there is one: by --device, or because its default depends on the machine."""
    return (device or runs.defaults(script.read_text()).get("device", "cpu")) != "cpu"


def slots(jobs: int | None, threads: int, gpus: list[str], runs_per_gpu: int = 1) -> list[str | None]:
    """One item for each run that fits at a time: the GPU that it gets, or None."""
    return (gpus * runs_per_gpu or [None] * (jobs or max(1, cores() // threads)))[:jobs]


def parse_seeds(text: str) -> list[int]:
    """3 means 1, 2, and 3; 1,3,7-9 is a list. [] if the text is neither."""
    try:
        if text.isdecimal():
            return list(range(1, int(text) + 1))
        ends = [part.split("-") for part in text.split(",") if part]
        return sorted({seed for first, *last in ends for seed in range(int(first), int(*last or [first]) + 1)})
    except (ValueError, TypeError):
        return []


# A backend has `start(spec, command, *, slot, threads, log, lock)`, which returns a handle. Its `poll()` is the
# exit code (minus the signal that killed it), None while it runs; then the run folder on this machine is up to date. It
# is called ten times a second. `stop(force=False)` asks the run to end, as Ctrl-C does, or kills it, and does not wait.


class Process:
    """A run as a process group. On Linux it ends with this process, whatever ends that."""

    def __init__(self, command: list[str], env: dict[str, str], log: Path, lock: int) -> None:
        self.code = None
        with log.open("a") as file:
            words = [*(f"{name}={value}" for name, value in env.items()), *command]
            print(f"# {time.ctime()}\n$ {shlex.join(words)}", file=file, flush=True)
            how = {"stdin": subprocess.DEVNULL, "stdout": file, "stderr": subprocess.STDOUT}
            how |= {"start_new_session": True, "preexec_fn": runs.dying_with_parent()}  # no Ctrl-C from a terminal
            how["pass_fds"] = [lock]  # the run stays locked as long as it lives
            self.popen = subprocess.Popen(command, env=os.environ | env, **how)

    def poll(self) -> int | None:
        if self.code is None:
            if hasattr(os, "waitid"):  # before it is reaped and its number is free: end what it may have left behind
                if not os.waitid(os.P_PID, self.popen.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                    return None
                self.stop(force=True)
            self.code = self.popen.poll()
        return self.code

    def stop(self, force: bool = False) -> None:
        if self.code is None:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self.popen.pid, signal.SIGKILL if force else signal.SIGINT)


class Local:
    """Runs on this machine."""

    def start(self, spec: Spec, command: list[str], *, slot: str | None, threads: int, log: Path, lock: int) -> Process:
        env = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(threads))
        env |= {"CUDA_VISIBLE_DEVICES": slot} if slot else {}
        return Process(command, env, log, lock)


@dataclass
class Job:
    """A run, and how it stands."""

    name: str
    spec: Spec
    on_gpu: bool = False
    state: str = "waiting"  # waiting, running, elsewhere, done, stale, failed
    note: str = ""
    step: int = 0
    seconds: float = 0.0
    trailing: float | None = None  # mean return of the last 100 episodes
    starts: int = 0
    code: int = 0  # the exit code of its last start
    hung: bool = False
    handle: Any = None
    lock: int = -1
    slot: str | None = None
    began: float = 0.0  # time.time() of the last start
    seen: tuple[float, float] = (0.0, 0.0)  # the newest change of log or folder, and time.monotonic() when it was seen
    log_start: int = 0  # where in the log the last start begins

    def beside(self, suffix: str) -> Path:
        return self.spec.folder.with_name(self.spec.folder.name + suffix)

    @property
    def is_open(self) -> bool:
        return self.state in ("waiting", "elsewhere")

    def look(self) -> None:
        """Set state and progress from the folder of a run that this runner is not making."""
        folder = self.spec.folder
        self.step, self.seconds, self.trailing = runs.progress(folder)
        if result := runs.read_result(folder):
            self.note = runs.difference(folder, self.spec)
            self.state = "stale" if self.note else "done"
            self.step, self.seconds = (result.get(x) or 0 for x in ("steps", "seconds"))
            self.trailing = result.get("final_return")
        else:
            self.state = "elsewhere" if runs.is_locked(self.beside(".lock")) else "waiting"

    def status(self) -> None:
        """For an onlooker: what another runner runs is running, and what failed last time has failed."""
        self.look()
        self.state = {"elsewhere": "running"}.get(self.state, self.state)
        if self.state == "waiting" and "".join(self.last_lines(1)).startswith(FAILED):
            self.state, self.note = "failed", self.last_lines(1)[0].removeprefix(FAILED)

    def command(self, threads: int, device: str | None) -> tuple[list[str], bool]:
        """What starts or resumes the run, and whether the folder that is there has to be moved aside first."""
        folder = self.spec.folder
        if self.state == "waiting" and runs.read_args(folder) and not runs.difference(folder, self.spec):
            return self.spec.resume_command(), False
        return self.spec.command(threads, device), folder.exists() and any(folder.iterdir())

    def is_silent(self, seconds: float) -> bool:
        """Whether this runner has seen no change of log or run folder for so long, while the machine was awake."""
        times = [self.began]
        for path in (self.beside(".log"), *(self.spec.folder.iterdir() if self.spec.folder.is_dir() else ())):
            with suppress(OSError):
                times.append(path.stat().st_mtime)
        if max(times) != self.seen[0]:
            self.seen = max(times), time.monotonic()
        return time.monotonic() - self.seen[1] > seconds

    def last_lines(self, count: int = 8) -> list[str]:
        """The end of what the last start printed; of a progress bar only its last state."""
        with suppress(OSError):
            text = self.beside(".log").read_bytes()[self.log_start :][-10_000:].decode(errors="replace")
            lines = [line.rstrip("\r").rpartition("\r")[2].rstrip() for line in text.split("\n")]
            return [line for line in lines if line][-count:]
        return []


class Runner:
    """Starts jobs in their order as slots become free, and watches them until all have ended."""

    def __init__(
        self,
        jobs: list[Job],
        slots: list[str | None],
        backend: Any,
        threads: int = 1,
        device: str | None = None,
        retries: int = 0,
        rerun_stale: bool = False,
        hang_after: float = 30.0,  # minutes of silence after which a run is killed
    ) -> None:
        self.jobs, self.free, self.slots, self.backend = jobs, list(slots), len(slots), backend
        self.threads, self.device, self.retries, self.rerun_stale = threads, device, retries, rerun_stale
        self.hang_after, self.stops, self.is_stopping, self.looked = 60 * hang_after, 0, False, 0.0
        self.display = Display(self)

    @property
    def running(self) -> list[Job]:
        return [job for job in self.jobs if job.handle is not None]

    def wants(self, job: Job) -> bool:
        return job.is_open or job.state == "stale" and self.rerun_stale and not job.starts

    def work(self) -> None:
        handlers = {x: signal.signal(x, self.ask_to_stop) for x in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
        for job in self.jobs:
            job.look()
        with self.display.live or nullcontext():
            try:
                while not self.stops and (self.running or any(map(self.wants, self.jobs))):
                    for job in filter(self.wants, self.jobs):
                        if not self.stops and (match := [x for x in self.free if (x is not None) == job.on_gpu]):
                            self.start(job, match[0])
                    self.watch()
                    time.sleep(TICK)
            finally:
                self.stop_all()
                self.display.refresh()
                for number, handler in handlers.items():
                    signal.signal(number, handler)

    def ask_to_stop(self, number: int, _) -> None:
        self.stops += 1
        if number == signal.SIGHUP:  # the terminal is gone, and writing to it would be an error
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1)
            os.dup2(null, 2)

    def start(self, job: Job, slot: str | None) -> None:
        """Lock the run, look at its folder again, and start it if that is still to be done."""
        lock, folder = runs.take_lock(job.beside(".lock")), job.spec.folder
        if lock is None:
            job.state = "elsewhere"
            return
        job.lock, job.state = lock, "waiting" if job.is_open else job.state
        if runs.read_result(folder) and (job.is_open or not runs.difference(folder, job.spec)):
            self.release(job)  # another runner has finished it
            self.display.event(job)
            return
        command, in_the_way = job.command(self.threads, self.device)
        aside = runs.move_aside(folder) if in_the_way else None
        resumed = "resumed" if (folder / "checkpoint.pt").exists() else "restarted: no checkpoint yet"
        job.note = f"old folder: {aside.name}" if aside else resumed if "--resume" in command else ""
        log = job.beside(".log")
        job.log_start, job.began = log.stat().st_size if log.exists() else 0, time.time()
        job.step, job.seconds, job.trailing, job.slot, job.hung = 0, 0.0, None, slot, False
        self.free.remove(slot)
        job.starts += 1
        job.handle = self.backend.start(job.spec, command, slot=slot, threads=self.threads, log=log, lock=lock)
        job.state = "running"
        self.display.event(job)

    def release(self, job: Job) -> None:
        job.beside(".lock").unlink(missing_ok=True)
        os.close(job.lock)
        job.look()

    def watch(self) -> None:
        """End what has ended; once a second, read the progress of the others."""
        for job in self.running:
            if (code := job.handle.poll()) is not None:
                self.end(job, code)
        if time.monotonic() - self.looked < LOOK:
            return
        self.looked = time.monotonic()
        for job in self.jobs:
            if job.state == "elsewhere":
                job.look()
            elif job.state == "running":
                job.step, job.seconds, job.trailing = runs.progress(job.spec.folder)
                if job.is_silent(self.hang_after):
                    job.hung = True
                    job.handle.stop(force=True)
        self.display.refresh()

    def end(self, job: Job, code: int) -> None:
        job.handle, job.code = None, code
        self.free.append(job.slot)
        self.release(job)
        if self.is_stopping:
            return
        if code or job.is_open:
            how = f"exit code {code}" if code > 0 else signal.strsignal(-code) if code else "no result"
            how = f"silent for {self.hang_after / 60:g} minutes" if job.hung else LAST_CODES.get(code, how)
            job.state, job.note = "failed", how
        self.display.event(job)
        if job.state == "failed":
            with job.beside(".log").open("a") as log:
                print(f"{FAILED}{job.note}", file=log)
            if code not in LAST_CODES and job.starts <= self.retries:
                job.state = "waiting"
        if code == 2 and not job.spec.folder.exists():  # another seed would fail in the same way
            for other in (x for x in self.jobs if x.state == "waiting" and x.spec.script == job.spec.script):
                if other.spec.flags | {"seed": 0} == job.spec.flags | {"seed": 0}:
                    other.state, other.note = "failed", f"not started: bad input, as in {job.name}"

    def stop_all(self) -> None:
        """Interrupt what is running; kill it after a while, or when asked once more."""
        asked, began, self.is_stopping = self.stops, time.monotonic(), True
        for job in self.running:
            job.handle.stop()
        while self.running:
            if time.monotonic() - began > PATIENCE or self.stops > asked:
                for job in self.running:
                    job.handle.stop(force=True)
            self.watch()
            time.sleep(TICK)
        self.is_stopping = False

    def report(self) -> int:
        """Print what is left to know; the exit code: 0, 1 if a run failed or is stale, 130 if stopped."""
        if not self.display.live:
            print(self.display.summary())
        for job in self.jobs:
            if job.state == "stale":
                print(f"stale: {job.name}: {job.note}; --rerun-stale runs it again")
            if job.state == "failed":
                print(f"failed: {job.name}: {job.note}; log: {shown(job.beside('.log'))}", file=sys.stderr)
        if self.stops:
            print(f"stopped; to resume: {shlex.join([sys.executable, *sys.argv])}", file=sys.stderr)
        folders = dict.fromkeys(shown(job.spec.folder.parent) for job in self.jobs)
        print(f"run folders: {', '.join(folders)}")
        return 130 if self.stops else int(any(job.state in ("failed", "stale") for job in self.jobs))


def time_left(jobs: list[Job], slots: int) -> str:
    """An estimate from the speed of the runs so far: of the same script, else of any."""
    paces: dict[Path | None, list[float]] = {}
    for job in (job for job in jobs if job.step and job.seconds):
        for key in (job.spec.script, None):
            paces.setdefault(key, []).append(job.seconds / job.step)
    left = [job for job in jobs if job.is_open or job.state == "running"]
    if not left or not paces:
        return ""
    steps = [max(0, job.spec.flags["total_timesteps"] - job.step) for job in left]
    needed = [n * median(paces.get(job.spec.script, paces[None])) for n, job in zip(steps, left)]
    return f"; about {timedelta(seconds=round(max(sum(needed) / slots, *needed)))} left"


class Display:
    """In a terminal a live table, elsewhere a line for each event and one a minute."""

    def __init__(self, runner: Runner) -> None:
        self.runner, self.printed = runner, time.monotonic()
        self.console = Console(highlight=False, markup=False, soft_wrap=True)
        self.live = Live(console=self.console, auto_refresh=False) if self.console.is_terminal else None

    def event(self, job: Job) -> None:
        """Print what has become of a job; in a terminal failures only, the table shows the rest."""
        if job.state == "failed":
            end = "".join(f"\n    {line}" for line in job.last_lines())
            self.console.print(f"failed    {job.name}  {job.note}; log: {shown(job.beside('.log'))}{end}")
        elif not self.live:
            note = f"return {short(job.trailing)}, {job.seconds:.0f} s" if job.state == "done" else job.note
            self.console.print(f"{job.state:9} {job.name}  {note}".rstrip())

    def summary(self) -> str:
        counts = Counter(job.state for job in self.runner.jobs)
        each = [f"{counts[x]} {x}" for x in ("done", "running", "elsewhere", "waiting", "stale", "failed") if counts[x]]
        return f"{', '.join(each)} of {len(self.runner.jobs)}{time_left(self.runner.jobs, self.runner.slots)}"

    def refresh(self) -> None:
        if self.live:
            self.live.update(table(self.runner.jobs, self.summary(), self.console.height), refresh=True)
        elif time.monotonic() - self.printed > LINE:
            self.printed = time.monotonic()
            now = [f"{job.name} {short(job.step)}, {short(job.trailing)}" for job in self.runner.running]
            self.console.print("; ".join([self.summary(), *now]))


def table(jobs: list[Job], caption: str, height: int) -> Table:
    """As many jobs as the terminal has lines for: what runs, what failed, what was done last, and what comes next."""
    table = Table(box=None, pad_edge=False, caption=caption, caption_justify="left")
    for title in ("run", "state", "step", "steps/s", "return", "note"):
        table.add_column(title, justify="left" if title in ("run", "state", "note") else "right", no_wrap=True)
    states = "running", "elsewhere", "failed", "stale", "done", "waiting"
    by_state = {state: [job for job in jobs if job.state == state] for state in states}
    rows = [job for state in states[:4] for job in by_state[state]]
    done, waiting = sorted(by_state["done"], key=lambda job: -job.began), by_state["waiting"]
    room = max(0, height - 4 - len(rows))
    for job in (rows + done[: max(room // 2, room - len(waiting))] + waiting)[: max(3, height - 4)]:
        step = f"{short(job.step)} / {short(job.spec.flags['total_timesteps'])}" if job.step else ""
        speed = short(job.step / job.seconds) if job.step and job.seconds else ""
        style = {"running": "bold", "failed": "red", "stale": "yellow", "done": "green"}.get(job.state, "dim")
        table.add_row(job.name, job.state, step, speed, short(job.trailing), job.note, style=style)
    return table
