"""The arrays through which a vector env and the processes that step its rows talk to each other."""

from __future__ import annotations

import mmap
import os
import tempfile
from dataclasses import dataclass, fields

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int64

_LAYOUT: dict[str, tuple[type, tuple[int, ...]]] = {
    "actions": (np.float32, (4,)),
    "next_goals": (np.int64, ()),
    "observations": (np.float32, (39,)),
    "first_observations": (np.float32, (39,)),
    "rewards": (np.float64, ()),
    "successes": (np.bool_, ()),
    "unstable": (np.bool_, ()),
}
_ALIGNMENT = 64


@dataclass(frozen=True, eq=False)
class Block:
    """One entry per row, except where said otherwise.

    Attributes:
        actions: what to do next.
        next_goals: index of the goal to start with, at a reset, a restart or after a step; -1 where the episode
            goes on.
        observations: what the step led to.
        first_observations: of the episode that a reset began; not touched where there was none.
        rewards: of the step.
        successes: whether the step succeeded.
        unstable: whether MuJoCo reset the simulation during the step, so that nothing of it is worth anything.
        progress: per worker, how many rows it has stepped or made. It stands still in a process that hangs.
    """

    actions: Float32[np.ndarray, "rows 4"]
    next_goals: Int64[np.ndarray, " rows"]
    observations: Float32[np.ndarray, "rows 39"]
    first_observations: Float32[np.ndarray, "rows 39"]
    rewards: Float64[np.ndarray, " rows"]
    successes: Bool[np.ndarray, " rows"]
    unstable: Bool[np.ndarray, " rows"]
    progress: Int64[np.ndarray, " workers"]


def _bytes_of(rows: int, workers: int) -> dict[str, tuple[int, np.dtype, tuple[int, ...]]]:
    """First byte, dtype and shape of each array."""
    first, places = 0, {}
    for field in fields(Block):
        kind, entry = _LAYOUT.get(field.name, (np.int64, ()))
        shape = (workers if field.name == "progress" else rows, *entry)
        places[field.name] = first, np.dtype(kind), shape
        size = np.dtype(kind).itemsize * int(np.prod(shape))
        first += -(-size // _ALIGNMENT) * _ALIGNMENT
    places["end"] = first, np.dtype(np.uint8), ()
    return places


def allocate(rows: int, workers: int) -> int:
    """A file descriptor of zeroed memory that processes can map. It has no name in any file system: the kernel frees it
    with the last process that maps it, however that one ends."""
    size = _bytes_of(rows, workers)["end"][0]
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("mtrl_imgrad")
    else:
        with tempfile.TemporaryFile() as file:
            descriptor = os.dup(file.fileno())
    os.ftruncate(descriptor, size)
    return descriptor


def attach(descriptor: int, rows: int, workers: int) -> Block:
    """Map the memory of `allocate`, in any process. The descriptor may be closed afterwards."""
    places = _bytes_of(rows, workers)
    size = places.pop("end")[0]
    memory = mmap.mmap(descriptor, size)
    return Block(**{name: np.ndarray(shape, kind, memory, first) for name, (first, kind, shape) in places.items()})


def private(rows: int) -> Block:
    """The same arrays in this process alone."""
    places = _bytes_of(rows, 1)
    places.pop("end")
    return Block(**{name: np.zeros(shape, kind) for name, (_, kind, shape) in places.items()})
