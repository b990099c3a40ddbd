"""Makes the runs of a suite that are missing, and only those, side by side.

    python benchmark/run.py classic                        # goes on where it was, as often as it is started
    python benchmark/run.py classic box2d --jobs 4         # several suites, four runs at a time
    python benchmark/run.py classic --only 'CartPole*' --seeds 3 --dry-run      # print the commands instead
    python benchmark/run.py mujoco --only ppo_continuous HalfCheetah-v5__sac_continuous --seeds 4-6
    python benchmark/run.py atari --gpus 0 1 --runs-per-gpu 3 --threads 4       # three runs on each of two GPUs
    python benchmark/run.py mujoco --backend dstack --jobs 20       # on rented machines, 20 at a time: docs/cloud.md

Suites are described in suites.py. A run's folder is runs/{suite}/{env}__{script}__{seed}; beside it lie its log (what
the script printed) and, while it is being made, its lock. Seed 1 of every entry comes first, then seed 2, and so on, so
that a benchmark that is stopped early has some of everything.

What becomes of a run folder that is there:

    finished                        left as it is
    finished, but stale             shown and left; --rerun-stale moves it aside (to *.old-1) and makes it anew
    unfinished                      resumed at its last checkpoint
    unfinished and stale            moved aside and made anew: its second half would not be what its first half was
    being made by another runner    left to it, and looked at again when it is done there

Stale means that its flags are not the entry's, or that the code of the script is not that of the folder's copy
(docstrings, comments and what it says when it fails may differ). Nothing is ever deleted.

A run that fails (an exit code other than 0, no result, no sign of life) does not stop the others. Ctrl-C and SIGTERM
stop all of them; so does the death of the runner, even by kill -9. The same command then goes on. Exit code: 0 when
every run is there, 1 when one failed, 2 for bad input, 130 when stopped.
"""

import ctypes
import fcntl
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from statistics import fmean
from typing import Any, Literal, Protocol

import tyro
from rich.console import Console
from rich.live import Live
from rich.table import Table

from benchmark.suites import SCRIPTS, Entry, SuiteError, load, run_folder, suite_names, takes, why_stale

TICK, LOOK, TELL = 0.1, 1.0, 60.0  # seconds between two looks at the processes, at the folders; between two plain lines
PATIENCE = 20.0  # seconds that a job has to end after SIGINT
THREAD_VARIABLES = "OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"
LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


@dataclass
class Args:
    suites: tyro.conf.Positional[tuple[str, ...]]
    """suites by name (benchmark/suites/), or paths of TOML files"""
    seeds: str | None = None
    """seeds instead of the suite's: 3 for 1, 2 and 3; 4-6 for 4, 5 and 6"""
    only: tuple[str, ...] = ()
    """only entries whose script, environment or folder name (CartPole-v1__ppo) fits one of these patterns"""
    jobs: int | None = None
    """runs side by side; by default as many as cores / threads, or as fit on the GPUs; 10 in the cloud"""
    threads: int = 1
    """CPU threads of each run"""
    gpus: tuple[str, ...] = ()
    """GPUs to spread the runs over, such as 0 1; each run sees one"""
    runs_per_gpu: int = 1
    """runs side by side on each GPU"""
    device: Literal["cpu", "cuda"] | None = None
    """--device of every run; by default each script's own"""
    dry_run: bool = False
    """print the commands and do nothing"""
    rerun_stale: bool = False
    """make stale runs anew; the old folders are moved aside"""
    runs_dir: Path = SCRIPTS.parent / "runs"
    """where the run folders are"""
    hang_after: float = 30.0
    """minutes without a sign in log and run folder after which a run is killed and counts as failed"""
    backend: Literal["local", "dstack"] = "local"
    """where the runs are made: on this machine, or on rented ones"""
    template: str = "auto"
    """what a rented machine is like: cpu, gpu, or a file as in cloud/; auto: by the script"""
    scripts: Path = SCRIPTS
    """folder of the scripts"""


def fail(message: str, code: int = 2) -> None:
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(code)


# ------------------------------------------------------------------------------------------------------- backends


@dataclass
class Resources:
    threads: int
    gpu: str | None  # the one GPU that the job may use
    log: Path  # its output is added to this file
    lock: int  # file descriptor that a process on this machine inherits: the run is locked as long as it lives


