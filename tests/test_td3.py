"""TD3 and DDPG: losses against their definitions, both kinds of noise, and which update moves what.

The replay buffer, when a run updates, and how a target moves are tested in test_dqn.py; first actions, and that noise
is new, in test_sac.py.
"""

import numpy as np
import pytest
import torch
from conftest import having, load, make_agent
from environments import Counter
from test_ppo import gradients
from test_sac import assert_gradients, floats
from torch.nn.utils import parameters_to_vector

TD3 = [name for name in having("actor_loss") if hasattr(load(name).Args, "policy_frequency")]
SCRIPTS = [name for name in having("actor_loss") if hasattr(load(name).Args, "exploration_noise")]

B = 50  # rows of a batch


def batch() -> list[torch.Tensor]:
    """obs, actions, rewards, next_obs, terminations, for the agents of make_agent."""
    return [torch.randn(B, 3), torch.rand(B, 2) * 2 - 1, torch.randn(B), torch.randn(B, 3), torch.rand(B) < 0.3]


def make_parts(script: str, **flags):
    """Two agents that differ, the second as the target, with actors that come near the bounds; and the flags."""
    parts = [make_agent(script, **flags)[0] for _ in range(2)]
    with torch.no_grad():
        for parameter in (p for part in parts for p in part.parameters()):
            parameter.add_(0.3 * torch.randn_like(parameter))
    return parts[0], parts[1].requires_grad_(False), make_agent(script, **flags)[1]


def critics(agent) -> torch.nn.Module:
    return agent.critics if hasattr(agent, "critics") else agent.critic


def q(agent, obs, actions) -> torch.Tensor:
    """(B, D), (B, A) -> (critics, B)."""
    return critics(agent)(obs, actions).reshape(-1, len(obs))


# ----------------------------------------------------------------------------------------- losses and their gradients


@pytest.mark.parametrize("script", SCRIPTS)
def test_critic_loss_equals_its_definition(script, rng):
    agent, target, args = make_parts(script, gamma=0.9, policy_noise=0.6, noise_clip=0.5)
    (obs, actions, rewards, next_obs, terminations), noise = batch(), torch.randn(B, 2)
    targets, smaller, clipped = [], set(), [0, 0]
    for i in range(B):
        a = target.actor(next_obs[i]).tanh().tolist()
        for j in range(2 if script in TD3 else 0):
            epsilon = min(max(0.6 * noise[i, j].item(), -0.5), 0.5)
            clipped[0] += abs(epsilon) == 0.5
            clipped[1] += abs(a[j] + epsilon) > 1
            a[j] = min(max(a[j] + epsilon, -1), 1)
        values = q(target, next_obs[i : i + 1], torch.tensor([a])).flatten().tolist()
        smaller.add(values.index(min(values)))
        targets.append(rewards[i].item() + (0 if terminations[i] else 0.9 * min(values)))
    assert script not in TD3 or (smaller == {0, 1} and min(clipped) > 5)
    values = q(agent, obs, actions)
    expected = sum((value[i] - targets[i]) ** 2 for value in values for i in range(B)) / B
    given = [noise] if script in TD3 else []
    loss, metrics = load(script).critic_loss(agent, target, args, *given, obs, actions, rewards, next_obs, terminations)
    torch.testing.assert_close(loss, expected)
    assert floats(metrics) == pytest.approx({"qf_loss": expected.item(), "q_values": values.mean().item()}, rel=1e-4)
    loss.backward()
    assert_gradients(critics(agent), gradients(expected, critics(agent)))
    assert all(parameter.grad is None for parameter in [*agent.actor.parameters(), *target.parameters()])


@pytest.mark.parametrize("script", SCRIPTS)
def test_actor_loss_equals_its_definition(script, rng):
    """The first critic alone, also where the second is smaller; a step against the gradient makes Q larger."""
    agent, _, _ = make_parts(script)
    obs = torch.randn(B, 3)
    values = q(agent, obs, agent.actor(obs).tanh())
    assert script not in TD3 or 0 < (values[0] < values[1]).sum() < B
    expected = -sum(values[0, i] for i in range(B)) / B
    loss, metrics = load(script).actor_loss(agent, obs)
    torch.testing.assert_close(loss, expected)
    assert floats(metrics) == pytest.approx({"actor_loss": expected.item()}, rel=1e-4)
    loss.backward()
    assert_gradients(agent.actor, gradients(expected, agent.actor))


