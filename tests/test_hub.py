"""cloud/hub.py against a stand-in for the Hub (loopback_hub.py)."""

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest
from loopback_hub import Loopback, begin, call_main, connect, files_in, spec
from tools import FAKE, finish

from benchmark.runs import difference, progress, read_json, read_result
from cloud import hub

DEV, PUBLIC = "me/dev", "me/public"


@pytest.fixture
def there(tmp_path, monkeypatch) -> Loopback:
    return connect(tmp_path / "hub", monkeypatch)


@pytest.fixture
def main(there, monkeypatch, capsys):
    return lambda *words, code=0: call_main(hub, words, monkeypatch, capsys, code)


def test_many_finished_runs_are_one_commit_and_come_back_as_they_were(there, main, tmp_path):
    runs, names = tmp_path / "runs", ["s/A__fake__1", "s/A__fake__2", "t/A__fake__1"]
    for name in (*names, "s/A__fake__1.old-1"):
        folder = finish(spec(tmp_path, f"runs/{name}"))
        for extra in ("checkpoint.pt", "x.lock", "x.tmp"):
            (folder / extra).touch()
    begin(spec(tmp_path, "runs/s/unfinished"), 100)
    main("push", runs / "s", runs / "t", "--runs-dir", runs)
    assert (there.root / "commits").read_text() == "3 runs\n" and (there.root / "me-dev.private").exists()
    assert [line.split()[-1] for line in main("list").splitlines()[:-1]] == names
    main("pull", "s", "*A__fake__1", "--runs-dir", tmp_path / "here")
    expected = {f"{name}/{x}" for name in names for x in ("args.json", "episodes.csv", "fake.py", "result.json")}
    pulled = files_in(tmp_path / "here")
    assert set(pulled) == expected and all(path.read_bytes() == (runs / x).read_bytes() for x, path in pulled.items())


def test_a_pull_replaces_nothing_that_is_better(there, main, tmp_path):
    runs, here = tmp_path / "runs", tmp_path / "here"
    for name in ("finished", "both"):
        finish(spec(tmp_path, f"runs/s/{name}"))
    main("push", runs, "--runs-dir", runs)
    for name, step in (("ahead", 500), ("behind", 50)):
        begin(spec(tmp_path, f"runs/s/{name}"), 100)
        begin(spec(tmp_path, f"here/s/{name}"), step)
        hub.Hub(DEV).save(runs, f"s/{name}")
    begin(spec(tmp_path, "here/s/finished"), 500)
    finish(spec(tmp_path, "here/s/both"), final_return=5.0)
    main("pull", "s", "--unfinished", "--runs-dir", here)
    steps = {x.name: progress(x)[0] for x in (here / "s").iterdir()}
    expected = {"finished": 1000, "finished.old-1": 500, "both": 1000, "ahead": 500}
    assert steps == expected | {"behind": 100, "behind.old-1": 50}
    assert read_result(here / "s/both")["final_return"] == 5.0


def test_what_is_damaged_or_hidden_or_cannot_be_reached_is_not_taken(there, main, tmp_path):
    finish(spec(tmp_path, "runs/s/A__fake__1"))
    main("push", tmp_path / "runs/s", "--runs-dir", tmp_path / "runs")
    (there.root / "corrupt").touch()
    main("pull", "s", "--runs-dir", tmp_path / "here", code=1)
    assert not list((tmp_path / "here").iterdir())
    (there.bucket(DEV) / "s/.ssh").mkdir(parents=True)
    (there.bucket(DEV) / "s/.ssh/args.json").touch()
    assert [x.name for x in hub.Hub(DEV).find()] == ["s/A__fake__1"]
    (there.root / "down").touch()
    assert main("list", code=1).startswith("error: ") and hub.reason(OSError("bad\n hf_token")) == "bad ***"


@pytest.mark.parametrize("change", [{}, {"learning_rate": 0.1}], ids=["same", "other"])
@pytest.mark.parametrize("requests", [0, 1])
def test_a_state_can_be_resumed_after_an_interrupted_upload(requests, change, there, tmp_path, monkeypatch):
    """The rows that its checkpoint counts on are there."""
    runs, name, mine = tmp_path / "runs", "s/A__fake__1", hub.Hub(DEV)
    mine.create()
    first, second = spec(tmp_path, f"runs/{name}"), spec(tmp_path, f"runs/{name}", **change)
    begin(first, 100)
    mine.save(runs, name)
    shutil.rmtree(runs)
    begin(second, 200)
    upload, left = there.batch_bucket_files, iter(range(requests))
    monkeypatch.setattr(mine.api, "batch_bucket_files", lambda *args, **kw: [upload(*args, **kw) for _ in [next(left)]])
    with pytest.raises(StopIteration):
        mine.save(runs, name)
    state = there.bucket(DEV) / name
    assert read_json(state / "checkpoint.pt")["step"] == 100 <= progress(state)[0] and not difference(state, first)


