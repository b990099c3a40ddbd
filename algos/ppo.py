# /// script
# requires-python = ">=3.11,<3.14"
# dependencies = [
#     "filelock==4.3.1", "gymnasium[classic-control]==1.4.0", "imageio[ffmpeg]==2.38.1", "numpy==2.4.6",
#     "safetensors==0.8.0", "tensorboard==2.21.0", "torch==2.13.0", "tqdm==4.70.1", "tyro==1.0.17",
# ]
# ///
"""Proximal Policy Optimization (PPO) for vector observations and discrete actions.

    uv run ppo.py                                         # CartPole-v1; or: python ppo.py
    uv run ppo.py --env-id Acrobot-v1 --seed 2            # --help lists all flags
    uv run ppo.py --resume runs/CartPole-v1__ppo__1__...
    uv run ppo.py --evaluate runs/CartPole-v1__ppo__1__... --video

Papers: Schulman et al. 2017 (PPO, arXiv:1707.06347) and 2016 (GAE, arXiv:1506.02438); Huang et al. 2022 (37 details).

Details that matter:
- A truncated episode (time limit) bootstraps from its real final observation; a terminated one does not bootstrap.
- Orthogonal initialization, Adam with epsilon 1e-5, annealed learning rate, normalized advantages, clipped gradients.
- Checkpoints restart environments and random numbers, so that a resumed run is bit-identical to an uninterrupted one.

Not included: continuous actions and normalization (ppo_continuous.py, read it next), images (ppo_atari.py), recurrence.
"""

import importlib.metadata
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import deque
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal, NoReturn

import gymnasium as gym
import numpy as np
import safetensors.torch
import torch
import tyro
from filelock import FileLock
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


@dataclass
class Args:
    env_id: str = "CartPole-v1"  # Gymnasium id; `package:Name-v0` imports the package first
    seed: int = 1  # random seed
    total_timesteps: int = 200_000  # environment steps, summed over all environments
    env_kwargs: dict[str, bool | int | float | str] = field(default_factory=dict)  # for gym.make: name value name value

    # The algorithm
    num_envs: int = 8  # parallel environments (N)
    num_steps: int = 128  # steps per environment and rollout (T)
    learning_rate: float = 2e-3  # initial learning rate of Adam
    anneal_lr: bool = True  # anneal the learning rate linearly to 0
    gamma: float = 0.99  # discount factor
    gae_lambda: float = 0.95  # lambda of generalized advantage estimation
    num_minibatches: int = 4  # minibatches per epoch
    update_epochs: int = 8  # epochs per rollout (K)
    norm_adv: bool = True  # normalize the advantages of each minibatch
    clip_coef: float = 0.2  # clip range of the probability ratio (epsilon)
    clip_vloss: bool = False  # clip the value loss, with the same range
    ent_coef: float = 0.01  # entropy coefficient
    vf_coef: float = 0.5  # value loss coefficient
    max_grad_norm: float = 0.5  # maximum global norm of the gradient
    target_kl: float = 0.0  # stop the epochs on a rollout when the approximate KL divergence exceeds this; 0: never

    # The run
    run_dir: str = ""  # run folder; default: runs/{env}__{algo}__{seed}__{UTC time}
    resume: str = ""  # resume the run in this folder, with its own flags
    evaluate: str = ""  # evaluate the agent of the run in this folder instead of training
    eval_episodes: int = 20  # episodes of the evaluation
    video: bool = False  # record a video of the first one
    device: Literal["cpu", "cuda"] = "cpu"  # networks this small keep a GPU waiting
    torch_threads: int = 1  # CPU threads of PyTorch; 0: PyTorch's default
    compile: bool = False  # torch.compile the loss
    checkpoint_every: int = 100_000  # steps; a checkpoint restarts the environments and discards unfinished episodes

    def __post_init__(self) -> None:  # tyro reports a ValueError as a usage error
        for name, value in vars(self).items():
            lowest = 1 if type(value) is int and name not in ("seed", "torch_threads") else 0
            if isinstance(value, int | float) and not lowest <= value < math.inf:
                raise ValueError(f"{name} must be at least {lowest} and finite, not {value}")
        if max(self.gamma, self.gae_lambda) > 1:
            raise ValueError("gamma and gae_lambda must be at most 1")
        if self.num_envs * self.num_steps % self.num_minibatches:
            raise ValueError("num_minibatches must divide num_envs * num_steps")


