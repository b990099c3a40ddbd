"""A machine that only orchestrates has neither PyTorch nor simulators, and can submit, pull, report, plot and tune."""

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT, TIMEOUT, finish
from loopback import LoopbackHub
from test_report import SUITE, make_run
from test_tuner_cloud import Cloud

from benchmark import suites

HEAVY = {"torch", "gymnasium", "mujoco", "ale_py", "Box2D", "imageio", "tensorboard", "safetensors"}
MODULES = [path for folder in ("benchmark", "cloud", "tuner") for path in sorted((ROOT / folder).glob("*.py"))]


def test_nothing_around_the_scripts_imports_what_they_need():
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in MODULES]
    code = f"import sys; import {', '.join(names)}; print(*({HEAVY!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT)
    assert (done.returncode, done.stdout, done.stderr) == (0, "\n", ""), done.stderr


def test_the_group_has_the_projects_versions():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert set(project["dependency-groups"]["orchestrate"]) <= set(project["project"]["dependencies"])


def reaches_an_index(uv: str, env: dict) -> bool:
    """Whether anything at all can be installed here: one package of the group is looked up anew."""
    probe = [uv, "pip", "install", "-q", "--dry-run", "--no-deps", "--reinstall", "--refresh", "tyro"]
    return subprocess.run(probe, cwd=ROOT, env=env, capture_output=True, timeout=TIMEOUT, check=False).returncode == 0


@pytest.fixture(scope="module")
def bare(tmp_path_factory) -> Path:
    """The python of a fresh environment, made by the README's command."""
    if not (uv := shutil.which("uv")):
        pytest.skip("uv is not installed")
    path = tmp_path_factory.mktemp("bare")
    env = os.environ | {"VIRTUAL_ENV": str(path / "venv"), "PYTHONPATH": ""}
    commands = [
        [uv, "venv", "-q", "--python", sys.executable, path / "venv"],
        [uv, "pip", "install", "-q", "--group", "orchestrate"],
        [uv, "pip", "install", "-q", "--no-deps", "-e", "."],
    ]
    for command in commands:
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=TIMEOUT, check=False)
        if done.returncode and not reaches_an_index(uv, env):
            pytest.skip(f"uv reaches no package index here: {' '.join(done.stderr.split())[-200:]}")
        assert done.returncode == 0, f"{' '.join(map(str, command))}: {done.stderr}"
    return path / "venv" / "bin" / "python"


def test_without_torch_it_submits_pulls_and_reports(bare, tmp_path):
    code = f"import importlib.util as u; print(*(x for x in {sorted(HEAVY)!r} if u.find_spec(x)))"
    assert subprocess.run([bare, "-c", code], capture_output=True, text=True, check=True).stdout == "\n"
    hub, cli = LoopbackHub(), tmp_path / "dstack"
    cli.write_text(f'#!/bin/sh\nexec {bare} {ROOT / "tests" / "loopback_dstack.py"} "$@"\n')
    cli.chmod(0o755)
    env = os.environ | {"HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_good", "FOLIO_HUB": "me/dev", "FOLIO_DSTACK": str(cli)}
    env |= {
        "HF_HUB_DISABLE_XET": "1",
        "HF_HOME": str(tmp_path / "hf"),
        "LOOPBACK_DSTACK": str(tmp_path),
        "PYTHONPATH": "",
    }

    def call(*words) -> str:
        done = subprocess.run([bare, *words], cwd=ROOT, env=env, capture_output=True, text=True, timeout=TIMEOUT)
        assert done.returncode == 0, done.stderr
        return done.stdout

    (tmp_path / "suites").mkdir()
    (tmp_path / "suites" / "toys.toml").write_text(SUITE)
    suite = suites.load(tmp_path / "suites" / "toys.toml")
    make_run(SimpleNamespace(suite=suite, runs=tmp_path / "elsewhere"))
    assert "loopback" in call("cloud/dstack.py", "submit", "--dry-run", "--", "python", "algos/ppo.py")
    call("cloud/hub.py", "push", "--all", "--yes", "--runs-dir", tmp_path / "elsewhere")
    assert "pulled" in call("cloud/hub.py", "pull", "toys", "--runs-dir", tmp_path / "runs")
    words = [x for name in ("runs", "results", "suites", "docs") for x in (f"--{name}-dir", tmp_path / name)]
    assert "wrote" in call("benchmark/report.py", *words)
    assert "450.0" in (tmp_path / "docs" / "BENCHMARKS.md").read_text() and any((tmp_path / "docs/plots").iterdir())
    assert "to make" in call("benchmark/run.py", "smoke", "--dry-run", "--runs-dir", tmp_path / "runs")
    assert "narrow" in call("tuner/run.py", "--help")
    hub.stop()


def test_without_torch_it_tunes_elsewhere(bare, tmp_path):
    house = Cloud(tmp_path)
    house.python = bare
    house.space(trials=9)
    for words, backend in ((("search", "s.toml"), "dstack"), (("show", "s"), None), (("narrow", "s"), None)):
        done = finish(house.start(*words, backend=backend))
        assert done.code == 0, done.err
    assert len(house.machines()) == 9 and (house.trials.parent / "narrow.toml").exists()
    house.hub.stop()
