"""cloud/dstack.py, alone and as backend of benchmark/run.py, with a stand-in for dstack's CLI that runs tasks as local
processes (loopback_dstack.py), through a stand-in for the Hub. With the real server: test_dstack_server.py."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from conftest import ROOT, TIMEOUT, bits
from loopback import LoopbackHub

from cloud import dstack

TESTS = Path(__file__).resolve().parent
TOKEN, DEV = "hf_good", "me/folio-dev"


def run(*words, cwd: Path = ROOT, env: dict | None = None, timeout: float = TIMEOUT) -> SimpleNamespace:
    """cloud/dstack.py as a user starts it."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_TOKEN": TOKEN, "FOLIO_HUB": DEV} | (env or {})
    command = [sys.executable, ROOT / "cloud" / "dstack.py", *map(str, words)]
    done = subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout, check=False
    )
    assert TOKEN not in done.stdout + done.stderr
    return SimpleNamespace(code=done.returncode, out=done.stdout, err=done.stderr)


def until(condition, what: str = "it", pause: float = 0.1) -> None:
    end = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < end, f"waited in vain for {what}"
        time.sleep(pause)


# ------------------------------------------------------------------------------------------------- what is sent there


@pytest.fixture
def repository(tmp_path) -> Path:
    """A git repository with everything that git status can say of a file."""
    folder = tmp_path / "repo"
    for path in ("algos/a.py", "gone.py", "docs/plots/big.svg", "benchmark/results/x.csv", ".gitignore", "sub/run.sh"):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(f"{path}\n")
    (folder / ".gitignore").write_text("ignored\n/runs/\n")
    (folder / "sub" / "run.sh").chmod(0o755)
    git = ["git", "-c", "user.name=x", "-c", "user.email=x@y", "-C", folder]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "-qm", "first"], check=True)
    return folder


def describe(folder: Path) -> str:
    words = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    return subprocess.run(words, cwd=folder, capture_output=True, text=True, check=True).stdout.strip()


def unpacked(repository: Path, tmp_path: Path) -> Path:
    dstack.pack(tmp_path / "folio.tgz", repository)
    folder = tmp_path / "there"
    shutil.rmtree(folder, ignore_errors=True)
    with tarfile.open(tmp_path / "folio.tgz") as tar:
        assert {(info.uid, info.uname) for info in tar} == {(0, "root")}  # git wants its files to be its user's
        tar.extractall(folder, filter="data")
    return folder


def test_what_is_packed_is_the_working_tree_and_knows_its_commit(repository, tmp_path):
    there = unpacked(repository, tmp_path)
    assert describe(there) == describe(repository) and not describe(there).endswith("-dirty")
    files = {str(path.relative_to(there)) for path in there.rglob("*") if path.is_file() and ".git" not in path.parts}
    assert files == {"algos/a.py", "gone.py", ".gitignore", "sub/run.sh"}
    assert os.access(there / "sub" / "run.sh", os.X_OK) and str(repository) not in (there / ".git/config").read_text()


@pytest.mark.parametrize("change", ["edit", "delete", "stage"])
def test_uncommitted_changes_are_packed_and_seen(change, repository, tmp_path):
    (repository / "ignored").write_text("x")
    (repository / "new.py").write_text("new\n")
    assert not describe(unpacked(repository, tmp_path)).endswith("-dirty")  # as git has it: not a change of what it has
    path = repository / "algos" / "a.py"
    path.unlink() if change == "delete" else path.write_text("changed\n")
    if change == "stage":
        subprocess.run(["git", "-C", repository, "add", "."], check=True)
    there = unpacked(repository, tmp_path)
    assert describe(there) == describe(repository) and describe(there).endswith("-dirty")
    assert (there / "new.py").read_text() == "new\n" and not (there / "ignored").exists()
    assert (
        not (there / "algos/a.py").exists() if change == "delete" else (there / "algos/a.py").read_text() == "changed\n"
    )


def test_this_repository_is_small_enough(tmp_path):
    dstack.pack(tmp_path / "folio.tgz")
    assert (tmp_path / "folio.tgz").stat().st_size < 1_500_000  # dstack takes 2 MB
    with tarfile.open(tmp_path / "folio.tgz") as tar:
        names = set(tar.getnames())
    assert {"cloud/job.py", "algos/ppo.py", "pyproject.toml", ".git/HEAD"} <= names
    assert not [name for name in names if name.startswith(("runs/", "docs/plots/", "benchmark/results/", ".venv/"))]


