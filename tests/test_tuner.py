"""The tuner, with a script that starts in 50 milliseconds: every trial is run once, whatever is killed."""

import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import optuna
import pandas as pd
import pytest
from optuna.trial import TrialState
from tools import FAKE, ROOT, fake_script, lives, run, until

import tuner.run
from benchmark import runner, runs
from benchmark.suites import SuiteError
from tuner import spaces, study
from tuner.narrow import toml

RUN = ROOT / "tuner" / "run.py"
SHIPPED = sorted(path.stem for path in spaces.SPACES.glob("*.toml"))
RATE = {"scale": "log", "low": 1e-4, "high": 1e-1}
SIZE, SWITCH = {"scale": "log2", "low": 16, "high": 256}, {"choices": [True, False]}
RANGES = {"learning-rate": RATE, "batch-size": SIZE, "norm-adv": SWITCH}
SPACE = {"script": "fake.py", "env": "Fake-v1", "steps": 1000, "trials": 4, "name": "s", "pruner": "none"}
COMPLETE, PRUNED, FAIL, RUNNING = TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL, TrialState.RUNNING


class House:
    """A folder with a space over a fake script, and the tuner in it."""

    def __init__(self, path: Path, url: str | None = None) -> None:
        self.path, self.url, self.folder = path, url, path / "studies" / "s"
        self.script = fake_script(path)

    def space(self, ranges: dict | None = None, **changes) -> str:
        content = SPACE | changes | {"space": {"learning-rate": RATE} if ranges is None else ranges}
        text = "".join(f"{key} = {toml(value)}\n" for key, value in content.items() if value is not None)
        (self.path / "s.toml").write_text(text)
        return str(self.path / "s.toml")

    def words(self, *words) -> list[str]:
        words = [*map(str, words or ("search", "s.toml")), "--studies", "studies"]
        return words + (["--storage", self.url] if self.url else [])

    def start(self, *words) -> subprocess.Popen:
        env = os.environ | {"PYTHONPATH": str(ROOT)}
        output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen([sys.executable, RUN, *self.words(*words)], cwd=self.path, env=env, **output)

    def run(self, *words) -> None:
        run(RUN, *self.words(*words), cwd=self.path)

    def trials(self) -> list[optuna.trial.FrozenTrial]:
        return optuna.load_study(study_name="s", storage=study.open_storage(self.url, self.folder)).trials

    def states(self) -> list[TrialState]:
        return [x.state for x in self.trials()]

    def run_folder(self, number: int, seed: int = 101) -> Path:
        return self.folder / "trials" / str(number) / f"seed-{seed}"

    def flags(self, number: int) -> dict:
        return runs.read_args(self.run_folder(number))["args"]

    def starts(self, folder: Path | None = None) -> list[tuple[int, int]]:
        """(step, process id) of each start, of one run or of all."""
        files = [folder / "starts.txt"] if folder else sorted(self.folder.glob("trials/*/*/starts.txt"))
        lines = [line.split() for path in files for line in path.read_text().splitlines()]
        return [(int(line[0]), int(line[1])) for line in lines if len(line) == 2]

    def is_quiet(self) -> bool:
        return not any(lives(pid) for _, pid in self.starts())

    def times(self) -> dict[str, int]:
        return {str(x): x.stat().st_mtime_ns for x in self.folder.glob("**/seed-*/*")}


@pytest.fixture
def house(tmp_path) -> House:
    return House(tmp_path)


