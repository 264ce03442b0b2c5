"""The smallest ridge that makes a Gramian numerically positive definite, without waiting for the device."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from mtrl_imgrad.aggregators.solvers.active_set import RIDGES


def smallest_ridge(
    matrix: Float[Tensor, "*batch tasks tasks"], diagonal: Float[Tensor, "*batch tasks"]
) -> Float[Tensor, "*batch"]:
    """The smallest delta of 1e-13, 1e-10, ..., 0.1 for which `matrix + delta diag(diagonal)` has a Cholesky factor; the
    last where none has."""
    ridges = torch.logspace(-13, -1, len(RIDGES), dtype=matrix.dtype, device=matrix.device)
    added = torch.diag_embed(ridges[:, None] * diagonal[..., None, :])
    failed = torch.linalg.cholesky_ex(matrix[..., None, :, :] + added).info != 0
    index = failed.int().cumprod(-1).sum(-1).clamp(max=len(RIDGES) - 1)
    # To index by a tensor without dimensions waits for the device; so does `take`, once a compiler decomposes it.
    return ridges.index_select(0, index.reshape(-1)).reshape(index.shape)
