"""PPO: its mathematics against brute force, and the data that a rollout hands to it against what really happened.

The parts that A2C has too (advantages, rollouts, actions, normalisation) are tested here for both.
"""

import itertools
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from ale_py.vector_env import AtariVectorEnv
from conftest import (
    ROOT,
    SCRIPTS,
    SPACES,
    counter_id,
    episodes,
    family,
    learner,
    load,
    make_agent,
    make_args,
    saved_agent,
    tensors,
)
from environments import Counter, FakeChoices, FakeGames
from gymnasium.vector import AutoresetMode
from torch import nn
from torch.distributions import Categorical, Independent, Normal

PPO = [name for name in SCRIPTS if hasattr(load(name), "ppo_loss")]
ON_POLICY = [name for name in SCRIPTS if hasattr(load(name), "gae")]
DISCRETE = [name for name in ON_POLICY if family(name).suffix != "_continuous"]
CONTINUOUS = [name for name in ON_POLICY if family(name).suffix == "_continuous"]
VECTOR = [name for name in ON_POLICY if family(name).suffix != "_atari"]
NORMALIZING = [name for name in ON_POLICY if hasattr(load(name), "RunningMeanStd")]
VECTOR_NORMALIZING = [name for name in NORMALIZING if name in VECTOR]
ATARI = [name for name in ON_POLICY if family(name).suffix == "_atari"]

ppo = load("ppo")  # for what has the same text in every script

# ------------------------------------------------------------------------------------------------ advantage estimation


def gae_by_definition(rewards, values, next_values, terminations, dones, gamma, lam):
    """The double sum of GAE eq. 16, which stops after the first end."""
    T, N = rewards.shape
    advantages = np.zeros((T, N))
    for t, n in np.ndindex(T, N):
        weight = 1.0
        for k in range(t, T):
            future = 0.0 if terminations[k, n] else gamma * next_values[k, n]
            advantages[t, n] += weight * (rewards[k, n] + future - values[k, n])
            weight *= gamma * lam
            if dones[k, n]:
                break
    return advantages


