"""Proximal policy optimisation (PPO) for Atari games.

    python algos/ppo_atari.py --env-id ALE/Pong-v5                  # ten million steps
    python algos/ppo_atari.py --env-id ALE/Pong-v5 --total-timesteps 4000000
    python algos/ppo_atari.py --resume runs/ALE-Pong-v5__ppo_atari__1__...
    python algos/ppo_atari.py --evaluate runs/ALE-Pong-v5__ppo_atari__1__... --video

Papers: Schulman et al. 2017, arXiv:1707.06347 ("PPO" below, whose Atari settings in table 5 are the defaults here, 3
epochs included, but that the clipping range stays as it is and the value loss weighs a quarter); Schulman et al. 2016,
arXiv:1506.02438 ("GAE"); the network is the one of Mnih et al. 2015, Nature 518, from which also comes that a lost
life ends an episode; sticky actions are from Machado et al. 2018, arXiv:1709.06009.

Protocol: `ALE/*-v5`, sticky actions with probability 0.25, the game's minimal action set, frame skip 4, 84 x 84
grayscale (the larger of the last two frames), 4 frames stacked; FIRE and fewer than 30 no-ops at the start, at most
108 000 frames a game. What is reported is the raw score of whole games; only the learner sees the sign of the rewards,
and an end of the episode where a life is lost, while the game goes on. Machado et al. recommend against that end
(`--no-life-loss`), since it tells the learner something about the game; on Breakout the last 100 games of 300 000 steps
had 9.6, 9.3 and 8.7 with it (seeds 101 to 103), 4.9 and 7.3 without (101 and 102).

What to notice, coming from `ppo.py`: policy and value share their features, so values come with the actions instead of
once per rollout; frames are turned into numbers once, when they arrive, with the channels last, and the layers that
they share run in bfloat16 by default (`--no-bf16`), while weights, heads and losses stay in float32. No
difference in score was found: on Breakout, as above, the average of three seeds is 9.2, and 8.8 in float32 (6.8, 8.6,
11.0).

What is not in the papers, beside the details that `ppo.py` names: from each pixel its running mean is taken, and all
are divided by the one standard deviation that is left (`--no-norm-obs` for pixels from 0 to 1). A ball is four pixels
on a background that says nothing, and as the pixels come, the background is most of what the network sees. On Pong
under these flags the mean return without it was -9.5 after 900 000 steps and no better after 1.8 million (one run);
with it, three runs of three were above -5 by 400 000. The best setting without it (four epochs, clip-coef 0.2, 5e-4)
reached 0 after 800 000 steps on one seed of two.

Best on Pong were the flags of the example in CleanRL's README, which a search on Pong without sticky actions found,
and no value clipping:

    python algos/ppo_atari.py --clip-coef 0.2 --num-envs 16 --num-minibatches 8 --no-clip-vloss

On Breakout, as above, they are no better than the defaults: 9.1, the average of three seeds. What is learned on Pong is
above all one shot that the opponent misses: in 32 games of an agent trained for 4 million steps 640 of 790 points were
won within 82 steps, 550 of them after the 70th. Of the 120 points that went on 88 were lost, since there its paddle
hardly follows the ball; without sticky actions, where the shot succeeds, it had 20.8.

What it does not do: memory, other image environments than ALE. Scores: docs/BENCHMARKS.md.

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

import ale_py  # noqa: F401 (registers the games)
import gymnasium as gym
import imageio
import numpy as np
import safetensors.torch
import torch
import tyro
from gymnasium.vector import AutoresetMode
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

AUTO_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # what --device auto means here
TRAIN, EVAL = 0, 1  # purposes of random streams
EVALUATION = "env_id", "seed", "eval_episodes", "video", "device", "torch_threads"  # flags that --evaluate may change
UV = "uv run " if "UV" in os.environ else ""  # how a printed command has to begin


@dataclass
class Args:
    # The run
    env_id: str = "ALE/Pong-v5"
    """Gymnasium id of the environment; `package:Name-v0` imports the package first"""
    seed: int = 1
    """decides every random number of the run"""
    total_timesteps: int = 10_000_000
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
    torch_threads: int = 0
    """CPU threads of PyTorch; 0 for one per core. Part of the result: sums are rounded in another order"""
    compile: bool = False
    """compile the loss with torch.compile (on a GPU into CUDA graphs)"""
    checkpoint_every: int = 0
    """steps between checkpoints; 0 for a tenth of the run. Each cuts the running episodes, which then do not count"""

    # The environment
    life_loss: bool = True
    """a lost life ends the episode for the learner (the game goes on)"""

    # The algorithm
    num_envs: int = 8
    """parallel environments (N)"""
    num_steps: int = 128
    """steps of each environment per rollout (T)"""
    learning_rate: float = 2.5e-4
    """learning rate of Adam at the start"""
    anneal_lr: bool = True
    """let the learning rate fall linearly towards 0"""
    gamma: float = 0.99
    """discount factor"""
    gae_lambda: float = 0.95
    """lambda of the generalised advantage estimation"""
    num_minibatches: int = 4
    """minibatches per epoch"""
    update_epochs: int = 3
    """epochs over each rollout (K)"""
    norm_adv: bool = True
    """normalise the advantages of each minibatch"""
    clip_coef: float = 0.1
    """clipping range of the probability ratio (epsilon)"""
    clip_vloss: bool = True
    """clip the value loss around the rollout's values, with the same range"""
    ent_coef: float = 0.01
    """weight of the entropy bonus (c2)"""
    vf_coef: float = 0.5
    """weight of the value loss, which is half a squared error (2 c1)"""
    max_grad_norm: float = 0.5
    """largest global norm of the gradient"""
    target_kl: float | None = None
    """stop the epochs of an update when the approximate KL divergence exceeds this"""
    norm_obs: bool = True
    """take from each pixel its running mean, and divide all by the standard deviation that is left"""

    # Speed
    bf16: bool = True
    """the layers before the heads in bfloat16 (weights, heads and losses stay in float32)"""


