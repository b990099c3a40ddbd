"""Writes docs/BENCHMARKS.md and its plots from benchmark/results/, after collecting the finished runs into it.

In README.md beside docs/ it keeps a short table up to date, between two comments: PPO on every environment with runs.

    python benchmark/report.py                  # collect from runs/, then write page and plots
    python benchmark/report.py --no-collect     # from benchmark/results/ alone
    python benchmark/report.py --check          # writes nothing; exit code 1 if page or plots are not up to date

The page depends on benchmark/results/, the suites, benchmark/reference.csv and, for one mark, the code of the scripts;
the same input gives the same bytes (the plots, with the same version of matplotlib). How to read it, and how to add to
it: docs/benchmarking.md. The suite `smoke` is for tests and is not published.
"""

import math
import re
import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib
import numpy as np
import tyro

from benchmark import collect, plots, stats, suites

ROOT = Path(__file__).resolve().parent.parent
FIRST = "classic", "box2d", "mujoco", "atari-cpu", "atari"  # the order of the suites on the page; others follow
UNPUBLISHED = {"smoke"}
BASELINE = "ppo"  # the algorithm that the others are compared with
KNOWN = "ppo", "a2c_gae", "sac", "dqn", "dqn_per", "reinforce", "sarsa"  # a style for each, whatever else a plot shows
MEASURES = {  # a metric of reference.csv: our column that is nearest to it, and what the page calls it
    "train_ma_100ckpt": ("slm_score", "SLM-Lab's training average"),
    "train_last100": ("final_return", "last 100 training episodes"),
    "eval_deterministic": ("eval_mean", "evaluation, greedy"),
    "eval_stochastic": ("eval_mean", "evaluation, ours greedy, theirs sampled"),
}


@dataclass
class Args:
    collect: bool = True
    """first add the finished runs in --runs-dir to --results-dir"""
    check: bool = False
    """write nothing and collect nothing; say whether page and plots are what --results-dir gives"""
    runs_dir: Path = ROOT / "runs"
    """run folders, one folder per suite"""
    results_dir: Path = ROOT / "benchmark" / "results"
    """the results that are committed"""
    suites_dir: Path = suites.SUITES
    """the suites' TOML files"""
    docs_dir: Path = ROOT / "docs"
    """where BENCHMARKS.md and plots/ are"""


@dataclass
class Cell:
    """An entry of a suite and the runs of it that the page shows."""

    entry: suites.Entry
    rows: list[dict[str, str]]
    curves: dict[str, list[str]]
    links: dict[str, str] = field(default_factory=dict)  # seed: where the run folder is public

    @property
    def algo(self) -> str:
        return re.sub("_(continuous|discrete|atari)$", "", self.entry.script)

    def values(self, column: str) -> np.ndarray:
        """Of the runs that have it."""
        return np.array([float(row[column]) for row in self.rows if row[column]])

    def has_changed(self, row: dict[str, str]) -> bool:
        """Was this run made with code that is not the script's now, nor known to do the same?"""
        return not suites.same_runs(self.entry, row["code"], self.entry.code)

    def curve(self) -> np.ndarray:
        """(seeds, steps)"""
        seeds = [self.curves[row["seed"]] for row in self.rows if row["seed"] in self.curves]
        return np.array([[float(value or "nan") for value in seed] for seed in seeds])

    def distinct(self, form) -> str:
        return ", ".join(sorted({form(row) for row in self.rows}))


@dataclass
class Table:
    """A suite and its cells."""

    suite: suites.Suite
    cells: list[Cell]
    scales: dict[str, tuple[float, float]]  # environment: the scores that become 0 and 1
    is_atari: bool
    hidden: int  # rows of the results that belong to no entry

    def environments(self) -> dict[str, list[Cell]]:
        """Those with runs."""
        found = {}
        for cell in self.cells:
            found.setdefault(cell.entry.env, []).append(cell)
        return {env: cells for env, cells in found.items() if any(cell.rows for cell in cells)}

    def normalised(self) -> dict[str, dict[str, np.ndarray]]:
        """Algorithm -> environment -> scores, for the environments that have a scale."""
        found = {}
        for cell in self.cells:
            if cell.rows and cell.entry.env in self.scales:
                low, high = self.scales[cell.entry.env]
                scores = (cell.values("final_return") - low) / (high - low)
                found.setdefault(cell.algo, {})[cell.entry.env] = scores
        return dict(sorted(found.items(), key=lambda item: number(item[0])))

    @property
    def scale(self) -> str:
        return "human-normalised score" if self.is_atari else "score, random policy 0, target 1"


