"""From run folders to the page (benchmark/collect.py, report.py, plots.py), and two sides compared (compare.py)."""

import csv
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import numpy as np
import pytest
from conftest import ROOT, TIMEOUT

from benchmark import collect, compare, plots, repeat, report, stats, suites

SUITE = """
title = "Toys"
protocol = "Trained, then scored."
seeds = 5

[[entry]]
script = "ppo"
env = "CartPole-v1"
steps = 100_000
target = 400
why = "it is there"
flags = { learning-rate = 1e-3, clip-vloss = true }

[[entry]]
script = "ppo"
env = "Acrobot-v1"
steps = 10_000
seeds = 3
target = -90.5
why = "it is there"

[[entry]]
script = "dqn"
env = "CartPole-v1"
steps = 100_000
target = 475
why = "it is there"
"""
FLAGS = "--clip-vloss --learning-rate 0.001"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def house(tmp_path) -> SimpleNamespace:
    """A suite, empty runs and results, and the words that make report.py use them."""
    (tmp_path / "suites").mkdir()
    (tmp_path / "suites" / "toys.toml").write_text(SUITE)
    folders = {name: tmp_path / name for name in ("runs", "results", "suites", "docs")}
    words = [word for name, folder in folders.items() for word in (f"--{name}-dir", str(folder))]
    suite = suites.load(tmp_path / "suites" / "toys.toml")
    return SimpleNamespace(base=tmp_path, words=words, suite=suite, **folders)


@pytest.fixture
def call(monkeypatch, capfd):
    """call(module, *words) -> code, out, err: its main() in this process."""

    def call(module, *words) -> SimpleNamespace:
        monkeypatch.setattr(sys, "argv", [f"benchmark/{module.__name__}.py", *map(str, words)])
        capfd.readouterr()
        code = 0
        try:
            module.main()
        except SystemExit as end:
            code = end.code
        return SimpleNamespace(code=code, **capfd.readouterr()._asdict())

    return call


def make_run(house, entry: int = 0, seed: int = 1, final: float = 450.0, **changes) -> Path:
    """A finished run folder: episodes of 100 steps, with return 0 in the first half and `final` in the second."""
    entry = house.suite.entries[entry]
    folder = house.runs / "toys" / f"{entry.name}__{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    own = {"env_id": entry.env, "seed": seed, "total_timesteps": entry.steps}
    described = {
        "args": own | entry.flags | changes.pop("args", {}),
        "command": [f"algos/{entry.script}.py", "--seed", str(seed)],
        "commit": COMMIT,
        "versions": {"torch": "2.13.0"},
        "cpu": "Some CPU",
        "threads": 1,
        "gpu": None,
        "started": f"Thu Jan  1 00:00:0{seed} 2026",
    }
    shutil.copy(ROOT / "algos" / f"{entry.script}.py", folder)
    result = {
        "final_return": final,
        "eval_return_mean": final + 1,
        "eval_return_std": 2.5,
        "eval_episodes": 20,
        "steps": entry.steps + 352,
        "seconds": 90.0,
        "sps": 1234.5,
        "peak_memory_mb": 321.0,
    }
    (folder / "args.json").write_text(json.dumps(described | changes))
    (folder / "result.json").write_text(json.dumps(result))
    steps = range(100, entry.steps + 1, 100)
    lines = [f"{step},{step / 1000},{0.0 if step <= entry.steps / 2 else final},100" for step in steps]
    (folder / "episodes.csv").write_text("\n".join(["step,seconds,return,length", *lines, ""]))
    return folder


def rows(house) -> list[dict[str, str]]:
    return collect.read_rows(house.results, "toys")


def page(house) -> str:
    return (house.docs / "BENCHMARKS.md").read_text()


# ---------------------------------------------------------------------------------------------------------- code hash

CODE = '''"""A manual."""
import os


class Args:
    """What it takes."""

    x: int = 1
    """its help"""


def f(x, *, y=(), z=f"{os.sep}!"):
    """Says what it does."""
    # a comment
    return [x, y, z, None, "text", ()]
'''


@pytest.mark.parametrize(
    "old, new",
    [("A manual.", "Another."), ("its help", "help"), ("# a comment", ""), ("Says", "Does"), ("[x, y", "[x,    y")],
)
def test_code_hash_does_not_see_texts(old, new):
    assert suites.code_hash(CODE.replace(old, new)) == suites.code_hash(CODE) and old in CODE


@pytest.mark.parametrize("old, new", [("= 1", "= 2"), ("None", "0"), ('"text"', '"Text"'), ("f(x", "g(x"), ("!", "?")])
def test_code_hash_sees_code(old, new):
    assert suites.code_hash(CODE.replace(old, new)) != suites.code_hash(CODE) and old in CODE


FAILING = """
def check(x):
    if x > 1:
        fail(f"{x} is too much", code=3)
    print("x is 1", file=sys.stderr)
"""


@pytest.mark.parametrize("old, new", [("too much", "more than 1"), (", code=3", "")])
def test_code_hash_does_not_see_why_a_run_failed(old, new):
    """A run that ended so has no result that could have been another."""
    assert suites.code_hash(FAILING.replace(old, new)) == suites.code_hash(FAILING) and old in FAILING


@pytest.mark.parametrize("old, new", [("x > 1", "x > 2"), ("fail(", "print("), ("is 1", "is 2")])
def test_code_hash_sees_when_a_run_fails(old, new):
    assert suites.code_hash(FAILING.replace(old, new)) != suites.code_hash(FAILING) and old in FAILING


