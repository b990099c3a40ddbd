"""Soft actor-critic (SAC) for vector observations and continuous actions.

    python algos/sac_continuous.py                                  # Pendulum-v1
    python algos/sac_continuous.py --env-id HalfCheetah-v5 --total-timesteps 1000000
    python algos/sac_continuous.py --resume runs/Pendulum-v1__sac_continuous__1__...
    python algos/sac_continuous.py --evaluate runs/Pendulum-v1__sac_continuous__1__... --eval-episodes 20 --video

Papers: Haarnoja et al. 2018, "Soft Actor-Critic Algorithms and Applications", arXiv:1812.05905 ("SAC" below): twin
critics, no value network, and a temperature that is tuned so that the policy keeps a given entropy.

What differs from the paper: the temperature's loss is taken on log alpha, as most implementations do; the logarithm of
the standard deviation is squeezed smoothly into [-5, 2] instead of being cut; an episode that is cut by a time limit
goes on for the learner: its target looks at its real last observation. `--noise-correlation` (off) makes the noise of
successive actions alike while each action has the policy's distribution, as coloured noise does (Eberhard et al. 2023,
"Pink Noise Is All You Need"). MountainCarContinuous needs it: in 60 episodes of independent uniform actions the car
never reached the flag, with a correlation of 0.9 it did in 31 of 40.

On LunarLanderContinuous-v3 many runs learn to hover and never land. In 300 episodes of random actions nothing landed,
so the critics learn that the ground is bad, and an actor that follows them does not go there to find out: where a
lander stands on the pad and 90 points are coming, the critics of three such runs expected -47, -30 and 10. With
128 units, batches of 128 and an update for every four steps it was chance: the mean of the critics instead of the
smaller one, and correlated noise, helped some seeds and harmed others. With the defaults' 256 units and batches of 256,
half an update for every step, both learning rates at 7e-4 and 10 000 random steps at first, most runs land.

On BipedalWalker-v3 it stands still first: a fall costs 100, and before walking has ever paid, the temperature has
fallen from 1 to 0.003 and little is tried. With the flags of the benchmark five runs began to walk after 73 000
to 140 000 steps. With half the units and half the batch two had not after 111 000 and 175 000, nor had one with
the temperature fixed at 0.1 and correlated noise after 260 000; but their learning rates fell from the beginning, and
with that a run that was else the benchmark's stood still until 140 000, too.

What to notice, coming from `sac_discrete.py`: neither a sum nor a maximum over continuous actions can be looked up,
so one action is drawn where that file sums over all, and the actor learns through the critics, whose gradient says
where a better action lies. The target is as soft, but of the two critics the smaller one counts, where that file
takes their mean: an actor that climbs the critics finds their errors. Coming from `ppo_continuous.py`: the Gaussian
is squashed by tanh, which changes its density (`tanh_log_prob`), and its width depends on the state.

Matrix products in bfloat16 (`--bf16`) are much faster on a CPU that has them. On HalfCheetah-v5 the last 20 episodes of
100 000 steps had 3406, 4553 and 5930 with it and 4234, 4367 and 4673 without (seeds 101 to 103).

What it does not do: images, discrete actions (`sac_discrete.py`), normalised observations.
Scores: docs/BENCHMARKS.md.

The file is long because it repeats all that a script needs to stand alone: from "the run" to "training" the text is
the same in every file, but for `start_envs`, `to_tensor` and `frame`, and who reads for the algorithm can skip it.
"""

import csv
import difflib
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import random
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
import warnings
import zipfile
from collections import deque
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import gymnasium as gym
import imageio
import mujoco
import numpy as np
import safetensors.torch
import torch
import tyro
from gymnasium.vector import AutoresetMode
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

AUTO_DEVICE = "cpu"  # what --device auto means here
TRAIN, EVAL = 0, 1  # purposes of random streams
EVALUATION = "env_id", "seed", "eval_episodes", "video", "device", "torch_threads"  # flags that --evaluate may change
UV = "uv run " if "UV" in os.environ else ""  # how a printed command has to begin
LOG_EVERY = 1000  # steps between two points of the curves


