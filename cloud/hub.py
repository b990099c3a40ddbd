"""Run folders to and from the Hugging Face Hub.

    export HF_TOKEN=hf_...                    # or once: hf auth login
    export FOLIO_HUB=you/folio-dev            # the development repository; --repo names another
    python cloud/hub.py push runs/mujoco/Ant-v5__ppo_continuous__1
    python cloud/hub.py push --all            # every finished run below runs/ that is not there yet; asks first
    python cloud/hub.py list mujoco
    python cloud/hub.py pull 'HalfCheetah*'   # by suite, script, environment, entry or name, as run.py's --only
    python cloud/hub.py verify                # is what docs/BENCHMARKS.md links to still what was graduated?

A run's name is its folder's path below runs/, such as mujoco/Ant-v5__ppo_continuous__1, here and on the Hub. All runs
are in one model repository, a folder each:

    finished    on the branch main: the run folder as it is, but for checkpoint.pt, of which a finished run has no use
    unfinished  on a branch of its own, run-mujoco--Ant-v5__ppo_continuous__1, with the checkpoint; the branch, and with
                it every old checkpoint, goes when the run is finished

So jobs that push at the same time do not meet, and what happens on a run's branch can be told from its head: a push
that names the head it knows is refused when another job has pushed since (cloud/job.py relies on it). Each folder has
also a README.md (the card: command, scores, versions, how to load it), curve.png, and SHA256SUMS of all other files,
which `pull` checks. The same content gives the same SHA256SUMS.

Results graduate from the development repository to the public one by benchmark/graduate.py, which knows the suites. It
records the public address and the hash of SHA256SUMS of each run in benchmark/results/hub.csv; `verify` checks that
what the addresses give still has these hashes.

Nothing that is pulled is run or unpickled: files of other kinds than a run folder's are not taken, the copy of the
script is there to be read, and checkpoint.pt is for the scripts, which load it with weights_only=True. When a push
fails, the folder is as it was: push it again. What was uploaded before counts.
"""

import csv
import hashlib
import io
import json
import math
import os
import re
import shlex
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

import httpx2
import tyro
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    ModelCardData,
    constants,
    get_token,
    set_client_factory,
)
from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError
from huggingface_hub.repocard_data import EvalResult
from huggingface_hub.utils import disable_progress_bars, logging

ROOT = Path(__file__).resolve().parent.parent
MAIN, CLAIM = "main", "claim.json"
MADE = SUMS, CARD, CURVE = "SHA256SUMS", "README.md", "curve.png"  # what a push adds to a run folder
NAME = re.compile(r"(?!.*(--|\.\.))[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)*(?<![./-])", re.ASCII)
RULE = "cannot be a run's name: letters, digits, _ . and single - in parts with / between them"
KINDS = r"[\w-][\w.-]*\.(json|csv|pt|safetensors|mp4|png)|events\.out\.tfevents\.[\w.-]+"
SCRIPT = r"[\w-][\w.-]*\.py"  # a copy of what made the run
DATA = re.compile(rf"([\w-][\w.-]*/)*({KINDS})|{SCRIPT}", re.ASCII)
ASIDE = re.compile(r"\.(old-\d+|push|pull)(/|$)")  # folders that are not runs any more, or not yet
SILENCE = 300.0  # seconds after which a Hub that does not answer is one that cannot be reached
ERRORS = (httpx2.HTTPError, OSError, ValueError, RuntimeError)  # what a Hub that is not well, or hf_xet, may raise


@dataclass
class Hub:
    """A repository, and the client that reaches it."""

    repo: str
    api: HfApi = field(default_factory=HfApi)


@dataclass
class Remote:
    """A run on the Hub."""

    name: str
    revision: str  # the commit that has these files
    files: dict[str, int]  # path in the run folder: size

    @property
    def finished(self) -> bool:
        return "result.json" in self.files


def fail(message: str, code: int = 2) -> None:
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(code)


def reason(error: Exception) -> str:
    """What went wrong, in a line that does not show the token."""
    response = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    said = " ".join(str(getattr(error, "server_message", None) or error or repr(error)).split())
    if isinstance(error, RepositoryNotFoundError):
        said = "the Hub has no such repository, or does not show it to this token"
    elif status == 401:
        said = f"the Hub refuses the token: {said}"
    elif status:
        said = f"the Hub answers {status}: {said}"
    elif isinstance(error, httpx2.HTTPError):
        said = f"the Hub cannot be reached: {said}"
    token = get_token()
    return (said.replace(token, "***") if token else said)[:300]


