"""Train a class of Stable-Baselines3 for benchmark/speed.py, with the Python that it is installed in.

    python sb3.py '{"algorithm": "PPO", "env_ids": ["CartPole-v1"], "arguments": {"n_steps": 128}, ...}'

Prints the versions as JSON before, and "SPS: n" after training.
"""

import contextlib
import importlib
import inspect
import json
import sys
import time

import gymnasium
import stable_baselines3
import torch
from stable_baselines3.common.env_util import make_atari_env, make_vec_env
from stable_baselines3.common.vec_env import VecFrameStack, VecNormalize

job = json.loads(sys.argv[1])
if job["threads"]:
    torch.set_num_threads(job["threads"])
versions = {"stable_baselines3": stable_baselines3.__version__, "torch": torch.__version__}
versions["gymnasium"] = gymnasium.__version__
for name in "mujoco", "ale_py":
    with contextlib.suppress(ImportError):
        versions[name] = importlib.import_module(name).__version__
if "ale_py" in versions:
    gymnasium.register_envs(sys.modules["ale_py"])
env_id = next(env_id for env_id in job["env_ids"] if env_id in gymnasium.registry)
about = {"env_id": env_id, "threads": torch.get_num_threads(), "versions": versions}
print("PEER", json.dumps(about), flush=True)

is_atari = "NoFrameskip" in env_id
make = make_atari_env if is_atari else make_vec_env
env = make(env_id, job["num_envs"], job["seed"])
env = VecFrameStack(env, 4) if is_atari else VecNormalize(env) if job["normalize"] else env
algorithm = getattr(stable_baselines3, job["algorithm"])
known = inspect.signature(algorithm).parameters
arguments = {name: value for name, value in job["arguments"].items() if name in known}
if job["anneal"]:
    initial = arguments["learning_rate"]
    arguments["learning_rate"] = lambda left: left * initial
policy = "CnnPolicy" if is_atari else "MlpPolicy"
model = algorithm(policy, env, seed=job["seed"], device=job["device"], **arguments)
started = time.perf_counter()
model.learn(job["steps"])
print("SPS:", model.num_timesteps / (time.perf_counter() - started))
