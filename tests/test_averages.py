"""Means over updates: on the device until they are read, and the same across a checkpoint."""

from __future__ import annotations

import torch

from mtrl_imgrad.averages import Averages, by_task

TASKS = ("east", "north")


def report(losses: list[float], norm: float, cosine: float = 0.0) -> dict[str, torch.Tensor]:
    cosines = torch.tensor([[1.0, cosine], [cosine, 1.0]], dtype=torch.float64)
    return {"loss": torch.tensor(losses), "cosine": cosines, "norm": torch.tensor(norm)}


def lists(means: dict[str, torch.Tensor]) -> dict[str, object]:
    return {tag: values.tolist() for tag, values in means.items()}


def test_means_over_updates_of_numbers_vectors_and_matrices():
    averages = Averages()
    averages.add(report([1.0, 3.0], 5.0, 0.5))
    averages.add(report([2.0, 5.0], 6.0, -1.0))
    assert lists(averages.pop()) == {"loss": [1.5, 4.0], "norm": 5.5, "cosine": [[1.0, -0.25], [-0.25, 1.0]]}


def test_numbers_per_task_have_a_tag_each_and_a_mean():
    means = {"loss": torch.tensor([1.5, 4.0]), "norm": torch.tensor(5.5)}
    assert by_task(means, TASKS) == {"loss/east": 1.5, "loss/north": 4.0, "loss": 2.75, "norm": 5.5}


def test_a_pop_starts_anew():
    averages = Averages()
    averages.add(report([1.0, 3.0], 5.0))
    averages.pop()
    assert averages.pop() == {}
    averages.add(report([7.0, 9.0], 0.0))
    assert averages.pop()["loss"].tolist() == [7.0, 9.0]


def test_sums_are_float64():
    """In float32 a sum of 2^24 ones stops growing."""
    averages = Averages()
    averages.add(report([2.0**24, 0.0], 0.0))
    averages.add(report([1.0, 0.0], 0.0))
    assert float(averages.pop()["loss"][0]) == (2**24 + 1) / 2


def test_the_state_goes_on():
    straight, halved = Averages(), Averages()
    for part in ([1.0, 3.0], [2.0, 5.0]):
        straight.add(report(part, 5.0, 0.25))
        halved.add(report(part, 5.0, 0.25))
        resumed = Averages()
        resumed.load_state_dict(halved.state_dict())
        halved = resumed
    assert lists(halved.pop()) == lists(straight.pop())


def test_the_state_of_no_updates_is_none():
    resumed = Averages()
    resumed.load_state_dict(Averages().state_dict())
    assert resumed.pop() == {}
    resumed.add(report([1.0, 3.0], 5.0))
    assert resumed.pop()["loss"].tolist() == [1.0, 3.0]
