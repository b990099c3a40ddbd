"""The run folder: what a script writes into it, and how a run is described. Nothing else here knows the files' names.

A run is a script, its flags, and a folder (`Spec`). Two runs are the same if the algorithm's half of the script and the
values of all flags are; threads and device do not count. `difference` decides that, at home and in the cloud.
"""

import ast
import ctypes
import fcntl
import hashlib
import io
import json
import os
import re
import signal
import sys
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from itertools import count
from pathlib import Path
from typing import NoReturn

import numpy as np
import pandas as pd

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS, RUNS = ROOT / "algos", ROOT / "runs"
BANNER = "# ------------------- The run: "  # what follows it in a script is the same in all of them
NEUTRAL = {"run_dir", "resume", "evaluate", "video", "torch_threads", "device"}  # flags that do not change the results


def fail(message: str, code: int = 2) -> NoReturn:
    print("error:", message, file=sys.stderr)
    raise SystemExit(code)


def words_of(flags: dict) -> list[str]:
    """{"learning_rate": 0.001, "clip_vloss": False} -> ["--learning-rate", "0.001", "--no-clip-vloss"]."""
    words = []
    for name, value in flags.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            values = [x for pair in value.items() for x in pair] if isinstance(value, dict) else value
            words += [f"--{flag}", *map(str, values if isinstance(values, list) else [values])]
    return words


def flags_of(words: list[str]) -> dict:
    """The inverse of `words_of`: strings for numbers, lists of strings for several, True and False for switches."""
    given: dict[str, list[str]] = {}
    for word in words:
        if word.startswith("--"):
            flag, equals, value = word[2:].partition("=")
            values = given.setdefault(flag.replace("-", "_"), [])
            values += [value] if equals else []
        elif given:
            values.append(word)
    flags: dict = {}
    for name, values in given.items():
        if values:
            flags[name] = values[0] if len(values) == 1 else values
        else:
            flags[name.removeprefix("no_")] = not name.startswith("no_")
    return flags


def canonical(value) -> object:
    """A flag's value in a form that is equal for 0.001 and "1e-3", and for a dict and its words."""
    if isinstance(value, dict):
        value = [x for pair in value.items() for x in pair]
    if isinstance(value, list | tuple):
        return [canonical(x) for x in value]
    with suppress(TypeError, ValueError):
        return str(value) if isinstance(value, bool) else float(value)
    return str(value)


@dataclass(frozen=True)
class Spec:
    """A run: the script, the flags by the names of its Args (with env_id, total_timesteps and seed), and the folder."""

    script: Path
    flags: dict
    folder: Path

    @property
    def words(self) -> list[str]:
        return words_of(self.flags)

    def command(self, threads: int = 1, device: str | None = None) -> list[str]:
        machine = {"torch_threads": threads} | ({"device": device} if device else {}) | {"run_dir": shown(self.folder)}
        return [sys.executable, shown(self.script), *self.words, *words_of(machine)]

    def resume_command(self) -> list[str]:
        """The copy of the script that began the run continues it."""
        return [sys.executable, shown(self.folder / self.script.name), "--resume", shown(self.folder)]


def shown(path: Path) -> str:
    """A path as one would type it here."""
    path = path.absolute()
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


@cache
def defaults(source: str) -> dict:
    """The fields of the Args in a script's text and their defaults; ... where that is not written out."""
    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef) and node.name == "Args":
            for field in (x for x in node.body if isinstance(x, ast.AnnAssign)):
                found[field.target.id] = ...
                with suppress(ValueError):
                    is_dict = field.value and ast.unparse(field.value) == "field(default_factory=dict)"
                    found[field.target.id] = {} if is_dict else ast.literal_eval(field.value)
    return found


@cache
def code_hash(source: str) -> str:
    """Hash of the algorithm's half of a script, without comments, docstrings and what differs between Pythons."""
    tree = ast.parse(source.partition(BANNER)[0])
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node, clean=False):
            node.body = node.body[1:]
    text = re.sub(r"\w+=\[\]|, ", "", ast.dump(tree))  # Python 3.13 leaves out empty lists
    return hashlib.sha256(text.encode()).hexdigest()[:16]


# --------------------------------------------------------------------------------------------------- the run folder


