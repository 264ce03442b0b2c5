"""Meta-World's own rows of which one blows up in MuJoCo; a module of its own, because workers import it."""

from __future__ import annotations

from typing import Any

import numpy as np

from mtrl_imgrad.envs.chunk import MetaworldRows, RowSettings
from mtrl_imgrad.envs.fast_env import FastTask
from mtrl_imgrad.envs.goals import Goals

TASK = "push-v3"
STEP = 4
"""The simulator step of the first environment of `TASK`, counted from its construction, that goes wrong."""

KINDS = ("position", "velocity", "force", "warm start")


def blow_up(data: Any, kind: str) -> None:
    """Put something into MuJoCo's data that the next step cannot integrate."""
    if kind == "position":
        data.qpos[3] = np.nan
    elif kind == "velocity":
        data.qvel[:] = 1e12
    elif kind == "force":
        data.xfrc_applied[:] = 1e300
    else:
        data.qacc_warmstart[:] = np.nan


def arm(env: Any, data: Any, kind: str) -> None:
    """Let a Meta-World env blow up: each of its steps ends with its reward, which is where this puts it."""
    evaluate_state, steps = env.evaluate_state, [0]

    def evaluate_and_blow_up(*arguments: Any) -> Any:
        result = evaluate_state(*arguments)
        steps[0] += 1
        if steps[0] == STEP - 1:
            blow_up(data, kind)
        return result

    env.evaluate_state = evaluate_and_blow_up


class Exploding(MetaworldRows):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.armed = kind, False

    def fast_task(self, task: str, goals: Goals, settings: RowSettings) -> FastTask | None:
        shared = super().fast_task(task, goals, settings)
        if shared and task == TASK:
            make = shared.make

            def make_armed(reward: Any) -> Any:
                env = make(reward)
                if not self.armed:
                    arm(env, env.simulation, self.kind)
                self.armed = True
                return env

            shared.make = make_armed
        return shared

    def row(self, task: str, goals: Goals, settings: RowSettings) -> Any:
        row: Any = super().row(task, goals, settings)
        if task == TASK and not self.armed:
            arm(row._env, row._env.data, self.kind)
            self.armed = True
        return row
