"""Sum, IMTL-G and Aligned-MTL: equal to their closed forms, and answered where these are singular."""

from __future__ import annotations

import itertools

import numpy as np
import oracles
import pytest
import torch
from gradient_families import FAMILIES, FULL_RANK, ROUTES, direction, gradients, relative_error
from hypothesis import given, settings
from hypothesis import strategies as st

from mtrl_imgrad.aggregators import IMTLG, AlignedMTL, Mean, Sum
from mtrl_imgrad.aggregators.solvers import eigen

SIZES = (1, 2, 3, 10, 50)
SCALES = (1e-4, 1.0, 1e4)
few = settings(max_examples=15, deadline=None, derandomize=True)
every_route = pytest.mark.parametrize("route", ROUTES)


def test_sum_is_k_times_the_mean_everywhere() -> None:
    jacobian = gradients("conflict", 5)
    jacobian[3] = 0.0
    result = Sum()(jacobian @ jacobian.mT)
    assert result.weights.tolist() == [1.0, 1.0, 1.0, 0.0, 1.0]
    assert result.own_weights is not None
    assert result.own_weights.tolist() == [1.0] * 5
    assert relative_error(direction(Sum(), jacobian), 5 * direction(Mean(), jacobian)) < 1e-15


# ---------------------------------------------------------------------------------------------------------------------
# IMTL-G
# ---------------------------------------------------------------------------------------------------------------------


def published_weights(jacobian: np.ndarray) -> np.ndarray:
    """alpha_2..K = g_1 U' (D U')^-1 of the paper, with explicit gradients."""
    units = jacobian / np.linalg.norm(jacobian, axis=1, keepdims=True)
    differences, unit_differences = jacobian[:1] - jacobian[1:], units[:1] - units[1:]
    rest = np.linalg.solve((differences @ unit_differences.T).T, unit_differences @ jacobian[0])
    return np.append(1 - rest.sum(), rest)


@pytest.mark.parametrize("family", FAMILIES)
def test_imtlg_projects_equally_on_every_task(family: str) -> None:
    for num_tasks, scale in itertools.product(SIZES, SCALES):
        if family == "lowrank" and num_tasks > 5:
            continue
        jacobian = gradients(family, num_tasks, 1) * scale
        weights = IMTLG()(jacobian @ jacobian.mT).weights
        projections = jacobian @ (weights @ jacobian) / jacobian.norm(dim=1)
        assert weights.sum().item() == pytest.approx(1.0, abs=1e-12)
        assert (projections / projections.mean() - 1).abs().max() < 1e-9


@pytest.mark.parametrize("family", FAMILIES)
def test_imtlg_is_the_papers_closed_form(family: str) -> None:
    for num_tasks in SIZES:
        if family == "lowrank" and num_tasks > 5:
            continue
        jacobian = gradients(family, num_tasks, 1)
        expected = torch.from_numpy(published_weights(jacobian.numpy())) @ jacobian
        error = relative_error(direction(IMTLG(), jacobian), expected)
        # The paper's matrix of differences is the worse conditioned, the nearer the gradients are to each other.
        assert error < (1e-8 if family in ("parallel", "imbalanced") else 1e-12)


@few
@given(family=st.sampled_from(FULL_RANK), num_tasks=st.integers(1, 8), seed=st.integers(0, 9999), data=st.data())
def test_imtlg_ignores_the_lengths_of_the_gradients_but_for_length_and_sign(family, num_tasks, seed, data) -> None:
    jacobian = gradients(family, num_tasks, seed)
    lengths = 10.0 ** torch.tensor([data.draw(st.floats(-2, 2)) for _ in range(num_tasks)], dtype=torch.float64)
    one, other = direction(IMTLG(), jacobian), direction(IMTLG(), jacobian * lengths[:, None])
    assert torch.cosine_similarity(one, other, dim=0).abs() > 1 - 1e-9


def test_imtlg_gives_nothing_where_nothing_projects_equally() -> None:
    """0 lies in the affine hull of the unit gradients: more tasks than dimensions, or an opposed pair of any length."""
    for num_tasks in (10, 50):
        assert IMTLG()(gradients("lowrank", num_tasks) @ gradients("lowrank", num_tasks).mT).weights.abs().max() == 0
    gradient = gradients("gauss", 4)[0]
    for length in (1.0, 3.0, 1e5):
        jacobian = torch.stack([gradient, -length * gradient])
        assert direction(IMTLG(), jacobian).norm() == 0


def test_imtlg_shares_the_weight_of_duplicates() -> None:
    jacobian = gradients("gauss", 3)
    weights = IMTLG()(jacobian @ jacobian.mT).weights
    doubled = jacobian[[0, 0, 1, 2]]
    shared = IMTLG()(doubled @ doubled.mT).weights
    assert relative_error(shared @ doubled, weights @ jacobian) < 1e-11
    torch.testing.assert_close(shared[0], shared[1], rtol=0.02, atol=0)  # the shares themselves are up to rounding


def test_imtlg_reports_the_common_projection_with_its_sign() -> None:
    jacobian = torch.tensor([[1.0, 0.0], [-0.6, 0.8]], dtype=torch.float64) * 10
    result = IMTLG()(jacobian @ jacobian.mT)
    found = jacobian @ (result.weights @ jacobian) / 10
    torch.testing.assert_close(result.diagnostics["projection"] * 10, found.mean())
    # Three gradients of which the shortest has a negative weight that outweighs the others: uphill for all alike.
    uphill = torch.tensor([[1.0, 0.0, 0.1], [0.0, 1.0, 0.1], [0.05, 0.05, 0.02]], dtype=torch.float64)
    result = IMTLG()(uphill @ uphill.mT)
    assert (result.diagnostics["projection"] < 0) == (uphill @ (result.weights @ uphill) < 0).all()
    assert result.diagnostics["projection"] < 0


