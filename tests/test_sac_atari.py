"""SAC on Atari: its network, what a run learns from, when it learns, and how it acts.

Its losses are tested in test_sac.py, the buffer, whose text is that of dqn_atari.py, in test_dqn_atari.py.
"""

import numpy as np
import pytest
import torch
from conftest import episodes, load, make_agent, saved_agent
from environments import FakeChoices, FakeGames
from test_dqn import fits
from test_dqn_atari import Stacks
from test_ppo import inputs

sac = load("sac_atari")


@pytest.fixture
def play(train, monkeypatch):
    """play(**flags): a run on stacked fake games. Returns its folder."""

    def play(kind: type = FakeGames, **flags):
        type("Stacked", (Stacks, kind), {}).install(monkeypatch, sac)
        kind.made.clear()
        return train("sac_atari", **{"num_envs": 4} | flags)

    return play


def test_the_networks(rng):
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


@pytest.mark.parametrize("life_loss", [False, True])
def test_batches_hold_what_happened(life_loss, play, monkeypatch):
    """Three games, three restarts, both kinds of end, lost lives, and stacks that begin with black."""
    seen, ends = set(), set()

    def look(agent, target, args, target_entropy, obs, actions, rewards, next_obs, terminations):
        for i, (game, t, n, restart) in enumerate(obs[:, -1, 0, :4].tolist()):
            length = 10 + n
            for stack, newest in ((obs[i], t), (next_obs[i], t + 1)):
                shown = [[game, k, n, restart] if k >= 0 else [0] * 4 for k in range(newest - 3, newest + 1)]
                assert stack[:, 0, :4].tolist() == shown
            over, lost = t + 1 == length, life_loss and t + 1 in (4, 7)
            assert terminations[i] == (over and game % 2 == 0 or lost)
            assert rewards[i] == 1 and actions[i] == FakeGames.made[restart - 1].actions[game * length + t][n]
            seen.add((game, t, n, restart))
            ends.add((over, game % 2, lost))
        return sum(x.sum() for x in agent.actor.head.parameters()), {}

    monkeypatch.setattr(sac, "sac_loss", look)
    flags = {"num_envs": 3, "total_timesteps": 300, "checkpoint_every": 75, "train_frequency": 3, "learning_starts": 0}
    play(batch_size=24, buffer_size=90, life_loss=life_loss, **flags)
    assert len(seen) > 260  # of 300
    assert {(True, 0, False), (True, 1, False), (False, 0, life_loss)} <= ends


def test_first_actions_are_uniform(play, monkeypatch):
    """Those of the policy follow, here always 1. The evaluation samples, too."""
    monkeypatch.setattr(sac.Agent, "sample", lambda self, obs: torch.ones(len(obs), dtype=torch.int64))
    folder = play(total_timesteps=2000, learning_starts=1000, train_frequency=10**9)
    actions = np.array(FakeGames.made[0].actions)
    assert fits(np.bincount(actions[:250].flatten(), minlength=3), np.full(3, 1 / 3)) and (actions[250:] == 1).all()
    assert np.abs(np.corrcoef(actions[:250].T) - np.eye(4)).max() < 0.25
    assert saved_agent("sac_atari", folder)[0].act(torch.zeros(5, 1)).tolist() == [1] * 5


@pytest.mark.parametrize("frequency, tau", [(7, 1.0), (3, 0.25), (30, 0.5)])
def test_updates_and_target_critics_are_due(frequency, tau, play, monkeypatch):
    """In steps of all environments, also where three at a time jump over a multiple. The critics begin different."""
    seen, steps = [], []

    def look(agent, target, *_):
        seen.append([torch.cat([x.detach().flatten() for x in net.parameters()]) for net in (agent.critics, target)])
        steps.append(FakeGames.made[0].steps)
        return sum(x.square().sum() for x in agent.parameters()), {}

    monkeypatch.setattr(sac, "sac_loss", look)
    flags = {"num_envs": 3, "total_timesteps": 120, "train_frequency": 8, "gradient_steps": 2, "learning_starts": 8}
    play(target_network_frequency=frequency, tau=tau, **flags)
    assert steps == [step for step in range(9, 121, 3) if step // 8 > (step - 3) // 8 for _ in range(2)]
    assert seen[0][0].equal(seen[0][1]) and not torch.equal(*seen[0][0].chunk(2))
    for i in range(1, len(seen)):
        (online, target), (before, expected) = seen[i], seen[i - 1]
        for step in range(steps[i - 1], steps[i], 3):  # those after which it moves before this update
            expected = expected.lerp(online, tau) if step // frequency > (step - 3) // frequency else expected
        torch.testing.assert_close(target, expected)
        assert not online.equal(before)


def test_images_are_learned(play):
    """Which of three bands of the newest frame is bright tells the action that pays: 8 steps at 7, by chance near 3."""
    flags = {"train_frequency": 4, "total_timesteps": 1000, "learning_starts": 100, "batch_size": 16}
    flags |= {"target_network_frequency": 50, "gamma": 0.5, "policy_lr": 3e-4, "autotune": False, "alpha": 0.2}
    returns = [episode_return for _, episode_return, _ in episodes(play(FakeChoices, **flags))]
    assert np.mean(returns[:12]) < 25 and np.mean(returns[-20:]) > 45
