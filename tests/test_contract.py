"""What every script promises, whatever it computes: started as a user starts it, or main() with a command line."""

import importlib.metadata
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import gymnasium as gym
import imageio
import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import (
    ROOT,
    SCRIPTS,
    arguments,
    bits,
    episodes,
    exit_code,
    family,
    is_asynchronous,
    load,
    make_args,
    named,
    on_step,
    saved_agent,
    start,
    tiny,
    wait_for,
)
from environments import ODD, Counter, FakeGames, Odd
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

# Vector environments can be the user's own. Of the machinery, whose text is the same in every file (test_house), what
# no other part of a script can break is shown by one script, or by one for each kind of environment.
VECTOR = [name for name in SCRIPTS if family(name).suffix != "_atari"]
LEARNERS = [name for name in VECTOR if hasattr(load(name).Args, "gamma")]
repeatable = pytest.mark.parametrize("script", [x for x in SCRIPTS if not is_asynchronous(x)], indirect=True)
vector_scripts = pytest.mark.parametrize("script", VECTOR, indirect=True)
one_of_each = pytest.mark.parametrize("script", ["ppo", "ppo_atari", "sac_continuous"], indirect=True)
one_of_each_vector = pytest.mark.parametrize("script", ["ppo", "sac_continuous"], indirect=True)
one_script = pytest.mark.parametrize("script", ["ppo"], indirect=True)


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """TensorBoard's curves: tag -> (step, value)."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def read_json(folder: Path, name: str) -> dict:
    return json.loads((folder / name).read_text())


def read_checkpoint(folder: Path) -> dict:
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Every file of a folder: its bytes and when it was written."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns) for path in paths}


def is_bad_input(done) -> bool:
    """Exit code 2 and one line, or the box in which tyro reports a usage error."""
    box = re.search(r"\A[^\n]*╭─[^\n]+\n(│[^\n]+│\n)+╰─+╯\s*\Z", done.err + done.out)
    return done.code == 2 and bool(box or re.fullmatch(r"error: [^\n]+\n", done.err))


# ------------------------------------------------------------------------------------------------------ the run folder


def test_help_shows_every_flag(script, call, tmp_path):
    done = call(script, "--help")
    assert done.code == 0 and done.err == "" and not any(tmp_path.iterdir())
    flags = [f"--{field.name.replace('_', '-')}" for field in fields(load(script).Args)]
    listed = re.findall(r"(--[a-z0-9-]+)", done.out)
    assert [flag for flag in flags if flag not in listed] == []


def test_run_folder_holds_these_files(script, finished):
    names = {re.sub(r"^events\.out\.tfevents\..*", "events", path.name) for path in finished.folder.iterdir()}
    files = {"args.json", f"{script}.py", "episodes.csv", "events", "agent.safetensors", "result.json", ".lock"}
    assert names == files  # finished: no checkpoint
    assert (finished.folder / f"{script}.py").read_bytes() == (ROOT / "algos" / f"{script}.py").read_bytes()
    beside = {path.name for path in finished.folder.parent.iterdir()}
    assert beside <= {f"{script}.py", "run", "run.log", "__pycache__"}


def test_args_json_describes_the_run(script, finished):
    described = read_json(finished.folder, "args.json")
    assert described["args"] == vars(make_args(script))  # without run_dir: a folder can be moved
    assert described["command"] == finished.command
    versions = {name: importlib.metadata.version(name) for name in ("torch", "gymnasium", "numpy")}
    assert versions.items() <= described["versions"].items()
    assert described["commit"] == ""  # a copied file belongs to no repository
    assert described["cpu"] and described["threads"] == 1 and described["gpu"] is None
    assert abs(time.mktime(time.strptime(described["started"])) - time.time()) < 3600


def test_episodes_and_result_agree(script, finished):
    result, flags = read_json(finished.folder, "result.json"), tiny(script)
    keys = "final_return eval_return_mean eval_return_std eval_episodes eval_truncated steps seconds sps peak_memory_mb"
    assert set(result) == set(keys.split())
    header, *rows = (finished.folder / "episodes.csv").read_text().splitlines()
    assert header == "step,seconds,return,length"
    steps, seconds, returns, lengths = np.array([row.split(",") for row in rows], float).T
    assert len(rows) > 1 and (np.diff(steps) >= 0).all() and (np.diff(seconds) >= 0).all()
    assert 0 < steps[0] and steps[-1] <= result["steps"] and seconds[-1] <= result["seconds"] + 0.01
    assert 0 < lengths.sum() <= result["steps"]  # the rest are steps of episodes that did not end
    assert math.isclose(result["final_return"], np.mean(returns[-100:]))
    assert (result["eval_episodes"], result["eval_truncated"]) == (flags["eval_episodes"], 0)
    assert flags["total_timesteps"] <= result["steps"] == round(result["sps"] * result["seconds"])
    assert 50 < result["peak_memory_mb"] < 100_000


def test_tensorboard_has_the_curves(script, finished):
    curves = scalars(finished.folder)
    assert {f"charts/{x}" for x in ("episodic_return", "episodic_length", "SPS")} <= set(curves)
    if hasattr(load(script).Args, "gamma"):
        assert "charts/learning_rate" in curves and any(tag.startswith("losses/") for tag in curves)
    assert all(re.fullmatch(r"(charts|losses)/\w+", tag) for tag in curves)
    steps = [step for step, _ in curves["charts/SPS"]]
    assert steps == sorted(set(steps)) and steps[-1] == read_json(finished.folder, "result.json")["steps"]
    assert all(math.isfinite(value) for points in curves.values() for _, value in points)


# ------------------------------------------------------------------------------------------------- the same run, always


@repeatable
def test_same_command_same_bits(script, finished, call, tmp_path):
    """Here after much else in this process, there in one of its own with other addresses and hashes."""
    assert call(script, *arguments(script, run_dir="again")).code == 0
    assert bits(tmp_path / "again") == bits(finished.folder)


@pytest.mark.parametrize("script", ["sac_continuous"], indirect=True)
def test_started_by_python(script, finished, tmp_path):
    """The same bits from a file that stands alone, with streams and a folder that do not agree on an alphabet."""
    shutil.copy(ROOT / "algos" / f"{script}.py", tmp_path)
    env = {name: value for name, value in os.environ.items() if name not in ("HOME", "PYTHONPATH")}
    done = subprocess.run(
        [sys.executable, f"{script}.py", *arguments(script, run_dir="ein Lauf, größer")],
        cwd=tmp_path,
        env=env | {"PYTHONIOENCODING": "ascii"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and done.stdout.isascii(), done.stderr
    assert bits(tmp_path / "ein Lauf, größer") == bits(finished.folder)


@one_script
def test_closed_streams(script, finished, tmp_path):
    words = [sys.executable, ROOT / "algos" / f"{script}.py", *arguments(script, run_dir=tmp_path / "run")]
    closed = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh"]
    assert subprocess.run([*closed, *map(str, words)], cwd=tmp_path).returncode == 0
    assert bits(tmp_path / "run") == bits(finished.folder)


@one_script
def test_another_seed_another_run(script, finished, call, tmp_path):
    """With a number as people write it."""
    done = call(script, *arguments(script, run_dir="run", seed=2), "--total-timesteps", "1e3", "--gamma=9e-1")
    assert done.code == 0, done.err
    args, rows = read_json(tmp_path / "run", "args.json")["args"], episodes(tmp_path / "run")
    assert (args["total_timesteps"], type(args["total_timesteps"]), args["gamma"]) == (1000, int, 0.9)
    assert rows != episodes(finished.folder)[: len(rows)]


def test_kill_and_resume_give_the_same_bits(script, finished, unfinished, copy, call):
    """Killed before the first checkpoint, at a random step, as if while it was writing, and in the evaluation.

    A run that nobody can repeat has the same files and the same number of steps.
    """
    folder = copy(unfinished)
    assert 0 < read_checkpoint(folder)["step"] < tiny(script)["total_timesteps"]
    assert not (folder / "result.json").exists() and not (folder / "agent.safetensors").exists()
    (folder / ".checkpoint.pt").write_bytes((folder / "checkpoint.pt").read_bytes()[:1000])
    with (folder / "episodes.csv").open("a") as file:
        file.write("99999,1.0,-")
    args_json = (folder / "args.json").read_bytes()
    moment = "agent.safetensors", 2
    path = ROOT / "algos" / f"{script}.py"
    assert exit_code(start(path, "--resume", folder, folder=folder, kill_after=moment)) == -signal.SIGKILL
    result = read_json(finished.folder, "result.json")
    assert read_checkpoint(folder)["step"] == result["steps"]  # the training is not repeated
    assert call(script, "--resume", folder).code == 0
    assert is_asynchronous(script) or bits(folder) == bits(finished.folder)
    assert (folder / "args.json").read_bytes() == args_json
    files = [{path.name for path in x.iterdir() if "events" not in path.name} for x in (folder, finished.folder)]
    assert files[0] == files[1]
    resumed = read_json(folder, "result.json")
    same = ("final_return", "eval_return_mean", "eval_return_std", "steps")[3 * is_asynchronous(script) :]
    assert {name: resumed[name] for name in same} == {name: result[name] for name in same}


@one_script
def test_killed_while_it_started(script, finished, unfinished, copy, call, tmp_path):
    """With args.json it can be resumed; without, started again. Of episodes.csv there is only the header."""
    folder, script_name = copy(unfinished), f"{script}.py"
    for path in folder.iterdir():
        if path.name not in ("args.json", "episodes.csv", script_name):
            path.unlink()
    (folder / "episodes.csv").write_text("step,seconds,return,length\n")
    assert call(script, "--resume", folder).code == 0
    assert bits(folder) == bits(finished.folder)
    (tmp_path / "run").mkdir()
    for name in (".lock", "episodes.csv", script_name, f".{script_name}", ".args.json"):
        (tmp_path / "run" / name).touch()
    done = call(script, *arguments(script, run_dir="run"))
    assert done.code == 0 and bits(tmp_path / "run") == bits(finished.folder), done.err


@one_script
def test_curves_of_a_killed_run(script, finished, unfinished, copy, call):
    """The events of a killed run are kept; what it logged after its last checkpoint is hidden."""
    folder = copy(unfinished)
    for i, path in enumerate(sorted(folder.glob("events.*"), key=lambda path: path.stat().st_mtime)):
        path.rename(folder / f"events.out.tfevents.{i}")  # TensorBoard reads them by name, which has only seconds
    before = {path.name: path.read_bytes() for path in folder.glob("events.*")}
    assert len(before) == 2 and call(script, "--resume", folder).code == 0
    assert {name: (folder / name).read_bytes() for name in before} == before
    ours, reference = scalars(folder), scalars(finished.folder)
    ours.pop("charts/SPS"), reference.pop("charts/SPS")
    assert ours == reference  # no point lost, none twice


@one_script
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_signals_stop_a_run_that_can_be_resumed(script, sent, tmp_path):
    folder = tmp_path / "run"
    words = arguments(script, run_dir=folder, total_timesteps=10**7)
    process = start(ROOT / "algos" / f"{script}.py", *words, folder=folder)
    wait_for(folder / "checkpoint.pt", process)
    os.kill(process.pid, sent)
    assert exit_code(process) == 130
    log = folder.with_suffix(".log").read_text()
    assert "Traceback" not in log and f"--resume {folder}" in log and not (folder / "result.json").exists()


@one_script
def test_one_process_per_run_folder(script, call, tmp_path):
    folder = tmp_path / "run"
    words = arguments(script, run_dir=folder, total_timesteps=10**7)
    for ours in words, ["--resume", folder]:
        (folder / "checkpoint.pt").unlink(missing_ok=True)
        process = start(ROOT / "algos" / f"{script}.py", *ours, folder=folder)
        wait_for(folder / "checkpoint.pt", process)
        assert is_bad_input(call(script, *words)) and is_bad_input(call(script, "--resume", folder))
        assert process.is_alive()
        process.kill()
        process.join()


def test_divergence_ends_the_run_and_keeps_the_checkpoint(script, call, monkeypatch, tmp_path):
    """Rewards, and observations that are not bytes, are NaN from some step after the first checkpoint on."""
    every = tiny(script)["checkpoint_every"]

    def change(steps, obs, rewards):
        nan = np.float32(np.nan if steps > 1.5 * every else 0)
        return obs if obs.dtype == np.uint8 else obs + nan, rewards + nan

    on_step(load(script), change, monkeypatch.setattr)
    done = call(script, *arguments(script, run_dir="run"))
    assert done.code == 3 and "Traceback" not in done.err, done.err
    assert not {"result.json", "agent.safetensors"} & {path.name for path in (tmp_path / "run").iterdir()}
    state = read_checkpoint(tmp_path / "run")
    assert every <= state["step"] < 1.5 * every
    assert all(tensor.isfinite().all() for tensor in state["agent"].values())


# ---------------------------------------------------------------------------------- steps, episodes and the evaluation


@repeatable
def test_books_agree_with_the_environments_own(script, train, spy, monkeypatch):
    """Every step and every episode that ended counts once; the evaluation takes one episode of each environment."""
    starts = spy(load(script), "start_envs")
    flags = {"num_envs": 2, "total_timesteps": 500, "checkpoint_every": 150, "eval_episodes": 5, "num_steps": 25}
    if script not in VECTOR:
        FakeGames.install(monkeypatch, load(script))
        FakeGames.made.clear()
    folder = train(script, **flags)
    if script in VECTOR:
        training, evaluated = Counter.made[:-5], Counter.made[-5:]
        expected = [counter.finished[0][0] for counter in evaluated]
        assert Counter.most_open == 2  # the first batch of the evaluation waits until the training is closed
    else:
        *training, a, b, c = FakeGames.made
        assert [games.num_envs for games in (a, b, c)] == [2, 2, 1]
        expected = [games.finished[i][0] for games in (a, b, c) for i in range(games.num_envs)]
    result = read_json(folder, "result.json")
    random_streams = [(bound["stream"], bound["step"]) for bound, _ in starts]
    assert len(random_streams) == len(set(random_streams)) > 5  # three checkpoints, three batches of the evaluation
    assert sum(env.steps for env in training) == result["steps"] and result["steps"] >= 500
    ours = [(total, length) for _, total, length in episodes(folder)]
    assert sorted(ours) == sorted(episode for env in training for episode in env.finished)
    assert result["final_return"] == pytest.approx(np.mean([total for total, _ in ours[-100:]]))
    assert result["eval_return_mean"] == pytest.approx(np.mean(expected))
    assert result["eval_return_std"] == pytest.approx(np.std(expected))


@pytest.mark.parametrize("script", LEARNERS, indirect=True)  # the others may drop what they see
def test_a_transition_ends_in_its_own_episode(script):
    """Also where an episode ended, and in an environment that reuses its array: never the reset observation.

    A recurrent script adds a fourth entry, see its own tests.
    """
    module = load(script)
    Counter.forget()
    envs = module.make_envs(make_args(script, env_id=named(script)), 2)
    obs, ended = envs.reset(seed=1)[0], 0
    for _ in range(30):
        before = obs.copy()
        actions = envs.action_space.sample()
        next_obs, _, terminations, truncations, infos = envs.step(actions)
        assert (obs == before).all()
        real = module.real_next_obs(next_obs, infos) if hasattr(module, "real_next_obs") else next_obs
        done = terminations | truncations
        ended += done.sum()
        assert (real[:, :3] == before[:, :3] + [0, 0, 1]).all()
        assert (next_obs[done, 1:3] == before[done, 1:3] * [1, 0] + [1, 0]).all()
        assert (truncations[done] == before[done, 1] % 2).all()
        obs = next_obs
    assert ended > 10


def test_evaluate_repeats_the_numbers_and_changes_nothing(script, finished, call, tmp_path):
    """Neither the files nor the agent, of which the file holds all, statistics included."""
    before, result = contents(finished.folder), read_json(finished.folder, "result.json")
    done = call(script, "--evaluate", os.path.relpath(finished.folder, tmp_path))
    mean, std = re.search(r"(-?[\d.]+) \+- ([\d.]+)", done.out).groups()
    assert (float(mean), float(std)) == (round(result["eval_return_mean"], 1), round(result["eval_return_std"], 1))
    assert done.code == 0 and contents(finished.folder) == before and not any(tmp_path.iterdir())
    agent, args = saved_agent(script, finished.folder)
    load(script).evaluate(args, agent, load(script).make_envs(args, 1))
    saved, after = safetensors.torch.load_file(finished.folder / "agent.safetensors"), agent.state_dict()
    assert saved.keys() == after.keys() and all(after[name].equal(tensor) for name, tensor in saved.items())


@one_of_each
def test_evaluate_takes_other_flags_and_records_a_video(script, finished, copy, call):
    """A run of another version of the script, too, which had one flag more and one less."""
    folder = copy(finished.folder)
    described = read_json(folder, "args.json")
    described["args"]["color"] = described["args"].pop("gamma")
    (folder / "args.json").write_text(json.dumps(described))
    before = contents(folder)
    done = call(script, "--evaluate", folder, "--eval-episodes", 1, "--seed", 5, "--video", "--gamma", 0.5)
    assert done.code == 0, done.err
    after = contents(folder)
    assert after.keys() - before.keys() == {"videos/seed5.mp4"}
    assert {name: after[name] for name in before} == before
    with imageio.get_reader(folder / "videos" / "seed5.mp4") as reader:
        assert sum(1 for _ in reader) >= 8
    assert re.findall(r"in (\d+) episodes", done.out) == ["1", "1"]


@one_script
def test_episodes_without_an_end(script, call, tmp_path):
    """A warning for each checkpoint before the first episode ended; the evaluation stops, and says so."""
    words = arguments(script, env_id="Test/Odd-v0", num_envs=1, eval_episodes=1, run_dir="run")
    done = call(script, *words, "--env-kwargs", "length", 10**6)
    assert done.code == 0 and 1 <= done.err.count("warning") <= 4, done.err
    result = read_json(tmp_path / "run", "result.json")
    assert (result["final_return"], result["eval_truncated"]) == (None, 1) and "1 over 30,000 steps" in done.out


# ---------------------------------------------------------------------------------------------- environments of users


def odd(script: str, call, kind: str, *words, **changes):
    """A run with the environment that does this."""
    changes = {"total_timesteps": 260, "checkpoint_every": 100, "num_steps": 16, "learning_starts": 50} | changes
    changes |= {"env_id": named(script, "Odd"), "env_kwargs": {"kind": kind}}
    return call(script, *arguments(script, run_dir="run", **changes), *words)


@vector_scripts
@pytest.mark.parametrize("kind", [*ODD, "NaN at the end"])
def test_odd_environments(script, kind, call, tmp_path):
    """NaN: in the last observation of a terminated episode, where its value does not count."""
    done = odd(script, call, kind)
    assert done.code == 0, done.err
    assert {(total, length) for _, total, length in episodes(tmp_path / "run")} == {(5.0, 5)}


@vector_scripts
def test_only_one_environment_at_a_time(script, call):
    """A second one cannot be made before the first is closed: in training, in the evaluation, for a video."""
    for words in (["--video"], ["--video", "--evaluate", "run"]):
        Odd.open_ones = 0
        done = odd(script, call, "single", *words, num_envs=1, num_minibatches=1, eval_episodes=3)
        assert done.code == 0 and "warning" not in done.err, done.err


@one_of_each_vector
def test_environment_that_samples_from_its_spaces(script, call, tmp_path):
    runs = []
    for _ in range(2):
        assert odd(script, call, "sampler").code == 0
        runs.append(bits(tmp_path / "run"))
        shutil.rmtree(tmp_path / "run")
    assert runs[0] == runs[1]


@one_of_each_vector
@pytest.mark.parametrize("error", ["OSError: no robot found", "TypeError: the robot fell"])
def test_an_error_of_the_environment_keeps_its_traceback(script, error, tmp_path):
    """At its start, and in the middle of the run."""
    folder, kind = tmp_path / "run", error.split(":")[0]
    words = arguments(script, run_dir=folder, env_id=named(script, "Odd"), env_kwargs={"kind": kind})
    assert exit_code(start(ROOT / "algos" / f"{script}.py", *words, folder=folder)) == 1
    log = folder.with_suffix(".log").read_text()
    assert "Traceback" in log and "environments.py" in log and error in log


@one_script
@pytest.mark.parametrize("kind", ["chdir", "close error"])
def test_environment_that_changes_the_folder_or_fails_to_close(script, kind, call, tmp_path):
    done = odd(script, call, kind)
    assert done.code == 0 and (tmp_path / "run" / "result.json").exists(), done.err


@one_script
@pytest.mark.parametrize("kind", ["no frame", "list of frames", "growing frame", "render error"])
def test_a_failed_video_costs_nothing(script, kind, call, tmp_path):
    done = odd(script, call, kind, "--video")
    assert done.code == 0 and (tmp_path / "run" / "result.json").exists(), done.err
    assert done.err.count("warning") == 1 and "Traceback" not in done.err


@one_of_each_vector
def test_train_from_python_on_an_environment_of_the_user(script, monkeypatch, tmp_path):
    """Its package registers it when it is imported, and sets PyTorch's default dtype. The folder gets its own name."""
    kwargs = {"continuous": "Continuous" in named(script)}
    code = "import environments, gymnasium, torch\ntorch.set_default_dtype(torch.float64)\n"
    code += f"gymnasium.register('My-v0', environments.Odd, kwargs={kwargs})"
    (tmp_path / "my_package.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_package", raising=False)  # of another script's test
    load(script).train(make_args(script, env_id="my_package:My-v0", total_timesteps=300))
    (folder,) = (tmp_path / "runs").iterdir()
    assert re.fullmatch(rf"my.package-My-v0__{script}__1__20\d{{6}}T\d{{6}}Z", folder.name)
    assert (folder / "result.json").exists()
    gym.registry.pop("My-v0")


