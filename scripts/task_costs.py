"""Measure what a simulator step of each task costs, for `mtrl_imgrad/envs/dealing.py`.

    python scripts/task_costs.py

Tasks are stepped as in training, one after another, with random actions; a task's figure is the median over rounds.
"""

from __future__ import annotations

import time

import numpy as np

from mtrl_imgrad.envs import MT50, make_goals
from mtrl_imgrad.envs.fast_env import FastTask
from mtrl_imgrad.envs.fast_rows import FastRows

ROUNDS, STEPS = 15, 40


def main() -> None:
    goals = make_goals(MT50, goal_seed=0, num_goals=1)
    rows = {task: FastRows([FastTask(task, goals.metaworld_tasks(task))], "v2", 500, 1) for task in MT50}
    random = np.random.default_rng(0)
    seconds: dict[str, list[float]] = {task: [] for task in MT50}
    for _ in range(ROUNDS):
        for row in rows.values():
            row.reset(0, 0)
        for actions in random.uniform(-1, 1, (STEPS, 1, 4)).astype(np.float32):
            for task, row in rows.items():
                started = time.thread_time()
                row.step(actions)
                seconds[task].append(time.thread_time() - started)
    for task in MT50:
        print(f'    "{task}": {1e6 * np.median(seconds[task]):.0f},')


if __name__ == "__main__":
    main()
