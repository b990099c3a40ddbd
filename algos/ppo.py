"""Proximal policy optimisation (PPO) for vector observations and discrete actions.

    python algos/ppo.py                                             # CartPole-v1, half a minute
    python algos/ppo.py --env-id Acrobot-v1 --total-timesteps 300000
    python algos/ppo.py --env-id package:Name-v0                    # any registered Gymnasium environment
    python algos/ppo.py --resume runs/CartPole-v1__ppo__1__...      # goes on where a killed run was
    python algos/ppo.py --evaluate runs/CartPole-v1__ppo__1__... --eval-episodes 20 --video

Paper: Schulman et al. 2017, "Proximal Policy Optimization Algorithms", arXiv:1707.06347 ("PPO" below), with the
advantage estimator of Schulman et al. 2016, arXiv:1506.02438 ("GAE"). The details that the papers leave out and that
matter are collected in Huang et al. 2022, "The 37 Implementation Details of Proximal Policy Optimization"; here they
are: several environments, orthogonal initialisation, Adam with epsilon 1e-5, a learning rate that falls linearly,
advantages normalised per minibatch, a clipped value loss (a flag), an entropy bonus, a global gradient-norm limit, an
approximate KL divergence with an optional early stop, and separate networks for policy and value.

What differs from the usual implementation: an episode that is cut by a time limit is bootstrapped from its real last
observation, because it was not over (`gae`); the environments' values are computed once per rollout in one batch; a
checkpoint restarts the environments and every random stream from (seed, step), so a resumed run repeats the bits of
one that was never interrupted.

What it does not do: images (`ppo_atari.py`), continuous actions (`ppo_continuous.py`), memory, action masks.
Read next: `ppo_continuous.py`, whose diff with this file is what a Gaussian policy and normalisation take.
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
from collections import deque
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Literal

import gymnasium as gym
import numpy as np
import safetensors.torch
import torch
import tyro
from gymnasium.vector import AutoresetMode
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

AUTO_DEVICE = "cpu"  # what --device auto means here: networks this small are faster on the CPU
INIT, TRAIN, EVAL = 0, 1, 2  # purposes of random streams


@dataclass
class Args:
    # The run
    env_id: str = "CartPole-v1"
    """Gymnasium id of the environment; `package:Name-v0` imports the package first"""
    seed: int = 1
    """decides every random number of the run"""
    total_timesteps: int = 200_000
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
    """steps between checkpoints; 0 for a tenth of the run"""

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
    update_epochs: int = 4
    """epochs over each rollout (K)"""
    norm_adv: bool = True
    """normalise the advantages of each minibatch"""
    clip_coef: float = 0.2
    """clipping range of the probability ratio (epsilon)"""
    clip_vloss: bool = True
    """clip the value loss around the rollout's values, with the same range"""
    ent_coef: float = 0.01
    """weight of the entropy bonus (c2)"""
    vf_coef: float = 0.5
    """weight of the value loss (c1)"""
    max_grad_norm: float = 0.5
    """largest global norm of the gradient"""
    target_kl: float | None = None
    """stop the epochs of an update when the approximate KL divergence exceeds this"""


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


class Agent(nn.Module):
    """Policy and value function: two networks, nothing shared."""

    def __init__(self, envs: gym.vector.VectorEnv):
        super().__init__()
        num_inputs, num_actions = envs.single_observation_space.shape[0], int(envs.single_action_space.n)
        self.actor = nn.Sequential(
            layer_init(nn.Linear(num_inputs, 64)),
            nn.Tanh(),
            layer_init(nn.Linear(64, 64)),
            nn.Tanh(),
            layer_init(nn.Linear(64, num_actions), std=0.01),
        )
        self.critic = nn.Sequential(
            layer_init(nn.Linear(num_inputs, 64)),
            nn.Tanh(),
            layer_init(nn.Linear(64, 64)),
            nn.Tanh(),
            layer_init(nn.Linear(64, 1), std=1.0),
        )

    def value(self, obs: Tensor) -> Tensor:
        """V(s): obs (..., D) -> (...)."""
        return self.critic(obs).squeeze(-1)

    def act(self, obs: Tensor) -> Tensor:
        """The most probable action: obs (N, D) -> (N,)."""
        return self.actor(obs).argmax(-1)


# ------------------------------------------------------------------------------------------------------ algorithm


