"""Suites: which runs a benchmark consists of. Read and checked here, for the runner and for the report.

A suite is a TOML file in benchmark/suites/. It says what its table is about and lists the entries; an entry is a script
on an environment, and its seeds are 1, 2, ..., n:

    title = "Classic control"
    protocol = "what is trained, and how it is scored"
    seeds = 10

    [[entry]]
    script = "ppo"              # algos/ppo.py
    env = "CartPole-v1"
    steps = 200_000
    seeds = 5                   # if not the suite's
    target = 475.0              # what the mean of final_return over the seeds has to reach
    why = "what the entry is for"
    flags = { learning-rate = 1e-3, clip-vloss = false, env-kwargs = { gravity = -5.0 } }       # optional

What most entries have in common, `script`, `steps` and `seeds`, may stand at the top instead, once.

A mistake is one line that names suite and entry (`SuiteError`), before anything has started. Flags are checked against
the script's `Args`, which is read as text: no script is imported here.
"""

import ast
import csv
import difflib
import hashlib
import json
import math
import re
import shlex
import tomllib
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path

HERE = Path(__file__).resolve().parent
SUITES, REFERENCE, SCRIPTS = HERE / "suites", HERE / "reference.csv", HERE.parent / "algos"
REPEATED = HERE / "repeated.csv"  # which changes of a script have left an entry's runs alone: by repeat.py

OWN = {"env_id", "total_timesteps", "seed", "run_dir", "torch_threads", "device", "resume", "evaluate"}  # the runner's
ENTRY_KEYS = {"script": str, "env": str, "steps": int, "seeds": int, "target": float, "why": str}
ENTRY_KEYS |= {"flags": dict, "tried": str}  # these two may be left out
COMMON = "script", "steps", "seeds"  # keys of an entry that may stand at the top of the suite
SUITE_KEYS = {"title": str, "protocol": str, "entry": list} | {key: ENTRY_KEYS[key] for key in COMMON}


class SuiteError(ValueError):
    """A mistake in a suite, told in one line."""


@dataclass(frozen=True)
class Entry:
    script: str
    env: str
    steps: int
    seeds: int
    target: float
    why: str
    flags: dict  # by the names of the script's Args: {"learning_rate": 0.001, "clip_vloss": False}
    tried: str = ""  # if it falls short of its target: what was done about it

    @property
    def name(self) -> str:
        """The entry's part of a file name."""
        return f"{re.sub('[^A-Za-z0-9]+', '-', self.env)}__{self.script}"

    @property
    def words(self) -> list[str]:
        """The entry's flags as words of a command line, in one order: --learning-rate 0.001 --no-clip-vloss."""
        words = []
        for name, value in sorted(self.flags.items()):
            flag = name.replace("_", "-")
            if isinstance(value, bool):
                words.append(f"--{'' if value else 'no-'}{flag}")
            else:
                pairs = value.items() if isinstance(value, dict) else [[value]]
                words += [f"--{flag}", *(str(x) for pair in pairs for x in pair)]
        return words

    @property
    def code(self) -> str:
        """The hash of what its script does now."""
        return code_hash((SCRIPTS / f"{self.script}.py").read_text())

    def fits(self, patterns: tuple[str, ...]) -> bool:
        """Is it one of those that `--only` names: by script, environment or folder name? All are, if it names none."""
        names = self.script, self.env, self.name
        return not patterns or any(fnmatchcase(name, pattern) for name in names for pattern in patterns)

    @property
    def key(self) -> tuple[str, str, str, str]:
        """What its runs have in common, as in repeated.csv."""
        return self.script, self.env, str(self.steps), shlex.join(self.words)


@dataclass(frozen=True)
class Suite:
    name: str  # the file's name without .toml
    title: str
    protocol: str
    entries: tuple[Entry, ...]


def run_folder(runs: Path, suite: str, entry: Entry, seed: int) -> Path:
    return runs / suite / f"{entry.name}__{seed}"


