"""The learning curves of docs/BENCHMARKS.md, as SVG: the same bytes from the same data and the same matplotlib.

Lines differ in color (Okabe and Ito's, which color-blind readers can tell apart), dash, and marker, so the figures can
be read in print.
"""

import io
import textwrap
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib import style
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter

COLORS = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9"
DASHES = "-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (6, 1.5, 1.5, 1.5)), (0, (3, 1, 1, 1, 1, 1))
MARKERS = "o", "s", "^", "D", "v", "P", "X", "<", ">", "*", "p"


def tidy(values) -> np.ndarray:
    """Six significant digits, so that another processor's rounding does not show."""
    return np.array([float(f"{value:.6g}") for value in np.ravel(values)]).reshape(np.shape(values))


def look(number: int) -> dict:
    names, values = ("color", "linestyle", "marker"), (COLORS, DASHES, MARKERS)
    return {name: value[number % len(value)] for name, value in zip(names, values)}


def short(value: float, _=None) -> str:
    for size, letter in ((1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{letter}".replace("-", "−")
    return f"{value:g}".replace("-", "−")


def draw(title: str, lines: list[tuple]) -> Figure:
    figure = Figure(figsize=(7.6, 3.8), facecolor="white")
    axes = figure.add_axes((0.1, 0.145, 0.6, 0.75))
    axes.set_title(title, loc="left", fontsize=11)
    for place, (_, number, steps, mean, band, target) in enumerate(lines):
        color, every = look(number)["color"], len(steps) // 5
        if not np.isnan(band).all():
            axes.fill_between(steps, *band, color=color, alpha=0.18, lw=0)
        axes.plot(steps, mean, **look(number), markevery=(place * every // 5 % every, every))
        axes.plot(1.012, target, "<", color=color, transform=axes.get_yaxis_transform(), clip_on=False)  # at the edge
    drawn = np.concatenate([np.ravel(x) for line in lines for x in line[3:]])
    low, high = np.nanmin(drawn), np.nanmax(drawn)
    margin = 0.06 * (high - low) or 1.0
    axes.set(xlim=(0, max(line[2][-1] for line in lines)), ylim=(low - margin, high + margin))
    axes.set(xlabel="environment steps", ylabel="return, last 100 training episodes")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(short))
    best_first = sorted(lines, key=lambda line: -np.nan_to_num(line[3][-1], nan=-np.inf))
    handles = [Line2D([], [], label=textwrap.fill(name, 26), **look(number)) for name, number, *_ in best_first]
    target = Line2D([], [], ls="", marker="<", color="#666666", label="target")
    handles += [target] if not all(np.isnan(line[5]) for line in lines) else []
    axes.legend(handles=handles, loc="upper left", bbox_to_anchor=(1.03, 1.02))
    return figure


def learning_curves(title: str, lines: list[tuple]) -> bytes:
    """SVG. lines: name, number of its look, steps (T,), mean over seeds (T,), its band (2, T), target or nan."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # whatever style a user has configured
        style.use(Path(__file__).with_suffix(".mplstyle"))
        file = io.BytesIO()
        figure = draw(title, [(*line[:3], *map(tidy, line[3:])) for line in lines])
        figure.savefig(file, format="svg", metadata={"Date": None})
    return b"\n".join(line.rstrip() for line in file.getvalue().split(b"\n"))
