"""Run folders to and from the Hugging Face Hub.

    export HF_TOKEN=hf_...                          # or once: hf auth login
    export FOLIO_HUB=you/folio-dev                  # a private repository, and a bucket of the same name
    python cloud/hub.py push runs/mujoco            # the finished runs below a folder, in one commit
    python cloud/hub.py list mujoco
    python cloud/hub.py pull mujoco '*__dqn__*'     # into runs/
    python cloud/hub.py publish mujoco --target you/folio       # to a public repository, with a model card

A run's name is the path of its folder below runs/: mujoco/Ant-v5__ppo_continuous__1. The repository has finished runs,
with their history. The bucket has the states of unfinished runs, overwritten in place by cloud/job.py, and other files
of its commands, such as logs or a tuner's journal; `--unfinished` includes it. The copy of the script in an unfinished
run is executed when the run is resumed: pull these only from a bucket that you trust. Finished runs are only read.
"""

import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

import httpx2
import pandas as pd
import tyro
from huggingface_hub import BucketFile, HfApi, ModelCardData, get_token, set_client_factory
from huggingface_hub.errors import BucketNotFoundError, EntryNotFoundError
from huggingface_hub.utils import logging
from tyro.conf import Positional

from benchmark.runs import RUNS, fail, move_aside, progress, read_args, read_result

NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)*", re.ASCII)  # of a run, or of a file: nothing hidden, and no ".."
LOCAL = "*.lock", "*.tmp", "*.old-*"  # files that stay on their machine
LAST = "args.json", "checkpoint.pt", "result.json"  # uploaded after the others, which they count on
ERRORS = (httpx2.HTTPError, OSError, ValueError, RuntimeError)  # of a Hub that refuses, is down, or far away
TIMEOUT = httpx2.Timeout(300.0, connect=4.0)  # seconds; huggingface_hub waits forever by default


def reason(error: Exception) -> str:
    """What went wrong, in one line that does not show the token."""
    status = getattr(getattr(error, "response", None), "status_code", "")
    text = getattr(error, "server_message", None) or str(error) or repr(error)
    return " ".join(f"{status} {text}".split()).replace(get_token() or "\n", "***")[:400]


def check_name(name: str) -> None:
    if not NAME.fullmatch(name):
        fail(f"{name!r} cannot be a name: letters, digits, and _ . - in parts with / between them")


def fits(name: str, patterns: Iterable[str]) -> bool:
    """Whether a name matches one of the patterns, or is below a folder that does."""
    return any(fnmatchcase(name, x) or fnmatchcase(name, f"{x.rstrip('/')}/*") for x in patterns)


class Client(httpx2.Client):
    """Connects twice at most: huggingface_hub would retry for 23 seconds, but not after a ConnectionError."""

    def send(self, *args, **options) -> httpx2.Response:
        for wait in (2, 0):
            try:
                return super().send(*args, **options)
            except (httpx2.ConnectError, httpx2.ConnectTimeout) as error:
                failure = error
            time.sleep(wait)
        raise ConnectionError(f"cannot connect: {failure}")


@dataclass
class Remote:
    """A run on the Hub; or another file in the bucket, whose name is its path."""

    name: str
    files: dict  # RepoFile or BucketFile by path
    in_bucket: bool

    @property
    def finished(self) -> bool:
        return f"{self.name}/result.json" in self.files