@pytest.mark.parametrize(
    "T, N, gamma, lam", [(40, 3, 0.99, 0.95), (17, 5, 0.5, 1.0), (25, 2, 1.0, 0.0), (1, 4, 0.9, 0.9)]
)
def test_gae_is_its_definition(rng, T, N, gamma, lam):
    rewards, values, next_values = rng.normal(size=(3, T, N))
    terminations, truncations = rng.random((2, T, N)) < 0.15
    arrays = (rewards, values, next_values, terminations, terminations | truncations)
    advantages, returns = ppo.gae(*tensors(*arrays), gamma, lam)
    expected = gae_by_definition(*arrays, gamma, lam)
    np.testing.assert_allclose(advantages, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(returns, expected + values, rtol=1e-5, atol=1e-6)


def test_gae_by_hand():
    """Ends [no, termination, no, truncation, no], gamma 0.5, lambda 0.5: every number worked out on paper."""
    rewards = np.array([[1.0], [2.0], [3.0], [4.0], [5.0]])
    values = np.array([[1.0], [2.0], [3.0], [4.0], [5.0]])
    next_values = np.array([[2.0], [100.0], [4.0], [8.0], [6.0]])  # 100: a terminated state has no value
    terminations = np.array([[False], [True], [False], [False], [False]])
    dones = np.array([[False], [True], [False], [True], [False]])
    advantages, _ = ppo.gae(*tensors(rewards, values, next_values, terminations, dones), 0.5, 0.5)
    # deltas: 1 + 1 - 1 = 1; 2 - 2 = 0; 3 + 2 - 3 = 2; 4 + 4 - 4 = 4; 5 + 3 - 5 = 3
    assert advantages.flatten().tolist() == [1.0, 0.0, 3.0, 4.0, 3.0]


def test_gae_at_a_time_limit_is_zero_for_the_true_values():
    """Reward 1 for ever is worth 10 at gamma 0.9; cutting it after 10 steps changes nothing."""
    ones, cut = torch.ones(10, 1), torch.zeros(10, 1, dtype=torch.bool)
    cut[-1] = True
    advantages, _ = ppo.gae(ones, 10 * ones, 10 * ones, torch.zeros_like(cut), cut, 0.9, 0.95)
    torch.testing.assert_close(advantages, torch.zeros(10, 1), atol=1e-5, rtol=0)
    advantages, _ = ppo.gae(ones, 10 * ones, 10 * ones, cut, cut, 0.9, 0.95)
    assert advantages[-1].item() == pytest.approx(-9)  # the same end as a termination: all the future is lost


# -------------------------------------------------------------------------------------------------------------- losses


def test_surrogate_at_ratio_one_has_the_policy_gradient(rng):
    logits = torch.randn(64, 4, requires_grad=True)
    actions, advantages = torch.randint(4, (64,)), torch.randn(64)
    logprobs = Categorical(logits=logits).log_prob(actions)
    ratio = (logprobs - logprobs.detach()).exp()
    surrogate = -ppo.clipped_surrogate(ratio, advantages, 0.2).mean()
    (gradient,) = torch.autograd.grad(surrogate, logits, retain_graph=True)
    (vanilla,) = torch.autograd.grad(-(advantages * logprobs).mean(), logits)
    torch.testing.assert_close(gradient, vanilla)
    assert gradient.abs().max() > 1e-3


@pytest.mark.parametrize(
    "ratio, advantage, gradient",
    [(1.5, 2.0, 0.0), (0.5, -2.0, 0.0), (1.5, -2.0, 2.0), (0.5, 2.0, -2.0), (1.1, 2.0, -2.0), (0.9, -2.0, 2.0)],
)
def test_surrogate_clips_only_what_went_too_far(ratio, advantage, gradient):
    x = torch.tensor([ratio], requires_grad=True)
    (-ppo.clipped_surrogate(x, torch.tensor([advantage]), 0.2)).backward()
    assert x.grad.item() == gradient


@pytest.mark.parametrize("clip_coef", [None, 0.2])
def test_value_loss(rng, clip_coef):
    new_values, values, returns = rng.normal(size=(3, 200))
    losses = []
    for v, old, target in zip(new_values, values, returns, strict=True):
        options = [(v - target) ** 2]
        if clip_coef:
            options.append((min(max(v, old - clip_coef), old + clip_coef) - target) ** 2)
        losses.append(0.5 * max(options))
    ours = ppo.value_loss(*tensors(new_values, values, returns), clip_coef)
    assert ours.numpy() == pytest.approx(np.array(losses), rel=1e-5)


def test_advantages_are_normalised(rng):
    advantages = torch.randn(100) * 5 + 3
    normal = ppo.normalize_advantages(advantages)
    assert normal.mean().item() == pytest.approx(0, abs=1e-6) and normal.std().item() == pytest.approx(1, abs=1e-5)
    torch.testing.assert_close((advantages - advantages.mean()) / advantages.std(), normal)
    assert ppo.normalize_advantages(torch.tensor([3.0])).tolist() == [3.0]
    assert ppo.normalize_advantages(torch.tensor([3.0, 3.0])).tolist() == [0.0, 0.0]


def test_explained_variance(rng):
    returns, noise = torch.randn(2, 1000)
    assert ppo.explained_variance(returns, returns) == pytest.approx(1)
    assert ppo.explained_variance(torch.full_like(returns, 7.0), returns) == pytest.approx(0, abs=1e-5)
    expected = 1 - np.var((noise - returns).numpy()) / np.var(returns.numpy())
    assert ppo.explained_variance(noise, returns) == pytest.approx(expected, rel=1e-3)
    assert math.isfinite(ppo.explained_variance(noise, torch.ones(1000)))


@pytest.mark.parametrize("script", DISCRETE)
def test_categorical(script, rng):
    logits, actions = torch.randn(6, 5, 4) * 3, torch.randint(4, (6, 5))
    logprobs, entropy = load(script).log_prob_and_entropy(logits, actions)
    torch.testing.assert_close(logprobs, Categorical(logits=logits).log_prob(actions))
    torch.testing.assert_close(entropy, Categorical(logits=logits).entropy())


@pytest.mark.parametrize("script", CONTINUOUS)
def test_gaussian(script, rng):
    mean, log_std, actions = torch.randn(6, 5, 3), torch.tensor([-1.0, 0.0, 0.7]), torch.randn(6, 5, 3) * 2
    logprobs, entropy = load(script).log_prob_and_entropy(mean, log_std, actions)
    reference = Independent(Normal(mean, log_std.exp().expand_as(mean)), 1)
    torch.testing.assert_close(logprobs, reference.log_prob(actions))
    torch.testing.assert_close(entropy.expand(6, 5), reference.entropy())


@pytest.mark.parametrize("script", PPO)
@pytest.mark.parametrize("norm_adv, clip_vloss", [(True, True), (False, False)])
def test_loss_is_the_sum_of_its_parts(script, norm_adv, clip_vloss, rng):
    """PPO eq. 9 and the metrics, from probabilities that torch.distributions computes, off the old policy."""
    module, B = load(script), 24
    flags = {"norm_adv": norm_adv, "clip_vloss": clip_vloss, "clip_coef": 0.1, "ent_coef": 0.03, "vf_coef": 0.7}
    agent, args = make_agent(script, **flags)
    _, action_space = SPACES[family(script).suffix]
    advantages, returns, values = torch.randn(3, B)
    if script in ATARI:
        obs, actions = torch.rand(B, 84, 84, 4), torch.randint(action_space.n, (B,))
        logits, new_values = agent(obs)
        policy = Categorical(logits=logits)
    elif script in CONTINUOUS:
        obs, actions = torch.randn(B, 3), torch.randn(B, 2)
        policy, new_values = Independent(Normal(agent.actor(obs), agent.log_std.exp()), 1), agent.value(obs)
    else:
        obs, actions = torch.randn(B, 3), torch.randint(action_space.n, (B,))
        policy, new_values = Categorical(logits=agent.actor(obs)), agent.value(obs)
    new_logprobs = policy.log_prob(actions)
    logprobs = new_logprobs.detach() + 0.2 * torch.randn(B)
    loss, _ = module.ppo_loss(agent, args, obs, actions, logprobs, advantages, returns, values)

    ratio = (new_logprobs - logprobs).exp()
    scaled = (advantages - advantages.mean()) / (advantages.std() + 1e-8) if norm_adv else advantages
    pg_loss = -torch.minimum(scaled * ratio, scaled * ratio.clamp(0.9, 1.1)).mean()
    squared = (new_values - returns) ** 2
    if clip_vloss:
        squared = torch.maximum(squared, (values + (new_values - values).clamp(-0.1, 0.1) - returns) ** 2)
    v_loss, entropy = 0.5 * squared.mean(), policy.entropy().mean()
    torch.testing.assert_close(loss, pg_loss - 0.03 * entropy + 0.7 * v_loss)
    args.update_epochs = args.num_minibatches = 1
    batch = (obs, actions, logprobs, advantages, returns, values)
    named = module.update(agent, torch.optim.SGD(agent.parameters(), lr=0.0), module.ppo_gradient, batch, args)
    expected = {
        "losses/policy_loss": pg_loss.item(),
        "losses/value_loss": v_loss.item(),
        "losses/entropy": entropy.item(),
        "losses/approx_kl": (ratio - 1 - ratio.log()).mean().item(),
        "losses/clipfrac": ((ratio - 1).abs() > 0.1).float().mean().item(),
    }
    assert {name: named[name] for name in expected} == pytest.approx(expected, rel=1e-4)
    assert 0 < named["losses/clipfrac"] < 1 and named["losses/approx_kl"] > 0


# -------------------------------------------------------------------------------------------------------------- update


@pytest.mark.parametrize("target_kl, epochs", [(None, 5), (0.1, 5), (0.01, 1)])
def test_target_kl_stops_the_epochs(target_kl, epochs):
    agent, args = make_agent("ppo", update_epochs=5, num_minibatches=4, target_kl=target_kl)
    seen = []

    def gradient_fn(agent, args, rows):
        assert all(parameter.grad is None for parameter in agent.parameters())  # nothing is left of the last minibatch
        sum(parameter.sum() for parameter in agent.parameters()).backward()
        seen.append(rows)
        return torch.full((4, len(rows)), 0.2)  # log ratios of 0.2 have a mean of ratio - 1 - log ratio of 0.0214

    optimizer = torch.optim.SGD(agent.parameters(), lr=0.0)
    ppo.update(agent, optimizer, gradient_fn, (torch.arange(12),), args)
    assert len(seen) == 4 * epochs
    for i in range(0, len(seen), 4):
        epoch = seen[i : i + 4]
        assert sorted(torch.cat(epoch).tolist()) == list(range(12))  # every row once
        assert {len(rows) for rows in epoch} == {3}
    if epochs > 1:
        assert torch.cat(seen[:4]).tolist() != torch.cat(seen[4:8]).tolist()  # shuffled anew


@pytest.mark.parametrize("script", PPO)
def test_gradient_norm_is_limited(script, rng):
    """A gradient that is too long keeps its direction; one that is not stays as it is."""
    module, B = load(script), 8
    agent, args = make_agent(script)
    obs = torch.rand(B, 84, 84, 4) if script in ATARI else torch.randn(B, 3)
    actions = torch.randn(B, 2) if script in CONTINUOUS else torch.randint(SPACES[family(script).suffix][1].n, (B,))

    def gradient(limit: float) -> torch.Tensor:
        agent.zero_grad()
        args.max_grad_norm = limit
        parts = module.ppo_gradient(agent, args, obs, actions, *([torch.zeros(B)] * 2), torch.ones(B), torch.zeros(B))
        assert parts.shape == (4, B) and not parts.requires_grad
        return torch.cat([p.grad.flatten() for p in agent.parameters() if p.grad is not None])

    whole = gradient(1e9)
    assert whole.norm() > 0
    torch.testing.assert_close(gradient(whole.norm().item() / 4), whole / 4, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(gradient(whole.norm().item() * 4), whole)


@pytest.mark.parametrize("script", ON_POLICY)
def test_learning_rate_falls_from_full_to_above_zero(script, train, monkeypatch):
    module, rates = load(script), []
    original = getattr(module, learner(module))

    def learn(agent, optimizer, *rest):
        rates.append(optimizer.param_groups[0]["lr"])
        return original(agent, optimizer, *rest)

    monkeypatch.setattr(module, learner(module), learn)
    flags = {"num_envs": 2, "num_steps": 8, "total_timesteps": 5 * 16, "checkpoint_every": 0, "update_epochs": 1}
    train(script, learning_rate=0.002, anneal_lr=True, eval_episodes=1, **flags)
    assert rates == pytest.approx([0.002, 0.0016, 0.0012, 0.0008, 0.0004])
    rates.clear()
    train(script, "constant", learning_rate=0.002, anneal_lr=False, eval_episodes=1, **flags)
    assert rates == pytest.approx([0.002] * 5)


@pytest.mark.parametrize("script", PPO)
def test_one_row_per_minibatch(script, train):
    """Nothing to normalise, and nothing that is not a number."""
    flags = {"num_envs": 1, "num_steps": 4, "total_timesteps": 8, "num_minibatches": 4, "eval_episodes": 1}
    agent, _ = saved_agent(script, train(script, checkpoint_every=0, norm_adv=True, **flags))
    assert all(parameter.isfinite().all() for parameter in agent.parameters())


@pytest.mark.parametrize("script", PPO)
def test_the_first_minibatch_has_ratio_one(script, train, spy):
    """What the update computes with unchanged weights is what the rollout stored, also with statistics that moved."""
    module = load(script)
    updates, computed = spy(module, "update"), spy(module, "log_prob_and_entropy")
    flags = {"num_envs": 4, "num_steps": 16, "total_timesteps": 4 * 64, "checkpoint_every": 0, "eval_episodes": 1}
    train(script, update_epochs=1, num_minibatches=1, norm_obs=True, norm_reward=True, bf16=False, **flags)
    assert len(updates) == 4 and len(computed) == 8  # in turn: at the end of the rollout, in the update
    for (_, metrics), (_, stored), (_, again) in zip(updates, computed[::2], computed[1::2], strict=True):
        assert metrics["losses/approx_kl"] == pytest.approx(0, abs=1e-7)
        assert metrics["losses/clipfrac"] == 0
        torch.testing.assert_close(stored[0].flatten().sort()[0], again[0].sort()[0], atol=1e-5, rtol=0)


# ---------------------------------------------------------------------------------------------------- networks, actions


@pytest.mark.parametrize("script", ON_POLICY)
def test_weights_are_orthogonal(script):
    """W W^T = gain^2 I (or W^T W, where that is the smaller), with the gains of Huang et al.; biases 0."""
    agent, _ = make_agent(script)
    layers = {name: layer for name, layer in agent.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)}
    heads = {"actor": 0.01, "critic": 1.0}
    last = {kind: [layer for name, layer in layers.items() if name.startswith(kind)][-1] for kind in heads}
    assert len(layers) > 4
    for layer in layers.values():
        gain = next((heads[kind] for kind in heads if layer is last[kind]), math.sqrt(2))
        W = layer.weight.detach().flatten(1)
        W = W if W.shape[0] <= W.shape[1] else W.T
        torch.testing.assert_close(W @ W.T, gain**2 * torch.eye(len(W)), atol=1e-5, rtol=1e-4)
        assert layer.bias.abs().max() == 0


@pytest.mark.parametrize("script", CONTINUOUS)
def test_actions_reach_each_bound_of_their_dimension(script):
    agent, _ = make_agent(script)
    policy = torch.tensor([[-1.0, -1.0], [1.0, 1.0], [0.0, 0.0], [5.0, -5.0], [0.5, -0.5]])
    expected = [[-1, -2], [3, 0.5], [1, -0.75], [3, -2], [2, -1.375]]
    torch.testing.assert_close(agent.to_env(policy), torch.tensor(expected))
    agent.actor[-1].weight.data.zero_()
    agent.actor[-1].bias.data.copy_(torch.tensor([0.5, -0.5]))
    torch.testing.assert_close(agent.act(torch.randn(3, 3)), torch.tensor([[2, -1.375]] * 3))  # greedy: the mean


@pytest.mark.parametrize("script", CONTINUOUS)
def test_actions_stay_in_bounds_and_differ(script, train, spy):
    """In a run: each environment and each dimension has noise of its own, on the mean's scale."""
    Counter.made.clear()
    updates = spy(load(script), learner(load(script)))
    flags = {"num_envs": 4, "num_steps": 256, "total_timesteps": 1024, "eval_episodes": 1, "checkpoint_every": 0}
    train(script, env_id=counter_id(script), log_std_init=0.0, **flags)
    given = np.array([env.actions for env in Counter.made[:4]])  # (N, T, A)
    assert (given >= [-1, -2]).all() and (given <= [3, 0.5]).all()
    assert (given == [-1, -2]).any((0, 1)).all() and (given == [3, 0.5]).any((0, 1)).all()  # noise of 1 clips often
    policy = updates[0][0]["batch"][1].reshape(256, 4, 2)
    noise = policy.flatten(1) - policy.flatten(1).mean(0)
    assert noise.std(0).numpy() == pytest.approx(np.ones(8), abs=0.2)
    assert (noise.T.corrcoef() - torch.eye(8)).abs().max() < 0.3
    expected = np.clip(policy.transpose(0, 1).numpy(), -1, 1) * [2, 1.25] + [1, -0.75]
    np.testing.assert_allclose(given, expected, atol=1e-5)


@pytest.mark.parametrize("script", DISCRETE)
def test_actions_have_the_frequencies_of_the_policy(script, train, rollouts, monkeypatch):
    module, N, T = load(script), 4, 1000
    logits = torch.tensor([1.0, 0.0, -1.5])
    if script in ATARI:
        FakeGames.install(monkeypatch, module)
        monkeypatch.setattr(module.Agent, "forward", lambda self, obs: (logits.expand(len(obs), 3), obs[:, 0, 0, 0]))
        env_id = "ALE/Pong-v5"
    else:
        original = module.Agent.__init__

        def init(self, *args):
            original(self, *args)
            self.actor[-1].weight.data.zero_()
            self.actor[-1].bias.data.copy_(logits)

        monkeypatch.setattr(module.Agent, "__init__", init)
        env_id = "Acrobot-v1"
    found = rollouts(script)
    flags = {"num_minibatches": 1, "checkpoint_every": 0}
    train(script, env_id=env_id, num_envs=N, num_steps=T, total_timesteps=N * T, **flags)
    ((batch, _),) = found
    actions, probabilities = torch.from_numpy(batch[1].reshape(T, N)), logits.softmax(0).numpy()
    counts = torch.bincount(actions.flatten(), minlength=3).numpy()
    chi_square = ((counts - N * T * probabilities) ** 2 / (N * T * probabilities)).sum()
    assert chi_square < 25  # two degrees of freedom: once in 270,000 seeds
    following = actions[1:] * 3 + actions[:-1]  # and each step is drawn anew
    pairs = torch.bincount(following.flatten(), minlength=9).numpy() / following.numel()
    np.testing.assert_allclose(pairs, np.outer(probabilities, probabilities).flatten(), atol=0.04)
    agree = (actions[:, 0] == actions[:, 1]).float().mean().item()  # in each environment too
    assert agree == pytest.approx((probabilities**2).sum(), abs=0.08)


# ------------------------------------------------------------------------------------------------------- normalisation


@pytest.mark.parametrize("script", NORMALIZING)
def test_running_mean_std_is_that_of_all_rows(script, rng):
    stats = load(script).RunningMeanStd(3)
    rows = rng.normal(size=(500, 3)) * [1, 100, 1e-3] + [0, 1e4, 5]
    for batch in np.split(rows, [1, 50, 51, 300]):
        stats.update(torch.from_numpy(batch))
    np.testing.assert_allclose(stats.mean, rows.mean(0))
    np.testing.assert_allclose(stats.var, rows.var(0), rtol=1e-8)
    assert stats.count == 500 and set(stats.state_dict()) == {"mean", "var", "count"}


@pytest.mark.parametrize("script", VECTOR_NORMALIZING)
def test_discounted_returns_start_anew_after_any_end(script, rng):
    T, N, gamma = 60, 3, 0.9
    rewards, dones, start = rng.normal(size=(T, N)), rng.random((T, N)) < 0.2, rng.normal(size=N)
    expected, running = np.zeros((T, N)), start.copy()
    for t, n in np.ndindex(T, N):
        running[n] = rewards[t, n] + gamma * running[n]
        expected[t, n] = running[n]
        if dones[t, n]:
            running[n] = 0.0
    returns, last = load(script).discounted_returns(rewards, dones, start, gamma)
    np.testing.assert_allclose(returns, expected)
    np.testing.assert_allclose(last, running)


@pytest.mark.parametrize("script", VECTOR_NORMALIZING)
def test_reward_normalisation_in_a_run(script, train, spy):
    """GAE gets rewards divided by the deviation of all discounted returns so far: one scale for all environments."""
    module = load(script)
    Counter.made.clear()
    rollouts = spy(module, "gae")
    flags = {"num_envs": 3, "num_steps": 16, "total_timesteps": 3 * 48, "num_minibatches": 1, "eval_episodes": 1}
    train(script, env_id=counter_id(script), gamma=0.9, norm_reward=True, norm_obs=False, checkpoint_every=0, **flags)
    running, seen, t = np.zeros(3), [], np.zeros(3, int)
    for bound, _ in rollouts:
        raw = np.zeros((16, 3))
        for step, n in np.ndindex(16, 3):
            t[n] += 1
            raw[step, n] = n + t[n]
            running[n] = raw[step, n] + 0.9 * running[n]
            seen.append(running[n])
            if t[n] == 3 + n:  # the length of this environment's episodes, however they end
                t[n], running[n] = 0, 0.0
        expected = np.clip(raw / np.sqrt(np.var(seen) + 1e-8), -10, 10)
        np.testing.assert_allclose(bound["rewards"], expected, rtol=1e-5)


@pytest.mark.parametrize("script", VECTOR_NORMALIZING)
def test_observation_statistics_are_saved_and_frozen(script, train, monkeypatch):
    """A fresh process acts as the trained agent did, and evaluating it left the statistics as they were."""
    module, agents = load(script), []
    original = module.evaluate

    def evaluate(args, agent):
        agents.append(agent)
        before = agent.obs_stats.count.item()
        returns = original(args, agent)
        assert agent.obs_stats.count.item() == before == 256 and agent.obs_stats.mean.abs().max() > 0.01
        return returns

    monkeypatch.setattr(module, "evaluate", evaluate)
    flags = {"num_envs": 2, "num_steps": 32, "total_timesteps": 256, "checkpoint_every": 0}
    folder = train(script, norm_obs=True, **flags)
    (agent,) = agents
    obs = np.random.default_rng(5).normal(size=(100, len(agent.obs_stats.mean))).astype(np.float32) * 3
    code = f"""
import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
import pathlib, numpy as np, torch, conftest
torch.set_num_threads(1)
agent, args = conftest.saved_agent({script!r}, pathlib.Path({str(folder)!r}))
obs = np.random.default_rng(5).normal(size=(100, {obs.shape[1]})).astype(np.float32) * 3
print(agent.act(torch.from_numpy(obs)).detach().numpy().tobytes().hex())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    with torch.no_grad():
        assert done.stdout.strip() == agent.act(torch.from_numpy(obs)).numpy().tobytes().hex(), done.stderr


@pytest.mark.parametrize("script", VECTOR_NORMALIZING)
@pytest.mark.parametrize("bad", [70, 190, 250])
def test_one_infinite_observation_spoils_no_checkpoint_and_no_agent(script, bad, train, spoil, tmp_path):
    """It is clipped, so that the loss stays finite, but the statistics do not: at whatever step it comes, of 256."""
    spoil(load(script), lambda steps, obs, rewards: (np.full_like(obs, np.inf) if steps == bad else obs, rewards))
    flags = {"num_envs": 2, "num_steps": 32, "total_timesteps": 256, "checkpoint_every": 64, "norm_obs": True}
    with pytest.raises(SystemExit) as end:
        train(script, **flags)
    assert end.value.code == 3
    checkpoint = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert 0 < checkpoint["step"] <= bad and all(x.isfinite().all() for x in checkpoint["agent"].values())
    assert not (tmp_path / "run" / "agent.safetensors").exists()


@pytest.mark.parametrize("script", VECTOR_NORMALIZING)
def test_the_value_function_sees_what_is_normalised(script, train, rollouts, monkeypatch):
    """Of every state, also of the last one of an episode that was cut: here the statistics add 1000."""
    module, N, T = load(script), 4, 16
    monkeypatch.setattr(module.Agent, "normalize", lambda self, obs: obs + 1000)
    monkeypatch.setattr(module.Agent, "value", lambda self, obs: obs[..., 2])
    found = rollouts(script)
    flags = {"num_envs": N, "num_steps": T, "total_timesteps": N * T, "num_minibatches": 1, "checkpoint_every": 0}
    Counter.made.clear()
    train(script, env_id=counter_id(script), norm_obs=True, norm_reward=False, **flags)
    ((batch, inputs),) = found
    t = batch[0].reshape(T, N, 3)[..., 2] - 1000
    cut = inputs["dones"] & ~inputs["terminations"]
    np.testing.assert_array_equal(inputs["values"], t + 1000)
    np.testing.assert_array_equal(inputs["next_values"][cut], t[cut] + 1001)
    assert cut.sum() >= 4 and t.max() == 5 and t.min() == 0


@pytest.mark.parametrize("script", ATARI)
def test_pictures_are_normalised(script, train, rollouts, monkeypatch):
    """Less the mean of each pixel, over one deviation of all, of every eighth step of all earlier rollouts."""
    module, N, T = load(script), 3, 16
    FakeChoices.install(monkeypatch, module)
    found, shown, original = rollouts(script), [], module.to_tensor
    monkeypatch.setattr(module, "to_tensor", lambda obs, args: shown.append(obs) or original(obs, args))
    flags = {"num_envs": N, "num_steps": T, "total_timesteps": 3 * N * T, "num_minibatches": 1, "checkpoint_every": 0}
    folder = train(script, norm_obs=True, bf16=False, eval_episodes=2, **flags)
    raw, pictures = [], [picture.transpose(0, 2, 3, 1) / 255 for picture in shown]
    for (batch, _), begin in zip(found, range(0, 3 * (T + 1), T + 1), strict=True):  # T steps, and what came before
        x = np.stack(pictures[begin : begin + T])
        mean, var = (np.mean(raw, (0, 1)), np.var(raw, (0, 1)).mean()) if raw else (0.0, 1.0)
        np.testing.assert_allclose(batch[0].reshape(x.shape), (x - mean) / np.sqrt(var + 1e-4), atol=1e-3)
        raw += [picture[..., -1:] for picture in pictures[begin + 1 : begin + T + 1 : 8]]
    agent, args = saved_agent(script, folder)  # with statistics that the evaluation has not changed
    assert agent.obs_stats.count == 3 * 2 * N
    np.testing.assert_allclose(agent.obs_stats.mean, np.mean(raw, (0, 1)), atol=1e-6)
    x = agent.normalize(original(shown[5], args))
    expected = (pictures[5] - np.mean(raw, (0, 1))) / np.sqrt(np.var(raw, (0, 1)).mean() + 1e-4)
    np.testing.assert_allclose(x, expected, atol=1e-3)
    assert x.dtype == torch.float32


# --------------------------------------------------------------------------------------------------------------- seeds


def test_no_two_seeds_are_the_same():
    train, evaluation = ppo.TRAIN, ppo.EVAL
    purposes = [(train, 0), (train, 1), (train, 1024), (evaluation,), (evaluation, 0)]
    streams, seeds = [], []
    for seed, purpose in itertools.product((1, 2, 3), purposes):
        seeds += ppo.reseed(seed, *purpose, num_envs=16)
        streams.append((torch.rand(()).item(), np.random.random()))
    assert len(seeds) == len(set(seeds)) == 3 * 5 * 16
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert len({x for x, _ in streams}) == len({x for _, x in streams}) == len(streams)
    again = ppo.reseed(1, train, 0, num_envs=16)
    assert again == seeds[:16] and (torch.rand(()).item(), np.random.random()) == streams[0]


# ------------------------------------------------------------------------------- the data against what really happened


@pytest.mark.parametrize("script", VECTOR)
def test_rollouts_hold_what_happened(script, train, rollouts, monkeypatch):
    """Four counters, three rollouts: no row of an autoreset, no end mistaken, no value of the wrong state."""
    N, T, module = 4, 16, load(script)
    monkeypatch.setattr(module.Agent, "value", lambda self, obs: obs[..., 1] * 100 + obs[..., 2])  # V = 100 episode + t
    found = rollouts(script)
    Counter.made.clear()
    flags = {"norm_obs": False, "norm_reward": False, "num_minibatches": 1, "checkpoint_every": 0}
    folder = train(script, env_id=counter_id(script), num_envs=N, num_steps=T, total_timesteps=3 * N * T, **flags)

    assert [env.steps for env in Counter.made[:N]] == [3 * T] * N
    cuts = 0
    for n in range(N):
        episode = t = 0
        for iteration, (batch, inputs) in enumerate(found):
            obs, actions = batch[0].reshape(T, N, 3), batch[1].reshape(T, N, -1)
            for step in range(T):
                assert obs[step, n].tolist() == [n, episode, t], (iteration, step)
                if script in DISCRETE:
                    assert actions[step, n] == Counter.made[n].actions[iteration * T + step]
                t += 1
                is_end, is_cut = t == 3 + n, t == 3 + n and episode % 2 == 1
                assert inputs["rewards"][step, n] == n + t
                assert inputs["dones"][step, n] == is_end
                assert inputs["terminations"][step, n] == (is_end and not is_cut)
                assert inputs["values"][step, n] == 100 * episode + t - 1
                if not is_end or is_cut:  # the state that was reached; what a terminated one is worth is not asked
                    assert inputs["next_values"][step, n] == 100 * episode + t
                cuts += is_cut
                episode, t = (episode + 1, 0) if is_end else (episode, t)
    assert cuts > 8

    logged = [(episode_return, length) for _, episode_return, length in episodes(folder)]
    assert sorted(logged) == sorted(row for env in Counter.made[:N] for row in env.finished)
    ends = [(k + 1) * N * (3 + n) for n in range(N) for k in range(3 * T // (3 + n))]
    assert [step for step, *_ in episodes(folder)] == sorted(ends)


@pytest.mark.parametrize("script", VECTOR)
def test_a_checkpoint_cuts_the_episodes(script, train, rollouts):
    """The environments are made anew with other seeds; what was running is not logged, nor mixed with what follows."""
    N, T = 2, 7
    found = rollouts(script)
    Counter.made.clear()
    flags = {"norm_obs": False, "norm_reward": False, "num_minibatches": 1, "checkpoint_every": N * T}
    folder = train(script, env_id=counter_id(script), num_envs=N, num_steps=T, total_timesteps=3 * N * T, **flags)
    assert len(Counter.made) == 3 * N and [env.steps for env in Counter.made] == [T] * 3 * N
    for batch, _ in found:
        assert batch[0].reshape(T, N, 3)[0, :, 1:].tolist() == [[0, 0]] * N  # each rollout begins with new episodes
    logged = [(episode_return, length) for _, episode_return, length in episodes(folder)]
    assert sorted(logged) == sorted(row for env in Counter.made for row in env.finished)
    seeds = [env.np_random_seed for env in Counter.made]
    assert len(set(seeds)) == len(seeds)


@pytest.fixture
def fake_games(monkeypatch):
    """fake_games(script, num_envs) -> the games it will play; V = 100 game + step, read off the picture."""

    def install(script: str, num_envs: int) -> FakeGames:
        module, games = load(script), FakeGames(num_envs)

        def forward(self, obs):
            corner = (obs[:, 0, :2, -1].float() * 255).round()
            return torch.zeros(len(obs), 3), corner[:, 0] * 100 + corner[:, 1]

        monkeypatch.setattr(module, "start_envs", lambda args, seeds, **_: (games, games.reset()[0]))
        monkeypatch.setattr(module.Agent, "forward", forward)
        return games

    return install


@pytest.mark.parametrize("life_loss", [False, True])
@pytest.mark.parametrize("script", ATARI)
def test_games_hold_what_happened(script, life_loss, train, rollouts, fake_games):
    """Signs for the learner and raw scores in the log; with --life-loss ends for the learner, the game goes on."""
    N, T, iterations = 3, 16, 3
    games, found = fake_games(script, N), rollouts(script)
    flags = {"num_envs": N, "num_steps": T, "total_timesteps": iterations * N * T, "num_minibatches": 1}
    folder = train(script, life_loss=life_loss, checkpoint_every=0, norm_obs=False, bf16=False, **flags)

    assert games.steps == iterations * N * T
    cuts = lost = 0
    for n in range(N):
        game = t = 0
        for batch, inputs in found:
            pixels = (batch[0].reshape(T, N, 84, 84, 4)[..., 0, :2, -1] * 255).round()
            for step in range(T):
                assert pixels[step, n].tolist() == [game, t]
                t += 1
                is_end, is_cut = t == 10 + n, t == 10 + n and game % 2 == 1
                is_loss = life_loss and t in (4, 7)
                assert inputs["rewards"][step, n] == 1
                assert inputs["terminations"][step, n] == (is_loss or (is_end and not is_cut))
                assert inputs["dones"][step, n] == (is_loss or is_end)
                assert inputs["values"][step, n] == 100 * game + t - 1
                if not inputs["terminations"][step, n]:
                    assert inputs["next_values"][step, n] == 100 * game + t
                cuts, lost = cuts + is_cut, lost + is_loss
                game, t = (game + 1, 0) if is_end else (game, t)
    assert cuts > 2 and (lost > 10) == life_loss
    logged = [(episode_return, length) for _, episode_return, length in episodes(folder)]
    assert logged == games.finished and len(logged) > 8


# ------------------------------------------------------------------------------------------------- the games themselves


@pytest.mark.parametrize("script", ATARI)
def test_games_are_played_by_the_stated_protocol(script):
    """The same bits as ALE's own vector environment with every setting spelled out, and others without one of them."""
    module, seeds = load(script), [11, 12]
    spelled = {
        "repeat_action_probability": 0.25,
        "frameskip": 4,
        "maxpool": True,
        "grayscale": True,
        "stack_num": 4,
        "img_height": 84,
        "img_width": 84,
        "noop_max": 30,
        "use_fire_reset": True,
        "episodic_life": False,
        "life_loss_info": False,
        "reward_clipping": False,
        "full_action_space": False,
        "max_num_frames_per_episode": 108_000,
        "autoreset_mode": AutoresetMode.SAME_STEP,
        "num_threads": 1,
    }
    ours, obs = module.start_envs(make_args(script, env_id="ALE/Breakout-v5"), seeds)
    same = AtariVectorEnv("breakout", 2, **spelled)
    not_sticky = AtariVectorEnv("breakout", 2, **spelled | {"repeat_action_probability": 0.0})
    assert ours.single_action_space.n == same.single_action_space.n == 4
    np.testing.assert_array_equal(obs, same.reset(seed=np.array(seeds))[0])
    not_sticky.reset(seed=np.array(seeds))
    rng, frames, rewards_seen, differed = np.random.default_rng(0), None, 0, False
    for _ in range(250):
        actions = rng.integers(4, size=2)
        obs, rewards, terminated, truncated, infos = ours.step(actions)
        reference = same.step(actions)
        for x, y in zip((obs, rewards, terminated, truncated), reference, strict=False):
            np.testing.assert_array_equal(x, y)
        differed |= bool((not_sticky.step(actions)[0] != obs).any())
        if frames is not None and not (terminated | truncated).any():
            assert (infos["episode_frame_number"] - frames == 4).all()  # one step is four frames
        frames = None if (terminated | truncated).any() else infos["episode_frame_number"].copy()
        rewards_seen += rewards.sum()
    assert differed and rewards_seen > 0
    assert obs.shape == (2, 4, 84, 84) and obs.dtype == np.uint8
    agent, args = make_agent(script, bf16=False, norm_obs=False)
    x = agent.normalize(module.to_tensor(obs, args))
    assert x.shape == (2, 84, 84, 4) and x.max() <= 1
    np.testing.assert_allclose(x.numpy() * 255, obs.transpose(0, 2, 3, 1), atol=1e-4)  # newest frame last


@pytest.mark.parametrize("script", ATARI)
def test_life_loss_in_a_real_game(script, train, rollouts):
    """Breakout has five lives: four losses before each end of a game."""
    found = rollouts(script)
    flags = {"num_envs": 4, "num_steps": 256, "total_timesteps": 1024, "num_minibatches": 1, "checkpoint_every": 0}
    folder = train(script, env_id="ALE/Breakout-v5", life_loss=True, **flags)
    ((_, inputs),) = found
    games = len(episodes(folder))
    assert games >= 4
    assert 4 * games < inputs["terminations"].sum() - games < 4 * (games + 4)
    assert (inputs["dones"] == inputs["terminations"]).all()
    assert set(np.unique(inputs["rewards"])) <= {-1.0, 0.0, 1.0}
    assert max(score for _, score, _ in episodes(folder)) > 1


@pytest.mark.slow  # 27,000 steps
@pytest.mark.parametrize("script", ATARI)
def test_a_game_without_end_is_cut(script):
    """Breakout without FIRE stands still once the first ball is lost: 108,000 frames, cut and not ended."""
    envs, _ = load(script).start_envs(make_args(script, env_id="ALE/Breakout-v5"), [3])
    terminated = truncated = [False]
    steps = 0
    while not terminated[0] and not truncated[0] and steps < 28_000:
        _, _, terminated, truncated, infos = envs.step(np.zeros(1, np.int64))
        steps += 1
    assert truncated[0] and not terminated[0]
    assert 26_990 < steps <= 27_000 and "final_obs" in infos


@pytest.mark.parametrize("script", ATARI)
def test_bfloat16_only_touches_the_convolutions(script, rng):
    module = load(script)
    agent, args = make_agent(script, bf16=True)
    obs = rng.integers(256, size=(4, 4, 84, 84), dtype=np.uint8)
    low = agent.normalize(module.to_tensor(obs, args))
    high = make_agent(script, bf16=False)[0].normalize(module.to_tensor(obs, args))
    assert low.dtype == torch.bfloat16 and high.dtype == torch.float32
    for x, y in zip(agent(low), agent(high), strict=True):
        assert x.dtype == y.dtype == torch.float32
        torch.testing.assert_close(x, y, atol=0.02, rtol=0.05)
    assert {parameter.dtype for parameter in agent.parameters()} == {torch.float32}
