"""Search spaces: which flags of a script are tuned, in which ranges, and what the search may cost.

A space is a TOML file, such as those in tuner/spaces/:

    script = "ppo"              # algos/ppo.py; or the path of a script, seen from this file: "../my_script.py"
    env = "LunarLander-v3"
    steps = 300_000             # budget of a run
    trials = 40                 # settings to try: three to four for each flag in [space]

    [space]
    learning-rate = { scale = "log", low = 1e-4, high = 1e-2 }
    gamma = { scale = "log(1-x)", low = 0.95, high = 0.9995 }   # 0.99 is as far from 0.9 as 0.999 is from 0.99
    num-steps = { scale = "log2", low = 32, high = 512 }        # 32, 64, 128, 256 or 512
    clip-coef = { low = 0.1, high = 0.3 }                       # evenly; a whole number where the flag is one
    norm-adv = { choices = [true, false] }

The rest may be left out:

    name = "my-study"           # of the study; by default {env}__{script}
    seeds = 1                   # runs per setting, whose mean counts: 3 for the seeds 101, 102 and 103; or a list
    metric = "final_return"     # the number of result.json that is the value of a run
    direction = "maximize"      # or "minimize"
    milestones = 20             # how often a run is judged, at equal distances; or a list of steps
    pruner = "asha"             # asynchronous successive halving; or "median", or "none"
    grace = 18_750              # steps before a run may be pruned; by default a sixteenth of the budget (the budget /
                                # reduction ** 2), or with "median" a fifth
    reduction = 4               # of "asha": one setting in so many goes on at grace, grace * reduction, ...
    startup = 5                 # of "median": finished settings before anything is pruned

    [fixed]                     # flags that belong to the task: every run has them, the defaults' in a validation too
    checkpoint-every = 100_000

    [settled]                   # flags that an earlier search has settled: every trial has them, the defaults have not
    norm-adv = true

    [start]                     # the first setting, where it differs from the script's defaults
    learning-rate = 2e-3

Seeds from 101 on leave 1, 2, ... to the benchmark, and 1001, 1002, ... to the validation.

A mistake is one line that names the space (`SuiteError`), before anything has started. Flags and values are checked
against the script's `Args`, which is read as text; a script without `Args` gets its flags as they are named here.
"""

import ast
import json
import math
import os
import re
import tomllib
from dataclasses import dataclass, field
from pathlib import Path

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from benchmark.suites import OWN, SCRIPTS, Entry, SuiteError, as_field, flag_name, flags_of, read_flags

SPACES = Path(__file__).resolve().parent / "spaces"
FIRST_SEED = 101
PRUNERS = "asha", "median", "none"
SCALES = "linear", "log", "log(1-x)", "log2"
KEYS = {"script": str, "env": str, "steps": int, "trials": int, "space": dict}
OPTIONAL = {"name": str, "seeds": (int, list), "metric": str, "direction": str, "milestones": (int, list)}
OPTIONAL |= {
    "pruner": str,
    "grace": int,
    "reduction": int,
    "startup": int,
    "fixed": dict,
    "settled": dict,
    "start": dict,
}
LEAST = {"steps": 1, "trials": 1, "seeds": 1, "milestones": 1, "grace": 1, "reduction": 2, "startup": 1}