def test_code_hash_is_the_same_in_every_python():
    """A changed value here means that every row of the results would be called changed."""
    assert suites.code_hash(CODE) == "6549e4a2e03feecf"


# ----------------------------------------------------------------------------------------------------------- collecting


def test_a_run_becomes_a_row(house, call):
    make_run(house, seed=2, final=450.0)
    done = call(report, *house.words)
    assert done.code == 0 and done.err == ""
    (row,) = rows(house)
    assert list(row) == collect.COLUMNS
    given = {name: row[name] for name in ("env", "script", "seed", "steps", "final_return", "eval_mean", "minutes")}
    assert list(given.values()) == ["CartPole-v1", "ppo", "2", "100000", "450.0", "451.0", "1.5"]
    assert (row["threads"], row["cpu"], row["gpu"], row["clean"], row["torch"]) == (
        "1",
        "Some CPU",
        "",
        "yes",
        "2.13.0",
    )
    assert (row["flags"], row["commit"], row["cores"]) == (FLAGS, COMMIT, "")
    assert row["sha256"] == hashlib.sha256((ROOT / "algos" / "ppo.py").read_bytes()).hexdigest()
    assert row["code"] == suites.code_hash((ROOT / "algos" / "ppo.py").read_text())
    # 200 checkpoints, 500 steps or 5 episodes apart. Returns of 450 begin after checkpoint 100, so the 101st has a
    # trailing mean of 5 / 100 * 450, and from the 120th on it is 450.
    means = np.minimum(np.arange(1, 101) * 5, 100) / 100 * 450
    assert float(row["slm_score"]) == pytest.approx(means.mean(), rel=1e-5)
    random = collect.reference_scores("random", "SLM-Lab")["CartPole-v1"]
    strengths = np.concatenate([np.zeros(100), means]) - random
    assert float(row["strength"]) == pytest.approx(strengths.mean(), rel=1e-4)
    at = np.arange(1, 201) * 500
    assert float(row["efficiency"]) == pytest.approx((strengths / at).sum() / strengths.sum(), rel=1e-4)
    assert float(row["stability"]) == 1


def test_a_run_becomes_a_curve(house, call):
    make_run(house, seed=10)
    make_run(house, seed=9, final=300.0)
    call(report, *house.words)
    with (house.results / "curves" / "toys" / "CartPole-v1__ppo.csv").open() as file:
        curve = list(csv.DictReader(file))
    assert list(curve[0]) == ["step", "9", "10"] and [int(row["step"]) for row in curve] == list(
        range(1000, 100_001, 1000)
    )
    assert [float(row["10"]) for row in curve[:50]] == [0] * 50
    assert [float(row["10"]) for row in curve[50:61]] == pytest.approx([45.0 * i for i in range(1, 11)] + [450])


def test_before_the_first_episode_a_curve_is_empty(house, call):
    folder = make_run(house, entry=1)
    (folder / "episodes.csv").write_text("step,seconds,return,length\n250,1,-80.0,250\n10400,9,-70.0,300\n")
    call(report, *house.words)
    curve = collect.read_curves(house.results, "toys", house.suite.entries[1])["1"]
    assert curve == ["", ""] + ["-80"] * 98  # an episode after the budget does not count


def test_results_are_sorted_and_kept(house, call):
    folders = [make_run(house, entry=entry, seed=seed) for entry, seed in ((2, 1), (0, 10), (0, 2), (1, 1))]
    call(report, *house.words)
    keys = [(row["env"], row["script"], row["seed"]) for row in rows(house)]
    assert keys == [
        ("Acrobot-v1", "ppo", "1"),
        *(("CartPole-v1", s, n) for s, n in (("dqn", "1"), ("ppo", "2"), ("ppo", "10"))),
    ]
    before = rows(house)
    shutil.rmtree(folders[1])
    shutil.rmtree(folders[3])
    make_run(house, entry=0, seed=2, final=123.0)
    call(report, *house.words)
    after = rows(house)
    assert [row["final_return"] for row in after] == ["450.0", "450.0", "123.0", "450.0"]
    assert [row for row in after if row["final_return"] != "123.0"] == [before[0], before[1], before[3]]
    curves = collect.read_curves(house.results, "toys", house.suite.entries[0])
    assert curves["2"][-1] == "123" and curves["10"][-1] == "450"


def test_what_is_not_a_finished_run_is_not_collected(house, call):
    (make_run(house, seed=1) / "result.json").unlink()
    make_run(house, seed=2).rename(house.runs / "toys" / "CartPole-v1__ppo__2.old-1")
    (house.runs / "toys" / "CartPole-v1__ppo__3.log").write_text("a log")
    make_run(house, seed=4).rename(house.runs / "toys" / "CartPole-v1__ppo_other__4")
    done = call(report, *house.words)
    assert (done.code, done.err, rows(house)) == (0, "", [])


def test_runs_with_other_flags_are_named_and_left_out(house, call):
    make_run(house, seed=1, args={"learning_rate": 0.002})
    make_run(house, seed=2, args={"total_timesteps": 50_000})
    make_run(house, seed=3)
    done = call(report, *house.words)
    assert [row["seed"] for row in rows(house)] == ["3"]
    assert done.code == 0 and len(done.err.splitlines()) == 2
    assert "learning-rate" in done.err and "total-timesteps" in done.err and done.err.startswith("left out: ")