# ------------------------------------------------------------------------------------------------------------ machines


@one_script
def test_where_git_is(script, call, tmp_path, monkeypatch):
    words = arguments(script, total_timesteps=1)
    if shutil.which("git") and (ROOT / ".git").exists():
        assert call(script, *words, "--run-dir", "with").code == 0
        assert re.fullmatch("[0-9a-f]{40}(-dirty)?", read_json(tmp_path / "with", "args.json")["commit"])
    monkeypatch.setenv("PATH", "")
    assert call(script, *words, "--run-dir", "without").code == 0
    described = read_json(tmp_path / "without", "args.json")
    assert described["commit"] == "" and described["cpu"]


@repeatable
@pytest.mark.slow  # 15 s each, if the compiler's cache is cold
@pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "c++")), reason="needs a C++ compiler")
def test_compile_computes_the_same_losses(script, call, tmp_path):
    """As long as rounding has not grown: for 20 updates, if there is one in every step."""
    flags = {"learning_starts": 980, "total_timesteps": 1000} if hasattr(load(script).Args, "utd") else {}
    for name, compile in {"eager": False, "compiled": True}.items():
        assert call(script, *arguments(script, run_dir=name, compile=compile, **flags)).code == 0
    eager, compiled = scalars(tmp_path / "eager"), scalars(tmp_path / "compiled")
    for tag in (tag for tag in eager if tag.startswith("losses/")):
        for (step, x), (compiled_step, y) in zip(eager[tag][:3], compiled[tag][:3], strict=True):
            assert step == compiled_step and math.isclose(x, y, rel_tol=1e-3, abs_tol=1e-5), (tag, step, x, y)


