"""Search spaces: which hyperparameters of a script are tuned, in which ranges, and with what budget.

A space is a TOML file, such as those in tuner/spaces/. Its keys are the fields of `Space`, some are optional:

    script = "ppo"              # algos/ppo.py; or the path of your own script, relative to this file: "../my_ppo.py"
    env = "LunarLander-v3"
    steps = 300_000             # budget of a run
    trials = 40                 # three to four for each flag in [space]

    [space]
    learning-rate = { scale = "log", low = 1e-4, high = 1e-2 }
    gamma = { scale = "log(1-x)", low = 0.95, high = 0.9995 }   # 0.99 is halfway between 0.9 and 0.999
    num-steps = { scale = "log2", low = 32, high = 512 }        # 32, 64, 128, 256 or 512
    clip-coef = { low = 0.1, high = 0.3 }                       # linear; integers if both ends are integers
    norm-adv = { choices = [true, false] }

Names are checked here, before anything starts; values by the script itself.
"""

import math
import re
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from benchmark.runner import parse_seeds
from benchmark.runs import SCRIPTS, Spec, canonical
from benchmark.suites import Entry, SuiteError, check_flags, check_keys, find_script, read_toml

SPACES = Path(__file__).resolve().parent / "spaces"
MILESTONES = 20  # how often a run is compared with others, at equal distances
SCALES = "linear", "log", "log(1-x)", "log2"


@dataclass(frozen=True)
class Dimension:
    """A flag and its values. Optuna sees it on the scale on which equal distances matter equally."""

    flag: str
    scale: str = "linear"
    low: float | None = None
    high: float | None = None
    choices: tuple = ()

    @property
    def param(self) -> str:
        """Its name in Optuna."""
        return {"log2": f"log2({self.flag})", "log(1-x)": f"1-{self.flag}"}.get(self.scale, self.flag)

    @cached_property
    def distribution(self) -> BaseDistribution:
        """ValueError or TypeError if there is no such range."""
        if self.choices:
            return CategoricalDistribution(self.choices)
        if self.scale not in SCALES or self.low is None or not self.low < self.high:
            raise ValueError(f"give low < high and one scale of {', '.join(SCALES)}; or give choices")
        low, high = (self.low, self.high) if self.scale != "log(1-x)" else (1 - self.high, 1 - self.low)
        if self.scale == "log2":
            low, high = math.log2(low), math.log2(high)
            if low % 1 or high % 1:
                raise ValueError("on the scale log2, low and high must be powers of two")
            return IntDistribution(int(low), int(high))
        kind = IntDistribution if isinstance(low, int) and isinstance(high, int) else FloatDistribution
        return kind(low, high, log=self.scale in ("log", "log(1-x)"))

    def value(self, param):
        """The flag's value for Optuna's. Fractions are rounded to four digits, to be readable and repeatable."""
        if self.choices or isinstance(param, int):
            return 2**param if self.scale == "log2" else param
        rounded = float(f"{param:.4g}")
        return min(max(round(1 - rounded, 12) if self.scale == "log(1-x)" else rounded, self.low), self.high)

    def param_of(self, value):
        """The inverse of `value`; None for a value outside of the range."""
        if self.choices:
            return next((x for x in self.choices if canonical(x) == canonical(value)), None)
        if isinstance(value, bool) or not isinstance(value, int | float) or not self.low <= value <= self.high:
            return None
        if self.scale == "log2":
            return int(math.log2(value)) if math.log2(value).is_integer() else None
        return min(max(1 - value, 1 - self.high), 1 - self.low) if self.scale == "log(1-x)" else value


