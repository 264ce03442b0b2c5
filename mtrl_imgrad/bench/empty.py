"""Tasks that cost nothing: what is left of a vector step is the vector env itself. A module of its own, because worker
processes import it."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from gymnasium.spaces import Box
from jaxtyping import Float32, Float64

from mtrl_imgrad.envs.chunk import RowSettings
from mtrl_imgrad.envs.goals import Goals

OBSERVATION = np.zeros(39)
INFOS = {"near_object", "grasp_success", "grasp_reward", "in_place_reward", "obj_to_target", "unscaled_reward"}


class EmptyRow:
    """A row of `MetaworldVectorEnv`."""

    unstable = False

    def __init__(self, horizon: int) -> None:
        self._horizon, self._length = horizon, 0

    def reset(self, goal: int) -> Float64[np.ndarray, "observation=39"]:
        self._length = 0
        return OBSERVATION

    def restart(self, goal: int) -> Float64[np.ndarray, "observation=39"]:
        return OBSERVATION

    def step(
        self, action: Float32[np.ndarray, "action=4"]
    ) -> tuple[Float64[np.ndarray, "observation=39"], float, bool, bool]:
        self._length += 1
        return OBSERVATION, 0.0, False, self._length == self._horizon

    def close(self) -> None:
        pass


class EmptyRows:
    """Makes them, as `MetaworldVectorEnv(maker=EmptyRows)`."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def fast_task(self, task: str, goals: Goals, settings: RowSettings) -> None:
        return None

    def row(self, task: str, goals: Goals, settings: RowSettings) -> EmptyRow:
        return EmptyRow(settings.horizon)


class EmptyEnv(gymnasium.Env):
    """The same for gymnasium's own vector envs, with as many infos as Meta-World's envs give."""

    observation_space = Box(-np.inf, np.inf, (39,), np.float64)
    action_space = Box(-1.0, 1.0, (4,), np.float32)

    def __init__(self, horizon: int) -> None:
        self._horizon, self._length = horizon, 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        self._length = 0
        return OBSERVATION, {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, float]]:
        self._length += 1
        infos = dict.fromkeys(INFOS, 0.0) | {"success": 0.0}
        return OBSERVATION, 0.0, False, self._length == self._horizon, infos