def read_json(path: Path) -> dict:
    with suppress(OSError, ValueError):
        content = json.loads(path.read_text())
        return content if isinstance(content, dict) else {}
    return {}


def read_args(folder: Path) -> dict:
    """args.json: args, command, commit, versions, cpu, threads, gpu, started. {} if it is missing or unreadable."""
    return read_json(folder / "args.json")


def read_result(folder: Path) -> dict:
    """result.json, {} while the run is unfinished."""
    return read_json(folder / "result.json")


def read_episodes(folder: Path) -> pd.DataFrame:
    """episodes.csv: step, seconds, return, length. The last row may be half written and is dropped then."""
    text = ""
    with suppress(OSError):
        text = (folder / "episodes.csv").read_text()
    return pd.read_csv(io.StringIO(text[: text.rfind("\n") + 1] or "step,seconds,return,length\n"))


def progress(folder: Path) -> tuple[int, float, float | None]:
    """Steps, seconds and mean return of the last 100 episodes, from the end of episodes.csv."""
    with suppress(OSError, ValueError), (folder / "episodes.csv").open("rb") as file:
        names, start = file.readline().decode().strip().split(","), file.tell()
        end = file.seek(0, os.SEEK_END)
        file.seek(max(start, end - 10_000))
        lines = file.read().decode().split("\n")[end - start > 10_000 : -1]  # whole lines only
        rows = [dict(zip(names, line.split(","), strict=True)) for line in lines[-100:]]
        if rows:
            mean = sum(float(row["return"]) for row in rows) / len(rows)
            return int(rows[-1]["step"]), float(rows[-1]["seconds"]), mean
    return 0, 0.0, None


def trailing_means(steps: np.ndarray, returns: np.ndarray, at: np.ndarray, window: int = 100) -> np.ndarray:
    """Mean of the last `window` episodes that had ended by each step of `at`, fewer at the beginning, nan before the
    first: episodes (E,), (E,) and (T,) -> (T,)."""
    sums = np.concatenate([[0.0], np.cumsum(returns)])
    ended = np.searchsorted(steps, at, side="right")
    first = np.maximum(ended - window, 0)
    return (sums[ended] - sums[first]) / np.where(ended == 0, np.nan, ended - first)


def difference(folder: Path, spec: Spec) -> str:
    """What distinguishes the run in a folder from `spec`, in a few words; "" if they are the same run."""
    had = read_args(folder).get("args")
    if not isinstance(had, dict):
        return "args.json is missing or damaged"
    try:
        copy, script = (folder / spec.script.name).read_text(), spec.script.read_text()
        if code_hash(copy) != code_hash(script):
            return f"{spec.script.name} has changed"
    except (OSError, SyntaxError) as error:
        return f"{spec.script.name} cannot be compared: {error}"
    wanted = defaults(script) | spec.flags
    for name in (wanted.keys() | had.keys()) - NEUTRAL:
        if wanted.get(name) is not ... and canonical(had.get(name)) != canonical(wanted.get(name)):
            return f"--{name.replace('_', '-')} was {had.get(name)} and is {wanted.get(name)}"
    return ""


def move_aside(folder: Path) -> Path:
    """Rename a folder to the first of NAME.old-1, NAME.old-2, ... that is free."""
    free = (path for i in count(1) if not (path := folder.with_name(f"{folder.name}.old-{i}")).exists())
    return folder.rename(next(free))


def take_lock(path: Path) -> int | None:
    """An exclusive lock as a file descriptor, None if another process has it. It dies with its process."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    with suppress(BlockingIOError, FileNotFoundError):
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(lock), path.stat()):  # else its last owner removed the file in the meantime
            return lock
    os.close(lock)
    return None


def is_locked(path: Path) -> bool:
    lock = take_lock(path) if path.exists() else None
    if lock is not None:
        os.close(lock)
    return lock is None and path.exists()


def dying_with_parent():
    """For Popen's preexec_fn: on Linux the child is killed when this process ends, whatever ends it."""
    parent, libc = os.getpid(), ctypes.CDLL(None) if sys.platform == "linux" else None

    def prepare() -> None:
        if libc and (libc.prctl(1, signal.SIGKILL) or os.getppid() != parent):  # PR_SET_PDEATHSIG; it died before that
            os.kill(os.getpid(), signal.SIGKILL)

    return prepare