@dataclass
class Args:
    # The run
    env_id: str = "Pendulum-v1"
    """Gymnasium id of the environment; `package:Name-v0` imports the package first"""
    seed: int = 1
    """decides every random number of the run"""
    total_timesteps: int = 30_000
    """environment steps, summed over the parallel environments"""
    run_dir: str | None = None
    """folder of the run; by default runs/{env}__{algo}__{seed}__{UTC time}"""
    resume: str | None = None
    """go on with the run in this folder, under its own flags"""
    evaluate: str | None = None
    """evaluate the agent in this run folder instead of training"""
    eval_episodes: int = 20
    """episodes of the evaluation, one environment each"""
    video: bool = False
    """film the first episode of the evaluation into videos/"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: the GPU for networks that see images, if there is one; the CPU for small networks"""
    torch_threads: int = 1
    """CPU threads of PyTorch; 0 for one per core. Part of the result: sums are rounded in another order"""
    compile: bool = False
    """compile the loss with torch.compile (on a GPU into CUDA graphs)"""
    checkpoint_every: int = 0
    """steps between checkpoints; 0 for a tenth of the run. Each cuts the running episodes, which then do not count"""

    # The algorithm
    num_envs: int = 1
    """parallel environments (N)"""
    buffer_size: int = 1_000_000
    """transitions in the replay"""
    learning_starts: int = 1_000
    """steps before the first update; until then actions are uniformly random"""
    noise_correlation: float = 0.0
    """correlation of the noise in successive actions (rho); 0.9 pushes some ten steps in one direction"""
    train_frequency: int = 1
    """environment steps between two rounds of updates"""
    gradient_steps: int = 1
    """updates per round: gradient_steps / train_frequency of them per environment step"""
    batch_size: int = 256
    """transitions per update (B)"""
    policy_lr: float = 3e-4
    """learning rate of the actor"""
    q_lr: float = 1e-3
    """learning rate of the critics and of the temperature"""
    anneal_lr: bool = False
    """let the learning rates fall linearly towards 0"""
    gamma: float = 0.99
    """discount factor"""
    tau: float = 0.005
    """share of the critics in each update of their targets"""
    autotune: bool = True
    """tune the temperature towards an entropy of -dim(A)"""
    alpha: float = 0.2
    """the temperature, where it is not tuned"""
    hidden_size: int = 256
    """width of the two hidden layers"""

    # Speed
    bf16: bool = False
    """matrix products in bfloat16 (weights, last layers and losses stay in float32)"""


LIMITS = {  # flag: smallest and largest value
    "seed": (0, 2**63),
    "total_timesteps": (1, math.inf),
    "eval_episodes": (1, 10_000),
    "torch_threads": (0, 1024),
    "checkpoint_every": (0, math.inf),
    "num_envs": (1, 100_000),
    "buffer_size": (1, 2**31),
    "learning_starts": (0, math.inf),
    "noise_correlation": (0, 0.9999),
    "train_frequency": (1, math.inf),
    "gradient_steps": (1, math.inf),
    "batch_size": (1, math.inf),
    "policy_lr": (1e-12, 10),
    "q_lr": (1e-12, 10),
    "gamma": (0, 1),
    "tau": (1e-12, 1),
    "alpha": (1e-12, 1e12),
    "hidden_size": (1, 100_000),
}


# ------------------------------------------------------------------------------------------------------- networks


