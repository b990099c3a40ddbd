"""cloud/hub.py with the unmodified huggingface_hub client against a stand-in for the Hub on the loopback interface
(loopback.py): what comes back is what went, and a Hub that is not well costs nothing."""

import csv
import json
import os
import re
import subprocess
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT
from huggingface_hub import HfApi, ModelCard, constants
from loopback import LoopbackHub

from cloud import hub as hf

DEV, PUBLIC = "me/folio-dev", "me/folio"


def write_run(folder: Path, seed: int = 1, finished: bool = True, **described) -> Path:
    """A small run folder with every kind of file."""
    (folder / "videos").mkdir(parents=True)
    args = {"env_id": "A-v1", "seed": seed, "total_timesteps": 10, "run_dir": str(folder)}
    told = {"args": args, "command": ["algos/fake.py", "--seed", str(seed)], "commit": "c0" * 20}
    told |= {"versions": {"torch": "2", "pip": "3"}, "cpu": "a CPU", "threads": 1, "gpu": None}
    told |= {"started": f"Fri Nov 20 00:00:0{seed} 2026"}
    (folder / "fake.py").write_text("print('a script')\n")
    (folder / "args.json").write_text(json.dumps(told | described))
    rows = [f"{i},{i / 10},{float(i * seed)},5\n" for i in range(1, 301)]
    (folder / "episodes.csv").write_text("step,seconds,return,length\n" + "".join(rows))
    (folder / "events.out.tfevents.1.host.2").write_bytes(bytes(range(256)) * 9)
    (folder / "checkpoint.pt").write_bytes(os.urandom(5000))
    (folder / ".checkpoint.pt").write_bytes(b"half")
    (folder / ".lock").touch()
    if finished:
        (folder / "agent.safetensors").write_bytes(os.urandom(3000))
        (folder / "videos" / "seed1.mp4").write_bytes(os.urandom(4000))
        result = {"final_return": 12.5, "eval_return_mean": 11.0, "eval_return_std": 2.0, "eval_episodes": 5}
        (folder / "result.json").write_text(json.dumps(result | {"steps": 10, "seconds": 3.0, "sps": 3.3}))
    return folder


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def pushed(folder: Path) -> dict[str, bytes]:
    """What of a folder goes to the Hub."""
    left_out = {".checkpoint.pt", ".lock"} | ({"checkpoint.pt"} if (folder / "result.json").exists() else set())
    return {path: data for path, data in content(folder).items() if path not in left_out}


@dataclass
class House:
    """A folder with runs, the stand-in, and cloud/hub.py's commands as a user gives them."""

    path: Path
    hub: LoopbackHub
    capfd: pytest.CaptureFixture
    patch: pytest.MonkeyPatch

    @property
    def runs(self) -> Path:
        return self.path / "runs"

    def api(self, repo: str = DEV) -> hf.Hub:
        return hf.Hub(repo, HfApi(endpoint=self.hub.url, token="hf_good"))

    def __call__(self, *words, runs: str | None = "runs") -> SimpleNamespace:
        self.patch.setattr(sys, "argv", ["cloud/hub.py", *map(str, words), *(["--runs-dir", runs] if runs else [])])
        self.capfd.readouterr()
        code = 0
        try:
            hf.main()
        except SystemExit as end:
            code = end.code
        out, err = self.capfd.readouterr()
        assert "hf_" not in out + err  # no token
        return SimpleNamespace(code=int(code), out=out, err=err)

    def there(self, name: str, branch: str = "main", repo: str = DEV) -> dict[str, bytes]:
        files = self.hub.files(repo, branch)
        return {path.removeprefix(f"{name}/"): data for path, data in files.items() if path.startswith(f"{name}/")}


@pytest.fixture
def house(tmp_path, capfd, monkeypatch) -> House:
    server = LoopbackHub()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)  # between its own attempts
    for name, value in {"HF_TOKEN": "hf_good", "FOLIO_HUB": DEV, "FOLIO_HUB_PUBLIC": PUBLIC}.items():
        monkeypatch.setenv(name, value)
    yield House(tmp_path, server, capfd, monkeypatch)
    server.stop()


