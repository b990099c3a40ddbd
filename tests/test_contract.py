"""What every script promises, whatever it computes: started as a user starts it, or main() with a command line."""

import ast
import hashlib
import importlib.metadata
import json
import math
import os
import pickle
import platform
import re
import resource
import shlex
import shutil
import signal
import sys
import time
import zipfile
from dataclasses import asdict, fields
from pathlib import Path

import gymnasium as gym
import imageio
import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import (
    REPRESENTATIVES,
    ROOT,
    SCRIPTS,
    arguments,
    bits,
    contents,
    episodes,
    family,
    finish,
    finish_well,
    load,
    make_args,
    start,
    tiny,
    wait_for,
)
from environments import Counter, FakeGames
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

COMMON = {  # flag: annotation. The first flags of every script, in this order
    "env_id": "str",
    "seed": "int",
    "total_timesteps": "int",
    "run_dir": "str | None",
    "resume": "str | None",
    "evaluate": "str | None",
    "eval_episodes": "int",
    "video": "bool",
    "device": "Literal['auto', 'cpu', 'cuda']",
    "torch_threads": "int",
    "compile": "bool",
    "checkpoint_every": "int",
}

VECTOR_SCRIPTS = [name for name in SCRIPTS if family(name).suffix != "_atari"]

THIRD_PARTY = """
import gymnasium as gym, numpy as np

class Walk(gym.Env):
    observation_space = gym.spaces.Box(-10, 10, (2,), np.float64)

    def __init__(self, action_space):
        self.action_space = action_space

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.place, self.t = 0.0, 0
        return np.array([self.place, self.t]), {}

    def step(self, action):
        self.place += float(np.sum(action)) - 0.5
        self.t += 1
        return np.array([self.place, self.t]), 1, self.t == 7, False, {}

gym.register("Discrete-v0", Walk, kwargs={"action_space": gym.spaces.Discrete(3)})
gym.register("Continuous-v0", Walk, kwargs={"action_space": gym.spaces.Box(-1, 1, (2,), np.float64)})
"""


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """TensorBoard's curves: tag -> (step, value)."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def read_json(folder: Path, name: str) -> dict:
    return json.loads((folder / name).read_text())


def is_one_error(done, *parts: str) -> None:
    """Exit code 2 and one line on stderr that says what is wrong, with these words."""
    assert done.code == 2, done
    assert re.fullmatch(r"error: [^\n]+\n", done.err), done.err
    assert "Traceback" not in done.out
    for part in parts:
        assert part in done.err


# ---------------------------------------------------------------------------------------------------------------- help


def documented_fields(script: str) -> list[tuple[str, str, str]]:
    """(name, annotation, docstring) of each field of Args, in the order of the file."""
    tree = ast.parse((ROOT / "algos" / f"{script}.py").read_text())
    body = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Args").body
    found = []
    for field, after in zip(body, [*body[1:], None], strict=True):
        if isinstance(field, ast.AnnAssign):
            is_text = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
            found.append((field.target.id, ast.unparse(field.annotation), after.value.value if is_text else ""))
    return found


def test_help_names_every_flag(script, call, tmp_path):
    done = call(script, "--help")
    assert done.code == 0
    flags = [f"--{field.name.replace('_', '-')}" for field in fields(load(script).Args)]
    listed = re.findall(r"^\W*(--[a-z0-9-]+)", done.out, re.MULTILINE)
    assert [flag for flag in listed if flag in flags] == flags
    assert load(script).__doc__.splitlines()[0] in done.out
    assert done.err == "" and not any(tmp_path.iterdir())


def test_common_flags_come_first_with_the_same_help(script):
    ours = documented_fields(script)[: len(COMMON)]
    assert {name: annotation for name, annotation, _ in ours} == COMMON
    assert [name for name, *_ in ours] == list(COMMON)
    assert ours == documented_fields(SCRIPTS[0])[: len(COMMON)]


def test_every_flag_has_help(script):
    for name, _, docstring in documented_fields(script):
        assert docstring and "\n" not in docstring, f"--{name} has no one-line docstring"


# ------------------------------------------------------------------------------------------------------ the run folder


def test_run_folder_holds_these_files(finished):
    names = {re.sub(r"^events\.out\.tfevents\..*", "events", path.name) for path in finished.folder.iterdir()}
    assert names == {"args.json", "episodes.csv", "events", "checkpoint.pt", "agent.safetensors", "result.json"}
    assert str(finished.folder) in finished.out  # the last lines say where to look


def test_args_json_says_what_was_run(script, finished):
    described = read_json(finished.folder, "args.json")
    assert described["args"] == asdict(make_args(script, run_dir=str(finished.folder)))
    assert shlex.split(described["command"])[1:] == finished.words
    assert described["script"] == f"{script}.py"
    assert described["sha256"] == hashlib.sha256((ROOT / "algos" / f"{script}.py").read_bytes()).hexdigest()
    packages = ("torch", "gymnasium", "ale-py", "mujoco", "numpy")
    versions = {name: importlib.metadata.version(name) for name in packages}
    assert versions.items() <= described["versions"].items()
    assert described["versions"]["python"] == platform.python_version()
    assert described["cores"] == os.cpu_count() and described["cpu"] and described["gpu"] is None
    assert re.fullmatch(r"[0-9a-f]{40}", described["commit"] or "0" * 40) and isinstance(described["clean"], bool)
    assert re.match(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d", described["started"])


def test_episodes_csv_has_a_row_per_episode(script, finished):
    header, *rows = (finished.folder / "episodes.csv").read_text().splitlines()
    assert header == "step,seconds,return,length"
    numbers = np.array([row.split(",") for row in rows], float)
    assert len(numbers) > 1
    steps, seconds, returns, lengths = numbers.T
    result = read_json(finished.folder, "result.json")
    assert (np.diff(steps) >= 0).all() and (np.diff(seconds) >= 0).all()
    assert 0 < steps[0] and steps[-1] <= result["steps"] and seconds[-1] <= result["seconds"] + 0.01
    assert 0 < lengths.sum() <= result["steps"]  # the rest are steps of episodes that did not end
    if family(script).env_id == "CartPole-v1":
        assert (returns == lengths).all()


def test_checkpoint_is_data(script, finished):
    checkpoint = torch.load(finished.folder / "checkpoint.pt", weights_only=True)
    flags = tiny(script)
    assert 0 < checkpoint["step"] < flags["total_timesteps"]
    assert checkpoint["step"] >= flags["checkpoint_every"]
    assert not list(finished.folder.glob("*.tmp"))


def test_agent_loads_from_its_file_alone(script, finished):
    tensors = safetensors.torch.load_file(finished.folder / "agent.safetensors")
    module, args = load(script), make_args(script)
    agent = module.Agent(module.start_envs(args, [0])[0], args)
    assert set(tensors) == set(agent.state_dict())
    agent.load_state_dict(tensors)
    assert all(tensor.isfinite().all() for tensor in tensors.values())


def test_readme_shows_how_to_act(script, finished, monkeypatch):
    """The lines for one's own code, with this script and this run in place of the example's."""
    (lines,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    for example, ours in ("algos.ppo", f"algos.{script}"), ("runs/...", str(finished.folder)):
        assert example in lines
        lines = lines.replace(example, ours)
    names = {}
    monkeypatch.syspath_prepend(ROOT)
    exec(lines, names)
    assert names["envs"].single_action_space.contains(names["action"][0].numpy())


def test_result_json_has_these_numbers(script, finished):
    result, flags = read_json(finished.folder, "result.json"), tiny(script)
    keys = "final_return eval_return_mean eval_return_std eval_episodes steps seconds sps peak_memory_mb"
    assert list(result) == keys.split()
    last = [episode_return for _, episode_return, _ in episodes(finished.folder)][-100:]
    assert math.isclose(result["final_return"], np.mean(last))
    assert result["eval_episodes"] == flags["eval_episodes"]
    rollout = flags.get("num_envs", 1) * flags.get("num_steps", 1)
    assert flags["total_timesteps"] <= result["steps"] < flags["total_timesteps"] + rollout
    assert math.isclose(result["steps"] / result["sps"], result["seconds"], abs_tol=0.01)  # two digits are kept
    assert 50 < result["peak_memory_mb"] < 100_000


def test_tensorboard_has_the_curves(script, finished):
    curves = scalars(finished.folder)
    assert {f"charts/{x}" for x in ("episodic_return", "episodic_length", "SPS", "learning_rate")} <= set(curves)
    assert all(re.fullmatch(r"(charts|losses)/\w+", tag) for tag in curves)
    assert sum(tag.startswith("losses/") for tag in curves) >= 2
    steps = [step for step, _ in curves["charts/SPS"]]
    assert steps == sorted(set(steps)) and steps[-1] == read_json(finished.folder, "result.json")["steps"]
    assert all(math.isfinite(value) for points in curves.values() for _, value in points)


# ------------------------------------------------------------------------------------------------ the same run, always


def test_same_seed_same_bits_and_another_seed_others(script, finished, call, tmp_path):
    """Here after much else in this process, there in a fresh one with other addresses and hashes: the seed decides."""
    ours = bits(finished.folder)
    assert len(ours[1]) > 1
    assert call(script, *arguments(script, run_dir=tmp_path / "again")).code == 0
    assert bits(tmp_path / "again") == ours
    assert call(script, *arguments(script, run_dir=tmp_path / "other", seed=2)).code == 0
    agent, rows = bits(tmp_path / "other")
    assert agent != ours[0] and rows != ours[1]


def test_kill_and_resume_give_the_same_bits(script, finished, unfinished, copy):
    """With a checkpoint half written and a row half written, as another kill might have left them."""
    folder = copy(unfinished)
    (folder / "checkpoint.pt.tmp").write_bytes((folder / "checkpoint.pt").read_bytes()[:1000])
    with (folder / "episodes.csv").open("a") as file:
        file.write("99999,1.0,-")
    args_json = contents(folder)["args.json"]
    finish_well(start(script, "--resume", folder, cwd=folder.parent))
    assert bits(folder) == bits(finished.folder)
    assert contents(folder)["args.json"] == args_json  # written before the first step, never again
    ours, reference = scalars(folder), scalars(finished.folder)
    ours.pop("charts/SPS"), reference.pop("charts/SPS")
    assert ours == reference  # no point lost, none twice
    resumed, result = (read_json(path, "result.json") for path in (folder, finished.folder))
    same = ("final_return", "eval_return_mean", "eval_return_std", "steps")
    assert {name: resumed[name] for name in same} == {name: result[name] for name in same}
    assert resumed["seconds"] > torch.load(unfinished / "checkpoint.pt", weights_only=True)["seconds"]


@pytest.mark.parametrize("script", REPRESENTATIVES, indirect=True)
def test_signals_stop_it_and_resuming_works(script, finished, tmp_path):
    """Ctrl-C before the first checkpoint, SIGTERM after it; each time the printed command goes on."""
    folder = tmp_path / "a run"  # with a blank, so that the printed command has to quote it
    process = start(script, *arguments(script, run_dir=folder), cwd=tmp_path)
    for stop, after in ((signal.SIGINT, "episodes.csv"), (signal.SIGTERM, "checkpoint.pt")):
        wait_for(folder / after, process)
        began = time.monotonic()
        process.send_signal(stop)
        done = finish(process)
        assert time.monotonic() - began < 20  # a second, where nothing else is running
        assert done.code == 130 and "Traceback" not in done.err, done
        assert not (folder / "result.json").exists()
        command = shlex.split(re.search(r"python (\S+ --resume ('[^']+'|\S+))", done.err)[1])
        assert Path(command[0]).stem == script and command[1:] == ["--resume", str(folder)]
        process = start(script, *command[1:], cwd=tmp_path)
    finish_well(process)
    assert bits(folder) == bits(finished.folder)


def test_full_disk_keeps_the_last_checkpoint(script, finished, unfinished, copy, call):
    """A limit on the size of files stands for the full disk: the logs fit, the next checkpoint does not."""
    folder = copy(unfinished)
    logs = [*finished.folder.glob("events.*"), finished.folder / "episodes.csv"]
    largest_log, needed = max(log.stat().st_size for log in logs), (folder / "checkpoint.pt").stat().st_size
    limit = (largest_log + needed) // 2
    assert largest_log < limit < needed
    before = contents(folder)["checkpoint.pt"]
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, old[1]))
    try:
        done = call(script, "--resume", folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    is_one_error(done, "--resume", str(folder))
    assert contents(folder)["checkpoint.pt"] == before
    assert call(script, "--resume", folder).code == 0
    assert bits(folder) == bits(finished.folder)


def test_divergence_ends_the_run_and_keeps_the_checkpoint(script, finished, call, monkeypatch, spoil, tmp_path):
    """Rewards that are not numbers, from some step after the first checkpoint on."""
    module, flags, folder = load(script), tiny(script), tmp_path / "run"
    original = module.start_envs

    def change(steps, obs, rewards):
        return obs, np.full(len(rewards), np.nan) if steps > 1.5 * flags["checkpoint_every"] else rewards

    spoil(module, change)
    done = call(script, *arguments(script, run_dir=folder))
    assert done.code == 3, done
    assert re.fullmatch(r"error: .* diverged .*\n", done.err)
    assert not (folder / "result.json").exists() and not (folder / "agent.safetensors").exists()
    checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert checkpoint["step"] < 1.5 * flags["checkpoint_every"]
    monkeypatch.setattr(module, "start_envs", original)
    assert call(script, "--resume", folder).code == 0
    assert bits(folder) == bits(finished.folder)


# ---------------------------------------------------------------------------------------------------------- evaluation


def test_evaluate_repeats_the_numbers_and_changes_nothing(script, finished, tmp_path):
    before = contents(finished.folder)
    words = ("--evaluate", os.path.relpath(finished.folder, tmp_path))
    done = finish_well(start(script, *words, cwd=tmp_path))
    result = read_json(finished.folder, "result.json")
    assert f"{result['eval_return_mean']:.1f} ± {result['eval_return_std']:.1f}" in done.out
    assert str(result["eval_episodes"]) in done.out and "greedy" in done.out
    assert contents(finished.folder) == before and not any(tmp_path.iterdir())


def test_evaluate_takes_other_episodes_and_films(script, finished, copy, call):
    folder = copy(finished.folder)
    before = contents(folder)
    done = call(script, "--evaluate", folder, "--eval-episodes", 1, "--seed", 5, "--video")
    assert done.code == 0 and "1 episodes" in done.out, done
    after = contents(folder)
    (film,) = after.keys() - before.keys()
    assert re.fullmatch(r"videos/.*\.mp4", film) and str(folder / film) in done.out
    assert {name: after[name] for name in before} == before
    with imageio.get_reader(folder / film) as reader:
        assert sum(1 for _ in reader) >= 8
    assert call(script, "--evaluate", folder, "--eval-episodes", 1, "--seed", 6).out != done.out


def test_evaluate_counts_one_whole_episode_of_each_environment(script, monkeypatch, tmp_path):
    """Raw returns, all known: short episodes are not counted twice, long ones not cut."""
    module = load(script)
    if family(script).suffix == "_atari":
        FakeGames.install(monkeypatch, module)
        env_id, expected = "ALE/Pong-v5", [5 * (10 + i) for i in range(4)]
    else:
        env_id = "Test/CounterContinuous-v0" if family(script).suffix == "_continuous" else "Test/Counter-v0"
        expected = [sum(i + t for t in range(1, 4 + i)) for i in range(4)]
    args = make_args(script, env_id=env_id, eval_episodes=4, run_dir=str(tmp_path))
    agent = module.Agent(module.start_envs(args, [0])[0], args)
    Counter.made.clear()
    assert module.evaluate(args, agent).tolist() == expected


def test_evaluate_does_not_change_the_agent(script, finished, tmp_path):
    module, args = load(script), make_args(script, eval_episodes=1, run_dir=str(tmp_path))
    agent = module.Agent(module.start_envs(args, [0])[0], args)
    before = {name: tensor.clone() for name, tensor in agent.state_dict().items()}
    module.evaluate(args, agent)
    assert all(tensor.equal(before[name]) for name, tensor in agent.state_dict().items())


def test_a_changed_script_warns_and_goes_on(script, unfinished, finished, copy, call):
    folder = copy(unfinished)
    edit(folder, lambda described: described.update(sha256="0" * 64))
    done = call(script, "--resume", folder)
    assert done.code == 0 and done.err.startswith("warning: ") and done.err.count("\n") == 1
    assert bits(folder) == bits(finished.folder)


def test_an_interrupt_only_offers_what_can_go_on(script, finished, call, monkeypatch, tmp_path):
    """Ctrl-C in an evaluation, or before there is a run folder: nothing to resume."""

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(load(script), "evaluate", interrupt)
    done = call(script, "--evaluate", finished.folder)
    assert done.code == 130 and "--resume" not in done.err
    monkeypatch.setattr(load(script), "start_envs", interrupt)
    done = call(script, *arguments(script))
    assert done.code == 130 and "--resume" not in done.err and not any(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------- environments and compilers


@pytest.mark.parametrize("script", [name for name in SCRIPTS if family(name).third_party], indirect=True)
def test_third_party_environment(script, call, monkeypatch, tmp_path):
    """A package of the user's that registers itself when imported; the run folder gets its default name and place."""
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages" / "thirdparty.py").write_text(THIRD_PARTY)
    monkeypatch.syspath_prepend(tmp_path / "packages")
    monkeypatch.delitem(sys.modules, "thirdparty", raising=False)  # of another script's test
    assert call(script, *arguments(script, env_id=family(script).third_party, total_timesteps=300)).code == 0
    (folder,) = (tmp_path / "runs").iterdir()
    kind = family(script).third_party.split(":")[1]
    assert re.fullmatch(rf"thirdparty-{kind}__{script}__1__20\d{{6}}T\d{{6}}\.\d{{3}}Z", folder.name)
    assert {(episode_return, length) for _, episode_return, length in episodes(folder)} == {(7.0, 7)}


