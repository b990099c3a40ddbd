"""PQN on Atari: its network against the definition, a run against what really happened.

Returns and loss are those of pqn.py, and tested there; the environments are those of ppo_atari.py (test_ppo.py).
"""

import numpy as np
import pytest
import torch
from conftest import episodes, load, make_agent, saved_agent
from environments import FakeGames
from test_dqn import is_share
from test_ppo import ExtraLives, inputs
from test_pqn import returns_by_definition
from torch import nn

pqn = load("pqn_atari")


@pytest.mark.parametrize("norm_obs", [False, True])
def test_layers_are_normalized(norm_obs, rng):
    """What enters a ReLU has mean 0 and deviation 1 over the channels of each position, times a weight, plus a bias."""
    agent, _ = make_agent("pqn_atari", norm_obs=norm_obs)
    for parameter in agent.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    obs, seen = inputs("pqn_atari", 5)[0], torch.rand(20, 84, 84, dtype=torch.float64) * torch.rand(84, 84)
    agent.obs_stats.update(seen)
    x = obs.double() / 255
    if norm_obs:
        x = (x - seen.mean(0)) / (seen.var(0, correction=0).mean() + 1e-4).sqrt()
    layers = [layer for layer in agent.double().trunk if list(layer.parameters())]
    assert len(layers) == 8
    for linear, norm in zip(layers[::2], layers[1::2], strict=True):
        x = linear(x if isinstance(linear, nn.Conv2d) else x.flatten(1))
        x = (x - x.mean(1, keepdim=True)) / (x.var(1, correction=0, keepdim=True) + 1e-5).sqrt()
        x = (x.movedim(1, -1) * norm.weight + norm.bias).movedim(-1, 1).relu()
    torch.testing.assert_close(agent.float()(obs), agent.double().head(x).float(), atol=1e-4, rtol=1e-4)


def run(train, spy, monkeypatch, N: int, T: int, iterations: int, **flags):
    """The folder, and what q_lambda_returns and the loss of each rollout got, (T, N, ...)."""
    monkeypatch.setattr(torch, "randperm", lambda n, device: torch.arange(n))
    returns, losses = spy(pqn, "q_lambda_returns"), spy(pqn, "pqn_loss")
    usual = {"num_envs": N, "num_steps": T, "total_timesteps": iterations * N * T, "num_minibatches": 1}
    folder, found = train("pqn_atari", **usual | flags), []
    for (given, result), (batch, _) in zip(returns, losses, strict=True):
        rows = {name: x.unflatten(0, (T, N)) for name, x in batch.items() if isinstance(x, torch.Tensor)}
        assert rows["returns"].equal(result)
        found.append({name: x.numpy() for name, x in (rows | given).items() if isinstance(x, torch.Tensor)})
    assert len(found) == iterations
    return folder, {name: np.concatenate([x[name] for x in found]) for name in found[0]}


@pytest.mark.parametrize("life_loss", [False, True])
def test_games_hold_what_happened(life_loss, train, spy, monkeypatch):
    """Signs of rewards for the learner, raw scores in the log. max Q is 100 game + t, also where a game ends."""
    N, T, iterations = 3, 16, 3

    def forward(self, obs):
        values = obs[:, -1, 0, 0] * 100.0 + obs[:, -1, 0, 1]
        return values[:, None] - torch.tensor([1.0, 0, 2]) + 0 * self.head.bias

    monkeypatch.setattr(pqn.Agent, "forward", forward)
    ExtraLives.install(monkeypatch, pqn)
    FakeGames.made.clear()
    flags = {"life_loss": life_loss, "gamma": 0.9, "q_lambda": 0.7, "start_e": 0.0, "end_e": 0.0}
    folder, found = run(train, spy, monkeypatch, N, T, iterations, **flags)
    game, t = np.divmod(np.arange(T * iterations)[:, None], 10 + np.arange(N))
    ends, lost, values = t + 1 == 10 + np.arange(N), life_loss & np.isin(t + 1, [4, 7]), 100 * game + t
    truncations = ends & (game % 2 == 1)
    terminations = ends & ~truncations | lost
    expected = {"rewards": np.ones_like(t), "dones": ends | lost, "terminations": terminations}
    expected |= {"actions": np.ones_like(t)}
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array)
    np.testing.assert_array_equal(found["next_values"][~terminations], values[~terminations] + 1)
    np.testing.assert_array_equal(found["obs"][..., -1, 0, :2], np.stack([game, t], -1))
    for rows in np.split(np.arange(T * iterations), iterations):
        given = [found[name][rows] for name in ("rewards", "next_values", "terminations", "dones")]
        np.testing.assert_allclose(found["returns"][rows], returns_by_definition(*given, 0.9, 0.7), rtol=1e-5)
    assert truncations.sum() > 2 and lost.any() == life_loss
    assert [(score, length) for _, score, length in episodes(folder)] == FakeGames.made[0].finished


def test_statistics_of_frames(train, spy, monkeypatch):
    """Of the newest frame of every eighth step; saved, and unchanged by evaluation."""
    FakeGames.install(monkeypatch, pqn)
    folder, found = run(train, spy, monkeypatch, 3, 16, 2, norm_obs=True)
    agent, _ = saved_agent("pqn_atari", folder)
    frames = found["obs"][::8, :, -1].reshape(-1, 84, 84) / 255
    np.testing.assert_allclose(agent.obs_stats.mean, frames.mean(0), atol=1e-9)
    np.testing.assert_allclose(agent.obs_stats.var, frames.var(0), atol=1e-9)
    assert agent.obs_stats.count == len(frames) == 2 * 2 * 3


def test_exploration_follows_its_schedule(train, spy, monkeypatch):
    """The greedy action is 1, of 3; the evaluation has an epsilon of its own."""
    FakeGames.install(monkeypatch, pqn)
    q_values = torch.tensor([0.0, 1.0, 0.5])
    monkeypatch.setattr(pqn.Agent, "forward", lambda self, obs: q_values + 0 * self.head.bias + 0 * obs[:, :1, 0, 0])
    flags = {"start_e": 1.0, "end_e": 0.2, "exploration_fraction": 0.5}
    _, found = run(train, spy, monkeypatch, 4, 20, 40, **flags)
    for i, actions in enumerate(np.split(found["actions"] == 1, 8)):  # epsilon of the five rollouts
        epsilon = np.mean([max(1 - 0.8 * j / 20, 0.2) for j in range(5 * i, 5 * i + 5)])
        assert is_share(actions, 1 - epsilon * 2 / 3)
    agent, _ = make_agent("pqn_atari", eval_e=0.3)
    q_values = torch.tensor([0.0, 1.0, 0.5, 0.2])  # of that agent's four actions
    assert is_share((agent.act(torch.zeros(4000, 1, 1, 1)) == 1).numpy(), 1 - 0.3 * 3 / 4)