# ------------------------------------------------------------------------------------------------- what is where


def is_name(name: str) -> bool:
    return bool(NAME.fullmatch(name)) and len(name) <= 150


def check_name(name: str) -> str:
    if not is_name(name):
        fail(f"{name!r} {RULE}")
    return name


def branch_of(name: str) -> str:
    return "run-" + name.replace("/", "--")


def open_hub(repo: str | None, variable: str = "FOLIO_HUB") -> Hub:
    repo = repo or os.environ.get(variable)
    if not repo or not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        wrong = f"{repo!r} is no repository" if repo else "which repository"
        fail(f"{wrong}: --repo or {variable} names it, such as you/folio-dev")
    set_up_client()
    return Hub(repo)


def set_up_client() -> None:
    """No bars and warnings, what matters of them is said in a line; and no waiting for ever, which is its default."""
    disable_progress_bars()
    logging.set_verbosity_error()
    warnings.filterwarnings("ignore", "Not enough free disk space")
    set_client_factory(lambda: httpx2.Client(follow_redirects=True, timeout=SILENCE))


def create(hub: Hub, private: bool) -> None:
    """The repository, if it is not there."""
    if not hub.api.repo_exists(hub.repo):
        hub.api.create_repo(hub.repo, private=private, exist_ok=True)


def heads(hub: Hub) -> dict[str, str]:
    """The newest commit of each branch; main is one of them."""
    found = {branch.name: branch.target_commit for branch in hub.api.list_repo_refs(hub.repo).branches}
    if MAIN not in found:
        raise RuntimeError("it has no branch main")
    return found


def tree(hub: Hub, name: str, revision: str) -> dict[str, int]:
    """The files of a run at a revision and their sizes; empty if it is not there."""
    try:
        entries = list(hub.api.list_repo_tree(hub.repo, path_in_repo=name, recursive=True, revision=revision))
    except EntryNotFoundError:
        return {}
    return {x.path.removeprefix(f"{name}/"): x.size for x in entries if hasattr(x, "size")}


def find(hub: Hub, name: str) -> tuple[Remote | None, Remote | None]:
    """The run as it goes on and as it was finished, as far as the Hub has them."""
    head = heads(hub)
    running = finished = None
    if revision := head.get(branch_of(name)):
        running = Remote(name, revision, tree(hub, name, revision))
    if files := tree(hub, name, head[MAIN]):
        finished = Remote(name, head[MAIN], files)
    return running, finished


def find_all(hub: Hub) -> list[Remote]:
    """Every run: finished ones, and unfinished ones whose branch has a state of them."""
    head = heads(hub)
    entries = hub.api.list_repo_tree(hub.repo, recursive=True, revision=head[MAIN])
    sizes = {Path(entry.path): entry.size for entry in entries if hasattr(entry, "size")}
    names = {path.parent for path in sizes if path.name == "result.json" and NAME.fullmatch(str(path.parent))}
    runs = {str(name): Remote(str(name), head[MAIN], {}) for name in names}
    for path, size in sizes.items():
        for name in names.intersection(path.parents):
            runs[str(name)].files[str(path.relative_to(name))] = size
    for branch, revision in head.items():
        name = branch.removeprefix("run-").replace("--", "/")
        if branch.startswith("run-") and NAME.fullmatch(name) and name not in runs:
            if "args.json" in (files := tree(hub, name, revision)):
                runs[name] = Remote(name, revision, files)
    return [runs[name] for name in sorted(runs)]


def fits(name: str, patterns: tuple[str, ...]) -> bool:
    """Whether name, suite, folder, entry, environment or script fits one of the patterns."""
    suite, _, folder = name.rpartition("/")
    words = {name, suite, folder, folder.rpartition("__")[0], *folder.split("__")[:2]}
    return not patterns or any(fnmatchcase(word, pattern) for word in words for pattern in patterns)


# ---------------------------------------------------------------------------------------------------- there


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sums_of(files: dict[str, Path]) -> str:
    """The content of SHA256SUMS, as `sha256sum -c` reads it."""
    return "".join(f"{sha256(files[path])}  {path}\n" for path in sorted(files) if path not in MADE)


