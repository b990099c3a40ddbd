"""Log run folders to Weights & Biases or trackio, finished or still running: flags, all curves, and the result.

    python benchmark/track.py runs/classic --project folio                  # pip install wandb
    python benchmark/track.py runs/classic --project folio --to trackio     # pip install trackio

Repeat it to add what is new: tracked.json in the run folder has the last step that was logged.
"""

import hashlib
import importlib.util
import json
from collections import defaultdict
from pathlib import Path
from typing import Literal

import tyro
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from benchmark import results, runs


def track(folder: Path, /, project: str = "folio", to: Literal["wandb", "trackio"] = "wandb") -> None:
    if not importlib.util.find_spec(to):
        runs.fail(f"{to} is missing: pip install {to}")
    tracker, key = importlib.import_module(to), f"{to}/{project}"
    for run_folder in results.find(folder.resolve()) or runs.fail(f"no runs in {folder}"):
        about, result, points = runs.read_args(run_folder), runs.read_result(run_folder), defaultdict(dict)
        events = EventAccumulator(str(run_folder), size_guidance={"scalars": 0}).Reload()
        for curve in events.Tags()["scalars"]:
            for event in events.Scalars(curve):
                points[event.step][curve] = event.value
        if result:
            scores = {f"result/{name}": value for name, value in result.items() if value is not None}
            points[max(result["steps"], *points, 0) + 1] = scores
        tracked, name = runs.read_json(run_folder / "tracked.json"), f"{run_folder.parent.name}/{run_folder.name}"
        if new := sorted(step for step in points if step > tracked.get(key, -1)):
            number = hashlib.sha256(f"{name} {about['started']}".encode()).hexdigest()[:16]
            identity = {"name": name} | ({"id": number} if to == "wandb" else {})
            run = tracker.init(project=project, config=about["args"], resume="allow", **identity)
            for step in new:
                run.log(points[step], step=step)
            run.finish()
            (run_folder / "tracked.json").write_text(json.dumps(tracked | {key: new[-1]}))
        print(f"{run_folder}: {len(new)} new steps")


if __name__ == "__main__":
    tyro.cli(track, description=__doc__)
