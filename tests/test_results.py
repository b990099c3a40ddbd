"""Run folders become tables of results; two tables are compared; run folders are logged to a tracker."""

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter
from tools import ROOT, fake_script, finish, run

from benchmark import compare, results, runs, suites

TOML = """
script = "fake.py"
seeds = 3

[[entry]]
env = "CartPole-v1"
steps = 100_000
flags = { learning-rate = 1e-2, norm-adv = false }

[[entry]]
env = "Acrobot-v1"
steps = 10_000
"""


@pytest.fixture
def suite(tmp_path):
    fake_script(tmp_path)
    (tmp_path / "toys.toml").write_text(TOML)
    return suites.load(tmp_path / "toys.toml")


@pytest.fixture
def make(suite, tmp_path):
    """make(seed, entry) -> a finished run folder."""
    return lambda seed, entry=0, **more: finish(suite.entries[entry].spec("toys", seed, tmp_path), **more)


@pytest.fixture
def collect(suite, tmp_path):
    """collect() -> what was said, and the table."""
    folder = tmp_path / "results"
    return lambda: (list(results.collect(suite, tmp_path, folder)), results.read_suite(suite, folder))


def describe(folder: Path, **changes) -> None:
    """Change the args.json of a run."""
    about = json.loads((folder / "args.json").read_text())
    (folder / "args.json").write_text(json.dumps(about | changes))


def test_a_run_becomes_a_row_and_a_curve(suite, make, collect, tmp_path):
    folder = make(2, returns=(0.0,) * 500 + (450.0,) * 500)
    said, table = collect()
    assert list(table.columns) == results.COLUMNS and len(table) == 1 and len(said) == 1
    row = table.iloc[0]
    assert tuple(row[["env", "script", "seed", "steps", "threads"]]) == ("CartPole-v1", "fake", 2, 100_000, 1)
    assert tuple(row[["final_return", "eval_mean", "minutes"]]) == (450, 450, 1)
    assert (row["flags"], row["gpu"]) == ("--learning-rate 0.01 --no-norm-adv", "")
    assert row["code"] == runs.code_hash((folder / "fake.py").read_text())
    # 200 checkpoints of 5 episodes. Returns of 450 begin after the 100th; from the 120th on, all of the last 100 are.
    assert row["slm_score"] == pytest.approx((np.minimum(np.arange(1, 101) * 5, 100) / 100 * 450).mean(), rel=1e-5)
    curve = results.read_curves(suite, suite.entries[0], tmp_path / "results")
    assert list(curve.index) == list(range(1000, 100_001, 1000)) and list(curve.columns) == [2]
    assert list(curve[2].iloc[48:62]) == pytest.approx([0, 0, *range(45, 451, 45), 450, 450])


def test_rows_and_curves_are_sorted_kept_and_replaced(suite, make, collect, tmp_path):
    gone, _, redone, unfinished, aside, other = make(10), make(1, 1), make(2), make(3), make(4), make(5)
    make(101)  # flags are chosen on such seeds
    (unfinished / "result.json").unlink()
    aside.rename(aside.with_name(f"{aside.name}.old-1"))
    other.rename(other.with_name("CartPole-v1__fake_other__5"))
    said, table = collect()
    assert list(zip(table["env"], table["seed"])) == [("Acrobot-v1", 1), ("CartPole-v1", 2), ("CartPole-v1", 10)]
    assert len(said) == 3 and collect()[0] == []
    shutil.rmtree(gone)
    shutil.rmtree(redone)
    describe(make(2, final_return=7.0), started="another time")
    said, table = collect()
    assert list(table["final_return"]) == [1, 7, 1] and len(said) == 1 and said[0].startswith("replaced")
    assert list(results.read_curves(suite, suite.entries[0], tmp_path / "results")) == [2, 10]


def test_another_script_is_taken_and_other_flags_are_not(make, collect):
    older, other = make(1), make(2)
    (older / "fake.py").write_text((older / "fake.py").read_text() + "\nMORE = 1\n")
    describe(other, args=runs.read_args(other)["args"] | {"batch_size": 64})
    said, table = collect()
    assert list(table["seed"]) == [1] and len(said) == 2 and "batch-size" in said[1]
    assert table["code"].iloc[0] == runs.code_hash((older / "fake.py").read_text())


@pytest.mark.parametrize(
    "file, content, reason",
    [
        ("args.json", "{", "args.json"),
        ("result.json", "{}", "final_return"),
        ("result.json", '{"final_return": null}', "no training episode ended"),
        ("episodes.csv", "step,seconds,return,length\n1,2,x,3\n", "x"),
        ("fake.py", None, "fake.py"),
    ],
)
def test_damaged_runs_are_named_and_left_out(make, collect, file, content, reason):
    path = make(1) / file
    make(2)
    path.unlink() if content is None else path.write_text(content)
    said, table = collect()
    assert list(table["seed"]) == [2] and len(said) == 2
    assert said[0].startswith(f"left out: {path.parent}: ") and reason in said[0]


