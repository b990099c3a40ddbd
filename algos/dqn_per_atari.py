# /// script
# requires-python = ">=3.11,<3.14"
# dependencies = [
#     "ale-py==0.12.1", "filelock==4.3.1", "gymnasium==1.4.0", "imageio[ffmpeg]==2.38.1", "numpy==2.4.6",
#     "safetensors==0.8.0", "tensorboard==2.21.0", "torch==2.13.0", "tqdm==4.70.1", "tyro==1.0.17",
# ]
# ///
"""Double DQN with prioritized experience replay (PER), for Atari games.

    uv run dqn_per_atari.py --env-id ALE/Breakout-v5      # or: python dqn_per_atari.py
    uv run dqn_per_atari.py --total-timesteps 2e6 --exploration-fraction .125 --buffer-size 500000 --n-step 3 --dueling
    uv run dqn_per_atari.py --resume runs/ALE-Breakout-v5__dqn_per_atari__1__...
    uv run dqn_per_atari.py --evaluate runs/ALE-Breakout-v5__dqn_per_atari__1__... --video

Papers: van Hasselt et al. 2016 (Double DQN, arXiv:1509.06461); Schaul et al. 2016 (PER, arXiv:1511.05952); Wang et al.
2016 (dueling networks, arXiv:1511.06581). Flags that dqn_atari.py has as well have its defaults.

Details that matter, besides those of dqn_atari.py (Atari, frames) and dqn_per.py (priorities, windows): with
`--dueling`, V(s) and A(s, a) have 512 hidden units each; unlike in the paper, gradients are not rescaled or clipped.

Not included: rank-based priorities, clipped TD errors, noisy or distributional networks.
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
import zlib
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import asdict, dataclass, field, replace
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
    num_envs: int = 4  # parallel environments (N)
    buffer_size: int = 1_000_000  # frames in the replay buffer, about as many transitions; 7.1 GB per million
    learning_starts: int = 20_000  # environment steps with random actions before the first update
    train_frequency: int = 4  # environment steps between rounds of updates
    gradient_steps: int = 1  # updates per round
    batch_size: int = 32  # transitions per update (B)
    learning_rate: float = 6.25e-5  # initial learning rate of Adam
    anneal_lr: bool = False  # anneal the learning rate linearly to 0
    gamma: float = 0.99  # discount factor
    target_network_frequency: int = 8_000  # environment steps between copies to the target network
    start_e: float = 1.0  # initial epsilon: the probability of a random action
    end_e: float = 0.01  # final epsilon
    exploration_fraction: float = 0.025  # fraction of the run in which epsilon is annealed from start_e to end_e
    per_alpha: float = 0.6  # exponent of the priorities: 0 samples uniformly, 1 in proportion to the TD error
    per_beta: float = 0.4  # initial exponent of the importance weights, annealed to 1
    per_eps: float = 1e-3  # added to each TD error, so that every transition can be sampled
    n_step: int = 1  # rewards that are summed before the bootstrap
    dueling: bool = False  # split Q(s, a) into a value of the state and advantages of the actions
    life_loss: bool = False  # a lost life is a termination for the learner; the game continues
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
            lowest = 1 if type(value) is int and name not in ("seed", "torch_threads", "learning_starts") else 0
            if isinstance(value, int | float) and not lowest <= value < math.inf:
                raise ValueError(f"{name} must be at least {lowest} and finite, not {value}")
        if max(self.gamma, self.start_e, self.end_e, self.exploration_fraction) > 1:
            raise ValueError("gamma, start_e, end_e, and exploration_fraction must be at most 1")
        if max(self.per_alpha, self.per_beta) > 1 or self.per_eps == 0:
            raise ValueError("per_alpha and per_beta must be at most 1, and per_eps greater than 0")
        if self.num_envs > min(self.train_frequency, self.target_network_frequency, self.buffer_size // 16):
            raise ValueError("num_envs must be at most train_frequency, target_network_frequency, and buffer_size / 16")


class Agent(nn.Module):
    """The Q-network of Mnih et al. 2015; with `--dueling`, V(s) and advantages A(s, a), which share convolutions."""

    def __init__(self, envs: gym.vector.VectorEnv, args: Args) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Conv2d(4, 32, 8, stride=4),
            nn.ReLU(),
            nn.Conv2d(32, 64, 4, stride=2),
            nn.ReLU(),
            nn.Conv2d(64, 64, 3),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(64 * 7 * 7, 512 * (1 + args.dueling)),
            nn.ReLU(),
        ).to(memory_format=torch.channels_last)
        self.q = nn.Linear(512, int(envs.single_action_space.n))
        self.v = nn.Linear(512, 1) if args.dueling else None
        for name, weights in self.named_parameters():  # as in Dopamine; Adam's epsilon is too large for smaller ones
            nn.init.zeros_(weights) if "bias" in name else nn.init.xavier_uniform_(weights)
        self.bf16 = args.bf16

    def forward(self, obs: Tensor) -> Tensor:
        """Q(s, a) of every action: bytes (B, 4, 84, 84) -> (B, A). Dueling eq. 9: advantages minus their mean."""
        x = obs.to(torch.float32, memory_format=torch.channels_last) / 255  # the layout of faster convolutions
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.bf16):
            hidden = self.trunk(x)
        for_q, for_v = hidden[:, :512].float(), hidden[:, 512:].float()
        q_values = self.q(for_q)
        return q_values if self.v is None else self.v(for_v) + q_values - q_values.mean(-1, keepdim=True)

    @torch.no_grad()
    def act(self, obs: Tensor, epsilon: float = 0.001) -> Tensor:
        """Epsilon-greedy actions; epsilon 0.001 is that of the evaluation: (N, 4, 84, 84) -> (N,)."""
        q_values = self(obs)
        random_actions = torch.randint(q_values.shape[-1], (len(obs),), device=obs.device)
        return torch.where(torch.rand(len(obs), device=obs.device) < epsilon, random_actions, q_values.argmax(-1))


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


def make_envs(args: Args, num_envs: int, render: bool = False) -> gym.vector.VectorEnv:
    """SAME_STEP autoreset: where a game ends, `step` already returns the first observation of the next one.

    Observations are bytes (N, 4, 84, 84), rewards are raw. At a lost life the game continues: see infos["lives"].
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
        "stack_num": 4,  # the last four of these frames
        "reward_clipping": False,
        "max_num_frames_per_episode": 108_000,  # then truncated
    }
    return Games(
        gym.make_vec(
            spec,
            num_envs,
            autoreset_mode=gym.vector.AutoresetMode.SAME_STEP,
            num_threads=min(num_envs, torch.get_num_threads()),
            **preprocessing | args.env_kwargs,
        )
    )


