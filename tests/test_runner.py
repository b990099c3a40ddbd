"""The runner: what it starts, resumes, leaves alone, and survives. With a script that starts in 50 milliseconds."""

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import pytest
from tools import FAKE, ROOT, fake_script, lives, run, until

from benchmark import runner, runs, suites

RUN = ROOT / "benchmark" / "run.py"


class House:
    """A folder with a suite `toys` over a fake script; its runs."""

    def __init__(self, path: Path) -> None:
        self.path, self.runs, self.script = path, path / "runs" / "toys", fake_script(path)

    def suite(self, *flags: dict, seeds: int = 2, steps: int = 1000) -> None:
        """One entry for each of `flags`, on A-v1, B-v1, ..."""
        text = f'title = "Toys"\nscript = "fake.py"\nsteps = {steps}\nseeds = {seeds}\n'
        for letter, given in zip("ABCDEF", flags or [{}], strict=False):
            pairs = ", ".join(f"{name} = {str(value).lower()}" for name, value in given.items())
            text += f'[[entry]]\nenv = "{letter}-v1"\nflags = {{ {pairs} }}\n'
        (self.path / "toys.toml").write_text(text)

    def words(self, *words) -> list[str]:
        return [str(RUN), "toys.toml", "--runs-dir", "runs", *map(str, words)]

    def run(self, *words, code: int = 0):
        return run(*self.words(*words), cwd=self.path, code=code)

    def start(self, *words) -> subprocess.Popen:
        env = os.environ | {"PYTHONPATH": str(ROOT)}
        output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen([sys.executable, *self.words(*words)], cwd=self.path, env=env, **output)

    def starts(self, name: str = "*") -> list[tuple[int, int]]:
        """(step, process id) of each start of these runs."""
        lines = [line for path in self.runs.glob(f"{name}/starts.txt") for line in path.read_text().splitlines()]
        return [tuple(map(int, line.split())) for line in lines]

    def results(self) -> dict[str, str]:
        return {x.parent.name: x.read_text() for x in self.runs.glob("*/result.json") if ".old" not in x.parent.name}

    def job(self, seed: int = 1) -> runner.Job:
        entry = suites.load(self.path / "toys.toml").entries[0]
        return runner.Job("job", entry.spec("toys", seed, self.path / "runs"))


@pytest.fixture
def house(tmp_path):
    return House(tmp_path)


# ----------------------------------------------------------------------------------------- what is started, and when


def test_it_runs_what_is_missing_and_only_that(house):
    house.suite({}, {"learning-rate": 0.01}, seeds=2)
    house.run("--seeds", 1)
    assert sorted(house.results()) == ["A-v1__fake__1", "B-v1__fake__1"]
    house.run()
    assert len(house.results()) == len(house.starts()) == 4
    assert runs.read_result(house.runs / "B-v1__fake__2")["final_return"] == pytest.approx(101.2)
    assert all(path.with_name(path.name + ".log").exists() for path in house.runs.iterdir() if path.is_dir())
    assert not list(house.runs.glob("*.lock"))


def test_seed_1_of_every_entry_comes_first(house):
    house.suite({}, {}, {}, seeds=2)
    lines = [line for line in house.run("--dry-run").stdout.splitlines() if "fake.py" in line]
    found = [re.search(r"toys/(\w)-v1__fake__(\d)", line).groups() for line in lines]
    assert found == [(env, seed) for seed in "12" for env in "ABC"]


def test_dry_run_prints_commands_that_work_and_starts_nothing(house):
    house.suite({"norm-adv": False}, seeds=1)
    line, summary = house.run("--dry-run").stdout.splitlines()
    steps = int(re.search(r"--total-timesteps (\d+)", line)[1])
    assert summary.startswith("# 1 to run") and f"{steps:,} steps" in summary
    assert not (house.path / "runs").exists()
    subprocess.run(line, shell=True, cwd=house.path, check=True)
    house.run()
    assert len(house.starts()) == 1


@pytest.mark.parametrize(
    "text, seeds",
    [("3", [1, 2, 3]), ("5-5", [5]), ("4,", [4]), ("1,3,7-9", [1, 3, 7, 8, 9]), ("x", []), ("3-1", []), ("1-2-3", [])],
)
def test_seeds(text, seeds):
    assert runner.parse_seeds(text) == seeds


