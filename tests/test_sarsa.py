"""SARSA: targets, loss and exploration against their definitions, and the next action against the one really taken."""

import numpy as np
import pytest
import torch
from conftest import load, make_agent, tensors
from environments import Counter
from torch import nn

sarsa = load("sarsa")


def q_of(episode, t, action):
    """Values that tell the episode, the step and the action apart; at even steps action 1 is the better one."""
    return 1000 * episode + 10 * t + np.where(np.asarray(t) % 2 == 0, action, 1 - action)


@pytest.fixture
def play(rollouts, train, monkeypatch):
    """play(**flags) -> [(obs, actions, targets) of each rollout, (T, N, ...)] on counters; Q is q_of."""

    def forward(self, obs):
        episode, t = obs[..., 1:2].numpy(), obs[..., 2:3].numpy()
        return torch.from_numpy(q_of(episode, t, np.array([0, 1], np.float32))).float()

    def play(num_envs: int, num_steps: int, iterations: int, **flags) -> list[tuple[np.ndarray, ...]]:
        monkeypatch.setattr(sarsa.Agent, "forward", forward)
        found = rollouts("sarsa")
        Counter.made.clear()
        sizes = {"num_envs": num_envs, "num_steps": num_steps, "total_timesteps": iterations * num_envs * num_steps}
        train("sarsa", env_id="Test/Counter-v0", **{"checkpoint_every": 0, "gamma": 0.9} | sizes | flags)
        return [tuple(x.reshape(num_steps, num_envs, *x.shape[1:]) for x in batch) for batch, _ in found]

    return play


# ------------------------------------------------------------------------------------------------------------- formulas


def test_targets_are_their_definition(rng):
    T, N = 30, 3
    rewards, next_q = rng.normal(size=(2, T, N))
    terminations = rng.random((T, N)) < 0.2
    targets = sarsa.sarsa_targets(*tensors(rewards, next_q, terminations), 0.9)
    for t, n in np.ndindex(T, N):
        expected = rewards[t, n] if terminations[t, n] else rewards[t, n] + 0.9 * next_q[t, n]
        assert targets[t, n].item() == pytest.approx(expected)


def test_loss_is_the_squared_error_of_the_action_taken(rng):
    """Its gradient, row by row, is -2 (target - Q(s, a)) grad Q(s, a) / B: through Q(s, a) and nothing else."""
    agent, args = make_agent("sarsa")
    B = 6
    obs, actions, targets = torch.randn(B, 3), torch.randint(4, (B,)), torch.randn(B)
    expected = [torch.zeros_like(parameter) for parameter in agent.parameters()]
    errors = []
    for i in range(B):
        agent.zero_grad()
        q = agent(obs[i : i + 1])[0, actions[i]]
        q.backward()
        errors.append((q.item() - targets[i].item()) ** 2)
        for total, parameter in zip(expected, agent.parameters(), strict=True):
            total += -2 * (targets[i] - q.detach()) * parameter.grad / B
    agent.zero_grad()
    loss, metrics = sarsa.sarsa_loss(agent, args, obs, actions, targets)
    loss.backward()
    for parameter, gradient in zip(agent.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, atol=1e-6, rtol=1e-4)
    taken = agent(obs)[torch.arange(B), actions].mean().item()
    assert loss.item() == pytest.approx(np.mean(errors)) and metrics.tolist() == pytest.approx([np.mean(errors), taken])


def test_linear_schedule():
    values = [sarsa.linear_schedule(1.0, 0.2, 100, step) for step in (0, 25, 50, 100, 101, 10_000)]
    assert values == pytest.approx([1.0, 0.8, 0.6, 0.2, 0.2, 0.2])
    assert sarsa.linear_schedule(1.0, 0.2, 0, 1) == pytest.approx(0.2)  # no time to fall