def test_task_names_are_dstacks_and_tell_runs_apart():
    names = [
        "mujoco/InvertedDoublePendulum-v5__ppo_continuous__1",
        "mujoco/InvertedDoublePendulum-v5__ppo_continuous__2",
    ]
    names += ["A/b", "a-b", "A-b", "__", "x" * 200, "9"]
    tasks = [dstack.task_name(name) for name in names]
    assert len(set(tasks)) == len(names) and dstack.task_name("my-run") == "my-run"
    assert all(re.fullmatch("[a-z][a-z0-9-]{1,40}", task) for task in tasks), tasks


def test_a_run_is_named_as_the_scripts_name_their_folders():
    name = dstack.default_name(["python", "algos/ppo_atari.py", "--env-id", "ALE/Pong-v5", "--seed", "3"])
    assert name.startswith("ALE-Pong-v5__ppo_atari__3__20")
    assert dstack.default_name(["python", "algos/ppo.py"]).startswith("default__ppo__1__20")
    assert dstack.default_name(["python", "x.py", "--env-id=-a:B-v0", "--seed=7"]).startswith("a-B-v0__x__7__20")


@pytest.mark.parametrize(
    "command, template",
    [
        ("python algos/ppo.py", "cpu"),
        ("python algos/ppo_atari.py --seed 1", "gpu"),
        ("python algos/ppo.py --device cuda", "gpu"),
        ("python algos/sac_continuous.py --device cpu", "cpu"),
    ],
)
def test_the_script_says_which_machine(command, template):
    assert dstack.template_for("auto", command.split()).name == f"{template}.dstack.yml"


def test_a_task_is_the_template_and_no_secret_is_in_it():
    command = ["python", "algos/ppo.py", "--seed", "1", "a b"]
    changes = {"gpu": "H100:2", "max_price": 0.5, "cpu": None}
    task = dstack.make_task(dstack.HERE / "gpu.dstack.yml", "s/r", command, DEV, changes, {"X": "1"}, many=False)
    original = yaml.safe_load((dstack.HERE / "gpu.dstack.yml").read_text())
    assert task["resources"] == original["resources"] | {"gpu": "H100:2"} and task["max_price"] == 0.5
    assert task["commands"] == [
        *original["commands"],
        "exec python cloud/job.py s/r -- python algos/ppo.py --seed 1 'a b'",
    ]
    assert {"HF_TOKEN", f"FOLIO_HUB={DEV}", "X=1", "FOLIO_RUN=s/r"} <= set(task["env"])
    assert task["name"] == dstack.task_name("s/r") and "hf_" not in json.dumps(task)
    assert {
        key: value for key, value in task.items() if key in ("retry", "spot_policy", "max_duration", "volumes")
    } == {key: original[key] for key in ("retry", "spot_policy", "max_duration", "volumes")}


def test_what_the_docs_say_of_the_templates_is_so():
    """The table of docs/cloud.md: what a job costs at most."""
    text = (ROOT / "docs" / "cloud.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \|.*\| \$([\d.]+) \| (\d+) h \| \$([\d.]+) \|$", text, re.M)
    for name, price, hours, most in rows:
        task = yaml.safe_load((dstack.HERE / f"{name}.dstack.yml").read_text())
        assert (task["max_price"], task["max_duration"]) == (float(price), f"{hours}h")
        assert float(most) == pytest.approx(float(price) * int(hours))
    assert [row[0] for row in rows] == ["cpu", "gpu", "gpus"]


# ------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "words, env, part",
    [
        (["submit"], {}, "no command"),
        (["--", "ls"], {}, "no script in ls"),
        (["--", "python", "algos/missing.py"], {}, "no script algos/missing.py"),
        (["--", "python", str(ROOT / "algos" / "ppo.py")], {}, "as seen from there"),
        (["--template", "tpu", "--", "python", "algos/ppo.py"], {}, "there are cpu, fleet, gpu, gpus"),
        (["--template", "fleet", "--", "python", "algos/ppo.py"], {}, "type is not task"),
        (["--name", "a--b", "--", "python", "algos/ppo.py"], {}, "cannot be a run's name"),
        (["--name", "a", "--many", "b", "--", "python", "algos/ppo.py"], {}, "so there is no --name"),
        (["--", "python", "algos/ppo.py"], {"FOLIO_HUB": ""}, "--repo or FOLIO_HUB"),
        (["--", "python", "algos/ppo.py"], {"HF_TOKEN": ""}, "no token"),
        (["--", "python", "algos/ppo.py"], {"FOLIO_DSTACK": "/missing"}, "uv tool install"),
        (["list"], {"FOLIO_DSTACK": "/missing"}, "uv tool install"),
        (["--", "python", "algos/ppo.py", "--run-dir", "runs/x"], {}, "--run-dir cannot be in a job's command"),
        (["--", "python", "algos/ppo.py", "--resume=runs/x"], {}, "--resume cannot be in a job's command"),
        (["fleet", "--file", "missing.yml"], {}, "missing.yml"),
        (["fleet", "--file", str(ROOT / "cloud" / "cpu.dstack.yml")], {}, "type is not fleet"),
        (["fleet", "--file", str(ROOT / "README.md")], {}, "cannot be used"),
    ],
)
def test_bad_input_is_one_line(words, env, part, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no-token"))
    for name, value in ({"HF_TOKEN": TOKEN, "FOLIO_HUB": DEV, "FOLIO_DSTACK": "/bin/false"} | env).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["cloud/dstack.py", *words])
    with pytest.raises(SystemExit) as end:
        dstack.main()
    out, err = capsys.readouterr()
    assert end.value.code == 2 and out == "" and err.startswith("error: ") and err.count("\n") == 1 and part in err, err