def test_a_new_column_leaves_older_rows_as_they_are(make, collect, tmp_path):
    folder, path = make(1), tmp_path / "results" / "runs" / "toys.csv"
    collect()
    shutil.rmtree(folder)
    pd.read_csv(path).drop(columns="memory_mb").assign(later=5).to_csv(path, index=False)
    make(2)
    _, table = collect()
    assert list(table["later"].isna()) == [False, True] and list(table["memory_mb"].isna()) == [True, False]


def test_a_folder_of_runs_is_read_at_any_depth(make, tmp_path, capsys):
    first, _, aside, damaged = make(1), make(2, 1), make(3), make(4)
    shutil.copytree(first, tmp_path / "toys" / "deeper" / "still" / "run")  # the same run
    aside.rename(aside.with_name("x.old-1"))
    (damaged / "result.json").write_text("{}")
    table = results.read_folder(tmp_path)
    assert list(zip(table["env"], table["seed"])) == [("Acrobot-v1", 2), ("CartPole-v1", 1)]
    assert list(table["flags"]) == ["", "--learning-rate 0.01 --no-norm-adv"]  # what differs from the defaults
    assert str(damaged) in capsys.readouterr().err


def test_checkpoints_are_slm_labs():
    assert list(results.checkpoints("CartPole-v1", 2000)) == [500, 1000, 1500, 2000]
    assert list(results.checkpoints("LunarLanderContinuous-v3", 2500)) == [1000, 2000]
    for env in ("HalfCheetah-v5", "InvertedDoublePendulum-v5", "ALE/Pong-v5"):
        assert list(results.checkpoints(env, 20_000)) == [10_000, 20_000]
    assert len(results.checkpoints("MountainCar-v0", 120_000)) == 200 and len(results.checkpoints("X-v0", 30)) == 30


def test_the_committed_results_are_tidy():
    for table in map(pd.read_csv, results.RESULTS.glob("runs/*.csv")):
        assert list(table.columns) == results.COLUMNS and not table[results.KEY].duplicated().any()


# ------------------------------------------------------------------------------------------------------------- compare

LOW, HIGH, MIXED = [1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0], [0.0, 2.5, 3.5, 9.0]


def side(started: str = "then", steps: int = 1000, **scores) -> pd.DataFrame:
    """A table: side(A__x=[1, 2]) has two seeds of script x on A-v0."""
    rows = []
    for name, values in scores.items():
        env, script = name.split("__")
        row = {"env": f"{env}-v0", "script": script, "steps": steps, "flags": "", "started": started}
        rows += [row | {"seed": seed, "final_return": value} for seed, value in enumerate(values, 1)]
    return pd.DataFrame(rows)


def verdicts(a, b) -> list[str]:
    table = compare.compare(a, b)[0]
    return list(table["B is"]) if len(table) else []


def test_compare_gives_a_verdict_for_each_environment():
    a = side(A__x=LOW, B__x=HIGH, C__x=LOW, D__x=LOW[:3], Only__x=LOW)
    b = side("now", A__x=HIGH, B__x=LOW, C__x=MIXED, D__x=HIGH[:3])
    table, notes = compare.compare(a, b)
    assert list(table["B is"]) == ["better", "worse", "no difference found", "too few seeds"]
    assert table["B - A"].iloc[0] == "4.00 [2.50, 5.50]" and table["P(B above A)"].iloc[0] == "1.00 [1.00, 1.00]"
    assert table["A"].iloc[0].startswith("2.50 [") and table["seeds"].iloc[3] == "3, 3"
    assert len(notes) == 1  # about the seeds, which are too few
    assert verdicts(b, a) == ["worse", "better", "no difference found", "too few seeds"]
    assert verdicts(a, side("now", A__x=[3.9, 5, 6, 7])) == ["no difference found"]  # one inversion: p = 4/70


def test_compare_marks_a_verdict_whose_interval_spans_zero():
    table, notes = compare.compare(side(A__x=np.arange(10.0)), side("now", A__x=[*np.arange(10.0, 19), -150]))
    assert list(table["B is"]) == ["better*"] and len(notes) == 1


def test_scripts_may_differ_in_name_if_each_side_has_one():
    assert verdicts(side(A__ppo=LOW), side(A__my_ppo=HIGH)) == ["better"]
    assert verdicts(side(A__ppo=LOW, A__dqn=HIGH), side("now", A__ppo=HIGH, A__other=LOW)) == ["better"]
    assert verdicts(side(A__ppo=LOW), side(steps=2000, A__ppo=HIGH)) == []


