"""TQC: the truncated pool and both losses against their definitions; critics that are independent.

The density of the policy, the temperature, and what a run does: test_sac.py. The replay buffer: test_dqn.py.
"""

import math

import numpy as np
import pytest
import torch
from conftest import load, make_args
from test_ppo import gradients
from test_qr_dqn import rho
from test_sac import assert_gradients, batch, floats, make_parts

tqc = load("tqc_continuous")


def truncated(quantiles: torch.Tensor, drop: int) -> list[float]:
    """Of one state, (C, M): pool, sort, and drop the largest of what is left, `drop` times for each critic."""
    pool = sorted(x for row in quantiles.tolist() for x in row)
    for _ in range(drop * len(quantiles)):
        pool.remove(max(pool))
    return pool


@pytest.mark.parametrize("C, M, drop", [(1, 1, 0), (1, 5, 2), (5, 25, 2), (2, 3, 0), (3, 4, 3), (2, 6, 5)])
def test_truncation_equals_its_definition(C, M, drop, rng):
    """Over all critics together: how many of each are dropped is up to the values. Also where some are equal."""
    quantiles = (torch.randn(C, 40, M) + torch.arange(C)[:, None, None]).round(decimals=1)
    ours = tqc.truncate(quantiles, drop)
    assert ours.shape == (40, C * (M - drop))
    assert [sorted(row) for row in ours.tolist()] == [truncated(quantiles[:, b], drop) for b in range(40)]


@pytest.mark.parametrize("drop", [0, 2])
def test_critic_loss_equals_its_definition(drop, rng):
    """The sum over critics of the mean over states, quantiles, and targets; these are the same for every critic."""
    C, M, B = 3, 4, 10
    flags = {"gamma": 0.9, "n_critics": C, "n_quantiles": M, "top_quantiles_to_drop_per_net": drop}
    agent, target, args = make_parts("tqc_continuous", **flags)
    data = obs, actions, rewards, next_obs, terminations = [x[:B] for x in batch("tqc_continuous")]
    noise = torch.randn(B, 2)
    next_actions, next_logprobs = agent.action_and_logprob(next_obs, noise)
    quantiles, next_quantiles = agent.critics(obs, actions), target(next_obs, next_actions)
    expected = 0
    for b in range(B):
        pool = truncated(next_quantiles[:, b], drop)
        futures = [0.9 * (z - math.exp(-0.7) * next_logprobs[b].item()) for z in pool]
        td_targets = [rewards[b] + (0 if terminations[b] else future) for future in futures]
        for c, i in np.ndindex(C, M):
            losses = [rho(y - quantiles[c, b, i], (2 * i + 1) / (2 * M), 1.0) for y in td_targets]
            expected = expected + sum(losses) / len(losses) / M / B
    loss, metrics = tqc.critic_loss(agent, target, args, noise, *data)
    torch.testing.assert_close(loss, expected)
    assert floats(metrics) == pytest.approx({"qf_loss": expected.item(), "q_values": quantiles.mean().item()})
    loss.backward()
    assert_gradients(agent.critics, gradients(expected, agent.critics))
    others = [*agent.actor.parameters(), agent.log_alpha, *target.parameters()]
    assert all(parameter.grad is None for parameter in others)


def test_actor_loss_equals_its_definition(rng):
    """With the mean of all quantiles, of which none is dropped."""
    agent, _, _ = make_parts("tqc_continuous", n_critics=3, n_quantiles=4, top_quantiles_to_drop_per_net=3)
    obs, noise = torch.randn(20, 3), torch.randn(20, 2)
    actions, logprobs = agent.action_and_logprob(obs, noise)
    q = agent.critics(obs, actions)
    means = [sum(q[c, b, i] for c, i in np.ndindex(3, 4)) / 12 for b in range(20)]
    expected = sum(math.exp(-0.7) * logprobs[b] - means[b] for b in range(20)) / 20
    loss, entropy, metrics = tqc.actor_loss(agent, noise, obs)
    values = {"actor_loss": expected.item(), "entropy": -logprobs.mean().item(), "alpha": math.exp(-0.7)}
    assert floats(metrics) == pytest.approx(values, rel=1e-4) and entropy == metrics["losses/entropy"]
    loss.backward()
    assert_gradients(agent.actor, gradients(expected, agent.actor))
    assert agent.log_alpha.grad is None


def test_critics_are_independent(rng):
    """They begin different, and no weight of one moves the quantiles of another."""
    agent, _, _ = make_parts("tqc_continuous", n_critics=3, n_quantiles=4)
    begin = load("tqc_continuous").Critics(3, 2, make_args("tqc_continuous", n_critics=3))
    for critics in (begin, agent.critics):
        first = critics(torch.randn(20, 3), torch.randn(20, 2))
        assert min((first[i] - first[j]).abs().max() for i in range(3) for j in range(i)) > 0.01
    touched = [torch.cat([g.flatten() for g in gradients(first[c].sum(), agent.critics)]) != 0 for c in range(3)]
    assert not any((touched[i] & touched[j]).any() for i in range(3) for j in range(i))
    assert all(x.float().mean() > 0.15 for x in touched)


def test_more_than_all_cannot_be_dropped():
    with pytest.raises(ValueError, match="n_quantiles"):
        tqc.Args(n_quantiles=5, top_quantiles_to_drop_per_net=5)
