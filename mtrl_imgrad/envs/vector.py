"""The vector env that training and evaluation step: every task of a run, several environments per task.

Rows are task-major: row `k * envs_per_task + e` is environment e of task k, so an array `[rows, ...]` reshapes to
`[tasks, envs, ...]`.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, TypeAlias, get_args

import gymnasium
import numpy as np
from gymnasium.spaces import Box
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from jaxtyping import Bool, Float32, Float64, UInt8

from mtrl_imgrad.envs import channel as messages
from mtrl_imgrad.envs.chunk import MetaworldRows, RowMaker, RowSettings, chunk_specs
from mtrl_imgrad.envs.dealing import deal, default_workers
from mtrl_imgrad.envs.episode_script import EpisodeScript, steps_of
from mtrl_imgrad.envs.goal_schedule import GoalSchedule, Seeding
from mtrl_imgrad.envs.goals import Goals
from mtrl_imgrad.envs.task_env import RewardVersion
from mtrl_imgrad.envs.worker_pool import LocalSection, ThisProcess, WorkerPool, WorkerSection
from mtrl_imgrad.saved_state import entry, rows_of

MAX_HORIZON = 500
"""Simulator steps after which Meta-World ends an episode itself (`max_path_length`)."""

SIMULATOR_STEPS_PER_SECOND = 80
"""Of simulated time."""

Observations: TypeAlias = Float32[np.ndarray, "rows 39"]
StepResult: TypeAlias = tuple[
    Observations,
    Float64[np.ndarray, "rows"],
    Bool[np.ndarray, "rows"],
    Bool[np.ndarray, "rows"],
    dict[str, Any],
]
"""Observations, rewards, terminated, truncated, infos."""


def check_arguments(
    horizon: int,
    reward: str,
    seeding: str,
    render_mode: str | None,
    **counts: int,
) -> None:
    """Raise the one-line ValueError of the first argument out of range. `counts` are at least 1."""
    for name, count in {"horizon": horizon, **counts}.items():
        if not isinstance(count, int | np.integer) or count < 1:
            raise ValueError(f"{name}: {count!r} is not a positive integer")
    if horizon > MAX_HORIZON:
        raise ValueError(f"horizon: {horizon} is not between 1 and {MAX_HORIZON} simulator steps")
    for name, value, allowed in (("reward", reward, RewardVersion), ("seeding", seeding, Seeding)):
        if value not in get_args(allowed):
            raise ValueError(f"{name}: {value!r} is not one of {', '.join(get_args(allowed))}")
    if render_mode not in (None, "rgb_array"):
        raise ValueError(f"render_mode: {render_mode!r} is not None or 'rgb_array'")


class MetaworldVectorEnv(VectorEnv):
    """Meta-World tasks with gymnasium's vector interface and same-step autoreset, in worker processes or in this one.

    The numbers do not depend on where and how fast the tasks are stepped: `workers` and `fast` change no bit of them.

    Observations are Meta-World's 39 numbers (18 now, the 18 of the step before, 3 for the goal) in float32, without a
    task one-hot. Meta-World's own bounds of them are wrong, so the space is unbounded. Rewards are float64.
    `terminated` is never true: Meta-World does not end an episode on success. `truncated` is true at the horizon; on
    that step the returned observation is the first of the next episode.

    A row is also truncated where its reward or observation is not finite, or where its simulation has become unstable
    and MuJoCo has therefore put it back to its initial state. Such a transition must not be learned from: its reward is
    NaN, or its reward or `final_obs` is what was not finite. The row starts over with the same goal, in what is left
    of the horizon: rows go on ending together, and no stream is drawn from. Other rows notice nothing.

    The infos of a step are arrays over the rows, present at every step and filled in every row:

    * `final_obs` float32 `[rows, 39]`: the observation that this step led to, before any autoreset, so the next
      observation of every transition. Where `_final_obs` (bool, equal to `truncated`) is true it is the episode's last
      one; elsewhere it is the returned one.
    * `success` bool: whether the episode this step belongs to has succeeded so far; on its last step, whether it
      succeeded.
    * `goal` int64: the index of that episode's goal.
    * `episode_return` float64, `episode_length` int64 (simulator steps): of that episode so far. Return and success are
      without a last step that must not be learned from.
    * `unstable` bool: whether the simulation has become unstable in this step.

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
        workers: processes that step the tasks, a share of them each; 0 steps in this process. None takes as many as
            there are cores and at most one per task, or 0 where there is one core.
        fast: leave out of Meta-World's step the Python that is not its reward (`fast_env`); False steps as it does.
        self_check: compare the fast way with Meta-World's own for some steps of each task. A task in which a bit
            differs is stepped by Meta-World's own way, and a RuntimeWarning names it.
        share: another env, whose workers, models and resets this one uses too, in place of `workers`. Its tasks must
            include these. Both may have a step under way at a time.
        maker: makes what is stepped. For tests; a class that workers can import.
        render_mode: "rgb_array" lets `render` draw pictures.
        camera: one of topview, corner, corner2, corner3, corner4, behindGripper, gripperPOV.
        width: of the pictures, in pixels.
        height: of the pictures, in pixels.

    Raises:
        ValueError: a task without goals, or an argument out of range.
        WorkerError: a worker process failed. So may every other method; there is nothing left to do then but `close`.
    """

    metadata: dict[str, Any] = {"autoreset_mode": AutoresetMode.SAME_STEP, "render_modes": ["rgb_array"]}  # noqa: RUF012

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
        workers: int | None = None,
        fast: bool = True,
        self_check: bool = True,
        share: MetaworldVectorEnv | None = None,
        maker: Callable[[], RowMaker] = MetaworldRows,
        render_mode: Literal["rgb_array"] | None = None,
        camera: str = "corner4",
        width: int = 480,
        height: int = 480,
    ) -> None:
        if missing := [task for task in tasks if task not in goals.tasks]:
            raise ValueError(f"goals: none for {', '.join(missing)}; given are those of {', '.join(goals.tasks)}")
        counts = {"envs_per_task": envs_per_task, "action_repeat": action_repeat, "width": width, "height": height}
        check_arguments(horizon, reward, seeding, render_mode, **counts)
        if not tasks or len(set(tasks)) < len(tasks):
            raise ValueError(f"tasks: {list(tasks)} is empty or has a task twice")
        if workers is not None and (not isinstance(workers, int | np.integer) or workers < 0):
            raise ValueError(f"workers: {workers!r} is not zero, a positive integer or None")
        if share and share.closed:
            raise ValueError("share: the other env is closed")
        if share and (missing := [task for task in tasks if task not in share.task_names]):
            raise ValueError(f"share: the other env has no {', '.join(missing)}")

        self.task_names = tuple(tasks)
        self.num_tasks = len(self.task_names)
        self.envs_per_task = envs_per_task
        self.num_envs = self.num_tasks * envs_per_task
        self.single_observation_space = Box(-np.inf, np.inf, (39,), np.float32)
        self.single_action_space = Box(-1.0, 1.0, (4,), np.float32)
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self.action_space = batch_space(self.single_action_space, self.num_envs)

        self._schedule = GoalSchedule(self.num_tasks, envs_per_task, goals.num_goals, seeding, seed)
        self.render_mode = render_mode
        self.metadata = self.metadata | {"render_fps": SIMULATOR_STEPS_PER_SECOND / action_repeat}
        self._picture = (camera, width, height)
        self._horizon, self._action_repeat, self._num_goals = horizon, action_repeat, goals.num_goals
        self._started = self._stepping = False
        self._goal = np.zeros(self.num_envs, np.int64)
        self._success = np.zeros(self.num_envs, np.bool_)
        self._episode_return = np.zeros(self.num_envs, np.float64)
        self._length = 0  # of the episodes of all rows, in simulator steps: they begin and end together
        self._begun = np.zeros(self.num_envs, np.int64)  # the length at which a row has started over
        self._to_restart: list[int] = []  # rows that start over after this step whatever it gives
        self._script = EpisodeScript()
        self._pool = share._pool if share else _make_pool(self.task_names, workers, maker)
        settings = RowSettings(horizon, reward, action_repeat, fast, self_check)
        specs = chunk_specs(self._pool.dealt, self.task_names, goals, envs_per_task, settings)
        self._section: WorkerSection | LocalSection = self._pool.open(specs, self.num_envs)
        self._block = self._section.block
        if self._section.warnings:
            warnings.warn(f"stepped by Meta-World's own code: {'; '.join(self._section.warnings)}", RuntimeWarning, 2)

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
        return self._start_all(self._next_goals())

    def step_async(self, actions: Float32[np.ndarray, "rows 4"]) -> None:
        """Hand over one action per row; `step_wait` returns what they lead to.

        Raises:
            ValueError: actions are not `[rows, 4]`.
            RuntimeError: before the first `reset`, or while a step is under way.
        """
        self._raise_if_closed()
        if not self._started:
            raise RuntimeError("call reset before the first step, and after one that was interrupted")
        if self._stepping:
            raise RuntimeError("a step is under way: call step_wait first")
        actions = np.asarray(actions, np.float32)
        if actions.shape != (self.num_envs, 4):
            raise ValueError(f"actions: shape {actions.shape} is not {(self.num_envs, 4)}")
        self._block.actions[:] = actions
        self._script.add(actions)
        self._length = min(self._length + self._action_repeat, self._horizon)
        # The horizon alone ends episodes, so it is known now whether the rows will need other goals.
        self._block.next_goals[:] = self._next_goals() if self._length == self._horizon else -1
        self._stepping = True
        with self._whole_or_reset():
            self._section.start(messages.STEP)

    def step_wait(self) -> StepResult:
        """Finish the step begun by `step_async`. The arrays returned are the caller's: no later step changes them.

        Raises:
            RuntimeError: no step is under way.
        """
        self._raise_if_closed()
        if not (self._started and self._stepping):
            raise RuntimeError("no step is under way: call step_async first, and reset after one that was interrupted")
        with self._whole_or_reset():
            self._section.wait()
        self._stepping = False
        ended = self._length == self._horizon
        final_obs, rewards = self._block.observations.copy(), self._block.rewards.copy()
        unstable = self._block.unstable.copy()
        broken = self._broken(rewards, final_obs, unstable)
        some_broken = broken.any()
        if some_broken:
            rewards[unstable] = np.nan
            self._success |= self._block.successes & ~broken
            self._episode_return += np.where(broken, 0.0, rewards)
        else:
            self._success |= self._block.successes
            self._episode_return += rewards
        truncated = broken | ended
        infos = {
            "final_obs": final_obs,
            "_final_obs": truncated.copy(),
            "success": self._success.copy(),
            "goal": self._goal.copy(),
            "episode_return": self._episode_return.copy(),
            "episode_length": self._length - self._begun,
            "unstable": unstable,
        }
        if ended:
            observations = self._begin_episodes()
        else:
            observations = final_obs.copy()
            if some_broken:
                observations[broken] = self._restart(broken)
        return observations, rewards, np.zeros(self.num_envs, np.bool_), truncated, infos

    def step(self, actions: Float32[np.ndarray, "rows 4"]) -> StepResult:
        """`step_async` and `step_wait` in one call."""
        self.step_async(actions)
        return self.step_wait()

    def state_dict(self) -> dict[str, Any]:
        """All that the rest of these episodes and those to come depend on, as integers, lists and strings, which JSON
        keeps exactly.

        Raises:
            RuntimeError: before the first `reset`, or while a step is under way.
        """
        if self._stepping or not self._started:
            raise RuntimeError("state_dict is valid after reset, and between two steps only")
        return {"tasks": list(self.task_names), "envs_per_task": self.envs_per_task} | self._script.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> tuple[Observations, dict[str, Any]]:
        """Go to the moment at which `state_dict` was taken: the rows are reset to where their episodes began and
        stepped with the same actions. Returns the observations of that moment, and the infos of `reset`.

        Raises:
            ValueError: the state is that of other tasks or of another number of environments, or none.
        """
        self._raise_if_closed()
        for name, own in (("tasks", list(self.task_names)), ("envs_per_task", self.envs_per_task)):
            if entry(state, name, type(own)) != own:
                raise ValueError(f"{name}: the state has {state[name]}, this env has {own}")
        start, script = entry(state, "start", dict), steps_of(state, self.num_envs)
        goals = rows_of(start, "goal", self.num_envs, self._num_goals)
        if len(script) * self._action_repeat >= self._horizon:
            raise ValueError(f"'actions' are {len(script)}, and an episode has {self._horizon} steps")
        self._schedule.load_state_dict(entry(start, "schedule", dict))
        observations, infos = self._start_all(goals)
        for actions, rows in script:
            self._to_restart = rows
            observations = self.step(actions)[0]
        self._to_restart = []
        return observations, infos

    def render(self) -> tuple[UInt8[np.ndarray, "height width rgb=3"], ...]:
        """A picture of every row. `render_row` draws a single one; both raise what it raises."""
        return tuple(self.render_row(row) for row in range(self.num_envs))

    def render_row(self, row: int) -> UInt8[np.ndarray, "height width rgb=3"]:
        """A picture of one row, row `k * envs_per_task + e`. A row drawn once keeps some 100 MB for it where the CPU
        draws.

        Raises:
            RuntimeError: the env was made without `render_mode`, or not yet reset.
            ValueError: there is no such row or camera.
            DependencyNotInstalled: there is no graphics library to draw with.
        """
        self._raise_if_closed()
        if self._stepping:
            raise RuntimeError("a step is under way: call step_wait before render")
        if self.render_mode is None:
            raise RuntimeError("render: make the env with render_mode='rgb_array' to draw it")
        if not self._started:
            raise RuntimeError("call reset before the first render")
        if not 0 <= row < self.num_envs:
            raise ValueError(f"row: {row} is not between 0 and {self.num_envs - 1}")
        return self._section.draw(self.task_names[row // self.envs_per_task], row, *self._picture)

    def close_extras(self, **kwargs: Any) -> None:
        """Release the simulators, and the workers that nobody else uses. Called by `close`."""
        if hasattr(self, "_section"):  # an env whose making failed may be closed, too
            self._section.close()
            del self._section, self._block  # the memory is freed with the last array that looks into it

    def _start_all(self, goals: Sequence[int]) -> tuple[Observations, dict[str, Any]]:
        if self._stepping:
            self._section.wait()
        self._started, self._stepping = True, False
        self._block.next_goals[:] = goals
        self._section.start(messages.RESET)
        self._section.wait()
        return self._begin_episodes(), {"goal": self._goal.copy()}

    def _next_goals(self) -> list[int]:
        return [self._schedule.next_goal(row) for row in range(self.num_envs)]

    def _begin_episodes(self) -> Observations:
        """The first observations of the episodes to which the rows were reset."""
        self._goal[:] = self._block.next_goals
        self._success.fill(False)
        self._episode_return.fill(0.0)
        self._length = 0
        self._begun.fill(0)
        self._script.begin({"goal": self._goal.tolist(), "schedule": self._schedule.state_dict()})
        return self._block.first_observations.copy()

    def _broken(
        self,
        rewards: Float64[np.ndarray, " rows"],
        observations: Observations,
        unstable: Bool[np.ndarray, " rows"],
    ) -> Bool[np.ndarray, " rows"]:
        """The rows that have to start over."""
        finite = np.isfinite(rewards).all() and np.isfinite(observations).all()
        if finite and not unstable.any() and not self._to_restart:  # on whole arrays, which costs microseconds
            return np.zeros(self.num_envs, np.bool_)
        broken = unstable | ~np.isfinite(rewards) | ~np.isfinite(observations).all(axis=1)
        broken[self._to_restart] = True
        return broken

    def _restart(self, rows: Bool[np.ndarray, " rows"]) -> Float32[np.ndarray, "broken 39"]:
        """Let these rows start over with their goals; their first observations."""
        self._block.next_goals[:] = np.where(rows, self._goal, -1)
        with self._whole_or_reset():
            self._section.start(messages.RESTART)
            self._section.wait()
        self._success[rows], self._episode_return[rows], self._begun[rows] = False, 0.0, self._length
        self._script.restart(np.flatnonzero(rows).tolist())
        return self._block.first_observations[rows]

    @contextlib.contextmanager
    def _whole_or_reset(self) -> Iterator[None]:
        """After a step that an exception such as a KeyboardInterrupt has cut short, only a reset helps: some rows may
        have been stepped."""
        try:
            yield
        except BaseException:
            self._started = False
            raise

    def _raise_if_closed(self) -> None:
        if self.closed:
            raise gymnasium.error.ClosedEnvironmentError("the vector env is closed")


def _make_pool(tasks: Sequence[str], workers: int | None, maker: Callable[[], RowMaker]) -> WorkerPool | ThisProcess:
    count = default_workers(len(tasks)) if workers is None else min(workers, len(tasks))
    return WorkerPool(deal(tasks, count), maker) if count else ThisProcess(tasks, maker)