def test_a_run_on_both_sides_counts_once():
    a, b = side(A__x=LOW), side("now", A__x=HIGH)
    table, _ = compare.compare(a, pd.concat([a, b]))
    assert list(table["seeds"]) == ["4, 4"] and list(table["B is"]) == ["better"] and verdicts(a, a) == []


def test_a_run_in_two_suites_counts_once(tmp_path):
    for name in ("a", "b"):
        results.write(side(A__x=LOW), tmp_path / "runs" / f"{name}.csv", index=False)
    assert len(compare.load(str(tmp_path))) == len(LOW)


def test_compare_run_folders(tmp_path):
    """A script and a changed copy, as in docs/benchmarking.md."""
    for name, score in (("fake", 0.0), ("changed", 5.0)):
        script = fake_script(tmp_path, name)
        for seed in (1, 2, 3, 4):
            flags = {"env_id": "CartPole-v1", "total_timesteps": 1000, "seed": seed}
            finish(runs.Spec(script, flags, tmp_path / name / "deeper" / str(seed)), final_return=score + seed / 10)
    done = run("benchmark/compare.py", tmp_path / "fake", tmp_path / "changed")
    assert "fake → changed" in done.stdout and "better" in done.stdout
    done = run("benchmark/compare.py", f"{tmp_path}:fake", f"{tmp_path}:changed", "--measure", "sps")
    assert "no difference found" in done.stdout


def test_compare_a_revision_of_the_old_layout(tmp_path, monkeypatch):
    """Another folder, other columns, and beside it a file that is no table of runs."""
    monkeypatch.chdir(tmp_path)
    folder = Path("benchmark/results")
    results.write(side(A__x=LOW).assign(strength=1, clean="yes"), folder / "toys.csv", index=False)
    (folder / "hub.csv").write_text("run,started,url,sha256\na,b,c,d\n")
    identity = "-c user.name=a -c user.email=a@b -c commit.gpgsign=false"
    for words in ("init -q", "add .", f"{identity} commit -qm results"):
        subprocess.run(["git", *words.split()], check=True)
    (folder / "toys.csv").unlink()
    results.write(side("now", A__x=HIGH), folder / "runs" / "toys.csv", index=False)
    assert verdicts(compare.load("HEAD"), compare.load("benchmark/results")) == ["better"]
    assert verdicts(compare.load("benchmark/results/runs/toys.csv"), compare.load("HEAD:x")) == ["worse"]


@pytest.mark.parametrize("name", ["missing", "empty", "text.csv", "bytes.csv", "good.csv:other"])
def test_compare_refuses_bad_input_in_one_line(tmp_path, monkeypatch, capsys, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "")  # without git
    Path("empty").mkdir()
    Path("text.csv").write_text("a,b\n1,2\n")
    Path("bytes.csv").write_bytes(b"\xff\xfe\x00")
    side(A__x=LOW).to_csv("good.csv")
    with pytest.raises(SystemExit) as end:
        compare.load(name)
    assert end.value.code == 2 and capsys.readouterr().err.count("\n") == 1


TRACKER = """
import json, types
write = lambda line: print(json.dumps(line), file=open("log", "a"))
run = types.SimpleNamespace(log=lambda values, step: write([step, values]), finish=lambda: None)
init = lambda **options: write(options) or run
"""


def test_track_logs_what_is_new(make, tmp_path):
    folder, later = make(1), tmp_path / "later"
    (folder / "result.json").rename(later)  # still running
    (tmp_path / "trackio.py").write_text(TRACKER)
    writer = EventFileWriter(str(folder))

    def track(step, folder="toys"):
        value = Summary.Value(tag="losses/x", simple_value=step / 2)
        writer.add_event(Event(step=step, summary=Summary(value=[value])))
        writer.flush()
        options = {"cwd": tmp_path, "env": {"PYTHONPATH": f"{ROOT}:{tmp_path}"}}
        run(ROOT / "benchmark" / "track.py", tmp_path / folder, "--to", "trackio", **options)

    track(10)
    with pytest.raises(AssertionError, match="no runs in"):
        track(10, "misspelled")
    later.rename(folder / "result.json")
    track(20)
    track(20)
    lines = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    start, first, _, second, last = lines
    assert start["config"]["env_id"] == "CartPole-v1" and start["name"] == "toys/CartPole-v1__fake__1"
    assert [first, second] == [[10, {"losses/x": 5}], [20, {"losses/x": 10}]] and last[1]["result/final_return"] == 1
