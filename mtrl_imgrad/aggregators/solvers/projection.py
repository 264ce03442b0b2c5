"""The point of the simplex nearest to a vector, by sorting (Held, Wolfe and Crowder 1974): batched, without a loop."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def project_onto_simplex(vector: Float[Tensor, "*batch tasks"]) -> Float[Tensor, "*batch tasks"]:
    """argmin over {w >= 0, sum w = 1} of ||w - v||: w = max(v - t, 0) for the right t.

    With v sorted downwards, t = (v_1 + ... + v_m - 1) / m for the largest m that leaves v_m > t.

    Args:
        vector: v; a NaN gives NaN, an entry of -inf among others 0.
    """
    # v and v + constant have the same projection; with the largest entry at 0 no digits are lost to a common offset.
    # Entries more than 1 below the largest are 0 in the projection.
    vector = (vector - vector.amax(-1, keepdim=True)).clamp_min(-2.0)
    ordered = vector.sort(-1, descending=True).values
    counts = torch.arange(1, vector.shape[-1] + 1, dtype=vector.dtype, device=vector.device)
    thresholds = (ordered.cumsum(-1) - 1.0) / counts
    last = ((ordered > thresholds).sum(-1, keepdim=True) - 1).clamp_min(0)  # with a NaN none exceeds
    return (vector - thresholds.gather(-1, last)).clamp_min(0.0)