@pytest.mark.parametrize("exploration, amount", [("epsilon", 0.4), ("epsilon", 1.0), ("boltzmann", 2.0)])
def test_exploration_has_its_frequencies(rng, exploration, amount):
    q, rows = torch.tensor([1.0, 3.0, -1.0, 2.0]), 40_000
    actions = sarsa.explore(q.expand(rows, 4), exploration, amount)
    if exploration == "epsilon":
        expected = np.full(4, amount / 4) + (1 - amount) * np.eye(4)[1]
    else:
        expected = np.exp(q.numpy() / amount) / np.exp(q.numpy() / amount).sum()
    counts = torch.bincount(actions, minlength=4).numpy()
    assert ((counts - rows * expected) ** 2 / (rows * expected)).sum() < 25  # chi-square, three degrees of freedom
    pairs = torch.bincount(actions[1:] * 4 + actions[:-1], minlength=16).numpy() / (rows - 1)  # each row for itself
    np.testing.assert_allclose(pairs, np.outer(expected, expected).flatten(), atol=0.01)


@pytest.mark.parametrize("exploration, amount", [("epsilon", 0.0), ("boltzmann", 1e-4)])
def test_exploration_ends_in_the_best_action(rng, exploration, amount):
    q = torch.randn(500, 5)
    assert sarsa.explore(q, exploration, amount).equal(q.argmax(-1))


def test_agent_answers_for_its_best_action(rng):
    agent, _ = make_agent("sarsa")
    obs = torch.randn(50, 3)
    q = agent(obs)
    assert q.shape == (50, 4)
    assert agent.act(obs).tolist() == [row.index(max(row)) for row in q.tolist()]
    assert agent.value(obs).tolist() == [max(row) for row in q.tolist()]


def test_network_normalises_each_hidden_layer():
    """What it says does not depend on how large the observation's features have become."""
    agent, _ = make_agent("sarsa")
    assert [type(layer).__name__ for layer in agent.q] == ["Linear", "LayerNorm", "ReLU"] * 2 + ["Linear"]
    first, second = (layer for layer in list(agent.q)[:4] if isinstance(layer, nn.Linear))
    obs = torch.randn(20, 3)
    before = agent(obs)
    for layer in (first, second):
        layer.weight.data *= 100
        layer.bias.data *= 100
    torch.testing.assert_close(agent(obs), before, atol=1e-3, rtol=1e-3)


# ------------------------------------------------------------------------------- the data against what really happened