LIMITS = {  # flag: smallest and largest value
    "seed": (0, 2**63),
    "total_timesteps": (1, math.inf),
    "eval_episodes": (1, 10_000),
    "torch_threads": (0, 1024),
    "checkpoint_every": (0, math.inf),
    "num_envs": (1, 100_000),
    "num_steps": (1, math.inf),
    "learning_rate": (1e-12, 10),
    "gamma": (0, 1),
    "gae_lambda": (0, 1),
    "num_minibatches": (1, math.inf),
    "update_epochs": (1, math.inf),
    "clip_coef": (1e-6, math.inf),
    "ent_coef": (0, math.inf),
    "vf_coef": (0, math.inf),
    "max_grad_norm": (1e-12, math.inf),
    "target_kl": (0, math.inf),
}


# ------------------------------------------------------------------------------------------------------- networks


def layer_init(layer: nn.Module, std: float = 2**0.5) -> nn.Module:
    """Orthogonal weights with gain `std` and zero biases."""
    nn.init.orthogonal_(layer.weight, std)
    nn.init.zeros_(layer.bias)
    return layer


class RunningMeanStd(nn.Module):
    """Mean and variance of all that was seen, as buffers: whoever has the agent has its statistics."""

    def __init__(self, *shape: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(shape, dtype=torch.float64))
        self.register_buffer("var", torch.ones(shape, dtype=torch.float64))
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))

    def update(self, x: Tensor) -> None:
        """Take in the rows of x (B, *shape): the parallel algorithm of Chan et al. 1979."""
        x = x.double()
        delta, total = x.mean(0) - self.mean, self.count + len(x)
        m2 = self.var * self.count + x.var(0, unbiased=False) * len(x) + delta.square() * self.count * len(x) / total
        self.mean.add_(delta * len(x) / total)
        self.var.copy_(m2 / total)
        self.count.copy_(total)


