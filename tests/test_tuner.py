"""tuner/: every trial is made once, whatever is killed; flags arrive as they were sampled; what is poor is cut short,
what diverges teaches, what is broken stops the search. Most of it with a script that only pretends to learn."""

import csv
import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import tomllib
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import optuna
import pytest
from conftest import ROOT, SCRIPTS, finish, lives
from optuna.trial import TrialState

import tuner.run
from benchmark import run, stats
from benchmark.suites import SuiteError, as_field, flags_of
from tuner import report, spaces, study
from tuner.search import Run

TIMEOUT = 120  # seconds for any one process: a hang, whatever else the machine is doing
SHIPPED = sorted(path.stem for path in spaces.SPACES.glob("*.toml"))

LEARNER = """
from __future__ import annotations

import json, math, os, shutil, signal, sys, time
from pathlib import Path


class Args:
    env_id: str = "A-v1"
    seed: int = 1
    total_timesteps: int = 60
    run_dir: str = ""
    resume: str = ""
    env_kwargs: dict[str, bool | int | float | str] = {}
    torch_threads: int = 1
    device: str = "cpu"
    rate: float = 1e-3
    size: int = 64
    gamma: float = 0.99
    on: bool = True
    kind: Literal["plain", "fancy"] = "plain"
    limit: float | None = None
    pace: float = 0.0
    mode: str = "ok"
    go: str = ""
    extra: int = 0


words, given = iter(sys.argv[1:]), {}
for word in words:
    name = word.removeprefix("--").replace("-", "_")
    given |= {name[3:]: False} if name.startswith("no_") else {name: True} if name == "on" else {name: next(words)}
folder = Path(given.get("resume") or given["run_dir"])


def journal(what):
    with (folder.parent.parent / "journal").open("a") as file:
        file.write(f"{folder.parent.name}/{folder.name} {os.getpid()} {what}\\n")


def write(name, content):
    (folder / "aside").write_text(json.dumps(content))
    (folder / "aside").replace(folder / name)


if "resume" in given:
    if not (folder / "args.json").exists():
        sys.exit("error: nothing to resume")
    journal("resume")
else:
    folder.mkdir(parents=True, exist_ok=True)
    assert not any(folder.iterdir()), "not empty"
    shutil.copy(sys.argv[0], folder)
    write("args.json", {"args": given, "command": sys.argv})
    journal("begin")
args = json.loads((folder / "args.json").read_text())["args"]
step = 0
if (folder / "checkpoint.pt").exists():
    if not (folder / "checkpoint.pt").read_text().strip():
        print("error: the checkpoint is damaged")
        sys.exit(2)
    step = json.loads((folder / "checkpoint.pt").read_text())["step"]
mode, rate, steps = args.get("mode", "ok"), float(args.get("rate", 1e-3)), int(args["total_timesteps"])
quality = 3 - abs(math.log10(rate) + 2) + int(args["seed"]) % 7 / 100
rows = (folder / "episodes.csv").open("a" if step else "w")
if step:
    lines = (folder / "episodes.csv").read_text().splitlines(keepends=True)[: step + 1]
    (folder / "episodes.csv").write_text("".join(lines))
else:
    rows.write("step,seconds,return,length\\n")
try:
    while step < steps:
        if step == steps // 2 and (mode == "diverge" or mode == "picky" and rate > 0.05):
            print("the loss is not finite")
            rows.flush()
            sys.exit(3)
        if mode == "broken":
            print("first words\\nerror: no such thing", flush=True)
            sys.exit(2)
        time.sleep(float(args.get("pace", 0)) * (4 if mode == "slow" and rate < 2e-4 else 1))
        while mode == "wait" and step == 20 and not Path(args.get("go") or folder.parent.parent / "go").exists():
            time.sleep(0.01)
        step += 1
        rows.write(f"{step},{step / 100},{quality * step},1\\n")
        rows.flush()
        if step % 10 == 0:
            write("checkpoint.pt", {"step": step})
except KeyboardInterrupt:
    sys.exit(130)
write("result.json", {"final_return": quality * step, "other": -quality, "steps": step, "seconds": step / 100})
journal("end")
"""

SPACE = {"script": "learner.py", "env": "A-v1", "steps": 60, "trials": 6, "milestones": 6, "pruner": "none"}
RATE = {"scale": "log", "low": 1e-4, "high": 1e-1}


class House:
    """A folder with a script, a space and studies, and the tuner started in it as a user does."""

    def __init__(self, path: Path):
        self.path, self.url = path, None
        (path / "learner.py").write_text(LEARNER)

    @property
    def trials(self) -> Path:
        return self.path / "studies" / "s" / "trials"

    def space(self, ranges: dict | None = None, **changes) -> Path:
        content = SPACE | {"name": "s", "space": ranges or {"rate": RATE}} | changes
        lines = [f"{key} = {spaces.toml(x)}\n" for key, x in content.items() if x is not None]
        (self.path / "s.toml").write_text("".join(lines))
        return self.path / "s.toml"

    def start(self, *words, stdout=subprocess.PIPE) -> subprocess.Popen:
        words = [str(word) for word in words or ("search", "s.toml")]
        words += ["--studies", "studies"] + (["--storage", self.url] if self.url else [])
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        environment.pop("UV", None)
        pipes = {"stdin": subprocess.DEVNULL, "stdout": stdout, "stderr": subprocess.PIPE, "text": True}
        command = [sys.executable, ROOT / "tuner" / "run.py", *words]
        return subprocess.Popen(command, cwd=self.path, env=environment, **pipes)

    def run(self, *words) -> SimpleNamespace:
        return finish(self.start(*words))

    def search(self, *words) -> SimpleNamespace:
        return self.run("search", "s.toml", *words)

    def study(self) -> optuna.Study:
        storage = study.open_storage(self.url, self.path / "studies" / "s")
        return optuna.load_study(study_name="s", storage=storage)

    def journal(self, *kinds: str) -> list[list[str]]:
        """What the scripts wrote: run, process id, what happened."""
        path = self.trials / "journal"
        lines = [line.split() for line in path.read_text().splitlines()] if path.exists() else []
        return [line for line in lines if not kinds or line[2] in kinds]

    def wait(self, process: subprocess.Popen, lines: int, *kinds: str) -> None:
        wait_until(lambda: len(self.journal(*kinds)) >= lines, process)

    def let_go(self) -> None:
        (self.trials / "go").touch()

    def files(self) -> dict[str, int]:
        return {str(path.relative_to(self.path)): path.stat().st_mtime_ns for path in sorted(self.path.rglob("*"))}


