"""benchmark/gallery.py, with scripts whose videos are noise; and the videos in docs/."""

import pandas as pd
from PIL import Image
from tools import ROOT, finish

from benchmark import gallery
from benchmark.runs import Spec

SCRIPT = """
class Args:
    seed: int = 1
import sys; from pathlib import Path; import imageio.v3 as imageio; import numpy as np
folder = Path(sys.argv[sys.argv.index("--evaluate") + 1])
if "Acrobot" in folder.name: sys.exit("error: an old interface")
(folder / "videos").mkdir()
pixels = np.random.default_rng(0).integers(0, 256, (50, 64, 96, 3), np.uint8)
imageio.imwrite(folder / "videos" / f"seed{folder.name[-1]}.mp4", pixels, plugin="FFMPEG", fps=24, macro_block_size=2)
"""
RUNS = [("ppo", "CartPole-v1", 1, 300.0), ("ppo", "CartPole-v1", 2, 400.0), ("dqn", "CartPole-v1", 1, 450.0)]
RUNS += [("dqn", "CartPole-v1", 2, 350.0), ("dqn_per", "Acrobot-v1", 1, -80.0), ("ppo", "InNoSuite-v0", 1, 9.0)]


def test_the_best_run_is_shown_and_one_that_fails_is_left_out(tmp_path, monkeypatch, capsys):
    """On an environment, and of a script that is the best on none. 50 frames at 24 a second are 21 at 10."""
    for script, env, seed, score in RUNS:
        (tmp_path / f"{script}.py").write_text(SCRIPT)
        flags = {"env_id": env, "total_timesteps": 300_000 if env == "Acrobot-v1" else 200_000, "seed": seed}
        finish(Spec(tmp_path / f"{script}.py", flags, tmp_path / "classic" / f"{env}__{script}__{seed}"), [score] * 200)
    monkeypatch.setattr(gallery, "LARGEST", 50_000)
    gallery.main(tmp_path, tmp_path / "videos")
    assert "Acrobot-v1__dqn_per__1: error: an old interface" in capsys.readouterr().err
    shown = pd.read_csv(tmp_path / "videos" / "videos.csv")[["name", "script", "seed", "eval_mean"]]
    assert shown.values.tolist() == [["CartPole-v1", "dqn", 1, 450.0], ["ppo", "ppo", 2, 400.0]]
    for name in shown["name"]:
        path = tmp_path / "videos" / f"{name}.webp"
        assert path.stat().st_size <= 50_000 and 20 <= Image.open(path).n_frames <= 24


def test_the_videos_in_docs_are_small_and_listed():
    sizes = {path.stem: path.stat().st_size for path in (ROOT / "docs" / "videos").glob("*.webp")}
    assert sizes.keys() == set(pd.read_csv(ROOT / "docs" / "videos" / "videos.csv")["name"])
    assert max(sizes.values()) <= gallery.LARGEST and sum(sizes.values()) <= 4_000_000