@pytest.fixture
def call(monkeypatch, capsys):
    """call(house, *words) -> stdout and stderr: in this process, which saves the time of starting another."""

    def call(house: House, *words, code: int = 0) -> SimpleNamespace:
        monkeypatch.chdir(house.path)
        monkeypatch.setattr(sys, "argv", ["tuner/run.py", *house.words(*words)])
        capsys.readouterr()
        ended = 0
        try:
            tuner.run.main()
        except SystemExit as end:
            ended = end.code
        out, err = capsys.readouterr()
        assert ended == code, f"{ended}\n{out}\n{err}"
        return SimpleNamespace(out=out, err=err)

    monkeypatch.setattr(runner, "LOOK", 0.1)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    return call


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_spaces_are_right(name):
    """Every default is inside, so that Optuna sees the first trial; three to four trials for each flag."""
    space = spaces.load(name, {})
    assert 3 * len(space.dimensions) <= space.trials <= 4.5 * len(space.dimensions)
    for x in space.dimensions:
        assert x.value(space.first_params[x.param]) == space.defaults[x.flag]
        if not x.choices:
            assert {x.value(x.distribution.low), x.value(x.distribution.high)} == {x.low, x.high}
    lows, highs = ({x.flag: getattr(x, end) for x in space.dimensions} for end in ("low", "high"))
    batch = math.prod(lows.get(flag, space.defaults.get(flag, 1)) for flag in ("num_envs", "num_steps"))
    assert batch % highs.get("num_minibatches", 1) == 0  # a power of two divides every larger one


def test_every_script_has_a_space_and_the_docs_have_valid_ones():
    learning = [path.stem for path in (ROOT / "algos").glob("*.py") if "gamma" in runs.defaults(path.read_text())]
    assert set(learning) <= set(SHIPPED)
    assert all(spaces.load(str(path), {}).trials for path in (ROOT / "docs" / "tuning").glob("*.toml"))


def test_the_pruner_fits_the_search(house):
    """Of few trials asha would leave none; before 10,000 steps, or half of the budget, it would compare beginners."""
    path = house.space(pruner=None, steps=320_000, trials=20)
    chosen = [spaces.load(path, x) for x in ({}, {"trials": 8}, {"steps": 64_000}, {"steps": 12_000})]
    assert [x.pruner for x in chosen] == ["asha", "median", "asha", "asha"]
    assert [x.grace for x in chosen] == [20_000, 64_000, 10_000, 6000]
    assert {16_000, 20_000, 80_000, 304_000} <= set(chosen[0].milestones) and max(chosen[0].milestones) < 320_000


MISTAKES = [
    *({"step": 5}, {"script": None}, {"script": "missing"}, {"trials": 0}, {"steps": 0.5}, {"fixed": {"missing": 3}}),
    *({"name": "a/b"}, {"name": ".."}, {"name": "-x"}, {"seeds": "0"}, {"seeds": "many"}, {"pruner": "hyperband"}),
    *({"pruner": "asha", "grace": 1000}, {"reduction": 1}, {"fixed": {"learning_rate": 0.1}}, {"start": {"pause": 3}}),
    *({"ranges": {}}, {"ranges": {"learning-rat": RATE}}, {"ranges": {"env-id": RATE}}, {"ranges": {"pause": [1, 2]}}),
    *({"ranges": {"pause": {"low": "a", "high": 1}}}, {"ranges": {"pause": {"low": 2, "high": 1}}}),
    *({"ranges": {"pause": {"low": 1}}}, {"ranges": {"pause": {"low": 1, "hihg": 2}}}, {"ranges": {"pause": {}}}),
    *({"ranges": {"pause": RATE | {"low": 0}}}, {"ranges": {"pause": RATE | {"scale": "exp"}}}),
    *({"ranges": {"pause": SIZE | {"low": 3}}}, {"ranges": {"pause": {"scale": "log(1-x)", "low": 0.9, "high": 1.0}}}),
]


@pytest.mark.parametrize("changes", MISTAKES, ids=map(str, MISTAKES))
def test_a_mistake_in_a_space_is_one_line(changes, house):
    with pytest.raises(SuiteError) as error:
        spaces.load(house.space(**changes), {})
    assert "\n" not in str(error.value)


BAD = ["search ppoo", "search missing.toml", "search s.toml --total-timesteps 0", "search s.toml --jobs 0", "show none"]
BAD += ["search s.toml --storage nonsense", "narrow none", "validate none"]
BAD += ["search s.toml --env-id Bad-v1", "search bad.toml"]  # the script refuses an environment, or a sampled value


