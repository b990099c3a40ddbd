"""Self-imitation: its buffer and loss against brute force, what a run stores against what really happened."""

import shutil

import numpy as np
import pytest
import torch
from conftest import bits, having, load, make_args
from environments import Counter
from test_dqn import fits, spaces, through_a_file
from test_ppo import decided, gradients, policy
from test_reinforce import returns_by_definition

SIL = having("sil_loss")

sil = load("a2c_sil")  # for functions whose text is the same in every script (test_house)


def make_buffer(N: int = 1, **flags):
    return sil.EpisodeBuffer(make_args("a2c_sil", **flags), spaces(N))


def add(buffer, lengths: list[int], rng) -> np.ndarray:
    """Terminated episodes with rewards 0 and observations (k, 0), (k + 1, 0), ...; returns the advantages, -values."""
    T, k, dones = sum(lengths), buffer.added, np.zeros((sum(lengths), 1), bool)
    dones[np.cumsum(lengths) - 1] = True
    obs, values = np.stack([k + np.arange(T), np.zeros(T)], -1)[:, None], rng.normal(size=(T, 1))
    buffer.add(obs, np.zeros((T, 1), int), np.zeros((T, 1)), values, obs, values, dones, dones)
    return -values[:, 0]


@pytest.mark.parametrize("sil_coef, sil_vf_coef", [(1.0, 0.0), (0.1, 0.3)])
def test_loss_equals_its_definition(sil_coef, sil_vf_coef, rng):
    """SIL eq. 1 to 3 in a loop. What was worse than its value has no gradient, the bootstrapped value neither."""
    agent, args = decided("a2c_sil", sil_coef=sil_coef, sil_vf_coef=sil_vf_coef)
    (obs, final_obs), actions = torch.randn(2, 40, 3), torch.randint(4, (40,))
    returns, discounts, weights = torch.randn(40), torch.rand(40) * (torch.rand(40) < 0.5), torch.rand(40)
    loss, clipped, metrics = sil.sil_loss(agent, args, obs, actions, returns, discounts, final_obs, weights)
    policy_loss, value_loss, expected, future = 0, 0, [], agent.value(final_obs).tolist()
    for b in range(40):
        value = agent.value(obs[b])
        better = returns[b] + discounts[b] * future[b] - value
        expected.append(max(better.item(), 0))
        if better > 0:
            policy_loss -= weights[b] * policy("a2c_sil", agent, obs[b]).log_prob(actions[b]) * better.item() / 40
            value_loss += weights[b] * better**2 / 2 / 40
    total = sil_coef * (policy_loss + sil_vf_coef * value_loss)
    torch.testing.assert_close(loss, total)
    torch.testing.assert_close(gradients(loss, agent), gradients(total, agent), atol=1e-5, rtol=1e-4)
    assert clipped.tolist() == pytest.approx(expected, abs=1e-5) and 10 < np.count_nonzero(expected) < 30
    values = [policy_loss.item(), value_loss.item(), np.mean(expected)]
    assert [x.item() for x in metrics.values()] == pytest.approx(values)


@pytest.mark.parametrize("buffer_size", [10_000, 20])
@pytest.mark.parametrize("script", SIL)
def test_whole_episodes_across_rollouts_and_environments(script, buffer_size, train, spy, monkeypatch):
    """Rollouts of 2 steps, episodes of 3 to 5, checkpoints in between: what is stored is what happened, to the end."""
    module, value, made = load(script), lambda obs: 10 * obs[..., 0] + obs[..., 1] + obs[..., 2] / 8, {}
    adds, original = spy(module.EpisodeBuffer, "add"), module.Agent.value
    monkeypatch.setattr(module.Agent, "value", lambda self, obs: value(obs) + 0 * original(self, obs))
    flags = {"num_envs": 3, "num_steps": 2, "total_timesteps": 240, "checkpoint_every": 90, "num_minibatches": 1}
    train(script, buffer_size=buffer_size, gamma=0.9, per_alpha=0.5, per_eps=0.25, **flags)
    buffer, ended = adds[-1][0]["self"], 0
    for env in Counter.made[:9]:  # each three until a checkpoint
        L = 3 + env.index % 4
        ended += L * len(env.finished)
        for episode in range(len(env.finished)):
            returns = returns_by_definition([env.index + t + 1 for t in range(L)], 0, 0.9)
            for t in range(L):
                action, discount = env.actions[episode * L + t], 0.9 ** (L - t) * (episode % 2)
                made[env.index, episode, t] = action, returns[t], discount, L
    assert buffer.added == ended > 180
    obs, actions, returns, discounts, final_obs, priorities = (x[: buffer.added] for x in buffer.arrays)
    rows = [tuple(row) for row in obs.astype(int).tolist()]
    assert len(set(rows)) == len(rows) == min(ended, buffer_size) and set(rows) <= made.keys()
    for row, (action, expected, discount, L) in enumerate(made[key] for key in rows):
        assert (actions[row], final_obs[row].tolist()) == (action, [*rows[row][:2], L])
        assert [returns[row], discounts[row]] == pytest.approx([expected, discount], rel=1e-5)
        better = expected + discount * value(final_obs[row]) - value(obs[row])
        assert priorities[row] == pytest.approx((max(better, 0) + 0.25) ** 0.5, rel=1e-5)