class FrameBuffer:
    """The most recent transitions of N environments, with one copy of each frame; stacks are rebuilt when sampled.

    A transition has the numbers of five frames: the first four are its obs, the last four its next_obs. Frame 0 is
    black; it fills the first stacks of a game, as in ALE. New frames overwrite the oldest ones, and transitions that
    need those are forgotten. A game of T steps has T + 1 frames, so there are slightly fewer transitions than frames.
    """

    def __init__(self, size: int, N: int) -> None:
        self.N, self.size = N, size - size % N
        self.oldest = self.added = self.stored = 0  # transitions oldest, ..., added - 1 can be sampled
        meminfo = Path("/proc/meminfo").read_text() if sys.platform == "linux" else "MemAvailable: inf"
        if 7089 * size > (free := 1024 * float(meminfo.split("MemAvailable:")[1].split()[0])):  # 84 * 84, and 33 bytes
            fail(f"--buffer-size {size} takes {7089 * size / 1e9:.1f} GB of memory, of which {free / 1e9:.1f} are free")
        self.frames = np.zeros((1 + self.size, 84, 84), np.uint8)
        self.numbers, self.newest = np.zeros((self.size, 5), np.int32), np.zeros((N, 4), np.int32)
        self.actions, self.rewards, self.terminations = (np.zeros(self.size, x) for x in (np.int64, np.float32, bool))
        self.arrays = [self.numbers, self.newest, self.actions, self.rewards, self.terminations]

    def store(self, frames: np.ndarray) -> np.ndarray:
        """Store frames (M, 84, 84) in place of the oldest ones. Returns their numbers (M,)."""
        numbers = 1 + (self.stored + np.arange(len(frames))) % self.size
        while self.oldest < self.added and np.isin(self.numbers[self.oldest % self.size :][: self.N], numbers).any():
            self.oldest += self.N
        self.frames[numbers] = frames
        self.stored += len(frames)
        return numbers

    def start(self, obs: np.ndarray) -> None:
        """The environments start, or restart, with obs (N, 4, 84, 84)."""
        self.newest[:, :3], self.newest[:, 3] = 0, self.store(obs[:, -1])

    def add(self, actions, rewards, terminations, dones, next_obs, infos) -> None:
        """Add a step of all environments, (N, ...). A done ends a game and its stack; a lost life only terminates."""
        led_to = np.where(dones[:, None, None], infos.get("final_obs", next_obs)[:, -1], next_obs[:, -1])
        rows = self.added % self.size + np.arange(self.N)
        self.numbers[rows, :4], self.numbers[rows, 4] = self.newest, self.store(led_to)
        self.actions[rows], self.rewards[rows], self.terminations[rows] = actions, rewards, terminations
        self.added += self.N
        self.newest[:] = self.numbers[rows, 1:]
        self.newest[dones, :3], self.newest[dones, 3] = 0, self.store(next_obs[dones, -1])

    def state_dict(self) -> dict:
        """Frames are compressed, in blocks of 1,000, to a few percent of their size."""
        starts = range(0, 1 + min(self.stored, self.size), 1000)
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            blocks = pool.map(lambda i: bytearray(zlib.compress(self.frames[i : i + 1000], level=1)), starts)
            frames = [torch.frombuffer(block, dtype=torch.uint8) for block in blocks]
        counts = [self.oldest, self.added, self.stored]
        return {"counts": counts, "frames": frames, "arrays": [torch.from_numpy(array) for array in self.arrays]}

    def load_state_dict(self, state: dict) -> None:
        self.oldest, self.added, self.stored = state["counts"]
        for i, block in enumerate(state["frames"]):
            frames = np.frombuffer(zlib.decompress(block.numpy()), np.uint8).reshape(-1, 84, 84)
            self.frames[1000 * i : 1000 * i + len(frames)] = frames
        for array, saved in zip(self.arrays, state["arrays"], strict=True):
            array[:] = saved.numpy()