@contextmanager
def snapshot(folder: Path, name: str, repo: str) -> Iterator[dict[str, Path]]:
    """{path in the run folder: file}: what is to be pushed, in a folder beside it that nobody else writes to.

    Of a run that goes on it is a state that can be resumed: the checkpoint comes first, and logs only grow, so that
    they have all the rows that the checkpoint counts on.
    """
    stage = folder.with_name(folder.name + ".push")
    shutil.rmtree(stage, ignore_errors=True)
    paths = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    paths = {str(path.relative_to(folder)): path for path in paths}
    finished, skipped = "result.json" in paths, {*MADE, CLAIM}
    names = [p for p in paths if DATA.fullmatch(p) and p not in skipped and not (finished and p == "checkpoint.pt")]
    try:
        files = {path: stage / path for path in sorted(names, key=lambda path: path != "checkpoint.pt")}
        for path, aside in files.items():
            aside.parent.mkdir(parents=True, exist_ok=True)
            try:
                if aside.suffix not in (".pt", ".safetensors"):  # these are replaced as a whole, the others may grow
                    raise OSError
                os.link(paths[path], aside)
            except OSError:
                shutil.copy2(paths[path], aside)
        if "args.json" not in files:
            raise ValueError(f"{folder} is not a run folder: it has no args.json")
        (stage / SUMS).write_text(sums_of(files))
        try:
            draw_curve(files.get("episodes.csv"), stage / CURVE)
            (stage / CARD).write_text(card(name, repo, files))
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{folder} has a file that is not a run folder's: {error!r}") from None
        yield files | {made: stage / made for made in MADE if (stage / made).exists()}
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def push(hub: Hub, folder: Path, name: str, parent: str | None = None) -> Remote:
    """Make the Hub's copy of a run what the folder is now, in one commit.

    With `parent`, only if the run's branch is still at that commit (otherwise an HfHubHTTPError with status 412).
    Without, whatever is there is replaced, and with it the claim of a job, which then ends.
    """
    with snapshot(folder, name, hub.repo) as files:
        finished, branch = "result.json" in files, branch_of(name)
        if not finished and parent is None:
            hub.api.create_branch(hub.repo, branch=branch, exist_ok=True)
        target = MAIN if finished else branch
        gone = tree(hub, name, target).keys() - files.keys() - ({CLAIM} if parent else set())
        operations = [CommitOperationDelete(f"{name}/{path}") for path in gone]
        operations += [CommitOperationAdd(f"{name}/{path}", file) for path, file in files.items()]
        done = hub.api.create_commit(
            hub.repo,
            operations,
            commit_message=f"{name}: {'finished' if finished else 'goes on'}",
            revision=target,
            parent_commit=None if finished else parent,
        )
    if finished and branch in heads(hub):
        with suppress(*ERRORS):  # the run is there; a branch that stays in spite of all costs no more than its room
            hub.api.delete_branch(hub.repo, branch=branch)
    return Remote(name, done.oid, dict.fromkeys(files, 0))


# ------------------------------------------------------------------------------------------------------- the card


def draw_curve(episodes: Path | None, target: Path) -> None:
    """The trailing mean of 100 training episodes over steps; nothing if no episode has ended."""
    rows = list(csv.DictReader(episodes.open(newline=""))) if episodes else []
    rows = [row for row in rows if None not in row.values()]
    if not rows:
        return
    from matplotlib.figure import Figure  # half a second that most commands do not need

    returns, total, means = [float(row["return"]) for row in rows], 0.0, []
    for i, value in enumerate(returns):
        total += value - (returns[i - 100] if i >= 100 else 0)
        means.append(total / min(i + 1, 100))
    every = math.ceil(len(rows) / 1000)
    figure = Figure(figsize=(6.4, 3.2), layout="constrained")
    axes = figure.subplots()
    axes.plot([int(row["step"]) for row in rows][::every], means[::every])
    axes.set(xlabel="environment steps", ylabel="return, mean of 100 episodes")
    figure.savefig(target, dpi=100, metadata={"Software": None})


