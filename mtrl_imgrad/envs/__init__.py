"""Meta-World's multi-task environments: task names, goals, and the vector env that training and evaluation step."""

from __future__ import annotations

from mtrl_imgrad.envs import tasks as _tasks
from mtrl_imgrad.envs.goal_schedule import GoalSchedule, Seeding
from mtrl_imgrad.envs.goals import GOALS_PER_TASK, Goals, make_goals
from mtrl_imgrad.envs.registration import MetaworldTaskEnv, make_vector_env, register_environments
from mtrl_imgrad.envs.task_env import RewardVersion, TaskEnv
from mtrl_imgrad.envs.tasks import expand_tasks, task_sets
from mtrl_imgrad.envs.vector import MetaworldVectorEnv

MT10: tuple[str, ...]
MT25: tuple[str, ...]
MT50: tuple[str, ...]

__all__ = [
    "GOALS_PER_TASK",
    "MT10",
    "MT25",
    "MT50",
    "GoalSchedule",
    "Goals",
    "MetaworldTaskEnv",
    "MetaworldVectorEnv",
    "RewardVersion",
    "Seeding",
    "TaskEnv",
    "expand_tasks",
    "make_goals",
    "make_vector_env",
    "task_sets",
]

register_environments()


def __getattr__(name: str) -> tuple[str, ...]:
    if name in ("MT10", "MT25", "MT50"):
        return getattr(_tasks, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
