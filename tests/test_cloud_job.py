"""cloud/job.py: a job that is killed, started twice, cut off from the Hub or told to stop ends with the result of one
that was left in peace. All state travels through a stand-in for the Hub (loopback.py); every job is a process."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT, TIMEOUT, bits, lives
from loopback import LoopbackHub

from cloud import job

DEV = "me/folio-dev"

FAKE = """
import hashlib, json, os, shutil, sys, time
from pathlib import Path

given = dict(zip(sys.argv[1::2], sys.argv[2::2]))
folder = Path(given.get("--resume") or given["--run-dir"])
journal = Path(os.environ["JOURNAL"])


def write(name, content):
    (folder / "aside").write_text(json.dumps(content))
    (folder / "aside").replace(folder / name)


def tell(*words):
    with journal.open("a") as file:
        file.write(" ".join(map(str, (os.getpid(), *words))) + "\\n")


if given.get("--mode") == "refuse":
    print("error: bad input", file=sys.stderr)
    sys.exit(2)
if "--resume" not in given:
    folder.mkdir(parents=True)
    flags = {"env_id": "A-v1", "seed": int(given.get("--seed", 1)), "mode": given.get("--mode", "")}
    flags |= {"steps": int(given.get("--steps", 30)), "pace": float(given.get("--pace", 0.02))}
    shutil.copy(__file__, folder)
    write("args.json", {"args": flags, "command": sys.argv})
args = json.loads((folder / "args.json").read_text())["args"]
state = {"step": 0, "chain": str(args["seed"]), "size": 26}
if (folder / "checkpoint.pt").exists():
    state = json.loads((folder / "checkpoint.pt").read_text())
tell("from", state["step"], os.environ.get("HF_TOKEN"))
log = (folder / "episodes.csv").open("a+")
if state["step"]:
    assert log.tell() >= state["size"], "rows are missing"
    os.truncate(log.fileno(), state["size"])
elif log.tell() == 0:
    log.write("step,seconds,return,length\\n")
try:
    while state["step"] < args["steps"]:
        time.sleep(args["pace"])
        step = state["step"] + 1
        chain = hashlib.sha256((state["chain"] + str(step)).encode()).hexdigest()
        log.write(f"{step},{step / 10},{int(chain[:4], 16)}.0,7\\n")
        log.flush()
        state = {"step": step, "chain": chain, "size": log.tell()}
        if step % 5 == 0:
            write("checkpoint.pt", state)
        while args["mode"] == "wait" and step == 12 and not journal.with_name("go").exists():
            time.sleep(0.01)
        while args["mode"] == "wait" and step == 17 and journal.with_name("not yet").exists():
            time.sleep(0.01)
        if args["mode"] == "diverge" and step == 12:
            print("error: diverged", flush=True)
            sys.exit(3)
except KeyboardInterrupt:
    tell("interrupted")
    sys.exit(130)
