"""Updates with a number that is not finite: they change nothing but counters, which name the task."""

from __future__ import annotations

import math

import pytest
import torch
from small_learner import RULES, changed, random_batch, small_learner, state_copy, update

from mtrl_imgrad.learner import Learner
from mtrl_imgrad.replay import Batch


def _spoiled(field: str, value: float) -> Batch:
    """A batch with one entry of task 1 that is not finite."""
    batch = random_batch(2)
    getattr(batch, field)[1, 3] = value
    return batch


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("field", ["rewards", "next_observations", "observations", "actions"])
@pytest.mark.parametrize("value", [math.nan, math.inf], ids=["nan", "inf"])
def test_a_non_finite_update_changes_nothing_but_counters(rule, value, field):
    learner = small_learner(rule=rule)
    update(learner)
    before = state_copy(learner)
    update(learner, _spoiled(field, value), seed=2)
    assert changed(before, learner) == {"non_finite"}
    assert learner.non_finite[:, 1].any()


@pytest.mark.parametrize("field", ["rewards", "next_observations", "observations", "actions"])
def test_a_non_finite_update_is_counted_for_its_own_task_only(field):
    learner = small_learner()
    update(learner, _spoiled(field, math.nan))
    assert learner.non_finite[:, 1].any()
    assert not learner.non_finite[:, [0, 2]].any()


def _huge(learner: Learner, reward: float, observation: float) -> Batch:
    """Finite numbers of task 1 that overflow in the critics; their heads of that task are 0, so that its gradient of
    the shared trunk is exactly 0."""
    for name in ("head.weight", "head.bias"):
        learner.sac.critic.layout.views(learner.state["critic"])[name][:, 1] = 0
    batch = random_batch()
    batch.rewards[1], batch.observations[1] = reward, observation
    return batch


def test_a_loss_that_overflows_while_its_gradient_is_finite_stops_the_update():
    learner = small_learner(network={"kind": "multi_head", "task_input": "none"})
    batch = _huge(learner, reward=3e19, observation=0.1)
    before = state_copy(learner)
    metrics = update(learner, batch)
    assert torch.isinf(metrics.per_task["train/critic_loss"][1])
    assert torch.isfinite(metrics.scalars["gradients/critic/direction_norm"])
    assert changed(before, learner) == {"non_finite"}
    assert learner.non_finite[:, 1].any()


def test_an_overflow_in_a_tasks_own_parameters_alone_stops_the_update_and_is_counted():
    learner = small_learner(network={"kind": "multi_head", "task_input": "none"})
    batch = _huge(learner, reward=3e18, observation=1000.0)
    before = state_copy(learner)
    metrics = update(learner, batch)
    assert torch.isfinite(metrics.per_task["train/critic_loss"]).all()
    assert torch.isfinite(metrics.per_task["gradients/critic/norm"]).all()
    assert torch.isinf(metrics.scalars["gradients/critic/direction_norm"])
    assert changed(before, learner) == {"non_finite"}


def test_training_goes_on_after_a_non_finite_update_as_if_it_had_not_been():
    hurt, well = small_learner(), small_learner()
    for seed in range(4):
        if seed == 2:
            bad = random_batch(99)
            bad.rewards[0, 0] = math.nan
            update(hurt, bad, seed=99)
        update(hurt, seed=seed)
        update(well, seed=seed)
    assert changed(state_copy(well), hurt) == {"non_finite"}
    assert float(hurt.state["updates"]) == 4


UNLEARNED = {"non_finite", "statistics", "noise", "returns", "return_size", "return_steps", "random_left"}
"""What only the environments change, and counters."""


def test_a_finite_update_counts_nothing_and_changes_everything():
    learner = small_learner()
    before = state_copy(learner)
    update(learner)
    assert changed(before, learner) == set(before) - UNLEARNED
