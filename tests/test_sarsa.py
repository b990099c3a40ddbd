"""SARSA: loss and exploration against their definitions, and the next action against the one really taken."""

import numpy as np
import pytest
import torch
from conftest import load, make_agent
from environments import Counter
from test_ppo import truth, walk

sarsa = load("sarsa")


@pytest.fixture
def play(train, spy, monkeypatch):
    """play(N, T, iterations, **flags) -> what the losses got, (steps, N, ...). The best action is 1 at even steps."""

    def forward(self, obs):
        q = torch.stack([obs[..., 2] % 2, 1 - obs[..., 2] % 2], -1)
        return q + 0 * self.network[0].weight.sum()

    def play(N: int, T: int, iterations: int, **flags) -> dict[str, np.ndarray]:
        monkeypatch.setattr(sarsa.Agent, "forward", forward)
        losses = spy(sarsa, "sarsa_loss")
        train("sarsa", num_envs=N, num_steps=T, total_timesteps=iterations * N * T, **flags)
        assert len(losses) == iterations
        names = [name for name, x in losses[0][0].items() if isinstance(x, torch.Tensor)]
        return {name: np.concatenate([bound[name].unflatten(0, (T, N)) for bound, _ in losses]) for name in names}

    return play


def test_loss_equals_its_definition(rng):
    """The gradient flows through Q(s, a), not through the target."""
    agent, args = make_agent("sarsa", gamma=0.9)
    (obs, next_obs), (actions, next_actions) = torch.randn(2, 20, 3), torch.randint(4, (2, 20))
    rewards, terminations = torch.randn(20), torch.rand(20) < 0.3
    loss, metrics = sarsa.sarsa_loss(agent, args, obs, actions, rewards, next_obs, next_actions, terminations)
    values = [agent(obs[b])[actions[b]] for b in range(20)]
    future = [0 if terminations[b] else 0.9 * agent(next_obs[b])[next_actions[b]].item() for b in range(20)]
    expected = sum((values[b] - (rewards[b] + future[b])) ** 2 for b in range(20)) / 20
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(list(metrics.values()), [expected.detach(), torch.stack(values).mean().detach()])
    ours, theirs = (torch.autograd.grad(x, list(agent.parameters())) for x in (loss, expected))
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("exploration, amount", [("epsilon", 0.4), ("epsilon", 1.0), ("boltzmann", 2.0)])
def test_exploration_has_its_frequencies(rng, exploration, amount):
    agent, _ = make_agent("sarsa")
    q, rows = torch.tensor([1.0, 3.0, -1.0, 2.0]), 40_000
    agent.forward = lambda obs: q.expand(len(obs), 4)
    actions = agent.sample(torch.zeros(rows, 3), exploration, amount)
    if exploration == "epsilon":
        expected = np.full(4, amount / 4) + (1 - amount) * np.eye(4)[1]
    else:
        expected = np.exp(q.numpy() / amount) / np.exp(q.numpy() / amount).sum()
    counts = torch.bincount(actions, minlength=4).numpy()
    assert ((counts - rows * expected) ** 2 / (rows * expected)).sum() < 25  # chi-square, three degrees of freedom
    pairs = torch.bincount(actions[1:] * 4 + actions[:-1], minlength=16).numpy() / rows  # each row for itself
    np.testing.assert_allclose(pairs, np.outer(expected, expected).flatten(), atol=0.01)


@pytest.mark.parametrize("exploration, amount", [("epsilon", 0.0), ("boltzmann", 1e-4)])
def test_exploration_ends_in_the_best_action(rng, exploration, amount):
    agent, _ = make_agent("sarsa")
    obs = torch.randn(500, 3)
    best = [row.index(max(row)) for row in agent(obs).tolist()]
    assert agent.sample(obs, exploration, amount).tolist() == agent.act(obs).tolist() == best


@pytest.mark.parametrize("script", ["sarsa", "pqn"])
def test_hidden_layers_are_normalized(script):
    """Q does not depend on how large the features have become."""
    agent, _ = make_agent(script)
    obs = torch.randn(20, 3)
    before = agent(obs)
    for layer in [layer for layer in agent.network if isinstance(layer, torch.nn.Linear)][:2]:
        layer.weight.data *= 100
        layer.bias.data *= 100
    torch.testing.assert_close(agent(obs), before, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("epsilon", [1.0, 0.0])
@pytest.mark.parametrize("T, iterations", [(9, 5), (1, 40)])
def test_the_next_action_is_the_one_really_taken(T, iterations, epsilon, play):
    """Also across the edge of a rollout. After a truncation it is drawn for the final observation, which has none."""
    N, found = 4, play(4, T, iterations, start_e=epsilon, end_e=epsilon)
    true = truth(walk(N, T * iterations))
    np.testing.assert_array_equal(found["obs"], walk(N, T * iterations))
    for name in ("actions", "rewards", "next_obs", "terminations"):
        np.testing.assert_array_equal(found[name], getattr(true, name))
    same_episode = ~true.dones[:-1]
    np.testing.assert_array_equal(found["next_actions"][:-1][same_episode], true.actions[1:][same_episode])
    truncated = true.dones & ~true.terminations
    is_best = (found["next_actions"] == 1 - true.next_obs[..., 2] % 2)[truncated]
    assert len(is_best) > 10 and is_best.all() == (epsilon == 0) and is_best.any()


def test_a_checkpoint_restarts_the_episodes(play):
    """The action that waited for the old environments is not taken in the new ones."""
    N, T = 2, 7
    found = play(N, T, 3, checkpoint_every=N * T, start_e=0.0, end_e=0.0)
    true = truth(found["obs"])
    assert [env.steps for env in Counter.made[: 3 * N]] == [T] * 3 * N
    assert (found["obs"][::T, :, 1:] == 0).all() and (found["actions"][::T] == 1).all()
    for name in ("actions", "rewards", "next_obs", "terminations"):
        np.testing.assert_array_equal(found[name], getattr(true, name))


@pytest.mark.parametrize("exploration", ["epsilon", "boltzmann"])
def test_exploration_follows_its_schedule(exploration, play, spy):
    samples = spy(sarsa.Agent, "sample")
    flags = {"start_e": 0.9, "end_e": 0.1, "start_tau": 5.0, "end_tau": 0.5, "exploration": exploration}
    play(2, 5, 10, exploration_fraction=0.5, **flags)
    start, end = (0.9, 0.1) if exploration == "epsilon" else (5.0, 0.5)
    amounts = list(dict.fromkeys(bound["amount"] for bound, _ in samples))
    assert amounts == pytest.approx([start + (end - start) * i / 5 for i in range(6)])
    assert {bound["exploration"] for bound, _ in samples} == {exploration}
