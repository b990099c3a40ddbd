"""The random policy: every kind of space, the distributions that it promises, observations that do not matter."""

import gymnasium as gym
import numpy as np
import pytest
from conftest import load, make_args
from environments import Misfit
from gymnasium.spaces import Box, Dict, Discrete, Graph, MultiBinary, MultiDiscrete, Sequence, Tuple

policy = load("random_policy")
SPACES = {
    "discrete": Discrete(3, start=-1),
    "multidiscrete": MultiDiscrete([[2, 3], [4, 5]], start=[[1, 0], [0, 1]]),
    "multibinary": MultiBinary([2, 2]),
    "box": Box(np.float32([-1, 2]), np.float32([1, 9])),
    "bytes": Box(0, 255, (4,), np.uint8),
    "unbounded": Box(-np.inf, np.inf, (2,)),
    "tuple": Tuple((Discrete(2), Box(-1, 1, (2,)))),
    "dict": Dict({"move": Dict({"x": Box(0, 1, (1,)), "y": Discrete(3)}), "jump": MultiBinary(1)}),
}


class Picky(Misfit):
    """Insists on actions of its space, and remembers them."""

    seen: list = []

    def step(self, action):
        assert self.action_space.contains(action), action
        self.seen.append(action)
        return self.observation_space.sample(), 1.0, len(self.seen) % 5 == 0, False, {}


@pytest.fixture
def play(monkeypatch, tmp_path):
    """play(action space, observation space, **flags) -> all actions that reached the environments of a run."""

    def play(action_space: gym.Space, observation_space: gym.Space = SPACES["discrete"], **flags) -> list:
        spaces = {"action_space": action_space, "observation_space": observation_space}
        monkeypatch.setitem(gym.registry, "Picky-v0", gym.envs.registration.EnvSpec("Picky-v0", Picky, kwargs=spaces))
        monkeypatch.setattr(Picky, "seen", [])
        flags = {"total_timesteps": 200, "eval_episodes": 1, "run_dir": str(tmp_path / "run")} | flags
        policy.train(make_args("random_policy", env_id="Picky-v0", **flags))
        return Picky.seen

    return play


@pytest.mark.filterwarnings("ignore::UserWarning")  # Gymnasium's, about such spaces
@pytest.mark.parametrize("kind", SPACES)
def test_every_space_of_actions_and_of_observations(kind, play):
    """The environment sees any of these, too."""
    assert len(play(SPACES[kind], SPACES[kind])) > 200


@pytest.mark.parametrize("space", [Sequence(Discrete(2)), Graph(Box(-1, 1, (2,)), None)])
def test_actions_without_a_fixed_size_are_refused(space, play, capsys, tmp_path):
    with pytest.raises(SystemExit) as end:
        play(space)
    assert end.value.code == 2 and "Picky-v0" in capsys.readouterr().err and not any(tmp_path.iterdir())


def test_actions_have_the_promised_distributions(play):
    half = Box(np.float32([3, -np.inf]), np.float32([np.inf, 5]))
    parts = Dict({"uniform": Box(-1, 3, (2,)), "normal": Box(-np.inf, np.inf, (2,)), "half": half, "n": Discrete(4)})
    seen = play(parts, total_timesteps=8000, num_envs=4)
    uniform, normal, half, n = (np.array([x[name] for x in seen]) for name in ("uniform", "normal", "half", "n"))
    z = np.column_stack([(uniform - 1) / (4 / 12**0.5), normal, half[:, 0] - 4, 4 - half[:, 1], (n - 1.5) / 1.25**0.5])
    assert np.abs(z.mean(0)).max() < 0.06 and np.abs(z.std(0) - 1).max() < 0.08
    assert uniform.min() < -0.98 and uniform.max() > 2.98 and half[:, 0].min() > 3 and half[:, 1].max() < 5
    shares = [np.bincount(n), np.histogram(uniform[:, 0], 4)[0], np.histogram(uniform[:, 1], 4)[0]]
    assert np.abs(np.array(shares) / len(n) - 0.25).max() < 0.025
    pairs = np.hstack([z[:-4], z[1:-3], z[4:]])  # each dimension, environment, and step for itself
    assert np.abs(np.corrcoef(pairs.T) - np.eye(pairs.shape[1])).max() < 0.08
