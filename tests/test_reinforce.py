"""REINFORCE: returns against their definition, batches of whole episodes against what happened. Loss: test_a2c.py."""

import numpy as np
import pytest
from conftest import episodes, load
from environments import Counter
from test_ppo import truth

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
