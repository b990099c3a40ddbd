"""PQN: returns and loss against their definitions, a run against what really happened."""

import math

import numpy as np
import pytest
import torch
from conftest import load, make_agent
from environments import Counter
from test_dqn import act_one, is_share
from test_ppo import gradients, truth, walk

pqn = load("pqn")


def returns_by_definition(rewards, next_values, terminations, dones, gamma, q_lambda):
    """The weighted mean of the n-step returns R_n = r_t + ... + gamma^n max Q, for all n up to the first end.

    R_n has weight (1 - lambda) lambda^(n - 1); the longest one has what is left.
    """
    returns = np.zeros_like(rewards)
    for t, env in np.ndindex(rewards.shape):
        left, total = 1.0, 0.0
        for k in range(t, len(rewards)):
            total += gamma ** (k - t) * rewards[k, env]
            future = 0.0 if terminations[k, env] else gamma ** (k - t + 1) * next_values[k, env]
            last = dones[k, env] or k == len(rewards) - 1
            weight = left if last else (1 - q_lambda) * left
            returns[t, env] += weight * (total + future)
            left -= weight
            if last:
                break
    return returns


@pytest.mark.parametrize("T, N", [(1, 1), (1, 3), (40, 5)])
@pytest.mark.parametrize("gamma, q_lambda", [(0.9, 0.7), (0.9, 0.0), (0.9, 1.0), (1.0, 1.0)])
@pytest.mark.parametrize("unused", [100.0, math.nan, math.inf])
def test_returns_equal_their_definition(T, N, gamma, q_lambda, unused, rng):
    """The value after a termination is not used, whatever it is."""
    rewards, next_values = rng.normal(size=(2, T, N)).astype(np.float32)
    dones = rng.random((T, N)) < 0.2
    terminations = dones & (rng.random((T, N)) < 0.5)
    next_values[terminations] = unused
    given = rewards, next_values, terminations, dones
    found = pqn.q_lambda_returns(*map(torch.from_numpy, given), gamma, q_lambda)
    np.testing.assert_allclose(found, returns_by_definition(*given, gamma, q_lambda), atol=1e-5)


def test_loss_equals_its_definition(rng):
    agent, _ = make_agent("pqn")
    obs, actions, returns = torch.randn(20, 3), torch.randint(4, (20,)), 3 * torch.randn(20)
    loss, metrics = pqn.pqn_loss(agent, obs, actions, returns)
    values = [agent(obs[b])[actions[b]] for b in range(20)]
    expected = sum((values[b] - returns[b]) ** 2 for b in range(20)) / 20
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(list(metrics.values()), [expected.detach(), torch.stack(values).mean().detach()])
    torch.testing.assert_close(gradients(loss, agent), gradients(expected, agent), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("T, N, iterations, restart", [(16, 3, 3, False), (1, 4, 20, False), (9, 2, 3, True)])
def test_rollouts_hold_what_happened(T, N, iterations, restart, train, spy, monkeypatch):
    """max Q is of what the action led to, also where an episode ended; a checkpoint restarts the environments."""
    weights = torch.tensor([[0.3, 0.1], [0.2, -0.4], [0.1, 0.5]])
    monkeypatch.setattr(pqn.Agent, "forward", lambda self, obs: obs @ weights + 0 * self.network[0].bias.sum())
    monkeypatch.setattr(torch, "randperm", lambda n, device: torch.arange(n))
    returns, losses = spy(pqn, "q_lambda_returns"), spy(pqn, "pqn_loss")
    flags = {"num_envs": N, "num_steps": T, "total_timesteps": iterations * N * T, "num_minibatches": 1}
    train("pqn", update_epochs=1, checkpoint_every=N * T if restart else 10**9, **flags)
    assert len(returns) == len(losses) == iterations and len(Counter.made) == (iterations * N if restart else N) + 1
    for i, ((given, result), (batch, _)) in enumerate(zip(returns, losses)):
        rows = {name: x.unflatten(0, (T, N)).numpy() for name, x in batch.items() if isinstance(x, torch.Tensor)}
        first = rows["obs"][0].tolist()
        expected = [[i * N + n, 0, 0] for n in range(N)] if restart else walk(N, iterations * T)[i * T].tolist()
        true = truth(rows["obs"])
        assert first == expected and (true.next_obs[:-1] == rows["obs"][1:])[~true.dones[:-1]].all()
        np.testing.assert_array_equal(rows["actions"], true.actions)
        for name in ("rewards", "terminations", "dones"):
            np.testing.assert_array_equal(given[name], getattr(true, name))
        np.testing.assert_allclose(given["next_values"], (true.next_obs @ weights.numpy()).max(-1), rtol=1e-5)
        np.testing.assert_array_equal(rows["returns"], result)


def test_epochs_take_each_step_once_and_keep_the_targets(train, spy):
    """In new order; the returns do not follow the weights from epoch to epoch."""
    losses = spy(pqn, "pqn_loss")
    flags = {"num_envs": 4, "num_steps": 6, "num_minibatches": 3, "update_epochs": 5, "total_timesteps": 48}
    train("pqn", **flags)
    assert len(losses) == 2 * 5 * 3
    for rollout in (losses[:15], losses[15:]):
        epochs = [rollout[3 * k : 3 * k + 3] for k in range(5)]
        rows = [[(*o, r) for b, _ in x for o, r in zip(b["obs"].tolist(), b["returns"].tolist())] for x in epochs]
        assert all(len(bound["actions"]) == 8 for bound, _ in rollout) and len(set(rows[0])) == 24
        assert all(sorted(x) == sorted(rows[0]) for x in rows) and len({tuple(x) for x in rows}) == 5


def test_exploration_follows_its_schedule(train, monkeypatch):
    """The greedy action is 1; each environment explores by itself."""
    act_one("pqn", monkeypatch)
    flags = {"num_envs": 4, "num_steps": 20, "num_minibatches": 1, "update_epochs": 1, "total_timesteps": 8000}
    train("pqn", start_e=1.0, end_e=0.2, exploration_fraction=0.5, **flags)
    actions = np.array([env.actions for env in Counter.made[:4]])  # (N, T)
    for quarter, epsilon in enumerate((0.8, 0.4, 0.2, 0.2)):
        assert is_share(actions[:, 500 * quarter : 500 * (quarter + 1)], 1 - epsilon / 2)
    assert np.abs(np.corrcoef(actions[:, 1000:]) - np.eye(4)).max() < 0.15