@dataclass(frozen=True)
class Dimension:
    """A flag that is tuned, and its values. Optuna sees it on the scale where equal distances mean as much."""

    flag: str
    scale: str = "linear"
    low: float | None = None
    high: float | None = None
    choices: tuple = ()

    @property
    def param(self) -> str:
        """Its name in Optuna."""
        return {"log2": f"log2({self.flag})", "log(1-x)": f"1-{self.flag}"}.get(self.scale, self.flag)

    @property
    def distribution(self) -> BaseDistribution:
        if self.choices:
            return CategoricalDistribution(self.choices)
        if self.scale == "log2":
            return IntDistribution(int(math.log2(self.low)), int(math.log2(self.high)))
        if self.scale == "log(1-x)":
            return FloatDistribution(round(1 - self.high, 12), round(1 - self.low, 12), log=True)
        kind = IntDistribution if isinstance(self.low, int) else FloatDistribution
        return kind(self.low, self.high, log=self.scale == "log")

    def value(self, param):
        """The flag's value for Optuna's; fractions are rounded to four digits, so that one can read and repeat them."""
        if self.choices:
            return param
        if self.scale == "log2":
            return 2**param
        rounded = param if isinstance(self.low, int) else float(f"{param:.4g}")
        value = round(1 - rounded, 12) if self.scale == "log(1-x)" else rounded
        return min(max(value, self.low), self.high)

    def has(self, value) -> bool:
        """Whether the space has this value of the flag."""
        if self.choices:
            return any(choice == value and type(choice) is type(value) for choice in self.choices)
        if isinstance(value, bool) or not isinstance(value, int | float) or not self.low <= value <= self.high:
            return False
        return self.scale != "log2" or math.log2(value).is_integer()

    def to_param(self, value):
        """Optuna's value for one that the space has."""
        if self.scale == "log2":
            return int(math.log2(value))
        return round(1 - value, 12) if self.scale == "log(1-x)" else value

    def suggest(self, trial):
        """Optuna's value for a trial, recorded in its study."""
        space = self.distribution
        if isinstance(space, CategoricalDistribution):
            return trial.suggest_categorical(self.param, space.choices)
        suggest = trial.suggest_int if isinstance(space, IntDistribution) else trial.suggest_float
        return suggest(self.param, space.low, space.high, log=space.log)


@dataclass(frozen=True)
class Space:
    name: str
    script: Path
    env: str
    steps: int
    trials: int
    dimensions: tuple[Dimension, ...]
    seeds: tuple[int, ...] = (FIRST_SEED,)
    metric: str = "final_return"
    direction: str = "maximize"
    milestones: int | tuple[int, ...] = 20
    pruner: str = "asha"
    grace: int = 1
    reduction: int = 4
    startup: int = 5
    fixed: dict = field(default_factory=dict)
    settled: dict = field(default_factory=dict)
    start: dict = field(default_factory=dict)
    defaults: dict = field(default_factory=dict)  # of the script, as far as its Args tells them

    @property
    def source(self) -> str:
        return self.script.read_text()

    @property
    def grid(self) -> list[int]:
        """The steps at which a run is judged; the last one is the budget. Successive halving's rungs are among them."""
        if isinstance(self.milestones, int):
            grid = {round(i * self.steps / self.milestones) for i in range(1, self.milestones + 1)}
        else:
            grid = set(self.milestones)
        if self.pruner != "none":
            rung = self.grace
            while rung < 0.9 * self.steps:  # who has come farther may as well finish
                grid.add(rung)
                rung = rung * self.reduction if self.pruner == "asha" else self.steps
        return sorted(step for step in grid | {self.steps} if step)

    def flags(self, number: int, params: dict) -> dict:
        """What a trial gives to the script: the first one's defaults are the script's own to know."""
        tuned = self.start if number == 0 else {x.flag: x.value(params[x.param]) for x in self.dimensions}
        return self.fixed | self.settled | tuned

    def settings(self, number: int, params: dict) -> dict:
        """The value of each tuned flag in a trial, as far as it is known: a default may not be."""
        if number == 0:
            known = self.defaults | self.start
            return {x.flag: known[x.flag] for x in self.dimensions if x.flag in known}
        return {x.flag: x.value(params[x.param]) for x in self.dimensions if x.param in params}

    def first_params(self) -> dict:
        """The first trial as Optuna sees it. A value that the space does not have is tried all the same, unseen."""
        known = self.settings(0, {})
        ours = [x for x in self.dimensions if x.flag in known and x.has(known[x.flag])]
        return {x.param: x.to_param(known[x.flag]) for x in ours}

    def entry(self, flags: dict) -> Entry:
        """A run with these flags, as the benchmark's runner knows it."""
        kind = Entry if flags_of(self.source) else Foreign
        return kind(self.script.stem, self.env, self.steps, len(self.seeds), math.nan, "", flags)

    @property
    def described(self) -> dict:
        """What makes two searches the same one, as JSON has it: all but the number of trials."""
        ranges = {x.flag: [x.scale, x.low, x.high, list(x.choices)] for x in self.dimensions}
        names = "env", "steps", "seeds", "metric", "direction", "pruner", "fixed", "settled", "start"
        told = {name: getattr(self, name) for name in names} | {"grid": self.grid, "space": ranges}
        if self.pruner != "none":
            told |= {"grace": self.grace, "reduction": self.reduction, "startup": self.startup}
        return json.loads(json.dumps({"script": self.script.name} | told))