class MLP(nn.Sequential):
    """Two hidden layers. The last layer stays in float32: bfloat16 has 8 bits, too few for values in the hundreds."""

    def __init__(self, num_inputs: int, width: int, num_outputs: int):
        hidden = nn.Linear(num_inputs, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()
        super().__init__(*hidden, nn.Linear(width, num_outputs))

    def forward(self, x: Tensor) -> Tensor:
        *hidden, last = self
        for layer in hidden:
            x = layer(x)
        with torch.autocast(x.device.type, enabled=False):
            return last(x.float())


class Critics(nn.Module):
    """Two independent estimates of Q(s, a)."""

    def __init__(self, num_inputs: int, num_actions: int, width: int):
        super().__init__()
        self.qf1 = MLP(num_inputs + num_actions, width, 1)
        self.qf2 = MLP(num_inputs + num_actions, width, 1)

    def forward(self, obs: Tensor, actions: Tensor) -> Tensor:
        """obs (B, D), actions (B, A) -> (2, B)."""
        x = torch.cat([obs, actions], -1)
        return torch.stack([self.qf1(x), self.qf2(x)]).squeeze(-1)


class Agent(nn.Module):
    """Actor, critics and temperature. To them actions are in [-1, 1], whatever the bounds of the environment are."""

    def __init__(self, envs: gym.vector.VectorEnv, args: Args):
        super().__init__()
        num_inputs, space = envs.single_observation_space.shape[0], envs.single_action_space
        self.register_buffer("low", torch.from_numpy(space.low))
        self.register_buffer("high", torch.from_numpy(space.high))
        self.actor = MLP(num_inputs, args.hidden_size, 2 * space.shape[0])
        self.critics = Critics(num_inputs, space.shape[0], args.hidden_size)
        log_alpha = torch.tensor(0.0 if args.autotune else math.log(args.alpha))
        self.log_alpha = nn.Parameter(log_alpha, requires_grad=args.autotune)

    def policy(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and logarithm of the standard deviation before the squashing: obs (B, D) -> (B, A), (B, A)."""
        mean, log_std = self.actor(obs).chunk(2, -1)
        return mean, -5 + 3.5 * (log_std.tanh() + 1)

    def sample(self, obs: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """SAC eq. 20: a = tanh(mean + std * noise), and log pi(a | s). obs (B, D), noise (B, A) -> (B, A), (B,)."""
        mean, log_std = self.policy(obs)
        u = mean + log_std.exp() * noise
        return u.tanh(), tanh_log_prob(u, noise, log_std)

    def to_env(self, actions: Tensor) -> Tensor:
        """Actions in [-1, 1] -> in the environment's units; its bounds are reached and never passed."""
        return torch.lerp(self.low, self.high, (actions + 1).to(self.low.dtype) / 2)

    def act(self, obs: Tensor) -> Tensor:
        """The mode of the unsquashed Gaussian, in the environment's units: obs (N, D) -> (N, A)."""
        return self.to_env(self.policy(obs)[0].tanh())


# ------------------------------------------------------------------------------------------------------ algorithm


def tanh_log_prob(u: Tensor, noise: Tensor, log_std: Tensor) -> Tensor:
    """log pi(tanh u) of u = mean + std * noise, noise ~ N(0, 1): all (B, A) -> (B,).

    SAC eq. 21: log N(u) - log(1 - tanh(u)^2), summed over the dimensions. The second logarithm is computed as
    2 (log 2 - u - softplus(-2u)), which stays finite where tanh(u) rounds to 1.
    """
    log_normal = -0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi)
    return (log_normal - 2 * (math.log(2) - u - nn.functional.softplus(-2 * u))).sum(-1)


class Replay:
    """The last transitions of N environments, with one copy of each observation.

    Row k * N + i holds what environment i did at place k of its ring. The transition that starts in a row leads to the
    observation in the next row of the same environment. The last observation of an episode has a row of its own, in
    which no transition starts, and the next episode begins after it: so ends, time limits and the place where new rows
    overwrite old ones need no special case. `starts` marks the rows where a transition starts. Nothing is allocated
    after the beginning.
    """

    def __init__(self, capacity: int, envs: gym.vector.VectorEnv):
        obs_space, action_space = envs.single_observation_space, envs.single_action_space
        self.N, self.filled = envs.num_envs, 0  # rows that were ever written
        self.rows = self.N * (-(-capacity // self.N) + 2)
        self.obs = np.zeros((self.rows, *obs_space.shape), np.float32)
        action_type = action_space.dtype if isinstance(action_space, gym.spaces.Discrete) else np.float32
        self.actions = np.zeros((self.rows, *action_space.shape), action_type)
        self.rewards = np.zeros(self.rows, np.float32)
        self.terminations = np.zeros(self.rows, bool)
        self.starts = np.zeros(self.rows, bool)
        self.heads = np.arange(self.N)  # the row where each environment goes on

    def add(self, obs, actions, rewards, next_obs, terminations, dones) -> np.ndarray:
        """A step of all environments, each (N, ...); `next_obs` are the real last ones where an episode ended.

        Returns the rows (2N,) that it wrote: where these transitions start, and what they lead to.
        """
        rows, after = self.heads, self.after(self.heads)
        self.obs[rows], self.obs[after] = obs, next_obs
        self.actions[rows], self.rewards[rows], self.terminations[rows] = actions, rewards, terminations
        self.starts[rows], self.starts[after] = True, False
        if self.filled < self.rows:
            self.filled = max(self.filled, int(rows.max()) + 1)
        self.heads = np.where(dones, self.after(after), after) if dones.any() else after
        return np.concatenate([rows, after])

    def after(self, rows: np.ndarray) -> np.ndarray:
        """The next rows of the same environments."""
        return (rows + self.N) % self.rows

    def cut(self) -> np.ndarray:
        """The environments were made anew: what they had reached gets rows of its own (N,), as after an end."""
        rows, self.heads = self.heads, self.after(self.heads)
        self.starts[rows] = False
        return rows

    def sample(self, size: int) -> np.ndarray:
        """Rows (B,) drawn uniformly, with replacement, from those in which a transition starts."""
        rows = np.random.randint(self.filled, size=size)
        while (misses := ~self.starts[rows]).any():
            rows[misses] = np.random.randint(self.filled, size=misses.sum())
        return rows

    def batch(self, rows: np.ndarray, device: str) -> list[Tensor]:
        """obs, actions, rewards, next_obs, terminations of the transitions that start in `rows` (B,)."""
        next_obs, terminations = self.obs[self.after(rows)], self.terminations[rows]
        arrays = self.obs[rows], self.actions[rows], self.rewards[rows], next_obs, terminations
        return [torch.from_numpy(array).to(device) for array in arrays]

    def state_dict(self) -> dict:
        arrays = {name: torch.from_numpy(value) for name, value in vars(self).items() if isinstance(value, np.ndarray)}
        return arrays | {"filled": self.filled}

    def load_state_dict(self, state: dict) -> None:
        for name, value in vars(self).items():
            if isinstance(value, np.ndarray):
                np.copyto(value, state[name].numpy())
        self.filled = state["filled"]


@torch.no_grad()
def update_target(target: nn.Module, online: nn.Module, tau: float) -> None:
    """target <- (1 - tau) target + tau online, buffers included; tau 1 is a copy."""
    torch._foreach_lerp_(list(target.state_dict().values()), list(online.state_dict().values()), tau)


CRITIC_METRICS = "losses/qf_loss", "losses/q_values"
ACTOR_METRICS = "losses/actor_loss", "losses/entropy", "losses/alpha"


def critic_loss(agent: Agent, target: Critics, args: Args, noise, obs, actions, rewards, next_obs, terminations):
    """SAC eq. 5 for both critics, summed, on B transitions: the squared error of the soft TD target (eq. 3 and 6),

        r + gamma (1 - terminated) (min_i Q_target_i(s', a') - alpha log pi(a' | s')),  a' ~ pi(. | s').

    Returns the loss and the CRITIC_METRICS (2,).
    """
    with torch.no_grad():
        next_actions, next_logprobs = agent.sample(next_obs, noise)
        next_values = target(next_obs, next_actions).amin(0) - agent.log_alpha.exp() * next_logprobs
        td_target = rewards + args.gamma * ~terminations * next_values
    q = agent.critics(obs, actions)
    loss = (q - td_target).square().mean(-1).sum()
    return loss, torch.stack([loss.detach(), q.detach().mean()])


def actor_loss(agent: Agent, args: Args, noise, obs):
    """SAC eq. 9 for the actor plus eq. 18 for the temperature, on B states.

    The actor minimises alpha log pi(a | s) - min_i Q_i(s, a). The temperature sees only how far the entropy is from
    its target, -dim(A): alpha rises where the entropy is too small. The critics' weights are constants here: not to
    compute their gradients saves a third of the work. Returns the loss and the ACTOR_METRICS (3,).
    """
    actions, logprobs = agent.sample(obs, noise)
    alpha = agent.log_alpha.exp()
    weights = {name: weight.detach() for name, weight in agent.critics.named_parameters()}
    q = torch.func.functional_call(agent.critics, weights, (obs, actions))
    pi_loss = (alpha.detach() * logprobs - q.amin(0)).mean()
    entropy = -logprobs.detach().mean()
    alpha_loss = agent.log_alpha * (entropy + actions.shape[-1])
    return pi_loss + alpha_loss, torch.stack([pi_loss.detach(), entropy, alpha.detach()])


def next_noise(noise: Tensor, rho: float) -> Tensor:
    """Standard Gaussian noise whose correlation with `noise` is rho: an autoregressive process of first order."""
    return rho * noise + math.sqrt(1 - rho**2) * torch.randn_like(noise)


def gradient(loss_fn, args: Args, *inputs) -> Tensor:
    """The gradient of `loss_fn(*inputs)` into the parameters that it reaches; returns the metrics of the loss."""
    with torch.autocast(args.device, torch.bfloat16, enabled=args.bf16):
        loss, metrics = loss_fn(*inputs)
    loss.backward()
    return metrics


# -------------------------------------------------------------------------------------------------------- the run


def fail(message: str, code: int = 2) -> None:
    """End the program with one line on stderr. Code 2: bad input or a full disk; 3: the numbers diverged."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(code)


def check_limits(args: Args) -> None:
    """Every flag named in LIMITS lies in its range; None is a flag that is off."""
    for name, (low, high) in LIMITS.items():
        value = getattr(args, name)
        if value is not None and not (isinstance(value, int | float) and low <= value <= high):
            fail(f"--{name.replace('_', '-')} is {value}; it takes values from {low} to {high}")


def reseed(seed: int, *purpose: int, num_envs: int = 0) -> list[int]:
    """Seed Python, NumPy and PyTorch for one purpose of one run; returns a 31-bit seed for each environment.

    Every (seed, purpose) is a stream of its own (`numpy.random.SeedSequence`): neighbouring seeds share nothing. A
    training run reseeds at each checkpoint for the purpose (TRAIN, step), so no generator's state needs to be saved.
    """
    first, *env_seeds = (np.random.SeedSequence(seed, spawn_key=purpose).generate_state(1 + num_envs) >> 1).tolist()
    random.seed(first)
    np.random.seed(first)
    torch.manual_seed(first)
    return env_seeds


def start_envs(args: Args, seeds: list[int], render: bool = False) -> tuple[gym.vector.VectorEnv, np.ndarray]:
    """One environment per seed, stepped in turn, and their first observations (N, D).

    An episode that ends restarts in the same step: its last observation is in infos["final_obs"]. An environment that
    does not fit ends the program.
    """

    def make() -> gym.Env:
        return gym.make(args.env_id, disable_env_checker=True, **{"render_mode": "rgb_array"} if render else {})

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mujoco.set_mju_user_warning(lambda message: None)  # HalfCheetah's model warns each time, and into a file too
        try:
            envs = gym.vector.SyncVectorEnv([make] * len(seeds), autoreset_mode=AutoresetMode.SAME_STEP)
            obs, _ = envs.reset(seed=seeds)
        except Exception as error:
            near = difflib.get_close_matches(args.env_id, gym.registry, n=3)
            hint = f" Near it: {', '.join(near)}." if near and isinstance(error, gym.error.UnregisteredEnv) else ""
            hint = " The script for Atari games is ppo_atari.py." if args.env_id.startswith("ALE/") else hint
            reason = " ".join(str(error).partition(" Did you mean")[0].split())
            fail(f"cannot make the environment {args.env_id}: {reason}{hint}")
    obs_space, space = envs.single_observation_space, envs.single_action_space
    if not isinstance(obs_space, gym.spaces.Box) or len(obs_space.shape) != 1:
        fail(f"{args.env_id} has observations {obs_space}; this script takes vectors, a Box of one dimension")
    if isinstance(space, gym.spaces.Discrete):
        fail(f"{args.env_id} has discrete actions; the script for it is sac_discrete.py")
    if not isinstance(space, gym.spaces.Box) or len(space.shape) != 1 or not space.is_bounded():
        fail(f"{args.env_id} has actions {space}; this script takes vectors with bounds, a Box of one dimension")
    return envs, obs


def to_tensor(obs: np.ndarray, args: Args) -> Tensor:
    """Observations as the networks take them."""
    return torch.from_numpy(obs).to(args.device, torch.float32)


def frame(envs: gym.vector.VectorEnv, obs: np.ndarray) -> np.ndarray:
    """A picture (H, W, 3) of the first environment."""
    return envs.envs[0].render()


def check_video(args: Args) -> None:
    """Make one picture, so that a film that is not possible is said before the run and not after it."""
    if sys.platform == "linux":  # pictures without a screen
        os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
        os.environ.setdefault("MUJOCO_GL", "egl")
    try:
        frame(*start_envs(args, [0], render=True))
    except Exception as error:
        fail(f"{args.env_id} cannot be filmed: {' '.join(repr(error).split())}")


def write_atomically(path: Path, write) -> None:
    """`write(file)` to a file aside, then move it over `path`: at any moment `path` is the old file or the new."""
    aside = path.with_name(path.name + ".tmp")
    try:
        with aside.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except (OSError, RuntimeError) as error:  # torch.save wraps the error of a full disk in a RuntimeError
        aside.unlink(missing_ok=True)
        cause = error if isinstance(error, OSError) else error.__context__ or error
        raise OSError(f"cannot write {path}: {cause}") from None


def write_json(path: Path, content: dict) -> None:
    write_atomically(path, lambda file: file.write((json.dumps(content, indent=2) + "\n").encode()))


def describe_run(args: Args) -> dict:
    """What args.json holds: every flag, and what the result may depend on besides."""
    packages = ("torch", "gymnasium", "ale-py", "mujoco", "Box2D", "numpy")
    installed = {d.name.lower(): d.version for d in importlib.metadata.distributions() if d.name}
    script = Path(__file__).resolve()
    git = ("git", "-C", script.parent, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
        cpu = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name"))
    except (OSError, StopIteration):
        commit, cpu = "", platform.processor()
    return {
        "args": asdict(args),
        "command": shlex.join(sys.argv),
        "script": script.name,
        "sha256": hashlib.sha256(script.read_bytes()).hexdigest(),
        "commit": commit.removesuffix("-dirty") or None,
        "clean": not commit.endswith("-dirty") if commit else None,
        "versions": {"python": platform.python_version()} | {p: installed.get(p.lower()) for p in packages},
        "cpu": cpu.partition(": ")[2] or cpu,
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if args.device == "cuda" else None,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }


class Run:
    """The run folder: what a run leaves on disk, and what it needs to go on from there."""

    def __init__(self, args: Args):
        self.path, self.args = Path(args.run_dir), args
        self.checkpoint = read_checkpoint(self.path) if args.resume else {}
        self.step = self.last_saved = self.checkpoint.get("step", 0)

    def open(self) -> None:
        """Write args.json, or cut the logs back to the checkpoint, and open them."""
        args, logs = self.args, self.checkpoint.get("logs", {})
        try:
            if not args.resume:
                self.path.mkdir(parents=True, exist_ok=True)
                if any(self.path.iterdir()):
                    fail(f"{self.path} is not empty; --resume goes on with a run, --run-dir takes another folder")
                write_json(self.path / "args.json", describe_run(args))
            for log in (*self.path.glob("events.out.tfevents.*"), *self.path.glob("episodes.csv")):
                os.truncate(log, min(logs.get(log.name, 0), log.stat().st_size))  # later rows are written again
            self.episodes = (self.path / "episodes.csv").open("a+", newline="")
            self.writer = SummaryWriter(self.path, flush_secs=10)
        except OSError as error:
            fail(f"cannot write the run folder {self.path}: {error.strerror or error}")
        if self.episodes.tell() == 0:
            self.episodes.write("step,seconds,return,length\n")
        self.episodes.seek(0)
        rows = deque(csv.DictReader(self.episodes), maxlen=100)
        self.recent = deque(((float(row["return"]), int(row["length"])) for row in rows), maxlen=100)
        self.returns, self.lengths = np.zeros(args.num_envs), np.zeros(args.num_envs, np.int64)
        self.flushed = time.perf_counter()
        self.started = self.flushed - self.checkpoint.get("seconds", 0)
        print(f"run folder: {self.path}", flush=True)
        self.bar = tqdm(total=args.total_timesteps, initial=self.step, unit=" steps", unit_scale=True, disable=None)

    def seconds(self) -> float:
        """Seconds of training, over all resumes."""
        return time.perf_counter() - self.started

    def restore(self, **parts) -> int:
        """Give every named part (module, optimiser, ...) its state from the checkpoint; returns the step.

        Only then are the logs opened: a checkpoint that does not fit leaves the folder as it was.
        """
        try:
            for name, part in parts.items() if self.checkpoint else ():
                part.load_state_dict(self.checkpoint[name])
        except (KeyError, ValueError, RuntimeError, TypeError, AttributeError) as error:
            fail(f"{self.path}/checkpoint.pt does not fit this script: {str(error).splitlines()[0]}")
        self.open()
        return self.step

    def save_is_due(self) -> bool:
        every = self.args.checkpoint_every
        return self.step // every > self.last_saved // every and self.step < self.args.total_timesteps

    def save(self, **parts) -> None:
        """Write checkpoint.pt: the state of every named part, the step, and how long each log is by now.

        The caller then starts the environments anew, as a resumed run has to; their running episodes are dropped.
        """
        modules = (part.state_dict() for part in parts.values() if isinstance(part, nn.Module))
        self.check_finite(*(tensor for module in modules for tensor in module.values()))
        self.episodes.flush()
        os.fsync(self.episodes.fileno())
        self.writer.flush()
        logs = {log.name: log.stat().st_size for log in (*self.path.glob("events.*"), *self.path.glob("episodes.csv"))}
        state = {name: part.state_dict() for name, part in parts.items()}
        state |= {"step": self.step, "seconds": self.seconds(), "logs": logs}
        write_atomically(self.path / "checkpoint.pt", lambda file: torch.save(state, file))
        self.last_saved = self.step
        if self.bar.disable:  # no terminal: a sign of life for who reads the log
            trailing = f"{np.mean(self.recent, axis=0)[0]:.1f}" if self.recent else "none yet"
            print(f"{self.step:,} steps in {self.seconds():.0f} s, training return {trailing}", flush=True)
        self.returns[:] = self.lengths[:] = 0

    def record(self, step: int, rewards: np.ndarray, dones: np.ndarray) -> None:
        """Add a step of all environments, raw rewards (N,), to their episodes; those that ended become rows."""
        self.returns += rewards
        self.lengths += 1
        if dones.any():
            for i in np.flatnonzero(dones):
                self.recent.append((float(self.returns[i]), int(self.lengths[i])))
                self.episodes.write(f"{step},{self.seconds():.2f},{self.returns[i]},{self.lengths[i]}\n")
            self.returns[dones] = self.lengths[dones] = 0

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Once per update: scalars for TensorBoard and the progress bar. A number that is not finite ends the run."""
        self.check_finite(torch.tensor(list(metrics.values())))
        if self.recent:
            mean_return, mean_length = np.mean(self.recent, axis=0).tolist()
            metrics |= {"charts/episodic_return": mean_return, "charts/episodic_length": mean_length}
            self.bar.set_postfix_str(f"return {mean_return:.1f}", refresh=False)
        for name, value in (metrics | {"charts/SPS": step / self.seconds()}).items():
            self.writer.add_scalar(name, value, step)
        self.bar.total = max(step, self.bar.total)  # the last rollout may end after --total-timesteps
        self.bar.update(step - self.step)
        self.step = step
        if time.perf_counter() - self.flushed > 1:
            self.episodes.flush()
            self.flushed = time.perf_counter()

    def check_finite(self, *tensors: Tensor) -> None:
        if not all(tensor.isfinite().all() for tensor in tensors):
            self.bar.close()
            hint = "its last checkpoint is kept; " if self.last_saved else ""
            hint += "if all rewards and observations were finite, a smaller learning rate may help"
            fail(f"{self.path} diverged after step {self.step}: loss or weights are not finite; {hint}", code=3)

    def finish(self, agent: nn.Module) -> None:
        """Save the agent, evaluate it, write result.json and say where to look."""
        seconds, args, path = self.seconds(), self.args, shlex.quote(str(self.path))
        self.bar.close()
        self.check_finite(*agent.state_dict().values())
        self.episodes.close()
        self.writer.close()
        tensors = {name: tensor.contiguous() for name, tensor in agent.state_dict().items()}
        write_atomically(self.path / "agent.safetensors", lambda file: file.write(safetensors.torch.save(tensors)))
        returns = evaluate(args, agent)
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
        final_return = float(np.mean(self.recent, axis=0)[0]) if self.recent else None
        result = {
            "final_return": final_return,
            "eval_return_mean": float(returns.mean()),
            "eval_return_std": float(returns.std()),
            "eval_episodes": args.eval_episodes,
            "steps": self.step,
            "seconds": round(seconds, 2),
            "sps": round(self.step / seconds, 1),
            "peak_memory_mb": round(memory, 1),
        }
        write_json(self.path / "result.json", result)
        trailing = f"{final_return:.1f}" if self.recent else "none"
        print(
            f"{args.env_id}, seed {args.seed}: {self.step:,} steps in {seconds:.1f} s, {result['sps']:,.0f} a second\n"
            f"training return, mean of the last {len(self.recent)} episodes: {trailing}\n"
            f"evaluation return, {args.eval_episodes} episodes, greedy: {returns.mean():.1f} ± {returns.std():.1f}\n"
            f"curves: {UV}tensorboard --logdir {path}\n"
            f"film:   {UV}python {shlex.quote(sys.argv[0])} --evaluate {path} --video"
        )


def read_checkpoint(path: Path) -> dict:
    """checkpoint.pt, read as data that can run no code; empty if the run was stopped before its first one."""
    if not (path / "checkpoint.pt").exists():
        return {}
    try:
        with warnings.catch_warnings(action="ignore"):
            if zipfile.ZipFile(path / "checkpoint.pt").testzip():
                raise ValueError("a checksum is wrong")
            checkpoint = torch.load(path / "checkpoint.pt", map_location="cpu", weights_only=True)
        if not (checkpoint["step"] > 0 and checkpoint["seconds"] >= 0 and checkpoint["logs"]["episodes.csv"] > 0):
            raise ValueError("step, seconds or logs are out of range")
        if (path / "episodes.csv").stat().st_size < checkpoint["logs"]["episodes.csv"]:
            raise ValueError("episodes.csv has lost rows that were there when it was written")
        return checkpoint
    except Exception as error:
        fail(f"{path}/checkpoint.pt is damaged or no checkpoint: {(str(error).splitlines() or [repr(error)])[0]}")


@torch.inference_mode()
def evaluate(args: Args, agent: nn.Module) -> np.ndarray:
    """Raw undiscounted returns of `eval_episodes` greedy episodes; `--video` films the first.

    Each episode has an environment of its own, so that short ones are not counted more often than long ones. An episode
    that does not end is cut after 30,000 steps.
    """
    envs, obs = start_envs(args, reseed(args.seed, EVAL, num_envs=args.eval_episodes), render=args.video)
    returns, running, film = np.zeros(args.eval_episodes), np.ones(args.eval_episodes, bool), None
    if args.video:
        path = Path(args.run_dir) / "videos" / f"evaluation-{args.seed}.mp4"
        path.parent.mkdir(exist_ok=True)
        film = imageio.get_writer(path, fps=envs.metadata.get("render_fps", 30), macro_block_size=2)
    for _ in range(30_000):
        if film and running[0]:
            film.append_data(frame(envs, obs))
        obs, rewards, terminations, truncations, _ = envs.step(agent.act(to_tensor(obs, args)).cpu().numpy())
        returns += rewards * running
        running &= ~(terminations | truncations)
        if not running.any():
            break
    envs.close()
    if film:
        film.close()
        print(f"film of the first episode: {path}")
    return returns


def evaluate_saved(args: Args) -> None:
    """Play the agent of a finished run: its folder alone is enough."""
    path = Path(args.run_dir) / "agent.safetensors"
    agent = Agent(start_envs(args, [0])[0], args).to(args.device)
    try:
        agent.load_state_dict(safetensors.torch.load_file(path, device=args.device))
    except FileNotFoundError:
        fail(f"{args.run_dir} is not finished; --resume {args.run_dir} goes on with it")
    except Exception as error:
        fail(f"{path} is damaged, or its agent is not for {args.env_id}: {' '.join(str(error).split())[:200]}")
    returns = evaluate(args, agent)
    print(f"{args.env_id}, {len(returns)} episodes, greedy: {returns.mean():.1f} ± {returns.std():.1f}")


def read_args(folder: str) -> dict:
    """The flags in a run folder's args.json."""
    script = Path(__file__).name
    try:
        described = json.loads((Path(folder) / "args.json").read_text())
        flags, maker, sha256 = dict(described["args"]), described["script"], described["sha256"]
    except FileNotFoundError:
        fail(f"{folder} is not a run folder: it has no args.json")
    except (OSError, ValueError, KeyError, TypeError) as error:
        fail(f"{folder}/args.json is damaged: {error}")
    if maker != script:
        fail(f"{folder} was made by {maker}, which is the script to use with it")
    if set(flags) != set(Args.__dataclass_fields__):
        commit = f": that of commit {described['commit']!s:.7}" if described.get("commit") else ""
        fail(f"{folder} was made by another version of {script}, with other flags{commit}")
    if sha256 != hashlib.sha256(Path(__file__).read_bytes()).hexdigest():
        print(f"warning: {script} has changed since {folder} was begun; the result may differ", file=sys.stderr)
    return flags


def parse_args() -> Args:
    """Flags from the command line; with --resume or --evaluate, those of the run's args.json are the defaults."""
    args = tyro.cli(Args, description=__doc__)
    folder = args.resume or args.evaluate
    if args.resume and args.evaluate:
        fail("--resume and --evaluate exclude each other")
    if folder:
        saved = replace(Args(**read_args(folder)), run_dir=folder, resume=args.resume, evaluate=args.evaluate)
        with warnings.catch_warnings(action="ignore"):  # of a flag of another type, which check_limits refuses
            args = tyro.cli(Args, default=saved)
        changed = [name for name, value in asdict(args).items() if value != getattr(saved, name)]
        if args.evaluate:
            changed = [name for name in changed if name not in EVALUATION]
        if changed:
            verb = "--resume goes on" if args.resume else "--evaluate plays the agent"
            fail(f"{verb} under the flags of the run; leave out --{changed[0].replace('_', '-')}")
        if args.resume and (Path(folder) / "result.json").exists():
            fail(f"{folder} is finished; --evaluate {folder} plays it")
    check_limits(args)
    if args.device == "auto":
        args.device = AUTO_DEVICE
    if args.device == "cuda" and not torch.cuda.is_available():
        fail("--device is cuda, but PyTorch finds no usable GPU")
    if args.compile and args.device == "cpu" and not shutil.which(os.environ.get("CXX", "c++")):
        fail("--compile needs a C++ compiler on PATH")
    args.torch_threads = args.torch_threads or os.cpu_count()
    args.checkpoint_every = args.checkpoint_every or -(-args.total_timesteps // 10)
    if args.run_dir is None:
        name = f"{re.sub('[^A-Za-z0-9.-]+', '-', args.env_id)}__{Path(__file__).stem}__{args.seed}"
        args.run_dir = f"runs/{name}__{datetime.now(UTC):%Y%m%dT%H%M%S.%f}"[:-3] + "Z"
    return args


# ------------------------------------------------------------------------------------------------------- training


def train(args: Args) -> None:
    """SAC, algorithm 1: act, remember, and every `train_frequency` steps learn from what is remembered."""
    N, device = args.num_envs, args.device
    envs, obs = start_envs(args, reseed(args.seed, TRAIN, 0, num_envs=N))
    num_actions = envs.single_action_space.shape[0]
    agent = Agent(envs, args).to(device)
    target = deepcopy(agent.critics).requires_grad_(False)
    q_optimizer = torch.optim.Adam(agent.critics.parameters(), lr=args.q_lr, fused=True)
    actor_optimizer = torch.optim.Adam(
        [{"params": agent.actor.parameters(), "lr": args.policy_lr}, {"params": [agent.log_alpha], "lr": args.q_lr}],
        fused=True,
    )
    replay = Replay(args.buffer_size, envs)
    parts = {"agent": agent, "target": target, "replay": replay}
    parts |= {"q_optimizer": q_optimizer, "actor_optimizer": actor_optimizer}
    run = Run(args)
    global_step = run.restore(**parts)
    restart = global_step > 0
    gradient_fn = gradient
    if args.compile:
        torch._dynamo.config.trace_autograd_ops = True  # loss and backward pass in one graph
        mode = "reduce-overhead" if device == "cuda" else "default"
        gradient_fn = torch.compile(gradient, mode=mode, fullgraph=True)
    history = []
    act_noise = torch.randn(N, num_actions, device=device)

    while global_step < args.total_timesteps:
        if restart:  # after a checkpoint, in a run that goes on and in one that is resumed alike: so both are the same
            envs.close()
            envs, obs = start_envs(args, reseed(args.seed, TRAIN, global_step, num_envs=N))
            replay.cut()
            act_noise = torch.randn(N, num_actions, device=device)
        last_step, global_step = global_step, global_step + N

        # Act. The error function makes Gaussian noise uniform in [-1, 1].
        act_noise = next_noise(act_noise, args.noise_correlation)
        with torch.no_grad():
            if last_step < args.learning_starts:
                actions = (act_noise / math.sqrt(2)).erf()
            else:
                actions, _ = agent.sample(to_tensor(obs, args), act_noise)
                run.check_finite(actions)  # what is not a number makes some simulators crash
            next_obs, rewards, terminations, truncations, infos = envs.step(agent.to_env(actions).cpu().numpy())
        dones = terminations | truncations
        run.record(global_step, rewards, dones)

        # Remember. Where an episode ended, next_obs is the first of the next one.
        reached = next_obs
        if dones.any():
            reached = next_obs.copy()
            reached[dones] = np.stack(infos["final_obs"][dones])
        replay.add(obs, actions.cpu().numpy(), rewards, reached, terminations, dones)
        obs = next_obs

        # Learn. A vector step may pass several multiples of train_frequency, or none.
        if global_step > args.learning_starts:
            scale = 1 - last_step / args.total_timesteps if args.anneal_lr else 1
            q_optimizer.param_groups[0]["lr"] = actor_optimizer.param_groups[1]["lr"] = scale * args.q_lr
            actor_optimizer.param_groups[0]["lr"] = scale * args.policy_lr
            rounds = global_step // args.train_frequency - last_step // args.train_frequency
            for _ in range(rounds * args.gradient_steps):
                batch = replay.batch(replay.sample(args.batch_size), device)
                noise = torch.randn(2, args.batch_size, num_actions, device=device)
                q_optimizer.zero_grad()
                critic_metrics = gradient_fn(critic_loss, args, agent, target, args, noise[0], *batch)
                q_optimizer.step()
                critic_metrics = critic_metrics.clone()  # a CUDA graph writes its next output into the same memory
                actor_optimizer.zero_grad()
                actor_metrics = gradient_fn(actor_loss, args, agent, args, noise[1], batch[0])
                actor_optimizer.step()
                update_target(target, agent.critics, args.tau)
                history.append(torch.cat([critic_metrics, actor_metrics]))

        if global_step // LOG_EVERY > last_step // LOG_EVERY or global_step >= args.total_timesteps:
            means = torch.stack(history).mean(0).tolist() if history else []
            history.clear()
            charts = {"charts/learning_rate": q_optimizer.param_groups[0]["lr"]}
            run.log(global_step, dict(zip(CRITIC_METRICS + ACTOR_METRICS, means, strict=False)) | charts)
        restart = run.save_is_due()
        if restart:
            run.save(**parts)
    envs.close()
    run.finish(agent)


def main() -> None:
    def interrupt(*_):
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    args = parse_args()
    torch.set_num_threads(args.torch_threads)
    try:
        if args.video:
            check_video(args)
        if args.evaluate:
            evaluate_saved(args)
        else:
            train(args)
    except KeyboardInterrupt:
        folder = Path(args.run_dir)
        is_unfinished = (folder / "args.json").exists() and not (folder / "result.json").exists()
        hint = f"; to go on: {UV}python {shlex.quote(sys.argv[0])} --resume {shlex.quote(args.run_dir)}"
        print(f"\nstopped{hint if is_unfinished else ''}", file=sys.stderr)
        raise SystemExit(130) from None
    except OSError as error:
        hint = f"; what was saved before is intact. To go on: --resume {shlex.quote(args.run_dir)}"
        fail(f"{error}{'' if args.evaluate else hint}")


if __name__ == "__main__":
    main()
