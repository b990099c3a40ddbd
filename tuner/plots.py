"""The figures of a search, as SVG, in the benchmark's style."""

import math

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from optuna.trial import FrozenTrial, TrialState

from benchmark.plots import COLOURS, figure, in_style, short, tidy
from tuner.spaces import Dimension, Space
from tuner.study import shown

BLUE, ORANGE, GREY = COLOURS[0], COLOURS[1], "#aaaaaa"
LOOKS = {  # complete, pruned
    TrialState.COMPLETE: {"color": BLUE, "marker": "o", "s": 26, "label": "complete", "zorder": 3},
    TrialState.PRUNED: {"color": GREY, "marker": "x", "s": 18, "label": "pruned, at its last value", "zorder": 2},
}

LEGEND = {"frameon": False, "fontsize": 8, "loc": "lower right", "bbox_to_anchor": (1, 1), "ncols": 3, "borderpad": 0.1}


def limits(axes, values: list[float]) -> None:
    """From the lowest tenth upwards: one disaster must not flatten the rest."""
    low, high = np.quantile(values, 0.1), max(values)
    margin = 0.06 * (high - low) or 1.0
    axes.set_ylim(*tidy([low - margin, high + margin]))


@in_style
def history(name: str, trials: list[FrozenTrial], leaders: list[float]):
    """Values in the order of trials, and the best so far: `leaders` has one number per trial."""
    drawing, axes = figure(name, right=0.97)
    for state, look in LOOKS.items():
        points = [(x.number, x.value) for x in trials if x.state == state]
        if points:
            axes.scatter(*tidy(points).T, linewidth=0 if look["marker"] == "o" else 1, **look)
    axes.plot([x.number for x in trials], tidy(leaders), color=ORANGE, drawstyle="steps-post", label="best so far")
    limits(axes, [x.value for x in trials])
    axes.set_xlabel("trial")
    axes.set_ylabel("value")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_formatter(FuncFormatter(short))
    axes.legend(**LEGEND)
    return drawing


@in_style
def curves(name: str, trials: list[FrozenTrial], leader: FrozenTrial | None):
    """What each trial reported at the milestones."""
    drawing, axes = figure(name, right=0.97)
    for trial in trials:
        points = sorted(trial.intermediate_values.items())
        if points:
            is_leader, ended = trial is leader, trial.state == TrialState.COMPLETE
            look = {"color": ORANGE if is_leader else BLUE if ended else GREY, "lw": 2.4 if is_leader else 1.0}
            look |= {"zorder": 4 if is_leader else 3 if ended else 2}
            axes.plot(*tidy(points).T, marker="" if ended else "x", markevery=[-1], markersize=4, **look)
    values = [value for x in trials for value in x.intermediate_values.values() if math.isfinite(value)]
    if values:
        limits(axes, values)
    for label, colour in (("best", ORANGE), ("complete", BLUE), ("pruned", GREY)):
        axes.plot([], [], color=colour, label=label)
    axes.set_xlabel("environment steps")
    axes.set_ylabel("return, last 100 training episodes")
    axes.xaxis.set_major_formatter(FuncFormatter(short))
    axes.yaxis.set_major_formatter(FuncFormatter(short))
    axes.legend(**LEGEND)
    return drawing


@in_style
def slices(name: str, space: Space, trials: list[FrozenTrial], order: list[Dimension], shares: dict[str, float]):
    """Value against each flag, the most important one first."""
    columns = min(4, len(order))
    rows = -(-len(order) // columns)
    drawing = Figure(figsize=(2.4 * columns + 0.4, 2.3 * rows + 0.5), facecolor="white", layout="constrained")
    drawing.suptitle(name, x=0.01, ha="left", fontsize=11)
    for i, dimension in enumerate(order):
        axes = drawing.add_subplot(rows, columns, i + 1)
        for state, look in LOOKS.items():
            known = [(space.settings(x.number, x.params), x.value) for x in trials if x.state == state]
            points = [(settings.get(dimension.flag, ...), value) for settings, value in known]
            points = [(place(dimension, setting), value) for setting, value in points if dimension.has(setting)]
            if points:
                axes.scatter(*tidy(points).T, linewidth=0 if look["marker"] == "o" else 1, **look)
        limits(axes, [x.value for x in trials])
        if dimension.choices:
            axes.set_xticks(range(len(dimension.choices)), [shown(x) for x in dimension.choices], fontsize=7)
            axes.set_xlim(-0.5, len(dimension.choices) - 0.5)
        elif dimension.scale == "log2":
            ticks = [2**k for k in range(int(math.log2(dimension.low)), int(math.log2(dimension.high)) + 1)]
            axes.set_xticks([math.log2(x) for x in ticks], [str(x) for x in ticks], fontsize=7)
        elif dimension.scale == "log(1-x)":
            low, high = (math.log10(1 - x) for x in (dimension.high, dimension.low))
            at = np.linspace(low, high, 4)
            axes.set_xticks(tidy(-at), [f"{1 - 10**x:.4g}" for x in at], fontsize=7)
        elif dimension.scale == "log":
            axes.set_xscale("log")
            axes.tick_params(labelsize=7)
        axes.tick_params(labelsize=7)
        axes.yaxis.set_major_formatter(FuncFormatter(short))
        share = f" ({shares[dimension.flag]:.2f})" if dimension.flag in shares else ""
        axes.set_title(f"{dimension.flag.replace('_', '-')}{share}", fontsize=8, loc="left")
    return drawing


def place(dimension: Dimension, setting) -> float:
    """Where a setting stands on its axis."""
    if dimension.choices:
        return dimension.choices.index(setting)
    if dimension.scale == "log2":
        return math.log2(setting)
    return -math.log10(1 - setting) if dimension.scale == "log(1-x)" else setting
