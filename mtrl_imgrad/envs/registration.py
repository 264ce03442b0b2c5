"""The environments under gymnasium's names: `gymnasium.make_vec("mtrl_imgrad/MT10-v0")` and, for one task,
`gymnasium.make("mtrl_imgrad/reach-v3")`.

`import mtrl_imgrad` registers them. Where nothing imports it, gymnasium does when the name says so:
`gymnasium.make_vec("mtrl_imgrad:mtrl_imgrad/MT10-v0")`. (gymnasium 1.0 and newer read no entry points.)
"""

from __future__ import annotations

from typing import Any, Literal

import gymnasium
import numpy as np
from gymnasium.spaces import Box
from jaxtyping import Float32, UInt8

from mtrl_imgrad.envs.goal_schedule import GoalSchedule, Seeding
from mtrl_imgrad.envs.goals import GOALS_PER_TASK, make_goals
from mtrl_imgrad.envs.rendering import TaskRenderer
from mtrl_imgrad.envs.task_env import RewardVersion, TaskEnv
from mtrl_imgrad.envs.tasks import expand_tasks
from mtrl_imgrad.envs.vector import (
    MAX_HORIZON,
    SIMULATOR_STEPS_PER_SECOND,
    MetaworldVectorEnv,
    check_arguments,
)

SETS = ("MT10", "MT25", "MT50")
TASKS = """
    assembly basketball bin-picking box-close button-press button-press-topdown button-press-topdown-wall
    button-press-wall coffee-button coffee-pull coffee-push dial-turn disassemble door-close door-lock door-open
    door-unlock drawer-close drawer-open faucet-close faucet-open hammer hand-insert handle-press handle-press-side
    handle-pull handle-pull-side lever-pull peg-insert-side peg-unplug-side pick-out-of-hole pick-place pick-place-wall
    plate-slide plate-slide-back plate-slide-back-side plate-slide-side push push-back push-wall reach reach-wall
    shelf-place soccer stick-pull stick-push sweep sweep-into window-close window-open
""".split()  # noqa: SIM905
"""Meta-World's tasks. To ask metaworld for them would cost every import of this package most of a second."""


def register_environments() -> None:
    """Tell gymnasium the names. What they stand for is imported and made when it is asked for."""
    here = __name__
    for name in SETS:
        gymnasium.register(
            f"mtrl_imgrad/{name}-v0", vector_entry_point=f"{here}:make_vector_env", kwargs={"tasks": name}
        )
    for name in TASKS:
        gymnasium.register(
            f"mtrl_imgrad/{name}-v3",
            entry_point=f"{here}:MetaworldTaskEnv",
            vector_entry_point=f"{here}:make_vector_env",
            kwargs={"tasks": f"{name}-v3"},
        )


def make_vector_env(
    tasks: str,
    *,
    num_envs: int = 1,
    envs_per_task: int | None = None,
    seed: int = 0,
    goal_seed: int | None = None,
    num_goals: int = GOALS_PER_TASK,
    **arguments: Any,
) -> MetaworldVectorEnv:
    """What `gymnasium.make_vec` makes of the names here.

    Args:
        tasks: the name of a set or of a task.
        num_envs: rows in all, a multiple of the number of tasks. gymnasium passes 1 where it was not given, and that
            means `envs_per_task`.
        envs_per_task: environments per task, 1 by default.
        seed: of the streams of goals.
        goal_seed: of the goals themselves; None takes `seed`, as Meta-World does.
        num_goals: goals per task, the first of Meta-World's 50.
        arguments: the others of `MetaworldVectorEnv`, such as `horizon`, `workers` or `render_mode`.

    Raises:
        ValueError: `num_envs` does not fit, or an argument is out of range.
    """
    names = expand_tasks((tasks,))
    per_task, left_over = divmod(num_envs, len(names))
    if num_envs == 1:
        per_task = 1 if envs_per_task is None else envs_per_task
    elif left_over or per_task != (envs_per_task or per_task):
        wanted = f"{len(names)} tasks x envs_per_task" + (f" {envs_per_task}" if envs_per_task else "")
        raise ValueError(f"num_envs: {num_envs} rows cannot be dealt to {wanted}")
    goals = make_goals(names, seed if goal_seed is None else goal_seed, num_goals)
    return MetaworldVectorEnv(names, goals, seed=seed, envs_per_task=per_task, **arguments)


