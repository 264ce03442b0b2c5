"""Transitions with a number that is not finite, or out of a simulation that became unstable: found before anything
stores or counts them, and told with the task.

A vector env may give such a transition at any time (`MetaworldVectorEnv` truncates the row's episode there and starts
it over). Under `sac.nan_policy: raise` the first one ends the run; under `skip` it is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Float32

from mtrl_imgrad.learner import NonFiniteError

LARGEST = float(np.finfo(np.float32).max)
"""Everything is stored as float32, so what is larger is infinite too."""


@dataclass(frozen=True)
class Fault:
    """One transition that is worth nothing.

    Attributes:
        task: name.
        environment: index among the task's environments.
        goal: index of the episode's goal.
        step: simulator steps of the episode, with this transition.
        what: was wrong with it.
    """

    task: str
    environment: int
    goal: int
    step: int
    what: str

    def __str__(self) -> str:
        return f"{self.task}, environment {self.environment}, goal {self.goal}, step {self.step}: {self.what}"


@dataclass(frozen=True)
class Transitions:
    """One vector step, as a vector env gave it; rows are task-major.

    Attributes:
        tasks: of the env, in its order.
        actions: that were taken.
        rewards: for them, as the env gave them.
        final_observations: that they led to, before any autoreset.
        infos: of the step: `goal`, `episode_length`, and `unstable` where the env knows of it.
    """

    tasks: Sequence[str]
    actions: Float[np.ndarray, "rows actions"]
    rewards: Float[np.ndarray, " rows"]
    final_observations: Float32[np.ndarray, "rows entries"]
    infos: dict[str, np.ndarray]

    def broken(self) -> Bool[np.ndarray, " rows"]:
        """Which of them are worth nothing."""
        if all_storable(self.actions, self.rewards, self.final_observations) and not self._unstable().any():
            return np.zeros(len(self.rewards), np.bool_)
        return ~(storable(self.rewards) & storable(self.actions) & storable(self.final_observations)) | self._unstable()

    def faults(self, broken: Bool[np.ndarray, " rows"]) -> list[Fault]:
        """What is wrong with those that are broken."""
        if not broken.any():
            return []
        environments = len(self.rewards) // len(self.tasks)
        found = []
        for row in np.flatnonzero(broken).tolist():
            task, environment = divmod(row, environments)
            goal, step = (int(self.infos[name][row]) for name in ("goal", "episode_length"))
            found.append(Fault(self.tasks[task], environment, goal, step, self._wrong_with(row)))
        return found

    def _unstable(self) -> Bool[np.ndarray, " rows"]:
        return self.infos.get("unstable", np.zeros(len(self.rewards), np.bool_))

    def _wrong_with(self, row: int) -> str:
        if not storable(self.actions[[row]])[0]:
            return "the policy's action is not finite"
        if self._unstable()[row]:
            return "MuJoCo's simulation became unstable"
        if not storable(self.final_observations[[row]])[0]:
            return "the observation is not finite"
        return f"the reward is {self.rewards[row]:g}"


def storable(values: Float[np.ndarray, "rows ..."]) -> Bool[np.ndarray, " rows"]:
    """In which rows all values are finite, in float32 too."""
    return np.logical_and.reduce(np.abs(values).reshape(len(values), -1) <= LARGEST, axis=1)


def all_storable(*arrays: Float[np.ndarray, "rows ..."]) -> bool:
    """Whether everything is: microseconds in each step, where `storable` takes some more."""
    return all(np.abs(values).max() <= LARGEST for values in arrays)


class Faults:
    """The transitions that one run left out.

    Args:
        policy: `sac.nan_policy`.
    """

    def __init__(self, policy: str) -> None:
        self.policy = policy
        self.count = 0
        """Since the run's start."""
        self._new: list[Fault] = []

    def take(self, faults: Sequence[Fault]) -> None:
        """Count them.

        Raises:
            NonFiniteError: there is one, and the policy is `raise`.
        """
        if faults and self.policy == "raise":
            raise NonFiniteError(f"{faults[0]}. sac.nan_policy skip would have left it out and gone on.")
        self.count += len(faults)
        self._new += faults

    def sift(
        self, transitions: Transitions, normalize: Callable[[Float[np.ndarray, " rows"]], Float[np.ndarray, " rows"]]
    ) -> tuple[Float[np.ndarray, " rows"], Bool[np.ndarray, " rows"]]:
        """Take those that are worth nothing before anything else sees them.

        Args:
            transitions: one vector step.
            normalize: of rewards; it is given NaN for what must stay out of its statistics.

        Returns:
            Rewards to store, 0 where nothing is to be stored, and where that is.

        Raises:
            NonFiniteError: there is one, and the policy is `raise`.
        """
        rewards = normalize(np.where(transitions.broken(), np.nan, transitions.rewards))
        broken = ~storable(rewards)
        self.take(transitions.faults(broken))
        return np.where(broken, 0.0, rewards), broken

    def told(self) -> str | None:
        """One line on those since the last call."""
        new, self._new = self._new, []
        return f"transitions left out: {len(new)} ({summary(new)})" if new else None


def summary(faults: Sequence[Fault]) -> str:
    """The first fault of each task, and how many more there are of it."""
    of_task: dict[str, list[Fault]] = {}
    for fault in faults:
        of_task.setdefault(fault.task, []).append(fault)
    more = {task: f" and {len(own) - 1} more of it" * (len(own) > 1) for task, own in of_task.items()}
    return "; ".join(f"{own[0]}{more[task]}" for task, own in of_task.items())


def require_finite(tasks: Sequence[str], observations: Float32[np.ndarray, "rows entries"]) -> None:
    """Make sure that there is something to act on; starting over is the environment's task.

    Raises:
        NonFiniteError: whatever the policy, since nothing of such an episode could be stored.
    """
    if not all_storable(observations):
        task, environment = divmod(int(np.argmin(storable(observations))), len(observations) // len(tasks))
        raise NonFiniteError(
            f"{tasks[task]}, environment {environment}: an episode begins or goes on with an observation that is not "
            "finite; nothing of it could be stored, whatever sac.nan_policy says."
        )
