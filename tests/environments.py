"""Environments whose truth is known: a counter, probes for learning, games without an emulator, odd ones, misfits."""

import os

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box, Dict, Discrete, MultiDiscrete
from gymnasium.vector.utils import batch_space


class Counter(gym.Env):
    """Observation (environment, episode, t). Environment i has episodes of 3 + i % 4 steps, every other one truncated.

    It reuses its observation array, its infos grow, and it keeps its own books: `finished` (return, length), `steps`,
    and every action. `made` lists the counters in the order of their creation; a test empties it first.
    """

    made: list["Counter"] = []
    most_open = 0

    def __init__(self, continuous: bool = False, render_mode: str | None = None):
        self.observation_space = Box(0, np.inf, (3,), np.float32)
        low, high = np.array([-1, -2], np.float32), np.array([3, 0.5], np.float32)  # asymmetric, different
        self.action_space = Box(low, high) if continuous else Discrete(2)
        self.index, self.episode, self.t, self.over, self.is_open = len(self.made), -1, 0, True, True
        self.steps, self.total, self.finished, self.actions = 0, 0.0, [], []
        self.obs = np.zeros(3, np.float32)
        self.made.append(self)
        Counter.most_open = max(Counter.most_open, sum(counter.is_open for counter in self.made))

    @classmethod
    def forget(cls) -> None:
        cls.made.clear()
        cls.most_open = 0

    def close(self):
        self.is_open = False

    @property
    def length(self) -> int:
        return 3 + self.index % 4

    def observe(self) -> np.ndarray:
        self.obs[:] = self.index, self.episode, self.t
        return self.obs

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.episode, self.t, self.total, self.over = self.episode + 1, 0, 0.0, False
        return self.observe(), {"path": [], "final_obs": 1}

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
        truncated = self.episode % 2 == 1
        infos = {"path": np.arange(self.t), "big": 2**70, "x": None if self.t % 2 else {"y": "text"}}
        return self.observe(), reward, self.over and not truncated, self.over and truncated, infos


