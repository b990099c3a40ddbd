"""DQN and what it remembers: replay, priorities and losses against brute force, a run against what really happened."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import SCRIPTS, counter_id, load, make_agent, make_args
from environments import Counter
from gymnasium.spaces import Box, Discrete

REPLAY = [name for name in SCRIPTS if hasattr(load(name), "Replay")]
SINGLE = [name for name in SCRIPTS if hasattr(load(name), "dqn_loss")]
DOUBLE = [name for name in SCRIPTS if hasattr(load(name), "double_dqn_loss")]
PER = [name for name in SCRIPTS if hasattr(load(name), "SumTree")]
DQN = SINGLE + DOUBLE
EZ = [name for name in SCRIPTS if hasattr(load(name), "hold")]
FAST = [name for name in SCRIPTS if hasattr(load(name), "fast_act")]

dqn = load("dqn")  # for what has the same text in every script

NEVER = 10**9  # a frequency that is never reached


def loss_name(script: str) -> str:
    return "dqn_loss" if script in SINGLE else "double_dqn_loss"


def spaces(N: int, num_inputs: int = 3, action_space=None) -> SimpleNamespace:
    """What a replay asks of its environments."""
    space = action_space or Discrete(5)
    return SimpleNamespace(num_envs=N, single_observation_space=Box(-1, 1, (num_inputs,)), single_action_space=space)


class World:
    """N environments with random ends that fill a replay, and the list of all that happened in each.

    Observation: environment, episode, t. Reward: a number of its own for each transition, by which it is found again.
    """

    def __init__(self, replay, rng, end: float = 0.0, cut: float = 0.0):
        self.replay, self.rng, self.end, self.cut, self.N = replay, rng, end, cut, replay.N
        self.episode, self.t, self.count, self.cuts = np.zeros(self.N), np.zeros(self.N), 0, 0
        self.happened = [[] for _ in range(self.N)]  # of each: obs, action, reward, next_obs, terminated, is the last

    def observe(self) -> np.ndarray:
        return np.stack([np.arange(self.N), self.episode, self.t], 1)

    def step(self) -> list[np.ndarray]:
        """One step, sometimes after a cut of all episodes; returns the rows that the replay says it changed."""
        changed = []
        if self.count and self.rng.random() < self.cut:
            changed.append(self.replay.cut())
            self.cuts += 1
            self.episode, self.t = self.episode + 1, np.zeros(self.N)
            for one in self.happened:
                one[-1]["last"] = True
        obs = self.observe()
        self.t = self.t + 1
        reached, actions = self.observe(), self.rng.integers(5, size=self.N)
        rewards = self.count * self.N + np.arange(self.N) + 1.0
        dones = self.rng.random(self.N) < self.end
        terminations = dones & (self.rng.random(self.N) < 0.5)
        changed.append(self.replay.add(obs, actions, rewards, reached, terminations, dones))
        for i in range(self.N):
            names = "obs", "action", "reward", "next_obs", "terminated", "last"
            row = obs[i], actions[i], rewards[i], reached[i], terminations[i], dones[i]
            self.happened[i].append(dict(zip(names, row, strict=True)))
        self.episode, self.t = self.episode + dones, self.t * ~dones
        self.count += 1
        return changed

    def find(self, reward: float) -> tuple[list, int]:
        """The history of an environment, and the index in it of the transition with this reward."""
        i = int(reward - 1) % self.N
        return self.happened[i], int(reward - 1) // self.N


def chi_square_fits(counts: np.ndarray, probabilities: np.ndarray) -> bool:
    """Five standard deviations above the mean of the distribution: once in 10,000 seeds or less."""
    expected = counts.sum() * probabilities
    assert expected.min() > 5
    freedom = len(counts) - 1
    return ((counts - expected) ** 2 / expected).sum() < freedom + 5 * np.sqrt(2 * freedom) + 10


# -------------------------------------------------------------------------------------------------------------- replay


@pytest.mark.parametrize("end, cut", [(0.0, 0.0), (0.3, 0.1), (0.9, 0.3), (1.0, 0.0)])
@pytest.mark.parametrize("N, capacity", [(1, 1), (1, 20), (3, 50), (4, 2)])
def test_replay_holds_the_last_of_what_happened(rng, N, capacity, end, cut):
    """After every step, over more than three times round: each transition, whole, and none that is not the latest."""
    replay = dqn.Replay(capacity, spaces(N))
    world, places = World(replay, rng, end, cut), replay.rows // N
    for _ in range(4 * places):
        world.step()
        rows = np.flatnonzero(replay.starts)
        obs, actions, rewards, next_obs, terminations = (x.numpy() for x in replay.batch(rows, "cpu"))
        stored = [[] for _ in range(N)]
        for k in range(len(rows)):
            history, index = world.find(rewards[k])
            true = history[index]
            assert obs[k].tolist() == true["obs"].tolist() and actions[k] == true["action"]
            assert next_obs[k].tolist() == true["next_obs"].tolist() and terminations[k] == true["terminated"]
            assert obs[k, 0] == rows[k] % N and obs.dtype == np.float32  # in a row of its environment
            stored[rows[k] % N].append(index)
        for i, indices in enumerate(stored):
            history = world.happened[i]
            assert sorted(indices) == list(range(len(history) - len(indices), len(history)))
            ends = sum(true["last"] for true in history[-len(indices) - 1 :])
            assert len(indices) >= min(len(history), places - 2 - ends - 2 * world.cuts)
            if end == cut == 0:
                assert len(indices) == min(len(history), places - 1) and places - 1 >= capacity / N
            assert indices  # there is always something to draw
        assert set(replay.sample(50)) <= set(rows)


def test_draws_are_uniform(rng):
    replay = dqn.Replay(60, spaces(3))
    world = World(replay, rng, end=0.2)
    for steps in (7, 100):  # before the replay is full, and after
        for _ in range(steps):
            world.step()
        counts = np.bincount(replay.sample(30_000), minlength=replay.rows)
        rows = np.flatnonzero(replay.starts)
        assert counts.sum() == counts[rows].sum() and 10 < len(rows) < replay.rows
        assert chi_square_fits(counts[rows], np.full(len(rows), 1 / len(rows)))


def saved(part, path):
    """The state of a part, as a checkpoint gives it back."""
    torch.save(part.state_dict(), path)
    return torch.load(path, weights_only=True)


def test_saved_replay_goes_on_as_the_first(rng, tmp_path):
    replays = [dqn.Replay(30, spaces(2)) for _ in range(2)]
    world = World(replays[0], rng, end=0.3, cut=0.1)
    for _ in range(40):
        world.step()
    replays[1].load_state_dict(saved(replays[0], tmp_path / "state"))
    for replay in replays:
        np.random.seed(3)
        world = World(replay, np.random.default_rng(3), end=0.3, cut=0.1)
        replay.drawn = []
        for _ in range(20):
            world.step()
            replay.drawn.append(replay.batch(replay.sample(16), "cpu"))
    torch.testing.assert_close(replays[0].drawn, replays[1].drawn, rtol=0, atol=0)


def test_state_of_another_replay_is_refused(tmp_path):
    replay = dqn.Replay(30, spaces(2))
    state = saved(replay, tmp_path / "state")
    with pytest.raises(ValueError):
        dqn.Replay(40, spaces(2)).load_state_dict(state)
    for name in ("obs", "starts", "heads", "filled"):
        with pytest.raises(KeyError):
            replay.load_state_dict({key: value for key, value in state.items() if key != name})


@pytest.mark.parametrize("script", REPLAY)
def test_a_million_transitions_of_halfcheetah_fit_in_250_mb(script):
    module = load(script)
    replay = module.Replay(1_000_000, spaces(1, 17, Box(-1, 1, (6,))))
    arrays = [value for value in vars(replay).values() if isinstance(value, np.ndarray)]
    if script in PER:
        arrays.append(module.Priorities(replay, make_args(script)).tree.sums)
    assert 90e6 < sum(array.nbytes for array in arrays) < 250e6


# -------------------------------------------------------------------------------------------------- losses and targets


def two_networks(script: str, **flags):
    """An agent, a target that is not its copy, and the flags."""
    (agent, args), (target, _) = make_agent(script, **flags), make_agent(script, **flags)
    return agent, target, args


def transitions(B: int) -> tuple[torch.Tensor, ...]:
    """obs, actions, rewards, next_obs, terminations; many errors are above 1, where a clipped loss would differ."""
    return torch.randn(B, 3), torch.randint(4, (B,)), 2 * torch.randn(B), torch.randn(B, 3), torch.rand(B) < 0.3


def is_the_gradient_of(loss, expected, agent, target) -> bool:
    """Of the agent's parameters; the target has none."""
    ours = torch.autograd.grad(loss, list(agent.parameters()), retain_graph=True)
    theirs = torch.autograd.grad(expected, list(agent.parameters()))
    torch.testing.assert_close(ours, theirs)
    unused = torch.autograd.grad(loss, list(target.parameters()), allow_unused=True)
    return all(gradient is None for gradient in unused) and max(gradient.abs().max() for gradient in ours) > 1e-3


