"""The logged Gramians: what they are, and that logging does not change the training."""

from __future__ import annotations

from types import SimpleNamespace

import log_gramians
import numpy as np
import pytest
import torch
from gradient_families import LOGGED, gradients, logged_gramians
from small_learner import small_learner, state_copy, update


def test_the_file_holds_gramians_of_ten_tasks():
    with np.load(LOGGED) as file:
        assert file["critic"].shape == file["actor"].shape == (len(file["steps"]), 10, 10)
        assert len(file["steps"]) == 152
        for part in (file["critic"], file["actor"]):
            norms = np.sqrt(np.diagonal(part, axis1=1, axis2=2))
            cosines = part / norms[:, :, None] / norms[:, None, :]
            np.testing.assert_allclose(cosines, cosines.transpose(0, 2, 1), atol=1e-6)  # products of float32
            assert (np.linalg.eigvalsh(cosines) > 1e-3).all()
    assert LOGGED.stat().st_size < 200_000


@pytest.mark.parametrize("num_tasks", [1, 3, 10])
def test_the_family_has_the_inner_products_that_were_logged(num_tasks):
    rows = gradients("mt10", num_tasks, seed=5)
    products, logged = rows @ rows.mT, logged_gramians()[5]
    for entry in products.flatten():
        assert (logged - entry).abs().min() < 1e-9 * logged.abs().max()


def test_more_tasks_come_from_several_gramians_in_frames_of_their_own():
    rows = gradients("mt10", 50)
    assert torch.linalg.matrix_rank(rows) == 50
    blocks = rows.reshape(5, 10, -1)
    torch.testing.assert_close(blocks.square().sum(-1).mean(-1), torch.ones(5, dtype=torch.float64))


def test_statistics_of_a_gramian_known_in_closed_form():
    shown = log_gramians.statistics(np.array([[[4.0, -1.0], [-1.0, 1.0]]]))
    eigenvalues = np.linalg.eigvalsh([[4.0, -1.0], [-1.0, 1.0]])
    assert shown["condition number"][0] == pytest.approx(eigenvalues[1] / eigenvalues[0])
    assert shown["of the cosines"][0] == pytest.approx(3.0)  # cosine -1/2: 1.5 / 0.5
    assert shown["conflict share"][0] == 1.0
    assert shown["norm ratio"][0] == 2.0
    assert shown["cos theta"][0] == pytest.approx((3 / 7 / 0.75) ** 0.5)  # gm = (2 g1 + 5 g2) / 7


def test_keeping_gramians_changes_nothing_else():
    plain, logged = small_learner(), small_learner()
    recorded = log_gramians.record(SimpleNamespace(learner=logged), every=2)
    for seed in range(5):
        update(plain, seed=seed)
        metrics = update(logged, seed=seed)
        if seed == 4:
            norms = metrics.per_task["gradients/actor/norm"]
            np.testing.assert_allclose(np.sqrt(np.diagonal(recorded["actor"][-1])), norms)
    for name, value in state_copy(plain).items():
        assert torch.equal(value, logged.state_dict()[name])
    assert [len(kept) for kept in recorded.values()] == [3, 3]
