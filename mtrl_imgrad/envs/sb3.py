"""The vector env as stable-baselines3's `VecEnv`: its algorithms, wrappers and callbacks run on Meta-World's tasks."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import gymnasium
import numpy as np
from gymnasium.spaces import Box
from jaxtyping import Bool, Float32, UInt8
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import VecEnv
from stable_baselines3.common.vec_env.base_vec_env import VecEnvIndices

from mtrl_imgrad.envs.vector import MetaworldVectorEnv

Observations: TypeAlias = Float32[np.ndarray, "rows entries"]
StepResult: TypeAlias = tuple[Observations, Float32[np.ndarray, "rows"], Bool[np.ndarray, "rows"], list[dict[str, Any]]]
"""Observations, rewards, whether the episode ended, infos."""


@dataclass
class Row:
    """One environment as `get_attr`, `set_attr` and `env_method` see it. Its simulator may be in another process.

    Attributes:
        envs: the vector env.
        index: its row there.
        task: index of its task.
        task_name: name of its task.
    """

    envs: MetaworldVectorEnv
    index: int
    task: int
    task_name: str
    observation_space: Box
    action_space: gymnasium.Space
    render_mode: str | None

    def render(self) -> UInt8[np.ndarray, "height width rgb=3"]:
        return self.envs.render_row(self.index)


class MtVecEnv(VecEnv):
    """stable-baselines3's interface over a `MetaworldVectorEnv`.

    Rows, rewards and episodes are those of the vector env; rewards become float32, as in SB3's own classes. A step's
    infos are a list with one dictionary per row. `is_success` (the episode has succeeded so far), `goal` and
    `TimeLimit.truncated` are in it at every step; at an episode's end also `terminal_observation` and `episode`, with
    the return `r`, the length in simulator steps `l` and the seconds since construction `t`, as SB3's `Monitor` reports
    them. That is why `env_is_wrapped(Monitor)` is true, and neither `Monitor` nor `VecMonitor` is needed.

    A transition that must not be learned from (see `MetaworldVectorEnv`) comes as it is; SB3's `VecCheckNan` finds it.
    `step_infos` are the vector env's own infos of the last step.

    `seed(s)` restarts all streams from s at the next `reset`. `set_options({"goals": [3, 7]})`, or a list with such a
    dictionary for every row, gives each row its next goals, as `MetaworldVectorEnv.reset` does. `env_method` reaches
    `render`; `get_attr` and `set_attr` reach the attributes of `Row` and any that were set.

    Args:
        envs: the vector env, used for nothing else from now on; `close` closes it.
        task_one_hot: append the task's one-hot to every observation, as Meta-World's `use_one_hot` does.
    """

    def __init__(self, envs: MetaworldVectorEnv, *, task_one_hot: bool = False) -> None:
        self.envs = envs
        tasks = envs.num_tasks if task_one_hot else 0
        identity = np.repeat(np.eye(envs.num_tasks, tasks, dtype=np.float32), envs.envs_per_task, axis=0)
        self._one_hot: Float32[np.ndarray, "rows tasks"] = identity
        own: Any = envs.single_observation_space
        low, high = np.append(own.low, np.zeros(tasks)), np.append(own.high, np.ones(tasks))
        space = Box(low.astype(np.float32), high.astype(np.float32), dtype=np.float32)
        self._rows: list[Any] = []
        for index in range(envs.num_envs):
            task = index // envs.envs_per_task
            name = envs.task_names[task]
            self._rows.append(Row(envs, index, task, name, space, envs.single_action_space, envs.render_mode))
        self.step_infos: dict[str, Any] = {}
        self._start = time.time()
        super().__init__(envs.num_envs, space, envs.single_action_space)

    def reset(self) -> Observations:
        """Start a new episode in every row, with the seed and options set since the last call.

        Raises:
            ValueError: only some rows have the option `goals`, or an option is not allowed.
        """
        options: dict[str, Any] = {}
        if any(self._options):
            if any(row.keys() != self._options[0].keys() for row in self._options):
                raise ValueError("options: every row needs the same ones")
            options = {name: np.stack([np.atleast_1d(row[name]) for row in self._options]) for name in self._options[0]}
        observations, infos = self.envs.reset(seed=self._seeds[0], options=options)
        self._reset_seeds()
        self._reset_options()
        self.reset_infos = [{"goal": goal} for goal in infos["goal"].tolist()]
        return self._with_task(observations)

    def step_async(self, actions: Float32[np.ndarray, "rows 4"]) -> None:
        self.envs.step_async(actions)

    def step_wait(self) -> StepResult:
        observations, rewards, terminated, truncated, infos = self.envs.step_wait()
        done = terminated | truncated
        row_infos: list[dict[str, Any]] = [
            {"is_success": success, "goal": goal, "TimeLimit.truncated": cut}
            for success, goal, cut in zip(
                infos["success"].tolist(), infos["goal"].tolist(), (truncated & ~terminated).tolist(), strict=True
            )
        ]
        if done.any():
            final_observations = self._with_task(infos["final_obs"])
            seconds = round(time.time() - self._start, 6)
            for row in np.flatnonzero(done).tolist():
                row_infos[row]["terminal_observation"] = final_observations[row]
                row_infos[row]["episode"] = {
                    "r": float(infos["episode_return"][row]),
                    "l": int(infos["episode_length"][row]),
                    "t": seconds,
                }
        self.step_infos = infos
        with np.errstate(over="ignore"):  # what is too large for float32 becomes infinite
            return self._with_task(observations), rewards.astype(np.float32), done, row_infos

    def state_dict(self) -> dict[str, Any]:
        """As `MetaworldVectorEnv.state_dict`."""
        return self.envs.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> Observations:
        """Go to the moment at which `state_dict` was taken, and return its observations."""
        observations, infos = self.envs.load_state_dict(state)
        self.reset_infos = [{"goal": goal} for goal in infos["goal"].tolist()]
        return self._with_task(observations)

    def close(self) -> None:
        self.envs.close()

    def get_images(self) -> Sequence[UInt8[np.ndarray, "height width rgb=3"]]:
        return [row.render() for row in self._rows]

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        return [getattr(self._rows[index], attr_name) for index in self._get_indices(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        for index in self._get_indices(indices):
            setattr(self._rows[index], attr_name, value)

    def env_method(
        self, method_name: str, *method_args: Any, indices: VecEnvIndices = None, **method_kwargs: Any
    ) -> list[Any]:
        methods = self.get_attr(method_name, indices)
        return [method(*method_args, **method_kwargs) for method in methods]

    def env_is_wrapped(self, wrapper_class: type[gymnasium.Wrapper], indices: VecEnvIndices = None) -> list[bool]:
        return [wrapper_class is Monitor for _ in self._get_indices(indices)]

    def _with_task(self, observations: Float32[np.ndarray, "rows 39"]) -> Observations:
        return np.concatenate([observations, self._one_hot], axis=1)
