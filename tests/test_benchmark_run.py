"""benchmark/suites.py and benchmark/run.py: mistakes in suites are found, and no kill, failure or second runner loses,
spoils or repeats a run. Most of it with a script that only pretends to learn, so that a run takes milliseconds."""

import csv
import json
import os
import pty
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import pytest
from conftest import ROOT, bits, finish, lives

from benchmark import run, suites

TIMEOUT = 120  # seconds for any one process: a hang, whatever else the machine is doing
SHIPPED = sorted(path.stem for path in suites.SUITES.glob("*.toml"))

FAKE = """
from __future__ import annotations

import hashlib, json, os, shutil, signal, sys, time
from pathlib import Path


class Args:
    env_id: str = "A"
    mode: str = "ok"
    pace: float = 0.0
    on: bool = True
    size: int | None = 3
    clip_loss: float = 1.0
    kind: Literal["plain", "fancy"] = "plain"
    env_kwargs: dict[str, bool | int | float | str] = {}
    resume: str = ""
    torch_threads: int = 1
    device: str = "cpu"


given = dict(zip(sys.argv[1::2], sys.argv[2::2]))
folder = Path(given.get("--resume") or given["--run-dir"])
name = folder.name


def journal(*words):
    with (folder.parent / "journal").open("a") as file:
        file.write(" ".join(map(str, (name, os.getpid(), *words))) + "\\n")


def write(name, content):
    (folder / "aside").write_text(json.dumps(content))
    (folder / "aside").replace(folder / name)


if "--resume" not in given:
    folder.mkdir(parents=True, exist_ok=True)
    assert not any(folder.iterdir()), "not empty"
    args = {"env_id": given["--env-id"], "seed": int(given["--seed"])}
    args |= {"total_timesteps": int(given["--total-timesteps"])}
    args |= {"mode": given.get("--mode", "ok"), "pace": float(given.get("--pace", 0)), "on": True, "size": 3}
    shutil.copy(__file__, folder)
    write("args.json", {"args": args, "command": sys.argv})
    journal("begin", os.environ.get("OMP_NUM_THREADS"), os.environ.get("CUDA_VISIBLE_DEVICES"))
else:
    journal("resume")
args = json.loads((folder / "args.json").read_text())["args"]
mode, state = args["mode"], {"step": 0, "chain": str(args["seed"])}
if (folder / "checkpoint.json").exists():
    state = json.loads((folder / "checkpoint.json").read_text())
if mode == "stubborn":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
rows = (folder / "episodes.csv").open("w")
rows.write("step,seconds,return,length\\n")
try:
    for step in range(state["step"] + 1, args["total_timesteps"] + 1):
        time.sleep(args["pace"])
        state = {"step": step, "chain": hashlib.sha256((state["chain"] + str(step)).encode()).hexdigest()}
        rows.write(f"{step},{step / 100},{step / 2},7\\n")
        rows.flush()
        if step % 5 == 0:
            write("checkpoint.json", state)
        if step == 3 and mode == "fail":
            print("first words\\nthe loss is [not] finite", flush=True)
            sys.exit(3)
        if step == 3 and mode == "hang":
            time.sleep(1000)
        while step == 3 and mode == "wait" and not (folder.parent / "go").exists():
            time.sleep(0.01)
except KeyboardInterrupt:
    journal("interrupted")
    sys.exit(130)
if mode != "silent":
    write("result.json", state | {"final_return": 12.5, "steps": state["step"], "seconds": 0.5})
journal("end")
"""

ENTRY = {"script": "fake", "env": "A-v1", "steps": 10, "target": 1.0, "why": "a test"}


def toml(value) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {toml(x)}" for key, x in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml, value)) + "]"
    return json.dumps(value)