def wait_until(condition, *processes: subprocess.Popen) -> None:
    end = time.monotonic() + TIMEOUT
    while not condition():
        if any(x.poll() is not None for x in processes) or time.monotonic() > end:
            for process in processes:
                process.kill()
            pytest.fail(f"the tuner ended, or waits for something: {[x.communicate() for x in processes]}")
        time.sleep(0.01)


def kill(*processes: subprocess.Popen) -> None:
    for process in processes:
        process.kill()
    for process in processes:
        process.communicate()
        assert process.returncode == -signal.SIGKILL, "it ended before it could be killed"


def given(folder: Path) -> dict:
    return json.loads((folder / "args.json").read_text())["args"]


@pytest.fixture
def house(tmp_path) -> House:
    return House(tmp_path)


@pytest.fixture
def call(monkeypatch, capsys):
    """call(house, *words) -> code, out, err: in this process, which saves the time of starting another."""

    def call(house: House, *words) -> SimpleNamespace:
        monkeypatch.chdir(house.path)
        monkeypatch.setattr(sys, "argv", ["tuner/run.py", *map(str, words), "--studies", "studies"])
        capsys.readouterr()
        code = 0
        try:
            tuner.run.main()
        except SystemExit as end:
            code = end.code
        out, err = capsys.readouterr()
        return SimpleNamespace(code=code, out=out, err=err)

    return call


# --------------------------------------------------------------------------------------------------------------- spaces


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_spaces_are_right(name):
    """Every default is inside, so that Optuna sees the first trial; three to four trials for each flag."""
    import ale_py

    gym.register_envs(ale_py)
    space = spaces.load(name)
    known = flags_of(space.source)
    assert space.env in gym.registry
    assert space.first_params().keys() == {x.param for x in space.dimensions}
    assert 3 * len(space.dimensions) <= space.trials <= 4.5 * len(space.dimensions)
    for x in space.dimensions:
        ends = x.choices or (x.low, x.high)
        assert [as_field(end, known[x.flag]) for end in ends] == list(ends)
    wide = [x for x in space.dimensions if x.flag in ("num_envs", "num_steps")]
    batch = math.prod(x.low for x in wide) * (1 if "num_envs" in {x.flag for x in wide} else space.defaults["num_envs"])
    minibatches = next((x for x in space.dimensions if x.flag == "num_minibatches"), None)
    assert minibatches is None or batch % minibatches.high == 0  # a power of two divides every larger one


def test_every_script_has_a_space():
    assert set(SCRIPTS) == {spaces.load(name).script.stem for name in SHIPPED} and set(SCRIPTS) <= set(SHIPPED)


def test_a_space_is_read_and_written(house):
    ranges = {
        "rate": RATE,
        "size": {"scale": "log2", "low": 16, "high": 256},
        "gamma": {"scale": "log(1-x)", "low": 0.9, "high": 0.999},
        "on": {"choices": [True, False]},
        "kind": {"choices": ["plain", "fancy"]},
        "limit": {"choices": ["None", 1, 2.5]},
        "pace": {"low": 0, "high": 1},
    }
    tables = {"settled": {"extra": 1}, "start": {"rate": 0.02}}
    tables["fixed"] = {"mode": "ok", "env_kwargs": {"gravity": -5.0}}
    path = house.space(ranges, seeds=3, pruner="asha", grace=7, **tables)
    space = spaces.load(path)
    assert [x.flag for x in space.dimensions] == list(ranges) and space.seeds == (101, 102, 103)
    assert [x.param for x in space.dimensions][:4] == ["rate", "log2(size)", "1-gamma", "on"]
    assert space.dimensions[5].choices == (None, 1.0, 2.5) and space.dimensions[6].low == 0.0
    assert space.grid == [7, 10, 20, 28, 30, 40, 50, 60]
    assert spaces.load(path, steps=1000, grace=60, milestones=1).grid == [60, 240, 1000]  # nothing is judged at 960
    assert space.first_params() == {
        "rate": 0.02,
        "log2(size)": 6,
        "1-gamma": 0.01,
        "on": True,
        "kind": "plain",
        "limit": None,
        "pace": 0.0,
    }
    params = space.first_params() | {"1-gamma": 0.0123456789, "rate": 0.00123456789, "on": False}
    assert space.flags(1, params) == {
        "mode": "ok",
        "env_kwargs": {"gravity": -5.0},
        "extra": 1,
        "rate": 0.001235,
        "size": 64,
        "gamma": 0.98765,
        "on": False,
        "kind": "plain",
        "limit": None,
        "pace": 0.0,
    }
    assert space.flags(0, params) == space.fixed | {"extra": 1, "rate": 0.02}
    assert space.entry(space.fixed).words == ["--env-kwargs", "gravity", "-5.0", "--mode", "ok"]
    (house.path / "t.toml").write_text(spaces.write(space, house.path, {"rate": "a note"}, "a head\nof two lines"))
    text = (house.path / "t.toml").read_text()
    assert (
        spaces.load(house.path / "t.toml") == space and "# a note\nrate" in text and text.startswith("# a head\n# of")
    )


