"""CrossQ: batch renormalization and the losses against their definitions, what moves which statistics, policy delay.

What it has in common with SAC (density, actions) is tested in test_sac.py; its replay buffer in test_dqn.py.
"""

from copy import deepcopy

import pytest
import torch
from conftest import load, make_agent, saved_agent
from test_ppo import gradients
from test_sac import B, assert_gradients, batch, floats

SCRIPT = "crossq_continuous"
crossq = load(SCRIPT)


def renorm(norm, x: torch.Tensor, training: bool) -> torch.Tensor:
    """Ioffe 2017, algorithm 1, a feature at a time; r and d are numbers, through which no gradient passes."""
    columns = []
    for j in range(x.shape[1]):
        mean, std, r, d = norm.mean[j].item(), (norm.var[j].item() + 1e-3) ** 0.5, 1, 0
        if training:
            batch_mean = sum(x[:, j]) / len(x)
            batch_std = (sum((x[:, j] - batch_mean) ** 2) / len(x) + 1e-3) ** 0.5
            if norm.updates >= norm.warmup_steps:
                r = min(max(batch_std.item() / std, 1 / 3), 3)
                d = min(max((batch_mean.item() - mean) / std, -5), 5)
            mean, std = batch_mean, batch_std
        columns.append(((x[:, j] - mean) / std * r + d) * norm.weight[j] + norm.bias[j])
    return torch.stack(columns, 1)


def forward(net, x: torch.Tensor, training: bool) -> torch.Tensor:
    norm1, linear1, _, norm2, linear2, _, norm3, linear3 = net
    x = linear1(renorm(norm1, x, training)).relu()
    return linear3(renorm(norm3, linear2(renorm(norm2, x, training)).relu(), training))


def test_batch_renorm_equals_its_definition(rng):
    """Seven updates, three of them the warm-up, on features near the running statistics and far from them."""
    _, args = make_agent(SCRIPT, renorm_warmup_steps=3, bn_momentum=0.9)
    norm, mean, var = crossq.BatchRenorm(4, args), torch.zeros(4), torch.ones(4)
    with torch.no_grad():
        norm.weight.normal_(), norm.bias.normal_()
    for update in range(7):
        x = (torch.randn(20, 4) * torch.tensor([1, 9, 0.1, 1]) + torch.tensor([0.1, 0, 0, 40])).requires_grad_()
        expected, y = renorm(norm, x, True), norm(x, True)
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
        ours, theirs = (torch.autograd.grad(z.pow(3).sum(), [x, norm.weight, norm.bias]) for z in (y, expected))
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
        batch_var, batch_mean = torch.var_mean(x.detach(), 0, correction=0)
        mean, var = 0.9 * mean + 0.1 * batch_mean, 0.9 * var + 0.1 * batch_var
        torch.testing.assert_close(norm(x, False), (x - mean) / (var + 1e-3).sqrt() * norm.weight + norm.bias)
        torch.testing.assert_close([*norm.buffers()], [mean, var, torch.tensor(update + 1)])  # of training alone
    norm.R_MAX = norm.D_MAX = 1e9
    torch.testing.assert_close(norm(x, False), norm(x, True), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("renorm_warmup_steps", [0, 100])
def test_losses_equal_their_definitions(renorm_warmup_steps, rng):
    """Each moves the statistics of its own network alone. (s', a') changes those by which Q(s, a) is normalized."""
    flags = {"hidden_size": 8, "critic_hidden_size": 8, "gamma": 0.9, "renorm_warmup_steps": renorm_warmup_steps}
    agent, args = make_agent(SCRIPT, **flags)
    for tensor in agent.state_dict().values():
        tensor += 0.3 * torch.rand(tensor.shape) if tensor.is_floating_point() else 0
    data, noise, alpha = batch(SCRIPT), torch.randn(B, 2), agent.log_alpha.exp().item()
    obs, actions, rewards, next_obs, terminations = data
    next_obs += 2
    next_actions, next_logprobs = (x.detach() for x in agent.action_and_logprob(next_obs, noise))
    x = torch.cat([torch.cat([obs, next_obs]), torch.cat([actions, next_actions])], 1)
    both = torch.cat([forward(net, x, training=True) for net in agent.critics.children()], 1)
    q, next_q, expected = both[:B], both[B:].detach(), 0
    assert not torch.allclose(q[:, :1], forward(agent.critics.qf1, x[:B], training=True), atol=0.01)
    for i in range(B):
        td_target = rewards[i] + (0 if terminations[i] else 0.9 * (min(next_q[i]) - alpha * next_logprobs[i]))
        expected += sum((q[i] - td_target) ** 2) / B
    expected_gradients, before = gradients(expected, agent.critics), deepcopy(agent.actor.state_dict())
    loss, metrics = crossq.critic_loss(agent, args, noise, *data)
    assert floats(metrics) == pytest.approx({"qf_loss": expected.item(), "q_values": q.mean().item()}, rel=1e-3)
    loss.backward()
    assert_gradients(agent.critics, expected_gradients)
    assert all(parameter.grad is None for parameter in (*agent.actor.parameters(), agent.log_alpha))
    torch.testing.assert_close(agent.actor.state_dict(), before, rtol=0, atol=0)

    mean, log_std = forward(agent.actor, obs, training=True).chunk(2, -1)
    log_std = -5 + 3.5 * (log_std.tanh() + 1)
    u = mean + log_std.exp() * noise
    logprobs, x = crossq.tanh_logprob(u, noise, log_std), torch.cat([obs, u.tanh()], 1)
    q = torch.cat([forward(net, x, training=False) for net in agent.critics.children()], 1)
    expected = sum(alpha * logprobs[i] - min(q[i]) for i in range(B)) / B
    expected_gradients, before = gradients(expected, agent.actor), deepcopy(agent.critics.state_dict())
    loss, _, metrics = crossq.actor_loss(agent, noise, obs)
    values = {"actor_loss": expected.item(), "entropy": -logprobs.mean().item(), "alpha": alpha}
    assert floats(metrics) == pytest.approx(values, rel=1e-3, abs=1e-4)
    loss.backward(inputs=list(agent.actor.parameters()))
    assert_gradients(agent.actor, expected_gradients)
    torch.testing.assert_close(agent.critics.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("N, utd, policy_delay", [(1, 1, 3), (3, 2, 4)])
def test_policy_delay_and_statistics_of_a_run(N, utd, policy_delay, train, spy):
    """Updates are counted through checkpoints, also by the statistics, which are saved as the training left them."""
    critic, actor, alpha = (spy(crossq, f"{name}_loss") for name in ("critic", "actor", "alpha"))
    logs, flags = spy(crossq.Run, "log"), {"num_envs": N, "utd": utd, "policy_delay": policy_delay, "batch_size": 8}
    folder = train(SCRIPT, total_timesteps=120, learning_starts=32, checkpoint_every=51, eval_episodes=3, **flags)
    first, last = 32 // N * N * utd, 120 * utd
    delayed = last // policy_delay - first // policy_delay
    assert [len(critic), len(actor), len(alpha)] == [last - first, delayed, delayed]
    saved, agent = saved_agent(SCRIPT, folder)[0], logs[-1][0]["self"].parts["agent"]
    torch.testing.assert_close([*saved.buffers()], [*agent.buffers()], rtol=0, atol=0)
    for net, count in (agent.critics.qf1, len(critic)), (agent.critics.qf2, len(critic)), (agent.actor, len(actor)):
        assert [norm.updates for norm in net if isinstance(norm, crossq.BatchRenorm)] == 3 * [count]