@pytest.mark.slow  # 15 s each, if the compiler's cache is cold
@pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "c++")), reason="needs a C++ compiler")
def test_compile_computes_the_same_losses(script, finished, tmp_path):
    folder = tmp_path / "run"
    finish_well(start(script, *arguments(script, run_dir=folder, compile=True), cwd=tmp_path))
    eager, compiled = scalars(finished.folder), scalars(folder)
    for tag in (tag for tag in eager if tag.startswith("losses/")):
        for (step, x), (compiled_step, y) in zip(eager[tag][:3], compiled[tag][:3], strict=True):
            assert step == compiled_step and math.isclose(x, y, rel_tol=1e-3, abs_tol=1e-5), (tag, step, x, y)


# ----------------------------------------------------------------------------------------------------------- bad input


def is_refused(call, script: str, tmp_path: Path, *parts: str, **changes) -> str:
    """A training run with these flags ends with one error line that holds `parts`, and writes nothing."""
    done = call(script, *arguments(script, **changes))
    is_one_error(done, *parts)
    assert not any(tmp_path.iterdir())
    return done.err


def test_misspelt_environment_names_the_near_one(script, call, tmp_path):
    wrong, near = family(script).misspelt
    is_refused(call, script, tmp_path, wrong, near, env_id=wrong)