BAD = "--seeds x", "--only nothing", "--jobs 0", "--threads -1", "--hang-after 0"


@pytest.mark.parametrize("words", BAD)
def test_bad_input_is_one_line(house, words):
    house.suite()
    assert house.run(*words.split(), code=2).stderr.startswith("error: ") and not house.runs.exists()


def test_an_unfinished_run_is_resumed_by_the_copy_of_its_script(house):
    house.suite({"pause": 0.2}, seeds=1)
    process = house.start()
    until(lambda: list(house.runs.glob("*/checkpoint.pt")))
    process.kill()
    process.wait()
    until(lambda: not any(lives(pid) for _, pid in house.starts()))
    house.script.write_text("# a comment, which changes nothing\n" + FAKE)
    assert "--resume" in house.run("--dry-run").stdout
    house.run()
    (first, _), (second, _) = house.starts()
    assert first == 0 < second and not list(house.runs.glob("*.old*"))


@pytest.mark.parametrize("finished", [True, False])
def test_a_run_by_another_algorithm_is_kept(house, finished):
    """A finished one until --rerun-stale asks for it; an unfinished one is started over."""
    house.suite(seeds=1)
    house.run()
    folder = house.runs / "A-v1__fake__1"
    house.script.write_text(FAKE.replace("100 -", "90 -"))
    if finished:
        assert "stale" in house.run(code=1).stdout and len(house.starts()) == 1
        house.run("--rerun-stale")
    else:
        (folder / "result.json").unlink()
        house.run()
    new, old = ((x / "fake.py").read_text() for x in (folder, folder.with_name(folder.name + ".old-1")))
    assert "90 -" in new and "100 -" in old
    house.run("--rerun-stale")
    assert not list(house.runs.glob("*.old-2"))


def test_a_folder_that_is_no_run_is_moved_aside(house):
    house.suite(seeds=1)
    folder = house.runs / "A-v1__fake__1"
    folder.mkdir(parents=True)
    (folder / "notes.txt").write_text("mine")
    house.run()
    assert (house.runs / "A-v1__fake__1.old-1" / "notes.txt").read_text() == "mine" and house.results()


# --------------------------------------------------------------------------------------------------------- failures


@pytest.mark.parametrize("fail, words", [("3", []), ("0", []), ("hang", ["--hang-after", "0.01"])])
def test_a_failure_is_shown_and_stops_nothing_else(house, fail, words):
    house.suite({"fail": f'"{fail}"'}, {}, seeds=2)
    done = house.run("--jobs", 2, *words, code=1)
    assert set(house.results()) == {"B-v1__fake__1", "B-v1__fake__2"}
    assert len(house.starts("A-*")) == 2  # each is tried once
    failed = [line for line in done.stderr.splitlines() if line.startswith("failed")]
    assert house.run("--status").stdout.count("  failed  ") == 2
    assert len(failed) == 2 and all("A-v1__fake__" in line and ".log" in line for line in failed)
    assert "at half of the run" in done.stdout  # the end of the log
    assert not any(lives(pid) for _, pid in house.starts())


@pytest.mark.parametrize("fail, starts", [("1", 3), ("2", 1), ("3", 1)])
def test_retries_resume_what_may_succeed(house, fail, starts):
    house.suite({"fail": f'"{fail}"'}, seeds=1)
    house.run("--retries", 2, code=1)
    assert len(house.starts()) == starts


def test_bad_input_is_tried_with_one_seed(house):
    house.suite({"batch-size": '"many"'}, {}, seeds=3)
    house.run("--jobs", 1, code=1)
    assert len(list(house.runs.glob("A-*.log"))) == 1 and len(house.results()) == 3


def test_silence_is_what_this_runner_has_heard(house, monkeypatch):
    """When a laptop wakes up, all files are old, and no run hangs."""
    house.suite()
    job, now = house.job(), [0.0]
    monkeypatch.setattr(runner.time, "monotonic", lambda: now[0])
    job.spec.folder.mkdir(parents=True)
    for at, changed, silent in ((5, 1, False), (60, 1, False), (66, 1, True), (67, 9, False), (128, 9, True)):
        now[0] = at
        (job.spec.folder / "episodes.csv").touch()
        os.utime(job.spec.folder / "episodes.csv", (changed, changed))
        assert job.is_silent(60) == silent


