"""Write docs/BENCHMARKS.md, its plots, and README's scores from benchmark/results/; or a page about your own runs.

    python benchmark/report.py                                  # collect from runs/, then write page and plots
    python benchmark/report.py --no-collect                     # from benchmark/results/ alone
    python benchmark/report.py --check                          # write nothing; exit code 1 if they are out of date
    python benchmark/report.py runs/mine --html mine.html       # one HTML file about the run folders below runs/mine
    python benchmark/report.py --suites box2d --only '*Lander*' --html lander.html
    python benchmark/report.py --export results.csv             # one tidy table with all curves

The same input gives the same bytes. The suite `smoke` is only shown if it is named. See docs/benchmarking.md.
"""

import base64
import math
import re
import shlex
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import tyro
from markdown_it import MarkdownIt

from benchmark import plots, results, runs, stats, suites
from benchmark.stats import between, exact, form, fraction, whole, with_interval

FIRST = ["classic", "box2d", "mujoco", "off-policy", "atari-cpu", "atari"]  # the order on the page; other suites follow
BASELINE = "ppo"
TELLING = ["HalfCheetah-v5", "LunarLander-v3", "CartPole-v1"]  # the one score of a script is on the first that it ran
CHART = r"^\| \[`(\w+)\.py`\]\(\1\.py\) \| (.*?) \| (.*?) \|$"  # a row of algos/README.md
METRICS = {  # in reference.csv: our closest column, and its name on the page
    "train_ma_100ckpt": ("slm_score", "SLM-Lab's training average"),
    "train_last100": ("final_return", "last 100 training episodes"),
    "eval_deterministic": ("eval_mean", "evaluation, theirs greedy"),
    "eval_stochastic": ("eval_mean", "evaluation, theirs sampled"),
}
SCORES = ["script", "steps", "seeds", "training return", "worst … best", "evaluation", "target", "minutes"]
DETAILS = ["script", "median", "steps/s", "machine", "commit"]
OWN = "*Training return*: mean over runs of the last 100 training episodes [95 % interval]. *Evaluation*: afterwards."
BELOW = "Below a target or a published score"
BEGIN, END = "<!-- written by benchmark/report.py -->\n", "<!-- end of what report.py writes -->\n"


@dataclass
class Args:
    folder: tyro.conf.Positional[Path | None] = None  # report the run folders in or below it, not results of suites
    suites: tuple[str, ...] = ()  # only these suites: names, or TOML files
    only: tuple[str, ...] = ()  # only entries whose script, environment, or name (CartPole-v1__ppo) matches a pattern
    out: Path = runs.ROOT / "docs"  # where BENCHMARKS.md and plots/ are written
    html: Path | None = None  # write this HTML file instead
    export: Path | None = None  # write one table of all runs instead, a CSV
    collect: bool = True  # first add finished runs to the results, unless --html, --export, or --check is given
    check: bool = False  # only report what is out of date
    runs_dir: Path = runs.RUNS  # run folders, one folder per suite
    results_dir: Path = results.RESULTS  # results of suites


def cell(entry: suites.Entry, found: pd.DataFrame, curves: pd.DataFrame, **more) -> dict:
    """An entry with its runs, as a row of the table that all parts of the page are made from."""
    finals, evals = found["final_return"].to_numpy(float), found["eval_mean"].dropna().to_numpy(float)
    is_ours = entry.script.parent == runs.SCRIPTS
    flags = {"env_id": entry.env, "total_timesteps": entry.steps} | dict(sorted(entry.flags.items())) | {"seed": 1}
    command = f"python {'algos/' * is_ours}{entry.script.name} {shlex.join(runs.words_of(flags))}"
    row = vars(entry) | {"algo": entry.algo, "label": entry.script.stem, "command": command, "is_ours": is_ours}
    row |= {"runs": found, "curves": curves, "peers": [], "protocol": "", "finals": finals, "ran": len(finals) > 0}
    row["target"] = math.nan if entry.target is None else entry.target
    row |= {"evals": evals, "scores": evals if entry.evaluated else finals, "heading": entry.env}
    return row | {"met": len(row["scores"]) > 0 and not row["scores"].mean() < row["target"]} | more


