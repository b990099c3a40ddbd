# /// script
# requires-python = ">=3.11,<3.14"
# dependencies = [
#     "ale-py==0.12.1", "filelock==4.3.1", "gymnasium==1.4.0", "imageio[ffmpeg]==2.38.1", "numpy==2.4.6",
#     "safetensors==0.8.0", "tensorboard==2.21.0", "torch==2.13.0", "tqdm==4.70.1", "tyro==1.0.17",
# ]
# ///
"""Soft actor-critic (SAC) for Atari games.

    uv run sac_atari.py --env-id ALE/Breakout-v5          # or: python sac_atari.py
    uv run sac_atari.py --env-id ALE/Pong-v5 --total-timesteps 2000000 --alpha 0.1 --end-entropy-scale 0.3
    uv run sac_atari.py --resume runs/ALE-Breakout-v5__sac_atari__1__...
    uv run sac_atari.py --evaluate runs/ALE-Breakout-v5__sac_atari__1__... --video

Papers: Christodoulou 2019 (SAC-D, arXiv:1910.07207); Zhou et al. 2022 (mean of the critics, arXiv:2209.10081); Mnih et
al. 2015, Nature 518 (the network); Machado et al. 2018 (sticky actions, arXiv:1709.06009). The defaults are those of
SAC-D, but 10 million steps, four environments, and CleanRL's target entropy (0.89; 0.98 in the paper) and Adam epsilon.

Details that matter, besides those of dqn_atari.py (environments, replay buffer, bfloat16):
- The target uses the mean of the two critics, not the minimum as in the paper, which underestimates (Zhou et al.).
- Actor and critics share no convolutions. An update costs about five times one of dqn_atari.py.
- The target entropy is a fraction of the maximum, constant by default; `--end-entropy-scale` anneals it.
- The critics' targets include the entropy, so values first rise far above the returns; with a smaller `--alpha`, less.
- The evaluation samples from the policy: a greedy agent can wait forever for a ball that it never serves.

Not included: the entropy penalty and clipped Q-values of Zhou et al., prioritized replay
(dqn_per_atari.py), critics without entropy (arXiv:2509.09838).
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
    batch_size: int = 64  # transitions per update (B)
    policy_lr: float = 3e-4  # initial learning rate of the actor
    q_lr: float = 3e-4  # initial learning rate of the critics and of the temperature
    anneal_lr: bool = False  # anneal the learning rates linearly to 0
    gamma: float = 0.99  # discount factor
    target_network_frequency: int = 8_000  # environment steps between updates of the target critics
    tau: float = 1.0  # update rate of the target critics; 1 copies them
    autotune: bool = True  # tune the temperature to the target entropy
    target_entropy_scale: float = 0.89  # initial target entropy, as a fraction of the maximum, log(number of actions)
    end_entropy_scale: float = 0.89  # final target entropy, annealed linearly
    alpha: float = 1.0  # temperature; with autotune, the initial one
    life_loss: bool = True  # a lost life is a termination for the learner; the game continues
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
        if max(self.gamma, self.tau, self.target_entropy_scale, self.end_entropy_scale) > 1 or self.alpha == 0:
            raise ValueError("gamma, tau, and the entropy scales must be at most 1, and alpha greater than 0")
        if self.num_envs > min(self.train_frequency, self.target_network_frequency, self.buffer_size // 16):
            raise ValueError("num_envs must be at most train_frequency, target_network_frequency, and buffer_size / 16")


class CNN(nn.Module):
    """The network of Mnih et al. 2015."""

    def __init__(self, outputs: int, bf16: bool) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Conv2d(4, 32, 8, stride=4),
            nn.ReLU(),
            nn.Conv2d(32, 64, 4, stride=2),
            nn.ReLU(),
            nn.Conv2d(64, 64, 3),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(64 * 7 * 7, 512),
            nn.ReLU(),
        ).to(memory_format=torch.channels_last)
        self.head, self.bf16 = nn.Linear(512, outputs), bf16
        for name, weights in self.named_parameters():  # as CleanRL; Adam's epsilon is too large for smaller ones
            nn.init.zeros_(weights) if "bias" in name else nn.init.kaiming_normal_(weights)

    def forward(self, obs: Tensor) -> Tensor:
        """Bytes (B, 4, 84, 84) -> (B, outputs)."""
        x = obs.to(torch.float32, memory_format=torch.channels_last) / 255  # the layout of faster convolutions
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.bf16):
            hidden = self.trunk(x)
        return self.head(hidden.float())


class Critics(nn.Module):
    """Two independent estimates of Q(s, a) of every action."""

    def __init__(self, num_actions: int, bf16: bool) -> None:
        super().__init__()
        self.qf1, self.qf2 = CNN(num_actions, bf16), CNN(num_actions, bf16)

    def forward(self, obs: Tensor) -> Tensor:
        """(B, 4, 84, 84) -> (2, B, A)."""
        return torch.stack([self.qf1(obs), self.qf2(obs)])


class Agent(nn.Module):
    """Actor, critics, and temperature."""

    def __init__(self, envs: gym.vector.VectorEnv, args: Args) -> None:
        super().__init__()
        num_actions = int(envs.single_action_space.n)
        self.actor, self.critics = CNN(num_actions, args.bf16), Critics(num_actions, args.bf16)
        self.log_alpha = nn.Parameter(torch.tensor(math.log(args.alpha)), requires_grad=args.autotune)

    def logprobs(self, obs: Tensor) -> Tensor:
        """log pi(.|s): (B, 4, 84, 84) -> (B, A)."""
        return self.actor(obs).log_softmax(-1)

    @torch.no_grad()
    def sample(self, obs: Tensor) -> Tensor:
        """Actions sampled from the policy: (N, 4, 84, 84) -> (N,)."""
        logits = self.actor(obs)
        gumbel = -torch.empty_like(logits).exponential_().log()
        return (logits + gumbel).argmax(-1)  # Gumbel-max: as Categorical(logits=logits).sample(), but faster

    @torch.no_grad()
    def act(self, obs: Tensor) -> Tensor:
        """Actions for the evaluation, sampled: (N, 4, 84, 84) -> (N,)."""
        return self.sample(obs)


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


def sample_transitions(replay: FrameBuffer, batch_size: int, device: str) -> list[Tensor]:
    """A uniform sample, with replacement, (B, ...): obs, actions, rewards, next_obs, terminations."""
    rows = np.random.randint(replay.oldest, replay.added, size=batch_size) % replay.size
    frames = replay.frames[replay.numbers[rows]]  # (B, 5, 84, 84)
    batch = frames[:, :4], replay.actions[rows], replay.rewards[rows], frames[:, 1:], replay.terminations[rows]
    return [torch.from_numpy(x).to(device) for x in batch]


@torch.no_grad()
def update_target(target: nn.Module, online: nn.Module, tau: float) -> None:
    """target <- (1 - tau) target + tau online."""
    for target_parameter, parameter in zip(target.parameters(), online.parameters(), strict=True):
        target_parameter.lerp_(parameter, tau)


def soft_values(q_values: Tensor, logprobs: Tensor, alpha: Tensor) -> Tensor:
    """V(s) = sum_a pi(a|s) (mean_i Q_i(s, a) - alpha log pi(a|s)): (2, B, A), (B, A), () -> (B,).

    SAC-D with the mean of the critics in place of the minimum.
    """
    return (logprobs.exp() * (q_values.mean(0) - alpha * logprobs)).sum(-1)


def sac_loss(agent, target, args, target_entropy, obs, actions, rewards, next_obs, terminations) -> tuple[Tensor, dict]:
    """The losses of critics, actor, and temperature on B transitions, summed. Returns the sum and the metrics to log.

    Each reaches its own parameters only: the critics regress on the soft TD target, the actor maximizes the soft
    value, and the temperature rises where the entropy is below its target (SAC-D, but on log alpha).
    """
    alpha = agent.log_alpha.exp().detach()
    with torch.no_grad():
        next_values = soft_values(target(next_obs), agent.logprobs(next_obs), alpha)
        td_target = rewards + args.gamma * torch.where(terminations, 0, next_values)
    q_values, logprobs = agent.critics(obs), agent.logprobs(obs)
    q_taken = q_values.gather(-1, actions.expand(2, -1).unsqueeze(-1)).squeeze(-1)
    qf_loss = (q_taken - td_target).square().mean(-1).sum()
    actor_loss = -soft_values(q_values.detach(), logprobs, alpha).mean()
    entropy = -(logprobs.exp() * logprobs).sum(-1).mean().detach()
    alpha_loss = agent.log_alpha * (entropy - target_entropy)
    metrics = {
        "losses/qf_loss": qf_loss.detach(),
        "losses/actor_loss": actor_loss.detach(),
        "losses/q_values": q_taken.detach().mean(),
        "losses/entropy": entropy,
        "losses/alpha": alpha,
    }
    return qf_loss + actor_loss + alpha_loss, metrics


def train(args: Args) -> None:
    """SAC-D with N environments in parallel."""
    torch.backends.cudnn.deterministic = True
    N, device = args.num_envs, args.device
    envs, obs = start_envs(args, "train", 0, N)  # seeds everything
    num_actions = int(envs.single_action_space.n)
    agent = Agent(envs, args).to(device)
    target = deepcopy(agent.critics).requires_grad_(False)
    actor_group = {"params": agent.actor.parameters(), "lr": args.policy_lr}
    critic_group = {"params": [*agent.critics.parameters(), agent.log_alpha], "lr": args.q_lr}
    optimizer = torch.optim.Adam([actor_group, critic_group], eps=1e-4, fused=True)
    replay = FrameBuffer(args.buffer_size, N)
    replay.start(obs)
    lives = np.zeros(N)
    loss_fn = torch.compile(sac_loss) if args.compile else sac_loss
    run = Run(args, agent=agent, target=target, optimizer=optimizer, replay=replay)  # with --resume, restores all
    global_step, history = run.start_step, []

    while global_step < args.total_timesteps:
        if run.checkpoint(global_step):  # every `checkpoint_every` steps and after a resume: environments restart
            envs, obs = start_envs(args, "train", global_step, N, old_envs=envs)
            replay.start(obs)
            lives = np.zeros(N)

        progress = global_step / args.total_timesteps
        if args.anneal_lr:
            optimizer.param_groups[0]["lr"] = args.policy_lr * (1 - progress)
            optimizer.param_groups[1]["lr"] = args.q_lr * (1 - progress)
        entropy_scale = args.target_entropy_scale + progress * (args.end_entropy_scale - args.target_entropy_scale)
        target_entropy = torch.tensor(entropy_scale * math.log(num_actions), device=device)

        # Act
        if global_step < args.learning_starts:
            actions = np.random.randint(num_actions, size=N)
        else:
            actions = agent.sample(torch.from_numpy(obs).to(device)).cpu().numpy()
        obs, rewards, game_over, truncations, infos = envs.step(actions)
        global_step += N
        run.record(global_step, rewards, game_over | truncations)
        lost_life = (infos["lives"] < lives) & ~truncations  # where a game ended, `lives` are the next game's
        terminations, lives = game_over | (lost_life & args.life_loss), infos["lives"]
        replay.add(actions, np.sign(rewards), terminations, game_over | truncations, obs, infos)

        # Learn. `global_step % frequency < N` is true once every `frequency` steps, although global_step advances by N
        if global_step > args.learning_starts and global_step % args.train_frequency < N:
            for _ in range(args.gradient_steps):
                batch = sample_transitions(replay, args.batch_size, device)
                loss, metrics = loss_fn(agent, target, args, target_entropy, *batch)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                history.append(metrics)
        if global_step % args.target_network_frequency < N:
            update_target(target, agent.critics, args.tau)

        if global_step % 1_000 < N or global_step >= args.total_timesteps:  # log every 1,000 steps
            run.log(global_step, history, {"charts/learning_rate": optimizer.param_groups[1]["lr"]})
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
