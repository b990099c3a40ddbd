"""cloud/job.py: a job that is killed, started twice, cut off from the Hub, or stopped ends as if nothing had happened.

Machines are empty folders; the Hub is a stand-in (loopback_hub.py).
"""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from loopback_hub import Loopback, begin, call_main, connect, files_in, spec, starts
from tools import FAKE, ROOT, fake_script, lives, until

from benchmark.runs import read_args, read_json
from cloud import hub, job

DEV, NAME = "me/dev", "s/A-v1__fake__1"
JOB = "--runs-dir", "runs", "--push-every", "0.001"
FLAGS = "--env-id", "A-v1", "--total-timesteps", "1000", "--seed", "1"
SUITE = """
title = "t"
steps = 1000
seeds = 3
entry = [{ script = "fake.py", env = "A-v1", flags = { pause = 0.05 } }]
"""


@pytest.fixture
def there(tmp_path, monkeypatch) -> Loopback:
    return connect(tmp_path / "hub", monkeypatch)


def machine(there: Loopback, script: str = FAKE) -> Path:
    """A new machine: a folder with the script and nothing else."""
    path = there.root.with_name(f"machine-{len(list(there.root.parent.iterdir()))}")
    path.mkdir()
    (path / "fake.py").write_text(script)
    return path


@pytest.fixture
def work(there, monkeypatch, capfd):
    """A job in this process: its output."""
    monkeypatch.setattr(job, "TICK", 0.02)
    monkeypatch.setattr(job, "RETRY", 0.1)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def call(path: Path, *words, name: str = NAME, flags=(), code: int = 0) -> str:
        monkeypatch.chdir(path)
        command = words if "--many" in flags else ["fake.py", *FLAGS, *words]
        return call_main(job, [name, *JOB, *flags, "--", "python", *command], monkeypatch, capfd, code)

    yield call
    for number, handler in handlers.items():
        signal.signal(number, handler)


def start(path: Path, *command, name: str = NAME, flags=()) -> subprocess.Popen:
    """A job in a process of its own."""
    words = [sys.executable, ROOT / "tests/loopback_hub.py", "cloud.job", name, *JOB, *flags, "--", "python", *command]
    return subprocess.Popen(words, cwd=path)


def test_a_job_killed_twice_ends_as_if_nothing_had_happened(there, work):
    state, result = there.bucket(DEV) / NAME, there.repository(DEV) / NAME
    for step in (300, 600):
        process = start(machine(there), "fake.py", *FLAGS, "--pause", "0.1")
        until(lambda step=step: read_json(state / "checkpoint.pt").get("step", 0) >= step)
        process.kill()
        process.wait()
        until(lambda: not lives(starts(state)[-1][1]))
    assert start(machine(there), "fake.py", *FLAGS, "--pause", "0.1").wait() == 0
    begun = [step for step, _ in starts(result)]
    assert len(begun) == 3 and begun[0] == 0 and begun[1] >= 300 and begun[2] >= 600
    assert not files_in(there.bucket(DEV)) and (there.root / "commits").read_text().count("\n") == 1
    path = machine(there)
    work(path, "--pause", "0.1")  # it is finished: pulled, and not started
    assert len(starts(path / "runs" / NAME)) == 3
    work(machine(there), "--pause", "0.1", name="undisturbed")
    for name in ("episodes.csv", "result.json"):
        assert (result / name).read_text() == (there.repository(DEV) / "undisturbed" / name).read_text()


def test_a_run_is_the_same_if_flags_and_algorithm_are(there, work, tmp_path):
    """As at home: an edited comment does not matter, another flag does."""
    mine, result, path = hub.Hub(DEV), there.repository(DEV) / NAME, machine(there)
    mine.create()
    begin(spec(tmp_path, f"runs/{NAME}"), 500)
    mine.save(tmp_path / "runs", NAME)
    work(machine(there, f"# a comment\n{FAKE}"))
    assert [step for step, _ in starts(result)] == [500]
    mine.save(tmp_path / "runs", NAME)
    work(path, "--learning-rate", "0.1")
    assert [step for step, _ in starts(result)] == [0] and read_args(result)["args"]["learning_rate"] == 0.1
    work(path)
    assert (path / "runs" / f"{NAME}.old-1").exists()


def test_exit_codes_are_the_commands(there, work):
    work(machine(there), "--fail", "3", code=3)
    assert read_json(there.bucket(DEV) / NAME / "checkpoint.pt")["step"] == 400
    work(machine(there), "--env-id", "Bad-v1", name="bad", code=2)
    assert not [x for x in files_in(there.bucket(DEV)) if x.startswith("bad")]
    work(machine(there), "-c", "print(1)", name="x", flags=["--many"], code=1)  # what it made is not on the Hub
    code = "import os; print(os.environ, flush=True); os.kill(os.getpid(), 9)"
    assert "FOLIO_HUB" in work(machine(there), "-c", code, name="x", flags=["--many"], code=137)  # and not the token


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_job_that_is_stopped_pushes_what_is_there(number, code, there):
    process = start(machine(there), "fake.py", *FLAGS, "--fail", "hang")
    until((there.bucket(DEV) / NAME / "checkpoint.pt").exists)
    process.send_signal(number)
    assert process.wait() == code and read_json(there.bucket(DEV) / NAME / "checkpoint.pt")["step"] == 400


def test_a_hub_that_is_down_costs_the_run_nothing(there, work, monkeypatch):
    down, path = there.root / "down", machine(there)
    code = f"import os, pathlib; os.makedirs('runs/x', exist_ok=True); [open(x, 'w') for x in ('runs/x/f', '{down}')]"
    for _ in ("at its end", "at its start"):
        work(path, "-c", code, name="x", flags=["--many", "--patience", "0"], code=1)
        assert (path / "runs/x/f").exists() and not files_in(there.bucket(DEV))
    monkeypatch.setattr(job, "log", lambda text: down.unlink() if "retrying" in text else None)
    work(path, "-c", code, name="x", flags=["--many"])
    assert list(files_in(there.bucket(DEV))) == ["x/f"] and not down.exists()


def test_many_runs_are_resumed_on_another_machine_and_none_is_made_twice(there):
    """The suite's runner under `kill -9`; what is no run travels, too."""
    command = ROOT / "benchmark" / "run.py", "../s.toml", "--runs-dir", "runs", "--jobs", "1"
    fake_script(there.root.parent).with_name("s.toml").write_text(SUITE)
    process = start(machine(there), *command, name="s", flags=["--many"])
    until((there.bucket(DEV) / "s/A-v1__fake__2/checkpoint.pt").exists)
    process.kill()
    process.wait()
    assert start(machine(there), *command, name="s", flags=["--many"]).wait() == 0
    folders = [there.repository(DEV) / f"s/A-v1__fake__{seed}" for seed in (1, 2, 3)]
    begun = [[step for step, _ in starts(folder)] for folder in folders]
    assert begun[0] == begun[2] == [0] and len(begun[1]) == 2 and begun[1][1] > 0
    assert {Path(path).suffix for path in files_in(there.bucket(DEV))} == {".log"}
    assert (there.root / "commits").read_text() == "3 runs\n"