def number(algo: str) -> tuple[int, str]:
    """The order of algorithms: the known ones first."""
    return (KNOWN.index(algo) if algo in KNOWN else len(KNOWN), algo)


def read_table(suite: suites.Suite, results: Path) -> Table:
    rows, cells, taken = collect.read_rows(results, suite.name), [], 0
    public = {(row["run"], row["started"]): row["url"] for row in collect.read_csv(results / "hub.csv")}
    for entry in suite.entries:
        ours = [row for row in rows if (row["env"], row["script"]) == (entry.env, entry.script)]
        shown = [row for row in ours if (int(row["steps"]), row["flags"]) == (entry.steps, shlex.join(entry.words))]
        names = {row["seed"]: (f"{suite.name}/{entry.name}__{row['seed']}", row["started"]) for row in shown}
        links = {seed: public[name] for seed, name in names.items() if name in public}  # of these runs, not older ones
        cells.append(Cell(entry, shown, collect.read_curves(results, suite.name, entry), links))
        taken += len(shown)
    is_atari = all(entry.env.startswith("ALE/") for entry in suite.entries)
    low = collect.reference_scores("random", "DQN Zoo" if is_atari else "SLM-Lab")
    high = collect.reference_scores("human", "DQN Zoo")
    if not is_atari:
        high = {env: max(e.target for e in suite.entries if e.env == env) for env in {e.env for e in suite.entries}}
    scales = {env: (low[env], high[env]) for env in low if env in high and high[env] > low[env]}
    return Table(suite, cells, scales, is_atari, len(rows) - taken)


# --------------------------------------------------------------------------------------------------------- the page


def form(value: float) -> str:
    """A number of the page: whole from 1000 on, two decimals below 10, a real minus sign."""
    if math.isnan(value):
        return "–"
    value = float(f"{value:.9g}")  # so that a tie is a tie on every processor
    digits = 0 if abs(value) >= 999.5 else 1 if abs(value) >= 9.995 else 2
    text = f"{value:.{digits}f}"
    return text.replace("-", "−") if float(text) else text.removeprefix("-")


def exact(value: float) -> str:
    """A number that somebody has set or published: to two decimals where it has them."""
    return f"{value:.2f}".rstrip("0").rstrip(".").replace("-", "−")


def whole(value: float) -> str:
    return f"{value:,.0f}".replace(",", " ")


def between(interval: np.ndarray) -> str:
    return "" if np.isnan(interval).any() else f" [{form(interval[0])}, {form(interval[1])}]"


def with_interval(values: np.ndarray, bold: bool = False) -> str:
    if not len(values):
        return "–"
    mean = form(values.mean())
    return (f"**{mean}**" if bold else mean) + between(stats.mean_interval(values))


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    lines = [" | ".join(cells) for cells in [head, ["---"] * len(head), *rows]]
    return [f"| {line} |" for line in lines] + [""]


def marks(cell: Cell) -> str:
    """What a reader has to know about these runs."""
    n, changed = len(cell.rows), sum(map(cell.has_changed, cell.rows))
    dirty = sum(row["clean"] == "no" for row in cell.rows)
    counts = {"script changed since": changed, "uncommitted changes": dirty}
    return ", ".join(word if count == n else f"{word} ({count} of {n} runs)" for word, count in counts.items() if count)


def machine(row: dict[str, str]) -> str:
    threads = f"{row['threads']} thread" + ("s" if row["threads"] != "1" else "")
    return f"{row['gpu']} and {row['cpu']}" if row["gpu"] else f"{row['cpu']}, {threads}"


def score_row(cell: Cell) -> list[str]:
    entry, finals = cell.entry, cell.values("final_return")
    seeds = f"{len(cell.rows)} of {entry.seeds}" if len(cell.rows) < entry.seeds else str(len(cell.rows))
    start = [f"[`{entry.script}`](../algos/{entry.script}.py)", whole(entry.steps), seeds]
    if not cell.rows:
        return [*start, "no runs yet", "", "", "", exact(entry.target), "", "", "", "", ""]
    return [
        *start,
        with_interval(finals, bold=True),
        form(np.median(finals)),
        f"{form(finals.min())} … {form(finals.max())}",
        with_interval(cell.values("eval_mean")),
        f"{exact(entry.target)} " + ("met" if finals.mean() >= entry.target else "**not met**"),
        form(np.median(cell.values("minutes"))),
        whole(np.median(cell.values("sps"))),
        cell.distinct(machine),
        cell.distinct(lambda row: f"`{row['commit'][:7]}`" if row["commit"] else "unknown"),
        marks(cell),
    ]


