"""SAC: densities by numerical integration, losses and gradients against their definitions, and what a run does."""

import math
from copy import deepcopy
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import SCRIPTS, counter_id, load, make_agent, make_args
from environments import Counter, Misfit
from gymnasium.spaces import Box
from torch.distributions import Independent, Normal, TanhTransform, TransformedDistribution

SAC = [name for name in SCRIPTS if hasattr(load(name), "Critics")]
CONTINUOUS = [name for name in SAC if hasattr(load(name), "tanh_log_prob")]
DISCRETE = [name for name in SAC if hasattr(load(name), "soft_values")]

B = 50  # rows of a batch


def batch(script: str, rng) -> list[torch.Tensor]:
    """obs, actions, rewards, next_obs, terminations, for the agents of make_agent."""
    actions = torch.rand(B, 2) * 2 - 1 if script in CONTINUOUS else torch.randint(4, (B,))
    terminations = torch.from_numpy(rng.random(B) < 0.3)
    assert 0 < terminations.sum() < B
    return [torch.randn(B, 3), actions, torch.randn(B), torch.randn(B, 3), terminations]


def make_parts(script: str, **flags):
    """An agent whose two critics disagree on which is the smaller, a target that is not its copy, and the flags."""
    agent, args = make_agent(script, **flags)
    with torch.no_grad():
        for parameter in agent.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    target = load(script).Critics(3, 2 if script in CONTINUOUS else 4, args.hidden_size).requires_grad_(False)
    return agent, target, args


def gradients(loss: torch.Tensor, module: torch.nn.Module) -> list[torch.Tensor]:
    return torch.autograd.grad(loss, list(module.parameters()), retain_graph=True)


def assert_gradients(module: torch.nn.Module, expected: list[torch.Tensor]) -> None:
    ours = [parameter.grad for parameter in module.parameters()]
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-6)
    assert max(gradient.abs().max() for gradient in ours) > 1e-3


# -------------------------------------------------------------------------------------------------- squashed Gaussian


def squashed(mean: torch.Tensor, log_std: torch.Tensor) -> TransformedDistribution:
    return TransformedDistribution(Independent(Normal(mean, log_std.exp()), 1), [TanhTransform()])


@pytest.mark.parametrize("script", CONTINUOUS)
@pytest.mark.parametrize("mean, std", [(0.0, 0.5), (0.8, 0.3), (-0.3, 1.5), (0.0, 0.05)])
def test_density_integrates_to_one(script, mean, std):
    """Over the action, in (-1, 1): not over what is squashed."""
    actions = torch.linspace(-1, 1, 200_003, dtype=torch.float64)[1:-1, None]
    u = actions.atanh()
    logprobs = load(script).tanh_log_prob(u, (u - mean) / std, torch.full_like(u, math.log(std)))
    assert torch.trapezoid(logprobs.exp(), actions[:, 0]).item() == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("script", CONTINUOUS)
def test_log_prob_is_that_of_the_transformed_distribution(script, rng):
    u, mean, log_std = torch.randn(3, 100, 4, dtype=torch.float64)
    logprobs = load(script).tanh_log_prob(u, (u - mean) / log_std.exp(), log_std)
    torch.testing.assert_close(logprobs, squashed(mean, log_std).log_prob(u.tanh()))


@pytest.mark.parametrize("script", CONTINUOUS)
def test_log_prob_is_finite_where_tanh_is_one(script):
    u = torch.tensor([[-20.0], [20.0]], requires_grad=True)
    assert u.tanh().abs().eq(1).all()
    logprobs = load(script).tanh_log_prob(u, torch.zeros(2, 1), torch.zeros(2, 1))
    # 1 - tanh(u)^2 = 4 / (e^u + e^-u)^2, which is 4 e^-2|u| for a large |u|
    assert logprobs.tolist() == pytest.approx([-0.5 * math.log(2 * math.pi) - math.log(4) + 40] * 2)
    logprobs.sum().backward()
    assert u.grad.flatten().tolist() == pytest.approx([-2, 2])


