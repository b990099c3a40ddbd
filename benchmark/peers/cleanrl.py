"""Run a script of a CleanRL checkout for benchmark/speed.py, with the Python that CleanRL is installed in.

    python cleanrl.py '{"script": ".../cleanrl/ppo.py", "env_ids": ["CartPole-v1"], "flags": ["--seed", "1"], ...}'

Prints the versions as JSON; the script itself prints "SPS: n" after each rollout or so.
"""

import contextlib
import importlib
import json
import runpy
import sys
from pathlib import Path

import gymnasium
import torch

job = json.loads(sys.argv[1])
if job["threads"]:
    torch.set_num_threads(job["threads"])
versions = {"torch": torch.__version__, "gymnasium": gymnasium.__version__}
for name in "mujoco", "ale_py":
    with contextlib.suppress(ImportError):  # importing ale_py registers its environments
        versions[name] = importlib.import_module(name).__version__
env_id = next(env_id for env_id in job["env_ids"] if env_id in gymnasium.registry)
about = {"env_id": env_id, "threads": torch.get_num_threads(), "versions": versions}
print("PEER", json.dumps(about), flush=True)
script = Path(job["script"])
sys.path.insert(0, str(script.parent.parent))
sys.argv = [str(script), "--env-id", env_id, "--seed", str(job["seed"]), "--total-timesteps", str(job["steps"])]
sys.argv += ["--cuda" if job["device"] == "cuda" else "--no-cuda", *job["flags"]]
runpy.run_path(str(script), run_name="__main__")
