"""A narrower space from a finished search: what mattered, in the range of the best trials; the rest has one value."""

import json
import math

import optuna

from benchmark.runs import fail
from tuner.spaces import Space
from tuner.study import importances, ranking


def toml(value) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {toml(x)}" for key, x in value.items()) + " }"
    return json.dumps(value)


def narrow(study: optuna.Study, space: Space) -> str:
    """The narrower space as TOML, with a comment on each flag."""
    trials = [x for x in ranking(study) if len(x.params) == len(space.dimensions)]  # not a default outside of the space
    if len(trials) < 8:
        fail(f"{space.name} has {len(trials)} trials to learn from, not 8", code=1)
    top = [space.settings(x) for x in trials[: max(4, math.ceil(len(trials) / 4))]]
    shares, ranges, start, lines = importances(study, space), {}, {}, []
    for x in space.dimensions:
        values, default = [found[x.flag] for found in top], space.defaults[x.flag]
        among = [choice for choice in x.choices if choice in values] or [min(values), max(values)]
        start[x.flag] = values[0]
        if shares[x.flag] >= 0.5 / len(space.dimensions) and among[0] != among[-1]:
            ranges[x.flag] = {"choices": among} if x.choices else {"scale": x.scale, "low": among[0], "high": among[-1]}
        elif x.param_of(default) is not None and (default in among if x.choices else among[0] <= default <= among[-1]):
            start[x.flag] = default
        have = (", " if x.choices else " to ").join(dict.fromkeys(map(str, among)))
        lines += [f"# importance {shares[x.flag]:.2f}; the best {len(top)} trials have {have}"]
        lines += [f"{x.flag.replace('_', '-')} = {toml(ranges.get(x.flag, {'choices': [start[x.flag]]}))}"]
    keys = {key: value for key in ("script", "env", "steps", "metric", "fixed") if (value := getattr(space, key))}
    keys |= {"name": f"{space.name}__narrow", "seeds": "201-203", "pruner": "none", "trials": 4 * len(ranges) or 1}
    head = f"# Narrowed from {space.name}: {len(trials)} trials, the best {trials[0].value:.4g}. Edit it before use.\n"
    head += "# The first trial is the best one of that search; what did not matter has its default again.\n"
    head += "".join(f"{key} = {toml(value)}\n" for key, value in (keys | {"start": start}).items())
    return "\n".join([head, "[space]", *lines, ""])