@pytest.mark.parametrize("words", BAD)
def test_bad_input_is_one_line_and_leaves_nothing(words, house, call):
    Path(house.space({"batch-size": {"low": 0.5, "high": 0.9}})).rename(house.path / "bad.toml")
    house.space()
    done = call(house, *words.split(), code=2)
    assert done.out == "" and done.err.startswith("error: ") and done.err.count("\n") == 1
    assert not (house.path / "studies").exists()


def test_the_storage_can_come_from_the_environment(house, call, monkeypatch):
    """A job on a rented machine has it there, so that no command shows the password."""
    monkeypatch.setenv("OPTUNA_STORAGE", "nonsense")
    house.space()
    assert call(house, "search", "s.toml", code=2).err.startswith("error: --storage: ")


def test_a_search_runs_its_trials_and_the_flags_arrive(house, call):
    """The first trial has the script's defaults; of the others every flag arrives as it was sampled."""
    house.space(RANGES, trials=12, fixed={"checkpoint-every": 50})
    dry = call(house, "search", "s.toml", "--dry-run").out.splitlines()
    assert not house.folder.exists() and len(dry) == 10
    done = call(house, "search", "s.toml", "--jobs", 2, "--threads", 3)
    trials = house.trials()
    assert (house.flags(0)["learning_rate"], house.flags(0)["batch_size"]) == (1e-3, 32)
    for x in trials[1:]:
        flags, rate = house.flags(x.number), float(f"{x.params['learning_rate']:.4g}")
        assert (flags["torch_threads"], flags["checkpoint_every"], flags["learning_rate"]) == (3, 50, rate)
        assert flags["batch_size"] == 2 ** x.params["log2(batch_size)"] and flags["norm_adv"] == x.params["norm_adv"]
        assert x.value == pytest.approx(100 - 30 * abs(math.log10(rate / 0.01)) + flags["norm_adv"] + 0.1)
    for number, line in enumerate(dry):  # it has printed what was run
        for name, value in runs.flags_of(shlex.split(line)[2:]).items():
            assert runs.canonical(house.flags(number)[name]) == runs.canonical(value)
    assert list(pd.read_csv(house.folder / "trials.csv")["value"]) == pytest.approx([x.value for x in trials])
    assert f"best: trial {max(trials, key=lambda x: x.value).number}," in done.out
    before = house.times()
    call(house)  # a finished search is left alone, and can be made longer
    assert house.times() == before
    with (house.folder / "study.journal").open("a") as file:
        file.write('{"op_code": 4, "worker')  # as a power cut leaves it
    call(house, "search", "s.toml", "--trials", 13)
    assert house.states() == [COMPLETE] * 13 and len(house.starts()) == 13


def test_another_search_is_not_mixed_with_this_one(house, call):
    house.space(trials=1)
    call(house)
    before = house.times()
    for change in ({"metric": "sps"}, {"steps": 2000}, {"ranges": RANGES}, {"seeds": "2"}, {"fixed": {"pause": 0.1}}):
        house.space(**change)
        error = call(house, code=2).err
        assert error.count("\n") == 1 and "grace" not in error and house.times() == before
    house.space(trials=2)
    house.script.write_text(FAKE.replace("100 - 30", "100 - 20"))
    assert "fake.py" in call(house, code=2).err and house.times() == before
    house.script.write_text(FAKE + "# nothing but a comment\n")
    call(house)
    assert len(house.trials()) == 2


def test_the_first_trial_is_run_as_it_is_wanted(house, call):
    """Also outside of the space, where Optuna does not see it; on any seeds, by any number in result.json."""
    house.space(RANGES | {"learning-rate": RATE | {"low": 2e-2}}, trials=2, metric="eval_return_mean")
    call(house, "search", "s.toml", "--seeds", "103,105")
    first, second = house.trials()
    assert first.params == {"log2(batch_size)": 5, "norm_adv": True} and len(second.params) == 3
    assert first.value == pytest.approx(102 - 30 + 0.4)


