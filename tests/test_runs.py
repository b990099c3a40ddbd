"""The run folder and suites: what is the same run, what is read, and what is refused."""

import importlib
import os
import subprocess
import sys

import numpy as np
import pytest
from tools import ROOT, fake_script, finish

from benchmark import runs, suites
from benchmark.runs import Spec

FLAGS = {"env_id": "Fake-v1", "total_timesteps": 1000, "seed": 1}


@pytest.fixture
def spec(tmp_path):
    return Spec(fake_script(tmp_path), FLAGS, tmp_path / "run")


def test_words_and_flags_are_inverse():
    flags = FLAGS | {"learning_rate": 1e-4, "norm_adv": False, "compile": True}
    flags |= {"env_kwargs": {"gravity": -5.0, "x": "y"}}
    words = runs.words_of(flags)
    assert words[6:] == "--learning-rate 0.0001 --no-norm-adv --compile --env-kwargs gravity -5.0 x y".split()
    back = runs.flags_of(words)
    assert back.keys() == flags.keys()
    assert all(runs.canonical(back[name]) == runs.canonical(value) for name, value in flags.items())
    assert runs.flags_of(["--seed=3", "--no-norm-adv"]) == {"seed": "3", "norm_adv": False}


@pytest.mark.parametrize("path", sorted((ROOT / "algos").glob("*.py")), ids=lambda path: path.stem)
def test_defaults_are_those_of_the_script(path):
    """Read from the text, without importing it."""
    real = vars(importlib.import_module(f"algos.{path.stem}").Args())
    found = runs.defaults(path.read_text())
    assert list(found) == list(real)
    assert {name: value for name, value in found.items() if value is not ... and value != real[name]} == {}
    assert sum(value is ... for value in found.values()) <= 2


def test_code_hash_sees_the_algorithm_alone():
    source = (ROOT / "algos" / "ppo.py").read_text()
    same = source.replace('"""', '"""Other words. ', 1).replace("\n\n\n", "\n\n\n# a comment\n", 1)
    own, banner, machinery = same.partition(runs.BANNER)
    assert banner and runs.code_hash(own + banner + machinery.replace("fail(", "give_up(")) == runs.code_hash(source)
    changed = source.replace("0.5 *", "0.25 *", 1)
    assert changed != source and runs.code_hash(changed) != runs.code_hash(source)


def test_code_hash_is_the_same_in_every_python():
    source = "@dataclass\nclass A:\n    x: int = 1\n\n"
    source += 'def f(x, *, y=()):\n    "Text."\n    return f"{x!r:>3} of {y}", [*x], {}\n'
    assert runs.code_hash(source) == "07fafc170e5e016d"


def test_a_run_is_the_same_whatever_does_not_change_its_results(spec):
    finish(spec)
    same = FLAGS | {"torch_threads": 4, "device": "cuda", "learning_rate": 0.001, "env_kwargs": {}}
    assert runs.difference(spec.folder, Spec(spec.script, same, spec.folder)) == ""
    text = {name: str(value) for name, value in FLAGS.items()}  # as words on a command line have them
    assert runs.difference(spec.folder, Spec(spec.script, text, spec.folder)) == ""
    spec.script.write_text("# a comment\n" + spec.script.read_text())
    assert runs.difference(spec.folder, spec) == ""


@pytest.mark.parametrize(
    "change", [{"seed": 2}, {"learning_rate": 0.1}, {"norm_adv": False}, {"env_kwargs": {"g": 1.0}}]
)
def test_a_run_with_other_flags_is_another_one(spec, change):
    finish(spec)
    other = Spec(spec.script, FLAGS | change, spec.folder)
    assert next(iter(change)).replace("_", "-") in runs.difference(spec.folder, other)
    moved = Spec(spec.script, other.flags, spec.folder.with_name("other"))
    finish(moved)  # and the other way around: a flag that was given and is a default now
    assert runs.difference(moved.folder, spec)


def test_a_run_of_another_algorithm_is_another_one(spec):
    finish(spec)
    spec.script.write_text(spec.script.read_text().replace("100 -", "90 -"))
    assert runs.difference(spec.folder, spec)


@pytest.mark.parametrize("damage", [lambda x: (x / "args.json").write_text("[]"), lambda x: (x / "fake.py").unlink()])
def test_a_damaged_folder_is_another_run(spec, damage):
    damage(finish(spec))
    assert runs.difference(spec.folder, spec)


@pytest.mark.parametrize(
    "text", ["", "step,seconds,return,length\n", "step,seconds,return,length\n10,1.5,2.0,10\n20,1"]
)
def test_episodes_are_whole_rows(tmp_path, text):
    (tmp_path / "episodes.csv").write_text(text)
    rows = 1 if "10" in text else 0
    assert runs.read_episodes(tmp_path)["step"].tolist() == [10] * rows
    assert runs.progress(tmp_path) == ((10, 1.5, 2.0) if rows else (0, 0.0, None))


def test_progress_reads_the_end(tmp_path):
    text = "step,seconds,return,length\n" + "".join(f"{i},{i / 10},{i},1\n" for i in range(5000))
    (tmp_path / "episodes.csv").write_text(text + "5000,5")
    assert runs.progress(tmp_path) == (4999, 499.9, 4949.5)
    assert len(runs.read_episodes(tmp_path)) == 5000


