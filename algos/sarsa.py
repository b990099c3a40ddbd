"""SARSA, on-policy temporal-difference control, with a Q-network, for vector observations and discrete actions.

    python algos/sarsa.py                                           # CartPole-v1
    python algos/sarsa.py --exploration boltzmann                   # actions drawn from softmax(Q / tau)
    python algos/sarsa.py --env-id package:Name-v0                  # your own, registered in `package`
    python algos/sarsa.py --resume runs/CartPole-v1__sarsa__1__...
    python algos/sarsa.py --evaluate runs/CartPole-v1__sarsa__1__... --eval-episodes 20 --video

Papers: Rummery & Niranjan 1994, "On-Line Q-Learning Using Connectionist Systems"; Sutton & Barto 2018, sections 6.4
and 10.1 ("S&B"). The name is what one update needs, (S, A, R, S', A'): the value of an action is pulled towards its
reward and the value of the action that is really taken next,

    Q(s, a) <- Q(s, a) + alpha (r + gamma Q(s', a') - Q(s, a))

so that Q is the value of the policy that explores, and not, as in Q-learning, of the greedy one that does not act.

What differs from the papers: several environments and one step of Adam on a rollout of all of them, instead of a step
of gradient descent after each action; layer normalisation in the network, which takes the place of the target network
that later methods need (Gallici et al. 2024, "Simplifying Deep Temporal Difference Learning", arXiv:2407.04811); no
eligibility traces; exploration falls linearly in the first part of the run.

What to notice: there is neither a replay nor a target network. What is learned from is what the present network has
just done, so a' is at hand; it is drawn before Q is updated and taken after it, also where a rollout ends, and
nowhere is an action learned from that is not taken. Two exceptions: where a time limit cuts an episode, the action
that would have come next is drawn for its real last observation (a termination has no next action); and at a
checkpoint the environments are made anew, so the last action is drawn anew too.

What it does not do: images, continuous actions, memory, action masks, traces. Read next: `dqn.py`.
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
    """steps between checkpoints; 0 for a tenth of the run. Each cuts the running episodes, which then do not count"""

    # The algorithm
    num_envs: int = 8
    """parallel environments (N)"""
    num_steps: int = 4
    """steps of each environment per rollout, and so per gradient step (T)"""
    learning_rate: float = 2e-3
    """learning rate of Adam at the start"""
    anneal_lr: bool = True
    """let the learning rate fall linearly towards 0"""
    gamma: float = 0.99
    """discount factor"""
    exploration: Literal["epsilon", "boltzmann"] = "epsilon"
    """epsilon: a random action with probability epsilon, else the best; boltzmann: a sample of softmax(Q / tau)"""
    start_e: float = 1.0
    """epsilon at the start"""
    end_e: float = 0.01
    """epsilon at the end"""
    start_tau: float = 1.0
    """temperature tau at the start, on the scale of Q"""
    end_tau: float = 0.05
    """temperature tau at the end"""
    exploration_fraction: float = 0.2
    """share of the run in which epsilon or tau falls from its start to its end"""
    max_grad_norm: float = 10.0
    """largest global norm of the gradient"""
    hidden_size: int = 64
    """width of the two hidden layers"""


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
    "start_e": (0, 1),
    "end_e": (0, 1),
    "start_tau": (1e-6, math.inf),
    "end_tau": (1e-6, math.inf),
    "exploration_fraction": (0, 1),
    "max_grad_norm": (1e-12, math.inf),
    "hidden_size": (1, 65_536),
}


# ------------------------------------------------------------------------------------------------------- networks


class Agent(nn.Module):
    """Q(s, a) of every action."""

    def __init__(self, envs: gym.vector.VectorEnv, args: Args):
        super().__init__()
        num_inputs, num_actions = envs.single_observation_space.shape[0], int(envs.single_action_space.n)
        self.q = nn.Sequential(
            nn.Linear(num_inputs, args.hidden_size),
            nn.LayerNorm(args.hidden_size),
            nn.ReLU(),
            nn.Linear(args.hidden_size, args.hidden_size),
            nn.LayerNorm(args.hidden_size),
            nn.ReLU(),
            nn.Linear(args.hidden_size, num_actions),
        )

    def forward(self, obs: Tensor) -> Tensor:
        """Q(s, .): obs (..., D) -> (..., A)."""
        return self.q(obs)

    def value(self, obs: Tensor) -> Tensor:
        """max_a Q(s, a): obs (..., D) -> (...)."""
        return self(obs).amax(-1)

    def act(self, obs: Tensor) -> Tensor:
        """The action of the largest value: obs (N, D) -> (N,)."""
        return self(obs).argmax(-1)


# ------------------------------------------------------------------------------------------------------ algorithm


def linear_schedule(start: float, end: float, duration: float, step: int) -> float:
    """From `start` at step 0 in a straight line to `end` at step `duration`, and `end` from there on."""
    return start + (end - start) * min(step / max(duration, 1), 1)


def explore(q: Tensor, exploration: str, amount: float) -> Tensor:
    """Actions of the policy that explores: Q (N, A) -> (N,). `amount` is epsilon or the temperature tau.

    epsilon: every action with probability epsilon / A, the best one with the rest. boltzmann: S&B section 13.1, a
    with probability softmax(Q / tau)_a; argmax(logits + Gumbel noise) is a sample of softmax(logits).
    """
    if exploration == "boltzmann":
        return (q / amount - torch.empty_like(q).exponential_().log()).argmax(-1)
    is_random = torch.rand(len(q), device=q.device) < amount
    return torch.where(is_random, torch.randint(q.shape[-1], (len(q),), device=q.device), q.argmax(-1))


def sarsa_targets(rewards: Tensor, next_q: Tensor, terminations: Tensor, gamma: float) -> Tensor:
    """S&B eq. 6.7, r + gamma Q(s', a') (1 - terminated): all (T, N).

    `next_q[t]` is Q of the state that action t led to, at the end of an episode its real last state and not the first
    of the next, and of the action that was taken there.
    """
    return rewards + gamma * next_q * ~terminations


METRICS = "losses/td_loss", "losses/q_values"


def sarsa_loss(agent: Agent, args: Args, obs, actions, targets) -> tuple[Tensor, Tensor]:
    """Mean of (Q(s, a) - target)^2 over B rows: its gradient is the step of S&B eq. 10.1. And the METRICS (2,)."""
    q = agent(obs).gather(-1, actions.unsqueeze(-1)).squeeze(-1)
    loss = nn.functional.mse_loss(q, targets)
    return loss, torch.stack([loss, q.mean()]).detach()


def gradient_step(
    agent: Agent, optimizer: torch.optim.Optimizer, loss_fn, batch: list[Tensor], args: Args
) -> dict[str, float]:
    """One step of the optimiser on the whole batch. Returns the METRICS by name."""
    loss, metrics = loss_fn(agent, args, *batch)
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm, foreach=True)
    optimizer.step()
    return dict(zip(METRICS, metrics.tolist(), strict=True))


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
    if isinstance(space, gym.spaces.Box):
        fail(f"{args.env_id} has continuous actions; the script for it is ppo_continuous.py")
    if not isinstance(space, gym.spaces.Discrete) or space.start != 0:
        fail(f"{args.env_id} has actions {space}; this script takes Discrete(n), counted from 0")
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
    """S&B section 10.1, semi-gradient Sarsa: T steps in each of N environments, one gradient step, and again."""
    T, N, device = args.num_steps, args.num_envs, torch.device(args.device)
    num_iterations = math.ceil(args.total_timesteps / (T * N))
    envs, next_obs = start_envs(args, reseed(args.seed, TRAIN, 0, num_envs=N))
    agent = Agent(envs, args).to(device)
    optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate, eps=1e-5, fused=True)
    run = Run(args)
    global_step = run.restore(agent=agent, optimizer=optimizer)
    restart = global_step > 0
    loss_fn = sarsa_loss
    if args.compile:
        loss_fn = torch.compile(sarsa_loss, mode="reduce-overhead" if args.device == "cuda" else "default")
    symbol, start, end = ("epsilon", args.start_e, args.end_e)
    if args.exploration == "boltzmann":
        symbol, start, end = ("tau", args.start_tau, args.end_tau)
    duration = args.exploration_fraction * args.total_timesteps

    obs = torch.zeros((T + 1, N, envs.single_observation_space.shape[0]), device=device)
    actions = torch.zeros((T + 1, N), dtype=torch.int64, device=device)
    next_q = torch.zeros((T, N), device=device)
    rewards, terminations = np.zeros((T, N), np.float32), np.zeros((T, N), bool)

    for iteration in range(global_step // (T * N), num_iterations):
        if restart:  # after a checkpoint, in a run that goes on and in one that is resumed alike: so both are the same
            envs.close()
            envs, next_obs = start_envs(args, reseed(args.seed, TRAIN, global_step, num_envs=N))
        learning_rate = args.learning_rate * (1 - iteration / num_iterations if args.anneal_lr else 1)
        optimizer.param_groups[0]["lr"] = learning_rate
        amount = linear_schedule(start, end, duration, global_step)

        with torch.no_grad():
            # The rollout. The action that follows the last step was drawn then, and is taken now.
            if restart or iteration == 0:
                obs[0] = to_tensor(next_obs, args)
                actions[0] = explore(agent(obs[0]), args.exploration, amount)
            else:
                obs[0], actions[0] = obs[T], actions[T]
            for t in range(T):
                next_obs, reward, terminated, truncated, infos = envs.step(actions[t].cpu().numpy())
                obs[t + 1] = to_tensor(next_obs, args)
                rewards[t], terminations[t] = reward, terminated
                global_step += N
                run.record(global_step, reward, terminated | truncated)
                q = agent(obs[t + 1])
                actions[t + 1] = explore(q, args.exploration, amount)
                next_q[t] = q.gather(-1, actions[t + 1].unsqueeze(-1)).squeeze(-1)
                if truncated.any():
                    q = agent(to_tensor(np.stack(infos["final_obs"][truncated]), args))
                    drawn = explore(q, args.exploration, amount)
                    next_q[t, truncated.nonzero()[0]] = q.gather(-1, drawn.unsqueeze(-1)).squeeze(-1)
            r, terminated = (torch.from_numpy(array).to(device) for array in (rewards, terminations))
            targets = sarsa_targets(r, next_q, terminated, args.gamma)

        batch = [x.flatten(0, 1) for x in (obs[:-1], actions[:-1], targets)]
        metrics = gradient_step(agent, optimizer, loss_fn, batch, args)
        run.log(global_step, metrics | {"charts/learning_rate": learning_rate, f"charts/{symbol}": amount})
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
