"""tuner/run.py --backend dstack: a search on rented machines is the search at home. A repository of its own with a
script that only pretends to learn, through the stand-ins for dstack's CLI (loopback_dstack.py) and the Hub."""

import csv
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, finish, lives
from loopback import LoopbackHub
from optuna.trial import TrialState
from test_tuner import House, wait_until

TESTS = Path(__file__).resolve().parent
TOKEN, DEV = "hf_good", "me/folio-dev"


class Cloud(House):
    """A repository with the tuner and a script of one's own, a Hub, and machines that are folders."""

    python = sys.executable  # of the worker; the machines have ours

    def __init__(self, path: Path):
        (path / "repo").mkdir()
        super().__init__(path / "repo")
        for name in ("benchmark", "cloud", "tuner"):
            skip = shutil.ignore_patterns("__pycache__", "results")
            shutil.copytree(ROOT / name, self.path / name, ignore=skip)
        (self.path / ".gitignore").write_text("__pycache__/\nruns/\nstudies/\n")
        who = ["-c", "user.name=me", "-c", "user.email=me@example.org"]
        for words in (["init", "-q"], ["add", "-A"], [*who, "commit", "-q", "-m", "all"]):
            subprocess.run(["git", *words], cwd=self.path, check=True)
        self.hub, self.rented, self.gate, cli = LoopbackHub(), path / "machines", path / "go", path / "dstack"
        self.rented.mkdir()
        cli.write_text(f'#!/bin/sh\nexec {sys.executable} {TESTS / "loopback_dstack.py"} "$@"\n')
        cli.chmod(0o755)
        self.env = os.environ | {"PYTHONPATH": str(self.path), "HF_TOKEN": TOKEN, "FOLIO_HUB": DEV}
        self.env |= {"HF_ENDPOINT": self.hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(path / "hf")}
        self.env |= {"FOLIO_DSTACK": str(cli), "LOOPBACK_DSTACK": str(self.rented)}

    def start(self, *words, backend: str | None = "dstack") -> subprocess.Popen:
        code = "from cloud import dstack; dstack.LOOK = 0.3; from tuner import run; run.main()"
        words = [*words, "--studies", "studies", *(["--backend", backend] if backend else [])]
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        command = [self.python, "-c", code, *map(str, words)]
        return subprocess.Popen(command, cwd=self.path, env=self.env, **pipes)

    def machines(self) -> list[Path]:
        return sorted(self.rented.glob("*.*"))

    def at_work(self) -> list[Path]:
        return [x for x in self.machines() if lives((x / "pid").read_text().strip())]

    def begun(self) -> int:
        """Scripts that wait on a machine, with what they have so far on the Hub."""
        return sum("pushed" in (x / "log").read_text() for x in self.machines() if (x / "log").exists())

    def let_go(self) -> None:
        self.gate.touch()

    def waiting(self) -> dict:
        """Flags of a script that waits in its middle until it is let go."""
        return {"mode": "wait", "go": str(self.gate)}

    def table(self) -> list[dict]:
        """trials.csv without what no two runs have in common."""
        with (self.trials.parent / "trials.csv").open() as file:
            return [{key: x for key, x in row.items() if key != "started"} for row in csv.DictReader(file)]


@pytest.fixture
def cloud(tmp_path):
    house = Cloud(tmp_path)
    yield house
    for machine in house.machines():
        if lives((machine / "pid").read_text().strip()):
            os.kill(int((machine / "pid").read_text()), signal.SIGKILL)
    house.hub.stop()


def test_a_search_in_the_cloud_is_the_search_at_home_and_so_is_a_validation(cloud):
    cloud.space(trials=3, start={"rate": 1e-4})
    done = cloud.run("search", "s.toml")
    assert done.code == 0 and "loopback" in done.out and "$0.01" in done.out, done.err  # what a machine costs
    assert len(cloud.machines()) == 3 and not cloud.at_work() and cloud.hub.branches(DEV) == {"main"}
    assert {x.rsplit("/", 1)[0] for x in cloud.hub.files(DEV) if "/" in x} == {
        f"studies/s/trials/{n}/seed-101" for n in range(3)
    }
    there, values = cloud.table(), [x.intermediate_values for x in cloud.study().trials]
    assert not list(cloud.trials.rglob("*.lock"))
    assert "dstack: submitted as" in (cloud.trials / "1" / "seed-101.log").read_text()

    validated = cloud.run("validate", "s", "--seeds", 2)
    assert validated.code == 0 and len(cloud.machines()) == 7, validated.err
    page = (cloud.trials.parent / "validation.md").read_text()
    shutil.rmtree(cloud.trials.parent / "validation")
    assert cloud.run("validate", "s", "--seeds", 2).code == 0 and len(cloud.machines()) == 7  # the Hub has them
    assert (cloud.trials.parent / "validation.md").read_text() == page

    shutil.rmtree(cloud.path / "studies")
    at_home = finish(cloud.start("search", "s.toml", backend="local"))
    assert at_home.code == 0 and len(cloud.machines()) == 7, at_home.err
    assert cloud.table() == there and [x.intermediate_values for x in cloud.study().trials] == values
    assert finish(cloud.start("validate", "s", "--seeds", 2, backend="local")).code == 0
    assert (cloud.trials.parent / "validation.md").read_text() == page


def test_jobs_outlive_a_killed_worker_and_the_next_one_finds_them(cloud):
    cloud.space(trials=3, fixed=cloud.waiting())
    process = cloud.start("search", "s.toml", "--jobs", 2)
    wait_until(lambda: cloud.begun() == 2, process)
    process.kill()
    process.communicate()
    assert len(cloud.at_work()) == 2
    cloud.let_go()
    done = cloud.run("search", "s.toml", "--jobs", 2)
    assert done.code == 0 and done.out.count("complete  trial") == 3, done
    assert [x.state for x in cloud.study().trials] == [TrialState.COMPLETE] * 3
    assert len(cloud.machines()) == 3 and not cloud.at_work() and cloud.hub.branches(DEV) == {"main"}