def card(name: str, repo: str, files: dict[str, Path]) -> str:
    """README.md of a run: what it is, the command, scores, curve, film, versions, how to load it."""
    described = json.loads(files["args.json"].read_text())
    result = json.loads(files["result.json"].read_text()) if "result.json" in files else {}
    args, script = described.get("args", {}), next((path for path in files if path.endswith(".py")), "?")
    algo, env, seed = script.removesuffix(".py"), str(args.get("env_id", "?")), args.get("seed")
    about = {"library_name": "folio", "license": "mit", "tags": ["reinforcement-learning", algo, env]}
    if result.get("eval_return_mean") is not None:
        kind = {"task_type": "reinforcement-learning", "dataset_type": env, "dataset_name": env}
        score = EvalResult(metric_type="mean_reward", metric_value=round(result["eval_return_mean"], 2), **kind)
        about |= {"model_name": algo, "eval_results": [score]}

    rows = []
    if result:
        rows.append(("training return, mean of the last 100 episodes", number(result.get("final_return"))))
        spread = f"{number(result.get('eval_return_mean'))} ± {number(result.get('eval_return_std'))}"
        rows.append((f"evaluation, greedy, {result.get('eval_episodes')} episodes", spread))
        rows.append(("environment steps", result.get("steps")))
        rows.append(("seconds of training; steps a second", f"{result.get('seconds')}; {result.get('sps')}"))
    commit, versions = described.get("commit") or "unknown", described.get("versions") or {}
    rows.append(("commit", commit.replace("-dirty", ", with uncommitted changes")))
    rows.append(("script", f"[{script}]({script})"))
    rows += [(key, described.get(key)) for key in ("cpu", "gpu", "started")]
    rows += [(key, versions.get(key)) for key in ("torch", "gymnasium", "mujoco", "ale-py", "numpy")]
    table = "\n".join(f"| {key} | {value} |" for key, value in rows if value is not None)
    films = [f"[film: {path}]({path})" for path in files if path.endswith(".mp4")]
    unfinished = "" if result else "\nThis run is not finished: below is its state at a checkpoint.\n"
    curve = "\n![Learning curve](curve.png)\n" if files["args.json"].with_name(CURVE).exists() else ""
    load = f"""hf download {repo} --include "{name}/*" --local-dir runs    # or: python cloud/hub.py pull {name}
python algos/{script} --evaluate runs/{name} --video"""
    return f"""---
{ModelCardData(**about).to_yaml()}
---

# {algo} on {env}, seed {seed}

An agent trained by `algos/{script}` of Folio, deep reinforcement learning in one file per algorithm.
{unfinished}{curve}
| | |
|---|---|
{table}

{" ".join(films)}

## The command

```sh
python {shlex.join(described.get("command", "?"))}
```

## Load it

In a clone of Folio:

```sh
{load}
```

Weights and normalisation statistics alone: `safetensors.torch.load_file("agent.safetensors")`. `episodes.csv` has every
training episode, and `sha256sum -c SHA256SUMS` checks all files.
"""


def number(value) -> str:
    return "none" if value is None else f"{value:.1f}"


# ------------------------------------------------------------------------------------------------------- and back


def download(hub: Hub, run: Remote, path: str, into: Path) -> Path:
    """One file of a run."""
    return Path(hub.api.hf_hub_download(hub.repo, f"{run.name}/{path}", revision=run.revision, local_dir=into))


def read(hub: Hub, run: Remote, path: str) -> str:
    with tempfile.TemporaryDirectory() as aside:
        return download(hub, run, path, Path(aside)).read_text()


def fetch(hub: Hub, run: Remote, folder: Path, without: tuple[str, ...] = ()) -> str:
    """Download a run, check it, and only then put it into its place; returns the sha256 of its SHA256SUMS.

    What is in that place is moved aside, to *.old-1. A download that was interrupted goes on where it was.
    """
    stage = folder.with_name(folder.name + ".pull")
    known = [path for path in run.files if DATA.fullmatch(path) and path != CLAIM and path not in without]
    wanted = {*known, SUMS, CARD} & run.files.keys()
    for path in wanted:
        download(hub, run, path, stage)
    content = stage / run.name
    for path in content.rglob("*"):  # what an interrupted download of another state has left
        if path.is_file() and path.relative_to(content).as_posix() not in wanted:
            path.unlink()
    check_sums(content, run.name, without)
    move_aside(folder)
    content.rename(folder)
    shutil.rmtree(stage)
    return sha256(folder / SUMS)


