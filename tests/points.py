"""Points with momentum as rows of the real vector env, so that the tiny world too can be stepped by worker processes.

Velocity is not observed: whoever goes on in the middle of an episode must restore more than the observation. A module
of its own, because workers import it.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mtrl_imgrad.config import Config
from mtrl_imgrad.envs import Goals, MetaworldVectorEnv
from mtrl_imgrad.envs.chunk import RowSettings
from mtrl_imgrad.world import World

NEAR = 0.3
"""Distance from the goal that counts as success."""


class PointRow:
    """A point on a plane that the action accelerates. Observation: its position and the goal's, over and over. Reward:
    minus the distance."""

    unstable = False

    def __init__(self, goals: np.ndarray, settings: RowSettings) -> None:
        self.goals, self.horizon, self.repeat = goals, settings.horizon, settings.action_repeat

    def reset(self, goal: int) -> np.ndarray:
        self.goal, self.steps = self.goals[goal, :2], 0
        self.position, self.velocity = np.zeros(2), np.zeros(2)
        return self.observe()

    def restart(self, goal: int) -> np.ndarray:
        steps, observation = self.steps, self.reset(goal)
        self.steps = steps
        return observation

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool]:
        reward, success = 0.0, False
        for _ in range(min(self.repeat, self.horizon - self.steps)):
            self.velocity = 0.7 * self.velocity + 0.2 * np.clip(action[:2], -1, 1)
            self.position = self.position + self.velocity
            self.steps += 1
            distance = float(np.linalg.norm(self.position - self.goal))
            reward, success = reward - distance, success or distance < NEAR
        return self.observe(), reward, success, self.steps == self.horizon

    def observe(self) -> np.ndarray:
        return np.resize(np.concatenate([self.position, self.goal]), 39)

    def close(self) -> None:
        pass


class Points:
    """Makes them; see `RowMaker`."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def fast_task(self, task: str, goals: Goals, settings: RowSettings) -> None:
        return None

    def row(self, task: str, goals: Goals, settings: RowSettings) -> PointRow:
        return PointRow(goals.vectors[task], settings)


def make_world(config: Config, description: dict[str, Any] | None) -> World:
    """The world of points as configured, for `train(config, make_world=...)`."""
    tasks, envs = config.benchmark.tasks, config.envs
    angles = np.linspace(0, 2 * np.pi, len(tasks) * config.benchmark.goals, endpoint=False)
    vectors = np.stack([np.cos(angles), np.sin(angles), 0 * angles], axis=1).reshape(len(tasks), -1, 3)
    goals = Goals.from_dict(description) if description else Goals(0, dict(zip(tasks, vectors, strict=True)))
    common: Any = {"action_repeat": envs.action_repeat, "workers": envs.workers, "maker": Points}

    def training(stream: np.random.SeedSequence, chosen: Any) -> MetaworldVectorEnv:
        own: Any = {"envs_per_task": envs.envs_per_task, "horizon": envs.horizon}
        return MetaworldVectorEnv(chosen, goals, seed=stream, **own, **common)

    def evaluation(beside: Any) -> MetaworldVectorEnv:
        return MetaworldVectorEnv(tasks, goals, seed=0, horizon=config.eval.horizon, share=beside, **common)

    return World(tasks, goals.num_goals, goals.to_dict(), training, evaluation)
