"""SAC: densities by numerical integration, losses and gradients against their definitions, and what a run does.

The replay buffer, what a run samples from it and when, and the target network are tested in test_dqn.py; the bounds of
actions in test_ppo.py.
"""

import math
from copy import deepcopy

import numpy as np
import pytest
import torch
from conftest import having, load, make_agent
from environments import Counter, FakeGames
from test_ppo import GAMES, gradients, inputs
from torch.distributions import Independent, Normal, TanhTransform, TransformedDistribution

CONTINUOUS, DISCRETE = having("tanh_logprob"), having("soft_values")
SAC, ACTOR = [*CONTINUOUS, *DISCRETE], [*having("actor_loss"), *DISCRETE]  # ACTOR: also those without entropy
ACTOR = [name for name in ACTOR if name not in GAMES]  # test_dqn_atari.py
CATEGORICAL = having("categorical_projection")  # test_simbav2.py
UTD = [name for name in CONTINUOUS if hasattr(load(name).Args, "utd")]  # three updates where others have one

sac = load("sac_continuous")  # for its losses, and for functions whose text is the same in every script (test_house)

B = 50  # rows of a batch


def batch(script: str) -> list[torch.Tensor]:
    """obs, actions, rewards, next_obs, terminations, for the agents of make_agent."""
    actions = torch.rand(B, 2) * 2 - 1 if script in CONTINUOUS else torch.randint(4, (B,))
    obs, next_obs = (inputs(script, B)[0] for _ in range(2))
    return [obs, actions, torch.randn(B), next_obs, torch.rand(B) < 0.3]


def make_parts(script: str, **flags):
    """An agent whose critics disagree on which is the smaller, a target that is not its copy, and the flags."""
    agent, args = make_agent(script, **flags)
    with torch.no_grad():
        for parameter in agent.parameters():
            parameter.add_((0.02 if script in GAMES else 0.3) * torch.randn_like(parameter))
        agent.log_alpha.fill_(-0.7)
    target = deepcopy(agent.critics).requires_grad_(False)
    target.apply(lambda layer: hasattr(layer, "reset_parameters") and layer.reset_parameters())
    for name, parameter in agent.critics.named_parameters():
        if name.endswith("head_scaler"):  # SimbaV2 begins with values that hardly depend on the state
            parameter.data *= 10
    return agent, target, args


def assert_gradients(module, expected: list[torch.Tensor]) -> None:
    ours = [parameter.grad for parameter in module.parameters()]
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
    assert max(gradient.abs().max() for gradient in ours) > 1e-3


def floats(metrics: dict) -> dict[str, float]:
    assert not any(x.requires_grad for x in metrics.values())
    return {name.removeprefix("losses/"): x.item() for name, x in metrics.items()}


# -------------------------------------------------------------------------------------------------- squashed Gaussian


def squashed(mean: torch.Tensor, log_std: torch.Tensor) -> TransformedDistribution:
    return TransformedDistribution(Independent(Normal(mean, log_std.exp()), 1), [TanhTransform()])


def test_logprob_is_that_of_the_transformed_distribution(rng):
    u, mean, log_std = torch.randn(3, 100, 4, dtype=torch.float64)
    logprobs = sac.tanh_logprob(u, (u - mean) / log_std.exp(), log_std)
    torch.testing.assert_close(logprobs, squashed(mean, log_std).log_prob(u.tanh()))


def test_logprob_is_finite_where_tanh_is_one():
    u = torch.tensor([[-90.0], [-20.0], [20.0], [90.0]], requires_grad=True)
    assert u.tanh().abs().eq(1).all()
    logprobs = sac.tanh_logprob(u, *torch.zeros(2, 4, 1))
    # 1 - tanh(u)^2 = 4 / (e^u + e^-u)^2, which is 4 e^-2|u| for a large |u|
    expected = [-0.5 * math.log(2 * math.pi) - math.log(4) + 2 * abs(x) for x in (-90, -20, 20, 90)]
    assert logprobs.tolist() == pytest.approx(expected)
    logprobs.sum().backward()
    assert u.grad.flatten().tolist() == pytest.approx([-2, -2, 2, 2])


@pytest.mark.parametrize("script", CONTINUOUS)
def test_actions_come_with_their_density(script, rng):
    agent, _, _ = make_parts(script)
    obs, noise = torch.randn(B, 3), torch.randn(B, 2)
    actions, logprobs = agent.action_and_logprob(obs, noise)
    mean, log_std = agent.policy(obs)
    torch.testing.assert_close(actions, (mean + log_std.exp() * noise).tanh())
    inside = actions.abs().amax(-1) < 0.999  # beyond, the inverse of tanh has no digits left
    assert inside.sum() > B / 3
    expected = squashed(mean, log_std).log_prob(actions)
    torch.testing.assert_close(logprobs[inside], expected[inside], rtol=1e-3, atol=1e-3)
    _, log_std = agent.policy(1e6 * obs)
    assert script in CATEGORICAL or (log_std.min() == -5 and log_std.max() == 2)


