"""The environments of a run: those of one task alone are that task with its own goals."""

from __future__ import annotations

import json

import numpy as np

from mtrl_imgrad.config import BenchmarkConfig, Config, EnvsConfig
from mtrl_imgrad.world import metaworld

TASKS = ("reach-v3", "window-close-v3")
CONFIG = Config(
    benchmark=BenchmarkConfig(tasks=TASKS, goals=3), envs=EnvsConfig(workers=0, horizon=4, self_check="off")
)


def test_one_task_alone_has_the_goals_that_it_has_among_others():
    world = metaworld(CONFIG, None)
    stream = np.random.SeedSequence(1)
    together = world.training(stream, TASKS)
    again = metaworld(CONFIG, json.loads(json.dumps(world.description)))
    alone = [again.training(stream, (task,)) for task in TASKS]
    goals = np.array([[0, 1, 2], [2, 0, 1]])
    first, _ = together.reset(options={"goals": goals})
    firsts = [env.reset(options={"goals": goals[row : row + 1]})[0] for row, env in enumerate(alone)]
    np.testing.assert_array_equal(np.concatenate(firsts), first)
    for action in np.random.default_rng(0).uniform(-1, 1, (9, 2, 4)).astype(np.float32):
        expected = together.step(action)
        found = [env.step(action[row : row + 1]) for row, env in enumerate(alone)]
        for part in range(4):
            np.testing.assert_array_equal(np.concatenate([step[part] for step in found]), expected[part])
    for env in (together, *alone):
        env.close()