def gae(
    values: Tensor, next_values: Tensor, rewards: Tensor, terminations: Tensor, dones: Tensor, gamma: float, lam: float
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
        following = torch.addcmul(deltas[t], decays[t], following, out=advantages[t])
    return advantages, advantages + values


def clipped_surrogate(ratio: Tensor, advantages: Tensor, clip_coef: float) -> Tensor:
    """PPO eq. 7, as a loss: the pessimistic of the plain and the clipped objective, (B,) -> scalar."""
    return -torch.min(advantages * ratio, advantages * ratio.clamp(1 - clip_coef, 1 + clip_coef)).mean()


def value_loss(new_values: Tensor, values: Tensor, returns: Tensor, clip_coef: float | None) -> Tensor:
    """Half the mean squared error, (B,) -> scalar; with `clip_coef` the worse of plain and clipped around `values`."""
    loss = (new_values - returns).square()
    if clip_coef is not None:
        clipped = values + (new_values - values).clamp(-clip_coef, clip_coef)
        loss = torch.max(loss, (clipped - returns).square())
    return 0.5 * loss.mean()


def normalize_advantages(advantages: Tensor) -> Tensor:
    """Zero mean and unit standard deviation; a single advantage has no deviation and stays as it is."""
    if len(advantages) == 1:
        return advantages
    return (advantages - advantages.mean()) / (advantages.std() + 1e-8)


def log_prob_and_entropy(logits: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
    """Of a categorical distribution: logits (B, A), actions (B,) -> (B,), (B,)."""
    logprobs = logits.log_softmax(-1)
    return logprobs.gather(-1, actions.unsqueeze(-1)).squeeze(-1), -(logprobs.exp() * logprobs).sum(-1)


def ppo_loss(agent: Agent, args: Args, obs, actions, logprobs, advantages, returns, values) -> tuple[Tensor, Tensor]:
    """PPO eq. 9 on a minibatch of B rows. Returns the loss and (policy loss, value loss, entropy, KL, clip fraction).

    The approximate KL divergence is mean((ratio - 1) - log ratio): unbiased, never negative, and of low variance
    (http://joschu.net/blog/kl-approx.html).
    """
    new_logprobs, entropy = log_prob_and_entropy(agent.actor(obs), actions)
    logratio = new_logprobs - logprobs
    ratio = logratio.exp()
    if args.norm_adv:
        advantages = normalize_advantages(advantages)
    pg_loss = clipped_surrogate(ratio, advantages, args.clip_coef)
    v_loss = value_loss(agent.value(obs), values, returns, args.clip_coef if args.clip_vloss else None)
    entropy = entropy.mean()
    loss = pg_loss - args.ent_coef * entropy + args.vf_coef * v_loss
    with torch.no_grad():
        approx_kl = (ratio - 1 - logratio).mean()
        clipfrac = ((ratio - 1).abs() > args.clip_coef).float().mean()
        metrics = torch.stack([pg_loss, v_loss, entropy, approx_kl, clipfrac])
    return loss, metrics


def update(agent: Agent, optimizer: torch.optim.Optimizer, loss_fn, batch: tuple, args: Args) -> dict[str, float]:
    """`update_epochs` epochs of minibatch steps over one rollout: each tensor of `batch` has T * N rows."""
    rows = len(batch[0])
    history = []
    for _ in range(args.update_epochs):
        order = torch.randperm(rows, device=batch[0].device)
        shuffled = [x[order].split(rows // args.num_minibatches) for x in batch]
        epoch = []
        for minibatch in zip(*shuffled):
            loss, metrics = loss_fn(agent, args, *minibatch)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm, foreach=True)
            optimizer.step()
            epoch.append(metrics.clone())
        history.extend(epoch)
        if args.target_kl is not None and torch.stack(epoch)[:, 3].mean() > args.target_kl:
            break
    names = ("policy_loss", "value_loss", "entropy", "approx_kl", "clipfrac")
    return dict(zip((f"losses/{name}" for name in names), torch.stack(history).mean(0).tolist()))


# -------------------------------------------------------------------------------------------------------- the run


def fail(message: str, code: int = 2) -> None:
    """End the program with one line on stderr. Code 2: bad input or a full disk; 3: the numbers diverged."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(code)


def check_limits(args: Args) -> None:
    """Every flag named in LIMITS lies in its range; None is a flag that is off."""
    for name, (low, high) in LIMITS.items():
        value = getattr(args, name)
        if value is not None and not low <= value <= high:
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


def make_envs(args: Args, num_envs: int, render: bool = False) -> gym.vector.VectorEnv:
    """Environments stepped in turn. An episode that ends restarts in the same step; info["final_obs"] has its end."""

    def thunk() -> gym.Env:
        return gym.make(args.env_id, disable_env_checker=True, render_mode="rgb_array" if render else None)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            envs = gym.vector.SyncVectorEnv([thunk] * num_envs, autoreset_mode=AutoresetMode.SAME_STEP)
        except Exception as error:
            known = difflib.get_close_matches(args.env_id, gym.registry, n=3)
            hint = f" Near it: {', '.join(known)}." if known and isinstance(error, gym.error.UnregisteredEnv) else ""
            hint = " Atari games are for ppo_atari.py." if args.env_id.startswith("ALE/") else hint
            fail(f"cannot make the environment {args.env_id}: {' '.join(str(error).split())}{hint}")
    space = envs.single_observation_space
    if not isinstance(space, gym.spaces.Box) or len(space.shape) != 1:
        fail(f"{args.env_id} has observations {space}; this script takes vectors, a Box of one dimension")
    if isinstance(envs.single_action_space, gym.spaces.Box):
        fail(f"{args.env_id} has continuous actions; the script for it is ppo_continuous.py")
    if not isinstance(envs.single_action_space, gym.spaces.Discrete) or envs.single_action_space.start != 0:
        fail(f"{args.env_id} has actions {envs.single_action_space}; this script takes Discrete(n), counted from 0")
    return envs


def write_atomically(path: Path, write) -> None:
    """`write(file)` to a file aside, then move it over `path`: at any moment `path` is the old file or the new."""
    aside = path.with_name(path.name + ".tmp")
    with aside.open("wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)


def describe_run(args: Args) -> dict:
    """What args.json holds: every flag, and what the result may depend on besides."""
    packages = ("torch", "gymnasium", "ale-py", "mujoco", "Box2D", "numpy")
    installed = {d.name.lower(): d.version for d in importlib.metadata.distributions() if d.name}
    script = Path(__file__).resolve()
    git = ("git", "-C", script.parent, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    try:
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
        cpu = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name"))
    except (OSError, StopIteration):
        commit, cpu = "", platform.processor()
    return {
        "args": asdict(args),
        "command": shlex.join(sys.argv),
        "script": script.name,
        "sha256": hashlib.sha256(script.read_bytes()).hexdigest(),
        "commit": commit.removesuffix("-dirty") or None,
        "clean": bool(commit) and not commit.endswith("-dirty"),
        "versions": {"python": platform.python_version()} | {p: installed.get(p.lower()) for p in packages},
        "cpu": cpu.partition(": ")[2] or cpu,
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if args.device == "cuda" else None,
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


class Run:
    """The run folder: all that a run leaves on disk, and what it needs to go on from there."""

    def __init__(self, args: Args):
        self.path = Path(args.run_dir)
        self.checkpoint = read_checkpoint(self.path) if args.resume else None
        saved = self.checkpoint or {"step": 0, "seconds": 0.0, "logs": {}}
        try:
            if not args.resume:
                self.path.mkdir(parents=True, exist_ok=True)
                if any(self.path.iterdir()):
                    fail(f"{self.path} is not empty; --resume goes on with a run, --run-dir takes another folder")
                text = json.dumps(describe_run(args), indent=2) + "\n"
                write_atomically(self.path / "args.json", lambda file: file.write(text.encode()))
            for log in (*self.path.glob("events.out.tfevents.*"), self.path / "episodes.csv"):
                if log.exists():  # rows written after the checkpoint are written again
                    os.truncate(log, min(saved["logs"].get(log.name, 0), log.stat().st_size))
            self.episodes = (self.path / "episodes.csv").open("a+", newline="")
        except OSError as error:
            fail(f"cannot write the run folder {self.path}: {error.strerror or error}")
        if self.episodes.tell() == 0:
            self.episodes.write("step,seconds,return,length\n")
        self.episodes.seek(0)
        self.recent = deque((float(row["return"]) for row in csv.DictReader(self.episodes)), maxlen=100)
        self.writer = SummaryWriter(self.path, flush_secs=10)
        self.started = self.flushed = time.perf_counter()
        self.started -= saved["seconds"]
        self.first_step = self.step = saved["step"]
        self.bar = tqdm(total=args.total_timesteps, initial=self.step, unit=" steps", unit_scale=True, disable=None)

    def seconds(self) -> float:
        """Seconds of training, over all resumes."""
        return time.perf_counter() - self.started

    def restore(self, **parts) -> int:
        """Give every named part (module, optimiser, ...) its state from the checkpoint; returns the step."""
        try:
            for name, part in parts.items() if self.checkpoint else ():
                part.load_state_dict(self.checkpoint[name])
        except (KeyError, ValueError, RuntimeError, TypeError, AttributeError) as error:
            fail(f"{self.path}/checkpoint.pt does not fit this script: {str(error).splitlines()[0]}")
        return self.step

    def save(self, **parts) -> None:
        """Write checkpoint.pt: the state of every named part, the step, and how long each log is now."""
        self.check_finite(*(p for part in parts.values() if isinstance(part, nn.Module) for p in part.parameters()))
        self.episodes.flush()
        self.writer.flush()
        logs = {log.name: log.stat().st_size for log in (*self.path.glob("events.*"), self.path / "episodes.csv")}
        state = {name: part.state_dict() for name, part in parts.items()}
        state |= {"step": self.step, "seconds": self.seconds(), "logs": logs}
        write_atomically(self.path / "checkpoint.pt", lambda file: torch.save(state, file))

    def episode(self, step: int, episode_return: float, length: int) -> None:
        """A training episode has ended."""
        self.recent.append(episode_return)
        self.episodes.write(f"{step},{self.seconds():.2f},{episode_return},{length}\n")

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Scalars for TensorBoard and the progress bar, once per update; a loss that is not finite ends the run."""
        self.check_finite(torch.tensor(list(metrics.values())))
        seconds = self.seconds()
        metrics = {"charts/SPS": step / seconds} | metrics
        if self.recent:
            metrics |= {"charts/episodic_return": sum(self.recent) / len(self.recent)}
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)
        if self.recent:
            self.bar.set_postfix_str(f"return {metrics['charts/episodic_return']:.1f}", refresh=False)
        self.bar.update(step - self.step)
        self.step = step
        if time.perf_counter() - self.flushed > 1:
            self.episodes.flush()
            self.flushed = time.perf_counter()

    def check_finite(self, *tensors: Tensor) -> None:
        if not all(tensor.isfinite().all() for tensor in tensors):
            self.bar.close()
            fail(f"the loss or the weights are no longer finite after step {self.step}; {self.path} keeps its last "
                 "checkpoint. A smaller --learning-rate may help", code=3)

    def finish(self, args: Args, agent: nn.Module, device: torch.device) -> None:
        """Save the agent, evaluate it, write result.json and say where to look."""
        self.bar.close()
        self.check_finite(*agent.parameters())
        self.episodes.close()
        self.writer.close()
        seconds, tensors = self.seconds(), {name: x.contiguous() for name, x in agent.state_dict().items()}
        write_atomically(self.path / "agent.safetensors", lambda file: file.write(safetensors.torch.save(tensors)))
        final_return = sum(self.recent) / len(self.recent) if self.recent else None
        returns = evaluate(args, agent, device)
        result = {
            "final_return": final_return,
            "eval_return_mean": float(returns.mean()),
            "eval_return_std": float(returns.std()),
            "eval_episodes": args.eval_episodes,
            "steps": self.step,
            "seconds": round(seconds, 2),
            "sps": round(self.step / seconds, 1),
            "peak_memory_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1),
        }
        text = json.dumps(result, indent=2) + "\n"
        write_atomically(self.path / "result.json", lambda file: file.write(text.encode()))
        trailing = "no episode ended" if final_return is None else f"{final_return:.1f}"
        print(
            f"{args.env_id}, seed {args.seed}: {self.step:,} steps in {seconds:.1f} s ({self.step / seconds:,.0f}/s)\n"
            f"training return (last 100 episodes): {trailing}\n"
            f"evaluation return ({args.eval_episodes} episodes, greedy): {returns.mean():.1f} ± {returns.std():.1f}\n"
            f"curves: tensorboard --logdir {shlex.quote(str(self.path))}\n"
            f"film:   python {sys.argv[0]} --evaluate {shlex.quote(str(self.path))} --video"
        )


def read_checkpoint(path: Path) -> dict | None:
    """checkpoint.pt, read as data that can run no code; None if the run was stopped before its first one."""
    if not (path / "checkpoint.pt").exists():
        return None
    try:
        checkpoint = torch.load(path / "checkpoint.pt", map_location="cpu", weights_only=True)
        assert isinstance(checkpoint["step"], int) and checkpoint["seconds"] >= 0 and isinstance(checkpoint["logs"], dict)
        return checkpoint
    except Exception as error:
        fail(f"{path}/checkpoint.pt is damaged or not a checkpoint: {(str(error).splitlines() or [repr(error)])[0]}")


@torch.inference_mode()
def evaluate(args: Args, agent: nn.Module, device: torch.device) -> np.ndarray:
    """Returns of `eval_episodes` greedy episodes, raw and undiscounted; `--video` films the first.

    Each episode has an environment of its own, so that short episodes are not counted more often than long ones. An
    episode without an end is cut after 100,000 steps.
    """
    envs = make_envs(args, args.eval_episodes, render=args.video)
    obs, _ = envs.reset(seed=reseed(args.seed, EVAL, num_envs=args.eval_episodes))
    returns, running, frames = np.zeros(args.eval_episodes), np.ones(args.eval_episodes, bool), []
    for _ in range(100_000):
        if args.video and running[0]:
            frames.append(envs.envs[0].render())
        obs, rewards, terminations, truncations, _ = envs.step(agent.act(to_tensor(obs, device)).cpu().numpy())
        returns += rewards * running
        running &= ~(terminations | truncations)
        if not running.any():
            break
    if args.video:
        film(Path(args.run_dir) / "videos" / f"evaluation-{args.seed}.mp4", frames, envs.metadata.get("render_fps", 30))
    envs.close()
    return returns


def evaluate_saved(args: Args) -> None:
    """Play the agent of a finished run, and nothing but that: the run folder alone is enough."""
    device, path = torch.device(args.device), Path(args.run_dir) / "agent.safetensors"
    agent = Agent(make_envs(args, 1)).to(device)
    try:
        agent.load_state_dict(safetensors.torch.load_file(path, device=args.device))
    except FileNotFoundError:
        fail(f"{args.run_dir} is not finished; --resume {args.run_dir} goes on with it")
    except Exception as error:
        fail(f"{path} is damaged: {str(error).splitlines()[0]}")
    returns = evaluate(args, agent, device)
    print(f"{args.env_id}, {len(returns)} episodes, greedy: {returns.mean():.1f} ± {returns.std():.1f}")


def to_tensor(obs: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(obs).to(device, torch.float32)


def film(path: Path, frames: list[np.ndarray], fps: float) -> None:
    """Write frames (H, W, 3) as an mp4."""
    import imageio

    path.parent.mkdir(exist_ok=True)
    imageio.mimwrite(path, frames, fps=fps, macro_block_size=2)
    print(f"film:   {path}")


def read_args(folder: str) -> dict:
    """The flags in a run folder's args.json."""
    script = Path(__file__).name
    try:
        described = json.loads((Path(folder) / "args.json").read_text())
        flags, maker, sha256 = described["args"], described["script"], described["sha256"]
    except FileNotFoundError:
        fail(f"{folder} is not a run folder: it has no args.json")
    except (OSError, ValueError, KeyError, TypeError) as error:
        fail(f"{folder}/args.json is damaged: {error}")
    if maker != script or set(flags) != set(Args.__dataclass_fields__):
        fail(f"{folder} was made by {maker}, with other flags than this {script} has")
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
        args = tyro.cli(Args, default=saved)
        changed = [name for name, value in asdict(args).items() if value != getattr(saved, name)]
        if args.resume and changed:
            fail(f"--resume goes on under the flags of the run; leave out --{changed[0].replace('_', '-')}")
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
        args.run_dir = f"runs/{name}__{datetime.now(timezone.utc):%Y%m%dT%H%M%S.%f}"[:-3] + "Z"
    return args


# ------------------------------------------------------------------------------------------------------- training


def train(args: Args) -> None:
    """PPO, algorithm 1: T steps in each of N environments, K epochs on them, and again."""
    T, N, device = args.num_steps, args.num_envs, torch.device(args.device)
    if T * N % args.num_minibatches:
        fail(f"--num-minibatches {args.num_minibatches} does not divide the batch, {N} environments * {T} steps")
    num_iterations = math.ceil(args.total_timesteps / (T * N))

    reseed(args.seed, INIT)
    envs = make_envs(args, N)
    run = Run(args)
    agent = Agent(envs).to(device)
    optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate, eps=1e-5, fused=True)
    global_step = run.restore(agent=agent, optimizer=optimizer)
    loss_fn = ppo_loss
    if args.compile:
        loss_fn = torch.compile(ppo_loss, mode="reduce-overhead" if args.device == "cuda" else "default")

    num_inputs, num_actions = envs.single_observation_space.shape[0], int(envs.single_action_space.n)
    obs = torch.zeros((T + 1, N, num_inputs), device=device)
    logits = torch.zeros((T, N, num_actions), device=device)
    actions = torch.zeros((T, N), dtype=torch.int64, device=device)
    rewards, terminations, dones = np.zeros((T, N), np.float32), np.zeros((T, N), bool), np.zeros((T, N), bool)

    restart = True
    for iteration in range(global_step // (T * N), num_iterations):
        if restart:
            restart = False
            next_obs, _ = envs.reset(seed=reseed(args.seed, TRAIN, global_step, num_envs=N))
            obs[T] = to_tensor(next_obs, device)
            episode_returns, episode_lengths = np.zeros(N), np.zeros(N, np.int64)
        learning_rate = args.learning_rate * (1 - iteration / num_iterations if args.anneal_lr else 1)
        optimizer.param_groups[0]["lr"] = learning_rate

        with torch.no_grad():
            # The rollout. argmax(logits + Gumbel noise) is a sample of softmax(logits).
            obs[0] = obs[T]
            gumbel = -torch.empty_like(logits).exponential_().log()
            last_obs = []  # of the episodes that a time limit cut: (t, which environments, observations)
            for t in range(T):
                logits[t] = agent.actor(obs[t])
                actions[t] = (logits[t] + gumbel[t]).argmax(-1)
                next_obs, reward, terminated, truncated, infos = envs.step(actions[t].cpu().numpy())
                done = terminated | truncated
                obs[t + 1] = to_tensor(next_obs, device)
                rewards[t], terminations[t], dones[t] = reward, terminated, done
                global_step += N
                episode_returns += reward
                episode_lengths += 1
                if done.any():
                    for i in np.flatnonzero(done):
                        run.episode(global_step, float(episode_returns[i]), int(episode_lengths[i]))
                    episode_returns[done] = episode_lengths[done] = 0
                    if truncated.any():
                        last_obs.append((t, truncated.nonzero()[0], np.stack(infos["final_obs"][truncated])))

            # Advantages. V of the state that each action led to is V of the next row, unless the episode was cut.
            values = agent.value(obs)
            next_values = values[1:].clone()
            for t, cut, cut_obs in last_obs:
                next_values[t, cut] = agent.value(to_tensor(cut_obs, device))
            rollout = (torch.from_numpy(x).to(device) for x in (rewards, terminations, dones))
            advantages, returns = gae(values[:-1], next_values, *rollout, args.gamma, args.gae_lambda)
            logprobs, _ = log_prob_and_entropy(logits.flatten(0, 1), actions.flatten())

        batch = (obs[:-1], actions, logprobs, advantages, returns, values[:-1])
        batch = [logprobs if x is logprobs else x.flatten(0, 1) for x in batch]
        metrics = update(agent, optimizer, loss_fn, batch, args)
        run.log(global_step, metrics | {"charts/learning_rate": learning_rate})
        if global_step // args.checkpoint_every > (global_step - T * N) // args.checkpoint_every:
            if iteration + 1 < num_iterations:
                # The environments are made anew here and in a resumed run alike: both go on with the same bits.
                run.save(agent=agent, optimizer=optimizer)
                envs.close()
                envs, restart = make_envs(args, N), True
    envs.close()
    run.finish(args, agent, device)


def main() -> None:
    def interrupt(*_):
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    args = parse_args()
    torch.set_num_threads(args.torch_threads)
    try:
        if args.evaluate:
            evaluate_saved(args)
        else:
            train(args)
    except KeyboardInterrupt:
        print(f"\nstopped; python {sys.argv[0]} --resume {shlex.quote(args.run_dir)} goes on", file=sys.stderr)
        raise SystemExit(130)
    except OSError as error:
        fail(f"{error}; what was saved is intact: --resume {shlex.quote(args.run_dir)} goes on")


if __name__ == "__main__":
    main()