PRUNERS = [("asha", 100, 10, 100), ("median", 200, 10, 200), ("asha", 50, 100, 500)]


@pytest.mark.parametrize("pruner, grace, interval, least", PRUNERS)
def test_poor_trials_are_pruned(pruner, grace, interval, least, house, call):
    """Ten episodes end in each interval. The first trial is slow and nearly the worst, but never pruned."""
    ranges = {"learning-rate": RATE, "pause": {"low": interval / 2000, "high": interval / 1500}}
    start, fixed = {"learning-rate": 2e-4, "pause": interval / 400}, {"checkpoint-every": interval}
    house.space(ranges, trials=16, pruner=pruner, grace=grace, fixed=fixed, start=start)
    call(house, "search", "s.toml", "--jobs", 2)
    trials, spared = house.trials(), 4 if pruner == "median" else 1
    assert set(house.states()) == {COMPLETE, PRUNED} and house.states()[:spared] == [COMPLETE] * spared
    for x in (x for x in trials if x.state == PRUNED):
        assert x.value == x.intermediate_values[x.last_step] and x.last_step >= least
        assert not (house.run_folder(x.number) / "checkpoint.pt").exists()
    assert max(trials, key=lambda x: x.value).state == COMPLETE and house.is_quiet()


def test_seeds_are_averaged_and_jobs_are_never_exceeded(house):
    """The seeds of a trial follow each other; a milestone counts when the last of them has passed it."""
    house.space(trials=2, seeds="3", pruner="median", fixed={"pause": 0.02})
    process, most = house.start("search", "s.toml", "--jobs", 1), 0
    while process.poll() is None:
        most = max(most, sum(lives(pid) for _, pid in house.starts()))
        time.sleep(0.01)
    assert process.returncode == 0 and most == 1, process.communicate()
    for x in house.trials():
        tables = [runs.read_episodes(house.run_folder(x.number, seed)) for seed in (101, 102, 103)]
        for step in range(50, 1000, 50):
            means = [runs.trailing_means(y["step"], y["return"], np.array([step]))[0] for y in tables]
            assert x.intermediate_values[step] == pytest.approx(np.mean(means)) and len(set(means)) == 3
        assert x.value == pytest.approx(np.mean([y["return"].iloc[-1] for y in tables]))


def test_divergence_is_pruned_with_its_last_value(house, call):
    house.space({"learning-rate": RATE, "fail": {"choices": ["", "3"]}}, trials=8)
    call(house, "search", "s.toml", "--jobs", 2)
    diverged = [x for x in house.trials() if x.params["fail"] == "3"]
    assert diverged and {x.state for x in diverged} == {PRUNED} and house.states()[0] == COMPLETE
    assert all(x.last_step == 500 and x.value == x.intermediate_values[500] for x in diverged)


@pytest.mark.parametrize("why", [{"fixed": {"fail": "1"}}, {"metric": "missing"}], ids=str)
def test_three_failed_trials_in_a_row_stop_the_search(why, house, call):
    house.space(trials=9, **why)
    call(house, "search", "s.toml", "--jobs", 1, code=1)
    assert house.states() == [FAIL] * 3


def test_what_was_refused_is_resumed_when_the_search_is_started_again(house, call):
    """As with a full disk: exit code 2 in the middle."""
    pause = "        time.sleep(args.pause)\n"
    stop = "        if step == 500 and Path('full').exists():\n            sys.exit(2)\n"
    house.script.write_text(FAKE.replace(pause, stop + pause))
    house.space(trials=5)
    (house.path / "full").touch()
    call(house, "search", "s.toml", "--jobs", 1, code=1)
    assert house.states() == [RUNNING] * 3
    (house.path / "full").unlink()
    call(house, "search", "s.toml", "--jobs", 1)
    assert house.states() == [COMPLETE] * 5
    assert [step for step, _ in house.starts(house.run_folder(0))] == [0, 500]