SCORES = [
    *("script", "steps", "seeds", "training return", "median", "worst … best", "evaluation", "target"),
    *("minutes", "steps/s", "machine", "commit", "marks"),
]
SHORT = ["script", "steps", "seeds", "training return", "target", "evaluation", "minutes"]  # what README.md shows


@dataclass
class Peer:
    """A published score beside ours, by the nearest measure."""

    row: dict[str, str]
    cell: Cell
    ours: np.ndarray = field(init=False)

    def __post_init__(self):
        self.ours = self.cell.values(MEASURES[self.row["metric"]][0])

    @property
    def score(self) -> float:
        return float(self.row["score"])

    @property
    def is_below(self) -> bool:
        return bool(self.ours.mean() < self.score)

    @property
    def verdict(self) -> str:
        if not self.is_below:
            return "at or above"
        return "**below**, within our interval" if stats.mean_interval(self.ours)[1] >= self.score else "**below**"

    @property
    def differences(self) -> str:
        """How their protocol differs from ours."""
        row, entry, words = self.row, self.cell.entry, []
        if row["their_env_id"] != entry.env:
            words.append(row["their_env_id"])
        steps = int(row["steps"]) if row["steps"] else None
        if steps != entry.steps:
            words.append(f"{whole(steps)} steps" if steps else "steps not stated")
        words.append({"1": "one run", "": "number of runs not stated"}.get(row["n_seeds"], f"{row['n_seeds']} runs"))
        words += [part for part in row["note"].split("; ") if part != "one run"]
        return "; ".join(words)


def peers(cell: Cell, reference: list[dict[str, str]]) -> list[Peer]:
    """Published scores of this algorithm here; of one project by one measure, the one with the nearest budget."""
    found = {}
    for row in reference:
        if (row["env_id"], row["algo"]) == (cell.entry.env, cell.algo) and row["metric"] in MEASURES:
            gap = abs(math.log(float(row["steps"] or 1e9) / cell.entry.steps))
            slot = row["source"], row["metric"]
            if slot not in found or gap < found[slot][0]:
                found[slot] = gap, Peer(row, cell)
    return [peer for _, peer in found.values() if len(peer.ours)]


def peer_row(peer: Peer) -> list[str]:
    spread = {"std_seeds": " ± {} over runs", "std_episodes": " ± {} over episodes"}
    kind = peer.row["spread_kind"].replace("_avg_over_window", "").replace("_ddof1", "")
    theirs = exact(peer.score) + (spread.get(kind, "").format(form(float(peer.row["spread"] or "nan"))))
    name = f"`{peer.cell.entry.script}`"
    measure = MEASURES[peer.row["metric"]][1]
    return [name, measure, with_interval(peer.ours), theirs, peer.row["source"], peer.verdict, peer.differences]


def command(cell: Cell) -> str:
    """What repeats the first run, and what the entry is for."""
    entry = cell.entry
    words = [f"python algos/{entry.script}.py", f"--env-id {entry.env}", f"--total-timesteps {entry.steps}"]
    return " ".join([*words, *entry.words, "--seed 1"]) + f"  # {' '.join(entry.why.split())}"


def slm_row(cell: Cell, random: dict[str, float]) -> list[str]:
    values = [cell.values(name) for name in ("slm_score", "strength", "efficiency", "stability")]
    means = [x.mean() if len(x) else math.nan for x in values]
    means[2] *= cell.entry.steps
    curve, zero = cell.curve(), random.get(cell.entry.env)
    same = math.nan if zero is None or len(curve) < 2 else stats.consistency(curve, zero)
    shares = ["–" if math.isnan(x) else f"{x:.3f}".replace("-", "−") for x in (means[3], same)]
    return [f"`{cell.entry.script}`", *map(form, means[:3]), *shares]


