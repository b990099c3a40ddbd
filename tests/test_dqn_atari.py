"""DQN and SAC on Atari: the frame buffer against a naive one, n-step windows against their definition, what a run does.

Functions whose text is that of the vector scripts are tested there; of those that several scripts share, one.
"""

import numpy as np
import pytest
import torch
from conftest import arguments, episodes, having, load, make_agent, make_args, saved_agent
from environments import FakeChoices, FakeGames
from test_dqn import fits, is_share, through_a_file
from test_ppo import inputs

LOSSES = {"dqn_atari": "dqn_loss", "dqn_per_atari": "double_dqn_loss", "rainbow_atari": "rainbow_loss"}
PER, DQN = having("n_step_windows"), list(LOSSES)
LOSSES["sac_atari"] = "sac_loss"  # the loss itself: test_sac.py
dqn, per, _, sac = map(load, LOSSES)


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
    args, lengths = make_args("dqn_per_atari", n_step=n_step, gamma=0.5), set()
    world = World(per.FrameBuffer(60, 3), rng, done, restart)
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


@pytest.mark.parametrize("script", PER)
def test_priorities_are_of_what_can_be_sampled(script, tmp_path, rng):
    """Those of new transitions are the largest so far, those of forgotten ones 0; also after a checkpoint."""

    def priorities_of(replay) -> np.ndarray:
        return replay.tree.sums[replay.tree.first_leaf :][:60] if hasattr(replay, "tree") else replay.priorities

    Buffer = load(script).PrioritizedBuffer
    world, expected, largest = World(Buffer(60, 3), rng, 0.1, 0.05), {}, 1.0
    for step in range(80):
        if step % 9 == 8:
            saved, world.replay = through_a_file(world.replay, tmp_path / "state"), Buffer(60, 3)
            world.replay.load_state_dict(saved)
        k, replay = world.step(), world.replay
        expected = {x: expected.get(x, largest) for x in k.tolist()}
        found = priorities_of(replay)
        np.testing.assert_allclose(found[k % 60], list(expected.values()))
        assert np.count_nonzero(found) == len(k)
        rows, priorities = replay.sample(16, 0.5)[0], rng.random(16) * (1 + step / 20)
        replay.update(rows, priorities)
        expected |= {x: found[x % 60] for x in k.tolist() if x % 60 in rows}
        largest = max(largest, priorities.max())
    rows, weights = replay.sample(20_000, 0.4)
    p = found / found.sum()
    assert fits(np.bincount(rows, minlength=60)[p > 0], p[p > 0]) and (p[rows] > 0).all()
    np.testing.assert_allclose(weights, (p[rows] / p[p > 0].min()) ** -0.4, rtol=1e-5)


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
@pytest.mark.parametrize("script, n_step", [*((script, 1) for script in LOSSES), *((script, 3) for script in PER)])
def test_batches_hold_what_happened(script, n_step, life_loss, train, games, monkeypatch):
    """Three games, three restarts, both kinds of end, lost lives: whole stacks, and no window across an end."""
    seen, ended = set(), set()

    def look(agent, target, *given):
        obs, actions, returns, *discounts, next_obs, terminations = given[:6] if script in PER else given[-5:]
        for i, (game, t, n, restart) in enumerate(obs[:, -1, 0, :4].tolist()):
            k = round(np.log(discounts[0][i].item()) / np.log(0.9)) if script in PER else 1
            made, length, end = FakeGames.made[restart - 1], 10 + n, t + k
            for stack, last in ((obs[i], t), (next_obs[i], end)):
                shown = [[game, x, n, restart] if x >= 0 else [0] * 4 for x in range(last - 3, last + 1)]
                assert stack[:, 0, :4].tolist() == shown
            assert actions[i] == made.actions[game * length + t][n]
            assert returns[i].item() == pytest.approx(sum(0.9**j for j in range(k)))
            over, lost, newest = end == length, life_loss and end in (4, 7), game * length + end == len(made.actions)
            assert terminations[i] == (over and game % 2 == 0 or lost)
            assert k == n_step or over or lost or newest
            assert not life_loss or not {4, 7} & set(range(t + 1, end))
            seen.add((game, t, n, restart))
            ended.add((over, game % 2, lost, newest and restart < len(FakeGames.made)))
        return next(agent.parameters()).sum(), *[torch.zeros(24)] * (script in PER), {}

    games(script, FakeGames)
    monkeypatch.setattr(load(script), LOSSES[script], look)
    flags = {"num_envs": 3, "total_timesteps": 300, "checkpoint_every": 75, "train_frequency": 3, "learning_starts": 0}
    flags |= {"n_step": n_step, "batch_size": 24, "gamma": 0.9, "buffer_size": 90, "life_loss": life_loss}
    train(script, **flags)
    assert len(FakeGames.made) == 4 + 1 and len(seen) > 260  # of 300
    kinds = {(True, 0, False, False), (True, 1, False, False), (False, 0, life_loss, False), (False, 0, False, True)}
    assert kinds <= ended


