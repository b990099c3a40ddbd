"""Suites: which runs a benchmark consists of.

A suite is a TOML file, in benchmark/suites/ or elsewhere. An entry is a script on an environment, with seeds 1 to n:

    title = "Classic control"
    seeds = 10

    [[entry]]
    script = "ppo"              # algos/ppo.py; or the path of a script, relative to this file: "../my_ppo.py"
    env = "CartPole-v1"         # or a pattern, "ALE/*": all environments of the entries above that fit it
    steps = 200_000
    flags = { learning-rate = 1e-3, clip-vloss = false, env-kwargs = { gravity = -5.0 } }       # optional
    target = 475.0              # optional: what the mean training return, or if `evaluated`, evaluation should reach
    why = "the default choice"  # optional: what the entry is for
    tried = "a larger batch"    # optional: what was tried, if it misses its target

`script`, `steps`, `seeds`, and `evaluated` (true) may stand at the top instead, for all entries; `protocol`, a text for
the page, only there. Names are checked here, before anything starts; values by the script itself.
"""

import difflib
import re
import tomllib
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

from benchmark.runs import RUNS, SCRIPTS, Spec, defaults

SUITES = Path(__file__).resolve().parent / "suites"
RESERVED = {"env_id", "total_timesteps", "seed", "run_dir", "resume", "evaluate", "torch_threads", "device"}
KINDS = {"script": str, "env": str, "steps": int, "seeds": int, "flags": dict}
KINDS |= {"target": float, "evaluated": bool, "why": str, "tried": str}
COMMON = {"script", "steps", "seeds", "evaluated"}  # may stand at the top
TOP = {"title": str, "protocol": str, "entry": list} | {key: KINDS[key] for key in COMMON}


class SuiteError(ValueError):
    """A mistake in a TOML file, in one line."""


@dataclass(frozen=True)
class Entry:
    script: Path
    env: str
    steps: int
    seeds: int
    flags: dict = field(default_factory=dict)  # by the names of the script's Args
    target: float | None = None
    evaluated: bool = False
    why: str = ""
    tried: str = ""

    @property
    def name(self) -> str:
        """CartPole-v1__ppo: the entry's part of a file name."""
        return f"{re.sub('[^A-Za-z0-9]+', '-', self.env)}__{self.script.stem}"

    @property
    def algo(self) -> str:
        return re.sub("_(continuous|discrete|atari)$", "", self.script.stem)

    def fits(self, patterns: tuple[str, ...]) -> bool:
        """Does a pattern of `--only` match its script, environment, or name? Without patterns every entry fits."""
        names = self.script.stem, self.env, self.name
        return not patterns or any(fnmatchcase(name, pattern) for name in names for pattern in patterns)

    def spec(self, suite: str, seed: int, runs: Path = RUNS) -> Spec:
        flags = {"env_id": self.env, "total_timesteps": self.steps, "seed": seed} | self.flags
        return Spec(self.script, flags, runs / suite / f"{self.name}__{seed}")


@dataclass(frozen=True)
class Suite:
    name: str  # the file's name without .toml
    title: str
    entries: tuple[Entry, ...]
    protocol: str = ""


def check_keys(table: dict, kinds: dict, required: tuple[str, ...], where: str) -> None:
    for key, value in table.items():
        if key not in kinds:
            raise SuiteError(f"{where}: unknown key {key}; known: {', '.join(kinds)}")
        if type(value) is not kinds[key] and not (kinds[key] is float and type(value) is int):
            raise SuiteError(f"{where}: {key} is {value!r}, not of type {kinds[key].__name__}")
        if kinds[key] is int and value < 1:
            raise SuiteError(f"{where}: {key} is {value}, must be at least 1")
    if missing := [key for key in required if key not in table]:
        raise SuiteError(f"{where}: {missing[0]} is missing")


def find_script(name: str, folder: Path, where: str) -> tuple[Path, dict]:
    """A script by its name in algos/ or by its path, relative to `folder`; and the defaults of its flags."""
    path = (folder / name).resolve() if name.endswith(".py") else SCRIPTS / f"{name}.py"
    try:
        return path, defaults(path.read_text())
    except (OSError, SyntaxError) as error:
        raise SuiteError(f"{where}: cannot read script {path}: {error}") from None


def check_flags(table: dict, known: dict, script: str, where: str) -> dict:
    """Flags of a TOML table, by the names of the script's Args."""
    flags = {key.replace("-", "_"): value for key, value in table.items()}
    for name in flags:
        if name in RESERVED:
            raise SuiteError(f"{where}: --{name.replace('_', '-')} is set by the runner")
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0].replace('_', '-')}?" if near else ""
            raise SuiteError(f"{where}: {script} has no flag {name.replace('_', '-')}{hint}")
    return flags


def read_toml(path: Path) -> dict:
    try:
        return tomllib.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise SuiteError(f"cannot read {path}: {error}") from None


def expand(rows: list[dict]) -> list[dict]:
    """An entry whose environment is a pattern becomes one for each of the environments above it that fit."""
    found, envs = [], {}
    for row in rows:
        name = str(row.get("env"))
        if "*" not in name:
            envs[name] = True
        found += [row | {"env": env} for env in envs if fnmatchcase(env, name)] or [row]
    return found


def suite_names() -> list[str]:
    return sorted(path.stem for path in SUITES.glob("*.toml"))


def load(name_or_path: str | Path) -> Suite:
    """A suite by its name in benchmark/suites/, or by the path of a TOML file."""
    path = Path(name_or_path)
    if path.suffix != ".toml":
        path = SUITES / f"{name_or_path}.toml"
        if path.stem not in suite_names():
            raise SuiteError(f"no suite {name_or_path}; there are {', '.join(suite_names())}, or give a TOML file")
    content = read_toml(path)
    check_keys(content, TOP, ("entry",), f"suite {path.stem}")
    if not all(isinstance(row, dict) for row in content["entry"]):
        raise SuiteError(f"suite {path.stem}: an entry is a table, [[entry]], not {content['entry'][0]!r}")
    entries: dict[str, Entry] = {}
    for number, row in enumerate(expand(content["entry"]), 1):
        row = {key: content[key] for key in COMMON & content.keys()} | row
        where = f"suite {path.stem}, entry {number} ({row.get('script')}, {row.get('env')})"
        check_keys(row, KINDS, ("script", "env", "steps", "seeds"), where)
        if "*" in row["env"]:
            raise SuiteError(f"{where}: no environment of the entries above fits the pattern")
        script, known = find_script(row["script"], path.parent, where)
        flags = check_flags(row.get("flags", {}), known, script.name, where)
        entry = Entry(**row | {"script": script, "flags": flags})
        if entry.name in entries:
            raise SuiteError(f"{where}: an earlier entry has the same script and environment")
        entries[entry.name] = entry
    return Suite(path.stem, content.get("title", path.stem), tuple(entries.values()), content.get("protocol", ""))
