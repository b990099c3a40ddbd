"""Steps per second of a script, alone or against another library that does the same work.

    python benchmark/speed.py algos/ppo.py
    python benchmark/speed.py algos/ppo.py --peer cleanrl --peer-path CHECKOUT --peer-python VENV/bin/python
    python benchmark/speed.py algos/ppo.py --peer sb3 --peer-python VENV/bin/python --until 475 --json speed.json
    python benchmark/speed.py algos/ppo_atari.py --repeats 3 -- --no-bf16       # what follows -- goes to our script
    python benchmark/speed.py algos/sac_continuous.py --repeats 1 --profile     # and where the time goes

Each run is a process of its own, one at a time, after a warm-up of each side that is not counted; run i has seed i.
Nothing else should be running on the machine.

Speed (the default): alone, our script has its own defaults. With a peer the runs alternate, each pair gives a ratio,
and our script is given the hyperparameters of CleanRL's script (PRESETS). Stable-Baselines3 has no scripts; a few lines
here call its class with the same ones, or, with --peer-defaults (PPO), both sides have those of its constructor.
"Training" is without start-up and imports: ours by result.json; CleanRL's by the last SPS it prints (all steps over the
time since just before its first reset); SB3's around learn(). The peers save no checkpoints; those of a script in
PRESETS are as far apart as in a run of CleanRL's length, so a short run has none. Where a replay is filled first, the
steps before the first update do not count: ours is measured from the end of the first episode after it to the end of
the last, which also leaves out the time in which --compile compiles; of a peer these steps are subtracted, and their
time, a thousandth, is not. "Whole process" is from outside; of ours it includes saving the agent and one evaluation
episode.

--profile: one more run of ours, with a timer at the calls that part its loop. "environment" is envs.step; "acting" all
that leads to it; "replay" adding and drawing transitions; "update" all that leads to a step of an optimiser or of a
target network; "rest" statistics, curves, checkpoints. What happens once, such as compiling, is over by the time that
the counting begins: after a tenth of the run, and after twice the steps before the first update.

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
from dataclasses import asdict, dataclass, field, replace
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
    profile: bool = False
    """show where our script spends its time"""
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
    flags: dict  # of ours, and of SB3's constructor as far as it has them: CleanRL's defaults
    changed: tuple[str, ...] = ()  # but for these, which CleanRL's script is given too
    sb3: dict = field(default_factory=dict)  # more arguments of SB3's constructor
    note: str = ""  # what is not equal


CARTPOLE, CHEETAH, PONG = ("CartPole-v1",), ("HalfCheetah-v5", "HalfCheetah-v4"), ("PongNoFrameskip-v4",)
PPO = {"gamma": 0.99, "gae_lambda": 0.95, "vf_coef": 0.5, "max_grad_norm": 0.5, "norm_adv": True}
PPO_1 = PPO | {"num_minibatches": 4, "update_epochs": 4, "ent_coef": 0.01, "anneal_lr": True, "clip_vloss": True}
PPO_2 = PPO | {"num_envs": 1, "num_steps": 2048, "num_minibatches": 32, "update_epochs": 10}
PPO_2 |= {"learning_rate": 3e-4, "clip_coef": 0.2, "ent_coef": 0.0}
OFF_POLICY = {"num_envs": 1, "gradient_steps": 1, "anneal_lr": False, "gamma": 0.99}
PRESETS = {
    "ppo": Preset(
        *("ppo.py", CARTPOLE, (100_000, 500_000)),
        PPO_1 | {"num_envs": 4, "num_steps": 128, "learning_rate": 2.5e-4, "clip_coef": 0.2},
    ),
    "ppo_continuous": Preset(
        *("ppo_continuous_action.py", CHEETAH, (50_000, 1_000_000)),
        PPO_2
        | {"anneal_lr": True, "clip_vloss": True, "hidden_size": 64, "log_std_init": 0.0}
        | {"norm_obs": True, "norm_reward": True},
    ),
    "ppo_atari": Preset(
        *("ppo_atari.py", PONG, (20_000, 10_000_000)),
        PPO_1 | {"num_envs": 8, "num_steps": 128, "learning_rate": 2.5e-4, "clip_coef": 0.1, "life_loss": True},
        note="ours: sticky actions, ALE's native vector environment, normalised pixels (unless -- --no-norm-obs), "
        "bfloat16 convolutions (unless -- --no-bf16)",
    ),
    "dqn": Preset(
        *("dqn.py", CARTPOLE, (100_000, 500_000)),
        OFF_POLICY
        | {"batch_size": 128, "train_frequency": 10, "target_network_frequency": 500, "tau": 1.0}
        | {"buffer_size": 10_000, "learning_rate": 2.5e-4, "start_e": 1.0, "end_e": 0.05, "exploration_fraction": 0.5}
        | {"learning_starts": 128, "hidden_size": 101},
        changed=("learning_starts",),
        sb3={"policy_kwargs": {"net_arch": [120, 84]}},
        note="hidden layers: ours of 101 and 101, theirs of 120 and 84, as many weights; SB3 clips the gradient's norm",
    ),
    "sac_continuous": Preset(
        *("sac_continuous_action.py", CHEETAH, (5_000, 1_000_000)),
        OFF_POLICY
        | {"batch_size": 256, "train_frequency": 1, "policy_lr": 3e-4, "q_lr": 1e-3, "tau": 0.005}
        | {"buffer_size": 1_000_000, "autotune": True, "learning_starts": 256, "hidden_size": 256},
        changed=("learning_starts",),
        note="CleanRL updates its actor twice every second step",
    ),
}
SB3_NAMES = {  # our flag: what SB3's constructors call it, where that is another name
    "num_steps": "n_steps",
    "update_epochs": "n_epochs",
    "clip_coef": "clip_range",
    "policy_lr": "learning_rate",
    "train_frequency": "train_freq",
    "target_network_frequency": "target_update_interval",
    "start_e": "exploration_initial_eps",
    "end_e": "exploration_final_eps",
}

PROBE = """
import importlib, json, sys, gymnasium, torch
found = {name: importlib.import_module(name).__version__ for name in ("torch", "gymnasium", *sys.argv[2:])}
if "ale_py" in found and hasattr(gymnasium, "register_envs"):
    gymnasium.register_envs(sys.modules["ale_py"])