class Probe(gym.Env):
    """Tiny problems whose values and best actions are known without learning them.

    discount    two steps, observations 0 and 1, reward 1 at the end: V(0) = gamma, V(1) = 1
    match       one step, observation +1 or -1, reward 1 for an action that is high at +1 and low at -1
    endless     reward 1 forever, truncated after 5 steps: V = 1 / (1 - gamma), because a time limit is not an end
    """

    def __init__(self, kind: str, continuous: bool = False, render_mode: str | None = None):
        self.kind, self.action_space = kind, Box(-1, 1, (1,), np.float32) if continuous else Discrete(2)
        self.observation_space = Box(-1, 1, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        self.signal = float(self.np_random.choice([-1, 1])) if self.kind == "match" else 0.0
        return np.array([self.signal], np.float32), {}

    def step(self, action):
        self.t += 1
        obs = np.array([self.t if self.kind == "discount" else self.signal], np.float32)
        action = float(np.clip(action, -1, 1)[0]) if isinstance(self.action_space, Box) else 2.0 * action - 1
        reward = {"discount": float(self.t == 2), "match": action * self.signal, "endless": 1.0}[self.kind]
        ended = {"discount": self.t == 2, "match": True, "endless": False}[self.kind]
        return obs, reward, ended, self.kind == "endless" and self.t == 5, {}


class FakeGames(gym.vector.VectorEnv):
    """The interface of ale_py's vector environment (same-step autoreset) around games that cost nothing.

    Game i has 3 lives, loses one after 4 steps and one after 7, and is over after 10 + i; every other game is truncated
    there. The first two pixels of the newest frame are the number of the game and the step. Each step pays 5. As in
    ale_py, rows of final_obs that did not end are garbage.
    """

    made: list["FakeGames"] = []
    metadata = {"render_fps": 15, "autoreset_mode": gym.vector.AutoresetMode.SAME_STEP}

    def __init__(self, num_envs: int):
        self.num_envs, self.envs = num_envs, [self]
        self.single_observation_space, self.single_action_space = Box(0, 255, (4, 84, 84), np.uint8), Discrete(3)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.games, self.t = np.zeros(num_envs, int), np.zeros(num_envs, int)
        self.lengths = 10 + np.arange(num_envs)
        self.steps, self.finished = 0, []
        self.made.append(self)

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
        over, truncated = self.t == self.lengths, self.games % 2 == 1
        infos = {"lives": (3 - (self.t >= 4) - (self.t >= 7)).astype(np.int32)}
        if over.any():
            infos["final_obs"] = self.observe()
            infos["final_obs"][~over] = 255
            self.finished += [(5.0 * length, int(length)) for length in self.lengths[over]]
            infos["lives"][over] = 3
        self.games[over] += 1
        self.t[over] = 0
        rewards = np.full(self.num_envs, 5, np.int32)
        return self.observe(), rewards, over & ~truncated, over & truncated, infos

    def render(self) -> np.ndarray:
        return self.observe()[0, -1][..., None].repeat(3, -1)

    def close(self, **kwargs):
        pass

    @classmethod
    def install(cls, monkeypatch, module) -> None:
        """Let a script's make_envs make these."""

        def make_envs(args, num_envs: int, render: bool = False) -> gym.vector.VectorEnv:
            games = cls(num_envs)
            return module.Games(module.Adapter(games)) if hasattr(module, "Adapter") else games

        monkeypatch.setattr(module, "make_envs", make_envs)


class FakeChoices(FakeGames):
    """Games of 8 steps: one of three bands of the image is bright, and that action pays 7, the others -3."""

    every = 1  # steps; then another band is bright, for one step

    def __init__(self, num_envs: int):
        super().__init__(num_envs)
        self.rng = np.random.default_rng(0)
        self.right = self.rng.integers(3, size=num_envs)

    def observe(self) -> np.ndarray:
        obs = np.zeros((self.num_envs, 4, 84, 84), np.uint8)
        for i, right in enumerate(self.right):
            obs[i, :, 28 * right : 28 * (right + 1)] = 255 * (self.t[i] % self.every == 0)
        return obs

    def step(self, actions):
        self.t += 1
        rewards = np.where(actions == self.right, 7, -3).astype(np.int32)
        over = self.t == 8
        infos = {"lives": np.ones(self.num_envs, np.int32)}
        infos |= {"final_obs": self.observe()} if over.any() else {}
        self.t[over] = 0
        self.right = np.where(self.t % self.every == 0, self.rng.integers(3, size=self.num_envs), self.right)
        return self.observe(), rewards, over, np.zeros_like(over), infos


ODD = {  # kind: discrete actions, continuous actions, observations, reward
    "types": (Discrete(3, dtype=np.int32), Box(np.float32([0.1, -3]), np.float32([0.7, 9])), ">f4", np.array([1.0])),
    "more types": (Discrete(3, start=1), Box(np.array([0.1, -3]), np.array([0.7, 9]), dtype=np.float64), "g", True),
}


class Odd(gym.Env):
    """Does what some user's environment does, one thing per `kind`. It insists on actions of the action space.

    Reward 1, episodes of `length` steps that are terminated.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 30}
    open_ones = 0  # of kind "single"

    def __init__(self, kind: str = "", length: int = 5, continuous: bool = False, render_mode: str | None = None):
        self.kind, self.length, self.render_mode, self.steps = kind, length, render_mode, 0
        *actions, dtype, self.reward = ODD.get(kind, (Discrete(3), Box(-1, 1, (2,), np.float32), "f4", 1.0))
        self.action_space, self.observation_space = actions[continuous], Box(-100, 100, (2,), np.dtype(dtype))
        if kind == "single":  # a license, a port, a robot
            assert Odd.open_ones == 0, "port 5005 is in use by another environment"
            Odd.open_ones += 1
        if kind == "chdir":
            os.makedirs("elsewhere", exist_ok=True)
            os.chdir("elsewhere")
        if kind == "OSError":
            raise OSError("no robot found")

    def observe(self) -> np.ndarray:
        x = self.observation_space.sample()[0] if self.kind == "sampler" else 3
        x = np.nan if self.kind == "NaN at the end" and self.t == self.length else x
        return np.array([x, min(self.t, 100)], self.observation_space.dtype)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return self.observe(), {}

    def step(self, action):
        assert self.action_space.contains(action), f"{action!r} ({action.dtype}) is not in {self.action_space}"
        self.t += 1
        self.steps += 1
        if self.kind == "TypeError" and self.steps > 12:
            raise TypeError("the robot fell")
        reward = float(np.sum(self.action_space.sample())) if self.kind == "sampler" else self.reward
        return self.observe(), reward, np.bool_(self.t == self.length), False, {}

    def render(self):
        frame = np.zeros((64, 64, 3), np.uint8)
        if self.kind == "render error" and self.t == 2:
            raise RuntimeError("the screen went away")
        grown = np.zeros((64, 64 + 8 * self.t, 3), np.uint8)
        return {"no frame": None, "list of frames": [frame], "growing frame": grown}.get(self.kind, frame)

    def close(self):
        Odd.open_ones -= self.kind == "single"
        if self.kind == "close error":
            raise RuntimeError("it is closed already")


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


def register() -> None:
    """Test/Name-v0; counter, odd ones and probes also as Test/NameContinuous-v0."""
    for continuous, suffix in ((False, ""), (True, "Continuous")):
        for environment in (Counter, Odd, Probe):
            gym.register(f"Test/{environment.__name__}{suffix}-v0", environment, kwargs={"continuous": continuous})
    vector, image, few = Box(-1, 1, (2,)), Box(0, 255, (96, 96, 3), np.uint8), Discrete(2)
    misfits = {
        "Dict": (Dict({"position": vector}), few),
        "DictContinuous": (Dict({"position": vector}), vector),
        "Image": (image, few),
        "ImageContinuous": (image, vector),
        "MultiDiscrete": (vector, MultiDiscrete([2, 3])),
        "Integers": (vector, Box(-10, 10, (2,), np.int64)),
        "Unbounded": (vector, Box(-np.inf, np.inf, (2,))),
    }
    for name, (observation_space, action_space) in misfits.items():
        spaces = {"observation_space": observation_space, "action_space": action_space}
        gym.register(f"Test/{name}-v0", Misfit, kwargs=spaces)
    gym.register("Test/Uninstalled-v0", uninstalled)