class Hub:
    """A repository and the bucket of the same name."""

    def __init__(self, repo: str) -> None:
        self.repo, self.api = repo, HfApi()

    def create(self) -> None:
        """Create both, private, unless they exist."""
        self.api.create_repo(self.repo, private=True, exist_ok=True)
        self.api.create_bucket(self.repo, private=True, exist_ok=True)

    def find(self, below: str = "", bucket: bool = True) -> list[Remote]:
        """The runs in the repository, then the runs and other files in the bucket."""
        found = []
        for in_bucket in (False, True) if bucket else (False,):
            entries = self.bucket_files(below) if in_bucket else self.api.list_repo_tree(self.repo, recursive=True)
            files = {x.path: x for x in entries if hasattr(x, "size") and NAME.fullmatch(x.path)}
            runs: dict[str, dict] = {path.rpartition("/")[0]: {} for path in files if path.endswith("/args.json")}
            for path, file in files.items():
                owner = next((str(x) for x in PurePosixPath(path).parents if str(x) in runs), None)
                if owner or in_bucket:
                    runs.setdefault(owner or path, {})[path] = file
            found += [Remote(name, runs[name], in_bucket) for name in sorted(runs) if fits(name, [below or "*"])]
        return found

    def bucket_files(self, below: str = "") -> list[BucketFile]:
        """Files whose path begins with `below`."""
        with suppress(BucketNotFoundError, EntryNotFoundError):
            entries = self.api.list_bucket_tree(self.repo, prefix=below or None, recursive=True)
            return [entry for entry in entries if isinstance(entry, BucketFile)]
        return []

    def pull(self, runs_dir: Path, remotes: Iterable[Remote], accept: Callable = lambda folder: True) -> list[Remote]:
        """Download runs into runs_dir, those that `accept` takes once they are downloaded, and return them.

        A finished run that is here stays, and an unfinished one that is further. What is replaced is moved aside.
        """
        remotes = [remote for remote in remotes if not read_result(runs_dir / remote.name)]
        runs_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=runs_dir, prefix=".pull-") as temporary:
            repository, bucket, pulled = Path(temporary, "repository"), Path(temporary, "bucket"), []
            if finished := [f"{remote.name}/*" for remote in remotes if not remote.in_bucket]:
                self.api.snapshot_download(self.repo, allow_patterns=finished, local_dir=repository)
                for wrong in self.api.verify_repo_checksums(self.repo, local_dir=repository).mismatches:
                    raise ValueError(f"{wrong['path']} has a wrong checksum")
            states = [file for remote in remotes if remote.in_bucket for file in remote.files.values()]
            self.api.download_bucket_files(self.repo, [(file, bucket / file.path) for file in states])
            for remote in remotes:
                new, here = (bucket if remote.in_bucket else repository) / remote.name, runs_dir / remote.name
                if read_result(here) or not accept(new):
                    continue
                length = [progress(x)[0] if x.is_dir() else x.stat().st_size for x in (here, new) if x.exists()]
                if here.exists() and (read_result(new) or length[0] < length[1]):  # logs and journals only grow
                    move_aside(here)
                if not here.exists():
                    here.parent.mkdir(parents=True, exist_ok=True)
                    new.rename(here)
                    pulled.append(remote)
            return pulled

    def commit(self, runs_dir: Path, names: list[str], *files: str) -> None:
        """Put finished runs, and other files, into the repository, in one commit."""
        self.api.upload_folder(
            repo_id=self.repo,
            folder_path=runs_dir,
            allow_patterns=[*files, *(f"{name}/*" for name in names)],
            ignore_patterns=[*LOCAL, "*/checkpoint.pt"],
            delete_patterns=[f"{name}/*" for name in names],  # what an older run of this name has left
            commit_message=names[0] if len(names) == 1 else f"{len(names)} runs",
        )

    def save(self, runs_dir: Path, name: str) -> None:
        """Make the bucket's copy of a run, or of a folder of runs, what it is now: first logs, then the checkpoint that
        counts on their rows. So a run can be resumed from what an interrupted upload leaves."""
        with tempfile.TemporaryDirectory(dir=runs_dir, prefix=".push-") as stage:
            files = freeze(runs_dir, name, Path(stage))
            runs = tuple(path.removesuffix("args.json") for path in files if path.endswith("/args.json"))
            gone = [x.path for x in self.bucket_files(name) if x.path not in files and x.path.startswith(runs)]
            first = [(str(file), path) for path, file in files.items() if not path.endswith(LAST)]
            last = [(str(file), path) for path, file in files.items() if path.endswith(LAST)]
            self.api.batch_bucket_files(self.repo, add=first, delete=gone)
            self.api.batch_bucket_files(self.repo, add=last)

    def push(self, runs_dir: Path, name: str) -> None:
        """`save`, and then move what is finished from the bucket to the repository."""
        self.save(runs_dir, name)
        if finished := finished_below(runs_dir, name):
            self.commit(runs_dir, finished)
            gone = [x.path for x in self.bucket_files(name) if x.path.startswith(tuple(f"{run}/" for run in finished))]
            self.api.batch_bucket_files(self.repo, delete=gone)