def read_suites(args: Args, reference: pd.DataFrame) -> pd.DataFrame:
    cells, first = [], {}
    for suite in chosen(args):
        found = results.read_suite(suite, args.results_dir)
        for entry in (entry for entry in suite.entries if entry.fits(args.only)):
            wanted = [entry.env, entry.script.stem, entry.steps, results.text_of(entry.flags)]
            mine = found[(found[["env", "script", "steps", "flags"]] == wanted).all(axis=1)]
            mine = one_version(mine, runs.code_hash(entry.script.read_text()))
            curves, peers = results.read_curves(suite, entry, args.results_dir), published(entry, mine, reference)
            more = {"suite": suite.name, "title": suite.title, "protocol": suite.protocol, "peers": peers}
            if first.setdefault(entry.env, suite) is not suite:  # headings are anchors, too
                more["heading"] = f"{entry.env}: {suite.title}"
            cells.append(cell(entry, mine, curves, **more))
    return pd.DataFrame(cells)


def one_version(found: pd.DataFrame, current: str) -> pd.DataFrame:
    """Of an entry's runs those of one version of the script: the one that most of them have, of equals the current."""
    counts = found["code"].value_counts()
    best = max(counts.index, key=lambda code: (counts[code], code == current, code), default=current)
    return found[found["code"] == best]


def read_own(args: Args) -> pd.DataFrame:
    """The run folders in or below a folder: an entry per environment, script, version of it, budget, and flags."""
    cells, found, keys = [], results.read_folder(args.folder), ["env", "script", "steps", "flags"]
    found["version"] = found["code"].where(found.groupby(keys)["code"].transform("nunique") > 1, "")
    for (env, script, steps, flags, version), mine in found.groupby([*keys, "version"]):
        label, at = f"{script} {flags} {version[:4]}".strip(), results.curve_steps(steps)
        copy = mine["folder"].iloc[-1] / f"{script}.py"
        entry = suites.Entry(copy, env, steps, len(mine), runs.flags_of(shlex.split(flags)))
        curves = pd.DataFrame({row.seed: results.means(row.folder, at) for row in mine.itertuples()}, index=at)
        more = {"suite": args.folder.name, "title": f"Runs in {args.folder}", "label": label, "algo": label}
        cells += [cell(entry, mine, curves, **more)] * entry.fits(args.only)
    return pd.DataFrame(cells)


def published(entry: suites.Entry, mine: pd.DataFrame, reference: pd.DataFrame) -> list[dict]:
    """Published scores beside ours; of one project and metric, the one with the closest budget."""
    rows = reference[(reference["env_id"] == entry.env) & (reference["algo"] == entry.algo)]
    rows = rows[rows["metric"].isin(METRICS)]
    gap, found = (rows["steps"].fillna(1e9) / entry.steps).map(math.log).abs(), []
    for row in rows.loc[gap.groupby([rows["source"], rows["metric"]], sort=False).idxmin()].itertuples():
        column, measure = METRICS[row.metric]
        ours = mine[column].dropna().to_numpy(float)
        if not len(ours):
            continue
        is_below, is_within = ours.mean() < row.score, stats.mean_interval(ours)[1] >= row.score
        spread = f" ± {form(row.spread)} over {'runs' if 'seeds' in row.spread_kind else 'episodes'}"
        steps, count = (whole(x) if x > 0 else "?" for x in (row.steps, row.n_seeds))
        peer = {"script": f"`{entry.script.stem}`, {whole(entry.steps)} steps", "measure": measure}
        peer["ours"], quoted = with_interval(ours), exact(row.score) + spread * (row.spread_kind != "none")
        peer |= {"published": quoted, "by": row.source}
        peer["ours is"] = "**below**" + ", within our interval" * bool(is_within) if is_below else "at or above"
        peer["their environment, steps, runs"] = f"{row.their_env_id}, {steps}, {count}"
        short = f"{measure} {form(ours.mean())}, {row.source} has {exact(row.score)}"
        found.append({"row": peer, "source": row.source, "is below": is_below, "short": short})
    return found


def normalized(of: pd.DataFrame, reference: pd.DataFrame) -> dict[str, dict[str, np.ndarray]]:
    """Algorithm -> environment -> scores, on a scale from random (0) to the target or, on Atari, to human (1)."""
    known, found = reference.set_index(["source", "algo", "env_id"])["score"], {}
    targets, chance = of.groupby("env")["target"].max(), of["algo"] == "random_policy"
    measured = of[chance & of["ran"]].set_index("env")["scores"].map(np.mean)
    for x in of[of["ran"] & ~chance].itertuples():
        source = "DQN Zoo" if x.env.startswith("ALE/") else "SLM-Lab"
        low, high = (known.get((source, name, x.env), math.nan) for name in ("random", "human"))
        low = low if x.env.startswith("ALE/") else measured.get(x.env, low)
        high = targets[x.env] if math.isnan(high) else high
        if high > low:
            found.setdefault(x.algo, {})[x.env] = (x.scores - low) / (high - low)
    return found