def environment_section(env: str, cells: list[Cell], of: Table, reference: list[dict], random: dict) -> list[str]:
    ran = [cell for cell in cells if cell.rows]
    name = plot_name(of.suite.name, env)
    lines = [f"### {env}", "", f"![Learning curves on {env}](plots/{name})", ""]
    lines += table(SCORES, [score_row(cell) for cell in cells])
    rows = [peer_row(peer) for cell in ran for peer in peers(cell, reference)]
    if rows:
        head = ["script", "measure", "ours", "published", "by", "ours is", "theirs differs in"]
        lines += ["Beside published scores:", "", *table(head, rows)]
    lines += ["<details><summary>Commands, and SLM-Lab's measures</summary>", ""]
    lines += ["```sh", *(command(cell) for cell in cells), "```", ""]
    for cell in (cell for cell in cells if cell.links):
        runs = " ".join(f"[{seed}]({url})" for seed, url in sorted(cell.links.items(), key=lambda item: int(item[0])))
        lines += [f"Run folders of `{cell.entry.script}`, by seed: {runs}", ""]
    head = ["script", "score", "strength", "efficiency × steps", "stability", "consistency"]
    return lines + table(head, [slm_row(cell, random) for cell in ran]) + ["</details>", ""]


def aggregate_section(of: Table) -> list[str]:
    scores = of.normalised()
    if not scores:
        return []
    rows, total = [], len(of.environments())
    budget = {(cell.algo, cell.entry.env): cell.entry.steps for cell in of.cells}
    for algo, by_env in scores.items():
        value, interval = stats.iqm_interval(list(by_env.values()))
        shared = [env for env in by_env if env in scores.get(BASELINE, {})]
        shared = [env for env in shared if budget[algo, env] == budget[BASELINE, env]]
        cells = [f"`{algo}`", f"{len(by_env)} of {total}", str(sum(map(len, by_env.values())))]
        cells.append(f"**{value:.2f}**" + fractions(interval))
        if algo == BASELINE or not shared:
            cells += ["–", "–"]
        else:
            theirs = [scores[BASELINE][env] for env in shared]
            value, interval = stats.improvement([by_env[env] for env in shared], theirs)
            cells += [f"{value:.2f}" + fractions(interval), ", ".join(shared)]
        rows.append(cells)
    if of.is_atari:
        how = "(score − random) / (human − random), the human and random scores being DQN Zoo's."
    else:
        how = "(score − random) / (target − random): the random policy's score is SLM-Lab's, the target the highest of "
        how += "the environment's entries."
    files = [plot_name(of.suite.name, "iqm"), plot_name(of.suite.name, "profile")]
    return [
        f"Over environments, with training returns on one scale, {how} Rows with different environments cannot be "
        f"ranked by their means; the probability that a run scores above one of `{BASELINE}` is over those that "
        "both learned with the same number of steps.",
        "",
        *table(
            ["algorithm", "environments", "runs", "interquartile mean", f"P(above `{BASELINE}`)", "on"],
            rows,
        ),
        *(f"![{of.suite.title}: {what}](plots/{file})" for what, file in zip(("aggregate", "profile"), files)),
        "",
    ]


def fractions(interval: np.ndarray) -> str:
    return "" if np.isnan(interval).any() else f" [{interval[0]:.2f}, {interval[1]:.2f}]".replace("-", "−")


def falls_short(of: Table, reference: list[dict[str, str]]) -> list[str]:
    lines = []
    for cell in of.cells:
        finals = cell.values("final_return")
        reasons = []
        if len(finals) and finals.mean() < cell.entry.target:
            reasons.append(f"{form(finals.mean())} against the target {exact(cell.entry.target)}")
        for peer in peers(cell, reference):
            if peer.is_below:
                steps = f" after {whole(float(peer.row['steps']))} steps" if peer.row["steps"] else ""
                other = f" on {peer.row['their_env_id']}" if peer.row["their_env_id"] != cell.entry.env else ""
                theirs = f"{peer.row['source']}'s {exact(peer.score)}{other}{steps}"
                reasons.append(f"{form(peer.ours.mean())} against {theirs} ({MEASURES[peer.row['metric']][1]})")
        if reasons:
            tried = cell.entry.tried or "nothing is written down yet."
            lines.append(f"- `{cell.entry.script}` on {cell.entry.env}, {whole(cell.entry.steps)} steps: ")
            lines[-1] += "; ".join(reasons) + f". Tried: {tried}"
    return ["### What falls short", "", *lines, ""] if lines else []