# ------------------------------------------------------------------------------------------------------ there and back


def test_a_finished_run_goes_there_and_comes_back_the_same(house):
    folder = write_run(house.runs / "s" / "A-v1__fake__1")
    before = content(folder)
    done = house("push", "runs/s/A-v1__fake__1")
    assert (done.code, done.err) == (0, "") and "pushed s/A-v1__fake__1" in done.out
    there = house.there("s/A-v1__fake__1")
    assert content(folder) == before and {path: there[path] for path in pushed(folder)} == pushed(folder)
    assert there.keys() - pushed(folder) == {"README.md", "curve.png", "SHA256SUMS"}
    assert house.hub.branches(DEV) == {"main"} and house.hub.repos[DEV]["private"]
    assert [path.name for path in (house.runs / "s").iterdir()] == ["A-v1__fake__1"]  # nothing is left beside it
    done = house("pull", "s", runs="back")
    assert done.code == 0, done.err
    back = content(house.path / "back" / "s" / "A-v1__fake__1")
    assert {path: back[path] for path in pushed(folder)} == pushed(folder)
    assert [path.name for path in (house.path / "back" / "s").iterdir()] == ["A-v1__fake__1"]
    command = ["sha256sum", "-c", "--strict", "SHA256SUMS"]
    assert subprocess.run(command, cwd=house.path / "back" / "s" / "A-v1__fake__1", capture_output=True).returncode == 0


def test_an_unfinished_run_has_a_branch_until_it_is_finished(house):
    folder = write_run(house.runs / "s" / "A-v1__fake__1", finished=False)
    assert house("push", folder).code == 0
    branch = "run-s--A-v1__fake__1"
    there = house.there("s/A-v1__fake__1", branch)
    assert {path: there[path] for path in pushed(folder)} == pushed(folder) and "checkpoint.pt" in there
    assert house.there("s/A-v1__fake__1") == {} and b"not finished" in there["README.md"]
    listed = f"unfinished        {sum(map(len, there.values())) / 1e6:.1f} MB  s/A-v1__fake__1\n"
    assert house("list", runs=None).out == listed + "0 finished, 1 unfinished\n"
    done = house("pull", "A-v1", runs="back")
    assert done.code == 0 and "unfinished" in done.out
    assert (house.path / "back/s/A-v1__fake__1/checkpoint.pt").read_bytes() == (folder / "checkpoint.pt").read_bytes()
    again = house("push", folder)
    assert again.code == 2 and "--force replaces it" in again.err
    assert house("push", folder, "--force").code == 0
    (folder / "result.json").write_text('{"final_return": 1.0}')
    assert house("push", folder).code == 0 and house.hub.branches(DEV) == {"main"}
    (folder / "events.out.tfevents.1.host.2").rename(folder / "events.out.tfevents.2.host.2")  # a run made anew
    assert house("push", folder).code == 0
    assert set(house.there("s/A-v1__fake__1")) == {*pushed(folder), *hf.MADE}
    assert "1 finished, 0 unfinished" in house("list", "fake", runs=None).out
    assert "0 finished, 0 unfinished" in house("list", "fak", runs=None).out


