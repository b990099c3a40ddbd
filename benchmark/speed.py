"""Steps per second of a script, alone or beside CleanRL or Stable-Baselines3 at equal work.

    python benchmark/speed.py algos/ppo.py --peer cleanrl --peer-path CHECKOUT --peer-python VENV/bin/python
    python benchmark/speed.py algos/ppo.py --peer sb3 --peer-python VENV/bin/python --threads 1 --save
    python benchmark/speed.py algos/ppo_atari.py --peer sb3 --peer-python VENV/bin/python -- --no-bf16   # flags of ours

Our script and the peer run in turn, one at a time, with CleanRL's hyperparameters (peer.toml). Each pair gives
a ratio: above 1, ours is faster. The first pair is a warm-up and does not count. Only an otherwise idle machine gives
true numbers. What counts is training, without start-up: ours by result.json; CleanRL's by the last SPS that it prints;
Stable-Baselines3's around learn(). Random steps before the first update do not count, but CleanRL's few take time.

--save adds the result to benchmark/results/speed.csv, which docs/speed.md shows.
"""

import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import tyro

from benchmark import runs
from benchmark.runs import ROOT, fail, words_of

PEER, SAVED = Path(__file__).resolve().parent / "peer.py", ROOT / "benchmark" / "results" / "speed.csv"
PRESETS = tomllib.loads(PEER.with_suffix(".toml").read_text())
SB3_NAMES = PRESETS.pop("sb3_names")


@dataclass
class Args:
    script: tyro.conf.Positional[Path]  # our script
    peer: Literal["cleanrl", "sb3"] | None = None  # what to run beside it
    peer_path: Path = Path("cleanrl")  # folder of a CleanRL checkout
    peer_python: str = sys.executable  # a Python with what the peer needs
    total_timesteps: int = 0  # steps of a run; default: the preset's
    repeats: int = 3  # pairs that count
    threads: int = 0  # CPU threads of PyTorch on both sides; 0: each side's own default
    device: Literal["cpu", "cuda"] = "cpu"  # device of both sides
    save: bool = False  # add the result to benchmark/results/speed.csv


def our_command(args: Args, preset: dict | None, seed: int, steps: int, folder: Path, extra: list[str]) -> list[str]:
    flags = {"seed": seed, "total_timesteps": steps, "run_dir": folder / "run", "eval_episodes": 1}
    flags |= {"device": args.device, "checkpoint_every": 10**9}  # the peers save none
    flags |= {"torch_threads": args.threads} if args.threads else {}
    if preset and args.peer:
        flags |= {"env_id": preset.get("env_id", preset["env_ids"][0])} | preset["flags"]
    return [sys.executable, str(args.script.absolute()), *words_of(flags), *extra]


def peer_command(args: Args, preset: dict, seed: int, steps: int) -> list[str]:
    job = {"env_ids": preset["env_ids"], "seed": seed, "steps": steps, "threads": args.threads, "device": args.device}
    if args.peer == "cleanrl":
        job["script"] = str((args.peer_path / "cleanrl" / preset["cleanrl"]).absolute())
        job["flags"] = words_of(preset.get("cleanrl_flags", {}))
    else:
        flags = preset["flags"]
        job["algorithm"] = preset.get("sb3_class", "stable_baselines3." + args.script.stem.split("_")[0].upper())
        job["arguments"] = {SB3_NAMES.get(name, name): value for name, value in flags.items()}
        job["arguments"] |= preset.get("sb3", {})
        if "num_minibatches" in flags:
            job["arguments"]["batch_size"] = flags["num_envs"] * flags["num_steps"] // flags["num_minibatches"]
            job["arguments"]["clip_range_vf"] = flags["clip_coef"]
        job |= {"num_envs": flags["num_envs"], "normalize": "norm_obs" in flags, "anneal": flags["anneal_lr"]}
    return [args.peer_python, str(PEER), json.dumps(job)]


def start(command: list[str], folder: Path) -> str:
    """The output of a command that has ended well."""
    done = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        end = "\n  ".join(line for line in done.stdout.splitlines() if line.strip())[-1500:]
        fail(f"{Path(command[1]).name} ended with exit code {done.returncode}:\n  {end}")
    return done.stdout


def measure_ours(args: Args, preset: dict | None, seed: int, steps: int, extra: list[str]) -> tuple[float, dict]:
    """Steps per second after the first update, and args.json."""
    with tempfile.TemporaryDirectory() as name:
        start(our_command(args, preset, seed, steps, Path(name), extra), Path(name))
        about, result = runs.read_args(Path(name) / "run"), runs.read_result(Path(name) / "run")
        sps = result["sps"]
        if first := about["args"].get("learning_starts"):
            rows = runs.read_episodes(Path(name) / "run").query(f"step > {first}")
            if len(rows) < 2:
                fail("fewer than two episodes ended after the first update; raise --total-timesteps")
            sps = np.ptp(rows["step"]) / np.ptp(rows["seconds"])
    return float(sps), about


