"""Rainbow: its loss, layers, and new priorities. What it shares with DQN on Atari is tested in test_dqn_atari.py."""

import math

import numpy as np
import pytest
import torch
from conftest import load, make_agent
from environments import FakeGames
from test_dqn import assert_same_gradient
from test_ppo import inputs
from test_simbav2 import by_loops

rainbow, Buffer = load("rainbow_atari"), load("rainbow_atari").PrioritizedBuffer


def test_loss_equals_its_definition(rng):
    """The online network chooses the next action, the target network has its distribution; no bootstrap at the end."""
    B, K, differ = 12, 7, 0
    agent, target = (make_agent("rainbow_atari", n_atoms=K, v_max=2.0, bf16=False)[0] for _ in range(2))
    for network in (agent, target):  # new ones are nearly indifferent
        network.q.weight.data *= 30
    (obs, actions), (next_obs, _) = inputs("rainbow_atari", B), inputs("rainbow_atari", B)
    returns, discounts, weights = 2 * torch.randn(B), 0.9 ** torch.randint(1, 4, (B,)), torch.rand(B)
    terminations, atoms = torch.arange(B) % 3 == 0, [-2 + 4 * k / (K - 1) for k in range(K)]
    batch = obs, actions, returns, discounts, next_obs, terminations, weights
    loss, divergences, metrics = rainbow.rainbow_loss(agent, target, *batch)
    log_probs, theirs, expected = agent.log_probs(obs), target.log_probs(next_obs).exp().tolist(), []
    for b in range(B):
        best = agent(next_obs)[b].argmax().item()
        differ += best != np.argmax([np.dot(row, atoms) for row in theirs[b]])
        bootstrap = 0 if terminations[b] else discounts[b].item()
        masses = by_loops(theirs[b][best], [returns[b].item() + bootstrap * z for z in atoms], atoms)
        expected.append(sum(m * (math.log(m) - log_probs[b, actions[b], k]) for k, m in enumerate(masses) if m > 0))
    mean, values = (weights * torch.stack(expected)).mean(), log_probs.exp()[range(B), actions] @ torch.tensor(atoms)
    assert differ > 1
    torch.testing.assert_close([*divergences, loss, *metrics.values()], [*expected, mean, mean, values.mean()])
    assert_same_gradient(loss, mean, agent, target)


def test_noisy_layers(rng):
    """By the moments of f(e) = sign(e) sqrt|e|: mean 0, variance E|e|, products of independent ones; means in eval."""
    layer, x = rainbow.NoisyLinear(4, 3), torch.tensor([1.0, -2.0, 0.5, 3.0])
    assert all((p == 0.5 / 2).all() for p in layer.sigma.parameters()) and layer.weight.abs().max() <= 0.5
    torch.nn.init.uniform_(layer.sigma.weight, 0.1, 1), torch.nn.init.uniform_(layer.sigma.bias, 0.1, 1)
    mean, rows, scale = layer.weight @ x + layer.bias, x.expand(400_000, 4), math.sqrt(2 / math.pi)  # E|e|
    with torch.no_grad():
        noise, again = layer(rows) - mean, layer(rows) - mean
        assert layer.eval()(rows[:5]).equal(torch.nn.functional.linear(rows[:5], layer.weight, layer.bias))
        variance = scale * (scale * layer.sigma.weight**2 @ x**2 + layer.sigma.bias**2)
        torch.testing.assert_close([noise.mean(0), noise.var(0)], [torch.zeros(3), variance], atol=0.02, rtol=0.03)
        correlations = torch.corrcoef(torch.cat((noise, again, noise.roll(1, 0)), 1).T)
    assert (correlations - torch.eye(9)).abs().max() < 0.02  # of outputs, calls, and rows


@pytest.mark.parametrize("network", ["nature", "impala"])
def test_the_network(network, rng):
    """Bytes / 255; distributions whose mean is Q; per atom, the mean over actions of the logits is V's."""
    agent, _ = make_agent("rainbow_atari", network=network, noisy=True, bf16=False, n_atoms=5, v_max=1.0)
    obs, _ = inputs("rainbow_atari", 4)
    assert not agent(obs).equal(agent(obs)) and agent.eval()(obs).equal(agent(obs))
    hidden = agent.trunk(obs.float() / 255)
    advantages, values = agent.q(hidden[:, :512]).reshape(4, 4, 5), agent.v(hidden[:, 512:])
    logits = advantages - advantages.mean(1, keepdim=True) + values[:, None]
    torch.testing.assert_close(agent.log_probs(obs), logits.log_softmax(-1))
    torch.testing.assert_close(agent(obs), logits.softmax(-1) @ torch.tensor([-1, -0.5, 0, 0.5, 1]))
    convolutions = [(x.in_channels, x.out_channels) for x in agent.modules() if isinstance(x, torch.nn.Conv2d)]
    impala = [(4, 16), *[(16, 16)] * 4, (16, 32), *[(32, 32)] * 9]
    assert convolutions == {"nature": [(4, 32), (32, 64), (64, 64)], "impala": impala}[network]


def test_priorities_follow_the_divergences(train, monkeypatch, spy):
    """(KL + 0.001)^alpha of the rows that were sampled; beta is annealed to 1."""
    FakeGames.install(monkeypatch, rainbow)
    losses, (samples, updates) = spy(rainbow, "rainbow_loss"), (spy(Buffer, name) for name in ("sample", "update"))
    train("rainbow_atari", per_alpha=0.3, num_envs=2, train_frequency=2, learning_starts=0, total_timesteps=40)
    assert [x["beta"] for x, _ in samples] == pytest.approx(np.linspace(0.4, 1, 21)[:-1])
    for (_, (_, divergences, _)), (update, _), (_, (rows, _)) in zip(losses, updates, samples, strict=True):
        np.testing.assert_allclose(update["priorities"], (divergences.numpy() + 1e-3) ** 0.3, rtol=1e-4)
        assert update["rows"] is rows
