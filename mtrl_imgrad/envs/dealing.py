"""Which worker steps which tasks: longest first, each to the worker that has least to do."""

from __future__ import annotations

import os
from collections.abc import Sequence

MICROSECONDS: dict[str, int] = {
    "assembly-v3": 277,
    "basketball-v3": 217,
    "bin-picking-v3": 234,
    "box-close-v3": 326,
    "button-press-topdown-v3": 171,
    "button-press-topdown-wall-v3": 171,
    "button-press-v3": 184,
    "button-press-wall-v3": 166,
    "coffee-button-v3": 219,
    "coffee-pull-v3": 275,
    "coffee-push-v3": 272,
    "dial-turn-v3": 188,
    "disassemble-v3": 267,
    "door-close-v3": 188,
    "door-lock-v3": 200,
    "door-open-v3": 215,
    "door-unlock-v3": 208,
    "hand-insert-v3": 256,
    "drawer-close-v3": 186,
    "drawer-open-v3": 175,
    "faucet-open-v3": 179,
    "faucet-close-v3": 171,
    "hammer-v3": 257,
    "handle-press-side-v3": 188,
    "handle-press-v3": 203,
    "handle-pull-side-v3": 228,
    "handle-pull-v3": 187,
    "lever-pull-v3": 182,
    "pick-place-wall-v3": 293,
    "pick-out-of-hole-v3": 214,
    "pick-place-v3": 271,
    "plate-slide-v3": 199,
    "plate-slide-side-v3": 201,
    "plate-slide-back-v3": 183,
    "plate-slide-back-side-v3": 202,
    "peg-insert-side-v3": 252,
    "peg-unplug-side-v3": 294,
    "soccer-v3": 248,
    "stick-push-v3": 327,
    "stick-pull-v3": 330,
    "push-v3": 231,
    "push-wall-v3": 255,
    "push-back-v3": 212,
    "reach-v3": 180,
    "reach-wall-v3": 175,
    "shelf-place-v3": 253,
    "sweep-into-v3": 323,
    "sweep-v3": 239,
    "window-open-v3": 180,
    "window-close-v3": 177,
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