MISTAKES = {
    "unknown key": ({"step": 5}, "unknown key step"),
    "no script": ({"script": None}, "script is missing"),
    "unknown script": ({"script": "missing"}, "missing.py"),
    "no trials": ({"trials": 0}, "trials is 0"),
    "half a step": ({"steps": 0.5}, "steps is 0.5"),
    "a name with a slash": ({"name": "a/b"}, "name is a/b"),
    "the folder above": ({"name": ".."}, "name is .."),
    "a name like a flag": ({"name": "-x"}, "name is -x"),
    "no such pruner": ({"pruner": "hyperband"}, "pruner is hyperband"),
    "no such direction": ({"direction": "up"}, "direction is up"),
    "late grace": ({"pruner": "asha", "grace": 60}, "grace is 60"),
    "late milestone": ({"milestones": [10, 70]}, "milestones go from 1 to the 60"),
    "a seed twice": ({"seeds": [1, 1]}, "one stands twice"),
    "no flag": ({"space": {}}, "[space] is empty"),
    "unknown flag": ({"space": {"raet": RATE}}, "no flag raet; near it: rate"),
    "the runner's flag": ({"space": {"env-id": RATE}}, "env-id is the runner's"),
    "a flag twice": ({"fixed": {"rate": 0.1}}, "rate is in [fixed] and in [space]"),
    "settled and tuned": ({"settled": {"rate": 0.1}}, "rate is in [settled] and in [space"),
    "settled and fixed": ({"fixed": {"size": 1}, "settled": {"size": 1}}, "size is in [settled]"),
    "a start outside": ({"start": {"size": 3}}, "size is in [start] and not in [space]"),
    "unknown fixed": ({"fixed": {"missing": 3}}, "no flag missing"),
    "a word for a number": ({"space": {"rate": {"low": "a", "high": 1}}}, "takes float"),
    "a fraction for a whole": ({"space": {"size": {"low": 1.5, "high": 3}}}, "takes int"),
    "upside down": ({"space": {"rate": {"low": 2, "high": 1}}}, "low is below high"),
    "log of 0": ({"space": {"rate": RATE | {"low": 0}}}, "above 0"),
    "no power of two": ({"space": {"size": {"scale": "log2", "low": 3, "high": 8}}}, "powers of two"),
    "gamma of 1": ({"space": {"gamma": {"scale": "log(1-x)", "low": 0.9, "high": 1.0}}}, "below 1"),
    "no such scale": ({"space": {"rate": RATE | {"scale": "exp"}}}, "scale is 'exp'"),
    "no range": ({"space": {"rate": {"low": 1}}}, "low = ..., high = ..."),
    "a list": ({"space": {"rate": [1, 2]}}, "low = ..., high = ..."),
    "one choice": ({"space": {"on": {"choices": [True]}}}, "two or more"),
    "a switch as a range": ({"space": {"on": {"low": False, "high": True}}}, "choices = [...]"),
    "no such choice": ({"space": {"kind": {"choices": ["plain", "odd"]}}}, "takes Literal"),
}


