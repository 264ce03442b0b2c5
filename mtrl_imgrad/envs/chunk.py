"""The rows of a vector env that one process steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from jaxtyping import Float, Float32, UInt8

from mtrl_imgrad.envs.goals import Goals
from mtrl_imgrad.envs.shared_block import Block
from mtrl_imgrad.envs.task_env import RewardVersion, TaskEnv

if TYPE_CHECKING:
    from mtrl_imgrad.envs.fast_env import FastTask
    from mtrl_imgrad.envs.rendering import TaskRenderer


@dataclass(frozen=True)
class RowSettings:
    """How rows are made and stepped; `MetaworldVectorEnv` explains each of them."""

    horizon: int
    reward: RewardVersion
    action_repeat: int
    fast: bool
    self_check: bool


@dataclass(frozen=True)
class ChunkSpec:
    """Which rows: all environments of some tasks.

    Attributes:
        tasks: index and name of each.
        goals: the goals of these tasks.
        envs_per_task: rows of each task; row `k * envs_per_task + e` is environment e of task k.
        settings: of every row.
    """

    tasks: tuple[tuple[int, str], ...]
    goals: Goals
    envs_per_task: int
    settings: RowSettings


class Row(Protocol):
    """An environment that is stepped on its own; `TaskEnv` is one."""

    unstable: bool

    def reset(self, goal: int) -> Float[np.ndarray, "observation=39"]: ...

    def restart(self, goal: int) -> Float[np.ndarray, "observation=39"]: ...

    def step(
        self, action: Float32[np.ndarray, "action=4"]
    ) -> tuple[Float[np.ndarray, "observation=39"], float, bool, bool]: ...

    def close(self) -> None: ...


class RowMaker(Protocol):
    """Makes what a process steps, and keeps what its rows share."""

    warnings: list[str]

    def fast_task(self, task: str, goals: Goals, settings: RowSettings) -> FastTask | None: ...

    def row(self, task: str, goals: Goals, settings: RowSettings) -> Row: ...


class MetaworldRows:
    """Steps Meta-World.

    Attributes:
        warnings: why a task is stepped by the plain path though the fast one was asked for, a line per task.
    """

    def __init__(self) -> None:
        self.warnings: list[str] = []
        self._tasks: dict[str, tuple[Goals, FastTask]] = {}
        self._differs: dict[tuple[str, RewardVersion], bool] = {}

    def fast_task(self, task: str, goals: Goals, settings: RowSettings) -> FastTask | None:
        """What the fast rows of a task share; None where it is to be stepped by the plain path."""
        if not settings.fast:
            return None
        from mtrl_imgrad.envs.fast_env import FastTask
        from mtrl_imgrad.envs.self_check import difference

        known, shared = self._tasks.get(task, (goals, None))
        if shared is None or not np.array_equal(known.vectors[task], goals.vectors[task]):
            shared = FastTask(task, goals.metaworld_tasks(task))
            self._tasks[task] = goals, shared
        key = task, settings.reward
        if settings.self_check and key not in self._differs:
            vectors = goals.vectors[task]
            farthest = int(np.abs(vectors - vectors[0]).sum(1).argmax())
            found = difference(shared, task, settings.reward, farthest)
            self._differs[key] = found is not None
            if found is not None:
                self.warnings.append(f"{task}: {found}")
        return None if self._differs.get(key) else shared

    def row(self, task: str, goals: Goals, settings: RowSettings) -> Row:
        """A row that steps as Meta-World does."""
        return TaskEnv(
            task,
            goals.metaworld_tasks(task),
            horizon=settings.horizon,
            reward=settings.reward,
            action_repeat=settings.action_repeat,
        )


class Chunk:
    """Rows of a vector env in this process.

    Args:
        spec: which rows.
        maker: makes them.
        block: what they read and write, at their index.
        worker: which entry of `block.progress` is this process's.
        tick: called after the rows of each task are made, which takes long.
    """

    def __init__(
        self, spec: ChunkSpec, maker: RowMaker, block: Block, worker: int = 0, tick: Callable[[], None] = lambda: None
    ) -> None:
        self._block, self._worker = block, worker
        self._rows: list[tuple[int, Row]] = []
        self._renderers: dict[int, TaskRenderer] = {}
        fast: list[tuple[int, FastTask]] = []
        settings = spec.settings
        for index, task in spec.tasks:
            shared = maker.fast_task(task, spec.goals, settings)
            for row in range(index * spec.envs_per_task, (index + 1) * spec.envs_per_task):
                if shared:
                    fast.append((row, shared))
                else:
                    self._rows.append((row, maker.row(task, spec.goals, settings)))
            self._made_progress()
            tick()
        self._fast_indices = np.array([row for row, _ in fast], np.int64)
        self._fast: Any = None
        if fast:
            from mtrl_imgrad.envs.fast_rows import FastRows

            self._fast = FastRows(
                [shared for _, shared in fast],
                settings.reward,
                settings.horizon,
                settings.action_repeat,
                self._made_progress,
            )

    def reset(self) -> None:
        """Start an episode in every row that has a next goal in the block: in all rows or none."""
        goals, first_observations = self._block.next_goals.tolist(), self._block.first_observations
        for row, env in self._rows:
            if goals[row] >= 0:
                first_observations[row] = env.reset(goals[row])
                self._made_progress()
        for index, row in enumerate(self._fast_indices.tolist()):
            if goals[row] >= 0:
                first_observations[row] = self._fast.reset(index, goals[row])
                self._made_progress()

    def restart(self) -> None:
        """Start an episode, in what the others have left of the horizon, in those rows that have a next goal."""
        goals, first_observations = self._block.next_goals.tolist(), self._block.first_observations
        for row, env in self._rows:
            if goals[row] >= 0:
                first_observations[row] = env.restart(goals[row])
        for index, row in enumerate(self._fast_indices.tolist()):
            if goals[row] >= 0:
                first_observations[row] = self._fast.restart(index, goals[row])

    def step(self) -> None:
        """Take a decision in every row, with the actions in the block, and reset those rows that have a next goal."""
        block = self._block
        if self._fast:
            rows = self._fast_indices
            observations, rewards, successes = self._fast.step(block.actions[rows])
            block.observations[rows], block.rewards[rows], block.successes[rows] = observations, rewards, successes
            block.unstable[rows] = self._fast.unstable
        for row, env in self._rows:
            block.observations[row], block.rewards[row], block.successes[row], _ = env.step(block.actions[row])
            block.unstable[row] = env.unstable
            self._made_progress()
        self.reset()

    def draw(self, row: int, camera: str, width: int, height: int) -> UInt8[np.ndarray, "height width rgb=3"]:
        """A picture of a row; see `TaskRenderer`."""
        from mtrl_imgrad.envs.rendering import TaskRenderer

        if row not in self._renderers:
            plain: Any = dict(self._rows).get(row)
            simulator = plain.simulator if plain else self._fast.simulator_of(self._fast_indices.tolist().index(row))
            self._renderers[row] = TaskRenderer(simulator, camera, width, height)
        return self._renderers[row].draw()

    def close(self) -> None:
        """Release the simulators."""
        for renderer in self._renderers.values():
            renderer.close()
        for _, env in self._rows:
            env.close()
        if self._fast:
            self._fast.close()
        self._renderers.clear()
        self._rows.clear()
        self._fast = None

    def _made_progress(self) -> None:
        self._block.progress[self._worker] += 1


def chunk_specs(
    dealt: Sequence[Sequence[str]], tasks: Sequence[str], goals: Goals, envs_per_task: int, settings: RowSettings
) -> list[ChunkSpec]:
    """The chunk of each worker, from the names of the tasks that it was dealt."""
    return [
        ChunkSpec(
            tuple((index, task) for index, task in enumerate(tasks) if task in names),
            Goals(goals.goal_seed, {task: goals.vectors[task] for task in tasks if task in names}),
            envs_per_task,
            settings,
        )
        for names in dealt
    ]