def test_ctrl_c_stops_the_jobs_and_they_go_on_where_they_were(cloud):
    cloud.space(trials=1, fixed=cloud.waiting())
    process = cloud.start("search", "s.toml")
    wait_until(lambda: cloud.begun() == 1, process)
    process.send_signal(signal.SIGINT)
    assert finish(process).code == 130
    wait_until(lambda: not cloud.at_work())
    cloud.let_go()
    assert cloud.run("search", "s.toml").code == 0
    assert len(cloud.machines()) == 2 and "--resume" in (cloud.machines()[1] / "log").read_text()
    assert cloud.study().trials[0].state == TrialState.COMPLETE


def test_a_poor_trial_is_stopped_and_leaves_nothing_on_the_hub(cloud):
    """The first one has the best flags there are. The others wait after the push that shows how poor they are."""
    flags = cloud.waiting() | {"go": "go"}  # on its own machine
    cloud.space(trials=3, pruner="median", startup=1, grace=5, milestones=[5], fixed=flags, start={"rate": 1e-2})
    process = cloud.start("search", "s.toml", "--jobs", 1)
    wait_until(lambda: cloud.begun() == 1, process)
    (cloud.machines()[0] / "folio" / "go").touch()
    done = finish(process)
    assert done.code == 0, done.err
    states = [x.state for x in cloud.study().trials]
    assert states == [TrialState.COMPLETE, TrialState.PRUNED, TrialState.PRUNED]
    assert [x.last_step for x in cloud.study().trials] == [60, 5, 5]
    wait_until(lambda: not cloud.at_work())
    assert len(cloud.machines()) == 3 and cloud.hub.branches(DEV) == {"main"}
    assert not any("/trials/1/" in path or "/trials/2/" in path for path in cloud.hub.files(DEV))


def test_a_trial_that_another_machine_has_taken_keeps_its_job(cloud):
    cloud.space(trials=1, fixed=cloud.waiting())
    process = cloud.start("search", "s.toml", "--orphaned-after", 2)
    wait_until(lambda: cloud.begun() == 1, process)
    journal = cloud.study()
    owner = {"worker": "theirs", "machine": "theirs", "beat": 0}
    journal._storage.set_trial_user_attr(journal.trials[0]._trial_id, "owner", owner)
    done = finish(process)  # it sees that somebody is at it, and has nothing else to do
    assert done.code == 0 and "was taken over by another worker" in done.out and len(cloud.at_work()) == 1, done
    process = cloud.start("search", "s.toml", "--orphaned-after", 2)
    log = cloud.trials / "0" / "seed-101.log"
    wait_until(lambda: "is active already" in log.read_text(), process)
    cloud.let_go()
    assert finish(process).code == 0 and len(cloud.machines()) == 1
    assert journal.trials[0].state == TrialState.COMPLETE


def test_what_another_search_of_this_name_has_left_is_not_taken_for_this_one(cloud):
    """Neither its job, which is still at work, nor its episodes on the Hub."""
    cloud.space(trials=1, fixed=cloud.waiting(), start={"rate": 1e-4})
    process = cloud.start("search", "s.toml")
    wait_until(lambda: cloud.begun() == 1, process)
    process.kill()
    process.communicate()
    shutil.rmtree(cloud.path / "studies")
    cloud.space(trials=1, fixed=cloud.waiting(), start={"rate": 1e-2})
    done = cloud.run("search", "s.toml")
    assert "is active already, by another command" in done.out and len(cloud.machines()) == 1, done
    assert cloud.study().trials[0].state == TrialState.FAIL and len(cloud.at_work()) == 1
    os.kill(int((cloud.machines()[0] / "pid").read_text()), signal.SIGKILL)
    wait_until(lambda: (cloud.machines()[0] / "code").exists())
    shutil.rmtree(cloud.path / "studies")
    process = cloud.start("search", "s.toml")
    wait_until(lambda: cloud.begun() == 2, process)
    cloud.let_go()
    assert finish(process).code == 0
    reported = cloud.study().trials[0].intermediate_values
    assert reported[10] == pytest.approx(3.03 * 5.5) and reported[60] == pytest.approx(3.03 * 60)


@pytest.mark.parametrize(
    "words, changes, env, part",
    [
        (["--gpus", "0"], {}, {}, "--gpus"),
        (["--runs-per-gpu", "2"], {}, {}, "--runs-per-gpu"),
        (["--template", "tpu"], {}, {}, "there are cpu, fleet, gpu, gpus"),
        (["--name", "a--b"], {}, {}, "cannot be a run's name"),
        ([], {"script": "../theirs.py"}, {}, "are not below"),
        ([], {}, {"HF_TOKEN": ""}, "no token"),
        ([], {}, {"FOLIO_HUB": ""}, "FOLIO_HUB"),
        ([], {}, {"FOLIO_DSTACK": "/missing"}, "uv tool install"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(words, changes, env, part, cloud):
    (cloud.path.parent / "theirs.py").write_text((cloud.path / "learner.py").read_text())
    cloud.space(**changes)
    cloud.env |= env
    done = cloud.run("search", "s.toml", *words)
    lines = [line for line in done.err.splitlines() if not line.startswith("warning: ")]
    assert done.code == 2 and len(lines) == 1 and lines[0].startswith("error: ") and part in lines[0], done
    assert cloud.machines() == [] and not (cloud.path / "studies").exists()