def table(rows: list[dict[str, str]], names: list[str] | None = None) -> list[str]:
    names = names or list(rows[0])
    lines = [names, ["---"] * len(names), *([row[name] for name in names] for row in rows)]
    return [*(f"| {' | '.join(cells)} |" for cells in lines), ""]


def fold(summary: str, *lines: str) -> list[str]:
    return [f"<details><summary>{summary}</summary>", "", *lines, "</details>", ""]


def describe(x) -> dict[str, str]:
    """The row of an entry, with SCORES and DETAILS."""
    row, n, found = dict.fromkeys([*SCORES, *DETAILS], ""), len(x.runs), x.runs
    row["script"] = f"[`{x.label}`](../algos/{x.script.name})" if x.is_ours else f"`{x.label}`"
    row |= {"steps": whole(x.steps), "seeds": f"{n} of {x.seeds}" if n < x.seeds else f"{n}"}
    row["target"] = "–" if math.isnan(x.target) else exact(x.target)
    if not n:
        return row | {"training return": "no runs yet"}
    row["seeds"] += "†" * int((found["code"] != runs.code_hash(x.script.read_text())).any())
    row["training return"] = f"**{form(x.finals.mean())}**" + between(stats.mean_interval(x.finals))
    row["worst … best"] = f"{form(x.finals.min())} … {form(x.finals.max())}"
    row["evaluation"] = with_interval(x.evals)
    row["target"] += "" if math.isnan(x.target) else " met" if x.met else " **not met**"
    row |= {"minutes": form(found["minutes"].median()), "median": form(np.median(x.finals))}
    row["steps/s"] = whole(found["sps"].median())
    machines = {f"{y.gpu or y.cpu}, {y.threads:.0f} thread{'s' * (y.threads != 1)}" for y in found.itertuples()}
    row["machine"] = "; ".join(sorted(machines))
    row["commit"] = ", ".join(sorted({re.sub(r"^(\w{7})\w*", r"`\1`", commit) for commit in found["commit"]}))
    return row


def environment_section(env: str, cells: pd.DataFrame) -> list[str]:
    rows, peers = [describe(x) for x in cells.itertuples()], [peer["row"] for peer in cells["peers"].explode().dropna()]
    commands = [x.command + f"  # {x.why}" * bool(x.why) for x in cells.itertuples()]
    details = table([row for row in rows if row["median"]], DETAILS)
    plot = f"![Learning curves on {env}](plots/{plot_name(cells['suite'].iloc[0], env)})"
    lines = [f"### {cells['heading'].iloc[0]}", "", plot, "", *table(rows, SCORES)]
    lines += fold("Commands and details", "```sh", *commands, "```", "", *details)
    return lines + (["Beside published scores:", "", *table(peers)] if peers else [])


def aggregate_section(of: pd.DataFrame, scores: dict[str, dict[str, np.ndarray]]) -> list[str]:
    rows, steps = [], of.groupby(["algo", "env"])["steps"].first()
    for algo, by_env in scores.items():
        value, interval = stats.iqm_interval(list(by_env.values()))
        row = {"algorithm": f"`{algo}`", "environments": f"{len(by_env)} of {of[of['ran']]['env'].nunique()}"}
        row["runs"] = str(sum(map(len, by_env.values())))
        row["interquartile mean"] = f"**{fraction(value)}**" + between(interval, fraction)
        row |= {f"P(above `{BASELINE}`)": "–", "on": "–"}
        baseline = scores.get(BASELINE, {}) if algo != BASELINE else {}
        if shared := [env for env in by_env if env in baseline and steps[algo, env] == steps[BASELINE, env]]:
            value, interval = stats.improvement([by_env[env] for env in shared], [baseline[env] for env in shared])
            row[f"P(above `{BASELINE}`)"] = fraction(value) + between(interval, fraction)
            row["on"] = ", ".join(shared)
        rows.append(row)
    return ["Over environments:", "", *table(rows)] if rows else []