@pytest.mark.parametrize(
    "file, content",
    [
        ("args.json", "{"),
        ("result.json", "{}"),
        ("result.json", "nothing"),
        ("episodes.csv", "step,seconds,return,length\n1,2,x,3\n"),
        ("episodes.csv", None),
    ],
)
def test_damaged_runs_are_named_and_left_out(house, call, file, content):
    make_run(house, seed=1)
    path = make_run(house, seed=2) / file
    path.unlink() if content is None else path.write_text(content)
    done = call(report, *house.words)
    assert done.code == 0 and [row["seed"] for row in rows(house)] == ["1"]
    assert done.err.startswith("left out: ") and done.err.count("\n") == 1 and "CartPole-v1__ppo__2" in done.err


def test_a_run_without_a_finished_episode_is_left_out(house, call):
    path = make_run(house) / "result.json"
    path.write_text(path.read_text().replace('"final_return": 450.0', '"final_return": null'))
    assert "no training episode ended" in call(report, *house.words).err and rows(house) == []


def test_runs_of_another_version_are_taken_and_marked(house, call):
    for seed in (1, 2, 3):
        folder = make_run(house, seed=seed)
    (folder / "ppo.py").write_text("another = 1\n")
    call(report, *house.words)
    now, another = suites.code_hash((ROOT / "algos" / "ppo.py").read_text()), suites.code_hash("another = 1")
    assert [row["code"] for row in rows(house)] == [now, now, another]
    assert "| script changed since (1 of 3 runs) |" in page(house)


def test_smoke_is_not_published(house, call):
    (house.suites / "smoke.toml").write_text((house.suites / "toys.toml").read_text().replace("Toys", "Smoke"))
    assert call(report, *house.words).code == 0 and "Smoke" not in page(house) and "Toys" in page(house)


# ------------------------------------------------------------------------------------------------------------- the page


def test_the_page_without_runs(house, call):
    assert call(report, *house.words).code == 0
    assert "No runs yet:\n\n- `ppo`, `dqn` on CartPole-v1\n- `ppo` on Acrobot-v1\n" in page(house)
    assert "| [Toys](#toys) | 0 of 3 | 0 of 13 | – | – | – | – |" in page(house)
    assert not list((house.docs).glob("plots/*")) and not house.results.exists()
    (house.suites / "toys.toml").unlink()
    assert call(report, *house.words).code == 0 and "No suites yet." in page(house)


def test_the_page(house, call):
    for seed, final in ((1, 390.0), (2, 400.0), (3, 440.0)):
        make_run(house, entry=0, seed=seed, final=final, commit=COMMIT + "-dirty" * (seed == 2))
        make_run(house, entry=1, seed=seed, final=-final / 4, gpu="Some GPU")
    call(report, *house.words)
    lines = page(house).splitlines()
    (cartpole,) = (line for line in lines if line.startswith("| [`ppo`]") and "100 000" in line)
    (acrobot,) = (
        line for line in lines if line.startswith("| [`ppo`]") and "10 000 " in line and "100 000" not in line
    )
    (missing,) = (line for line in lines if line.startswith("| [`dqn`]"))
    cells = [cell.strip() for cell in cartpole.split("|")[1:-1]]
    low, high = (f"{x:.1f}" for x in stats.mean_interval(np.array([390.0, 400, 440])))
    assert cells[1:8] == [
        "100 000",
        "3 of 5",
        f"**410.0** [{low}, {high}]",
        "400.0",
        "390.0 … 440.0",
        f"411.0 [{float(low) + 1:.1f}, {float(high) + 1:.1f}]",
        "400 met",
    ]
    assert cells[8:] == ["1.50", "1 234", "Some CPU, 1 thread", "`0123456`", "uncommitted changes (1 of 3 runs)"]
    assert "| −90.5 **not met** |" in acrobot and "| 3 |" in acrobot and "Some GPU and Some CPU" in acrobot
    assert "no runs yet" in missing and "0 of 5" in missing
    assert f"python algos/ppo.py --env-id CartPole-v1 --total-timesteps 100000 {FLAGS} --seed 1  # it is there" in lines
    assert "| [Toys](#toys) | 2 of 3 | 6 of 13 | 1 of 2 |" in page(house)


def test_published_scores_stand_beside_the_nearest_measure(house, call):
    make_run(house, entry=0, seed=1, final=495.0)
    call(report, *house.words)
    slm = rows(house)[0]["slm_score"]
    lines = [line for line in page(house).splitlines() if line.startswith("| `ppo` |")]
    table = {cells[5].strip(): [cell.strip() for cell in cells] for cells in (line.split("|") for line in lines)}
    assert table["SLM-Lab"][3:5] == [f"{float(slm):.1f}", "498.94"] and table["SLM-Lab"][6] == "**below**"
    assert table["CleanRL"][3:5] == ["495.0", "490.04 ± 6.12 over runs"] and table["CleanRL"][6] == "at or above"
    assert table["rl-zoo3"][3:5] == ["496.0", "500 ± 0.00 over episodes"] and table["rl-zoo3"][6] == "**below**"
    assert table["SLM-Lab"][7].startswith("200 000 steps; 4 runs") and "500 000 steps; 3 runs" in table["CleanRL"][7]
    assert table["rl-zoo3"][7].startswith("one run")  # 100 000 steps, as ours


