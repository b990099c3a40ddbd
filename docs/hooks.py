"""MkDocs hooks: directives that fill the pages from the repository, and links to its files.

    {{ about ppo }}                 the file, its length, its environments, what it adds to the one before
    {{ source ppo.gae }}            a function, class, or method (ppo.Agent.sample), with line numbers and a link
    {{ source ppo.train "# Collect" "run.record" }}     of it, the line with the first text to the next with the second
    {{ flag ppo.gamma }}            three cells of a table: flag, default, meaning
    {{ flags ppo }}                 a table of all flags of the algorithm; {{ flags ppo gamma num_envs }}: of these
    {{ results ppo }}               scores, curves, commands, and missed targets, from benchmark/results/
    {{ diff a2c_gae ppo }}          what differs between two files, definition by definition, above the banner
    {{ algorithms }}, {{ map }}     the table of all algorithms; the drawing of algos/README.md
    {{ best }}                      of each environment, the script with the highest training return, and its command
    {{ speed }}                     the rows of benchmark/results/speed.csv
    {{ video ppo "caption" }}       of the videos that benchmark/gallery.py made of this script, the first
    {{ gallery }}, {{ gallery 6 }}  the videos of all environments, of the first six

Inside ``` fences nothing is expanded. An unknown name ends the build with one line. Scripts are parsed, not imported.
Links to files of the repository are written as on GitHub; on the site they lead to copies below source/.
"""

import ast
import difflib
import os
import posixpath
import re
import shlex
import shutil
import sys
from functools import cache
from pathlib import Path

import pandas as pd
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, InclusionLevel
from mkdocs.utils import get_relative_url
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmark import report, results, runs  # noqa: E402
from benchmark import speed as speed_of_scripts  # noqa: E402
from benchmark.stats import form  # noqa: E402

DIRECTIVE, FENCE = re.compile(r"\{\{ *(\w+)(.*?)\}\}"), re.compile(r"(^ *```.*?^ *```$)", re.M | re.S)
NUMBERED = re.compile(
    r'<span id="__span-([-\d]+)"><a id="[^"]*" name="[^"]*"></a><a href="[^"]*">(<span class="linenos".*?></span>)</a>'
)
THOUSANDS = re.compile(r"(?<=\d) (?=\d{3}\b)")  # a number is not broken
LINK = re.compile(r"(?<=\])\(([^()\s:#]+)(#[^()\s]*)?\)")  # not to other sites, nor within the page


def own(stem: str) -> str:
    """The algorithm's half of a script."""
    if not (runs.SCRIPTS / f"{stem}.py").exists():
        raise LookupError(f"there is no algos/{stem}.py")
    return (runs.SCRIPTS / f"{stem}.py").read_text().partition(runs.BANNER)[0]


def definitions(nodes: list[ast.stmt]) -> dict[str, ast.FunctionDef | ast.ClassDef]:
    return {node.name: node for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}


def rows_of(node: ast.stmt) -> range:
    """Its lines, from 0, with decorators."""
    return range(min(x.lineno for x in [node, *node.decorator_list]) - 1, node.end_lineno)


def source(page, files, name: str, first: str = "", last: str = "") -> str:
    stem, *path = name.split(".")
    lines, nodes, rows = own(stem).splitlines(), ast.parse(own(stem)).body, []
    for part in path or [""]:
        known = definitions(nodes)
        if part not in known:
            raise LookupError(f"there is no {part!r}; there are {', '.join(known)}")
        nodes, rows = known[part].body, rows_of(known[part])
    if first:
        begins = [i for i in rows if first in lines[i]]
        ends = [i for i in rows if len(begins) == 1 and i >= begins[0] and (last or first) in lines[i]]
        if not ends:
            raise LookupError(f"{len(begins)} lines have the first text, not 1; or none from there on has the second")
        rows = range(begins[0], ends[0] + 1)
    indent = len(lines[rows[0]]) - len(lines[rows[0]].lstrip())
    url = get_relative_url(files.get_file_from_path(f"source/algos/{stem}.py.md").url, page.url)
    text = f"algos/{stem}.py, lines {rows[0] + 1}–{rows[-1] + 1}"
    link = f'<p class="source-link"><a href="{url}#__codelineno-0-{rows[0] + 1}">{text}</a></p>'
    code = [f'``` {{.python linenums="{rows[0] + 1}"}}', *(lines[i][indent:] for i in rows), "```"]
    return "\n".join([link, "", *code, ""])