class House:
    """A folder with a fake script, a suite and runs, and the runner started on it as a user does."""

    def __init__(self, path: Path):
        self.path, self.runs, self.script = path, path / "runs" / "s", path / "algos" / "fake.py"
        self.script.parent.mkdir()
        self.script.write_text(FAKE)

    def suite(self, *entries: dict, name: str = "s", **top) -> Path:
        content = {"title": "t", "protocol": "p", "seeds": 2} | top
        content["entry"] = [ENTRY | entry for entry in entries or [{}]]
        path = self.path / f"{name}.toml"
        path.write_text("".join(f"{key} = {toml(value)}\n" for key, value in content.items() if value is not None))
        return path

    def start(self, *words, suite: str = "s.toml", stdout=subprocess.PIPE) -> subprocess.Popen:
        command = [sys.executable, ROOT / "benchmark" / "run.py", suite, "--scripts", "algos", "--runs-dir", "runs"]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        pipes = {"stdin": subprocess.DEVNULL, "stdout": stdout, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen([*command, *map(str, words)], cwd=self.path, env=environment, **pipes)

    def run(self, *words, **kwargs) -> SimpleNamespace:
        return finish(self.start(*words, **kwargs))

    def journal(self, *kinds: str) -> list[list[str]]:
        """What the scripts wrote: run, process id, what happened, ..."""
        path = self.runs / "journal"
        lines = [line.split() for line in path.read_text().splitlines()] if path.exists() else []
        return [line for line in lines if not kinds or line[2] in kinds]

    def wait(self, process: subprocess.Popen, lines: int, *kinds: str) -> None:
        end = time.monotonic() + TIMEOUT
        while len(self.journal(*kinds)) < lines:
            if process.poll() is not None or time.monotonic() > end:
                process.kill()
                pytest.fail(f"the runner ended, or waits for something: {process.communicate()}")
            time.sleep(0.005)

    def let_go(self) -> None:
        """Runs in mode `wait` may go on."""
        (self.runs / "go").touch()

    def results(self) -> dict[str, dict]:
        return {path.parent.name: json.loads(path.read_text()) for path in sorted(self.runs.glob("*/result.json"))}

    def files(self) -> dict[str, int]:
        return {str(path.relative_to(self.path)): path.stat().st_mtime_ns for path in sorted(self.path.rglob("*"))}


def kill(process: subprocess.Popen) -> None:
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL, "it ended before it could be killed"


@pytest.fixture
def house(tmp_path) -> House:
    return House(tmp_path)


# --------------------------------------------------------------------------------------------------------------- suites


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_suites_are_right(name):
    import ale_py

    gym.register_envs(ale_py)
    suite = suites.load(name)
    assert suite.name == name and suite.title and suite.protocol
    assert [entry.env for entry in suite.entries if entry.env not in gym.registry] == []


def test_shipped_suites_are_complete():
    cells = {name: {(entry.script, entry.env) for entry in suites.load(name).entries} for name in SHIPPED}
    assert {"classic", "box2d", "mujoco", "atari", "atari-cpu", "smoke"} <= set(cells)
    assert len(cells["atari"]) == 57 and {script for script, _ in cells["atari"]} == {"ppo_atari"}
    mujoco = {env for env in gym.registry if env.endswith("-v5") and "mujoco" in str(gym.registry[env].entry_point)}
    assert {env for script, env in cells["mujoco"] if script == "ppo_continuous"} == mujoco and len(mujoco) == 11
    on_cartpole = {script for script, env in cells["classic"] if env == "CartPole-v1"}
    assert on_cartpole == {"reinforce", "sarsa", "dqn", "dqn_per", "a2c_gae", "ppo", "sac_discrete"}


def test_targets_are_not_below_slm_lab_at_the_same_budget():
    with suites.REFERENCE.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["source"] == "SLM-Lab"]
    scores = {(row["algo"], row["env_id"], int(row["steps"])): float(row["score"]) for row in rows if row["steps"]}
    compared = 0
    for entry in (entry for name in SHIPPED if name != "smoke" for entry in suites.load(name).entries):
        algo = entry.script.removesuffix("_continuous").removesuffix("_discrete").removesuffix("_atari")
        if (score := scores.get((algo, entry.env, entry.steps))) is not None:
            assert entry.target >= score, entry
            compared += 1
    assert compared > 57 + 20


def test_an_entry_is_read(house):
    flags = {"pace": 1, "on": False, "size": "None", "kind": "fancy", "env-kwargs": {"gravity": -5.0, "on": True}}
    path = house.suite({"flags": flags, "seeds": 5}, {"env": "ALE/B-v5"}, seeds=3, script="other", steps=7)
    first, second = suites.load(path, house.script.parent).entries
    kwargs = {"env_kwargs": {"gravity": -5.0, "on": True}}
    assert first.flags == {"pace": 1.0, "on": False, "size": None, "kind": "fancy"} | kwargs
    words = "--env-kwargs gravity -5.0 on True --kind fancy --no-on --pace 1.0 --size None"
    assert first.words == words.split()
    assert (first.seeds, second.seeds, first.target) == (5, 3, 1.0)
    assert suites.run_folder(Path("runs"), "s", second, 3) == Path("runs/s/ALE-B-v5__fake__3")


def test_what_entries_share_may_stand_at_the_top(house):
    path = house.suite(script="fake", steps=7, seeds=4)
    text = (
        path.read_text().replace('"script": "fake", ', "").replace('script = "fake", ', "").replace("steps = 10, ", "")
    )
    path.write_text(text)
    assert "steps = 10" not in text and text.count("fake") == 1
    (entry,) = suites.load(path, house.script.parent).entries
    assert (entry.script, entry.steps, entry.seeds) == ("fake", 7, 4)


