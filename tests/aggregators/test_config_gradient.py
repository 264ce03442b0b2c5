"""ConFIG on the Gramian equals its definition on the gradients, and TorchJD's."""

from __future__ import annotations

import itertools

import pytest
import torch
from gradient_families import FAMILIES, ROUTES, direction, gradients, relative_error
from oracles import config_direction

from mtrl_imgrad.aggregators import ConFIG

SCALES = (1e-4, 1.0, 1e4)


@pytest.mark.parametrize("num_tasks", [1, 2, 3, 10, 50])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("route", ROUTES)
def test_it_is_the_papers_definition_at_every_scale(family: str, num_tasks: int, route: str) -> None:
    jacobian = gradients(family, num_tasks)
    expected = torch.from_numpy(config_direction(jacobian.numpy()))
    # The condition number of nearly parallel cosines, 1e7 and more, is the error in units of 1e-16.
    tolerance = 1e-9 if family == "parallel" else 1e-12
    for scale in SCALES:
        found = direction(ConFIG(solver=route), jacobian * scale) / scale
        assert torch.cosine_similarity(found, expected, dim=0) > 1 - 1e-12
        assert relative_error(found, expected) < tolerance


@pytest.mark.parametrize("num_tasks", [1, 2, 3, 10, 50])
@pytest.mark.parametrize("family", FAMILIES)
def test_torchjds_is_the_sum_instead_of_the_mean(family: str, num_tasks: int) -> None:
    torchjd = pytest.importorskip("torchjd.aggregation", reason="the extra torchjd is not installed")
    jacobian = gradients(family, num_tasks)
    expected = torchjd.ConFIG()(jacobian)
    found = num_tasks * direction(ConFIG(), jacobian)
    assert relative_error(found, expected) < (1e-9 if family == "parallel" else 1e-12)


def test_all_cosines_are_equal_where_the_gradients_are_independent() -> None:
    for family, num_tasks in itertools.product(("gauss", "shared", "imbalanced", "conflict"), (2, 5, 20)):
        jacobian = gradients(family, num_tasks)
        found = direction(ConFIG(), jacobian)
        cosines = jacobian @ found / jacobian.norm(dim=1) / found.norm()
        assert cosines.min() > 0
        assert cosines.max() - cosines.min() < 1e-9
        assert found.norm().item() == pytest.approx((jacobian @ found).mean().item() / found.norm().item())


def test_the_norms_of_the_gradients_do_not_turn_it() -> None:
    jacobian = gradients("gauss", 4)
    factors = torch.tensor([1.0, 1e6, 1e-3, 7.0], dtype=torch.float64)[:, None]
    cosine = torch.cosine_similarity(direction(ConFIG(), jacobian), direction(ConFIG(), factors * jacobian), dim=0)
    assert cosine > 1 - 1e-12


def test_two_gradients_of_one_norm_give_the_direction_of_the_mean() -> None:
    jacobian = torch.tensor([[3.0, 4.0, 0.0], [0.0, -3.0, 4.0]], dtype=torch.float64)
    assert torch.cosine_similarity(direction(ConFIG(), jacobian), jacobian.mean(0), dim=0) > 1 - 1e-12


def test_duplicates_count_as_one_angle() -> None:
    """Two equal gradients and a third: the same direction as without the duplicate."""
    jacobian = gradients("gauss", 2)
    repeated = direction(ConFIG(), jacobian[[0, 0, 1]])
    assert relative_error(repeated, torch.from_numpy(config_direction(jacobian[[0, 0, 1]].numpy()))) < 1e-9
    assert torch.cosine_similarity(repeated, direction(ConFIG(), jacobian), dim=0) > 1 - 1e-9


def test_an_indefinite_gramian_from_rounding_has_an_answer() -> None:
    jacobian = gradients("lowrank", 50)
    for dtype in (torch.float32, torch.bfloat16):
        assert ConFIG()((jacobian @ jacobian.mT).to(dtype)).weights.isfinite().all()
