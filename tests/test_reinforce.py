"""REINFORCE: returns and loss against their definitions, and batches of whole episodes against what really happened."""

import numpy as np
import pytest
import torch
from conftest import episodes, load, make_agent
from environments import Counter
from test_ppo import policy, truth

reinforce = load("reinforce")


def returns_by_definition(rewards, last_value: float, gamma: float) -> list[float]:
    L = len(rewards)
    return [sum(gamma ** (k - t) * rewards[k] for k in range(t, L)) + gamma ** (L - t) * last_value for t in range(L)]


@pytest.mark.parametrize(
    "L, gamma, last_value", [(1, 0.9, 0.0), (7, 0.9, 0.0), (7, 1.0, 2.5), (30, 0.5, -4.0), (4, 0, 3)]
)
def test_returns_equal_their_definition(rng, L, gamma, last_value):
    rewards = rng.normal(size=L)
    expected = returns_by_definition(rewards, last_value, gamma)
    np.testing.assert_allclose(reinforce.returns_to_go(rewards, last_value, gamma), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("baseline", [True, False])
@pytest.mark.parametrize("norm_adv, rows", [(True, 24), (False, 24), (True, 1)])
def test_loss_is_the_sum_of_its_parts(norm_adv, rows, baseline, rng):
    flags = {"norm_adv": norm_adv, "baseline": baseline, "ent_coef": 0.03, "vf_coef": 0.7}
    agent, args = make_agent("reinforce", **flags)
    obs, actions, (advantages, returns) = torch.randn(rows, 3), torch.randint(4, (rows,)), torch.randn(2, rows) + 1
    loss, metrics = reinforce.reinforce_loss(agent, args, obs, actions, advantages, returns)
    new, scaled = policy("reinforce", agent, obs), advantages
    if norm_adv and rows > 1:  # nothing to normalize in a single row
        scaled = (advantages - advantages.mean()) / advantages.std()
    expected = {"losses/policy_loss": -(scaled * new.log_prob(actions)).mean(), "losses/entropy": new.entropy().mean()}
    total = expected["losses/policy_loss"] - 0.03 * expected["losses/entropy"]
    if baseline:
        expected["losses/value_loss"] = 0.5 * ((agent.value(obs) - returns) ** 2).mean()
        total = total + 0.7 * expected["losses/value_loss"]
    torch.testing.assert_close(loss, total)
    torch.testing.assert_close(metrics, {name: x.detach() for name, x in expected.items()})
    assert baseline == any(name.startswith("critic") for name in agent.state_dict())


# ------------------------------------------------------------------------------- the data against what really happened


@pytest.fixture
def play(train, spy, monkeypatch):
    """play(**flags) -> the folder, and of each update, obs, actions, advantages, returns; V = 100 episode + t."""

    def play(**flags):
        monkeypatch.setattr(reinforce.Agent, "value", lambda self, obs: obs[..., 1] * 100 + obs[..., 2])
        losses = spy(reinforce, "reinforce_loss")
        folder = train("reinforce", gamma=0.9, **flags)
        names = "obs", "actions", "advantages", "returns"
        return folder, [[bound[name].numpy() for name in names] for bound, _ in losses]

    return play


def whole(env: int, episode: int) -> list[list[int]]:
    """What a counter observes in an episode."""
    return [[env, episode, t] for t in range(3 + env % 4)]


def check(obs, actions, advantages, returns, baseline: bool = True) -> None:
    """A truncated episode has a future, V of what it ended with, if there is a baseline to ask."""
    true = truth(obs)
    np.testing.assert_array_equal(actions, true.actions)
    expected, start = [], 0
    for end in np.flatnonzero(true.dones) + 1:
        _, episode, t = true.next_obs[end - 1]
        future = 100 * episode + t if baseline and not true.terminations[end - 1] else 0
        expected += returns_by_definition(true.rewards[start:end], future, 0.9)
        start = end
    np.testing.assert_allclose(returns, expected, rtol=1e-5)
    values = obs[:, 1] * 100 + obs[:, 2] if baseline else 0
    np.testing.assert_allclose(advantages, np.array(expected) - values, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("baseline", [True, False])
def test_episodes_of_several_environments_stay_apart(play, baseline):
    """Four environments with episodes of 3 to 6 steps: each row once, in the update after its episode ended."""
    N = 4
    _, found = play(num_envs=N, episodes_per_update=3, total_timesteps=60 * N, baseline=baseline)
    ends = sorted((k * (3 + n), n, k - 1) for n in range(N) for k in range(1, 60 // (3 + n) + 1))  # step, env, episode
    waiting, learned = [], []
    for i, (step, n, episode) in enumerate(ends):
        waiting.append((n, episode))
        if len(waiting) >= 3 and (i + 1 == len(ends) or ends[i + 1][0] > step):  # all that ended in this step join
            learned, waiting = [*learned, waiting], []
    assert len(found) == len(learned) > 10 and max(map(len, learned)) > 3
    for ended, batch in zip(learned, found):
        assert batch[0].tolist() == sum((whole(*one) for one in ended), [])
        check(*batch, baseline)


def test_a_checkpoint_discards_the_running_episodes(play):
    """After each update here: no step of the old environments is learned from later."""
    _, found = play(num_envs=3, episodes_per_update=1, total_timesteps=3 * (3 + 3 + 3 + 4 + 3), checkpoint_every=1)
    assert len(found) == 5 and len(Counter.made) == 3 * 5 + 1
    for i, batch in enumerate(found):
        shortest = min(range(3 * i, 3 * i + 3), key=lambda env: env % 4)
        assert batch[0].tolist() == whole(shortest, 0)
        check(*batch)


def test_the_run_ends_at_its_last_step(play):
    """In the middle of an episode, and with episodes that are too few for an update."""
    folder, found = play(num_envs=3, episodes_per_update=5, total_timesteps=100)
    assert [env.steps for env in Counter.made[:3]] == [34] * 3
    finished = [row for env in Counter.made[:3] for row in env.finished]
    assert sorted(row[1:] for row in episodes(folder)) == sorted(finished)
    assert 0 < len(finished) - sum(len({tuple(row[:2]) for row in obs}) for obs, *_ in found) < 5
