"""Environments for memory and for sparse rewards, for example --env-id benchmark.environments:KeyDoorTreasure-v0."""

import gymnasium as gym
import numpy as np
from gymnasium.envs.classic_control import CartPoleEnv, PendulumEnv
from gymnasium.spaces import Box, Discrete


class NoVelocity:
    """Observe only the entries `visible` of what the next base class shows, divided by `units`."""

    def __init__(self, **kwargs) -> None:
        super().__init__(**kwargs)
        low, high = self.observation_space.low, self.observation_space.high
        self.observation_space = Box(self.show(low), self.show(high))

    def show(self, obs: np.ndarray) -> np.ndarray:
        return obs[self.visible] / np.float32(self.units)

    def reset(self, **kwargs):
        obs, info = super().reset(**kwargs)
        return self.show(obs), info

    def step(self, action):
        obs, *rest = super().step(action)
        return self.show(obs), *rest


class CartPoleNoVelocity(NoVelocity, CartPoleEnv):  # small units: velocities have to be seen in small differences
    visible, units = [0, 2], [0.2, 0.05]  # the position of the cart (m), the angle of the pole (rad)


class PendulumNoVelocity(NoVelocity, PendulumEnv):
    visible, units = [0, 1], [1, 1]  # cosine and sine of the angle


class KeyDoorTreasure(gym.Env):
    """Get the key (reward 1), open the door (2), reach the treasure (4), in 50 steps: Oh et al. 2018, arXiv:1806.05635.

    The shortest way takes 26 steps. A random policy gets the key in 1.1 % of its episodes, opens the door in 0.03 %,
    reaches the treasure in one of 1.4 million. Observation: row and column, one-hot; has the key; has opened the door.
    Actions: up, right, down, left; none through walls, nor through the door without the key.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}
    maze = np.full((13, 13), ".")
    maze[::6] = maze[:, ::6] = "#"  # four rooms
    maze[6, 2] = maze[9, 6] = "."  # from the lower left one, where the agent starts, to two others
    maze[11, 11], maze[6, 11], maze[1, 7] = "KDT"  # lower right, between there and the upper right, upper right

    def __init__(self, render_mode: str | None = None) -> None:
        self.render_mode, self.action_space, self.observation_space = render_mode, Discrete(4), Box(0, 1, (24,))

    def observe(self) -> np.ndarray:
        place = [np.arange(1, 12) == x for x in self.position]
        return np.concatenate([*place, [self.stage > 0, self.stage > 1]]).astype(np.float32)

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        super().reset(seed=seed)
        self.position, self.stage = (8, 2), 0  # stage: rewards so far
        return self.observe(), {}

    def step(self, action):
        down, right = ((-1, 0), (0, 1), (1, 0), (0, -1))[action]
        position = self.position[0] + down, self.position[1] + right
        cell, reward = self.maze[position], 0.0
        if cell != "#" and (cell != "D" or self.stage > 0):
            self.position = position
        if cell == "KDT"[self.stage]:
            reward, self.stage = 2.0**self.stage, self.stage + 1
        return self.observe(), reward, self.stage == 3, False, {}

    def render(self) -> np.ndarray:  # walls black, what is left to get light gray, the agent dark gray
        left = np.isin(self.maze, list("KDT"[self.stage :]))
        frame = np.select([self.maze == "#", left], [0, 192], 255).astype(np.uint8)
        frame[self.position] = 96
        return frame.repeat(16, 0).repeat(16, 1)[..., None].repeat(3, -1)


LIMITS = {CartPoleNoVelocity: 500, PendulumNoVelocity: 200, KeyDoorTreasure: 50}
for env, steps in LIMITS.items():
    gym.register(f"{env.__name__}-v0", env, max_episode_steps=steps)