MISTAKES = {
    "unknown key": ({"step": 5}, "step"),
    "unknown script": ({"script": "missing"}, "missing.py"),
    "unknown flag": ({"flags": {"pase": 0.5}}, "pase; near it: pace"),
    "the runner's flag": ({"flags": {"env-id": "B-v1"}}, "env-id is the runner's"),
    "a flag twice": ({"flags": {"clip-loss": 1.0, "clip_loss": 2.0}}, "clip_loss is there twice"),
    "a word for a number": ({"flags": {"pace": "fast"}}, "pace takes float"),
    "true for a number": ({"flags": {"pace": True}}, "pace takes float"),
    "a number for a switch": ({"flags": {"on": 1}}, "on takes bool"),
    "a switch for a number": ({"flags": {"size": True}}, "size takes int | None"),
    "a fraction for a whole": ({"flags": {"size": 1.5}}, "size takes int | None"),
    "no such choice": ({"flags": {"kind": "odd"}}, "kind takes Literal"),
    "None for a number": ({"flags": {"pace": "None"}}, "pace takes float"),
    "a number for a table": ({"flags": {"env-kwargs": 1}}, "env-kwargs takes dict"),
    "no steps": ({"steps": 0}, "steps is 0"),
    "half a step": ({"steps": 0.5}, "steps is 0.5"),
    "true steps": ({"steps": True}, "steps is True"),
    "no seeds": ({"seeds": -1}, "seeds is -1"),
    "a target in words": ({"target": "high"}, "target is 'high'"),
    "no reason": ({"why": " "}, "why is empty"),
    "the wrong sign": ({"env": "Up-v1", "target": -475}, "target -475 is below the random policy's 22"),
}