def glance(hub: Hub, run: Remote, folder: Path) -> None:
    """What is needed to see how an unfinished run gets on: args.json, the script and episodes.csv."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".") as aside:
        for path in (path for path in run.files if re.fullmatch(rf"args\.json|episodes\.csv|{SCRIPT}", path)):
            download(hub, run, path, Path(aside)).replace(folder / path)


def move_aside(folder: Path) -> None:
    """Make way for a new folder of this name; an empty one goes."""
    if folder.exists() and not any(folder.iterdir()):
        folder.rmdir()
    elif folder.exists():
        old = (folder.with_name(f"{folder.name}.old-{i}") for i in range(1, 10**6))
        folder.rename(next(path for path in old if not path.exists()))


def check_sums(folder: Path, name: str, without: tuple[str, ...] = ()) -> None:
    """A ValueError unless the folder has the files of its SHA256SUMS and no other data."""
    try:
        lines = [line.split("  ", 1) for line in (folder / SUMS).read_text().splitlines()]
        expected = {path: digest for digest, path in lines if path not in without}
    except (OSError, ValueError):
        raise ValueError(f"{name} has no SHA256SUMS that can be read: it was not pushed by cloud/hub.py") from None
    there = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} - {*MADE}
    wrong = sorted(there ^ expected.keys())
    wrong += sorted(path for path in there & expected.keys() if sha256(folder / path) != expected[path])
    if wrong:
        raise ValueError(f"{name}: {wrong[0]} is not what SHA256SUMS says")


# ---------------------------------------------------------------------------------------------------- graduating

RECORD = "run", "started", "url", "sums"  # columns of benchmark/results/hub.csv
LINK = re.compile(r"\((https?://[^\s()]+/tree/[0-9a-f]{40}/[^\s()]+)\)")


def graduate(
    source: Hub, target: Hub, wanted: dict[str, dict], index: Callable[[Iterable[str]], str]
) -> tuple[dict[str, dict], list[str]]:
    """Copy finished runs to the public repository, all in one commit, with index(names of these) as its page.

    `wanted` says of each run, by name, what its args.json and result.json have to say, so that what becomes public is
    what the caller has checked. Returns a record of each run that is there now, and a line for each that is not.
    """
    records, lines, files = {}, [], {}
    head = heads(source)[MAIN]
    with tempfile.TemporaryDirectory(prefix="folio-") as aside:
        for name, expected in wanted.items():
            run = Remote(name, head, tree(source, name, head))
            if not run.finished:
                lines.append(f"{name}: {source.repo} does not have it finished; `cloud/hub.py push` takes it there")
                continue
            try:
                folder = Path(aside) / "runs" / name
                folder.parent.mkdir(parents=True, exist_ok=True)
                sums = fetch(source, run, folder)
                content = json.loads((folder / "args.json").read_text()) | json.loads(
                    (folder / "result.json").read_text()
                )
                if not content["commit"] or content["commit"].endswith("-dirty"):
                    raise ValueError(f"{name} was not made from a clean commit")
                for key, value in expected.items():
                    if content.get(key) != value:
                        raise ValueError(f"{name}: its {key} is {content.get(key)}, not {value} as in the results")
            except (ValueError, KeyError) as error:
                lines.append(str(error) if isinstance(error, ValueError) else f"{name}: {error!r}")
                continue
            records[name] = {"run": name, "started": content["started"], "sums": sums}
            files |= {f"{name}/{p.relative_to(folder)}": p for p in folder.rglob("*") if p.is_file()}
        if not records:
            return {}, lines
        create(target, private=False)
        public = heads(target)[MAIN]
        there = {f"{name}/{path}" for name in records for path in tree(target, name, public)}
        operations = [CommitOperationDelete(path) for path in there - files.keys()]
        operations += [CommitOperationAdd(path, file) for path, file in sorted(files.items())]
        operations += [CommitOperationAdd(CARD, index(records).encode())]
        done = target.api.create_commit(target.repo, operations, commit_message=f"{len(records)} runs")
    for name, record in records.items():
        record["url"] = f"{target.api.endpoint}/{target.repo}/tree/{done.oid}/{name}"
    return records, lines


def read_record(path: Path) -> dict[str, dict]:
    """benchmark/results/hub.csv by name of the run."""
    return {row["run"]: row for row in csv.DictReader(path.open(newline=""))} if path.exists() else {}


def write_record(path: Path, record: dict[str, dict]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, RECORD, lineterminator="\n")
    writer.writeheader()
    writer.writerows(record[name] for name in sorted(record))
    path.with_name(path.name + ".tmp").write_text(text.getvalue())
    path.with_name(path.name + ".tmp").replace(path)


def check_link(url: str, sums: str) -> str | None:
    """What is wrong with a graduated run, or None."""
    address, _, name = url.partition("/tree/")
    revision, _, name = name.partition("/")
    endpoint, owner, repo = address.rsplit("/", 2)
    if endpoint != constants.ENDPOINT:
        return f"is not on {constants.ENDPOINT}"
    if not NAME.fullmatch(name):
        return "is not the address of a run"
    hub = Hub(f"{owner}/{repo}")
    try:
        run = Remote(name, revision, tree(hub, name, revision))
        with tempfile.TemporaryDirectory(prefix="folio-") as aside:
            if not run.finished:
                return "has no finished run"
            (Path(aside) / name).parent.mkdir(parents=True, exist_ok=True)
            if fetch(hub, run, Path(aside) / name) != sums:
                return "has other content than the one that was recorded"
    except ERRORS as error:
        return f"cannot be checked: {reason(error)}"
    return None


# --------------------------------------------------------------------------------------------------- the commands


@dataclass
class Push:
    """run folders to the Hub"""

    folders: tyro.conf.Positional[tuple[Path, ...]] = ()
    """run folders, finished or not"""
    all: bool = False
    """every finished run below --runs-dir that is not there yet"""
    yes: bool = False
    """do not ask"""
    force: bool = False
    """replace the state of an unfinished run that is on the Hub; a job that is making it ends"""
    repo: str | None = None
    """the repository; by default that in FOLIO_HUB"""
    runs_dir: Path = ROOT / "runs"
    """a run's name is its folder's path below this one"""


@dataclass
class Pull:
    """runs from the Hub"""

    patterns: tyro.conf.Positional[tuple[str, ...]]
    """suites, scripts, environments, entries or names; * stands for anything"""
    repo: str | None = None
    """the repository; by default that in FOLIO_HUB"""
    runs_dir: Path = ROOT / "runs"
    """where the run folders come to lie"""


@dataclass
class List:
    """what is on the Hub"""

    patterns: tyro.conf.Positional[tuple[str, ...]] = ()
    """suites, scripts, environments, entries or names; * stands for anything"""
    repo: str | None = None
    """the repository; by default that in FOLIO_HUB"""


@dataclass
class Verify:
    """check that what the page links to exists and has the recorded content"""

    page: Path = ROOT / "docs" / "BENCHMARKS.md"
    """the page with the links"""
    record: Path = ROOT / "benchmark" / "results" / "hub.csv"
    """what was graduated"""


def size(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"


def run_push(args: Push) -> None:
    if bool(args.folders) == args.all:
        fail("name run folders, or --all")
    runs_dir, folders = args.runs_dir.resolve(), [folder.resolve() for folder in args.folders]
    if args.all:
        if not runs_dir.is_dir():
            fail(f"there is no folder {runs_dir}")
        folders = sorted(path.parent for path in runs_dir.rglob("result.json"))
        folders = [x for x in folders if not ASIDE.search(str(x)) and (x / "args.json").exists()]
        unnamed = [x for x in folders if not is_name(x.relative_to(runs_dir).as_posix())]
        folders = [x for x in folders if x not in unnamed]
        for folder in unnamed:
            print(f"left out: {folder}: {RULE}", file=sys.stderr)
    for folder in folders:
        if not folder.is_dir():
            fail(f"there is no folder {folder}")
        if not (folder / "args.json").is_file():
            fail(f"{folder} is not a run folder: it has no args.json")
        if not folder.is_relative_to(runs_dir) or folder == runs_dir:
            parent = shlex.quote(str(folder.parent))
            fail(f"{folder} is not below {runs_dir}; with --runs-dir {parent} the run's name is {folder.name}")
        check_name(folder.relative_to(runs_dir).as_posix())
    hub = open_hub(args.repo)
    try:
        there = heads(hub) if hub.api.repo_exists(hub.repo) else {}
        if args.all:
            folders = [folder for folder in folders if not (there and is_there(hub, folder, runs_dir, there[MAIN]))]
            files = [path for x in folders for path in x.rglob("*") if path.is_file() and path.name != "checkpoint.pt"]
            print(f"{len(folders)} finished runs to push to {hub.repo}, {size(sum(p.stat().st_size for p in files))}")
            if folders and not args.yes and not agreed():
                raise SystemExit(1)
        create(hub, private=True)
        for folder in folders:
            name = folder.relative_to(runs_dir).as_posix()
            if not (folder / "result.json").exists() and branch_of(name) in there and not args.force:
                fail(f"{hub.repo} has a state of {name}, maybe of a job that is making it; --force replaces it")
            push(hub, folder, name)
            print(f"pushed {name}: {hub.api.endpoint}/{hub.repo}", flush=True)
    except KeyboardInterrupt:
        fail("interrupted; nothing here has changed, and the same command goes on", code=130)
    except ERRORS as error:
        rest = shlex.join(["python", *sys.argv])
        fail(f"{hub.repo}: {reason(error)}. Nothing here has changed; push it later: {rest}", code=1)


def is_there(hub: Hub, folder: Path, runs_dir: Path, revision: str) -> bool:
    """Whether the Hub has a run with exactly these files."""
    name = folder.relative_to(runs_dir).as_posix()
    run = Remote(name, revision, tree(hub, name, revision))
    if SUMS not in run.files:
        return False
    with tempfile.TemporaryDirectory() as aside, snapshot(folder, name, hub.repo) as files:
        return download(hub, run, SUMS, Path(aside)).read_bytes() == files[SUMS].read_bytes()


def agreed() -> bool:
    if not sys.stdin.isatty():
        fail("this needs a yes: --yes gives it")
    return input("Go on? [y/N] ").strip().lower() in ("y", "yes")


def run_pull(args: Pull) -> None:
    hub = open_hub(args.repo)
    if not args.patterns:
        fail("name what to pull: suites, scripts, environments, entries or names; * stands for anything")

    def one(run: Remote) -> str:
        folder = args.runs_dir / run.name
        if (folder / "result.json").exists():
            return f"is there      {run.name}"
        if not run.finished and (folder / "args.json").exists():
            return f"left alone    {run.name}: neither here nor there it is finished; move {folder} away to pull it"
        folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            fetch(hub, run, folder)
        except ValueError as error:  # of this run's content; the others may be well
            return f"wrong         {error}"
        return f"{'pulled' if run.finished else 'unfinished':13} {run.name}"

    try:
        runs = [run for run in find_all(hub) if fits(run.name, args.patterns)]
        if not runs:
            fail(f"{hub.repo} has no run that fits {shlex.join(args.patterns)}", code=1)
        with ThreadPoolExecutor(8) as pool:
            lines = []
            for line in pool.map(one, runs):
                print(line, flush=True)
                lines.append(line)
    except KeyboardInterrupt:
        fail("interrupted; what was pulled is intact, and the same command goes on", code=130)
    except ERRORS as error:
        fail(f"{hub.repo}: {reason(error)}. What was pulled is intact, and the same command goes on", code=1)
    if wrong := [line for line in lines if line.startswith("wrong")]:
        fail(f"{len(wrong)} of {len(lines)} runs were not taken: their content is not what it should be", code=1)


def run_list(args: List) -> None:
    hub = open_hub(args.repo)
    try:
        runs = [run for run in find_all(hub) if fits(run.name, args.patterns)]
    except ERRORS as error:
        fail(f"{hub.repo}: {reason(error)}", code=1)
    for run in runs:
        print(f"{'finished' if run.finished else 'unfinished':10}  {size(sum(run.files.values())):>12}  {run.name}")
    print(f"{sum(run.finished for run in runs)} finished, {sum(not run.finished for run in runs)} unfinished")


def run_verify(args: Verify) -> None:
    try:
        links, record = set(LINK.findall(args.page.read_text())), read_record(args.record)
        sums = {row["url"]: row["sums"] for row in record.values()}
    except (OSError, KeyError, ValueError, csv.Error) as error:
        fail(f"{args.page} or {args.record} cannot be read: {error}")
    set_up_client()
    urls, wrong = sorted(links | sums.keys()), 0
    with ThreadPoolExecutor(8) as pool:
        found = pool.map(lambda url: check_link(url, sums[url]) if url in sums else f"is not in {args.record}", urls)
        for url, problem in zip(urls, found):
            wrong += problem is not None
            print(f"{'wrong' if problem else 'ok':5}  {url}{f' {problem}' if problem else ''}", flush=True)
    print(f"{len(urls) - wrong} of {len(urls)} links are as recorded")
    raise SystemExit(wrong > 0)


def main() -> None:
    commands = {"push": Push, "pull": Pull, "list": List, "verify": Verify}
    args = tyro.extras.subcommand_cli_from_dict(commands, description=__doc__)
    {Push: run_push, Pull: run_pull, List: run_list, Verify: run_verify}[type(args)](args)


if __name__ == "__main__":
    main()
