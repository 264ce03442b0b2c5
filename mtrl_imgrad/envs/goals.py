"""The goals of a run: for every task the positions that Meta-World draws at random and then keeps.

Meta-World draws 50 goals per task when a benchmark is constructed, from numpy's global generator, seeded once per
benchmark. So a task's goals depend on the seed *and on the tasks drawn before it*: with one seed, `drawer-open-v3` has
other goals in MT10 than in MT50 or MT1, while the first task of a set has the goals of MT1, and the ten tasks of MT10
have the same goals as in MT25, which starts with them. `make_goals` follows this for the three sets; in any other list
a task gets the goals of `metaworld.MT1(task)`.

A goal is one position or two, 3 or 6 numbers in metres: of the object, the target or both. Nothing else in a reset is
random.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float64

from mtrl_imgrad.envs.tasks import task_sets

if TYPE_CHECKING:
    from metaworld.types import Task

GOALS_PER_TASK = 50
"""Goals that Meta-World draws per task."""


@dataclass(frozen=True, eq=False)
class Goals:
    """The goals of every task of a run.

    Attributes:
        goal_seed: the seed they were drawn with.
        vectors: for each task, in task order, float64 `[goals, 3 or 6]`, in metres.
    """

    goal_seed: int
    vectors: Mapping[str, Float64[np.ndarray, "goals coordinates"]]

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(self.vectors)

    @property
    def num_goals(self) -> int:
        """Goals per task."""
        return len(next(iter(self.vectors.values())))

    def metaworld_tasks(self, task: str) -> list[Task]:
        """The task's goals as Meta-World's own objects, equal to those in `train_tasks`, for an env's `set_task`."""
        from metaworld import _MT_OVERRIDE, _encode_task
        from metaworld.env_dict import ALL_V3_ENVIRONMENTS

        env_class = ALL_V3_ENVIRONMENTS[task]
        rows = self.vectors[task]
        return [_encode_task(task, {"rand_vec": row, "env_cls": env_class} | _MT_OVERRIDE) for row in rows]

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers for a run folder. JSON keeps every float64 exactly."""
        return {"goal_seed": self.goal_seed, "goals": {task: rows.tolist() for task, rows in self.vectors.items()}}

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Goals:
        """The inverse of `to_dict`: nothing is drawn again.

        Raises:
            ValueError: this is not what `to_dict` gives.
        """
        goals = plain.get("goals")
        if not isinstance(goals, Mapping) or not goals or not isinstance(plain.get("goal_seed"), int):
            raise ValueError("goals: goals.json must have goal_seed, and under goals a list for every task.")
        vectors = {task: _rows(task, rows) for task, rows in goals.items()}
        if len({len(rows) for rows in vectors.values()}) > 1:
            raise ValueError("goals: goals.json must have as many goals for every task.")
        return cls(plain["goal_seed"], vectors)


def _rows(task: str, plain: Any) -> Float64[np.ndarray, "goals coordinates"]:
    try:
        rows: np.ndarray = np.array(plain, np.float64)
    except (TypeError, ValueError, OverflowError):
        rows = np.zeros(0)
    if rows.ndim != 2 or not len(rows) or rows.shape[1] not in (3, 6) or not np.isfinite(rows).all():
        raise ValueError(f"goals: those of {task!r} in goals.json must be lists of 3 or 6 finite numbers each.")
    return rows


def make_goals(tasks: Sequence[str], goal_seed: int, num_goals: int = GOALS_PER_TASK) -> Goals:
    """Draw the goals of `tasks` as Meta-World would.

    Exactly the tasks of MT10, MT25 or MT50, in their order, get the goals of `metaworld.MT10(seed=goal_seed)` and so
    on; every task of any other list gets those of `metaworld.MT1(task, seed=goal_seed)`. The state of numpy's global
    generator is left as it was.

    Args:
        tasks: task names, as `expand_tasks` returns them.
        goal_seed: 0 to 2**32 - 1.
        num_goals: how many of each task's 50 goals to keep, the first ones; 1 means one fixed goal.

    Raises:
        ValueError: `goal_seed` or `num_goals` is out of range.
    """
    if not 0 <= goal_seed < 2**32:
        raise ValueError(f"goal_seed: {goal_seed} is not between 0 and 2**32 - 1")
    if not 1 <= num_goals <= GOALS_PER_TASK:
        raise ValueError(f"num_goals: {num_goals} is not between 1 and {GOALS_PER_TASK}")
    drawn_together = [tuple(tasks)] if tuple(tasks) in task_sets().values() else [(task,) for task in tasks]
    vectors: dict[str, np.ndarray] = {}
    global_state = np.random.get_state()  # noqa: NPY002  (Meta-World draws from the global generator)
    try:
        for group in drawn_together:
            np.random.seed(goal_seed)  # noqa: NPY002
            vectors |= {task: _draw_goals(task) for task in group}
    finally:
        np.random.set_state(global_state)  # noqa: NPY002
    return Goals(goal_seed, {task: rows[:num_goals] for task, rows in vectors.items()})


def _draw_goals(task: str) -> Float64[np.ndarray, "goals coordinates"]:
    """Draw one task's goals from numpy's global generator, by resetting its env as `metaworld._make_tasks` does.

    No goal depends on the simulation. So the model is made without its meshes, whose compilation is nearly all of the
    time that making it takes, and the hand is moved to its start for one step instead of 50.
    """
    from metaworld.env_dict import ALL_V3_ENVIRONMENTS

    env_class = ALL_V3_ENVIRONMENTS[task]
    env = type(env_class.__name__, (env_class,), {"_initialize_simulation": _simulation_without_meshes})()
    env._reset_hand = partial(env_class._reset_hand, env, steps=1)
    env._freeze_rand_vec = False
    env._set_task_called = True
    rows = []
    for _ in range(GOALS_PER_TASK):
        env.reset()
        rows.append(env._last_rand_vec)
    env.close()
    return np.stack(rows)


def _simulation_without_meshes(env: Any) -> tuple[Any, Any]:
    """MuJoCo's model and data of an env, with a sphere in place of each mesh. Nothing in it touches anything."""
    mujoco: Any = import_module("mujoco")  # its names have no types
    spec = mujoco.MjSpec.from_file(env.fullpath)
    for geom in spec.geoms:
        if geom.type == mujoco.mjtGeom.mjGEOM_MESH:
            geom.type, geom.size, geom.meshname = mujoco.mjtGeom.mjGEOM_SPHERE, [0.01, 0.01, 0.01], ""
    for material in spec.materials:
        for index in range(len(material.textures)):
            material.textures[index] = ""
    for asset in (*spec.meshes, *spec.textures):
        asset.delete()
    # A body whose mass was that of its mesh needs some.
    spec.compiler.boundmass, spec.compiler.boundinertia = 1e-3, 1e-6
    spec.option.disableflags |= int(mujoco.mjtDisableBit.mjDSBL_CONTACT)
    model = spec.compile()
    return model, mujoco.MjData(model)