@cache
def cells_of_flags(stem: str) -> dict[str, list[str]]:
    """Of each field of Args: flag, default, meaning."""
    found, lines = {}, own(stem).splitlines()
    for node in (x for x in definitions(ast.parse(own(stem)).body)["Args"].body if isinstance(x, ast.AnnAssign)):
        value = getattr(node.value, "value", "")
        default = f"`{value:,}`" if type(value) is int else f"`{ast.get_source_segment(own(stem), node.value)}`"
        default = "`{}`" if "factory=dict" in default else default
        meaning = lines[node.end_lineno - 1].partition("  # ")[2]
        meaning = re.sub(r"`[^`]*`|[_{}|]", lambda match: match[0] if match[0][0] == "`" else f"\\{match[0]}", meaning)
        found[node.target.id] = [f"`--{node.target.id.replace('_', '-')}`", default, meaning]
    return found


def flag(page, files, name: str) -> str:
    stem, _, field = name.partition(".")
    if field not in cells_of_flags(stem):
        raise LookupError(f"there is no flag {field!r}; there are {', '.join(cells_of_flags(stem))}")
    return " | ".join(cells_of_flags(stem)[field])


def flags(page, files, stem: str, *names: str) -> str:
    known = list(cells_of_flags(stem))
    names = names or known[known.index("env_kwargs") + 1 : known.index("run_dir")]
    return "\n".join(
        ["| flag | default | meaning |", "|---|---|---|", *(f"| {flag(0, 0, f'{stem}.{x}')} |" for x in names)]
    )


@cache
def entries() -> pd.DataFrame:
    return report.read_suites(report.Args(), pd.read_csv(results.REFERENCE))


def results_of(page, files, stem: str) -> str:
    mine = entries()[[bool(own(stem)) and path.stem == stem for path in entries()["script"]]]
    ran, lines = mine[mine["ran"]], []
    if not ran.empty:
        rows = [report.describe(x) | {"environment": report.environment(x)} for x in ran.itertuples()]
        names = ["environment", *(name for name in report.SCORES[1:] if name != "worst … best")]
        lines += [re.sub(r"(?<![|]) (?![|[])", "\u00a0", row) for row in report.table(rows, names)]
        legend = "Training return: last 100 training episodes, mean over seeds [95 % interval]. Evaluation: afterwards."
        legend += " †: run with an earlier version of the script." * ("†" in str(rows))
        lines += [f"{legend} [More](/docs/guides/read-the-benchmarks.md)", ""]
        plots = [f"![{x.env}](/docs/plots/{report.plot_name(x.suite, x.env)})" for x in ran.itertuples()]
        lines += ['<div class="curves" markdown="1">', "", *plots, "", "</div>", ""]
        lines += report.fold("The commands", "```sh", *(f"uv run {x.command}" for x in ran.itertuples()), "```", "")
        missed = [line.replace("](", "](/docs/") for line in report.missed_targets(ran)[2:]]
        lines += [f"{report.BELOW}:", "", *missed, ""] if missed else []
    if waiting := report.some(mine["env"][~mine["ran"]]) or "in no suite" * ran.empty:
        lines.append(f"Not run yet: {waiting}.")
    return "\n".join([*lines, ""])


def diff(page, files, *stems: str) -> str:
    """Definition by definition, both sides highlighted as Python. Losses are compared whatever their names."""
    texts, codes, places = [], [], []
    for stem in stems:
        texts.append(own(stem).splitlines())
        codes.append(highlight(own(stem), PythonLexer(stripnl=False), HtmlFormatter(nowrap=True)).splitlines())
        known = definitions(ast.parse(own(stem)).body)
        places.append({re.sub("^.*_loss$", "loss", name): (name, rows_of(node)) for name, node in known.items()})
    same, parts = [], []
    for key in places[1] | places[0]:
        (old_name, old), (new_name, new) = (place.get(key, ("", range(0))) for place in places)
        a, b = [texts[0][i] for i in old], [texts[1][i] for i in new]
        if a == b:
            same.append(f"`{key}`")
            continue
        rows = []
        for group in difflib.SequenceMatcher(None, a, b, autojunk=False).get_grouped_opcodes(3):
            rows += ['<span class="gap">⋯</span>'] * bool(rows)
            for tag, i, k, j, m in group:
                rows += [f'<span class="del">{codes[0][old[x]]}</span>' for x in range(i, k) if tag != "equal"]
                rows += [f'<span class="{"add" * (tag != "equal")}">{codes[1][new[x]]}</span>' for x in range(j, m)]
        title = " → ".join(dict.fromkeys(x for x in (old_name, new_name) if x))
        verb, is_open = "changed" if a and b else "new" if b else "gone", " open" * (key == "loss")
        summary = f"<summary><code>{title}</code> {verb}</summary>"
        code = f'<div class="highlight diff"><pre><code>{"".join(rows)}</code></pre></div>'
        parts.append(f'<details class="plain"{is_open}>{summary}{code}</details>')
    return "\n\n".join([*parts, f"The same in both files: {', '.join(same)}." if same else "", ""])


