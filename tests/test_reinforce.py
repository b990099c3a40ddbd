"""REINFORCE: returns and loss against their definitions, and batches of whole episodes against what really happened."""

import numpy as np
import pytest
import torch
from conftest import episodes, load, make_agent
from environments import Counter
from torch.distributions import Categorical

reinforce = load("reinforce")


def lengths_of(index: int, count: int) -> list[tuple[int, int]]:
    """(episode, length) of the first episodes of a counter."""
    return [(episode, 3 + index % 4) for episode in range(count)]


def counter_returns(index: int, episode: int, length: int, gamma: float, baseline: bool) -> list[float]:
    """By definition; V = 100 episode + t, which is asked only where a time limit cut the episode."""
    future = 100 * episode + length if baseline and episode % 2 == 1 else 0
    rewards = [index + t for t in range(1, length + 1)]
    return [
        sum(gamma ** (k - t) * rewards[k] for k in range(t, length)) + gamma ** (length - t) * future
        for t in range(length)
    ]


@pytest.fixture
def batches(rollouts, train, monkeypatch):
    """batches(**flags) -> [(obs, actions, advantages, returns) of each update], on counters; V = 100 episode + t."""

    def play(**flags) -> list[list[np.ndarray]]:
        monkeypatch.setattr(reinforce.Agent, "value", lambda self, obs: obs[..., 1] * 100 + obs[..., 2])
        found = rollouts("reinforce")
        Counter.made.clear()
        train("reinforce", env_id="Test/Counter-v0", **{"checkpoint_every": 0, "gamma": 0.9} | flags)
        return [batch for batch, _ in found]

    return play


# ------------------------------------------------------------------------------------------------------------- formulas


@pytest.mark.parametrize(
    "L, gamma, last_value", [(1, 0.9, 0.0), (7, 0.9, 0.0), (7, 1.0, 2.5), (30, 0.5, -4.0), (4, 0, 3)]
)
def test_returns_are_their_definition(rng, L, gamma, last_value):
    rewards = rng.normal(size=L)
    expected = [
        sum(gamma ** (k - t) * rewards[k] for k in range(t, L)) + gamma ** (L - t) * last_value for t in range(L)
    ]
    np.testing.assert_allclose(reinforce.returns_to_go(np.array(rewards), last_value, gamma), expected)


@pytest.mark.parametrize("baseline", [True, False])
@pytest.mark.parametrize("norm_adv", [True, False])
def test_loss_is_the_sum_of_its_parts(norm_adv, baseline, rng):
    flags = {"norm_adv": norm_adv, "baseline": baseline, "ent_coef": 0.03, "vf_coef": 0.7}
    agent, args = make_agent("reinforce", **flags)
    obs, actions, (advantages, returns) = torch.randn(24, 3), torch.randint(4, (24,)), torch.randn(2, 24) + 1
    loss, metrics = reinforce.reinforce_loss(agent, args, obs, actions, advantages, returns)
    policy = Categorical(logits=agent.actor(obs))
    scaled = (advantages - advantages.mean()) / (advantages.std() + 1e-8) if norm_adv else advantages
    pg_loss, entropy = -(scaled * policy.log_prob(actions)).mean(), policy.entropy().mean()
    v_loss = 0.5 * ((agent.value(obs) - returns) ** 2).mean() if baseline else torch.zeros(())
    torch.testing.assert_close(loss, pg_loss - 0.03 * entropy + 0.7 * v_loss)
    torch.testing.assert_close(metrics, torch.stack([pg_loss, v_loss, entropy]).detach())


def test_gradient_is_that_of_the_expected_return():
    """One step, four actions with known pay: averaged over all actions by their probability, the loss has minus the
    gradient of the expected return, and a baseline changes nothing in it."""
    pay = torch.tensor([1.0, -2.0, 0.5, 3.0])
    for level in (0.0, 7.0):
        agent, args = make_agent("reinforce", norm_adv=False, ent_coef=0.0, vf_coef=0.0)
        agent.actor[-1].bias.data.copy_(torch.tensor([0.3, -0.2, 0.5, 0.0]))
        obs = torch.tensor([[0.2, -0.4, 0.7]])
        (agent.actor(obs).softmax(-1) @ pay).sum().backward()
        expected = [parameter.grad.clone() for parameter in agent.actor.parameters()]
        probabilities = agent.actor(obs).softmax(-1).detach()[0]
        total = 0.0
        for action in range(4):
            batch = obs, torch.tensor([action]), pay[[action]] - level, pay[[action]]
            total = total + probabilities[action] * reinforce.reinforce_loss(agent, args, *batch)[0]
        agent.zero_grad()
        total.backward()
        for parameter, gradient in zip(agent.actor.parameters(), expected, strict=True):
            torch.testing.assert_close(parameter.grad, -gradient, atol=1e-6, rtol=1e-4)


