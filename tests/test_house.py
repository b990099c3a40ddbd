"""The rules of the house: files that stand alone, one form for all, the same machinery in each, little around them."""

import ast
import importlib.metadata
import re
import subprocess
import sys
import tomllib

import pytest
import shared
from conftest import ROOT, SCRIPTS, TIMEOUT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

MAY_IMPORT = {  # of ours
    "algos": [],
    "benchmark": ["benchmark", "cloud"],
    "cloud": ["cloud", "benchmark.runs"],
    "tuner": ["tuner", "benchmark"],
}
LINES = {"benchmark": 2_200, "tuner": 900, "cloud": 900, "tests": 6080 + 120 * (len(SCRIPTS) - 11)}
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]


def text(script: str) -> str:
    return (ROOT / "algos" / f"{script}.py").read_text()


def imported(module: ast.Module) -> set[str]:
    """package.module or package.name of every import, wherever it stands, also by importlib.import_module("name")."""
    names = set()
    for node in ast.walk(module):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{'.' * node.level}{node.module or ''}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "importlib.import_module":
            names |= {argument.value for argument in node.args if isinstance(argument, ast.Constant)}
    return names


def undeclared(module: ast.Module, requirements: dict[str, str]) -> set[str]:
    """The packages that it imports, neither ours nor the standard library's, that these requirements do not bring."""
    tops = {name.split(".")[0] for name in imported(module)} - set(sys.stdlib_module_names) - MAY_IMPORT.keys()
    publishers = importlib.metadata.packages_distributions()
    return {top for top in tops if not requirements.keys() & set(map(canonicalize_name, publishers.get(top, [])))}


def pins(requirements: list[str]) -> dict[str, str]:
    """name: version; extras and markers are left out."""
    return {canonicalize_name(x.name): str(x.specifier) for x in map(Requirement, requirements)}


# ----------------------------------------------------------------------------------------------------- single files


def test_metadata_covers_the_imports(script):
    """PEP 723: what the file imports is published and listed, with the versions of pyproject.toml."""
    block = re.fullmatch(r"# /// script\n((?:#(?: .*)?\n)+)# ///\n(?s:.*)", text(script))[1]
    metadata = tomllib.loads(re.sub("^# ?", "", block, flags=re.M))
    assert metadata["requires-python"] == PROJECT["requires-python"]
    listed = pins(metadata["dependencies"])
    assert listed.items() <= pins(PROJECT["dependencies"]).items()
    assert all(version.startswith("==") for version in listed.values())
    assert "torch" in listed and undeclared(ast.parse(text(script)), listed) == set()


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


# ------------------------------------------------------------------------------------------------- around the scripts


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_who_may_import_whom(folder):
    allowed, found = MAY_IMPORT[folder], []
    for path in sorted((ROOT / folder).rglob("*.py")):
        ours = [x for x in imported(ast.parse(path.read_text())) if x.split(".")[0] in ("", "tests", *MAY_IMPORT)]
        found += [(path.name, x) for x in ours if not any(f"{x}.".startswith(f"{name}.") for name in allowed)]
    assert found == []


@pytest.mark.parametrize("folder", LINES)
def test_there_is_little_around_the_scripts(folder):
    """Lines of Python. Above the budget, something has to be deleted or simplified; 120 lines of tests a new script."""
    assert sum(path.read_text().count("\n") for path in (ROOT / folder).rglob("*.py")) <= LINES[folder]


def test_what_the_tools_import_is_declared():
    """In the group `orchestrate`, which has the project's versions, for machines without PyTorch and simulators."""
    group = pins(PYPROJECT["dependency-groups"]["orchestrate"])
    assert group.items() <= pins(PROJECT["dependencies"]).items()
    assert not group.keys() & {"torch", "gymnasium", "mujoco", "ale-py", "tensorboard"}
    paths = [path for folder in ("benchmark", "cloud", "tuner") for path in (ROOT / folder).glob("*.py")]
    missing = {path.name: undeclared(ast.parse(path.read_text()), group) for path in paths}
    for name in ("peer.py", "environments.py", "gallery.py"):  # which run in the environment of a peer, or of a script
        del missing[name]
    assert missing.pop("track.py") <= {"tensorboard"}  # whose files it reads
    assert set().union(*missing.values()) == set(), missing


def test_no_lock_file_is_tracked():
    """Pins are in pyproject.toml; a lock file would name the package index of whoever wrote it."""
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    assert "pyproject.toml" in tracked and not [name for name in tracked if name.endswith("uv.lock")]
