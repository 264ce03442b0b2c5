"""UPGrad and DualProj: the projections are those of non-negative least squares, and no task is opposed."""

from __future__ import annotations

import numpy as np
import oracles
import pytest
import torch
from gradient_families import FAMILIES, ROUTES, direction, gradients, relative_error
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import nnls
from torch import Tensor

from mtrl_imgrad.aggregators import Aggregator, DualProj, UPGrad
from mtrl_imgrad.aggregators.solvers import dual_cone
from mtrl_imgrad.aggregators.solvers.dual_cone import project_onto_dual_cone

SIZES = (1, 2, 3, 10, 50)
SCALES = (1e-4, 1.0, 1e4)
every_rule = pytest.mark.parametrize("rule", [UPGrad, DualProj], ids=["upgrad", "dualproj"])
every_route = pytest.mark.parametrize("route", ROUTES)
few = settings(max_examples=15, deadline=None, derandomize=True)
anything = given(
    family=st.sampled_from(FAMILIES), num_tasks=st.integers(1, 8), seed=st.integers(0, 10_000), data=st.data()
)


def projected(jacobian: Tensor, vector: Tensor) -> Tensor:
    """The projection of a vector of the gradients' span: vector + J^T s, s the NNLS solution of J^T s = -vector."""
    units = jacobian / jacobian.norm(dim=1, keepdim=True)
    added, _ = nnls(units.numpy().T, -vector.numpy(), maxiter=1000)
    return vector + torch.from_numpy(added) @ units


def expected_direction(rule: type[Aggregator], jacobian: Tensor) -> Tensor:
    if rule is DualProj:
        return projected(jacobian, jacobian.mean(0))
    return torch.stack([projected(jacobian, gradient) for gradient in jacobian]).mean(0)


@every_route
@every_rule
@pytest.mark.parametrize("family", FAMILIES)
def test_the_direction_is_that_of_nonnegative_least_squares(family: str, rule, route: str) -> None:
    for num_tasks in SIZES:
        jacobian = torch.from_numpy(oracles.coordinates(gradients(family, num_tasks, 1).numpy()))
        expected, size = expected_direction(rule, jacobian), jacobian.mean(0).norm()
        for scale in SCALES:
            scaled = jacobian * scale
            result = rule(solver=route)(scaled @ scaled.mT)
            assert result.diagnostics["gap"] < 1e-12
            found = result.weights @ jacobian
            if expected.norm() < 1e-10 * size:  # 0 is all that opposes no task
                assert found.norm() < 1e-9 * size
            else:
                assert torch.cosine_similarity(found, expected, dim=0) >= 1 - 1e-12
                assert relative_error(found, expected) < 1e-8


@every_route
@every_rule
@few
@anything
def test_no_task_is_opposed(rule, route, family, num_tasks, seed, data) -> None:
    jacobian = gradients(family, num_tasks, seed)
    jacobian[0] *= 10.0 ** data.draw(st.integers(-6, 6))
    found = direction(rule(solver=route), jacobian)
    units = jacobian / jacobian.norm(dim=1, keepdim=True)
    assert (units @ found).min() >= -1e-11 * jacobian.mean(0).norm()


@few
@anything
def test_dualproj_is_orthogonal_to_what_it_adds(family, num_tasks, seed, data) -> None:
    jacobian = gradients(family, num_tasks, seed)
    found, mean = direction(DualProj(), jacobian), jacobian.mean(0)
    size = jacobian.norm(dim=1).max() ** 2
    assert (found @ mean - found @ found).abs() < 1e-10 * size
    weights = DualProj()(jacobian @ jacobian.mT).weights
    added = weights - 1 / num_tasks
    assert (added >= -1e-12).all() or (weights == 0).all()  # 0 is all that opposes no task
    assert (added * (jacobian @ found)).abs().max() < 1e-10 * size


def test_without_conflict_both_are_the_mean() -> None:
    for family in ("shared", "parallel"):
        jacobian = gradients(family, 10)
        assert (jacobian @ jacobian.mT).min() > 0
        for rule in (UPGrad, DualProj):
            assert relative_error(direction(rule(), jacobian), jacobian.mean(0)) < 1e-14


def test_dualproj_is_the_mean_unless_a_task_opposes_it() -> None:
    jacobian = torch.tensor([[1.0, 0.0], [-0.2, 1.0]], dtype=torch.float64)
    assert jacobian[0] @ jacobian[1] < 0
    assert relative_error(direction(DualProj(), jacobian), jacobian.mean(0)) < 1e-15
    assert relative_error(direction(UPGrad(), jacobian), jacobian.mean(0)) > 0.05


def test_upgrad_is_linear_in_the_lengths_of_the_gradients() -> None:
    jacobian = gradients("conflict", 4, 3)
    one, other = (torch.tensor(lengths, dtype=torch.float64)[:, None] for lengths in ((1, 2, 3, 4.0), (5, 1, 0.1, 2.0)))
    total = direction(UPGrad(), jacobian * one) + direction(UPGrad(), jacobian * other)
    assert relative_error(direction(UPGrad(), jacobian * (one + other)), total) < 1e-10


