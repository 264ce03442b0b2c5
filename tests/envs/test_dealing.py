from __future__ import annotations

import pytest

from mtrl_imgrad.envs import MT10, MT50, dealing


@pytest.mark.parametrize("workers", [1, 2, 3, 8, 50])
def test_every_task_is_dealt_once_and_no_worker_goes_empty(workers):
    dealt = dealing.deal(MT50, workers)
    assert len(dealt) == workers
    assert all(dealt)
    assert sorted(task for tasks in dealt for task in tasks) == sorted(MT50)


def test_every_task_has_a_measured_cost():
    assert set(dealing.MICROSECONDS) == set(MT50)


@pytest.mark.parametrize(("tasks", "workers"), [(MT10, 2), (MT50, 2), (MT50, 8)])
def test_no_worker_would_be_done_sooner_if_its_last_task_had_gone_elsewhere(tasks, workers):
    cost = dealing.MICROSECONDS
    dealt = dealing.deal(tasks, workers)
    loads = [sum(cost[task] for task in worker) for worker in dealt]
    for worker, load in zip(dealt, loads, strict=True):
        assert load - min(cost[task] for task in worker) <= min(loads)


def test_the_longest_tasks_go_to_different_workers(monkeypatch):
    monkeypatch.setattr(dealing, "MICROSECONDS", {"a": 1, "b": 9, "c": 8, "d": 2})
    assert [set(tasks) for tasks in dealing.deal(["a", "b", "c", "d"], 2)] == [{"b", "a"}, {"c", "d"}]


def test_an_unknown_task_counts_as_an_average_one(monkeypatch):
    monkeypatch.setattr(dealing, "MICROSECONDS", {"a": 1, "b": 9})
    assert dealing.deal(["a", "b", "new"], 3) == [["b"], ["new"], ["a"]]
