"""A command as the cloud runs it: its run folder comes from the Hub, and goes there at every checkpoint.

    python cloud/job.py CartPole-v1__ppo__1 -- python algos/ppo.py --env-id CartPole-v1 --seed 1
    python cloud/job.py atari --many -- python benchmark/run.py atari --gpus 0 1 2 3

The first form is for a script that writes a run folder. It runs in runs/NAME, which the job names, so the command has
no --run-dir. When it starts:

    the Hub has the run finished      it is pulled, nothing is started, exit code 0
    the Hub has a state of it         it is pulled and resumed
    ... but by other flags or by another version of the script: the command begins anew, and its first push replaces it
    the Hub has nothing of it         the command begins

So a job that died, however it died, is started again by the same command on any machine, and only what it did since its
last push is done twice. --many is for a command that makes many runs, all below runs/NAME, and resumes them by itself:
all that the Hub has of them is pulled at its start.

The job pushes at a checkpoint when the last push began more than --push-every minutes ago, and when the command ends. A
push that fails is tried again and costs the run nothing; at the end the job goes on trying for --patience minutes.

Two jobs of one run at once (a machine that was thought lost, a second start): the one that started last has it. It puts
a claim on the run's branch; the other finds at its next push that the branch has moved, ends its command and exits
with 0, so that nobody starts it once more. Both compute the same bits, so it does not matter for the result. (With
--many the other only stops pushing that run: its command makes others, which may be nobody else's.)

SIGINT and SIGTERM are passed on to the command, whose last checkpoint is then pushed. The exit code is the command's
(128 + n if signal n ended it); 1 if the Hub could not be reached, 2 for bad input.
"""

import ctypes
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import tyro
from huggingface_hub import CommitOperationAdd
from huggingface_hub.errors import HfHubHTTPError, RevisionNotFoundError

from cloud import hub as hf
from cloud.hub import CLAIM, ERRORS, Hub, Remote, fail, reason

TICK, TELL = 0.2, 300.0  # seconds between two looks at the run folders; between two lines on how the run gets on
TOKENS = "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"
LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
JOB = {"job": uuid.uuid4().hex, "host": socket.gethostname(), "since": datetime.now(UTC).isoformat(timespec="seconds")}


@dataclass
class Args:
    name: tyro.conf.Positional[str]
    """the run's name, on the Hub and below --runs-dir"""
    many: bool = False
    """the command makes many runs, all below --runs-dir / NAME, and resumes them by itself"""
    repo: str | None = None
    """repository on the Hub; by default that in FOLIO_HUB"""
    runs_dir: Path = Path("runs")
    """where the run folders are"""
    push_every: float = 10.0
    """minutes between two pushes of a run, at least"""
    retry: float = 1.0
    """minutes between two attempts when the Hub does not answer"""
    patience: float = 60.0
    """minutes to go on trying before the start and after the end"""


class Taken(Exception):
    """Another job has this run now."""


@dataclass
class Run:
    """A run folder, and what the Hub has of it."""

    name: str
    folder: Path
    head: str | None = None  # of the run's branch: the commit of our claim, or of our last push
    pushed: tuple | None = None  # the state that was pushed last
    due: float = 0.0  # when it may be pushed again
    taken: bool = False  # by another job, while the command goes on with other runs

    def state(self) -> tuple | None:
        """What changes when there is something to push."""
        for name in ("result.json", "checkpoint.pt"):
            with suppress(FileNotFoundError):
                stat = (self.folder / name).stat()
                return name, stat.st_ino, stat.st_mtime_ns
        return None

    def progress(self) -> str:
        """The last row of episodes.csv."""
        with suppress(OSError):
            with (self.folder / "episodes.csv").open("rb") as file:
                file.seek(max(0, os.fstat(file.fileno()).st_size - 1000))
                rows = file.read().decode().splitlines(keepends=True)[1:]
            if rows and rows[-1].endswith("\n"):
                step, seconds, score, _ = rows[-1].split(",")
                return f"{self.name}: step {step} after {seconds} s, last return {score}"
        return ""


