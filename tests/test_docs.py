"""The documentation site: it builds without warnings and without PyTorch, and its pages are complete."""

import re
import subprocess
import sys
from types import SimpleNamespace

import pandas as pd
import pytest
from conftest import ROOT, SCRIPTS, TIMEOUT

pytest.importorskip("mkdocs")
PAGES = {path.stem: path.read_text() for path in sorted((ROOT / "docs" / "algorithms").glob("*.md"))}
SECTIONS = re.findall("^## (.*)", PAGES.pop("template"), re.M)
del PAGES["index"]
BUILD = "import sys; sys.modules['torch'] = None; from mkdocs.__main__ import cli; cli()"


def sections(page: str) -> dict[str, str]:
    return dict(re.findall(r"^## (.*)\n((?:(?!## ).*\n)*)", page, re.M))


def test_the_site_builds(tmp_path):
    """Strictly, so that every link, anchor, and directive is right. No page loads anything from elsewhere."""
    words = [sys.executable, "-c", BUILD, "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT)
    assert done.returncode == 0, done.stdout + done.stderr
    files = [path for path in (tmp_path / "site").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 15e6
    loads = r"""<(?:script|link|img|iframe|video)\b[^>]*?(?:src|href)=["']?(?:https?:)?//[^>]*>"""
    assert [path for path in files if path.suffix == ".html" and re.search(loads, path.read_text())] == []


def test_every_script_has_a_page():
    assert sorted(PAGES) == SCRIPTS


@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_complete(name):
    page, code = PAGES[name], (ROOT / "algos" / f"{name}.py").read_text()
    parts = sections(page)
    assert list(parts) == SECTIONS and all(text.strip() for text in parts.values())
    assert page.startswith("# ") and f"{{{{ about {name} }}}}" in page and f"{{{{ video {name} " in page
    equations = re.split("^### ", parts["The equations and their code"], flags=re.M)[1:]
    assert [x.split("\n")[0] for x in equations if "$$" not in x or f"{{{{ source {name}." not in x] == []
    assert len(equations) >= 2
    assert f"{{{{ flag {name}." in parts["Hyperparameters"] and f"{{{{ flags {name} }}}}" in parts["Hyperparameters"]
    assert f"{{{{ results {name} }}}}" in parts["Results"]
    assert re.search(rf"\{{\{{ diff \w+ {name} \}}\}}", parts["What changed"])
    tag = r"\b(?:losses|charts)/\w+"
    logged = set(re.findall(tag, code.partition("# ------------------- The run")[0]))
    assert logged <= set(re.findall(tag, parts["Logged metrics"])) <= set(re.findall(tag, code))
    known = {x.replace("_", "-") for x in re.findall(r"^    (\w+): .*  # ", code, re.M)}
    used = {x for line in re.findall(rf"algos/{name}\.py.*(?:\\\n.*)*", page) for x in re.findall(r" --([\w-]+)", line)}
    assert {x for x in used if not {x, x.removeprefix("no-")} & known} == set()


def test_every_metric_is_explained():
    tag = r"\b(?:losses|charts)/\w+"
    logged = {name for script in SCRIPTS for name in re.findall(tag, (ROOT / "algos" / f"{script}.py").read_text())}
    assert logged <= set(re.findall(tag, (ROOT / "docs" / "metrics.md").read_text()))


def test_the_environment_of_the_guide_is_right(tmp_path):
    page = (ROOT / "docs" / "guides" / "own-environment.md").read_text()
    (tmp_path / "catch.py").write_text(re.search(r"```python\n(.*?)```", page, re.S)[1])
    done = subprocess.run([sys.executable, "catch.py"], cwd=tmp_path, capture_output=True, text=True, timeout=TIMEOUT)
    assert (done.returncode, done.stdout) == (0, "fine\n"), done.stderr


def test_the_score_of_the_guide_is_in_the_results():
    page = (ROOT / "docs" / "guides" / "reproduce.md").read_text()
    words = r"algos/(\w+)\.py --env-id (\S+) --total-timesteps (\d+) \\\n +(.*) --seed (\d+)"
    script, env, steps, flags, seed = re.search(words, page).groups()
    rows = pd.read_csv(ROOT / "benchmark" / "results" / "runs" / "sparse.csv", dtype=str)
    known = rows.set_index(["script", "env", "steps", "flags", "seed"])["final_return"]
    assert f"`final_return` of {known[script, env, steps, flags, seed]}." in page


MISTAKES = "source ppo.gea", "source nope.gae", "flag ppo.gama", "results nope", "sauce ppo"


@pytest.mark.parametrize("directive", [*MISTAKES, 'source ppo.train "for t in range(T)" "no such line"'])
def test_a_mistake_in_a_directive_ends_the_build(directive, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs")
    import hooks
    from mkdocs.exceptions import PluginError

    page = SimpleNamespace(file=SimpleNamespace(src_uri="algorithms/x.md"))
    with pytest.raises(PluginError, match=re.escape(directive)):  # which it names
        hooks.on_page_markdown(f"text\n\n{{{{ {directive} }}}}\n", page, config=None, files=None)