@pytest.mark.parametrize("script", CONTINUOUS)
def test_sample_gives_actions_with_their_density(script, rng):
    agent, _, _ = make_parts(script)
    obs, noise = torch.randn(B, 3), torch.randn(B, 2)
    actions, logprobs = agent.sample(obs, noise)
    mean, log_std = agent.policy(obs)
    torch.testing.assert_close(actions, (mean + log_std.exp() * noise).tanh())
    inside = actions.abs().amax(-1) < 0.999  # beyond, the inverse of tanh has no digits left
    assert inside.sum() > B / 2
    torch.testing.assert_close(
        logprobs[inside], squashed(mean, log_std).log_prob(actions)[inside], rtol=1e-3, atol=1e-3
    )
    assert agent.act(obs).equal(agent.to_env(mean.tanh()))


@pytest.mark.parametrize("script", CONTINUOUS)
def test_standard_deviation_stays_in_its_range(script):
    agent, _ = make_agent(script)
    _, log_std = agent.policy(1e6 * torch.randn(100, 3))
    assert log_std.min() == -5 and log_std.max() == 2


@pytest.mark.parametrize("script", CONTINUOUS)
def test_bounds_are_reached_and_kept_in_each_dimension(script, rng):
    agent, _ = make_agent(script)  # [-1, 3] x [-2, 0.5]
    corners = torch.tensor([[-1.0, -1.0], [1.0, 1.0], [-1.0, 1.0], [0.0, 0.0]])
    assert agent.to_env(corners).tolist() == [[-1, -2], [3, 0.5], [-1, 0.5], [1, -0.75]]
    low, high = np.sort(rng.normal(size=(2, 1000)).astype(np.float32), axis=0)
    space = Box(low, high)
    envs = SimpleNamespace(single_observation_space=Box(-1, 1, (3,)), single_action_space=space)
    agent = load(script).Agent(envs, make_args(script))
    assert (agent.to_env(-torch.ones(1000)).numpy() == low).all()
    assert (agent.to_env(torch.ones(1000)).numpy() == high).all()
    assert all(space.contains(agent.to_env((3 * torch.randn(1000)).tanh()).numpy()) for _ in range(100))


# ------------------------------------------------------------------------------------------- losses and their gradients


@pytest.mark.parametrize("script", CONTINUOUS)
def test_critic_loss_is_its_definition(script, rng):
    module, (agent, target, args) = load(script), make_parts(script, gamma=0.9)
    agent.log_alpha.data.fill_(-0.7)
    obs, actions, rewards, next_obs, terminations = batch(script, rng)
    noise = torch.randn(B, 2)
    next_actions, next_logprobs = agent.sample(next_obs, noise)
    targets, smaller = [], set()
    for i in range(B):
        values = target(next_obs[i : i + 1], next_actions[i : i + 1]).flatten().tolist()
        smaller.add(values.index(min(values)))
        future = min(values) - math.exp(-0.7) * next_logprobs[i].item()
        targets.append(rewards[i].item() + (0 if terminations[i] else 0.9 * future))
    assert smaller == {0, 1}
    q = agent.critics(obs, actions)
    expected = sum((q[k, i] - targets[i]) ** 2 for k in range(2) for i in range(B)) / B
    loss, metrics = module.critic_loss(agent, target, args, noise, obs, actions, rewards, next_obs, terminations)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert dict(zip(module.CRITIC_METRICS, metrics.tolist(), strict=True)) == pytest.approx(
        {"losses/qf_loss": expected.item(), "losses/q_values": q.mean().item()}
    )
    loss.backward()
    assert_gradients(agent.critics, gradients(expected, agent.critics))
    others = [*agent.actor.parameters(), agent.log_alpha, *target.parameters()]
    assert all(parameter.grad is None for parameter in others) and not metrics.requires_grad