def tell(text: str) -> None:
    print(f"job: {text}", flush=True)


# ------------------------------------------------------------------------------------------------------- the claim


def head_if_ours(hub: Hub, name: str) -> str | None:
    """The head of the run's branch, whose claim is this job's; None if nobody has the run, because the branch was
    removed. Raises Taken if another job has it, or has finished it."""
    running, finished = hf.find(hub, name)
    if running and CLAIM in running.files and json.loads(hf.read(hub, running, CLAIM)).get("job") == JOB["job"]:
        return running.revision
    if running or finished and finished.finished:
        raise Taken
    return None


def has_moved(error: HfHubHTTPError) -> bool:
    """Whether a branch is not any more where we thought it was."""
    return error.response.status_code == 412 or isinstance(error, RevisionNotFoundError)


def claim(hub: Hub, name: str, command: list[str] | None) -> tuple[Remote | None, str | None]:
    """Take a run over: the state that the Hub has of it, and the head of its branch, None if it is finished.

    States of other runs than that of the command do not count.
    """

    def counts(run: Remote) -> bool:
        return command is None or is_same(run.files, lambda path: hf.read(hub, run, path), command)

    while True:
        running, finished = hf.find(hub, name)
        if finished and finished.finished and counts(finished):
            return finished, None
        if running is None:
            hub.api.create_branch(hub.repo, branch=hf.branch_of(name), exist_ok=True)
            continue  # and look at what is there: another job may have been faster
        has_state = "args.json" in running.files and counts(running)
        try:
            done = hub.api.create_commit(
                hub.repo,
                [CommitOperationAdd(f"{name}/{CLAIM}", json.dumps(JOB).encode())],
                commit_message=f"{name}: a job on {JOB['host']} has it",
                revision=hf.branch_of(name),
                parent_commit=running.revision,
            )
            return running if has_state else None, done.oid
        except HfHubHTTPError as error:
            if not has_moved(error):
                raise


def push(hub: Hub, run: Run) -> None:
    """The run as it is now. Raises Taken if another job has it."""
    state = run.state()
    try:
        if state[0] == "result.json":
            if run.head and hf.heads(hub).get(hf.branch_of(run.name)) != run.head:
                run.head = head_if_ours(hub, run.name)
        elif run.head is None:
            run.head = claim(hub, run.name, None)[1]
        there = hf.push(hub, run.folder, run.name, run.head)
        run.head = there.revision
    except HfHubHTTPError as error:
        if has_moved(error):  # by another job, or by our own push, whose answer was lost
            run.head = head_if_ours(hub, run.name)
        raise
    run.pushed = run.state() if there.finished else state  # it may have ended while it was pushed
    tell(f"pushed {run.name}{', finished' if there.finished else ''}")


# ------------------------------------------------------------------------------------------------------ the command


def script_of(command: list[str]) -> int:
    """Where in the command the script is."""
    for i, word in enumerate(command):
        if word.endswith(".py"):
            return i
    fail(f"no script in {shlex.join(command)}; --many is for other commands that make runs")


def check_flags(command: list[str]) -> None:
    """No flag that names a run folder: a job's name does."""
    for word in command[script_of(command) + 1 :]:
        if (flag := word.partition("=")[0]) in ("--run-dir", "--resume", "--evaluate"):
            fail(f"{flag} cannot be in a job's command: the job names the run folder, and resumes by itself")


def flags_in(words: list[str]) -> list[str]:
    """The words of a command after the script, but for the run folder."""
    kept, skip = [], False
    for word in words:
        if not skip and word != "--run-dir" and not word.startswith("--run-dir="):
            kept.append(word)
        skip = word == "--run-dir" and not skip
    return kept