# ------------------------------------------------------------------------------------------- losses and their gradients


def test_critic_loss_equals_its_definition(rng):
    agent, target, args = make_parts("sac_continuous", gamma=0.9)
    (obs, actions, rewards, next_obs, terminations), noise = batch("sac_continuous"), torch.randn(B, 2)
    next_actions, next_logprobs = agent.action_and_logprob(next_obs, noise)
    targets, smaller = [], set()
    for i in range(B):
        values = target(next_obs[i : i + 1], next_actions[i : i + 1]).flatten().tolist()
        smaller.add(values.index(min(values)))
        future = min(values) - math.exp(-0.7) * next_logprobs[i].item()
        targets.append(rewards[i].item() + (0 if terminations[i] else 0.9 * future))
    assert smaller == {0, 1}
    q = agent.critics(obs, actions)
    expected = sum((q[k, i] - targets[i]) ** 2 for k in range(2) for i in range(B)) / B
    loss, metrics = sac.critic_loss(agent, target, args, noise, obs, actions, rewards, next_obs, terminations)
    torch.testing.assert_close(loss, expected)
    assert floats(metrics) == pytest.approx({"qf_loss": expected.item(), "q_values": q.mean().item()})
    loss.backward()
    assert_gradients(agent.critics, gradients(expected, agent.critics))
    others = [*agent.actor.parameters(), agent.log_alpha, *target.parameters()]
    assert all(parameter.grad is None for parameter in others)


def test_actor_loss_equals_its_definition(rng):
    agent, _, _ = make_parts("sac_continuous")
    obs, noise = torch.randn(B, 3), torch.randn(B, 2)
    actions, logprobs = agent.action_and_logprob(obs, noise)
    q1, q2 = agent.critics(obs, actions)
    assert 0 < (q1 < q2).sum() < B
    expected = sum(math.exp(-0.7) * logprobs[i] - (q1[i] if q1[i] < q2[i] else q2[i]) for i in range(B)) / B
    loss, entropy, metrics = sac.actor_loss(agent, noise, obs)
    assert entropy == metrics["losses/entropy"]
    values = {"actor_loss": expected.item(), "entropy": -logprobs.mean().item(), "alpha": math.exp(-0.7)}
    assert floats(metrics) == pytest.approx(values, rel=1e-4)
    loss.backward()
    assert_gradients(agent.actor, gradients(expected, agent.actor))
    assert agent.log_alpha.grad is None


@pytest.mark.parametrize("entropy", [1.5, -3.0])
def test_alpha_loss_equals_its_definition(entropy, rng):
    """A step against the gradient: alpha falls where the entropy is above its target, here -2, and rises below."""
    agent, _, _ = make_parts("sac_continuous")
    loss = sac.alpha_loss(agent, torch.tensor(entropy), -2)
    assert loss.item() == pytest.approx(-0.7 * (entropy + 2))
    loss.backward()
    assert agent.log_alpha.grad.item() == pytest.approx(entropy + 2)


@pytest.mark.parametrize("script", DISCRETE)
def test_loss_equals_its_definition(script, rng):
    """The sum of three losses; each part of the agent gets the gradient of its own alone."""
    agent, target, args = make_parts(script, gamma=0.9)
    alpha, data = math.exp(-0.7), batch(script)
    obs, actions, rewards, next_obs, terminations = data
    q, next_q = agent.critics(obs), target(next_obs)
    probs, next_probs = agent.actor(obs).softmax(-1), agent.actor(next_obs).softmax(-1).detach()
    qf_loss = actor_loss = entropy = 0
    for i in range(B):
        future = sum(p * (next_q[:, i, a].mean() - alpha * p.log()) for a, p in enumerate(next_probs[i]))
        td_target = rewards[i] + (0 if terminations[i] else 0.9 * future)
        qf_loss += sum((q[k, i, actions[i]] - td_target) ** 2 for k in range(2)) / B
        for a, p in enumerate(probs[i]):
            actor_loss += p * (alpha * p.log() - q[:, i, a].mean().detach()) / B
            entropy -= (p * p.log()).item() / B
    loss, metrics = load(script).sac_loss(agent, target, args, torch.tensor(0.2), *data)
    q_taken = np.mean([q[k, i, actions[i]].item() for k in range(2) for i in range(B)])
    values = {"qf_loss": qf_loss.item(), "actor_loss": actor_loss.item(), "q_values": q_taken}
    assert floats(metrics) == pytest.approx(values | {"entropy": entropy, "alpha": alpha}, rel=1e-4)
    loss.backward()
    assert_gradients(agent.critics, gradients(qf_loss, agent.critics))
    assert_gradients(agent.actor, gradients(actor_loss, agent.actor))
    assert agent.log_alpha.grad.item() == pytest.approx(entropy - 0.2, rel=1e-4)
    assert all(parameter.grad is None for parameter in target.parameters())


