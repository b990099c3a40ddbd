"""What the tests of the scripts share: the list of scripts, a tiny run of each, and ways to start them.

PyTorch is imported where it is needed, so that tests of the tools start at once.
"""

import csv
import importlib
import inspect
import json
import multiprocessing
import multiprocessing.forkserver
import os
import random
import shutil
import signal
import sys
import time
import traceback
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import ModuleType, SimpleNamespace

import environments
import numpy as np
import pytest
from gymnasium.spaces import Box, Discrete

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sorted(path.stem for path in (ROOT / "algos").glob("*.py"))
TIMEOUT = 600  # seconds for any one process: a hang, whatever else the machine is doing

os.environ["OMP_NUM_THREADS"] = "1"  # tests run in parallel
environments.register()


# ------------------------------------------------------------------------------------------- a tiny run of each script


@dataclass
class Family:
    """What a script needs to run for a second: an environment that it takes, and the smallest sensible flags."""

    suffix: str  # of the file name
    env_id: str
    spaces: tuple  # what the smallest agent sees and does
    refused: list[str]  # environments that no script of this family takes
    flags: dict = field(default_factory=dict)


MISFITS = ["MultiDiscrete", "Integers", "Unbounded"]
FAMILIES = [  # the first whose suffix fits; a new kind of script needs a row here, a new script of a known kind nothing
    Family(
        suffix="_atari",
        env_id="ALE/Klax-v5",  # every policy ends it within 400 steps, a random one within 130
        spaces=(Box(0, 255, (4, 84, 84), np.uint8), Discrete(4)),
        refused=["CartPole-v1", "Pendulum-v1", "Test/Image-v0", "ALE/Pung-v5"],
        flags={"total_timesteps": 700, "checkpoint_every": 320, "num_envs": 2, "eval_episodes": 1, "bf16": False}
        | {"update_epochs": 1, "learning_starts": 100, "end_e": 0.8},
    ),
    Family(
        suffix="_continuous",
        env_id="Pendulum-v1",
        spaces=(Box(-1, 1, (3,)), Box(np.array([-1, -2], np.float32), np.array([3, 0.5], np.float32))),
        refused=["CartPole-v1", *(f"Test/{name}-v0" for name in ("DictContinuous", "ImageContinuous", *MISFITS))],
    ),
    Family(suffix="random_policy", env_id="CartPole-v1", spaces=(Box(-1, 1, (0,)), Discrete(4)), refused=[]),
    Family(
        suffix="",
        env_id="CartPole-v1",
        spaces=(Box(-1, 1, (3,)), Discrete(4)),
        refused=["Pendulum-v1", *(f"Test/{name}-v0" for name in ("Dict", "Image", *MISFITS))],
    ),
]

TINY = {  # each is passed to the scripts that have it; together, a run of less than a second with two checkpoints
    "seed": 1,
    "total_timesteps": 3000,
    "checkpoint_every": 900,
    "eval_episodes": 3,
    "device": "cpu",
    "torch_threads": 1,
    "learning_rate": 1e-3,
    # on-policy
    "num_envs": 4,
    "num_steps": 32,
    "num_minibatches": 2,
    "update_epochs": 2,
    "hidden_size": 32,
    "critic_hidden_size": 32,
    "episodes_per_update": 4,
    # off-policy
    "batch_size": 32,
    "buffer_size": 2000,
    "learning_starts": 500,  # before the first checkpoint
    "train_frequency": 8,
    "gradient_steps": 1,
    "random_repeat": 8,
    "renorm_warmup_steps": 300,
}


def family(script: str) -> Family:
    return next(family for family in FAMILIES if script.endswith(family.suffix))


def load(script: str) -> ModuleType:
    return importlib.import_module(f"algos.{script}")


def having(name: str) -> list[str]:
    """The scripts that define a function or class of this name."""
    return [script for script in SCRIPTS if hasattr(load(script), name)]


def is_asynchronous(script: str) -> bool:
    """Does it train in several processes, whose order no seed decides?"""
    return getattr(load(script), "ASYNCHRONOUS", False)


def tiny(script: str, **changes) -> dict:
    """The fields of a script's Args for a tiny run: TINY, the family's, and `changes` on top."""
    known = {field.name for field in fields(load(script).Args)}
    values = TINY | {"env_id": family(script).env_id} | family(script).flags | changes
    return {name: value for name, value in values.items() if name in known}


def make_args(script: str, **changes):
    return load(script).Args(**tiny(script, **changes))