@pytest.mark.parametrize("script", CONTINUOUS)
@pytest.mark.parametrize("rho", [0.0, 0.9])
def test_noise_has_its_correlation_and_its_distribution(script, rho, rng):
    """Over a time t it is rho^t; each value stays standard Gaussian, and its error function uniform."""
    noise = [torch.randn(20_000)]
    for _ in range(30):
        noise.append(load(script).next_noise(noise[-1], rho))
    noise = torch.stack(noise)
    for t in (1, 2, 5):
        assert torch.corrcoef(torch.stack([noise[30 - t], noise[30]]))[0, 1].item() == pytest.approx(rho**t, abs=0.03)
    assert noise[30].mean().item() == pytest.approx(0, abs=0.03)
    assert noise[30].std().item() == pytest.approx(1, abs=0.02)
    quantiles = torch.quantile((noise[30] / math.sqrt(2)).erf(), torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9]))
    assert quantiles.tolist() == pytest.approx([-0.8, -0.4, 0.0, 0.4, 0.8], abs=0.03)


@pytest.mark.parametrize("script", CONTINUOUS)
def test_actor_loss_is_its_definition(script, rng):
    """And the actor sees nothing of the temperature's loss, the temperature nothing of the actor's, critics neither."""
    module, (agent, _, args) = load(script), make_parts(script)
    agent.log_alpha.data.fill_(-0.7)
    obs, noise = torch.randn(B, 3), torch.randn(B, 2)
    actions, logprobs = agent.sample(obs, noise)
    q1, q2 = agent.critics(obs, actions)
    expected = sum(math.exp(-0.7) * logprobs[i] - (q1[i] if q1[i] < q2[i] else q2[i]) for i in range(B)) / B
    assert 0 < (q1 < q2).sum() < B
    entropy = -logprobs.mean().item()
    loss, metrics = module.actor_loss(agent, args, noise, obs)
    assert dict(zip(module.ACTOR_METRICS, metrics.tolist(), strict=True)) == pytest.approx(
        {"losses/actor_loss": expected.item(), "losses/entropy": entropy, "losses/alpha": math.exp(-0.7)}, rel=1e-4
    )
    loss.backward()
    assert_gradients(agent.actor, gradients(expected, agent.actor))
    assert agent.log_alpha.grad.item() == pytest.approx(entropy - -2, rel=1e-4)  # the target is -dim(A)
    assert all(parameter.grad is None for parameter in agent.critics.parameters()) and not metrics.requires_grad


@pytest.mark.parametrize("script", DISCRETE)
def test_loss_is_its_definition(script, rng):
    """The sum of three losses; each part of the agent gets the gradient of its own alone."""
    module, (agent, target, args) = load(script), make_parts(script, gamma=0.9)
    alpha = math.exp(agent.log_alpha.data.fill_(-0.7).item())
    obs, actions, rewards, next_obs, terminations = batch(script, rng)

    def softmax(logits: torch.Tensor) -> list[torch.Tensor]:
        total = sum(logit.exp() for logit in logits)
        return [logit.exp() / total for logit in logits]

    qf_loss = actor_loss = entropy = 0
    q, next_q = agent.critics(obs), target(next_obs)
    for i in range(B):
        future = 0
        for a, p in enumerate(softmax(agent.actor(next_obs)[i].detach())):
            future += p * ((next_q[0, i, a] + next_q[1, i, a]) / 2 - alpha * p.log())
        td_target = rewards[i] + (0 if terminations[i] else 0.9 * future)
        for k in range(2):
            qf_loss += (q[k, i, actions[i]] - td_target) ** 2 / B
        for a, p in enumerate(softmax(agent.actor(obs)[i])):
            actor_loss += p * (alpha * p.log() - (q[0, i, a] + q[1, i, a]).detach() / 2) / B
            entropy -= (p * p.log()).item() / B
    data = obs, actions, rewards, next_obs, terminations
    loss, metrics = module.sac_loss(agent, target, args, torch.tensor(0.2), *data)
    q_taken = np.mean([q[k, i, actions[i]].item() for k in range(2) for i in range(B)])
    expected = {"qf_loss": qf_loss.item(), "actor_loss": actor_loss.item(), "q_values": q_taken}
    expected |= {"entropy": entropy, "alpha": alpha}
    expected = {f"losses/{name}": value for name, value in expected.items()}
    assert dict(zip(module.METRICS, metrics.tolist(), strict=True)) == pytest.approx(expected, rel=1e-4)
    loss.backward()
    assert_gradients(agent.critics, gradients(qf_loss, agent.critics))
    assert_gradients(agent.actor, gradients(actor_loss, agent.actor))
    assert agent.log_alpha.grad.item() == pytest.approx(entropy - 0.2, rel=1e-4)
    assert all(parameter.grad is None for parameter in target.parameters()) and not metrics.requires_grad