def test_without_baseline_there_is_no_value_network():
    names = {baseline: set(make_agent("reinforce", baseline=baseline)[0].state_dict()) for baseline in (True, False)}
    assert names[False] == {name for name in names[True] if name.startswith("actor")} != names[True]


# ------------------------------------------------------------------------------- the data against what really happened


@pytest.mark.parametrize("baseline", [True, False])
def test_an_update_has_whole_episodes_in_order(batches, baseline):
    """One environment with episodes of 3 steps, every second of them cut: exactly on-policy, no step twice or lost."""
    found = batches(num_envs=1, episodes_per_update=4, total_timesteps=3 * 12, baseline=baseline)
    assert len(found) == 3
    for update, (obs, actions, advantages, returns) in enumerate(found):
        ended = lengths_of(0, 12)[4 * update : 4 * update + 4]
        assert obs.tolist() == [[0, episode, t] for episode, length in ended for t in range(length)]
        expected = sum((counter_returns(0, *row, 0.9, baseline) for row in ended), [])
        np.testing.assert_allclose(returns, expected, rtol=1e-5)
        values = obs[:, 1] * 100 + obs[:, 2] if baseline else 0
        np.testing.assert_allclose(advantages, np.array(expected) - values, rtol=1e-4, atol=1e-4)
        assert actions.tolist() == [int(action) for action in Counter.made[0].actions[12 * update : 12 * update + 12]]
        assert returns.dtype == advantages.dtype == np.float32 and actions.dtype == np.int64


