"""The figures of docs/BENCHMARKS.md, as SVG, the same bytes from the same numbers and the same matplotlib.

Every line has a colour (Okabe and Ito's, told apart by the colour-blind), a dash and a marker of its own, and its name
stands beside its end: the figures can be read in print and in grey.
"""

import io

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

COLOURS = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9"
DASHES = "-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (6, 1.5, 1.5, 1.5)), (0, (3, 1, 1, 1, 1, 1))
MARKERS = "o", "s", "^", "D", "v", "P", "X", "<", ">", "*", "p"
STYLE = {
    "svg.hashsalt": "folio",
    "svg.fonttype": "none",  # text stays text
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.8,
    "lines.markersize": 5,
}


def style(number: int) -> dict:
    """Of the line with this number: 7 x 5 pairs of colour and dash, each with one of 11 markers."""
    n = len(MARKERS)
    return {
        "color": COLOURS[number % len(COLOURS)],
        "linestyle": DASHES[number % len(DASHES)],
        "marker": MARKERS[number % n],
    }


def tidy(values) -> np.ndarray:
    """Six significant digits: what another processor adds up differently must not reach the file."""
    return np.array([float(f"{value:.6g}") for value in np.ravel(values)]).reshape(np.shape(values))


def short(value: float, _=None) -> str:
    for size, letter in ((1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{letter}".replace("-", "−")
    return f"{value:g}".replace("-", "−")


def spread(positions: list[float], gap: float) -> list[float]:
    """Move positions between 0 and 1 down until neighbours have this gap, and up where there is no room below."""
    order = sorted(range(len(positions)), key=positions.__getitem__)
    moved, highest = list(positions), max(1.0, gap * (len(order) - 1))
    for rank, i in reversed(list(enumerate(order))):
        moved[i] = max(min(positions[i], highest), gap * rank)
        highest = moved[i] - gap
    return moved


def label_ends(axes: Axes, ends: list[tuple[str, int, float, float]]) -> None:
    """Names beside the ends of lines: (name, style number, x, y), with a thin line from one to the other."""
    to_axes = axes.transAxes.inverted()
    points = [to_axes.transform(axes.transData.transform((x, y))) for _, _, x, y in ends]
    heights = spread([float(np.clip(y, 0, 1)) for _, y in points], 0.062)
    for (name, number, _, _), (x, y), height in zip(ends, points, heights):
        line = {"color": COLOURS[number % len(COLOURS)], "lw": 0.8, "clip_on": False, "transform": axes.transAxes}
        axes.plot([x, 1.02, 1.04], [np.clip(y, 0, 1), height, height], **line, marker="")
        axes.text(1.05, height, name, transform=axes.transAxes, va="center", fontsize=9)


def figure(title: str, height: float = 3.8, right: float = 0.77) -> tuple[Figure, Axes]:
    drawing = Figure(figsize=(7.2, height), facecolor="white")
    axes = drawing.add_axes((0.1, 0.55 / height, right - 0.1, (height - 0.95) / height))
    axes.set_title(title, loc="left", fontsize=11)
    axes.set_axisbelow(True)
    return drawing, axes


def svg(drawing: Figure) -> bytes:
    file = io.BytesIO()
    drawing.savefig(file, format="svg", metadata={"Date": None})
    return b"\n".join(line.rstrip() for line in file.getvalue().split(b"\n"))


def in_style(draw):
    """With matplotlib's own defaults and STYLE, whatever a user has configured."""

    def drawn(*args, **kwargs) -> bytes:
        with matplotlib.rc_context():
            matplotlib.rcdefaults()
            matplotlib.rcParams.update(STYLE)
            return svg(draw(*args, **kwargs))

    return drawn


@in_style
def learning_curves(env: str, lines: list[tuple[str, int, np.ndarray, np.ndarray, np.ndarray]], target: float | None):
    """lines: name, style number, steps (T,), mean over seeds (T,), its band (2, T)."""
    drawing, axes = figure(env)
    for i, (_, number, steps, mean, band) in enumerate(lines):
        mean, band = tidy(mean), tidy(band)
        if not np.isnan(band).all():
            axes.fill_between(steps, *band, color=COLOURS[number % len(COLOURS)], alpha=0.18, lw=0)
        axes.plot(steps, mean, **style(number), markevery=(3 + 4 * i % 20, 20), markeredgewidth=0)
    if target is not None:
        axes.axhline(target, color="#666666", lw=1, ls=(0, (2, 2)))
        axes.annotate(
            "target", (0.012, target), xycoords=("axes fraction", "data"), va="bottom", color="#444444", size=8
        )
    drawn = np.concatenate([np.ravel(x) for *_, mean, band in lines for x in (mean, band)] + [[target or np.nan]])
    low, high = tidy([np.nanmin(drawn), np.nanmax(drawn)])
    margin = 0.06 * (high - low) or 1.0
    axes.set_ylim(low - margin, high + margin)
    axes.set_xlim(0, max(steps[-1] for _, _, steps, _, _ in lines))
    axes.set_xlabel("environment steps")
    axes.set_ylabel("return, last 100 training episodes")
    axes.xaxis.set_major_formatter(FuncFormatter(short))
    axes.yaxis.set_major_formatter(FuncFormatter(short))
    label_ends(axes, [(name, number, steps[-1], tidy(mean)[-1]) for name, number, steps, mean, _ in lines])
    return drawing


@in_style
def profiles(title: str, scale: str, taus: np.ndarray, lines: list[tuple[str, int, np.ndarray, np.ndarray]]):
    """lines: name, style number, share of runs above each tau (T,), its band (2, T)."""
    drawing, axes = figure(f"{title}: performance profile", right=0.7)
    for i, (_, number, share, band) in enumerate(lines):
        if not np.isnan(band).all():
            axes.fill_between(taus, *tidy(band), color=COLOURS[number % len(COLOURS)], alpha=0.18, lw=0)
        axes.plot(taus, tidy(share), **style(number), markevery=(5 + 7 * i % 30, 30), markeredgewidth=0)
    axes.set_xlim(taus[0], taus[-1])
    axes.set_ylim(0, 1.02)
    axes.set_xlabel(f"τ: {scale}")
    axes.set_ylabel("share of runs that score above τ")
    halfway = [int(np.abs(share - 0.5).argmin()) for _, _, share, _ in lines]
    order = np.argsort([-taus[at] for at in halfway], kind="stable")
    for place, i in enumerate(order):  # the lines all end at 0: a list on the right, ordered as they cross one half
        name, number, _, _ = lines[i]
        height = 0.97 - 0.075 * place
        axes.plot(
            [1.03, 1.13], [height, height], **style(number), markevery=[0], transform=axes.transAxes, clip_on=False
        )
        axes.text(1.15, height, name, transform=axes.transAxes, va="center", fontsize=9)
    return drawing


@in_style
def aggregates(title: str, scale: str, rows: list[tuple[str, int, float, np.ndarray]]):
    """rows: name, style number, interquartile mean, its interval (2,)."""
    drawing, axes = figure(f"{title}: interquartile mean", height=1.1 + 0.32 * len(rows), right=0.93)
    axes.set_position((0.3, *axes.get_position().bounds[1:2], 0.63, axes.get_position().height))
    for i, (_, number, value, (low, high)) in enumerate(rows):
        look = style(number)
        if not np.isnan(low):
            axes.plot(tidy([low, high]), [i, i], color=look["color"], lw=5, alpha=0.35, solid_capstyle="butt")
        axes.plot(tidy([value]), [i], color=look["color"], marker=look["marker"], ls="", ms=7)
    axes.axvline(1, color="#666666", lw=1, ls=(0, (2, 2)))
    axes.set_yticks(range(len(rows)), [name for name, _, _, _ in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.grid(axis="y", visible=False)
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.set_xlabel(f"{scale}, 95 % interval")
    return drawing
