"""Gramians of degenerate gradients whose products were taken in float32 get the documented answers all the same."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from gradient_families import ROUTES, RULES, noise_for
from torch import Tensor

from mtrl_imgrad.aggregators import AlignedMTL

# Rows that are exact in float32 whatever small integers combine them, so that float64 sees them exactly degenerate.
BITS = 9
LENGTH = 20_000
COMBINATIONS = {
    "independent": [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]],
    "opposed": [[1, 0, 0], [-2, 0, 0], [0, 1, 0], [0, 0, 1]],
    "duplicate": [[1, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]],
    "rank one": [[1], [-2], [4], [3]],
    "0 inside the hull": [[2, 0, 0], [0, 2, 0], [0, 0, 2], [-1, -1, -1]],
    "low rank": [[3, 1], [1, 0], [-1, 2], [2, -1], [0, 1], [-3, -2]],
}
RANKS = {"independent": 4, "opposed": 3, "duplicate": 3, "rank one": 1, "0 inside the hull": 3, "low rank": 2}


def rows(name: str, seed: int) -> Tensor:
    combinations = torch.tensor(COMBINATIONS[name], dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    return combinations @ (
        (torch.randn(combinations.shape[1], LENGTH, generator=generator) * 2**BITS).round() / 2**BITS
    )


def gramians(jacobian: Tensor) -> tuple[Tensor, Tensor]:
    exact = jacobian.double() @ jacobian.double().mT
    return jacobian @ jacobian.mT, exact


@pytest.mark.parametrize("case", COMBINATIONS)
def test_the_cases_are_what_they_are_called(case: str) -> None:
    """And float32 does not see it."""
    rounded, exact = gramians(rows(case, 0))
    assert torch.linalg.matrix_rank(exact, hermitian=True) == RANKS[case]
    assert rounded.dtype == torch.float32
    assert (rounded.double() - exact).abs().max() > 1e-9 * exact.diagonal().max()


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("case", COMBINATIONS)
@pytest.mark.parametrize("name", RULES)
def test_the_direction_is_that_of_the_exact_gramian(name: str, case: str, route: str) -> None:
    """Where it is a minimiser of length 0, up to the root of what M is known to."""
    rule = RULES[name]
    if route == "device" and not hasattr(rule, "solver"):
        return
    if hasattr(rule, "solver"):
        rule = dataclasses.replace(rule, solver=route)
    for seed in range(3):
        jacobian = rows(case, seed)
        noise, size = noise_for(rule, len(jacobian)), jacobian.norm(dim=1).square().mean().sqrt()
        found, expected = (
            dataclasses.replace(rule)(gramian, noise).weights @ jacobian.double() for gramian in gramians(jacobian)
        )
        shortest = name in ("mgda", "sdmgrad", "sdmgrad-os")
        assert (found - expected).norm() < (3e-3 if shortest else 1e-3) * size


@pytest.mark.parametrize("case", COMBINATIONS)
def test_the_rank_is_that_of_the_gradients(case: str) -> None:
    for gramian in gramians(rows(case, 1)):
        assert AlignedMTL()(gramian).diagnostics["rank"] == RANKS[case]


@pytest.mark.parametrize("name", ["nashmtl", "fairgrad", "imgrad-nash", "upgrad", "dualproj", "imtlg"])
@pytest.mark.parametrize("case", ["rank one", "0 inside the hull"])
def test_0_in_the_hull_is_seen(name: str, case: str) -> None:
    for gramian in gramians(rows(case, 2)):
        weights = RULES[name](gramian).weights
        if name == "imtlg" and case == "0 inside the hull":
            assert weights.isfinite().all()  # its criterion is the affine hull of the unit gradients
        else:
            assert weights.abs().max() == 0
