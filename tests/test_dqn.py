"""DQN and its replay: buffers, priorities and losses against brute force, a run against what really happened.

What SAC and its relatives have too (replay, when to update) is tested here for all.
"""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import having, load, make_agent, make_args
from environments import Counter
from gymnasium.spaces import Box, Discrete
from test_ppo import truth
from torch.nn.utils import parameters_to_vector

REPLAY, ACTOR = having("ReplayBuffer"), [*having("actor_loss"), *having("sac_loss")]
DQN = [name for name in REPLAY if name not in ACTOR]
TARGET_ACTOR = [name for name in ACTOR if name in REPLAY and hasattr(load(name).Args, "tau")]
NAMES = "double_dqn_loss", "dqn_loss", "qr_dqn_loss", "critic_loss", "sac_loss"
UTD = [name for name in REPLAY if hasattr(load(name).Args, "utd")]  # in place of train_frequency, gradient_steps
IN_ROUNDS = [name for name in REPLAY if name not in UTD]
LOSSES = {name: loss for loss in NAMES for name in having(loss) if name in REPLAY}
per = load("dqn_per")  # the buffers of frames: test_dqn_atari.py

NEVER = 10**9  # a frequency that is never reached


def spaces(N: int) -> SimpleNamespace:
    """What a replay buffer asks of its environments."""
    return SimpleNamespace(num_envs=N, single_observation_space=Box(-1, 1, (2,)), single_action_space=Discrete(5))


def fits(counts: np.ndarray, probabilities: np.ndarray) -> bool:
    """Chi-square, five standard deviations above its mean."""
    expected, freedom = counts.sum() * probabilities, len(counts) - 1
    assert expected.min() > 5
    return ((counts - expected) ** 2 / expected).sum() < freedom + 5 * np.sqrt(2 * freedom) + 10


def through_a_file(replay, path):
    """state_dict() as a checkpoint gives it back."""
    torch.save(replay.state_dict(), path)
    return torch.load(path, weights_only=True)


# ------------------------------------------------------------------------------------------------------------- uniform


def fill(replay, N: int, steps: range) -> None:
    """Transition k has obs (k, 0), action k % 5, reward -k, next_obs (k, 1)."""
    for step in steps:
        k = N * step + np.arange(N)
        replay.add(np.stack([k, 0 * k], 1), k % 5, -k, np.stack([k, 0 * k + 1], 1), k % 3 == 0)


@pytest.mark.parametrize("script", [name for name in REPLAY if name != "dqn_per"])
@pytest.mark.parametrize("N, size", [(1, 1), (1, 20), (3, 10), (4, 7)])
@pytest.mark.parametrize("steps", [1, 2, 3, 50])
def test_replay_holds_the_last_transitions_whole(script, N, size, steps, tmp_path, rng):
    """Also one that was loaded before the last step."""
    replay, other = (load(script).ReplayBuffer(size, spaces(N)) for _ in range(2))
    fill(replay, N, range(steps - 1))
    other.load_state_dict(through_a_file(replay, tmp_path / "state"))
    samples = []
    for one in (replay, other):
        fill(one, N, range(steps - 1, steps))
        np.random.seed(1)
        samples.append(one.sample(20_000, "cpu"))
    torch.testing.assert_close(*samples, rtol=0, atol=0)
    obs, actions, rewards, next_obs, terminations = (x.numpy() for x in samples[0])
    k = obs[:, 0]
    np.testing.assert_array_equal(obs, np.stack([k, 0 * k], 1))
    np.testing.assert_array_equal(next_obs, np.stack([k, 0 * k + 1], 1))
    assert (actions == k % 5).all() and (rewards == -k).all() and (terminations == (k % 3 == 0)).all()
    filled = min(steps * N, size - size % N)
    counts = np.bincount(k.astype(int), minlength=steps * N)
    assert counts[: steps * N - filled].sum() == 0 and fits(counts[steps * N - filled :], np.full(filled, 1 / filled))


# ------------------------------------------------------------------------------------------- windows of n transitions