def test_a_state_that_is_pushed_during_the_run_can_be_resumed(house):
    """The checkpoint counts rows of the log, and the run goes on at every moment of the push: it must never count more
    rows than are there, and no file may be another when it is sent than when it was summed up."""
    folder, rows = write_run(house.runs / "r", finished=False), 0
    (folder / "episodes.csv").write_text("step,seconds,return,length\n")

    def train():
        nonlocal rows
        rows += 1
        with (folder / "episodes.csv").open("a") as log:
            log.write(f"{rows},1.0,1.0,1\n")
        (folder / "aside").write_text(str(rows))
        (folder / "aside").replace(folder / "checkpoint.pt")

    def during(function):
        def around(*args, **kwargs):
            train()
            result = function(*args, **kwargs)
            train()
            return result

        return around

    train()
    house.patch.setattr(hf.shutil, "copy2", during(hf.shutil.copy2))
    house.patch.setattr(hf.os, "link", during(hf.os.link))
    house.patch.setattr(hf, "sha256", during(hf.sha256))
    hub = hf.open_hub(DEV)
    hf.create(hub, private=True)
    hf.push(hub, folder, "r")
    house.patch.undo()
    (run, _), back = hf.find(house.api(), "r"), house.path / "back"
    house.patch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", house.hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    hf.fetch(house.api(), run, back)
    counted = int((back / "checkpoint.pt").read_text())
    assert 0 < counted <= len((back / "episodes.csv").read_text().splitlines()) - 1 < rows


def test_the_card_says_what_is_there(house):
    folder = write_run(house.runs / "s" / "A-v1__fake__1")
    house("push", folder)
    text = house.there("s/A-v1__fake__1")["README.md"].decode()
    data = ModelCard(text).data
    (score,) = data.eval_results
    assert (score.metric_value, score.dataset_name, data.model_name, data.license) == (11.0, "A-v1", "fake", "mit")
    assert {"reinforcement-learning", "A-v1", "fake"} <= set(data.tags)
    for part in (
        *("# fake on A-v1, seed 1", "12.5", "11.0 ± 2.0", "![Learning curve](curve.png)", "(videos/seed1.mp4)"),
        *(
            "python algos/fake.py --seed 1",
            "| torch | 2 |",
            "c0c0",
            f"hf download {DEV} --include",
            "--evaluate runs/s/",
        ),
    ):
        assert part in text
    assert "uncommitted" not in text and "not finished" not in text
    assert house.there("s/A-v1__fake__1")["curve.png"].startswith(b"\x89PNG")
    assert "[fake.py](fake.py)" in text and "| pip |" not in text
    house("push", write_run(house.runs / "x", commit="c0-dirty"))
    assert "| c0, with uncommitted changes |" in house.there("x")["README.md"].decode()


def test_pull_takes_what_fits_and_touches_nothing_that_is_there(house):
    for name in ("s/A-v1__fake__1", "s/A-v1__other__1", "t/B-v1__fake__2"):
        house("push", write_run(house.runs / name))
    assert house("pull", "fake", "--repo", DEV, runs="a").out.count("pulled") == 2
    assert house("pull", "B-*", runs="b").out == "pulled        t/B-v1__fake__2\n"
    assert house("pull", "s/*", runs="c").out.count("pulled") == 2
    assert house("pull", "A-v1__other", "t", runs="d").out.count("pulled") == 2
    assert house("pull", "nothing", runs="e").code == 1 and not (house.path / "e").exists()
    mine = house.path / "b" / "t" / "B-v1__fake__2"
    (mine / "result.json").write_text("mine")
    assert house("pull", "t", runs="b").out == "is there      t/B-v1__fake__2\n"
    assert (mine / "result.json").read_text() == "mine"
    (mine / "result.json").unlink()  # begun here, finished there
    assert house("pull", "t", runs="b").code == 0 and (mine / "result.json").exists()
    assert mine.with_name("B-v1__fake__2.old-1").is_dir()
    write_run(house.runs / "u", finished=False)
    house("push", house.runs / "u")
    before = content(house.runs / "u")
    assert "left alone" in house("pull", "u").out and content(house.runs / "u") == before


# ----------------------------------------------------------------------------------------------- a Hub that is unwell