def suite_section(title: str, of: pd.DataFrame, scores: dict[str, dict[str, np.ndarray]]) -> list[str]:
    lines = [f"## {title}", "", of["protocol"].iloc[0], "", *aggregate_section(of, scores)]
    has_runs = of["env"].isin(of["env"][of["ran"]])
    for env, cells in of[has_runs].groupby("env", sort=False):
        lines += environment_section(env, cells)
    waiting = of[~has_runs].groupby("label", sort=False)["env"].agg(some)
    named = "; ".join(f"`{label}` on {envs}" for label, envs in waiting.items())
    return lines + [f"No runs yet: {named}.", ""] * bool(named)


def summary(cells: pd.DataFrame) -> list[str]:
    rows = []
    for title, of in cells.groupby("title", sort=False):
        counts = of["runs"].map(len)
        row = {"suite": f"[{title}](#{anchor(title)})", "entries with runs": f"{of['ran'].sum()} of {len(of)}"}
        older = sum((x.runs["code"] != runs.code_hash(x.script.read_text())).sum() for x in of[of["ran"]].itertuples())
        row["runs"] = f"{counts.sum()} of {np.maximum(counts, of['seeds']).sum()}" + f" ({older}†)" * bool(older)
        aimed = of[of["ran"] & of["target"].notna()]
        row["targets met"] = f"{aimed['met'].sum()} of {len(aimed)}" if len(aimed) else "–"
        for source in ("SLM-Lab", "CleanRL", "rl-zoo3"):
            below = [peer["is below"] for peer in of["peers"].explode().dropna() if peer["source"] == source]
            row[f"at or above {source}"] = f"{len(below) - sum(below)} of {len(below)}" if below else "–"
        rows.append(row)
    return table(rows)


def missed_targets(cells: pd.DataFrame) -> list[str]:
    lines = []
    for x in cells[cells["ran"]].itertuples():
        measure = "evaluation" * x.evaluated or "training return"
        missed = [] if x.met else [f"{measure} {form(x.scores.mean())}, target {exact(x.target)}"]
        missed += [peer["short"] for peer in x.peers if peer["is below"]]
        lines += [f"- `{x.label}` on {x.env}: {'; '.join(missed)}. {x.tried}".strip()] * bool(missed)
    return [f"## {BELOW}", "", *lines] if lines else []