@pytest.mark.parametrize("script", FAST)
def test_a_run_acts_as_the_agent_does(script, train, monkeypatch):
    """The faster way to act has the same bits throughout a run that learns."""
    module, calls = load(script), 0
    flags = {"env_id": "CartPole-v1", "total_timesteps": 600, "learning_starts": 20, "learning_rate": 0.05}
    fast = train(script, "fast", **flags)

    def slow_act(agent):
        def act(obs):
            nonlocal calls
            calls += 1
            with torch.no_grad():
                return agent.act(obs)

        return act

    monkeypatch.setattr(module, "fast_act", slow_act)
    slow = train(script, "slow", **flags)
    assert calls > 100
    assert (fast / "agent.safetensors").read_bytes() == (slow / "agent.safetensors").read_bytes()


@pytest.mark.parametrize("script", SINGLE)
def test_dqn_loss_is_its_definition(script, rng):
    agent, target, args = two_networks(script, gamma=0.9)
    obs, actions, rewards, next_obs, terminations = transitions(60)
    loss, metrics = load(script).dqn_loss(agent, target, args, obs, actions, rewards, next_obs, terminations)
    losses, values = [], []
    for b in range(60):
        future = 0.0 if terminations[b] else 0.9 * max(target(next_obs[b]).tolist())
        values.append(agent(obs[b])[actions[b]])
        losses.append((values[-1] - (rewards[b] + future)) ** 2)
    expected = sum(losses) / 60
    torch.testing.assert_close(loss, expected)
    assert metrics.tolist() == pytest.approx([expected.item(), (sum(values) / 60).item()], rel=1e-5)
    assert is_the_gradient_of(loss, expected, agent, target)


