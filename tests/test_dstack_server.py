"""cloud/dstack.py against the real dstack server, started here without any cloud, so that no job ever gets a machine.

Skipped where the server is not installed: .ci/run installs it into .venv-dstack, or FOLIO_DSTACK names the CLI.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from tools import ROOT, until

from cloud import dstack

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("dstack")]
SCRIPT = "--", "python", "algos/ppo.py"


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Start a program as a client of the server, with a stand-in for the Hub."""
    cli = os.environ.get("FOLIO_DSTACK") or shutil.which("dstack") or str(ROOT / ".venv-dstack" / "bin" / "dstack")
    if not Path(cli).exists():
        pytest.skip("dstack[server] is not installed")
    path = tmp_path_factory.mktemp("dstack")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = os.environ | {"HOME": str(path), "DSTACK_SERVER_DIR": str(path / "server"), "LOOPBACK_HUB": str(path)}
    env |= {"FOLIO_DSTACK": cli, "FOLIO_HUB": "me/dev", "HF_TOKEN": "hf_token", "PYTHONPATH": str(ROOT)}
    words = [cli, "server", "--host", "127.0.0.1", "-p", str(port), "-y"]
    server = subprocess.Popen(words, env=env | {"DO_NOT_TRACK": "1"}, cwd=path, stdout=-3, stderr=-3)

    def start(*words, **changes) -> subprocess.Popen:
        command = [sys.executable, ROOT / "tests/loopback_hub.py", *words]
        return subprocess.Popen(command, cwd=ROOT, env=env | changes, stdout=-1, stderr=-1, text=True)

    try:
        until((path / ".dstack/config.yml").exists, 300)
        until(lambda: start("cloud.dstack", "list").wait() == 0, 300)
        yield start
    finally:
        server.terminate()
        server.wait()


@pytest.fixture
def cloud(start):
    """cloud/dstack.py as a user starts it: its output. An error is one line."""

    def call(*words, code: int = 0, **changes) -> str:
        out, err = (process := start("cloud.dstack", *words, **changes)).communicate()
        assert process.returncode == code and err.count("\n") == bool(code) and "hf_token" not in out + err, (out, err)
        return out

    call("fleet")
    return call


def test_a_plan_shows_what_is_asked_for_and_what_dstack_refuses_is_one_line(cloud, tmp_path):
    plans = {
        "--template cpu": "cpu=x86:2.. mem=4GB.. disk=20GB.. gpu=0",
        "--template gpu": "cpu=x86:4.. mem=16GB.. disk=40GB.. gpu=nvidia:16GB..80GB:1",
        "--template gpus": "cpu=x86:16.. mem=64GB.. disk=100GB.. gpu=nvidia:16GB..80GB:4",
        "--cpu 8.. --memory 20GB.. --gpu 24GB:1": "cpu=x86:8.. mem=20GB.. disk=20GB.. gpu=nvidia:24GB:1",
    }
    for words, asked in plans.items():
        assert asked in cloud("submit", "--dry-run", *words.split(), *SCRIPT)
    task = yaml.safe_load((dstack.HERE / "cpu.dstack.yml").read_text())
    (tmp_path / "typo.yml").write_text(yaml.safe_dump(task | {"gpus": 1}))
    for words in (["--max-price", "-1"], ["--template", tmp_path / "typo.yml"]):
        cloud("submit", "--dry-run", *words, *SCRIPT, code=2)
    cloud("stop", "test/none", code=2)
    cloud("list", code=2, HOME=str(tmp_path))  # no login


def test_a_job_is_submitted_once_retried_and_stopped(cloud):
    for _ in range(2):
        cloud("--name", "test/a", *SCRIPT)
    assert cloud("list").count("test/a") == 1
    until(lambda: "retrying" in cloud("list"), 300)  # no capacity is no reason to give up
    cloud("logs", "test/a")
    cloud("stop", "test/a")
    until(lambda: "terminated" in cloud("list"), 300)


def test_the_runner_waits_for_machines_and_ctrl_c_gives_its_jobs_up(start, cloud, tmp_path):
    words = "smoke", "--only", "ppo", "--seeds", "1", "--backend", "dstack", "--runs-dir", tmp_path
    runner = start("benchmark.run", *words)
    until(lambda: any("retrying" in path.read_text() for path in tmp_path.rglob("*.log")), 300)
    runner.send_signal(signal.SIGINT)
    assert runner.wait() == 130
    until(lambda: "smoke" in (listed := cloud("list")) and "retrying" not in listed, 300)
