"""PPO with an LSTM: sequences against single steps, rollouts against what really happened."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import load, make_agent, saved_agent
from test_ppo import gradients, truth, walk
from torch import nn
from torch.distributions import Categorical

lstm, ppo = load("ppo_lstm"), load("ppo")


def sequences(T: int, B: int, resets: float = 0.2) -> torch.Tensor:
    """Observations (T, B, 3) whose last entry is 1 where an episode begins."""
    return torch.cat([torch.randn(T, B, 2), (torch.rand(T, B, 1) < resets).float()], -1)


def by_definition(net: nn.Module, obs: torch.Tensor, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The equations of an LSTM, one step after the other."""
    (h, c), outputs, (W, V, b, d) = state, [], net.lstm.parameters()
    for x in obs:
        h, c = (torch.where(x[:, -1:] == 1, 0, y) for y in (h, c))
        i, f, g, o = (net.encoder(x[:, :-1]) @ W.T + b + h @ V.T + d).chunk(4, -1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        outputs.append(net.head(h))
    return torch.stack(outputs), torch.stack([h, c])


@pytest.mark.parametrize("T, B, resets", [(1, 3, 0.5), (20, 4, 0.2), (20, 2, 0.0), (9, 2, 1.0)])
def test_in_one_piece_and_step_by_step(T, B, resets, rng):
    """The same outputs, states, and gradients."""
    net, obs, state = make_agent("ppo_lstm")[0].critic, sequences(T, B, resets), torch.randn(2, B, 32)
    whole, last = net(obs, state)
    outputs, after = by_definition(net, obs, state)
    torch.testing.assert_close((whole, last), (outputs, after))
    torch.testing.assert_close(gradients((whole**2).sum(), net), gradients((outputs**2).sum(), net))
    for t in range(T):
        output, state = net(obs[t : t + 1], state)
        torch.testing.assert_close(output[0], whole[t])


@pytest.mark.parametrize("T, B", [(7, 4), (1, 1)])
@pytest.mark.parametrize("script", ["ppo_lstm", "ppo_lstm_atari"])
def test_loss_is_that_of_ppo(script, T, B, rng):
    """Of all steps of the sequences as one batch; for data of another policy, from a state that is not zero."""
    agent, args = make_agent("ppo_lstm", clip_vloss=True, clip_coef=0.1, ent_coef=0.03, vf_coef=0.7)
    agent.actor.head.weight.data *= 100
    obs, state, actions = sequences(T, B), torch.randn(4, B, 32), torch.randint(4, (T, B))
    old_logprobs, advantages, returns, old_values = torch.randn(4, T, B)
    batch = obs, actions, old_logprobs, advantages, returns, old_values
    loss, metrics = load(script).ppo_loss(agent, args, *batch, state)  # of the Atari script with this agent, too
    logits, values = by_definition(agent.actor, obs, state[:2])[0], by_definition(agent.critic, obs, state[2:])[0]
    new = Categorical(logits=logits.flatten(0, 1))
    flat = SimpleNamespace(value=lambda _: values.flatten())
    flat.logprob_and_entropy = lambda _, actions: (new.log_prob(actions), new.entropy())
    expected, expected_metrics = ppo.ppo_loss(flat, args, *(x.flatten(0, 1) for x in batch))
    torch.testing.assert_close((loss, metrics), (expected, expected_metrics))
    torch.testing.assert_close(gradients(loss, agent), gradients(expected, agent), atol=1e-5, rtol=1e-3)


def test_rollouts_hold_what_happened(train, spy):
    """Values again, from the first step to the last, by weights that never change. Minibatches are whole sequences."""
    gaes, losses, (N, T, iterations) = spy(lstm, "gae"), spy(lstm, "ppo_loss"), (4, 7, 3)
    flags = {"num_envs": N, "num_steps": T, "total_timesteps": iterations * N * T, "num_minibatches": 2}
    agent, _ = saved_agent("ppo_lstm", train("ppo_lstm", learning_rate=0.0, update_epochs=3, **flags))
    raw = walk(N, T * iterations)
    true, first = truth(raw), raw[..., 2:] == 0
    obs = torch.from_numpy(np.concatenate([raw, first], -1)).float()
    led_to = torch.from_numpy(np.concatenate([true.next_obs, 0 * first], -1)).float()
    states, (values, next_values) = [torch.zeros(4, N, 32)], torch.zeros(2, T * iterations, N)
    for t in range(T * iterations):
        (_, actor), (value, critic) = agent.actor(obs[[t]], states[t][:2]), agent.critic(obs[[t]], states[t][2:])
        states.append(torch.cat([actor, critic]).detach())
        values[t], next_values[t] = value[0, :, 0].detach(), agent.critic(led_to[[t]], critic)[0][0, :, 0].detach()
    truths = vars(true) | {"values": values, "next_values": next_values}
    for i, (given, _) in enumerate(gaes):
        for name in ("rewards", "values", "next_values", "terminations", "dones"):
            np.testing.assert_allclose(given[name], truths[name][T * i : T * (i + 1)], atol=1e-5, rtol=1e-5)
    order = []
    for i, (given, (_, metrics)) in enumerate(losses):
        rows = slice(T * (i // 6), T * (i // 6 + 1))  # three epochs, two minibatches
        same = (given["obs"][:, :, None] - obs[rows, None]).abs().amax((0, 3)) < 1e-5  # (2, N)
        columns = same.nonzero()[:, 1].tolist()  # which environments these are
        torch.testing.assert_close(given["state"], states[rows.start][:, columns])
        np.testing.assert_array_equal(given["actions"], true.actions[rows, columns])
        assert abs(metrics["losses/approx_kl"]) < 1e-6  # the policy that acted, step by step
        order.append(columns)
    assert len(gaes) == iterations and len(losses) == iterations * 6
    assert all(sorted(a + b) == [0, 1, 2, 3] for a, b in zip(order[::2], order[1::2])) and len(set(map(str, order))) > 2


def test_the_evaluation_remembers_and_forgets(rng):
    agent, _ = make_agent("ppo_lstm")
    agent.actor.head.weight.data *= 100
    for B in (4, 4, 2):  # the last batch of an evaluation is smaller
        obs = sequences(12, B, resets=0.0)
        obs[0, :, -1] = obs[7, 0, -1] = 1
        expected = by_definition(agent.actor, obs, torch.zeros(2, B, 32))[0].argmax(-1)
        assert torch.stack([agent.act(x) for x in obs]).equal(expected)