class Foreign(Entry):
    """An entry of a script without Args: its flags are passed as they are named."""

    @property
    def words(self) -> list[str]:
        switch = {name: f"--{'' if value else 'no-'}{name}" for name, value in self.flags.items()}
        pairs = (
            [switch[name]] if isinstance(value, bool) else [f"--{name}", str(value)]
            for name, value in sorted(self.flags.items())
        )
        return [word for pair in pairs for word in pair]


# ------------------------------------------------------------------------------------------------- reading and checking


def defaults_of(source: str) -> dict:
    """The defaults in a script's Args, as far as they are written out: {"learning_rate": 0.001, ...}."""
    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef) and node.name == "Args":
            for x in node.body:
                if isinstance(x, ast.AnnAssign) and x.value is not None:
                    try:
                        found[x.target.id] = ast.literal_eval(x.value)
                    except ValueError:
                        continue
    return found


def read_dimension(key: str, table, script: str, known: dict[str, str], where: str) -> Dimension:
    flag = flag_name(key, script, known, where) if known else key
    where = f"{where}: flag {key}"
    if not isinstance(table, dict) or not ({"choices"} == set(table) or {"low", "high"} <= set(table)):
        raise SuiteError(
            f"{where}: it takes {{ low = ..., high = ... }}, with a scale if not even, or {{ choices = [...] }}"
        )
    if unknown := set(table) - {"low", "high", "scale", "choices"}:
        raise SuiteError(f"{where}: unknown key {min(unknown)}; there are low, high, scale, choices")
    values = table.get("choices", [table.get("low"), table.get("high")])
    if not isinstance(values, list) or not all(isinstance(x, bool | int | float | str) for x in values):
        raise SuiteError(f"{where}: {values} are no values of a flag")
    if known:
        try:
            values = [as_field(value, known[flag]) for value in values]
        except ValueError as error:
            raise SuiteError(f"{where} {error}") from None
    if "choices" in table:
        if len(values) < 2 or len({json.dumps(x) for x in values}) < len(values):
            raise SuiteError(f"{where}: choices are {values}; it takes two or more, none twice")
        return Dimension(flag, "choices", choices=tuple(values))
    (low, high), scale = values, table.get("scale", "linear")
    if any(isinstance(x, bool) or not isinstance(x, int | float) or not math.isfinite(x) for x in values):
        raise SuiteError(f"{where}: low and high are {low!r} and {high!r}; they are numbers, or write choices = [...]")
    if not (isinstance(low, int) and isinstance(high, int)):
        low, high = float(low), float(high)
    if scale not in SCALES:
        raise SuiteError(f"{where}: scale is {scale!r}; there are {', '.join(SCALES)}")
    if not low < high:
        raise SuiteError(f"{where}: low is {low} and high is {high}; low is below high")
    if scale in ("log", "log2") and low <= 0:
        raise SuiteError(f"{where}: low is {low}, but on the scale {scale} it is above 0")
    if scale == "log2" and not (isinstance(low, int) and low & (low - 1) == 0 == high & (high - 1)):
        raise SuiteError(f"{where}: low is {low} and high is {high}, but on the scale log2 they are powers of two")
    if scale == "log(1-x)" and (isinstance(low, int) or high >= 1):
        raise SuiteError(f"{where}: high is {high}, but on the scale log(1-x) values are fractions below 1")
    return Dimension(flag, scale, low, high)


