"""Draw logged metrics of two or more runs next to each other, for the section "Logged metrics" of a page.

    python docs/metrics.py docs/algorithms/figures/ppo.svg \\
        "default=runs/good" "--learning-rate 0.05=runs/bad" losses/approx_kl losses/entropy charts/episodic_return

Arguments: the file to write, then NAME=FOLDER of each run, the healthy one first, and the metrics, one panel for each.
"""

import sys
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib import style
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from benchmark import plots

COLORS = plots.COLORS[0], plots.COLORS[1], plots.COLORS[2]


def smooth(values: np.ndarray, points: int = 100) -> np.ndarray:
    """Means of `points` equal parts."""
    return np.array([part.mean() for part in np.array_split(values, min(points, len(values)))])


def main(path: str, *words: str) -> None:
    runs = dict(reversed(word.rsplit("=", 1)) for word in words if Path(word.rpartition("=")[2]).is_dir())
    metrics = [word for word in words if "/" in word and "=" not in word]
    style.use(Path(plots.__file__).with_suffix(".mplstyle"))
    columns = min(len(metrics), 2)
    rows = -(-len(metrics) // columns)
    figure = Figure(figsize=(3.8 * columns, 2.3 * rows + 0.3), facecolor="white", layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for folder, color in zip(runs, COLORS):
        events = EventAccumulator(folder, size_guidance={"scalars": 0}).Reload()
        logged = events.Tags()["scalars"]
        for axes, metric in ((axes, metric) for axes, metric in zip(grid, metrics) if metric in logged):
            steps, values = np.array([(x.step, x.value) for x in events.Scalars(metric)]).T
            axes.plot(smooth(steps), plots.tidy(smooth(values)), color=color, lw=1.4, label=runs[folder])
            axes.set_title(metric, loc="left", fontsize=10)
            typical = np.median(axes.lines[0].get_ydata())  # of the healthy run
            if values.min() > 0 and (values.max() > 1000 * typical or np.median(values) > 30 * typical):
                axes.set_yscale("log")
    for axes in grid[-columns:]:
        axes.set_xlabel("environment steps")
    for axes in grid:
        for axis in (axes.xaxis, axes.yaxis):
            if axis.get_scale() == "linear":
                axis.set_major_formatter(FuncFormatter(plots.short))
    labels = max((axes.get_legend_handles_labels() for axes in grid), key=lambda x: len(x[0]))
    figure.legend(*labels, loc="outside lower center", ncols=len(runs))
    figure.savefig(path, metadata={"Date": None})
    text = Path(path).read_text()
    Path(path).write_text("".join(f"{line.rstrip()}\n" for line in text.splitlines()))


if __name__ == "__main__":
    matplotlib.rcdefaults()
    main(*sys.argv[1:])