def test_of_several_budgets_the_nearest_is_shown(house):
    entry = suites.Entry("ppo_continuous", "HalfCheetah-v5", 1_000_000, 5, 0.0, "", {})
    cell = report.Cell(entry, [{"final_return": "1", "slm_score": "1", "eval_mean": "1"}], {})
    steps = {p.row["source"]: p.row["steps"] for p in report.peers(cell, collect.read_reference())}
    assert steps["CleanRL"] == "1000000" and steps["SLM-Lab"] == "10000000"
    cell.entry = suites.Entry("ppo_continuous", "HalfCheetah-v5", 6_000_000, 5, 0.0, "", {})
    (peer,) = (p for p in report.peers(cell, collect.read_reference()) if p.row["source"] == "CleanRL")
    assert peer.row["steps"] == "8000000" and peer.differences.startswith("HalfCheetah-v4; 8 000 000 steps; 10 runs")


def test_below_but_within_our_interval(house, call):
    for seed, final in ((1, 480.0), (2, 495.0), (3, 470.0)):
        make_run(house, seed=seed, final=final)
    call(report, *house.words)
    (line,) = (line for line in page(house).splitlines() if "| CleanRL |" in line and line.startswith("| `ppo`"))
    assert "| **below**, within our interval |" in line


def test_what_falls_short_is_listed_with_what_was_tried(house, call):
    make_run(house, entry=0, final=350.0)
    make_run(house, entry=1, final=-70.0)
    call(report, *house.words)
    (line,) = (line for line in page(house).splitlines() if line.startswith("- `ppo`"))
    assert line.startswith("- `ppo` on CartPole-v1, 100 000 steps: 350.0 against the target 400; ")
    assert "SLM-Lab's 498.94 after 200 000 steps" in line and line.endswith("Tried: nothing is written down yet.")
    of = report.read_table(house.suite, house.results)
    of.cells[0].entry = SimpleNamespace(**vars(of.cells[0].entry) | {"tried": "Everything.", "words": []})
    assert report.falls_short(of, [])[2].endswith("350.0 against the target 400. Tried: Everything.")


def test_rows_of_other_flags_are_counted_and_not_shown(house, call):
    make_run(house, seed=1)
    make_run(house, seed=2)
    make_run(house, entry=2, seed=1)
    call(report, *house.words)
    text = (house.suites / "toys.toml").read_text().replace("1e-3", "2e-3")
    (house.suites / "toys.toml").write_text(text[: text.rindex("[[entry]]")])
    done = call(report, "--no-collect", *house.words)
    assert done.code == 0 and "Not shown: 3 runs" in page(house) and "No runs yet:" in page(house)


def test_numbers_of_the_page():
    values = [500, 1234.4, 999.4, 999.6, 12.34, 9.996, 1.005, -0.001, 0, -81.25, float("nan"), 1e6]
    shown = ["500.0", "1234", "999.4", "1000", "12.3", "10.0", "1.00", "0.00", "0.00", "−81.2", "–", "1000000"]
    assert list(map(report.form, values)) == shown
    assert [report.exact(x) for x in (498.94, 475.0, -100.0, 6240.684, 0.0)] == [
        "498.94",
        "475",
        "−100",
        "6240.68",
        "0",
    ]
    assert report.form(12.25 + 4e-15) == report.form(
        12.25 - 4e-15
    )  # what adds up differently does not round differently


def test_scores_are_on_one_scale(house, call):
    make_run(house, entry=0, seed=1, final=475.0)
    make_run(house, entry=2, seed=1, final=475.0)
    call(report, *house.words)
    of = report.read_table(house.suite, house.results)
    random = collect.reference_scores("random", "SLM-Lab")
    assert of.scales["CartPole-v1"] == (random["CartPole-v1"], 475.0)  # the highest target, so that the scale is one
    scores = of.normalised()
    assert scores["ppo"]["CartPole-v1"] == scores["dqn"]["CartPole-v1"] == pytest.approx([1.0])
    assert "| `dqn` | 1 of 1 | 1 | **1.00** | 0.50 | CartPole-v1 |" in page(house)


def test_runs_of_other_lengths_are_not_ranked(house, call):
    path = house.suites / "toys.toml"
    head, dqn = path.read_text().split('script = "dqn"')
    assert dqn.count("steps =") == 1
    path.write_text(head + 'script = "dqn"' + re.sub(r"steps = \w+", "steps = 2000", dqn))
    house.suite = suites.load(path)
    make_run(house, entry=0, seed=1)
    make_run(house, entry=2, seed=1)
    call(report, *house.words)
    assert "| `dqn` | 1 of 1 | 1 |" in page(house) and "| – | – |" in page(house)
    assert "0.50 | CartPole-v1 |" not in page(house)


def test_a_target_that_a_random_policy_reaches_gives_no_scale(house):
    (house.suites / "toys.toml").write_text(SUITE.replace("475", "22.97").replace("400", "22.97"))
    of = report.read_table(suites.load(house.suites / "toys.toml"), house.results)
    assert "CartPole-v1" not in of.scales and "Acrobot-v1" in of.scales


def test_atari_is_normalised_by_human_scores(house):
    path = house.suites / "games.toml"
    entry = '[[entry]]\nscript = "ppo_atari"\nenv = "ALE/{}-v5"\nsteps = 1000\ntarget = 1000\nwhy = "it is there"\n'
    head = 'title = "Games"\nprotocol = "Played."\nseeds = 1\n'
    path.write_text(head + entry.format("Pong") + entry.format("AirRaid"))
    of = report.read_table(suites.load(path), house.results)
    assert of.is_atari and of.scales["ALE/Pong-v5"] == (-20.7, 14.6) and "ALE/AirRaid-v5" not in of.scales
    of.cells[0].rows = [{"final_return": "14.6"}]
    assert of.normalised()["ppo"]["ALE/Pong-v5"] == pytest.approx([1.0])