# ----------------------------------------------------------------------------------------------------- what a run does


@pytest.fixture
def play(train, monkeypatch):
    """play(script, **flags): a run of three counters, or games. Returns the counters."""

    def play(script: str, **flags) -> list[Counter]:
        if script in GAMES:
            FakeGames.install(monkeypatch, load(script))
        train(script, **{"num_envs": 3, "train_frequency": 3, "batch_size": 8, "policy_delay": 1} | flags)
        return Counter.made[:3]

    return play


@pytest.mark.parametrize("script", SAC)
@pytest.mark.parametrize("autotune", [True, False])
def test_each_part_learns_by_its_own_loss(script, autotune, play, spy, monkeypatch):
    """In a run, no optimizer sees another loss: not the critics the actor's, nor the actor that of the critics."""
    module, expected, steps = load(script), {}, 0
    alphas = spy(module, "alpha_loss") if script in CONTINUOUS else []

    def watch(name: str, part) -> None:
        loss_fn = getattr(module, name)

        def watched(agent, *args):
            result = loss_fn(agent, *args)
            loss = result if torch.is_tensor(result) else result[0]
            parameters = [p for p in part(agent) if p.requires_grad]
            expected.update(zip(parameters, torch.autograd.grad(loss, parameters, retain_graph=True), strict=True))
            return result

        monkeypatch.setattr(module, name, watched)

    if script in CONTINUOUS:
        watch("critic_loss", lambda agent: agent.critics.parameters())
        watch("actor_loss", lambda agent: agent.actor.parameters())
        watch("alpha_loss", lambda agent: [agent.log_alpha])
    else:
        watch("sac_loss", lambda agent: agent.parameters())

    class Adam(torch.optim.Adam):
        def step(self):
            nonlocal steps
            for parameter in (p for group in self.param_groups for p in group["params"] if p.requires_grad):
                torch.testing.assert_close(parameter.grad, expected[parameter], rtol=1e-4, atol=1e-6)
                steps += 1
            super().step()

    monkeypatch.setattr(torch.optim, "Adam", Adam)
    logs = spy(module.Run, "log")
    play(script, total_timesteps=120, learning_starts=30, autotune=autotune, alpha=0.37)
    agent = logs[0][0]["self"].parts["agent"]
    assert steps == (90 if script in UTD else 30) * len(expected)
    assert len(expected) == len(list(agent.parameters())) - (not autotune)
    assert {bound["target_entropy"] for bound, _ in alphas} <= {-1 if script in CATEGORICAL else -2}  # -dim(A), or half
    assert (agent.log_alpha.item() == pytest.approx(math.log(0.37), rel=1e-6)) != autotune


@pytest.mark.parametrize("script", DISCRETE)
def test_target_entropy_is_annealed(script, play, spy):
    """Between fractions of the entropy of random actions, of which counters have two and games three."""
    updates = spy(load(script), "sac_loss")
    play(script, total_timesteps=300, learning_starts=30, target_entropy_scale=0.8, end_entropy_scale=0.2)
    fractions = [update["target_entropy"].item() / math.log(3 if script in GAMES else 2) for update, _ in updates]
    np.testing.assert_allclose(fractions, 0.8 - 0.6 * np.arange(30, 300, 3) / 300, rtol=1e-5)


@pytest.mark.parametrize("script", ACTOR)
def test_first_actions_are_uniform(script, play):
    flags = {"total_timesteps": 3000, "learning_starts": 3000, "random_repeat": 1}
    actions = np.array([env.actions for env in play(script, **flags)])
    if script in DISCRETE:
        assert abs(actions.mean() - 0.5) < 4 * 0.5 / 3000**0.5
    else:
        low, high = np.array([-1, -2]), np.array([3, 0.5])
        shares = np.sort((actions.reshape(-1, 2) - low) / (high - low), axis=0)
        assert (np.abs(shares - np.linspace(0, 1, 3000)[:, None]) < 1.95 / 3000**0.5).all()  # Kolmogorov-Smirnov
    together = np.corrcoef(actions.reshape(3, 1000, -1)[..., 0])
    assert np.abs(together - np.eye(3)).max() < 0.15  # each environment by itself


