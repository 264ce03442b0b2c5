"""Streams of numpy's and torch's global generators, from which stable-baselines3 draws, one for each model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from mtrl_imgrad.saved_state import check_like


class GlobalStreams:
    """The states of the global generators that belong to one model.

    Within `with streams.lent():` the global generators go on where this model left them; outside they are the program's
    own. So models that learn in turn do not change each other's numbers, and neither do evaluations.

    Args:
        seed: of these streams.
        device: whose generator belongs to them too, where it is a GPU.
    """

    def __init__(self, seed: int, device: torch.device) -> None:
        self.device = device
        outside = self._read()
        np.random.seed(seed)  # noqa: NPY002
        torch.manual_seed(seed)
        self.state = self._read()
        self._write(outside)

    @contextmanager
    def lent(self) -> Iterator[None]:
        """Let the global generators be this model's."""
        outside = self._read()
        self._write(self.state)
        try:
            yield
        finally:
            self.state = self._read()
            self._write(outside)

    def state_dict(self) -> dict[str, Tensor]:
        return dict(self.state)

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take back what `state_dict` gave.

        Raises:
            ValueError: it did not give this.
        """
        new, own = {name: value.cpu() for name, value in state.items()}, self.state
        check_like(new, own)
        try:
            self.state = new
            with self.lent():
                pass
        except (RuntimeError, TypeError, ValueError) as error:
            self.state = own
            raise ValueError(f"random streams have no state of theirs: {' '.join(str(error).split())}") from error

    def _read(self) -> dict[str, Tensor]:
        of_numpy = np.random.get_state(legacy=False)  # noqa: NPY002
        state = {
            "torch": torch.get_rng_state(),
            "numpy_key": torch.from_numpy(of_numpy["state"]["key"].astype(np.int64)),
            "numpy_position": torch.tensor([of_numpy["state"]["pos"], of_numpy["has_gauss"]]),
            "numpy_gauss": torch.tensor(of_numpy["gauss"], dtype=torch.float64),
        }
        return state | ({"cuda": torch.cuda.get_rng_state(self.device)} if self.device.type == "cuda" else {})

    def _write(self, state: dict[str, Tensor]) -> None:
        torch.set_rng_state(state["torch"])
        position, has_gauss = state["numpy_position"].tolist()
        key = state["numpy_key"].numpy().astype(np.uint32)
        np.random.set_state(("MT19937", key, position, has_gauss, float(state["numpy_gauss"])))  # noqa: NPY002
        if "cuda" in state and self.device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda"], self.device)
