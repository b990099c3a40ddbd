"""PPO with an LSTM on Atari: sequences against the equations, rollouts against what happened, a game of memory.

Its loss is tested in test_ppo_lstm.py.
"""

from types import SimpleNamespace

import numpy as np
import pytest
import test_ppo_lstm
import torch
from conftest import episodes, load, make_agent, saved_agent
from environments import FakeChoices
from test_ppo import ExtraLives, gradients
from torch import nn
from torch.distributions import Categorical

lstm = load("ppo_lstm_atari")


def sequences(T: int, B: int, resets: float = 0.2) -> torch.Tensor:
    """Observations (T, B, 4, 84, 84): a plane that is 1 where a game begins, then three frames."""
    first = (torch.rand(T, B, 1, 1, 1) < resets).expand(T, B, 1, 84, 84)
    return torch.cat([first.byte(), torch.randint(256, (T, B, 3, 84, 84)).byte()], 2)


def by_definition(agent, obs, state) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Normalized frames, convolutions, the equations of an LSTM, one step after the other, two heads."""
    x, net = obs[:, :, 1:].flatten(0, 1) / 255, SimpleNamespace(encoder=nn.Identity(), lstm=agent.lstm)
    if agent.norm_obs:
        x = (x - agent.obs_stats.mean.float()) / (agent.obs_stats.var.mean().float() + 1e-4).sqrt()
    x = agent.trunk(x).unflatten(0, obs.shape[:2])
    net.head = lambda h: torch.cat([agent.actor(h), agent.critic(h)], -1)
    outputs, state = test_ppo_lstm.by_definition(net, torch.cat([x, obs[:, :, 0, 0, :1]], -1), state)
    return outputs[..., :-1], outputs[..., -1], state


@pytest.mark.parametrize("T, B, resets, norm_obs", [(1, 3, 0.5, False), (12, 4, 0.2, True), (5, 2, 1.0, False)])
def test_in_one_piece_and_step_by_step(T, B, resets, norm_obs, rng):
    """The same outputs, states, and gradients."""
    agent, _ = make_agent("ppo_lstm_atari", norm_obs=norm_obs)
    obs, state = sequences(T, B, resets), torch.randn(2, B, 32)
    agent.obs_stats.update(torch.rand(20, 84, 84).double())
    whole, expected = agent(obs, state), by_definition(agent, obs, state)
    torch.testing.assert_close(whole, expected)
    sums = ((logits**2).sum() + (values**2).sum() for logits, values, _ in (whole, expected))
    torch.testing.assert_close(*(gradients(x, agent) for x in sums), atol=1e-4, rtol=1e-3)
    actions, policy = torch.randint(4, (T, B)), Categorical(logits=expected[0])
    found = agent.logprob_entropy_value(obs, actions, state)
    torch.testing.assert_close(found, (policy.log_prob(actions), policy.entropy(), expected[1]))
    for t in range(T):
        torch.testing.assert_close(agent.value(obs[t], state), whole[1][t])
        *_, state = agent.sample(obs[t], state)
    torch.testing.assert_close(state, whole[2])


def test_the_evaluation_remembers_and_forgets(rng):
    """Also in bfloat16, which is close, and in the convolutions only."""
    agent, _ = make_agent("ppo_lstm_atari", bf16=True)
    for B in (4, 4, 2):  # the last batch of an evaluation is smaller
        obs = sequences(8, B, resets=0.0)
        obs[0, :, 0] = obs[5, 0, 0] = 1
        expected = by_definition(agent, obs, torch.zeros(2, B, 32))[2]
        assert all(agent.act(x).shape == (B,) for x in obs) and not agent.acting_state.equal(expected)
        torch.testing.assert_close(agent.acting_state, expected, atol=0.02, rtol=0.05)


@pytest.mark.parametrize("life_loss", [False, True])
def test_games_hold_what_happened(life_loss, train, spy, monkeypatch):
    """V = 1000 game + 10 t + c, where c, the state, counts the steps since the last reset: t + 1, if all is right."""
    N, T, iterations = 4, 16, 3

    def forward(self, obs, state):
        values = []
        for first, frame in zip(obs[:, :, 0, 0, 0], obs[:, :, -1, 0, :2].float()):
            state = state * (1 - first)[:, None] + 1
            values.append(frame @ torch.tensor([1000.0, 10.0]) + state[0, :, 0])
        return self.actor.weight.sum() * torch.zeros(*obs.shape[:2], 3), torch.stack(values), state

    monkeypatch.setattr(lstm.Agent, "forward", forward)
    ExtraLives.install(monkeypatch, lstm)
    gaes, losses = spy(lstm, "gae"), spy(lstm, "ppo_loss")
    flags = {"num_envs": N, "num_steps": T, "total_timesteps": iterations * N * T, "num_minibatches": 2}
    folder = train("ppo_lstm_atari", life_loss=life_loss, norm_obs=True, update_epochs=3, **flags)
    game, t = np.divmod(np.arange(T * iterations)[:, None], 10 + np.arange(N))
    ends, lost, values = t + 1 == 10 + np.arange(N), life_loss & np.isin(t + 1, [4, 7]), 1000 * game + 11 * t + 1
    terminations = ends & (game % 2 == 0) | lost
    truths = {"values": values, "rewards": np.ones_like(t), "terminations": terminations, "dones": ends | lost}
    found = {name: np.concatenate([given[name] for given, _ in gaes]) for name in [*truths, "next_values"]}
    np.testing.assert_array_equal(found.pop("next_values")[~terminations], values[~terminations] + 11)
    np.testing.assert_equal(found, truths)
    assert (ends & ~terminations).sum() > 2 and len(losses) == iterations * 6
    order = []
    for i, (given, _) in enumerate(losses):  # three epochs, two minibatches of two whole sequences
        rows = slice(T * (i // 6), T * (i // 6 + 1))
        order.append(np.argwhere((given["old_values"][:, :, None].numpy() == values[rows, None]).all(0))[:, 1].tolist())
        begins, newest = given["obs"][:, :, 0, 0, 0], given["obs"][:, :, -1, 0, :2]
        np.testing.assert_array_equal(newest, np.stack([game, t], -1)[rows, order[i]])
        np.testing.assert_array_equal(begins, t[rows, order[i]] == 0)
        before = t[rows.start - 1, order[i]] + 1 if i >= 6 else np.zeros(2)  # the rollout
        np.testing.assert_array_equal(given["state"], np.broadcast_to(before[:, None], (2, 2, 32)))
    seen = np.stack([game, t], -1)[::8]  # the first two pixels, in the statistics every eighth step
    stats = saved_agent("ppo_lstm_atari", folder)[0].obs_stats
    np.testing.assert_allclose(stats.mean[0, :2], seen.mean((0, 1)) / 255)
    assert stats.count == seen.shape[0] * N
    assert all(sorted(a + b) == [0, 1, 2, 3] for a, b in zip(order[::2], order[1::2])) and len(set(map(str, order))) > 2


def test_memory(train, spy, monkeypatch):
    """A band is seen once in 8 steps at 7. Without memory 7, then 2, by chance near 3. At first ratios are one."""
    flags = {"num_envs": 8, "num_steps": 12, "total_timesteps": 2500, "learning_rate": 2e-3, "clip_vloss": False}
    flags |= {"num_minibatches": 2, "update_epochs": 4, "gamma": 0.5, "clip_coef": 0.2, "ent_coef": 0.0}
    monkeypatch.setattr(FakeChoices, "every", 8)
    FakeChoices.install(monkeypatch, lstm)
    losses, folder = spy(lstm, "ppo_loss"), train("ppo_lstm_atari", **flags)
    returns = [episode_return for _, episode_return, _ in episodes(folder)]
    assert np.mean(returns[:20]) < 25 and np.mean(returns[-50:]) > 40
    distances = [metrics["losses/approx_kl"].item() for _, (_, metrics) in losses]
    assert max(distances[::8]) < 1e-6 < min(distances[7:160:8])