def finished_once(house: House, trials: int) -> None:
    """All trials are complete, and were resumed where they were: nothing was moved aside or is in a table twice."""
    assert house.states() == [COMPLETE] * trials and house.is_quiet() and not list(house.folder.rglob("*.old-*"))
    for x in house.trials():
        steps = [step for step, _ in house.starts(house.run_folder(x.number))]
        assert steps == sorted(steps) and len(x.intermediate_values) == 20
        assert list(runs.read_episodes(house.run_folder(x.number))["step"]) == list(range(10, 1001, 10))


def kill_two_and_finish(house: House, times: int) -> None:
    """Two workers, killed in the middle so many times; then two more, which finish."""
    house.space(trials=8, fixed={"pause": 0.05})
    for _ in range(times):
        begun = len(house.starts())
        workers = [house.start("search", "s.toml", "--jobs", 2) for _ in range(2)]
        until(lambda begun=begun: len(house.starts()) >= begun + 4)
        time.sleep(0.2)
        for process in workers:
            process.kill()
        assert [process.wait() for process in workers] == [-signal.SIGKILL] * 2
        until(house.is_quiet)
    assert RUNNING in house.states(), "nothing was interrupted"
    for process in [house.start("search", "s.toml", "--jobs", 2) for _ in range(2)]:
        out, _ = process.communicate(timeout=120)
        assert process.returncode == 0, out
    finished_once(house, 8)


def test_two_killed_workers_lose_and_repeat_nothing(house):
    kill_two_and_finish(house, times=2)
    assert any(step for step, _ in house.starts())


@pytest.mark.slow
def test_a_worker_killed_at_any_moment_loses_nothing(house):
    house.space(trials=6, fixed={"pause": 0.02})
    for delay in np.random.default_rng(0).uniform(0.5, 3, 12):
        process = house.start("search", "s.toml", "--jobs", 2)
        time.sleep(delay)
        process.kill()
        process.wait()
        until(house.is_quiet)
    house.run()
    finished_once(house, 6)


def test_an_interrupt_leaves_trials_to_be_resumed(house):
    house.space(trials=2, fixed={"pause": 0.2})
    process = house.start("search", "s.toml", "--jobs", 2)
    until(lambda: len(list(house.folder.glob("trials/*/*/checkpoint.pt"))) == 2)
    process.send_signal(signal.SIGINT)
    assert "to resume: " in process.communicate(timeout=60)[0] and process.returncode == 130
    house.run("search", "s.toml", "--minutes", 0.01)
    assert house.states() == [RUNNING] * 2 and len(house.starts()) == 4 and house.is_quiet()
    house.run()
    finished_once(house, 2)


@pytest.fixture(scope="module")
def searched(tmp_path_factory) -> House:
    """A search of 16 trials in which the learning rate decides and nearly nothing else."""
    house = House(tmp_path_factory.mktemp("searched"))
    house.space(RANGES, trials=16)
    house.run("search", "s.toml", "--jobs", 4)
    return house


@pytest.fixture
def found(searched, tmp_path) -> House:
    shutil.copytree(searched.path, tmp_path, dirs_exist_ok=True)
    return House(tmp_path)


def test_show_reports_what_mattered_and_draws_it(found, call):
    done = call(found, "show", "s")
    words = next(line for line in done.out.splitlines() if line.startswith("importance: ")).split()
    assert words[1] == "learning_rate" and float(words[2].rstrip(",")) > 0.5
    assert "too small" not in done.out and "validate studies/s" in done.out
    assert len(list(found.folder.glob("*.png"))) == 3


def test_a_search_of_nothing_can_be_shown(house, call):
    house.space()
    call(house, "search", "s.toml", "--minutes", 0)
    assert call(house, "show", "s").out