def is_same(files: Iterable[str], read: Callable[[str], str], command: list[str]) -> bool:
    """Whether a run folder with these files, which `read` reads, is of this command and this version of its script."""
    at, script = script_of(command), Path(command[script_of(command)])
    if not {"args.json", script.name} <= set(files) or read(script.name) != script.read_text():
        return False
    return flags_in(json.loads(read("args.json")).get("command", [])[1:]) == flags_in(command[at + 1 :])


def is_here(folder: Path, command: list[str]) -> bool:
    files = os.listdir(folder) if folder.is_dir() else []
    return is_same(files, lambda path: (folder / path).read_text(), command)


def prepare(hub: Hub, args: Args, command: list[str]) -> tuple[list[Run], list[str] | None]:
    """Pull what there is; the runs to follow and the command to start, None if there is nothing to do."""
    if args.many:
        runs = []
        for remote in hf.find_all(hub):
            folder = args.runs_dir / remote.name
            if remote.name.startswith(f"{args.name}/") and not (folder / "args.json").exists():
                folder.parent.mkdir(parents=True, exist_ok=True)
                hf.fetch(hub, remote, folder)
                runs.append(Run(remote.name, folder))
                runs[-1].pushed = runs[-1].state()
        tell(f"pulled {len(runs)} runs of {args.name}")
        return runs, command
    at, run = script_of(command), Run(args.name, args.runs_dir / args.name)
    found, run.head = claim(hub, run.name, command)
    run.folder.parent.mkdir(parents=True, exist_ok=True)
    if found:
        hf.fetch(hub, found, run.folder)
        run.pushed = run.state()
        if found.finished:
            tell(f"{run.name} is finished")
            return [], None
        tell(f"pulled {run.name}: {run.progress() or 'no episode yet'}")
        return [run], [*command[: at + 1], "--resume", str(run.folder)]
    if is_here(run.folder, command):
        return [run], [*command[: at + 1], "--resume", str(run.folder)]  # it died before it could push
    hf.move_aside(run.folder)
    return [run], [*command[: at + 1], *flags_in(command[at + 1 :]), "--run-dir", str(run.folder)]


def start(command: list[str]) -> subprocess.Popen:
    """The command, which ends with this process, whatever ends it. Its output is passed on, but not as a terminal's."""
    parent = os.getpid()

    def die_with_the_job():
        if LIBC:
            LIBC.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
            if os.getppid() != parent:
                os.kill(os.getpid(), signal.SIGKILL)

    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={name: value for name, value in os.environ.items() if name not in TOKENS},  # it has no use for them
        start_new_session=True,  # a terminal's Ctrl-C comes through us, and once
        preexec_fn=die_with_the_job,
    )


def pass_on(process: subprocess.Popen) -> None:
    while text := process.stdout.read1():  # not by lines: a progress bar ends none
        sys.stdout.buffer.write(text.replace(b"\r", b"\n"))
        sys.stdout.flush()


