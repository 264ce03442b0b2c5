"""Names of Meta-World's tasks and of its multi-task sets.

`MT10`, `MT25` and `MT50` are tuples of task names in Meta-World's own order, read from metaworld's dictionaries when
first used: importing metaworld costs about a second, and a command's `--help` does not need it.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Sequence
from functools import cache

MT10: tuple[str, ...]
MT25: tuple[str, ...]
MT50: tuple[str, ...]


@cache
def task_sets() -> dict[str, tuple[str, ...]]:
    """The multi-task sets by name, each in Meta-World's order. MT50 is every task there is.

    Raises:
        ValueError: the environment variable MUJOCO_GL names a graphics library that MuJoCo cannot load.
    """
    try:
        from metaworld import env_dict
    except Exception as error:
        # MuJoCo loads the library that MUJOCO_GL names when it is imported, and fails in many ways where there is none.
        if library := os.environ.get("MUJOCO_GL"):
            raise ValueError(
                f"MUJOCO_GL: MuJoCo cannot load {library!r} ({type(error).__name__}: {error}); unset it or install "
                "the library, on Debian and Ubuntu libosmesa6 for osmesa or libegl1 and a GPU's driver for egl"
            ) from error
        raise

    return {"MT10": tuple(env_dict.MT10_V3), "MT25": tuple(env_dict.MT25_V3), "MT50": tuple(env_dict.MT50_V3)}


def __getattr__(name: str) -> tuple[str, ...]:
    if name in ("MT10", "MT25", "MT50"):
        return task_sets()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def expand_tasks(names: Sequence[str]) -> tuple[str, ...]:
    """Turn names of sets and of tasks into task names, in the order given.

    Args:
        names: each a set in any case (`"mt10"`) or a task (`"reach-v3"`).

    Raises:
        ValueError: no name, an unknown name (with the nearest known one), or a task named twice.
    """
    if isinstance(names, str):
        names = (names,)
    if not names:
        raise ValueError("tasks: none given; allowed are MT10, MT25, MT50 and the names of Meta-World's tasks")
    tasks: list[str] = []
    for name in names:
        expanded = task_sets().get(name.upper(), (name,))
        for task in expanded:
            if task not in task_sets()["MT50"]:
                raise ValueError(_unknown(name))
            if task in tasks:
                raise ValueError(f"tasks: {task!r} is given twice in {', '.join(names)}")
            tasks.append(task)
    return tuple(tasks)


def _unknown(name: str) -> str:
    known = {candidate.lower(): candidate for candidate in (*task_sets(), *task_sets()["MT50"])}
    nearest = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.4)
    hint = f"did you mean {known[nearest[0]]!r}?" if nearest else "a task is for example 'reach-v3'."
    return f"tasks: unknown name {name!r}; {hint} Allowed are MT10, MT25, MT50 and the names of Meta-World's 50 tasks"