class World:
    """N environments with random ends and restarts, which fill a prioritized buffer; every transition has a number."""

    def __init__(self, replay, N: int, rng, done: float, restart: float):
        self.replay, self.N, self.rng, self.done, self.restart, self.history = replay, N, rng, done, restart, []

    def step(self) -> None:
        """Transition k: obs (k, 0), reward k, next_obs (k, 1)."""
        if self.history and self.rng.random() < self.restart:
            self.replay.end_episodes()
            self.history[-1].last[:] = True
        k = len(self.history) * self.N + np.arange(self.N)
        dones = self.rng.random(self.N) < self.done
        terminations = dones & (self.rng.random(self.N) < 0.5)
        self.replay.add(np.stack([k, 0 * k], 1), k % 5, k, np.stack([k, 0 * k + 1], 1), terminations, dones)
        self.history.append(SimpleNamespace(terminations=terminations, last=dones.copy()))


@pytest.mark.parametrize("n_step", [1, 3, 6])
@pytest.mark.parametrize("done, restart", [(0.0, 0.0), (0.3, 0.1), (1.0, 0.0)])
def test_windows_equal_their_definition(n_step, done, restart, rng):
    """Every stored transition at every moment, over three times round; gamma 0.5 keeps the sums exact."""
    N, size, lengths = 3, 31, set()
    replay = per.ReplayBuffer(make_args("dqn_per", buffer_size=size, n_step=n_step, gamma=0.5), spaces(N))
    world = World(replay, N, rng, done, restart)
    for step in range(1, 32):
        world.step()
        filled = min(step * N, size - size % N)
        batch = replay.windows(np.arange(filled))
        first = batch[0][:, 0].astype(int)
        assert sorted(first) == list(range(step * N - filled, step * N))
        assert [x.dtype for x in batch[2:4]] == [np.float32] * 2
        for k, obs, action, window_return, discount, next_obs, terminated in zip(first, *batch, strict=True):
            window = [k]
            while len(window) < n_step and not world.history[window[-1] // N].last[k % N]:
                if window[-1] + N >= step * N:  # the newest transition
                    break
                window.append(window[-1] + N)
            lengths.add(len(window))
            assert obs.tolist() == [k, 0] and action == k % 5
            assert window_return == sum(0.5**j * reward for j, reward in enumerate(window))
            assert discount == 0.5 ** len(window) and next_obs.tolist() == [window[-1], 1]
            assert terminated == world.history[window[-1] // N].terminations[k % N]
    assert lengths == ({1} if done == 1 else set(range(1, n_step + 1)))


# ------------------------------------------------------------------------------------------------------------- sum tree


@pytest.mark.parametrize("size", [1, 2, 7, 8, 1000])
def test_sum_tree_is_a_list(size, rng):
    """Whole numbers, so that every sum is exact: also masses on the border of two leaves have one right answer."""
    tree, leaves = per.SumTree(size), np.zeros(size)
    for _ in range(30):
        changed = rng.integers(size, size=rng.integers(1, 20))  # often the same leaf twice
        values = rng.integers(4, size=len(changed)) * rng.integers(2, size=len(changed))
        for leaf, value in zip(changed, values):
            leaves[leaf] = value
        tree.set(changed, values)
        assert tree.sums[1] == leaves.sum()
        masses = np.arange(0, leaves.sum(), 0.5)
        assert tree.find(masses).tolist() == np.searchsorted(leaves.cumsum(), masses, side="right").tolist()


def test_sum_tree_does_not_drift(rng):
    """A million changes over twelve orders of magnitude."""
    tree, leaves = per.SumTree(1000), np.zeros(1000)
    for _ in range(1000):
        changed = rng.integers(1000, size=1000)
        leaves[changed] = 10 ** rng.uniform(-6, 6, size=1000) * (rng.random(1000) < 0.9)
        tree.set(changed, leaves[changed])
    assert tree.sums[1] == pytest.approx(math.fsum(leaves), rel=1e-9)
    tree.set(np.arange(1000), np.zeros(1000))
    assert tree.sums[1] == 0


@pytest.mark.parametrize("size, share", [(7, 0.3), (7, 0.8), (1000, 0.02), (1000, 0.5)])
def test_a_leaf_of_zero_is_never_found(size, share, rng):
    """Also by a mass that rounding has pushed to the very end, or beyond."""
    for _ in range(20):
        tree = per.SumTree(size)
        values = 10 ** rng.uniform(-8, 8, size=size) * (rng.random(size) < share)
        values[rng.integers(size)] = 0.1
        tree.set(np.arange(size), values)
        total, borders = tree.sums[1], values.cumsum()
        edges = [0.0, np.nextafter(total, 0), total, 1.001 * total]
        found = tree.find(np.concatenate([edges, borders, np.nextafter(borders, 0), np.nextafter(borders, np.inf)]))
        assert found.max() < size and (values[found] > 0).all()


# ----------------------------------------------------------------------------------------------------------- priorities


def prioritized(size: int, rng, steps: int | None = None, **flags):
    """A buffer of one environment without ends, and the |TD errors| that were given to its rows."""
    replay = per.ReplayBuffer(make_args("dqn_per", buffer_size=size, **flags), spaces(1))
    world = World(replay, 1, rng, 0, 0)
    for _ in range(steps or 2 * size):
        world.step()
    errors = rng.exponential(size=steps or size).astype(np.float32)
    replay.update(np.arange(len(errors)), errors * rng.choice([-1, 1], size=len(errors)).astype(np.float32))
    np.random.seed(1)
    return replay, errors.astype(float)


@pytest.mark.parametrize(
    "size, steps, alpha, samples",
    [(7, 14, 0.6, 20), (7, 14, 1.0, 20), (1000, 1500, 0.6, 500), (7, 14, 0.0, 20), (50, 9, 0.6, 20)],
)
def test_frequencies_follow_the_priorities(size, steps, alpha, samples, rng):
    """Also of a buffer that is not full."""
    steps = steps if steps < size else None
    replay, errors = prioritized(size, rng, steps, per_alpha=alpha, per_eps=0.1)
    counts = sum(np.bincount(replay.sample(1000, 0.5)[0], minlength=len(errors)) for _ in range(samples))
    share = (errors + 0.1) ** alpha
    assert fits(counts, share / share.sum())


def test_each_sample_comes_from_its_share(rng):
    """Stratified: of B samples the b-th falls into the b-th of B equal parts, anywhere in it."""
    replay, errors = prioritized(50, rng, per_alpha=1.0, per_eps=0.1)
    borders = (errors + 0.1).cumsum()
    sampled = np.array([replay.sample(10, 0.5)[0] for _ in range(200)])
    assert (borders[sampled] > borders[-1] * np.arange(10) / 10 - 1e-9).all()
    assert (borders[sampled] - errors[sampled] - 0.1 < borders[-1] * np.arange(1, 11) / 10 + 1e-9).all()
    assert set(sampled[:, 0]) == set(range(np.searchsorted(borders, borders[-1] / 10) + 1))


def test_weights_make_up_for_the_priorities(rng):
    replay, errors = prioritized(100, rng, per_alpha=0.6, per_eps=0.01)
    share = (errors + 0.01) ** 0.6 / ((errors + 0.01) ** 0.6).sum()
    for beta in (0.0, 0.4, 1.0):
        rows, weights = replay.sample(64, beta)
        expected = (100 * share[rows]) ** -beta
        assert weights.dtype == np.float32
        np.testing.assert_allclose(weights, expected / expected.max(), rtol=1e-5)


def test_new_transitions_have_the_largest_priority_so_far(rng):
    replay = per.ReplayBuffer(make_args("dqn_per", buffer_size=8, per_alpha=0.5, per_eps=0.25), spaces(2))
    world = World(replay, 2, rng, 0.5, 0)

    def priorities(count: int) -> list[float]:
        return replay.tree.sums[replay.tree.first_leaf :][:count].tolist()

    world.step()
    assert priorities(4) == [1, 1, 0, 0]
    replay.update(np.array([0, 1]), np.array([-3.75, 0.0]))
    world.step()
    assert priorities(4) == [2, 0.5, 2, 2]
    replay.update(np.arange(4), np.zeros(4))
    world.step()
    assert priorities(6) == [0.5, 0.5, 0.5, 0.5, 2, 2]  # the largest ever, not the largest there is


@pytest.mark.filterwarnings("error")
def test_errors_that_are_no_numbers_leave_the_tree_whole(rng):
    """So that a run that diverges gets as far as the check that reports it."""
    replay, _ = prioritized(20, rng)
    replay.update(np.arange(3), np.array([np.nan, np.inf, 3e38], np.float32))
    rows, weights = replay.sample(64, 0.5)
    assert rows.max() < 20 and np.isfinite(weights).all() and np.isfinite(replay.tree.sums).all()


# ------------------------------------------------------------------------------------------------------ loss and target


def transitions(B: int) -> tuple[torch.Tensor, ...]:
    """obs, actions, rewards, next_obs, terminations; many errors are above 1, where a clipped loss would differ."""
    return torch.randn(B, 3), torch.randint(4, (B,)), 2 * torch.randn(B), torch.randn(B, 3), torch.rand(B) < 0.3


def assert_same_gradient(loss, expected, agent, target) -> None:
    """In the agent's parameters; the target has none."""
    ours = torch.autograd.grad(loss, list(agent.parameters()), retain_graph=True)
    torch.testing.assert_close(ours, torch.autograd.grad(expected, list(agent.parameters())))
    assert max(gradient.abs().max() for gradient in ours) > 1e-3
    assert not any(x is not None for x in torch.autograd.grad(loss, list(target.parameters()), allow_unused=True))


def test_dqn_loss_equals_its_definition(rng):
    (agent, args), (target, _) = make_agent("dqn", gamma=0.9), make_agent("dqn")
    obs, actions, rewards, next_obs, terminations = transitions(60)
    loss, metrics = load("dqn").dqn_loss(agent, target, args, obs, actions, rewards, next_obs, terminations)
    values = [agent(obs[b])[actions[b]] for b in range(60)]
    futures = [0 if terminations[b] else 0.9 * max(target(next_obs[b]).tolist()) for b in range(60)]
    expected = sum((q - (reward + future)) ** 2 for q, reward, future in zip(values, rewards, futures)) / 60
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(list(metrics.values()), [expected.detach(), torch.stack(values).mean().detach()])
    assert_same_gradient(loss, expected, agent, target)


@pytest.mark.parametrize("dueling", [False, True])
def test_double_dqn_loss_equals_its_definition(dueling, rng):
    """Weights multiply before the mean; the online network chooses, the target network evaluates."""
    agent, target = (make_agent("dqn_per", dueling=dueling)[0] for _ in range(2))
    obs, actions, returns, next_obs, terminations = transitions(60)
    discounts, weights = torch.rand(2, 60)
    batch = obs, actions, returns, discounts, next_obs, terminations, weights
    loss, td_errors, metrics = per.double_dqn_loss(agent, target, *batch)
    values, errors, differ = [], [], 0
    for b in range(60):
        chosen = agent(next_obs[b]).argmax().item()
        differ += chosen != target(next_obs[b]).argmax().item()
        future = 0.0 if terminations[b] else discounts[b] * target(next_obs[b])[chosen].item()
        values.append(agent(obs[b])[actions[b]])
        errors.append(returns[b] + future - values[-1])
    expected = sum(weights[b] * errors[b] ** 2 for b in range(60)) / 60
    assert differ > 5 and not td_errors.requires_grad
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(td_errors, torch.stack(errors).detach())
    torch.testing.assert_close(list(metrics.values()), [expected.detach(), torch.stack(values).mean().detach()])
    assert_same_gradient(loss, expected, agent, target)


def test_dueling_head(rng):
    agent, _ = make_agent("dqn_per", dueling=True)
    obs = torch.randn(20, 3)
    value, advantages = agent.v(agent.body(obs)), agent.q(agent.body(obs))
    torch.testing.assert_close(agent(obs), value + advantages - sum(advantages.T)[:, None] / 4)
    assert len(make_agent("dqn_per", dueling=False)[0].state_dict()) < len(agent.state_dict())


@pytest.mark.parametrize("script", [*DQN, "pqn"])
def test_greedy_actions(script, rng):
    agent, _ = make_agent(script)
    obs = torch.randn(50, 3)
    assert agent.act(obs).tolist() == [row.index(max(row)) for row in agent(obs).tolist()]


# ------------------------------------------------------------------------------------------------------ what a run does


@pytest.fixture
def watch(train, monkeypatch):
    """watch(script, look, **flags): a run on counters in which look(...) sees the arguments of the loss before it."""

    def watch(script: str, look=None, **flags) -> None:
        module = load(script)
        original = getattr(module, LOSSES[script])
        monkeypatch.setattr(module, LOSSES[script], lambda *args: (look and look(*args), original(*args))[1])
        train(script, **{"learning_starts": 0, "buffer_size": 1000} | flags)

    return watch


@pytest.mark.parametrize("script, n_step", [*((name, 1) for name in REPLAY), ("dqn_per", 3)])
@pytest.mark.parametrize("buffer_size", [1000, 60])
def test_batches_hold_what_happened(script, n_step, buffer_size, watch):
    """Three environments, four restarts, both kinds of end: no transition and no window across either."""
    N, seen = 3, set()

    def look(*given):
        given = [x.numpy() for x in given if isinstance(x, torch.Tensor)]
        if script == "dqn_per":
            obs, actions, returns, discounts, next_obs, terminations, _ = given
            k = np.round(np.log(discounts) / np.log(0.9)).astype(int)
        else:
            (obs, actions, returns, next_obs, terminations), k = given[-5:], np.ones(len(given[-1]), int)
        if script.endswith("_continuous"):
            actions = np.clip(actions * [2, 1.25] + [1, -0.75], [-1, -2], [3, 0.5])
        first, last = truth(obs), truth(obs + np.outer(k - 1, [0, 0, 1]))
        np.testing.assert_allclose(actions, first.actions, atol=1e-6)
        np.testing.assert_array_equal(next_obs, last.next_obs)
        np.testing.assert_array_equal(terminations, last.terminations)
        expected = [sum(0.9**j * (reward + j) for j in range(n)) for reward, n in zip(first.rewards, k)]
        np.testing.assert_allclose(returns, expected, rtol=1e-5)
        newest = [Counter.made[int(env)].observe() for env in obs[:, 0]]
        episode_is_over = next_obs[:, 1] != np.array(newest)[:, 1]
        assert ((k == n_step) | last.dones | (~episode_is_over & (next_obs[:, 2] == np.array(newest)[:, 2]))).all()
        seen.update(map(tuple, obs.tolist()))

    flags = {"num_envs": N, "total_timesteps": 70 * N, "checkpoint_every": 51, "train_frequency": N, "n_step": n_step}
    watch(script, look, buffer_size=buffer_size, batch_size=64, gamma=0.9, norm_obs=False, norm_reward=False, **flags)
    assert len(Counter.made) == 5 * N + 1 and len(seen) > 190  # of 210


@pytest.mark.parametrize("script", IN_ROUNDS)
@pytest.mark.parametrize(
    "N, train_frequency, gradient_steps, learning_starts",
    [(3, 4, 2, 0), (3, 7, 1, 50), (3, 3, 3, 49), (1, 4, 1, 10), (5, 7, 1, 20)],
)
def test_updates_are_counted_in_environment_steps(script, N, train_frequency, gradient_steps, learning_starts, watch):
    updates = []
    flags = {"num_envs": N, "train_frequency": train_frequency, "gradient_steps": gradient_steps, "batch_size": 4}
    flags |= {"learning_starts": learning_starts, "total_timesteps": 210}
    watch(script, lambda *_: updates.append(N * Counter.made[0].steps), **flags)
    steps = [step for step in range(N, 211, N) if step > learning_starts]
    due = [step for step in steps if step // train_frequency > (step - N) // train_frequency]
    assert updates == [step for step in due for _ in range(gradient_steps)]


DQN_CASES = [(name, *case) for name in DQN for case in [(3, 7, 0.25), (3, 3, 1.0), (1, 15, 1.0)]]


@pytest.mark.parametrize("script, N, frequency, tau", [*DQN_CASES, *((name, 3, 0, 0.02) for name in TARGET_ACTOR)])
def test_target_begins_as_a_copy_and_moves_when_due(script, N, frequency, tau, watch):
    """By tau, with a separate actor after every update, of which there are several in a row."""
    updates, seen = 1 if frequency else N if script in UTD else 2, []

    def look(agent, target, *_):
        nets = agent if type(target) is type(agent) else agent.critics, target  # of DQN, or of actor and critics too
        seen.append([parameters_to_vector(net.parameters()).detach().clone() for net in nets])

    flags = {"num_envs": N, "total_timesteps": 40 * N, "train_frequency": N, "gradient_steps": updates, "batch_size": 4}
    flags |= {"target_network_frequency": frequency, "policy_frequency": 1}
    watch(script, look, tau=tau, learning_rate=0.01, q_lr=0.01, **flags)
    assert len(seen) == 40 * updates and seen[0][0].equal(seen[0][1])
    assert script in DQN or not torch.equal(*seen[0][0].chunk(2))  # the two critics begin different
    moved = 0
    for i in range(1, len(seen)):  # in DQN before the update at step (i + 1) N
        agent, (before, old), target = seen[i][0], seen[i - 1], seen[i][1]
        assert not agent.equal(before)
        if not frequency or i * N // frequency > (i - 1) * N // frequency:
            torch.testing.assert_close(target, (1 - tau) * old + tau * agent)
            moved += 1
        else:
            assert target.equal(old)
    assert not frequency or moved == 39 * N // frequency


def act_one(script: str, monkeypatch) -> None:
    """The greedy action is 1."""
    monkeypatch.setattr(load(script).Agent, "act", lambda self, obs: torch.ones(len(obs), dtype=torch.int64))


def is_share(actions: np.ndarray, expected: float) -> bool:
    """That of action 1, to four standard deviations."""
    return abs(actions.mean() - expected) < 4 * np.sqrt(expected * (1 - expected) / actions.size) + 1e-12


@pytest.mark.parametrize("script", DQN)
def test_epsilon_greedy(script, watch, monkeypatch):
    """The greedy action is 1. At first half of all actions, each environment by itself; then epsilon is annealed."""
    act_one(script, monkeypatch)
    flags = {"num_envs": 4, "total_timesteps": 8000, "train_frequency": NEVER, "learning_starts": 1000}
    watch(script, start_e=0.8, end_e=0.0, exploration_fraction=0.5, **flags)
    actions = np.array([env.actions for env in Counter.made[:4]])  # (N, T)
    for eighth, epsilon in enumerate((1.0, 0.5, 0.3, 0.1, 0.0, 0.0, 0.0, 0.0)):
        assert is_share(actions[:, 250 * eighth : 250 * (eighth + 1)], 1 - epsilon / 2)
    assert np.abs(np.corrcoef(actions[:, :250]) - np.eye(4)).max() < 0.25


def test_priorities_are_of_what_was_sampled(watch, spy, monkeypatch):
    """Weights and new priorities belong to the rows of each update; beta is annealed from per_beta to 1."""
    given, loss_fn = [], per.double_dqn_loss
    samples, windows, updates = (spy(per.ReplayBuffer, name) for name in ("sample", "windows", "update"))

    def loss(*batch):
        given.append((batch[2:], loss_fn(*batch)))
        return given[-1][1]

    monkeypatch.setattr(per, "double_dqn_loss", loss)
    flags = {"num_envs": 3, "total_timesteps": 300, "train_frequency": 3, "gradient_steps": 2, "buffer_size": 60}
    watch("dqn_per", per_alpha=0.7, per_beta=0.3, per_eps=0.01, batch_size=16, **flags)
    assert len(samples) == len(given) == len(updates) == len(windows) == 200
    for i in range(200):
        (sampled, (rows, weights)), (looked_up, window), (update, _) = samples[i], windows[i], updates[i]
        *batch, (_, td_errors, _) = *given[i][0], given[i][1]
        assert looked_up["rows"] is rows and update["rows"] is rows
        for x, y in zip(batch, [*window, weights], strict=True):
            np.testing.assert_array_equal(x.numpy(), y)
        np.testing.assert_array_equal(update["td_errors"], td_errors.numpy())
        assert sampled["beta"] == pytest.approx(0.3 + 0.7 * (i // 2 * 3) / 300)
    tree = updates[-1][0]["self"].tree
    expected = (np.abs(td_errors.numpy().astype(float)) + 0.01) ** 0.7
    np.testing.assert_allclose(tree.sums[tree.first_leaf + rows], expected, rtol=1e-6)