@pytest.mark.parametrize("script", DISCRETE)
def test_soft_values_are_what_samples_average_to(script, rng):
    agent, target, _ = make_parts(script)
    obs, draws, alpha = torch.randn(1, 3), 100_000, torch.tensor(0.3)
    with torch.no_grad():
        logprobs, q = agent.logprobs(obs), target(obs)
        actions = agent.sample(obs.expand(draws, 3), torch.from_numpy(rng.gumbel(size=(draws, 4))))
        samples = q.mean(0)[0, actions] - alpha * logprobs[0, actions]
        exact = load(script).soft_values(q, logprobs, alpha).item()
    assert exact == pytest.approx(samples.mean().item(), abs=4 * samples.std().item() / draws**0.5)


@pytest.mark.parametrize("script", DISCRETE)
def test_actions_are_drawn_from_the_policy(script, rng):
    agent, _, _ = make_parts(script)
    obs, draws = torch.randn(1, 3), 100_000
    with torch.no_grad():
        probs = agent.actor(obs).softmax(-1)[0].numpy()
        actions = agent.sample(obs.expand(draws, 3), torch.from_numpy(rng.gumbel(size=(draws, 4))))
        counts = np.bincount(actions.numpy(), minlength=4)
        assert agent.act(obs).item() == probs.argmax()
    assert ((counts - draws * probs) ** 2 / (draws * probs)).sum() < 16.3  # chi-square of 3 degrees: one in a thousand


def set_entropy(agent, script: str, high: bool) -> None:
    """Let the last layer of the actor ignore the observation and say: all actions, or one."""
    last = agent.actor[-1]
    last.weight.data.zero_()
    last.bias.data.zero_()
    if script in CONTINUOUS:
        last.bias.data[2:] = 0.5 if high else -10  # squeezed to a deviation of 0.76, and of e^-5
    elif not high:
        last.bias.data[0] = 50


@pytest.mark.parametrize("high", [True, False])
@pytest.mark.parametrize("script", SAC)
def test_temperature_falls_where_the_entropy_is_too_high(script, high, rng):
    module, (agent, target, args) = load(script), make_parts(script)
    set_entropy(agent, script, high)
    data = batch(script, rng)
    if script in CONTINUOUS:
        loss, _ = module.actor_loss(agent, args, torch.randn(B, 2), data[0])
    else:
        loss, _ = module.sac_loss(agent, target, args, torch.tensor(0.2), *data)
    loss.backward()
    assert (agent.log_alpha.grad.item() > 0) == high and agent.log_alpha.grad.item() != 0  # a step goes against it


