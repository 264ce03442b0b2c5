"""Measure what a simulator step of each task costs, for `mtrl_imgrad/envs/dealing.py`.

    python scripts/task_costs.py

Tasks are stepped as in training, ten in turn, in episodes of random actions and episodes of Meta-World's scripted
experts by turns: contacts, which an expert has more of, cost time. A task's figure is the mean of both; of each, the
lower quartile over rounds of a round's median, so that slow phases of the machine do not count.
"""

from __future__ import annotations

import time
import warnings

import numpy as np
from metaworld.policies import ENV_POLICY_MAP

from mtrl_imgrad.envs import MT50, make_goals
from mtrl_imgrad.envs.fast_env import FastTask
from mtrl_imgrad.envs.fast_rows import FastRows

ROUNDS, STEPS, TOGETHER = 16, 60, 10


def main() -> None:
    warnings.simplefilter("ignore")  # the experts warn of their own gains
    goals = make_goals(MT50, goal_seed=0, num_goals=1)
    rows = {task: FastRows([FastTask(task, goals.metaworld_tasks(task))], "v2", 500, 1) for task in MT50}
    groups = [MT50[first : first + TOGETHER] for first in range(0, len(MT50), TOGETHER)]
    random = np.random.default_rng(0)
    seconds: dict[bool, dict[str, list[float]]] = {experts: {task: [] for task in MT50} for experts in (False, True)}
    # Rounds last, so that a slow phase of the machine meets all tasks.
    for _ in range(ROUNDS):
        for group in groups:
            for experts, into in seconds.items():
                _step({task: rows[task] for task in group}, experts, random, into)
    for task in MT50:
        medians = [np.median(np.reshape(each[task], (ROUNDS, STEPS)), axis=1) for each in seconds.values()]
        print(f'    "{task}": {1e6 * np.mean(np.percentile(medians, 25, axis=1)):.0f},')


def _step(rows: dict[str, FastRows], experts: bool, random: np.random.Generator, into: dict[str, list[float]]) -> None:
    """Add the seconds of the steps of an episode of each task."""
    policies = {task: ENV_POLICY_MAP[task]() for task in rows}
    observations = {task: row.reset(0, 0) for task, row in rows.items()}
    for _ in range(STEPS):
        for task, row in rows.items():
            action = random.uniform(-1, 1, 4)
            if experts:
                action = policies[task].get_action(observations[task].copy()) + 0.1 * action
            started = time.thread_time()
            (observations[task],), _, _ = row.step(action[None].astype(np.float32))
            into[task].append(time.thread_time() - started)


if __name__ == "__main__":
    main()
