"""The tiny world with faults: numbers that are not finite, in chosen rows at chosen steps of its environments."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from gymnasium.vector import VectorEnv
from tiny_world import TinyVectorEnv, make_world

from mtrl_imgrad.config import Config
from mtrl_imgrad.world import MakeWorld, World

Spoil = Callable[[np.ndarray, np.ndarray, int], None]
"""Puts something into the rewards and final observations of a step, in a row."""


def _reward(value: float) -> Spoil:
    def spoil(rewards: np.ndarray, final_obs: np.ndarray, row: int) -> None:
        rewards[row] = value

    return spoil


def _observation(value: float) -> Spoil:
    def spoil(rewards: np.ndarray, final_obs: np.ndarray, row: int) -> None:
        final_obs[row, 1] = value

    return spoil


KINDS: dict[str, tuple[Spoil, str]] = {
    "reward nan": (_reward(math.nan), "the reward is nan"),
    "reward inf": (_reward(math.inf), "the reward is inf"),
    "reward -inf": (_reward(-math.inf), "the reward is -inf"),
    "reward too large": (_reward(1e39), "the reward is 1e+39"),
    "reward whose square is infinite": (_reward(1e160), "the reward is 1e+160"),
    "observation nan": (_observation(math.nan), "the observation is not finite"),
    "observation inf": (_observation(-math.inf), "the observation is not finite"),
}
"""What can go wrong, and how it is told."""


def faulty_envs(envs: TinyVectorEnv, faults: Mapping[int, tuple[str, list[int]]]) -> TinyVectorEnv:
    """The same environments in which something of `KINDS` goes wrong, after so many simulator steps, in these rows."""

    class Faulty(TinyVectorEnv):
        def spoil(self, rewards: np.ndarray, final_obs: np.ndarray) -> None:
            kind, rows = faults.get(self.steps_taken, ("reward nan", []))
            for row in rows:
                KINDS[kind][0](rewards, final_obs, row)

    envs.__class__ = Faulty
    return envs


def faulty_world(
    training: Mapping[int, tuple[str, list[int]]] | None = None,
    evaluation: Mapping[int, tuple[str, list[int]]] | None = None,
) -> MakeWorld:
    """The tiny world in whose training and evaluation environments something goes wrong."""

    def make(config: Config, description: dict[str, Any] | None) -> World:
        world = make_world(config, description)

        def make_training(stream: np.random.SeedSequence, tasks: tuple[str, ...]) -> VectorEnv:
            envs: Any = world.training(stream, tasks)
            return faulty_envs(envs, training or {})

        def make_evaluation(beside: Any) -> VectorEnv:
            envs: Any = world.evaluation(beside)
            return faulty_envs(envs, evaluation or {})

        return replace(world, training=make_training, evaluation=make_evaluation)

    return make
