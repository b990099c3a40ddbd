"""From a finished run to a link on the page that can be verified: report.py, benchmark/graduate.py, cloud/hub.py."""

import sys
from types import SimpleNamespace

import pytest
from huggingface_hub import constants
from loopback import LoopbackHub
from test_report import SUITE, make_run, page, rows

from benchmark import graduate, report, suites
from cloud import hub

DEV, PUBLIC = "me/folio-dev", "me/folio"


@pytest.fixture
def house(tmp_path, monkeypatch):
    """A suite, runs, results, and the stand-in for the Hub."""
    server = LoopbackHub()
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    for name, value in {"HF_TOKEN": "hf_good", "FOLIO_HUB": DEV, "FOLIO_HUB_PUBLIC": PUBLIC}.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "suites").mkdir()
    toml = tmp_path / "suites" / "toys.toml"
    toml.write_text(SUITE)
    monkeypatch.setattr(suites, "SUITES", tmp_path / "suites")
    folders = {name: tmp_path / name for name in ("runs", "results", "suites", "docs")}
    words = [word for name, folder in folders.items() for word in (f"--{name}-dir", folder)]
    yield SimpleNamespace(base=tmp_path, words=words, suite=suites.load(toml), toml=toml, server=server, **folders)
    server.stop()


@pytest.fixture
def call(monkeypatch, capfd):
    def call(module, *words) -> SimpleNamespace:
        monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, words)])
        capfd.readouterr()
        code = 0
        try:
            module.main()
        except SystemExit as end:
            code = end.code
        return SimpleNamespace(code=int(code or 0), **capfd.readouterr()._asdict())

    return call


def test_from_a_run_to_a_link_that_can_be_verified(house, call):
    for seed in (1, 2):
        make_run(house, seed=seed)
    make_run(house, seed=3, commit="0123456-dirty")
    make_run(house, entry=2, seed=1)
    assert call(report, *house.words).code == 0
    assert "Run folders of" not in page(house)
    assert call(hub, "push", "--all", "--yes", "--runs-dir", house.runs).code == 0
    run = ("toys", "--results-dir", house.results)
    planned = call(graduate, *run, "--dry-run")
    assert planned.code == 0 and "3 to graduate from me/folio-dev to me/folio, 0 are there" in planned.out
    assert PUBLIC not in house.server.repos and not (house.results / "hub.csv").exists()
    done = call(graduate, *run)
    assert done.code == 0 and "3 graduated" in done.out and done.out.count("uncommitted") == 1, done
    names = set(hub.read_record(house.results / "hub.csv"))
    assert names == {"toys/CartPole-v1__ppo__1", "toys/CartPole-v1__ppo__2", "toys/CartPole-v1__dqn__1"}
    index = house.server.files(PUBLIC)["README.md"].decode()
    assert all(f"[{name}]({name}/README.md)" in index for name in names) and "450.0" in index and "0123456" in index
    assert call(report, "--no-collect", *house.words).code == 0
    verify = ("verify", "--page", house.docs / "BENCHMARKS.md", "--record", house.results / "hub.csv")
    (line,) = [x for x in page(house).splitlines() if x.startswith("Run folders of `ppo`")]
    commit = house.server.repos[PUBLIC]["branches"]["main"]
    url = f"{house.server.url}/{PUBLIC}/tree/{commit}/toys/CartPole-v1__ppo__"
    assert line == f"Run folders of `ppo`, by seed: [1]({url}1) [2]({url}2)"
    checked = call(hub, *verify)
    assert checked.code == 0 and "3 of 3 links" in checked.out, checked
    again = call(graduate, *run)
    assert again.code == 0 and "0 to graduate" in again.out and "3 are there" in again.out

    make_run(house, seed=2, final=499.0, started="Mon Feb  2 00:00:00 2026")  # run again: the old link is not its own
    assert call(report, *house.words).code == 0
    assert f"[1]({url}1)" in page(house) and f"({url}2)" not in page(house)
    assert call(graduate, *run).code == 1  # the development repository has the old one still
    assert hub.read_record(house.results / "hub.csv")["toys/CartPole-v1__ppo__2"]["url"] == url + "2"
    call(hub, "push", house.runs / "toys" / "CartPole-v1__ppo__2", "--runs-dir", house.runs)
    assert call(graduate, *run).code == 0 and call(report, "--no-collect", *house.words).code == 0
    assert f"[1]({url}1)" in page(house) and page(house).count("CartPole-v1__ppo__2)") == 1
    checked = call(hub, *verify)
    assert checked.code == 0 and "3 of 3 links" in checked.out, checked
    assert "499.0" in house.server.files(PUBLIC)["README.md"].decode()


def test_only_runs_with_the_suites_flags_graduate(house, call):
    folder = make_run(house)
    call(report, *house.words)
    call(hub, "push", folder, "--runs-dir", house.runs)
    house.toml.write_text(SUITE.replace("steps = 100_000", "steps = 200_000"))
    assert len(rows(house)) == 1
    done = call(graduate, "toys", "--results-dir", house.results)
    assert done.code == 0 and "0 to graduate" in done.out and PUBLIC not in house.server.repos


def test_a_run_that_is_not_there_is_named_and_the_others_graduate(house, call):
    for seed in (1, 2):
        make_run(house, seed=seed)
    call(report, *house.words)
    call(hub, "push", house.runs / "toys" / "CartPole-v1__ppo__1", "--runs-dir", house.runs)
    done = call(graduate, "toys", "--results-dir", house.results)
    assert done.code == 1 and "1 graduated" in done.out and done.err.count("\n") == 1, done
    assert "CartPole-v1__ppo__2: me/folio-dev does not have it finished" in done.err


def test_bad_input_and_a_hub_that_is_gone_are_one_line(house, call, monkeypatch):
    assert "suite" in call(graduate).err
    assert call(graduate, "nothing").code == 2
    make_run(house)
    call(report, *house.words)
    hub.create(hub.open_hub(DEV), private=True)
    nothing = call(graduate, "toys", "--results-dir", house.results)  # the development repository has no run
    assert nothing.code == 1 and nothing.out.endswith("\n0 graduated\n") and not (house.results / "hub.csv").exists()
    call(hub, "push", "--all", "--yes", "--runs-dir", house.runs)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    house.server.stop()
    done = call(graduate, "toys", "--results-dir", house.results)
    house.server.start()
    assert done.code == 1 and "cannot be reached" in done.err and done.err.count("\n") == 1
    assert not (house.results / "hub.csv").exists()
    monkeypatch.delenv("FOLIO_HUB_PUBLIC")
    assert "FOLIO_HUB_PUBLIC" in call(graduate, "toys", "--results-dir", house.results).err


def test_a_page_is_the_same_with_an_empty_record(house, call):
    make_run(house)
    call(report, *house.words)
    before = page(house)
    hub.write_record(house.results / "hub.csv", {})
    call(report, "--no-collect", *house.words)
    assert page(house) == before