# ----------------------------------------------------------------------------------------------- the same bytes, always


def fill(house) -> None:
    rng = np.random.default_rng(0)
    for entry, level in ((0, 400), (1, -90), (2, 300)):
        for seed in (1, 2, 3):
            make_run(house, entry=entry, seed=seed, final=float(level + rng.normal() * 20))


def generated(house) -> dict[str, bytes]:
    return {str(path.relative_to(house.docs)): path.read_bytes() for path in house.docs.rglob("*") if path.is_file()}


def test_page_and_plots_are_the_same_bytes_every_time(house, call):
    """In another process, with another order of sets, another matplotlibrc and another day."""
    fill(house)
    call(report, *house.words)
    first = generated(house)
    names = {f"plots/toys-{what}.svg" for what in ("CartPole-v1", "Acrobot-v1", "iqm", "profile")}
    assert set(first) == names | {"BENCHMARKS.md"}
    for path in house.docs.rglob("*.*"):
        path.unlink()
    (house.base / "matplotlibrc").write_text(
        "font.size: 30\naxes.titlesize: 40\naxes.facecolor: red\nlines.linewidth: 9\n"
    )
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "PYTHONHASHSEED": "7",
        "MATPLOTLIBRC": str(house.base / "matplotlibrc"),
        "SOURCE_DATE_EPOCH": "86400",
        "TZ": "Asia/Tokyo",
    }
    command = [sys.executable, ROOT / "benchmark" / "report.py", "--no-collect", *house.words]
    done = subprocess.run(command, cwd=house.base, env=environment, capture_output=True, text=True, timeout=TIMEOUT)
    assert done.returncode == 0, done.stderr
    assert generated(house) == first


def test_plots_are_plain_svg(house, call):
    fill(house)
    call(report, *house.words)
    for path in (house.docs / "plots").glob("*.svg"):
        text = path.read_text()
        ElementTree.fromstring(text)
        assert "<text" in text and "<dc:date>" not in text and str(house.base) not in text and len(text) < 100_000
    assert {"ppo", "dqn", "target"} <= set(
        re.findall(r">([\w-]+)</text>", (house.docs / "plots" / "toys-CartPole-v1.svg").read_text())
    )
    for name in generated(house):
        if name.endswith(".svg"):
            assert f"(plots/{Path(name).name})" in page(house)


def test_check_finds_what_is_not_up_to_date(house, call):
    fill(house)
    call(report, *house.words)
    before = generated(house)
    make_run(house, seed=4)  # --check collects nothing
    done = call(report, "--check", *house.words)
    assert (done.code, done.out) == (0, "up to date\n") and generated(house) == before and len(rows(house)) == 9
    text, plot, other = (
        house.docs / name for name in ("BENCHMARKS.md", "plots/toys-iqm.svg", "plots/toys-profile.svg")
    )
    text.write_text(page(house) + "more")
    plot.write_bytes(plot.read_bytes() + b"<!-- -->")
    other.unlink()
    other.with_name("old.svg").write_text("<svg/>")
    done = call(report, "--check", *house.words)
    assert done.code == 1 and sorted(line.rpartition("/")[2] for line in done.out.splitlines()[:-1]) == [
        "BENCHMARKS.md is not up to date",
        "old.svg is left over",
        "toys-iqm.svg is not up to date",
        "toys-profile.svg is missing",
    ]
    call(report, "--no-collect", *house.words)
    assert generated(house) == before


def test_readme_has_a_short_table_of_ppo(house, call):
    """Between two comments, and nothing else of it is touched; without the comments nothing is."""
    readme, top, bottom = house.base / "README.md", "# Toys\n\n", "\nThe rest.\n"
    fill(house)
    readme.write_text(top + bottom)
    call(report, *house.words)
    assert readme.read_text() == top + bottom
    readme.write_text(top + report.BEGIN + "old" + report.END + bottom)
    assert "README.md is not up to date" in call(report, "--check", *house.words).out
    call(report, *house.words)
    text = readme.read_text()
    assert text.startswith(top + report.BEGIN) and text.endswith(report.END + bottom)
    lines = [line for line in text.splitlines() if line.startswith("| [")]
    (ppo,) = (entry for entry in house.suite.entries if entry.script == "ppo" and entry.env == "CartPole-v1")
    assert [line.split(" | ")[1] for line in lines] == ["[`ppo`](algos/ppo.py)"] * 2  # no other algorithm
    start = "| [CartPole-v1](docs/BENCHMARKS.md#cartpole-v1) | [`ppo`](algos/ppo.py) | "
    assert f"{start}{report.whole(ppo.steps)} | 3 of 5 | **" in text and "| marks |" not in text
    assert call(report, "--check", *house.words).code == 0
    (make_run(house, seed=4) / "ppo.py").write_text("another = 1\n")
    call(report, *house.words)
    assert "| marks |" in readme.read_text() and "| script changed since (1 of 4 runs) |" in readme.read_text()


def test_plots_of_another_matplotlib_are_not_compared(house, call):
    fill(house)
    call(report, *house.words)
    plot = house.docs / "plots" / "toys-iqm.svg"
    plot.write_text(plot.read_text().replace(f"Matplotlib v{matplotlib.__version__}", "Matplotlib v3.0.0") + "\n")
    done = call(report, "--check", *house.words)
    assert done.code == 0 and "not compared: toys-iqm.svg, by matplotlib 3.0.0" in done.err


