"""The simplex kernel where some gradients are up to 1e8 times longer than others, against 60-digit arithmetic."""

from __future__ import annotations

import itertools

import numpy as np
import oracles
import pytest
import torch
from gradient_families import FULL_RANK, ROUTES, gradients, relative_error
from torch import Tensor

from mtrl_imgrad.aggregators.solvers import SimplexSolution, minimise_on_simplex, simplex

SPREADS = ("one long", "one short", "geometric")
KERNELS = {"cagrad": (0.4, 0.0), "quadratic": (0.0, 1.0), "both": (0.3, 0.7)}  # (r / ||g0||, q)


def spread(family: str, num_tasks: int, kind: str, ratio: float) -> Tensor:
    """Gradients of a family, some of them `ratio` times longer, of mean squared norm 1."""
    rows = gradients(family, num_tasks, 3)
    if kind == "geometric":
        rows = rows * torch.logspace(0.0, np.log10(ratio), num_tasks, dtype=torch.float64)[:, None]
    else:
        rows[num_tasks // 2] *= {"one long": ratio, "one short": 1.0 / ratio}[kind]
    return rows / rows.square().sum(1).mean().sqrt()


def solve(jacobian: Tensor, kernel: str, route: str) -> tuple[SimplexSolution, tuple[np.ndarray, float, float]]:
    gramian = jacobian @ jacobian.mT
    radius, quadratic = KERNELS[kernel]
    products = gramian.mean(-1) if radius > 0 else torch.zeros_like(gramian[0])
    norm, q = radius * gramian.mean().sqrt(), torch.tensor(quadratic, dtype=torch.float64)
    active = torch.ones(len(gramian), dtype=torch.bool)
    solution = minimise_on_simplex(gramian, products, norm, q, active, solver=route)
    return solution, (products.numpy(), norm.item(), quadratic)


def against_the_exact_one(
    jacobian: Tensor, solution: SimplexSolution, terms: tuple[np.ndarray, float, float]
) -> tuple[float, float]:
    """The relative error of J^T w, and how far from optimal the exact minimiser on w's support is."""
    weights = solution.weights.numpy()
    # The interior point leaves weights near 1e-20 beside those of the support.
    share = weights * np.linalg.norm(jacobian.numpy(), axis=1)
    exact, error = oracles.exact_kernel(jacobian.numpy(), *terms, np.where(share > 1e-11 * share.max(), weights, 0.0))
    return float(np.linalg.norm(weights @ jacobian.numpy() - exact) / np.linalg.norm(exact)), error


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("kind", SPREADS)
def test_the_combination_is_the_exact_one(kind: str, kernel: str, route: str) -> None:
    for family, (num_tasks, ratio) in itertools.product(
        ("gauss", "shared", "conflict"), ((2, 1e8), (3, 1e7), (5, 1e8), (10, 1e2), (10, 1e8))
    ):
        jacobian = spread(family, num_tasks, kind, ratio)
        solution, terms = solve(jacobian, kernel, route)
        error, support_error = against_the_exact_one(jacobian, solution, terms)
        assert support_error < 1e-12  # the support is the right one
        assert error < 1e-9
        assert solution.gap < 1e-12
        assert solution.relative_gap < 1e-4


@pytest.mark.parametrize("route", ROUTES)
def test_one_gradient_a_million_times_longer_than_the_imbalanced_ones(route: str) -> None:
    for kernel in KERNELS:
        jacobian = gradients("imbalanced", 10, 4)
        jacobian[3] *= 1e6
        jacobian = jacobian / jacobian.square().sum(1).mean().sqrt()
        solution, terms = solve(jacobian, kernel, route)
        error, support_error = against_the_exact_one(jacobian, solution, terms)
        assert support_error < 1e-12
        assert error < 1e-9


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("kind", SPREADS)
@pytest.mark.parametrize("num_tasks", [10, 50])
def test_both_routes_agree(num_tasks: int, kind: str, kernel: str) -> None:
    for family in FULL_RANK:
        jacobian = spread(family, num_tasks, kind, 1e8)
        host, device = (solve(jacobian, kernel, route)[0].weights @ jacobian for route in ROUTES)
        assert relative_error(device, host) < 1e-4


@pytest.mark.parametrize("route", ROUTES)
def test_the_relative_gap_is_the_gap_over_the_terms_at_the_answer(route: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simplex, "INTERIOR_POINT_STEPS", 6)
    monkeypatch.setattr(simplex, "on_support", lambda problem, matrix, support, curvature: 0.0 * problem.linear)
    jacobian = spread("conflict", 5, "geometric", 1e3)
    solution, (linear, norm, quadratic) = solve(jacobian, "both", route)
    assert (solution.gap > 1e-9) == (route == "device")  # stopped early

    def size(weights: np.ndarray, linear: np.ndarray) -> float:
        length = float(np.linalg.norm(weights @ jacobian.numpy()))
        return float(linear @ weights) + norm * length + quadratic / 2 * length**2

    at_uniform, at_answer = size(np.full(5, 0.2), linear), size(solution.weights.numpy(), np.abs(linear))
    expected = solution.gap.item() * at_uniform / at_answer
    assert solution.relative_gap.item() == pytest.approx(expected, rel=1e-9)


def test_a_wrong_answer_shows_in_the_relative_gap_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A short gradient's neighbourhood is invisible next to f at the uniform weights."""
    jacobian = spread("gauss", 10, "one long", 1e8)
    right = solve(jacobian, "quadratic", "device")[0].weights @ jacobian
    monkeypatch.setattr(simplex, "INTERIOR_POINT_STEPS", 5)
    monkeypatch.setattr(simplex, "on_support", lambda problem, matrix, support, curvature: 0.0 * problem.linear)
    solution = solve(jacobian, "quadratic", "device")[0]
    assert relative_error(solution.weights @ jacobian, right) > 1e-2
    assert solution.gap < 1e-9
    assert solution.relative_gap > 1e-3


def test_a_ratio_beyond_float64_is_answered_alike_or_told() -> None:
    for kind, kernel, ratio in itertools.product(SPREADS, KERNELS, (1e10, 1e12, 1e14)):
        jacobian = spread("gauss", 5, kind, ratio)
        host, device = (solve(jacobian, kernel, route)[0] for route in ROUTES)
        assert torch.isfinite(host.weights).all()
        assert torch.isfinite(device.weights).all()
        if max(host.relative_gap, device.relative_gap) < 1e-6:
            assert relative_error(device.weights @ jacobian, host.weights @ jacobian) < 1e-2


def test_the_best_corner_may_be_a_very_short_gradient() -> None:
    """A linear objective; the support shrinks to one task, whose tilt is rounding error."""
    gramian = torch.diag(torch.tensor([1.0, 2.0, 1e-22, 1e-20], dtype=torch.float64))
    zero, active = torch.zeros((), dtype=torch.float64), torch.ones(4, dtype=torch.bool)
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        linear = -torch.rand(4, generator=generator, dtype=torch.float64)
        linear[2] -= 1.0
        weights = minimise_on_simplex(gramian, linear, zero, zero, active, solver="host").weights
        assert weights.tolist() == pytest.approx([0, 0, 1, 0], abs=1e-9)
