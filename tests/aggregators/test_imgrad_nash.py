"""IMGrad on Nash-MTL: the weights satisfy the optimality conditions of Eq. 13 and are Nash-MTL's where those do."""

from __future__ import annotations

import cvxpy as cp
import numpy as np
import oracles
import pytest
import torch
from gradient_families import FAMILIES, FULL_RANK, ROUTES, direction, gradients, relative_error
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mtrl_imgrad.aggregators import IMGradNash, NashMTL

OWN = IMGradNash(norm="own")
few = settings(max_examples=15, deadline=None, derandomize=True)


def normalised(jacobian: Tensor) -> Tensor:
    return jacobian / jacobian.square().sum(-1).mean().sqrt()


def terms(weights: Tensor, jacobian: Tensor) -> tuple[Tensor, Tensor]:
    """sum_i (Ma)_i and phi."""
    products = jacobian @ (weights @ jacobian)
    return products.sum(), weights.log() + products.log()


def objective(weights: Tensor, jacobian: Tensor, cosine: float) -> float:
    total, phi = terms(weights, jacobian)
    return float((1 - cosine) * total + cosine * phi.sum())


@pytest.mark.parametrize("family", FAMILIES)
def test_the_optimality_conditions_hold_to_1e_9(family: str) -> None:
    """Recomputed by automatic differentiation, the multipliers by least squares on the active constraints."""
    for num_tasks in (1, 2, 3, 10, 50):
        if family == "lowrank" and num_tasks > 5:
            continue
        for scale in (1e-4, 1.0, 1e4):
            jacobian = normalised(gradients(family, num_tasks, 1))
            result = OWN((jacobian * scale) @ (jacobian * scale).mT)
            assert result.diagnostics["residual"] < 1e-9
            cosine = result.diagnostics["cos_theta"].item()
            # For relative changes of the weights, so that the tasks' units drop out.
            logs = (result.weights * scale).log().requires_grad_()
            total, phi = terms(logs.exp(), jacobian)
            assert phi.min() > -1e-9
            (slope,) = torch.autograd.grad((1 - cosine) * total + cosine * phi.sum(), logs, retain_graph=True)
            derivative = torch.stack([torch.autograd.grad(entry, logs, retain_graph=True)[0] for entry in phi])
            active = phi.detach() < 1e-6
            multipliers = torch.linalg.lstsq(derivative[active].mT, slope[:, None]).solution.squeeze(-1)
            size = slope.abs().max()
            assert (multipliers @ derivative[active] - slope).abs().max() < 1e-8 * size
            assert multipliers.min() > -1e-8 * size


@pytest.mark.parametrize("seed", [1, 3, 5])
def test_successive_convex_programs_end_at_the_same_point(seed: int) -> None:
    """As Nash-MTL's code does it: linearise phi in the objective, keep it in the constraints, solve, repeat."""
    jacobian = normalised(gradients("imbalanced", 3, seed))
    gramian = (jacobian @ jacobian.mT).numpy()
    result = OWN(jacobian @ jacobian.mT)
    cosine = result.diagnostics["cos_theta"].item()
    norms = np.sqrt(np.diag(gramian))
    cosines = gramian / np.outer(norms, norms)
    point = NashMTL(norm="own")(jacobian @ jacobian.mT).weights.numpy() * norms
    for _ in range(15):
        slope = (1 - cosine) * cosines @ norms + cosine * (1 / point + cosines @ (1 / (cosines @ point)))
        variable = cp.Variable(3)
        constraints = [cp.log(variable) + cp.log(cosines @ variable) >= 0]
        oracles.solve(cp.Problem(cp.Minimize(slope / slope.max() @ variable), constraints))
        point = np.asarray(variable.value)
    expected = torch.from_numpy(point / norms) @ jacobian
    assert torch.cosine_similarity(result.weights @ jacobian, expected, dim=0) > 1 - 1e-8
    assert relative_error(result.weights @ jacobian, expected) < 1e-4


def test_small_gradients_bargain_with_more_power_where_norms_differ() -> None:
    jacobian = normalised(gradients("imbalanced", 10, 3))
    result = OWN(jacobian @ jacobian.mT)
    nash = NashMTL(norm="own")(jacobian @ jacobian.mT).weights
    phi = terms(result.weights, jacobian)[1]
    assert phi.argmax() < 5  # the first half has the small gradients
    assert phi.max() > 1
    cosine = result.diagnostics["cos_theta"].item()
    assert objective(result.weights, jacobian, cosine) < objective(nash, jacobian, cosine) - 0.1
    assert relative_error(direction(IMGradNash(), jacobian), direction(NashMTL(), jacobian)) > 0.1