@pytest.mark.parametrize("script", ACTOR)
def test_the_policy_acts_once_learning_has_started(script, play, monkeypatch):
    """Each environment by what it observes: here the action is decided by the step of its episode."""
    low, high = (0, 1) if script in DISCRETE else (-0.5, 0.5)

    def sample(self, obs):
        action = torch.where(obs[:, 2] % 2 == 0, high, low)
        return action.long() if script in DISCRETE else torch.stack([action, action], 1)

    monkeypatch.setattr(load(script).Agent, "sample", sample)
    for env in play(script, total_timesteps=300, learning_starts=30):
        chosen = np.where(np.arange(100) % env.length % 2 == 0, high, low)[10:]
        if script not in DISCRETE:
            chosen = np.outer(chosen, [2, 1.25]) + [1, -0.75]
        np.testing.assert_array_equal(np.array(env.actions)[10:], chosen)


@pytest.mark.parametrize("script", having("actor_loss"))
@pytest.mark.parametrize("random_repeat", [1, 5])
def test_random_actions_are_repeated(script, random_repeat, play):
    for env in play(script, total_timesteps=300, learning_starts=300, random_repeat=random_repeat):
        actions = np.array(env.actions)  # (100, 2)
        changed = (actions[1:] != actions[:-1]).any(1)
        np.testing.assert_array_equal(changed, np.arange(1, 100) % random_repeat == 0)


@pytest.mark.parametrize("script", [*CONTINUOUS, "td3_continuous"])
def test_every_loss_has_new_noise(script, play, spy):
    losses = [spy(load(script), name) for name in ("critic_loss", "actor_loss")]
    play(script, total_timesteps=90, learning_starts=30)
    noise = torch.cat([bound["noise"] for calls in losses for bound, _ in calls if "noise" in bound])
    assert noise.shape[1] == 2 and len(noise.unique()) == noise.numel() >= 2 * 20 * 8
    assert noise.mean().abs() < 0.2 and abs(noise.std() - 1) < 0.2


# ------------------------------------------------------------------------------------------------------------ bfloat16


def test_bfloat16_is_close_and_losses_stay_in_float32(rng):
    agent, target, args = make_parts("sac_continuous")
    data, noise, results = batch("sac_continuous"), torch.randn(B, 2), []
    for bf16 in (False, True):
        agent.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            q_loss, q_metrics = sac.critic_loss(agent, target, args, noise, *data)
            pi_loss, entropy, pi_metrics = sac.actor_loss(agent, noise, data[0])
            alpha_loss = sac.alpha_loss(agent, entropy, -2)
        (q_loss + pi_loss + alpha_loss).backward()
        metrics = [*q_metrics.values(), *pi_metrics.values()]
        values = [q_loss, pi_loss, alpha_loss, *metrics, *(p.grad for p in agent.parameters())]
        assert {x.dtype for x in values} == {torch.float32}
        results.append(torch.stack(metrics))
    assert not results[0].equal(results[1])
    torch.testing.assert_close(*results, rtol=0.05, atol=0.05)


def test_bfloat16_leaves_last_layers_alone():
    """In bfloat16 the numbers near 300 are 2 apart."""
    agent, _, _ = make_parts("sac_continuous")
    for net in (agent.critics.qf1, agent.critics.qf2, agent.actor):
        torch.nn.init.zeros_(net[-1].weight)
        torch.nn.init.constant_(net[-1].bias, 300.7)
    with torch.autocast("cpu", torch.bfloat16):
        q, mean = agent.critics(torch.randn(B, 3), torch.randn(B, 2)), agent.policy(torch.randn(B, 3))[0]
    for values in (q, mean):
        torch.testing.assert_close(values, torch.full_like(values, 300.7))


@pytest.mark.parametrize("bf16", [True, False])
def test_bfloat16_is_where_the_losses_are(bf16, play, monkeypatch):
    """And not where actions are chosen, of which there are 3 at a time."""
    seen, forward = set(), sac.MLP.forward

    def watched(self, x):
        seen.add((len(x), torch.is_autocast_enabled("cpu")))
        return forward(self, x)

    monkeypatch.setattr(sac.MLP, "forward", watched)
    play("sac_continuous", total_timesteps=90, learning_starts=30, bf16=bf16, batch_size=8)
    assert seen == {(1, False), (3, False), (8, bf16)}  # 1: in the evaluation
