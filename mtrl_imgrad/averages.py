"""Means of what updates report, kept on the training device so that no update waits for the host."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from mtrl_imgrad.saved_state import check_like


class Averages:
    """Means over the updates since the last `pop`, of numbers, vectors and matrices by tag."""

    def __init__(self) -> None:
        self.count = 0
        self.tags: list[list[str]] = []
        self.sums: list[Tensor] = []
        """Float64, one for each number of dimensions, the highest first: all its tags stacked, which makes one
        addition of them."""

    def add(self, values: dict[str, Tensor]) -> None:
        """Take what one update reports; every call has the same tags and shapes."""
        stacked = self._stack(values)
        self.sums = [total + new for total, new in zip(self.sums, stacked, strict=True)] if self.sums else stacked
        self.count += 1

    def pop(self) -> dict[str, Tensor]:
        """Tag -> mean, float64 on the CPU; nothing where there was no update. Then starts anew."""
        means = self._by_tag((total / self.count).cpu() for total in self.sums)
        self.count, self.sums = 0, []
        return means

    def _stack(self, values: dict[str, Tensor]) -> list[Tensor]:
        groups = [sorted(tag for tag, value in values.items() if value.ndim == ndim) for ndim in (2, 1, 0)]
        self.tags = [tags for tags in groups if tags]
        return [torch.stack([values[tag] for tag in tags]).double() for tags in self.tags]

    def _by_tag(self, tensors: Iterable[Tensor]) -> dict[str, Tensor]:
        pairs = zip(self.tags, tensors, strict=False)  # without tensors before the first update
        return {tag: row for tags, rows in pairs for tag, row in zip(tags, rows, strict=True)}

    def state_dict(self) -> dict[str, Tensor]:
        return {tag: row.clone() for tag, row in self._by_tag(self.sums).items()} | {"count": torch.tensor(self.count)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take back what `state_dict` gave.

        Raises:
            ValueError: it did not give this. (Which tags there are only the next update knows.)
        """
        check_like({"count": state["count"]} if "count" in state else {}, {"count": torch.tensor(self.count)})
        sums = {tag: value for tag, value in state.items() if tag != "count"}
        sizes = {size for value in sums.values() for size in value.shape}
        if len(sizes) > 1 or any(value.ndim > 2 or value.dtype != torch.float64 for value in sums.values()):
            raise ValueError("sums must be float64, and have the number of tasks on all of at most 2 axes")
        number = int(state["count"])
        if number < 0 or (number == 0) != (not sums):
            raise ValueError(f"'count' is {number} with sums of {len(sums)} tags")
        self.count = number
        self.sums = self._stack(sums)


def by_task(means: dict[str, Tensor], tasks: Sequence[str]) -> dict[str, float]:
    """Tag -> number: a vector `[K]` becomes `<tag>/<task>` and, under its own tag, the mean over tasks."""
    numbers: dict[str, float] = {}
    for tag, values in means.items():
        if values.ndim:
            numbers |= {f"{tag}/{task}": value for task, value in zip(tasks, values.tolist(), strict=True)}
        numbers[tag] = float(np.mean(values.tolist()))
    return numbers
