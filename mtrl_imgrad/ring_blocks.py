"""A replay's rings in blocks of slots, so that a checkpoint writes only what has changed since the one before.

A block's name tells where it begins and how many slots had been written, over all laps, when it changed last:
`replay-0000012000-000000512000`. Within one training run the name therefore tells the content.

Most next observations are the observation of the following slot; a block stores only those that are not, bit for bit:
at the ends of episodes, and at its own end. That halves a checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial

import torch
from torch import Tensor

from mtrl_imgrad.checkpoint import Parts, Tensors
from mtrl_imgrad.saved_state import check_like

BLOCK_BYTES = 16 * 2**20
"""What a block takes in memory, about. The one that is being filled is written again by every checkpoint."""


def blocks(prefix: str, rings: Mapping[str, Tensor], written: int) -> Parts:
    """The filled blocks of rings, by name.

    Args:
        prefix: begins the names.
        rings: tensors with the same slots as leading axis; `observations` and `next_observations`, float32, among them.
        written: slots written so far, over all laps.
    """
    length = len(rings["observations"])
    slot_bytes = sum(ring[0].nbytes for ring in rings.values())
    size = max(1, BLOCK_BYTES // slot_bytes)
    filled = min(written, length)
    spans = [(start, min(start + size, filled)) for start in range(0, filled, size)]
    return {
        f"{prefix}-{start:010d}-{changed(start, stop, written, length):012d}": partial(packed, rings, start, stop)
        for start, stop in spans
    }


def changed(start: int, stop: int, written: int, length: int) -> int:
    """Slots written, over all laps, when one of the filled slots from `start` to `stop` was last written."""
    lap, newest = divmod(written - 1, length)
    if newest >= start:
        return lap * length + min(newest + 1, stop)
    return (lap - 1) * length + stop


def fill(rings: Mapping[str, Tensor], written: int, stored: Iterable[Tensors]) -> None:
    """Put blocks back into rings of the same shapes, one after another.

    Raises:
        ValueError: the shapes differ, or blocks are missing.
    """
    length = len(rings["observations"])
    expected = 0
    for block in stored:
        _check_block(block, rings)
        start, slots = int(block["start"]), len(block["observations"])
        if start != expected or start + slots > length:
            raise ValueError(f"replay: a block begins at {start}, where {expected} of {length} slots are filled.")
        for name, values in unpacked(block).items():
            rings[name][start : start + slots].copy_(values)
        expected += slots
    if expected != min(written, length):
        raise ValueError(f"replay: {expected} slots are stored, not {min(written, length)}.")


def _check_block(block: Tensors, rings: Mapping[str, Tensor]) -> None:
    if "other" not in block or "observations" not in block or not block["observations"].ndim:
        raise ValueError("replay: a block has no observations")
    slots, following = len(block["observations"]), rings["next_observations"]

    def like(ring: torch.Tensor, *shape: int) -> torch.Tensor:
        return ring.new_zeros(()).expand(shape)

    own = {name: like(ring, slots, *ring.shape[1:]) for name, ring in rings.items() if name != "next_observations"}
    own |= {"start": torch.tensor(0), "other": torch.zeros((), dtype=torch.bool).expand(slots, *following.shape[1:-1])}
    check_like({"other": block["other"]}, {"other": own["other"]})
    others = like(following, int(block["other"].sum()), following.shape[-1])
    check_like(block, own | {"other_next_observations": others})


def packed(rings: Mapping[str, Tensor], start: int, stop: int) -> Tensors:
    block = {name: ring[start:stop] for name, ring in rings.items()}
    following = block.pop("next_observations")
    same = (following[:-1].view(torch.int32) == block["observations"][1:].view(torch.int32)).all(-1)
    other = torch.cat([~same, torch.ones_like(following[:1, ..., 0], dtype=torch.bool)])
    return block | {"start": torch.tensor(start), "other": other, "other_next_observations": following[other]}


def unpacked(block: Tensors) -> Tensors:
    block = dict(block)
    following = block["observations"].roll(-1, 0)
    following[block.pop("other")] = block.pop("other_next_observations")
    del block["start"]
    return block | {"next_observations": following}
