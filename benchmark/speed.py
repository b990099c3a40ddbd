"""Steps per second of a script, alone or against another library that does the same work.

    python benchmark/speed.py algos/ppo.py
    python benchmark/speed.py algos/ppo.py --peer cleanrl --peer-path CHECKOUT --peer-python VENV/bin/python
    python benchmark/speed.py algos/ppo.py --peer sb3 --peer-python VENV/bin/python --until 475 --json speed.json
    python benchmark/speed.py algos/ppo_atari.py --repeats 3 -- --no-bf16       # what follows -- goes to our script

Each run is a process of its own, one at a time, after a warm-up of each side that is not counted; run i has seed i.
Nothing else should be running on the machine.

Speed (the default): alone, our script has its own defaults. With a peer the runs alternate, each pair gives a ratio,
and our script is given the peer's hyperparameters: those of CleanRL's ppo.py, ppo_continuous_action.py or ppo_atari.py.
Stable-Baselines3 has no scripts; a few lines here call its PPO with the same ones, or, with --peer-defaults, both sides
have those of its constructor. "Training" is without start-up and imports: ours by result.json, with its checkpoints;
CleanRL's by the last SPS it prints (all steps over the time since just before its first reset); SB3's around learn().
"Whole process" is from outside; of ours it includes saving the agent and one evaluation episode.

--until RETURN: seconds from the start of the process until 100 training episodes have a mean of RETURN, each side at
its own defaults: CleanRL at its script's, SB3 at its constructor's, with one environment and no normalisation. A peer's
episode counts when it appears on the output; ours by its time in episodes.csv plus a start-up time that is never taken
too short. A run that ends without the return took `inf` seconds.
"""

import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import tyro


@dataclass
class Args:
    script: tyro.conf.Positional[Path]
    """our script, such as algos/ppo.py"""
    peer: Literal["cleanrl", "sb3"] | None = None
    """what to compare with"""
    peer_path: Path | None = None
    """folder of a CleanRL checkout"""
    peer_python: str | None = None
    """Python interpreter that has what the peer needs"""
    peer_defaults: bool = False
    """sb3: both sides have the hyperparameters of its PPO's constructor instead of CleanRL's"""
    until: float | None = None
    """measure the seconds to this return instead of the speed"""
    total_timesteps: int | None = None
    """steps of a run, rounded up to whole rollouts; by default a preset's, with --until each side's own"""
    repeats: int = 5
    """counted runs of each side"""
    threads: int | None = None
    """CPU threads of PyTorch on both sides; by default each side's own"""
    device: Literal["cpu", "cuda"] = "cpu"
    """device of both sides"""
    json: Path | None = None
    """write the raw numbers to this file"""


@dataclass
class Preset:
    cleanrl: str  # the script that ours is compared with
    env_ids: tuple[str, ...]  # the first that the peer's Gymnasium knows
    steps: tuple[int, int]  # of a run that measures speed; of CleanRL's full run
    work: tuple[int, int, int, int]  # environments, steps, minibatches, epochs
    learning: tuple[float, float, float]  # learning rate, clipping range, entropy bonus
    flags: dict  # of ours, besides
    note: str = ""


CHEETAH, PONG = ("HalfCheetah-v5", "HalfCheetah-v4"), ("PongNoFrameskip-v4",)
CHEETAH_FLAGS = {"hidden_size": 64, "log_std_init": 0.0, "norm_obs": True, "norm_reward": True}
PONG_NOTE = "; ours: sticky actions, ALE's native vector environment, bfloat16 convolutions (unless -- --no-bf16)"
PRESETS = {
    "ppo": Preset("ppo.py", ("CartPole-v1",), (100_000, 500_000), (4, 128, 4, 4), (2.5e-4, 0.2, 0.01), {}),
    "ppo_continuous": Preset(
        *("ppo_continuous_action.py", CHEETAH, (50_000, 1_000_000), (1, 2048, 32, 10), (3e-4, 0.2, 0.0)), CHEETAH_FLAGS
    ),
    "ppo_atari": Preset(
        *("ppo_atari.py", PONG, (20_000, 10_000_000), (8, 128, 4, 4), (2.5e-4, 0.1, 0.01), {"life_loss": True}),
        PONG_NOTE,
    ),
}
SB3_DEFAULTS = {"work": (1, 2048, 32, 10), "learning": (3e-4, 0.2, 0.0)}
SHARED = {"gamma": 0.99, "gae_lambda": 0.95, "vf_coef": 0.5, "max_grad_norm": 0.5, "norm_adv": True, "target_kl": None}

