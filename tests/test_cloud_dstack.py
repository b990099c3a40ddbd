"""cloud/dstack.py, alone and as the backend of benchmark/run.py, with stand-ins for dstack (below) and the Hub
(loopback_hub.py). With the real dstack server: test_dstack_server.py."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import pytest
import yaml
from loopback_hub import Loopback, call_main, connect, files_in, starts
from tools import ROOT, fake_script, until

from benchmark import run as runner
from benchmark.runs import Spec, read_args, read_json
from cloud import dstack, hub, job

ENTRY = '[[entry]]\nscript = "{}"\nenv = "{}"\nseeds = {}\nflags = {{ pause = 0.1 }}\n'


class Cloud:
    """A stand-in for dstack's CLI: machines are folders with what the archive holds, tasks are processes there."""

    def __init__(self, path: Path) -> None:
        self.path, self.tasks, self.calls = path, {}, []

    def call(self, *words, cwd: Path | None = None, stdin: str = "y") -> str:
        self.calls.append(words[0])
        match words:
            case "apply", "-f", file, *flags:
                task = json.loads((cwd / file).read_text())
                if "-y" in flags:
                    self.start(task, cwd)
                return f"{task['resources']}\n$0.01\nSubmit the run? [y/n]: {stdin}"
            case "ps", *_:
                return json.dumps({"runs": [self.record(name) for name in self.tasks]})
            case "run", "get", name, "--json":
                return json.dumps(self.record(name))
            case "logs", name:
                return (self.path / f"{name}.log").read_text()
            case "stop", "-y", name:
                self.tasks[name][1].send_signal(signal.SIGTERM)
                return "Stopped"

    def start(self, task: dict, folder: Path) -> None:
        machine = tempfile.mkdtemp(dir=self.path)
        with tarfile.open(folder / "folio.tgz") as tar:
            tar.extractall(machine, filter="data")
        words = [sys.executable, ROOT / "tests/loopback_hub.py", "cloud.job", "--push-every", "0.005"]
        words += shlex.split(task["commands"][-1])[3:]  # exec python cloud/job.py
        with (self.path / f"{task['name']}.log").open("w") as log:
            pipes = {"stdout": log, "stderr": log, "env": os.environ | {"PYTHONPATH": machine}}
            self.tasks[task["name"]] = task, subprocess.Popen(words, cwd=machine, **pipes), Path(machine)

    def record(self, name: str) -> dict:
        task, process, _ = self.tasks[name]
        code = process.poll()
        spec = {"run_name": name, "configuration": task | {"env": {}}}
        run = {"run_spec": spec, "submitted_at": "2026-11-29T12:00", "latest_job_submission": {"exit_status": code}}
        return run | {"status": {None: "running", 0: "done"}.get(code, "failed")}


@pytest.fixture
def clone(tmp_path, monkeypatch) -> Path:
    """A small clone of this repository, with a script that starts at once and a suite."""
    folder = tmp_path / "clone"
    for name in ("benchmark", "cloud"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("results", "suites", "*.csv"))
    (folder / "algos").mkdir()
    script = fake_script(folder / "algos")
    (folder / "s.toml").write_text(f'title = "t"\nsteps = 1000\n{ENTRY.format(script, "A-v1", 2)}')
    (folder / ".gitignore").write_text("ignored\n/runs/\n__pycache__/\n")
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "first"]):
        subprocess.run(["git", "-c", "user.name=x", "-c", "user.email=x@y", "-C", folder, *words], check=True)
    monkeypatch.setattr(dstack, "ROOT", folder)
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def cloud(clone, tmp_path, monkeypatch):
    found = Cloud(tmp_path)
    connect(tmp_path, monkeypatch)
    monkeypatch.setenv("FOLIO_DSTACK", sys.executable)
    monkeypatch.setattr(dstack, "call", found.call)
    monkeypatch.setattr(dstack, "LOOK", 0.2)
    yield found
    for _, process, _ in found.tasks.values():
        process.kill()
        process.wait()


@pytest.fixture
def main(monkeypatch, capsys):
    return lambda module, *words, code=0: call_main(module, words, monkeypatch, capsys, code)