class SumTree:
    """A binary tree with priorities as leaves; every other node is the sum of its two children (float64: no drift)."""

    def __init__(self, num_leaves: int) -> None:
        self.depth = (num_leaves - 1).bit_length()
        self.first_leaf = 1 << self.depth  # node 1 is the root; nodes 2i and 2i + 1 are the children of node i
        self.sums = np.zeros(2 * self.first_leaf)

    def set(self, leaves: np.ndarray, values: np.ndarray) -> None:
        """leaves (B,) <- values (B,). The last value counts where a leaf occurs more than once."""
        nodes = self.first_leaf + leaves
        self.sums[nodes] = values
        for _ in range(self.depth):
            nodes = nodes >> 1
            self.sums[nodes] = self.sums[2 * nodes] + self.sums[2 * nodes + 1]

    def find(self, masses: np.ndarray) -> np.ndarray:
        """The leaves (B,) at which the cumulative sum of priorities exceeds `masses` (B,), each below the total."""
        nodes = np.ones(len(masses), np.int64)
        for _ in range(self.depth):
            left = self.sums[2 * nodes]
            right = (masses >= left) & (self.sums[2 * nodes + 1] > 0)  # rounding never leads to a leaf of priority 0
            masses = masses - left * right
            nodes = 2 * nodes + right
        return nodes - self.first_leaf


class PrioritizedBuffer(FrameBuffer):
    """A FrameBuffer with a priority for each transition; rows that cannot be sampled have 0."""

    def __init__(self, size: int, N: int) -> None:
        super().__init__(size, N)
        self.tree, self.largest, self.cleared = SumTree(self.size), np.ones(1), 0
        self.arrays += [self.tree.sums, self.largest]  # these are saved

    def add(self, *step) -> None:
        super().add(*step)
        forgotten = np.arange(max(self.cleared, self.added - self.size), self.oldest)
        self.tree.set(forgotten % self.size, np.zeros(1))
        self.tree.set(np.arange(self.added - self.N, self.added) % self.size, self.largest)
        self.cleared = self.oldest

    def sample(self, batch_size: int, beta: float) -> tuple[np.ndarray, np.ndarray]:
        """Rows (B,), one from each of B equal shares of the total priority (PER section 3.3), and weights (B,)."""
        masses = (np.arange(batch_size) + np.random.random(batch_size)) * (self.tree.sums[1] / batch_size)
        rows = self.tree.find(masses)
        priorities = self.tree.sums[self.tree.first_leaf + rows]
        return rows, ((priorities.min() / priorities) ** beta).astype(np.float32)  # (size P_i)^-beta / their maximum

    def update(self, rows: np.ndarray, priorities: np.ndarray) -> None:
        self.tree.set(rows, priorities)
        self.largest[:] = max(self.largest[0], priorities.max())