@pytest.mark.parametrize("env_id", ["nosuchpackage:Env-v0", "Test/Uninstalled-v0", "Hopper-v3", "a/b/c", ""])
def test_environment_that_cannot_be_made(script, env_id, call, tmp_path):
    line = is_refused(call, script, tmp_path, env_id, env_id=env_id)
    if env_id == "Test/Uninstalled-v0" and family(script).third_party:
        assert "pip install gymnasium[engine]" in line


def test_wrong_actions_name_the_right_script(script, call, tmp_path):
    env_id, suffix = family(script).wrong_actions
    line = is_refused(call, script, tmp_path, env_id, env_id=env_id)
    (named,) = re.findall(r"(\w+)\.py", line)
    assert named in SCRIPTS and family(named).suffix == suffix


@pytest.mark.parametrize(
    "script, env_id",
    [(name, env_id) for name in SCRIPTS for env_id in family(name).wrong_spaces],
    indirect=["script"],
)
def test_spaces_that_do_not_fit(script, env_id, call, tmp_path):
    is_refused(call, script, tmp_path, env_id, env_id=env_id)


@pytest.mark.parametrize("script", VECTOR_SCRIPTS, indirect=True)
def test_games_name_the_script_for_games(script, call, tmp_path, monkeypatch):
    for name in [name for name in gym.registry if name.startswith("ALE/")]:
        monkeypatch.delitem(gym.registry, name)  # importing the script for games has registered them in this process
    is_refused(call, script, tmp_path, "_atari.py", env_id="ALE/Pong-v5")