@cache
def code_hash(source: str) -> str:
    """Of what decides a script's results: its syntax tree without docstrings, so that an edit of a text or a comment
    changes nothing, and without what `fail` is called with, which ends in no result. Empty fields are left out, because
    each Python version adds some."""

    def form(node) -> str:
        if isinstance(node, list):
            return "[" + ",".join(form(x) for x in node if not is_text(x)) + "]"
        if not isinstance(node, ast.AST):
            return repr(node)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "fail":
            return "fail()"
        fields = ((name, value) for name, value in ast.iter_fields(node) if value is not None and value != [])
        return type(node).__name__ + "(" + ",".join(f"{name}={form(value)}" for name, value in fields) + ")"

    def is_text(node) -> bool:
        return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)

    return hashlib.sha256(form(ast.parse(source)).encode()).hexdigest()[:16]


def same_runs(entry: Entry, a: str, b: str) -> bool:
    """Is it known that the script gives the same runs of this entry with code of hash `a` and of hash `b`?"""
    reached = {a}
    if a != b and REPEATED.exists():
        with REPEATED.open(newline="") as file:
            links = [{code, now} for *key, _, code, now in csv.reader(file) if tuple(key) == entry.key]
        for _ in links:
            reached = reached.union(*(link for link in links if link & reached))
    return b in reached


def why_stale(folder: Path, entry: Entry, seed: int, scripts: Path = SCRIPTS) -> str | None:
    """What sets a run folder apart from the run that the entry asks for now, or None."""
    script = f"{entry.script}.py"
    try:
        described = json.loads((folder / "args.json").read_text())
        had, command = dict(described["args"]), list(described["command"])
        code, now = code_hash((folder / script).read_text()), code_hash((scripts / script).read_text())
    except (OSError, ValueError, KeyError, TypeError, SyntaxError) as error:
        return f"its args.json or its copy of the script cannot be read: {error!r}"
    wanted = {"env_id": entry.env, "total_timesteps": entry.steps, "seed": seed} | entry.flags
    for name, value in wanted.items():
        if had.get(name) != value:
            return f"--{name.replace('_', '-')} was {had.get(name)} and is {value} now"
    for word in command[1:]:  # a flag that the entry no longer has: the script's default counts now
        name = word.partition("=")[0].removeprefix("--").replace("-", "_")
        name = name if name in had else name.removeprefix("no_")
        if word.startswith("--") and name not in wanted.keys() | OWN:
            return f"{word} was given and is not now"
    is_finished = (folder / "result.json").exists()  # another is not to be gone on with by another script
    if code != now and not (is_finished and same_runs(entry, code, now)):
        return f"{script} has changed"
    return None


# ------------------------------------------------------------------------------------------------- reading and checking


@cache
def flags_of(source: str) -> dict[str, str]:
    """The fields of the Args in a script's text and their annotations, {"learning_rate": "float", ...}."""
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef) and node.name == "Args":
            return {x.target.id: ast.unparse(x.annotation) for x in node.body if isinstance(x, ast.AnnAssign)}
    return {}


def takes(source: str, flag: str) -> bool:
    """Whether a script has this flag: in its Args, or, of a script without Args, somewhere in its text."""
    known = flags_of(source)
    return flag in known if known else f"--{flag.replace('_', '-')}" in source


def as_field(value, annotation: str):
    """A flag's value as the script's Args will hold it; a ValueError says which values the annotation takes."""
    kinds = ["dict"] if annotation.startswith("dict[") else [kind.strip() for kind in annotation.split("|")]
    if value == "None" and "None" in kinds:
        return None
    for kind in kinds:
        if kind.startswith("Literal["):
            if value in ast.literal_eval(f"({kind[8:-1]},)"):
                return value
        elif kind == "float" and type(value) in (int, float):
            return float(value)
        elif kind == type(value).__name__:
            return value
    raise ValueError(f"takes {annotation}, not {json.dumps(value, default=str)}")


def random_returns() -> dict[str, float]:
    """The random policy's return in each environment that benchmark/reference.csv knows; the lowest of several."""
    if not REFERENCE.exists():
        return {}
    with REFERENCE.open(newline="") as file:
        rows = [(row["env_id"], float(row["score"])) for row in csv.DictReader(file) if row["algo"] == "random"]
    return dict(sorted(rows, reverse=True))  # of equal keys the last one stays