def mlp(inputs: int, outputs: int, std: float) -> nn.Sequential:
    """Two hidden layers of 64 tanh units; orthogonal initialization, with gain `std` in the last layer."""
    layers = [nn.Linear(inputs, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, outputs)]
    for layer, gain in zip(layers[::2], (2**0.5, 2**0.5, std), strict=True):
        nn.init.orthogonal_(layer.weight, gain)
        nn.init.zeros_(layer.bias)
    return nn.Sequential(*layers)


class Agent(nn.Module):
    """Separate networks for the policy (actor) and the value function (critic)."""

    def __init__(self, envs: gym.vector.VectorEnv, args: Args) -> None:
        super().__init__()
        obs_dim, num_actions = envs.single_observation_space.shape[0], int(envs.single_action_space.n)
        self.actor = mlp(obs_dim, num_actions, std=0.01)
        self.critic = mlp(obs_dim, 1, std=1.0)

    def value(self, obs: Tensor) -> Tensor:
        """V(s): (..., D) -> (...)."""
        return self.critic(obs).squeeze(-1)

    def logprob_and_entropy(self, obs: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        """log pi(a|s) and the entropy of pi(.|s): (..., D), (...) -> (...), (...)."""
        logprobs = self.actor(obs).log_softmax(-1)
        return logprobs.gather(-1, actions.unsqueeze(-1)).squeeze(-1), -(logprobs.exp() * logprobs).sum(-1)

    @torch.no_grad()
    def sample(self, obs: Tensor) -> Tensor:
        """Actions sampled from the policy: (N, D) -> (N,)."""
        logits = self.actor(obs)
        gumbel = -torch.empty_like(logits).exponential_().log()
        return (logits + gumbel).argmax(-1)  # Gumbel-max: as Categorical(logits=logits).sample(), but faster

    @torch.no_grad()
    def act(self, obs: Tensor) -> Tensor:
        """Greedy actions, for the evaluation: (N, D) -> (N,)."""
        return self.actor(obs).argmax(-1)


class Adapter(gym.Wrapper):
    """Observations as float32 copies (some environments reuse their array), no infos, actions as the space has them."""

    def __init__(self, env: gym.Env) -> None:
        super().__init__(env)
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, env.observation_space.shape, np.float32)

    def reset(self, **kwargs):
        obs, _ = self.env.reset(**kwargs)
        return np.array(obs, np.float32), {}

    def step(self, action):
        action = self.action_space.dtype.type(action + self.action_space.start)
        obs, reward, terminated, truncated, _ = self.env.step(action)
        return np.array(obs, np.float32), np.asarray(reward, np.float64).item(), terminated, truncated, {}


def make_envs(args: Args, num_envs: int, render: bool = False) -> gym.vector.VectorEnv:
    """SAME_STEP autoreset: where an episode ends, `step` already returns the first observation of the next one."""

    def make_env() -> gym.Env:
        env = gym.make(args.env_id, **args.env_kwargs, **({"render_mode": "rgb_array"} if render else {}))
        # Your wrappers go here, without memory: they start anew at checkpoints (for statistics, see ppo_continuous.py)
        if not isinstance(env.observation_space, gym.spaces.Box) or len(env.observation_space.shape) != 1:
            fail(f"{args.env_id} has observations {env.observation_space}, not a Box of shape (n,)")
        if not isinstance(env.action_space, gym.spaces.Discrete):
            fail(f"{args.env_id} has actions {env.action_space}, not Discrete: see ppo_continuous.py")
        return Adapter(env)

    try:
        return gym.vector.SyncVectorEnv([make_env] * num_envs, autoreset_mode=gym.vector.AutoresetMode.SAME_STEP)
    except (gym.error.Error, ImportError) as error:
        fail(f"cannot make {args.env_id}: {error}")


def real_next_obs(next_obs: np.ndarray, infos: dict) -> np.ndarray:
    """What the actions led to: the final observation where an episode ended, not the first one of the next episode."""
    if "final_obs" in infos:
        next_obs, ended = next_obs.copy(), infos["_final_obs"]
        next_obs[ended] = np.stack(infos["final_obs"][ended])
    return next_obs


def gae(rewards, values, next_values, terminations, dones, gamma: float, gae_lambda: float) -> Tensor:
    """Generalized advantage estimation, GAE eq. 16. All tensors are (T, N).

    Every done stops the sum of TD errors. Only a termination drops the next value; a truncation keeps V(final obs).
    """
    deltas = rewards + gamma * torch.where(terminations, 0, next_values) - values
    decays = gamma * gae_lambda * ~dones
    advantages, advantage = torch.zeros_like(deltas), 0
    for t in reversed(range(len(deltas))):
        advantages[t] = advantage = deltas[t] + decays[t] * advantage
    return advantages


