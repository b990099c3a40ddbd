"""A2C: its loss against the policy gradient, one step per rollout by the policy that acted.

What it has in common with PPO (advantages, rollouts, policies, normalization) is tested in test_ppo.py.
"""

import pytest
import torch
from conftest import having, load
from environments import FakeGames
from test_ppo import ATARI, CONTINUOUS, decided, evaluate, gradients, inputs, policy

A2C = having("a2c_loss")
LOSSES = {script: "a2c_loss" for script in A2C} | {"a3c": "a3c_loss", "reinforce": "reinforce_loss"}


@pytest.mark.parametrize("script, baseline", [*((script, True) for script in LOSSES), ("reinforce", False)])
@pytest.mark.parametrize("norm_adv, rows", [(True, 24), (False, 24), (True, 1)])
def test_loss_is_the_sum_of_its_parts(script, baseline, norm_adv, rows, rng):
    """And so is its gradient: of -A log pi(a|s), which is the policy gradient, and of the squared error of V."""
    flags = {"norm_adv": norm_adv, "baseline": baseline, "ent_coef": 0.03, "vf_coef": 0.7, "bounds_coef": 0.2}
    agent, args = decided(script, **flags)
    if script in CONTINUOUS:
        agent.actor[-1].bias.data = torch.tensor([1.0, -1.0])  # half of the means are beyond a bound
    (obs, actions), (advantages, returns) = inputs(script, rows), torch.randn(2, rows) + 1
    loss, metrics = getattr(load(script), LOSSES[script])(agent, args, obs, actions, advantages, returns)
    new, scaled = policy(script, agent, obs), advantages
    if norm_adv and hasattr(args, "norm_adv") and rows > 1:  # nothing to normalize in a single row
        scaled = (advantages - advantages.mean()) / advantages.std()
    expected = {"losses/policy_loss": -(scaled * new.log_prob(actions)).mean(), "losses/entropy": new.entropy().mean()}
    total = expected["losses/policy_loss"] - 0.03 * expected["losses/entropy"]
    if baseline:
        expected["losses/value_loss"] = 0.5 * ((evaluate(agent, obs, actions)[2] - returns) ** 2).mean()
        total = total + 0.7 * expected["losses/value_loss"]
    if script in CONTINUOUS:  # the squared distance of the means to the bounds, summed over the dimensions
        beyond = agent.actor(obs) - agent.actor(obs).clamp(-1, 1)
        expected["losses/bounds_loss"] = (beyond**2).sum(-1).mean()
        total = total + 0.2 * expected["losses/bounds_loss"]
    torch.testing.assert_close(loss, total)
    torch.testing.assert_close(gradients(loss, agent), gradients(total, agent), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(metrics, {name: x.detach() for name, x in expected.items()})
    assert baseline == any(name.startswith("critic") for name in agent.state_dict())


@pytest.mark.parametrize("script", [*A2C, "reinforce"])
def test_each_batch_gives_one_step_by_the_policy_that_acted(script, train, monkeypatch):
    """The weights that learn are those that judged (R - A is V) and acted, here without noise."""

    def greedy(agent, obs):
        return agent(obs)[0].argmax(-1) if script in ATARI else agent.act(obs)

    module, counts = load(script), []
    loss_fn = getattr(module, LOSSES[script])

    def watched(agent, args, obs, actions, advantages, returns):
        counts.append(len(obs))
        torch.testing.assert_close(returns - advantages, agent.value(obs), atol=1e-4, rtol=1e-4)
        expected = agent.actor(obs) if script in CONTINUOUS else greedy(agent, obs)  # these observations are normalized
        torch.testing.assert_close(actions, expected, atol=1e-4, rtol=1e-4)
        return loss_fn(agent, args, obs, actions, advantages, returns)

    monkeypatch.setattr(module, LOSSES[script], watched)
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