def test_what_may_not_see_the_repository_is_not_submitted(rented):
    """Better known before a machine is rented."""
    command = "--", "python", "algos/ppo.py"
    refused = run("--name", "r", *command, env=rented.env | {"HF_TOKEN": "hf_bad"})
    assert refused.code == 2 and "token" in refused.err and refused.err.count("\n") == 1 and rented.machines() == []


@pytest.mark.parametrize("how", ["silent", "interrupted"])
def test_a_dstack_that_hangs_is_one_line(how, tmp_path):
    (tmp_path / "dstack").write_text("#!/bin/sh\ntouch $0.began\nexec sleep 600\n")
    (tmp_path / "dstack").chmod(0o755)
    code = f"from cloud import dstack; dstack.SILENCE = {1 if how == 'silent' else 600}; dstack.main()"
    env = os.environ | {"PYTHONPATH": str(ROOT), "FOLIO_DSTACK": str(tmp_path / "dstack")}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, "-c", code, "list"], env=env, **pipes)
    until((tmp_path / "dstack.began").exists, "the CLI")
    if how == "interrupted":
        process.send_signal(signal.SIGINT)
    done = finish(process)
    assert done.code == (130 if how == "interrupted" else 2) and done.err.count("\n") == 1, done
    assert ("interrupted" if how == "interrupted" else "no answer for 1 seconds") in done.err


# --------------------------------------------------------------------------------------- a suite, on stand-in machines


SUITE = """
title = "t"
protocol = "p"
seeds = 2
steps = 3_000

[[entry]]
script = "ppo"
env = "CartPole-v1"
target = 23
why = "a test"
flags = { eval-episodes = 2, num-envs = 4, num-steps = 32, checkpoint-every = 500 }
"""


@dataclass
class Rented:
    """The runner with --backend dstack, a Hub, and machines that are folders."""

    path: Path
    hub: LoopbackHub
    env: dict

    def start(self, *words, runs: str = "runs") -> subprocess.Popen:
        code = "from cloud import dstack; dstack.LOOK = 0.3; from benchmark import run; run.main()"
        command = [sys.executable, "-c", code, "s.toml", "--runs-dir", runs, *words]
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen([*map(str, command)], cwd=self.path, env=self.env, **pipes)

    def machines(self) -> list[Path]:
        return sorted((self.path / "machines").glob("*.*"))

    def pids(self) -> list[int]:
        return [int((machine / "pid").read_text()) for machine in self.machines()]


def finish(process: subprocess.Popen) -> SimpleNamespace:
    try:
        out, err = process.communicate(timeout=TIMEOUT)
    finally:
        process.kill()
    assert TOKEN not in out + err
    return SimpleNamespace(code=process.returncode, out=out, err=err)


@pytest.fixture
def rented(tmp_path):
    hub, cli = LoopbackHub(), tmp_path / "dstack"
    cli.write_text(f'#!/bin/sh\nexec {sys.executable} {TESTS / "loopback_dstack.py"} "$@"\n')
    cli.chmod(0o755)
    (tmp_path / "s.toml").write_text(SUITE)
    (tmp_path / "machines").mkdir()
    env = os.environ | {"PYTHONPATH": str(ROOT), "HF_TOKEN": TOKEN, "FOLIO_HUB": DEV, "HF_ENDPOINT": hub.url}
    env |= {"HF_HUB_DISABLE_XET": "1", "FOLIO_DSTACK": str(cli), "LOOPBACK_DSTACK": str(tmp_path / "machines")}
    house = Rented(tmp_path, hub, env | {"HF_HOME": str(tmp_path / "hf")})
    yield house
    for pid in house.pids():
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    hub.stop()


