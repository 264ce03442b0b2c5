"""The vector env that training and evaluation step: every task of a run, several environments per task.

Rows are task-major: row `k * envs_per_task + e` is environment e of task k, so an array `[rows, ...]` reshapes to
`[tasks, envs, ...]`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias, get_args

import gymnasium
import numpy as np
from gymnasium.spaces import Box
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from jaxtyping import Bool, Float32, Float64

from mtrl_imgrad.envs.goal_schedule import GoalSchedule, Seeding
from mtrl_imgrad.envs.goals import Goals
from mtrl_imgrad.envs.task_env import RewardVersion, TaskEnv

MAX_HORIZON = 500
"""Simulator steps after which Meta-World ends an episode itself (`max_path_length`)."""

Observations: TypeAlias = Float32[np.ndarray, "rows 39"]
StepResult: TypeAlias = tuple[
    Observations,
    Float64[np.ndarray, "rows"],
    Bool[np.ndarray, "rows"],
    Bool[np.ndarray, "rows"],
    dict[str, Any],
]
"""Observations, rewards, terminated, truncated, infos."""


class MetaworldVectorEnv(VectorEnv):
    """Meta-World tasks in this process, with gymnasium's vector interface and same-step autoreset.

    Observations are Meta-World's 39 numbers (18 now, the 18 of the step before, 3 for the goal) in float32, without a
    task one-hot. Meta-World's own bounds of them are wrong, so the space is unbounded. Rewards are float64.
    `terminated` is never true: Meta-World does not end an episode on success. `truncated` is true at the horizon; on
    that step the returned observation is the first of the next episode. The infos of a step are arrays over the rows,
    present at every step and filled in every row:

    * `final_obs` float32 `[rows, 39]`: the observation that this step led to, before any autoreset, so the next
      observation of every transition. Where `_final_obs` (bool, equal to `truncated`) is true it is the episode's last
      one; elsewhere it is the returned one.
    * `success` bool: whether the episode this step belongs to has succeeded so far; on its last step, whether it
      succeeded.
    * `goal` int64: the index of that episode's goal.
    * `episode_return` float64, `episode_length` int64 (simulator steps): of that episode so far.

    The infos of `reset` hold `goal` only. Streams of random numbers choose the goal of each episode and nothing else
    (`GoalSchedule`).

    Args:
        tasks: task names, as `expand_tasks` returns them.
        goals: the goals of these tasks; it may hold those of others.
        seed: of the streams; an integer or, with `seeding="spawn"`, a SeedSequence, which is not advanced.
        envs_per_task: environments per task.
        horizon: episode length in simulator steps, at most 500.
        reward: version of Meta-World's reward function. (Meta-World itself takes any string but "v2" for v1.)
        action_repeat: simulator steps per decision. Rewards are summed, success is that of any repeated step, and the
            last decision of an episode is shorter where `horizon` is not a multiple.
        seeding: the law of the streams, see `GoalSchedule`.

    Raises:
        ValueError: a task without goals, or an argument out of range.
    """

    metadata = {"autoreset_mode": AutoresetMode.SAME_STEP, "render_modes": []}  # noqa: RUF012  (declared by gymnasium)

    def __init__(
        self,
        tasks: Sequence[str],
        goals: Goals,
        *,
        seed: int | np.random.SeedSequence,
        envs_per_task: int = 1,
        horizon: int = MAX_HORIZON,
        reward: RewardVersion = "v2",
        action_repeat: int = 1,
        seeding: Seeding = "spawn",
    ) -> None:
        if missing := [task for task in tasks if task not in goals.tasks]:
            raise ValueError(f"goals: none for {', '.join(missing)}; given are those of {', '.join(goals.tasks)}")
        if not 1 <= horizon <= MAX_HORIZON:
            raise ValueError(f"horizon: {horizon} is not between 1 and {MAX_HORIZON} simulator steps")
        for name, count in (("envs_per_task", envs_per_task), ("action_repeat", action_repeat)):
            if count < 1:
                raise ValueError(f"{name}: {count} is less than 1")
        for name, value, allowed in (("reward", reward, RewardVersion), ("seeding", seeding, Seeding)):
            if value not in get_args(allowed):
                raise ValueError(f"{name}: {value!r} is not one of {', '.join(get_args(allowed))}")

        self.task_names = tuple(tasks)
        self.num_tasks = len(self.task_names)
        self.envs_per_task = envs_per_task
        self.num_envs = self.num_tasks * envs_per_task
        self.single_observation_space = Box(-np.inf, np.inf, (39,), np.float32)
        self.single_action_space = Box(-1.0, 1.0, (4,), np.float32)
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self.action_space = batch_space(self.single_action_space, self.num_envs)

        self._schedule = GoalSchedule(self.num_tasks, envs_per_task, goals.num_goals, seeding, seed)
        self._envs: list[TaskEnv] = []
        for task in self.task_names:
            task_goals = goals.metaworld_tasks(task)
            for _ in range(envs_per_task):
                env = TaskEnv(task, task_goals, horizon=horizon, reward=reward, action_repeat=action_repeat)
                self._envs.append(env)
        self._started = False
        self._actions: np.ndarray | None = None
        self._goal = np.zeros(self.num_envs, np.int64)
        self._success = np.zeros(self.num_envs, np.bool_)
        self._episode_return = np.zeros(self.num_envs, np.float64)
        self._episode_length = np.zeros(self.num_envs, np.int64)

    def reset(
        self,
        *,
        seed: int | None = None,
        options: dict[str, Any] | None = None,
    ) -> tuple[Observations, dict[str, Any]]:
        """Start a new episode in every row.

        Args:
            seed: restarts all streams, as if the env had been constructed with it. None: they go on.
            options: `{"goals": int array [rows, n]}` gives each row the goal indices of this episode and of the n - 1
                that follow it; after these, goals are drawn again. Such episodes take nothing from the streams.

        Raises:
            ValueError: an unknown option, or goals of a wrong shape, dtype or range.
        """
        self._raise_if_closed()
        options = options or {}
        if unknown := sorted(set(options) - {"goals"}):
            raise ValueError(f"options: unknown {', '.join(map(repr, unknown))}; allowed is 'goals'")
        if "goals" in options:
            self._schedule.queue(options["goals"])
        else:
            self._schedule.clear_queue()
        super().reset(seed=seed)
        if seed is not None:
            self._schedule.reseed(seed)
        return self._start_all([self._schedule.next_goal(row) for row in range(self.num_envs)])

    def step_async(self, actions: Float32[np.ndarray, "rows 4"]) -> None:
        """Hand over one action per row; `step_wait` returns what they lead to.

        Raises:
            ValueError: actions are not `[rows, 4]`.
            RuntimeError: before the first `reset`, or while a step is under way.
        """
        self._raise_if_closed()
        if not self._started:
            raise RuntimeError("call reset before the first step")
        if self._actions is not None:
            raise RuntimeError("a step is under way: call step_wait first")
        actions = np.array(actions, np.float32)
        if actions.shape != (self.num_envs, 4):
            raise ValueError(f"actions: shape {actions.shape} is not {(self.num_envs, 4)}")
        self._actions = actions

    def step_wait(self) -> StepResult:
        """Finish the step begun by `step_async`. The arrays returned are the caller's: no later step changes them.

        Raises:
            RuntimeError: no step is under way.
        """
        self._raise_if_closed()
        if self._actions is None:
            raise RuntimeError("no step is under way: call step_async first")
        actions, self._actions = self._actions, None
        final_obs = np.empty((self.num_envs, 39), np.float32)
        rewards = np.empty(self.num_envs, np.float64)
        truncated = np.empty(self.num_envs, np.bool_)
        for row, env in enumerate(self._envs):
            final_obs[row], rewards[row], success, truncated[row] = env.step(actions[row])
            self._success[row] |= success
            self._episode_length[row] = env.episode_length
        self._episode_return += rewards
        infos = {
            "final_obs": final_obs,
            "_final_obs": truncated.copy(),
            "success": self._success.copy(),
            "goal": self._goal.copy(),
            "episode_return": self._episode_return.copy(),
            "episode_length": self._episode_length.copy(),
        }
        observations = final_obs.copy()
        for row in np.flatnonzero(truncated).tolist():
            observations[row] = self._start_episode(row, self._schedule.next_goal(row))
        return observations, rewards, np.zeros(self.num_envs, np.bool_), truncated, infos

    def step(self, actions: Float32[np.ndarray, "rows 4"]) -> StepResult:
        """`step_async` and `step_wait` in one call."""
        self.step_async(actions)
        return self.step_wait()

    @property
    def at_episode_start(self) -> bool:
        """Whether every row was reset and none stepped since: the only moment at which `state_dict` is valid."""
        return self._started and self._actions is None and not self._episode_length.any()

    def state_dict(self) -> dict[str, Any]:
        """All that the episodes to come depend on, as integers, lists and strings, which JSON keeps exactly.

        Raises:
            RuntimeError: not `at_episode_start`. The simulators' state inside an episode is not part of it.
        """
        if not self.at_episode_start:
            raise RuntimeError("state_dict is valid only right after all rows were reset (see at_episode_start)")
        return {
            "tasks": list(self.task_names),
            "envs_per_task": self.envs_per_task,
            "goal": self._goal.tolist(),
            "schedule": self._schedule.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> tuple[Observations, dict[str, Any]]:
        """Go to the episode start at which `state_dict` was taken, and return what `reset` returned there.

        Raises:
            ValueError: the state is that of other tasks or of another number of environments.
        """
        self._raise_if_closed()
        for name, own in (("tasks", list(self.task_names)), ("envs_per_task", self.envs_per_task)):
            if state[name] != own:
                raise ValueError(f"{name}: the state has {state[name]}, this env has {own}")
        self._schedule.load_state_dict(state["schedule"])
        return self._start_all(state["goal"])

    def close_extras(self, **kwargs: Any) -> None:
        """Release the simulators. Called by `close`."""
        for env in self._envs:
            env.close()
        self._envs.clear()

    def _start_all(self, goals: Sequence[int]) -> tuple[Observations, dict[str, Any]]:
        self._started = True
        self._actions = None
        observations = np.empty((self.num_envs, 39), np.float32)
        for row, goal in enumerate(goals):
            observations[row] = self._start_episode(row, goal)
        return observations, {"goal": self._goal.copy()}

    def _start_episode(self, row: int, goal: int) -> Float64[np.ndarray, "observation=39"]:
        self._goal[row] = goal
        self._success[row] = False
        self._episode_return[row] = 0.0
        self._episode_length[row] = 0
        return self._envs[row].reset(goal)

    def _raise_if_closed(self) -> None:
        if self.closed:
            raise gymnasium.error.ClosedEnvironmentError("the vector env is closed")
