"""Every rule gives the direction that an independent solver gives."""

from __future__ import annotations

import itertools

import numpy as np
import oracles
import pytest
import torch
from gradient_families import FAMILIES, ROUTES, direction, gradients, relative_error

from mtrl_imgrad.aggregators import MGDA, CAGrad, ConicGrad, IMGrad, PCGrad

SCALES = (1e-4, 1.0, 1e4)
# The oracles lose digits on a norm ratio of 1e4; there the objective is compared in test_solvers.py instead.
WELL_SCALED = tuple(family for family in FAMILIES if family != "imbalanced")


def scaled(family: str, num_tasks: int, seed: int = 1) -> torch.Tensor:
    """Gradients of mean squared norm 1 in a basis of their span, as the oracles want them."""
    return torch.from_numpy(oracles.coordinates(gradients(family, num_tasks, seed).numpy()))


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("num_tasks", [1, 2, 3, 10, 50])
@pytest.mark.parametrize("family", FAMILIES)
def test_mgda_is_the_nonnegative_least_squares_point(family: str, num_tasks: int, route: str) -> None:
    jacobian = scaled(family, num_tasks)
    expected = torch.from_numpy(oracles.mgda_weights(jacobian.numpy())) @ jacobian
    for scale in SCALES:
        given = direction(MGDA(solver=route), jacobian * scale) / scale
        if family == "lowrank" and num_tasks > 5:
            assert given.norm() < 1e-5  # 0 lies in the hull: the minimum is 0
        else:
            assert relative_error(given, expected) < 1e-8


@pytest.mark.parametrize("c", [0.1, 0.4, 0.9])
@pytest.mark.parametrize("family", WELL_SCALED)
def test_cagrad_is_the_best_worst_case_in_the_ball(family: str, c: float) -> None:
    for num_tasks in (2, 3, 10):
        jacobian = scaled(family, num_tasks)
        expected = torch.from_numpy(oracles.cagrad_primal(jacobian.numpy(), c))
        for route, scale in itertools.product(ROUTES, SCALES):
            given = direction(CAGrad(c=c, rescale=0, solver=route), jacobian * scale) / scale
            # The maximum is flat in d: an error of 1e-13 in the oracle's value moves its d by 3e-7.
            assert relative_error(given, expected) < 1e-6
            assert (jacobian @ given).min() >= (jacobian @ expected).min() - 1e-9


@pytest.mark.parametrize("variant", ["official", "eq9", "eq11"])
@pytest.mark.parametrize("family", WELL_SCALED)
def test_imgrad_minimises_the_objective_of_its_variant(family: str, variant: str) -> None:
    c = 0.4
    for num_tasks in (2, 3, 5):
        jacobian = scaled(family, num_tasks)
        rows = jacobian.numpy()
        mean, shortest = rows.mean(0), oracles.mgda_weights(rows) @ rows
        cosine = mean @ shortest / np.linalg.norm(mean) / np.linalg.norm(shortest)
        radius = c * np.linalg.norm(mean)
        linear, norm, quadratic = {
            "official": (1.5 - cosine, cosine * radius, 0.0),
            "eq9": (1 - cosine, (1 - cosine) * radius, 2 * cosine),
            "eq11": (1 - cosine, cosine * radius, 0.0),
        }[variant]
        combined = oracles.simplex_kernel(rows, linear * rows @ mean, norm, quadratic) @ rows
        expected = torch.from_numpy(mean + radius * combined / np.linalg.norm(combined)) / (1 + c * c)
        for route in ROUTES:
            rule = IMGrad(c=c, variant=variant, solver=route)
            for scale in SCALES:
                assert relative_error(direction(rule, jacobian * scale) / scale, expected) < 1e-6
            given_cosine = rule(jacobian @ jacobian.mT).diagnostics["cos_theta"]
            assert given_cosine.item() == pytest.approx(cosine, abs=1e-9)


@pytest.mark.parametrize("c", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("family", FAMILIES)
def test_conicgrad_is_the_best_worst_case_in_the_cone(family: str, c: float) -> None:
    for num_tasks in (2, 3, 10):
        jacobian = scaled(family, num_tasks)
        expected, value = oracles.conic_primal(jacobian.numpy(), c)
        for route in ROUTES:
            given = direction(ConicGrad(c=c, solver=route), jacobian)
            if value > 1e-8:
                assert relative_error(given, torch.from_numpy(expected)) < 1e-5  # the oracle's own error: 3e-6
                assert (jacobian @ given).min().item() == pytest.approx(value, abs=1e-8)
            else:  # no direction in the cone descends for all, so neither does the best one on its surface
                assert (jacobian @ given).min() < 1e-8


@pytest.mark.parametrize("num_tasks", [2, 3, 10, 50])
@pytest.mark.parametrize("family", FAMILIES)
def test_pcgrad_is_the_papers_loop(family: str, num_tasks: int) -> None:
    jacobian = gradients(family, num_tasks)
    noise = PCGrad().draw_noise(num_tasks, torch.Generator().manual_seed(3))
    expected = oracles.pcgrad_direction(jacobian.numpy(), noise.argsort(-1).numpy())
    given = direction(PCGrad(), jacobian, noise)
    np.testing.assert_allclose(given.numpy(), expected, rtol=0, atol=1e-12 * np.abs(jacobian.numpy()).max())
