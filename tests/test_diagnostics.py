from __future__ import annotations

import numpy as np
import pytest
import torch

from mtrl_imgrad.diagnostics import gradient_cosines, gradient_statistics


def _statistics(gradients: np.ndarray) -> dict[str, float]:
    gramian = torch.from_numpy(gradients @ gradients.T)
    return {name: float(value) for name, value in gradient_statistics(gramian).items()}


@pytest.mark.parametrize("tasks", [2, 5, 10])
def test_statistics_equal_those_of_the_gradients_themselves(tasks):
    J = np.random.default_rng(tasks).normal(size=(tasks, 6)) * np.geomspace(1e-3, 1e3, tasks)[:, None]
    norms = np.linalg.norm(J, axis=1)
    pairs = [(i, j) for i in range(tasks) for j in range(i)]
    cosines = np.array([J[i] @ J[j] / (norms[i] * norms[j]) for i, j in pairs])
    found = _statistics(J)
    assert found["cosine_mean"] == pytest.approx(cosines.mean(), rel=1e-9)
    assert found["conflict_fraction"] == pytest.approx((cosines < 0).mean(), rel=1e-6)
    assert found["norm_ratio"] == pytest.approx(norms.max() / norms.min(), rel=1e-9)


@pytest.mark.parametrize(
    ("gradients", "cosine", "conflicts"),
    [
        (np.ones((4, 3)), 1.0, 0.0),
        (np.array([[1.0, 2.0], [-1.0, -2.0]]), -1.0, 1.0),
        (np.eye(4), 0.0, 0.0),
    ],
    ids=["identical", "opposed", "orthogonal"],
)
def test_known_answers(gradients, cosine, conflicts):
    norms = np.linalg.norm(gradients, axis=1)
    found = _statistics(gradients)
    assert found["cosine_mean"] == pytest.approx(cosine, abs=1e-12)
    assert found["conflict_fraction"] == conflicts
    assert found["norm_ratio"] == pytest.approx(norms.max() / norms.min())


def test_one_task_has_no_pairs():
    assert _statistics(np.array([[3.0, 4.0]])) == {"cosine_mean": 0.0, "conflict_fraction": 0.0, "norm_ratio": 1.0}


def test_a_zero_gradient_counts_as_no_conflict_and_makes_the_ratio_infinite():
    found = _statistics(np.array([[1.0, 0.0], [0.0, 0.0], [1.0, 0.0]]))
    assert found["cosine_mean"] == pytest.approx(1 / 3)
    assert (found["conflict_fraction"], found["norm_ratio"]) == (0.0, np.inf)


def test_cosines_equal_those_of_the_gradients_themselves():
    J = np.random.default_rng(0).normal(size=(5, 6)) * np.geomspace(1e-3, 1e3, 5)[:, None]
    units = J / np.linalg.norm(J, axis=1)[:, None]
    np.testing.assert_allclose(gradient_cosines(torch.from_numpy(J @ J.T)), units @ units.T, rtol=1e-9, atol=1e-12)


def test_a_gradient_that_is_zero_or_not_finite_has_no_cosine():
    gramian = torch.tensor([[1.0, 0.0, np.nan], [0.0, 0.0, np.nan], [np.nan, np.nan, np.inf]], dtype=torch.float64)
    assert gradient_cosines(gramian).tolist() == [[1.0, 0.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]
