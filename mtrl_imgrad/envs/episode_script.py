"""How to come back into the middle of episodes: where they began, and the actions since."""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Float32

from mtrl_imgrad.saved_state import entry


class EpisodeScript:
    """What a vector env whose rows begin and end their episodes together needs to restore any moment of them.

    The same start and the same actions give the same bits, so nothing has to be read out of the simulators: whoever
    restores resets the rows to the start and steps through the actions, which takes as long as it took to get there
    without a policy and without updates.
    """

    def __init__(self) -> None:
        self.start: dict[str, Any] | None = None
        self.actions: list[Float32[np.ndarray, "rows entries"]] = []

    def begin(self, start: dict[str, Any]) -> None:
        """New episodes have begun from this state."""
        self.start, self.actions = start, []

    def add(self, actions: Float32[np.ndarray, "rows entries"]) -> None:
        """The rows are stepped with these actions."""
        self.actions.append(actions.copy())

    def state_dict(self) -> dict[str, Any]:
        """As JSON keeps it exactly: actions as the hexadecimal digits of their little-endian float32."""
        return {"start": self.start, "actions": [actions.astype("<f4").tobytes().hex() for actions in self.actions]}


def actions_of(state: dict[str, Any], rows: int) -> list[Float32[np.ndarray, "rows entries"]]:
    """The actions of a `state_dict`, in their order.

    Raises:
        ValueError: they are not what `state_dict` gives.
    """
    try:
        found = [np.frombuffer(bytes.fromhex(text), "<f4").reshape(rows, -1) for text in entry(state, "actions", list)]
    except TypeError as error:
        raise ValueError("'actions' must be texts") from error
    if not all(np.isfinite(actions).all() for actions in found):
        raise ValueError("'actions' must be finite")
    return found