@dataclass(frozen=True)
class Space:
    script: str
    env: str
    steps: int
    trials: int
    space: dict
    name: str = ""  # of the study; default: {env}__{file}
    seeds: str = "1"  # runs per trial, whose mean is its value: "3" for seeds 101 to 103, or seeds as "101,105-107"
    metric: str = "final_return"  # the number in result.json to maximize
    pruner: str = ""  # "asha", "median" or "none"; default: asha, or median for fewer than 20 trials
    grace: int = 0  # no pruning before this step; default: 1/16 of steps (median: 1/5), at least 10,000 or half of it
    reduction: int = 4  # asha: one trial in so many survives grace, grace * reduction, ...
    fixed: dict = field(default_factory=dict)  # flags of the task, for all runs, also the defaults' in a validation
    start: dict = field(default_factory=dict)  # the first trial, where it differs from the script's defaults

    @property
    def path(self) -> Path:
        return Path(self.script) if self.script.endswith(".py") else SCRIPTS / f"{self.script}.py"

    @property
    def defaults(self) -> dict:  # of the script; ... where its text does not show a value
        return find_script(self.script, Path(), self.name)[1]

    @cached_property
    def dimensions(self) -> list[Dimension]:
        return [Dimension(flag, **table) for flag, table in self.space.items()]

    @property
    def milestones(self) -> list[int]:
        """The steps at which a run is compared with others. The rungs of successive halving are among them."""
        equal = {round(i * self.steps / MILESTONES) for i in range(1, MILESTONES)}
        rungs = {self.grace * self.reduction**i for i in range(20 if self.pruner == "asha" else 1)}
        return sorted(step for step in equal | rungs if 0 < step < self.steps)

    @property
    def first_params(self) -> dict:
        """The first trial as Optuna sees it, without values outside of the space."""
        known = self.defaults | self.start
        params = {x.param: x.param_of(known[x.flag]) for x in self.dimensions}
        return {name: param for name, param in params.items() if param is not None}

    def flags(self, trial: optuna.trial.BaseTrial) -> dict:
        """What a trial passes to the script. The first has the script's defaults, which need no flags."""
        tuned = {x.flag: x.value(trial.params[x.param]) for x in self.dimensions} if trial.number else self.start
        return self.fixed | tuned

    def settings(self, trial: optuna.trial.BaseTrial) -> dict:
        """The value of each tuned flag in a trial."""
        known = self.defaults | self.flags(trial)
        return {x.flag: known[x.flag] for x in self.dimensions}

    def spec(self, flags: dict, seed: int, folder: Path = Path()) -> Spec:
        return Spec(self.path, {"env_id": self.env, "total_timesteps": self.steps, "seed": seed} | flags, folder)


def seeds_of(text: str, first: int = 101) -> list[int]:
    """3 means the first three from `first` on; 1,3,7-9 is a list. The seeds 1, 2, ... belong to the benchmark."""
    if seeds := list(range(first, first + int(text))) if text.isdecimal() else parse_seeds(text):
        return seeds
    raise SuiteError(f"seeds are {text!r}; give a number of seeds, or a list such as {first},{first + 4}-{first + 6}")


def load(name_or_path: str, changes: dict) -> Space:
    """A space by its name in tuner/spaces/ or by the path of a TOML file, with some keys changed."""
    path = Path(name_or_path)
    if path.suffix != ".toml":
        path, known = SPACES / f"{name_or_path}.toml", sorted(x.stem for x in SPACES.glob("*.toml"))
        if path.stem not in known:
            raise SuiteError(f"no search space {name_or_path}; there are {', '.join(known)}, or give a TOML file")
    return read(read_toml(path) | changes, path)


def read(content: dict, path: Path) -> Space:
    """A space from the content of the TOML file at `path`, checked and with all defaults filled in."""
    where, required = f"space {path.stem}", ("script", "env", "steps", "trials", "space")
    check_keys(content, {x.name: x.type for x in fields(Space)}, required, where)
    script, defaults = find_script(content["script"], path.parent, where)
    space = Space(**content | {"script": script.stem if script.parent == SCRIPTS else str(script)})
    tables = {x: check_flags(getattr(space, x), defaults, script.name, where) for x in ("fixed", "space", "start")}
    pruner = space.pruner or ("asha" if space.trials >= 20 else "median")
    share = 1 / 5 if pruner == "median" else 1 / space.reduction**2
    grace = space.grace or max(min(10_000, space.steps // 2), math.ceil(space.steps * share))
    name = space.name or Entry(Path(path.stem), space.env, 0, 0).name
    space = replace(space, name=name, pruner=pruner, grace=grace, **tables)
    mistakes = {
        "[space] is empty": not space.space,
        "[fixed] and [space] have a flag in common": bool(space.fixed.keys() & space.space.keys()),
        "[start] has a flag that [space] has not": bool(space.start.keys() - space.space.keys()),
        f"pruner is {pruner!r}, not asha, median or none": pruner not in ("asha", "median", "none"),
        f"name is {name!r}, but it names a folder": not re.fullmatch(r"\w[\w.-]*", name),
        f"grace is {grace}, but a run has only {space.steps} steps": grace >= space.steps,
        "reduction must be at least 2": space.reduction < 2,
    }
    for mistake in (mistake for mistake, is_so in mistakes.items() if is_so):
        raise SuiteError(f"{where}: {mistake}")
    known = [x.name for x in fields(Dimension) if x.name != "flag"]
    for flag, table in space.space.items():
        try:
            if unknown := [key for key in (table if isinstance(table, dict) else [table]) if key not in known]:
                raise ValueError(f"unknown key {unknown[0]}; known: {', '.join(known)}")
            _ = Dimension(flag, **table).distribution
        except (TypeError, ValueError) as error:
            raise SuiteError(f"{where}: {flag.replace('_', '-')}: {error}") from None
    seeds_of(space.seeds)
    return space
