"""The rules of the house: files that stand alone, shared parts that stay the same, one form for all."""

import ast
import json
import re
import subprocess
import sys
import tomllib

import pytest
import shared
from conftest import ROOT, SCRIPTS, TIMEOUT, ByScript

MAY_IMPORT = {"algos": "", "cloud": "cloud", "benchmark": "benchmark cloud", "tuner": "tuner benchmark"}  # of ours
TRACKED = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split()


def tree(script: str) -> ast.Module:
    return ast.parse((ROOT / "algos" / f"{script}.py").read_text())


def text(script: str) -> str:
    return (ROOT / "algos" / f"{script}.py").read_text()


# ----------------------------------------------------------------------------------------------------- single files


def imported(module: ast.Module) -> set[str]:
    """Top-level packages of every import, wherever it stands."""
    names = set()
    for node in ast.walk(module):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add("." if node.level else node.module.split(".")[0])
    return names


def test_scripts_import_only_published_packages(script):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    published = {re.match(r"[\w-]+", line)[0].lower().replace("-", "_") for line in project["dependencies"]}
    theirs = imported(tree(script)) - set(sys.stdlib_module_names)
    assert theirs <= published and "torch" in theirs
    assert not theirs & {path.stem for path in ROOT.iterdir() if path.is_dir()}


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_who_may_know_whom(folder):
    paths = sorted((ROOT / folder).glob("*.py"))
    known = {(path.name, name) for path in paths for name in imported(ast.parse(path.read_text())) & {*MAY_IMPORT, "."}}
    assert paths and [pair for pair in sorted(known) if pair[1] not in MAY_IMPORT[folder].split()] == []


def test_importing_a_script_does_nothing(tmp_path):
    """All in one process; a script that prints or warns is found by importing it alone."""
    modules = ", ".join(f"algos.{script}" for script in SCRIPTS)
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import {modules}"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=TIMEOUT)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "") and not any(tmp_path.iterdir())


