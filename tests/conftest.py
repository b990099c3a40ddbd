"""What the tests share: the list of scripts, a tiny run of each, and ways to start them."""

import csv
import importlib
import inspect
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import ModuleType, SimpleNamespace

import environments
import numpy as np
import pytest
import safetensors.torch
import torch
from gymnasium.spaces import Box, Discrete
from xdist.scheduler import LoadScopeScheduling

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sorted(path.stem for path in (ROOT / "algos").glob("*.py"))
TIMEOUT = 600  # seconds for any one process: a hang, whatever else the machine is doing

environments.register()


# ------------------------------------------------------------------------------------------- a tiny run of each script


@dataclass
class Family:
    """What a script needs to run for a second: an environment that it takes, and the smallest sensible flags."""

    suffix: str  # of the file name
    env_id: str
    misspelt: tuple[str, str]  # an id that does not exist, and the one near it
    wrong_actions: tuple[str, str]  # an environment with the other kind of action, and the suffix of its scripts
    wrong_spaces: list[str]  # environments that no script of this family takes
    third_party: str | None  # of test_contract's third-party package
    flags: dict = field(default_factory=dict)


FAMILIES = [  # the first whose suffix fits; a new kind of script needs a row here, a new script of a known kind nothing
    Family(
        suffix="_atari",
        env_id="ALE/Klax-v5",  # every policy ends it within 400 steps, a random one within 130
        misspelt=("ALE/Pung-v5", "ALE/Pong-v5"),
        wrong_actions=("CartPole-v1", ""),
        wrong_spaces=["Pendulum-v1", "Test/Dict-v0"],
        third_party=None,  # the games of ale-py are all there are
        flags={"total_timesteps": 700, "checkpoint_every": 256, "num_envs": 2, "eval_episodes": 1, "bf16": False},
    ),
    Family(
        suffix="_continuous",
        env_id="Pendulum-v1",
        misspelt=("Pendulun-v1", "Pendulum-v1"),
        wrong_actions=("CartPole-v1", ""),
        wrong_spaces=[f"Test/{x}-v0" for x in ("DictContinuous", "ImageContinuous", "Unbounded", "MultiDiscrete")],
        third_party="thirdparty:Continuous-v0",
    ),
    Family(
        suffix="",
        env_id="CartPole-v1",
        misspelt=("CartPol-v1", "CartPole-v1"),
        wrong_actions=("Pendulum-v1", "_continuous"),
        wrong_spaces=[f"Test/{x}-v0" for x in ("Dict", "Image", "FromOne", "MultiDiscrete")],
        third_party="thirdparty:Discrete-v0",
    ),
]

TINY = {  # each is passed to the scripts that have it; together, a run of half a second with three checkpoints
    "seed": 1,
    "total_timesteps": 6000,
    "checkpoint_every": 1500,
    "eval_episodes": 2,
    "device": "cpu",
    "torch_threads": 1,
    "learning_rate": 1e-3,
    # on-policy
    "num_envs": 4,
    "num_steps": 32,
    "num_minibatches": 2,
    "update_epochs": 2,
    "hidden_size": 32,
    "episodes_per_update": 4,
    # off-policy
    "batch_size": 32,
    "buffer_size": 2000,
    "learning_starts": 500,
    "train_frequency": 4,
    "gradient_steps": 1,
}


def family(script: str) -> Family:
    return next(family for family in FAMILIES if script.endswith(family.suffix))


def has_replay(script: str) -> bool:
    return "class Replay" in (ROOT / "algos" / f"{script}.py").read_text()


# One script of each family, with and without replay. The text of "the run" is the same in every file (test_house), so
# what only that can break and a process of its own must show is shown by these; what an algorithm can break is shown by
# every script.
REPRESENTATIVES = list({(family(name).suffix, has_replay(name)): name for name in reversed(SCRIPTS)}.values())


def load(script: str) -> ModuleType:
    return importlib.import_module(f"algos.{script}")


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
        words += [f"--{'' if value else 'no-'}{flag}"] if isinstance(value, bool) else [f"--{flag}", str(value)]
    return words


# ---------------------------------------------------------------------------------------------------- parts of a script


SPACES = {  # by family: what the smallest agent sees and does
    "": (Box(-1, 1, (3,)), Discrete(4)),
    "_continuous": (Box(-1, 1, (3,)), Box(np.array([-1, -2], np.float32), np.array([3, 0.5], np.float32))),
    "_atari": (Box(0, 255, (4, 84, 84), np.uint8), Discrete(4)),
}


def make_agent(script: str, **flags):
    observation_space, action_space = SPACES[family(script).suffix]
    envs = SimpleNamespace(single_observation_space=observation_space, single_action_space=action_space)
    args = make_args(script, **flags)
    return load(script).Agent(envs, args), args


