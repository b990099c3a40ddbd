"""Scripts learn: their optimizer steps, tiny problems with known answers, one small real environment each."""

import numpy as np
import pytest
import torch
from conftest import SCRIPTS, episodes, family, is_asynchronous, load, named, saved_agent
from environments import FakeChoices, FakeGames

# Enough for every probe, whatever the script's own defaults are; on-policy; off-policy
PROBE_FLAGS = {"total_timesteps": 6000, "num_envs": 8, "learning_rate": 3e-3, "gamma": 0.5}
PROBE_FLAGS |= {"num_steps": 16, "num_minibatches": 4, "update_epochs": 4, "gae_lambda": 0.9, "ent_coef": 0.0}
PROBE_FLAGS |= {"max_grad_norm": 10.0, "norm_obs": False, "norm_reward": False, "log_std_init": 0.0}
PROBE_FLAGS |= {"learning_starts": 200, "train_frequency": 8, "gradient_steps": 1, "batch_size": 64, "tau": 0.05}
PROBE_FLAGS |= {"policy_lr": 3e-3, "q_lr": 3e-3, "autotune": False, "alpha": 0.01}

ONE_STEP = {"num_steps": 4, "learning_rate": 1e-2}  # one gradient step per rollout: more rollouts, larger steps
EPSILON = {"start_e": 1.0, "end_e": 0.1, "exploration_fraction": 0.5}
TARGET_NETWORK = EPSILON | {"total_timesteps": 4000, "target_network_frequency": 8}

OWN_PROBE_FLAGS = {  # on top, for scripts that learn in another rhythm
    "a2c_gae": ONE_STEP,
    "a3c": ONE_STEP | {"num_envs": 2},
    "a2c_gae_continuous": ONE_STEP,
    "a2c_sil": ONE_STEP,
    "sarsa": ONE_STEP | EPSILON,
    "reinforce": {"episodes_per_update": 8, "baseline": True, "learning_rate": 1e-2},
    "dqn": TARGET_NETWORK,
    "dqn_per": TARGET_NETWORK,
    "qr_dqn": TARGET_NETWORK,
    "pqn": EPSILON,
    "pqn_atari": EPSILON,
    "a2c_atari": {"num_steps": 2},
    "tqc_continuous": {"n_critics": 2, "n_quantiles": 5, "top_quantiles_to_drop_per_net": 1},
    "simbav2_continuous": {"v_max": 10.0, "total_timesteps": 2500},
    "crossq_continuous": {"total_timesteps": 1500},
}

GOALS = {"CartPole-v1": 195, "Pendulum-v1": -400, "InvertedPendulum-v5": 300}  # mean return of 20 training episodes

LEARNERS = [name for name in SCRIPTS if hasattr(load(name).Args, "gamma")]
VECTOR = [name for name in LEARNERS if family(name).suffix != "_atari"]
ATARI = [name for name in SCRIPTS if family(name).suffix == "_atari"]