def test_an_upload_that_breaks_off_goes_on_where_it_was(house):
    folder = write_run(house.runs / "r")
    house("push", write_run(house.runs / "first"))
    house.hub.break_uploads, before, count = 1, content(folder), len(house.hub.uploads())
    done = house("push", folder)
    if done.code:  # the client itself may try again
        assert done.code == 1 and "push it later: python cloud/hub.py push" in done.err and done.err.count("\n") == 1
        assert house.there("r") == {} and content(folder) == before
        assert house("push", folder).code == 0
    assert {path: house.there("r")[path] for path in pushed(folder)} == pushed(folder)
    sent = house.hub.uploads()[count:]
    assert len(sent) == len(set(sent)) + 1  # one file twice, the others once


def test_what_was_uploaded_before_is_not_sent_again(house):
    folder = write_run(house.runs / "r")
    house.hub.fail_commits = 1
    done = house("push", folder)
    assert done.code == 1 and "503" in done.err and house.there("r") == {}
    sent = len(house.hub.uploads())
    assert sent >= 4 and house("push", folder).code == 0
    assert len(house.hub.uploads()) == sent and "agent.safetensors" in house.there("r")


TROUBLES = [
    (command, trouble) for command in ("push", "pull", "list") for trouble in ("wrong token", "no token", "gone")
]
TROUBLES += [("push", "may only read"), ("push", "full"), ("pull", "nothing there"), ("list", "nothing there")]


@pytest.mark.parametrize("command, trouble", TROUBLES)
def test_trouble_is_one_line_and_costs_nothing(trouble, command, house):
    folder = write_run(house.runs / "r")
    if trouble != "nothing there":
        house("push", write_run(house.runs / "first"))
    before = content(house.runs)
    tokens = {"wrong token": "hf_bad", "may only read": "hf_reader", "no token": ""}
    house.patch.setenv("HF_TOKEN", tokens.get(trouble, "hf_good"))
    house.hub.full = trouble == "full"
    if trouble == "gone":
        house.hub.stop()
    words = {"push": [folder], "pull": ["first"], "list": []}[command]
    done = house(command, *words, runs=None if command == "list" else "runs" if command == "push" else "back")
    if trouble == "gone":
        house.hub.start()
    assert done.code == 1 and done.out == "" and done.err.count("\n") == 1, done
    assert done.err.startswith(f"error: {DEV}: ") and "Traceback" not in done.err
    part = {"gone": "cannot be reached", "full": "storage limit", "may only read": "403"}.get(trouble, "token")
    assert part in done.err or trouble == "nothing there"
    assert content(house.runs) == before and not (house.path / "back").exists()
    if command == "push":
        assert f"push it later: python cloud/hub.py push {folder}" in done.err
        house.patch.setenv("HF_TOKEN", "hf_good")
        house.hub.full = False
        assert house("push", folder).code == 0 and house.there("r")


def test_a_hub_that_does_not_answer_is_given_up(house):
    house("push", write_run(house.runs / "r"))
    house.patch.setattr(hf, "SILENCE", 0.3)
    house.hub.delay = 1.0
    done = house("push", write_run(house.runs / "s"))
    assert done.code == 1 and "cannot be reached" in done.err and done.err.count("\n") == 1


def test_a_full_disk_here_is_one_line(house):
    house("push", write_run(house.runs / "r"))

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    house.patch.setattr("huggingface_hub.file_download.shutil.disk_usage", lambda _: SimpleNamespace(free=0))
    house.patch.setattr("huggingface_hub.file_download.http_get", full)
    with warnings.catch_warnings(record=True) as seen:  # the client warns of it, too, once a file
        warnings.simplefilter("always")
        done = house("pull", "r", runs="back")
    assert not [x for x in seen if issubclass(x.category, UserWarning)]
    assert done.code == 1 and "No space left" in done.err and done.err.count("\n") == 1
    assert not (house.path / "back" / "r").exists()


