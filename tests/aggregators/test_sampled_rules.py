"""CAGrad-Fast, SDMGrad and SDMGrad-OS against CLARABEL, NNLS and their own definitions on explicit vectors."""

from __future__ import annotations

import itertools

import oracles
import pytest
import torch
from gradient_families import FAMILIES, ROUTES, direction, gradients, noise_for, relative_error
from torch import Tensor

from mtrl_imgrad.aggregators import MGDA, Aggregator, CAGrad, CAGradFast, Mean, SDMGrad, SDMGradOS

SCALES = (1e-4, 1.0, 1e4)
SIZES = (1, 2, 3, 10, 50)


def cosine_distance(one: Tensor, other: Tensor) -> float:
    """1 - cos without cancellation."""
    return float((one / one.norm() - other / other.norm()).square().sum() / 2)


# ---------------------------------------------------------------------------------------------------------------------
# CAGrad-Fast
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_tasks", SIZES)
@pytest.mark.parametrize("family", FAMILIES)
def test_cagrad_fast_is_the_best_worst_case_of_the_groups(family: str, num_tasks: int) -> None:
    """max min <h_k, d> = min_w <hw, g0> + c ||g0|| ||hw||: the value certifies d on explicit vectors."""
    c, n = 0.5, min(4, num_tasks)
    jacobian = gradients(family, num_tasks, 1)
    jacobian = jacobian / jacobian.square().sum(1).mean().sqrt()
    noise, mean = noise_for(CAGradFast(), num_tasks), jacobian.mean(0)
    rows = torch.from_numpy(oracles.fast_groups(jacobian.numpy(), noise.numpy(), n))
    for route, scale in itertools.product(ROUTES, SCALES):
        rule = CAGradFast(c=c, n=n, rescale=0, solver=route)
        result = rule(scale**2 * jacobian @ jacobian.mT, noise)
        assert result.diagnostics["gap"] < 1e-9
        given = result.weights @ jacobian
        assert (given - mean).norm().item() == pytest.approx(c * mean.norm().item(), rel=1e-7)
        if family == "imbalanced":  # CLARABEL loses digits there
            continue
        best = oracles.simplex_kernel(rows.numpy(), (rows @ mean).numpy(), c * float(mean.norm()), 0.0)
        combined = torch.from_numpy(best) @ rows
        if combined.norm() < 1e-4:
            continue  # 0 lies nearly in the hull of h, CLARABEL's direction is noise
        assert cosine_distance(given, mean + c * mean.norm() * combined / combined.norm()) < 1e-8


@pytest.mark.parametrize("route", ROUTES)
def test_with_as_many_groups_as_tasks_it_is_cagrad(route: str) -> None:
    for family, num_tasks, n in itertools.product(FAMILIES, (1, 2, 5), (5, 8)):
        jacobian = gradients(family, num_tasks)
        fast = direction(CAGradFast(c=0.7, n=n, solver=route), jacobian, noise_for(CAGradFast(), num_tasks))
        assert relative_error(fast, direction(CAGrad(c=0.7, rescale=2, solver=route), jacobian)) < 1e-9


def test_one_group_or_no_room_is_the_mean() -> None:
    for family in FAMILIES:
        jacobian = gradients(family, 6)
        noise = noise_for(CAGradFast(), 6)
        mean = direction(Mean(), jacobian)
        assert relative_error(direction(CAGradFast(c=0.7, n=1, rescale=0), jacobian, noise), 1.7 * mean) < 1e-9
        assert relative_error(direction(CAGradFast(c=0.0, n=3), jacobian, noise), mean) < 1e-12


def test_no_task_is_missing_from_the_average_of_the_others() -> None:
    """The published code leaves one out. All non-sampled tasks share one weight, and it is not that of the mean."""
    jacobian = gradients("conflict", 7)
    noise = torch.linspace(0, 1, 7, dtype=torch.float64)
    weights = CAGradFast(c=0.9, n=3, rescale=0)(jacobian @ jacobian.mT, noise).weights
    assert (weights[2:] - weights[2]).abs().max() < 1e-12
    assert abs(weights[2] - 1 / 7) > 1e-3
    assert len(set(weights[:3].tolist())) == 3