@pytest.mark.parametrize("script", DOUBLE)
@pytest.mark.parametrize("dueling", [False, True])
def test_double_dqn_loss_is_its_definition(script, dueling, rng):
    """Weights multiply before the mean; the online network chooses, the target network tells what that is worth."""
    agent, target, args = two_networks(script, dueling=dueling)
    obs, actions, returns, next_obs, terminations = transitions(60)
    discounts, weights = torch.rand(60), torch.rand(60)
    batch = obs, actions, returns, discounts, next_obs, terminations, weights
    loss, metrics, errors = load(script).double_dqn_loss(agent, target, *batch)
    losses, values, expected_errors, differ = [], [], [], 0
    for b in range(60):
        chosen = agent(next_obs[b]).tolist().index(max(agent(next_obs[b]).tolist()))
        differ += chosen != target(next_obs[b]).argmax().item()
        future = 0.0 if terminations[b] else discounts[b] * target(next_obs[b])[chosen].item()
        values.append(agent(obs[b])[actions[b]])
        expected_errors.append(abs(values[-1] - (returns[b] + future)).item())
        losses.append(weights[b] * (values[-1] - (returns[b] + future)) ** 2)
    expected = sum(losses) / 60
    assert differ > 5
    torch.testing.assert_close(loss, expected)
    assert errors.tolist() == pytest.approx(expected_errors, rel=1e-4, abs=1e-6) and not errors.requires_grad
    assert metrics.tolist() == pytest.approx([expected.item(), (sum(values) / 60).item()], rel=1e-5)
    assert is_the_gradient_of(loss, expected, agent, target)


@pytest.mark.parametrize("tau", [0.25, 1.0])
def test_target_moves_by_tau(tau):
    online, target = (torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4)) for _ in range(2))
    online[1].num_batches_tracked = target[1].num_batches_tracked = None  # the one buffer that is no number
    online[1].running_mean += 3
    before = [value.clone() for value in target.state_dict().values()]
    dqn.update_target(target, online, tau)
    for new, old, other in zip(target.state_dict().values(), before, online.state_dict().values(), strict=True):
        assert new.equal(other) if tau == 1 else torch.allclose(new, 0.75 * old + 0.25 * other)


@pytest.mark.parametrize("script", DOUBLE)
def test_dueling_head(script, rng):
    """Q = V + A - mean A: the mean over the actions is V, and a constant added to every advantage changes nothing."""
    agent, _ = make_agent(script, dueling=True)
    obs = torch.randn(20, 3)
    q, x = agent(obs), agent.body(obs)
    value, advantages = agent.v(x), agent.q(x)
    torch.testing.assert_close(q.mean(-1, keepdim=True), value)
    for b, a in np.ndindex(20, 4):
        assert q[b, a].item() == pytest.approx((value[b] + advantages[b, a] - advantages[b].mean()).item(), abs=1e-6)
    agent.q[-1].bias.data += 7
    torch.testing.assert_close(agent(obs), q, atol=1e-5, rtol=1e-5)
    plain, _ = make_agent(script, dueling=False)
    torch.testing.assert_close(plain(obs), plain.q(plain.body(obs)), rtol=0, atol=0)
    assert not [name for name in plain.state_dict() if name.startswith("v.")]


# ------------------------------------------------------------------------------------------------------- n-step windows


