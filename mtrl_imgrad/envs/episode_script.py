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
        """These rows have started over after the last actions."""
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
    restarts: dict[int, list[int]] = {}
    for restart in entry(state, "restarts", list):
        after, which = restart if isinstance(restart, list) and len(restart) == 2 else (-1, [])
        if not are_indices([after], len(found)) or not are_indices(which, rows):
            raise ValueError("'restarts' must be pairs of an index of the actions and a list of rows")
        restarts[after] = which
    return [(actions, restarts.get(index, [])) for index, actions in enumerate(found)]