def ppo_loss(agent, args, obs, actions, old_logprobs, advantages, returns, old_values) -> tuple[Tensor, dict]:
    """PPO eq. 9 on a minibatch of B steps: obs (B, D), the others (B,). Returns the loss and the metrics to log."""
    new_logprobs, entropy = agent.logprob_and_entropy(obs, actions)
    logratio = new_logprobs - old_logprobs
    ratio = logratio.exp()
    if args.norm_adv and len(advantages) > 1:
        advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
    clipped_ratio = ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef)
    policy_loss = -torch.min(ratio * advantages, clipped_ratio * advantages)  # PPO eq. 7

    new_values = agent.value(obs)
    value_loss = 0.5 * (new_values - returns).square()
    if args.clip_vloss:
        clipped_values = old_values + (new_values - old_values).clamp(-args.clip_coef, args.clip_coef)
        value_loss = torch.max(value_loss, 0.5 * (clipped_values - returns).square())

    loss = (policy_loss + args.vf_coef * value_loss - args.ent_coef * entropy).mean()
    with torch.no_grad():
        metrics = {
            "losses/policy_loss": policy_loss.mean(),
            "losses/value_loss": value_loss.mean(),
            "losses/entropy": entropy.mean(),
            "losses/approx_kl": (ratio - 1 - logratio).mean(),  # http://joschu.net/blog/kl-approx.html
            "losses/clipfrac": ((ratio - 1).abs() > args.clip_coef).float().mean(),
        }
    return loss, metrics


def train(args: Args) -> None:
    """PPO, algorithm 1: collect T steps in each of N environments, optimize for K epochs, repeat."""
    T, N, device = args.num_steps, args.num_envs, args.device
    envs, current_obs = start_envs(args, "train", 0, N)  # seeds everything
    agent = Agent(envs, args).to(device)
    optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate, eps=1e-5, fused=True)
    loss_fn = torch.compile(ppo_loss) if args.compile else ppo_loss

    obs, next_obs = np.zeros((2, T, N, *envs.single_observation_space.shape), np.float32)
    actions, rewards = np.zeros((T, N), np.int64), np.zeros((T, N), np.float32)
    terminations, dones = np.zeros((2, T, N), bool)  # NumPy arrays: one transfer to the device per rollout
    run = Run(args, agent=agent, optimizer=optimizer)  # with --resume, restores both
    global_step = run.start_step
    while global_step < args.total_timesteps:
        if run.checkpoint(global_step):  # every `checkpoint_every` steps and after a resume: environments restart
            envs, current_obs = start_envs(args, "train", global_step, N, old_envs=envs)
        if args.anneal_lr:
            optimizer.param_groups[0]["lr"] = args.learning_rate * (1 - global_step / args.total_timesteps)

        # Collect a rollout
        for t in range(T):
            obs[t] = current_obs
            actions[t] = agent.sample(torch.from_numpy(obs[t]).to(device)).cpu().numpy()
            current_obs, reward, terminations[t], truncated, infos = envs.step(actions[t])
            next_obs[t], rewards[t], dones[t] = real_next_obs(current_obs, infos), reward, terminations[t] | truncated
            global_step += N
            run.record(global_step, reward, dones[t])

        # Compute log-probabilities (of the weights that acted), values, and advantages of the whole rollout at once
        b_obs, b_next_obs, b_actions, b_rewards, b_terminations, b_dones = (
            torch.from_numpy(x).to(device) for x in (obs, next_obs, actions, rewards, terminations, dones)
        )
        with torch.no_grad():
            b_logprobs, _ = agent.logprob_and_entropy(b_obs, b_actions)
            b_values, b_next_values = agent.value(b_obs), agent.value(b_next_obs)
            b_advantages = gae(b_rewards, b_values, b_next_values, b_terminations, b_dones, args.gamma, args.gae_lambda)
            b_returns = b_advantages + b_values

        # Optimize the policy and the value function
        batch = [x.flatten(0, 1) for x in (b_obs, b_actions, b_logprobs, b_advantages, b_returns, b_values)]
        history = []
        for _ in range(args.update_epochs):
            for rows in torch.randperm(T * N, device=device).chunk(args.num_minibatches):
                loss, metrics = loss_fn(agent, args, *(x[rows] for x in batch))
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)
                optimizer.step()
                history.append(metrics)
            if 0 < args.target_kl < metrics["losses/approx_kl"]:
                break

        explained = 1 - (b_returns - b_values).var(correction=0) / (b_returns.var(correction=0) + 1e-8)
        charts = {"charts/learning_rate": optimizer.param_groups[0]["lr"], "losses/explained_variance": explained}
        run.log(global_step, history, charts)
    run.finish(global_step, envs)