def finished_below(runs_dir: Path, name: str) -> list[str]:
    """Names of the finished runs that are runs_dir/name or below it, without those that were moved aside."""
    found = {x.parent.relative_to(runs_dir).as_posix(): x.parent for x in (runs_dir / name).rglob("args.json")}
    return sorted(x for x in found if NAME.fullmatch(x) and ".old-" not in x and read_result(found[x]))


def freeze(runs_dir: Path, name: str, stage: Path) -> dict[str, Path]:
    """Copy what is to be uploaded, while the runs continue: {path below runs_dir: copy}.

    Checkpoints come first: logs only grow, so their copies have every row that a checkpoint counts on. A folder whose
    files have changed in the meantime, because its run has just ended, is copied again.
    """

    def listed(folder: str) -> dict[str, Path]:
        paths = {path.relative_to(runs_dir).as_posix(): path for path in Path(folder).iterdir() if not path.is_dir()}
        skip = {"checkpoint.pt"} if any(path.name == "result.json" for path in paths.values()) else set()
        wanted = [x for x, path in paths.items() if NAME.fullmatch(x) and path.name not in skip]
        return {x: paths[x] for x in wanted if not any(fnmatchcase(x, pattern) for pattern in LOCAL)}

    files = {}
    for folder, _, _ in os.walk(runs_dir / name):
        paths = None
        while paths != (paths := listed(folder)):
            with suppress(FileNotFoundError):
                for x, path in sorted(paths.items(), key=lambda item: item[1].name != "checkpoint.pt"):
                    (stage / x).parent.mkdir(parents=True, exist_ok=True)
                    (stage / x).unlink(missing_ok=True)
                    (os.link if path.name == "checkpoint.pt" else shutil.copy2)(path, stage / x)
        files |= {x: stage / x for x in paths}
    return files


def card(table: pd.DataFrame, repo: str) -> str:
    """README.md of the public repository: how to load an agent, and the scores."""
    means = table.groupby(["env_id", "script"], as_index=False)
    means = means.agg(seeds=("seed", "count"), training=("final_return", "mean"), score=("eval_return_mean", "mean"))
    rows = [f"| {x.env_id} | {x.script} | {x.seeds} | {x.training:.1f} | {x.score:.1f} |" for x in means.itertuples()]
    lines, about = "\n".join(rows), ModelCardData(license="mit", tags=["reinforcement-learning"])
    run, script = table.iloc[0][["run", "script"]]
    return f"""---
{about.to_yaml()}
---

# Folio: trained agents

Run folders of Folio, deep reinforcement learning in one file per algorithm: flags and versions (`args.json`), a copy of
the script, every training episode (`episodes.csv`), and the agent (`agent.safetensors`). In a clone of Folio:

```sh
hf download {repo} --include "{run}/*" --local-dir runs
python algos/{script}.py --evaluate runs/{run} --video
```

All runs in a table: `pandas.read_csv("hf://{repo}/runs.csv")`. Means over seeds, of the last 100 training episodes and
of the evaluation after training:

| environment | script | seeds | training return | evaluation |
|---|---|---|---|---|
{lines}
"""


@dataclass
class Push:
    """upload finished runs, in one commit"""

    folders: Positional[tuple[Path, ...]]  # run folders, or folders of runs
    repo: str = ""  # the repository; default: $FOLIO_HUB
    runs_dir: Path = RUNS  # a run's name is the path of its folder below this one

    def run(self, hub: Hub) -> None:
        runs_dir, runs = self.runs_dir.resolve(), []
        for folder in (folder.resolve() for folder in self.folders):
            if not folder.is_relative_to(runs_dir):
                fail(f"{folder} is not below --runs-dir, {runs_dir}")
            runs += finished_below(runs_dir, folder.relative_to(runs_dir).as_posix())
        if not runs:
            fail("no finished run there")
        hub.create()
        hub.commit(runs_dir, runs)
        print(f"pushed {len(runs)} runs to {hub.repo}")


