"""A stand-in for the Hugging Face Hub: the methods of HfApi that cloud/ calls, on the folder $LOOPBACK_HUB.

It has a line in `commits` for each commit. While there is a file `down`, nothing answers; while there is `corrupt`,
downloads are damaged. Calls are checked against the real methods' signatures. Quotas, tokens, and transfers are not
imitated. `python loopback_hub.py cloud.job WORDS` is `python cloud/job.py WORDS` with it.
"""

import importlib
import inspect
import json
import os
import shutil
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

from huggingface_hub import BucketFile, HfApi
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import filter_repo_objects
from tools import ROOT, fake_script, finish

from benchmark.runs import Spec


def files_in(folder: Path) -> dict[str, Path]:
    return {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}


def copy(source: Path, target: Path) -> None:
    """All of a file, or nothing of it if this process is killed."""
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(source, target.with_name(f".{target.name}")).replace(target)


def spec(path: Path, name: str, **flags) -> Spec:
    """A run of the fake script, in a folder below `path`."""
    return Spec(fake_script(path), {"env_id": "A-v1", "total_timesteps": 1000, "seed": 1} | flags, path / name)


def begin(run: Spec, step: int) -> Path:
    """An unfinished run folder, `step` steps in."""
    rows = [f"{i},{i / 1000},1.0,10\n" for i in range(10, step + 1, 10)]
    (finish(run) / "episodes.csv").write_text("".join(["step,seconds,return,length\n", *rows]))
    (run.folder / "checkpoint.pt").write_text(json.dumps({"step": step}))
    (run.folder / "result.json").unlink()
    return run.folder


def starts(folder: Path) -> list[tuple[int, int]]:
    """Step and process id of each start of a run."""
    return [tuple(map(int, line.split())) for line in (folder / "starts.txt").read_text().splitlines()]


def call_main(module: ModuleType, words, monkeypatch, capture, code: int = 0) -> str:
    """A program as a user starts it, in this process: its output. An error is one line."""
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, words)])
    try:
        ended = module.main() or 0
    except SystemExit as end:
        ended = end.code
    out, err = capture.readouterr()
    assert ended == code and (code != 2 or err.count("\n") <= 1) and "Traceback" not in err, (ended, out, err)
    assert "hf_token" not in out + err
    return out + err


class Loopback:
    def __init__(self, root: Path) -> None:
        self.root = root

    def repository(self, name: str) -> Path:
        return self.root / "repositories" / name

    def bucket(self, name: str) -> Path:
        return self.root / "buckets" / name

    def install(self, patch=setattr) -> "Loopback":
        for name in (x for x in vars(Loopback) if hasattr(HfApi, x) and not x.startswith("_")):
            patch(HfApi, name, self.checked(name, inspect.signature(getattr(HfApi, name))))
        return self

    def checked(self, name: str, signature: inspect.Signature):
        def call(api, *args, **kwargs):
            if (self.root / "down").exists():
                raise ConnectionError("the Hub is down")
            signature.bind(api, *args, **kwargs)
            return getattr(self, name)(*args, **kwargs)

        return call

    def create_repo(self, repo_id, private, exist_ok):
        self.repository(repo_id).mkdir(parents=True, exist_ok=exist_ok)
        (self.root / f"{repo_id.replace('/', '-')}.{'private' if private else 'public'}").touch()

    def create_bucket(self, bucket_id, private, exist_ok):
        self.bucket(bucket_id).mkdir(parents=True, exist_ok=exist_ok and private)

    def list_repo_tree(self, repo_id, recursive):
        files = files_in(self.repository(repo_id)).items()
        return [RepoFile(path=path, size=file.stat().st_size, oid="") for path, file in files]

    def list_bucket_tree(self, bucket_id, prefix, recursive):
        files = {x: path for x, path in files_in(self.bucket(bucket_id)).items() if x.startswith(prefix or "")}
        return [BucketFile(type="file", path=x, size=path.stat().st_size, xetHash="") for x, path in files.items()]

    def batch_bucket_files(self, bucket_id, add=(), delete=()):
        for source, path in add:
            copy(Path(source), self.bucket(bucket_id) / path)
        for path in delete:
            (self.bucket(bucket_id) / path).unlink()

    def download_bucket_files(self, bucket_id, files):
        for file, target in files:
            copy(self.bucket(bucket_id) / file.path, target)

    def upload_folder(self, repo_id, folder_path, allow_patterns, ignore_patterns, delete_patterns, commit_message):
        there, here = files_in(self.repository(repo_id)), files_in(Path(folder_path))
        chosen = set(filter_repo_objects(here, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns))
        for path in set(filter_repo_objects(there, allow_patterns=delete_patterns)) - chosen:
            there[path].unlink()
        for path in chosen:
            copy(here[path], self.repository(repo_id) / path)
        with (self.root / "commits").open("a") as file:
            file.write(f"{commit_message}\n")

    def snapshot_download(self, repo_id, allow_patterns, local_dir):
        there = files_in(self.repository(repo_id))
        for path in filter_repo_objects(there, allow_patterns=allow_patterns):
            copy(there[path], Path(local_dir) / path)
            if (self.root / "corrupt").exists():
                (Path(local_dir) / path).write_text("damaged")

    def verify_repo_checksums(self, repo_id, local_dir):
        there, here = files_in(self.repository(repo_id)), files_in(Path(local_dir))
        wrong = [{"path": x} for x, path in here.items() if path.read_bytes() != there[x].read_bytes()]
        return SimpleNamespace(mismatches=wrong)


def connect(path: Path, monkeypatch) -> Loopback:
    """Replace the Hub in this process and in those that it starts."""
    path.mkdir(exist_ok=True)
    env = {"LOOPBACK_HUB": path, "FOLIO_HUB": "me/dev", "HF_TOKEN": "hf_token", "PYTHONPATH": ROOT}
    for name, value in env.items():
        monkeypatch.setenv(name, str(value))
    return Loopback(path).install(monkeypatch.setattr)


if __name__ == "__main__":
    sys.argv[:] = sys.argv[1:]
    Loopback(Path(os.environ["LOOPBACK_HUB"])).install()
    from cloud import dstack, job

    dstack.LOOK, job.RETRY, job.TICK = 0.3, 0.05, 0.05  # patience for machines is not needed here
    importlib.import_module(sys.argv[0]).main()