def test_trailing_means_equal_their_definition():
    rng = np.random.default_rng(1)
    steps, returns = np.cumsum(rng.integers(1, 20, size=300)), rng.normal(size=300)
    at = np.arange(0, 4000, 37)
    found = runs.trailing_means(steps, returns, at, window=50)
    for step, value in zip(at, found, strict=True):
        ended = returns[steps <= step][-50:]
        assert np.isnan(value) if len(ended) == 0 else value == pytest.approx(ended.mean())


def test_a_lock_is_held_once_and_dies_with_its_process(tmp_path):
    path = tmp_path / "folder" / "x.lock"
    first = runs.take_lock(path)
    assert first is not None and runs.take_lock(path) is None
    path.unlink()
    second = runs.take_lock(path)  # another file now
    assert second is not None
    os.close(first)
    os.close(second)
    code = "import sys, time; from pathlib import Path; from benchmark import runs; "
    code += "print(runs.take_lock(Path(sys.argv[1])), flush=True); time.sleep(60)"
    holder = subprocess.Popen([sys.executable, "-c", code, path], stdout=subprocess.PIPE, cwd=ROOT)
    holder.stdout.readline()
    assert runs.take_lock(path) is None
    holder.kill()
    holder.wait()
    assert runs.take_lock(path) is not None


# ------------------------------------------------------------------------------------------------------------- suites

SUITE = """
title = "Toys"
seeds = 3
[[entry]]
script = "fake.py"
env = "Fake-v1"
steps = 1000
[[entry]]
script = "fake.py"
env = "ALE/Fake-v5"
steps = 2000
seeds = 2
target = 3
flags = { learning-rate = 0.01, norm-adv = false }
"""


@pytest.mark.parametrize("name", suites.suite_names())
def test_shipped_suites_are_right(name):
    suite = suites.load(name)
    assert suite.title and suite.entries
    assert all(entry.why for entry in suite.entries)
    aimed = {entry.env for entry in suite.entries if entry.target is not None}
    assert aimed == {entry.env for entry in suite.entries}  # others, for comparison, need none


def test_a_suite_is_read(tmp_path):
    (tmp_path / "toys.toml").write_text(SUITE)
    script = fake_script(tmp_path)
    suite = suites.load(tmp_path / "toys.toml")
    first, second = suite.entries
    assert (suite.name, suite.title) == ("toys", "Toys")
    assert (first.script, first.seeds, first.target) == (script, 3, None)
    assert (second.name, second.seeds, second.target) == ("ALE-Fake-v5__fake", 2, 3)
    spec = second.spec("toys", 4, tmp_path / "runs")
    assert spec.folder == tmp_path / "runs" / "toys" / "ALE-Fake-v5__fake__4"
    assert runs.flags_of(spec.words)["learning_rate"] == "0.01" and spec.flags["norm_adv"] is False
    for pattern, fits in {"fake": [1, 1], "ALE/*": [0, 1], "Fake-v1__fake": [1, 0], "Fake": [0, 0]}.items():
        assert [entry.fits((pattern,)) for entry in suite.entries] == fits


def test_an_environment_may_be_a_pattern(tmp_path):
    fake_script(tmp_path), fake_script(tmp_path, "other")
    more = '[[entry]]\nscript = "other.py"\nenv = "ALE/*"\nsteps = 5\n'
    third = more.replace("other", fake_script(tmp_path, "third").stem)
    (tmp_path / "toys.toml").write_text(SUITE + more.replace("other", "fake").replace("/*", "/Gone-v5") + more + third)
    found = [(entry.script.stem, entry.env, entry.steps) for entry in suites.load(tmp_path / "toys.toml").entries]
    added = [(script, f"ALE/{name}-v5", 5) for script in ("other", "third") for name in ("Fake", "Gone")]
    assert found[2:] == [("fake", "ALE/Gone-v5", 5), *added]


@pytest.mark.parametrize(
    "old, new, named",
    [
        ("steps = 2000", "", "steps"),
        ('"ALE/Fake-v5"', '"Fake-v2*"', "pattern"),
        ("steps = 2000", "steps = 0", "steps"),
        ("seeds = 2", 'seeds = "two"', "seeds"),
        ("target = 3", "targett = 3", "targett"),
        ("learning-rate", "learning-rat", "learning-rate"),
        ("learning-rate", "total-timesteps", "total-timesteps"),
        ('env = "ALE/Fake-v5"', 'env = "Fake-v1"', "entry 2"),
        ('"fake.py"\nenv = "ALE', '"gone.py"\nenv = "ALE', "gone.py"),
        ("[[entry]]", "[[entri]]", "entr"),
        ("title =", "title", "toys.toml"),
        (SUITE, 'entry = ["ppo"]', "entry"),
    ],
)
def test_a_mistake_is_one_line(tmp_path, old, new, named):
    fake_script(tmp_path)
    assert SUITE.count(old)
    (tmp_path / "toys.toml").write_text(SUITE.replace(old, new))
    with pytest.raises(suites.SuiteError, match=named) as caught:
        suites.load(tmp_path / "toys.toml")
    assert "\n" not in str(caught.value)