def measure_peer(args: Args, preset: dict, seed: int, steps: int) -> tuple[float, dict]:
    with tempfile.TemporaryDirectory() as name:
        output = start(peer_command(args, preset, seed, steps), Path(name))
    about = json.loads(re.search("^PEER (.*)", output, re.M)[1])
    sps = float(re.findall(r"^SPS: ([\d.]+)", output, re.M)[-1])
    first = preset["flags"].get("learning_starts", 0) * (args.peer == "cleanrl")  # Stable-Baselines3's are left out
    return sps * (1 - first / steps), about


def main() -> None:
    at = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    args, extra = tyro.cli(Args, description=__doc__, args=sys.argv[1:at]), sys.argv[at + 1 :]
    preset = PRESETS.get(args.script.stem)
    if not args.script.is_file():
        fail(f"no script {args.script}")
    if min(args.repeats, args.threads + 1, args.total_timesteps + 1) < 1:
        fail("--repeats must be at least 1, --threads and --total-timesteps at least 0")
    if preset is None and (args.peer or not args.total_timesteps):
        fail(f"only {', '.join(PRESETS)} have a preset; another script runs alone, with --total-timesteps")
    if args.peer == "cleanrl" and not (args.peer_path / "cleanrl" / preset.get("cleanrl", "none")).is_file():
        fail(f"--peer-path {args.peer_path} has no {preset.get('cleanrl', 'counterpart')} in cleanrl/")
    if args.save and not args.peer:
        fail("--save needs a --peer")
    rollout = preset["flags"]["num_envs"] * preset["flags"].get("num_steps", 1) if args.peer else 1
    steps = math.ceil((args.total_timesteps or preset["steps"]) / rollout) * rollout  # whole rollouts on both sides
    if (load := os.getloadavg()[0]) > 0.5:
        print(f"warning: this machine has a load of {load:.1f}; only an idle one gives true numbers", file=sys.stderr)

    pairs = []
    for seed in range(args.repeats + 1):
        ours, about = measure_ours(args, preset, seed, steps, extra)
        theirs, peer = measure_peer(args, preset, seed, steps) if args.peer else (math.nan, {})
        pairs.append((ours, theirs, ours / theirs))
        ratio = f"  {args.peer} {theirs:,.0f}  ratio {ours / theirs:.2f}" if args.peer else ""
        print(f"{f'run {seed}' if seed else 'warm-up'}  ours {ours:,.0f} steps/s{ratio}", flush=True)
    ours, theirs, ratios = np.array(pairs[1:]).T
    machine = f"{about['cpu']} {about['gpu'] or ''}, threads {about['threads']}"
    print(f"{args.script.name}: median {np.median(ours):,.0f} steps/s, {steps:,} steps a run, {machine}")
    if args.peer:
        middle, low, high = np.median(ratios), ratios.min(), ratios.max()
        versions = ", ".join(f"{name} {version}" for name, version in peer["versions"].items())
        theirs_is = f"{args.peer}: {peer['env_id']}, threads {peer['threads']}, {versions}"
        print(f"ratio {middle:.2f} [{low:.2f}, {high:.2f}]; {theirs_is}")
        print(f"not equal: {preset.get('note', 'nothing known')}")
    if args.save:
        title = {"cleanrl": "CleanRL", "sb3": "Stable-Baselines3"}[args.peer]
        row = {"script": args.script.stem, "env": peer["env_id"], "device": args.device, "peer": title}
        version = peer["versions"]["stable_baselines3"] if args.peer == "sb3" else ""  # CleanRL has none
        row |= {"version": version, "threads": about["threads"], "steps": steps}
        row |= {"pairs": args.repeats, "flags": " ".join(extra), "ours": np.median(ours), "theirs": np.median(theirs)}
        row |= {"ratio": middle, "ratio_min": low, "ratio_max": high, "cpu": about["cpu"], "gpu": about["gpu"]}
        row |= {"commit": about["commit"], "date": time.strftime("%Y-%m-%d")}
        rows = [pd.read_csv(SAVED, keep_default_na=False)] if SAVED.exists() else []
        pd.concat([*rows, pd.DataFrame([row])], ignore_index=True).to_csv(SAVED, index=False, float_format="%.5g")


if __name__ == "__main__":
    main()
