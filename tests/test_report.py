"""The page, its plots, and the HTML report, from results and from run folders."""

import re
import shutil
import sys
import xml.etree.ElementTree as ElementTree
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from tools import ROOT, fake_script, finish, run

from benchmark import report, results, stats, suites

TOML = """
title = "Toys"
protocol = "Trained, then scored."
steps = 100_000
seeds = 3

[[entry]]
script = "ppo.py"
env = "CartPole-v1"
target = 400
flags = { learning-rate = 1e-2, norm-adv = false }
why = "the first"
tried = "More was worse."

[[entry]]
script = "dqn.py"
env = "CartPole-v1"
target = 475

[[entry]]
script = "sac.py"
env = "CartPole-v1"
target = 9999
"""
PPO = [390.0, 400.0, 440.0]


@pytest.fixture
def call(monkeypatch, capsys):
    """call(*words) -> code, out, err: report.py in this process."""

    def call(*words) -> SimpleNamespace:
        monkeypatch.setattr(sys, "argv", ["benchmark/report.py", *map(str, words)])
        try:
            code = report.main() or 0
        except SystemExit as end:
            code = end.code
        return SimpleNamespace(code=code, **capsys.readouterr()._asdict())

    return call


@pytest.fixture(scope="session")
def toys(tmp_path_factory) -> SimpleNamespace:
    """A suite with runs of two of its three scripts on one environment, collected and drawn once."""
    base = tmp_path_factory.mktemp("toys")
    for name in ("ppo", "dqn", "sac"):
        fake_script(base, name)
    (base / "toys.toml").write_text(TOML)
    suite = suites.load(base / "toys.toml")
    for entry, scores in zip(suite.entries, (PPO, [300.0, 350.0, 100.0])):
        for seed, score in enumerate(scores, 1):
            half = (0.0,) * 500 + (score,) * 500
            folder = finish(entry.spec("toys", seed, base / "runs"), half, seconds=90.0 * seed)
    (folder / "dqn.py").write_text((folder / "dqn.py").read_text() + "\nMORE = 1\n")  # an older version
    words = ["--suites", base / "toys.toml", "--out", base / "docs", "--runs-dir", base / "runs"]
    words += ["--results-dir", base / "results"]
    run("benchmark/report.py", *words)
    return SimpleNamespace(base=base, words=words, docs=base / "docs", text=(base / "docs/BENCHMARKS.md").read_text())


def tables(text: str) -> list[pd.DataFrame]:
    """The tables of a Markdown page."""
    found = []
    for block in re.findall(r"(?:^\|.*\n)+", text, re.M):
        head, _, *rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in block.splitlines()]
        found.append(pd.DataFrame(rows, columns=head))
    return found


def contents(folder) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ------------------------------------------------------------------------------------------------------------- the page


def test_scores_of_the_page(toys):
    scores = next(table for table in tables(toys.text) if "training return" in table)
    assert list(scores.columns) == report.SCORES
    low, high = (f"{x:.1f}" for x in stats.mean_interval(np.array(PPO)))
    row = ["`ppo`", "100 000", "3", f"**410.0** [{low}, {high}]", "390.0 … 440.0", f"410.0 [{low}, {high}]"]
    assert list(scores.iloc[0]) == [*row, "400 met", "3.00"]
    assert list(scores.iloc[1][["seeds", "target"]]) == ["2 of 3", "475 **not met**"]
    assert list(scores.iloc[2][["seeds", "training return", "target"]]) == ["0 of 3", "no runs yet", "9999"]
    command = "python ppo.py --env-id CartPole-v1 --total-timesteps 100000 --learning-rate 0.01 --no-norm-adv --seed 1"
    assert f"\n{command}  # the first\n" in toys.text


def test_published_scores_stand_beside_the_closest_metric_and_budget(toys):
    peers = next(table for table in tables(toys.text) if "published" in table)
    script, _, ours, *theirs = peers[peers["by"] == "CleanRL"].iloc[0]
    assert script.startswith("`ppo`, ") and ours.startswith("410.0 [")
    assert theirs == ["490.04 ± 6.12 over runs", "CleanRL", "**below**", "CartPole-v1, 500 000, 3"]
    mine = pd.DataFrame({"final_return": [1.0], "slm_score": [1.0], "eval_mean": [1.0]})
    for steps, theirs in ((1_000_000, "1 000 000"), (6_000_000, "8 000 000")):
        entry = suites.Entry(ROOT / "algos" / "ppo_continuous.py", "HalfCheetah-v5", steps, 1)
        found = report.published(entry, mine, pd.read_csv(results.REFERENCE))
        (row,) = (peer["row"] for peer in found if peer["source"] == "CleanRL")
        assert theirs in list(row.values())[-1]


def test_what_falls_short_is_listed_once_with_what_was_tried(toys):
    (part,) = re.findall(rf"## {report.BELOW}\n(.*)", toys.text, re.S)
    assert "training return 325.0, target 475" in part and "`sac`" not in part
    (line,) = (line for line in part.splitlines() if "`ppo`" in line)
    assert "410.0, CleanRL has 490.04" in line and line.endswith(". More was worse.")


