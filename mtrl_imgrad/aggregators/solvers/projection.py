"""The nearest point of the simplex."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def project_onto_simplex(v: Float[Tensor, "*batch tasks"]) -> Float[Tensor, "*batch tasks"]:
    """argmin over w >= 0, sum w = 1 of ||w - v||, by one sort.

    It is max(v - t, 0) with t = (sum of the n largest - 1) / n for the largest n at which the n-th largest still
    exceeds t. An entry of -inf gets 0, if another is finite.
    """
    ordered = v.sort(dim=-1, descending=True).values
    counts = torch.arange(1, v.shape[-1] + 1, dtype=v.dtype, device=v.device)
    thresholds = (ordered.cumsum(-1) - 1) / counts
    last = ((ordered > thresholds).sum(-1, keepdim=True) - 1).clamp_min(0)  # with a NaN none exceeds: NaN comes out
    return (v - thresholds.gather(-1, last)).clamp_min(0.0)
