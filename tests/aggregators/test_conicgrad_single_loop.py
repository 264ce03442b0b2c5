"""ConicGrad's mode that moves the task weights by one Adam step a call."""

from __future__ import annotations

import itertools

import pytest
import torch
from gradient_families import FAMILIES, direction, gradients, relative_error
from hypothesis import given, settings
from hypothesis import strategies as st
from loops import best_in_the_cone, by_single_loop
from torch import Tensor

from mtrl_imgrad.aggregators import ConicGrad

STATE = ("logits", "adam_m", "adam_v", "adam_step")


def at(logits: Tensor, **fields) -> ConicGrad:
    """A rule that has come to these logits."""
    rule = ConicGrad(mode="single_loop", **fields)
    rule.load_state_dict(rule.initial_state((len(logits),), 0) | {"logits": logits})
    return rule


@pytest.mark.parametrize("num_tasks", [1, 2, 3, 10, 50])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_direction_is_the_best_one_for_the_present_weights(family: str, num_tasks: int) -> None:
    generator = torch.Generator().manual_seed(1)
    for c, scale, spread in itertools.product((0.1, 0.5, 0.9), (1e-4, 1.0, 1e4), (1.0, 5.0)):
        jacobian = gradients(family, num_tasks) * scale
        logits = spread * torch.randn(num_tasks, generator=generator, dtype=torch.float64)
        result = at(logits, c=c)(jacobian @ jacobian.mT).weights @ jacobian
        expected = best_in_the_cone(jacobian, logits.softmax(0), c)
        # ||P gw|| of nearly parallel gradients is a difference of nearly equal numbers.
        assert relative_error(result, expected) < (1e-9 if family == "parallel" else 1e-12)


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_logits_move_as_torchs_adam_moves_them(family: str, scale: float) -> None:
    rule = ConicGrad(c=0.5, mode="single_loop", lr=0.3, gamma=0.05)
    jacobians = [scale * gradients(family, 5, seed) for seed in range(8)]
    for jacobian, best, logits in zip(jacobians, *by_single_loop(jacobians, rule), strict=True):
        result = rule(jacobian @ jacobian.mT).weights @ jacobian
        assert (result - best).norm() < 1e-8 * best.norm()
        assert (rule.state_dict()["logits"] - logits).abs().max() < (1e-6 if family == "parallel" else 1e-10)
    assert rule.state_dict()["adam_step"] == 8


def test_many_steps_on_one_gramian_reach_the_exact_worst_case() -> None:
    """The gradient is the dual's, so that without decay the loop converges to what `exact` gives."""
    for family, c in (("conflict", 0.9), ("gauss", 0.3), ("shared", 0.5)):
        jacobian = gradients(family, 4)
        gramian = jacobian @ jacobian.mT
        rule = ConicGrad(c=c, mode="single_loop", lr=0.01, gamma=0.0)
        for _ in range(1500):
            weights = rule.aggregate(gramian, state=rule.state_dict() or None)
            rule.load_state_dict(weights.state)
        exact = direction(ConicGrad(c=c), jacobian)
        assert (jacobian @ (weights.weights @ jacobian)).min() > (jacobian @ exact).min() - 1e-2 * exact @ exact
        assert relative_error(weights.weights @ jacobian, exact) < 0.05


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    family=st.sampled_from(FAMILIES), num_tasks=st.integers(1, 8), c=st.floats(0.05, 1.0), scale=st.integers(-6, 6),
    data=st.data(),
)  # fmt: skip
def test_norm_cone_permutations_and_scales(family: str, num_tasks: int, c: float, scale: int, data) -> None:
    order = torch.tensor(data.draw(st.permutations(range(num_tasks))))
    one, other = (ConicGrad(c=c, mode="single_loop", lr=1.0) for _ in range(2))
    for seed in range(3):
        jacobian = gradients(family, num_tasks, seed)
        rows = jacobian[order] * 10.0**scale
        result = one(jacobian @ jacobian.mT).weights @ jacobian
        torch.testing.assert_close(
            other(rows @ rows.mT).weights @ rows / 10.0**scale, result, rtol=1e-5, atol=1e-6 * jacobian.norm().item()
        )
        mean = jacobian.mean(0)
        assert result.norm().item() == pytest.approx(mean.norm().item(), rel=1e-6)
        assert torch.cosine_similarity(result, mean, dim=0) >= c - 1e-6