def suite_section(of: Table, reference: list[dict[str, str]], random: dict[str, float]) -> list[str]:
    suite, environments = of.suite, of.environments()
    lines = [f"## {suite.title}", "", suite.protocol, ""]
    lines += aggregate_section(of)
    for env, cells in environments.items():
        lines += environment_section(env, cells, of, reference, random)
    lines += falls_short(of, reference)
    waiting = {}
    for cell in of.cells:
        if cell.entry.env not in environments:
            waiting.setdefault(cell.entry.env, []).append(f"`{cell.entry.script}`")
    by_scripts = {}
    for env, scripts in waiting.items():
        by_scripts.setdefault(", ".join(scripts), []).append(env)
    if waiting:
        lines += [
            "No runs yet:",
            "",
            *(f"- {scripts} on {', '.join(envs)}" for scripts, envs in by_scripts.items()),
            "",
        ]
    if of.hidden:
        lines += [f"Not shown: {of.hidden} runs with steps, flags or an entry that the suite no longer has.", ""]
    what = "To make the runs of this suite that your `runs/` does not hold (in a fresh clone all: it is not in git)"
    return [*lines, f"{what}: `python benchmark/run.py {suite.name}`", ""]


def summary(tables: list[Table], reference: list[dict[str, str]]) -> list[str]:
    rows = []
    for of in tables:
        ran = [cell for cell in of.cells if cell.rows]
        met = sum(cell.values("final_return").mean() >= cell.entry.target for cell in ran)
        runs = sum(len(cell.rows) for cell in ran)
        row = [f"[{of.suite.title}](#{anchor(of.suite.title)})", f"{len(ran)} of {len(of.cells)}"]
        row += [f"{runs} of {sum(max(cell.entry.seeds, len(cell.rows)) for cell in of.cells)}"]
        row += [f"{met} of {len(ran)}" if ran else "–"]
        for source in ("SLM-Lab", "CleanRL", "rl-zoo3"):
            found = [peer for cell in ran for peer in peers(cell, reference) if peer.row["source"] == source]
            row.append(f"{sum(not peer.is_below for peer in found)} of {len(found)}" if found else "–")
        rows.append(row)
    head = ["suite", "entries with runs", "runs", "targets met", "at or above SLM-Lab", "CleanRL", "rl-zoo3"]
    return table(head, rows) if rows else ["No suites yet.", ""]


def anchor(title: str) -> str:
    """As GitHub makes them."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


HEAD = """\
# Benchmarks

Generated by `python benchmark/report.py` from [`benchmark/results/`](../benchmark/results); an edit by hand would be
lost. [How to read this page, and how to add to it](benchmarking.md).

*Training return*: the mean of a run's last 100 training episodes, exploring as the agent does, then the mean over
seeds with its 95 % bootstrap interval, the median, the worst and the best seed. *Evaluation*: greedy, after training,
in the same form. *Target*: what the mean training return has to reach. *Minutes* and *steps/s*: medians over seeds of
training alone, beside whatever else the machine was doing. *Script changed since*: its code, texts and messages
aside, is not what it was in these runs, and no repeated run has shown yet that this leaves the numbers as they are.
*Uncommitted changes*: the commit alone does not give the code of these runs.

Published scores stand beside the measure of ours that is nearest to theirs; they are theirs, not rerun here, and the
last column says how their protocol differs, as far as they state it. Every score below a target or a published score
is listed under *What falls short*. Commands begin with `python`: where uv runs the project, that is `uv run python`.
"""


def page(tables: list[Table]) -> str:
    reference, random = collect.read_reference(), collect.reference_scores("random", "SLM-Lab")
    lines = [HEAD, *summary(tables, reference)]
    for of in tables:
        lines += suite_section(of, reference, random)
    return "\n".join(lines).rstrip() + "\n"


BEGIN, END = "<!-- written by benchmark/report.py -->\n", "<!-- end of what report.py writes -->\n"


def short_table(tables: list[Table]) -> str:
    """The baseline algorithm on every environment that has runs of it."""
    cells = [cell for of in tables for cell in of.cells if cell.rows and cell.algo == BASELINE]
    head = SHORT + ["marks"] * any(map(marks, cells))
    rows = []
    for cell in cells:
        row, env = dict(zip(SCORES, score_row(cell))), cell.entry.env
        rows.append([f"[{env}](docs/BENCHMARKS.md#{anchor(env)})", *(row[name].replace("../", "") for name in head)])
    return "\n".join(table(["environment", *head], rows))


def readme(text: str, tables: list[Table]) -> str:
    """README.md with what stands between the two comments written anew; without them as it is."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    return before + begin + "\n" + short_table(tables) + "\n" + end + after if end else text


# -------------------------------------------------------------------------------------------------------- the plots


def plot_name(suite: str, what: str) -> str:
    return f"{suite}-{re.sub('[^A-Za-z0-9]+', '-', what)}.svg"