@pytest.mark.parametrize("script", DOUBLE)
@pytest.mark.parametrize("n", [1, 3, 6])
@pytest.mark.parametrize("end, cut", [(0.0, 0.0), (0.3, 0.1), (1.0, 0.0)])
def test_windows_are_their_definition(script, n, end, cut, rng):
    """Every stored transition at every moment, over three times round; gamma 0.5 keeps the sums exact."""
    module = load(script)
    replay = module.Replay(30, spaces(3))
    world, lengths = World(replay, rng, end, cut), set()
    for _ in range(3 * replay.rows // 3):
        world.step()
        rows = np.flatnonzero(replay.starts)
        first = replay.batch(rows, "cpu")
        batch = module.n_step_batch(replay, rows, n, 0.5, "cpu")
        assert [x.dtype for x in batch[2:4]] == [torch.float32] * 2 and batch[5].dtype == torch.bool
        torch.testing.assert_close(batch[:2], first[:2], rtol=0, atol=0)
        if n == 1:
            torch.testing.assert_close([batch[2], *batch[4:]], first[2:], rtol=0, atol=0)
        for k, reward in enumerate(first[2].tolist()):
            history, index = world.find(reward)
            window = [history[index]]
            while len(window) < n and not window[-1]["last"] and index + len(window) < len(history):
                window.append(history[index + len(window)])
            lengths.add(len(window))
            obs, action, window_return, discount, next_obs, terminated = (x[k].tolist() for x in batch)
            assert obs == window[0]["obs"].tolist() and action == window[0]["action"]
            assert window_return == sum(0.5**j * one["reward"] for j, one in enumerate(window))
            assert discount == 0.5 ** len(window)
            assert next_obs == window[-1]["next_obs"].tolist() and terminated == window[-1]["terminated"]
    assert lengths == ({1} if end == 1 else set(range(1, n + 1)))


# ------------------------------------------------------------------------------------------------------------- sum tree


@pytest.mark.parametrize("script", PER)
@pytest.mark.parametrize("size", [1, 2, 3, 7, 8, 100, 1000])
def test_sum_tree_is_a_list(script, size, rng):
    """Whole numbers, so that every sum is exact: also masses on the border of two leaves have one right answer."""
    tree, leaves = load(script).SumTree(size), np.zeros(size)
    for _ in range(30):
        changed = rng.integers(size, size=rng.integers(1, 20))  # often the same leaf twice
        values = rng.integers(4, size=len(changed)) * rng.integers(2, size=len(changed))
        for leaf, value in zip(changed, values, strict=True):
            leaves[leaf] = value
        tree.set(changed, values)
        assert tree.total == leaves.sum() and tree[np.arange(size)].tolist() == leaves.tolist()
        if tree.total:
            masses = np.arange(0, tree.total, 0.5)
            borders = leaves.cumsum()
            expected = [int(np.flatnonzero(borders > mass)[0]) for mass in masses]
            assert tree.find(masses).tolist() == expected
            assert masses.tolist() == np.arange(0, tree.total, 0.5).tolist()  # left as they were


@pytest.mark.parametrize("script", PER)
def test_sum_tree_does_not_drift(script, rng):
    """A million changes over twelve orders of magnitude: every node is still the sum of its children."""
    tree, leaves = load(script).SumTree(1000), np.zeros(1000)
    for _ in range(1000):
        changed = rng.integers(1000, size=1000)
        leaves[changed] = 10 ** rng.uniform(-6, 6, size=1000) * (rng.random(1000) < 0.9)
        tree.set(changed, leaves[changed])
    assert tree.total == pytest.approx(math.fsum(leaves), rel=1e-9)
    np.testing.assert_array_equal(tree[np.arange(1000)], leaves)
    np.testing.assert_array_equal(tree.sums[1:1024], tree.sums[2::2] + tree.sums[3::2])
    tree.set(np.arange(1000), np.zeros(1000))
    assert tree.total == 0


@pytest.mark.parametrize("script", PER)
def test_a_leaf_of_zero_is_never_found(script, rng):
    """Also by a mass that rounding has pushed to the very end, or beyond; and with unused leaves after the last."""
    for size, share in [(7, 0.3), (7, 0.8), (1000, 0.02), (1000, 0.5)] * 20:
        tree = load(script).SumTree(size)
        values = 10 ** rng.uniform(-8, 8, size=size) * (rng.random(size) < share)
        values[rng.integers(size)] = 0.1
        tree.set(np.arange(size), values)
        total = tree.total
        edges = [0.0, np.nextafter(total, 0), total, np.nextafter(total, np.inf), 1.001 * total]
        borders = values.cumsum()
        masses = np.concatenate([edges, borders, np.nextafter(borders, 0), np.nextafter(borders, np.inf)])
        found = tree.find(masses)
        assert found.max() < size and (values[found] > 0).all()


# ----------------------------------------------------------------------------------------------------------- priorities


def filled_priorities(script: str, size: int, rng, **flags):
    """A replay full of transitions without an end, its priorities, and |TD errors| that were given to them."""
    module = load(script)
    replay = module.Replay(size, spaces(1))
    priorities = module.Priorities(replay, make_args(script, **flags))
    world = World(replay, rng)
    for _ in range(2 * replay.rows):
        priorities.mark(np.concatenate(world.step()))
    rows = np.flatnonzero(replay.starts)
    errors = rng.exponential(size=len(rows)).astype(np.float32)
    priorities.update(rows, errors)
    return priorities, rows, errors


@pytest.mark.parametrize("script", PER)
@pytest.mark.parametrize("size, alpha, draws", [(7, 0.6, 20_000), (7, 1.0, 20_000), (1000, 0.6, 500_000), (7, 0, 9000)])
def test_draws_have_the_frequencies_of_the_priorities(script, size, alpha, draws, rng):
    priorities, rows, errors = filled_priorities(script, size, rng, per_alpha=alpha, per_eps=0.1)
    np.random.seed(1)
    counts = np.zeros(priorities.replay.rows, int)
    for _ in range(draws // 500):
        counts += np.bincount(priorities.sample(500, 0.5)[0], minlength=len(counts))
    share = (errors.astype(float) + 0.1) ** alpha
    assert len(rows) >= size and counts.sum() == counts[rows].sum()
    assert chi_square_fits(counts[rows], share / share.sum())


@pytest.mark.parametrize("script", PER)
def test_each_draw_comes_from_its_share(script, rng):
    """Stratified: of B draws the b-th falls into the b-th of B equal parts, anywhere in it, anew each time."""
    priorities, rows, errors = filled_priorities(script, 50, rng, per_alpha=1.0, per_eps=0.1)
    borders = (errors.astype(float) + 0.1).cumsum()
    order = {row: k for k, row in enumerate(rows)}  # in a single environment, in the order of the rows
    first = set()
    for _ in range(200):
        drawn = [order[row] for row in priorities.sample(10, 0.5)[0]]
        for b, k in enumerate(drawn):
            low, high = borders[-1] * b / 10, borders[-1] * (b + 1) / 10
            assert borders[k] > low and (k == 0 or borders[k - 1] < high)
        first.add(drawn[0])
    assert first == set(range(int(np.searchsorted(borders, borders[-1] / 10)) + 1))


@pytest.mark.parametrize("script", PER)
def test_weights_make_up_for_the_priorities(script, rng):
    """By definition; and at beta 1, with the largest put back, the mean over the draws is the mean over the replay."""
    priorities, rows, errors = filled_priorities(script, 100, rng, per_alpha=0.6, per_eps=0.01)
    np.random.seed(1)
    share = np.zeros(priorities.replay.rows)
    share[rows] = (errors.astype(float) + 0.01) ** 0.6
    share /= share.sum()
    f = rng.normal(size=len(share)) + share * 300  # something that goes with the priority
    estimates = []
    for beta in (0.0, 0.4, 1.0):
        drawn, weights = priorities.sample(64, beta)
        by_definition = (len(rows) * share[drawn]) ** -beta
        assert weights.dtype == np.float32 and weights.max() == 1
        np.testing.assert_allclose(weights, by_definition / by_definition.max(), rtol=1e-5)
    for _ in range(2000):
        drawn, weights = priorities.sample(64, 1.0)
        estimates.append((weights / (len(rows) * share[drawn].min()) * f[drawn]).mean())
    error = np.std(estimates) / np.sqrt(len(estimates))
    assert abs(np.mean(estimates) - f[rows].mean()) < 4 * error
    assert abs(f[drawn].mean() - f[rows].mean()) > 40 * error  # without weights it would be another one


@pytest.mark.parametrize("script", PER)
def test_new_transitions_have_the_largest_priority_so_far(script, rng):
    module = load(script)
    replay = module.Replay(20, spaces(2))
    priorities = module.Priorities(replay, make_args(script, per_alpha=0.5, per_eps=0.25))
    world = World(replay, rng)

    def new() -> list[float]:
        (rows,) = world.step()
        priorities.mark(rows)
        return priorities.tree[rows].tolist()

    assert new() == [1, 1, 0, 0]  # where they start, and the newest observations
    rows = np.flatnonzero(replay.starts)
    priorities.update(rows, np.array([3.75, 0.0]))
    assert priorities.tree[rows].tolist() == [2, 0.5]
    assert new() == [2, 2, 0, 0]
    priorities.update(np.flatnonzero(replay.starts), np.zeros(4))
    assert new() == [2, 2, 0, 0]  # the largest ever, not the largest there is


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("script", PER)
def test_errors_that_are_no_numbers_leave_the_tree_whole(script, rng):
    """So that a run that diverges gets as far as the check that says so."""
    priorities, rows, _ = filled_priorities(script, 20, rng)
    priorities.update(rows[:3], np.array([np.nan, np.inf, 3e38], np.float32))
    drawn, weights = priorities.sample(64, 0.5)
    assert set(drawn) <= set(rows) and np.isfinite(weights).all() and np.isfinite(priorities.tree.sums).all()


@pytest.mark.parametrize("script", PER)
@pytest.mark.parametrize("end, cut", [(0.0, 0.0), (0.3, 0.1), (1.0, 0.2)])
def test_rows_where_nothing_starts_have_no_priority(script, end, cut, rng):
    module = load(script)
    replay = module.Replay(20, spaces(3))
    priorities, world = module.Priorities(replay, make_args(script)), World(replay, rng, end, cut)
    for _ in range(3 * replay.rows // 3):
        for rows in world.step():
            priorities.mark(rows)
        np.testing.assert_array_equal(priorities.tree[np.arange(replay.rows)] > 0, replay.starts)
        rows, _ = priorities.sample(10, 0.5)
        assert replay.starts[rows].all()
        priorities.update(rows, rng.random(10))


@pytest.mark.parametrize("script", PER)
def test_saved_priorities_go_on_as_the_first(script, rng, tmp_path):
    priorities, rows, _ = filled_priorities(script, 50, rng)
    other = load(script).Priorities(priorities.replay, make_args(script))
    other.load_state_dict(saved(priorities, tmp_path / "state"))
    draws = []
    for one in (priorities, other):
        np.random.seed(5)
        one.mark(rows[:5])
        draws.append([x.tolist() for _ in range(5) for x in one.sample(32, 0.7)])
    assert draws[0] == draws[1]
    with pytest.raises(ValueError):
        filled_priorities(script, 20, rng)[0].load_state_dict(saved(priorities, tmp_path / "state"))


# ------------------------------------------------------------------------------------------------------ what a run does


@pytest.mark.parametrize(
    "start, end, duration, expected",
    [
        (1.0, 0.1, 10, [1.0, 0.91, 0.55, 0.1, 0.1]),
        (0.4, 1.0, 20, [0.4, 0.43, 0.55, 0.7, 1.0]),
        (1, 0, 0, [1, 0, 0, 0, 0]),
    ],
)
def test_linear_schedule(start, end, duration, expected):
    assert [dqn.linear_schedule(start, end, duration, step) for step in (0, 1, 5, 10, 20)] == pytest.approx(expected)


@pytest.fixture
def watch(train, monkeypatch):
    """watch(script, **flags) -> the replays and priorities that a run on counters made."""

    def watch(script: str, **flags) -> SimpleNamespace:
        module, seen = load(script), SimpleNamespace(replays=[], priorities=[])
        for name, made in (("Replay", seen.replays), ("Priorities", seen.priorities)):
            original = getattr(module, name, None)
            if original:

                def make(*args, original=original, made=made):
                    made.append(original(*args))
                    return made[-1]

                monkeypatch.setattr(module, name, make)
        monkeypatch.setattr(module, "evaluate", lambda args, agent: np.zeros(1))
        monkeypatch.setattr(module, "LOG_EVERY", flags.get("checkpoint_every", module.LOG_EVERY))  # a log goes before
        Counter.made.clear()
        train(script, env_id=counter_id(script), **{"checkpoint_every": 0, "learning_starts": 0} | flags)
        return seen

    return watch


def counted(env: Counter) -> list[tuple]:
    """All that a counter has been through: (obs, action, reward, next_obs, terminated) of each step."""
    found, episode, t = [], 0, 0
    for action in env.actions:
        t += 1
        is_end = t == env.length
        reached = [env.index, episode, t]
        found.append(([*reached[:2], t - 1], action, env.index + t, reached, is_end and episode % 2 == 0))
        episode, t = (episode + 1, 0) if is_end else (episode, t)
    return found


@pytest.mark.parametrize("script", REPLAY)
@pytest.mark.parametrize("buffer_size", [1000, 60])
def test_replay_of_a_run_holds_what_happened(script, buffer_size, watch):
    """Three environments, three checkpoints, both kinds of end: every step of every one, or the last of them."""
    N, steps = 3, 70
    flags = {"num_envs": N, "total_timesteps": N * steps, "checkpoint_every": 51, "train_frequency": NEVER}
    (replay,) = watch(script, buffer_size=buffer_size, **flags).replays
    made, places = Counter.made, replay.rows // N
    assert len(made) == 5 * N and sum(env.steps for env in made) == N * steps
    for i in range(N):
        expected = [row for env in made[i::N] for row in counted(env)]
        assert len(expected) == steps and sum(terminated for *_, terminated in expected) > 3
        ring = (replay.heads[i] + N * np.arange(places)) % replay.rows  # from the oldest row to the newest
        rows = ring[replay.starts[ring]]
        stored = list(zip(*(x.tolist() for x in replay.batch(rows, "cpu")), strict=True))
        assert len(stored) == steps if buffer_size == 1000 else 10 < len(stored) < steps
        for ours, (obs, action, reward, next_obs, terminated) in zip(stored, expected[-len(stored) :], strict=True):
            assert (ours[0], ours[2], ours[3], ours[4]) == (obs, reward, next_obs, terminated)
            if script in DQN:  # SAC keeps them in units of its own
                assert ours[1] == action


@pytest.mark.parametrize("script", DQN)
@pytest.mark.parametrize(
    "N, train_frequency, gradient_steps, target_frequency, learning_starts",
    [(3, 4, 2, 7, 0), (3, 4, 1, 1, 50), (3, 2, 3, 100, 49), (1, 4, 1, 5, 10), (5, 1, 1, 3, 20)],
)
def test_updates_are_counted_in_environment_steps(
    script, N, train_frequency, gradient_steps, target_frequency, learning_starts, watch, monkeypatch
):
    """At any moment as many as the steps so far call for, also where several multiples lie in one vector step."""
    module, updates, copies = load(script), [], []

    def now() -> int:
        return N * Counter.made[0].steps

    def count(name: str, calls: list[int]) -> None:
        original = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args: (calls.append(now()), original(*args))[1])

    count(loss_name(script), updates)
    count("update_target", copies)
    flags = {"num_envs": N, "train_frequency": train_frequency, "gradient_steps": gradient_steps, "batch_size": 4}
    flags |= {"target_network_frequency": target_frequency, "learning_starts": learning_starts}
    watch(script, total_timesteps=200, **flags)
    total = -(-200 // N) * N
    idle = learning_starts // N * N  # the last vector step that does not learn
    assert now() == total
    for step in range(N, total + 1, N):
        due = gradient_steps * (step // train_frequency - idle // train_frequency) if step > idle else 0
        assert sum(x <= step for x in updates) == due
        assert sum(x <= step for x in copies) == step // target_frequency
    assert len(copies) == total // target_frequency


@pytest.mark.parametrize("script", DQN)
@pytest.mark.parametrize("tau", [1.0, 0.25])
def test_target_begins_as_a_copy_and_only_moves_when_due(script, tau, watch, monkeypatch):
    module, seen = load(script), []
    original = getattr(module, loss_name(script))

    def loss(agent, target, *rest):
        seen.append([torch.cat([x.flatten() for x in one.parameters()]).detach() for one in (agent, target)])
        return original(agent, target, *rest)

    monkeypatch.setattr(module, loss_name(script), loss)
    flags = {"num_envs": 1, "total_timesteps": 50, "train_frequency": 1, "gradient_steps": 1, "batch_size": 4}
    watch(script, target_network_frequency=15, tau=tau, learning_rate=0.01, **flags)
    assert len(seen) == 50 and seen[0][0].equal(seen[0][1])
    for step in range(1, 50):  # before the update of step + 1
        agent, target = seen[step]
        if step % 15 == 0:
            torch.testing.assert_close(target, (1 - tau) * seen[step - 1][1] + tau * agent)
        else:
            assert target.equal(seen[step - 1][1])
        assert not agent.equal(seen[step - 1][0])


@pytest.mark.parametrize("script", DQN)
@pytest.mark.parametrize("anneal_lr, expected", [(True, [20, 16, 12, 8, 4]), (False, [20] * 5)])
def test_learning_rate_falls_from_full_to_above_zero(script, anneal_lr, expected, watch, monkeypatch):
    rates = []

    class Adam(torch.optim.Adam):
        def step(self):
            rates.append(self.param_groups[0]["lr"] * 1e4)
            super().step()

    monkeypatch.setattr(torch.optim, "Adam", Adam)
    flags = {"num_envs": 2, "total_timesteps": 10, "train_frequency": 2, "gradient_steps": 1}
    watch(script, anneal_lr=anneal_lr, learning_rate=0.002, **flags)
    assert rates == pytest.approx(expected)


def frequency_is(actions: np.ndarray, expected: float) -> bool:
    """That of action 1, to four standard deviations."""
    return abs(actions.mean() - expected) < 4 * np.sqrt(expected * (1 - expected) / actions.size) + 1e-12


def act_one(script: str, monkeypatch) -> None:
    """The greedy action is 1."""
    module = load(script)
    monkeypatch.setattr(module.Agent, "act", lambda self, obs: torch.ones(len(obs), dtype=torch.int64))
    if script in FAST:
        monkeypatch.setattr(module, "fast_act", lambda agent: agent.act)


@pytest.mark.parametrize("script", DQN)
def test_epsilon_greedy(script, watch, monkeypatch):
    """The greedy action is 1: half of all actions at first, 0.7 + 0.3 / 2 later, each environment for itself."""
    act_one(script, monkeypatch)
    flags = {"num_envs": 4, "total_timesteps": 4000, "train_frequency": NEVER, "learning_starts": 1000}
    watch(script, start_e=0.3, end_e=0.3, **flags)
    actions = np.array([env.actions for env in Counter.made[:4]])  # (N, T)
    assert actions.shape == (4, 1000)
    assert frequency_is(actions[:, :250], 0.5) and frequency_is(actions[:, 250:], 0.85)
    assert np.abs(np.corrcoef(actions) - np.eye(4)).max() < 0.25
    assert (actions[:, :250].std(1) > 0.4).all()


@pytest.mark.parametrize("script", DQN)
def test_epsilon_falls(script, watch, monkeypatch):
    act_one(script, monkeypatch)
    flags = {"num_envs": 4, "total_timesteps": 8000, "train_frequency": NEVER}
    watch(script, start_e=1.0, end_e=0.0, exploration_fraction=0.5, **flags)
    actions = np.array([env.actions for env in Counter.made[:4]])
    for quarter, epsilon in enumerate((0.75, 0.25, 0.0, 0.0)):
        assert frequency_is(actions[:, 500 * quarter : 500 * (quarter + 1)], 1 - epsilon / 2)


@pytest.mark.parametrize("script", EZ)
def test_random_actions_are_held_for_zeta_times(script, rng):
    """Each action is the time at which it was drawn, so that one which is held shows how long and since when."""
    N, T, epsilon, module = 50, 2000, 0.2, load(script)
    np.random.seed(1)
    left, held, rows = np.zeros(N, int), np.zeros(N, int), []
    for t in range(T):
        actions, is_greedy, left, held = module.hold(left, held, np.full(N, t), rng.random(N) >= epsilon)
        assert not (is_greedy & (actions != t)).any()
        rows.append(np.where(is_greedy, -1, actions))
    durations, greedy, begins = [], 0, 0
    for column in np.array(rows).T:
        greedy += (column == -1).sum()
        begun, counts = np.unique(column[column >= 0], return_counts=True)
        begins += len(begun)
        durations += counts[begun < T / 2].tolist()  # the longest ones end later than this test
        for start, count in zip(begun, counts, strict=True):
            assert (column[start : start + count] == start).all()
    for duration in (1, 2, 3, 4):
        expected = 6 / (math.pi * duration) ** 2
        assert np.mean(np.array(durations) == duration) == pytest.approx(expected, abs=4 * 0.5 / len(durations) ** 0.5)
    assert begins / (begins + greedy) == pytest.approx(epsilon, abs=0.02)


@pytest.mark.parametrize("script", EZ)
def test_random_actions_are_held_until_the_episode_ends(script, watch, monkeypatch):
    act_one(script, monkeypatch)
    flags = {"num_envs": 4, "total_timesteps": 8000, "train_frequency": NEVER, "ez_greedy": True}
    for epsilon, learning_starts in ((1.0, 0), (0.0, 8000), (0.0, 0)):  # random; random, as nothing is learnt; greedy
        changes = {"start_e": epsilon, "end_e": epsilon, "learning_starts": learning_starts}
        watch(script, folder=f"run-{epsilon}-{learning_starts}", **flags | changes)
        for env in Counter.made[:4]:
            actions = np.array(env.actions)
            goes_on = np.arange(1, 2000) % env.length > 0
            same, is_random = actions[1:] == actions[:-1], epsilon or learning_starts
            assert same[goes_on].mean() > 0.65 if is_random else same.all()
            assert abs(same[~goes_on].mean() - 0.5) < 0.1 if is_random else actions.all()


@pytest.mark.parametrize("script", PER)
@pytest.mark.parametrize("n_step", [1, 3])
def test_a_run_learns_from_what_it_drew(script, n_step, watch, monkeypatch):
    """Batch, weights and new priorities of each update belong to the rows drawn; beta rises from per_beta to 1."""
    module, drawn, losses, updates = load(script), [], [], []
    Priorities = module.Priorities
    sample, update, mark, loss = Priorities.sample, Priorities.update, Priorities.mark, module.double_dqn_loss

    def is_in_step(self) -> None:
        np.testing.assert_array_equal(self.tree[np.arange(self.replay.rows)] > 0, self.replay.starts)

    def watched_sample(self, size, beta):
        rows, weights = sample(self, size, beta)
        drawn.append((rows, weights, beta, module.n_step_batch(self.replay, rows, n_step, 0.9, "cpu")))
        return rows, weights

    def watched_loss(agent, target, *batch):
        losses.append((batch, loss(agent, target, *batch)))
        return losses[-1][1]

    def watched_update(self, rows, errors):
        update(self, rows, errors)
        updates.append((rows, errors))
        np.testing.assert_allclose(self.tree[rows], (errors.astype(float) + 0.01) ** 0.7)
        is_in_step(self)

    def watched_mark(self, rows):
        mark(self, rows)
        is_in_step(self)

    monkeypatch.setattr(Priorities, "sample", watched_sample)
    monkeypatch.setattr(Priorities, "update", watched_update)
    monkeypatch.setattr(Priorities, "mark", watched_mark)
    monkeypatch.setattr(module, "double_dqn_loss", watched_loss)
    flags = {"num_envs": 3, "total_timesteps": 300, "train_frequency": 3, "gradient_steps": 2, "buffer_size": 60}
    flags |= {"per_alpha": 0.7, "per_beta": 0.3, "per_eps": 0.01, "gamma": 0.9, "batch_size": 16, "n_step": n_step}
    (priorities,) = watch(script, checkpoint_every=100, **flags).priorities
    assert len(drawn) == len(losses) == len(updates) == 200
    for i in range(200):
        (rows, weights, beta, expected), (batch, (_, _, errors)), (updated, given) = drawn[i], losses[i], updates[i]
        assert len(rows) == 16 and (updated == rows).all() and (given == errors.numpy()).all()
        torch.testing.assert_close(list(batch[:-1]), expected, rtol=0, atol=0)
        assert (batch[-1].numpy() == weights).all()
        assert beta == pytest.approx(0.3 + 0.7 * (i // 2 * 3) / 300)
    assert priorities.largest > 1
