"""The Euclidean projection onto the simplex."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq
from torch import Tensor

from mtrl_imgrad.aggregators.solvers import project_onto_simplex


def by_root_finding(vector: Tensor) -> Tensor:
    """max(v - t, 0) with the t that makes it sum to 1."""
    low, high = vector.max().item() - 1.0, vector.max().item()
    threshold = brentq(lambda t: (vector - t).clamp_min(0.0).sum().item() - 1.0, low - 1e-9, high, xtol=1e-15)
    return (vector - threshold).clamp_min(0.0)


@pytest.mark.parametrize("num_tasks", [1, 2, 3, 10, 50])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_it_is_the_root_of_the_threshold_equation(num_tasks: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    vectors = scale * torch.randn(20, num_tasks, generator=generator, dtype=torch.float64)
    projected = project_onto_simplex(vectors)
    for vector, given_point in zip(vectors, projected, strict=True):
        torch.testing.assert_close(given_point, by_root_finding(vector), rtol=0, atol=1e-12 * max(1.0, scale))
    torch.testing.assert_close(projected.sum(-1), torch.ones(20, dtype=torch.float64), rtol=0, atol=1e-14)
    assert (projected >= 0).all()


def test_it_is_nearer_than_any_other_point() -> None:
    """<v - w, u - w> <= 0 for every u on the simplex, so for every corner."""
    vectors = torch.randn(50, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    projected = project_onto_simplex(vectors)
    normal = vectors - projected
    assert (normal.amax(-1) - (normal * projected).sum(-1)).max() < 1e-14


@settings(max_examples=50, deadline=None, derandomize=True)
@given(numbers=st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=8), offset=st.floats(-1e6, 1e6), data=st.data())
def test_offsets_orders_and_points_of_the_simplex(numbers: list[float], offset: float, data) -> None:
    vector = torch.tensor(numbers, dtype=torch.float64)
    order = torch.tensor(data.draw(st.permutations(range(len(numbers)))))
    projected = project_onto_simplex(vector)
    torch.testing.assert_close(project_onto_simplex(vector[order]), projected[order], rtol=0, atol=1e-14)
    torch.testing.assert_close(project_onto_simplex(vector + offset), projected, rtol=0, atol=1e-9)
    torch.testing.assert_close(project_onto_simplex(projected), projected, rtol=0, atol=1e-14)


def test_minus_infinity_gets_nothing_and_changes_nothing() -> None:
    vector = torch.tensor([[0.3, -math.inf, 0.1], [5.0, -math.inf, 5.0]], dtype=torch.float64)
    projected = project_onto_simplex(vector)
    assert (projected[:, 1] == 0).all()
    torch.testing.assert_close(projected[:, [0, 2]], project_onto_simplex(vector[:, [0, 2]]))


def test_ties_share_and_nan_is_passed_on() -> None:
    torch.testing.assert_close(project_onto_simplex(torch.full((4,), 0.5)), torch.full((4,), 0.25))
    assert project_onto_simplex(torch.tensor([0.2, math.nan, 0.8])).isnan().all()


def test_it_compiles_as_one_graph() -> None:
    torch._dynamo.reset()
    vector = torch.randn(3, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    compiled = torch.compile(project_onto_simplex, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(vector), project_onto_simplex(vector))