# ------------------- The run: identical in every script; skip it if you are here for the algorithm --------------------


def fail(message: str, code: int = 2) -> NoReturn:  # exit codes: 2 is bad input, 3 NaN or inf, 130 an interrupt
    print("error:", *message.split(), file=sys.stderr)
    sys.exit(code)


def close(envs: gym.vector.VectorEnv | None) -> None:
    try:
        envs and envs.close()
    except Exception as error:  # not worth losing a run
        print(f"warning: an environment failed to close: {error!r}", file=sys.stderr)


def start_envs(args: Args, stream: str, step: int, num_envs: int, old_envs=None, render: bool = False):
    """Replace `old_envs`. All random numbers restart from (seed, step), so that checkpoints need not hold any state."""
    name = re.sub("[^A-Za-z0-9.-]+", "-", args.env_id) + f"__{Path(__file__).stem}__{args.seed}"
    args.run_dir = os.path.abspath(args.run_dir or time.strftime(f"runs/{name}__%Y%m%dT%H%M%SZ", time.gmtime()))
    if args.device == "cuda" and not torch.cuda.is_available():
        fail("--device cuda: PyTorch finds no GPU")
    torch.set_num_threads(args.torch_threads or torch.get_num_threads())
    torch.set_float32_matmul_precision(getattr(args, "matmul_precision", "highest"))
    close(old_envs)
    envs = make_envs(args, num_envs, render)
    seed = int(np.random.SeedSequence([args.seed, step, *stream.encode()]).generate_state(1)[0]) >> 1
    for seed_library in (random.seed, np.random.seed, torch.manual_seed):
        seed_library(seed)
    torch.set_default_dtype(torch.float32)  # a package with environments may have changed these two
    torch.set_grad_enabled(True)
    for i, env in enumerate(envs.envs):
        for space in (env.action_space, env.unwrapped.action_space, env.unwrapped.observation_space):
            space.seed(seed + i)
    return envs, envs.reset(seed=seed)[0]


def write_atomically(path: Path, write) -> None:  # a crash leaves the old file or the new one
    write(temporary := path.with_name("." + path.name))
    temporary.replace(path)


