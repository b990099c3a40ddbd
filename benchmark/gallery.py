"""Record trained agents for the documentation, as looping WebP files in docs/videos/: python benchmark/gallery.py

{env}.webp: the first seconds of the best run by evaluation on an environment of the suites. {script}.webp: that of a
script in none of these. videos.csv lists them. They stay without their runs; a run folder keeps the MP4 of the episode.
"""

import os
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pandas as pd
import tyro

from benchmark import results, runs, suites

FIRST = "HalfCheetah-v5 LunarLander-v3 Ant-v5 BipedalWalker-v3 Walker2d-v5 MountainCar-v0 Hopper-v5 CartPole-v1".split()
CAMERA = "--env-kwargs camera_name track width 360 height 240".split()  # Gymnasium 1.4's own one does not follow
FRAMES, FPS, LARGEST = 60, 10, 150_000  # of a video; bytes of its file
TRIES = (240, 75), (240, 50), (240, 25), (240, 10), (200, 10), (120, 10), (60, 0)  # width, quality; until it fits


def choose(table: pd.DataFrame) -> pd.DataFrame:
    best = table.sort_values(["eval_mean", "final_return"]).drop_duplicates(["env", "script"], keep="last")
    best["rank"] = [FIRST.index(env) if env in FIRST else len(FIRST) for env in best["env"]]
    best["name"] = best["env"].str.rpartition(":")[2].str.replace("/", "-")
    first = best.drop_duplicates("env", keep="last")
    others = best[~best["script"].isin(first["script"])].sort_values("rank").drop_duplicates("script")
    return pd.concat([first, others.assign(name=others["script"])]).sort_values(["rank", "name"])


def record(folder: Path, script: str, seed: int) -> list:
    """Images of PIL, which a machine without the scripts' packages may lack."""
    import imageio.v3 as imageio
    from PIL import Image

    path, env = folder / "videos" / f"seed{seed}.mp4", os.environ | {"PYTHONPATH": str(runs.ROOT)}
    if not path.exists():
        words = [folder / f"{script}.py", "--evaluate", folder, "--video", "--eval-episodes=1", "--device=cpu"]
        words += CAMERA * (folder.parent.name in ("mujoco", "off-policy"))
        errors = subprocess.run([sys.executable, *words], capture_output=True, text=True, env=env).stderr
        if not path.exists():
            raise ValueError(errors.strip().rpartition("\n")[2])
    return [Image.fromarray(x) for x in islice(imageio.imiter(path, plugin="FFMPEG", fps=FPS), FRAMES)]


def save(frames: list, path: Path) -> None:
    for width, quality in TRIES:
        first, *rest = (frame.resize((width, width * frame.height // frame.width)) for frame in frames)
        first.save(path, save_all=True, append_images=rest, duration=1000 // FPS, loop=0, quality=quality)
        if path.stat().st_size <= LARGEST:
            break


def main(runs_dir: Path = runs.RUNS, out: Path = runs.ROOT / "docs" / "videos") -> None:
    chosen = [suites.load(name) for name in suites.suite_names() if name != "smoke"]
    table = pd.concat([results.read_folder(runs_dir / suite.name) for suite in chosen], ignore_index=True)
    wanted = {(entry.env, entry.script.stem, entry.steps) for suite in chosen for entry in suite.entries}
    found = choose(table.loc[[run in wanted for run in zip(table["env"], table["script"], table["steps"])]])
    out.mkdir(exist_ok=True)
    old = pd.read_csv(out / "videos.csv") if (out / "videos.csv").exists() else found[:0]
    for run in found.itertuples():
        try:
            save(record(run.folder, run.script, run.seed), out / f"{run.name}.webp")
        except results.DAMAGE as error:
            found = found.drop(run.Index)
            print(f"left out: {run.folder}: {error}", file=sys.stderr)
    table = pd.concat([found, old]).drop_duplicates("name").sort_values(["rank", "name"])
    results.write(table[["name", "rank", *results.KEY, "eval_mean"]], out / "videos.csv", index=False)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
