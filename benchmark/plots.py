"""The learning curves of docs/BENCHMARKS.md, as SVG: the same bytes from the same data and the same matplotlib.

Lines differ in color (Okabe and Ito's and two of Tol's, which color-blind readers can tell apart), dash, and marker, so
the figures can be read in print.
"""

import io
import re
import textwrap
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib import style
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter

from benchmark.stats import short

COLORS = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9", "#882255", "#999933"
DASHES = "-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (6, 1.5, 1.5, 1.5)), (0, (3, 1, 1, 1, 1, 1))
MARKERS = "o", "s", "^", "D", "v", "P", "X", "<", ">", "*", "p"


def tidy(values) -> np.ndarray:
    """Six significant digits, so that another processor's rounding does not show."""
    return np.array([float(f"{value:.6g}") for value in np.ravel(values)]).reshape(np.shape(values))


def style_of(number: int) -> dict:
    names, values = ("color", "linestyle", "marker"), (COLORS, DASHES, MARKERS)
    return {name: value[number % len(value)] for name, value in zip(names, values)}


def draw(title: str, lines: list[tuple]) -> Figure:
    """Over environment steps; and where there is something to compare, below it, over minutes."""
    count = 1 + (len(lines) > 1)
    height = 0.3 + 3.5 * count
    figure = Figure(figsize=(7.6, height), facecolor="white")
    panels = figure.subplots(count, 1, squeeze=False, sharey=True)[:, 0]
    figure.subplots_adjust(left=0.1, right=0.7, bottom=0.53 / height, top=1 - 0.4 / height, hspace=0.22)
    panels[0].set_title(title, loc="left", fontsize=11)
    for is_clock, axes in enumerate(panels):
        edge = {"transform": axes.get_yaxis_transform(), "clip_on": False}
        for place, (_, number, steps, minutes, mean, band, target) in enumerate(lines):
            color, every = style_of(number)["color"], len(steps) // 5
            x = steps * minutes / steps[-1] if is_clock else steps
            if not np.isnan(band).all():
                axes.fill_between(x, *band, color=color, alpha=0.18, lw=0)
            axes.plot(x, mean, **style_of(number), markevery=(place * every // 5 % every, every))
            axes.plot(1.012, target, "<", color=color, **edge)
        axes.set(ylabel="return, last 100 training episodes", xlabel="minutes" if is_clock else "environment steps")
    drawn = np.concatenate([np.ravel(x) for line in lines for x in line[4:]])
    low, high = np.nanmin(drawn), np.nanmax(drawn)
    margin = 0.06 * (high - low) or 1.0
    panels[0].set(xlim=(0, max(line[2][-1] for line in lines)), ylim=(low - margin, high + margin))
    ends = [line[3] for line in lines]
    panels[-1].set(**{"xscale": "log", "xlim": (min(ends) / 20, max(ends))} if count > 1 else {})
    for axis in (axis for axes in panels for axis in (axes.xaxis, axes.yaxis)):
        axis.set_major_formatter(FuncFormatter(lambda value, _: short(value).replace("-", "−")))
    best_first = sorted(lines, key=lambda line: -np.nan_to_num(line[4][-1], nan=-np.inf))
    handles = [Line2D([], [], label=textwrap.fill(name, 26), **style_of(number)) for name, number, *_ in best_first]
    target = Line2D([], [], ls="", marker="<", color="#666666", label="target")
    handles += [target] if not all(np.isnan(line[6]) for line in lines) else []
    panels[0].legend(handles=handles, loc="upper left", bbox_to_anchor=(1.03, 1.02))
    return figure


def learning_curves(title: str, lines: list[tuple]) -> bytes:
    """SVG. lines: name, number of its look, steps (T,), minutes, mean over seeds (T,), its band (2, T), target."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # whatever style a user has configured
        style.use(Path(__file__).with_suffix(".mplstyle"))
        file = io.BytesIO()
        figure = draw(title, [(*line[:3], *map(tidy, line[3:])) for line in lines])
        figure.savefig(file, format="svg", metadata={"Date": None})
    svg = re.sub(rb"(\d\.\d\d)\d+", rb"\1", file.getvalue()).replace(b"\nL ", b" L ")  # hundredths, a path in a line
    return b"\n".join(line.rstrip() for line in svg.split(b"\n"))