@pytest.mark.parametrize(
    "name, value",
    [
        ("total_timesteps", 0),
        ("total_timesteps", -5),
        ("learning_rate", float("nan")),
        ("learning_rate", 0.0),
        ("learning_rate", float("inf")),
        ("gamma", 1.5),
        ("num_envs", 0),
        ("num_minibatches", 3),  # does not divide 2 or 4 environments times 32 steps
        ("num_minibatches", 1_000_000),
        ("eval_episodes", 0),
        ("torch_threads", -1),
        ("checkpoint_every", -1),
        ("seed", -1),
        ("clip_coef", float("nan")),
    ],
)
def test_flag_out_of_range(script, name, value, call, tmp_path):
    if name in tiny(script, **{name: value}):
        is_refused(call, script, tmp_path, f"--{name.replace('_', '-')}", str(value), **{name: value})


def test_no_gpu(script, call, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    is_refused(call, script, tmp_path, "--device", device="cuda")


def test_no_compiler(script, call, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    is_refused(call, script, tmp_path, "--compile", compile=True)


def test_misspelt_flag(script, call, tmp_path):
    done = call(script, "--total-timestep", 100)
    assert done.code == 2 and "Traceback" not in done.out + done.err
    assert "--total-timesteps" in done.out + done.err and not any(tmp_path.iterdir())


@pytest.mark.parametrize("script", VECTOR_SCRIPTS, indirect=True)
def test_film_of_what_cannot_be_filmed(script, call, tmp_path):
    """Said before the run, not after it: these environments have no pictures."""
    env_id = "Test/ConstantContinuous-v0" if family(script).suffix == "_continuous" else "Test/Constant-v0"
    is_refused(call, script, tmp_path, env_id, env_id=env_id, video=True, total_timesteps=100)


def test_run_dir_that_cannot_be_written(script, call, tmp_path):
    """Below a regular file, because a superuser may write anywhere else."""
    (tmp_path / "file").write_text("mine")
    done = call(script, *arguments(script, run_dir=tmp_path / "file" / "run"))
    is_one_error(done, str(tmp_path / "file" / "run"))
    assert list(contents(tmp_path)) == ["file"] and (tmp_path / "file").read_text() == "mine"


def test_run_dir_that_is_not_empty(script, finished, call):
    before = contents(finished.folder)
    is_one_error(call(script, *arguments(script, run_dir=finished.folder)), str(finished.folder), "--resume")
    assert contents(finished.folder) == before


def test_resume_and_evaluate_exclude_each_other(script, finished, call):
    is_one_error(call(script, "--resume", finished.folder, "--evaluate", finished.folder), "--resume", "--evaluate")


@pytest.mark.parametrize("words", [("--gamma", "0.5"), ("--total-timesteps", "7"), ("--compile",)])
def test_evaluate_takes_no_flags_of_training(script, finished, call, words):
    before = contents(finished.folder)
    done = call(script, "--evaluate", finished.folder, *words)
    is_one_error(done, "--evaluate", f"leave out {words[0]}\n")
    assert contents(finished.folder) == before


def test_evaluate_of_an_unfinished_run(script, unfinished, copy, call):
    folder = copy(unfinished)
    before = contents(folder)
    is_one_error(call(script, "--evaluate", folder), str(folder), "--resume")
    assert contents(folder) == before


def test_evaluate_of_a_damaged_agent(script, finished, copy, call):
    folder = copy(finished.folder)
    agent = folder / "agent.safetensors"
    for damage in (agent.read_bytes()[:-100], b"", pickle.dumps(Trap(folder / "trap")), None):
        agent.write_bytes(damage) if damage is not None else safetensors.torch.save_file({"x": torch.ones(2)}, agent)
        before = contents(folder)
        is_one_error(call(script, "--evaluate", folder), "agent.safetensors")
        assert contents(folder) == before


def test_evaluate_where_no_film_can_be_written(script, finished, copy, call):
    """One line, and nothing of a run that could go on: this one is finished."""
    folder = copy(finished.folder)
    (folder / "videos").write_text("a file where the folder has to be")
    before = contents(folder)
    done = call(script, "--evaluate", folder, "--video")
    is_one_error(done, "videos")
    assert "--resume" not in done.err and contents(folder) == before


# ------------------------------------------------------------------------------------------- resume from what is broken


class Trap:
    """An object whose unpickling creates a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def edit(folder: Path, change) -> None:
    """Apply `change(described)` to args.json."""
    described = read_json(folder, "args.json")
    change(described)
    (folder / "args.json").write_text(json.dumps(described))


def edit_checkpoint(folder: Path, change) -> None:
    checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
    change(checkpoint)
    torch.save(checkpoint, folder / "checkpoint.pt")


def widen(checkpoint: dict) -> None:
    """The agent of a network of another size."""
    for state in (part for part in checkpoint.values() if isinstance(part, dict)):
        for name, tensor in state.items():
            if isinstance(tensor, torch.Tensor) and tensor.ndim == 2:
                state[name] = torch.cat([tensor, tensor])


def flip_a_bit(path: Path) -> None:
    """In the middle of the largest stored tensor, where nothing but a checksum can tell."""
    with zipfile.ZipFile(path) as archive:
        record = max(archive.infolist(), key=lambda record: record.file_size)
    data = bytearray(path.read_bytes())
    data[record.header_offset + record.file_size // 2 + 200] ^= 1
    path.write_bytes(data)


def truncate(path: Path, size: float) -> None:
    os.truncate(path, int(path.stat().st_size * size))


DAMAGES = {  # what is wrong with a run folder: how it comes about, a word of the complaint
    "no folder": (shutil.rmtree, "args.json"),
    "no args.json": (lambda x: (x / "args.json").unlink(), "args.json"),
    "args.json is cut": (lambda x: truncate(x / "args.json", 0.5), "args.json"),
    "args.json is a list": (lambda x: (x / "args.json").write_text("[1, 2]"), "args.json"),
    "args.json is binary": (lambda x: (x / "args.json").write_bytes(b"\xff\xfe\x00"), "args.json"),
    "args.json holds no flags": (lambda x: edit(x, lambda y: y.update(args=5)), "args.json"),
    "a flag of another type": (lambda x: edit(x, lambda y: y["args"].update(num_envs="four")), "num-envs"),
    "a flag out of range": (lambda x: edit(x, lambda y: y["args"].update(num_envs=0)), "num-envs"),
    "other script": (lambda x: edit(x, lambda y: y.update(script="other.py")), "other.py"),
    "other flags": (
        lambda x: edit(x, lambda y: (y["args"].update(colour="red"), y.update(commit=""))),
        "with other flags",
    ),
    "other flags of a commit": (
        lambda x: edit(x, lambda y: (y["args"].update(colour="red"), y.update(commit="fedcba9876"))),
        "with other flags: that of commit fedcba9\n",
    ),
    "finished": (lambda x: (x / "result.json").write_text("{}"), "--evaluate"),
    "episodes.csv is cut": (lambda x: truncate(x / "episodes.csv", 0.2), "episodes.csv"),
    "no episodes.csv": (lambda x: (x / "episodes.csv").unlink(), "episodes.csv"),
    "checkpoint is cut": (lambda x: truncate(x / "checkpoint.pt", 0.5), "checkpoint.pt"),
    "checkpoint lacks its end": (lambda x: truncate(x / "checkpoint.pt", 0.999), "checkpoint.pt"),
    "checkpoint has a flipped bit": (lambda x: flip_a_bit(x / "checkpoint.pt"), "checksum"),
    "checkpoint is empty": (lambda x: truncate(x / "checkpoint.pt", 0), "checkpoint.pt"),
    "checkpoint is text": (lambda x: (x / "checkpoint.pt").write_text("hello\n"), "checkpoint.pt"),
    "checkpoint is code": (lambda x: torch.save(Trap(x / "trap"), x / "checkpoint.pt"), "checkpoint.pt"),
    "checkpoint is a pickle": (lambda x: (x / "checkpoint.pt").write_bytes(pickle.dumps(Trap(x / "trap"))), "damaged"),
    "checkpoint is a list": (lambda x: torch.save([1, 2], x / "checkpoint.pt"), "checkpoint.pt"),
    "checkpoint of other data": (lambda x: torch.save({"step": 5}, x / "checkpoint.pt"), "checkpoint.pt"),
    "checkpoint lacks the agent": (lambda x: edit_checkpoint(x, lambda y: y.pop("agent")), "does not fit"),
    "checkpoint of another network": (lambda x: edit_checkpoint(x, widen), "does not fit"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_resume_of_a_damaged_run(script, damage, unfinished, copy, call):
    folder = copy(unfinished)
    spoil, word = DAMAGES[damage]
    spoil(folder)
    before = contents(folder)
    is_one_error(call(script, "--resume", folder), word)
    assert contents(folder) == before
    assert not (folder / "trap").exists()


def test_resume_with_other_flags(script, unfinished, copy, call):
    folder = copy(unfinished)
    before = contents(folder)
    is_one_error(call(script, "--resume", folder, "--gamma", 0.5), "--gamma")
    is_one_error(call(script, "--resume", folder, "--seed", 3), "--seed")
    assert contents(folder) == before


@pytest.mark.parametrize("script", SCRIPTS[:1], indirect=True)
def test_bad_input_from_a_shell(script, unfinished, copy, tmp_path):
    """The same in a process of its own, where nothing but our line may reach stderr: one script stands for all."""
    damaged = copy(unfinished)
    truncate(damaged / "checkpoint.pt", 0.5)
    commands = {
        family(script).misspelt[1]: ["--env-id", family(script).misspelt[0]],
        "nosuchpackage": ["--env-id", "nosuchpackage:Env-v0"],
        "--total-timesteps": ["--total-timesteps", "-3"],
        "args.json": ["--resume", "missing"],
        "checkpoint.pt": ["--resume", damaged],
    }
    processes = {word: start(script, *words, cwd=tmp_path) for word, words in commands.items()}
    for word, process in processes.items():
        is_one_error(finish(process), word)
    assert not any(tmp_path.iterdir())