@pytest.mark.parametrize("script", DISCRETE)
def test_target_entropy_falls_linearly(script, watch, spy):
    """From and to shares of log(2), the entropy of two random actions; every update sees the target of its step."""
    updates = spy(load(script), "sac_loss")
    flags = {"target_entropy_scale": 0.8, "end_entropy_scale": 0.2, "train_frequency": 3, "learning_starts": 30}
    watch(script, total_timesteps=300, **flags)
    shares = [update["target_entropy"].item() / math.log(2) for update, _ in updates]
    np.testing.assert_allclose(shares, 0.8 - 0.6 * np.arange(30, 300, 3) / 300, rtol=1e-5)


# ---------------------------------------------------------------------------------------------------- target network


@pytest.mark.parametrize("script", SAC)
@pytest.mark.parametrize("tau", [0.3, 1.0])
def test_target_moves_by_tau(script, tau):
    _, target, args = make_parts(script)
    online = deepcopy(target)
    for parameter in online.parameters():
        parameter.data.normal_()
    states = [{name: tensor.clone() for name, tensor in net.state_dict().items()} for net in (target, online)]
    load(script).update_target(target, online, tau)
    expected = {name: (1 - tau) * tensor + tau * states[1][name] for name, tensor in states[0].items()}
    torch.testing.assert_close(dict(target.state_dict()), expected)
    torch.testing.assert_close(dict(online.state_dict()), states[1], rtol=0, atol=0)


@pytest.mark.parametrize("script", SAC)
def test_every_update_moves_the_target_once(script, train, spy, monkeypatch):
    """Three environments, rounds every 7 steps: 102 steps hold 14 multiples of 7, the first two before step 21."""
    module = load(script)
    monkeypatch.setattr(module, "evaluate", lambda args, agent: np.zeros(1))
    targets = spy(module, "update_target")
    losses = spy(module, "critic_loss" if script in CONTINUOUS else "sac_loss")
    flags = {"num_envs": 3, "train_frequency": 7, "gradient_steps": 2, "learning_starts": 20, "tau": 0.02}
    train(script, env_id=counter_id(script), total_timesteps=100, checkpoint_every=0, **flags)
    assert len(losses) == len(targets) == (14 - 2) * 2
    for (moved, _), (learned, _) in zip(targets, losses, strict=True):
        assert moved["tau"] == 0.02 and moved["target"] is learned["target"]
        assert moved["online"] is learned["agent"].critics and moved["target"] is not moved["online"]
        assert not any(parameter.requires_grad for parameter in moved["target"].parameters())


# ----------------------------------------------------------------------------------------------------- what a run does


@pytest.fixture
def watch(train, monkeypatch):
    """watch(script, **flags) -> the agent, the replay and the counters (in order) of a run of 3 environments."""

    def watch(script: str, **flags):
        module, found = load(script), {}

        def keep(name: str):
            made = getattr(module, name)

            def make(*args):
                found[name] = made(*args)
                return found[name]

            monkeypatch.setattr(module, name, make)

        keep("Agent")
        keep("Replay")
        monkeypatch.setattr(module, "evaluate", lambda args, agent: np.zeros(1))
        Counter.made.clear()
        train(script, env_id=counter_id(script), num_envs=3, checkpoint_every=0, **flags)
        return found["Agent"], found["Replay"], Counter.made[-3:]

    return watch


@pytest.mark.parametrize("script", SAC)
def test_first_actions_are_uniform_within_the_bounds(script, watch):
    _, _, counters = watch(script, total_timesteps=3000, learning_starts=3000)
    actions = np.array([counter.actions for counter in counters])  # (3, 1000) or (3, 1000, 2)
    if script in DISCRETE:
        assert abs(actions.mean() - 0.5) < 4 * 0.5 / 3000**0.5
    else:
        low, high = np.array([-1, -2]), np.array([3, 0.5])
        shares = (actions.reshape(-1, 2) - low) / (high - low)
        assert shares.min() >= 0 and shares.max() <= 1
        distance = np.abs(np.sort(shares, axis=0) - np.linspace(0, 1, 3000)[:, None]).max(0)
        assert (distance < 1.95 / 3000**0.5).all()  # Kolmogorov-Smirnov: one in a thousand
    assert not (actions[0] == actions[1]).all() and not (actions[1] == actions[2]).all()