def test_a_result_without_numbers_stops_nothing(house):
    house.suite(seeds=1)
    house.run()
    next(house.runs.glob("*/result.json")).write_text('{"final_return": 1.0}')
    assert "2 done of 2" in house.run("--seeds", 2).stdout


def test_a_run_that_was_killed_is_a_failure_and_can_be_resumed(house):
    house.suite({"pause": 0.1}, seeds=1)
    process = house.start()
    until(house.starts)
    os.kill(house.starts()[0][1], signal.SIGKILL)
    assert process.wait(60) == 1
    house.run()
    assert len(house.starts()) == 2 and house.results()


# --------------------------------------------------------------------------------------------------- kills and stops


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the lock alone protects")
def test_no_process_outlives_a_killed_runner(house):
    house.suite({"pause": 1}, {"pause": 1, "fail": '"stubborn"'}, seeds=1)
    process = house.start("--jobs", 2)
    until(lambda: len(house.starts()) == 2)
    process.kill()
    process.wait()
    until(lambda: not any(lives(pid) for _, pid in house.starts()), 10)


def test_killed_three_times_the_results_are_the_same(house):
    house.suite(*[{"pause": 0.04}] * 3, seeds=3)
    finished = {}
    for _ in range(3):
        begun = len(house.starts())
        process = house.start("--jobs", 3)
        until(lambda begun=begun: len(house.starts()) > begun or len(house.results()) == 9)
        time.sleep(random.uniform(0, 0.6))
        process.kill()
        process.wait()
        finished |= {name: len(house.starts(name)) for name in house.results()}
    house.run("--jobs", 3)
    disturbed = house.results()
    assert {name: len(house.starts(name)) for name in finished} == finished  # nothing finished is repeated
    shutil.rmtree(house.runs)
    house.run("--jobs", 3)
    assert house.results() == disturbed and len(disturbed) == 9


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_the_runs_gently(house, number):
    house.suite({"pause": 0.05}, {"pause": 0.05}, seeds=2, steps=100_000)
    process = house.start("--jobs", 2)
    until(lambda: len(list(house.runs.glob("*/checkpoint.pt"))) == 2)
    process.send_signal(number)
    assert process.wait(60) == 130
    assert len(house.starts()) == 2 and not any(lives(pid) for _, pid in house.starts())
    assert "failed" not in process.stdout.read() and not list(house.runs.glob("*.lock"))


def test_a_run_that_does_not_stop_is_killed_when_asked_twice(house):
    house.suite({"pause": 0.05, "fail": '"stubborn"'}, seeds=1, steps=100_000)
    process = house.start()
    until(lambda: list(house.runs.glob("*/checkpoint.pt")))
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None and lives(house.starts()[0][1])
    process.send_signal(signal.SIGINT)
    assert process.wait(runner.PATIENCE / 2) == 130 and not lives(house.starts()[0][1])


def test_what_a_run_leaves_behind_is_ended(house):
    child = "    if not os.fork():\n        Path('child').write_text(str(os.getpid()))\n        time.sleep(100)\n"
    house.script.write_text(FAKE.replace("    folder, step =", child + "    folder, step =", 1))
    house.suite(seeds=1)
    house.run()
    until(lambda: not lives(int((house.path / "child").read_text())), 10)


# ---------------------------------------------------------------------------------------------------- several runners


def test_two_runners_share_the_work(house):
    house.suite(*[{"pause": 0.05}] * 3, seeds=2)
    both = [house.start("--jobs", 1) for _ in range(2)]
    assert [process.wait(60) for process in both] == [0, 0]
    assert len(house.results()) == len(house.starts()) == 6
    assert all(process.stdout.read().count("running ") >= 1 for process in both)


def test_status_shows_the_runs_of_another_runner(house):
    house.suite({"pause": 0.1}, {}, seeds=1, steps=3000)
    process = house.start("--jobs", 1)
    until(lambda: list(house.runs.glob("A*/checkpoint.pt")))
    shown = house.run("--status").stdout
    assert re.search(r"A-v1__fake__1 +running +\d", shown) and re.search("B-v1__fake__1 +waiting", shown)
    assert process.wait(60) == 0 and len(house.starts()) == 2
    assert "2 done of 2" in house.run("--status").stdout


