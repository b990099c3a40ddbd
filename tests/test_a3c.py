"""A3C: updates by several processes, the books of its workers, and what ends them. Its loss: test_a2c.py."""

import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import FORK, ROOT, TIMEOUT, arguments, episodes, load, make_agent, make_args, ready_to_fork, wait_for
from environments import Counter
from test_ppo import gae_by_definition, truth

a3c = load("a3c")


def part_loss(agent, part: str) -> torch.Tensor:
    return sum((k + 1) * p.square().sum() + p.sum() for k, p in enumerate(getattr(agent, part).parameters()))


def update(part: str, steps: int, args, agent, optimizer, barrier) -> None:
    """A worker whose gradient is of one of the two networks."""
    own_agent = a3c.deepcopy(agent)
    barrier.wait(TIMEOUT)
    for _ in range(steps):
        own_agent.load_state_dict(agent.state_dict())
        a3c.apply_gradient(part_loss(own_agent, part), own_agent, agent, optimizer, args)


@pytest.mark.parametrize("resumed", [False, True])
def test_gradients_of_two_workers_arrive(resumed, rng):
    """One improves the actor, one the critic, at the same time: together what Adam does with both, to the last step."""
    (agent, args), steps = make_agent("a3c", max_grad_norm=1e9), 20
    alone = a3c.deepcopy(agent)
    adams = [torch.optim.Adam(x.parameters(), 0.01, betas=(0.0, 0.99), fused=True) for x in (agent, alone)]

    def improve_alone() -> None:
        for part in ("actor", "critic") * steps:
            adams[1].zero_grad()
            part_loss(alone, part).backward()
            adams[1].step()

    if resumed:
        improve_alone()
        agent.load_state_dict(alone.state_dict())
        adams[0].load_state_dict(a3c.deepcopy(adams[1].state_dict()))
    improve_alone()
    a3c.share(agent, adams[0])
    ready_to_fork()
    barrier = FORK.Barrier(2)
    parts = [(part, steps, args, agent, adams[0], barrier) for part in ("actor", "critic")]
    workers = [FORK.Process(target=update, args=x) for x in parts]
    for process in workers:
        process.start()
    for process in workers:
        process.join(TIMEOUT)
        assert process.exitcode == 0
    for ours, expected in zip(agent.parameters(), alone.parameters()):
        torch.testing.assert_close(ours, expected)
        torch.testing.assert_close(adams[0].state[ours], adams[1].state[expected])


def test_rollouts_hold_what_happened(spy, monkeypatch):
    """A worker in this process: its counter has episodes of 4 steps, every other one truncated. V = 100 episode + t."""
    T, rollouts = 7, 5
    monkeypatch.setattr(a3c, "end_with_parent", lambda: None)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(a3c.Agent, "value", lambda self, obs: obs[..., 1] * 100 + obs[..., 2])
    Counter.forget()
    flags = {"num_envs": 1, "num_steps": T, "total_timesteps": T * rollouts, "gamma": 0.9, "gae_lambda": 0.8}
    args = make_args("a3c", env_id="Test/Counter-v0", learning_rate=0.002, anneal_lr=True, max_grad_norm=1e-3, **flags)
    agent = a3c.Agent(a3c.make_envs(args, 1), args)
    optimizer = torch.optim.Adam(agent.parameters(), args.learning_rate, fused=True)
    losses, (ours, theirs) = spy(a3c, "a3c_loss"), FORK.Pipe()
    ours.send((0, rollouts)), ours.send(None)
    a3c.worker(0, args, agent, optimizer, theirs)
    for i, (batch, _) in enumerate(losses):
        episode, t = np.divmod(np.arange(T * i, T * (i + 1)), 4)
        np.testing.assert_array_equal(batch["obs"], np.stack([np.ones(T), episode, t], -1))
        true, values = truth(batch["obs"].numpy()), 100.0 * episode + t
        arrays = [x[:, None] for x in (true.rewards.astype(float), values, values + 1, true.terminations, true.dones)]
        np.testing.assert_array_equal(batch["actions"], true.actions)
        advantages = gae_by_definition(*arrays, 0.9, 0.8)[:, 0]
        np.testing.assert_allclose(batch["advantages"], advantages, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(batch["returns"], advantages + values, rtol=1e-4, atol=1e-4)
        assert ours.recv()[2]["charts/learning_rate"] == pytest.approx(0.002 * (1 - i / rollouts))
    assert len(losses) == rollouts
    norm = torch.nn.utils.get_total_norm([p.grad for p in agent.parameters() if p.grad is not None])
    assert norm.item() == pytest.approx(1e-3, rel=1e-2)


def test_every_episode_of_every_worker_is_recorded(train):
    """Each worker has a counter of its own: after a checkpoint the next one, whose episodes are longer."""
    folder = train("a3c", num_envs=2, num_steps=25, total_timesteps=500, checkpoint_every=200)
    rows = episodes(folder)
    expected = [(sum(i + t for t in range(1, 4 + i)), 3 + i) for i in range(3)]  # environment i: return, length
    counts = [sum(row[1:] == episode for row in rows) for episode in expected]
    assert counts == [2 * (100 // 3), 2 * (100 // 4), 2 * (50 // 5)] and len(rows) == sum(counts)
    assert [step for step, *_ in rows] == sorted(step for step, *_ in rows) and rows[-1][0] == 500


def test_workers_act_differently(train):
    """Two workers with the same random numbers would have the same episodes."""
    rows = episodes(train("a3c", env_id="CartPole-v1", num_envs=2, num_steps=200, total_timesteps=400))
    assert len({step for step, *_ in rows}) > len(rows) / 2 + 2


def run(tmp_path, *words):
    """As a user starts it. Its output ends when the last process that could print has ended."""
    command = [sys.executable, ROOT / "algos" / "a3c.py", *arguments("a3c", run_dir=tmp_path / "run"), *words]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([str(word) for word in command], cwd=tmp_path, start_new_session=True, **pipes)


@pytest.mark.parametrize("sent, kill, code", [(signal.SIGKILL, os.kill, -9), (signal.SIGINT, os.killpg, 130)])
def test_no_process_is_left(sent, kill, code, tmp_path):
    """The parent alone is killed; Ctrl-C reaches all processes."""
    process = run(tmp_path, "--total-timesteps", 10**7)
    process.is_alive = lambda: process.poll() is None
    wait_for(tmp_path / "run" / "checkpoint.pt", process)
    kill(process.pid, sent)
    out, _ = process.communicate(timeout=TIMEOUT)
    assert process.returncode == code, out
    assert sent == signal.SIGKILL or "Traceback" not in out and "--resume" in out


def test_an_error_in_a_worker_keeps_its_traceback(tmp_path, monkeypatch):
    """And ends the run, with all its processes."""
    code = "import gymnasium as gym\nfrom gymnasium.envs.classic_control import CartPoleEnv as Mine\n"
    (tmp_path / "mine.py").write_text(code + "Mine.step = lambda *x: 'robot' + 1\ngym.register('Mine-v0', Mine)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    process = run(tmp_path, "--env-id", "mine:Mine-v0")
    out, _ = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 1 and "mine.py" in out and "TypeError: can only concatenate" in out
    assert "EOFError" not in out, out