@pytest.mark.parametrize("script", CONTINUOUS)
@pytest.mark.parametrize("learning_starts", [900, 30])
@pytest.mark.parametrize("rho", [0.0, 0.9])
def test_successive_actions_have_the_correlation_of_the_noise(script, learning_starts, rho, watch):
    """Random actions and a policy's that hardly learns. Differences of two environments, for what they see drifts."""
    flags = {"learning_starts": learning_starts, "policy_lr": 1e-12}
    _, _, counters = watch(script, total_timesteps=900, noise_correlation=rho, **flags)
    first, second, _ = (np.array(counter.actions)[20:] for counter in counters)  # (280, 2)
    for difference in (first - second).T:
        assert np.corrcoef(difference[:-1], difference[1:])[0, 1] == pytest.approx(rho, abs=0.35)


@pytest.mark.parametrize("script", SAC)
def test_replay_holds_the_actions_that_were_taken(script, watch):
    """As the networks know them: continuous ones in [-1, 1], in the environment's units only where it sees them."""
    agent, replay, counters = watch(script, total_timesteps=300, learning_starts=150)
    if script in CONTINUOUS:
        assert np.abs(replay.actions).max() <= 1 and replay.actions.dtype == np.float32
    for i, counter in enumerate(counters):
        rows = np.arange(i, replay.rows, 3)
        stored = replay.actions[rows[replay.starts[rows]]]
        if script in CONTINUOUS:
            stored = agent.to_env(torch.from_numpy(stored)).numpy()
        np.testing.assert_array_equal(stored, np.array(counter.actions))
        assert len(stored) == 100