def n_step_windows(replay: FrameBuffer, args: Args, rows: np.ndarray) -> list[np.ndarray]:
    """obs, actions, returns, discounts, next_obs, terminations of the windows that start in `rows`, (B, ...).

    A window ends after n transitions, or earlier at a termination, the end of a game, or the newest transition. With k
    of them, return = sum_{j < k} gamma^j r_j, discount = gamma^k, next_obs = what the last one led to.
    """
    last, returns, discounts = rows, replay.rewards[rows], np.full(len(rows), args.gamma, np.float32)
    for _ in range(args.n_step - 1):
        following = (last + replay.N) % replay.size
        more = replay.numbers[following, 3] == replay.numbers[last, 4]  # it begins with what the last one led to
        newest = (replay.added - 1 - last) % replay.size < replay.N
        more &= ~(replay.terminations[last] | newest)
        last = np.where(more, following, last)
        returns = returns + np.where(more, discounts * replay.rewards[last], 0)
        discounts = np.where(more, args.gamma * discounts, discounts)
    obs, next_obs = replay.frames[replay.numbers[rows, :4]], replay.frames[replay.numbers[last, 1:]]
    return [obs, replay.actions[rows], returns, discounts, next_obs, replay.terminations[last]]


def linear_schedule(start: float, end: float, duration: float, t: float) -> float:
    """Linear from `start` at t = 0 to `end` at t = `duration`, then constant; both are fractions of the run."""
    return start + (end - start) * t / duration if t < duration else end


def double_dqn_loss(
    agent, target, obs, actions, returns, discounts, next_obs, terminations, weights
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Double DQN on B windows, the squared TD errors weighted. Returns the loss, TD errors (B,), and metrics."""
    with torch.no_grad():
        next_actions = agent(next_obs).argmax(-1, keepdim=True)
        next_values = target(next_obs).gather(-1, next_actions).squeeze(-1)
        td_target = returns + discounts * torch.where(terminations, 0, next_values)
    q_values = agent(obs).gather(-1, actions.unsqueeze(-1)).squeeze(-1)
    td_errors = td_target - q_values
    loss = (weights * td_errors.square()).mean()
    return loss, td_errors.detach(), {"losses/td_loss": loss.detach(), "losses/q_values": q_values.detach().mean()}


def train(args: Args) -> None:
    """PER, algorithm 1, with N environments in parallel."""
    torch.backends.cudnn.deterministic = True
    N, device = args.num_envs, args.device
    envs, obs = start_envs(args, "train", 0, N)  # seeds everything
    agent = Agent(envs, args).to(device)
    target = deepcopy(agent).requires_grad_(False)
    optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate, eps=1.5e-4, fused=True)
    replay = PrioritizedBuffer(args.buffer_size, N)
    replay.start(obs)
    lives = np.zeros(N)
    loss_fn = torch.compile(double_dqn_loss) if args.compile else double_dqn_loss
    run = Run(args, agent=agent, target=target, optimizer=optimizer, replay=replay)
    global_step, history = run.start_step, []

    while global_step < args.total_timesteps:
        if run.checkpoint(global_step):  # every `checkpoint_every` steps and after a resume: environments restart
            envs, obs = start_envs(args, "train", global_step, N, old_envs=envs)
            replay.start(obs)
            lives = np.zeros(N)

        progress = global_step / args.total_timesteps
        epsilon = linear_schedule(args.start_e, args.end_e, args.exploration_fraction, progress)
        if global_step < args.learning_starts:
            epsilon = 1.0
        if args.anneal_lr:
            optimizer.param_groups[0]["lr"] = args.learning_rate * (1 - progress)

        # Act: epsilon-greedy
        actions = agent.act(torch.from_numpy(obs).to(device), epsilon).cpu().numpy()
        obs, rewards, game_over, truncations, infos = envs.step(actions)
        global_step += N
        run.record(global_step, rewards, game_over | truncations)
        lost_life = (infos["lives"] < lives) & ~truncations  # where a game ended, `lives` are the next game's
        terminations, lives = game_over | (lost_life & args.life_loss), infos["lives"]
        replay.add(actions, np.sign(rewards), terminations, game_over | truncations, obs, infos)

        # Learn. `global_step % frequency < N` is true once every `frequency` steps, although global_step advances by N
        if global_step > args.learning_starts and global_step % args.train_frequency < N:
            for _ in range(args.gradient_steps):
                rows, weights = replay.sample(args.batch_size, beta=args.per_beta + progress * (1 - args.per_beta))
                batch = (torch.from_numpy(x).to(device) for x in (*n_step_windows(replay, args, rows), weights))
                loss, td_errors, metrics = loss_fn(agent, target, *batch)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                errors = np.nan_to_num(td_errors.abs().double().cpu().numpy(), posinf=0)  # its log ends a diverged run
                replay.update(rows, (errors + args.per_eps) ** args.per_alpha)  # PER eq. 1
                history.append(metrics)
        if global_step % args.target_network_frequency < N:
            target.load_state_dict(agent.state_dict())

        if global_step % 1_000 < N or global_step >= args.total_timesteps:  # log every 1,000 steps
            charts = {"charts/epsilon": epsilon, "charts/learning_rate": optimizer.param_groups[0]["lr"]}
            run.log(global_step, history, charts)
            history = []
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