def anchor(title: str) -> str:
    """As GitHub makes them."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


def some(names: pd.Series) -> str:
    names = list(names.unique())
    return ", ".join(names if len(names) < 6 else [*names[:3], f"and {len(names) - 3} more"])


def environment(x) -> str:
    return f"[{x.env.rpartition(':')[2]}](/docs/BENCHMARKS.md#{anchor(x.heading)})"


def algorithms(cells: pd.DataFrame) -> list[dict[str, str]]:
    """A row for each script, in the order of algos/README.md, with one score."""
    rows = []
    for stem, adds, envs in re.findall(CHART, (runs.SCRIPTS / "README.md").read_text(), re.M):
        ran = [x for x in cells[cells["ran"]].itertuples() if x.script.stem == stem]
        ran.sort(key=lambda x: TELLING.index(x.env) if x.env in TELLING else len(TELLING))
        found = [(describe(x), environment(x)) for x in ran[:1]]
        scores = [f"{x['training return'].split(' [')[0]} {env}, {x['seeds']} seeds" for x, env in found]
        row = {"file": f"[`{stem}`](/algos/{stem}.py)", "what it adds to the one before": adds, "environments": envs}
        rows.append(row | {"training return": "".join(scores) or "not run yet"})
    return rows


def readme(text: str, cells: pd.DataFrame) -> str:
    """README.md with the table of algorithms between the two comments."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    lines = "\n".join(table(algorithms(cells))).replace("](/", "](")
    return before + begin + "\n" + lines + "\n" + end + after if end else text


def plot_name(suite: str, what: str) -> str:
    return f"{suite}-{re.sub('[^A-Za-z0-9]+', '-', what)}.svg"


def draw_curves(env: str, cells: pd.DataFrame, styles: list[str]) -> bytes:
    lines, learners = [], cells[cells["algo"] != "random_policy"]
    for x in (cells if learners.empty else learners).itertuples():
        curves = x.curves[list(x.runs["seed"])].to_numpy(float).T
        look, minutes = styles.index(x.algo), x.runs["minutes"].median()
        lines.append((x.label, look, x.curves.index, minutes, curves.mean(0), stats.band(curves), x.target))
    return plots.learning_curves(env, lines)


def chosen(args: Args) -> list[suites.Suite]:
    names = args.suites or [*FIRST, *(name for name in suites.suite_names() if name not in [*FIRST, "smoke"])]
    return [suites.load(name) for name in names]


def generate(args: Args) -> tuple[pd.DataFrame, str, dict[str, partial]]:
    """The data; the page; and what draws its plots, by the names of their files."""
    reference = pd.read_csv(results.REFERENCE)
    cells = read_own(args) if args.folder else read_suites(args, reference)
    if cells.empty:
        runs.fail("nothing to report: no finished runs in this folder, or none that --suites and --only leave")
    styles, figures = list(cells["algo"].unique()), {}
    page = Path(__file__).with_name("page.md").read_text()
    lines = ["# Runs", "", OWN, ""] if args.folder else [page, *summary(cells)]
    for title, of in cells.groupby("title", sort=False):
        lines += suite_section(title, of, normalized(of, reference))
        for env, those in of[of["ran"]].groupby("env", sort=False):
            figures[plot_name(of["suite"].iloc[0], env)] = partial(draw_curves, env, those, styles)
    return cells, "\n".join([*lines, *missed_targets(cells)]).rstrip() + "\n", figures


def as_html(text: str, figures: dict[str, partial]) -> str:
    """The page as one file, with its plots and without links to other files."""
    text = re.sub(r"(?<!!)\[([^]]+)\]\((?!#|http)[^)]*\)", r"\1", text)
    body = MarkdownIt("commonmark").enable("table").render(text)
    body = re.sub("<h([23])>(.*)</h", lambda m: f'<h{m[1]} id="{anchor(m[2])}">{m[2]}</h', body)
    for name, draw in figures.items():
        body = body.replace(f"plots/{name}", f"data:image/svg+xml;base64,{base64.b64encode(draw()).decode()}")
    return Path(__file__).with_name("page.html").read_text().replace("BODY", body)


def export(cells: pd.DataFrame, path: Path) -> None:
    """Everything in one tidy table: a row per run and point of its curve."""
    parts = []
    for x in cells[cells["ran"]].itertuples():
        curve = x.curves.rename_axis("step").reset_index().melt("step", var_name="seed", value_name="return")
        parts.append(x.runs.merge(curve.astype({"seed": int}), on="seed").assign(suite=x.suite))
    pd.concat(parts).drop(columns="folder", errors="ignore").to_csv(path, index=False)


def write(texts: dict[Path, str], svgs: dict[Path, partial], is_check: bool) -> None:
    """Write pages and plots and remove other plots; or only name what is out of date, plots by their names."""
    folder = next(iter(texts)).parent / "plots"
    extra = set(folder.glob("*.svg")) - svgs.keys()
    if is_check:
        old = [path for path, text in texts.items() if not path.exists() or path.read_text() != text]
        old += sorted(extra | {path for path in svgs if not path.exists()})
        print("\n".join(f"out of date: {path}" for path in old) or "up to date")
        raise SystemExit(1 if old else 0)
    folder.mkdir(parents=True, exist_ok=True)
    for path, content in [*texts.items(), *svgs.items()]:
        path.write_text(content) if isinstance(content, str) else path.write_bytes(content())
    for path in extra:
        path.unlink()
    print(f"wrote {', '.join(map(str, texts))} and {len(svgs)} plots")


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    is_part, is_page = bool(args.folder or args.suites or args.only), not (args.html or args.export)
    if is_part and is_page and args.out == Args.out:
        runs.fail("this is only a part of docs/BENCHMARKS.md: add --html FILE, --export FILE, or --out FOLDER")
    try:
        if args.collect and is_page and not args.check and not args.folder:
            for suite in chosen(args):
                print("".join(f"{line}\n" for line in results.collect(suite, args.runs_dir, args.results_dir)), end="")
        cells, text, figures = generate(args)
        if args.html:
            args.html.write_text(as_html(text, figures))
        if args.export:
            export(cells, args.export)
    except (OSError, ValueError, ImportError) as error:
        runs.fail(str(error).partition("\n")[0])
    if is_page:
        texts, path = {args.out / "BENCHMARKS.md": text}, args.out.parent / "README.md"
        if path.exists() and not is_part:
            texts[path] = readme(path.read_text(), cells)
        write(texts, {args.out / "plots" / name: draw for name, draw in figures.items()}, args.check)


if __name__ == "__main__":
    main()