(folder / "agent.safetensors").write_text(state["chain"])
write("result.json", {"final_return": 1.0, "steps": state["step"]})
tell("end")
"""


class Cloud:
    """Machines: empty folders with the code, in which jobs are started; and the Hub."""

    def __init__(self, path: Path):
        self.path, self.hub, self.machines = path, LoopbackHub(), []
        self.script = FAKE

    def machine(self) -> Path:
        folder = self.path / f"machine-{len(self.machines)}"
        (folder / "algos").mkdir(parents=True)
        (folder / "algos" / "fake.py").write_text(self.script)
        self.machines.append(folder)
        return folder

    def start(self, *words, name: str = "s/r", on: Path | None = None, flags=(), script="algos/fake.py", **env):
        """A job on a new machine, or on one that is there."""
        command = [sys.executable, ROOT / "cloud" / "job.py", name, "--push-every", 0, "--retry", 0.003, *flags]
        command += ["--", *(words if flags[:1] == ("--many",) else [sys.executable, script, *words])]
        given = os.environ | {"HF_ENDPOINT": self.hub.url, "HF_TOKEN": "hf_good", "FOLIO_HUB": DEV}
        given |= {"HF_HUB_DISABLE_XET": "1", "HF_HOME": str(self.path / "hf"), "PYTHONPATH": str(ROOT)}
        given |= {"JOURNAL": str(self.path / "journal"), "PYTHONUNBUFFERED": "1"} | env
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen([*map(str, command)], cwd=on or self.machine(), env=given, **pipes)

    def run(self, *words, **kwargs) -> SimpleNamespace:
        return finish(self.start(*words, **kwargs))

    def journal(self, *kinds: str) -> list[list[str]]:
        """What the scripts wrote: process id, what happened, ..."""
        path = self.path / "journal"
        lines = [line.split() for line in path.read_text().splitlines()] if path.exists() else []
        return [line for line in lines if not kinds or line[1] in kinds]

    def there(self, branch: str = "main", name: str = "s/r") -> dict[str, bytes]:
        repo = self.hub.repos.get(DEV)
        if repo is None or branch not in repo["branches"]:
            return {}
        files = self.hub.files(DEV, branch)
        return {path.removeprefix(f"{name}/"): data for path, data in files.items() if path.startswith(f"{name}/")}

    def state(self) -> dict:
        """The checkpoint of the unfinished run on the Hub."""
        return json.loads(self.there("run-s--r").get("checkpoint.pt", '{"step": 0}'))


def finish(process: subprocess.Popen) -> SimpleNamespace:
    try:
        out, err = process.communicate(timeout=TIMEOUT)
    finally:
        process.kill()
    assert "hf_" not in out + err
    return SimpleNamespace(code=process.returncode, out=out, err=err)


def until(condition, process: subprocess.Popen | None = None, what: str = "it") -> None:
    end = time.monotonic() + TIMEOUT
    while not condition():
        ended = process is not None and process.poll() is not None
        assert not ended, f"ended: {process.communicate()}"
        assert time.monotonic() < end, f"waited in vain for {what}"
        time.sleep(0.01)


def kill(process: subprocess.Popen) -> None:
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL


def result(steps: int = 30, seed: int = 1) -> tuple[bytes, list[str]]:
    """The agent and the episodes of a run that was left in peace."""
    chain, rows = str(seed), []
    for step in range(1, steps + 1):
        chain = hashlib.sha256((chain + str(step)).encode()).hexdigest()
        rows.append(f"{step},{step / 10},{int(chain[:4], 16)}.0,7")
    return chain.encode(), rows


def end_of(files: dict[str, bytes]) -> tuple[bytes, list[str]]:
    return files["agent.safetensors"], files["episodes.csv"].decode().splitlines()[1:]


@pytest.fixture
def cloud(tmp_path) -> Cloud:
    cloud = Cloud(tmp_path)
    yield cloud
    (tmp_path / "go").touch()
    cloud.hub.stop()


# ------------------------------------------------------------------------------------------------------------ one job


def test_a_job_makes_its_run_and_a_second_start_does_nothing(cloud):
    done = cloud.run("--seed", 3)
    assert done.code == 0, done
    assert end_of(cloud.there()) == result(seed=3) and cloud.hub.branches(DEV) == {"main"}
    assert cloud.hub.repos[DEV]["private"] and "claim.json" not in cloud.there()
    assert cloud.journal("from")[0][2:] == ["0", "None"]  # and the command has no token
    again = cloud.run("--seed", 3)
    assert again.code == 0 and "s/r is finished" in again.out and len(cloud.journal("from")) == 1
    assert (cloud.machines[1] / "runs" / "s" / "r" / "result.json").exists()


def test_killed_twice_the_result_is_the_same(cloud):
    """In an empty folder each time: what comes over is on the Hub."""
    (cloud.path / "not yet").touch()
    for stop in (10, 15):
        process = cloud.start("--mode", "wait", "--steps", 60)
        until(lambda step=stop: cloud.state()["step"] == step, process)
        kill(process)
        until(lambda: not lives(cloud.journal("from")[-1][0]), what="the command's end")
        (cloud.path / "go").touch()
    (cloud.path / "not yet").unlink()
    assert cloud.run("--mode", "wait", "--steps", 60).code == 0
    assert end_of(cloud.there()) == result(60) and cloud.hub.branches(DEV) == {"main"}
    assert [int(line[2]) for line in cloud.journal("from")] == [0, 10, 15] and len(cloud.journal("end")) == 1


def test_the_command_does_not_outlive_a_job_that_is_killed(cloud):
    """It would go on beside the next start, and write to its folder where the disk is the same."""
    process = cloud.start("--pace", 100)
    until(lambda: cloud.journal("from"), process)
    (pid, *_) = cloud.journal("from")[0]
    assert lives(pid)
    kill(process)
    end = time.monotonic() + 10
    while lives(pid) and time.monotonic() < end:
        time.sleep(0.01)
    alive = lives(pid)
    if alive:
        os.kill(int(pid), signal.SIGKILL)
    assert not alive


def test_killed_before_its_first_push_it_begins_anew(cloud):
    process = cloud.start("--pace", 100)
    until(lambda: cloud.journal("from"), process)
    kill(process)
    assert set(cloud.there("run-s--r")) == {"claim.json"}
    assert cloud.run("--seed", 1, "--pace", 0).code == 0 and end_of(cloud.there()) == result()


def test_on_the_same_disk_it_goes_on_with_what_is_there(cloud):
    process = cloud.start("--mode", "wait", flags=("--push-every", 100))  # the first checkpoint is pushed, not the next
    until(lambda: (cloud.machines[0] / "runs/s/r/checkpoint.pt").exists() and cloud.state()["step"], process)
    kill(process)
    shutil.rmtree(cloud.machines[0] / "runs/s/r")
    (cloud.path / "go").touch()
    assert cloud.run("--mode", "wait", on=cloud.machines[0]).code == 0
    assert end_of(cloud.there()) == result()


def test_an_unpushed_start_on_the_same_disk_is_resumed(cloud):
    machine = cloud.machine()
    env = {"JOURNAL": str(cloud.path / "journal")}
    words = [sys.executable, "algos/fake.py", "--mode", "wait", "--run-dir", "runs/s/r"]
    process = subprocess.Popen(words, cwd=machine, env=os.environ | env)
    until(lambda: (machine / "runs/s/r/checkpoint.pt").exists(), process)
    process.kill()
    process.wait()
    (cloud.path / "go").touch()
    assert cloud.run("--mode", "wait", on=machine).code == 0
    assert int(cloud.journal("from")[1][2]) >= 5 and end_of(cloud.there()) == result()


def test_other_flags_or_another_script_begin_anew(cloud):
    process = cloud.start("--mode", "wait", "--seed", 1)
    until(lambda: cloud.state()["step"] == 10, process)
    kill(process)
    assert cloud.run("--seed", 2).code == 0 and end_of(cloud.there()) == result(seed=2)
    assert cloud.journal("from")[1][2] == "0"
    cloud.script = FAKE + "\n# changed\n"
    assert cloud.run("--seed", 2).code == 0 and len(cloud.journal("from")) == 3
    assert end_of(cloud.there()) == result(seed=2)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_reaches_the_command_and_its_last_checkpoint_the_hub(number, cloud):
    process = cloud.start("--mode", "wait", flags=("--push-every", 100))
    until(lambda: cloud.state()["step"] and "checkpoint.pt" in os.listdir(cloud.machines[0] / "runs/s/r"), process)
    until(lambda: json.loads((cloud.machines[0] / "runs/s/r/checkpoint.pt").read_text())["step"] == 10, process)
    process.send_signal(number)
    done = finish(process)
    expected = {signal.SIGINT: 130, signal.SIGTERM: 128 + 15}[number]  # the fake script does not catch SIGTERM
    assert done.code == expected and cloud.state()["step"] == 10, done
    assert bool(cloud.journal("interrupted")) == (number == signal.SIGINT)
    (cloud.path / "go").touch()
    assert cloud.run("--mode", "wait").code == 0 and end_of(cloud.there()) == result()


def test_the_exit_code_is_the_commands(cloud):
    done = cloud.run("--mode", "diverge")
    assert done.code == 3 and "error: diverged" in done.out and cloud.state()["step"] == 10
    done = cloud.run("--mode", "refuse", name="other")
    assert done.code == 2 and "error: bad input" in done.out
    assert "run-other" not in cloud.hub.branches(DEV)  # no claim is left of what never began
    done = cloud.run("--mode", "refuse")  # a slip in the flags of a run that has a state
    assert done.code == 2 and cloud.state()["step"] == 10  # does not take the state away


# -------------------------------------------------------------------------------------------------------- two at once


def test_of_two_jobs_the_later_one_has_the_run(cloud):
    first = cloud.start("--mode", "wait", "--steps", 60)
    until(lambda: cloud.state()["step"] == 10, first)
    second = cloud.start("--mode", "wait", "--steps", 60)
    until(lambda: len(cloud.journal("from")) == 2, second)
    assert cloud.journal("from")[1][2] == "10"
    (cloud.path / "go").touch()
    done = [finish(process) for process in (first, second)]
    assert [x.code for x in done] == [0, 0], done
    assert "another job has this run now" in done[0].out and "another job" not in done[1].out
    assert "pushed s/r, finished" in done[1].out and "finished" not in done[0].out
    assert end_of(cloud.there()) == result(60) and cloud.hub.branches(DEV) == {"main"}
    assert not [line for line in cloud.journal("from") if lives(line[0])]
    assert cloud.run("--mode", "wait", "--steps", 60).code == 0 and len(cloud.journal("from")) == 2


@pytest.mark.parametrize("push_every", [0, 100])
def test_a_job_that_finds_the_run_finished_by_another_lets_it_be(push_every, cloud):
    """At its next checkpoint, or only at its end."""
    first = cloud.start("--mode", "wait", flags=("--push-every", push_every))
    until(lambda: cloud.state()["step"], first)
    go, other = cloud.path / "go", {"JOURNAL": str(cloud.path / "elsewhere" / "journal")}
    (cloud.path / "elsewhere").mkdir()
    (cloud.path / "elsewhere" / "go").touch()
    assert cloud.run("--mode", "wait", **other).code == 0
    before = cloud.there()
    go.touch()
    done = finish(first)
    assert done.code == 0 and "another job has this run now" in done.out and cloud.there() == before


def test_a_lost_answer_is_not_another_job(cloud):
    """The commit was made, the connection broke: the branch has moved, by our own hand."""
    (cloud.path / "not yet").touch()
    process = cloud.start("--mode", "wait", "--steps", 40, flags=("--retry", 0.05))
    until(lambda: cloud.state()["step"] == 10, process)
    cloud.hub.lose_answers = 1
    (cloud.path / "go").touch()
    until(lambda: cloud.state()["step"] == 15, process)
    (cloud.path / "not yet").unlink()  # before it tries again, there is more to push
    done = finish(process)
    assert done.code == 0 and "another job" not in done.out and done.out.count("tried again") == 2, done
    assert "412" in done.out and end_of(cloud.there()) == result(40)


def test_a_state_that_is_pushed_by_hand_ends_the_job(cloud):
    """As `cloud/hub.py push --force` says."""
    process = cloud.start("--mode", "wait", "--steps", 60)
    until(lambda: cloud.state()["step"] == 10, process)
    mine = cloud.machine() / "runs" / "s" / "r"
    shutil.copytree(cloud.machines[0] / "runs" / "s" / "r", mine)
    (mine / "checkpoint.pt").write_text('{"step": 1}')
    words = [sys.executable, ROOT / "cloud" / "hub.py", "push", mine, "--force", "--runs-dir", mine.parents[1]]
    env = {"HF_ENDPOINT": cloud.hub.url, "HF_TOKEN": "hf_good", "FOLIO_HUB": DEV, "HF_HUB_DISABLE_XET": "1"}
    subprocess.run(words, env=os.environ | env | {"PYTHONPATH": str(ROOT)}, check=True)
    (cloud.path / "go").touch()
    done = finish(process)
    assert done.code == 0 and "another job has this run now" in done.out and cloud.state()["step"] == 1, done


def test_a_branch_that_was_removed_is_made_again(cloud):
    """Nobody has the run then, and the job goes on with it."""
    process = cloud.start("--mode", "wait", "--steps", 40)
    until(lambda: cloud.state()["step"] == 10, process)
    del cloud.hub.repos[DEV]["branches"]["run-s--r"]
    (cloud.path / "go").touch()
    done = finish(process)
    assert done.code == 0 and "another job" not in done.out and end_of(cloud.there()) == result(40), done


# ---------------------------------------------------------------------------------------------- a Hub that is not well


def test_a_hub_that_goes_away_during_the_run_costs_nothing(cloud):
    process = cloud.start("--mode", "wait", "--steps", 40)
    until(lambda: cloud.state()["step"] == 10, process)
    cloud.hub.stop()
    (cloud.path / "go").touch()
    until(lambda: cloud.journal("end"), process)
    time.sleep(0.5)
    assert process.poll() is None  # it waits for the Hub
    cloud.hub.fail_commits = 3  # which is not well at once
    cloud.hub.start()
    done = finish(process)
    assert done.code == 0 and end_of(cloud.there()) == result(40), done


@pytest.mark.parametrize("trouble", ["gone", "full", "refused"])
def test_out_of_patience_it_says_what_to_do_and_the_run_stays(trouble, cloud):
    process = cloud.start("--mode", "wait", flags=("--patience", 0.01))
    until(lambda: cloud.state()["step"] == 10, process)
    if trouble == "gone":
        cloud.hub.stop()
    cloud.hub.full = trouble == "full"
    if trouble == "refused":
        del cloud.hub.tokens["hf_good"]
    (cloud.path / "go").touch()
    done = finish(process)
    assert done.code == 1 and "push it later: python cloud/hub.py push" in done.err, done
    assert done.err.count("\n") == 1 and "Traceback" not in done.out
    if trouble == "gone":
        cloud.hub.start()
    cloud.hub.full, cloud.hub.tokens["hf_good"] = False, "me"
    later = done.err.partition("push it later: python ")[2].split()
    env = os.environ | {
        "HF_ENDPOINT": cloud.hub.url,
        "HF_TOKEN": "hf_good",
        "FOLIO_HUB": DEV,
        "HF_HUB_DISABLE_XET": "1",
    }
    words = [sys.executable, ROOT / later[0], *later[1:]]
    assert subprocess.run(words, cwd=cloud.machines[0], env=env | {"PYTHONPATH": str(ROOT)}).returncode == 0
    assert end_of(cloud.there()) == result()


def test_without_a_hub_nothing_is_started(cloud):
    cloud.hub.stop()
    done = cloud.run(flags=("--patience", 0.001))
    assert done.code == 1 and "cannot be reached" in done.err and "nothing was started" in done.err
    cloud.hub.start()
    done = cloud.run(HF_TOKEN="hf_bad")
    assert done.code == 1 and "token" in done.err and done.err.count("\n") == 1 and not cloud.journal()


def test_it_waits_for_a_hub_that_is_away_at_the_start(cloud):
    cloud.hub.stop()
    processes = cloud.start(flags=("--retry", 1)), cloud.start()
    assert all("not begun yet" in process.stdout.readline() for process in processes)
    processes[0].send_signal(signal.SIGTERM)
    cloud.hub.start()
    stopped, done = map(finish, processes)
    assert stopped.code == 130 and stopped.err == "error: stopped before it had begun\n"
    assert done.code == 0 and end_of(cloud.there()) == result()


def test_a_damaged_state_is_not_waited_for(cloud):
    process = cloud.start("--mode", "wait")
    until(lambda: cloud.state()["step"] == 10, process)
    kill(process)
    repo = cloud.hub.repos[DEV]
    files = repo["commits"][repo["branches"]["run-s--r"]]
    files["s/r/checkpoint.pt"] = files["s/r/episodes.csv"]
    done = cloud.run("--mode", "wait")
    assert done.code == 1 and "checkpoint.pt is not what SHA256SUMS says; nothing was started" in done.err, done
    assert done.err.count("\n") == 1 and len(cloud.journal("from")) == 1


# ----------------------------------------------------------------------------------------------------------- many runs


SEVERAL = """
for seed in 1 2 3; do
    if [ -e runs/s/$seed/result.json ]; then continue; fi
    if [ $seed = 2 ]; then mode="--mode wait"; else mode=""; fi
    if [ -e runs/s/$seed/args.json ]; then run="--resume runs/s/$seed"; else run="--run-dir runs/s/$seed"; fi
    PYTHON algos/fake.py $run --seed $seed $mode || exit $?