def arguments(script: str, **changes) -> list[str]:
    """The same as words of a command line."""
    words = []
    for name, value in tiny(script, **changes).items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words += [f"--{'' if value else 'no-'}{flag}"]
        else:
            values = [x for item in value.items() for x in item] if isinstance(value, dict) else [value]
            words += [f"--{flag}", *map(str, values)]
    return words


def make_agent(script: str, **flags):
    observation_space, action_space = family(script).spaces
    envs = SimpleNamespace(single_observation_space=observation_space, single_action_space=action_space, num_envs=4)
    args = make_args(script, **flags)
    return load(script).Agent(envs, args), args


def named(script: str, name: str = "Counter") -> str:
    """The id of a test environment with the actions of this script; for Atari, where tests install games, of a game."""
    if family(script).suffix == "_atari":
        return family(script).env_id
    return f"Test/{name}{'Continuous' * (family(script).suffix == '_continuous')}-v0"


# --------------------------------------------------------------------------------------------------- starting a script


def on_step(module: ModuleType, change, patch=setattr) -> None:
    """Environments of a script, or its workers, give change(steps so far, obs, rewards) instead of obs, rewards."""
    make_envs, steps = module.make_envs, 0

    def make_changed_envs(*args, **kwargs):
        envs = make_envs(*args, **kwargs)
        step = envs.step

        def changed_step(actions):
            nonlocal steps
            obs, rewards, *rest = step(actions)
            steps += len(rewards)
            return *change(steps, obs, rewards), *rest

        envs.step = changed_step
        return envs

    def changed_record(run, step, rewards, dones):
        nonlocal steps
        steps += len(rewards)
        record(run, step, change(steps, rewards, rewards)[1], dones)

    patch(module, "make_envs", make_changed_envs)
    if getattr(module, "ASYNCHRONOUS", False):
        record = module.Run.record
        patch(module.Run, "record", changed_record)