def draw(of: Table, styles: dict[str, int]) -> dict[str, bytes]:
    """File name -> SVG."""
    drawn = {}
    for env, cells in of.environments().items():
        lines = []
        for cell in cells:
            curve = cell.curve()
            if len(curve):
                steps = np.array(cell.curves["step"], dtype=float)
                lines.append((cell.entry.script, styles[cell.algo], steps, curve.mean(0), stats.band(curve)))
        if lines:
            target = max(cell.entry.target for cell in cells)
            drawn[plot_name(of.suite.name, env)] = plots.learning_curves(env, lines, target)
    scores, total = of.normalised(), len(of.environments())
    if scores:
        everything = np.concatenate([x for by_env in scores.values() for x in by_env.values()])
        low, high = np.clip(everything.min(), -0.5, 0), np.clip(everything.max() * 1.02, 1.2, 4)
        taus = plots.tidy(np.linspace(low, high, 181))
        names = {algo: f"{algo}, {len(by_env)} of {total}" for algo, by_env in scores.items()}
        strata = {algo: list(by_env.values()) for algo, by_env in scores.items()}
        lines = [(names[a], styles[a], taus, *stats.profile(x, taus)) for a, x in strata.items()]
        profile = plots.profiles(
            of.suite.title, of.scale, taus, [(n, s, share, band) for n, s, _, share, band in lines]
        )
        bars = plots.aggregates(
            of.suite.title, of.scale, [(names[a], styles[a], *stats.iqm_interval(x)) for a, x in strata.items()]
        )
        drawn |= {plot_name(of.suite.name, "profile"): profile, plot_name(of.suite.name, "iqm"): bars}
    return drawn


# ---------------------------------------------------------------------------------------------------------- the run


def read_suites(folder: Path) -> list[suites.Suite]:
    paths = {path.stem: path for path in sorted(folder.glob("*.toml")) if path.stem not in UNPUBLISHED}
    names = [name for name in FIRST if name in paths] + [name for name in paths if name not in FIRST]
    return [suites.load(paths[name]) for name in names]


def generate(args: Args) -> dict[Path, bytes]:
    """Every generated file and its content."""
    tables = [read_table(suite, args.results_dir) for suite in read_suites(args.suites_dir)]
    algos = sorted({cell.algo for of in tables for cell in of.cells} | set(KNOWN), key=number)
    styles = {algo: i for i, algo in enumerate(algos)}
    files = {args.docs_dir / "BENCHMARKS.md": page(tables).encode()}
    if (path := args.docs_dir.parent / "README.md").exists():
        files[path] = readme(path.read_text(), tables).encode()
    for of in tables:
        files |= {args.docs_dir / "plots" / name: content for name, content in draw(of, styles).items()}
    return files


def differences(files: dict[Path, bytes], plots_dir: Path) -> list[str]:
    """What on disk is not what it should be. Plots by another matplotlib are not compared."""
    lines = []
    for path, content in files.items():
        old = path.read_bytes() if path.exists() else None
        made_with = re.search(rb"Matplotlib v(\S+?),", old or b"")
        if old is None:
            lines.append(f"{path} is missing")
        elif old != content and made_with and made_with[1].decode() != matplotlib.__version__:
            print(f"not compared: {path.name}, by matplotlib {made_with[1].decode()}", file=sys.stderr)
        elif old != content:
            lines.append(f"{path} is not up to date")
    return lines + [f"{path} is left over" for path in sorted(plots_dir.glob("*.svg")) if path not in files]


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    plots_dir = args.docs_dir / "plots"
    try:
        if args.collect and not args.check:
            random = collect.reference_scores("random", "SLM-Lab")
            for suite in read_suites(args.suites_dir):
                for line in collect.collect(suite, args.runs_dir, args.results_dir, random):
                    print(f"left out: {line}", file=sys.stderr)
        files = generate(args)
    except (suites.SuiteError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    if args.check:
        lines = differences(files, plots_dir)
        print("\n".join([*lines, "run: python benchmark/report.py --no-collect"] if lines else ["up to date"]))
        raise SystemExit(1 if lines else 0)
    for path, content in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    for path in plots_dir.glob("*.svg"):
        if path not in files:
            path.unlink()
    print(f"wrote {args.docs_dir / 'BENCHMARKS.md'} and {sum(path.suffix == '.svg' for path in files)} plots")


if __name__ == "__main__":
    main()