PROBE = """
import importlib, json, sys, gymnasium, torch
found = {name: importlib.import_module(name).__version__ for name in ("torch", "gymnasium", *sys.argv[2:])}
if "ale_py" in found and hasattr(gymnasium, "register_envs"):
    gymnasium.register_envs(sys.modules["ale_py"])
known = [name for name in json.loads(sys.argv[1]) if name in gymnasium.registry]
print(json.dumps({"env_id": (known or [None])[0], "torch_threads": torch.get_num_threads(), "versions": found}))
"""

SB3_DRIVER = """
import json, sys, time, gymnasium
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_atari_env, make_vec_env
from stable_baselines3.common.vec_env import VecFrameStack, VecNormalize

def episodes(local, _):
    for info in local["infos"]:
        if "episode" in info:
            print(f"global_step={local['self'].num_timesteps}, episodic_return={info['episode']['r']}")
    return True  # go on

job = json.loads(sys.argv[1])
if job["atari"]:
    import ale_py
    gymnasium.register_envs(ale_py)
    env = VecFrameStack(make_atari_env(job["env_id"], job["num_envs"], job["seed"]), 4)
else:
    env = make_vec_env(job["env_id"], job["num_envs"], job["seed"])
env = VecNormalize(env) if job["normalize"] else env
if job["own"]:
    rate = job["own"]["learning_rate"]
    job["own"]["learning_rate"] = lambda left: left * rate
model = PPO("CnnPolicy" if job["atari"] else "MlpPolicy", env, seed=job["seed"], device=job["device"], **job["own"])
started = time.perf_counter()
model.learn(job["steps"], callback=episodes if job["print"] else None)
print("SPS:", model.num_timesteps / (time.perf_counter() - started))
"""


def fail(message: str, output: str = "", code: int = 2) -> None:
    shown = [line for line in output.splitlines() if line.strip()][-8:]
    print("\n  ".join([f"error: {message}{'; its last lines:' if shown else ''}", *shown]), file=sys.stderr)
    raise SystemExit(code)


def to_flags(values: dict) -> list[str]:
    """{"num_envs": 4, "norm_adv": False} -> --num-envs 4 --no-norm-adv"""
    pairs = ((name.replace("_", "-"), x) for name, x in values.items())
    return [y for k, x in pairs for y in ((f"--{'no-' * (not x)}{k}",) if isinstance(x, bool) else (f"--{k}", str(x)))]


@dataclass
class Side:
    name: str
    command: Callable[[int, int | None, Path], list[str]]  # of seed, steps (None: its own) and a folder to write in
    environment: dict[str, str]
    about: dict


def our_side(args: Args, preset: Preset | None, extra: list[str]) -> Side:
    flags = {"eval_episodes": 1, "device": args.device} | ({"torch_threads": args.threads} if args.threads else {})
    if args.peer and args.until is None:
        flags |= dict(zip(("num_envs", "num_steps", "num_minibatches", "update_epochs"), preset.work))
        flags |= dict(zip(("learning_rate", "clip_coef", "ent_coef"), preset.learning)) | SHARED | preset.flags
        flags |= {"anneal_lr": not args.peer_defaults, "clip_vloss": not args.peer_defaults}

    def command(seed: int, steps: int | None, folder: Path) -> list[str]:
        run = {"seed": seed, "run_dir": folder / "run"} | ({"total_timesteps": steps} if steps else {})
        return [sys.executable, str(args.script.absolute()), *to_flags(flags | run), *extra]

    return Side("ours", command, {}, {})