class Agent(nn.Module):
    """The network of Mnih et al. 2015, with two heads on the features that policy and value share."""

    def __init__(self, envs: gym.vector.VectorEnv, args: Args):
        super().__init__()
        self.norm_obs = args.norm_obs
        self.dtype = torch.bfloat16 if args.bf16 else torch.float32
        self.obs_stats = RunningMeanStd(84, 84, 1)
        self.trunk = nn.Sequential(
            layer_init(nn.Conv2d(4, 32, 8, stride=4)),
            nn.ReLU(),
            layer_init(nn.Conv2d(32, 64, 4, stride=2)),
            nn.ReLU(),
            layer_init(nn.Conv2d(64, 64, 3)),
            nn.ReLU(),
            nn.Flatten(),
            layer_init(nn.Linear(64 * 7 * 7, 512)),
            nn.ReLU(),
        ).to(memory_format=torch.channels_last)
        self.actor = layer_init(nn.Linear(512, int(envs.single_action_space.n)), std=0.01)
        self.critic = layer_init(nn.Linear(512, 1), std=1.0)

    def normalize(self, obs: Tensor) -> Tensor:
        """Bytes (N, 84, 84, 4) -> what the network sees. Until the first update the statistics are 0 and 1.

        The mean is one of each pixel: without it most of what the network sees is the background, which says nothing.
        The deviation is one of all pixels, so that a pixel that hardly ever changes is not blown up, and at least 0.01.
        Nothing is clipped: how bright the pixels of a ball are tells where between them it is.
        """
        x = obs / 255
        if self.norm_obs:
            std = (self.obs_stats.var.mean() + 1e-4).sqrt()
            x = (x - self.obs_stats.mean.float()) / std.float()
        return x.to(self.dtype)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised frames (B, 84, 84, 4) -> logits (B, A), V(s) (B,). Weights and heads are float32 in any case."""
        with torch.autocast(x.device.type, x.dtype, enabled=x.dtype != torch.float32):
            hidden = self.trunk(x.permute(0, 3, 1, 2))
        hidden = hidden.float()
        return self.actor(hidden), self.critic(hidden).squeeze(-1)

    def act(self, obs: Tensor) -> Tensor:
        """The most probable action: bytes (N, 84, 84, 4) -> (N,)."""
        return self(self.normalize(obs))[0].argmax(-1)


# ------------------------------------------------------------------------------------------------------ algorithm


def gae(
    rewards: Tensor, values: Tensor, next_values: Tensor, terminations: Tensor, dones: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation, GAE eq. 16, with both kinds of episode end. All tensors are (T, N).

    `next_values[t]` is V of the state that action t led to: at the end of an episode its real last state, not the
    first of the next. A termination has no future; a truncation (done but not terminated) has one that was not seen.

        delta_t = r_t + gamma V(s_{t+1}) (1 - terminated_t) - V(s_t)
        A_t = delta_t + gamma lambda (1 - done_t) A_{t+1}

    Returns advantages and returns (advantages + values).
    """
    deltas = rewards + gamma * next_values * ~terminations - values
    decays = gamma * lam * ~dones
    advantages, following = torch.empty_like(deltas), torch.zeros_like(deltas[0])
    for t in reversed(range(len(deltas))):
        advantages[t] = following = deltas[t] + decays[t] * following
    return advantages, advantages + values


def clipped_surrogate(ratio: Tensor, advantages: Tensor, clip_coef: float) -> Tensor:
    """PPO eq. 7 before the mean: the pessimistic of the plain and the clipped objective, (B,) -> (B,)."""
    return torch.min(advantages * ratio, advantages * ratio.clamp(1 - clip_coef, 1 + clip_coef))


def value_loss(new_values: Tensor, values: Tensor, returns: Tensor, clip_coef: float | None) -> Tensor:
    """Half the squared error, (B,) -> (B,); with `clip_coef` the worse of plain and clipped around `values`."""
    error = (new_values - returns).square()
    if clip_coef is not None:
        clipped = values + (new_values - values).clamp(-clip_coef, clip_coef)
        error = torch.max(error, (clipped - returns).square())
    return 0.5 * error


def normalize_advantages(advantages: Tensor) -> Tensor:
    """Zero mean and unit standard deviation; a single advantage has no deviation and stays as it is."""
    if len(advantages) == 1:
        return advantages
    std, mean = torch.std_mean(advantages)
    return (advantages - mean) / (std + 1e-8)


def log_prob_and_entropy(logits: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
    """Of a categorical distribution: logits (..., A), actions (...) -> (...), (...)."""
    logprobs = logits.log_softmax(-1)
    return logprobs.gather(-1, actions.unsqueeze(-1)).squeeze(-1), -(logprobs.exp() * logprobs).sum(-1)


def explained_variance(values: Tensor, returns: Tensor) -> float:
    """1 - Var(returns - values) / Var(returns): 1 for a perfect critic, 0 for one no better than a constant."""
    return 1 - ((returns - values).var(correction=0) / (returns.var(correction=0) + 1e-8)).item()


def ppo_loss(agent: Agent, args: Args, obs, actions, logprobs, advantages, returns, values) -> tuple[Tensor, Tensor]:
    """PPO eq. 9 on a minibatch of B rows, as a loss.

    Returns it and, for the metrics of `update`, its parts: policy loss, value loss, entropy and log ratio, (4, B).
    """
    logits, new_values = agent(obs)
    new_logprobs, entropy = log_prob_and_entropy(logits, actions)
    logratio = new_logprobs - logprobs
    if args.norm_adv:
        advantages = normalize_advantages(advantages)
    policy_loss = -clipped_surrogate(logratio.exp(), advantages, args.clip_coef)
    v_loss = value_loss(new_values, values, returns, args.clip_coef if args.clip_vloss else None)
    loss = (policy_loss - args.ent_coef * entropy + args.vf_coef * v_loss).mean()
    return loss, torch.stack([policy_loss, v_loss, entropy.expand_as(v_loss), logratio]).detach()


def ppo_gradient(agent: Agent, args: Args, *minibatch: Tensor) -> Tensor:
    """The gradient of `ppo_loss`, its norm limited, into the parameters; returns the parts of the loss, (4, B)."""
    loss, parts = ppo_loss(agent, args, *minibatch)
    loss.backward()
    nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm, foreach=True)
    return parts


