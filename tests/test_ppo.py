"""PPO: its loss and advantages against brute force, and what a rollout hands to the loss against what really happened.

What A2C has too (advantages, rollouts, policies, normalization) is tested here for both.
"""

import math
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from ale_py.vector_env import AtariVectorEnv
from conftest import SCRIPTS, episodes, family, having, is_asynchronous, load, make_agent, make_args, saved_agent
from environments import Counter, FakeGames, Misfit
from gymnasium.spaces import Box
from torch import nn
from torch.distributions import Categorical, Independent, Normal

GAMES = [name for name in SCRIPTS if family(name).suffix == "_atari"]
ATARI = [name for name in GAMES if name in having("gae")]
CONTINUOUS = [name for name in SCRIPTS if family(name).suffix == "_continuous"]
RECURRENT = [name for name in SCRIPTS if hasattr(load(name).Agent, "initial_state")]  # test_ppo_lstm.py and _atari.py
PPO, ON_POLICY = ([name for name in having(part) if name not in RECURRENT] for part in ("ppo_loss", "gae"))
ACTOR_CRITIC, IMAGES = [*ON_POLICY, "reinforce"], [name for name in ON_POLICY if name in ATARI]
VECTOR = [name for name in ON_POLICY if name not in ATARI and not is_asynchronous(name)]
NORMALIZING = [name for name in VECTOR if name in CONTINUOUS]

ppo = load("ppo")  # for functions whose text is the same in every script (test_house)