def test_a_small_search_says_so_and_does_not_recommend_the_defaults(house, call):
    house.space(RANGES, trials=3, start={"learning-rate": 0.01})
    done = call(house)
    assert "too small to conclude" in done.out and "validate" not in done.out
    call(house, "narrow", "s", code=1)


def test_narrow_keeps_what_mattered_around_the_best(found, call):
    call(found, "narrow", "s")
    path = found.folder / "narrow.toml"
    best, space = max(found.trials(), key=lambda x: x.value), spaces.load(str(path), {})
    rate, size, switch = space.dimensions
    assert 1e-4 < rate.low <= space.start["learning_rate"] <= rate.high < 1e-1 and rate.scale == "log"
    assert space.start["learning_rate"] == pytest.approx(best.params["learning_rate"], rel=1e-3)
    assert len(size.choices) == len(switch.choices) == 1 and (space.pruner, space.seeds) == ("none", "201-203")
    call(found, "narrow", "s", code=2)  # the file may have been edited
    call(found, "search", path, "--jobs", 4)
    call(found, "validate", "s__narrow", "--seeds", "1001-1004")
    assert f"{rate.low} to {rate.high}\n" in path.read_text() and "fixed" not in path.read_text()
    arms = found.path.glob("studies/s__narrow/validation/*/seed-1001")
    rates = {folder.parent.name: runs.read_args(folder)["args"]["learning_rate"] for folder in arms}
    assert rates.pop("defaults") == 1e-3 and rate.low <= rates.popitem()[1] <= rate.high


def test_validate_compares_with_the_defaults_on_fresh_seeds(found, call):
    best, done = max(found.trials(), key=lambda x: x.value), call(found, "validate", "s", "--seeds", 4, "--jobs", 4)
    path = found.folder / f"validation-{best.number}.md"
    page, table = path.read_text(), pd.read_csv(path.with_suffix(".csv"))
    tuned = table[table["arm"] == f"trial-{best.number}"]
    assert len(table) == 8 and list(tuned["seed"]) == [1001, 1002, 1003, 1004]
    assert tuned["final_return"].mean() == pytest.approx(best.value - 0.1 + 0.25) and "**Better**" in done.out
    train, evaluate = (shlex.split(line) for line in page.splitlines() if line.startswith("    python "))
    flags, rate = runs.flags_of(train[2:]), float(f"{best.params['learning_rate']:.4g}")
    assert float(flags["learning_rate"]) == rate and flags["total_timesteps"] == "1000"
    assert runs.read_result(found.path / evaluate[-1])["eval_return_mean"] == tuned["eval_return_mean"].max()
    entry = tomllib.loads(page.split("```toml\n")[1].split("```")[0])["entry"][0]
    assert entry["flags"]["learning-rate"] == rate and entry["env"] == "Fake-v1"
    before = found.times()
    call(found, "validate", "s", "--seeds", 4)  # nothing is run again
    assert found.times() == before
    call(found, "validate", "s", "--seeds", "1001-1005")
    assert path.with_name(f"{path.name}.old-1").read_text() == page != path.read_text()


def test_a_changed_script_is_validated_anew(house, call):
    house.space(trials=1, start={"learning-rate": 0.01})
    call(house)
    for _ in range(2):
        call(house, "validate", "s", "--seeds", 4, "--jobs", 4)
        house.script.write_text(house.script.read_text() + "\nMORE = 1\n")
    assert len(list(house.folder.glob("validation/*/seed-*.old-1"))) == 8


@pytest.mark.parametrize(
    "defaults, tuned, word",
    [
        ([-10, -9, -8, -7], [-7.5, -6, -5, -4], "No difference found"),  # p = 0.057, but the interval excludes 0
        (range(10, 20), [*range(9), 1000], "Worse"),  # of a higher mean, by one lucky run
    ],
)
def test_the_verdict_is_that_of_the_test(defaults, tuned, word, found):
    rows = [("defaults", x) for x in defaults] + [("trial-7", x) for x in tuned]
    table = pd.DataFrame(rows, columns=["arm", "final_return"]).assign(seed=1001, folder="x", eval_return_mean=1.0)
    page = tuner.validate.report(spaces.load(str(found.path / "s.toml"), {}), found.trials()[0], table)
    assert f"**{word}**" in page and "disagree" in page


