"""Train with CleanRL or Stable-Baselines3 for speed.py, with the Python that has them. The job is JSON:

    python peer.py '{"script": ".../cleanrl/ppo.py", "env_ids": ["CartPole-v1"], "flags": ["--seed", "1"], ...}'

Prints environment and versions as JSON, then "SPS: n"; CleanRL's scripts print that after each rollout or so.
"""

import contextlib
import importlib
import inspect
import json
import runpy
import sys
import time
from pathlib import Path

import gymnasium
import torch


def cleanrl(job: dict, env_id: str) -> None:
    script = Path(job["script"])
    sys.path.insert(0, str(script.parent.parent))
    sys.argv = [str(script), "--env-id", env_id, "--seed", str(job["seed"]), "--total-timesteps", str(job["steps"])]
    sys.argv += ["--cuda" if job["device"] == "cuda" else "--no-cuda", *job["flags"]]
    runpy.run_path(str(script), run_name="__main__")


def sb3(job: dict, env_id: str) -> None:
    from stable_baselines3.common.env_util import make_atari_env, make_vec_env
    from stable_baselines3.common.vec_env import VecFrameStack, VecNormalize

    module, _, name = job["algorithm"].rpartition(".")
    algorithm, is_atari = getattr(importlib.import_module(module), name), "NoFrameskip" in env_id
    env = (make_atari_env if is_atari else make_vec_env)(env_id, job["num_envs"], job["seed"])
    env = VecFrameStack(env, 4) if is_atari else VecNormalize(env) if job["normalize"] else env
    known = inspect.signature(algorithm).parameters
    arguments = {name: value for name, value in job["arguments"].items() if name in known}
    if job["anneal"]:
        initial = arguments["learning_rate"]
        arguments["learning_rate"] = lambda left: left * initial
    arguments |= {"policy": "CnnPolicy" if is_atari else "MlpPolicy", "seed": job["seed"], "device": job["device"]}
    model = algorithm(env=env, **arguments)
    if first := arguments.get("learning_starts", 0):
        model.learn(first)  # random actions, which do not count
    started = time.perf_counter()
    model.learn(job["steps"] - first, reset_num_timesteps=False)
    print("SPS:", (job["steps"] - first) / (time.perf_counter() - started))


def main() -> None:
    job, versions = json.loads(sys.argv[1]), {"torch": torch.__version__, "gymnasium": gymnasium.__version__}
    for name in "stable_baselines3", "mujoco", "ale_py":
        with contextlib.suppress(ImportError):  # in old Gymnasium, importing ale_py registers its environments
            versions[name] = importlib.import_module(name).__version__
    if "ale_py" in versions and hasattr(gymnasium, "register_envs"):
        gymnasium.register_envs(sys.modules["ale_py"])
    if job["threads"]:
        torch.set_num_threads(job["threads"])
    env_id = next(env_id for env_id in job["env_ids"] if env_id in gymnasium.registry)
    about = {"env_id": env_id, "threads": torch.get_num_threads(), "versions": versions}
    print("PEER", json.dumps(about), flush=True)
    cleanrl(job, env_id) if "script" in job else sb3(job, env_id)


if __name__ == "__main__":
    main()
