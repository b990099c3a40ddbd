"""Our own environments: what they hide, and that the treasure can be found but hardly by chance."""

import gymnasium as gym
import numpy as np
import pytest
from conftest import episodes
from gymnasium.utils.env_checker import check_env

from benchmark.environments import KeyDoorTreasure

LIMITS = {"CartPoleNoVelocity": 500, "PendulumNoVelocity": 200, "KeyDoorTreasure": 50}


def make(name: str, **kwargs) -> gym.Env:
    return gym.make(f"benchmark.environments:{name}-v0", **kwargs)


@pytest.mark.filterwarnings("ignore:.*symmetric and normalized space")  # Pendulum's torque
@pytest.mark.parametrize("name", LIMITS)
def test_registered_and_sound(name):
    env = make(name, render_mode="rgb_array")
    assert env.spec.max_episode_steps == LIMITS[name]
    check_env(env.unwrapped)
    env.reset(seed=1)
    assert env.render().ndim == 3 and np.ptp(env.render()) > 0


def test_by_name_from_the_command_line(call, tmp_path):
    words = ["--env-id", "benchmark.environments:KeyDoorTreasure-v0", "--total-timesteps", 2000, "--run-dir", "run"]
    assert call("ppo", *words, "--eval-episodes", 1, "--checkpoint-every", 1000).code == 0
    assert all(length <= 50 for _, _, length in episodes(tmp_path / "run"))


@pytest.mark.parametrize(
    "name, original, visible, units",
    [
        ("CartPoleNoVelocity", "CartPole-v1", [0, 2], [0.2, 0.05]),
        ("PendulumNoVelocity", "Pendulum-v1", [0, 1], [1, 1]),
    ],
)
def test_the_same_without_velocities(name, original, visible, units):
    ours, theirs = make(name), gym.make(original)
    (x, _), (y, _) = ours.reset(seed=3), theirs.reset(seed=3)
    ours.action_space.seed(0)
    for _ in range(200):
        np.testing.assert_allclose(x * units, y[visible], rtol=1e-6)
        assert ours.observation_space.contains(x)
        action = ours.action_space.sample()
        (x, *rest), (y, *expected) = ours.step(action), theirs.step(action)
        assert rest == expected
        if any(rest[1:3]):
            break


def transition(stage: int, position: tuple[int, int], action: int):
    env = KeyDoorTreasure()
    env.reset()
    env.stage, env.position = stage, position
    obs, reward, terminated, truncated, _ = env.step(action)
    found = obs[:11].argmax() + 1, obs[11:22].argmax() + 1
    assert found == env.position and obs.sum() == 2 + min(env.stage, 2) and not truncated
    assert reward == (2**stage if env.stage > stage else 0) and terminated == (env.stage == 3)
    return env.stage, env.position


def test_a_random_policy_hardly_finds_the_treasure():
    """The exact distribution over all states, step by step; the shortest way is the first step at which it is there."""
    moves, now, reached = {}, {(0, (8, 2)): 1.0}, {}
    for t in range(1, 51):
        after = {}
        for state, p in now.items():
            for action in range(4):
                if (state, action) not in moves:
                    moves[state, action] = transition(*state, action)
                new = moves[state, action]
                if new[0] > state[0]:
                    first, chance = reached.get(new[0], (t, 0.0))
                    reached[new[0]] = first, chance + p / 4
                if new[0] < 3:
                    after[new] = after.get(new, 0.0) + p / 4
        now = after
    (key, has_key), (door, opens), (treasure, finds) = (reached[stage] for stage in (1, 2, 3))
    assert (key, door, treasure) == (12, 17, 26)
    assert (has_key, opens, finds) == pytest.approx((0.0111, 3.10e-4, 6.97e-7), rel=0.01)


def test_the_door_is_closed_without_the_key():
    assert transition(0, (7, 11), 0) == (0, (7, 11)) and transition(1, (7, 11), 0) == (2, (6, 11))
    assert transition(2, (7, 11), 0) == (2, (6, 11)) and transition(0, (8, 5), 1) == (0, (8, 5))
    assert transition(1, (1, 8), 3) == (1, (1, 7))  # the treasure without an open door, which no way leads to