@cache
def chart() -> dict[str, dict[str, str]]:
    """Of each script, in the order of algos/README.md: its row in {{ algorithms }}."""
    return {row["file"].split("`")[1]: row for row in report.algorithms(entries())}


def link(page, files, stem: str) -> str:
    """To the page of an algorithm; while there is none, to its source."""
    there = files.get_file_from_path(f"algorithms/{stem}.md") or files.get_file_from_path(shown(f"algos/{stem}.py"))
    return f'<a href="{get_relative_url(there.url, page.url)}">{stem}</a>'


def algorithms(page, files) -> str:
    rows = [{"algorithm": f"<code>{link(page, files, stem)}</code>"} | row for stem, row in chart().items()]
    return "\n".join(report.table(rows, [name for name in rows[0] if name != "file"]))


def best(page, files) -> str:
    rows, commands, ran = [], [], entries()[entries()["ran"]]
    for _, of in ran[ran["algo"] != "random_policy"].groupby("env", sort=False):
        x = max(of.itertuples(), key=lambda x: x.finals.mean())
        row = {"environment": report.environment(x), "script": f"<code>{link(page, files, x.script.stem)}</code>"}
        shown = "training return", "evaluation", "seeds", "steps", "minutes"
        rows.append(row | {name: report.describe(x)[name] for name in shown})
        commands += [f"uv run {x.command}"]
    return "\n".join([*report.table(rows), *report.fold("The commands", "```sh", *commands, "```", "")])


def speed(page, files) -> str:
    rows, saved = [], pd.read_csv(speed_of_scripts.SAVED, keep_default_na=False)
    last = saved.drop_duplicates(["script", "peer", "device", "flags"], keep="last")
    for x in last.sort_values(["script", "peer", "flags"]).itertuples():
        where = f"{x.gpu if x.device == 'cuda' else x.cpu}, {x.threads} thread{'s' * (x.threads > 1)}"
        row = {"script": f"`{x.script}`" + f" `{x.flags}`" * bool(x.flags), "environment": x.env}
        row |= {"beside": f"{x.peer} {x.version}".strip(), "ours, steps/s": f"{x.ours:,.0f}"}
        row |= {"theirs": f"{x.theirs:,.0f}"}
        row |= {"ratio [min, max]": f"**{x.ratio:.2f}** [{x.ratio_min:.2f}, {x.ratio_max:.2f}]"}
        row |= {"pairs": f"{x.pairs} of {x.steps:,} steps"}
        rows.append(row | {"measured": f"{where}, `{x.commit[:7]}`{x.commit[40:]}"})
    return "\n".join(report.table(rows))


def drawing(page, files) -> str:
    lines = (runs.SCRIPTS / "README.md").read_text().split("```")[1].strip("\n")
    names = "|".join(rf"\b{stem}\b" for stem in chart())
    lines = re.sub(names, lambda match: link(page, files, match[0]), lines)
    return f'<div class="highlight"><pre><code>{lines}</code></pre></div>'


def about(page, files, stem: str) -> str:
    length, (adds, envs) = len(own(stem).splitlines()), list(chart()[stem].values())[1:3]
    file = f"[`algos/{stem}.py`](/algos/{stem}.py), {length} lines above the shared part"
    words = "[words and symbols](/docs/primer.md)"
    return f"{file} · {envs} · what it adds: {adds} · {words}\n{{ .about }}"


@cache
def videos() -> pd.DataFrame:
    path = ROOT / "docs" / "videos" / "videos.csv"
    return pd.read_csv(path) if path.exists() else pd.DataFrame(columns=["name", *results.KEY, "eval_mean"])


def figure(row, caption: str) -> str:
    image = f"![{row.script} on {row.env.rpartition(':')[2]}](/docs/videos/{row.name}.webp){{ loading=lazy }}"
    return f'<figure class="video" markdown="span">{image}<figcaption>{caption}</figcaption></figure>'


def scores_of(env: str) -> str:
    """Its name, with a link to its scores if there are any."""
    found = [x for x in entries()[entries()["ran"]].itertuples() if x.env == env]
    return report.environment(found[0]) if found else env.rpartition(":")[2]


def video(page, files, stem: str, caption: str = "") -> str:
    mine = videos()[[bool(own(stem)) and script == stem for script in videos()["script"]]]
    for row in mine.head(1).itertuples(index=False):
        score = f"evaluation return of this run {form(row.eval_mean)}"
        return figure(row, f"{caption}. {scores_of(row.env)}, {score}.")
    return ""


def gallery(page, files, count: str = "1000") -> str:
    best = videos()[videos()["name"] != videos()["script"]].head(int(count)).itertuples(index=False)
    figures = [figure(row, f"{scores_of(row.env)}, {link(page, files, row.script)}") for row in best]
    return "\n".join(['<div class="videos" markdown="1">', "", *figures, "", "</div>"])