@pytest.mark.parametrize("change, part", MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_in_an_entry_is_one_line(change, part, house, monkeypatch):
    (house.path / "reference.csv").write_text("env_id,algo,source,score\nUp-v1,random,x,22\nUp-v1,random,y,30\n")
    monkeypatch.setattr(suites, "REFERENCE", house.path / "reference.csv")
    path = house.suite({"env": "B-v1"}, change)
    with pytest.raises(suites.SuiteError) as error:
        suites.load(path, house.script.parent)
    line = str(error.value)
    assert line.startswith("suite s, entry 2 (") and part in line and "\n" not in line


def test_targets_near_the_random_policy_are_right(house, monkeypatch):
    (house.path / "reference.csv").write_text("env_id,algo,source,score\nUp-v1,random,x,22\nUp-v1,ppo,x,400\n")
    monkeypatch.setattr(suites, "REFERENCE", house.path / "reference.csv")
    suites.load(house.suite({"env": "Up-v1", "target": 22}, {"env": "Other-v1", "target": -9}), house.script.parent)


def test_other_mistakes_are_one_line(house):
    def error_of(path) -> str:
        with pytest.raises(suites.SuiteError) as error:
            suites.load(path, house.script.parent)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "entry 3 (fake, A-v1): entry 1 has the same" in error_of(house.suite({}, {"env": "B-v1"}, {"steps": 99}))
    assert "entry 2 (fake, A/v1): entry 1 has the same" in error_of(house.suite({}, {"env": "A/v1"}))  # one folder
    assert "unknown key seed;" in error_of(house.suite(seed=3))
    assert "title is missing" in error_of(house.suite(title=None))
    assert "seeds is missing" in error_of(house.suite(seeds=None))
    assert "no suite clasic; there are atari, atari-cpu, box2d" in error_of("clasic")
    assert "cannot be read" in error_of(house.path / "missing.toml")
    (house.path / "bad.toml").write_text("title = ")
    assert "suite " in error_of(house.path / "bad.toml")
    (house.path / "empty.toml").write_text('title = "t"\nprotocol = "p"\nseeds = 1\nentry = []\n')
    assert "no entry" in error_of(house.path / "empty.toml")
    (house.path / "odd.toml").write_text('title = "t"\nprotocol = "p"\nseeds = 1\nentry = [3]\n')
    assert "entry 1" in error_of(house.path / "odd.toml")
    house.script.write_text("def broken(:\n")
    assert "fake.py cannot be read" in error_of(house.suite())


@pytest.mark.parametrize(
    "words, part",
    [
        (["--seeds", "x"], "--seeds"),
        (["--seeds", "5-4"], "--seeds"),
        (["--seeds", "0"], "--seeds"),
        (["--only", "nothing*"], "--only"),
        (["--jobs", "0"], "--jobs"),
        (["--threads", "0"], "--threads"),
        (["--hang-after", "0"], "--hang-after"),
        (["s.toml"], "twice"),
        (["wrong.toml"], "wrong.toml"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_bad_input_is_one_line(words, part, house, monkeypatch, capsys):
    house.suite()
    before = house.files()
    monkeypatch.chdir(house.path)
    monkeypatch.setattr(sys, "argv", ["run.py", "s.toml", *words, "--scripts", "algos", "--runs-dir", "runs"])
    if not words[0].startswith("--"):
        monkeypatch.setattr(sys, "argv", ["run.py", "s.toml", words[0], "--scripts", "algos", "--runs-dir", "runs"])
    with pytest.raises(SystemExit) as end:
        run.main()
    out, err = capsys.readouterr()
    assert end.value.code == 2 and out == "" and err.startswith("error: ") and err.count("\n") == 1 and part in err
    assert house.files() == before


# --------------------------------------------------------------------------------------------------- what is to be made


def test_it_makes_what_is_missing_and_only_that(house):
    house.suite({}, {"env": "ALE/B-v1"})
    done = house.run("--threads", 3, "--jobs", 2)
    assert done.code == 0, done.err
    assert [x[0] for x in house.journal("end")] and set(house.results()) == {
        f"{env}__fake__{seed}" for env in ("A-v1", "ALE-B-v1") for seed in (1, 2)
    }
    assert {tuple(x[3:]) for x in house.journal("begin")} == {("3", "None")}
    assert "4 done of 4" in done.out and "return 12.5" in done.out
    assert all((house.runs / f"{name}.log").exists() for name in house.results()) and not list(
        house.runs.glob("*.lock")
    )
    before = house.files()
    again = house.run()
    assert again.code == 0 and "4 done of 4" in again.out and house.files() == before
    house.suite({}, {"env": "ALE/B-v1"}, {"env": "C-v1"}, seeds=3)
    assert house.run("--only", "C-v1", "ALE-B*", "--seeds", "2-3").code == 0
    new = {f"ALE-B-v1__fake__{x}" for x in (1, 2, 3)} | {f"C-v1__fake__{x}" for x in (2, 3)}
    assert set(house.results()) == new | {"A-v1__fake__1", "A-v1__fake__2"}
    assert {name: time for name, time in house.files().items() if name in before and "__" in name} == {
        name: time for name, time in before.items() if "__" in name
    }


def test_seed_1_of_every_entry_comes_first(house):
    house.suite({}, {"env": "B-v1", "seeds": 1}, {"env": "C-v1"}, seeds=3)
    assert house.run("--jobs", 1).code == 0
    assert [x[0].replace("-v1__fake__", "") for x in house.journal("begin")] == [
        "A1",
        "B1",
        "C1",
        "A2",
        "C2",
        "A3",
        "C3",
    ]


def test_dry_run_prints_what_it_would_do_and_does_nothing(house):
    house.suite({"flags": {"pace": 0.001}}, {"env": "B-v1"})
    assert house.run("--only", "B-v1", "--seeds", 1).code == 0
    unfinished, stale = house.runs / "A-v1__fake__1", house.runs / "B-v1__fake__2"
    for folder, env, seed in ((unfinished, "A-v1", 1), (stale, "B-v1", 2)):
        shutil.copytree(house.runs / "B-v1__fake__1", folder)
        described = json.loads((folder / "args.json").read_text())
        described["args"] |= {"env_id": env, "seed": seed, "pace": 0.001}
        described["command"] += ["--pace", "0.001"]
        (folder / "args.json").write_text(json.dumps(described))
        (folder / "result.json").unlink()
        (folder / "checkpoint.json").unlink()
    before = house.files()
    assert "--torch-threads 1 --device cuda --pace 0.001" in house.run("--dry-run", "--device", "cuda").out
    done = house.run("--dry-run")
    assert done.code == 0 and house.files() == before
    lines = done.out.splitlines()
    assert len([line for line in lines if not line.startswith(("#", "mv"))]) == 3
    assert "--resume runs/s/A-v1__fake__1" in lines[0] and "OMP_NUM_THREADS=1" in lines[0]
    assert "--env-id A-v1 --total-timesteps 10 --seed 2 --run-dir runs/s/A-v1__fake__2 --torch-threads 1" in lines[1]
    assert lines[1].endswith("--torch-threads 1 --pace 0.001")
    assert lines[2] == "mv runs/s/B-v1__fake__2 runs/s/B-v1__fake__2.old-1"
    assert lines[-1] == "# 3 to make, 1 done"
    subprocess.run(["sh", "-e"], input=done.out, cwd=house.path, text=True, check=True)  # copied into a shell, it works
    assert len(house.results()) == 4
    assert house.run("--dry-run").out == "# 0 to make, 4 done\n"


def test_an_unfinished_run_is_resumed_and_a_bare_folder_begun_anew(house):
    house.suite({"flags": {"mode": "wait"}}, {"env": "B-v1"}, {"env": "C-v1"}, seeds=1)
    for name in ("B-v1__fake__1", "C-v1__fake__1"):
        (house.runs / name).mkdir(parents=True)
    (house.runs / "C-v1__fake__1" / "args.json.tmp").write_text("{")
    process = house.start("--jobs", 3)
    house.wait(process, 5, "begin", "end")
    kill(process)
    house.let_go()
    done = house.run()
    assert done.code == 0, done.out
    assert [x[0] for x in house.journal("resume")] == ["A-v1__fake__1"]
    assert len(house.journal("begin")) == 3 and set(house.results()) >= {"B-v1__fake__1", "C-v1__fake__1"}
    assert (house.runs / "C-v1__fake__1.old-1" / "args.json.tmp").exists()  # nothing is deleted


def test_stale_runs_are_shown_and_made_anew_only_on_demand(house):
    house.suite({}, {"env": "B-v1"}, seeds=1)
    assert house.run().code == 0
    house.suite({}, {"env": "B-v1", "flags": {"pace": 0.001}}, seeds=1)
    before = house.files()
    done = house.run()
    assert done.code == 0 and house.files() == before
    assert "stale: s/B-v1__fake__1: --pace was 0.0 and is 0.001 now; --rerun-stale" in done.out
    assert "1 done, 1 stale of 2" in done.out
    done = house.run("--rerun-stale")
    assert done.code == 0 and "2 done of 2" in done.out
    assert [x[0] for x in house.journal("begin")].count("A-v1__fake__1") == 1
    assert len(house.journal("begin")) == 3
    assert json.loads((house.runs / "B-v1__fake__1" / "args.json").read_text())["args"]["pace"] == 0.001
    old = house.runs / "B-v1__fake__1.old-1"
    assert json.loads((old / "args.json").read_text())["args"]["pace"] == 0 and (old / "result.json").exists()
    house.suite({}, {"env": "B-v1"}, seeds=1)
    assert house.run("--rerun-stale").code == 0
    assert old.exists() and (house.runs / "B-v1__fake__1.old-2" / "result.json").exists()


def test_a_run_that_stays_stale_is_made_once(house):
    house.suite({"flags": {"on": False}}, seeds=1)  # the script says that it was on
    assert house.run().code == 0
    assert "1 stale of 1" in house.run("--rerun-stale").out and len(house.journal("begin")) == 2


def test_an_unfinished_run_of_another_script_is_not_mixed_with_this_one(house):
    house.suite({"flags": {"mode": "wait"}}, seeds=1)
    process = house.start()
    house.wait(process, 1, "begin")
    kill(process)
    house.let_go()
    house.script.write_text(FAKE + "\nchanged = 1\n")
    assert house.run().code == 0
    assert not house.journal("resume") and len(house.journal("begin")) == 2
    assert (house.runs / "A-v1__fake__1.old-1" / "args.json").exists() and len(house.results()) == 1


def test_what_makes_a_run_stale(house):
    (entry,) = suites.load(house.suite(seeds=1), house.script.parent).entries
    assert house.run().code == 0
    folder, scripts = house.runs / "A-v1__fake__1", house.script.parent
    described = json.loads((folder / "args.json").read_text())

    def reason(entry=entry, seed=1, **changes):
        (folder / "args.json").write_text(json.dumps(described | changes))
        return suites.why_stale(folder, entry, seed, scripts)

    def with_flags(**flags):
        return replace(entry, flags=flags)

    assert reason() is None and reason(with_flags(pace=0.0, on=True)) is None
    assert "--seed was 1 and is 2 now" in reason(seed=2)
    assert "--on was True and is False now" in reason(with_flags(on=False))
    assert "--missing" in reason(with_flags(missing=1))
    own = "fake.py --env-id A-v1 --run-dir elsewhere --torch-threads 7 --device cuda --seed 1 --total-timesteps 10"
    assert reason(command=own.split()) is None
    for flag in ("--pace 0.0", "--pace=0.0", "--no-on", "--on"):  # the entry has it no more
        assert flag.split("=")[0].split()[0] in reason(command=f"{own} {flag}".split())
        flags = {"on": True} if "on" in flag else {"pace": 0.0}
        assert reason(with_flags(**flags), command=f"{own} {flag}".split()) is None
    house.script.write_text(FAKE + "\n# a remark\n")
    assert reason() is None
    (folder / "fake.py").write_text(FAKE.replace("step in range", "step in 2 * range"))
    assert reason() == "fake.py has changed"
    for damaged in ("def broken(:", None):
        (folder / "fake.py").unlink() if damaged is None else (folder / "fake.py").write_text(damaged)
        assert "copy of the script cannot be read" in reason()
    (folder / "args.json").write_text("{")
    assert "args.json" in suites.why_stale(folder, entry, 1, scripts)


# ------------------------------------------------------------------------------------------------------------- failures


@pytest.mark.parametrize(
    "mode, note, words",
    [
        ("fail", "exit code 3", []),
        ("silent", "ended without a result", []),
        ("hang", "hangs: no sign of life for 0.05 minutes", ["--hang-after", 0.05]),
    ],
)
def test_a_failure_is_shown_and_stops_nothing_else(mode, note, words, house):
    house.suite({"flags": {"mode": mode}}, {"env": "B-v1"}, seeds=2)
    done = house.run("--jobs", 2, *words)
    assert done.code == 1
    assert set(house.results()) == {"B-v1__fake__1", "B-v1__fake__2"} and "2 done, 2 failed of 4" in done.out
    for seed in (1, 2):
        shown = f"s/A-v1__fake__{seed}: {note}; its log: runs/s/A-v1__fake__{seed}.log"
        assert f"failed: {shown}" in done.err
        assert f"failed    {shown.replace(':', ' ', 1)}" in done.out
    if mode == "fail":
        again = house.run().out  # what is shown is of the last attempt
        for out in (done.out, again):
            shown = [line for line in out.splitlines() if line.startswith(" ")]
            assert shown == ["    first words", "    the loss is [not] finite"] * 2
        assert "the loss is [not] finite" in (house.runs / "A-v1__fake__1.log").read_text()
    assert [x[0] for x in house.journal("begin")].count("A-v1__fake__1") == 1
    assert not [pid for _, pid, *_ in house.journal() if lives(pid)]


def test_a_run_killed_from_outside_is_a_failure_and_can_go_on(house):
    house.suite({"flags": {"mode": "wait"}}, seeds=1)
    process = house.start()
    house.wait(process, 1, "begin")
    os.kill(int(house.journal("begin")[0][1]), signal.SIGKILL)
    done = finish(process)
    house.let_go()
    assert done.code == 1 and "killed by signal 9" in done.err
    assert house.run().code == 0 and len(house.journal("resume")) == 1


# ------------------------------------------------------------------------------------------------------ kills and stops


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the lock alone protects")
def test_no_process_outlives_a_killed_runner(house):
    house.suite({"steps": 1000, "flags": {"pace": 0.05}}, {"env": "B-v1", "flags": {"mode": "stubborn", "pace": 1}})
    process = house.start("--jobs", 3)
    house.wait(process, 3, "begin")
    pids = [x[1] for x in house.journal("begin")]
    assert all(map(lives, pids))
    kill(process)
    end = time.monotonic() + 10
    while any(map(lives, pids)) and time.monotonic() < end:
        time.sleep(0.01)
    assert not [pid for pid in pids if lives(pid)]


def test_killed_three_times_the_results_are_the_same(house, tmp_path):
    entries = [{"env": f"{x}-v1", "steps": 30, "flags": {"pace": 0.03}} for x in "ABC"]
    house.suite(*entries, seeds=3)
    for _ in range(3):
        begun = len(house.journal("begin"))
        process = house.start("--jobs", 3)
        house.wait(process, begun + 1, "begin")
        time.sleep(random.uniform(0, 0.8))
        kill(process)
    done = house.run("--jobs", 3)
    assert done.code == 0, done.out
    disturbed, ends = house.results(), [x[0] for x in house.journal("end")]
    assert sorted(ends) == sorted(disturbed) and house.journal("resume")  # each was finished once
    begins = [x[0] for x in house.journal("begin")]
    assert len(begins) == len(set(begins))
    shutil.rmtree(house.runs)
    assert house.run("--jobs", 3).code == 0
    assert house.results() == disturbed and len(disturbed) == 9


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopping_ends_the_jobs_and_says_how_to_go_on(number, house):
    house.suite({"steps": 1000, "flags": {"pace": 0.01}}, seeds=3)
    process = house.start("--jobs", 2)
    house.wait(process, 2, "begin")
    time.sleep(0.1)
    process.send_signal(number)
    done = finish(process)
    assert done.code == 130 and "to go on: " in done.err and "s.toml --scripts algos" in done.err
    assert "failed" not in done.out + done.err
    assert len(house.journal("interrupted")) == 2 and len(house.journal("begin")) == 2  # as by Ctrl-C; none was started
    assert not [pid for _, pid, *_ in house.journal() if lives(pid)]


def test_a_job_that_does_not_stop_is_killed(house):
    house.suite({"steps": 100_000, "flags": {"pace": 0.01, "mode": "stubborn"}}, seeds=1)
    process = house.start()
    house.wait(process, 1, "begin")
    while not (house.runs / "A-v1__fake__1" / "episodes.csv").exists():  # by then it ignores SIGINT
        time.sleep(0.01)
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None and lives(house.journal()[0][1])
    process.send_signal(signal.SIGINT)  # asked twice
    assert finish(process).code == 130 and time.monotonic() - began < run.PATIENCE
    assert not lives(house.journal()[0][1])


# ------------------------------------------------------------------------------------------------------ several runners


def test_two_runners_share_the_work(house):
    house.suite(*({"env": f"{x}-v1", "flags": {"mode": "wait"}} for x in "ABC"), seeds=2)
    processes = [house.start("--jobs", 1) for _ in range(2)]
    house.wait(processes[0], 2, "begin")
    house.let_go()
    done = [finish(process) for process in processes]
    assert [x.code for x in done] == [0, 0], done
    begins = [x[0] for x in house.journal("begin")]
    assert len(begins) == len(set(begins)) == len(house.results()) == 6 and not house.journal("resume")
    assert all("6 done of 6" in x.out for x in done)
    shares = [x.out.count("running   s/") for x in done]
    assert sum(shares) == 6 and min(shares) >= 1


def test_a_run_that_an_orphan_makes_is_left_to_it(house):
    """Where jobs do not die with their runner, they keep its lock."""
    house.suite({"flags": {"mode": "wait"}}, {"env": "B-v1"}, seeds=1)
    code = "from benchmark import run; run.LIBC = None; run.main()"
    words = ["s.toml", "--scripts", "algos", "--runs-dir", "runs", "--jobs", "1"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    first = subprocess.Popen([sys.executable, "-c", code, *words], cwd=house.path, env=environment, text=True)
    house.wait(first, 1, "begin")
    kill(first)
    assert "# s/A-v1__fake__1 is running elsewhere" in house.run("--dry-run").out
    second = house.start("--jobs", 2)
    house.wait(second, 1, "end")
    ((_, orphan, *_), (name, *_)) = house.journal("begin")
    assert name == "B-v1__fake__1" and lives(orphan) and second.poll() is None
    house.let_go()
    done = finish(second)
    assert done.code == 0 and "2 done of 2" in done.out and len(house.results()) == 2
    assert len(house.journal()) == 4 and not lives(orphan)  # two begin, two end


def test_what_a_job_leaves_behind_is_ended(house):
    house.script.write_text(FAKE + "\nif os.fork() == 0:\n    journal('left')\n    time.sleep(1000)\ntime.sleep(0.5)\n")
    house.suite(seeds=1)
    assert house.run().code == 0
    ((_, pid, _),) = house.journal("left")
    end = time.monotonic() + 10
    while lives(pid) and time.monotonic() < end:
        time.sleep(0.01)
    assert not lives(pid)


def test_a_lock_is_held_once(tmp_path):
    path = tmp_path / "x.lock"
    lock = run.take_lock(path)
    assert lock is not None and run.take_lock(path) is None
    late = os.open(path, os.O_RDWR)  # by a runner that opened the file just before its owner removed it
    job = SimpleNamespace(beside=lambda suffix: path, lock=lock)
    run.give_lock(job)
    assert not path.exists()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "open", lambda *args: late)
        assert run.take_lock(path) is None  # its lock would be worth nothing
    lock = run.take_lock(path)
    assert lock is not None
    os.close(lock)


# -------------------------------------------------------------------------------------------- backends, and the display


class Cloud:
    """A backend that is no process: what a job is to be is all that it gets. Each job takes three looks."""

    def __init__(self):
        self.now, self.most, self.seen = {}, 0, []

    def submit(self, command, env, resources):
        self.seen.append((command, env, resources))
        self.now[len(self.seen)] = 3
        self.most = max(self.most, len(self.now))
        gpus = [self.seen[i - 1][2].gpu for i in self.now]
        assert all(gpus.count(gpu) <= 2 for gpu in gpus if gpu)
        return len(self.seen)

    def poll(self, handle):
        self.now[handle] -= 1
        if self.now[handle]:
            return None
        del self.now[handle]
        command = self.seen[handle - 1][0]
        subprocess.run(command, check=True)
        return 0

    def stop(self, handle, force):
        raise AssertionError("nobody asked for it")


@pytest.fixture
def jobs(house, monkeypatch):
    """jobs(*words) -> the jobs of the suite, their slots, and Args."""
    monkeypatch.setattr(run, "TICK", 0.001)
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # ours stay
    monkeypatch.chdir(house.path)

    def make(**flags):
        args = run.Args(("s.toml",), scripts=Path("algos"), runs_dir=Path("runs"), **flags)
        return run.make_jobs(args), args

    return make


@pytest.mark.parametrize(
    "flags, most",
    [({"jobs": 3}, 3), ({"gpus": ("0", "1"), "runs_per_gpu": 2}, 4), ({"gpus": ("0", "1"), "jobs": 1}, 1)],
)
def test_jobs_are_packed_into_slots(flags, most, house, jobs):
    house.suite(*({"env": f"{x}-v1"} for x in "ABC"), seeds=3)
    todo, args = jobs(threads=2, **flags)
    backend = Cloud()
    run.Runner(todo, run.slots_of(args), args, backend).work()
    assert len(house.results()) == len(backend.seen) == 9 and backend.most == most
    for _, env, resources in backend.seen:
        assert {env[name] for name in run.THREAD_VARIABLES} == {"2"} and resources.threads == 2
        assert env.get("CUDA_VISIBLE_DEVICES") == resources.gpu and resources.gpu in (args.gpus or [None])
    if most == 4:
        assert [resources.gpu for _, _, resources in backend.seen[:4]] == ["0", "1", "0", "1"]


def test_by_default_there_are_as_many_jobs_as_cores_for_their_threads(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    assert len(run.slots_of(run.Args(()))) == 8
    assert len(run.slots_of(run.Args((), threads=3))) == 2
    assert len(run.slots_of(run.Args((), threads=9))) == 1
    assert len(run.slots_of(run.Args((), threads=9, jobs=5))) == 5


def test_progress_is_read_from_the_last_episodes(house, jobs):
    house.suite(seeds=1)
    (job,), _ = jobs()
    job.follow()
    assert (job.step, job.trailing) == (0, None)
    job.folder.mkdir(parents=True)
    rows = [f"{10 * i},{i / 2},{float(i)},9\n" for i in range(1, 1001)]
    (job.folder / "episodes.csv").write_text("step,seconds,return,length\n" + "".join(rows[:50]) + "9999,1")
    job.follow()  # the row that is being written does not count
    assert (job.step, job.seconds, job.trailing) == (500, 25.0, 25.5)
    (job.folder / "episodes.csv").write_text("step,seconds,return,length\n" + "".join(rows))
    job.follow()
    assert (job.step, job.seconds, job.trailing) == (10_000, 500.0, sum(range(901, 1001)) / 100)


def test_time_left(house, jobs):
    house.suite({"steps": 1000}, {"env": "B-v1", "steps": 2000}, seeds=3)
    todo, _ = jobs()
    assert run.time_left(todo, 2) == ({}, None)
    a1, b1, a2, b2, a3, b3 = todo
    a1.state, a1.step, a1.seconds = "done", 1000, 10.0
    b1.state, b1.step, b1.seconds = "running", 500, 10.0
    left, total = run.time_left(todo, 2)
    assert left[id(b1)] == 30.0  # at its own pace
    assert left[id(a2)] == 10.0 and left[id(b2)] == 40.0  # at that of their entries
    assert total == (30 + 10 + 40 + 10 + 40) / 2
    for job in todo[2:]:
        job.state = "done"
    assert run.time_left(todo, 2)[1] == 30.0


def test_the_table_fits_the_terminal(house, jobs, monkeypatch):
    house.suite(*({"env": f"E{i}-v1"} for i in range(20)), seeds=5)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("LINES", "24")
    todo, _ = jobs()
    for i, state in enumerate(["done"] * 30 + ["running"] * 4 + ["failed"] * 2 + ["elsewhere"] * 2):
        todo[i].state = state
    display = run.Display(todo, 4)
    with display.console.capture() as capture:
        display.console.print(display.table(*run.time_left(todo, 4)))
    lines = capture.get().splitlines()
    assert 20 <= len(lines) <= 24
    assert sum("running" in line for line in lines[1:-1]) == 4 and sum("failed" in line for line in lines[:-1]) == 2
    assert any("done" in line for line in lines[:-1]) and any("waiting" in line for line in lines[:-1])
    assert lines[-1].strip() == "30 done, 4 running, 2 running elsewhere, 62 waiting, 2 failed of 100"


def test_in_a_terminal_there_is_a_live_table(house, monkeypatch):
    house.suite({"steps": 30, "flags": {"pace": 0.1}}, {"env": "B-v1", "flags": {"mode": "fail"}}, seeds=1)
    screen, terminal = pty.openpty()
    for name, value in {"TERM": "xterm", "COLUMNS": "100", "LINES": "30"}.items():
        monkeypatch.setenv(name, value)
    process, seen = house.start("--jobs", 2, stdout=terminal), b""
    os.close(terminal)
    with suppress(OSError):  # Linux's way to say that the other end is closed
        while part := os.read(screen, 10_000):
            seen += part
    os.close(screen)
    done = finish(process)
    assert done.code == 1 and done.err == "failed: s/B-v1__fake__1: exit code 3; its log: runs/s/B-v1__fake__1.log\n"
    lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", seen.decode()).splitlines()
    assert any(re.match(r"A-v1__fake__1 +running +\d+ / 30 +100 ", line) for line in lines)
    assert any(re.match(r"B-v1__fake__1 +failed .* exit code 3; runs/s/B-v1__fake__1.log", line) for line in lines)
    assert lines.count("    the loss is [not] finite") == 1 and lines[-1].strip() == "1 done, 1 failed of 2"


def test_numbers_are_short():
    assert [run.short(x) for x in (None, 0, 3.14159, 475, 999.6, 12_345, 1_234_567, -1197.2, 10**7)] == [
        *("", "0", "3.14", "475", "1e+03", "12.3k", "1.23M", "-1.2k", "10M")
    ]


# ---------------------------------------------------------------------------------------------------- with real scripts


@pytest.mark.slow
def test_the_smoke_suite_killed_three_times_gives_the_same_results(tmp_path):
    def start(runs) -> subprocess.Popen:
        words = ["smoke", "--seeds", "1", "--jobs", "2", "--runs-dir", tmp_path / runs]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        return subprocess.Popen([sys.executable, ROOT / "benchmark" / "run.py", *words], cwd=tmp_path, env=environment)

    assert start("undisturbed").wait(10 * TIMEOUT) == 0
    for i in range(3):
        process = start("disturbed")
        end = time.monotonic() + 10 * TIMEOUT  # kill it in the middle of something: i + 1 run folders are there
        while len(list((tmp_path / "disturbed" / "smoke").glob("*/episodes.csv"))) <= i and time.monotonic() < end:
            time.sleep(0.01)
        time.sleep(random.uniform(0, 4))
        assert process.poll() is None, "it ended before it could be killed"
        process.kill()
        process.wait()
    assert start("disturbed").wait(10 * TIMEOUT) == 0
    folders = sorted(path.parent.name for path in (tmp_path / "undisturbed" / "smoke").glob("*/result.json"))
    assert len(folders) == 5
    for name in folders:
        assert bits(tmp_path / "disturbed" / "smoke" / name) == bits(tmp_path / "undisturbed" / "smoke" / name), name