def test_sections_have_one_order(script):
    """Docstring, imports, Args and its limits; then, each under its banner, the four sections; main at the end."""
    banners = {m[1]: text(script)[: m.start()].count("\n") for m in re.finditer(r"^# -{3,} (.+)$", text(script), re.M)}
    assert list(banners) == ["networks", "algorithm", "the run", "training"]
    body = tree(script).body
    assert ast.get_docstring(tree(script)).count("\n") > 3
    last_import = max(i for i, node in enumerate(body) if isinstance(node, ast.Import | ast.ImportFrom))
    assert all(isinstance(node, ast.Import | ast.ImportFrom) for node in body[1 : last_import + 1])
    lines = {node.name: node.lineno for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    assert list(lines)[0] == "Args" and lines["Args"] < banners["networks"]
    assert banners["the run"] < lines["Run"] < banners["training"] < lines["train"] < lines["main"]
    classes = [node for node in body if isinstance(node, ast.ClassDef) and "Module" in ast.unparse(node).split("\n")[0]]
    assert classes and all(banners["networks"] < node.lineno < banners["algorithm"] for node in classes)
    assert list(lines)[-2:] == ["train", "main"] and ast.unparse(body[-1]).startswith("if __name__ == '__main__'")


def test_flags_that_a_script_names_are_its_own(script):
    """In its manual, its messages and its comments; those of git and TensorBoard are left out."""
    fields = next(node.body for node in tree(script).body if isinstance(node, ast.ClassDef) and node.name == "Args")
    flags = {node.target.id.replace("_", "-") for node in fields if isinstance(node, ast.AnnAssign)}
    others = set("abbrev always dirty exclude logdir".split())
    named = set(re.findall(r"(?<![\w-])--((?:no-)?[a-z][a-z0-9-]+)", text(script)))
    assert {name for name in named - others if not flags & {name, name.removeprefix("no-")}} == set() and flags & named


def test_the_map_shows_every_script_and_no_score():
    """algos/README.md: each file once in the table and once in the drawing; numbers stand in README.md alone."""
    page = (ROOT / "algos" / "README.md").read_text()
    assert sorted(re.findall(r"^\| \[`(\w+)\.py`\]\(\1\.py\) \| [^|]+ \| [^|]+ \|$", page, re.M)) == SCRIPTS
    drawing = re.sub(r"^[a-z ]+:", "", page.split("```")[1], flags=re.M)
    assert sorted(re.findall(r"\w+", drawing)) == SCRIPTS
    assert "(../README.md)" in page and "(algos/README.md)" in (ROOT / "README.md").read_text()
    assert re.findall(r"\b\d[\d.,]*\b", page) == []


def test_all_tests_of_a_script_go_to_one_worker():
    ids = [
        "a.py::test_x[dqn]",
        "b.py::test_y[dqn-no folder]",
        "b.py::test_y[3-dqn_per]",
        "b.py::test_y[dqns]",
        "b.py::dqn",
        "tests/test_dstack_server.py::test_z[dqn]",
    ]
    groups = [ByScript._split_scope(None, name) for name in ids]
    assert groups == ["dqn", "dqn", "dqn_per", *ids[3:5], "server"]


def test_lines_fit_in_120_columns():
    paths = [path for folder in (*MAY_IMPORT, "tests") for path in (ROOT / folder).glob("*.py")]
    lines = [(path.name, i, line) for path in paths for i, line in enumerate(path.read_text().splitlines(), 1)]
    assert len(paths) > 5 and [line for line in lines if len(line[2]) > 120] == []


def test_no_lock_file_is_tracked():
    assert "pyproject.toml" in TRACKED and not [name for name in TRACKED if name.endswith("uv.lock")]


# ---------------------------------------------------------------------------------------------------- shared parts


def test_same_named_definitions_are_the_same():
    assert shared.drift() == []


def test_names_that_may_differ_exist_and_do_differ():
    texts: dict[str, set[str]] = {}
    for script in SCRIPTS:
        for name, (_, _, definition) in shared.definitions(ROOT / "algos" / f"{script}.py").items():
            texts.setdefault(name, set()).add(definition)
    assert shared.MAY_DIFFER <= set(texts)
    assert [name for name in shared.MAY_DIFFER if len(texts[name]) == 1 and len(SCRIPTS) > 1] == []


A = """import os


@decorated
def one():
    return 1


class Two:
    x = 2


def train():
    return "a"
"""


def test_drift_is_found_and_mended(tmp_path):
    (tmp_path / "a.py").write_text(A)
    drifted = A.replace("return 1", "return 10").replace("x = 2", "x = 20").replace('"a"', '"b"') + "\n\nlast = 3\n"
    (tmp_path / "b.py").write_text(drifted)
    (tmp_path / "c.py").write_text("def other():\n    pass\n")
    assert shared.drift(tmp_path) == ["one: b.py differs from a.py", "Two: b.py differs from a.py"]
    assert shared.copy(tmp_path / "a.py", ["one"], tmp_path) == ["one: a.py -> b.py"]
    assert shared.drift(tmp_path) == ["Two: b.py differs from a.py"]
    assert shared.copy(tmp_path / "a.py", [], tmp_path) == ["Two: a.py -> b.py"]
    assert shared.drift(tmp_path) == [] == shared.copy(tmp_path / "a.py", [], tmp_path)
    assert (tmp_path / "b.py").read_text() == A.replace('"a"', '"b"') + "\n\nlast = 3\n"  # the rest is as it was
    assert (tmp_path / "a.py").read_text() == A and (tmp_path / "c.py").read_text() == "def other():\n    pass\n"
    (tmp_path / "b.py").write_text((tmp_path / "b.py").read_text().replace("@decorated", "@other"))
    assert shared.drift(tmp_path) == ["one: b.py differs from a.py"]  # a decorator belongs to the definition
    with pytest.raises(SystemExit, match="no top-level definition three"):
        shared.copy(tmp_path / "a.py", ["three"], tmp_path)


# ------------------------------------------------------------------------------------------------- benchmark/speed.py


CLEANRL = "--peer", "cleanrl", "--peer-python", sys.executable


def speed(*words, cwd) -> subprocess.CompletedProcess:
    command = [sys.executable, ROOT / "benchmark" / "speed.py", *map(str, words)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=TIMEOUT)


def test_speed_helps(tmp_path):
    done = speed("--help", cwd=tmp_path)
    assert done.returncode == 0 and {"--peer", "--until", "--repeats"} <= set(re.findall(r"--[a-z]+", done.stdout))


def test_speed_of_a_script_alone(tmp_path):
    """One counted run; the flags after -- reach the script, and no process or folder stays behind."""
    script, own = ROOT / "algos" / "ppo.py", ("--num-envs", 4, "--num-steps", 32)
    words = (script, "--total-timesteps", 600, "--repeats", 1, "--threads", 1, "--json", "speed.json", "--", *own)
    done = speed(*words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    written = json.loads((tmp_path / "speed.json").read_text())
    (runs,) = written["runs"].values()
    assert [run["seed"] for run in runs] == [1]
    assert all(run["steps"] == 640 and run["sps"] > 0 and run["process_seconds"] > 0 for run in runs)
    assert written["sides"]["ours"]["args"]["num_steps"] == 32
    assert "training, steps/s" in done.stdout and "CartPole-v1" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["speed.json"]


@pytest.mark.parametrize(
    "words, part",
    [
        (["algos/ppo.py", *CLEANRL, "--peer-path", "missing"], "--peer-path"),
        (["algos/ppo.py", *CLEANRL], "--peer-path"),
        (["algos/ppo.py", "--peer", "sb3", "--peer-python", "missing/python"], "--peer-python"),
        (["algos/missing.py"], "algos/missing.py"),
        (["algos/ppo.py", "--repeats", "0"], "--repeats"),
        (["algos/ppo.py", "--json", "missing/speed.json"], "--json"),
    ],
    ids=["no such checkout", "no checkout", "no such python", "no script", "no repeats", "no folder"],
)
def test_speed_refuses_bad_input(words, part, tmp_path):
    done = speed(ROOT / words[0], *words[1:], cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and part in done.stderr
    assert not any(tmp_path.iterdir())