# ---------------------------------------------------------------------------------------------------- cores and GPUs


def machine(monkeypatch, tmp_path, visible: str | None, gpus: int = 0) -> None:
    """This process sees these GPUs, on a machine with so many."""
    lines = "".join(f"GPU {i}: H200 (UUID: GPU-{i})\\n  MIG 1g device 0\\n" for i in range(gpus))
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\nprintf '{lines}'\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)


@pytest.mark.parametrize(
    "visible, wanted, found",
    [
        (None, (), ["0", "1"]),
        (None, ("1",), ["1"]),
        ("4,5", (), ["4", "5"]),
        ("4,5", ("1",), ["5"]),  # the second of those that this process may use
        ("4,5", ("GPU-abc",), ["GPU-abc"]),
        ("", (), []),
        ("-1", (), []),
        ("4,5", ("2",), None),
    ],
)
def test_gpus_are_those_that_this_process_sees(monkeypatch, tmp_path, visible, wanted, found):
    machine(monkeypatch, tmp_path, visible, gpus=2)
    with nullcontext() if found is not None else pytest.raises(SystemExit, match="2"):
        assert runner.find_gpus(wanted) == found


@pytest.mark.parametrize(
    "jobs, threads, gpus, per_gpu, count",
    [(None, 1, [], 1, 8), (None, 3, [], 1, 2), (5, 1, [], 1, 5), (None, 4, ["4", "5"], 3, 6), (4, 1, ["4", "5"], 3, 4)],
)
def test_slots(monkeypatch, jobs, threads, gpus, per_gpu, count):
    monkeypatch.setattr(runner, "cores", lambda: 8)
    found = runner.slots(jobs, threads, gpus, per_gpu)
    assert len(found) == count and set(found) <= set(gpus or [None])
    assert not gpus or abs(found.count("4") - found.count("5")) <= 1


def test_each_run_sees_its_gpu_and_only_scripts_that_use_one_get_one(house, monkeypatch, tmp_path):
    """Half of the runs ask for CUDA where there is one; two slots on GPUs, one without."""
    machine(monkeypatch, tmp_path, "4,5")
    gpu_script = house.script.with_name("gpu.py")
    gpu_script.write_text(FAKE.replace('device: str = "cpu"', 'device: str = "cuda" if os.environ else "cpu"'))
    assert runner.uses_gpu(gpu_script, None) and not runner.uses_gpu(house.script, None)
    assert runner.uses_gpu(house.script, "cuda") and not runner.uses_gpu(gpu_script, "cpu")
    house.suite({"pause": 0.05}, {"pause": 0.05}, seeds=1)
    text = (house.path / "toys.toml").read_text().replace("[[entry]]", '[[entry]]\nscript = "gpu.py"', 1)
    (house.path / "toys.toml").write_text(text)
    house.run("--seeds", 3, "--jobs", 2)
    logs = {path.name[0]: path.read_text() for path in house.runs.glob("*.log")}
    seen = {gpu for path in house.runs.glob("A*.log") for gpu in re.findall(r"DEVICES=(\d)", path.read_text())}
    assert seen == {"4", "5"} and "DEVICES" not in logs["B"]


# ----------------------------------------------------------------------------------------------------------- progress


@pytest.mark.slow
def test_the_smoke_suite_killed_three_times_gives_the_same_results(tmp_path):
    """Real scripts: their episodes and evaluations are the same to the bit."""

    def outcome(folder: Path) -> dict:
        files = sorted(folder.glob("smoke/*/episodes.csv"))
        rows = {x.parent.name: runs.read_episodes(x.parent).drop(columns="seconds").to_csv() for x in files}
        scores = ("final_return", "eval_return_mean", "eval_return_std")
        return {name: (rows[name], [runs.read_result(folder / "smoke" / name)[x] for x in scores]) for name in rows}

    words = [str(RUN), "smoke", "--jobs", "2", "--runs-dir"]
    for _ in range(3):
        process = subprocess.Popen([sys.executable, *words, str(tmp_path / "a")], stdout=subprocess.DEVNULL)
        time.sleep(random.uniform(8, 20))
        process.kill()
        process.wait()
    run(*words, tmp_path / "a")
    run(*words, tmp_path / "b")
    assert outcome(tmp_path / "a") == outcome(tmp_path / "b") != {}
