"""cloud/dstack.py against the real dstack server, started here on the loopback interface.

It offers the machines of a stand-in Slurm cluster (loopback_slurm.py), so that what is asked for meets what there is.
Nothing can be started there: what happens on a machine is in test_cloud_job.py and test_cloud_dstack.py. Skipped where
the server is not installed; .ci/run installs it into .venv-dstack. All tests go to one worker (conftest.py).
"""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import urllib.request
import uuid
from contextlib import ExitStack, suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from conftest import ROOT
from loopback import LoopbackHub
from test_cloud_dstack import DEV, SUITE, TESTS, TOKEN, finish, run, until

from cloud import dstack

TEMPLATES = sorted(path.name.removesuffix(".dstack.yml") for path in dstack.HERE.glob("*.dstack.yml"))


def find_dstack() -> str | None:
    """The real CLI with its server: FOLIO_DSTACK, .venv-dstack in the repository (.ci/run makes it), or on PATH."""
    beside = ROOT / ".venv-dstack" / "bin" / "dstack"
    path = os.environ.get("FOLIO_DSTACK") or (str(beside) if beside.exists() else shutil.which("dstack"))
    python = Path(path).resolve().parent / "python" if path else None
    if python is None or not python.exists():
        return None
    probe = subprocess.run(
        [python, "-c", "import dstack._internal.server.app, asyncssh"], capture_output=True, check=False
    )
    return path if probe.returncode == 0 else None


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The real server with three machines to offer and no fleet yet; the environment in which its CLI reaches it."""
    if (cli := find_dstack()) is None:
        pytest.skip("dstack[server] and asyncssh are not installed: see docs/cloud.md, or FOLIO_DSTACK names the CLI")
    path, python = tmp_path_factory.mktemp("dstack"), Path(cli).resolve().parent / "python"
    (path / "server").mkdir()
    (path / "home").mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = {"HOME": str(path / "home"), "DSTACK_SERVER_DIR": str(path / "server"), "DO_NOT_TRACK": "1"}
    env |= {"FOLIO_DSTACK": cli}
    with ExitStack() as running:

        def start(*words) -> None:
            log = running.enter_context((path / f"log-{Path(words[1]).stem}").open("w"))
            process = subprocess.Popen([*map(str, words)], env=os.environ | env, stdout=log, stderr=log, cwd=path)
            running.callback(process.wait, 60)
            running.callback(process.terminate)

        def answers() -> bool:
            with suppress(OSError):
                return urllib.request.urlopen(f"http://127.0.0.1:{port}/healthcheck", timeout=2).status == 200

        start(python, TESTS / "loopback_slurm.py", path / "slurm")
        until((path / "slurm" / "port").exists, "the login node")
        cluster = {"name": "here", "hostname": "127.0.0.1", "port": int((path / "slurm" / "port").read_text())}
        cluster |= {"user": "me", "private_key": {"path": str(path / "slurm" / "key")}, "cpu_partitions": ["cpu"]}
        cluster |= {"gpu_partitions": [{"gpu": "A10:24GB", "partitions": ["gpu", "gpus"]}]}
        project = {"name": "main", "backends": [{"type": "slurm", "clusters": [cluster]}]}
        (path / "server" / "config.yml").write_text(yaml.safe_dump({"projects": [project]}))
        start(cli, "server", "--host", "127.0.0.1", "-p", port, "-y", "--token", uuid.uuid4())
        until(answers, "the server")
        until((path / "home" / ".dstack" / "config.yml").exists, "the login")
        yield SimpleNamespace(env=env, path=path)


@pytest.fixture(scope="module")
def fleet(server):
    """The environment, with the fleet."""
    no_fleet = run("submit", "--dry-run", "--", "python", "algos/ppo.py", env=server.env)
    assert no_fleet.code == 2 and "cloud/dstack.py fleet" in no_fleet.err and no_fleet.err.count("\n") == 1, no_fleet
    done = run("fleet", env=server.env)
    assert done.code == 0 and "folio" in done.out, done
    return server.env


BY_HAND, BY_RUNNER = "test/A-v1__ppo__1", "s/CartPole-v1__ppo__1"
SUBMIT = "submit", "--name", BY_HAND, "--", "python", "algos/ppo.py"


@pytest.fixture(scope="module", autouse=True)
def waiting(fleet, tmp_path_factory):
    """Two jobs that no machine takes, one submitted by hand and one by the runner. They come before all tests, because
    half a minute goes by until dstack tries again."""
    path, hub = tmp_path_factory.mktemp("runner"), LoopbackHub()
    env = fleet | {"PYTHONPATH": str(ROOT), "HF_TOKEN": TOKEN, "FOLIO_HUB": DEV, "HF_ENDPOINT": hub.url}
    env |= {"HF_HUB_DISABLE_XET": "1"}
    assert run("list", env=fleet).out == "no jobs\n"
    submitted = run(*SUBMIT, env=env)
    (path / "s.toml").write_text(SUITE.replace("seeds = 2", "seeds = 1"))
    code = "from cloud import dstack; dstack.LOOK = 8.0; from benchmark import run; run.main()"
    command = [sys.executable, "-c", code, "s.toml", "--runs-dir", "runs", "--backend", "dstack"]
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    runner = subprocess.Popen(command, cwd=path, env=os.environ | env, **pipes)
    log = path / "runs" / f"{BY_RUNNER}.log"
    yield SimpleNamespace(submitted=submitted, env=env, runner=runner, log=log)
    runner.kill()
    runner.communicate()
    hub.stop()


@pytest.mark.parametrize(
    "template, asked, machine",
    [
        ("cpu", "cpu=x86:2.. mem=4GB.. disk=20GB.. gpu=0", "cpu1"),
        ("gpu", "cpu=x86:4.. mem=16GB.. disk=40GB.. gpu=nvidia:16GB..80GB:1", "node1"),
        ("gpus", "cpu=x86:16.. mem=64GB.. disk=100GB.. gpu=nvidia:16GB..80GB:4", "node4"),
    ],
)
def test_every_template_is_accepted_and_the_plan_shows_what_it_asks_for(template, asked, machine, fleet):
    done = run("submit", "--dry-run", "--template", template, "--", "python", "algos/ppo.py", env=fleet)
    assert done.code == 0 and done.err == "", done
    lines = [line.strip() for line in done.out.splitlines()]
    assert f"Resources      {asked}" in lines and any(line.endswith("$0") and machine in line for line in lines), (
        done.out
    )
    terms = yaml.safe_load((dstack.HERE / f"{template}.dstack.yml").read_text())
    assert f"Max price      ${terms['max_price']:g}" in lines and "Spot policy    auto" in lines
    assert "Retry policy   12h[no-capacity, interruption]" in lines
    assert TEMPLATES == ["cpu", "fleet", "gpu", "gpus"]


def test_flags_change_what_is_asked_for(fleet):
    words = "--cpu 8.. --memory 20GB.. --gpu 24GB:1 --disk 70GB.. --spot-policy on-demand --max-price 0.25".split()
    words += ["--max-duration", "6h", "--template", "gpu"]
    done = run("submit", "--dry-run", *words, "--", "python", "algos/ppo.py", env=fleet)
    assert "cpu=x86:8.. mem=20GB.. disk=70GB.. gpu=nvidia:24GB:1" in done.out, done
    assert [x for x in ("on-demand", "$0.25", "Max duration   6h", "A10:24GB:1") if x not in done.out] == []


@pytest.mark.parametrize(
    "words, env, part",
    [
        (["--gpu", "40GB..80GB:1"], {}, "no machine that dstack can rent fits: "),
        (["--gpu", "24GBz"], {}, "24GBz"),
        (["--max-price", "-1"], {}, "max_price"),
        (["--template", "typo.yml"], {}, "gpus"),
        (["--template", "secret.yml"], {}, "MISSING_SECRET"),
        ([], {"HOME": "/nonexistent"}, "dstack"),
    ],
)
def test_what_dstack_refuses_is_one_line(words, env, part, fleet, tmp_path):
    task = yaml.safe_load((dstack.HERE / "cpu.dstack.yml").read_text())
    (tmp_path / "typo.yml").write_text(yaml.safe_dump(task | {"gpus": 1}))
    (tmp_path / "secret.yml").write_text(yaml.safe_dump(task | {"env": ["HF_TOKEN", "MISSING_SECRET"]}))
    words = [str(tmp_path / word) if word.endswith(".yml") else word for word in words]
    done = run("submit", "--dry-run", *words, "--", "python", "algos/ppo.py", env=fleet | env)
    assert done.code == 2 and done.err.startswith("error: ") and done.err.count("\n") == 1 and part in done.err, done
    assert done.out == "" and "Traceback" not in done.err


def test_submitted_listed_not_twice_retried_and_stopped(fleet, waiting):
    task, done = dstack.task_name(BY_HAND), waiting.submitted
    assert done.code == 0 and f"as {task}" in done.out and f"cloud/hub.py pull {BY_HAND}" in done.out, done
    until(lambda: "submitted as" in waiting.log.read_text(), "the runner's job")
    listed = run("list", env=fleet)
    assert {(line.split()[0], line.split()[-1]) for line in listed.out.splitlines()} == {
        (dstack.task_name(name), name) for name in (BY_HAND, BY_RUNNER)
    }  # and no dry run has submitted anything
    again = run(*SUBMIT, env=waiting.env)
    assert again.code == 0 and "is active already" in again.out and run("list", env=fleet).out.count(task) == 1
    dry = run("submit", "--dry-run", *SUBMIT[1:], "--seed", 2, env=waiting.env)
    assert dry.code == 0 and "already exists" in dry.out and "[y/n]" not in dry.out and TOKEN not in dry.out, dry
    # The one machine refuses to start it, which is lost capacity: it is tried again, not given up.
    until(lambda: re.search(f"{task}.*retrying", run("list", env=fleet).out), "a retry", pause=3)
    shown = json.loads(
        subprocess.run(
            [fleet["FOLIO_DSTACK"], "run", "get", task, "--json"],
            env=os.environ | fleet,
            capture_output=True,
            text=True,
        ).stdout
    )
    asked = shown["run_spec"]["configuration"]
    assert asked["retry"]["on_events"] == ["no-capacity", "interruption"]
    assert asked["commands"][-1] == "exec python cloud/job.py test/A-v1__ppo__1 -- python algos/ppo.py"
    assert shown["run_spec"]["file_archives"] and shown["status"] in ("pending", "submitted")
    assert run("logs", BY_HAND, env=fleet).code == 0
    stopped = run("stop", BY_HAND, env=fleet)
    assert stopped.code == 0 and "Stopped" in stopped.out, stopped
    until(lambda: re.search(f"{task}.*terminated", run("list", env=fleet).out), "the stop", pause=3)
    gone = run("stop", "test/none", env=fleet)
    assert gone.code == 2 and "not found" in gone.err and gone.err.count("\n") == 1


def test_a_server_that_is_gone_is_one_line(server, tmp_path):
    config = (server.path / "home" / ".dstack" / "config.yml").read_text()
    for number, text in enumerate([yaml.safe_load(config) | {}, None]):
        home = tmp_path / str(number)
        (home / ".dstack").mkdir(parents=True)
        if text:
            text["projects"][0]["url"] = "http://127.0.0.1:9"
            (home / ".dstack" / "config.yml").write_text(yaml.safe_dump(text))
        done = run("list", env=server.env | {"HOME": str(home)})
        assert done.code == 2 and done.err.count("\n") == 1 and "Traceback" not in done.err, done
    wrong = yaml.safe_load(config)
    wrong["projects"][0]["token"] = str(uuid.uuid4())
    (tmp_path / "0" / ".dstack" / "config.yml").write_text(yaml.safe_dump(wrong))
    done = run("list", env=server.env | {"HOME": str(tmp_path / "0")})
    assert done.code == 2 and done.err.count("\n") == 1 and "token" in done.err, done


def test_the_runner_submits_waits_and_stops_on_the_real_server(fleet, waiting):
    """Capacity never comes, which is no reason to fail; Ctrl-C gives back what was asked for."""
    until(lambda: "retrying" in waiting.log.read_text(), "a retry")
    waiting.runner.send_signal(signal.SIGINT)
    done = finish(waiting.runner)
    assert done.code == 130 and "cpu1" in done.out and "$0" in done.out and "failed" not in done.out + done.err, done
    task = dstack.task_name(BY_RUNNER)
    until(lambda: re.search(f"{task}.*terminat", run("list", env=fleet).out), "the stop", pause=3)