def test_imtlg_gives_nothing_where_the_weights_cancel() -> None:
    """Lengths chosen so that sum_i y_i / ||g_i|| = 0 with C y = 1."""
    units = torch.tensor([[1.0, 0.0, 0.1], [0.0, 1.0, 0.1], [0.6, 0.6, 0.2]], dtype=torch.float64)
    units = units / units.norm(dim=1, keepdim=True)
    solution = torch.linalg.solve(units @ units.mT, torch.ones(3, dtype=torch.float64))
    assert solution[2] < 0 < solution[:2].min()
    units[2] *= -solution[2] / solution[:2].sum()
    assert IMTLG()(units @ units.mT).weights.abs().max() == 0


def test_imtlg_leaves_out_a_task_without_gradient() -> None:
    jacobian = gradients("gauss", 4)
    extended = torch.cat([jacobian, torch.zeros_like(jacobian[:1])])
    assert relative_error(direction(IMTLG(), extended), direction(IMTLG(), jacobian)) < 1e-12


# ---------------------------------------------------------------------------------------------------------------------
# Aligned-MTL
# ---------------------------------------------------------------------------------------------------------------------


@every_route
@pytest.mark.parametrize("scale_mode", ["min", "median", "rmse"])
@pytest.mark.parametrize("family", FAMILIES)
def test_alignedmtl_is_the_mean_of_the_aligned_gradients(family: str, scale_mode: str, route: str) -> None:
    rule = AlignedMTL(scale_mode=scale_mode, solver=route)
    for num_tasks, scale in itertools.product(SIZES, SCALES):
        jacobian = gradients(family, num_tasks, 1)
        expected = torch.from_numpy(oracles.aligned_direction(jacobian.numpy(), scale_mode))
        result = rule(jacobian @ jacobian.mT * scale**2)
        # The small eigenvalues of M have an absolute error of eps times the largest.
        tolerance = 1e-12 + 1e-14 * result.diagnostics["condition"].item()
        assert relative_error(result.weights @ jacobian, expected) < tolerance
        assert torch.cosine_similarity(result.weights @ jacobian, expected, dim=0) > 1 - 1e-8


@every_route
def test_alignedmtl_counts_the_rank(route: str) -> None:
    for family, num_tasks in itertools.product(FAMILIES, (1, 3, 10)):
        jacobian = gradients(family, num_tasks)
        diagnostics = AlignedMTL(solver=route)(jacobian @ jacobian.mT).diagnostics
        assert diagnostics["rank"] == (min(num_tasks, 5) if family == "lowrank" else num_tasks)
        values = torch.linalg.svdvals(jacobian)[: int(diagnostics["rank"])].square()
        assert diagnostics["condition"].item() == pytest.approx((values[0] / values[-1]).item(), rel=1e-6)


def test_alignedmtl_of_orthogonal_gradients_evens_out_their_lengths() -> None:
    jacobian = torch.diag(torch.tensor([1.0, 2.0, 4.0, 8.0], dtype=torch.float64))
    for scale_mode, squared in (("min", 1.0), ("median", 4.0), ("rmse", 85 / 4)):
        found = direction(AlignedMTL(scale_mode=scale_mode), jacobian)
        torch.testing.assert_close(found, torch.full_like(found, squared**0.5 / 4))


@pytest.mark.parametrize("scale_mode", ["min", "median", "rmse"])
def test_alignedmtl_leaves_a_task_without_gradient_out_but_for_1_over_k(scale_mode: str) -> None:
    jacobian, rule = gradients("conflict", 4), AlignedMTL(scale_mode=scale_mode)
    extended = torch.cat([jacobian, torch.zeros_like(jacobian[:1])])
    assert relative_error(direction(rule, extended), direction(rule, jacobian) * 4 / 5) < 1e-12


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"scale_mode": "mean"}, r"AlignedMTL.scale_mode: got 'mean', allowed: 'min', 'median', 'rmse'"),
        ({"solver": "gpu"}, r"AlignedMTL.solver: got 'gpu'"),
    ],
)
def test_a_wrong_field_is_refused_by_name(fields, message) -> None:
    with pytest.raises(ValueError, match=message):
        AlignedMTL(**fields)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7, 10, 50])
def test_jacobi_diagonalises(size: int) -> None:
    for family in FAMILIES:
        jacobian = gradients(family, size)
        matrix = jacobian @ jacobian.mT
        values, vectors = eigen.jacobi(matrix)
        largest = values[-1]
        assert (values.diff() >= 0).all()
        assert (vectors.mT @ vectors - torch.eye(size)).abs().max() < 1e-13
        assert (vectors @ torch.diag(values) @ vectors.mT - matrix).abs().max() < 1e-13 * largest
        assert (values - torch.linalg.eigvalsh(matrix)).abs().max() < 1e-13 * largest


def test_jacobi_of_diagonal_equal_and_indefinite_matrices() -> None:
    for matrix in (torch.zeros(3, 3), torch.eye(4), torch.diag(torch.tensor([3.0, -1.0, 2.0])), torch.ones(5, 5)):
        values, vectors = eigen.jacobi(matrix.double())
        torch.testing.assert_close(vectors @ torch.diag(values) @ vectors.mT, matrix.double())
        torch.testing.assert_close(values, torch.linalg.eigvalsh(matrix.double()))