def test_a_mistake_in_a_suite_is_one_line(house, call):
    (house.suites / "toys.toml").write_text(SUITE.replace('"dqn"', '"missing"'))
    done = call(report, *house.words)
    assert done.code == 2 and done.err.startswith("error: suite toys") and done.err.count("\n") == 1
    assert not house.docs.exists() and not house.results.exists()


def test_the_committed_page_is_up_to_date():
    """Otherwise: python benchmark/report.py --no-collect, and commit docs/."""
    args = report.Args()
    assert report.differences(report.generate(args), args.docs_dir / "plots") == []
    assert "(docs/BENCHMARKS.md)" in (ROOT / "README.md").read_text()


# ----------------------------------------------------------------------------------------------------- reference scores


def test_reference_scores_are_well_formed():
    reference, seen = collect.read_reference(), set()
    assert len(reference) > 500
    for row in reference:
        float(row["score"])
        assert row["metric"] in report.MEASURES or row["algo"] in ("random", "human"), row
        assert row["source_file"] and (row["steps"] or row["source"] == "DQN Zoo"), row
        key = tuple(row[name] for name in ("env_id", "algo", "source", "metric", "steps", "their_env_id", "note"))
        assert key not in seen, row
        seen.add(key)


def test_every_published_environment_has_a_random_score():
    random = collect.reference_scores("random", "SLM-Lab")
    environments = {entry.env for suite in report.read_suites(suites.SUITES) for entry in suite.entries}
    assert environments <= random.keys()


# --------------------------------------------------------------------------------------------------------- small parts


def test_checkpoints_are_slm_labs():
    assert list(collect.checkpoints("CartPole-v1", 2000)) == [500, 1000, 1500, 2000]
    assert list(collect.checkpoints("LunarLanderContinuous-v3", 2500)) == [1000, 2000]
    assert (
        list(collect.checkpoints("HalfCheetah-v5", 20_000))
        == list(collect.checkpoints("ALE/Pong-v5", 20_000))
        == [10_000, 20_000]
    )
    assert len(collect.checkpoints("MountainCar-v0", 120_000)) == 200 and len(collect.checkpoints("Other-v0", 30)) == 30


@pytest.mark.parametrize("positions", [[0.5, 0.5, 0.5], [0.99, 1.0, 0.98], [0.0, 0.01, 0.9], [0.2], [0.0] * 30])
def test_labels_are_spread(positions):
    moved = plots.spread(positions, 0.06)
    assert np.all(np.diff(sorted(moved)) >= 0.06 - 1e-9) and min(moved) >= 0
    assert max(moved) <= max(1, 0.06 * (len(moved) - 1)) + 1e-9
    assert list(np.argsort(moved, kind="stable")) == list(np.argsort(positions, kind="stable"))


def test_labels_with_room_stay():
    assert plots.spread([0.9, 0.1, 0.5], 0.06) == [0.9, 0.1, 0.5]


def test_styles_differ_in_two_ways():
    looks = [plots.style(i) for i in range(14)]
    for i, a in enumerate(looks):
        assert all(sum(a[key] != b[key] for key in a) >= 2 for b in looks[:i])


# ------------------------------------------------------------------------------------------------------------- compare