def test_upgrad_of_two_tasks_is_the_closed_form() -> None:
    """Each gradient loses its part along the other, as in PCGrad, whose mean this is for K = 2."""
    jacobian = torch.tensor([[2.0, 1.0, 0.0], [-1.0, 0.5, 1.0]], dtype=torch.float64)
    gramian = jacobian @ jacobian.mT
    assert gramian[0, 1] < 0
    expected = (1 - gramian[0, 1] / gramian.diagonal()) / 2
    torch.testing.assert_close(UPGrad()(gramian).weights, expected, rtol=1e-11, atol=0)


@every_route
@every_rule
def test_a_task_without_gradient_leaves_the_others_as_they_were(rule, route: str) -> None:
    jacobian = gradients("conflict", 4)
    extended = torch.cat([jacobian, torch.zeros_like(jacobian[:1])])
    expected = direction(rule(solver=route), jacobian) * 4 / 5
    assert relative_error(direction(rule(solver=route), extended), expected) < 1e-12


@every_route
def test_the_gap_is_honest(route: str) -> None:
    """It is (primal - dual) of the problem in u, recomputed here from the returned v."""
    jacobian = gradients("conflict", 6)
    gramian = jacobian @ jacobian.mT
    sides = torch.eye(6, dtype=torch.float64)
    solution = project_onto_dual_cone(gramian, sides, torch.ones(6, dtype=torch.bool), route)
    slope = solution.weights @ gramian
    assert (solution.weights >= sides - 1e-12).all()
    assert slope.min() > -1e-9
    assert ((solution.weights - sides) * slope).sum(-1).abs().max() < 1e-12 * gramian.diagonal().max()
    assert solution.gap < 1e-12


def test_the_gap_is_that_between_primal_and_dual_for_any_answer() -> None:
    jacobian = torch.from_numpy(oracles.coordinates(gradients("conflict", 4).numpy()))
    matrix, sides = jacobian @ jacobian.mT, torch.eye(4, dtype=torch.float64)
    factor = torch.linalg.cholesky(matrix)
    added = torch.rand(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    slope = ((sides + added) @ matrix).clamp_min(0.0)
    assert (slope == 0).any()
    primal = ((sides + added) @ matrix * (sides + added)).sum(-1) / 2
    dual = (slope * sides).sum(-1) - (slope @ torch.linalg.inv(matrix) * slope).sum(-1) / 2
    expected = (primal - dual) / (matrix.diagonal() / 2)
    torch.testing.assert_close(dual_cone.relative_gap(matrix, factor, sides, added), expected)


@pytest.mark.parametrize("error", [0.99, 1.01])
def test_the_host_certifies_what_it_returns(error: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """A linear solver that is off by 1 % either way is found out, and the device route's answer returned."""
    jacobian = torch.tensor([[1.0, 0.0], [-0.5, 1.0]], dtype=torch.float64)
    expected = UPGrad(solver="device")(jacobian @ jacobian.mT).weights
    solve = dual_cone.solve_positive
    monkeypatch.setattr(
        dual_cone, "solve_positive", lambda *arguments, lower: (0, error * solve(*arguments, lower=1)[1])
    )
    torch.testing.assert_close(UPGrad(solver="host")(jacobian @ jacobian.mT).weights, expected, rtol=1e-9, atol=1e-12)


def test_the_host_needs_no_help(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dual_cone, "device_route", None)
    for family in FAMILIES:
        for num_tasks in SIZES:
            jacobian = gradients(family, num_tasks, 5)
            assert UPGrad(solver="host")(jacobian @ jacobian.mT).diagnostics["gap"] < 1e-12


def test_the_host_leaves_to_the_device_what_it_cannot_certify(monkeypatch: pytest.MonkeyPatch) -> None:
    jacobian = torch.stack([gradients("conflict", 4, seed) for seed in (0, 1, 2)])
    expected = UPGrad(solver="device")(jacobian @ jacobian.mT).weights
    pivot, calls = dual_cone.pivot, []

    def refuse(*arguments):
        calls.append(arguments)
        return None if len(calls) == 6 else pivot(*arguments)  # the second side of the second Gramian

    monkeypatch.setattr(dual_cone, "pivot", refuse)
    torch.testing.assert_close(UPGrad(solver="host")(jacobian @ jacobian.mT).weights, expected, rtol=1e-9, atol=1e-12)


@every_rule
def test_a_wrong_solver_is_refused_by_name(rule) -> None:
    with pytest.raises(ValueError, match=rf"{rule.__name__}.solver: got 'gpu', allowed: 'auto', 'device', 'host'"):
        rule(solver="gpu")


def test_a_side_may_have_any_sign() -> None:
    jacobian = gradients("conflict", 5)
    side = torch.tensor([[1.0, -2.0, 0.0, 0.5, -0.1]], dtype=torch.float64)
    expected = projected(jacobian, (side @ jacobian)[0])
    for route in ROUTES:
        solution = project_onto_dual_cone(jacobian @ jacobian.mT, side, torch.ones(5, dtype=torch.bool), route)
        np.testing.assert_allclose((solution.weights @ jacobian)[0].numpy(), expected.numpy(), atol=1e-9)