def test_priorities_follow_the_errors(train, games, spy):
    """Weights and new priorities belong to the rows of each update; beta is annealed to 1."""
    games("dqn_per_atari", FakeGames)
    losses = spy(per, "double_dqn_loss")
    samples, updates = (spy(per.PrioritizedBuffer, name) for name in ("sample", "update"))
    flags = {"num_envs": 2, "train_frequency": 2, "learning_starts": 0, "total_timesteps": 40}
    train("dqn_per_atari", per_beta=0.4, per_alpha=0.3, per_eps=0.01, **flags)
    assert [x["beta"] for x, _ in samples] == pytest.approx(np.linspace(0.4, 1, 21)[:-1])
    for (batch, (_, errors, _)), (update, _), (_, (rows, weights)) in zip(losses, updates, samples, strict=True):
        assert update["rows"] is rows
        np.testing.assert_allclose(update["priorities"], (errors.abs().numpy() + 0.01) ** 0.3, rtol=1e-4)
        np.testing.assert_array_equal(batch["weights"], weights)


@pytest.mark.parametrize("frequency, tau", [(7, 1.0), (3, 0.25), (30, 0.5)])
@pytest.mark.parametrize("script", LOSSES)
def test_updates_and_targets_are_due(script, frequency, tau, train, games, monkeypatch):
    """In steps of all environments, also where three at a time jump over a multiple. DQN copies: its tau is 1."""
    seen, steps, updates = [], [], 1 if script == "rainbow_atari" else 2
    tau = tau if script == "sac_atari" else 1.0

    def look(agent, target, *_):
        nets = agent.critics if script == "sac_atari" else agent, target
        seen.append([torch.cat([x.detach().flatten() for x in net.parameters()]) for net in nets])
        steps.append(FakeGames.made[0].steps)
        return sum(x.square().sum() for x in agent.parameters()), *[torch.zeros(8)] * (script in PER), {}

    games(script, FakeGames)
    monkeypatch.setattr(load(script), LOSSES[script], look)
    flags = {"num_envs": 3, "total_timesteps": 120, "train_frequency": 8, "gradient_steps": 2, "learning_starts": 8}
    train(script, target_network_frequency=frequency, tau=tau, batch_size=8, **flags)
    assert steps == [step for step in range(9, 121, 3) if step // 8 > (step - 3) // 8 for _ in range(updates)]
    assert seen[0][0].equal(seen[0][1])
    assert script in DQN or not torch.equal(*seen[0][0].chunk(2))  # the two critics begin different
    for i in range(1, len(seen)):
        (online, target), (before, expected) = seen[i], seen[i - 1]
        for step in range(steps[i - 1], steps[i], 3):  # those after which it moves before this update
            expected = expected.lerp(online, tau) if step // frequency > (step - 3) // frequency else expected
        torch.testing.assert_close(target, expected)
        assert not online.equal(before)


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


def test_sac_explores(train, games, monkeypatch):
    """First actions are uniform. Those of the policy follow, here always 1. The evaluation samples, too."""
    monkeypatch.setattr(sac.Agent, "sample", lambda self, obs: torch.ones(len(obs), dtype=torch.int64))
    games("sac_atari", FakeGames)
    folder = train("sac_atari", num_envs=4, total_timesteps=2000, learning_starts=1000, train_frequency=10**9)
    actions = np.array(FakeGames.made[0].actions)
    assert fits(np.bincount(actions[:250].flatten(), minlength=3), np.full(3, 1 / 3)) and (actions[250:] == 1).all()
    assert np.abs(np.corrcoef(actions[:250].T) - np.eye(4)).max() < 0.25
    assert saved_agent("sac_atari", folder)[0].act(torch.zeros(5, 1)).tolist() == [1] * 5


@pytest.mark.parametrize("script", LOSSES)
def test_images_are_learned(script, train, games):
    """Which of three bands of the newest frame is bright tells the action that pays: 8 steps at 7, by chance near 3."""
    flags = {"num_envs": 4, "train_frequency": 4, "total_timesteps": 1300, "learning_starts": 100, "batch_size": 32}
    flags |= {"target_network_frequency": 50, "gamma": 0.5, "end_e": 0.05, "exploration_fraction": 0.5}
    flags |= {"policy_lr": 3e-4, "autotune": False, "alpha": 0.2}
    games(script, FakeChoices)
    folder = train(script, eval_episodes=4, **flags)
    returns = [episode_return for _, episode_return, _ in episodes(folder)]
    assert np.mean(returns[:20]) < 25 and np.mean(returns[-20:]) > 45
    agent, _ = saved_agent(script, folder)
    fake = FakeChoices(3)
    fake.right = np.arange(3)
    net = agent.actor if script == "sac_atari" else agent
    assert net(torch.from_numpy(fake.observe())).argmax(-1).tolist() == [0, 1, 2]


@pytest.mark.parametrize("script, dueling", [("dqn_atari", False), ("dqn_per_atari", False), ("dqn_per_atari", True)])
def test_the_network(script, dueling, rng):
    """Bytes / 255; bfloat16 only in the trunk."""
    agent, _ = make_agent(script, bf16=False, dueling=dueling)
    obs, _ = inputs(script, 6)
    hidden, q_values = agent.trunk(obs.float() / 255), agent(obs)
    expected = agent.q(hidden[:, :512])
    if dueling:
        expected += agent.v(hidden[:, 512:]) - expected.mean(-1, keepdim=True)
    torch.testing.assert_close(q_values, expected)
    agent.bf16 = True
    low = agent(obs)
    assert low.dtype == torch.float32 and not low.equal(q_values)
    torch.testing.assert_close(low, q_values, atol=0.02, rtol=0.1)


def test_the_networks_of_sac(rng):
    """Bytes / 255; bfloat16 only in the trunks; actor and critics share nothing."""
    agent, _ = make_agent("sac_atari", bf16=False)
    obs, _ = inputs("sac_atari", 6)
    nets = agent.actor, agent.critics.qf1, agent.critics.qf2
    expected = torch.stack([net.head(net.trunk(obs.float() / 255)) for net in nets])
    torch.testing.assert_close(agent.critics(obs), expected[1:])
    torch.testing.assert_close(agent.logprobs(obs), expected[0].log_softmax(-1))
    assert len({id(x) for net in nets for x in net.parameters()}) == 30 and not expected[1].equal(expected[2])
    for net, full in zip(nets, expected):
        net.bf16 = True
        assert net(obs).dtype == torch.float32 and not net(obs).equal(full)
        torch.testing.assert_close(net(obs), full, atol=0.02, rtol=0.1)


def test_a_buffer_that_does_not_fit_is_refused(call, tmp_path):
    done = call("dqn_atari", *arguments("dqn_atari"), "--buffer-size", 10**12)
    assert done.code == 2 and "--buffer-size" in done.err and not any(tmp_path.iterdir())