# ----------------------------------------------------------------------------------------------------------- bad input


def test_environments_that_are_refused(script, call, tmp_path):
    """Unknown, not installed, or with spaces that do not fit: one line that names it. Nothing is written."""
    unknown = ["CartPol-v1", "no_such_package:Env-v0", "Test/Uninstalled-v0", "Hopper-v3", "a/b/c", ""]
    for env_id in [*unknown, *family(script).refused]:
        done = call(script, *arguments(script, env_id=env_id))
        assert is_bad_input(done) and env_id in done.err and not any(tmp_path.iterdir()), done.err


@pytest.mark.parametrize("script", LEARNERS, indirect=True)  # the others refuse none
def test_wrong_actions_name_the_right_script(script, call):
    done = call(script, *arguments(script, env_id=family(script).refused[0]))
    (other,) = set(re.findall(r"(\w+)\.py", done.err)) - {script}
    assert {family(script).suffix, family(other).suffix} == {"", "_continuous"} and other in SCRIPTS


BAD_FLAGS = {
    "total_timesteps": [0, -5, "many", 1.5],
    "learning_rate": ["nan", "inf", -1],
    "gamma": [1.5, -0.1],
    "num_envs": [0],
    "num_steps": [0, 10**14],
    "num_minibatches": [3, 10**6],  # 3 does not divide 2 or 4 environments times 32 steps
    "buffer_size": [0, 10**15],
    "eval_episodes": [0],
    "torch_threads": [-1],
    "checkpoint_every": [0],
    "seed": [-1],
    "clip_coef": ["nan"],
    "device": ["tpu", "cuda"],  # of which there is none, see below
    "env_kwargs": ["missing"],
    "total_timestep": [100],
}


