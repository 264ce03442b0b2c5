"""Fast envs stepped together: what is the same for every task is done once for all of them.

A step has three passes: the controls of all rows, the physics of each row, the observation and reward of each row. So
MuJoCo's code stays in the processor's cache for one pass and Python's for the next, where one row after another would
throw both out by turns.
"""

# pyright: reportAttributeAccessIssue=false
# (mujoco does not tell its names to type checkers.)
from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import mujoco
import numpy as np
from jaxtyping import Bool, Float32, Float64

from mtrl_imgrad.envs.fast_env import EpisodeStart, FastTask
from mtrl_imgrad.envs.instability import instability_counts
from mtrl_imgrad.envs.task_env import RewardVersion

_ORIENTATION = np.array([1.0, 0.0, 1.0, 0.0])
"""Of the hand, as `set_xyz_action` sets it."""


class FastRows:
    """Several environments in lockstep: their episodes begin together and have one length.

    Args:
        tasks: what the rows of each task share, once per row.
        reward: version of Meta-World's reward function.
        horizon: simulator steps after which the episodes end.
        action_repeat: simulator steps per decision.
        tick: called when a row is made, and after every simulator step of all rows.

    Attributes:
        unstable: bool `[rows]`, in which rows MuJoCo has reset the simulation during the last step.
    """

    def __init__(
        self,
        tasks: Sequence[FastTask],
        reward: RewardVersion,
        horizon: int,
        action_repeat: int,
        tick: Callable[[], None] = lambda: None,
    ) -> None:
        self._tasks = list(tasks)
        self._envs: list[Any] = []
        for task in tasks:
            self._envs.append(task.make(reward))
            tick()
        self._starts: list[EpisodeStart | None] = [None] * len(tasks)
        self._horizon, self._action_repeat = horizon, action_repeat
        self._length = horizon
        self._tick = tick
        count, envs = len(tasks), self._envs
        self._scale = np.array([[env.action_scale] for env in envs], np.float32)
        self._mocap_low, self._mocap_high = (
            np.stack([getattr(env, f"mocap_{end}") for env in envs]) for end in ("low", "high")
        )
        # Meta-World clips observations to these bounds, which build on the task's goal space.
        spaces = [env.sawyer_observation_space for env in envs]
        self._low, self._high = np.stack([space.low for space in spaces]), np.stack([space.high for space in spaces])
        self._mocap = np.zeros((count, 3))
        self._mocap_positions = [env.simulation.mocap_pos[0] for env in envs]
        self._frames = np.zeros((count, 18))
        # Hand, claws and tips of all rows, one after another, and where they are copied to before an observation.
        self._points = [point for env in envs for point in env.points]
        self._gathered = np.empty((count, 5, 3))
        self._simulations = [(env.model, env.simulation, env.frame_skip) for env in envs]
        self._instabilities = [instability_counts(env.simulation) for env in envs]
        self._unstable_counts = np.zeros((count, 4), np.int32)
        self.unstable = np.zeros(count, np.bool_)
        self._inputs = [(env.simulation.mocap_pos, env.simulation.mocap_quat, env.simulation.ctrl) for env in envs]

    def reset(self, index: int, goal: int) -> Float64[np.ndarray, "observation=39"]:
        """Start an episode of one row. All rows are reset before the next step."""
        self._length = 0
        return self.restart(index, goal)

    def restart(self, index: int, goal: int) -> Float64[np.ndarray, "observation=39"]:
        """Start an episode of one row, in what the others have left of the horizon."""
        start = self._starts[index] = self._tasks[index].start(self._envs[index], goal)
        self._frames[index] = start.observation[:18]
        self._instabilities[index][:] = 0
        return start.observation

    def step(
        self, actions: Float32[np.ndarray, "rows 4"]
    ) -> tuple[Float64[np.ndarray, "rows 39"], Float64[np.ndarray, " rows"], Bool[np.ndarray, " rows"]]:
        """Take one decision in every row: the action is repeated until the episode ends at the latest.

        Returns:
            The last observations, the sums of the rewards, whether any repeated step succeeded. All three are worth
            nothing in rows that are `unstable`.

        Raises:
            RuntimeError: the episodes were over before.
        """
        if self._length == self._horizon:
            raise RuntimeError("the episode is over: call reset first")
        # As in `SawyerXYZEnv.set_xyz_action`: float32 until it is added to the position.
        shifts = np.clip(actions[:, :3], -1, 1) * self._scale
        controls = np.stack((actions[:, 3], -actions[:, 3]), axis=1).astype(np.float64)
        observations = self._frames
        totals, successes = [0.0] * len(actions), [False] * len(actions)
        for _ in range(min(self._action_repeat, self._horizon - self._length)):
            self._advance(shifts, controls)
            observations = self._observe()
            for row, (env, observation, action) in enumerate(zip(self._envs, observations, actions, strict=True)):
                self._place(row)  # some rewards read the model
                reward, info = env.evaluate_state(observation, action)
                totals[row] += float(reward)  # some are float32
                successes[row] = successes[row] or info["success"] == 1.0
            self._length += 1
            self._tick()
        np.concatenate(self._instabilities, out=self._unstable_counts.reshape(-1))
        self.unstable = self._unstable_counts.any(axis=1)
        return observations, np.array(totals), np.array(successes, np.bool_)

    def _advance(self, shifts: Float32[np.ndarray, "rows 3"], controls: Float64[np.ndarray, "rows 2"]) -> None:
        """`set_xyz_action` and `do_simulation` up to where `SawyerXYZEnv.step` observes."""
        mocap = self._mocap
        # MuJoCo moves neither position nor orientation, unless it resets a simulation that has become unstable.
        np.concatenate(self._mocap_positions, out=mocap.reshape(-1))
        mocap += shifts
        mocap.clip(self._mocap_low, self._mocap_high, out=mocap)
        for row, (simulation, inputs, position, control) in enumerate(
            zip(self._simulations, self._inputs, mocap, controls, strict=True)
        ):
            self._place(row)
            inputs[0][:], inputs[1][:], inputs[2][:] = position, _ORIENTATION, control
            mujoco.mj_step(*simulation)
            mujoco.mj_forward(simulation[0], simulation[1])

    def _observe(self) -> Float64[np.ndarray, "rows 39"]:
        """`_get_obs` and the clipping in `SawyerXYZEnv.step`."""
        np.concatenate(self._points, out=self._gathered.reshape(-1))
        hands, right_claws, left_claws, right_tips, left_tips = self._gathered.swapaxes(0, 1)
        observations = np.empty((len(self._envs), 39))
        observations[:, :3] = hands
        # The dot product of one row at a time, as in `np.linalg.norm`: a sum over all rows may round otherwise.
        widths = [math.sqrt(apart.dot(apart)) for apart in right_claws - left_claws]
        observations[:, 3] = (np.array(widths) / 0.1).clip(0.0, 1.0)
        tcp_centers = (right_tips + left_tips) / 2.0
        for row, (env, observation) in enumerate(zip(self._envs, observations, strict=True)):
            self._place(row)
            env.tcp_center = tcp_centers[row]
            env.objects(observation[4:18])
            observation[36:] = env._get_pos_goal()
        observations[:, 18:36] = self._frames
        self._frames = observations[:, :18].copy()
        return observations.clip(self._low, self._high, out=observations)

    def _place(self, row: int) -> None:
        """Have the model that the rows of a task share as the goal of this row wants it."""
        task, start = self._tasks[row], self._starts[row]
        if start and task.on_model is not start:
            task.place(start)

    def simulator_of(self, index: int) -> Callable[[], tuple[mujoco.MjModel, mujoco.MjData]]:
        """Gives a row's model and data as they are now, for drawing them."""

        def simulator() -> tuple[mujoco.MjModel, mujoco.MjData]:
            self._place(index)
            return self._envs[index].model, self._envs[index].simulation

        return simulator

    def close(self) -> None:
        """Release the simulators."""
        for env in self._envs:
            env.close()