class MetaworldTaskEnv(gymnasium.Env):
    """One task as a plain gymnasium environment, with the numbers of a one-row `MetaworldVectorEnv` of the same seed.
    It steps as fast as Meta-World does; the vector env, also of one row, is several times as fast.

    `truncated` is true at the horizon, `terminated` never. The infos of a step have `success` (whether the episode has
    succeeded so far), the same as `is_success` for stable-baselines3, and `goal`, the index of the episode's goal,
    which is in those of `reset` too.

    Args:
        tasks: the task's name.
        seed: of the stream of goals; `reset(seed=s)` restarts it from s.
        goal_seed: of the goals themselves; None takes `seed`, as Meta-World does.
        num_goals: goals, the first of Meta-World's 50.
        horizon: as in `MetaworldVectorEnv`, and so are the others.

    Raises:
        ValueError: an argument is out of range.
    """

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"], "render_fps": SIMULATOR_STEPS_PER_SECOND}  # noqa: RUF012

    def __init__(
        self,
        tasks: str,
        *,
        seed: int = 0,
        goal_seed: int | None = None,
        num_goals: int = GOALS_PER_TASK,
        horizon: int = MAX_HORIZON,
        reward: RewardVersion = "v2",
        action_repeat: int = 1,
        seeding: Seeding = "spawn",
        render_mode: Literal["rgb_array"] | None = None,
        camera: str = "corner4",
        width: int = 480,
        height: int = 480,
    ) -> None:
        check_arguments(horizon, reward, seeding, render_mode, action_repeat=action_repeat, width=width, height=height)
        goals = make_goals(expand_tasks((tasks,)), seed if goal_seed is None else goal_seed, num_goals)
        (task,) = goals.tasks
        self._task = TaskEnv(
            task, goals.metaworld_tasks(task), horizon=horizon, reward=reward, action_repeat=action_repeat
        )
        self._schedule = GoalSchedule(1, 1, num_goals, seeding, seed)
        self._goal, self._success = -1, False
        self.observation_space = Box(-np.inf, np.inf, (39,), np.float32)
        self.action_space = Box(-1.0, 1.0, (4,), np.float32)
        self.render_mode = render_mode
        self.metadata = self.metadata | {"render_fps": SIMULATOR_STEPS_PER_SECOND / action_repeat}
        self._picture = (camera, width, height)
        self._renderer: TaskRenderer | None = None

    def reset(
        self,
        *,
        seed: int | None = None,
        options: dict[str, Any] | None = None,
    ) -> tuple[Float32[np.ndarray, "observation=39"], dict[str, Any]]:
        """Start an episode.

        Args:
            seed: restarts the stream of goals.
            options: `{"goal": index}` chooses the goal and takes nothing from the stream.

        Raises:
            ValueError: an unknown option, or a goal out of range.
        """
        super().reset(seed=seed)
        options = options or {}
        if unknown := sorted(set(options) - {"goal"}):
            raise ValueError(f"options: unknown {', '.join(map(repr, unknown))}; allowed is 'goal'")
        if seed is not None:
            self._schedule.reseed(seed)
        if "goal" in options:
            self._schedule.queue(np.array([[options["goal"]]]))
        self._goal, self._success = self._schedule.next_goal(0), False
        return np.asarray(self._task.reset(self._goal), np.float32), {"goal": self._goal}

    def step(
        self, action: Float32[np.ndarray, "action=4"]
    ) -> tuple[Float32[np.ndarray, "observation=39"], float, bool, bool, dict[str, Any]]:
        observation, reward, success, truncated = self._task.step(np.asarray(action, np.float32))
        self._success |= success
        infos = {"success": self._success, "is_success": self._success, "goal": self._goal}
        return np.asarray(observation, np.float32), reward, False, truncated, infos

    def render(self) -> UInt8[np.ndarray, "height width rgb=3"] | None:
        """A picture, or None without `render_mode`.

        Raises:
            ValueError: there is no such camera.
            DependencyNotInstalled: there is no graphics library to draw with.
        """
        if self.render_mode is None:
            return None
        self._renderer = self._renderer or TaskRenderer(self._task.simulator, *self._picture)
        return self._renderer.draw()

    def close(self) -> None:
        if self._renderer:
            self._renderer.close()
            self._renderer = None
        self._task.close()