done
"""


def test_many_runs_of_one_command_come_and_go_as_well(cloud):
    words = "bash", "-c", SEVERAL.replace("PYTHON", sys.executable)
    process = cloud.start(*words, name="s", flags=("--many",))
    until(lambda: "checkpoint.pt" in cloud.there("run-s--2", "s/2") and cloud.there(name="s/1"), process)
    kill(process)
    assert end_of(cloud.there(name="s/1")) == result(seed=1)
    (cloud.path / "go").touch()
    done = cloud.run(*words, name="s", flags=("--many",))
    assert done.code == 0 and "pulled 2 runs of s" in done.out, done
    assert [end_of(cloud.there(name=f"s/{seed}")) for seed in (1, 2, 3)] == [result(seed=seed) for seed in (1, 2, 3)]
    assert cloud.hub.branches(DEV) == {"main"}
    assert [line[2] for line in cloud.journal("from")] == ["0", "0", "10", "0"]  # the second was resumed


def test_many_runs_go_on_when_another_job_takes_one(cloud):
    words = "bash", "-c", SEVERAL.replace("PYTHON", sys.executable)
    process = cloud.start(*words, name="s", flags=("--many",))
    until(lambda: "checkpoint.pt" in cloud.there("run-s--2", "s/2"), process)
    elsewhere = cloud.path / "elsewhere" / "journal"
    elsewhere.parent.mkdir()
    other = cloud.start("--seed", 2, "--mode", "wait", name="s/2", JOURNAL=str(elsewhere))
    until(lambda: elsewhere.exists() and " from 10" in elsewhere.read_text(), other)
    (cloud.path / "go").touch()
    done = finish(process)
    kill(other)
    assert done.code == 0 and "another job has s/2 now" in done.out, done
    assert end_of(cloud.there(name="s/3")) == result(seed=3) and "result.json" not in cloud.there(name="s/2")


# ----------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "words, part",
    [
        (["r"], "no command"),
        (["r", "--", "ls"], "no script in ls"),
        (["r", "--", "python", "algos/missing.py"], "algos/missing.py"),
        (["a--b", "--", "python", "x.py"], "cannot be a run's name"),
        (["r", "--", "python", "x.py", "--run-dir", "runs/x"], "--run-dir cannot be in a job's command"),
        (["r", "--", "python", "x.py", "--evaluate=runs/x"], "--evaluate cannot be in a job's command"),
        (["r", "--push-every", "-1", "--", "python", "x.py"], "--push-every"),
        (["r", "--repo", "x", "--", "python", "x.py"], "is no repository"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_bad_input_is_one_line(words, part, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.py").touch()
    monkeypatch.setattr(sys, "argv", ["cloud/job.py", *words])
    with pytest.raises(SystemExit) as end:
        job.main()
    out, err = capsys.readouterr()
    assert end.value.code == 2 and out == "" and err.startswith("error: ") and err.count("\n") == 1 and part in err
    assert [path.name for path in tmp_path.iterdir()] == ["x.py"]


# ----------------------------------------------------------------------------------------------------------- the chain


def test_the_whole_chain_with_a_real_script(cloud):
    """ppo.py on CartPole, killed twice with SIGKILL, ends with the bits of a run that was left in peace."""
    flags = "--total-timesteps", 40_000, "--checkpoint-every", 4_000, "--eval-episodes", 2, "--device", "cpu"
    script = ROOT / "algos" / "ppo.py"
    alone = [sys.executable, script, *map(str, flags), "--run-dir", "alone"]
    undisturbed = subprocess.Popen(alone, cwd=cloud.path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    pushed = b""
    for _ in range(2):
        process = cloud.start(*flags, script=script)
        until(lambda before=pushed: cloud.there("run-s--r").get("checkpoint.pt", before) != before, process)
        pushed = cloud.there("run-s--r")["checkpoint.pt"]
        kill(process)
        assert "result.json" not in cloud.there(), "it ended before it could be killed"
    done = cloud.run(*flags, script=script)
    assert done.code == 0 and "--resume" in done.out, done
    assert undisturbed.wait(TIMEOUT) == 0
    folder = cloud.path / "from-the-hub"
    folder.mkdir()
    for path, data in cloud.there().items():
        (folder / path).write_bytes(data)
    assert bits(folder) == bits(cloud.path / "alone")
    assert len(cloud.machines) == 3 and not (cloud.machines[2] / "alone").exists()
