"""One Meta-World task in this process: a row of the vector env."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from jaxtyping import Float32, Float64

if TYPE_CHECKING:
    from metaworld.types import Task

RewardVersion = Literal["v1", "v2"]


class TaskEnv:
    """A Meta-World env without gymnasium's wrappers: goals by index, action repeat, a horizon.

    Args:
        task: the task's name.
        goals: its goals as Meta-World's objects; `reset` takes an index into them.
        horizon: simulator steps after which an episode is truncated, at most 500.
        reward: version of Meta-World's reward function.
        action_repeat: simulator steps per decision.
    """

    def __init__(
        self,
        task: str,
        goals: Sequence[Task],
        *,
        horizon: int,
        reward: RewardVersion,
        action_repeat: int,
    ) -> None:
        from metaworld.env_dict import ALL_V3_ENVIRONMENTS

        from mtrl_imgrad.envs.instability import instability_counts

        self._env = ALL_V3_ENVIRONMENTS[task](reward_function_version=reward)
        self._goals = goals
        self._horizon = horizon
        self._action_repeat = action_repeat
        self.episode_length = 0
        """Simulator steps of the running episode."""
        self._instabilities = instability_counts(self._env.data)
        self.unstable = False
        """Whether MuJoCo has reset the simulation during the last step."""

    def simulator(self) -> tuple[Any, Any]:
        """MuJoCo's model and data of this env as they are now, for drawing them."""
        return self._env.model, self._env.data

    def reset(self, goal: int) -> Float64[np.ndarray, "observation=39"]:
        """Start an episode with the goal of this index. Nothing else in it is random."""
        self._env.set_task(self._goals[goal])
        observation, _ = self._env.reset()
        self._instabilities[:] = 0
        self.episode_length = 0
        return observation

    def restart(self, goal: int) -> Float64[np.ndarray, "observation=39"]:
        """`reset`, but to an episode that has only what is left of the horizon."""
        length = self.episode_length
        observation = self.reset(goal)
        self.episode_length = length
        return observation

    def step(
        self,
        action: Float32[np.ndarray, "action=4"],
    ) -> tuple[Float64[np.ndarray, "observation=39"], float, bool, bool]:
        """Take one decision: the action is repeated until the episode ends at the latest.

        Returns:
            The last observation, the sum of the rewards, whether any repeated step succeeded, whether the episode is
            over. Where the simulation has become unstable, the sum is NaN and the episode is over.

        Raises:
            RuntimeError: the episode was over before.
        """
        if self.episode_length == self._horizon:
            raise RuntimeError("the episode is over: call reset first")
        total_reward, any_success = 0.0, False
        observation = np.empty(0)
        for _ in range(min(self._action_repeat, self._horizon - self.episode_length)):
            observation, reward, _, _, info = self._env.step(action)
            total_reward += float(reward)
            any_success |= bool(info["success"] == 1.0)
            self.episode_length += 1
        self.unstable = bool(self._instabilities.any())
        over = self.unstable or self.episode_length == self._horizon
        return observation, math.nan if self.unstable else total_reward, any_success, over

    def close(self) -> None:
        self._env.close()
