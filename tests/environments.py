"""Environments whose truth is known: a counter, probes for learning, games without an emulator, and misfits."""

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box, Dict, Discrete, MultiDiscrete

ACTIONS = {False: Discrete(2), True: Box(-1, 1, (1,), np.float32)}  # by `continuous`


class Counter(gym.Env):
    """Observation (environment, episode, t). Environment i has episodes of 3 + i steps; every other one is cut.

    It keeps its own books: `finished` (return, length), `steps`, and every action it was given. `made` lists the
    counters in the order in which they were made; a test empties it first.
    """

    made: list["Counter"] = []

    def __init__(self, continuous: bool = False, render_mode: str | None = None):
        self.observation_space = Box(0, np.inf, (3,), np.float32)
        low, high = np.array([-1, -2], np.float32), np.array([3, 0.5], np.float32)  # not symmetric, not alike
        self.action_space = Box(low, high) if continuous else Discrete(2)
        self.index, self.episode, self.t, self.over = len(self.made), -1, 0, True
        self.steps, self.total, self.finished, self.actions = 0, 0.0, [], []
        self.made.append(self)

    @property
    def length(self) -> int:
        return 3 + self.index % 4

    def observe(self) -> np.ndarray:
        return np.array([self.index, self.episode, self.t], np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.episode, self.t, self.total, self.over = self.episode + 1, 0, 0.0, False
        return self.observe(), {}

    def step(self, action):
        assert not self.over, "stepped after the end of an episode"
        self.t += 1
        self.steps += 1
        self.actions.append(np.array(action))
        reward = float(self.index + self.t)
        self.total += reward
        self.over = self.t == self.length
        if self.over:
            self.finished.append((self.total, self.t))
        cut = self.episode % 2 == 1
        return self.observe(), reward, self.over and not cut, self.over and cut, {}


class Probe(gym.Env):
    """Tiny problems whose values and best actions are known without learning them. Two signals: +1 and -1.

    constant    one step, reward 1: V = 1
    signal      one step, reward = signal: V = signal
    discount    two steps, observations 0 and 1, reward 1 at the end: V(0) = gamma, V(1) = 1
    action      one step, reward 1 for a high action and -1 for a low one
    match       one step, reward 1 for an action that is high when the signal is +1 and low when it is -1
    endless     reward 1 for ever, cut after 5 steps: V = 1 / (1 - gamma), because a time limit is not an end
    """

    def __init__(self, kind: str, continuous: bool = False, render_mode: str | None = None):
        self.kind, self.action_space = kind, ACTIONS[continuous]
        self.observation_space = Box(-1, 1, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        fixed = self.kind in ("constant", "discount", "action", "endless")
        self.signal = 0.0 if fixed else float(self.np_random.choice([-1, 1]))
        return np.array([self.signal], np.float32), {}

    def step(self, action):
        self.t += 1
        obs = np.array([self.t if self.kind == "discount" else self.signal], np.float32)
        action = float(np.clip(action, -1, 1)[0]) if isinstance(self.action_space, Box) else 2.0 * action - 1
        reward = {
            "constant": 1.0,
            "signal": self.signal,
            "discount": float(self.t == 2),
            "action": action,
            "match": action * self.signal,
            "endless": 1.0,
        }[self.kind]
        ended = self.t == 2 if self.kind == "discount" else self.kind != "endless"
        return obs, reward, ended, self.kind == "endless" and self.t == 5, {}


class FakeGames(gym.vector.VectorEnv):
    """The interface of ale_py's vector environment (same-step autoreset) around games that cost nothing.

    Game i has 3 lives, loses one after 4 steps and one after 7, and is over after 10 + i; every other game is cut
    there by the time limit. The two first pixels of the newest frame are the number of the game and the step. Each
    step pays 5. As in ale_py, rows of final_obs that did not end are garbage.
    """

    def __init__(self, num_envs: int):
        self.num_envs = num_envs
        self.single_observation_space, self.single_action_space = Box(0, 255, (4, 84, 84), np.uint8), Discrete(3)
        self.games, self.t = np.zeros(num_envs, int), np.zeros(num_envs, int)
        self.lengths = 10 + np.arange(num_envs)
        self.steps, self.finished = 0, []

    def observe(self) -> np.ndarray:
        obs = np.zeros((self.num_envs, 4, 84, 84), np.uint8)
        obs[:, -1, 0, 0], obs[:, -1, 0, 1] = self.games, self.t
        return obs

    def reset(self, *, seed=None, options=None):
        self.games[:] = self.t[:] = 0
        return self.observe(), {}

    def step(self, actions):
        self.t += 1
        self.steps += self.num_envs
        over, cut = self.t == self.lengths, self.games % 2 == 1
        infos = {"lives": (3 - (self.t >= 4) - (self.t >= 7)).astype(np.int32)}
        if over.any():
            infos["final_obs"] = self.observe()
            infos["final_obs"][~over] = 255
            self.finished += [(5.0 * length, int(length)) for length in self.lengths[over]]
            infos["lives"][over] = 3
        self.games[over] += 1
        self.t[over] = 0
        return self.observe(), np.full(self.num_envs, 5, np.int32), over & ~cut, over & cut, infos

    def close(self, **kwargs):
        pass

    @classmethod
    def install(cls, monkeypatch, module) -> None:
        """Let a script's start_envs start these."""

        def start_envs(args, seeds, **kwargs):
            games = cls(len(seeds))
            return games, games.reset()[0]

        monkeypatch.setattr(module, "start_envs", start_envs)


class FakeChoices(FakeGames):
    """Games of 8 steps: one of three bands of the picture is bright, and that action pays 7, the others -3."""

    def __init__(self, num_envs: int):
        super().__init__(num_envs)
        self.rng = np.random.default_rng(0)
        self.right = self.rng.integers(3, size=num_envs)

    def observe(self) -> np.ndarray:
        obs = np.zeros((self.num_envs, 4, 84, 84), np.uint8)
        for i, right in enumerate(self.right):
            obs[i, :, 28 * right : 28 * (right + 1)] = 255
        return obs

    def step(self, actions):
        self.t += 1
        rewards = np.where(actions == self.right, 7, -3).astype(np.int32)
        over = self.t == 8
        infos = {"lives": np.ones(self.num_envs, np.int32)} | ({"final_obs": self.observe()} if over.any() else {})
        self.right = self.rng.integers(3, size=self.num_envs)
        self.t[over] = 0
        return self.observe(), rewards, over, np.zeros_like(over), infos


class Misfit(gym.Env):
    """An environment with the spaces it is given."""

    def __init__(self, observation_space: gym.Space, action_space: gym.Space, render_mode: str | None = None):
        self.observation_space, self.action_space = observation_space, action_space

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.observation_space.sample(), {}

    def step(self, action):
        return self.observation_space.sample(), 0.0, False, False, {}


def uninstalled(**kwargs):
    """What Gymnasium's own environments do when their extra is not installed."""
    raise gym.error.DependencyNotInstalled("the engine is missing,\nrun `pip install gymnasium[engine]`")


PROBES = ("constant", "signal", "discount", "action", "match", "endless")


def register() -> None:
    """All of them as Test/Name-v0; the counter and the probes also as Test/NameContinuous-v0."""
    for continuous, suffix in ((False, ""), (True, "Continuous")):
        gym.register(f"Test/Counter{suffix}-v0", Counter, kwargs={"continuous": continuous})
        for kind in PROBES:
            name = f"Test/{kind.capitalize()}{suffix}-v0"
            gym.register(name, Probe, kwargs={"kind": kind, "continuous": continuous})
    vector, picture, few = Box(-1, 1, (2,)), Box(0, 255, (96, 96, 3), np.uint8), Discrete(2)
    misfits = {
        "Dict": (Dict({"position": vector}), few),
        "DictContinuous": (Dict({"position": vector}), vector),
        "Image": (picture, few),
        "ImageContinuous": (picture, vector),
        "MultiDiscrete": (vector, MultiDiscrete([2, 3])),
        "FromOne": (vector, Discrete(2, start=1)),
        "Unbounded": (vector, Box(-np.inf, np.inf, (2,))),
    }
    for name, (observation_space, action_space) in misfits.items():
        spaces = {"observation_space": observation_space, "action_space": action_space}
        gym.register(f"Test/{name}-v0", Misfit, kwargs=spaces)
    gym.register("Test/Uninstalled-v0", uninstalled)