known = [name for name in json.loads(sys.argv[1]) if name in gymnasium.registry]
print(json.dumps({"env_id": (known or [None])[0], "torch_threads": torch.get_num_threads(), "versions": found}))
"""

SB3_DRIVER = """
import inspect, json, sys, time, gymnasium, stable_baselines3
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
algorithm, policy = getattr(stable_baselines3, job["algorithm"]), "CnnPolicy" if job["atari"] else "MlpPolicy"
own = {name: value for name, value in job["own"].items() if name in inspect.signature(algorithm).parameters}
if job["anneal"]:
    rate = own["learning_rate"]
    own["learning_rate"] = lambda left: left * rate
model = algorithm(policy, env, seed=job["seed"], device=job["device"], **own)
started = time.perf_counter()
model.learn(job["steps"], callback=episodes if job["print"] else None)
print("SPS:", model.num_timesteps / (time.perf_counter() - started))
"""

PROFILER = """
import functools, importlib.util, json, sys, time, torch
from torch.optim.optimizer import register_optimizer_step_post_hook

spent, last = dict.fromkeys(("environment", "acting", "replay", "update", "rest"), 0.0), 0.0
first = None  # step at which the counting begins

def mark(part):  # what has passed since the last mark went into this part
    global last
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    now = time.perf_counter()
    spent[part], last = spent[part] + now - last, now

def mark_calls(owner, name, before, part):
    function = getattr(owner, name)
    @functools.wraps(function)
    def marked(*args, **kwargs):
        mark(before)
        result = function(*args, **kwargs)
        mark(part)
        return result
    setattr(owner, name, marked)

sys.argv = sys.argv[1:]
spec = importlib.util.spec_from_file_location("script", sys.argv[0])
script = sys.modules["script"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)
start_envs, record = script.start_envs, script.Run.record

def start_marked_envs(*args, **kwargs):
    envs, obs = start_envs(*args, **kwargs)
    mark_calls(envs, "step", "acting", "environment")
    return envs, obs

def record_marked(run, step, *args):
    global first
    mark("acting")
    record(run, step, *args)
    mark("rest")
    if first is None and step > max(run.args.total_timesteps / 10, 2 * getattr(run.args, "learning_starts", 0)):
        first = step
        spent.update(dict.fromkeys(spent, 0.0))

def finish(run, step, envs):
    mark("rest")
    run.bar.close()
    print(json.dumps({"steps": step - first, "spent": spent}))
    raise SystemExit

script.start_envs, script.Run.record, script.Run.finish = start_marked_envs, record_marked, finish
mark_calls(script, "start_envs", "rest", "rest")
mark_calls(script.Run, "log", "update", "rest")
mark_calls(script.Run, "checkpoint", "rest", "rest")
for owner in (x for name, x in list(vars(script).items()) if "Replay" in name and isinstance(x, type)):
    for name in (x for x in vars(owner) if x in ("add", "sample", "batch") or x.startswith("update")):
        mark_calls(owner, name, "replay", "replay")
if hasattr(script, "update_target"):
    mark_calls(script, "update_target", "update", "update")
register_optimizer_step_post_hook(lambda *_: mark("update"))
script.main()
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
    learning_starts: int = 0  # steps of a peer before its first update


def our_side(args: Args, preset: Preset | None, extra: list[str]) -> Side:
    flags = {"eval_episodes": 1, "device": args.device} | ({"torch_threads": args.threads} if args.threads else {})
    if args.peer and preset.env_ids != PONG:  # our id of Pong is another one, and the script's default
        flags["env_id"] = preset.env_ids[0]
    if preset and args.until is None:
        flags["checkpoint_every"] = preset.steps[1] // 10
    if args.peer and args.until is None:
        flags |= preset.flags

    def command(seed: int, steps: int | None, folder: Path) -> list[str]:
        run = {"seed": seed, "run_dir": folder / "run"} | ({"total_timesteps": steps} if steps else {})
        return [sys.executable, str(args.script.absolute()), *to_flags(flags | run), *extra]

    return Side("ours", command, {}, {})


