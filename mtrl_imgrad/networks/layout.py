"""Where a network's parameters live: named views into one flat vector.

A network here is a function of a flat vector `[P]`: the parameters shared between tasks first, then those that belong
to one task. Adam, the target update, the norm clip, the select of a non-finite update and a checkpoint are then each
one operation on one tensor, and a target network is the same function with another vector.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Slot:
    """One named parameter: drawn uniformly from [center - spread, center + spread]."""

    name: str
    shape: tuple[int, ...]
    shared: bool
    spread: float
    center: float = 0.0

    @property
    def size(self) -> int:
        return math.prod(self.shape)


class Layout:
    """The places of a network's parameters in its vector, shared ones first.

    Attributes:
        size: number of parameters P.
        shared_size: number of parameters shared between tasks; they are `vector[:shared_size]`.
    """

    def __init__(self, slots: Iterable[Slot]) -> None:
        self.slots = sorted(slots, key=lambda slot: not slot.shared)  # stable: each group keeps its order
        self.size = sum(slot.size for slot in self.slots)
        self.shared_size = sum(slot.size for slot in self.slots if slot.shared)

    def views(self, vector: Float[Tensor, " parameters"]) -> dict[str, Tensor]:
        """Every parameter by name, as a view of `vector`."""
        parts = vector.split([slot.size for slot in self.slots])
        return {slot.name: part.view(slot.shape) for slot, part in zip(self.slots, parts, strict=True)}

    def initial(self, generator: torch.Generator) -> Float[Tensor, " parameters"]:
        """Fresh parameters, float32 on the CPU."""
        parts = [
            (torch.rand(slot.size, generator=generator) * 2 - 1) * slot.spread + slot.center for slot in self.slots
        ]
        return torch.cat(parts)