@pytest.mark.parametrize("alpha, beta", [(0.6, 0.1), (1.0, 1.0), (0.0, 0.4)])
def test_priorities_and_weights(alpha, beta, rng, tmp_path):
    """Frequencies of (max(R - V, 0) + eps)^alpha, weights by definition; also of a buffer that was loaded."""
    buffer, other = (make_buffer(buffer_size=60, per_alpha=alpha, per_beta=beta, per_eps=0.1) for _ in range(2))
    errors = add(buffer, [5, 1, 14], rng)
    errors[:4] = [-3.0, 0.0, 2.0, 0.5]
    buffer.update(np.arange(4), errors[:4])
    other.load_state_dict(through_a_file(buffer, tmp_path / "state"))
    share = (np.maximum(errors, 0) + 0.1) ** alpha / ((np.maximum(errors, 0) + 0.1) ** alpha).sum()
    samples = []
    for one in (buffer, other):
        np.random.seed(1)
        samples.append(one.sample(20_000, "cpu"))
    rows, batch = samples[0]
    torch.testing.assert_close(samples[1][1], batch, rtol=0, atol=0)
    assert fits(np.bincount(rows, minlength=20), share) and batch[0][:, 0].tolist() == rows.tolist()
    expected = (20 * share[rows]) ** -beta
    np.testing.assert_allclose(batch[-1], expected / expected.max(), rtol=1e-5)


def test_numbers_that_are_none_leave_the_buffer_whole(rng):
    """So that a run that diverges gets as far as the check that reports it."""
    buffer = make_buffer(buffer_size=7)
    add(buffer, [4, 9], rng)  # an episode that is longer than the buffer, too
    buffer.update(np.arange(3), np.array([np.nan, np.inf, -np.inf], np.float32))
    rows, batch = buffer.sample(64, "cpu")
    assert rows.max() < 7 and all(x.isfinite().all() for x in batch) and batch[0][:, 0].min() >= 6


@pytest.mark.parametrize("script", SIL)
def test_updates_after_each_rollout(script, train, spy):
    """M of them as soon as an episode has ended; what an update sampled gets its clipped advantages."""
    module = load(script)
    losses = spy(module, "sil_loss")
    samples, updates = (spy(module.EpisodeBuffer, name) for name in ("sample", "update"))
    flags = {"num_envs": 2, "num_steps": 2, "total_timesteps": 40, "num_minibatches": 1, "update_epochs": 1}
    train(script, sil_updates=3, sil_batch_size=8, **flags)
    assert len(losses) == len(samples) == 3 * 9  # the first rollout ends before the first episode
    after = {id(given["rows"]): given["advantages"] for given, _ in updates}
    for (_, (rows, batch)), (given, (_, clipped, _)) in zip(samples, losses):
        np.testing.assert_array_equal(after[id(rows)], clipped)
        assert given["weights"].equal(batch[-1]) and given["discounts"].equal(batch[3])


@pytest.mark.parametrize("script, neighbor", [("a2c_sil", "a2c_gae"), ("ppo_sil", "ppo")])
def test_without_imitation_it_is_its_neighbor(script, neighbor, train):
    flags, found = {"num_envs": 2, "num_steps": 8, "total_timesteps": 96, "checkpoint_every": 40}, []
    for name in (script, neighbor):
        folder = train(name, sil_updates=0, **flags)
        found.append(bits(folder))
        shutil.rmtree(folder)
    assert found[0] == found[1]
