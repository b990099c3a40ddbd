"""A2C: its loss against the policy gradient, one step per rollout, and what it learns from.

What it has in common with PPO (advantages, rollouts, actions, normalisation) is tested in test_ppo.py.
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import SCRIPTS, counter_id, family, load, make_agent, saved_agent, tensors
from torch.distributions import Categorical, Independent, Normal

A2C = [name for name in SCRIPTS if hasattr(load(name), "a2c_loss")]
CONTINUOUS = [name for name in A2C if family(name).suffix == "_continuous"]

a2c = load("a2c_gae")


def policy_and_actions(script: str, agent, obs):
    """The distribution as torch.distributions has it, and actions that it need not like."""
    if script in CONTINUOUS:
        return Independent(Normal(agent.actor(obs), agent.log_std.exp()), 1), torch.randn(len(obs), 2)
    return Categorical(logits=agent.actor(obs)), torch.randint(4, (len(obs),))


# ---------------------------------------------------------------------------------------------------------------- loss


@pytest.mark.parametrize("script", A2C)
@pytest.mark.parametrize("norm_adv", [True, False])
def test_loss_is_the_sum_of_its_parts(script, norm_adv, rng):
    agent, args = make_agent(script, norm_adv=norm_adv, ent_coef=0.03, vf_coef=0.7)
    obs, (advantages, returns) = torch.randn(24, 3), torch.randn(2, 24) + 1
    policy, actions = policy_and_actions(script, agent, obs)
    loss, metrics = load(script).a2c_loss(agent, args, obs, actions, advantages, returns)
    scaled = (advantages - advantages.mean()) / (advantages.std() + 1e-8) if norm_adv else advantages
    pg_loss, entropy = -(scaled * policy.log_prob(actions)).mean(), policy.entropy().mean()
    v_loss = 0.5 * ((agent.value(obs) - returns) ** 2).mean()
    torch.testing.assert_close(loss, pg_loss - 0.03 * entropy + 0.7 * v_loss)
    named = dict(zip(load(script).METRICS, metrics, strict=True))
    torch.testing.assert_close(named["losses/policy_loss"], pg_loss.detach())
    torch.testing.assert_close(named["losses/value_loss"], v_loss.detach())
    torch.testing.assert_close(named["losses/entropy"], entropy.detach())


@pytest.mark.parametrize("script", A2C)
def test_gradient_is_the_policy_gradient(script, rng):
    """-A grad log pi(a|s) and vf_coef (V - R) grad V, worked out row by row; neither reaches the other's network."""
    agent, args = make_agent(script, norm_adv=False, ent_coef=0.0, vf_coef=0.7)
    B = 6
    obs, (advantages, returns) = torch.randn(B, 3), torch.randn(2, B)
    policy, actions = policy_and_actions(script, agent, obs)
    expected = {name: torch.zeros_like(parameter) for name, parameter in agent.named_parameters()}
    for i in range(B):
        log_prob = policy_and_actions(script, agent, obs[i : i + 1])[0].log_prob(actions[i : i + 1])
        for weight, output in ((-advantages[i], log_prob), (None, agent.value(obs[i : i + 1]))):
            agent.zero_grad()
            output.sum().backward()
            weight = 0.7 * (output.item() - returns[i]) if weight is None else weight
            for name, parameter in agent.named_parameters():
                if parameter.grad is not None:
                    expected[name] += weight * parameter.grad / B
    agent.zero_grad()
    loss, _ = load(script).a2c_loss(agent, args, obs, actions, advantages, returns)
    loss.backward()
    for name, parameter in agent.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], atol=1e-6, rtol=1e-4)
        assert parameter.grad.abs().max() > 1e-5, name


def test_means_beyond_the_bounds_are_pulled_back(rng):
    """The penalty is the squared distance to the bounds, summed over actions; inside them it does nothing."""
    script = load("a2c_gae_continuous")
    agent, args = make_agent("a2c_gae_continuous", bounds_coef=0.3, vf_coef=0.0)
    nothing = torch.zeros(5)
    for bias, penalty in (([0.9, -0.9], 0.0), ([1.5, -0.2], 0.25), ([3.0, -1.5], 4.25)):
        agent.actor[-1].weight.data.zero_()
        agent.actor[-1].bias.data.copy_(torch.tensor(bias))
        agent.zero_grad()
        loss, metrics = script.a2c_loss(agent, args, torch.randn(5, 3), torch.randn(5, 2), nothing, nothing)
        loss.backward()
        assert loss.item() == pytest.approx(0.3 * penalty, abs=1e-6)
        assert dict(zip(script.METRICS, metrics.tolist(), strict=True))["losses/bounds_loss"] == pytest.approx(penalty)
        beyond = [np.sign(x) * 2 * 0.3 * max(abs(x) - 1, 0) for x in bias]
        assert agent.actor[-1].bias.grad.tolist() == pytest.approx(beyond, abs=1e-6)


