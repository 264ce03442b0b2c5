"""What a checkpoint holds is taken only where it is what this run would have saved.

A checksum says that a file is as it was written, not by whom: a checkpoint of another run, or one that was edited, may
be whole. These checks turn it down before it is used; each raises a ValueError that names the part.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor  # worker processes import this module, and need no torch


def check_like(found: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    """Compare names, shapes and types with those of the part that is to take the tensors.

    Raises:
        ValueError: they differ; the first tensor that does is named.
    """
    for name in sorted(own.keys() | found.keys()):
        if name not in found:
            raise ValueError(f"{name!r} is missing")
        if name not in own:
            raise ValueError(f"{name!r} belongs to no part of this run")
        its, must = ((tuple(x.shape), str(x.dtype).removeprefix("torch.")) for x in (found[name], own[name]))
        if its != must:
            raise ValueError(f"{name!r} is {its[1]} {list(its[0])} and must be {must[1]} {list(must[0])}")


def check_same(state: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Compare entries of a JSON object with those that a run would write.

    Raises:
        ValueError: they differ; the first that does is named.
    """
    for name, value in own.items():
        if entry(state, name, type(value)) != value:
            raise ValueError(f"{name!r} is {state[name]} and must be {value}")


def entry(state: Any, name: str, kind: type) -> Any:
    """One entry of a JSON object.

    Raises:
        ValueError: there is none, or it is of another type. A truth value is no whole number.
    """
    if not isinstance(state, dict) or name not in state:
        raise ValueError(f"{name!r} is missing")
    if type(state[name]) is not kind:
        raise ValueError(f"{name!r} is {type(state[name]).__name__} and must be {kind.__name__}")
    return state[name]


def count(state: Any, name: str, most: int = 2**53) -> int:
    """An entry that is a whole number from 0.

    Raises:
        ValueError: it is none, or is above `most`.
    """
    number: int = entry(state, name, int)
    if not 0 <= number <= most:
        raise ValueError(f"{name!r} is {number} and must be between 0 and {most}")
    return number


def rows_of(state: Any, name: str, rows: int, below: int) -> list[int]:
    """An entry that has a whole number from 0 for each row.

    Raises:
        ValueError: it is none, or one is not below `below`.
    """
    numbers: list[Any] = entry(state, name, list)
    if len(numbers) != rows or not are_indices(numbers, below):
        raise ValueError(f"{name!r} must be {rows} whole numbers from 0 to {below - 1}")
    return numbers


def are_indices(values: Any, below: int) -> bool:
    """Whether this is a list of whole numbers from 0, all below `below`."""
    return isinstance(values, list) and all(type(value) is int and 0 <= value < below for value in values)


def restore_stream(generator: np.random.Generator, state: Any) -> None:
    """Let a generator go on where another one of its kind was.

    Raises:
        ValueError: this is no state of such a generator.
    """
    try:
        generator.bit_generator.state = state
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
        raise ValueError(f"a random stream has no state of {type(generator.bit_generator).__name__}") from error
