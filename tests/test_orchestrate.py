"""A machine that only orchestrates has neither PyTorch nor simulators: docs/cloud.md."""

from tools import ROOT, run

HEAVY = ["torch", "gymnasium", "mujoco", "ale_py", "Box2D", "imageio", "tensorboard", "safetensors"]
BLOCK = f"""
import sys
class Block:
    def find_spec(name, path=None, target=None):
        if name.split(".")[0] in {HEAVY}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Block)
"""


def test_without_torch_everything_but_the_scripts_works():
    paths = [path for folder in ("benchmark", "cloud", "tuner") for path in (ROOT / folder).glob("*.py")]
    apart = "environments", "peer", "track"
    modules = [f"{path.parent.name}.{path.stem}" for path in paths if path.stem not in apart]
    run("-c", f"{BLOCK}import {', '.join(modules)}")
    words = "sys.argv = ['run.py', 'smoke', '--dry-run', '--runs-dir', '/missing']"
    assert "--env-id" in run("-c", f"{BLOCK}{words}; from benchmark.run import main; main()").stdout
