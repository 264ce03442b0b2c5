"""Rows that cost nothing and rows that go wrong, for workers; a module of its own, because workers import it."""

from __future__ import annotations

import os
import signal
import time

import numpy as np

from mtrl_imgrad.envs.chunk import RowSettings
from mtrl_imgrad.envs.goals import Goals
from mtrl_imgrad.envs.worker_pool import HANG_SECONDS

WRONG_STEP = 3
"""The step in which something goes wrong."""


class ZeroCostRow:
    """Observation: goal, steps taken, process id, zeros. Reward: the action's first entry."""

    def __init__(self, settings: RowSettings) -> None:
        self.horizon, self.steps = settings.horizon, 0
        self.observation = np.zeros(39)
        self.unstable = False

    def reset(self, goal):
        self.steps = 0
        self.observation = np.zeros(39)
        self.observation[:3] = goal, 0, os.getpid()
        return self.observation

    def restart(self, goal):
        return self.reset(goal)

    def step(self, action):
        self.steps += 1
        self.observation[1] = self.steps
        return self.observation, float(action[0]), self.steps == WRONG_STEP, self.steps == self.horizon

    def close(self):
        pass


class ZeroCost:
    """Makes them; what is derived from it decides what happens in `WRONG_STEP` of the task push-v3."""

    def __init__(self):
        self.warnings: list[str] = []

    def fast_task(self, task, goals, settings):
        return None

    def row(self, task: str, goals: Goals, settings: RowSettings):
        row = ZeroCostRow(settings)
        if task == "push-v3":
            step = row.step

            def go_wrong(action):
                if row.steps == WRONG_STEP - 1:
                    self.go_wrong()
                return step(action)

            row.step = go_wrong
        return row

    def go_wrong(self):
        pass


class Dying(ZeroCost):
    def go_wrong(self):
        os.kill(os.getpid(), signal.SIGKILL)


class Leaving(ZeroCost):
    def go_wrong(self):
        os._exit(3)


class Hanging(ZeroCost):
    def go_wrong(self):
        time.sleep(3600)


class Failing(ZeroCost):
    def go_wrong(self):
        raise ArithmeticError("the simulator\nhas exploded")


class Spoiling(ZeroCost):
    """In that step, the reward or an entry of the observation is what is given, or the simulation is unstable."""

    def __init__(self, what: str, value: float = 0.0):
        super().__init__()
        self.what, self.value = what, value

    def row(self, task: str, goals: Goals, settings: RowSettings):
        row = super().row(task, goals, settings)
        step = row.step
        if task != "push-v3":
            return row

        def spoiled(action):
            observation, reward, success, over = step(action)
            wrong = row.steps == WRONG_STEP
            row.unstable = wrong and self.what == "simulation"
            if wrong and self.what == "observation":
                observation = np.append(observation[:-1], self.value)
            return observation, self.value if wrong and self.what == "reward" else reward, success, over

        row.step = spoiled
        return row


class NeverMade(ZeroCost):
    def row(self, task, goals, settings):
        raise LookupError(f"no model for {task}")


class SlowlyMade(ZeroCost):
    def row(self, task, goals, settings):
        if task == "push-v3":
            time.sleep(HANG_SECONDS + 2)
        return super().row(task, goals, settings)


class Warning_(ZeroCost):  # noqa: N801  (`Warning` is Python's)
    def row(self, task, goals, settings):
        self.warnings.append(f"{task}: differs")
        return super().row(task, goals, settings)