class Run:  # the run folder: args.json, a copy of the script, episodes.csv, TensorBoard events, checkpoint.pt, results
    def __init__(self, args: Args, **parts) -> None:  # parts: all that a resume restores, each with a state_dict
        self.args, self.parts, self.path, script = args, parts, Path(args.run_dir), Path(__file__)
        if not args.resume and {path.name for path in self.path.glob("[!.]*")} - {"episodes.csv", script.name}:
            fail(f"{self.path} exists: continue it with --resume, or choose another --run-dir")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self.lock = FileLock(self.path / ".lock").acquire(blocking=False)
        except OSError as error:  # also filelock.Timeout
            fail(f"cannot use {self.path}, or another process does: {error}")
        state = {"step": 0, "seconds": 0.0, "recent": [], "csv_size": 27}  # of the header
        if not args.resume:
            git = ["git", "-C", script.parent, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
            commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() if shutil.which("git") else ""
            versions = {package.name: package.version for package in importlib.metadata.distributions()}
            info = {"args": asdict(args) | {"run_dir": ""}, "command": sys.argv, "commit": commit, "versions": versions}
            info |= {"cpu": torch.cpu.get_capabilities().get("cpu_name"), "threads": torch.get_num_threads()}
            info |= {"gpu": torch.cuda.get_device_name() if args.device == "cuda" else None, "started": time.ctime()}
            (self.path / "episodes.csv").write_text("step,seconds,return,length\n", newline="")
            write_atomically(self.path / script.name, lambda path: shutil.copy(script, path))
            write_atomically(self.path / "args.json", lambda path: path.write_text(json.dumps(info, indent=2)))
        elif (self.path / "checkpoint.pt").exists():
            state = torch.load(self.path / "checkpoint.pt", map_location="cpu", weights_only=True)
            for name, part in parts.items():
                part.load_state_dict(state[name])
        self.start_step, self.next_checkpoint = state["step"], state["step"] or args.checkpoint_every
        self.started = time.perf_counter() - state["seconds"]
        self.recent = deque(state["recent"], maxlen=100)  # (return, length) of the last 100 episodes
        self.returns, self.lengths = np.zeros(args.num_envs), np.zeros(args.num_envs, int)
        self.csv = (self.path / "episodes.csv").open("a", buffering=1)
        self.csv.truncate(state["csv_size"])
        self.writer = SummaryWriter(self.path, purge_step=self.start_step + 1)  # hides what a killed run logged later
        self.bar = tqdm(total=args.total_timesteps, initial=state["step"], mininterval=1 if sys.stderr.isatty() else 60)

    def checkpoint(self, step: int, last: bool = False) -> bool:  # True: the environments have to restart
        if step < self.next_checkpoint and not last:
            return False
        if not all(weights.isfinite().all() for weights in self.parts["agent"].parameters()):
            fail(f"{self.path} diverged before step {step}: NaN or inf in the weights", code=3)
        if self.lengths.max() * self.args.num_envs >= step - self.start_step > 0:
            self.bar.write("warning: discarded an episode as long as the run or --checkpoint-every", sys.stderr)
        self.start_step, self.next_checkpoint = step, step + self.args.checkpoint_every
        self.returns[:] = self.lengths[:] = 0
        state = {name: part.state_dict() for name, part in self.parts.items()}
        state |= {"step": step, "seconds": time.perf_counter() - self.started}
        state |= {"recent": list(self.recent), "csv_size": os.path.getsize(self.csv.name)}
        write_atomically(self.path / "checkpoint.pt", lambda path: torch.save(state, path))
        return True

    def record(self, step: int, rewards: np.ndarray, dones: np.ndarray) -> None:  # ended episodes become rows
        self.returns, self.lengths = self.returns + rewards, self.lengths + 1
        for i in np.flatnonzero(dones):
            self.csv.write(f"{step},{time.perf_counter() - self.started:.2f},{self.returns[i]},{self.lengths[i]}\n")
            self.recent.append((float(self.returns[i]), int(self.lengths[i])))
            self.returns[i] = self.lengths[i] = 0

    def log(self, step: int, history: list[dict[str, Tensor]], charts: dict[str, Tensor | float]) -> None:
        """Write the means of `history` and `charts` to TensorBoard; stop the run if anything is NaN or inf."""
        metrics = {name: sum(x[name] for x in history) / len(history) for name in (history or [{}])[0]} | charts
        metrics["charts/SPS"] = step / (time.perf_counter() - self.started)
        metrics["charts/weight_norm"] = nn.utils.get_total_norm(self.parts["agent"].parameters()).item()
        if self.recent:
            metrics["charts/episodic_return"], metrics["charts/episodic_length"] = np.mean(self.recent, axis=0)
            self.bar.set_postfix_str(f"return {metrics['charts/episodic_return']:.1f}", refresh=False)
        for name, value in metrics.items():
            self.writer.add_scalar(name, float(value), step)
        self.bar.update(min(step, self.bar.total) - self.bar.n)  # the last rollout may go beyond total_timesteps
        if bad := [name for name, value in metrics.items() if not math.isfinite(value)]:
            self.writer.close()
            fail(f"{self.path} diverged before step {step}: NaN or inf in {', '.join(bad[:3])}", code=3)

    def finish(self, step: int, envs: gym.vector.VectorEnv) -> None:  # result.json marks a finished run
        agent, seconds = self.parts["agent"], time.perf_counter() - self.started
        write_atomically(self.path / "agent.safetensors", lambda path: safetensors.torch.save_model(agent, path))
        self.checkpoint(step, last=True)  # a kill from here on costs no training
        self.bar.close()
        self.writer.close()
        final_return = np.mean(self.recent, axis=0)[0] if self.recent else None
        result = dict(final_return=final_return, **evaluate(self.args, agent.eval(), envs), steps=step, seconds=seconds)
        peak = importlib.import_module("resource").getrusage(0).ru_maxrss if os.name == "posix" else 0
        result |= {"sps": step / seconds, "peak_memory_mb": peak / (2**20 if sys.platform == "darwin" else 2**10)}
        write_atomically(self.path / "result.json", lambda path: path.write_text(json.dumps(result, indent=2)))
        (self.path / "checkpoint.pt").unlink()
        print(f"curves: tensorboard --logdir {self.path}; video: python {sys.argv[0]} --evaluate {self.path} --video")
        if self.args.video:
            record_video(self.args, agent, envs)


@torch.inference_mode()
def evaluate(args: Args, agent: nn.Module, envs: gym.vector.VectorEnv, video=None) -> dict:
    """One episode per environment, so that short ones do not count more; at most `num_envs` at a time."""
    returns, running = np.zeros(args.eval_episodes), np.ones(args.eval_episodes, bool)
    for first in range(0, len(returns), args.num_envs):
        rows = slice(first, min(first + args.num_envs, len(returns)))
        envs, obs = start_envs(args, "eval", first, rows.stop - first, envs, render=video is not None)
        for _ in tqdm(range(30_000), desc="evaluation", leave=False, delay=1, mininterval=1):
            if video:
                video.append_data(envs.envs[0].render())
            actions = agent.act(torch.from_numpy(obs).to(args.device)).cpu().numpy()
            obs, rewards, terminations, truncations, _ = envs.step(actions)
            returns[rows] += np.where(running[rows], rewards, 0)
            running[rows] &= ~(terminations | truncations)
            if not running[rows].any():
                break
    close(envs)
    mean, std, truncated = returns.mean(), returns.std(), int(running.sum())
    print(f"{args.run_dir}: return {mean:.1f} +- {std:.1f} in {len(returns)} episodes, {truncated} over 30,000 steps")
    return dict(eval_return_mean=mean, eval_return_std=std, eval_episodes=len(returns), eval_truncated=truncated)


def record_video(args: Args, agent: nn.Module, envs: gym.vector.VectorEnv) -> None:
    try:
        path, fps = Path(args.run_dir, "videos", f"seed{args.seed}.mp4"), float(envs.metadata.get("render_fps") or 30)
        path.parent.mkdir(exist_ok=True)
        with importlib.import_module("imageio").get_writer(path, fps=fps, macro_block_size=2) as video:
            evaluate(replace(args, eval_episodes=1), agent, envs, video)
    except (Exception, SystemExit) as error:  # the result is saved
        print(f"warning: no video: {error!r}", file=sys.stderr)


def main() -> None:
    sys.stdout, sys.stderr = (x or open(os.devnull, "w") for x in (sys.stdout, sys.stderr))  # None if closed
    sys.stdout.reconfigure(errors="replace")  # not every terminal can print every path
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # `kill` ends a run as Ctrl-C does
    words = [re.sub(r"(?<![^=])\d+(\.\d)?e[3-9]$", lambda m: f"{float(m[0]):.0f}", x) for x in sys.argv[1:]]  # 1e6
    args = tyro.cli(Args, args=words, description=__doc__.split("\n")[0])
    if folder := args.resume or args.evaluate:  # the flags of that run become the defaults
        script, files = Path(__file__), set(os.listdir(folder)) if os.path.isdir(folder) else set()
        needed = {script.name, "args.json", "agent.safetensors" if args.evaluate else "args.json"}
        if needed - files or args.resume and (args.evaluate or "result.json" in files):
            fail(f"{folder} is no {'un' * bool(args.resume)}finished run of {script.name}: {sorted(files) or 'empty'}")
        if args.resume and Path(folder, script.name).read_bytes() != script.read_bytes():
            fail(f"{script.name} has changed since: resume with the copy in the folder, {folder}/{script.name}")
        saved = json.loads(Path(folder, "args.json").read_text())["args"] | {"run_dir": folder, "resume": args.resume}
        saved |= {"env_kwargs": {}} if args.env_kwargs else {}  # with other defaults tyro would take only their names
        defaults = Args(**{name: saved[name] for name in Args.__dataclass_fields__ if name in saved})
        args = tyro.cli(Args, args=words, default=defaults)
        if args.resume and args != defaults:
            fail("--resume continues a run with its own flags: remove the others")
    try:
        if not args.evaluate:
            return train(args)
        envs, _ = start_envs(args, "eval", 0, 1)
        agent = Agent(envs, args).to(args.device).eval()
        safetensors.torch.load_model(agent, Path(args.run_dir, "agent.safetensors"))
        evaluate(args, agent, envs)
        if args.video:
            record_video(args, agent, envs)
    except KeyboardInterrupt:
        fail("interrupted" if args.evaluate else f"interrupted: --resume {args.run_dir} continues it", code=130)
    except Exception as error:
        if re.search("MemoryError|Allocator|out of memory|No space|StreamWriter|t.creator|s. in loading", repr(error)):
            fail(str(error) or repr(error))
        error.add_note("If the error is in your environment, gymnasium.utils.env_checker.check_env may explain it.")
        raise


if __name__ == "__main__":
    main()
