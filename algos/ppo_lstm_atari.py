# /// script
# requires-python = ">=3.11,<3.14"
# dependencies = [
#     "ale-py==0.12.1", "filelock==4.3.1", "gymnasium==1.4.0", "imageio[ffmpeg]==2.38.1", "numpy==2.4.6",
#     "safetensors==0.8.0", "tensorboard==2.21.0", "torch==2.13.0", "tqdm==4.70.1", "tyro==1.0.17",
# ]
# ///
"""PPO with an LSTM for Atari games: the agent sees one frame at a time, and has to remember those before it.

    uv run ppo_lstm_atari.py --env-id ALE/Breakout-v5     # or: python ppo_lstm_atari.py
    uv run ppo_lstm_atari.py --env-id ALE/Pong-v5 --norm-obs --clip-coef .2 --num-envs 16 --num-minibatches 8
    uv run ppo_lstm_atari.py --resume runs/ALE-Breakout-v5__ppo_lstm_atari__1__...
    uv run ppo_lstm_atari.py --evaluate runs/ALE-Breakout-v5__ppo_lstm_atari__1__... --video

Papers: Schulman et al. 2017 (PPO, arXiv:1707.06347) and 2016 (GAE, arXiv:1506.02438); Mnih et al. 2015, Nature 518 (the
convolutions); Machado et al. 2018 (sticky actions, arXiv:1709.06009); Huang et al. 2022 (37 details: LSTM, defaults).

Details that matter, besides those of ppo_atari.py and ppo_lstm.py:
- Policy and value share the convolutions and the LSTM. Rewards are clipped, so one gradient does not drown the other.
- Observations begin with a plane that is 1 in the first step of a game. There the LSTM's state is reset to 0.
- A lost life does not reset the state (in the code of Huang et al. it does): the game continues, and so does memory.
- A minibatch is whole sequences of some games, unrolled from the state with which the rollout began.
- The final observation of a truncated game is valued with the state that led to it, before the reset.
- `--env-kwargs stack_num 4` shows the last four frames, as in ppo_atari.py.

Not included: other image environments, gradients or recomputed states beyond the beginning of a rollout.
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
from itertools import pairwise
from pathlib import Path
from typing import Literal, NoReturn

import ale_py  # noqa: F401 (registers the games)
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
    env_id: str = "ALE/Breakout-v5"  # Gymnasium id of an Atari game: ALE/Name-v5
    seed: int = 1  # random seed
    total_timesteps: int = 10_000_000  # environment steps, summed over all environments
    env_kwargs: dict[str, bool | int | float | str] = field(default_factory=dict)  # for gym.make: name value name value

    # The algorithm
    num_envs: int = 8  # parallel environments (N)
    num_steps: int = 128  # steps per environment and rollout (T)
    learning_rate: float = 2.5e-4  # initial learning rate of Adam
    anneal_lr: bool = True  # anneal the learning rate linearly to 0
    gamma: float = 0.99  # discount factor
    gae_lambda: float = 0.95  # lambda of generalized advantage estimation
    num_minibatches: int = 4  # minibatches per epoch, each of num_envs / num_minibatches whole sequences
    update_epochs: int = 4  # epochs per rollout (K)
    norm_adv: bool = True  # normalize the advantages of each minibatch
    clip_coef: float = 0.1  # clip range of the probability ratio (epsilon)
    clip_vloss: bool = True  # clip the value loss, with the same range
    ent_coef: float = 0.01  # entropy coefficient
    vf_coef: float = 0.5  # value loss coefficient
    max_grad_norm: float = 0.5  # maximum global norm of the gradient
    hidden_size: int = 128  # units of the LSTM (H)
    target_kl: float = 0.0  # stop the epochs on a rollout when the approximate KL divergence exceeds this; 0: never
    life_loss: bool = True  # a lost life is a termination for the learner; the game continues
    norm_obs: bool = False  # subtract the running mean of each pixel, and divide all by one standard deviation
    bf16: bool = bool(torch.cpu.get_capabilities().get("avx512_bf16"))  # bfloat16 in the trunk; default: if the CPU can

    # The run
    run_dir: str = ""  # run folder; default: runs/{env}__{algo}__{seed}__{UTC time}
    resume: str = ""  # resume the run in this folder, with its own flags
    evaluate: str = ""  # evaluate the agent of the run in this folder instead of training
    eval_episodes: int = 20  # episodes of the evaluation
    video: bool = False  # record a video of the first one
    device: Literal["cpu", "cuda"] = "cuda" if torch.cuda.is_available() else "cpu"  # by default a GPU if there is one
    torch_threads: int = 0  # CPU threads of PyTorch and the emulators; 0: PyTorch's default
    compile: bool = False  # torch.compile the loss
    checkpoint_every: int = 500_000  # steps; a checkpoint restarts the environments and discards unfinished episodes

    def __post_init__(self) -> None:  # tyro reports a ValueError as a usage error
        for name, value in vars(self).items():
            lowest = 1 if type(value) is int and name not in ("seed", "torch_threads") else 0
            if isinstance(value, int | float) and not lowest <= value < math.inf:
                raise ValueError(f"{name} must be at least {lowest} and finite, not {value}")
        if max(self.gamma, self.gae_lambda) > 1:
            raise ValueError("gamma and gae_lambda must be at most 1")
        if self.num_envs % self.num_minibatches:
            raise ValueError("num_minibatches must divide num_envs")


class RunningMeanStd(nn.Module):
    """Running mean and variance (Chan et al. 1979), stored as buffers so that they are saved with the agent."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(shape, dtype=torch.float64))
        self.register_buffer("var", torch.ones(shape, dtype=torch.float64))
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))

    def update(self, x: Tensor) -> None:
        """Add the rows of x (B, *shape)."""
        delta, total = x.mean(0) - self.mean, self.count + len(x)
        m2 = self.var * self.count + x.var(0, correction=0) * len(x) + delta.square() * self.count * len(x) / total
        self.mean += delta * len(x) / total
        self.var.copy_(m2 / total)
        self.count.copy_(total)


