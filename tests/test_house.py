"""The rules of the house: files that stand alone, one form for all, the same machinery in each."""

import ast
import importlib.metadata
import json
import re
import subprocess
import sys
import tomllib

import pytest
import shared
from conftest import ROOT, SCRIPTS, TIMEOUT, ByScript
from packaging.requirements import Requirement

MAY_IMPORT = {"algos": "", "cloud": "cloud", "benchmark": "benchmark cloud", "tuner": "tuner benchmark"}  # of ours
TRACKED = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split()


def text(script: str) -> str:
    return (ROOT / "algos" / f"{script}.py").read_text()


def imported(module: ast.Module) -> set[str]:
    """Top-level packages of every import, wherever it stands, also by importlib.import_module("name")."""
    names = set()
    for node in ast.walk(module):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add("." if node.level else node.module.split(".")[0])
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "importlib.import_module":
            names.add(node.args[0].value.split(".")[0])
    return names


def pins(requirements: list[str]) -> set[tuple[str, str]]:
    """(name, version); extras and markers are left out."""
    return {(requirement.name, str(requirement.specifier)) for requirement in map(Requirement, requirements)}


# ----------------------------------------------------------------------------------------------------- single files


def test_metadata_covers_the_imports(script):
    """PEP 723: what the file imports is published and listed, with the versions of pyproject.toml."""
    block = re.fullmatch(r"# /// script\n((?:#(?: .*)?\n)+)# ///\n(?s:.*)", text(script))[1]
    metadata = tomllib.loads(re.sub("^# ?", "", block, flags=re.M))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert metadata["requires-python"] == project["requires-python"]
    ours = pins(metadata["dependencies"])
    assert ours <= pins(project["dependencies"]) and all(version.startswith("==") for _, version in ours)
    third_party = imported(ast.parse(text(script))) - set(sys.stdlib_module_names)
    publishers = importlib.metadata.packages_distributions()
    listed = {name for name, _ in ours}
    assert [x for x in third_party if not listed & {name.lower() for name in publishers.get(x, [])}] == []
    assert not third_party & {path.stem for path in ROOT.iterdir() if path.is_dir()} and "torch" in third_party


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


def test_anatomy(script):
    """Metadata, docstring, imports, Args, networks, environments, algorithm, train; then the machinery."""
    own, machinery = shared.split(ROOT / "algos" / f"{script}.py")
    body = ast.parse(text(script)).body
    imports = [isinstance(node, ast.Import | ast.ImportFrom) for node in body]
    assert ast.get_docstring(ast.parse(own)) and imports.index(False, 1) > imports.count(True)
    definitions = [node for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    names = [node.name for node in definitions]
    networks = {x.name for x in definitions if re.match(r"class \w+\(nn\.", ast.unparse(x))}
    envs = names.index("make_envs")
    assert [x.name for x in definitions if isinstance(x, ast.ClassDef)][0] == "Args"
    assert "Agent" in networks <= set(names[names.index("Args") : envs])
    assert "Adapter" not in names or names[envs - 1] == "Adapter"
    assert "real_next_obs" not in names or names[envs + 1] == "real_next_obs"
    own_names = [node.name for node in definitions if node.lineno <= own.count("\n")]
    assert own_names[-1] == "train" and {"Run", "evaluate", "main"} <= set(names) - set(own_names)
    assert machinery.endswith('\n\nif __name__ == "__main__":\n    main()\n')


def test_budgets(script):
    own, machinery = shared.split(ROOT / "algos" / f"{script}.py")
    assert text(script).count("\n") <= (480 if script in ("ppo", "dqn") else 620)
    assert machinery.count("\n") <= 201  # with the empty line before the banner
    docstring = ast.parse(own).body[0]
    assert docstring.end_lineno - docstring.lineno < 22


def test_flags_are_explained_and_those_that_are_named_exist(script):
    own, _ = shared.split(ROOT / "algos" / f"{script}.py")
    args = next(node for node in ast.parse(own).body if isinstance(node, ast.ClassDef))
    fields = {node.target.id: node for node in args.body if isinstance(node, ast.AnnAssign)}
    lines = own.splitlines()
    assert [name for name, node in fields.items() if "  # " not in lines[node.end_lineno - 1]] == []
    names = list(fields)
    assert names[:4] == ["env_id", "seed", "total_timesteps", "env_kwargs"]
    run = "run_dir resume evaluate eval_episodes video device torch_threads compile checkpoint_every".split()
    assert [name for name in names if name in run] == run
    named = set(re.findall(r"(?<![\w-])--((?:no-)?[a-z][a-z0-9-]+)", re.sub(r"uv run \S.*\.py", "", own)))
    flags = {"help", *(name.replace("_", "-") for name in names)}
    assert {name for name in named if not flags & {name, name.removeprefix("no-")}} == set() and flags & named


def test_the_map_shows_every_script():
    """algos/README.md: each file once in the table and once in the drawing."""
    page = (ROOT / "algos" / "README.md").read_text()
    assert sorted(re.findall(r"^\| \[`(\w+)\.py`\]\(\1\.py\) \|", page, re.M)) == SCRIPTS
    drawing = re.sub(r"^[a-z ]+:", "", page.split("```")[1], flags=re.M)
    assert sorted(re.findall(r"\w+", drawing)) == SCRIPTS


def test_no_lock_file_is_tracked():
    assert "pyproject.toml" in TRACKED and not [name for name in TRACKED if name.endswith("uv.lock")]


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


# ---------------------------------------------------------------------------------------------------- shared parts


def test_shared_parts_are_the_same():
    assert shared.drift() == []


def test_drift_is_found_and_copied_over(tmp_path):
    own, machinery = "def gae():\n    pass\n\n\ndef train():\n    a\n", shared.BANNER + "\n\nclass Run:\n    pass\n"
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.py").write_text(own.replace("    a", f"    {name}") + machinery)
    assert shared.drift(tmp_path) == shared.copy(tmp_path / "a.py") == []
    (tmp_path / "c.py").write_text("import os\n" + own.replace("pass", "return") + machinery.replace("pass", "x = 1"))
    assert shared.drift(tmp_path) == ["c.py", "gae in c.py and a.py"]
    assert shared.copy(tmp_path / "a.py") == ["c.py"]
    assert (tmp_path / "c.py").read_text() == "import os\n" + own.replace("pass", "return") + machinery
    (tmp_path / "d.py").write_text(own)
    with pytest.raises(SystemExit):
        shared.copy(tmp_path / "d.py")


# ------------------------------------------------------------------------------------------------- benchmark/speed.py


def speed(*words, cwd) -> subprocess.CompletedProcess:
    command = [sys.executable, ROOT / "benchmark" / "speed.py", *map(str, words)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=TIMEOUT)


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


def test_speed_refuses_bad_input(tmp_path):
    ours, peer = ROOT / "algos" / "ppo.py", ("--peer", "cleanrl", "--peer-python", sys.executable)
    for words in [ours, *peer], [ROOT / "missing.py"], [ours, "--json", "missing/speed.json"]:
        done = speed(*words, cwd=tmp_path)
        assert done.returncode == 2 and done.stdout == "" and not any(tmp_path.iterdir())
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