def test_a_target_may_be_for_the_evaluation(tmp_path):
    """Here it is 50 higher than the training return of 1; and an environment's scale is for the same score."""
    for evaluated, met in ((False, False), (True, True)):
        entry = suites.Entry(fake_script(tmp_path), "A-v1", 1000, 1, target=51.0, evaluated=evaluated)
        found = pd.DataFrame({"final_return": [1.0], "eval_mean": [51.0]})
        row = pd.Series(report.cell(entry, found, pd.DataFrame()))
        assert row["met"] == met and row["scores"] == [51.0 if evaluated else 1.0]


def test_a_row_is_of_one_version_of_the_script():
    def chosen(*codes: str) -> list[int]:
        return list(report.one_version(pd.DataFrame({"code": list(codes)}), "now").index)

    assert chosen("now", "old", "old", "older") == [1, 2]
    assert chosen("old", "now", "older") == [1]
    assert chosen("old", "now", "old", "now") == [1, 3]
    assert chosen() == []


def test_scores_of_other_flags_are_not_shown(toys, call, tmp_path):
    for path in toys.base.glob("*.*"):
        (tmp_path / path.name).write_text(path.read_text().replace("1e-2", "2e-2"))
    words = ["--suites", tmp_path / "toys.toml", "--results-dir", toys.base / "results", "--export", tmp_path / "x.csv"]
    assert call(*words).code == 0 and set(pd.read_csv(tmp_path / "x.csv")["script"]) == {"dqn"}


def test_scores_are_on_one_scale():
    """From random to the highest target of the environment, or to the human score on Atari."""
    rows = [("CartPole-v1", "ppo", 475, 475), ("CartPole-v1", "dqn", 400, 22.97), ("ALE/Pong-v5", "ppo", 1, 14.6)]
    rows += [("Unknown-v0", "ppo", 1, 1), ("Acrobot-v1", "ppo", -500, 0)]  # no random score; a target below it
    rows += [("Own-v0", "random_policy", np.nan, 0.5), ("Own-v0", "sac", 1, 0.75)]  # a random score of our own
    cells = pd.DataFrame(rows, columns=["env", "algo", "target", "score"]).assign(ran=True)
    cells["scores"] = [np.array([score]) for score in cells["score"]]
    scores = report.normalized(cells, pd.read_csv(results.REFERENCE))
    found = {f"{algo} {env}": score for algo, by_env in scores.items() for env, (score,) in by_env.items()}
    expected = {"ppo CartPole-v1": 1, "ppo ALE/Pong-v5": 1, "dqn CartPole-v1": 0, "sac Own-v0": 0.5}
    assert found == pytest.approx(expected, abs=1e-3)


def test_readme_gets_a_table_with_one_score_of_each_script(toys, tmp_path):
    cells, *_ = report.generate(report.Args(suites=(str(toys.base / "toys.toml"),), results_dir=toys.base / "results"))
    assert report.readme("# Toys\n", cells) == "# Toys\n"
    text = report.readme(f"# Toys\n{report.BEGIN}old{report.END}The rest.\n", cells)
    assert text.startswith(f"# Toys\n{report.BEGIN}") and text.endswith(f"{report.END}The rest.\n")
    (table,) = tables(text)
    scores = dict(zip(table["file"].str.split("`").str[1], table["training return"]))
    assert scores["ppo"] == "**410.0** [CartPole-v1](docs/BENCHMARKS.md#cartpole-v1), 3 seeds"
    assert scores["dqn"].startswith("**325.0** ") and scores["reinforce"] == "not run yet"
    assert set(scores) == {path.stem for path in (ROOT / "algos").glob("*.py")} and report.readme(text, cells) == text


def test_the_committed_page_is_up_to_date():
    """Otherwise: python benchmark/report.py --no-collect, and commit docs/ and README.md."""
    args = report.Args()
    cells, text, figures = report.generate(args)
    titles = re.findall("^#+ (.*)", text, re.M)
    assert len({*map(report.anchor, titles)}) == len(titles)
    assert text == (args.out / "BENCHMARKS.md").read_text()
    assert report.readme((ROOT / "README.md").read_text(), cells) == (ROOT / "README.md").read_text()
    assert {path.name for path in (args.out / "plots").glob("*.svg")} == set(figures)
    assert all(len(table.columns) <= 8 for table in tables(text)) and text.count(f"{report.BELOW}\n") == 1
    findings = (args.out / "findings.md").read_text()
    anchors = {report.anchor(title) for title in re.findall(r"^#+ (.*)", findings, re.M)}
    assert set(re.findall(r"\(findings\.md#([^)]*)\)", text)) <= anchors