@pytest.mark.parametrize("epsilon", [1.0, 0.0])
def test_targets_hold_the_action_that_is_really_taken(play, epsilon):
    """Four counters, five rollouts, whose edges are no edges for the learner; ends by both kinds."""
    N, T, iterations = 4, 9, 5
    found = play(N, T, iterations, start_e=epsilon, end_e=epsilon)
    assert len(found) == iterations and [env.steps for env in Counter.made[:N]] == [T * iterations] * N
    drawn, over_an_edge, ended = [], [], 0
    for n in range(N):
        taken = [int(action) for action in Counter.made[n].actions]
        episode = t = 0
        for i in range(T * iterations):
            obs, actions, targets = (x[i % T, n] for x in found[i // T])
            assert obs.tolist() == [n, episode, t] and actions == taken[i]
            t += 1
            is_end, is_cut = t == 3 + n, t == 3 + n and episode % 2 == 1
            next_q = (targets - (n + t)) / 0.9
            if is_end and not is_cut:
                assert targets == n + t  # nothing follows
                ended += 1
            elif is_cut or i + 1 == T * iterations:  # drawn for this state, but nobody took it
                options = [q_of(episode, t, action) for action in (0, 1)]
                assert min(abs(next_q - option) for option in options) < 0.01
                if is_cut:
                    drawn.append(abs(next_q - max(options)) < 0.01)
            else:
                assert next_q == pytest.approx(q_of(episode, t, taken[i + 1]), abs=0.01)
                if i % T == T - 1:
                    over_an_edge.append(taken[i + 1] == (t % 2 == 0))
            episode, t = (episode + 1, 0) if is_end else (episode, t)
    assert ended > 10 and len(drawn) > 10 and len(over_an_edge) > 8
    for is_best in (drawn, over_an_edge):  # by the policy that explores: at epsilon 0 always the best, at 1 not
        assert all(is_best) if epsilon == 0 else 0 < sum(is_best) < len(is_best)


def test_a_checkpoint_cuts_the_episodes(play):
    """The environments are made anew, and the action that waited for the old ones is not taken in the new ones."""
    N, T = 2, 7
    found = play(N, T, 3, checkpoint_every=N * T, start_e=0.0, end_e=0.0)
    assert len(Counter.made) == 3 * N and [env.steps for env in Counter.made] == [T] * 3 * N
    for iteration, (obs, actions, _) in enumerate(found):
        assert obs[0, :, 1:].tolist() == [[0, 0]] * N
        assert actions[0].tolist() == [1] * N  # the best at step 0
        given = [Counter.made[iteration * N + n].actions for n in range(N)]
        assert actions.T.tolist() == [[int(action) for action in row] for row in given]


@pytest.mark.parametrize("exploration", ["epsilon", "boltzmann"])
def test_exploration_follows_its_schedule(exploration, play, spy):
    calls, logs = spy(sarsa, "explore"), spy(sarsa.Run, "log")
    flags = {"start_e": 0.9, "end_e": 0.1, "start_tau": 5.0, "end_tau": 0.5, "exploration": exploration}
    play(2, 5, 10, exploration_fraction=0.5, **flags)
    start, end, tag = (0.9, 0.1, "charts/epsilon") if exploration == "epsilon" else (5.0, 0.5, "charts/tau")
    amounts = [bound["metrics"][tag] for bound, _ in logs]
    assert amounts == pytest.approx([start + (end - start) * min(i / 5, 1) for i in range(10)])
    assert {bound["exploration"] for bound, _ in calls} == {exploration}
    assert sorted({bound["amount"] for bound, _ in calls}) == pytest.approx(sorted(set(amounts)))


def test_one_gradient_step_per_rollout_with_a_falling_rate(train, monkeypatch):
    rates, original = [], sarsa.gradient_step

    def gradient_step(agent, optimizer, loss_fn, batch, args):
        rates.append(optimizer.param_groups[0]["lr"])
        assert {len(x) for x in batch} == {2 * 8} and not any(x.requires_grad for x in batch)
        with torch.no_grad():  # the targets are of the network that acted
            q = agent(batch[0]).reshape(8, 2, -1)
        found.append((q, [x.reshape(8, 2, *x.shape[1:]).clone() for x in batch]))
        return original(agent, optimizer, loss_fn, batch, args)

    monkeypatch.setattr(sarsa, "gradient_step", gradient_step)
    flags = {"num_envs": 2, "num_steps": 8, "total_timesteps": 5 * 16, "checkpoint_every": 0, "eval_episodes": 1}
    for i, (anneal_lr, expected) in enumerate([(True, [0.002, 0.0016, 0.0012, 0.0008, 0.0004]), (False, [0.002] * 5)]):
        found = []
        rates.clear()
        train("sarsa", f"run{i}", learning_rate=0.002, anneal_lr=anneal_lr, gamma=0.9, **flags)
        assert rates == pytest.approx(expected)
        checked = 0
        for q, (_, actions, targets) in found:  # CartPole pays 1; where it ends the target is 1 and not checked here
            following = 1 + 0.9 * q.gather(-1, actions.unsqueeze(-1)).squeeze(-1)[1:]
            goes_on = targets[:-1] != 1
            torch.testing.assert_close(targets[:-1][goes_on], following[goes_on], atol=1e-5, rtol=1e-4)
            checked += goes_on.sum().item()
        assert checked > 50