class Backend(Protocol):
    """Where jobs run. When `poll` says that one has ended, its run folder is up to date on this machine."""

    def submit(self, command: list[str], env: dict[str, str], resources: Resources) -> Any:
        """Start a job and return a handle. `env` is what its environment has besides this one."""

    def poll(self, handle: Any) -> int | None:
        """Its exit code (minus the signal that killed it), or None while it runs."""

    def stop(self, handle: Any, force: bool) -> None:
        """Ask it to end, as Ctrl-C does; with `force` end it at once. Does not wait."""

    def leave(self, handle: Any) -> None:
        """Let go of a job whose run another runner has taken over."""

    def forget(self, folder: Path) -> None:
        """Nobody goes on with this run: remove the state that it could be resumed from."""


class Local:
    """Processes on this machine. They end with the runner, whatever ends it."""

    def submit(self, command: list[str], env: dict[str, str], resources: Resources) -> subprocess.Popen:
        runner = os.getpid()

        def die_with_the_runner():
            if LIBC:
                LIBC.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
                if os.getppid() != runner:  # it died before that
                    os.kill(os.getpid(), signal.SIGKILL)

        with resources.log.open("ab") as log:
            return subprocess.Popen(
                command,
                env=os.environ | env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C in the terminal reaches the runner alone, and a job's children with it
                pass_fds=[resources.lock],
                preexec_fn=die_with_the_runner,
            )

    def poll(self, handle: subprocess.Popen) -> int | None:
        if (code := handle.poll()) is not None:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(handle.pid, signal.SIGKILL)  # what it may have left behind, which would keep the lock
        return code

    def stop(self, handle: subprocess.Popen, force: bool) -> None:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(handle.pid, signal.SIGKILL if force else signal.SIGINT)

    def leave(self, handle: subprocess.Popen) -> None:
        self.stop(handle, force=True)  # the other has a process of its own

    def forget(self, folder: Path) -> None:
        (folder / "checkpoint.pt").unlink(missing_ok=True)  # a replay can be large


def check(args: Args) -> None:
    """The flags that say how runs are made, and how many at a time."""
    for name in ("jobs", "threads", "runs_per_gpu"):
        if (value := getattr(args, name)) is not None and value < 1:
            fail(f"--{name.replace('_', '-')} is {value}; it is at least 1")
    if not args.hang_after > 0:
        fail(f"--hang-after is {args.hang_after}; it takes minutes above 0")
    if args.backend == "dstack":
        args.jobs = args.jobs or 10
        for name in ("gpus", "runs_per_gpu"):
            if getattr(args, name) != getattr(Args, name):
                flag = f"--{name.replace('_', '-')}"
                fail(f"{flag} is about this machine; with --backend dstack the template says what a machine has")


def backend_of(args: Args, folders: list[Path]) -> Backend:
    """What --backend names; the run folders are those that it may be asked to make."""
    if args.backend == "local":
        return Local()
    from cloud.dstack import Dstack  # and with it the Hub's client, only where it is needed

    return Dstack(args.runs_dir, args.template, args.scripts, folders)


# ----------------------------------------------------------------------------------------------------------- jobs