def test_a_suite_is_made_in_the_cloud_and_nothing_twice(rented):
    """Not even when the runner is killed; and the results are those of runs at home."""
    process = rented.start("--backend", "dstack")
    until(lambda: len(rented.machines()) == 2 and any("checkpoint" in x for x in rented.hub.uploads_of(DEV)), "a push")
    process.kill()
    process.communicate()
    done = finish(rented.start("--backend", "dstack"))
    assert done.code == 0 and "2 done of 2" in done.out, done
    assert len(rented.machines()) == 2  # the jobs outlived their runner, and the next one found them
    folders = [rented.path / "runs" / "s" / f"CartPole-v1__ppo__{seed}" for seed in (1, 2)]
    args = [json.loads((folder / "args.json").read_text()) for folder in folders]
    assert [x["args"]["seed"] for x in args] == [1, 2] and all(x["commit"] == describe(ROOT) for x in args)
    assert sorted(x.name for x in (rented.path / "runs/s").iterdir() if x.is_dir()) == [x.name for x in folders]
    assert " episodes, " in folders[0].with_name(folders[0].name + ".log").read_text()
    assert rented.hub.branches(DEV) == {"main"}
    again = finish(rented.start("--backend", "dstack"))
    assert again.code == 0 and len(rented.machines()) == 2
    shutil.rmtree(rented.path / "runs")  # and on another box, what is on the Hub is not made again, only pulled
    assert finish(rented.start("--backend", "dstack")).code == 0 and len(rented.machines()) == 2
    assert all((folder / "result.json").exists() for folder in folders)
    home = finish(rented.start("--seeds", "1", runs="home"))
    assert home.code == 0 and bits(rented.path / "home" / "s" / folders[0].name) == bits(folders[0])


def test_a_failure_and_a_stop_in_the_cloud_look_as_they_do_at_home(rented):
    text = SUITE.replace("steps = 3_000", "steps = 3_000_000").replace(
        "checkpoint-every = 500", "checkpoint-every = 5_000"
    )
    bad = text[text.index("[[entry]]") :].replace("CartPole-v1", "CartPol-v1").replace("a test", "no such environment")
    (rented.path / "s.toml").write_text(text.replace("seeds = 2", "seeds = 1") + bad)
    process = rented.start("--backend", "dstack")
    log = rented.path / "runs" / "s" / "CartPol-v1__ppo__1.log"
    until(lambda: log.exists() and "failed" in log.read_text(), "the failure")
    episodes = rented.path / "runs" / "s" / "CartPole-v1__ppo__1" / "episodes.csv"
    until(lambda: episodes.exists() and len(episodes.read_text().splitlines()) > 10, "episodes of a run that goes on")
    process.send_signal(signal.SIGINT)
    done = finish(process)
    assert done.code == 130 and "CartPol-v1__ppo__1  exit code 2" in done.out, done
    assert "error: cannot make CartPol-v1" in done.out
    branch = "run-s--CartPole-v1__ppo__1"
    until(lambda: all((machine / "code").exists() for machine in rented.machines()), "the machines' end")
    assert rented.hub.branches(DEV) == {"main", branch}  # the state is there to go on from
    assert any(path.endswith("checkpoint.pt") for path in rented.hub.files(DEV, branch))


def test_what_was_begun_at_home_goes_on_in_the_cloud(rented):
    text = SUITE.replace("steps = 3_000", "steps = 40_000").replace("every = 500", "every = 4_000")
    (rented.path / "s.toml").write_text(text)  # so that much is left when the first checkpoint is there
    process = rented.start("--seeds", "1")
    checkpoint = rented.path / "runs" / "s" / "CartPole-v1__ppo__1" / "checkpoint.pt"
    until(checkpoint.exists, "a checkpoint")
    process.kill()
    process.communicate()
    assert not (checkpoint.parent / "result.json").exists(), "it ended before it could be killed"
    assert finish(rented.start("--seeds", "1", "--backend", "dstack")).code == 0
    (machine,) = rented.machines()
    assert "pulled s/CartPole-v1__ppo__1" in (machine / "log").read_text()
    assert "--resume" in (machine / "log").read_text()


@pytest.mark.parametrize(
    "words, env, part",
    [
        (["--gpus", "0"], {}, "--gpus"),
        ([], {"HF_TOKEN": ""}, "no token"),
        ([], {"FOLIO_HUB": ""}, "FOLIO_HUB"),
        ([], {"FOLIO_DSTACK": "/missing"}, "uv tool install"),
        ([], {"HF_TOKEN": "hf_bad"}, "token"),
    ],
)
def test_the_runner_refuses_what_cannot_be_before_it_starts(words, env, part, rented):
    rented.env |= env
    done = finish(rented.start("--backend", "dstack", *words))
    assert done.code == 2 and done.err.startswith("error: ") and done.err.count("\n") == 1 and part in done.err, done
    assert rented.machines() == [] and not (rented.path / "runs").exists()