DIRECTIVES = {"about": about, "algorithms": algorithms, "diff": diff, "flag": flag, "flags": flags, "map": drawing}
DIRECTIVES |= {"best": best, "gallery": gallery, "results": results_of, "source": source, "speed": speed}
DIRECTIVES["video"] = video


def shown(path: str) -> str:
    """Where a file of the repository is on the site."""
    return path[5:] if path.startswith("docs/") else f"source/{path}{'' if path.endswith('.csv') else '.md'}"


def linked(link: str, uri: str) -> str:
    """The path in the repository that a link on a page of the site means."""
    here = uri[7:-3] if uri.startswith("source/") else f"docs/{uri}"
    return posixpath.normpath(link[1:] if link[0] == "/" else posixpath.join(posixpath.dirname(here), link))


def copy(path: Path, title: str) -> str:
    """The page of a file or folder that is not in docs/."""
    if path.suffix in (".csv", ".md"):
        return path.read_text()
    if path.is_dir():
        body = "\n".join(f"- `{x.name}`" for x in sorted(path.iterdir()) if x.name[0] not in "._")
    else:
        language = path.suffix[1:] if path.suffix in (".py", ".toml") else "text"
        text, banner, run = path.read_text().partition(runs.BANNER)
        text += f"{banner}200 lines, shown in ppo.py\n" if run and path.stem != "ppo" else banner + run
        body = f'````` {{.{language} linenums="1"}}\n{text}`````'
    return f"---\ntitle: {title}\nhide: [navigation, toc]\nsearch: {{ exclude: true }}\n---\n\n# {title}\n\n{body}\n"


def on_config(config):
    """The pages of the algorithms in the order of the map; anchors as GitHub makes them."""
    section = next(section["Algorithms"] for section in config["nav"] if "Algorithms" in section)
    section += [f"algorithms/{x}.md" for x in chart() if Path(config["docs_dir"], f"algorithms/{x}.md").exists()]
    config["mdx_configs"]["toc"]["slugify"] = lambda text, separator: report.anchor(text)


def on_files(files, config):
    """Add copies of all scripts, of README.md, and of what pages link to."""
    todo = ["README.md", *(f"algos/{stem}.py" for stem in chart())]
    for file in files.documentation_pages():
        todo += [linked(match[1], file.src_uri) for match in LINK.finditer(file.content_string)]
    while todo:
        path = todo.pop()
        if not path.startswith(("docs", ".")) and (ROOT / path).exists() and not files.get_file_from_path(shown(path)):
            text = copy(ROOT / path, path)
            files.append(File.generated(config, shown(path), content=text, inclusion=InclusionLevel.NOT_IN_NAV))
            todo += [linked(match[1], shown(path)) for match in LINK.finditer(text)] if path.endswith(".md") else []


def on_page_markdown(markdown, page, config, files):
    uri = page.file.src_uri

    def expand(match: re.Match) -> str:
        try:
            if match[1] not in DIRECTIVES:
                raise LookupError(f"there are {', '.join(sorted(DIRECTIVES))}")
            return DIRECTIVES[match[1]](page, files, *shlex.split(match[2]))
        except (LookupError, TypeError, ValueError) as error:
            raise PluginError(f"{uri}: {match[0]}: {error}")

    def relink(match: re.Match) -> str:
        there = shown(linked(match[1], uri))
        is_there = files.get_file_from_path(there)
        return f"({os.path.relpath(there, posixpath.dirname(uri) or '.')}{match[2] or ''})" if is_there else match[0]

    if uri.startswith("source/") and not uri.endswith(".md.md"):
        return markdown
    for pattern, change in ((DIRECTIVE, expand), (LINK, relink), (THOUSANDS, "\u00a0")):
        parts = FENCE.split(markdown)
        parts[::2] = [pattern.sub(change, part) for part in parts[::2]]
        markdown = "".join(parts)
    return markdown.replace("<details><summary>", '<details markdown="1"><summary>')


def on_post_page(output, page, config):
    """Smaller: of each line of code one element with an id, not three; none around names; no indentation elsewhere."""
    output = NUMBERED.sub(r'<span id="__codelineno-\1">\2', output)
    output = re.sub('<span class="[nw]">([^<]*)</span>', r"\1", output)
    parts = re.split("(<pre.*?</pre>)", output, flags=re.S)
    parts[::2] = [re.sub(r"\s*\n\s*", "\n", part) for part in parts[::2]]
    return "".join(parts)


def on_post_build(config):
    """Without source maps and what the search needs for other languages than English: 2 MB."""
    assets = Path(config["site_dir"], "assets")
    shutil.rmtree(assets / "javascripts" / "lunr", ignore_errors=True)
    for path in assets.glob("*/*.map"):
        path.unlink()