def test_entropy_bonus_levels_the_policy(rng):
    agent, args = make_agent("a2c_gae", norm_adv=False, ent_coef=1.0, vf_coef=0.0)
    agent.actor[-1].bias.data.copy_(torch.tensor([2.0, 0.0, 0.0, -1.0]))
    obs, optimizer = torch.randn(50, 3), torch.optim.SGD(agent.parameters(), lr=0.5)
    entropies = []
    for _ in range(30):
        batch = [obs, torch.zeros(50, dtype=torch.int64), torch.zeros(50), torch.zeros(50)]
        entropies.append(a2c.gradient_step(agent, optimizer, a2c.a2c_loss, batch, args)["losses/entropy"])
    assert np.all(np.diff(entropies) > 0) and entropies[-1] > entropies[0] + 0.2


# -------------------------------------------------------------------------------------------------------- gradient step


def test_gradient_step_is_one_step_of_limited_norm(rng):
    agent = torch.nn.Linear(3, 1)
    optimizer, args = torch.optim.SGD(agent.parameters(), lr=0.1), SimpleNamespace(max_grad_norm=0.5)
    for factor, moved in ((1000.0, 0.1 * 0.5), (0.01, 0.1 * 0.01 * 2)):  # above the limit, and below it
        before = [parameter.detach().clone() for parameter in agent.parameters()]
        seen = []

        def loss_fn(agent, args, x, y, factor=factor, seen=seen):
            seen.append((x, y))
            return factor * sum(parameter.sum() for parameter in agent.parameters()), torch.tensor([1.0, 2.0, 3.0])

        metrics = a2c.gradient_step(agent, optimizer, loss_fn, [1, 2], args)  # the second has no gradient of the first
        distance = sum((new - old).square().sum() for new, old in zip(agent.parameters(), before, strict=True)).sqrt()
        assert distance.item() == pytest.approx(moved, rel=1e-3)
        assert seen == [(1, 2)] and metrics == dict(zip(a2c.METRICS, (1.0, 2.0, 3.0), strict=True))


# ------------------------------------------------------------------------------------------------------------- in a run


@pytest.mark.parametrize("script", A2C)
def test_lambda_one_gives_n_step_returns(script, rng):
    """A3C algorithm S3: R is the sum of what follows in the rollout, and V of the state that it stops at."""
    T, N, gamma = 9, 4, 0.9
    rewards, values, next_values = rng.normal(size=(3, T, N))
    terminations, truncations = rng.random((2, T, N)) < 0.2
    dones = terminations | truncations
    next_values[:-1] = np.where(dones[:-1], next_values[:-1], values[1:])
    arrays = (rewards, values, next_values, terminations, dones)
    _, returns = load(script).gae(*tensors(*arrays), gamma, 1.0)
    for n in range(N):
        R = next_values[-1, n]
        for t in reversed(range(T)):
            if dones[t, n]:
                R = 0 if terminations[t, n] else next_values[t, n]
            R = rewards[t, n] + gamma * R
            assert returns[t, n].item() == pytest.approx(R)


@pytest.mark.parametrize("script", A2C)
def test_each_rollout_gives_one_step_by_the_policy_that_acted(script, train, monkeypatch):
    """The weights that learn are those that acted and judged: R - A is V, and without noise the action is the mean."""
    module, seen = load(script), []
    original = module.gradient_step

    def gradient_step(agent, optimizer, loss_fn, batch, args):
        obs, actions, advantages, returns = batch
        assert not any(x.requires_grad for x in batch) and {len(x) for x in batch} == {8 * 4}
        with torch.no_grad():
            torch.testing.assert_close(returns - advantages, agent.value(obs), atol=1e-4, rtol=1e-4)
            if script in CONTINUOUS:
                torch.testing.assert_close(actions, agent.actor(obs), atol=1e-3, rtol=0)
                seen.append(agent.obs_stats.count.item())
            else:
                seen.append(None)
        return original(agent, optimizer, loss_fn, batch, args)

    monkeypatch.setattr(module, "gradient_step", gradient_step)
    flags = {"num_envs": 4, "num_steps": 8, "total_timesteps": 5 * 32, "checkpoint_every": 0, "log_std_init": -10.0}
    train(script, env_id=counter_id(script), eval_episodes=1, norm_obs=True, learning_rate=0.05, **flags)
    assert seen == ([0, 32, 64, 96, 128] if script in CONTINUOUS else [None] * 5)


@pytest.mark.parametrize("script", A2C)
def test_one_row(script, train):
    """Nothing to normalise, and nothing that is not a number."""
    flags = {"num_envs": 1, "num_steps": 1, "total_timesteps": 5, "checkpoint_every": 0, "eval_episodes": 1}
    agent, _ = saved_agent(script, train(script, norm_adv=True, **flags))
    assert all(parameter.isfinite().all() for parameter in agent.parameters())