@dataclass
class Job:
    """One run: what it is and how it stands."""

    suite: str
    entry: Entry
    seed: int
    folder: Path
    state: str = "waiting"  # waiting, running, elsewhere, done, stale, failed
    note: str = ""  # why it is stale, how it failed, how it was begun
    hung: bool = False
    code: int | None = None  # what its last attempt ended with
    step: int = 0
    seconds: float = 0.0
    trailing: float | None = None  # mean return of the last 100 episodes
    slot: str | None = None
    handle: Any = None
    lock: int = -1
    log_start: int = 0  # where in the log this attempt begins
    sign: tuple = ()  # size and time of the newest file; and when it was last seen to change
    sign_at: float = 0.0
    began: float = 0.0
    tried: bool = False  # each run is begun at most once by one runner

    @property
    def name(self) -> str:
        return f"{self.suite}/{self.folder.name}"

    def beside(self, suffix: str) -> Path:
        return self.folder.with_name(self.folder.name + suffix)

    def why_stale(self, scripts: Path) -> str | None:
        return why_stale(self.folder, self.entry, self.seed, scripts)

    def look(self, scripts: Path) -> None:
        """Set the state of a run that nobody is making from its folder."""
        self.state = "waiting"
        if (self.folder / "result.json").exists():
            self.note = self.why_stale(scripts) or ""
            self.state = "stale" if self.note else "done"
            with suppress(OSError, ValueError, KeyError, TypeError):
                result = json.loads((self.folder / "result.json").read_text())
                self.step, self.seconds, self.trailing = result["steps"], result["seconds"], result["final_return"]

    def follow(self) -> None:
        """Read the progress of a run from the last rows of its episodes.csv."""
        with suppress(OSError, ValueError):
            with (self.folder / "episodes.csv").open("rb") as file:
                file.seek(max(0, os.fstat(file.fileno()).st_size - 10_000))
                lines = file.read().decode().splitlines(keepends=True)
            rows = [line.split(",") for line in lines[1:] if line.endswith("\n")][-100:]
            if rows:
                self.step, self.seconds = int(rows[-1][0]), float(rows[-1][1])
                self.trailing = fmean(float(row[2]) for row in rows)

    def signs_of_life(self) -> tuple:
        """What changes when the run writes anything."""
        stats = []
        for path in (self.beside(".log"), *(self.folder.iterdir() if self.folder.is_dir() else ())):
            with suppress(OSError):
                stats.append(path.stat())
        return len(stats), sum(x.st_size for x in stats), max((x.st_mtime_ns for x in stats), default=0)

    def last_lines(self, count: int = 8) -> list[str]:
        """The end of what this attempt printed; of a progress bar only its last state."""
        with suppress(OSError):
            with self.beside(".log").open("rb") as file:
                file.seek(max(self.log_start, os.fstat(file.fileno()).st_size - 10_000))
                lines = file.read().decode(errors="replace").split("\n")
            return [line for raw in lines if (line := raw.rstrip("\r").rpartition("\r")[2].rstrip())][-count:]
        return []


def take_lock(path: Path) -> int | None:
    """The run's lock as an open file descriptor, or None if another process has it."""
    lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    with suppress(BlockingIOError, FileNotFoundError):
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(lock), path.stat()):  # else its last owner removed the file in the meantime
            return lock
    os.close(lock)
    return None


def give_lock(job: Job) -> None:
    job.beside(".lock").unlink(missing_ok=True)
    os.close(job.lock)
    job.lock = -1


def shown(path: Path) -> str:
    """A path as one would type it here."""
    path = path.absolute()
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def plan(job: Job, args: Args) -> tuple[Path | None, list[str]]:
    """Where the folder that is there has to be moved first, if anywhere, and the command that makes or resumes the run.

    For a run that is to be made: one that is waiting, or stale with --rerun-stale.
    """
    script, folder = shown(args.scripts / f"{job.entry.script}.py"), shown(job.folder)
    source = Path(script).read_text()
    in_the_way = job.folder.is_dir() and any(job.folder.iterdir())
    if in_the_way and job.state == "waiting" and (job.folder / "args.json").exists() and takes(source, "resume"):
        if job.why_stale(args.scripts) is None:
            copy = job.folder / Path(script).name  # what began the run continues it; a rented machine has its own
            is_ours = args.backend == "local" and copy.exists()
            return None, [sys.executable, shown(copy) if is_ours else script, "--resume", folder]
    own = {"env-id": job.entry.env, "total-timesteps": job.entry.steps, "seed": job.seed, "run-dir": folder}
    extra = {"torch-threads": args.threads, "device": args.device}  # which a script of somebody else may not have
    own |= {name: value for name, value in extra.items() if value and takes(source, name.replace("-", "_"))}
    words = [word for name, value in own.items() for word in (f"--{name}", str(value))]
    aside = next(path for i in range(1, 10**6) if not (path := job.beside(f".old-{i}")).exists())
    return aside if in_the_way else None, [sys.executable, script, *words, *job.entry.words]


def environment(args: Args, gpu: str | None) -> dict[str, str]:
    """What a job's environment has besides ours: its share of the cores, and its GPU."""
    return {name: str(args.threads) for name in THREAD_VARIABLES} | ({"CUDA_VISIBLE_DEVICES": gpu} if gpu else {})


# ----------------------------------------------------------------------------------------------------- what is shown


def short(number: float | None) -> str:
    """1234567 -> 1.23M"""
    for size, letter in ((1e6, "M"), (1e3, "k")):
        if number is not None and abs(number) >= size:
            return f"{number / size:.3g}{letter}"
    return "" if number is None else f"{number:.3g}" if number < 1000 else f"{number:.0f}"


def clock(seconds: float | None) -> str:
    return "?" if seconds is None else str(timedelta(seconds=round(seconds)))