def find_script(name: str, folder: Path, where: str) -> Path:
    path = (folder / name).resolve() if name.endswith(".py") else SCRIPTS / f"{name}.py"
    if not path.is_file():
        raise SuiteError(f"{where}: there is no script {path}")
    try:
        ast.parse(path.read_text())
    except (SyntaxError, ValueError) as error:
        raise SuiteError(f"{where}: {path.name} cannot be read: {error}") from None
    return path


def check_keys(content: dict, where: str) -> None:
    known = KEYS | OPTIONAL
    for key, value in content.items():
        if key not in known:
            raise SuiteError(f"{where}: unknown key {key}; there are {', '.join(known)}")
        kinds = known[key] if isinstance(known[key], tuple) else (known[key],)
        if type(value) not in kinds:
            names = " or ".join(kind.__name__ for kind in kinds)
            raise SuiteError(f"{where}: {key} is {value!r}; it takes a value of type {names}")
        if key in LEAST and isinstance(value, int) and value < LEAST[key]:
            raise SuiteError(f"{where}: {key} is {value}; it is at least {LEAST[key]}")
        if isinstance(value, str) and not value.strip():
            raise SuiteError(f"{where}: {key} is empty")
        if isinstance(value, list) and not (value and all(type(x) is int and x >= 0 for x in value)):
            raise SuiteError(f"{where}: {key} is {value}; it takes whole numbers")
        if isinstance(value, list) and len(set(value)) < len(value):
            raise SuiteError(f"{where}: {key} is {value}, where one stands twice")
    if missing := [key for key in KEYS if key not in content]:
        raise SuiteError(f"{where}: {missing[0]} is missing")


def load(name_or_path: str | Path, **changes) -> Space:
    """A space by its name in tuner/spaces/, by the path of a TOML file or of a study's folder; with keys changed."""
    path, there = Path(name_or_path), sorted(file.stem for file in SPACES.glob("*.toml"))
    if (path / "space.toml").exists():
        path = path / "space.toml"
    if path.suffix != ".toml":
        path = SPACES / f"{name_or_path}.toml"
        if str(name_or_path) not in there:
            known = f"there are {', '.join(there)}, or paths of TOML files and of studies"
            raise SuiteError(f"there is no search space {name_or_path}; {known}")
    try:
        content = tomllib.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise SuiteError(f"search space {path} cannot be read: {error}") from None
    return read_space(content | {key: x for key, x in changes.items() if x is not None}, path)