def check_keys(found: dict, known: dict, optional: tuple[str, ...], where: str) -> None:
    for key, value in found.items():
        if key not in known:
            raise SuiteError(f"{where}: unknown key {key}; there are {', '.join(known)}")
        if type(value) is not known[key] and not (known[key] is float and type(value) is int):
            raise SuiteError(f"{where}: {key} is {value!r}; it takes a value of type {known[key].__name__}")
        if key in ("steps", "seeds") and value < 1:
            raise SuiteError(f"{where}: {key} is {value}; it is at least 1")
        if known[key] is str and not value.strip():
            raise SuiteError(f"{where}: {key} is empty")
    if missing := [key for key in known if key not in found and key not in optional]:
        raise SuiteError(f"{where}: {missing[0]} is missing")


def flag_name(key: str, script: str, known: dict[str, str], where: str) -> str:
    """The field of a script's Args that a flag in a TOML file stands for."""
    name = key.replace("-", "_")
    if name in OWN:
        raise SuiteError(f"{where}: flag {key} is the runner's to set")
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"; near it: {near[0].replace('_', '-')}" if near else ""
        raise SuiteError(f"{where}: {script} has no flag {key}{hint}")
    return name


def read_flags(table: dict, script: str, known: dict[str, str], where: str) -> dict:
    """Flags and their values as the script's Args will hold them."""
    flags = {}
    for key, value in table.items():
        name = flag_name(key, script, known, where)
        if name in flags:
            raise SuiteError(f"{where}: flag {key} is there twice")
        try:
            flags[name] = as_field(value, known[name])
        except ValueError as error:
            raise SuiteError(f"{where}: flag {key} {error}") from None
    return flags


def read_entry(row: dict, where: str, scripts: Path) -> Entry:
    check_keys(row, ENTRY_KEYS, ("flags", "tried"), where)
    path = scripts / f"{row['script']}.py"
    if not path.is_file():
        raise SuiteError(f"{where}: there is no script {path}")
    try:
        known = flags_of(path.read_text())
    except SyntaxError as error:
        raise SuiteError(f"{where}: {path.name} cannot be read: {error}") from None
    flags = read_flags(row.get("flags", {}), path.name, known, where)
    return Entry(**row | {"target": float(row["target"]), "flags": flags})


def suite_names() -> list[str]:
    return sorted(file.stem for file in SUITES.glob("*.toml"))


def load(name_or_path: str | Path, scripts: Path = SCRIPTS) -> Suite:
    """A suite by its name in benchmark/suites/ or by the path of a TOML file, checked from end to end."""
    path = Path(name_or_path)
    if path.suffix != ".toml":
        path = SUITES / f"{name_or_path}.toml"
        if str(name_or_path) not in suite_names():
            there = ", ".join(suite_names())
            raise SuiteError(f"there is no suite {name_or_path}; there are {there}, or paths of TOML files")
    try:
        content = tomllib.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise SuiteError(f"suite {path} cannot be read: {error}") from None
    where = f"suite {path.stem}"
    check_keys(content, SUITE_KEYS, COMMON, where)
    if not content["entry"]:
        raise SuiteError(f"{where}: it has no entry")
    numbers, entries, random = {}, [], random_returns()
    for number, row in enumerate(content["entry"], 1):
        if not isinstance(row, dict):
            raise SuiteError(f"{where}, entry {number}: it is {row!r}, not a table")
        row = {key: content[key] for key in COMMON if key in content} | row
        place = f"{where}, entry {number} ({row.get('script')}, {row.get('env')})"
        entry = read_entry(row, place, scripts)
        if entry.name in numbers:
            raise SuiteError(f"{place}: entry {numbers[entry.name]} has the same script and environment")
        if entry.target < random.get(entry.env, -math.inf):
            low = f"target {entry.target:g} is below the random policy's {random[entry.env]:g}"
            raise SuiteError(f"{place}: {low}; is its sign wrong?")
        numbers[entry.name] = number
        entries.append(entry)
    return Suite(path.stem, content["title"], content["protocol"], tuple(entries))