def counter_id(script: str) -> str:
    return "Test/CounterContinuous-v0" if family(script).suffix == "_continuous" else "Test/Counter-v0"


def learner(module: ModuleType) -> str:
    """The function of a script that learns from a batch: many steps on it, or one."""
    return "update" if hasattr(module, "update") else "gradient_step"


def tensors(*arrays):
    return [torch.from_numpy(np.asarray(array)) for array in arrays]


def frozen(value) -> np.ndarray:
    """A copy, because a rollout is written into the same memory as the one before."""
    return value.numpy().copy() if isinstance(value, torch.Tensor) else np.array(value)


# --------------------------------------------------------------------------------------------------- starting a script


def start(script: str, *words, cwd: Path) -> subprocess.Popen:
    """A script as a user starts it."""

    def prepare():
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it

    return subprocess.Popen(
        [sys.executable, ROOT / "algos" / f"{script}.py", *map(str, words)],
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=prepare,
    )


def finish(process: subprocess.Popen) -> SimpleNamespace:
    """Wait for its end: code, out, err."""
    try:
        out, err = process.communicate(timeout=TIMEOUT)
    finally:
        process.kill()
    return SimpleNamespace(code=process.returncode, out=out, err=err)


def lives(pid: str) -> bool:
    """Whether there is a process of that number that has not ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def finish_well(process: subprocess.Popen) -> SimpleNamespace:
    done = finish(process)
    assert done.code == 0, done.err
    return done


def wait_for(path: Path, process: subprocess.Popen) -> None:
    """Until the process has written this file."""
    end = time.monotonic() + TIMEOUT
    while not path.exists():
        assert process.poll() is None, f"ended before it wrote {path}: {process.communicate()}"
        assert time.monotonic() < end, f"no {path} after {TIMEOUT} s"
        time.sleep(0.002)


def kill(process: subprocess.Popen) -> None:
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL, "it ended before it could be killed"


# ------------------------------------------------------------------------------------------------- reading a run folder


def episodes(folder: Path) -> list[tuple[int, float, int]]:
    """Rows of episodes.csv without the seconds: (step, return, length)."""
    with (folder / "episodes.csv").open(newline="") as file:
        return [(int(row["step"]), float(row["return"]), int(row["length"])) for row in csv.DictReader(file)]


def bits(folder: Path) -> tuple[bytes, list]:
    """What two runs of the same command have in common to the last bit."""
    return (folder / "agent.safetensors").read_bytes(), episodes(folder)


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Every file of a folder: its bytes and when it was written."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns) for path in paths}


def saved_agent(script: str, folder: Path):
    """The agent of a finished run, and its Args, read as --evaluate reads them."""
    module = load(script)
    args = module.Args(**module.read_args(folder))
    envs, _ = module.start_envs(args, [0])
    agent = module.Agent(envs, args)
    agent.load_state_dict(safetensors.torch.load_file(folder / "agent.safetensors"))
    return agent, args


# ------------------------------------------------------------------------------------------------------------- fixtures


class ByScript(LoadScopeScheduling):
    """With several workers, all tests of a script go to one: its runs, which the tests share, are made once. Likewise
    those that share dstack's server.

    Not by --dist loadgroup, which with pytest 9.2 groups nothing and does not say so (pytest-xdist issue 1386).
    """

    def _split_scope(self, nodeid: str) -> str:
        """name.py::test[ppo-other] -> ppo; a test of no script is a group of its own."""
        if "test_dstack_server.py" in nodeid:
            return "server"
        return next((word for word in re.findall(r"\w+", nodeid.partition("[")[2]) if word in SCRIPTS), nodeid)


@pytest.hookimpl(optionalhook=True)  # pytest without xdist knows no such hook
def pytest_xdist_make_scheduler(config, log):
    return ByScript(config, log)


@pytest.fixture(autouse=True)
def leave_no_trace():
    """main() is made to be the only thing in a process: put back what it sets."""
    handler, threads = signal.getsignal(signal.SIGTERM), torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    signal.signal(signal.SIGTERM, handler)
    torch.set_num_threads(threads)


@pytest.fixture(scope="session", params=SCRIPTS)
def script(request) -> str:
    return request.param


@pytest.fixture(scope="session")
def finished(script, tmp_path_factory) -> SimpleNamespace:
    """A finished run of each script."""
    base = tmp_path_factory.mktemp(f"finished-{script}")
    words = arguments(script, run_dir=base / "folder")
    done = finish_well(start(script, *words, cwd=base))
    return SimpleNamespace(base=base, words=words, out=done.out, folder=base / "folder")


@pytest.fixture(scope="session")
def unfinished(script, tmp_path_factory) -> Path:
    """The same run, killed in an iteration after a checkpoint; of some also before the first one, and resumed."""
    base = tmp_path_factory.mktemp(f"unfinished-{script}")
    process = start(script, *arguments(script, run_dir=base / "run"), cwd=base)
    if script in REPRESENTATIVES:
        wait_for(base / "run" / "episodes.csv", process)
        kill(process)
        assert not (base / "run" / "checkpoint.pt").exists(), "it had its first checkpoint before it could be killed"
        process = start(script, "--resume", base / "run", cwd=base)
    wait_for(base / "run" / "checkpoint.pt", process)
    time.sleep(0.05)
    kill(process)
    assert not (base / "run" / "result.json").exists(), "it ended before it could be killed"
    return base / "run"


@pytest.fixture
def copy(tmp_path_factory):
    """copy(folder) -> a copy that may be damaged."""

    def copy(folder: Path) -> Path:
        return Path(shutil.copytree(folder, tmp_path_factory.mktemp("copy") / folder.name))

    return copy


@pytest.fixture
def call(monkeypatch, capfd, tmp_path):
    """call(script, *words) -> code, out, err: main() in this process, which saves the seconds of starting another."""

    def call(script: str, *words) -> SimpleNamespace:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [f"algos/{script}.py", *map(str, words)])
        capfd.readouterr()
        code = 0
        with warnings.catch_warnings(record=True) as seen:  # pytest's filters show less than a process does
            warnings.simplefilter("always")
            for category in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
                warnings.simplefilter("ignore", category)
            try:
                load(script).main()
            except SystemExit as end:
                code = end.code
        out, err = capfd.readouterr()
        return SimpleNamespace(code=code, out=out, err=err + "".join(f"{warning.message}\n" for warning in seen))

    return call


@pytest.fixture
def train(monkeypatch, tmp_path):
    """train(script, **flags) -> the run folder; train() in this process, without a command line."""

    def train(script: str, folder: str = "run", **flags) -> Path:
        args = make_args(script, run_dir=str(tmp_path / folder), **flags)
        args.checkpoint_every = args.checkpoint_every or args.total_timesteps
        monkeypatch.setattr(sys, "argv", [f"algos/{script}.py"])
        load(script).train(args)
        return tmp_path / folder

    return train


@pytest.fixture
def spoil(monkeypatch):
    """spoil(module, change): environments give change(steps so far, obs, rewards) instead of obs, rewards."""

    def spoil(module, change) -> None:
        original, steps = module.start_envs, 0

        def start_broken_envs(*args, **kwargs):
            envs, obs = original(*args, **kwargs)
            step = envs.step

            def broken_step(actions):
                nonlocal steps
                steps += len(actions)
                obs, rewards, *rest = step(actions)
                return *change(steps, obs, rewards), *rest

            envs.step = broken_step
            return envs, obs

        monkeypatch.setattr(module, "start_envs", start_broken_envs)

    return spoil


@pytest.fixture
def spy(monkeypatch):
    """spy(module, name) -> list of (bound arguments, result) of every call; the function still does its work."""

    def spy(module, name: str) -> list[tuple[dict, object]]:
        original, calls = getattr(module, name), []
        signature = inspect.signature(original)

        def watched(*args, **kwargs):
            copies = [value.clone() if isinstance(value, torch.Tensor) else value for value in args]
            bound = signature.bind(*copies, **kwargs).arguments
            result = original(*args, **kwargs)
            calls.append((bound, result))
            return result

        monkeypatch.setattr(module, name, watched)
        return calls

    return spy


@pytest.fixture
def rollouts(monkeypatch):
    """rollouts(script) -> a list that fills with (batch, arguments of gae, if it has one); nothing is learned.

    Of PPO the batch is what its gradient would be given for all rows at once.
    """

    def watch(script: str) -> list[tuple[list, dict]]:
        module, found, inputs = load(script), [], [{}]

        def learn(agent, optimizer, loss_fn, batch, args):
            if hasattr(module, "ppo_gradient"):
                batch = loss_fn(agent, args, *batch)
            found.append(([frozen(x) for x in batch], inputs[-1]))
            return {name: 0.0 for name in module.METRICS}

        if hasattr(module, "ppo_gradient"):
            monkeypatch.setattr(module, "ppo_gradient", lambda agent, args, *minibatch: minibatch)

        if hasattr(module, "gae"):
            original, signature = module.gae, inspect.signature(module.gae)

            def gae(*args):
                inputs.append({name: frozen(value) for name, value in signature.bind(*args).arguments.items()})
                return original(*args)

            monkeypatch.setattr(module, "gae", gae)
        monkeypatch.setattr(module, learner(module), learn)
        monkeypatch.setattr(module, "evaluate", lambda args, agent: np.zeros(1))
        return found

    return watch


@pytest.fixture
def rng() -> np.random.Generator:
    torch.manual_seed(0)
    return np.random.default_rng(0)