class Job:
    """A command and its runs."""

    def __init__(self, hub: Hub, args: Args, runs: list[Run], command: list[str]):
        self.hub, self.args, self.runs = hub, args, {run.name: run for run in runs}
        self.asked, self.told, self.said = 0, time.monotonic(), ""
        self.process = start(command)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.interrupt)
        self.printer = threading.Thread(target=pass_on, args=(self.process,), daemon=True)
        self.printer.start()

    def interrupt(self, number: int, _) -> None:
        self.asked += 1
        if self.process.returncode is None:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, number)

    def open(self) -> list[Run]:
        """The runs that have something to push; with --many, new ones are found here."""
        if self.args.many:
            for path in (self.args.runs_dir / self.args.name).rglob("args.json"):
                name = path.parent.relative_to(self.args.runs_dir).as_posix()
                if hf.NAME.fullmatch(name) and not hf.ASIDE.search(name):
                    self.runs.setdefault(name, Run(name, path.parent))
        return [run for run in self.runs.values() if not run.taken and run.state() not in (None, run.pushed)]

    def push_what_is_due(self) -> None:
        for run in self.open():
            if time.monotonic() >= run.due:
                run.due = time.monotonic() + 60 * self.args.push_every
                try:
                    push(self.hub, run)
                except Taken:
                    if not self.args.many:
                        raise
                    run.taken = True
                    tell(f"another job has {run.name} now, and it is not pushed from here any more")
                except ERRORS as error:
                    run.due = time.monotonic() + 60 * min(self.args.retry, self.args.push_every)
                    tell(f"{run.name} could not be pushed, which is tried again: {reason(error)}")

    def tell_progress(self) -> None:
        if not self.args.many and time.monotonic() - self.told > TELL:
            self.told = time.monotonic()
            (run,) = self.runs.values()
            if (text := run.progress()) != self.said:  # silence is a sign that it hangs
                tell(text)
            self.said = text

    def work(self) -> int:
        try:
            while self.process.poll() is None:
                self.push_what_is_due()
                self.tell_progress()
                time.sleep(TICK)
            self.printer.join(5)
            return self.end()
        except Taken:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            tell("another job has this run now, and this one ends")
            return 0

    def end(self) -> int:
        """Push what the command left; its exit code."""
        code = self.process.returncode
        code, began = code if code >= 0 else 128 - code, time.monotonic()
        while left := self.open():
            for run in left:
                run.due = 0.0
            self.push_what_is_due()
            patience = 1.0 if self.asked else self.args.patience
            if not (left := self.open()):
                break
            if time.monotonic() - began > 60 * patience or self.asked > 1:
                folders = shlex.join(str(run.folder) for run in left)
                later = f"python cloud/hub.py push --runs-dir {self.args.runs_dir} {folders}"
                fail(f"not pushed, and only on this machine: {folders}; push it later: {later}", code or 1)
            time.sleep(min(60 * self.args.retry, 60 * patience))
        for run in self.runs.values():
            if not (run.folder / "args.json").exists() and run.head:
                with suppress(*ERRORS):
                    self.withdraw(run)
        return code

    def withdraw(self, run: Run) -> None:
        """Take back the claim on a run that never began, but not what another job or other flags have left there."""
        branch = hf.branch_of(run.name)
        if hf.heads(self.hub).get(branch) == run.head:
            if "checkpoint.pt" not in hf.tree(self.hub, run.name, run.head):
                self.hub.api.delete_branch(self.hub.repo, branch=branch)


def main() -> None:
    words = sys.argv[1:]
    at = words.index("--") if "--" in words else len(words)
    args, command = tyro.cli(Args, description=__doc__, args=words[:at]), words[at + 1 :]
    hf.check_name(args.name)
    if not command:
        fail("no command; it stands behind --")
    for name in ("push_every", "retry", "patience"):
        if getattr(args, name) < 0:
            fail(f"--{name.replace('_', '-')} is {getattr(args, name)}; it takes minutes from 0")
    if not args.many:
        check_flags(command)
        if not Path(command[script_of(command)]).is_file():
            fail(f"there is no script {command[script_of(command)]}")
    hub, began = hf.open_hub(args.repo), time.monotonic()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        while True:
            try:
                hf.create(hub, private=True)
                runs, child = prepare(hub, args, command)
                break
            except ERRORS as error:
                status = getattr(getattr(error, "response", None), "status_code", None)
                is_lasting = status in (401, 403) or isinstance(error, ValueError)  # a state that is damaged
                if is_lasting or time.monotonic() - began > 60 * args.patience:
                    fail(f"{hub.repo}: {reason(error)}; nothing was started", code=1)
                tell(f"not begun yet, which is tried again: {hub.repo}: {reason(error)}")
                time.sleep(60 * args.retry)
        if child is None:
            return
        tell(shlex.join(child))
        job = Job(hub, args, runs, child)
    except KeyboardInterrupt:
        fail("stopped before it had begun", code=130)
    raise SystemExit(job.work())


if __name__ == "__main__":
    main()
