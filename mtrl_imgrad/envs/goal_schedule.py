"""Which goal each row of a vector env plays next: the only random choice in an episode's start."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from gymnasium.utils import seeding as gymnasium_seeding
from jaxtyping import Int

from mtrl_imgrad.saved_state import are_indices, entry, restore_stream

Seeding = Literal["spawn", "metaworld"]


class GoalSchedule:
    """Draws goal indices uniformly and with replacement, a stream per row, and plays given sequences first.

    Rows are task-major: row `k * envs_per_task + e` is environment e of task k. `seeding` is the law of their streams:

    * `"spawn"`: row (k, e) draws from child e of child k of `numpy.random.SeedSequence(seed)`. No two rows share a
      stream, and a task's streams do not depend on how many tasks or environments there are beside it.
    * `"metaworld"`: every task draws from one seed, as `gymnasium.make_vec("Meta-World/MT10", seed=seed)` does, so all
      tasks go through the same sequence of indices. Meta-World has one environment per task; environment e of ours
      draws from seed + e.

    Args:
        seed: of the streams. A SeedSequence is read, not advanced, and only `"spawn"` takes one.

    Raises:
        ValueError: a SeedSequence with `"metaworld"`.
    """

    def __init__(
        self,
        num_tasks: int,
        envs_per_task: int,
        num_goals: int,
        seeding: Seeding,
        seed: int | np.random.SeedSequence,
    ) -> None:
        self._num_tasks = num_tasks
        self._envs_per_task = envs_per_task
        self._num_goals = num_goals
        self._seeding: Seeding = seeding
        self.clear_queue()
        self.reseed(seed)

    @property
    def num_rows(self) -> int:
        return self._num_tasks * self._envs_per_task

    def reseed(self, seed: int | np.random.SeedSequence) -> None:
        """Restart all streams."""
        if self._seeding == "metaworld":
            if isinstance(seed, np.random.SeedSequence):
                raise ValueError("seed: seeding='metaworld' takes an integer, not a SeedSequence")
            seeds = [int(seed) + env for env in range(self._envs_per_task)] * self._num_tasks
            self._generators = [gymnasium_seeding.np_random(row_seed)[0] for row_seed in seeds]
            return
        if isinstance(seed, np.random.SeedSequence):
            # A copy, so that the caller's sequence has the same children afterwards.
            root = np.random.SeedSequence(seed.entropy, spawn_key=seed.spawn_key, pool_size=seed.pool_size)
        else:
            root = np.random.SeedSequence(seed)
        streams = [row for task in root.spawn(self._num_tasks) for row in task.spawn(self._envs_per_task)]
        self._generators = [np.random.default_rng(stream) for stream in streams]

    def queue(self, goals: Int[np.ndarray, "rows episodes"]) -> None:
        """Let each row play these goals next, in order, in place of any still queued; afterwards it draws again.

        Raises:
            ValueError: not an integer array `[rows, n >= 1]`, or an index out of range.
        """
        goals = np.asarray(goals)
        if goals.ndim != 2 or goals.shape[0] != self.num_rows or goals.shape[1] < 1 or goals.dtype.kind not in "iu":
            raise ValueError(f"goals: {goals.dtype} {goals.shape} is not an integer array [{self.num_rows}, n >= 1]")
        if goals.min() < 0 or goals.max() >= self._num_goals:
            raise ValueError(f"goals: {goals.min()} to {goals.max()} is not within 0 to {self._num_goals - 1}")
        self._queues: list[list[int]] = goals.tolist()

    def clear_queue(self) -> None:
        self._queues = [[] for _ in range(self.num_rows)]

    def next_goal(self, row: int) -> int:
        """The goal of the row's next episode. A queued one takes nothing from the row's stream."""
        if self._queues[row]:
            return self._queues[row].pop(0)
        # `choice`, not `integers`: the same call as Meta-World's RandomTaskSelectWrapper, hence the same numbers.
        return int(self._generators[row].choice(self._num_goals))

    def state_dict(self) -> dict[str, Any]:
        """Integers, lists and strings, which JSON keeps exactly."""
        return {
            "generators": [generator.bit_generator.state for generator in self._generators],
            "queues": [list(queue) for queue in self._queues],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where the schedule was whose `state_dict` this is.

        Raises:
            ValueError: it is that of other rows or goals, or none.
        """
        generators, queues = (entry(state, name, list) for name in ("generators", "queues"))
        if len(generators) != self.num_rows or len(queues) != self.num_rows:
            raise ValueError(
                f"{len(generators)} streams and {len(queues)} queues are not those of {self.num_rows} rows"
            )
        if not all(are_indices(queue, self._num_goals) for queue in queues):
            raise ValueError(f"'queues' must be lists of whole numbers from 0 to {self._num_goals - 1}")
        for generator, generator_state in zip(self._generators, generators, strict=True):
            restore_stream(generator, generator_state)
        self._queues = [list(queue) for queue in queues]