@dataclass
class Pull:
    """download finished runs"""

    patterns: Positional[tuple[str, ...]]  # names of runs or of folders of runs; * stands for anything
    unfinished: bool = False  # also download the states of unfinished runs and other files of jobs
    repo: str = ""  # the repository; default: $FOLIO_HUB
    runs_dir: Path = RUNS  # where the run folders go

    def run(self, hub: Hub) -> None:
        found = [x for x in hub.find(bucket=self.unfinished) if fits(x.name, self.patterns)]
        chosen = {x.name: x for x in sorted(found, key=lambda x: x.finished)}.values()  # of two the finished one
        if not chosen:
            fail(f"{hub.repo} has no such run", code=1)
        pulled = hub.pull(self.runs_dir.resolve(), chosen)
        print(*(x.name for x in pulled), f"pulled {len(pulled)} of {len(chosen)}; the others are here", sep="\n")


@dataclass
class List:
    """list runs"""

    patterns: Positional[tuple[str, ...]] = ("*",)  # names of runs or of folders of runs; * stands for anything
    unfinished: bool = False  # also list the bucket
    repo: str = ""  # the repository; default: $FOLIO_HUB

    def run(self, hub: Hub) -> None:
        found = [x for x in hub.find(bucket=self.unfinished) if fits(x.name, self.patterns)]
        for x in found:
            size = sum(file.size for file in x.files.values()) / 1e6
            print(f"{'finished' if x.finished else 'unfinished':10}  {size:8.1f} MB  {x.name}")
        print(f"{sum(x.finished for x in found)} finished, {sum(not x.finished for x in found)} unfinished")


@dataclass
class Publish:
    """copy finished runs to a public repository, and update its table and card"""

    patterns: Positional[tuple[str, ...]]  # names of runs or of folders of runs; * stands for anything
    repo: str = ""  # the repository that has them; default: $FOLIO_HUB
    target: str = ""  # the public repository; default: $FOLIO_HUB_PUBLIC
    dry_run: bool = False  # only print how many runs would be copied, and which are left out

    def run(self, hub: Hub) -> None:
        target = open_hub(self.target, "FOLIO_HUB_PUBLIC")
        runs = [run for run in hub.find(bucket=False) if run.finished and fits(run.name, self.patterns)]
        with tempfile.TemporaryDirectory(prefix="folio-") as temporary:
            folder, rows = Path(temporary), []
            for run in hub.pull(folder, runs):
                about, result = read_args(folder / run.name), read_result(folder / run.name)
                if not about["commit"] or about["commit"].endswith("-dirty"):
                    print(f"left out: {run.name} was not made from a clean commit")
                    continue
                row = {"run": run.name, "script": Path(about["command"][0]).stem, "commit": about["commit"]}
                columns = "env_id", "seed", "final_return", "eval_return_mean", "eval_return_std", "steps"
                rows.append(row | {key: (about["args"] | result).get(key) for key in columns})
            print(f"{len(rows)} runs from {hub.repo} to {target.repo}")
            if self.dry_run or not rows:
                return
            target.api.create_repo(target.repo, private=False, exist_ok=True)
            target.api.snapshot_download(target.repo, allow_patterns=["runs.csv"], local_dir=folder)
            earlier = pd.read_csv(folder / "runs.csv") if (folder / "runs.csv").exists() else None
            table = pd.concat([earlier, pd.DataFrame(rows)]).drop_duplicates("run", keep="last").sort_values("run")
            table.to_csv(folder / "runs.csv", index=False)
            (folder / "README.md").write_text(card(table, target.repo))
            target.commit(folder, [row["run"] for row in rows], "runs.csv", "README.md")


def open_hub(repo: str, variable: str = "FOLIO_HUB", missing: Iterable[str] = ()) -> Hub:
    """The repository, or an error with all that is `missing`."""
    repo = repo or os.environ.get(variable, "")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        missing = [f"no repository {repo or 'given'}: export {variable}=you/folio-dev", *missing]
    if missing:
        fail("; ".join(missing))
    logging.set_verbosity_error()
    set_client_factory(lambda: Client(follow_redirects=True, timeout=TIMEOUT))
    return Hub(repo)


def main() -> None:
    commands = {"push": Push, "pull": Pull, "list": List, "publish": Publish}
    args = tyro.extras.subcommand_cli_from_dict(commands, description=__doc__)
    hub = open_hub(args.repo)
    try:
        args.run(hub)
    except ERRORS as error:
        fail(f"{hub.repo}: {reason(error)}", code=1)
    except KeyboardInterrupt:
        fail("interrupted; the same command continues", code=130)


if __name__ == "__main__":
    main()
