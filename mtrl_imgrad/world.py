"""The environments of a run: those that it trains in, those that evaluate it, and how to make the same ones again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from gymnasium.vector import VectorEnv

from mtrl_imgrad.config import Config
from mtrl_imgrad.envs import Goals, MetaworldVectorEnv, expand_tasks, make_goals


@dataclass(frozen=True)
class World:
    """The environments of a run.

    Attributes:
        tasks: task names.
        goals: goals per task.
        description: what the run folder keeps in `goals.json` to make the same world again.
        training: makes the training environments of the given tasks, whose streams come from the given sequence; rows
            are task-major.
        evaluation: makes one environment per task for evaluation. It may use the worker processes of the training
            environments given; None where there are none.
    """

    tasks: tuple[str, ...]
    goals: int
    description: dict[str, Any]
    training: Callable[[np.random.SeedSequence, Sequence[str]], VectorEnv]
    evaluation: Callable[[Any], VectorEnv]

    @property
    def digest(self) -> str:
        """Of the description; a checkpoint belongs to one world."""
        return hashlib.sha256(json.dumps(self.description, sort_keys=True).encode()).hexdigest()


MakeWorld = Callable[[Config, "dict[str, Any] | None"], World]


def metaworld(config: Config, description: dict[str, Any] | None) -> World:
    """Meta-World as configured; `description` is that of an earlier run, whose goals are to be used again."""
    tasks = expand_tasks(config.benchmark.tasks)
    goal_seed = config.seed if config.envs.goal_seed is None else config.envs.goal_seed
    goals = (
        Goals.from_dict(description)
        if description is not None
        else make_goals(tasks, goal_seed, config.benchmark.goals)
    )
    common: Any = {
        "reward": config.benchmark.reward,
        "action_repeat": config.envs.action_repeat,
        "workers": config.envs.workers,
        "fast": config.envs.fast,
        "self_check": config.envs.self_check == "on",
    }

    def training(stream: np.random.SeedSequence, chosen: Sequence[str]) -> VectorEnv:
        envs = config.envs
        seed = config.seed if envs.seeding == "metaworld" else stream
        return MetaworldVectorEnv(
            chosen,
            goals,
            seed=seed,
            seeding=envs.seeding,
            envs_per_task=envs.envs_per_task,
            horizon=envs.horizon,
            **common,
        )

    def evaluation(beside: MetaworldVectorEnv | None) -> VectorEnv:
        return MetaworldVectorEnv(tasks, goals, seed=0, horizon=config.eval.horizon, share=beside, **common)

    return World(tasks, goals.num_goals, goals.to_dict(), training, evaluation)
