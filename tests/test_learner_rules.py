"""What the learner does for rules that keep a state, see losses, return directions or are optimisers themselves."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from small_learner import RULES, TASKS, changed, draw_noise, random_batch, small_learner, state_copy, update
from torch import Tensor

from mtrl_imgrad.aggregators import DBMTL, FAMO, AdaTask, Aggregator, IMGrad, Mean, MoCo
from mtrl_imgrad.losses import SquaredLoss

STATEFUL = {name: rule for name, rule in RULES.items() if rule.initial_state((TASKS,), 4)}
CRITIC_ONLY = {name: rule for name, rule in RULES.items() if rule.critic_only}


def rule_state(learner, network: str) -> set[str]:
    return {name for name in learner.state if name.startswith(f"{network}/rule/")}


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("network", [{"kind": "multi_head"}, {"share_encoder": True}], ids=["heads", "one encoder"])
def test_training_keeps_everything_finite(rule: Aggregator, network: dict) -> None:
    learner = small_learner(rule=rule, network=network, max_grad_norm=1.0)
    for seed in range(8):
        metrics = update(learner, seed=seed)
    for name, value in (learner.state_dict() | metrics.per_task | metrics.scalars).items():
        assert torch.isfinite(value).all(), name
    assert not learner.non_finite.any()


@pytest.mark.parametrize("rule", STATEFUL.values(), ids=STATEFUL)
def test_a_saved_learner_continues_bit_for_bit_with_the_rules_state(rule: Aggregator) -> None:
    through, resumed = small_learner(rule=rule), small_learner(rule=rule)
    for seed in range(4):
        update(through, seed=seed)
    resumed.load_state_dict(state_copy(through))
    for learner in (through, resumed):
        for seed in range(4, 8):
            update(learner, seed=seed)
    assert changed(state_copy(through), resumed) == set()
    assert rule_state(through, "critic")


@pytest.mark.parametrize("rule", STATEFUL.values(), ids=STATEFUL)
def test_the_rules_state_moves_with_an_update_and_not_with_a_rejected_one(rule: Aggregator) -> None:
    learner = small_learner(rule=rule)
    update(learner)
    before = state_copy(learner)
    update(learner, seed=2)
    assert rule_state(learner, "critic") & changed(before, learner)
    before, spoiled = state_copy(learner), random_batch(3)
    spoiled.rewards[1, 0] = torch.inf
    update(learner, spoiled, seed=3)
    assert changed(before, learner) == {"non_finite"}


def test_critics_and_actor_have_a_state_each_of_their_own_size() -> None:
    learner = small_learner(rule=MoCo(), network={"kind": "multi_head"})
    for network in ("critic", "actor"):
        shared = getattr(learner.sac, network).layout.shared_size
        assert learner.state[f"{network}/rule/tracked"].shape == (TASKS, shared)
    assert learner.sac.rules["critic"] is not learner.sac.rules["actor"]


@pytest.mark.parametrize("rule", CRITIC_ONLY.values(), ids=CRITIC_ONLY)
def test_a_rule_for_critics_leaves_the_actor_the_mean(rule: Aggregator) -> None:
    learner, plain = small_learner(rule=rule), small_learner()
    weights = update(learner).per_task
    update(plain)
    torch.testing.assert_close(weights["gradients/actor/weight"], torch.full((TASKS,), 1 / TASKS).double())
    assert rule_state(learner, "actor") == set()


@dataclass(frozen=True)
class Shifted(SquaredLoss):
    """The squared loss of task 1 minus 100."""

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return super().losses(outputs, targets) - 100 * torch.nn.functional.one_hot(torch.tensor(1), TASKS)


@pytest.mark.parametrize("kind", ["mlp", "multi_head"])
@pytest.mark.parametrize("rule", CRITIC_ONLY.values(), ids=CRITIC_ONLY)
def test_a_negative_loss_is_counted_for_its_task_and_changes_nothing(rule: Aggregator, kind: str) -> None:
    learner = small_learner(rule=rule, network={"kind": kind})
    update(learner)
    learner.sac.critic_loss = Shifted()
    before = state_copy(learner)
    update(learner, seed=2)
    assert changed(before, learner) == {"non_finite"}
    assert learner.non_finite.tolist() == [[0, 1, 0], [0, 0, 0], [0, 0, 0]]


def test_a_negative_loss_is_nothing_to_other_rules() -> None:
    learner = small_learner(rule=IMGrad())
    learner.sac.critic_loss = Shifted()
    update(learner)
    assert not learner.non_finite.any()


def recorded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, Tensor]]:
    seen, after_step = [], FAMO.after_step

    def record(self: FAMO, state: dict[str, Tensor], losses: Tensor, new_losses: Tensor) -> dict[str, Tensor]:
        seen.append((losses, new_losses))
        return after_step(self, state, losses, new_losses)

    monkeypatch.setattr(FAMO, "after_step", record)
    return seen


@pytest.mark.parametrize("network", [{"kind": "mlp"}, {"share_encoder": True}], ids=["mlp", "one encoder"])
def test_famo_sees_the_losses_on_the_same_batch_with_the_same_targets_after_the_critics_step(
    network: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, targets, losses_of = recorded(monkeypatch), [], SquaredLoss.losses

    def record(self: SquaredLoss, outputs: Tensor, given_targets: Tensor) -> Tensor:
        targets.append(given_targets.clone())
        return losses_of(self, outputs, given_targets)

    learner = small_learner(rule=FAMO(), network=network, critic_lr=1e-2, actor_lr=1e-2, tau=0.5)
    update(learner)
    monkeypatch.setattr(SquaredLoss, "losses", record)
    batch = random_batch(5)
    metrics = learner.update(batch, draw_noise(learner, 5))
    losses, new_losses = seen[1]
    torch.testing.assert_close(losses, metrics.per_task["train/critic_loss"])
    inputs = learner.sac.inputs(learner.state["statistics"], batch.observations)
    encoding = learner.sac.critic.encode(learner.state["critic"], inputs)
    outputs = learner.sac.critic(learner.state["critic"], encoding, batch.actions)
    torch.testing.assert_close(new_losses, losses_of(SquaredLoss(), outputs, targets[0]))  # the critics alone are new
    assert (new_losses != losses).all()
    assert not new_losses.requires_grad


def test_famo_lowers_the_logits_of_the_tasks_whose_losses_fell_more(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, learner = recorded(monkeypatch), small_learner(rule=FAMO(), critic_lr=1e-3)
    update(learner)
    falls = seen[0][0].log() - seen[0][1].log()
    # Adam's first step has the length of its step size.
    expected = -0.025 * (falls - falls.mean()).sign().double()
    torch.testing.assert_close(learner.state["critic/rule/logits"], expected, rtol=1e-2, atol=0)


def test_losses_that_overflow_after_the_critics_step_stop_the_update(monkeypatch: pytest.MonkeyPatch) -> None:
    learner = small_learner(rule=FAMO())
    update(learner)
    calls, losses = [], SquaredLoss.losses

    def overflow(self: SquaredLoss, outputs: Tensor, targets: Tensor) -> Tensor:
        calls.append(outputs)
        factor = torch.tensor([1.0, 1.0, torch.inf if len(calls) == 2 else 1.0])
        return losses(self, outputs, targets) * factor

    monkeypatch.setattr(SquaredLoss, "losses", overflow)
    before = state_copy(learner)
    update(learner, seed=2)
    assert len(calls) == 2
    assert changed(before, learner) == {"non_finite"}
    assert learner.non_finite.tolist() == [[0, 0, 1], [0, 0, 0], [0, 0, 0]]


def test_own_parameters_follow_the_weights_of_a_rule_on_losses() -> None:
    """One Adam moment of the heads is a tenth of weight times gradient, so it is K times w_i that of the mean."""
    famo, mean = (small_learner(rule=rule, network={"kind": "multi_head"}) for rule in (FAMO(), Mean()))
    weights = update(famo).per_task["gradients/critic/weight"]
    update(mean)
    found, plain = (
        learner.sac.critic.layout.views(learner.state["critic/m"])["head.weight"] for learner in (famo, mean)
    )
    torch.testing.assert_close(found, plain * (TASKS * weights).float()[:, None, None], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("combine", ["mean", "sum"])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_adatask_with_one_task_is_adam(weight_decay: float, combine: str) -> None:
    rules = AdaTask(combine=combine), Mean()
    adatask, adam = (small_learner(rule=rule, tasks=1, double=True, weight_decay=weight_decay) for rule in rules)
    for seed in range(6):
        update(adatask, seed=seed)
        update(adam, seed=seed)
    for name in ("critic", "actor", "log_alpha", "target_critic"):
        torch.testing.assert_close(adatask.state[name], adam.state[name], rtol=1e-9, atol=1e-12)


def test_an_optimiser_of_its_own_is_not_clipped() -> None:
    clipped, free = (small_learner(rule=AdaTask(), max_grad_norm=norm) for norm in (1e-3, 0.0))
    update(clipped)
    update(free)
    assert clipped.state["critic"].equal(free.state["critic"])


def test_log_losses_shape_the_step_of_a_rule_that_needs_both() -> None:
    """A reward scale multiplies losses and gradients; the direction of DB-MTL does not see it."""
    learner = small_learner(rule=DBMTL(beta=0.0), network={"kind": "multi_head"})
    batch = random_batch()
    metrics = update(learner, replace(batch, discounts=torch.zeros_like(batch.discounts)))
    norms, weights = metrics.per_task["gradients/critic/norm"], metrics.per_task["gradients/critic/weight"]
    lengths = norms * weights
    torch.testing.assert_close(lengths, lengths[:1].expand(TASKS), rtol=1e-5, atol=0)