@pytest.mark.parametrize(
    "words, part",
    [
        (["push"], "or --all"),
        (["push", "--all", "runs/r"], "or --all"),
        (["push", "runs/missing"], "there is no folder"),
        (["push", "runs/r/videos"], "no args.json"),
        (["push", "elsewhere/x"], "elsewhere the run's name is x"),
        (["push", "runs"], "no args.json"),
        (["push", "runs/a--b"], "cannot be a run's name"),
        (["push", "runs/r", "--repo", "folio"], "is no repository"),
        (["pull"], "name what to pull"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_bad_input_is_one_line(words, part, house):
    for name in ("runs/r", "runs/a--b", "elsewhere/x"):
        write_run(house.path / name)
    before = content(house.path)
    done = house(*words)
    assert done.code == 2 and done.out == "" and done.err.startswith("error: ") and part in done.err
    assert done.err.count("\n") == 1 and content(house.path) == before and house.hub.asked == []


@pytest.mark.parametrize("path, text", [("episodes.csv", "a,b\n1,2\n"), ("args.json", "[]"), ("result.json", "{")])
def test_a_folder_that_is_no_run_folder_is_one_line(path, text, house):
    """A script of somebody else may write such a one, and a job that makes it must not die of it."""
    folder = write_run(house.runs / "r")
    (folder / path).write_text(text)
    done = house("push", folder)
    assert done.code == 1 and done.err.count("\n") == 1 and "Traceback" not in done.err, done
    assert list(house.runs.iterdir()) == [folder]


@pytest.mark.parametrize("command", ["push", "pull"])
def test_an_interruption_is_one_line(command, house):
    house("push", write_run(house.runs / "r"))

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    house.patch.setattr(hf, "tree" if command == "push" else "find_all", interrupt)
    done = house(command, house.runs / "r" if command == "push" else "r")
    assert done.code == 130 and done.err.count("\n") == 1 and "the same command goes on" in done.err


def test_without_a_repository_it_says_how_to_name_one(house):
    house.patch.delenv("FOLIO_HUB")
    done = house("list", runs=None)
    assert done.code == 2 and "--repo or FOLIO_HUB" in done.err


def test_names_that_would_not_survive_the_way_are_refused():
    good = ["r", "mujoco/Ant-v5__ppo__1", "A.b_c-d/e", "CartPole-v1__ppo__1__20261120T141632.397Z", "x__1.old-1"]
    bad = [
        "",
        "/r",
        "r/",
        "a//b",
        "../r",
        "a/../b",
        "a/.b",
        "a--b",
        "a b",
        "ä",
        "a.",
        "-a",
        "a..b",
        "a/b-",
        "a\n",
        "main/",
    ]
    assert [name for name in good if not hf.NAME.fullmatch(name)] == []
    assert [name for name in bad if hf.NAME.fullmatch(name)] == []
    names = ["a/b-c", "a_b/c", "a/b/c.d"]
    assert [hf.branch_of(name).removeprefix("run-").replace("--", "/") for name in names] == names


# ------------------------------------------------------------------------------------------------- strangers' content


def put(house, repo: str, files: dict[str, bytes], branch: str = "main") -> None:
    """Change what the Hub has, past every check."""
    import hashlib

    entry = house.hub.repos[repo]
    now = dict(entry["commits"][entry["branches"][branch]])
    for path, data in files.items():
        now[path] = hashlib.sha256(data).hexdigest()
        house.hub.blobs[now[path]] = data
    house.hub.commit(entry, branch, now)


def test_only_data_is_taken_and_only_into_its_place(house):
    house("push", write_run(house.runs / "r"))
    evil = {"r/x/fake.py": b"boom", "r/../../out.json": b"{}", "r/.hidden.json": b"{}", "r/x/run.sh": b"boom"}
    put(house, DEV, evil)
    assert house("pull", "r", runs="back").code == 0
    names = set(content(house.path / "back" / "r"))
    assert names == set(pushed(house.runs / "r")) | {"README.md", "SHA256SUMS", "curve.png"}
    assert not (house.path / "out.json").exists() and not (house.path / "back" / "out.json").exists()


@pytest.mark.parametrize(
    "path, data", [("episodes.csv", b"step\n"), ("extra.json", b"{}"), ("SHA256SUMS", b"nonsense")]
)
def test_what_is_not_as_its_sums_say_is_not_taken(path, data, house):
    for name in ("a", "r", "z"):
        house("push", write_run(house.runs / name))
    put(house, DEV, {f"r/{path}": data})
    done = house("pull", "*", runs="back")
    assert done.code == 1 and "1 of 3 runs were not taken" in done.err and done.err.count("\n") == 1
    assert re.search("^wrong +r.* SHA256SUMS", done.out, re.M) and not (house.path / "back" / "r").exists()
    assert (house.path / "back" / "a").exists() and (house.path / "back" / "z").exists()


def test_a_pull_that_was_broken_off_is_mended(house):
    """What lies in the staging folder may be half of another state."""
    house("push", write_run(house.runs / "r"))
    stage = house.path / "back" / "r.pull" / "r"
    stage.mkdir(parents=True)
    (stage / "checkpoint.pt").write_bytes(b"of another state")
    (stage / "args.json").write_bytes(b"half")
    assert house("pull", "r", runs="back").code == 0
    assert set(content(house.path / "back")) == {f"r/{x}" for x in (*pushed(house.runs / "r"), *hf.MADE)}


# -------------------------------------------------------------------------------------------------------- push --all


def test_push_all_asks_and_sends_what_is_missing(house):
    for name in ("s/A-v1__fake__1", "s/A-v1__fake__2", "s/A-v1__fake__1.old-1"):
        write_run(house.runs / name)
    write_run(house.runs / "s" / "A-v1__fake__3", finished=False)
    house("push", house.runs / "s" / "A-v1__fake__1")
    done = house("push", "--all")
    assert done.code == 2 and re.match(r"1 finished runs to push to me/folio-dev, 0\.\d MB", done.out), done
    assert "--yes" in done.err and house.there("s/A-v1__fake__2") == {}
    done = house("push", "--all", "--yes")
    assert done.code == 0 and done.out.count("pushed ") == 1 and "pushed s/A-v1__fake__2" in done.out
    assert house("push", "--all").out.startswith("0 finished runs")
    (house.runs / "s" / "A-v1__fake__1" / "episodes.csv").write_text("step,seconds,return,length\n1,1,1,1\n")
    assert house("push", "--all", "--yes").out.count("pushed ") == 1  # its content is another now
    names = {Path(path).parent.as_posix() for path in house.hub.files(DEV) if path.endswith("result.json")}
    assert names == {"s/A-v1__fake__1", "s/A-v1__fake__2"}


def test_push_all_makes_the_repository_only_when_it_may_and_leaves_bad_names_out(house):
    write_run(house.runs / "good")
    write_run(house.runs / "not good")
    asked = house("push", "--all")
    assert asked.code == 2 and asked.out.startswith("1 finished runs") and house.hub.repos == {}
    assert asked.err.startswith(f"left out: {house.runs / 'not good'}: cannot be a run's name")
    done = house("push", "--all", "--yes")
    assert done.code == 0 and "pushed good" in done.out and "left out" in done.err
    assert "result.json" in house.there("good")
    assert house("push", "--all", runs="typo").err == f"error: there is no folder {house.path / 'typo'}\n"


# -------------------------------------------------------------------------------------------------------- graduating


def test_graduates_are_what_was_asked_for(house):
    for seed in (1, 2):
        house("push", write_run(house.runs / "s" / f"A-v1__fake__{seed}", seed))
    house("push", write_run(house.runs / "s" / "dirty", commit="c0-dirty"))
    house("push", write_run(house.runs / "s" / "unknown", commit=""))
    house("push", write_run(house.runs / "s" / "half", finished=False))
    wanted = {f"s/A-v1__fake__{seed}": {"final_return": 12.5, "commit": "c0" * 20} for seed in (1, 2)}
    others = {"s/dirty": {}, "s/unknown": {}, "s/half": {}, "s/missing": {}}
    records, lines = hf.graduate(house.api(), house.api(PUBLIC), wanted | others, lambda names: f"# {len(names)}\n")
    assert set(records) == set(wanted) and len(lines) == 4
    assert ["clean commit" in lines[0], "clean commit" in lines[1]] == [True, True]
    assert all("does not have it finished" in line for line in lines[2:])
    assert not house.hub.repos[PUBLIC]["private"] and house.hub.files(PUBLIC)["README.md"] == b"# 2\n"
    for name, record in records.items():
        assert {**house.there(name, repo=PUBLIC)} == house.there(name) != {}
        commit = house.hub.repos[PUBLIC]["branches"]["main"]
        assert record["url"] == f"{house.hub.url}/{PUBLIC}/tree/{commit}/{name}"
    other = {"s/A-v1__fake__1": {"final_return": 99.0}}
    records, (line,) = hf.graduate(house.api(), house.api(PUBLIC), other, str)
    assert records == {} and "final_return is 12.5, not 99.0" in line
    assert house.hub.files(PUBLIC)["README.md"] == b"# 2\n"  # nothing was changed


@pytest.fixture
def graduated(house) -> SimpleNamespace:
    """Two public runs, their record, and a page that links to them."""
    for seed in (1, 2):
        house("push", write_run(house.runs / "s" / f"A-v1__fake__{seed}", seed))
    wanted = {f"s/A-v1__fake__{seed}": {} for seed in (1, 2)}
    records, _ = hf.graduate(house.api(), house.api(PUBLIC), wanted, str)
    page, record = house.path / "page.md", house.path / "hub.csv"
    hf.write_record(record, records)
    page.write_text(" ".join(f"[1]({row['url']})" for row in records.values()) + " [x](https://example.org/tree/y)\n")
    return SimpleNamespace(
        page=page, record=record, words=["verify", "--page", page, "--record", record], **{"all": records}
    )


def test_verify_looks_at_the_content(house, graduated):
    done = house(*graduated.words, runs=None)
    assert done.code == 0 and done.out.count("ok ") == 2 and "2 of 2 links" in done.out, done
    assert hf.read_record(graduated.record) == graduated.all
    digest = next(k for k, v in house.hub.blobs.items() if v.startswith(b"step,") and b"\n7,0.7,14.0" in v)
    house.hub.blobs[digest] = house.hub.blobs[digest].replace(b"14.0", b"15.0")  # the same address, other content
    done = house(*graduated.words, runs=None)
    assert done.code == 1 and "1 of 2 links" in done.out and "A-v1__fake__2 cannot be checked" in done.out


def test_verify_finds_links_that_were_never_recorded_and_other_hashes(house, graduated):
    rows = list(csv.DictReader(graduated.record.open()))
    graduated.page.write_text(graduated.page.read_text().replace("fake__1)", "fake__7)"))
    done = house(*graduated.words, runs=None)
    assert done.code == 1 and "fake__7 is not in" in done.out and "2 of 3 links" in done.out
    rows[0]["sums"] = "0" * 64
    hf.write_record(graduated.record, {row["run"]: row for row in rows})
    done = house(*graduated.words, runs=None)
    assert done.code == 1 and "has other content" in done.out and "1 of 3 links" in done.out
    house.hub.repos.pop(PUBLIC)
    done = house(*graduated.words, runs=None)
    assert done.code == 1 and done.out.count("cannot be checked") == 2 and "Traceback" not in done.err


def test_an_address_that_leads_elsewhere_is_not_followed(house):
    assert hf.check_link(f"{house.hub.url}/{PUBLIC}/tree/{'0' * 40}/../../x", "") == "is not the address of a run"
    assert house.hub.asked == []


def test_a_page_without_links_is_verified(house, tmp_path):
    done = house("verify", "--page", ROOT / "docs" / "BENCHMARKS.md", "--record", tmp_path / "none.csv", runs=None)
    assert (done.code, done.out) == (0, "0 of 0 links are as recorded\n")