@pytest.mark.parametrize("script", SAC)
def test_noise_is_new_for_every_environment_call_and_loss(script, watch, monkeypatch):
    module, noises, sample = load(script), [], load(script).Agent.sample

    def watched(self, obs, noise):
        noises.append(noise.clone())
        return sample(self, obs, noise)

    monkeypatch.setattr(module.Agent, "sample", watched)
    watch(script, total_timesteps=120, learning_starts=30, batch_size=8)
    shapes = [tuple(noise.shape) for noise in noises]
    assert shapes.count((3, 2)) == 30  # one for each step that is not at random
    assert shapes.count((8, 2)) == (2 * (120 // 4 - 30 // 4) if script in CONTINUOUS else 0)  # and two for each update
    numbers = torch.cat(noises).flatten()
    assert len(numbers.unique()) == len(numbers)
    mean, std = (0, 1) if script in CONTINUOUS else (0.577, math.pi / 6**0.5)  # normal, or Gumbel
    assert abs(numbers.mean() - mean) < 4 * std / len(numbers) ** 0.5 and abs(numbers.std() / std - 1) < 0.25


@pytest.mark.parametrize("script", CONTINUOUS)
def test_no_environment_gets_what_is_not_a_number(script, watch, monkeypatch):
    monkeypatch.setattr(load(script).Agent, "policy", lambda self, obs: (torch.full((len(obs), 2), torch.nan),) * 2)
    with pytest.raises(SystemExit) as end:
        watch(script, total_timesteps=120, learning_starts=30)
    assert end.value.code == 3
    assert all(len(counter.actions) == 10 and np.isfinite(counter.actions).all() for counter in Counter.made[-3:])


@pytest.mark.parametrize("script", SAC)
@pytest.mark.parametrize("autotune", [True, False])
def test_only_a_tuned_temperature_changes(script, autotune, watch):
    agent, _, _ = watch(script, total_timesteps=300, learning_starts=30, autotune=autotune, alpha=0.37)
    assert (agent.log_alpha.item() == pytest.approx(math.log(0.37), rel=1e-6)) != autotune
    assert agent.log_alpha.item() != 0


@pytest.mark.parametrize("script", SAC)
def test_critics_begin_different_and_targets_as_their_copies(script, watch, spy, monkeypatch):
    losses = spy(load(script), "critic_loss" if script in CONTINUOUS else "sac_loss")
    monkeypatch.setattr(load(script), "update_target", lambda target, online, tau: None)
    agent, _, _ = watch(script, total_timesteps=60, learning_starts=50, q_lr=1e-12)
    for x, y in zip(agent.critics.parameters(), losses[-1][0]["target"].parameters(), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-9)
    assert not agent.critics.qf1[0].weight.equal(agent.critics.qf2[0].weight)


@pytest.mark.parametrize("script", CONTINUOUS)
def test_actions_of_other_types_than_float32(script, train, monkeypatch):
    spaces = {"observation_space": Box(-1, 1, (2,), np.float64), "action_space": Box(-1, 1, (2,), np.float64)}
    gym.register("Test/Double-v0", Misfit, kwargs=spaces)
    monkeypatch.setattr(load(script), "evaluate", lambda args, agent: np.zeros(1))
    try:
        train(script, env_id="Test/Double-v0", total_timesteps=100, learning_starts=20, checkpoint_every=0)
    finally:
        del gym.registry["Test/Double-v0"]


# ------------------------------------------------------------------------------------------------------------ bfloat16


BF16 = [name for name in SAC if "bf16" in load(name).Args.__dataclass_fields__]


@pytest.mark.parametrize("script", BF16)
def test_bf16_is_close_and_losses_stay_in_float32(script, rng):
    module, (agent, target, args) = load(script), make_parts(script)
    data, noise = batch(script, rng), torch.randn(B, 2)
    results = []
    for bf16 in (False, True):
        agent.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            q_loss, q_metrics = module.critic_loss(agent, target, args, noise, *data)
            pi_loss, pi_metrics = module.actor_loss(agent, args, noise, data[0])
        (q_loss + pi_loss).backward()
        tensors = [q_loss, pi_loss, q_metrics, pi_metrics, *(parameter.grad for parameter in agent.parameters())]
        assert {tensor.dtype for tensor in tensors} == {torch.float32}
        results.append(torch.cat([q_metrics, pi_metrics]))
    assert not results[0].equal(results[1])  # it does something
    torch.testing.assert_close(*results, rtol=0.03, atol=0.03)


@pytest.mark.parametrize("script", BF16)
def test_bf16_leaves_last_layers_alone(script):
    """In bfloat16 the numbers near 300 are 2 apart."""
    agent, _, _ = make_parts(script)
    for net in (agent.critics.qf1, agent.critics.qf2, agent.actor):
        net[-1].weight.data.zero_()
        net[-1].bias.data.fill_(300.7)
    with torch.autocast("cpu", torch.bfloat16):
        q, mean = agent.critics(torch.randn(B, 3), torch.randn(B, 2)), agent.policy(torch.randn(B, 3))[0]
    for values in (q, mean):
        torch.testing.assert_close(values, torch.full_like(values, 300.7))
        assert values.dtype == torch.float32


@pytest.mark.parametrize("script", BF16)
@pytest.mark.parametrize("bf16", [True, False])
def test_bf16_is_where_the_losses_are(script, bf16, watch, monkeypatch):
    """And not where actions are chosen, of which there are 3 at a time."""
    module, seen = load(script), set()
    forward = module.MLP.forward

    def watched(self, x):
        seen.add((len(x), torch.is_autocast_enabled("cpu")))
        return forward(self, x)

    monkeypatch.setattr(module.MLP, "forward", watched)
    agent, _, _ = watch(script, total_timesteps=300, learning_starts=30, bf16=bf16, batch_size=8)
    assert seen == {(3, False), (8, bf16)}
    assert all(x.dtype == torch.float32 and x.isfinite().all() for x in agent.parameters())
