"""A2C: its loss against the policy gradient, one step per rollout by the policy that acted.

What it has in common with PPO (advantages, rollouts, policies, normalization) is tested in test_ppo.py.
"""

import numpy as np
import pytest
import torch
from conftest import SCRIPTS, counter_id, load, make_agent, tensors
from test_ppo import CONTINUOUS, decided, inputs, policy

A2C = [name for name in SCRIPTS if hasattr(load(name), "a2c_loss")]


@pytest.mark.parametrize("script", A2C)
@pytest.mark.parametrize("norm_adv", [True, False])
def test_loss_is_the_sum_of_its_parts(script, norm_adv, rng):
    flags = {"norm_adv": norm_adv, "ent_coef": 0.03, "vf_coef": 0.7, "bounds_coef": 0.2}
    agent, args = decided(script, **flags)
    (obs, actions), (advantages, returns) = inputs(script, 24), torch.randn(2, 24) + 1
    loss, metrics = load(script).a2c_loss(agent, args, obs, actions, advantages, returns)
    new = policy(script, agent, obs)
    scaled = (advantages - advantages.mean()) / advantages.std() if norm_adv else advantages
    expected = {
        "losses/policy_loss": -(scaled * new.log_prob(actions)).mean(),
        "losses/value_loss": 0.5 * ((agent.value(obs) - returns) ** 2).mean(),
        "losses/entropy": new.entropy().mean(),
    }
    policy_loss, value_loss, entropy = expected.values()
    total = policy_loss + 0.7 * value_loss - 0.03 * entropy
    if script in CONTINUOUS:
        beyond = agent.actor(obs) - agent.actor(obs).clamp(-1, 1)
        expected["losses/bounds_loss"] = (beyond**2).sum(-1).mean()
        assert expected["losses/bounds_loss"] > 0
        total = total + 0.2 * expected["losses/bounds_loss"]
    torch.testing.assert_close(loss, total)
    torch.testing.assert_close(metrics, {name: x.detach() for name, x in expected.items()})


@pytest.mark.parametrize("script", A2C)
def test_gradient_is_the_policy_gradient(script, rng):
    """-A grad log pi(a|s) and vf_coef (V - R) grad V, row by row; neither reaches the other's network."""
    agent, args = make_agent(script, norm_adv=False, ent_coef=0.0, vf_coef=0.7)
    (obs, actions), (advantages, returns) = inputs(script, 6), torch.randn(2, 6)
    expected = {name: torch.zeros_like(parameter) for name, parameter in agent.named_parameters()}
    for i in range(6):
        row = obs[i : i + 1]
        logprob, value = policy(script, agent, row).log_prob(actions[i : i + 1]), agent.value(row)
        for weight, output in ((-advantages[i], logprob), (0.7 * (value.item() - returns[i]), value)):
            agent.zero_grad()
            output.sum().backward()
            for name, parameter in agent.named_parameters():
                if parameter.grad is not None:
                    expected[name] += weight * parameter.grad / 6
    agent.zero_grad()
    load(script).a2c_loss(agent, args, obs, actions, advantages, returns)[0].backward()
    for name, parameter in agent.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], atol=1e-5, rtol=1e-4)
        assert parameter.grad.abs().max() > 1e-5, name


@pytest.mark.parametrize("bias, penalty", [([0.9, -0.9], 0.0), ([1.5, -0.2], 0.25), ([3.0, -1.5], 4.25)])
def test_means_beyond_the_bounds_are_pulled_back(bias, penalty, rng):
    """The penalty is the squared distance to the bounds, summed over the dimensions; inside it does nothing."""
    agent, args = make_agent("a2c_gae_continuous", bounds_coef=0.3, vf_coef=0.0)
    torch.nn.init.zeros_(agent.actor[-1].weight)
    agent.actor[-1].bias.data.copy_(torch.tensor(bias))
    loss, _ = load("a2c_gae_continuous").a2c_loss(agent, args, *inputs("a2c_gae_continuous", 5), *torch.zeros(2, 5))
    loss.backward()
    assert loss.item() == pytest.approx(0.3 * penalty, abs=1e-6)
    gradient = [2 * 0.3 * (x - np.clip(x, -1, 1)) for x in bias]
    assert agent.actor[-1].bias.grad.tolist() == pytest.approx(gradient, abs=1e-6)


@pytest.mark.parametrize("script", A2C)
def test_lambda_one_gives_n_step_returns(script, rng):
    """A3C algorithm S3: R is the sum of what follows in the rollout, and V of the state where that stops."""
    T, N, gamma = 9, 4, 0.9
    rewards, values, next_values = rng.normal(size=(3, T, N))
    terminations, truncations = rng.random((2, T, N)) < 0.2
    dones = terminations | truncations
    next_values[:-1] = np.where(dones[:-1], next_values[:-1], values[1:])
    arrays = rewards, values, next_values, terminations, dones
    returns = load(script).gae(*tensors(*arrays), gamma, 1.0).numpy() + values
    R = next_values[-1]
    for t in reversed(range(T)):
        R = rewards[t] + gamma * np.where(terminations[t], 0, np.where(dones[t], next_values[t], R))
        np.testing.assert_allclose(returns[t], R, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("script", A2C)
def test_each_rollout_gives_one_step_by_the_policy_that_acted(script, train, monkeypatch):
    """The weights that learn are those that judged (R - A is V) and acted (without noise, the action is the mean)."""
    module, counts = load(script), []
    a2c_loss = module.a2c_loss

    def watched(agent, args, obs, actions, advantages, returns):
        counts.append(len(obs))
        with torch.no_grad():
            torch.testing.assert_close(returns - advantages, agent.value(obs), atol=1e-4, rtol=1e-4)
            if script in CONTINUOUS:
                torch.testing.assert_close(actions, agent.actor(obs), atol=1e-3, rtol=0)
        return a2c_loss(agent, args, obs, actions, advantages, returns)

    monkeypatch.setattr(module, "a2c_loss", watched)
    flags = {"num_envs": 4, "num_steps": 8, "total_timesteps": 5 * 32, "checkpoint_every": 0, "log_std_init": -10.0}
    train(script, env_id=counter_id(script), eval_episodes=1, norm_obs=True, learning_rate=0.05, **flags)
    assert counts == [32] * 5
