"""Which worker steps which tasks: longest first, each to the worker that has least to do."""

from __future__ import annotations

import os
from collections.abc import Sequence

MICROSECONDS: dict[str, int] = {}
"""What a simulator step of each task takes, measured (see `scripts/task_costs.py`). Only the ratios matter; a task that
is not listed counts as an average one."""


def default_workers(num_tasks: int) -> int:
    """As many as there are cores for this process, at most one per task; none where one core would be shared."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, num_tasks) if cores > 1 else 0


def deal(tasks: Sequence[str], workers: int) -> list[list[str]]:
    """The tasks of each worker. Every task goes to one worker, with all of its environments, which share resets."""
    average = sum(MICROSECONDS.values()) / max(1, len(MICROSECONDS))
    cost = {task: MICROSECONDS.get(task, average) or 1 for task in tasks}
    dealt: list[list[str]] = [[] for _ in range(workers)]
    for task in sorted(tasks, key=lambda name: -cost[name]):
        min(dealt, key=lambda names: (sum(cost[name] for name in names), len(names))).append(task)
    return dealt
