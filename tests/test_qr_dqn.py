"""QR-DQN: its loss against loops over the definition, quantiles of known distributions.

What it has in common with DQN (replay, updates, target network, exploration) is tested in test_dqn.py.
"""

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import load, make_agent, saved_agent
from gymnasium.spaces import Box, Discrete
from test_dqn import assert_same_gradient, transitions

qr_dqn = load("qr_dqn")


def rho(u: torch.Tensor, tau: float, kappa: float) -> torch.Tensor:
    """QR-DQN eq. 9 and 10 for one error; divided by kappa, if there is one."""
    weight = abs(tau - (u.item() < 0))
    if kappa == 0:
        return weight * abs(u)
    return weight * (u**2 / 2 if abs(u) <= kappa else kappa * (abs(u) - kappa / 2)) / kappa


@pytest.mark.parametrize("kappa", [0.0, 0.3, 1.0, 2.5])
def test_loss_equals_its_definition(kappa, rng):
    """The sum over quantiles of the mean over targets. The target network chooses the next action, by the mean."""
    B, M, differ = 20, 5, np.zeros(2)
    flags = {"gamma": 0.9, "num_quantiles": M, "kappa": kappa}
    (agent, args), (target, _) = make_agent("qr_dqn", **flags), make_agent("qr_dqn", **flags)
    batch = obs, actions, rewards, next_obs, terminations = transitions(B)
    loss, metrics = qr_dqn.qr_dqn_loss(agent, target, args, *batch)
    expected, means = 0, []
    for b in range(B):
        ours, theirs = agent.quantiles(obs[b])[actions[b]], target.quantiles(next_obs[b]).tolist()
        best = np.argmax([np.mean(row) for row in theirs])
        differ += best != agent(next_obs[b]).argmax().item(), best != np.argmax([max(row) for row in theirs])
        for i in range(M):
            for j in range(M):
                future = 0 if terminations[b] else 0.9 * theirs[best][j]
                expected = expected + rho(rewards[b] + future - ours[i], (2 * i + 1) / (2 * M), kappa) / M / B
        means.append(ours.mean())
    assert (differ > 1).all()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(list(metrics.values()), [expected.detach(), torch.stack(means).mean().detach()])
    assert_same_gradient(loss, expected, agent, target)


@pytest.mark.parametrize("kappa, tolerance", [(0.0, 0.01), (0.05, 0.04)])
def test_the_minimum_is_at_the_quantiles(kappa, tolerance):
    """Of two distributions, U^2 and -2 U^2: each row learns its own."""
    M, scale = 8, torch.tensor([[1.0], [-2.0]])
    targets = ((torch.arange(1000) + 0.5) / 1000) ** 2 * scale  # (2, 1000)
    quantiles = torch.zeros(2, M, requires_grad=True)
    optimizer = torch.optim.Adam([quantiles], lr=0.05)
    for i in range(400):
        optimizer.param_groups[0]["lr"] = 0.05 * (1 - i / 400)
        optimizer.zero_grad()
        qr_dqn.quantile_huber_loss(quantiles, targets, kappa).sum().backward()
        optimizer.step()
    tau = (2 * np.arange(1, M + 1) - 1) / (2 * M)
    np.testing.assert_allclose(quantiles.detach().numpy(), [tau**2, -2 * (1 - tau) ** 2], atol=tolerance)


def test_the_value_is_the_mean_of_the_quantiles(rng):
    """Not the median or the largest, which would take other actions."""
    agent, _ = make_agent("qr_dqn", num_quantiles=3)
    quantiles = torch.tensor([[1.0, 2.0, 3.0], [-9.0, 4.0, 5.0], [0.0, 0.0, 8.0], [2.0, 2.0, 2.1]])
    agent.network[-1].weight.data.zero_()
    agent.network[-1].bias.data = quantiles.flatten()
    obs = torch.randn(5, 3)
    torch.testing.assert_close(agent.quantiles(obs), quantiles.expand(5, 4, 3))
    torch.testing.assert_close(agent(obs), torch.tensor([2, 0, 8 / 3, 6.1 / 3]).expand(5, 4))
    assert agent.act(obs).tolist() == [2] * 5


class Coin(gym.Env):
    """Two steps. The second pays 0 or 4, by a coin."""

    observation_space, action_space = Box(-1, 1, (1,), np.float32), Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.t += 1
        reward = float(self.np_random.choice([0, 4])) if self.t == 2 else 0.0
        return np.ones(1, np.float32), reward, self.t == 2, False, {}


def test_a_run_learns_the_distribution_of_the_return(train):
    """Half of the quantiles at 0, half at 4; a step before, at 0 and gamma * 4."""
    gym.register("Test/Coin-v0", Coin)
    flags = {"total_timesteps": 4000, "learning_starts": 200, "batch_size": 64, "learning_rate": 3e-3, "gamma": 0.5}
    flags |= {"num_quantiles": 4, "kappa": 0.1, "target_network_frequency": 40, "start_e": 1.0, "end_e": 1.0}
    agent, _ = saved_agent("qr_dqn", train("qr_dqn", env_id="Test/Coin-v0", **flags))
    for x, high in ((1.0, 4), (0.0, 2)):
        expected = torch.tensor([0, 0, high, high]).expand(2, 4)
        torch.testing.assert_close(agent.quantiles(torch.tensor([x])), expected.float(), atol=0.25, rtol=0)
    gym.registry.pop("Test/Coin-v0")