@pytest.mark.parametrize("family", ["shared", "parallel"])
def test_without_conflict_and_with_equal_norms_it_is_nash(family: str) -> None:
    for num_tasks in (1, 2, 10):
        jacobian = gradients(family, num_tasks, 4)
        for norm in ("mean", "own"):
            expected = direction(NashMTL(norm=norm), jacobian)
            assert relative_error(direction(IMGradNash(norm=norm), jacobian), expected) < 1e-12


def test_it_is_nash_exactly_where_the_multipliers_stated_are_not_negative() -> None:
    seen = set()
    for family, seed in [(family, seed) for family in ("imbalanced", "conflict") for seed in range(6)]:
        jacobian = normalised(gradients(family, 4, seed))
        gramian = jacobian @ jacobian.mT
        nash = NashMTL(norm="own")(gramian).weights
        cosine = OWN(gramian).diagnostics["cos_theta"]
        share = nash[:, None] * gramian * nash
        solved = torch.linalg.solve(torch.eye(4, dtype=torch.float64) + share, share @ (1 / nash))
        stays = bool((cosine + (1 - cosine) * solved >= 0).all())
        assert (relative_error(OWN(gramian).weights, nash) < 1e-15) == stays
        seen.add(stays)
    assert seen == {True, False}


def test_both_routes_give_the_same_direction() -> None:
    generator = torch.Generator().manual_seed(3)
    conflict = torch.randn(40, 10, 47, generator=generator, dtype=torch.float64)
    conflict = conflict - 0.95 * conflict.mean(1, keepdim=True)
    conflict = conflict * 10.0 ** (4 * torch.rand(40, 10, 1, generator=generator, dtype=torch.float64) - 2)
    cases = [conflict] + [
        torch.stack([gradients(family, num_tasks, seed) for seed in range(8, 14)])
        for family in FULL_RANK
        for num_tasks in (2, 3, 10, 50)
    ]
    for jacobian in cases:
        host, device = (IMGradNash(solver=route)(jacobian @ jacobian.mT) for route in ROUTES)
        one, other = ((result.weights[:, None] @ jacobian).squeeze(1) for result in (host, device))
        assert ((one - other).norm(dim=-1) < 1e-5 * one.norm(dim=-1)).all()
        assert host.diagnostics["residual"].max() < 1e-7


def test_nearly_opposed_gradients_get_nash_mtls_weights_and_a_residual_that_says_so() -> None:
    seen = False
    for seed in range(10):
        jacobian = gradients("gauss", 3, seed)
        jacobian[1] = -3 * jacobian[0] + 1e-4 * jacobian[1]
        result = OWN(jacobian @ jacobian.mT)
        if result.diagnostics["residual"] > 1e-6:
            seen = True
            assert relative_error(result.weights @ jacobian, direction(NashMTL(norm="own"), jacobian)) < 1e-9
    assert seen


@few
@given(family=st.sampled_from(FULL_RANK), num_tasks=st.integers(1, 6), seed=st.integers(0, 9999), data=st.data())
def test_its_own_length_does_not_depend_on_the_scale(family, num_tasks, seed, data) -> None:
    jacobian = gradients(family, num_tasks, seed)
    scale = 10.0 ** data.draw(st.integers(-6, 6))
    assert relative_error(direction(OWN, jacobian * scale), direction(OWN, jacobian)) < 1e-6


def test_a_task_without_gradient_changes_nothing() -> None:
    for family, num_tasks in (("conflict", 4), ("imbalanced", 10)):
        jacobian = gradients(family, num_tasks, 3)
        extended = torch.cat([jacobian, torch.zeros_like(jacobian[:1])])
        assert relative_error(direction(OWN, extended), direction(OWN, jacobian)) < 1e-9


def test_degenerate_gradients_get_the_documented_answer() -> None:
    lowrank = gradients("lowrank", 50)
    assert OWN(lowrank @ lowrank.mT).weights.abs().max() == 0  # 0 lies in the hull
    for seed in range(6):
        jacobian = gradients("conflict", 3, seed)
        jacobian[2] *= 1e6
        result = OWN(jacobian @ jacobian.mT)
        if result.diagnostics["residual"] > 1e-6:
            nash = direction(NashMTL(norm="own"), jacobian)
            assert relative_error(result.weights @ jacobian, nash) < 1e-9
        assert torch.isfinite(result.weights).all()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"norm": "sum"}, r"IMGradNash.norm: got 'sum', allowed: 'mean', 'own'"),
        ({"solver": "gpu"}, r"IMGradNash.solver: got 'gpu'"),
    ],
)
def test_a_wrong_field_is_refused_by_name(fields, message) -> None:
    with pytest.raises(ValueError, match=message):
        IMGradNash(**fields)