def read_space(content: dict, path: Path) -> Space:
    where = f"space {path.stem}"
    check_keys(content, where)
    content = dict(content)
    script = find_script(content["script"], path.parent, where)
    known, steps = flags_of(script.read_text()), content["steps"]
    name = content.get("name", Entry(path.stem, content["env"], 0, 0, 0, "", {}).name)
    if not re.fullmatch(r"\w[\w.-]*", name):
        rule = "of letters, digits, dots, - and _, not beginning with a dot or -"
        raise SuiteError(f"{where}: name is {name}; it becomes a folder's, {rule}")
    tables = {name: content.get(name, {}) for name in ("fixed", "settled", "start")}
    if known:
        tables = {name: read_flags(x, script.name, known, f"{where}, [{name}]") for name, x in tables.items()}
    elif theirs := [key for x in (*tables.values(), content["space"]) for key in x if key.replace("-", "_") in OWN]:
        raise SuiteError(f"{where}: flag {theirs[0]} is the tuner's to set")
    for flag, value in ((flag, value) for table in tables.values() for flag, value in table.items()):
        if not known and not isinstance(value, bool | int | float | str):
            raise SuiteError(f"{where}: flag {flag} is {value}; it takes a number, a word, true or false")
    ranges = content["space"].items()
    dimensions = tuple(read_dimension(key, x, script.name, known, f"{where}, [space]") for key, x in ranges)
    if not dimensions:
        raise SuiteError(f"{where}: [space] is empty")
    names = [x.flag for x in dimensions]
    for flag in names:
        if names.count(flag) > 1:
            raise SuiteError(f"{where}, [space]: flag {flag} is there twice")
    for one, flags, other in (("fixed", names, "space"), ("settled", [*names, *tables["fixed"]], "space or [fixed]")):
        for flag in tables[one]:
            if flag in flags:
                raise SuiteError(f"{where}: flag {flag} is in [{one}] and in [{other}]")
    for flag in tables["start"]:
        if flag not in names:
            raise SuiteError(f"{where}: flag {flag} is in [start] and not in [space]")
    pruner, direction = content.get("pruner", "asha"), content.get("direction", "maximize")
    if pruner not in PRUNERS:
        raise SuiteError(f"{where}: pruner is {pruner}; there are {', '.join(PRUNERS)}")
    if direction not in ("maximize", "minimize"):
        raise SuiteError(f"{where}: direction is {direction}; there are maximize and minimize")
    reduction = content.get("reduction", 4)
    grace = content.get("grace", math.ceil(steps / (5 if pruner == "median" else reduction**2)))
    if pruner != "none" and grace >= steps:
        raise SuiteError(f"{where}: grace is {grace}, but a run has only {steps} steps")
    milestones = content.get("milestones", 20)
    if isinstance(milestones, list):
        if max(milestones) > steps or min(milestones) < 1:
            raise SuiteError(f"{where}: milestones go from 1 to the {steps} steps of a run")
        milestones = tuple(milestones)
    seeds = content.get("seeds", 1)
    seeds = tuple(seeds) if isinstance(seeds, list) else tuple(range(FIRST_SEED, FIRST_SEED + seeds))
    return Space(
        name=name,
        script=script,
        env=content["env"],
        steps=steps,
        trials=content["trials"],
        dimensions=dimensions,
        seeds=seeds,
        metric=content.get("metric", "final_return"),
        direction=direction,
        milestones=milestones,
        pruner=pruner,
        grace=grace,
        reduction=reduction,
        startup=content.get("startup", 5),
        **tables,
        defaults=defaults_of(script.read_text()),
    )


# ----------------------------------------------------------------------------------------------------------- writing


def toml(value) -> str:
    if value is None:
        return '"None"'
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{toml_key(key)} = {toml(x)}" for key, x in value.items()) + " }" if value else "{}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(toml, value)) + "]"
    return json.dumps(value, ensure_ascii=False)


def write(space: Space, folder: Path, notes: dict[str, str], head: str = "") -> str:
    """The space as TOML for a file in this folder; `notes` are comments above flags."""
    shipped = space.script == SCRIPTS / space.script.name
    name = (lambda flag: flag.replace("_", "-")) if flags_of(space.source) else (lambda flag: flag)
    top = {
        "script": space.script.stem if shipped else os.path.relpath(space.script, folder.resolve()),
        "env": space.env,
        "steps": space.steps,
    }
    top |= {"trials": space.trials, "name": space.name, "seeds": list(space.seeds), "metric": space.metric}
    top |= {"direction": space.direction, "pruner": space.pruner}
    top["milestones"] = space.milestones if isinstance(space.milestones, int) else list(space.milestones)
    if space.pruner != "none":
        top |= {"grace": space.grace, "reduction": space.reduction, "startup": space.startup}
    lines = [f"# {line}".rstrip() for line in head.splitlines()] + [f"{key} = {toml(x)}" for key, x in top.items()]
    ranges = {}
    for x in space.dimensions:
        scale = {"scale": x.scale} if x.scale not in ("linear", "choices") else {}
        ranges[x.flag] = {"choices": x.choices} if x.choices else scale | {"low": x.low, "high": x.high}
    tables = {"fixed": space.fixed, "settled": space.settled, "start": space.start, "space": ranges}
    for title, table in tables.items():
        if table or title == "space":
            lines += ["", f"[{title}]"]
        for flag, value in table.items():
            lines += [f"# {notes[flag]}"] if flag in notes and title != "start" else []
            lines.append(f"{toml_key(name(flag))} = {toml(value)}")
    return "\n".join(lines) + "\n"


def toml_key(key: str) -> str:
    return key if key.replace("-", "").replace("_", "").isalnum() and key.isascii() else json.dumps(key)