@pytest.mark.parametrize("ends", [False, True], ids=["continues", "ends"])
def test_what_is_uploaded_is_consistent_while_the_run(ends, there, tmp_path, monkeypatch):
    folder = begin(spec(tmp_path, "runs/s/A__fake__1"), 100)

    def copy(source, target, copy=shutil.copy2):
        """Between two files the run writes more rows and the next checkpoint, or its result."""
        with (folder / "episodes.csv").open("a") as file:
            file.write("200,200,1.0,1\n")
        (folder / "new").write_text('{"step": 200}')
        (folder / "new").replace(folder / ("result.json" if ends else "checkpoint.pt"))
        (folder / "checkpoint.pt").unlink(missing_ok=ends) if ends else None
        copy(source, target)

    monkeypatch.setattr(shutil, "copy2", copy)
    hub.Hub(DEV).create()
    hub.Hub(DEV).save(tmp_path / "runs", "s")
    state = there.bucket(DEV) / "s/A__fake__1"
    assert (state / "checkpoint.pt").exists() != ends == (state / "result.json").exists()
    assert ends or read_json(state / "checkpoint.pt")["step"] <= progress(state)[0]


def test_pushing_moves_what_is_finished_to_the_repository_and_keeps_the_rest(there, tmp_path):
    runs, mine = tmp_path / "runs", hub.Hub(DEV)
    for name in ("A__fake__1", "A__fake__2", "of-another-job"):
        begin(spec(tmp_path, f"runs/s/{name}"), 100)
    (runs / "s/journal.log").write_text("journal")
    mine.create()
    mine.save(runs, "s")
    for name in ("A__fake__1", "of-another-job"):
        shutil.rmtree(runs / "s" / name)
    finish(spec(tmp_path, "runs/s/A__fake__1"))
    mine.push(runs, "s")
    assert {Path(x).parent.name for x in files_in(there.repository(DEV))} == {"A__fake__1"}
    assert {x.split("/")[1] for x in files_in(there.bucket(DEV))} == {"A__fake__2", "of-another-job", "journal.log"}
    mine.pull(tmp_path / "here", mine.find("s"))
    assert (tmp_path / "here/s/journal.log").read_text() == "journal"


def test_publishing_copies_clean_runs_and_keeps_a_table_and_a_card(there, main, tmp_path):
    runs = tmp_path / "runs"
    for name, score in (("s/A__fake__1", 10.0), ("s/A__fake__2", 20.0), ("s/dirty", 0.0), ("t/A__fake__1", 30.0)):
        about = finish(spec(tmp_path, f"runs/{name}"), eval_return_mean=score) / "args.json"
        if "dirty" in name:
            about.write_text(json.dumps(read_json(about) | {"commit": "0-dirty"}))
    main("push", runs, "--runs-dir", runs)
    main("publish", "s", "--target", PUBLIC, "--dry-run")
    assert not there.repository(PUBLIC).exists()
    for suite in ("s", "t"):
        main("publish", suite, "--target", PUBLIC)
    table = pd.read_csv(there.repository(PUBLIC) / "runs.csv")
    assert list(table.run) == ["s/A__fake__1", "s/A__fake__2", "t/A__fake__1"] and set(table.script) == {"fake"}
    assert list(table.eval_return_mean) == [10, 20, 30] and (there.root / "me-public.public").exists()
    assert {x.rpartition("/")[0] for x in files_in(there.repository(PUBLIC))} == {"", *table.run}
    card = (there.repository(PUBLIC) / "README.md").read_text()
    assert card.startswith("---\n") and "| A-v1 | fake | 3 |" in card and "| 20.0 |" in card
    main("pull", "s", "--repo", PUBLIC, "--runs-dir", tmp_path / "here")
    assert (tmp_path / "here/s/A__fake__1/fake.py").read_text() == FAKE