def test_a_task_without_gradient_is_neither_drawn_nor_averaged() -> None:
    jacobian, noise = gradients("conflict", 6), torch.tensor([0.5, 0.1, 0.9, 0.3, 0.7, 0.2], dtype=torch.float64)
    extended = torch.cat([torch.zeros_like(jacobian[:2]), jacobian])
    extended_noise = torch.cat([torch.tensor([0.0, 0.4], dtype=torch.float64), noise])
    given = direction(CAGradFast(n=3), extended, extended_noise)
    assert relative_error(given, direction(CAGradFast(n=3), jacobian, noise) * 6 / 8) < 1e-9


# ---------------------------------------------------------------------------------------------------------------------
# SDMGrad
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("num_tasks", SIZES)
@pytest.mark.parametrize("family", FAMILIES)
def test_sdmgrad_is_the_nonnegative_least_squares_point_of_the_shifted_gradients(
    family: str, num_tasks: int, route: str
) -> None:
    jacobian = gradients(family, num_tasks, 1)
    shifted = jacobian + 0.6 * jacobian.mean(0)
    expected = torch.from_numpy(oracles.mgda_weights(shifted.numpy())) @ shifted / 1.6
    size = jacobian.square().sum(1).mean().sqrt()
    for scale in SCALES:
        result = SDMGrad(solver=route)(scale**2 * jacobian @ jacobian.mT)
        given = result.weights @ jacobian
        assert result.diagnostics["gap"] < 1e-9
        products = shifted @ given * 1.6
        assert (products >= 1.6**2 * given @ given - 1e-9 * size**2).all()
        if family == "lowrank" and num_tasks > 5:
            # 0 lies in the hull: d = 0 is approached as the square root of the objective.
            assert given.norm() < 1e-5 * size
        else:
            assert relative_error(given, expected) < 1e-6
            assert cosine_distance(given, expected) < 1e-8


def test_no_regularisation_is_mgda_and_much_is_the_mean() -> None:
    for family in FAMILIES:
        jacobian = gradients(family, 5)
        assert relative_error(direction(SDMGrad(lam=0.0), jacobian), direction(MGDA(), jacobian)) < 1e-9
        assert relative_error(direction(SDMGrad(lam=1e9), jacobian), direction(Mean(), jacobian)) < 1e-7


def test_sdmgrad_is_the_shortest_combination_with_weights_of_at_least_lambda_over_1_plus_lambda_k() -> None:
    for family in ("conflict", "imbalanced", "shared"):
        jacobian = gradients(family, 5)
        gramian, floor = jacobian @ jacobian.mT, 0.6 / 1.6 / 5
        weights = SDMGrad()(gramian).weights
        assert weights.sum().item() == pytest.approx(1.0)
        assert weights.min() >= floor - 1e-12
        if MGDA()(gramian).weights.min() >= floor:
            assert relative_error(weights @ jacobian, direction(MGDA(), jacobian)) < 1e-9
        else:
            assert weights.min() <= floor + 1e-9
    assert MGDA()(gradients("conflict", 5) @ gradients("conflict", 5).mT).weights.min() > 0.6 / 1.6 / 5


def test_a_task_without_gradient_changes_only_the_mean_of_sdmgrad() -> None:
    jacobian = gradients("shared", 4)
    extended = torch.cat([jacobian, torch.zeros_like(jacobian[:1])])
    shifted = jacobian + 0.6 * extended.mean(0)
    expected = torch.from_numpy(oracles.mgda_weights(shifted.numpy())) @ shifted / 1.6
    assert relative_error(direction(SDMGrad(), extended), expected) < 1e-9


