"""A2C: its loss against the policy gradient, one step per rollout by the policy that acted.

What it has in common with PPO (advantages, rollouts, policies, normalization) is tested in test_ppo.py.
"""

import numpy as np
import pytest
import torch
from conftest import having, load, make_agent
from environments import FakeGames
from test_ppo import ATARI, CONTINUOUS, decided, evaluate, gradients, inputs, policy

A2C = having("a2c_loss")


@pytest.mark.parametrize("script", A2C)
@pytest.mark.parametrize("norm_adv", [True, False])
def test_loss_is_the_sum_of_its_parts(script, norm_adv, rng):
    """And so is its gradient: of -A log pi(a|s), which is the policy gradient, and of the squared error of V."""
    flags = {"norm_adv": norm_adv, "ent_coef": 0.03, "vf_coef": 0.7, "bounds_coef": 0.2}
    agent, args = decided(script, **flags)
    (obs, actions), (advantages, returns) = inputs(script, 24), torch.randn(2, 24) + 1
    loss, metrics = load(script).a2c_loss(agent, args, obs, actions, advantages, returns)
    new = policy(script, agent, obs)
    scaled = (advantages - advantages.mean()) / advantages.std() if norm_adv else advantages
    expected = {
        "losses/policy_loss": -(scaled * new.log_prob(actions)).mean(),
        "losses/value_loss": 0.5 * ((evaluate(agent, obs, actions)[2] - returns) ** 2).mean(),
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
    torch.testing.assert_close(gradients(loss, agent), gradients(total, agent), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(metrics, {name: x.detach() for name, x in expected.items()})


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


@pytest.mark.parametrize("script", [*A2C, "reinforce"])
def test_each_batch_gives_one_step_by_the_policy_that_acted(script, train, monkeypatch):
    """The weights that learn are those that judged (R - A is V) and acted, here without noise."""

    def greedy(agent, obs):
        return agent(obs)[0].argmax(-1) if script in ATARI else agent.act(obs)

    module, counts = load(script), []
    name = "a2c_loss" if script in A2C else "reinforce_loss"
    loss_fn = getattr(module, name)

    def watched(agent, args, obs, actions, advantages, returns):
        counts.append(len(obs))
        torch.testing.assert_close(returns - advantages, agent.value(obs), atol=1e-4, rtol=1e-4)
        expected = agent.actor(obs) if script in CONTINUOUS else greedy(agent, obs)  # these observations are normalized
        torch.testing.assert_close(actions, expected, atol=1e-4, rtol=1e-4)
        return loss_fn(agent, args, obs, actions, advantages, returns)

    monkeypatch.setattr(module, name, watched)
    if script in ATARI:
        FakeGames.install(monkeypatch, module)
        monkeypatch.setattr(module.Agent, "sample", lambda agent, obs: (greedy(agent, obs), agent.value(obs)))
    else:
        monkeypatch.setattr(module.Agent, "sample", module.Agent.act)
    flags = {"num_envs": 4, "num_steps": 8, "total_timesteps": 5 * 32}
    if script == "reinforce":  # two episodes of 3 steps
        flags = {"num_envs": 1, "episodes_per_update": 2, "total_timesteps": 5 * 6}
    train(script, norm_obs=True, learning_rate=0.05, **flags)
    assert counts == [32 if script in A2C else 6] * 5
