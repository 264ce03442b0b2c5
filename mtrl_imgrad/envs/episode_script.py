"""How to come back into the middle of episodes: where they began, the actions since, and which rows started over."""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Float32

from mtrl_imgrad.saved_state import are_indices, entry


class EpisodeScript:
    """What a vector env whose rows begin and end their episodes together needs to restore any moment of them.

    The same start and the same actions give the same bits, so nothing has to be read out of the simulators: whoever
    restores resets the rows to the start and steps through the actions, which takes as long as it took to get there
    without a policy and without updates. Rows that had to start over do so again, whether or not what made them do so
    repeats itself.
    """

    def __init__(self) -> None:
        self.start: dict[str, Any] | None = None
        self.actions: list[Float32[np.ndarray, "rows entries"]] = []
        self.restarts: list[tuple[int, list[int]]] = []

    def begin(self, start: dict[str, Any]) -> None:
        """New episodes have begun from this state."""
        self.start, self.actions, self.restarts = start, [], []

    def add(self, actions: Float32[np.ndarray, "rows entries"]) -> None:
        """The rows are stepped with these actions."""
        self.actions.append(actions.copy())

    def restart(self, rows: list[int]) -> None:
        """These rows have started over after the last actions. What they did does not matter; it may not have been
        finite."""
        self.actions[-1][rows] = 0.0
        self.restarts.append((len(self.actions) - 1, rows))

    def state_dict(self) -> dict[str, Any]:
        """As JSON keeps it exactly: actions as the hexadecimal digits of their little-endian float32."""
        actions = [actions.astype("<f4").tobytes().hex() for actions in self.actions]
        return {"start": self.start, "actions": actions, "restarts": [list(restart) for restart in self.restarts]}


def steps_of(state: dict[str, Any], rows: int) -> list[tuple[Float32[np.ndarray, "rows entries"], list[int]]]:
    """The steps of a `state_dict` in their order: actions, and the rows that started over after them.

    Raises:
        ValueError: they are not what `state_dict` gives.
    """
    try:
        found = [np.frombuffer(bytes.fromhex(text), "<f4").reshape(rows, -1) for text in entry(state, "actions", list)]
    except TypeError as error:
        raise ValueError("'actions' must be texts") from error
    if not all(np.isfinite(actions).all() for actions in found):
        raise ValueError("'actions' must be finite")
    return list(zip(found, _restarts_of(state, rows, len(found)), strict=True))


def _restarts_of(state: dict[str, Any], rows: int, steps: int) -> list[list[int]]:
    """For each step, the rows that started over after it."""
    after: list[list[int]] = [[] for _ in range(steps)]
    for restart in entry(state, "restarts", list):
        if not (isinstance(restart, list) and len(restart) == 2 and are_indices(restart[:1], steps)):
            raise ValueError(f"'restarts' must each have one of the {steps} steps and a list of rows")
        if not are_indices(restart[1], rows):
            raise ValueError(f"'restarts' must have rows from 0 to {rows - 1}")
        after[restart[0]] = restart[1]
    return after