def describe(folder: Path) -> str:
    words = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    return subprocess.run(words, cwd=folder, capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.parametrize("change", ["", "edit", "delete"])
def test_what_is_packed_is_the_working_tree_and_knows_its_commit(change, clone, tmp_path):
    for name in ("ignored", "new.py", *(["algos/fake.py"] if change else [])):
        (clone / name).write_text("changed")
    if change == "delete":
        (clone / "algos/fake.py").unlink()
    dstack.pack(tmp_path / "folio.tgz", clone)
    with tarfile.open(tmp_path / "folio.tgz") as tar:
        assert {(info.uid, info.uname) for info in tar} == {(0, "root")}  # git wants its files to be its user's
        tar.extractall(tmp_path / "there", filter="data")
    assert describe(tmp_path / "there") == describe(clone) and describe(clone).endswith("-dirty") == bool(change)
    names = {name for name in files_in(tmp_path / "there") if not name.startswith(".git/")}
    assert {"cloud/job.py", "new.py"} < names and "ignored" not in names
    assert ("algos/fake.py" in names) == (change != "delete")


def test_this_repository_is_small_enough(tmp_path):
    dstack.pack(tmp_path / "folio.tgz", ROOT)
    assert (tmp_path / "folio.tgz").stat().st_size < 1_500_000  # dstack takes 2 MB


def test_task_names_are_dstacks_and_distinguish_runs():
    names = ["x" * 200, "x" * 201, "A/b", "a-b", "A-b", "__", "9"]
    tasks = {dstack.task_name(name) for name in names}
    assert len(tasks) == len(names) and dstack.task_name("my-run") == "my-run"
    assert all(re.fullmatch("[a-z][a-z0-9-]{1,40}", task) for task in tasks), tasks


@pytest.mark.parametrize(
    "command, name, many, template",
    [
        ("algos/ppo_atari.py --env-id ALE/Pong-v5 --seed 3", "ALE-Pong-v5__ppo_atari__3__20.*", False, "gpu"),
        ("algos/ppo.py --device cuda", "default__ppo__1__20.*", False, "gpu"),
        ("benchmark/run.py classic --seeds 3", "classic", True, "cpu"),
        ("tuner/run.py search ppo", "tuner/ppo", True, "cpu"),
        ("tuner/run.py search ppo --env-id a:B-v1", "tuner/a-B-v1__ppo", True, "cpu"),
        ("tuner/run.py validate x --name y", "tuner/x", True, "cpu"),
        ("tuner/run.py validate runs/tuner/x", "tuner/x", True, "cpu"),
    ],
)
def test_a_job_is_named_by_what_its_command_writes(command, name, many, template):
    found, is_many, words = dstack.name_job(["python", *command.split()])
    assert re.fullmatch(name, found) and is_many == many
    assert dstack.find_template("auto", words).name == f"{template}.dstack.yml"
    assert "search" not in words or words[-2:] == ["--name", found.removeprefix("tuner/")]


def test_a_task_is_the_template_and_no_secret_is_in_it():
    path = dstack.HERE / "gpu.dstack.yml"
    original = yaml.safe_load(path.read_text())
    task = dstack.make_task(path, "s/r", ["python", "x.py", "a b"], "me/dev", gpu="H100:2", max_price=0.5, cpu=None)
    assert task["resources"] == original["resources"] | {"gpu": "H100:2"} and task["max_price"] == 0.5
    assert task["commands"] == [*original["commands"], "exec python cloud/job.py s/r -- python x.py 'a b'"]
    assert {"HF_TOKEN", "FOLIO_HUB=me/dev"} <= set(task["env"]) and "hf_" not in json.dumps(task)
    for path in dstack.HERE.glob("?pu*.dstack.yml"):
        # uv does not reach its index; as the job's exit code, 2 would mean bad input
        commands = "uv() { return 2; }; true && " + " && ".join(yaml.safe_load(path.read_text())["commands"][1:])
        assert subprocess.run(["bash", "-c", commands]).returncode == 1
    cores = [dstack.at_least(3, "16.."), dstack.at_least(3, 2), dstack.at_least(4, "x86:4..8")]
    assert cores == ["16..", "3..", "x86:4..8"]  # the larger of the template's and --threads


@pytest.mark.parametrize(
    "module, words",
    [
        (dstack, "-- ls"),
        (dstack, "-- python algos/missing.py"),
        (dstack, "-- python benchmark/run.py a b"),
        (dstack, "--template tpu -- python algos/ppo.py"),
        (dstack, "--template cloud/fleet.dstack.yml -- python algos/ppo.py"),
        (dstack, "-- python algos/ppo.py --run-dir runs/x"),
        (dstack, "submit python algos/ppo.py"),
        (dstack, "-- python benchmark/run.py classic --runs-dir out"),
        (dstack, "-- python tuner/run.py search ppo --studies out"),
        (dstack, "-- python tuner/run.py search runs/tuner/x/narrow.toml"),
        (dstack, "list"),
        (job, "../x -- python algos/ppo.py"),
        (job, "x -- python benchmark/run.py"),
        (hub, "publish s"),
    ],
)
def test_bad_input_is_one_line(module, words, main, monkeypatch):
    monkeypatch.chdir(ROOT)
    for name, value in {"FOLIO_DSTACK": "/bin/false", "FOLIO_HUB": "me/dev", "HF_TOKEN": "hf_token"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("FOLIO_HUB_PUBLIC", raising=False)
    assert main(module, *words.split(), code=2).startswith("error: ")


def test_a_command_is_shown_with_prices_submitted_once_and_stopped(cloud, clone, main, tmp_path, monkeypatch):
    words = ["python", "algos/fake.py", "--env-id", "A-v1", "--fail", "hang"]
    shown = main(dstack, "submit", "--dry-run", "--cpu", "9", "--", *words)
    assert "'cpu': '9'" in shown and "$0.01" in shown and "[y/n]" not in shown and not cloud.tasks
    for _ in range(2):
        main(dstack, "--name", "s/r", "--", *words)
    assert len(cloud.tasks) == 1 and cloud.calls.count("apply") == 2 and "running" in main(dstack, "list")
    state = Loopback(tmp_path).bucket("me/dev") / "s/r"
    until((state / "checkpoint.pt").exists)
    main(dstack, "stop", "s/r")
    ((_, process, machine),) = cloud.tasks.values()
    assert process.wait() == 143 and read_json(state / "checkpoint.pt")["step"] == 400
    assert "algos/fake.py" in main(dstack, "logs", "s/r") and describe(machine) == describe(clone)
    monkeypatch.setenv("FOLIO_HUB", "")
    monkeypatch.setenv("FOLIO_DSTACK", "")
    monkeypatch.setattr(dstack, "get_token", lambda: None)
    error = main(dstack, "--", *words, code=2)  # all that is missing is named
    assert all(what in error for what in ("FOLIO_HUB=", "'dstack[server]", "HF_TOKEN="))


def test_a_suite_is_made_in_the_cloud_and_nothing_twice(cloud, clone, main, tmp_path):
    """A run that fails, or cannot be submitted, does not stop the others. dstack is asked once for all."""
    scripts = {"Bad-v1": clone / "algos/fake.py", "B-v1": fake_script(tmp_path, "outside")}
    with (clone / "s.toml").open("a") as file:
        file.writelines(ENTRY.format(script, env, 1) for env, script in scripts.items())
    out = main(runner, "s.toml", "--backend", "dstack", "--runs-dir", "runs", code=1)
    failed = {line.split()[1] for line in out.splitlines() if line.startswith("failed:")}
    assert failed == {"s/Bad-v1__fake__1:", "s/B-v1__outside__1:"} and cloud.calls.count("apply") == 3
    assert "cannot make Bad-v1" in Path("runs/s/Bad-v1__fake__1.log").read_text()
    for seed in (1, 2):
        folder = Path("runs/s", f"A-v1__fake__{seed}")
        assert (folder / "result.json").exists() and read_args(folder)["args"]["seed"] == seed
        assert len(starts(folder)) == 1
    shutil.rmtree("runs")  # elsewhere, what is finished is pulled
    main(runner, "s.toml", "--backend", "dstack", "--runs-dir", "runs", "--only", "A-v1__fake")
    assert Path("runs/s/A-v1__fake__2/result.json").exists() and cloud.calls.count("apply") == 3
    backend, before = dstack.Dstack("cpu", Path("runs")), cloud.calls.count("ps")
    dstack.LOOK = 100
    assert len([backend.active() for _ in range(50)]) == 50 and cloud.calls.count("ps") == before


def test_jobs_outlive_the_runner_are_found_again_and_resumed_after_a_stop(cloud, clone, tmp_path, monkeypatch, capsys):
    flags = {"env_id": "A-v1", "total_timesteps": 1000, "seed": 1, "pause": 0.2}
    spec = Spec(clone / "algos/fake.py", flags, clone / "runs/s/r")
    spec.folder.parent.mkdir(parents=True)

    def start():
        backend = dstack.Dstack("cpu", clone / "runs")
        return backend.start(spec, spec.command(), slot=None, threads=1, log=clone / "runs/s/r.log", lock=0)

    dstack.LOOK = 1000  # a runner that is killed never looks again
    start()
    until((Loopback(tmp_path).bucket("me/dev") / "s/r/checkpoint.pt").exists)
    dstack.LOOK = 0.2
    monkeypatch.setattr(dstack, "call", lambda *words, **how: 1 / 0 if "stop" in words else cloud.call(*words, **how))
    handle = start()
    handle.stop()
    until(lambda: handle.poll() is not None)
    assert handle.poll() == 1 and "dstack.py stop s/r" in capsys.readouterr().err
    monkeypatch.setattr(dstack, "call", cloud.call)
    handle = start()
    handle.stop()
    until(lambda: handle.poll() is not None)
    assert handle.poll() == 130 and cloud.calls.count("apply") == 1
    assert cloud.tasks[dstack.task_name("s/r")][1].wait() == 143
    handle = start()
    until(lambda: handle.poll() is not None)
    assert handle.poll() == 0 and cloud.calls.count("apply") == 2
    assert [step > 0 for step, _ in starts(spec.folder)] == [False, True]