def test_episodes_of_several_environments_stay_apart(batches):
    """Four environments with episodes of 3 to 6 steps: each row once, in the update after its episode ended."""
    N, total = 4, 240
    found = batches(num_envs=N, episodes_per_update=3, total_timesteps=total)
    rows = [(update, *row) for update, (obs, *_) in enumerate(found) for row in obs.astype(int).tolist()]
    taken = {(n, *row): [] for n in range(N) for row in np.ndindex(60, 6)}
    for update, n, episode, t in rows:
        taken[n, episode, t].append(update)
    ends = sorted((k * (3 + n), n, k - 1) for n in range(N) for k in range(1, 60 // (3 + n) + 1))  # (vector step, ...)
    waiting, learned = [], []
    for i, (step, n, episode) in enumerate(ends):
        waiting.append((n, episode))
        if len(waiting) >= 3 and (i + 1 == len(ends) or ends[i + 1][0] > step):  # all that ended in this step join
            learned, waiting = [*learned, waiting], []
    assert len(found) == len(learned) > 10
    for update, ended in enumerate(learned):
        obs, actions, _, returns = found[update]
        assert obs.tolist() == [[n, episode, t] for n, episode in ended for t in range(3 + n)]
        given = [int(Counter.made[n].actions[episode * (3 + n) + t]) for n, episode in ended for t in range(3 + n)]
        assert actions.tolist() == given
        expected = sum((counter_returns(n, episode, 3 + n, 0.9, True) for n, episode in ended), [])
        np.testing.assert_allclose(returns, expected, rtol=1e-5)
    assert all(len(updates) <= 1 for updates in taken.values())
    assert max(len(ended) for ended in learned) > 3  # more than asked for, where several ended at once


def test_a_checkpoint_drops_the_running_episodes(batches):
    """After each update here: the environments are made anew, and no step of the old ones is learned from later."""
    found = batches(num_envs=3, episodes_per_update=1, total_timesteps=3 * (3 + 3 + 3 + 4 + 3), checkpoint_every=1)
    assert len(found) == 5 and len(Counter.made) == 3 * 5
    for i, (obs, *_) in enumerate(found):
        index = min(range(3 * i, 3 * i + 3), key=lambda index: index % 4)  # the shortest ends first, in any place
        assert obs.tolist() == [[index, 0, t] for t in range(3 + index % 4)]


def test_the_run_ends_at_its_last_step(train, spy):
    """In the middle of an episode, and with episodes that are too few for an update."""
    Counter.made.clear()
    updates, logs = spy(reinforce, "gradient_step"), spy(reinforce.Run, "log")
    flags = {"num_envs": 3, "episodes_per_update": 5, "total_timesteps": 100, "checkpoint_every": 0}
    folder = train("reinforce", env_id="Test/Counter-v0", eval_episodes=1, **flags)
    assert [env.steps for env in Counter.made[:3]] == [34] * 3 and logs[-1][0]["step"] == 102
    finished = [row for env in Counter.made[:3] for row in env.finished]
    assert sorted(row[1:] for row in episodes(folder)) == sorted(finished)
    assert 0 < len(finished) - sum(len(set(map(tuple, bound["batch"][0][:, :2].tolist()))) for bound, _ in updates) < 5
    assert len(logs) == len(updates) + 1


def test_learning_rate_falls_from_full_to_above_zero(train, monkeypatch):
    """By the step at which the update's first episode began; 12 steps an update."""
    rates, original = [], reinforce.gradient_step

    def gradient_step(agent, optimizer, *rest):
        rates.append(optimizer.param_groups[0]["lr"])
        return original(agent, optimizer, *rest)

    monkeypatch.setattr(reinforce, "gradient_step", gradient_step)
    flags = {"num_envs": 1, "episodes_per_update": 4, "total_timesteps": 60, "checkpoint_every": 0, "eval_episodes": 1}
    for i, (anneal_lr, expected) in enumerate([(True, [0.01, 0.008, 0.006, 0.004, 0.002]), (False, [0.01] * 5)]):
        Counter.made.clear()
        rates.clear()
        train("reinforce", f"run{i}", env_id="Test/Counter-v0", learning_rate=0.01, anneal_lr=anneal_lr, **flags)
        assert rates == pytest.approx(expected)


@pytest.fixture
def fixed_logits(monkeypatch):
    """fixed_logits(values): the policy is the same in every state."""
    original = reinforce.Agent.__init__

    def fix(values: list[float]) -> np.ndarray:
        def init(self, *args):
            original(self, *args)
            self.actor[-1].weight.data.zero_()
            self.actor[-1].bias.data.copy_(torch.tensor(values))

        monkeypatch.setattr(reinforce.Agent, "__init__", init)
        return torch.tensor(values).softmax(0).numpy()

    return fix


def test_actions_have_the_frequencies_of_the_policy(train, rollouts, fixed_logits):
    probabilities = fixed_logits([1.0, 0.0, -1.5])
    found = rollouts("reinforce")
    flags = {"num_envs": 1, "episodes_per_update": 1, "total_timesteps": 4500, "checkpoint_every": 0}
    train("reinforce", env_id="Acrobot-v1", **flags)
    actions = np.concatenate([batch[1] for batch, _ in found])
    counts, expected = np.bincount(actions, minlength=3), len(actions) * probabilities
    assert len(actions) > 4000 and ((counts - expected) ** 2 / expected).sum() < 25  # two degrees of freedom
    pairs = np.bincount(actions[1:] * 3 + actions[:-1], minlength=9) / (len(actions) - 1)  # each step is drawn anew
    np.testing.assert_allclose(pairs, np.outer(probabilities, probabilities).flatten(), atol=0.04)


def test_each_environment_acts_for_itself(train, fixed_logits):
    fixed_logits([0.8, -0.2])
    Counter.made.clear()
    flags = {"num_envs": 4, "episodes_per_update": 10_000, "total_timesteps": 8000, "checkpoint_every": 0}
    train("reinforce", env_id="Test/Counter-v0", eval_episodes=1, **flags)
    actions = np.array([env.actions for env in Counter.made[:4]])  # (N, T)
    assert actions.shape == (4, 2000) and abs(np.corrcoef(actions) - np.eye(4)).max() < 0.1


def test_no_baseline_learns_too(train):
    """Three updates without a critic: finite weights, and the curves of an update."""
    flags = {"num_envs": 1, "episodes_per_update": 2, "total_timesteps": 40, "checkpoint_every": 0, "eval_episodes": 1}
    folder = train("reinforce", env_id="Test/Counter-v0", baseline=False, **flags)
    assert (folder / "result.json").exists()
