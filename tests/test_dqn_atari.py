"""DQN on Atari: the frame buffer against a naive one, n-step windows against their definition, what a run learns from.

Functions whose text is that of the vector scripts are tested in test_dqn.py; of those that several scripts share, one.
"""

import numpy as np
import pytest
import torch
from conftest import arguments, episodes, having, load, make_agent, make_args, saved_agent
from environments import FakeChoices, FakeGames
from test_dqn import fits, is_share, through_a_file
from test_ppo import inputs

LOSSES = {"dqn_atari": "dqn_loss", "dqn_per_atari": "double_dqn_loss", "rainbow_atari": "rainbow_loss"}
FRAMES, PER, DQN = having("FrameBuffer"), having("n_step_windows"), list(LOSSES)
dqn, per, _ = map(load, DQN)


class World:
    """N games with random ends, lost lives, and restarts, for a buffer and a naive one: a list of whole transitions.

    Each frame begins with its number, from 1 on. The naive buffer knows which frames the other one was given.
    """

    def __init__(self, replay, rng, done: float, restart: float):
        self.replay, self.N, self.rng, self.done, self.restart = replay, replay.N, rng, done, restart
        self.shown, self.steps, self.obs = 0, [], np.zeros((replay.N, 4, 84, 84), np.uint8)
        self.begin()

    def push(self, games: np.ndarray, fresh: bool) -> np.ndarray:
        """The stacks after new frames, which the buffer will be given, of these games; black before a fresh game."""
        stacks = np.concatenate((self.obs[:, 1:] * (not fresh), np.full((self.N, 1, 84, 84), 9, np.uint8)), axis=1)
        numbers = np.zeros(self.N, np.int32)
        numbers[games] = self.shown + 1 + np.arange(len(numbers[games]))
        self.shown = max(self.shown, *numbers)
        stacks[:, -1, 0, :4] = numbers[:, None].view(np.uint8)
        return stacks

    def begin(self) -> None:
        self.obs = self.push(np.ones(self.N, bool), fresh=True)
        self.replay.start(self.obs)
        if self.steps:
            self.steps[-1]["last"][:] = True

    def step(self) -> np.ndarray:
        """Returns the transitions that can be sampled."""
        if self.steps and self.rng.random() < self.restart:
            self.begin()
        N, rng = self.N, self.rng
        x = {"obs": self.obs, "actions": rng.integers(9, size=N), "rewards": rng.integers(-9, 9, size=N)}
        x["dones"] = dones = rng.random(N) < self.done
        x["terminations"] = rng.random(N) < np.where(dones, 0.5, 0.1)  # without a done: a lost life
        x["last"] = x["terminations"] | dones
        x["next_obs"] = self.push(np.ones(N, bool), fresh=False)
        where = dones[:, None, None, None]
        self.obs = np.where(where, self.push(dones, fresh=True), x["next_obs"])
        infos = {"final_obs": np.where(where, x["next_obs"], 77)} if dones.any() else {}
        self.replay.add(x["actions"], x["rewards"], x["terminations"], dones, self.obs, infos)
        self.steps.append(x)
        return np.arange(self.replay.oldest, self.replay.added)

    def naive(self, name: str, k) -> np.ndarray:
        return np.array([self.steps[i // self.N][name][i % self.N] for i in k])


def newest_frames(stacks) -> np.ndarray:
    """Their numbers."""
    return np.ascontiguousarray(stacks[..., -1, 0, :4]).view(np.int32)[..., 0]


@pytest.mark.parametrize("N", [1, 3])
@pytest.mark.parametrize("done, restart", [(0.0, 0.0), (0.15, 0.05), (1.0, 0.0)])
def test_frames_against_a_naive_buffer(N, done, restart, tmp_path, rng):
    """Every transition at every moment, over three times round; only those are forgotten that lack a frame."""
    size, other = 20 * N, dqn.FrameBuffer(20 * N, N)
    world, ends = World(dqn.FrameBuffer(size, N), rng, done, restart), set()
    for step in range(1, 90):
        if step % 9 == 0:  # a checkpoint
            other.load_state_dict(through_a_file(world.replay, tmp_path / "state"))
            world.replay, other = other, world.replay
        k = world.step()
        rows = k % size
        frames = world.replay.frames[world.replay.numbers[rows]]
        np.testing.assert_array_equal(frames[:, :4], world.naive("obs", k))
        np.testing.assert_array_equal(frames[:, 1:], world.naive("next_obs", k))
        for name in ("actions", "rewards", "terminations"):
            np.testing.assert_array_equal(getattr(world.replay, name)[rows], world.naive(name, k))
        assert k[-1] == N * step - 1
        if k[0] > 0:
            before = np.ascontiguousarray(world.steps[k[0] // N - 1]["obs"][:, :, 0, :4]).view(np.int32)
            assert before[before > 0].min() <= world.shown - size
        ends |= set(zip(world.steps[-1]["dones"].tolist(), world.steps[-1]["terminations"].tolist()))
    assert world.shown == world.replay.stored > 4 * size and k[0] > 3 * size * (done < 1)
    assert {done > 0 for done, _ in ends} == ({True, False} if 0 < done < 1 else {done == 1}) and len(ends) > 1


@pytest.mark.parametrize("n_step", [1, 3, 6])
@pytest.mark.parametrize("done, restart", [(0.0, 0.0), (0.15, 0.1), (1.0, 0.0)])
def test_windows_equal_their_definition(n_step, done, restart, rng):
    """They stop at terminations, ends of games, restarts, and the newest transition; gamma 0.5 keeps the sums exact."""
    args, world = (
        make_args("dqn_per_atari", n_step=n_step, gamma=0.5),
        World(per.FrameBuffer(60, 3), rng, done, restart),
    )
    lengths = set()
    for _ in range(70):
        k, windows = world.step(), []
        obs, actions, returns, discounts, next_obs, terminations = per.n_step_windows(world.replay, args, k % 60)
        for first in k:
            window = [first]
            while len(window) < n_step and window[-1] + 3 <= k[-1] and not world.naive("last", window[-1:])[0]:
                window.append(window[-1] + 3)
            windows.append(window)
        lengths |= set(map(len, windows))
        assert returns.dtype == discounts.dtype == np.float32 and discounts.tolist() == [0.5 ** len(x) for x in windows]
        assert returns.tolist() == [sum(0.5**j * r for j, r in enumerate(world.naive("rewards", x))) for x in windows]
        last = [window[-1] for window in windows]
        for name, x, rows in (("obs", obs, k), ("actions", actions, k), ("next_obs", next_obs, last)):
            np.testing.assert_array_equal(x, world.naive(name, rows))
        np.testing.assert_array_equal(terminations, world.naive("terminations", last))
    assert lengths == ({1} if done == 1 else set(range(1, n_step + 1)))


def test_samples_are_uniform(rng):
    world = World(dqn.FrameBuffer(60, 3), rng, 0.1, 0.05)
    for _ in range(50):
        k = world.step()
    sample, known = dqn.sample_transitions(world.replay, 4000, "cpu"), newest_frames(world.naive("obs", k)).tolist()
    which = np.array([known.index(number) for number in newest_frames(sample[0].numpy())])
    assert fits(np.bincount(which, minlength=len(k)), np.full(len(k), 1 / len(k)))
    for name, x in zip("obs actions rewards next_obs terminations".split(), sample, strict=True):
        np.testing.assert_array_equal(x, world.naive(name, k[which]))


def test_priorities_are_of_what_can_be_sampled(tmp_path, rng):
    """Those of new transitions are the largest so far, those of forgotten ones 0; also after a checkpoint."""
    args, world = make_args("dqn_per_atari", per_alpha=0.5, per_eps=0.25), World(per.FrameBuffer(60, 3), rng, 0.1, 0.05)
    priorities, expected, largest = per.Priorities(args, 60), np.zeros(300), 1.0
    for step in range(80):
        k, leaves = world.step(), np.zeros(60)
        priorities.add(world.replay)
        expected[k[-3:]] = largest
        leaves[k % 60] = expected[k]
        np.testing.assert_allclose(priorities.tree.sums[priorities.tree.first_leaf :][:60], leaves)
        rows = np.unique(priorities.sample(16, 0.5)[0])
        errors = rng.normal(size=len(rows)) * (1 + step / 20)
        priorities.update(rows, errors)
        expected[[k[k % 60 == row][0] for row in rows]] = (np.abs(errors) + 0.25) ** 0.5
        largest = max(largest, expected[k].max())
        if step % 9 == 0:
            saved, priorities = through_a_file(priorities, tmp_path / "state"), per.Priorities(args, 60)
            priorities.load_state_dict(saved)


# ------------------------------------------------------------------------------------------------------ what a run does


class Stacks:
    """The newest frames of a vector environment, stacked as ALE does; pixels 2 and 3 tell environment, restart."""

    def stack(self, older: np.ndarray, obs: np.ndarray) -> np.ndarray:
        obs[:, -1, 0, 2], obs[:, -1, 0, 3] = np.arange(self.num_envs), 1 + self.made.index(self)
        return np.concatenate((older, obs[:, -1:]), axis=1)

    def reset(self, **kwargs):
        obs, infos = super().reset(**kwargs)
        self.obs, self.actions = self.stack(np.zeros_like(obs[:, 1:]), obs), []
        return self.obs, infos

    def step(self, actions):
        obs, rewards, terminations, truncations, infos = super().step(actions)
        over, older = (terminations | truncations)[:, None, None, None], self.obs[:, 1:]
        if over.any():
            infos["final_obs"] = self.stack(older, infos["final_obs"])
        self.obs = self.stack(np.where(over, 0, older), obs)
        self.actions.append(actions)
        return self.obs, rewards, terminations, truncations, infos


@pytest.fixture
def games(monkeypatch):
    """games(script, kind): the script plays these fake games, stacked."""

    def games(script: str, kind: type) -> None:
        type("Stacked", (Stacks, kind), {}).install(monkeypatch, load(script))
        kind.made.clear()

    return games


@pytest.mark.parametrize("life_loss", [False, True])
@pytest.mark.parametrize("script, n_step", [*((script, 1) for script in DQN), ("dqn_per_atari", 3), (DQN[-1], 3)])
def test_batches_hold_what_happened(script, n_step, life_loss, train, games, monkeypatch):
    """Three games, three restarts, both kinds of end, lost lives: whole stacks, and no window across an end."""
    seen, ended = set(), set()

    def look(agent, *given):
        obs, actions, returns, *discounts, next_obs, terminations = [x.numpy() for x in given if torch.is_tensor(x)][:6]
        if script == "dqn_atari":
            discounts = [np.full(len(obs), 0.9)]
        for i, (game, t, n, restart) in enumerate(obs[:, -1, 0, :4].tolist()):
            k = round(np.log(discounts[0][i]) / np.log(0.9))
            made, length, end = FakeGames.made[restart - 1], 10 + n, t + k
            shown = [[game, t - ago, n, restart] if t >= ago else [0, 0, 0, 0] for ago in (3, 2, 1, 0)]
            assert obs[i, :, 0, :4].tolist() == shown and actions[i] == made.actions[game * length + t][n]
            shown = [[game, end - ago, n, restart] if end >= ago else [0, 0, 0, 0] for ago in (3, 2, 1, 0)]
            assert next_obs[i, :, 0, :4].tolist() == shown and returns[i] == pytest.approx(
                sum(0.9**j for j in range(k))
            )
            over, lost, newest = end == length, life_loss and end in (4, 7), game * length + end == len(made.actions)
            assert terminations[i] == (over and game % 2 == 0 or lost)
            assert k == n_step or over or lost or newest
            assert not life_loss or not {4, 7} & set(range(t + 1, end))
            seen.add((game, t, n, restart))
            ended.add((over, game % 2, lost, newest and restart < len(FakeGames.made)))
        return agent.q.bias.sum(), *[torch.zeros(24)] * (script in PER), {}

    games(script, FakeGames)
    monkeypatch.setattr(load(script), LOSSES[script], look)
    flags = {"num_envs": 3, "total_timesteps": 300, "checkpoint_every": 75, "train_frequency": 3, "learning_starts": 0}
    flags |= {"n_step": n_step, "batch_size": 24, "gamma": 0.9, "buffer_size": 90, "life_loss": life_loss}
    train(script, **flags)
    assert len(FakeGames.made) == 4 + 1 and len(seen) > 260  # of 300
    kinds = {(True, 0, False, False), (True, 1, False, False), (False, 0, life_loss, False), (False, 0, False, True)}
    assert kinds <= ended


@pytest.mark.parametrize("script", DQN)
def test_exploration(script, train, games, monkeypatch):
    """All random before learning starts, then epsilon; one action in 1,000 in the evaluation."""
    q_values = torch.tensor([0.0, 1.0, 0.5])
    monkeypatch.setattr(load(script).Agent, "forward", lambda self, obs: q_values.expand(len(obs), 3))
    games(script, FakeGames)
    flags = {"num_envs": 4, "total_timesteps": 4000, "learning_starts": 1000, "train_frequency": 10**9}
    agent, _ = saved_agent(script, train(script, start_e=0.3, end_e=0.3, **flags))
    actions = np.array(FakeGames.made[0].actions) == 1
    assert is_share(actions[:250], 1 / 3) and is_share(actions[250:], 0.7 + 0.3 / 3)
    assert np.abs(np.corrcoef(actions.T) - np.eye(4)).max() < 0.25
    assert is_share((agent.act(torch.zeros(100_000, 1)) == 1).numpy(), 1 - 0.001 * 2 / 3)


@pytest.mark.parametrize("script", DQN)
def test_images_are_learned(script, train, games):
    """Which of three bands of the newest frame is bright tells the action that pays: 8 steps at 7, by chance near 3."""
    flags = {"num_envs": 4, "train_frequency": 4, "total_timesteps": 1300, "learning_starts": 100, "batch_size": 32}
    flags |= {"target_network_frequency": 50, "gamma": 0.5, "end_e": 0.05, "exploration_fraction": 0.5}
    games(script, FakeChoices)
    folder = train(script, eval_episodes=4, **flags)
    returns = [episode_return for _, episode_return, _ in episodes(folder)]
    assert np.mean(returns[:20]) < 25 and np.mean(returns[-20:]) > 45
    agent, _ = saved_agent(script, folder)
    fake = FakeChoices(3)
    fake.right = np.arange(3)
    assert agent(torch.from_numpy(fake.observe())).argmax(-1).tolist() == [0, 1, 2]


@pytest.mark.parametrize("script, dueling", [("dqn_atari", False), ("dqn_per_atari", False), ("dqn_per_atari", True)])
def test_the_network(script, dueling, rng):
    """Bytes / 255; bfloat16 only in the trunk; with dueling heads the mean of Q is V."""
    agent, _ = make_agent(script, bf16=False, dueling=dueling)
    obs, _ = inputs(script, 6)
    hidden, q_values = agent.trunk(obs.float() / 255), agent(obs)
    expected = agent.q(hidden[:, :512])
    if dueling:
        expected += agent.v(hidden[:, 512:]) - expected.mean(-1, keepdim=True)
        torch.testing.assert_close(q_values.mean(-1, keepdim=True), agent.v(hidden[:, 512:]))
    torch.testing.assert_close(q_values, expected)
    agent.bf16 = True
    low = agent(obs)
    assert low.dtype == torch.float32 and not low.equal(q_values)
    torch.testing.assert_close(low, q_values, atol=0.02, rtol=0.1)


@pytest.mark.parametrize("script", FRAMES)
def test_a_buffer_that_does_not_fit_is_refused(script, call, tmp_path):
    done = call(script, *arguments(script), "--buffer-size", 10**12)
    assert done.code == 2 and done.err.count("\n") == 1 and not any(tmp_path.iterdir())
    assert "--buffer-size" in done.err and "7089000.0 GB" in done.err
