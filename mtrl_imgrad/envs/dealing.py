"""Which worker steps which tasks: longest first, each to the worker that has least to do."""

from __future__ import annotations

import os
from collections.abc import Sequence

MICROSECONDS: dict[str, int] = {
    "assembly-v3": 304,
    "basketball-v3": 228,
    "bin-picking-v3": 246,
    "box-close-v3": 310,
    "button-press-topdown-v3": 183,
    "button-press-topdown-wall-v3": 181,
    "button-press-v3": 170,
    "button-press-wall-v3": 171,
    "coffee-button-v3": 214,
    "coffee-pull-v3": 278,
    "coffee-push-v3": 268,
    "dial-turn-v3": 206,
    "disassemble-v3": 297,
    "door-close-v3": 212,
    "door-lock-v3": 269,
    "door-open-v3": 213,
    "door-unlock-v3": 249,
    "hand-insert-v3": 267,
    "drawer-close-v3": 220,
    "drawer-open-v3": 190,
    "faucet-open-v3": 183,
    "faucet-close-v3": 173,
    "hammer-v3": 299,
    "handle-press-side-v3": 179,
    "handle-press-v3": 225,
    "handle-pull-side-v3": 198,
    "handle-pull-v3": 195,
    "lever-pull-v3": 190,
    "pick-place-wall-v3": 265,
    "pick-out-of-hole-v3": 227,
    "pick-place-v3": 236,
    "plate-slide-v3": 189,
    "plate-slide-side-v3": 176,
    "plate-slide-back-v3": 178,
    "plate-slide-back-side-v3": 176,
    "peg-insert-side-v3": 247,
    "peg-unplug-side-v3": 297,
    "soccer-v3": 241,
    "stick-push-v3": 306,
    "stick-pull-v3": 302,
    "push-v3": 237,
    "push-wall-v3": 240,
    "push-back-v3": 235,
    "reach-v3": 197,
    "reach-wall-v3": 196,
    "shelf-place-v3": 244,
    "sweep-into-v3": 228,
    "sweep-v3": 221,
    "window-open-v3": 182,
    "window-close-v3": 186,
}
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
