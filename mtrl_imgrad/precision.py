"""Number formats of matrix products, and whether the processor has them."""

from __future__ import annotations

import time

import torch

PRODUCT_DTYPES = {"auto": torch.float32, "float32": torch.float32, "bfloat16": torch.bfloat16}
"""What `Config.precision` stands for."""
SLOWER = 1.5
"""A product that takes so many times as long as in float32 is worth a warning. Processors with bfloat16 instructions
take about half of float32's time, those without up to 50 times."""


def slowdown(dtype: torch.dtype, rounds: int = 5) -> float:
    """How many times as long a product of a hidden layer's size takes on the CPU in a format as in float32: the
    quickest of some rounds that take turns, a few milliseconds together."""
    rows, weight = torch.ones(64, 256), torch.ones(256, 256)
    pairs = {each: (rows.to(each), weight.to(each)) for each in (torch.float32, dtype)}
    spent: dict[torch.dtype, list[float]] = {each: [] for each in pairs}
    for _ in range(rounds + 1):  # the first one prepares
        for each, (left, right) in pairs.items():
            started = time.perf_counter()
            torch.mm(left, right)
            spent[each].append(time.perf_counter() - started)
    return min(spent[dtype][1:]) / min(spent[torch.float32][1:])


def precision_warning(precision: str, device: torch.device) -> str | None:
    """In one line, that products in this precision are much slower than in float32 on this CPU; None where not."""
    dtype = PRODUCT_DTYPES[precision]
    if dtype == torch.float32 or device.type != "cpu" or (factor := slowdown(dtype)) <= SLOWER:
        return None
    return (
        f"warning: precision: a matrix product in {precision} takes {factor:.0f} times as long as in float32 on this "
        "processor, which seems to have no instructions for it; --precision float32 is faster here"
    )