def peer_side(args: Args, preset: Preset) -> Side:
    python, until = os.path.abspath(shutil.which(args.peer_python)), args.until is not None
    atari, mujoco = "life_loss" in preset.flags, "norm_obs" in preset.flags
    environment = {"OMP_NUM_THREADS": str(args.threads)} if args.threads else {}
    environment |= {"PYTHONUNBUFFERED": "1"} if until else {}
    environment |= {"PYTHONPATH": str(args.peer_path.absolute())} if args.peer == "cleanrl" else {}
    needed = ["stable_baselines3"] * (args.peer == "sb3") + ["ale_py"] * atari + ["mujoco"] * mujoco
    probe = [python, "-c", PROBE, json.dumps(preset.env_ids), *needed]
    done = subprocess.run(probe, env=os.environ | environment, capture_output=True, text=True)
    if done.returncode:
        fail(f"{args.peer_python} lacks what {args.peer} needs", done.stderr)
    about = json.loads(done.stdout.splitlines()[-1])
    if about["env_id"] is None:
        fail(f"the Gymnasium of {args.peer_python} does not know {' or '.join(preset.env_ids)}")

    def cleanrl(seed: int, steps: int | None, folder: Path) -> list[str]:
        flags = {"env_id": about["env_id"], "seed": seed, "cuda": args.device == "cuda"}
        flags |= {"total_timesteps": steps} if steps else {}
        return [python, str(args.peer_path.absolute() / "cleanrl" / preset.cleanrl), *to_flags(flags)]

    def sb3(seed: int, steps: int | None, folder: Path) -> list[str]:
        (num_envs, num_steps, num_minibatches, epochs), (rate, clip, entropy) = preset.work, preset.learning
        own = {"n_steps": num_steps, "batch_size": num_envs * num_steps // num_minibatches, "n_epochs": epochs}
        own |= {"learning_rate": rate, "clip_range": clip, "clip_range_vf": clip, "ent_coef": entropy}
        job = {"env_id": about["env_id"], "seed": seed, "device": args.device, "steps": steps or preset.steps[1]}
        job |= {"atari": atari, "normalize": mujoco and not until, "print": until}
        job |= {"num_envs": 1, "own": {}} if until or args.peer_defaults else {"num_envs": num_envs, "own": own}
        return [python, "-c", SB3_DRIVER, json.dumps(job)]

    return Side(args.peer, cleanrl if args.peer == "cleanrl" else sb3, environment, about)


@contextmanager
def running(side: Side, seed: int, steps: int | None):
    """A run in a folder of its own. Afterwards, whatever happens, the folder is gone and so is the process."""
    with tempfile.TemporaryDirectory(prefix="speed-") as name, (Path(name) / "output").open("w") as output:
        command, environment = side.command(seed, steps, Path(name)), os.environ | side.environment
        files = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": subprocess.STDOUT}
        process = subprocess.Popen(command, cwd=name, env=environment, start_new_session=True, **files)
        try:
            yield process, Path(name)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def check(side: Side, process: subprocess.Popen, folder: Path) -> str:
    """The output of a run that has ended; if it failed, that is the end of us too."""
    output = (folder / "output").read_text(errors="replace")
    if process.returncode:
        fail(f"{side.name} ended with exit status {process.returncode}", output)
    return output


def measure_speed(side: Side, seed: int, steps: int) -> dict:
    began = time.perf_counter()
    with running(side, seed, steps) as (process, folder):
        process.wait()
        seconds = time.perf_counter() - began
        output = check(side, process, folder)
        if side.name == "ours":
            about, result = (json.loads((folder / "run" / x).read_text()) for x in ("args.json", "result.json"))
            side.about |= about | {x: about["args"][x] for x in ("env_id", "torch_threads")}
            return {"seed": seed, "steps": result["steps"], "sps": result["sps"], "process_seconds": seconds}
        printed = re.findall(r"^SPS: ([\d.]+)", output, re.M) or fail(f"{side.name} printed no SPS", output)
        return {"seed": seed, "steps": steps, "sps": float(printed[-1]), "process_seconds": seconds}


def measure_until(side: Side, seed: int, steps: int | None, goal: float) -> dict:
    ours, began, recent = side.name == "ours", time.perf_counter(), deque(maxlen=100)
    pattern = r"(\d+),([^,]+),([^,]+)," if ours else r"global_step=(\d+), (episodic)_return=\[?([^\]\s]+)"
    log, rest, start_up = None, "", math.inf
    with running(side, seed, steps) as (process, folder):
        path = folder / "run" / "episodes.csv" if ours else folder / "output"
        while True:
            ended = process.poll() is not None  # asked first, so that what it wrote last is still read
            log = log or (path.open(errors="replace") if path.exists() else None)
            *lines, rest = (rest + (log.read() if log else "")).split("\n")
            now = time.perf_counter() - began
            rows = [found.groups() for line in lines if (found := re.match(pattern, line))]
            if ours and rows:
                start_up = min(start_up, now - float(rows[-1][1]))  # never too short: the row was written before now
            for step, second, episode_return in rows:
                recent.append(float(episode_return))
                if len(recent) == 100 and np.mean(recent) >= goal:
                    return {"seed": seed, "steps": int(step), "seconds": start_up + float(second) if ours else now}
            if ended:
                output = check(side, process, folder)
                if not recent:
                    fail(f"{side.name} showed no episode", output)
                print(f"{side.name} ended at step {step} with a mean of {np.mean(recent):.1f}", file=sys.stderr)
                return {"seed": seed, "steps": int(step), "seconds": None}
            time.sleep(0.05)


def parse_args() -> tuple[Args, Preset | None, list[str]]:
    argv = sys.argv[1:]
    cut = argv.index("--") if "--" in argv else len(argv)
    args, extra = tyro.cli(Args, description=__doc__, args=argv[:cut]), argv[cut + 1 :]
    preset = PRESETS.get(args.script.stem)
    if not args.script.is_file():
        fail(f"there is no script {args.script}")
    if any(x is not None and x < 1 for x in (args.repeats, args.total_timesteps, args.threads)):
        fail("--repeats, --total-timesteps and --threads are at least 1")
    if preset is None and (args.peer or args.until is None and not args.total_timesteps):
        fail(f"only {', '.join(PRESETS)} have a preset; another script runs alone and needs --total-timesteps")
    if args.peer and not shutil.which(args.peer_python or ""):
        fail(f"--peer-python is {args.peer_python}, not a program; it takes a Python that can run {args.peer}")
    if args.peer == "cleanrl" and not (args.peer_path and (args.peer_path / "cleanrl" / preset.cleanrl).is_file()):
        fail(f"--peer-path is {args.peer_path}, which holds no cleanrl/{preset.cleanrl}")
    if args.json and not args.json.absolute().parent.is_dir():
        fail(f"--json is {args.json}, in a folder that does not exist")
    if args.peer == "sb3" and args.peer_defaults:
        preset = replace(preset, **SB3_DEFAULTS)
    return args, preset, extra


def columns(runs: dict[str, list[dict]], key: str) -> dict[str, np.ndarray]:
    """The measured numbers of each side, and the ratio of each pair: how many times as fast as the peer ours is."""
    found = {name: np.array([math.inf if x[key] is None else x[key] for x in rows]) for name, rows in runs.items()}
    if len(found) == 2:
        ours, peer = found.values()
        with np.errstate(invalid="ignore"):
            found["ratio"] = ours / peer if key == "sps" else peer / ours
    return found


def form(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.{2 if value < 10 else 1}f}"


def benchmark(args: Args, preset: Preset | None, extra: list[str]) -> None:
    if (load := os.getloadavg()[0]) > 0.5:
        print(f"warning: this machine has a load of {load:.1f}; only an idle one gives true numbers", file=sys.stderr)
    sides = [our_side(args, preset, extra)] + ([peer_side(args, preset)] if args.peer else [])
    rollout, steps, speed = (math.prod(preset.work[:2]) if args.peer else 1), args.total_timesteps, args.until is None
    if speed:  # whole rollouts, because one side would round up and another down
        steps = math.ceil((steps or preset.steps[0]) / rollout) * rollout
    for side in sides:
        measure_speed(side, 0, steps if speed else rollout)

    machine = sides[0].about
    print(f"{args.script.name} on {machine['cpu']}, {machine['cores']} cores, {machine['gpu'] or 'no GPU used'}")
    for side in sides:
        threads = f"torch threads {side.about['torch_threads']} ({'given' if args.threads else 'its default'})"
        versions = {k: v for k, v in side.about["versions"].items() if v and k not in ("python", "numpy", "Box2D")}
        print(f"{side.name:8}{side.about['env_id']}, {threads}, {', '.join(f'{k} {v}' for k, v in versions.items())}")
    if not speed:
        print(f"until   100 training episodes have a mean of {args.until:g}, each side at its own defaults")
    elif args.peer:
        print("work    {} environments x {} steps, {} minibatches, {} epochs".format(*preset.work) + preset.note)
    if extra:
        print(f"ours    besides has {shlex.join(extra)}")

    runs, titles = {side.name: [] for side in sides}, {"seconds": "to the return, s"}
    if speed:
        titles = {"sps": "training, steps/s", "process_seconds": "whole process, s"}
    for seed in range(1, args.repeats + 1):
        for side in sides:
            run = measure_speed(side, seed, steps) if speed else measure_until(side, seed, steps, args.until)
            runs[side.name].append(run)
        newest = columns(runs, list(titles)[0]).items()
        print(f"run {seed:<4}" + "   ".join(f"{name} {form(x[-1]):8}" for name, x in newest), flush=True)

    print(f"\n{'':26}{'min':>10}{'median':>10}{'max':>10}" + (f"   {steps:,} steps a run" if speed else ""))
    for key, title in titles.items():
        for name, x in columns(runs, key).items():
            print(f"{title:18}{name:8}" + "".join(f"{form(f(x)):>10}" for f in (np.min, np.median, np.max)))
    if args.json:
        about = {side.name: side.about | {"command": side.command(1, steps, Path("FOLDER"))} for side in sides}
        args.json.write_text(json.dumps({"args": asdict(args), "sides": about, "runs": runs}, indent=2, default=str))


def main() -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        benchmark(*parse_args())
    except KeyboardInterrupt:
        fail("stopped", code=130)


if __name__ == "__main__":
    main()