# ---------------------------------------------------------------------------------------------------------------------
# SDMGrad-OS
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_tasks", SIZES)
@pytest.mark.parametrize("family", FAMILIES)
def test_sdmgrad_os_is_sdmgrad_of_its_sample(family: str, num_tasks: int) -> None:
    rule, jacobian = SDMGradOS(n=4), gradients(family, num_tasks, 2)
    for seed, scale in enumerate(SCALES):
        noise = noise_for(rule, num_tasks, seed)
        sample = next(row < 4 / num_tasks for row in noise if (row < 4 / num_tasks).any())
        result = rule(scale**2 * jacobian @ jacobian.mT, noise)
        expected = direction(SDMGrad(), jacobian[sample])
        assert (result.weights[~sample] == 0).all()
        assert result.diagnostics["sampled"] == sample.sum()
        assert (result.weights @ jacobian - expected).norm() < 1e-9 * jacobian[sample].norm(dim=1).max()


def test_all_tasks_expected_is_sdmgrad() -> None:
    jacobian = gradients("conflict", 4)
    assert (
        relative_error(direction(SDMGradOS(n=9), jacobian, noise_for(SDMGradOS(), 4)), direction(SDMGrad(), jacobian))
        < 1e-9
    )


def test_n_tasks_are_sampled_on_average_and_never_none() -> None:
    rule, gramian = SDMGradOS(n=2, solver="device"), torch.eye(10, dtype=torch.float64).expand(400, 10, 10)
    noise = torch.stack([noise_for(rule, 10, seed) for seed in range(400)])
    sampled = rule(gramian, noise).diagnostics["sampled"]
    assert sampled.min() == 1
    # 10 draws with p = 0.2, given that they are not all failures: mean 2 / (1 - 0.8^10) = 2.24, deviation 1.2 / 20
    assert sampled.mean().item() == pytest.approx(2 / (1 - 0.8**10), abs=0.2)


def test_empty_samples_fall_to_the_next_row_and_finally_to_the_smallest_number() -> None:
    rule, jacobian = SDMGradOS(n=1), gradients("gauss", 4)
    gramian = jacobian @ jacobian.mT
    noise = torch.full((16, 4), 0.9, dtype=torch.float64)
    noise[-1, 2] = 0.5
    assert rule(gramian, noise).weights.tolist() == pytest.approx([0, 0, 1, 0])
    noise[3, 1] = 0.1
    noise[5, 0] = 0.1
    assert rule(gramian, noise).weights.tolist() == pytest.approx([0, 1, 0, 0])
    gramian[1], gramian[:, 1] = 0.0, 0.0  # a sample without any gradient is empty too
    assert rule(gramian, noise).weights.tolist() == pytest.approx([1, 0, 0, 0])


@pytest.mark.parametrize("rule", [CAGradFast(), SDMGradOS()], ids=lambda rule: type(rule).__name__)
def test_missing_noise_is_told_and_other_noise_is_another_direction(rule: Aggregator) -> None:
    jacobian = gradients("conflict", 10)
    with pytest.raises(ValueError, match=r"noise: got None, need \[.*10\] as drawn by"):
        rule.aggregate(jacobian @ jacobian.mT)
    one, other = (direction(rule, jacobian, noise_for(rule, 10, seed)) for seed in (1, 2))
    assert relative_error(one, other) > 1e-3


@pytest.mark.parametrize("rule", [CAGradFast(n=2), SDMGrad(), SDMGradOS(n=2)], ids=lambda rule: type(rule).__name__)
@pytest.mark.parametrize("route", ROUTES)
def test_degenerate_gradients_have_an_answer(rule: Aggregator, route: str) -> None:
    rule = type(rule)(**(vars(rule) | {"solver": route}))
    one = gradients("gauss", 3)
    rows = {
        "opposed": torch.stack([one[0], -one[0]]),
        "duplicates": torch.stack([one[0], one[0], one[1]]),
        "rank one": one[:1] * torch.tensor([[1.0], [-2.0], [0.5], [1e-3]], dtype=torch.float64),
        "others cancel": torch.stack([one[0], one[1], -one[1], one[2], -one[2]]),
        "one long": one * torch.tensor([[1.0], [1e6], [1.0]], dtype=torch.float64),
    }
    for name, jacobian in rows.items():
        for seed in range(4):
            result = rule(jacobian @ jacobian.mT, noise_for(rule, len(jacobian), seed))
            assert torch.isfinite(result.weights).all(), name
            if name == "one long":
                assert result.diagnostics["gap"] < 1e-9