def test_plots(toys):
    name = "plots/toys-CartPole-v1.svg"
    assert set(contents(toys.docs)) == {"BENCHMARKS.md", name} and f"]({name})" in toys.text
    text = (toys.docs / name).read_text()
    ElementTree.fromstring(text)
    assert "<dc:date>" not in text and str(toys.base) not in text and len(text) < 100_000
    words = set(re.findall(r">([\w-]+)</text>", text))
    assert {"ppo", "dqn", "target", "500", "minutes"} <= words and not {"sac", "10k"} & words  # target of sac: 9999


def test_the_same_bytes_in_another_process_with_another_style(toys):
    (toys.base / "matplotlibrc").write_text("font.size: 30\naxes.facecolor: red\nlines.linewidth: 9\n")
    env = {"PYTHONHASHSEED": "7", "MATPLOTLIBRC": str(toys.base / "matplotlibrc"), "SOURCE_DATE_EPOCH": "86400"}
    before = contents(toys.docs)
    run("benchmark/report.py", *toys.words, "--no-collect", env=env)
    assert contents(toys.docs) == before


def test_check_names_what_is_out_of_date_and_writes_nothing(toys, call, tmp_path):
    docs = shutil.copytree(toys.docs, tmp_path / "docs")
    assert call(*toys.words, "--out", docs, "--check").code == 0
    (docs / "BENCHMARKS.md").write_text(toys.text + "more")
    (docs / "plots" / "toys-CartPole-v1.svg").rename(docs / "plots" / "old.svg")
    before, done = contents(docs), call(*toys.words, "--out", docs, "--check")
    assert done.code == 1 and contents(docs) == before
    names = [line.rpartition("/")[2] for line in done.out.splitlines()]
    assert names == ["BENCHMARKS.md", "old.svg", "toys-CartPole-v1.svg"]


def rows_of(path) -> list[list[str]]:
    """The rows of all tables of an HTML page, which loads nothing from elsewhere."""
    text = path.read_text()
    assert all(re.match("data:image/svg|#|http", address) for address in re.findall(r'(?:src|href)="(.*?)"', text))
    rows = re.findall(r"<tr>(.*?)</tr>", text, re.S)
    return [[re.sub("<.*?>", "", x) for x in re.findall(r"<t[dh]>(.*?)</t[dh]>", row)] for row in rows]


def test_html_of_any_folder_of_run_folders(tmp_path, call):
    """Flags or versions of the script that differ are rows of their own, with their curves; damage is named."""
    script = fake_script(tmp_path, "mine")
    entry = suites.Entry(script, "Own-v0", 1000, 3, {"learning_rate": 0.1})
    for seed in (1, 2, 3):
        finish(entry.spec("a", seed, tmp_path), returns=(float(seed),) * 50)
    finish(suites.Entry(script, "Own-v0", 1000, 1).spec("b", 1, tmp_path), returns=(7.0,) * 50)
    (finish(entry.spec("a", 4, tmp_path)) / "result.json").write_text("{}")
    script.write_text(script.read_text() + "\nMORE = 1\n")
    for seed in (1, 2):
        finish(entry.spec("later", seed, tmp_path), returns=(100.0 + seed,) * 50)
    done = call(tmp_path, "--html", tmp_path / "page.html")
    found = {row[0]: row[2:5] for row in rows_of(tmp_path / "page.html") if "1 000" in row}
    versions = sorted(row for label, row in found.items() if label.startswith("mine --learning-rate 0.1 "))
    assert versions == [["2", "101.5", "101.0 … 102.0"], ["3", "2.00 [1.00, 3.00]", "1.00 … 3.00"]]
    cells, *_ = report.generate(report.Args(tmp_path))
    for x in cells.itertuples():
        assert list(x.curves.iloc[-1]) == list(x.runs["final_return"])
    assert found["mine"] == ["1", "7.00", "7.00 … 7.00"] and done.code == 0 and "mine__4" in done.err
    assert "data:image/svg" in (tmp_path / "page.html").read_text()


def test_html_of_suites_and_export(toys, call, tmp_path):
    before = contents(toys.base)
    words = [*toys.words, "--html", tmp_path / "page.html", "--export", tmp_path / "all.csv", "--only", "ppo"]
    assert call(*words).code == 0 and contents(toys.base) == before
    assert ["ppo", "100 000"] in [row[:2] for row in rows_of(tmp_path / "page.html")]
    table = pd.read_csv(tmp_path / "all.csv")
    assert len(table) == 300 and set(table["suite"]) == {"toys"} and set(table["script"]) == {"ppo"}
    assert list(table[table["step"] == 100_000].sort_values("seed")["return"]) == PPO


@pytest.mark.parametrize(
    "words",
    [("--only", "ppo"), ("--suites", "classic"), ("runs",), ("--suites", "none"), ("--only", "x", "--html", "x")],
)
def test_a_part_does_not_replace_the_whole(call, tmp_path, monkeypatch, words):
    monkeypatch.chdir(tmp_path)
    done = call("--no-collect", *words)
    assert done.code == 2 and done.err.count("\n") == 1 and contents(tmp_path) == {}
