"""Whole updates against the same update written with torch.autograd and torch.optim on whole parameter vectors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_learner import RULES, draw_noise, random_batch, small_learner
from torch import Tensor

from mtrl_imgrad import losses as sac
from mtrl_imgrad.learner import Learner
from mtrl_imgrad.replay import Batch


class Reference:
    """Multi-task SAC on parameter leaves with torch.optim.AdamW and the mean of the task losses."""

    def __init__(self, learner: Learner) -> None:
        self.learner, self.settings = learner, learner.config.sac
        self.leaves = {name: learner.state[name].clone().requires_grad_() for name in ("critic", "actor", "log_alpha")}
        self.target = learner.state["target_critic"].clone()
        rates = {"critic": "critic_lr", "actor": "actor_lr", "log_alpha": "temperature_lr"}
        self.optimizers = {
            name: torch.optim.AdamW(
                [leaf], lr=getattr(self.settings, rates[name]), eps=self.settings.adam_eps,
                weight_decay=0.0 if name == "log_alpha" else self.settings.weight_decay,
            )
            for name, leaf in self.leaves.items()
        }  # fmt: skip

    def step(self, name: str, loss: Tensor) -> None:
        leaf, bound = self.leaves[name], self.settings.max_grad_norm
        (leaf.grad,) = torch.autograd.grad(loss, leaf)
        if bound and name != "log_alpha":
            leaf.grad *= min(1.0, bound / float(leaf.grad.norm()))
        self.optimizers[name].step()

    def act(self, observations: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Actions and log-probabilities; no gradient reaches an encoder."""
        encoding = self.learner.sac.critic.encode(self.leaves["critic"].detach(), self.inputs(observations))
        return sac.tanh_gaussian(*self.learner.sac.actor(self.leaves["actor"], encoding), noise)

    def inputs(self, observations: Tensor) -> Tensor:
        return self.learner.sac.inputs(self.learner.state["statistics"], observations)

    def outputs(self, vector: Tensor, observations: Tensor, actions: Tensor) -> Tensor:
        critic = self.learner.sac.critic
        return critic(vector, critic.encode(vector, self.inputs(observations)), actions)

    def critic_losses(self, batch: Batch, noise: Tensor, alpha: Tensor) -> Tensor:
        with torch.no_grad():
            actions, log_prob = self.act(batch.next_observations, noise)
            values = self.learner.sac.critic_loss.values(self.outputs(self.target, batch.next_observations, actions))
            soft_values = values.min(0).values - alpha[:, None] * log_prob
            targets = self.settings.reward_scale * batch.rewards + batch.discounts * soft_values
        outputs = self.outputs(self.leaves["critic"], batch.observations, batch.actions)
        return self.learner.sac.critic_loss.losses(outputs, targets)

    def update(self, batch: Batch, noise: Tensor) -> None:
        log_alpha, settings = self.leaves["log_alpha"], self.settings
        alpha = log_alpha.detach().exp()
        actions, log_prob = self.act(batch.observations, noise[0])
        critic_losses = self.critic_losses(batch, noise[1], alpha)
        self.step("log_alpha", -(log_alpha * (log_prob.detach() + settings.target_entropy).mean(1)).sum())
        self.step("critic", critic_losses.mean())
        outputs = self.outputs(self.leaves["critic"].detach(), batch.observations, actions)
        values = self.learner.sac.critic_loss.values(outputs).min(0).values
        self.step("actor", (alpha[:, None] * log_prob - values).mean(1).mean())
        self.target += settings.tau * (self.leaves["critic"].detach() - self.target)


CASES: dict[str, dict[str, Any]] = {
    "mlp": {},
    "multi_head": {"network": {"kind": "multi_head"}},
    "affine_layer_norm": {"network": {"layer_norm": "affine", "kind": "multi_head"}},
    "shared_encoder": {"network": {"share_encoder": True, "kind": "multi_head", "layer_norm": "affine"}},
    "task_blind_and_normalised": {"network": {"task_input": "none", "observation_normalization": True}},
    "categorical": {"critic_loss": "categorical", "critic_bins": 11, "critic_min": -5.0, "critic_max": 5.0},
    "weight_decay": {"weight_decay": 0.3},
    "clipped": {"max_grad_norm": 0.05, "network": {"kind": "multi_head"}},
    "reward_scale": {"reward_scale": 7.0},
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_five_updates_with_the_mean_equal_plain_autograd(case):
    learner = small_learner(double=True, **case)
    learner.observe(random_batch(9, dtype=torch.float64).observations)
    start = {name: value.clone() for name, value in learner.state.items()}
    reference = Reference(learner)
    for seed in range(5):
        batch, noise = random_batch(seed, dtype=torch.float64), draw_noise(learner, seed)
        learner.update(batch, noise)
        reference.update(batch, noise.actions)
    expected = {name: leaf.detach() for name, leaf in reference.leaves.items()} | {"target_critic": reference.target}
    for name, value in expected.items():
        moved, ours = value - start[name], learner.state[name] - start[name]
        assert float((ours - moved).abs().max() / moved.abs().max()) < 1e-7, name


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_the_step_is_what_the_rule_makes_of_the_task_gradients(rule):
    """The rule is called here with gradients, Gramian and losses from plain autograd."""
    learner = small_learner(double=True, rule=rule, network={"kind": "multi_head"})
    batch, noise = random_batch(dtype=torch.float64), draw_noise(learner)
    reference = Reference(learner)
    losses = reference.critic_losses(batch, noise.actions[1], learner.state["log_alpha"].exp())
    leaf = reference.leaves["critic"]
    J = torch.stack([torch.autograd.grad(loss, leaf, retain_graph=True)[0] for loss in losses])
    shared, old = learner.sac.critic.layout.shared_size, learner.state["critic"].clone()
    rows, own_rows = J[:, :shared], J[:, shared:]
    needed = rows if rule.needs == "jacobian" else None
    expected = rule.aggregate(rows @ rows.T, noise.critic, losses, needed)
    own_weights = torch.full_like(losses, 1 / len(losses)) if expected.own_weights is None else expected.own_weights

    metrics = learner.update(batch, noise)
    close = {"rtol": 1e-8, "atol": 1e-12}
    torch.testing.assert_close(metrics.per_task["gradients/critic/weight"], expected.weights, **close)
    torch.testing.assert_close(metrics.per_task["gradients/critic/norm"], rows.norm(dim=1))
    combined = expected.weights @ rows if expected.direction is None else expected.direction
    direction = learner.state["critic/m"] / 0.1  # after one step Adam's first moment is a tenth of the gradient
    torch.testing.assert_close(direction[:shared], combined, **close)
    torch.testing.assert_close(direction[shared:], own_weights @ own_rows, **close)
    if rule.preconditioned:
        torch.testing.assert_close((old - learner.state["critic"])[:shared], 3e-4 * combined, **close)