def test_validate_refuses_what_would_show_nothing(found, call):
    assert "seed 101" in call(found, "validate", "s", "--seeds", "98-102", code=2).err
    call(found, "validate", "s", "--trial", 99, code=2)
    call(found, "validate", "s", "--seeds", 3, code=2)
    assert "--trial" in call(found, "validate", "s", "--trial", 0, code=2).err
    assert not (found.folder / "validation").exists()


@pytest.fixture
def postgres():
    """A PostgreSQL server of our own on a socket in a folder: its address, and how to stop and start it."""
    pytest.importorskip("psycopg", reason="psycopg is not installed: pip install -e '.[postgres]'")
    programs = list(filter(None, [shutil.which("initdb"), *Path("/usr/lib/postgresql").glob("*/bin/initdb")]))
    if not programs:
        pytest.skip("no PostgreSQL server is installed: apt-get install postgresql")
    base, as_user = Path(tempfile.mkdtemp()), []  # not tmp_path: a socket's path has at most 107 letters
    if os.getuid() == 0:  # the server refuses to run as root
        shutil.chown(base, "nobody")
        as_user = ["setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups"]

    def pg(program: str, *words) -> None:
        command = [*as_user, Path(programs[0]).resolve().parent / program, "-D", base / "data", *words]
        null = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}  # the server would keep a pipe open
        subprocess.run(command, cwd=base, timeout=60, check=True, **null)

    options = f"-k {base} -c listen_addresses='' -c fsync=off"
    start = partial(pg, "pg_ctl", "-l", base / "log", "-o", options, "-w", "start")
    stop = partial(pg, "pg_ctl", "-m", "immediate", "-w", "stop")
    try:
        pg("initdb", "-U", "folio", "-A", "trust", "--no-sync")
        start()
        yield SimpleNamespace(url=f"postgresql://folio@/postgres?host={base}", start=start, stop=stop)
    finally:
        if (base / "data" / "postmaster.pid").exists():
            stop()
        shutil.rmtree(base)


@pytest.mark.slow
def test_workers_share_a_database_and_survive_its_stop(tmp_path, postgres):
    house = House(tmp_path, postgres.url)
    kill_two_and_finish(house, times=1)
    assert not (house.folder / "study.journal").exists()
    process, begun = house.start("search", "s.toml", "--trials", 12, "--jobs", 2), len(house.starts())
    until(lambda: len(house.starts()) >= begun + 2)
    postgres.stop()
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 1 and "Traceback" not in out and house.is_quiet()
    postgres.start()
    house.run("search", "s.toml", "--trials", 12, "--jobs", 2)
    finished_once(house, 12)


@pytest.mark.slow
def test_a_worker_takes_the_trials_of_another_machine(tmp_path, postgres):
    """Machines are folders here: they share the database and nothing else, so these trials begin again."""
    (tmp_path / "other").mkdir()
    one, other = House(tmp_path, postgres.url), House(tmp_path / "other", postgres.url)
    for house in (one, other):
        house.space(trials=8, fixed={"pause": 0.05})
    workers = [house.start("search", "s.toml", "--jobs", 2) for house in (one, other)]
    until(lambda: len(one.starts()) >= 2 and len(other.starts()) >= 2)
    workers[0].kill()
    out, _ = workers[1].communicate(timeout=120)
    assert workers[0].wait() == -signal.SIGKILL and workers[1].returncode == 0, out
    assert one.states() == [COMPLETE] * 8
    results = [len(list(house.folder.glob("trials/*/*/result.json"))) for house in (one, other)]
    assert results[0] <= 6 and sum(results) == 8  # nothing was run twice to the end