@pytest.mark.parametrize("anneal_lr", [True, False])
@pytest.mark.parametrize("script", [name for name in LEARNERS if not is_asynchronous(name)])
def test_learning_rate_and_gradient_norm(script, anneal_lr, train, monkeypatch):
    """Five updates: the first has the full learning rate, the last a positive one; no gradient is too long.

    The first step of the optimizer moves no weight by more than the learning rate: its averages start without a bias.
    """
    rates, norms, moves = [], [], []

    def watched(optimizer: type) -> type:
        class Watched(optimizer):
            def step(self):
                parameters = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
                norms.append(torch.nn.utils.get_total_norm([p.grad for p in parameters]).item())
                rates.extend(group["lr"] for group in self.param_groups)
                before = [p.detach().clone() for p in parameters]
                super().step()
                moves.append(max((p.detach() - old).abs().max().item() for p, old in zip(parameters, before)))

        return Watched

    for name in ("Adam", "RAdam", "RMSprop"):
        monkeypatch.setattr(torch.optim, name, watched(getattr(torch.optim, name)))
    flags = {"num_envs": 2, "num_steps": 1, "num_minibatches": 1, "update_epochs": 1, "total_timesteps": 10}
    flags |= {"learning_starts": 0, "train_frequency": 2, "gradient_steps": 1, "max_grad_norm": 1e-3, "sil_updates": 0}
    flags |= {"policy_frequency": 1, "policy_delay": 1, "learning_rate_end": 0.002 * (not anneal_lr)}
    if script == "reinforce":  # episodes of 3 steps
        flags |= {"num_envs": 1, "episodes_per_update": 1, "total_timesteps": 15}
    if script in ATARI:
        FakeGames.install(monkeypatch, load(script))
    train(script, anneal_lr=anneal_lr, **flags, **{name: 0.002 for name in ("learning_rate", "policy_lr", "q_lr")})
    expected = [0.002, 0.0016, 0.0012, 0.0008, 0.0004] if anneal_lr else [0.002] * 5
    assert rates == pytest.approx(np.repeat(expected, len(rates) // 5))
    assert moves[0] <= 0.0021
    if "max_grad_norm" in load(script).Args.__dataclass_fields__:
        assert max(norms) == pytest.approx(1e-3, rel=1e-2)


@pytest.fixture
def learn(train):
    """learn(script, probe, **flags) -> value(x) and action(x) of the agent that was saved, at observation x.

    Actions are from -1 (low) to 1 (high), also where they are discrete.
    """

    def learn(script: str, kind: str, **flags):
        is_continuous = family(script).suffix == "_continuous"
        flags = PROBE_FLAGS | {"env_kwargs": {"kind": kind}} | flags | OWN_PROBE_FLAGS.get(script, {})
        agent, _ = saved_agent(script, train(script, env_id=named(script, "Probe"), **flags))

        def with_memory(x: float) -> float:
            """An observation that ends with whether the episode begins; 1 in "discount" is seen after a 0."""
            path = [[0.0, 1.0], [x, 0.0]] if (kind, x) == ("discount", 1) else [[x, 1.0]]
            values, _ = agent.critic(torch.tensor(path)[:, None], agent.initial_state(1)[2:])
            return values[-1].item()

        if hasattr(agent, "initial_state"):
            return with_memory, lambda x: 2 * agent.act(torch.tensor([[x, 1.0]])).item() - 1

        def value(obs: torch.Tensor) -> torch.Tensor:
            if hasattr(agent, "value"):
                return agent.value(obs)
            if hasattr(agent, "critic"):  # DDPG, whose critic has an action
                return agent.critic(obs, agent.act(obs))
            if not hasattr(agent, "critics"):  # Q
                return agent(obs).amax(-1)
            if not is_continuous:
                return agent.critics(obs).mean(0).amax(-1)
            return agent.critics(obs, agent.act(obs)).amin(0).mean()  # the mean: over the quantiles in TQC

        @torch.no_grad()
        def ask(method, x: float) -> float:
            return method(torch.tensor([[x]])).item()

        def action(x: float) -> float:
            return ask(agent.act, x) if is_continuous else 2 * ask(agent.act, x) - 1

        return lambda x: ask(value, x), action

    return learn


@pytest.mark.parametrize("script", VECTOR)
def test_value_is_discounted(script, learn):
    value, _ = learn(script, "discount", gamma=0.6)
    assert value(0.0) == pytest.approx(0.6, abs=0.05)
    assert value(1.0) == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("script", VECTOR)
def test_value_looks_beyond_a_time_limit(script, learn):
    """1 / (1 - gamma) = 5. Code that takes the cut after 5 steps for an end arrives near 2.9."""
    value, _ = learn(script, "endless", gamma=0.8, num_steps=32, total_timesteps=10_000)
    assert value(0.0) == pytest.approx(5, abs=0.3)


@pytest.mark.parametrize("script", VECTOR)
def test_value_and_policy_depend_on_the_observation(script, learn):
    value, action = learn(script, "match")
    assert action(1.0) > 0.8 and action(-1.0) < -0.8
    assert value(1.0) > 0.3 and value(-1.0) > 0.3


QUICK = "ppo", "sac_discrete"  # the others in the nightly part


@pytest.mark.parametrize("script", [x if x in QUICK else pytest.param(x, marks=pytest.mark.slow) for x in VECTOR])
def test_real_environment(script, tmp_path, monkeypatch):
    """By its defaults; the run ends as soon as the last 20 training episodes are good enough."""
    module, learned = load(script), []
    env_id = module.Args.env_id if module.Args.env_id in GOALS else "InvertedPendulum-v5"  # HalfCheetah takes hours
    log = module.Run.log

    def watched(run, step, *rest):
        log(run, step, *rest)
        last = [episode_return for episode_return, _ in run.recent][-20:]
        if len(last) == 20 and np.mean(last) >= GOALS[env_id]:
            learned.append(step)
            run.args.total_timesteps = step

    monkeypatch.setattr(module.Run, "log", watched)
    module.train(module.Args(env_id=env_id, run_dir=str(tmp_path / "run"), torch_threads=1, eval_episodes=1))
    assert learned


ON_POLICY = [name for name in ATARI if hasattr(load(name).Args, "num_steps")]  # off-policy: test_dqn_atari.py


@pytest.mark.parametrize("script", [name for name in ON_POLICY if not hasattr(load(name).Agent, "initial_state")])
def test_images(script, train, monkeypatch):
    """Which of three bands of the image is bright tells the action that pays: 8 steps at 7, by chance near 3."""
    flags = {"num_envs": 8, "num_steps": 16, "total_timesteps": 1300, "learning_rate": 1e-3, "norm_obs": True}
    flags |= {"num_minibatches": 2, "update_epochs": 3, "gamma": 0.5, "clip_coef": 0.2, "ent_coef": 0.0}
    FakeChoices.install(monkeypatch, load(script))
    folder = train(script, eval_episodes=4, **flags | OWN_PROBE_FLAGS.get(script, {}))
    returns = [episode_return for _, episode_return, _ in episodes(folder)]
    assert np.mean(returns[:20]) < 25 and np.mean(returns[-50:]) > 50
    agent, _ = saved_agent(script, folder)
    games = FakeChoices(3)
    games.right = np.arange(3)
    outputs = agent(torch.from_numpy(games.observe()))  # logits and values, or Q
    assert (outputs[0] if isinstance(outputs, tuple) else outputs).argmax(-1).tolist() == [0, 1, 2]