def test_flags_that_are_refused(script, call, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in BAD_FLAGS.keys() & {"total_timestep", *(field.name for field in fields(load(script).Args))}:
        for value in BAD_FLAGS[name]:
            done = call(script, *arguments(script), f"--{name.replace('_', '-')}", value)
            assert is_bad_input(done) and not any(tmp_path.iterdir()), (name, value, done.err)
    if family(script).suffix != "_atari":
        done = odd(script, call, "", "--env-kwargs", "no_such_argument", 1)
        assert is_bad_input(done) and "no_such_argument" in done.err and not any(tmp_path.iterdir())


@one_script
def test_folders_that_are_refused(script, finished, unfinished, copy, call, tmp_path):
    """One line, and everything stays as it was."""
    begun, other = copy(unfinished), copy(finished.folder)
    (other / f"{script}.py").rename(other / "other.py")
    (tmp_path / "file").write_text("mine")
    commands = [
        [*arguments(script), "--run-dir", tmp_path / "file" / "run"],  # not by permissions: a superuser has all
        [*arguments(script), "--run-dir", finished.folder],
        [*arguments(script), "--run-dir", begun],
        ["--resume", tmp_path],
        ["--resume", "missing"],
        ["--resume", finished.folder],
        ["--resume", other],
        ["--resume", begun, "--gamma", 0.5],
        ["--resume", begun, "--seed", 3],
        ["--resume", begun, "--evaluate", finished.folder],
        ["--evaluate", "missing"],
        ["--evaluate", tmp_path / "file"],
        ["--evaluate", begun],
        ["--evaluate", other],
    ]
    folders = tmp_path, finished.folder, begun, other
    before = [contents(folder) for folder in folders]
    for words in commands:
        done = call(script, *words)
        assert is_bad_input(done), (words, done.err)
    assert [contents(folder) for folder in folders] == before


class Trap:
    """An object whose unpickling creates a folder."""

    def __reduce__(self):
        return os.mkdir, ("trap",)


@one_script
def test_a_checkpoint_can_run_no_code(script, unfinished, copy, call, tmp_path):
    folder = copy(unfinished)
    torch.save(Trap(), folder / "checkpoint.pt")
    assert call(script, "--resume", folder).code != 0 and not any(tmp_path.iterdir())