METRICS = "losses/policy_loss", "losses/value_loss", "losses/entropy", "losses/approx_kl", "losses/clipfrac"


def update(agent: Agent, optimizer: torch.optim.Optimizer, gradient_fn, batch: tuple, args: Args) -> dict[str, float]:
    """`update_epochs` epochs of minibatch steps over one rollout: each tensor of `batch` has T * N rows.

    Returns the METRICS. The approximate KL divergence is mean((ratio - 1) - log ratio): unbiased, never negative, and
    of low variance (http://joschu.net/blog/kl-approx.html).
    """
    rows = len(batch[0])
    history = []
    for _ in range(args.update_epochs):
        order = torch.randperm(rows, device=batch[0].device)
        shuffled = [x[order].split(rows // args.num_minibatches) for x in batch]
        epoch = []
        for minibatch in zip(*shuffled, strict=True):
            optimizer.zero_grad()
            parts = gradient_fn(agent, args, *minibatch)
            optimizer.step()
            epoch.append(parts.clone())  # a CUDA graph writes its next output into the same memory
        policy_loss, v_loss, entropy, logratio = torch.cat(epoch, 1)
        ratio = logratio.exp()
        approx_kl = (ratio - 1 - logratio).mean()
        clipfrac = ((ratio - 1).abs() > args.clip_coef).float().mean()
        history.append(torch.stack([policy_loss.mean(), v_loss.mean(), entropy.mean(), approx_kl, clipfrac]))
        if args.target_kl is not None and approx_kl > args.target_kl:
            break
    return dict(zip(METRICS, torch.stack(history).mean(0).tolist(), strict=True))


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
    """One game per seed in ALE's native vector environment, and their first observations (N, 4, 84, 84), bytes.

    Sticky actions (0.25), frame skip 4, the maximum of the last two frames, grayscale, the last 4 of these. A game
    starts with FIRE, where it has that button, and fewer than 30 no-ops; it is cut after 108,000 frames. One that ends
    restarts in the same step: its last observation is in infos["final_obs"]. Rewards are raw.
    """
    games = [name for name in gym.registry if name.startswith("ALE/")]
    if args.env_id not in games:
        near = ", ".join(difflib.get_close_matches(args.env_id, games, n=3) or ["ALE/Pong-v5"])
        fail(f"{args.env_id} is not an Atari game of ale-py. Near it: {near}. For vectors there is ppo.py")
    envs = gym.make_vec(
        args.env_id,
        len(seeds),
        autoreset_mode=AutoresetMode.SAME_STEP,
        repeat_action_probability=0.25,
        reward_clipping=False,
        num_threads=args.torch_threads,
    )
    return envs, envs.reset(seed=np.array(seeds))[0]


def to_tensor(obs: np.ndarray, args: Args) -> Tensor:
    """Bytes (N, 4, 84, 84) -> bytes (N, 84, 84, 4), the layout in which convolutions are fastest."""
    return torch.from_numpy(obs).to(args.device).permute(0, 2, 3, 1)


def frame(envs: gym.vector.VectorEnv, obs: np.ndarray) -> np.ndarray:
    """A picture (336, 336, 3) of what the agent sees of the first game."""
    return np.repeat(obs[0, -1].repeat(4, 0).repeat(4, 1)[..., None], 3, -1)


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
    """PPO, algorithm 1: T steps in each of N environments, K epochs on them, and again."""
    T, N, device = args.num_steps, args.num_envs, torch.device(args.device)
    if T * N % args.num_minibatches:
        fail(f"--num-minibatches {args.num_minibatches} does not divide the batch, {N} environments * {T} steps")
    num_iterations = math.ceil(args.total_timesteps / (T * N))
    envs, next_obs = start_envs(args, reseed(args.seed, TRAIN, 0, num_envs=N))
    agent = Agent(envs, args).to(device)
    optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate, eps=1e-5, fused=True)
    run = Run(args)
    global_step = run.restore(agent=agent, optimizer=optimizer)
    restart = global_step > 0
    gradient_fn = ppo_gradient
    if args.compile:
        torch._dynamo.config.trace_autograd_ops = True  # loss and backward pass in one graph
        mode = "reduce-overhead" if args.device == "cuda" else "default"
        gradient_fn = torch.compile(ppo_gradient, mode=mode, fullgraph=True)

    def gradient_of_rows(agent: Agent, args: Args, rows: Tensor, *minibatch: Tensor) -> Tensor:
        """`gradient_fn` with the pictures of these rows. One shuffled copy of all would be new memory each time."""
        return gradient_fn(agent, args, obs.flatten(0, 1)[rows], *minibatch)

    num_actions = int(envs.single_action_space.n)
    frames = torch.zeros((T, N, 84, 84, 1), dtype=torch.uint8, device=device)
    obs = torch.zeros((T + 1, N, 84, 84, 4), dtype=agent.dtype, device=device)
    logits = torch.zeros((T, N, num_actions), device=device)
    values = torch.zeros((T + 1, N), device=device)
    actions = torch.zeros((T, N), dtype=torch.int64, device=device)
    rewards, terminations, dones = np.zeros((T, N), np.float32), np.zeros((T, N), bool), np.zeros((T, N), bool)
    lives = np.zeros(N)

    for iteration in range(global_step // (T * N), num_iterations):
        if restart:  # after a checkpoint, in a run that goes on and in one that is resumed alike: so both are the same
            envs.close()
            envs, next_obs = start_envs(args, reseed(args.seed, TRAIN, global_step, num_envs=N))
            lives[:] = 0
        learning_rate = args.learning_rate * (1 - iteration / num_iterations if args.anneal_lr else 1)
        optimizer.param_groups[0]["lr"] = learning_rate

        with torch.no_grad():
            # The rollout. argmax(logits + Gumbel noise) is a sample of softmax(logits).
            actor = deepcopy(agent)
            actor.trunk.to(agent.dtype)  # what autocast does in every call
            gumbel = -torch.empty_like(logits).exponential_().log()
            obs[0] = agent.normalize(to_tensor(next_obs, args))
            last_obs = []  # of the episodes that a time limit cut: (t, which environments, observations)
            for t in range(T):
                logits[t], values[t] = actor(obs[t])
                actions[t] = (logits[t] + gumbel[t]).argmax(-1)
                next_obs, reward, terminated, truncated, infos = envs.step(actions[t].cpu().numpy())
                seen = to_tensor(next_obs, args)
                frames[t], obs[t + 1] = seen[..., -1:], agent.normalize(seen)
                global_step += N
                run.record(global_step, reward, terminated | truncated)
                if truncated.any():
                    last_obs.append((t, truncated.nonzero()[0], infos["final_obs"][truncated]))
                if args.life_loss:
                    terminated = terminated | (infos["lives"] < lives) & ~truncated
                    lives = infos["lives"]
                rewards[t], terminations[t], dones[t] = np.sign(reward), terminated, terminated | truncated

            # Advantages. The state an action led to has the next row's value, unless the episode was cut there.
            values[T] = actor(obs[T])[1]
            next_values = values[1:].clone()
            for t, cut, cut_obs in last_obs:
                next_values[t, cut] = actor(agent.normalize(to_tensor(cut_obs, args)))[1]
            r, terminated, done = (torch.from_numpy(array).to(device) for array in (rewards, terminations, dones))
            advantages, returns = gae(r, values[:-1], next_values, terminated, done, args.gamma, args.gae_lambda)
            logprobs, _ = log_prob_and_entropy(logits, actions)

        rows = torch.arange(T * N, device=device)
        batch = [rows, *(x.flatten(0, 1) for x in (actions, logprobs, advantages, returns, values[:-1]))]
        metrics = update(agent, optimizer, gradient_of_rows, batch, args)
        if args.norm_obs:  # of one step in eight: the frames between are much like these
            agent.obs_stats.update(frames[::8].flatten(0, 1) / 255)
        metrics |= {"losses/explained_variance": explained_variance(values[:-1], returns)}
        run.log(global_step, metrics | {"charts/learning_rate": learning_rate})
        restart = run.save_is_due()
        if restart:
            run.save(agent=agent, optimizer=optimizer)
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