def peer_side(args: Args, preset: Preset) -> Side:
    python, until = os.path.abspath(shutil.which(args.peer_python)), args.until is not None
    flags, atari, mujoco = preset.flags, preset.env_ids == PONG, preset.env_ids == CHEETAH
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
        own = {"env_id": about["env_id"], "seed": seed, "cuda": args.device == "cuda"}
        own |= {"total_timesteps": steps} if steps else {}
        own |= {} if until else {name: flags[name] for name in preset.changed}
        return [python, str(args.peer_path.absolute() / "cleanrl" / preset.cleanrl), *to_flags(own)]

    def sb3(seed: int, steps: int | None, folder: Path) -> list[str]:
        own = {SB3_NAMES.get(name, name): value for name, value in flags.items()} | preset.sb3
        if "num_minibatches" in flags:
            own["batch_size"] = flags["num_envs"] * flags["num_steps"] // flags["num_minibatches"]
            own["clip_range_vf"] = flags["clip_coef"]
        is_default = until or args.peer_defaults
        job = {"algorithm": args.script.stem.split("_")[0].upper(), "env_id": about["env_id"], "device": args.device}
        job |= {"seed": seed, "steps": steps or preset.steps[1], "print": until, "atari": atari}
        job |= {"normalize": "norm_obs" in flags and not until, "anneal": flags["anneal_lr"] and not is_default}
        job |= {"num_envs": 1, "own": {}} if is_default else {"num_envs": flags["num_envs"], "own": own}
        return [python, "-c", SB3_DRIVER, json.dumps(job)]

    command = cleanrl if args.peer == "cleanrl" else sb3
    return Side(args.peer, command, environment, about, flags.get("learning_starts", 0))


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
            side.about |= about | {"env_id": about["args"]["env_id"], "torch_threads": about["threads"]}
            sps = result["sps"]
            if first := about["args"].get("learning_starts"):
                rows = [row.split(",")[:2] for row in (folder / "run" / "episodes.csv").read_text().splitlines()[1:]]
                ends = np.array([(step, second) for step, second in rows if int(step) > first], float)
                if len(ends) < 2 or ends[-1, 1] == ends[0, 1]:
                    fail("too few episodes ended after the first update; give it more --total-timesteps")
                sps = float(np.divide(*(ends[-1] - ends[0])))
            return {"seed": seed, "steps": result["steps"], "sps": sps, "process_seconds": seconds}
        printed = re.findall(r"^SPS: ([\d.]+)", output, re.M) or fail(f"{side.name} printed no SPS", output)
        sps = float(printed[-1]) + 0.5 * (side.name == "cleanrl")  # which cuts it to a whole number
        return {
            "seed": seed,
            "steps": steps,
            "sps": sps * (1 - side.learning_starts / steps),
            "process_seconds": seconds,
        }


def show_profile(side: Side, steps: int) -> None:
    def command(*run) -> list[str]:
        python, *words = side.command(*run)
        return [python, "-c", PROFILER, *words]

    with running(replace(side, command=command), 1, steps) as (process, folder):
        process.wait()
        found = json.loads(check(side, process, folder).splitlines()[-1])
    total = sum(found["spent"].values())
    print(f"\nwhere the time goes{'share':>17}{'µs a step':>12}   with a timer: {found['steps'] / total:,.0f} steps/s")
    for name, seconds in found["spent"].items():
        print(f"{name:26}{seconds / total:>10.1%}{1e6 * seconds / found['steps']:>12.1f}")


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
        if not args.script.stem.startswith("ppo"):
            fail("--peer-defaults is for the scripts of PPO")
        preset = replace(preset, flags=preset.flags | PPO_2 | {"anneal_lr": False, "clip_vloss": False})
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
    rollout = preset.flags["num_envs"] * preset.flags.get("num_steps", 1) if args.peer else 1
    steps, speed = args.total_timesteps, args.until is None
    if speed:  # whole rollouts, because one side would round up and another down
        steps = math.ceil((steps or preset.steps[0]) / rollout) * rollout
    for side in sides:
        measure_speed(side, 0, steps if speed else rollout)

    machine = sides[0].about
    print(f"{args.script.name} on {machine['cpu']}, {os.cpu_count()} cores, {machine['gpu'] or 'no GPU used'}")
    for side in sides:
        threads = f"torch threads {side.about['torch_threads']} ({'given' if args.threads else 'its default'})"
        names = "torch", "gymnasium", "mujoco", "ale-py", "ale_py", "stable_baselines3"
        versions = ", ".join(f"{k} {v}" for k, v in side.about["versions"].items() if k in names)
        print(f"{side.name:8}{side.about['env_id']}, {threads}, {versions}")
    if not speed:
        print(f"until   100 training episodes have a mean of {args.until:g}, each side at its own defaults")
    elif args.peer:
        print(f"ours    has {shlex.join(to_flags(preset.flags))}")
        print(f"unequal {preset.note or 'nothing that is known'}")
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
    if args.profile:
        show_profile(sides[0], steps)
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