@pytest.mark.parametrize("changes, part", MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_in_a_space_is_one_line(changes, part, house):
    path = house.space(changes.pop("space", None), **changes) if changes.get("space") != {} else house.space(**changes)
    if part == "[space] is empty":
        path.write_text(re.sub("space = .*", "space = {}", path.read_text()))
    with pytest.raises(SuiteError) as error:
        spaces.load(path)
    line = str(error.value)
    assert line.startswith("space s") and part in line and "\n" not in line


@pytest.mark.parametrize(
    "words, part",
    [
        (["search", "ppoo"], "there is no search space ppoo; there are a2c_gae"),
        (["search", "missing.toml"], "cannot be read"),
        (["search", "s.toml", "--total-timesteps", "0"], "steps is 0"),
        (["search", "s.toml", "--jobs", "0"], "--jobs"),
        (["search", "s.toml", "--minutes", "0"], "--minutes"),
        (["search", "s.toml", "--storage", "nonsense"], "--storage"),
        (["show", "missing"], "studies/missing is no study"),
        (["narrow", "missing"], "studies/missing is no study"),
        (["validate", "missing", "--seeds", "0"], "--seeds"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_bad_input_is_one_line(words, part, house, call):
    house.space()
    before = house.files()
    done = call(house, *words)
    assert (done.code, done.out) == (2, "") and part in done.err
    assert done.err.startswith("error: ") and done.err.count("\n") == 1 and house.files() == before


# --------------------------------------------------------------------------------------------------------------- search


def test_a_search_makes_its_trials_and_the_flags_arrive(house):
    """The first trial is the script's defaults; of the others every flag arrives as it was sampled."""
    ranges = {
        "rate": RATE,
        "size": {"scale": "log2", "low": 16, "high": 256},
        "gamma": {"scale": "log(1-x)", "low": 0.9, "high": 0.999},
        "kind": {"choices": ["plain", "fancy"]},
        "limit": {"choices": ["None", 1, 2.5]},
        "on": {"choices": [True, False]},
    }
    house.space(ranges, trials=12, fixed={"mode": "ok"})
    done = house.search("--jobs", 2, "--threads", 3)
    assert done.code == 0, done.err
    assert "warning: 12 trials are few for 6 flags; 18 to 24 are sensible" in done.err
    trials = house.study().trials
    assert [x.state for x in trials] == [TrialState.COMPLETE] * 12
    own = {
        "env_id": "A-v1",
        "total_timesteps": "60",
        "seed": "101",
        "torch_threads": "3",
        "mode": "ok",
    }
    space = spaces.load(house.path / "s.toml")
    assert {x: y for x, y in given(house.trials / "0" / "seed-101").items() if x != "run_dir"} == own
    seen = set()
    for x in trials[1:]:
        expected = {"rate": float(f"{x.params['rate']:.4g}"), "size": 2 ** x.params["log2(size)"]}
        expected |= {"gamma": round(1 - float(f"{x.params['1-gamma']:.4g}"), 12)}
        expected |= {name: x.params[name] for name in ("kind", "limit", "on")}
        arrived = given(house.trials / str(x.number) / "seed-101")
        written = {name: value if name == "on" else str(value) for name, value in expected.items()}
        assert {name: arrived.pop(name) for name in written} == written
        assert arrived.items() >= own.items() and space.settings(x.number, x.params) == expected
        assert x.value == pytest.approx((3 - abs(math.log10(expected["rate"]) + 2) + 0.03) * 60)
        seen |= {(name, str(expected[name])) for name in ("kind", "limit", "on")}
    assert len(seen) == 7  # each choice was tried
    assert trials[0].params == space.first_params() and trials[0].value == pytest.approx(2.03 * 60)
    best = house.study().best_trial
    assert f"best: trial {best.number}, {best.value:.1f}" in done.out and "trial 0 is the defaults" in done.out
    with (house.trials.parent / "trials.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["trial"]) for row in rows] == list(range(12)) and rows[0]["rate"] == "0.001"
    assert rows[best.number]["value"] == str(best.value) and {row["steps"] for row in rows} == {"60"}
    assert not list(house.trials.rglob("*.lock")) and not list(house.trials.rglob("checkpoint.pt"))


def test_a_finished_search_is_left_alone_and_can_be_made_longer(house):
    house.space(trials=3)
    assert house.search().code == 0
    before = {name: at for name, at in house.files().items() if "/trials/" in name}
    assert house.search().code == 0 and {x: y for x, y in house.files().items() if "/trials/" in x} == before
    assert house.run("search", "studies/s", "--trials", 5).code == 0
    assert len(house.study().trials) == 5 and len(house.journal("end")) == 5
    assert tomllib.loads((house.trials.parent / "space.toml").read_text())["trials"] == 5
    house.study().enqueue_trial({})  # as when two machines line up the trials at once
    assert house.run("search", "studies/s").code == 0 and len(house.journal("end")) == 5


def test_a_study_goes_on_where_it_lies(house):
    house.space(trials=1)
    assert house.search().code == 0
    (house.path / "studies").rename(house.path / "moved")
    assert house.run("search", "moved/s", "--trials", 2).code == 0
    assert len(list((house.path / "moved" / "s" / "trials").glob("*/seed-101"))) == 2
    assert not (house.path / "studies").exists()


def test_a_folder_that_has_the_name_of_a_space_is_not_in_its_way(house, monkeypatch):
    monkeypatch.chdir(house.path)
    (house.path / "ppo").mkdir()
    assert spaces.load("ppo").script.name == "ppo.py"


def test_trials_are_lined_up_by_one_worker_at_a_time(house):
    house.space(trials=2)
    house.trials.parent.mkdir(parents=True)
    with study.locked(house.trials.parent):
        process = house.start()
        journal = house.trials.parent / "study.journal"
        wait_until(lambda: journal.exists() and "folio" in journal.read_text(), process)
        time.sleep(0.5)
        assert house.study().trials == [] and process.poll() is None
    assert finish(process).code == 0 and len(house.study().trials) == 2


def test_the_best_trial_is_a_complete_one():
    made = optuna.create_study(direction="maximize")

    def add(state, value, step):
        trial = optuna.trial.create_trial(state=state, value=value, intermediate_values={step: value})
        made.add_trial(trial)

    add(TrialState.PRUNED, 9.0, 10)
    assert study.best(made) is None
    for state, value, step in (("COMPLETE", 1.0, 60), ("COMPLETE", 2.0, 60), ("PRUNED", 5.0, 20), ("PRUNED", 7.0, 10)):
        add(TrialState[state], value, step)
    made.add_trial(optuna.trial.create_trial(state=TrialState.FAIL))
    assert study.best(made).number == 2 and [x.number for x in study.best_first(made)] == [2, 1, 3, 0, 4]


def test_another_search_is_not_mixed_with_this_one(house, call):
    house.space(trials=1)
    assert house.search().code == 0
    before = {name: at for name, at in house.files().items() if name.startswith("studies")}

    def error_of(**changes) -> str:
        house.space(**({"trials": 2} | changes))
        done = call(house, "search", "s.toml")
        assert done.code == 2 and "study s is another search" in done.err and "--name" in done.err
        assert {name: at for name, at in house.files().items() if name.startswith("studies")} == before
        return done.err

    assert "direction was maximize and is minimize now" in error_of(direction="minimize")
    assert "metric was final_return and is other now" in error_of(metric="other")
    assert "steps was 60 and is 61 now" in error_of(steps=61)
    assert "space was" in error_of(ranges={"rate": RATE | {"high": 1.0}})
    assert "seeds was [101] and is [101, 102] now" in error_of(seeds=2)
    assert "pruner was none" in error_of(pruner="asha")
    assert "fixed was {}" in error_of(fixed={"size": 32})
    (house.path / "learner.py").write_text(LEARNER.replace("step = 0", "step = 0 * 1"))
    assert "the code of learner.py has changed" in error_of()
    (house.path / "learner.py").write_text("# nothing but a comment\n" + LEARNER)
    house.space(trials=2)
    assert house.search().code == 0 and len(house.study().trials) == 2


def test_a_default_outside_the_space_is_the_first_trial_all_the_same(house):
    ranges = {
        "rate": RATE | {"low": 1e-2},
        "limit": {"choices": [1, 2]},
        "size": {"scale": "log2", "low": 16, "high": 64},
    }
    house.space(ranges, trials=4)
    done = house.search()
    assert done.code == 0, done.err
    trials = house.study().trials
    assert trials[0].state == TrialState.COMPLETE and trials[0].params == {"log2(size)": 6}
    assert "rate" not in given(house.trials / "0" / "seed-101") and len(trials[1].params) == 3
    assert (house.trials.parent / "trials.csv").read_text().splitlines()[1].split(",")[6:9] == ["0.001", "None", "64"]


def test_a_start_is_the_first_trial(house):
    house.space(trials=2, start={"rate": 0.05})
    assert house.search().code == 0
    assert given(house.trials / "0" / "seed-101")["rate"] == "0.05" and house.study().trials[0].params["rate"] == 0.05


def test_other_metrics_and_directions(house):
    house.space(trials=6, metric="other", direction="minimize")
    done = house.search()
    assert done.code == 0, done.err
    values = [x.value for x in house.study().trials]
    assert all(x < 0 for x in values) and f"best: trial {int(np.argmin(values))}," in done.out


FOREIGN = """
import json, sys
given = dict(zip(sys.argv[1::2], sys.argv[2::2]))
import os; os.makedirs(given["--run-dir"], exist_ok=True); os.chdir(given["--run-dir"])
json.dump(given, open("args.json", "w"))
with open("episodes.csv", "w") as file:
    print("step,seconds,return,length", file=file)
    for step in range(1, int(given["--total-timesteps"]) + 1):
        print(f"{step},{step / 9},{step * float(given.get('--alpha_0', 0.5))},1", file=file)
result = {"final_return": step * float(given.get("--alpha_0", 0.5)), "steps": step, "seconds": 1}
json.dump(result, open("result.json", "w"))
"""


def test_a_script_of_somebody_else_is_tuned(house, call):
    (house.path / "foreign.py").write_text(FOREIGN)
    house.space({"alpha_0": {"low": 0.0, "high": 1.0}}, script="foreign.py", trials=10, pruner="median", startup=2)
    done = house.search("--jobs", 2)
    assert done.code == 0, done.err
    flags = [json.loads((house.trials / str(n) / "seed-101" / "args.json").read_text()) for n in range(10)]
    assert flags[0].keys() == {"--env-id", "--total-timesteps", "--seed", "--run-dir"}
    assert all(set(x) - set(flags[0]) == {"--alpha_0"} for x in flags[1:])
    assert house.study().best_value == pytest.approx(60 * max(float(x["--alpha_0"]) for x in flags[1:]))
    space, folder = spaces.load(house.path / "s.toml"), house.trials / "0" / "seed-101"
    aside, command = run.plan(Run("trial 0", space.entry({}), 101, folder), run.Args(suites=(), scripts=house.path))
    assert aside and "--resume" not in command  # it could not go on with a run that was cut off
    assert call(house, "narrow", "s").code == 0
    done = house.run("validate", "s", "--seeds", 4)
    assert done.code == 0 and "**better**" in done.out and done.err == "", done.err
    assert "Made on a machine that args.json does not name. The entry" in done.out
    house.space({"alpha_0": {"low": 0.0, "high": 1.0}}, script="foreign.py", fixed={"beta": {"a": 1}})
    assert "flag beta is {'a': 1}; it takes a number" in call(house, "search", "s.toml", "--name", "t").err


# -------------------------------------------------------------------------------------------------- pruning and failing


def test_poor_trials_are_cut_short(house):
    house.space(trials=12, pruner="asha", grace=20, reduction=3, fixed={"pace": 0.03})
    done = house.search("--jobs", 3)
    assert done.code == 0, done.err
    trials = house.study().trials
    pruned = [x for x in trials if x.state == TrialState.PRUNED]
    assert {x.state for x in trials} == {TrialState.COMPLETE, TrialState.PRUNED} and len(pruned) >= 5
    assert house.study().best_value == max(x.value for x in trials if x.state == TrialState.COMPLETE)
    for x in pruned:
        assert x.last_step == 20 and x.value == x.intermediate_values[20]
        assert not (house.trials / str(x.number) / "seed-101" / "result.json").exists()
        assert 20 < x.user_attrs["outcome"]["steps"] < 60
    assert f"{len(pruned)} at 20" in done.out and "times as many" in done.out
    assert not [pid for _, pid, *_ in house.journal() if lives(pid)]


def test_the_first_trial_is_never_cut_short(house):
    """It is slow and the worst, so that others are there to compare it with."""
    start, fixed = {"rate": 1e-4}, {"pace": 0.01, "mode": "slow"}
    house.space(trials=4, pruner="asha", grace=10, reduction=2, fixed=fixed, start=start)
    assert house.search("--jobs", 4).code == 0
    trials = house.study().trials
    assert trials[0].state == TrialState.COMPLETE
    assert trials[0].intermediate_values[10] == min(x.intermediate_values[10] for x in trials)


def test_what_a_rung_is_worth_is_the_mean_over_seeds(house):
    house.space(trials=3, seeds=3, pruner="median", startup=1, grace=10, fixed={"pace": 0.01})
    done = house.search("--jobs", 2)
    assert done.code == 0, done.err
    for x in house.study().trials:
        folders = [house.trials / str(x.number) / f"seed-{seed}" for seed in (101, 102, 103)]
        for step, value in x.intermediate_values.items():
            means = []
            for folder in folders:
                rows = np.loadtxt(folder / "episodes.csv", delimiter=",", skiprows=1)
                means.append(stats.trailing_means(rows[:, 0], rows[:, 2], np.array([step]))[0])
            if step < 60:
                assert value == pytest.approx(np.mean(means)) and len(set(means)) == 3
        if x.state == TrialState.COMPLETE:
            results = [json.loads((folder / "result.json").read_text())["final_return"] for folder in folders]
            assert x.user_attrs["outcome"]["values"] == results and x.value == pytest.approx(np.mean(results))
            assert len(x.intermediate_values) == 6


def test_seeds_go_side_by_side_and_a_milestone_counts_when_it_lies_behind_them(house):
    """They wait after 20 steps. Another episode may end in the 20th, so it does not count yet."""
    house.space(trials=1, seeds=3, pruner="median", startup=1, grace=10, fixed={"mode": "wait"})
    process = house.start("search", "s.toml", "--jobs", 1)
    house.wait(process, 3, "begin")
    journal = house.study()
    wait_until(lambda: 10 in journal.trials[0].intermediate_values, process)
    time.sleep(1.5)
    assert journal.trials[0].intermediate_values.keys() == {10}
    house.let_go()
    assert finish(process).code == 0 and len(journal.trials[0].intermediate_values) == 6


def test_divergence_is_pruned_with_its_last_value_and_teaches(house):
    house.space(trials=8, fixed={"mode": "picky"}, start={"rate": 0.06}, milestones=[1, 7, 60])
    done = house.search("--jobs", 2)
    assert done.code == 0, done.err
    trials = house.study().trials
    diverged = [x for x in trials if float(x.params["rate"]) > 0.05]
    assert [x.state for x in diverged] == [TrialState.PRUNED] * len(diverged) and trials[0] in diverged
    assert trials[0].intermediate_values.keys() == {1, 7, 30} and trials[0].value == trials[0].intermediate_values[30]
    assert sum(x.state == TrialState.COMPLETE for x in trials) == 8 - len(diverged) > 0
    assert "diverged, seed 101" in done.out


def test_three_broken_trials_in_a_row_stop_the_search(house, call):
    house.space(trials=9, fixed={"mode": "broken"})
    done = house.search("--jobs", 1)
    assert done.code == 1 and "three trials in a row failed" in done.err
    assert done.out.count("exit code 2, seed 101\n    first words\n    error: no such thing") == 3
    states = [x.state for x in house.study().trials]
    assert states[:3] == [TrialState.FAIL] * 3 and set(states[3:]) == {TrialState.WAITING}
    assert "failed: trial 0: exit code 2, seed 101: error: no such thing" in call(house, "show", "s").out


def test_a_result_without_a_number_fails(house):
    house.space(trials=1, metric="missing")
    done = house.search()
    assert "no finite number as missing" in done.out and house.study().trials[0].state == TrialState.FAIL


# ------------------------------------------------------------------------------------------------------ kills and stops


def killed_and_restarted(house: House, times: int) -> None:
    """Two workers, killed in the middle, so many times; then two more, which finish."""
    house.space(trials=10, fixed={"pace": 0.02}, seeds=1)
    for _ in range(times):
        begun = len(house.journal("begin", "resume"))
        workers = [house.start("search", "s.toml", "--jobs", 2) for _ in range(2)]
        for process in workers:
            house.wait(process, begun + 4, "begin", "resume")
        time.sleep(0.5)
        kill(*workers)
        wait_until(lambda: not any(lives(pid) for _, pid, *_ in house.journal()))
    running = [x.number for x in house.study().trials if x.state == TrialState.RUNNING]
    assert running, "nothing was interrupted"
    done = [finish(x) for x in [house.start("search", "s.toml", "--jobs", 2) for _ in range(2)]]
    assert [x.code for x in done] == [0, 0], done
    trials = house.study().trials
    assert [x.number for x in trials] == list(range(10)) and {x.state for x in trials} == {TrialState.COMPLETE}
    assert sorted(x[0] for x in house.journal("end")) == sorted(f"{n}/seed-101" for n in range(10))
    assert len(house.journal("begin")) == 10 and house.journal("resume")
    for x in trials:
        assert sorted(x.intermediate_values) == [10, 20, 30, 40, 50, 60]
        rate = float(f"{x.params['rate']:.4g}")
        assert x.value == pytest.approx((3 - abs(math.log10(rate) + 2) + 0.03) * 60)
    assert not [pid for _, pid, *_ in house.journal() if lives(pid)]


def test_two_killed_workers_lose_and_repeat_nothing(house):
    killed_and_restarted(house, times=2)


def test_ctrl_c_leaves_trials_to_be_resumed(house):
    house.space(trials=2, fixed={"mode": "wait"})
    process = house.start("search", "s.toml", "--jobs", 2)
    house.wait(process, 2, "begin")
    wait_until(lambda: len(list(house.trials.glob("*/*/checkpoint.pt"))) == 2, process)
    process.send_signal(signal.SIGINT)
    done = finish(process)
    assert done.code == 130 and "stopped; to go on: " in done.err
    assert not [pid for _, pid, *_ in house.journal() if lives(pid)]
    assert [x.state for x in house.study().trials] == [TrialState.RUNNING] * 2
    house.let_go()
    assert house.search().code == 0
    assert len(house.journal("resume")) == 2 == len(house.journal("end")) and not list(house.trials.rglob("*.old-1"))


def test_minutes_end_a_search_that_can_go_on(house):
    house.space(trials=50, fixed={"pace": 0.01})
    began = time.monotonic()
    done = house.search("--minutes", 0.05)
    assert done.code == 0 and time.monotonic() - began < 60
    states = {x.state for x in house.study().trials}
    assert TrialState.WAITING in states and "waiting" in done.out


def test_what_cannot_be_resumed_is_begun_anew(house):
    house.space(trials=1, fixed={"mode": "wait"})
    process = house.start()
    wait_until(lambda: list(house.trials.glob("*/*/checkpoint.pt")), process)
    house.wait(process, 1, "begin")
    kill(process)
    house.let_go()
    (house.trials / "0" / "seed-101" / "checkpoint.pt").write_text("\n")
    done = house.search()
    assert done.code == 0 and "could not be resumed" in done.out, done.err
    assert house.study().trials[0].state == TrialState.COMPLETE and (house.trials / "0" / "seed-101.old-1").is_dir()


def test_a_journal_that_was_cut_short_goes_on(house):
    house.space(trials=2)
    assert house.search().code == 0
    with (house.trials.parent / "study.journal").open("a") as file:
        file.write('{"op_code": 4, "worker')
    assert house.run("search", "studies/s", "--trials", 3).code == 0
    assert [x.state for x in house.study().trials] == [TrialState.COMPLETE] * 3


def test_a_trial_of_another_machine_is_taken_over_when_it_falls_silent(house):
    """The other machine is a beat that this test gives, for as long as it gives it."""
    house.space(trials=1, fixed={"mode": "wait"})
    process = house.start()
    wait_until(lambda: list(house.trials.glob("*/*/checkpoint.pt")), process)
    kill(process)
    house.let_go()
    journal = house.study()
    (frozen,) = journal.trials
    alive = threading.Event()
    alive.set()

    def beat():
        count = 0
        while alive.is_set():
            owner = {"worker": "theirs", "machine": "theirs", "beat": (count := count + 1)}
            journal._storage.set_trial_user_attr(frozen._trial_id, "owner", owner)
            time.sleep(1.5)  # longer than a claim waits to see whether it stands

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        done = house.search("--orphaned-after", 4)  # it sees that somebody is at it, and has nothing else to do
    finally:
        alive.clear()
        thread.join()
    assert done.code == 0 and "1 unfinished" in done.out and not house.journal("resume", "end")
    done = house.search("--orphaned-after", 4)
    assert done.code == 0 and len(house.journal("resume")) == 1 == len(house.journal("end"))
    assert house.study().trials[0].state == TrialState.COMPLETE


def test_a_worker_lets_go_of_a_trial_that_another_machine_has_taken(house):
    house.space(trials=2, fixed={"mode": "wait"})
    process = house.start("search", "s.toml", "--jobs", 2, "--orphaned-after", 1)
    house.wait(process, 2, "begin")
    journal = house.study()
    wait_until(lambda: all(x.user_attrs["owner"]["beat"] for x in journal.trials), process)
    owner = {"worker": "theirs", "machine": "theirs", "beat": 0}
    journal._storage.set_trial_user_attr(journal.trials[1]._trial_id, "owner", owner)
    pids = {name: pid for name, pid, _ in house.journal("begin")}
    wait_until(lambda: not lives(pids["1/seed-101"]), process)
    assert lives(pids["0/seed-101"])
    process.send_signal(signal.SIGTERM)
    assert finish(process).code == 130
    assert journal.trials[1].user_attrs["owner"] == owner


# --------------------------------------------------------------------------------------- what is made of a search


@pytest.fixture(scope="module")
def searched(tmp_path_factory) -> House:
    """A search of 24 trials in which the rate decides and nothing else."""
    house = House(tmp_path_factory.mktemp("searched"))
    ranges = {"rate": RATE, "size": {"scale": "log2", "low": 16, "high": 256}, "on": {"choices": [True, False]}}
    ranges |= {"gamma": {"scale": "log(1-x)", "low": 0.9, "high": 0.999}}
    house.space(ranges, trials=24)
    assert house.search("--jobs", 4).code == 0
    return house


@pytest.fixture
def found(searched, tmp_path) -> House:
    house = House(tmp_path)
    shutil.copytree(searched.path, tmp_path, dirs_exist_ok=True)
    return house


def test_show_tells_what_mattered(found, call):
    done = call(found, "show", "s")
    assert done.code == 0, done.err
    line = next(line for line in done.out.splitlines() if line.startswith("importance: "))
    assert line.startswith("importance: rate ") and float(line.split()[2].rstrip(",")) > 0.4
    command = done.out.splitlines()[-1].split()
    assert "learner.py" in command and "--rate" in command
    assert "optuna-dashboard studies/s/study.journal" in done.out
    figures = {path.name: path.read_text() for path in found.trials.parent.glob("*.svg")}
    assert figures.keys() == {"history.svg", "slices.svg", "curves.svg"}
    assert all("</svg>" in text and ">nan<" not in text for text in figures.values())
    assert all(f">{name} (" in figures["slices.svg"] for name in ("rate", "size", "on", "gamma"))


@pytest.mark.parametrize(
    "scores, digits",
    [([475.0, 21.0], 1), ([9.31, -3], 2), ([-0.36, -0.0223], 3), ([0.004], 5), ([], 1), ([0.0, math.inf], 1)],
)
def test_small_scores_are_shown_with_what_sets_them_apart(scores, digits):
    assert report.decimals(scores) == digits


def test_narrow_keeps_what_mattered_around_the_best(found, call):
    done = call(found, "narrow", "s")
    assert done.code == 0, done.err
    path = found.trials.parent / "narrow.toml"
    space, text = spaces.load(path), path.read_text()
    best = found.study().best_trial
    kept = {x.flag: x for x in space.dimensions}
    rate = kept["rate"]
    assert math.log(rate.high / rate.low) == pytest.approx(math.log(1e3) / 2, rel=0.01)  # half of it, on the log scale
    assert rate.low <= best.params["rate"] <= rate.high and rate.low < 0.01 < rate.high
    assert len(kept) < 4 and set(kept) | set(space.settled) == {"rate", "size", "on", "gamma"}
    assert space.pruner == "none" and space.seeds == (201, 202, 203) and space.trials == 4 * len(kept)
    assert space.start["rate"] == float(f"{best.params['rate']:.4g}") and space.name == "s__narrow"
    assert "search studies/s/narrow.toml --studies studies\n" in done.out
    assert "# importance " in text and "does not matter" in text and "it was 0.0001 to 0.1" in text
    again = call(found, "narrow", "s")
    assert again.code == 2 and "is there already" in again.err and path.read_text() == text
    assert found.run("search", path, "--jobs", 4).code == 0
    done = found.run("validate", "s__narrow", "--seeds", 1, "--jobs", 2)
    assert done.code == 0 and done.err == "warning: with 1 seeds each no difference is ever found; it takes 4\n"
    folder = found.path / "studies" / "s__narrow" / "validation"
    flags = [set(given(path)) & {"rate", "size", "on", "gamma"} for path in sorted(folder.glob("*/seed-1001"))]
    assert flags == [set(), {"rate", "size", "on", "gamma"}]  # what was settled is not the defaults'


def test_validate_proves_the_winner_on_fresh_seeds(found):
    done = found.run("validate", "s", "--seeds", 4, "--jobs", 4)
    assert done.code == 0, done.err
    folder, best = found.trials.parent, found.study().best_trial
    written = json.loads((folder / "validation.json").read_text())
    names = ["defaults", f"trial-{best.number}"]
    assert list(written["settings"]) == names and written["trial"] == best.number
    flags = spaces.load(folder).flags(best.number, best.params)
    for name in names:
        for seed in (1001, 1002, 1003, 1004):
            arrived = given(folder / "validation" / name / f"seed-{seed}")
            assert arrived["seed"] == str(seed) and arrived["total_timesteps"] == "60"
            assert arrived.get("rate") == (None if name == "defaults" else str(flags["rate"]))
    rate = flags["rate"]
    scores = [(3 - abs(math.log10(rate) + 2) + seed % 7 / 100) * 60 for seed in (1001, 1002, 1003, 1004)]
    assert written["settings"][names[1]]["scores"] == pytest.approx(scores)
    assert written["probability_of_improvement"] == 1 and written["verdict"] == "better"
    assert written["difference"] == pytest.approx(
        np.mean(scores) - 60 * np.mean([2 + x % 7 / 100 for x in range(1001, 1005)])
    )
    page = (folder / "validation.md").read_text()
    assert page in done.out and "on seeds 1001 to 1004, which the search has not seen" in page
    entry = tomllib.loads(page.split("```toml\n")[1].split("```")[0])["entry"][0]
    defaults = {"rate": 1e-3, "size": 64, "gamma": 0.99, "on": True}  # what the search finds may be one of them
    assert entry["flags"] == {name: value for name, value in flags.items() if value != defaults[name]}
    assert (entry["script"], entry["env"], entry["steps"]) == ("learner", "A-v1", 60)
    with (folder / "validation.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 8
    before = {name: at for name, at in found.files().items() if "/validation/" in name}
    assert found.run("validate", "s", "--seeds", 4).code == 0  # what is there is not made again
    assert {name: at for name, at in found.files().items() if "/validation/" in name} == before


def test_validate_refuses_what_would_prove_nothing(found, call):
    done = call(found, "validate", "s", "--first-seed", 98)
    assert done.code == 2 and "seed 101 was used in the search" in done.err
    done = call(found, "validate", "s", "--trial", 99)
    assert done.code == 2 and "no complete trial" in done.err
    assert "nothing to validate" in call(found, "validate", "s", "--trial", 0).out
    (found.path / "learner.py").write_text(LEARNER.replace("step = 0", "step = 0 * 1"))
    done = call(found, "validate", "s")
    assert done.code == 2 and "the code of learner.py has changed" in done.err
    assert not (found.trials.parent / "validation").exists()


def test_in_a_terminal_a_table_is_drawn(house):
    import pty

    house.space(trials=3, fixed={"pace": 0.02})
    ours, theirs = pty.openpty()
    process = house.start("search", "s.toml", stdout=theirs)
    os.close(theirs)
    text = b""
    while True:
        try:
            text += os.read(ours, 10_000)
        except OSError:
            break
    os.close(ours)
    assert finish(process).code == 0
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text.decode())
    assert "flags" in shown and "running" in shown and "3 complete of 3 trials; best" in shown


# ----------------------------------------------------------------------------------------------------------- PostgreSQL


def postgres_bin() -> Path | None:
    found = [shutil.which("initdb"), *sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))]
    return next((Path(x).resolve().parent for x in found if x), None)


@pytest.fixture
def postgres(tmp_path_factory):
    """A PostgreSQL server of our own on a socket in a folder: its address, and how to stop and start it."""
    pytest.importorskip("psycopg", reason="psycopg is not installed: pip install -e '.[postgres]'")
    if postgres_bin() is None:
        pytest.skip("no PostgreSQL server is installed: apt-get install postgresql")
    base = Path("/tmp") / f"folio-pg-{os.getpid()}"  # a socket's path has at most 107 letters
    base.mkdir()
    as_user = []
    if os.getuid() == 0:  # the server refuses to run as root
        shutil.chown(base, "nobody")
        as_user = ["setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups"]
    log = base / "log"

    def pg(*words):
        # Its output goes nowhere: the server inherits it, and would keep a pipe open.
        out = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        done = subprocess.run([*as_user, *words], cwd=base, timeout=TIMEOUT, check=False, **out)
        assert done.returncode == 0, log.read_text() if log.exists() else words

    def start():
        pg(postgres_bin() / "pg_ctl", "-D", base / "data", "-l", log, "-o", options, "-w", "start")

    def stop():
        pg(postgres_bin() / "pg_ctl", "-D", base / "data", "-m", "immediate", "-w", "stop")

    options = f"-k {base} -c listen_addresses='' -c fsync=off"
    try:
        pg(postgres_bin() / "initdb", "-D", base / "data", "-U", "folio", "-A", "trust", "--no-sync")
        start()
        yield SimpleNamespace(url=f"postgresql://folio@/postgres?host={base}", start=start, stop=stop)
    finally:
        if (base / "data" / "postmaster.pid").exists():
            stop()
        shutil.rmtree(base)


def test_a_database_that_does_not_answer_is_one_line(house, call, monkeypatch):
    pytest.importorskip("psycopg", reason="psycopg is not installed: pip install -e '.[postgres]'")
    monkeypatch.setattr(study, "PATIENCE", 2)
    house.space()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"postgresql://folio@127.0.0.1:{silent.getsockname()[1]}/db"
        done = call(house, "search", "s.toml", "--storage", url)
    assert done.code == 2 and done.err.startswith("error: --storage cannot be opened: ") and done.err.count("\n") == 1
    assert "timeout" in done.err


def test_two_killed_workers_with_postgresql(house, postgres):
    house.url = postgres.url
    killed_and_restarted(house, times=1)
    assert not (house.trials.parent / "study.journal").exists()

    process = house.start("search", "studies/s", "--trials", 12, "--jobs", 2)
    house.wait(process, 12, "begin")
    postgres.stop()
    done = finish(process)
    assert done.code == 1 and "the same command goes on" in done.err and "Traceback" not in done.err
    assert not [pid for _, pid, *_ in house.journal() if lives(pid)]
    postgres.start()
    assert house.run("search", "studies/s", "--trials", 12, "--jobs", 2).code == 0
    assert [x.state for x in house.study().trials] == [TrialState.COMPLETE] * 12 and len(house.journal("end")) == 12