def run_in_child(path: Path, words: list[str], folder: Path, kill_after: tuple[str, int] | None) -> None:
    """What `python path words` does. kill_after=(file, n): SIGKILL n steps after this file is in the run folder."""
    os.chdir(folder.parent)
    log = os.open(folder.with_suffix(".log"), os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(log, 1), os.dup2(log, 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    multiprocessing.current_process()._config["daemon"] = False  # or it may have no workers of its own, which then
    multiprocessing.forkserver._forkserver.ensure_running = lambda: None  # come from the server it came from
    sys.argv, sys.path = [str(path), *words], [str(path.parent), *sys.path]
    module, seen = importlib.import_module(path.stem), []

    def kill(steps, obs, rewards):
        seen.extend([steps] * (folder / kill_after[0]).exists())
        if len(seen) > kill_after[1]:
            os.kill(os.getpid(), signal.SIGKILL)
        return obs, rewards

    if kill_after:
        on_step(module, kill)
    module.main()


# A process that is forked from one that has imported everything starts in milliseconds and not in four seconds.
FORK = multiprocessing.get_context("forkserver")
FORK.set_forkserver_preload(["torch._dynamo", "conftest", *(f"algos.{script}" for script in SCRIPTS)])


def ready_to_fork() -> None:
    """Start the fork server with the tests on its path. The workers of a script in this process come from it, too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        multiprocessing.forkserver.ensure_running()


def start(path: Path, *words, folder: Path, kill_after: tuple[str, int] | None = None):
    """A script in a process of its own, beside the run folder; what it prints goes to folder.log."""
    words = [str(word) for word in words]
    ready_to_fork()
    process = FORK.Process(target=run_in_child, args=(path, words, folder, kill_after), daemon=True)
    process.start()
    return process


def exit_code(process) -> int:
    process.join(TIMEOUT)
    process.kill()
    return process.exitcode


def wait_for(path: Path, process) -> None:
    """Until the process has written this file."""
    end = time.monotonic() + TIMEOUT
    while not path.exists():
        assert process.is_alive(), f"ended before it wrote {path}"
        assert time.monotonic() < end, f"no {path} after {TIMEOUT} s"
        time.sleep(0.002)


# ------------------------------------------------------------------------------------------------- reading a run folder


def episodes(folder: Path) -> list[tuple[int, float, int]]:
    """Rows of episodes.csv without the seconds: (step, return, length)."""
    with (folder / "episodes.csv").open(newline="") as file:
        return [(int(row["step"]), float(row["return"]), int(row["length"])) for row in csv.DictReader(file)]


def bits(folder: Path) -> tuple[bytes, list]:
    """What two runs of the same command have in common to the last bit."""
    return (folder / "agent.safetensors").read_bytes(), episodes(folder)


def saved_agent(script: str, folder: Path):
    """The agent of a finished run, and its Args, read as --evaluate reads them."""
    import safetensors.torch

    module = load(script)
    args = module.Args(**json.loads((folder / "args.json").read_text())["args"])
    agent = module.Agent(module.make_envs(args, 1), args)
    safetensors.torch.load_model(agent, folder / "agent.safetensors")
    return agent, args


# ------------------------------------------------------------------------------------------------------------- fixtures


@pytest.fixture(scope="session", params=SCRIPTS)
def script(request) -> str:
    return request.param


@pytest.fixture(scope="session")
def finished(script, tmp_path_factory) -> SimpleNamespace:
    """A run of the file alone, copied to an empty folder."""
    base = tmp_path_factory.mktemp(f"finished-{script}")
    path, folder = Path(shutil.copy(ROOT / "algos" / f"{script}.py", base)), base / "run"
    words = arguments(script, run_dir=folder)
    assert exit_code(start(path, *words, folder=folder)) == 0, folder.with_suffix(".log").read_text()
    return SimpleNamespace(command=[str(path), *words], folder=folder)


@pytest.fixture(scope="session")
def unfinished(script, tmp_path_factory) -> Path:
    """The same run, killed before its first checkpoint, resumed, and killed at a random step after it."""
    path, folder = ROOT / "algos" / f"{script}.py", tmp_path_factory.mktemp(f"unfinished-{script}") / "run"
    words = arguments(script, run_dir=folder)
    assert exit_code(start(path, *words, folder=folder, kill_after=("episodes.csv", 5))) == -signal.SIGKILL
    assert not (folder / "checkpoint.pt").exists()
    moment = "checkpoint.pt", random.randrange(tiny(script)["total_timesteps"] // 3 // tiny(script)["num_envs"])
    assert exit_code(start(path, "--resume", folder, folder=folder, kill_after=moment)) == -signal.SIGKILL, moment
    return folder


@pytest.fixture
def copy(tmp_path_factory):
    """copy(folder) -> a copy that may be damaged."""

    def copy(folder: Path) -> Path:
        return Path(shutil.copytree(folder, tmp_path_factory.mktemp("copy") / folder.name))

    return copy


@pytest.fixture
def call(monkeypatch, capfd, tmp_path):
    """call(script, *words) -> code, out, err: main() in this process, which saves the seconds of starting another."""
    handler = signal.getsignal(signal.SIGTERM)

    def call(script: str, *words) -> SimpleNamespace:
        if is_asynchronous(script):
            ready_to_fork()
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [f"algos/{script}.py", *map(str, words)])
        capfd.readouterr()
        code = 0
        try:
            load(script).main()
        except SystemExit as end:
            code = end.code
        except Exception:
            code = 1
            traceback.print_exc()
        out, err = capfd.readouterr()
        return SimpleNamespace(code=code, out=out, err=err)

    yield call
    signal.signal(signal.SIGTERM, handler)


@pytest.fixture
def train(tmp_path):
    """train(script, **flags) -> the run folder; train() on counters in this process, without checkpoints."""

    def train(script: str, **flags) -> Path:
        environments.Counter.forget()
        if is_asynchronous(script):
            ready_to_fork()
        folder, usual = tmp_path / "run", {"env_id": named(script), "checkpoint_every": 10**9, "eval_episodes": 1}
        load(script).train(make_args(script, run_dir=str(folder), **usual | flags))
        return folder

    return train


@pytest.fixture
def spy(monkeypatch):
    """spy(module, name) -> list of (bound arguments, result) of every call; the function still does its work."""

    def spy(module, name: str) -> list[tuple[dict, object]]:
        original, calls = getattr(module, name), []
        signature = inspect.signature(original)

        def watched(*args, **kwargs):
            copies = [value.clone() if hasattr(value, "clone") else value for value in args]  # tensors
            bound = signature.bind(*copies, **kwargs).arguments
            result = original(*args, **kwargs)
            calls.append((bound, result))
            return result

        monkeypatch.setattr(module, name, watched)
        return calls

    return spy


@pytest.fixture
def rng() -> np.random.Generator:
    import torch

    torch.manual_seed(0)
    return np.random.default_rng(0)