def test_the_first_direction_and_the_narrowest_cone_are_the_mean() -> None:
    for family in FAMILIES:
        jacobian = gradients(family, 4)
        assert relative_error(direction(ConicGrad(mode="single_loop"), jacobian), jacobian.mean(0)) < 1e-12
        narrow = at(torch.tensor([3.0, 0.0, -1.0, 0.5], dtype=torch.float64), c=1.0)
        assert relative_error(narrow(jacobian @ jacobian.mT).weights @ jacobian, jacobian.mean(0)) < 1e-9


def test_on_infeasible_decides_where_nothing_in_the_cone_helps_the_weighted_sum() -> None:
    jacobian = torch.tensor([[1.0, 0.0], [-3.0, 0.2]], dtype=torch.float64)
    gramian, mean = jacobian @ jacobian.mT, jacobian.mean(0)
    logits = torch.tensor([9.0, -9.0], dtype=torch.float64)  # g0 points to the second task, gw is the first
    found = {
        policy: at(logits, c=0.9, on_infeasible=policy)(gramian).weights @ jacobian
        for policy in ("boundary", "mean", "zero")
    }
    assert found["zero"].norm() == 0
    assert relative_error(found["mean"], mean) < 1e-12
    assert torch.cosine_similarity(found["boundary"], mean, dim=0).item() == pytest.approx(0.9)


def test_degenerate_gradients_have_an_answer() -> None:
    one = gradients("gauss", 3)
    zero = torch.zeros_like(one)
    rows = {
        "opposed": torch.stack([one[0], -one[0]]),
        "opposed of unequal length": torch.stack([one[0], -3.0 * one[0]]),
        "duplicates": torch.stack([one[0], one[0], one[1]]),
        "rank one": one[:1] * torch.tensor([[1.0], [-2.0], [0.5], [1e-3]], dtype=torch.float64),
        "one long": one * torch.tensor([[1.0], [1e6], [1.0]], dtype=torch.float64),
        "none": zero,
    }
    for (name, jacobian), policy in itertools.product(rows.items(), ("boundary", "mean", "zero")):
        rule = ConicGrad(mode="single_loop", lr=1.0, on_infeasible=policy)
        for _ in range(20):
            result = rule(jacobian @ jacobian.mT)
            assert torch.isfinite(result.weights).all(), name
            assert all(torch.isfinite(value).all() for value in result.state.values())


def test_without_a_mean_the_cone_has_no_axis_and_the_weights_are_the_means() -> None:
    jacobian = torch.tensor([[1.0, 0.0], [-0.5, 2.0], [-0.5, -2.0]], dtype=torch.float64)
    logits = torch.tensor([1.0, 0.0, -1.0], dtype=torch.float64)
    for policy in ("boundary", "zero"):
        weights = at(logits, on_infeasible=policy)(jacobian @ jacobian.mT).weights
        assert weights.tolist() == pytest.approx([1 / 3] * 3)


def test_a_task_without_gradient_keeps_its_state_and_takes_no_share() -> None:
    jacobian = gradients("conflict", 4)
    rule = ConicGrad(mode="single_loop", lr=0.5)
    for _ in range(3):
        rule(jacobian @ jacobian.mT)
    before = rule.state_dict()
    jacobian[2] = 0.0
    assert rule(jacobian @ jacobian.mT).weights[2] == 0
    after = rule.state_dict()
    assert all(after[name][2] == before[name][2] for name in STATE[:3])
    assert all((after[name][[0, 1, 3]] != before[name][[0, 1, 3]]).all() for name in STATE[:3])
    present = jacobian[[0, 1, 3]]
    tasks = before["logits"][[0, 1, 3]].softmax(0)
    expected = best_in_the_cone(torch.cat([present, 0.0 * present[:1]]), torch.cat([tasks, 0.0 * tasks[:1]]), 0.5)
    assert relative_error(at(before["logits"])(jacobian @ jacobian.mT).weights @ jacobian, expected) < 1e-9


def test_a_loaded_state_goes_on_bit_for_bit() -> None:
    gramians = [rows @ rows.mT for rows in (gradients("conflict", 5, seed) for seed in range(8))]
    one = ConicGrad(mode="single_loop", lr=0.5)
    for gramian in gramians[:4]:
        one(gramian)
    other = ConicGrad(mode="single_loop", lr=0.5)
    other.load_state_dict(one.state_dict())
    assert sorted(one.state_dict()) == sorted(STATE)
    for gramian in gramians[4:]:
        assert torch.equal(one(gramian).weights, other(gramian).weights)
    for name in STATE:
        assert torch.equal(one.state_dict()[name], other.state_dict()[name])
    assert ConicGrad().initial_state((5,), 0) == {}
