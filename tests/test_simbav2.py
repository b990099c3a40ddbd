"""SimbaV2: the sphere, critics, running statistics. What it shares with SAC is tested in test_sac.py, test_dqn.py."""

import math

import numpy as np
import pytest
import torch
from conftest import load, saved_agent
from test_ppo import gradients
from test_sac import B, batch, floats, make_parts

simbav2 = load("simbav2_continuous")


def assert_unit(rows: torch.Tensor) -> None:
    torch.testing.assert_close(rows.detach().square().sum(-1), torch.ones(len(rows)))


@pytest.mark.parametrize("width, num_blocks", [(8, 1), (32, 3)])
def test_network_equals_its_definition(width, num_blocks, rng):
    """Row by row, as in section 4; at first alpha is 1 / (num_blocks + 1). Features have unit norm at any input."""
    net, outputs = simbav2.SphereNet(5, width, num_blocks, 3), []
    for layer in (net.embed, *net.expand, net.mix):
        layer.register_forward_pre_hook(lambda _, features: assert_unit(features[0]))
    weights = {name: x.detach().double().numpy() for name, x in net.named_parameters()}
    inputs = torch.randn(4, 5) * torch.logspace(-3, 4, 4)[:, None]
    for x in inputs.double().numpy():
        x = math.sqrt(2 / width) * weights["embed.weight"] @ np.append(x, 3.0) / math.sqrt(sum(x**2) + 9)
        x /= np.linalg.norm(x)
        for i in range(num_blocks):
            y = weights[f"reduce.{i}.weight"] @ np.maximum((2 * width) ** -0.5 * weights[f"expand.{i}.weight"] @ x, 0)
            x = (num_blocks * x + y / np.linalg.norm(y)) / (num_blocks + 1)
            x /= np.linalg.norm(x)
        outputs.append(weights["head.weight"] @ weights["mix.weight"] @ x)
    torch.testing.assert_close(net(inputs), torch.tensor(np.array(outputs)).float(), rtol=1e-4, atol=1e-5)


def test_weights_stay_on_the_sphere(train, monkeypatch):
    """At the beginning of a run, after each of two updates per step, and when saved; each update moves all of them."""
    critic_loss, seen = simbav2.critic_loss, [torch.zeros(1)]

    def look(agent) -> None:
        matrices = [layer.weight.detach() for layer in agent.modules() if isinstance(layer, torch.nn.Linear)]
        assert len(matrices) == 3 * 5 and not any(map(assert_unit, matrices))
        seen.append(torch.cat([x.flatten() for x in matrices]))
        assert (seen[-1] != seen[-2]).float().mean() > 0.9

    monkeypatch.setattr(simbav2, "critic_loss", lambda agent, *args: (look(agent), critic_loss(agent, *args))[1])
    flags = {"num_envs": 3, "utd": 2, "total_timesteps": 60, "learning_starts": 30}
    look(saved_agent("simbav2_continuous", train("simbav2_continuous", **flags))[0])
    assert len(seen) == 1 + 2 * 30 + 1


def by_loops(probs, values, atoms) -> list[float]:  # C51, algorithm 1
    masses = [0.0] * len(atoms)
    for p, value in zip(probs, values, strict=True):
        b = min(max((value - atoms[0]) / (atoms[1] - atoms[0]), 0), len(atoms) - 1)
        masses[math.floor(b)] += p * (math.ceil(b) - b + (math.floor(b) == math.ceil(b)))
        masses[math.ceil(b)] += p * (b - math.floor(b))
    return masses


def test_projection(rng):
    """Equal to the loops, also at the atoms and far outside."""
    atoms, probs, values = torch.linspace(-2, 2, 9), torch.rand(B, 9).softmax(-1), 3 * torch.randn(B, 9)
    values[:5], values[5:10], values[10:15] = atoms, 1e9, -1e9
    projected = simbav2.categorical_projection(probs, values, atoms)
    expected = [by_loops(*row, atoms.tolist()) for row in zip(probs.tolist(), values.tolist(), strict=True)]
    torch.testing.assert_close(projected, torch.tensor(expected))


def test_critic_loss_equals_its_definition(rng):
    """Both critics learn the distribution of the target critic with the smaller mean."""
    agent, target, args = make_parts("simbav2_continuous", gamma=0.9)
    (obs, actions, rewards, next_obs, ends), noise = batch("simbav2_continuous"), torch.randn(B, 2)
    next_actions, logprobs = agent.action_and_logprob(next_obs, noise)
    theirs = target.log_probs(next_obs, next_actions).exp().tolist()
    ours, atoms, expected, smaller = agent.critics.log_probs(obs, actions), np.linspace(-5, 5, 101), 0, set()
    for i in range(B):
        smaller.add(k := int(np.argmin([sum(p[i] * atoms) for p in theirs])))
        values = [rewards[i].item() + (not ends[i]) * 0.9 * (z - math.exp(-0.7) * logprobs[i].item()) for z in atoms]
        masses = by_loops(theirs[k][i], values, atoms)
        expected = expected - sum(m * ours[j, i, n] for j in range(2) for n, m in enumerate(masses)) / B
    assert smaller == {0, 1}
    loss, metrics = simbav2.critic_loss(agent, target, args, noise, obs, actions, rewards, next_obs, ends)
    torch.testing.assert_close(loss, expected)
    values = {"qf_loss": expected.item(), "q_values": agent.critics(obs, actions).mean().item()}
    assert floats(metrics) == pytest.approx(values, rel=1e-4)
    loss.backward()
    grads = [parameter.grad for parameter in agent.critics.parameters()]
    torch.testing.assert_close(grads, gradients(expected, agent.critics), rtol=1e-3, atol=1e-4)
    assert all(x.grad is None for x in (*agent.actor.parameters(), agent.log_alpha, *target.parameters()))


@pytest.mark.parametrize("v_max", [5.0, 0.5])
def test_running_statistics(v_max, train, spy):
    """Rewards are divided by the discounted returns' deviation (v_max 5) or maximum / v_max (0.5). Saved as trained."""
    losses, obs, returns, current = spy(simbav2, "critic_loss"), [], [], [0, 0, 0]
    flags = {"num_envs": 3, "total_timesteps": 90, "learning_starts": 30, "gamma": 0.9}
    agent, _ = saved_agent("simbav2_continuous", train("simbav2_continuous", v_max=v_max, **flags))
    for t in range(30):
        for i, n in enumerate((3, 4, 5)):  # steps per episode
            obs.append([i, t // n, t % n])
            current[i] = i + t % n + 1 + 0.9 * current[i] * (t % n > 0)
        returns += current
        mean, std = np.mean(obs, 0), (np.var(obs, 0) + 1e-8) ** 0.5
        scale = max(np.std(returns), max(returns) / v_max)
        for bound, _ in losses[3 * (t - 10) : 3 * (t - 9)] if t >= 10 else []:
            seen, after = bound["obs"].numpy() * std + mean, bound["next_obs"].numpy() * std + mean
            np.testing.assert_allclose(bound["rewards"], (seen[:, 0] + after[:, 2]) / scale, rtol=1e-4)
    assert (scale == np.std(returns)) == (v_max == 5) and len(losses) == 60 and agent.obs_stats.count == 90
    greedy = agent.policy(torch.tensor((obs - mean) / std).float())[0].tanh()
    torch.testing.assert_close(agent.act(torch.tensor(obs).float()), greedy.detach(), rtol=1e-4, atol=1e-5)