def time_left(jobs: list[Job], slots: int) -> tuple[dict[int, float], float | None]:
    """Seconds that each running job still needs, by id, and all of them together.

    What a run takes is judged by the runs of its entry, else by those of its script, else by all, as far as they are.
    """
    paces: dict[tuple, list[float]] = {}
    for job in jobs:
        if job.step and job.seconds:
            for key in ((job.entry.name,), (job.entry.script,), ()):
                paces.setdefault(key, []).append(job.seconds / job.step)

    needed: dict[int, float] = {}
    todo = [job for job in jobs if job.state in ("waiting", "running", "elsewhere")]
    for job in todo:
        known = [paces[key] for key in ((job.entry.name,), (job.entry.script,), ()) if key in paces]
        if job.step and job.seconds:
            known.insert(0, [job.seconds / job.step])
        if known:
            needed[id(job)] = fmean(known[0]) * max(0, job.entry.steps - job.step)
    if len(needed) < len(todo):
        return needed, None
    return needed, max(sum(needed.values()) / slots, max(needed.values(), default=0.0))


class Display:
    """A live table in a terminal; otherwise a line per event, and one on how it goes once a minute."""

    def __init__(self, jobs: list[Job], slots: int):
        self.jobs, self.slots, self.told = jobs, slots, time.monotonic()
        self.console = Console(highlight=False, markup=False, soft_wrap=True)
        self.live = Live(console=self.console, auto_refresh=False) if self.console.is_terminal else None
        self.several = len({job.suite for job in jobs}) > 1

    def __enter__(self):
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *_):
        if self.live:
            self.refresh()
            self.live.stop()

    def event(self, job: Job) -> None:
        """Say what has become of a job. In a terminal the table says it, but for a failure, which stays above it."""
        if self.live and job.state != "failed":
            return
        about = f"return {short(job.trailing)}, {clock(job.seconds)}" if job.state == "done" else job.note
        text = f"{job.state:9} {job.name}  {about}".rstrip()
        lines = [f"{text}; its log: {shown(job.beside('.log'))}"] if job.state == "failed" else [text]
        lines += [f"    {line}" for line in job.last_lines()] if job.state == "failed" else []
        self.console.print("\n".join(lines))

    def summary(self, total: float | None) -> str:
        counts = Counter(job.state for job in self.jobs)
        names = {"elsewhere": "running elsewhere"}
        states = ("done", "running", "elsewhere", "waiting", "stale", "failed")
        parts = [f"{counts[x]} {names.get(x, x)}" for x in states if counts[x] or x == "done"]
        left = f"; about {clock(total)} left" if total else ""
        return f"{', '.join(parts)} of {len(self.jobs)}{left}"

    def refresh(self) -> None:
        left, total = time_left(self.jobs, self.slots)
        if self.live:
            self.live.update(self.table(left, total), refresh=True)
        elif time.monotonic() - self.told > TELL:
            self.told = time.monotonic()
            running = [job for job in self.jobs if job.state == "running"]
            now = [f"{x.folder.name} {short(x.step)} / {short(x.entry.steps)}, {short(x.trailing)}" for x in running]
            self.console.print("; ".join([self.summary(total), *now]))

    def table(self, left: dict[int, float], total: float | None) -> Table:
        """As many jobs as the terminal has lines for: what is running, failed, was last done, and comes next."""
        table = Table(box=None, pad_edge=False, caption=self.summary(total), caption_justify="left")
        for title in ("run", "", "step", "steps/s", "return", "left"):
            table.add_column(title, justify="left" if title in ("run", "") else "right", no_wrap=True)
        by_state: dict[str, list[Job]] = {}
        for job in self.jobs:
            by_state.setdefault(job.state, []).append(job)
        recent = sorted(by_state.get("done", []), key=lambda job: job.began)[::-1]
        rows = [job for state in ("running", "elsewhere", "failed", "stale") for job in by_state.get(state, [])]
        room = max(3, self.console.height - 4 - len(rows))
        rows += recent[: room // 2] + by_state.get("waiting", [])[: room - min(len(recent), room // 2)]
        for job in rows[: max(3, self.console.height - 4)]:
            step = f"{short(job.step)} / {short(job.entry.steps)}" if job.step else ""
            speed = short(job.step / job.seconds) if job.seconds else ""
            ends = {"running": clock(left.get(id(job))), "done": clock(job.seconds), "stale": job.note}
            ends["failed"] = f"{job.note}; {shown(job.beside('.log'))}"
            style = {"running": "bold", "failed": "red", "stale": "yellow", "done": "green"}.get(job.state, "dim")
            name = job.name if self.several else job.folder.name
            table.add_row(name, job.state, step, speed, short(job.trailing), ends.get(job.state), style=style)
        return table


# --------------------------------------------------------------------------------------------------------- the work


class Runner:
    """Starts jobs in their order as slots become free, and watches them until all have ended."""

    def __init__(self, jobs: list[Job], slots: list[str | None], args: Args, backend: Backend):
        self.jobs, self.free, self.args, self.backend = jobs, list(slots), args, backend
        self.display = Display(jobs, len(slots))
        self.stops = 0  # how often somebody asked us to stop
        self.stopping = False
        self.looked = 0.0

    @property
    def running(self) -> list[Job]:
        return [job for job in self.jobs if job.handle is not None]

    def wants(self, job: Job) -> bool:
        is_open = job.state in ("waiting", "elsewhere") or job.state == "stale" and self.args.rerun_stale
        return is_open and not job.tried

    def has_work(self) -> bool:
        return bool(self.running) or any(map(self.wants, self.jobs))

    def work(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.ask_to_stop)
        with self.display:
            try:
                while not self.stops and self.has_work():
                    self.fill_slots()
                    self.watch()
                    time.sleep(TICK)
            finally:
                self.stop_all()

    def ask_to_stop(self, *_) -> None:
        self.stops += 1

    def fill_slots(self) -> None:
        for job in self.jobs:
            if not self.free or self.stops:
                return
            if self.wants(job):
                self.start(job)

    def start(self, job: Job) -> None:
        """Take the job's lock, look at its folder again, and start it if it is still to be made."""
        job.folder.parent.mkdir(parents=True, exist_ok=True)
        lock = take_lock(job.beside(".lock"))
        if lock is None:
            job.state = "elsewhere"
            return
        job.lock = lock
        job.look(self.args.scripts)
        if not self.wants(job):  # another runner has made it
            give_lock(job)
            self.display.event(job)
            return
        aside, command = plan(job, self.args)
        if aside:
            job.folder.rename(aside)
        job.tried, job.slot, log = True, self.free.pop(0), job.beside(".log")
        env = environment(self.args, job.slot)
        with log.open("a") as file:
            line = shlex.join([*(f"{name}={value}" for name, value in env.items()), *command])
            file.write(f"# {datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC\n$ {line}\n")
        job.log_start, job.sign_at, job.began = log.stat().st_size, time.monotonic(), time.monotonic()
        job.step, job.seconds, job.trailing = 0, 0.0, None
        job.note = "resumed" if "--resume" in command else f"anew; what was there is now {aside.name}" if aside else ""
        job.handle = self.backend.submit(command, env, Resources(self.args.threads, job.slot, log, job.lock))
        job.state = "running"
        self.display.event(job)

    def watch(self) -> None:
        """See which jobs have ended; once a second also how the others get on."""
        for job in self.running:
            if (code := self.backend.poll(job.handle)) is not None:
                self.end(job, code)
        if time.monotonic() - self.looked > LOOK:
            for job in self.jobs:
                if job.state in ("running", "elsewhere"):
                    job.follow()
                if job.state in ("waiting", "elsewhere") and (job.folder / "result.json").exists():
                    job.look(self.args.scripts)  # another runner has made it
                    self.display.event(job)
            for job in self.running:
                if (sign := job.signs_of_life()) != job.sign:
                    job.sign, job.sign_at = sign, time.monotonic()
                elif time.monotonic() - job.sign_at > 60 * self.args.hang_after:
                    job.hung = True
                    self.backend.stop(job.handle, force=True)
            self.display.refresh()
            self.looked = time.monotonic()

    def end(self, job: Job, code: int) -> None:
        job.handle, job.code = None, code
        self.free.append(job.slot)
        job.look(self.args.scripts)
        if job.hung:
            job.state, job.note = "failed", f"hangs: no sign of life for {self.args.hang_after:g} minutes"
        elif code:
            how = f"exit code {code}" if code > 0 else f"killed by signal {-code}, {signal.strsignal(-code)}"
            job.state, job.note = "failed", how
        elif job.state == "waiting":
            job.state, job.note = "failed", "ended without a result"
        give_lock(job)
        if not self.stopping:
            self.display.event(job)
        elif job.state == "failed":  # by our own signal
            job.state, job.note = "waiting", ""

    def stop_all(self) -> None:
        """End what is running: with SIGINT, and after a while, or when asked once more, by force."""
        self.stopping = True
        for job in self.running:
            self.backend.stop(job.handle, force=False)
        began, asked = time.monotonic(), self.stops
        while self.running:
            if time.monotonic() - began > PATIENCE or self.stops > asked:
                for job in self.running:
                    self.backend.stop(job.handle, force=True)
            self.watch()
            time.sleep(TICK)


def make_jobs(args: Args) -> list[Job]:
    """The runs of the suites that --only and --seeds leave, in the order in which they are made."""
    if not (match := re.fullmatch(r"(\d+)(?:-(\d+))?", args.seeds or "1")):
        fail(f"--seeds is {args.seeds}; it takes a number (3 for 1, 2 and 3) or a range (4-6)")
    first, last = (1, match[1]) if match[2] is None else match.groups()
    wanted = range(int(first), int(last) + 1) if args.seeds else None
    if wanted is not None and not wanted:
        fail(f"--seeds {args.seeds} are none")
    jobs: list[Job] = []
    for suite in [load(name, args.scripts) for name in args.suites]:
        if suite.name in {job.suite for job in jobs}:
            fail(f"suite {suite.name} is named twice")
        for entry in suite.entries:
            if entry.fits(args.only):
                for seed in wanted or range(1, entry.seeds + 1):
                    jobs.append(Job(suite.name, entry, seed, run_folder(args.runs_dir, suite.name, entry, seed)))
    if not jobs:
        fail(f"--only {shlex.join(args.only)} fits no entry")
    return sorted(jobs, key=lambda job: job.seed)  # stable: within a seed as in the suites


def slots_of(args: Args) -> list[str | None]:
    """One item for each run that may be made at a time: the GPU that it gets, if there are any."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    slots = list(args.gpus) * args.runs_per_gpu or [None] * (args.jobs or max(1, cores // args.threads))
    return slots[: args.jobs]


def dry_run(jobs: list[Job], slots: list[str | None], args: Args) -> None:
    """The commands that would be started, in their order, as they can be pasted into a shell."""
    commands = 0
    for job in jobs:
        if job.state == "elsewhere":
            print(f"# {job.name} is running elsewhere")
        elif job.state == "waiting" or job.state == "stale" and args.rerun_stale:
            aside, command = plan(job, args)
            if aside:
                print(shlex.join(["mv", shown(job.folder), shown(aside)]))
            env = environment(args, slots[commands % len(slots)])
            print(" ".join([*(f"{name}={value}" for name, value in env.items()), shlex.join(command)]))
            commands += 1
        elif job.state == "stale":
            print(f"# {job.name} is stale: {job.note}")
    print(f"# {commands} to make, {sum(job.state == 'done' for job in jobs)} done")


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    check(args)
    if not args.suites:
        fail(f"name at least one suite: {', '.join(suite_names())}, or the path of a TOML file; --help says the rest")
    try:
        jobs = make_jobs(args)
    except SuiteError as error:
        fail(str(error))
    slots = slots_of(args)
    for job in jobs:
        job.look(args.scripts)
    if args.dry_run:
        for job in jobs:
            if job.beside(".lock").exists() and job.state != "done":
                if (lock := take_lock(job.beside(".lock"))) is None:
                    job.state = "elsewhere"
                else:
                    os.close(lock)
        return dry_run(jobs, slots, args)

    runner = Runner(jobs, slots, args, backend_of(args, [job.folder for job in jobs]))
    try:
        runner.work()
    except OSError as error:
        fail(f"{error}; what was made is intact, and the same command goes on", code=1)
    if not runner.display.live:  # otherwise it stands under the table
        print(runner.display.summary(None))
    for job in jobs:
        if job.state == "stale":
            print(f"stale: {job.name}: {job.note}; --rerun-stale makes it anew")
        if job.state == "failed":
            print(f"failed: {job.name}: {job.note}; its log: {shown(job.beside('.log'))}", file=sys.stderr)
    if runner.stops:
        print(f"stopped; to go on: {shlex.join([sys.executable, *sys.argv])}", file=sys.stderr)
        raise SystemExit(130)
    raise SystemExit(any(job.state == "failed" for job in jobs))


if __name__ == "__main__":
    main()