# -------------------------------------------------------------------------------------------------------------- noise


@pytest.mark.parametrize("script", SCRIPTS)
def test_exploration_noise(script, rng):
    """Normal, for each row and dimension by itself, clipped to the bounds; the evaluation has none."""
    agent, _ = make_agent(script, exploration_noise=0.2)
    torch.nn.init.zeros_(agent.actor[-1].weight)
    agent.actor[-1].bias.data = torch.tensor([0.1, 0.9]).atanh()
    actions, greedy = agent.sample(torch.randn(40_000, 3)), agent.act(torch.randn(9, 3))
    torch.testing.assert_close(greedy, torch.tensor([0.1, 0.9]).expand(9, 2))
    share = (actions == 1).float().mean(0)  # P(z > 4.5) and P(z > 0.5)
    assert actions.abs().max() <= 1 and share[0] < 0.001 and abs(share[1] - 0.3085) < 0.01
    z = (actions - greedy[0]) / 0.2
    assert abs(z[:, 0].mean()) < 0.025 and abs(z[:, 0].std() - 1) < 0.02 and abs(z[:, 1].median()) < 0.03
    pairs = torch.stack([z[:-1, 0], z[:-1, 1], z[1:, 0], z[1:, 1]])
    assert (pairs.corrcoef() - torch.eye(4)).abs().max() < 0.025


# ---------------------------------------------------------------------------------------------- which update moves what


@pytest.mark.parametrize(
    "script, frequency, gradient_steps",
    [
        (name, d, G)
        for name in SCRIPTS
        for d, G in ([(1, 2), (2, 1), (3, 2), (2, 5)] if name in TD3 else [(1, 1), (1, 2)])
    ],
)
def test_the_actor_and_all_targets_are_delayed(script, frequency, gradient_steps, train, monkeypatch):
    """Each critic update is one of the critics alone, every `frequency`-th also of actor and targets, by their losses.

    The count runs through restarts of the environments.
    """
    module, expected, before, updates = load(script), {}, [], []
    losses = module.critic_loss, module.actor_loss

    def critic_loss(agent, target, *args):
        nets = [agent.actor, critics(agent), target.actor, critics(target)]
        before.append([parameters_to_vector(net.parameters()).detach().clone() for net in nets])
        result, parameters = losses[0](agent, target, *args), list(critics(agent).parameters())
        expected.update(zip(parameters, torch.autograd.grad(result[0], parameters, retain_graph=True), strict=True))
        updates.append(False)
        return result

    def actor_loss(agent, obs):
        result, parameters = losses[1](agent, obs), list(agent.actor.parameters())
        expected.update(zip(parameters, torch.autograd.grad(result[0], parameters, retain_graph=True), strict=True))
        updates[-1] = True
        return result

    class Adam(torch.optim.Adam):
        def step(self):
            for parameter in self.param_groups[0]["params"]:
                torch.testing.assert_close(parameter.grad, expected.pop(parameter), rtol=1e-4, atol=1e-6)
            super().step()

    monkeypatch.setattr(module, "critic_loss", critic_loss)
    monkeypatch.setattr(module, "actor_loss", actor_loss)
    monkeypatch.setattr(torch.optim, "Adam", Adam)
    flags = {"num_envs": 3, "train_frequency": 4, "gradient_steps": gradient_steps, "policy_frequency": frequency}
    flags |= {"total_timesteps": 120, "learning_starts": 31, "checkpoint_every": 51, "batch_size": 8, "tau": 0.1}
    train(script, **flags)
    assert len(Counter.made) == 3 * 3 + 1 and expected == {}
    assert len(updates) == gradient_steps * (120 // 4 - 31 // 4)
    actors = np.flatnonzero(updates)
    assert actors[0] < frequency and (np.diff(actors) == frequency).all() and len(updates) - actors[-1] <= frequency
    for i, ((actor, critic, target_actor, target_critic), now) in enumerate(zip(before, before[1:], strict=False)):
        assert not now[1].equal(critic) and now[0].equal(actor) != updates[i]
        for online, old, new in ((now[0], target_actor, now[2]), (now[1], target_critic, now[3])):
            torch.testing.assert_close(new, 0.9 * old + 0.1 * online if updates[i] else old)
    assert before[0][0].equal(before[0][2]) and before[0][1].equal(before[0][3])  # the targets begin as copies
    assert script not in TD3 or not torch.equal(*before[0][1].chunk(2))  # and the two critics different