def layer_init(layer: nn.Module, std: float = 2**0.5) -> nn.Module:
    """Orthogonal initialization with gain `std`, zero biases."""
    nn.init.orthogonal_(layer.weight, std)
    nn.init.zeros_(layer.bias)
    return layer


class Agent(nn.Module):
    """The convolutions of Mnih et al. 2015, an LSTM, and two heads, the policy (actor) and the value function (critic).

    The state of B games, (2, B, H), is h and c of the LSTM. An observation is a plane, which is 1 in the first step of
    a game, otherwise 0, and F frames (1 by default).
    """

    def __init__(self, envs: gym.vector.VectorEnv, args: Args) -> None:
        super().__init__()
        num_frames, num_actions = envs.single_observation_space.shape[0] - 1, int(envs.single_action_space.n)
        self.trunk = nn.Sequential(
            layer_init(nn.Conv2d(num_frames, 32, 8, stride=4)),
            nn.ReLU(),
            layer_init(nn.Conv2d(32, 64, 4, stride=2)),
            nn.ReLU(),
            layer_init(nn.Conv2d(64, 64, 3)),
            nn.ReLU(),
            nn.Flatten(),
            layer_init(nn.Linear(64 * 7 * 7, 512)),
            nn.ReLU(),
        ).to(memory_format=torch.channels_last)
        self.lstm = nn.LSTM(512, args.hidden_size)
        for name, parameter in self.lstm.named_parameters():
            nn.init.zeros_(parameter) if "bias" in name else nn.init.orthogonal_(parameter)
        self.actor = layer_init(nn.Linear(args.hidden_size, num_actions), std=0.01)
        self.critic = layer_init(nn.Linear(args.hidden_size, 1), std=1.0)
        self.obs_stats, self.norm_obs, self.bf16 = RunningMeanStd(84, 84), args.norm_obs, args.bf16
        self.acting_state = None

    def initial_state(self, num_envs: int) -> Tensor:
        return torch.zeros(2, num_envs, self.lstm.hidden_size, device=self.actor.weight.device)

    def forward(self, obs: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Unroll sequences: bytes (T, B, 1 + F, 84, 84), (2, B, H) -> logits (T, B, A), V(s) (T, B), (2, B, H)."""
        frames, first = obs[:, :, 1:].flatten(0, 1), obs[:, :, 0, 0, :1]  # first (T, B, 1): 1 resets the state
        x = frames.to(torch.float32, memory_format=torch.channels_last) / 255  # the layout of faster convolutions
        if self.norm_obs:
            std = (self.obs_stats.var.mean() + 1e-4).sqrt()  # one for all pixels: those that never change stay small
            x = (x - self.obs_stats.mean.float()) / std.float()
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.bf16):
            x = self.trunk(x)
        x = x.float().unflatten(0, obs.shape[:2])
        resets = first[1:].flatten(1).any(1).nonzero().flatten() + 1
        hidden = []
        for start, end in pairwise([0, *resets.tolist(), len(obs)]):  # from one reset to the next in one call
            h, c = (state * (1 - first[start])).unsqueeze(1)
            part, state = self.lstm(x[start:end], (h, c))
            state = torch.cat(state)
            hidden.append(part)
        hidden = torch.cat(hidden)
        return self.actor(hidden), self.critic(hidden).squeeze(-1), state

    def logprob_entropy_value(self, obs: Tensor, actions: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """log pi(a|s), the entropy of pi(.|s), and V(s), all (T, B): (T, B, 1 + F, 84, 84), (T, B), (2, B, H)."""
        logits, values, _ = self(obs, state)
        logprobs = logits.log_softmax(-1)
        entropy = -(logprobs.exp() * logprobs).sum(-1)
        return logprobs.gather(-1, actions.unsqueeze(-1)).squeeze(-1), entropy, values

    @torch.no_grad()
    def sample(self, obs: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Actions sampled from the policy, their log-probabilities, V(s), and the next state.

        (N, 1 + F, 84, 84), (2, N, H) -> (N,), (N,), (N,), (2, N, H).
        """
        logits, values, state = self(obs.unsqueeze(0), state)
        logits, values = logits.squeeze(0), values.squeeze(0)
        actions = logits.softmax(-1).multinomial(1).squeeze(-1)
        return actions, logits.log_softmax(-1).gather(-1, actions.unsqueeze(-1)).squeeze(-1), values, state

    @torch.no_grad()
    def value(self, obs: Tensor, state: Tensor) -> Tensor:
        """V(s) of single steps: (B, 1 + F, 84, 84), (2, B, H) -> (B,)."""
        return self(obs.unsqueeze(0), state)[1].squeeze(0)

    @torch.no_grad()
    def act(self, obs: Tensor) -> Tensor:
        """Actions for the evaluation, sampled: (N, 1 + F, 84, 84) -> (N,). Remembers the state for the next call."""
        state = self.initial_state(len(obs)) if obs[:, 0].all() else self.acting_state  # all begin
        actions, _, _, self.acting_state = self.sample(obs, state)
        return actions


class Games(gym.vector.VectorWrapper):
    """ALE's vector environment. It remembers the newest frame of the first game, for a video of what the agent sees."""

    def __init__(self, env: gym.vector.VectorEnv) -> None:
        super().__init__(env)
        self.envs = [self]  # a video is made of envs.envs[0].render()

    def reset(self, **kwargs):
        self.obs, infos = self.env.reset(**kwargs)
        return self.obs, infos

    def step(self, actions):
        self.obs, *rest = self.env.step(actions)
        return self.obs, *rest

    def render(self) -> np.ndarray:
        """RGB, (336, 336, 3)."""
        return np.repeat(self.obs[0, -1].repeat(4, 0).repeat(4, 1)[..., None], 3, -1)


class Adapter(gym.vector.VectorWrapper):
    """Puts a plane before the frames of an observation: 1 in the first step of a game, otherwise 0."""

    def __init__(self, env: gym.vector.VectorEnv) -> None:
        super().__init__(env)
        num_frames, height, width = env.single_observation_space.shape
        self.single_observation_space = gym.spaces.Box(0, 255, (1 + num_frames, height, width), np.uint8)

    def reset(self, **kwargs):
        obs, infos = self.env.reset(**kwargs)
        return np.insert(obs, 0, 1, axis=1), infos

    def step(self, actions):
        obs, rewards, terminations, truncations, infos = self.env.step(actions)
        if "final_obs" in infos:
            infos["final_obs"] = np.insert(infos["final_obs"], 0, 0, axis=1)
        first = (terminations | truncations).reshape(-1, 1, 1, 1)
        return np.insert(obs, [0], first, axis=1), rewards, terminations, truncations, infos


def make_envs(args: Args, num_envs: int, render: bool = False) -> gym.vector.VectorEnv:
    """SAME_STEP autoreset: where a game ends, `step` already returns the first observation of the next one.

    Observations are bytes (N, 2, 84, 84), rewards are raw. At a lost life the game continues: see infos["lives"].
    """
    try:
        spec = gym.spec(args.env_id.removeprefix("ale_py:"))
    except (gym.error.Error, ImportError) as error:
        fail(f"cannot make {args.env_id}: {error}")
    if not spec.id.startswith("ALE/"):
        fail(f"{args.env_id} is not an Atari game, like ALE/Pong-v5: for vector observations there is ppo.py")
    preprocessing = {
        "noop_max": 30,  # a game starts with 0 to 29 no-ops, at random
        "use_fire_reset": True,  # and FIRE, where the game has it
        "repeat_action_probability": 0.25,  # sticky actions (Machado et al.)
        "frameskip": 4,  # the action is repeated, rewards are summed
        "maxpool": True,  # the maximum of the last two frames
        "grayscale": True,
        "img_height": 84,
        "img_width": 84,
        "stack_num": 1,  # the last of these frames; the LSTM remembers the others
        "reward_clipping": False,
        "max_num_frames_per_episode": 108_000,  # then truncated
    }
    games = gym.make_vec(
        spec,
        num_envs,
        autoreset_mode=gym.vector.AutoresetMode.SAME_STEP,
        num_threads=min(num_envs, torch.get_num_threads()),
        **preprocessing | args.env_kwargs,
    )
    return Games(Adapter(games))


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


def ppo_loss(agent, args, obs, actions, old_logprobs, advantages, returns, old_values, state) -> tuple[Tensor, dict]:
    """PPO eq. 9 on sequences: obs (T, B, 1 + F, 84, 84), the state before them (2, B, H), the others (T, B)."""
    new_logprobs, entropy, new_values = agent.logprob_entropy_value(obs, actions, state)
    logratio = new_logprobs - old_logprobs
    ratio = logratio.exp()
    if args.norm_adv and advantages.numel() > 1:
        advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
    clipped_ratio = ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef)
    policy_loss = -torch.min(ratio * advantages, clipped_ratio * advantages)  # PPO eq. 7

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
    torch.backends.cudnn.deterministic = True
    T, N, device = args.num_steps, args.num_envs, args.device
    envs, current_obs = start_envs(args, "train", 0, N)  # seeds everything
    agent = Agent(envs, args).to(device)
    optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate, eps=1e-5, fused=True)
    loss_fn = torch.compile(ppo_loss) if args.compile else ppo_loss
    obs_shape = (T + 1, N, *envs.single_observation_space.shape)  # the last one is that after the rollout
    obs = torch.zeros(obs_shape, dtype=torch.uint8, device=device)
    actions = torch.zeros((T, N), dtype=torch.int64, device=device)
    logprobs, values = torch.zeros((T, N), device=device), torch.zeros((T + 1, N), device=device)
    rewards = np.zeros((T, N), np.float32)
    terminations, truncations = np.zeros((2, T, N), bool)
    lives, state = np.zeros(N), agent.initial_state(N)
    run = Run(args, agent=agent, optimizer=optimizer)  # with --resume, restores both
    global_step = run.start_step

    while global_step < args.total_timesteps:
        if run.checkpoint(global_step):  # every `checkpoint_every` steps and after a resume: environments restart
            envs, current_obs = start_envs(args, "train", global_step, N, old_envs=envs)
            lives = np.zeros(N)
        if args.anneal_lr:
            optimizer.param_groups[0]["lr"] = args.learning_rate * (1 - global_step / args.total_timesteps)

        # Collect a rollout
        initial_state = state
        final_obs, final_states = [], []  # of truncated games, in the order of (t, n); the states that led there
        for t in range(T):
            obs[t] = torch.from_numpy(current_obs)
            actions[t], logprobs[t], values[t], state = agent.sample(obs[t], state)
            current_obs, reward, game_over, truncations[t], infos = envs.step(actions[t].cpu().numpy())
            if truncations[t].any():
                final_obs.append(infos["final_obs"][truncations[t]])
                final_states.append(state[:, torch.from_numpy(truncations[t])])
            global_step += N
            run.record(global_step, reward, game_over | truncations[t])
            lost_life = (infos["lives"] < lives) & ~truncations[t]  # where a game ended, `lives` are the next game's
            rewards[t], terminations[t] = np.sign(reward), game_over | (lost_life & args.life_loss)
            lives = infos["lives"]

        # Compute the advantages. The next value is that of the next step or, where truncated, of the final observation
        obs[T] = torch.from_numpy(current_obs)
        values[T] = agent.value(obs[T], state)
        next_values = values[1:].clone()
        if final_obs:
            b_final_obs = torch.from_numpy(np.concatenate(final_obs)).to(device)
            b_final_values = agent.value(b_final_obs, torch.cat(final_states, 1))
            next_values[torch.from_numpy(truncations).to(device)] = b_final_values
        b_rewards, b_terminations, b_dones = (
            torch.from_numpy(x).to(device) for x in (rewards, terminations, terminations | truncations)
        )
        advantages = gae(b_rewards, values[:-1], next_values, b_terminations, b_dones, args.gamma, args.gae_lambda)
        returns = advantages + values[:-1]

        # Optimize the policy and the value function
        history = []
        batch = obs[:-1], actions, logprobs, advantages, returns, values[:-1], initial_state
        for _ in range(args.update_epochs):
            for columns in torch.randperm(N, device=device).chunk(args.num_minibatches):
                loss, metrics = loss_fn(agent, args, *(x[:, columns] for x in batch))
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)
                optimizer.step()
                history.append(metrics)
            if 0 < args.target_kl < metrics["losses/approx_kl"]:
                break
        if args.norm_obs:  # not earlier: the gradient steps have to see what the policy saw
            newest_frames = obs[:-1:8, :, -1]  # of every eighth step, which is enough
            agent.obs_stats.update(newest_frames.flatten(0, 1).double() / 255)

        explained = 1 - (returns - values[:-1]).var(correction=0) / (returns.var(correction=0) + 1e-8)
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