def write(path: Path, scores: dict[tuple[str, str], list[float]], **changes) -> Path:
    """A table of results: {(env, script): scores of seeds 1, 2, ...}."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = []
    for (env, script), values in scores.items():
        for seed, value in enumerate(values, 1):
            row = dict.fromkeys(collect.COLUMNS, "") | {"env": env, "script": script, "seed": seed, "steps": 1000}
            table.append(row | {"final_return": value, "started": path.name} | changes)
    collect.write_csv(path, collect.COLUMNS, (row.values() for row in table))
    return path


LOW, HIGH, BETWEEN = [1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0], [0.0, 2.5, 3.5, 9.0]


@pytest.fixture
def sides(tmp_path) -> tuple[Path, Path]:
    a = {("A-v0", "x"): LOW, ("B-v0", "x"): HIGH, ("C-v0", "x"): LOW, ("D-v0", "x"): LOW[:3], ("OnlyA-v0", "x"): LOW}
    b = {("A-v0", "x"): HIGH, ("B-v0", "x"): LOW, ("C-v0", "x"): BETWEEN, ("D-v0", "x"): HIGH[:3]}
    return write(tmp_path / "a" / "toys.csv", a).parent, write(tmp_path / "b" / "toys.csv", b, cpu="another").parent


def verdicts(out: str) -> dict[str, str]:
    lines = [[cell.strip() for cell in line.split("|")] for line in out.splitlines() if line.startswith("| ")]
    return {cells[1]: cells[7].strip("*") for cells in lines[2:]}


def test_compare_says_better_and_worse(sides, call):
    done = call(compare, *sides)
    expected = {"A": "better", "B": "worse", "C": "no difference found", "D": "too few seeds"}
    assert done.code == 0 and verdicts(done.out) == {f"toys {env}-v0 x": word for env, word in expected.items()}
    (line,) = (line for line in done.out.splitlines() if line.startswith("| toys A-v0"))
    assert "| 4, 4 |" in line and "| 4.00 [2.50, 5.50] | 1.00 [1.00, 1.00] |" in line
    found = stats.detectable(4, 4) * np.std(LOW, ddof=1)
    assert line.endswith(f"| {found:.2f} |")
    assert "P(B above A) is 0.64" in done.out and "1 better, 1 worse, 1 no difference found, 1 too few" in done.out
    assert "p ≤ 0.05" in done.out and "OnlyA" not in done.out
    back = verdicts(call(compare, *reversed(sides)).out)
    assert back == {"toys A-v0 x": "worse", "toys B-v0 x": "better"} | {f"toys {e}-v0 x": expected[e] for e in "CD"}


def test_compare_is_exact_at_the_edge(tmp_path, call):
    """4 against 4: without an inversion p = 2/70, with one 4/70, which is more than 0.05."""
    a = write(tmp_path / "a.csv", {("A-v0", "x"): LOW, ("B-v0", "x"): LOW})
    b = write(tmp_path / "b.csv", {("A-v0", "x"): [4.1, 5, 6, 7], ("B-v0", "x"): [3.9, 5, 6, 7]})
    assert verdicts(call(compare, a, b).out) == {"A-v0 x": "better", "B-v0 x": "no difference found"}


def test_compare_takes_files_and_scripts(tmp_path, call):
    a = write(tmp_path / "one.csv", {("A-v0", "x"): LOW, ("A-v0", "y"): HIGH, ("B-v0", "y"): LOW})
    b = write(tmp_path / "two.csv", {("A-v0", "x"): LOW, ("A-v0", "y"): LOW})
    assert verdicts(call(compare, a, b).out) == {"A-v0 x": "no difference found", "A-v0 y": "worse"}
    assert verdicts(call(compare, f"{a}:x", f"{a}:y").out) == {"A-v0": "better"}
    assert verdicts(call(compare, f"{a}:y", f"{b}:x").out) == {"A-v0": "worse"}


def test_compare_takes_commits_and_script_names(tmp_path, call, monkeypatch):
    def git(*words):
        identity = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
        subprocess.run(["git", "-C", tmp_path, *identity, *words], capture_output=True, check=True)

    results = tmp_path / "benchmark" / "results"
    monkeypatch.setattr(report, "ROOT", tmp_path)
    monkeypatch.setattr(compare, "RESULTS", results)
    (tmp_path / "algos").mkdir()
    for script in "xy":
        (tmp_path / "algos" / f"{script}.py").touch()
    git("init", "-q")
    write(results / "toys.csv", {("A-v0", "x"): LOW, ("A-v0", "y"): HIGH})
    git("add", ".")
    git("commit", "-qm", "one")
    write(results / "toys.csv", {("A-v0", "x"): HIGH, ("A-v0", "y"): HIGH}, cpu="another")
    git("commit", "-qam", "two")
    assert verdicts(call(compare, "HEAD~1", "HEAD").out) == {
        "toys A-v0 x": "better",
        "toys A-v0 y": "no difference found",
    }
    assert verdicts(call(compare, "HEAD~1:x", results).out) == {"toys A-v0 x": "better"}
    assert verdicts(call(compare, "x", "y").out) == {"toys A-v0": "no difference found"}
    assert verdicts(call(compare, "HEAD~1:y", "HEAD~1:x").out) == {"toys A-v0": "worse"}
    assert verdicts(call(compare, "HEAD~1:x", "y").out) == {"toys A-v0": "better"}


def test_compare_counts_a_run_once(tmp_path, call):
    """Seeds 1 to 4 were there before; B has them and four new ones."""
    a = write(tmp_path / "t.csv", {("A-v0", "x"): LOW})
    b = tmp_path / "b.csv"
    new = write(tmp_path / "new.csv", {("A-v0", "x"): HIGH}).read_text().splitlines()[1:]
    b.write_text(a.read_text() + "\n".join(new) + "\n")
    done = call(compare, a, b)
    assert verdicts(done.out) == {"A-v0 x": "better"} and "| 4, 4 |" in done.out
    assert "4 runs are on both sides and count as A's" in done.out
    done = call(compare, a, a)
    assert done.code == 0 and "left out, both sides have the same runs" in done.out and verdicts(done.out) == {}
    assert "Nothing to compare" in done.out and "Rule:" not in done.out


def test_compare_says_when_settings_differ(tmp_path, call):
    a = write(tmp_path / "a.csv", {("A-v0", "x"): LOW})
    assert "not the same" not in call(compare, a, write(tmp_path / "b.csv", {("A-v0", "x"): LOW})).out
    b = write(tmp_path / "b.csv", {("A-v0", "x"): LOW}, flags="--gamma 0.5")
    assert "A-v0 x: the flags are not the same" in call(compare, a, b).out
    b = write(tmp_path / "b.csv", {("A-v0", "x"): LOW}, steps="2000000")
    assert "A-v0 x: A had 1 000 steps, B 2 000 000." in call(compare, a, b).out


def test_compare_takes_other_measures(tmp_path, call):
    a = write(tmp_path / "a.csv", {("A-v0", "x"): LOW}, eval_mean="3")
    b = write(tmp_path / "b.csv", {("A-v0", "x"): LOW}, eval_mean="4")
    assert verdicts(call(compare, a, b, "--measure", "eval_mean").out) == {"A-v0 x": "better"}
    assert (
        "left out, there is no slm_score for B"
        in call(compare, write(a, {("A-v0", "x"): LOW}, slm_score=1), b, "--measure", "slm_score").out
    )


def test_compare_refuses_bad_input(sides, call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    good, other = sides[0], write(tmp_path / "other.csv", {("Z-v0", "x"): LOW})
    (tmp_path / "empty.csv").write_text("env,script\n")
    (tmp_path / "bytes.csv").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "empty").mkdir()
    cases = {
        "missing": "missing is no results folder, CSV file, commit or script",
        other: "no environment and script in common",
        "empty.csv": "empty.csv is no table of results",
        "bytes.csv": "bytes.csv cannot be read",
        "empty": "empty holds no results",
        f"{good}:z": "holds no results of z; there are x",
        write(tmp_path / "words.csv", {("A-v0", "x"): ["one"]}): "could not convert",
        write(tmp_path / "nan.csv", {("A-v0", "x"): ["nan"]}): "is not finite",
        write(tmp_path / "few.csv", {("A-v0", "x"): LOW}).with_name("other.csv"): "in common",
    }
    for name, part in cases.items():
        done = call(compare, good, name)
        assert done.code == 2 and done.out == "", name
        assert done.err.startswith("error: ") and done.err.count("\n") == 1 and part in done.err, done.err


# ----------------------------------------------------------------------------------------------------------- repeating


def set_code(house, code: str) -> None:
    """The runs of the results were made with this code."""
    changed = [(row | {"code": code}).values() for row in rows(house)]
    collect.write_csv(house.results / "toys.csv", collect.COLUMNS, changed)


@pytest.fixture
def repeated(house, call, monkeypatch):
    """Two runs of two entries each, made with older code, and what `repeat.py` does if its runs end with `finals`."""
    monkeypatch.setattr(suites, "REPEATED", house.base / "repeated.csv")
    for entry, seed in ((0, 1), (0, 2), (1, 1), (1, 2)):
        make_run(house, entry, seed, final=-80.0)
    assert call(report, *house.words).code == 0
    set_code(house, "older")
    asked, there = [], SimpleNamespace(runs=house.base / "again", suite=house.suite)

    def repeated(*words, **finals: float) -> SimpleNamespace:
        def make(suite, names, seed, args):
            asked.append((names, seed))
            for entry in (0, 1):
                if house.suite.entries[entry].name in names and finals:
                    make_run(there, entry, int(seed), final=finals[f"final{entry}"])
            return 0

        monkeypatch.setattr(repeat, "make", make)
        folders = ("--runs-dir", there.runs, "--results-dir", house.results)
        return call(repeat, house.suites / "toys.toml", *folders, *words)

    repeated.asked = asked
    return repeated


def marked(house, call) -> int:
    """How many rows of the page have the mark."""
    assert call(report, "--no-collect", *house.words).code == 0
    return page(house).count("| script changed since |")


def test_a_run_that_repeats_itself_clears_all_seeds(house, call, repeated):
    assert marked(house, call) == 2
    done = repeated(final0=-80.0, final1=-80.0)
    assert repeated.asked == [(["CartPole-v1__ppo", "Acrobot-v1__ppo"], "1")]
    assert done.code == 0 and "same: toys/CartPole-v1__ppo, seed 1" in done.out
    assert marked(house, call) == 0
    content = suites.REPEATED.read_text()
    assert "nothing to repeat" in repeated().out and suites.REPEATED.read_text() == content


def test_a_run_that_does_not_repeat_itself_stays_marked(house, call, repeated):
    done = repeated(final0=-80.0, final1=-79.0)
    assert done.code == 1 and "differs: toys/Acrobot-v1__ppo, seed 1: final_return was -80.0 and is -79.0" in done.out
    assert marked(house, call) == 1


def test_a_curve_alone_is_a_difference(house, repeated):
    path = house.results / "curves" / "toys" / "Acrobot-v1__ppo.csv"
    path.write_text(path.read_text().replace("-40", "-40.1", 1))
    done = repeated(final0=-80.0, final1=-80.0)
    assert done.code == 1 and "differs: toys/Acrobot-v1__ppo, seed 1: the curve is another" in done.out


def test_what_was_not_repeated_is_no_proof(house, call, repeated):
    done = repeated("--only", "CartPole*")  # its runs fail
    assert repeated.asked == [(["CartPole-v1__ppo"], "1")]
    assert done.code == 1 and "it has not finished" in done.out and not suites.REPEATED.exists()


def test_what_is_known_of_changes_adds_up(house, monkeypatch):
    monkeypatch.setattr(suites, "REPEATED", house.base / "repeated.csv")
    first, second = house.suite.entries[:2]
    assert suites.same_runs(first, "a", "a") and not suites.same_runs(first, "a", "b")
    links = [(*first.key, "1", "c", "d"), (*first.key, "1", "b", "c"), (*first.key, "1", "a", "b")]
    links.append((*second.key, "1", "a", "e"))
    collect.write_csv(suites.REPEATED, repeat.COLUMNS, links)
    assert suites.same_runs(first, "a", "d") and suites.same_runs(first, "d", "a")
    assert not suites.same_runs(first, "a", "e") and suites.same_runs(second, "a", "e")
    assert not suites.same_runs(first, "", "a")


def test_the_runner_takes_repeated_runs_for_done_but_does_not_go_on_with_one(house, monkeypatch):
    monkeypatch.setattr(suites, "REPEATED", house.base / "repeated.csv")
    (entry, *_), folder = house.suite.entries, make_run(house)
    (folder / "ppo.py").write_text("older = 1\n")
    assert suites.why_stale(folder, entry, 1) == "ppo.py has changed"
    now = suites.code_hash((suites.SCRIPTS / "ppo.py").read_text())
    collect.write_csv(suites.REPEATED, repeat.COLUMNS, [(*entry.key, "1", suites.code_hash("older = 1"), now)])
    assert suites.why_stale(folder, entry, 1) is None
    (folder / "result.json").unlink()
    assert suites.why_stale(folder, entry, 1) == "ppo.py has changed"
