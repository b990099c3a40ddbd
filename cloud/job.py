"""Run a command on a rented machine, and keep what it writes on the Hub: the last command of each cloud/dstack.py task.

    python cloud/job.py CartPole-v1__ppo__1 -- python algos/ppo.py --env-id CartPole-v1 --seed 1
    python cloud/job.py atari --many -- python benchmark/run.py atari

The first form is for a script that writes a run folder, here runs/NAME. A run that the Hub has is pulled and resumed;
if it is finished, nothing is started. If the Hub has nothing, or a run with other flags or another algorithm
(benchmark.runs.difference), the command begins, and its first push replaces that run's state. --many is for commands
that make many runs below runs/NAME, and resume them by themselves.

Everything is pushed to the bucket every --push-every minutes and at the end, when finished runs move to the repository.
A push that fails is retried, at the end for --patience minutes. docs/cloud.md has what survives what.

SIGINT and SIGTERM are passed on to the command. The exit code is the command's (128 + n after signal n), 1 if the Hub
cannot be reached, 2 for bad input.
"""

import os
import shlex
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import tyro
from huggingface_hub.utils import disable_progress_bars

from benchmark.runs import RUNS, Spec, defaults, difference, dying_with_parent, fail, flags_of, move_aside, read_result
from cloud.hub import Hub, check_name, open_hub, reason

TICK, RETRY = 1.0, 60.0  # seconds between looks at the command, and between attempts to reach the Hub


@dataclass
class Args:
    name: tyro.conf.Positional[str]  # of the run, or with --many of the folder of runs: on the Hub and in --runs-dir
    many: bool = False  # the command makes many runs, below --runs-dir / NAME
    repo: str = ""  # repository and bucket on the Hub; default: $FOLIO_HUB
    runs_dir: Path = RUNS  # where the run folders are
    push_every: float = 10.0  # minutes between pushes
    patience: float = 60.0  # minutes to retry when the Hub cannot be reached, at the start and at the end


def log(text: str) -> None:
    print(f"job: {text}", flush=True)


def find_script(command: list[str]) -> int:
    """Where in a command the script is."""
    found = [i for i, word in enumerate(command) if word.endswith(".py")]
    return found[0] if found else fail(f"no script in {shlex.join(command)}")


def makes_a_run(script: Path) -> bool:
    """Whether a script writes a run folder, which the job may name."""
    return "run_dir" in defaults(script.read_text()) if script.exists() else fail(f"there is no script {script}")


def prepare(hub: Hub, args: Args, command: list[str]) -> list[str]:
    """Pull what there is; the command to start. If the run is finished, that is all."""
    hub.create()
    found = hub.find(args.name)
    if args.many:
        newest = {remote.name: remote for remote in found}  # the bucket's, where both have a run
        log(f"pulled {len(hub.pull(args.runs_dir, newest.values()))} of {len(newest)} runs and files of {args.name}")
        return command
    at, folder = find_script(command), args.runs_dir / args.name
    spec = Spec(Path(command[at]), flags_of(command[at + 1 :]), folder)
    if folder.exists() and difference(folder, spec):
        move_aside(folder)
    hub.pull(args.runs_dir, [x for x in found if x.name == args.name], accept=lambda path: not difference(path, spec))
    if read_result(folder):
        hub.push(args.runs_dir, args.name)
        log(f"{args.name} is finished")
        raise SystemExit(0)
    return spec.resume_command() if folder.exists() else [*command, "--run-dir", str(folder)]


def patiently(attempt, minutes: float, stops: list[int]):
    """Call `attempt` until it succeeds, for so many minutes, and only a few when the job is to stop."""
    began = time.monotonic()
    while True:
        try:
            return attempt()
        except Exception as error:  # of the Hub's client, of its Rust part, or of the network: the run must not suffer
            waited = (time.monotonic() - began) / 60
            if waited > (min(minutes, 5) if stops else minutes) or len(stops) > 1:
                raise
            log(f"the Hub cannot be reached, retrying: {reason(error)}")
            time.sleep(RETRY)


def start(command: list[str]) -> tuple[subprocess.Popen, subprocess.Popen]:
    """Start the command, which ends with this process, and a cat that prints its output: it sees no terminal."""
    log(shlex.join(command))
    env = {name: value for name, value in os.environ.items() if name != "HF_TOKEN"}  # the command does not need it
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    process = subprocess.Popen(command, env=env, start_new_session=True, preexec_fn=dying_with_parent(), **pipes)
    printer = subprocess.Popen(["cat"], stdin=process.stdout, start_new_session=True)
    process.stdout.close()
    return process, printer


def work(hub: Hub, args: Args, command: list[str]) -> int:
    """Run the command and push what it writes; its exit code."""
    process, printer = start(command)
    stops: list[int] = []

    def pass_on(number: int, _) -> None:
        stops.append(number)
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, pass_on)
    pushed = time.monotonic()
    while os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        time.sleep(min(TICK, 60 * args.push_every))
        if time.monotonic() - pushed > 60 * args.push_every and (args.runs_dir / args.name).exists():
            pushed = time.monotonic()
            try:
                hub.save(args.runs_dir, args.name)
            except Exception as error:
                log(f"push failed, the next one is in {args.push_every:g} minutes: {reason(error)}")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: stops.append(number))
    with suppress(ProcessLookupError, PermissionError):  # before the process is reaped and its number is free
        os.killpg(process.pid, signal.SIGKILL)  # what it left behind
    code = process.wait()
    code = code if code >= 0 else 128 - code
    with suppress(subprocess.TimeoutExpired):
        printer.wait(5)
    if (args.runs_dir / args.name).exists():
        try:
            patiently(lambda: hub.push(args.runs_dir, args.name), args.patience, stops)
            log(f"pushed {args.name}")
        except Exception as error:
            fail(f"{args.runs_dir / args.name} is only on this machine, the push failed: {reason(error)}", code or 1)
    elif code == 0:
        fail(f"the command wrote nothing to {args.runs_dir / args.name}; what it wrote elsewhere is lost", 1)
    return code


def main() -> None:
    words = sys.argv[1:]
    at = words.index("--") if "--" in words else len(words)
    args, command = tyro.cli(Args, description=__doc__, args=words[:at]), words[at + 1 :]
    check_name(args.name)
    if not command:
        fail("no command; it follows --")
    hub = open_hub(args.repo)
    disable_progress_bars()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if not args.many and not makes_a_run(script := Path(command[find_script(command)])):
        fail(f"{script} has no --run-dir; --many is for commands that make many runs")
    try:
        begun = patiently(lambda: prepare(hub, args, command), args.patience, [])
    except (Exception, KeyboardInterrupt) as error:
        fail(f"nothing was started: {reason(error)}", code=130 if isinstance(error, KeyboardInterrupt) else 1)
    raise SystemExit(work(hub, args, begun))


if __name__ == "__main__":
    main()