def inputs(script: str, B: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Observations and actions for the agents of make_agent."""
    if script in GAMES:
        return torch.randint(256, (B, 4, 84, 84), dtype=torch.uint8), torch.randint(4, (B,))
    return torch.randn(B, 3), torch.randn(B, 2) if script in CONTINUOUS else torch.randint(4, (B,))


def decided(script: str, **flags):
    """make_agent whose policy depends on what it sees; a new one hardly does."""
    agent, args = make_agent(script, **flags)
    (agent.actor if script in ATARI else agent.actor[-1]).weight.data *= 100
    return agent, args


def policy(script: str, agent, obs):
    if script in CONTINUOUS:
        return Independent(Normal(agent.actor(obs), agent.log_std.exp()), 1)
    return Categorical(logits=agent(obs)[0] if script in ATARI else agent.actor(obs))


def evaluate(agent, obs, actions) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-probabilities, entropy, values."""
    if hasattr(agent, "logprob_entropy_value"):
        return agent.logprob_entropy_value(obs, actions)
    return *agent.logprob_and_entropy(obs, actions), agent.value(obs)


def gradients(loss, agent) -> list[torch.Tensor]:
    parameters = list(agent.parameters())
    found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    return [torch.zeros_like(p) if gradient is None else gradient for p, gradient in zip(parameters, found)]


def walk(N: int, steps: int) -> np.ndarray:
    """What N counters observe, (steps, N, 3)."""
    episode, t = np.divmod(np.arange(steps)[:, None], 3 + np.arange(N) % 4)
    return np.stack(np.broadcast_arrays(np.arange(N), episode, t), -1)


def truth(obs: np.ndarray) -> SimpleNamespace:
    """What happened to counters in these states: obs (..., 3)."""
    env, episode, t = np.moveaxis(np.asarray(obs), -1, 0).astype(int)
    length = 3 + env % 4
    taken = [Counter.made[i].actions[k] for i, k in zip(env.flat, (episode * length + t).flat)]
    dones = t + 1 == length
    return SimpleNamespace(
        actions=np.reshape(taken, (*env.shape, *np.shape(taken)[1:])),
        rewards=env + t + 1,
        next_obs=obs + np.array([0, 0, 1]),
        terminations=dones & (episode % 2 == 0),
        dones=dones,
    )


@pytest.fixture
def rollouts(train, spy, monkeypatch):
    """rollouts(script, T, N, iterations, **flags) -> the folder, and what gae and the loss of each got, (T, N, ...)."""

    def rollouts(script: str, T: int, N: int, iterations: int, **flags):
        module = load(script)
        monkeypatch.setattr(torch, "randperm", lambda n, device: torch.arange(n))
        gaes, losses = spy(module, "gae"), spy(module, "ppo_loss" if script in PPO else "a2c_loss")
        usual = {"num_envs": N, "num_steps": T, "total_timesteps": iterations * N * T, "num_minibatches": 1}
        folder = train(script, **usual | {"update_epochs": 1, "norm_obs": False, "norm_reward": False} | flags)
        found = []
        for (given, _), (batch, _) in zip(gaes, losses, strict=True):
            rows = {name: x.unflatten(0, (T, N)) for name, x in batch.items() if isinstance(x, torch.Tensor)}
            both = rows | {name: x for name, x in given.items() if isinstance(x, torch.Tensor)}
            found.append(SimpleNamespace(**{name: x.numpy() for name, x in both.items()}))
        assert len(found) == iterations
        return folder, found

    return rollouts


# ------------------------------------------------------------------------------------------------ advantage estimation


def gae_by_definition(rewards, values, next_values, terminations, dones, gamma, gae_lambda):
    """The double sum of GAE eq. 16, up to the first end."""
    advantages = np.zeros_like(rewards)
    for t, n in np.ndindex(rewards.shape):
        weight = 1.0
        for k in range(t, len(rewards)):
            future = 0.0 if terminations[k, n] else gamma * next_values[k, n]
            advantages[t, n] += weight * (rewards[k, n] + future - values[k, n])
            weight *= gamma * gae_lambda
            if dones[k, n]:
                break
    return advantages


@pytest.mark.parametrize(
    "T, N, gamma, gae_lambda", [(40, 3, 0.99, 0.95), (17, 5, 0.5, 1.0), (25, 2, 1.0, 0.0), (1, 4, 0.9, 0.9)]
)
def test_gae_equals_its_definition(rng, T, N, gamma, gae_lambda):
    rewards, values, next_values = rng.normal(size=(3, T, N))
    terminations, truncations = rng.random((2, T, N)) < 0.15
    arrays = rewards, values, next_values, terminations, terminations | truncations
    expected = gae_by_definition(*arrays, gamma, gae_lambda)
    advantages = ppo.gae(*map(torch.from_numpy, arrays), gamma, gae_lambda)
    np.testing.assert_allclose(advantages, expected, rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------------------------------ the loss


@pytest.mark.parametrize("script", PPO)
@pytest.mark.parametrize("norm_adv, clip_vloss", [(True, True), (False, False)])
def test_loss_is_the_sum_of_its_parts(script, norm_adv, clip_vloss, rng):
    """PPO eq. 9, its gradient, and the metrics, from torch.distributions, for data of another policy."""
    flags = {"norm_adv": norm_adv, "clip_vloss": clip_vloss, "clip_coef": 0.1, "ent_coef": 0.03, "vf_coef": 0.7}
    agent, args = decided(script, **flags)
    (obs, actions), (advantages, returns, old_values) = inputs(script, 24), torch.randn(3, 24)
    new, values = policy(script, agent, obs), evaluate(agent, obs, actions)[2]
    logprobs = new.log_prob(actions).detach() + 0.2 * torch.randn(24)
    loss, metrics = load(script).ppo_loss(agent, args, obs, actions, logprobs, advantages, returns, old_values)

    ratio = (new.log_prob(actions) - logprobs).exp()
    scaled = (advantages - advantages.mean()) / advantages.std() if norm_adv else advantages
    policy_loss = -torch.minimum(scaled * ratio, scaled * ratio.clamp(0.9, 1.1)).mean()
    squared = (values - returns) ** 2
    if clip_vloss:
        squared = torch.maximum(squared, (old_values + (values - old_values).clamp(-0.1, 0.1) - returns) ** 2)
    value_loss, entropy = 0.5 * squared.mean(), new.entropy().mean()
    total = policy_loss - 0.03 * entropy + 0.7 * value_loss
    torch.testing.assert_close(loss, total)
    torch.testing.assert_close(gradients(loss, agent), gradients(total, agent), atol=1e-4, rtol=1e-3)
    expected = {
        "losses/policy_loss": policy_loss.item(),
        "losses/value_loss": value_loss.item(),
        "losses/entropy": entropy.item(),
        "losses/approx_kl": (ratio - 1 - ratio.log()).mean().item(),
        "losses/clipfrac": ((ratio - 1).abs() > 0.1).float().mean().item(),
    }
    assert {name: x.item() for name, x in metrics.items()} == pytest.approx(expected, rel=1e-4)
    assert 0 < expected["losses/clipfrac"] < 1 and not any(x.requires_grad for x in metrics.values())


# -------------------------------------------------------------------------------------------------------------- update


@pytest.mark.parametrize("script", PPO)
def test_the_first_minibatch_has_ratio_one(script, train, monkeypatch):
    """The loss sees what the policy saw when it acted, also when statistics change, and the weights have not moved."""
    module, distances = load(script), []
    ppo_loss = module.ppo_loss

    def watched(agent, args, obs, actions, logprobs, *rest):
        with torch.no_grad():
            distances.append((evaluate(agent, obs, actions)[0] - logprobs).abs().max().item())
        return ppo_loss(agent, args, obs, actions, logprobs, *rest)

    monkeypatch.setattr(module, "ppo_loss", watched)
    flags = {"num_envs": 4, "num_steps": 16, "total_timesteps": 3 * 64, "num_minibatches": 2, "update_epochs": 1}
    train(script, learning_rate=0.01, anneal_lr=False, norm_obs=True, norm_reward=True, **flags)
    assert len(distances) == 6
    assert max(distances[::2]) < 1e-4 and min(distances[1::2]) > 1e-3


@pytest.mark.parametrize("script", [name for name in VECTOR if name in PPO])
@pytest.mark.parametrize("target_kl, epochs", [(0.0, 5), (1e-9, 1), (1e9, 5)])
def test_target_kl_stops_the_epochs(script, target_kl, epochs, train, spy):
    losses = spy(load(script), "ppo_loss")
    flags = {"num_envs": 3, "num_steps": 4, "total_timesteps": 12, "num_minibatches": 4, "update_epochs": 5}
    train(script, target_kl=target_kl, norm_obs=False, **flags)
    seen = [[tuple(row) for row in bound["obs"].tolist()] for bound, _ in losses]
    assert [len(rows) for rows in seen] == [3] * 4 * epochs
    shuffled = [sum(seen[i : i + 4], []) for i in range(0, len(seen), 4)]
    assert all(set(rows) == set(map(tuple, walk(3, 4).reshape(-1, 3))) for rows in shuffled)  # every row once
    assert len(set(map(tuple, shuffled))) == epochs  # each time in another order


@pytest.mark.parametrize("script", VECTOR)
def test_one_row_per_minibatch(script, train):
    """Nothing to normalize, and nothing that is not a number."""
    flags = {"num_envs": 1, "num_steps": 4 if script in PPO else 1, "total_timesteps": 8, "num_minibatches": 4}
    agent, _ = saved_agent(script, train(script, norm_adv=True, **flags))
    assert all(parameter.isfinite().all() for parameter in agent.parameters())


# -------------------------------------------------------------------------------------------- networks and the policies


@pytest.mark.parametrize("script", ACTOR_CRITIC)
def test_weights_are_orthogonal(script):
    """W W^T = gain^2 I (or W^T W, where that is the smaller): gain sqrt 2, of the policy 0.01, of the values 1."""
    agent, _ = make_agent(script)
    layers = {name: layer for name, layer in agent.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)}
    gains = {name: math.sqrt(2) for name in layers}
    for head, gain in (("actor", 0.01), ("critic", 1.0)):
        gains[[name for name in layers if name.startswith(head)][-1]] = gain
    assert len(layers) > 4
    for name, layer in layers.items():
        W = layer.weight.detach().flatten(1)
        W = W if W.shape[0] <= W.shape[1] else W.T
        torch.testing.assert_close(W @ W.T, gains[name] ** 2 * torch.eye(len(W)), atol=1e-5, rtol=1e-4)
        assert layer.bias.abs().max() == 0


@pytest.mark.parametrize("script", [*(x for x in ACTOR_CRITIC if x not in CONTINUOUS), *having("soft_values")])
def test_discrete_actions_have_the_frequencies_of_the_policy(script, rng):
    agent, _ = make_agent(script)
    logits, rows = torch.tensor([1.0, 0.0, -1.5, 0.3]), 40_000
    (agent if script in ATARI else agent.actor).forward = lambda obs: (
        (logits.expand(len(obs), 4), torch.ones(len(obs))) if script in ATARI else logits.expand(len(obs), 4)
    )
    obs, probabilities = torch.zeros(rows, 3), logits.softmax(0).numpy()
    actions = agent.sample(obs)
    if script in ATARI:
        actions, *logprobs, values = actions  # A2C needs no probabilities of the policy that acted
        torch.testing.assert_close(logprobs, [logits.log_softmax(0)[actions]] * len(logprobs))
        assert values.equal(torch.ones(rows))
    counts = torch.bincount(actions, minlength=4).numpy()
    assert ((counts - rows * probabilities) ** 2 / (rows * probabilities)).sum() < 30  # three degrees of freedom
    pairs = torch.bincount(actions[1:] * 4 + actions[:-1], minlength=16).numpy() / rows  # each row for itself
    np.testing.assert_allclose(pairs, np.outer(probabilities, probabilities).flatten(), atol=0.01)
    assert script in GAMES or agent.act(obs[:9]).tolist() == [0] * 9  # greedy


@pytest.mark.parametrize("script", [x for x in CONTINUOUS if not hasattr(load(x).Args, "exploration_noise")])
def test_continuous_actions_have_the_distribution_of_the_policy(script, rng):
    agent, _ = make_agent(script, log_std_init=-1.0)
    mean, std, rows = torch.tensor([0.3, -0.2]), math.exp(-1), 40_000
    head = getattr(agent.actor, "head", None) or agent.actor[-1]
    nn.init.zeros_(head.weight)
    head.bias.data[:2] = mean
    if len(head.bias) == 4:  # SAC: tanh of a Gaussian, and its standard deviation is squashed too
        head.bias.data[2:] = math.atanh((-1 + 5) / 3.5 - 1 if script != "simbav2_continuous" else (-1 + 10) / 6 - 1)
    obs = torch.randn(rows, 3)
    actions, greedy = agent.sample(obs), agent.act(obs[:9])
    if len(head.bias) == 4:
        actions, greedy = actions.atanh(), greedy.atanh()
    torch.testing.assert_close(greedy, mean.expand(9, 2), atol=1e-6, rtol=1e-5)
    z = ((actions - mean) / std).detach()
    assert z.mean(0).abs().max() < 0.025 and (z.std(0) - 1).abs().max() < 0.02
    pairs = torch.stack([z[:-1, 0], z[:-1, 1], z[1:, 0], z[1:, 1]])  # each row and each dimension for itself
    assert (pairs.corrcoef() - torch.eye(4)).abs().max() < 0.025


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("script", CONTINUOUS)
def test_actions_reach_each_bound_of_their_dimension(script, dtype, rng):
    def step(space: Box, action) -> np.ndarray:
        env, seen = Misfit(Box(-1, 1, (3,)), space), []
        env.step = lambda action: (np.zeros(3), 0.0, False, seen.append(action) is not None, {})
        load(script).Adapter(env).step(np.asarray(action, np.float32))
        assert space.contains(seen[0])
        return seen[0]

    space = Box(np.array([-1, -2], dtype), np.array([3, 0.5], dtype), dtype=dtype)
    actions = [[-1.0, -1.0], [1.0, 1.0], [0.0, 0.0], [5.0, -5.0], [0.5, -0.5]]
    expected = [[-1, -2], [3, 0.5], [1, -0.75], [3, -2], [2, -1.375]]
    assert [step(space, action).tolist() for action in actions] == expected
    low, high = np.sort(rng.normal(size=(2, 1000)).astype(dtype), axis=0)
    space = Box(low, high, dtype=dtype)
    for sign, bound in ((-1, low), (1, high)):  # to the last bit in float32
        np.testing.assert_allclose(step(space, sign * np.ones(1000)), bound, rtol=0, atol=1e-15)
    for _ in range(20):
        step(space, np.tanh(3 * rng.normal(size=1000)))


# ------------------------------------------------------------------------------- the data against what really happened


@pytest.mark.parametrize("script", VECTOR)
@pytest.mark.parametrize("T, iterations", [(16, 3), (1, 20)])
def test_rollouts_hold_what_happened(script, T, iterations, rollouts, spy, monkeypatch):
    """Four counters: no row of a reset, no end mistaken, no value of the wrong state; also in rollouts of one step."""
    N, module = 4, load(script)
    monkeypatch.setattr(module.Agent, "value", lambda self, obs: obs[..., 1] * 100 + obs[..., 2])  # 100 episode + t
    logs = spy(module.Run, "log")
    folder, found = rollouts(script, T, N, iterations, gamma=0.9, gae_lambda=0.8)
    obs = walk(N, T * iterations)
    true, values = truth(obs), obs[..., 1] * 100 + obs[..., 2]

    def all_of(name: str) -> np.ndarray:
        return np.concatenate([getattr(rollout, name) for rollout in found])

    np.testing.assert_array_equal(all_of("obs"), obs)
    for name in ("rewards", "terminations", "dones"):
        np.testing.assert_array_equal(all_of(name), getattr(true, name))
    np.testing.assert_array_equal(all_of("values"), values)
    np.testing.assert_array_equal(all_of("next_values")[~true.terminations], values[~true.terminations] + 1)
    actions = all_of("actions")
    if script in CONTINUOUS:
        actions = np.clip(actions * [2, 1.25] + [1, -0.75], [-1, -2], [3, 0.5])
    np.testing.assert_allclose(actions, true.actions, atol=1e-6)
    for x, (log, _) in zip(found, logs, strict=True):
        expected = gae_by_definition(x.rewards, x.values, x.next_values, x.terminations, x.dones, 0.9, 0.8)
        np.testing.assert_allclose(x.advantages, expected, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(x.returns, expected + x.values, rtol=1e-4, atol=1e-4)
        explained = 1 - np.var(x.advantages) / (np.var(x.returns) + 1e-8)
        assert log["charts"]["losses/explained_variance"].item() == pytest.approx(explained, rel=1e-3)
    truncations = true.dones & ~true.terminations
    assert truncations.sum() > 3 and len(episodes(folder)) == true.dones.sum()


@pytest.mark.parametrize("script", VECTOR)
def test_a_checkpoint_restarts_the_environments(script, rollouts):
    """With other seeds; each rollout here begins with new episodes of new counters."""
    N, T = 2, 7
    _, found = rollouts(script, T, N, 3, checkpoint_every=N * T)
    for i, rollout in enumerate(found):
        assert rollout.obs[0].tolist() == [[N * i, 0, 0], [N * i + 1, 0, 0]]
        for name in ("rewards", "terminations", "dones"):
            np.testing.assert_array_equal(getattr(rollout, name), getattr(truth(rollout.obs), name))
    assert [env.steps for env in Counter.made[: 3 * N]] == [T] * 3 * N


def test_no_two_seeds_are_the_same():
    streams = [(seed, stream, step) for seed in (1, 2, 3) for stream in ("train", "eval") for step in (0, 1, 1024)]
    seeds, numbers = [], []
    for seed, stream, step in [*streams, streams[0]]:
        envs, _ = ppo.start_envs(make_args("ppo", env_id="CartPole-v1", seed=seed), stream, step, 8)
        seeds.append(envs.np_random_seed)
        numbers.append((torch.rand(()).item(), np.random.random()))
    assert seeds.pop() == seeds[0] and numbers.pop() == numbers[0]
    assert len({seed for row in seeds for seed in row}) == 8 * len(streams)
    assert len({x for x, _ in numbers}) == len({x for _, x in numbers}) == len(streams)


# ------------------------------------------------------------------------------------------------------- normalization


def test_running_mean_std_is_that_of_all_rows(rng):
    stats = load("ppo_continuous").RunningMeanStd(3)
    rows = rng.normal(size=(500, 3)) * [1, 100, 1e-3] + [0, 1e4, 5]
    for batch in np.split(rows, [1, 50, 51, 300]):
        stats.update(torch.from_numpy(batch))
    np.testing.assert_allclose(stats.mean, rows.mean(0))
    np.testing.assert_allclose(stats.var, rows.var(0), rtol=1e-8)
    assert stats.count == 500 and set(stats.state_dict()) == {"mean", "var", "count"}


@pytest.mark.parametrize("script", NORMALIZING)
def test_observations_are_normalized_by_earlier_rollouts(script, rollouts, monkeypatch):
    """One statistic for all environments, also for what an episode ended with; saved, and unchanged by evaluation."""
    N, T, iterations = 4, 16, 3
    monkeypatch.setattr(load(script).Agent, "value", lambda self, obs: obs[..., 2])
    folder, found = rollouts(script, T, N, iterations, norm_obs=True)
    obs = walk(N, T * iterations)
    for i, x in enumerate(found):
        raw, seen = obs[T * i : T * (i + 1)], obs[: T * i].reshape(-1, 3)
        mean, var = (seen.mean(0), seen.var(0)) if i else (0, 1)
        expected, led_to = (((y - mean) / np.sqrt(var + 1e-8)).clip(-10, 10) for y in (raw, truth(raw).next_obs))
        np.testing.assert_allclose(x.obs, expected, atol=1e-5)
        np.testing.assert_allclose(x.next_values[~x.terminations], led_to[~x.terminations][:, 2], atol=1e-5)
    agent, _ = saved_agent(script, folder)
    np.testing.assert_allclose(agent.obs_stats.mean, obs.mean((0, 1)))
    assert agent.obs_stats.count == obs.shape[0] * N


@pytest.mark.parametrize("script", NORMALIZING)
def test_rewards_are_divided_by_the_deviation_of_discounted_returns(script, rollouts):
    """Of all so far; a return starts anew where an episode ends, and where a checkpoint restarts the environments."""
    N, T = 3, 16
    _, found = rollouts(script, T, N, 4, gamma=0.9, norm_reward=True, checkpoint_every=2 * N * T)
    seen, running = [], np.zeros(N)
    for i, x in enumerate(found):
        true = truth(x.obs)
        running = running * (i != 2)
        for reward, dones in zip(true.rewards, true.dones):
            running = reward + 0.9 * running
            seen.append(running)
            running = running * ~dones
        expected = (true.rewards / np.sqrt(np.var(seen) + 1e-8)).clip(-10, 10)
        np.testing.assert_allclose(x.rewards, expected, rtol=1e-5)
        assert x.obs[0, 0, 0] == N * (i >= 2)


class Clock(gym.Env):
    """Observes 1.7e9 and 1.7e9 + 1 in turn, which float32 cannot tell apart. Every 400th step gives a reward of 1."""

    observation_space, action_space = Box(0, np.inf, (1,), np.float64), Box(-1, 1, (1,))

    def __init__(self, render_mode: str | None = None):
        self.t = 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.array([1.7e9]), {}

    def step(self, action):
        self.t += 1
        return np.array([1.7e9 + self.t % 2]), float(self.t % 400 == 0), False, self.t % 20 == 0, {}


@pytest.fixture
def clock():
    gym.register("Test/Clock-v0", Clock)
    yield "Test/Clock-v0"
    del gym.registry["Test/Clock-v0"]


@pytest.mark.parametrize("script", NORMALIZING)
def test_large_observations_are_told_apart(script, rollouts, clock):
    _, found = rollouts(script, 8, 2, 2, env_id=clock, norm_obs=True)
    assert (found[0].obs == 10).all()  # before the first update they are only clipped
    expected = np.where(np.arange(8) % 2, 1, -1)[:, None, None]
    np.testing.assert_allclose(found[1].obs, np.broadcast_to(expected, (8, 2, 1)), atol=1e-4)


@pytest.mark.parametrize("script", NORMALIZING)
def test_rare_rewards_are_clipped(script, rollouts, clock):
    """The first reward, after 400 steps, is 20 standard deviations."""
    _, found = rollouts(script, 100, 1, 4, env_id=clock, norm_reward=True, gamma=0.0)
    rewards = np.concatenate([x.rewards for x in found])
    assert (rewards[:-1] == 0).all() and rewards[-1] == 10


# --------------------------------------------------------------------------------------------------------------- Atari


class ExtraLives(FakeGames):
    """After 8 steps of a game it has 3 lives more, so that the next game begins with fewer."""

    def step(self, actions):
        *results, infos = super().step(actions)
        infos["lives"] += 3 * (self.t >= 8)
        return *results, infos


@pytest.mark.parametrize("life_loss", [False, True])
@pytest.mark.parametrize("script", IMAGES)
def test_games_hold_what_happened(script, life_loss, rollouts, monkeypatch):
    """Signs of rewards for the learner, raw scores in the log. A lost life ends for the learner, not the game."""
    N, T, iterations, module = 3, 16, 3, load(script)

    def forward(self, obs):  # V = 100 game + t, from the first pixels of the newest frame
        return self.actor.weight.sum() * torch.zeros(len(obs), 3), obs[:, -1, 0, 0] * 100.0 + obs[:, -1, 0, 1]

    monkeypatch.setattr(module.Agent, "forward", forward)
    ExtraLives.install(monkeypatch, module)
    FakeGames.made.clear()
    folder, found = rollouts(script, T, N, iterations, life_loss=life_loss)
    games, length = FakeGames.made[0], 10 + np.arange(N)
    game, t = np.divmod(np.arange(T * iterations)[:, None], length)
    ends, lost, values = t + 1 == length, life_loss & np.isin(t + 1, [4, 7]), 100 * game + t
    truncations = ends & (game % 2 == 1)
    expected = {
        "rewards": np.ones_like(t),
        "dones": ends | lost,
        "terminations": ends & ~truncations | lost,
        "values": values,
    }
    for name, array in expected.items():
        np.testing.assert_array_equal(np.concatenate([getattr(x, name) for x in found]), array)
    alive = ~expected["terminations"]
    next_values = np.concatenate([x.next_values for x in found])
    np.testing.assert_array_equal(next_values[alive], values[alive] + 1)
    shown = np.concatenate([x.obs for x in found])[..., -1, 0, :2]
    np.testing.assert_array_equal(shown, np.stack([game, t], -1))
    assert truncations.sum() > 2 and lost.any() == life_loss
    assert [(score, length) for _, score, length in episodes(folder)] == games.finished


@pytest.mark.parametrize("script", IMAGES)
@pytest.mark.parametrize("norm_obs", [False, True])
def test_frames_are_normalized(script, norm_obs, rng):
    """Less the running mean of each pixel, over one deviation of all; without --norm-obs, bytes / 255."""
    agent, _ = decided(script, norm_obs=norm_obs, bf16=False)
    (obs, _), seen = inputs(script, 5), torch.rand(20, 84, 84, dtype=torch.float64) * torch.rand(84, 84)
    agent.obs_stats.update(seen)
    x = obs.double() / 255
    if norm_obs:
        x = (x - seen.mean(0)) / (seen.var(0, correction=0).mean() + 1e-4).sqrt()
    hidden = agent.trunk(x.float())
    logits, values = agent(obs)
    torch.testing.assert_close(logits, agent.actor(hidden), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(values, agent.critic(hidden)[:, 0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("script", IMAGES)
def test_statistics_of_frames(script, rollouts, monkeypatch):
    """Of the newest frame of every eighth step; saved, and unchanged by evaluation."""
    FakeGames.install(monkeypatch, load(script))
    folder, found = rollouts(script, 16, 3, 2, norm_obs=True)
    agent, _ = saved_agent(script, folder)
    frames = np.concatenate([x.obs[::8, :, -1] for x in found]).reshape(-1, 84, 84) / 255
    np.testing.assert_allclose(agent.obs_stats.mean, frames.mean(0), atol=1e-9)
    np.testing.assert_allclose(agent.obs_stats.var, frames.var(0), atol=1e-9)
    assert agent.obs_stats.count == len(frames) == 2 * 2 * 3


@pytest.mark.parametrize("script", IMAGES)
def test_bfloat16_is_close_and_only_in_the_convolutions(script, rng):
    obs, _ = inputs(script, 4)
    agent, _ = make_agent(script, bf16=True)
    low = agent(obs)
    agent.bf16 = False
    for x, y in zip(low, agent(obs)):
        assert x.dtype == y.dtype == torch.float32 and not x.equal(y)
        torch.testing.assert_close(x, y, atol=0.02, rtol=0.05)
    assert {parameter.dtype for parameter in agent.parameters()} == {torch.float32}


def test_a_video_shows_the_newest_frame_of_the_first_game():
    games = load("ppo_atari").Games(FakeGames(2))
    games.reset()
    for _ in range(3):
        games.step(np.zeros(2, int))
    frame = np.zeros((84, 84), np.uint8)
    frame[0, 1] = 3
    np.testing.assert_array_equal(games.render(), np.kron(frame, np.ones((4, 4), np.uint8))[..., None].repeat(3, -1))


@pytest.mark.parametrize("script", GAMES)
def test_games_follow_the_stated_protocol(script):
    """The same bits as ALE's vector environment with every setting spelled out, and others without sticky actions."""
    F = 1 if script in RECURRENT else 4
    spelled = {"frameskip": 4, "maxpool": True, "grayscale": True, "stack_num": F, "img_height": 84, "img_width": 84}
    spelled |= {"noop_max": 30, "use_fire_reset": True, "episodic_life": False, "life_loss_info": False}
    spelled |= {"reward_clipping": False, "full_action_space": False, "max_num_frames_per_episode": 108_000}
    spelled |= {"autoreset_mode": gym.vector.AutoresetMode.SAME_STEP, "num_threads": 1}
    ours = load(script).make_envs(make_args(script, env_id="ALE/Breakout-v5"), 2)
    same = AtariVectorEnv("breakout", 2, repeat_action_probability=0.25, **spelled)
    not_sticky = AtariVectorEnv("breakout", 2, repeat_action_probability=0.0, **spelled)
    obs, _, _ = (envs.reset(seed=11)[0] for envs in (ours, same, not_sticky))
    assert obs[:, -F:].shape == (2, F, 84, 84) and obs.dtype == np.uint8 and ours.single_action_space.n == 4
    rng, frames, lives, score, differed, ends = np.random.default_rng(0), None, None, 0, False, 0
    for _ in range(300):
        actions = rng.integers(4, size=2)
        obs, *results, infos = ours.step(actions)
        results = [obs[:, -F:], *results]  # of a recurrent agent, without the plane before the frames
        for x, y in zip(results, same.step(actions)):
            np.testing.assert_array_equal(x, y)
        obs, rewards, terminations, truncations = results
        over = terminations | truncations
        differed |= bool((not_sticky.step(actions)[0] != obs).any())
        if frames is not None:
            assert (infos["episode_frame_number"] - frames == 4)[~over].all()  # one step is four frames
            assert np.isin(lives - infos["lives"], [0, 1])[~over].all() and (lives[over] == 1).all()
        assert (infos["lives"][over] == 5).all()  # of the next game, as FakeGames does it
        frames, lives = infos["episode_frame_number"].copy(), infos["lives"].copy()
        score, ends = score + rewards.sum(), ends + over.sum()
    assert differed and score > 0 and ends > 1
