"""The Gramian of the gradients at unit length, in which no tolerance depends on how unequal their norms are."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mtrl_imgrad.aggregators.solvers.ridges import smallest_ridge


class Correlations(NamedTuple):
    """M = diag(norms) C diag(norms)."""

    norms: Float[Tensor, "*batch tasks"]
    """||g_i||, 1 for inactive tasks."""

    matrix: Float[Tensor, "*batch tasks tasks"]
    """C + delta I, C the cosines between the gradients, with the smallest delta of 1e-13, 1e-10, ..., 0.1 that lets
    Cholesky succeed: 1e-13 for a float64 Gramian, more for those that rounding has made indefinite. An inactive task's
    row is that of the identity."""

    factor: Float[Tensor, "*batch tasks tasks"]
    """Its Cholesky factor."""

    ridge: Float[Tensor, "*batch"]
    """delta."""


def correlations(gramian: Float[Tensor, "*batch tasks tasks"], active: Bool[Tensor, "*batch tasks"]) -> Correlations:
    """Divides M by its tasks' norms."""
    norms = torch.where(active, gramian.diagonal(dim1=-2, dim2=-1), 1.0).sqrt()
    identity = torch.eye(gramian.shape[-1], dtype=gramian.dtype, device=gramian.device)
    matrix = gramian / (norms[..., :, None] * norms[..., None, :])
    matrix = torch.where(identity > 0, 1.0, matrix)  # exactly 1, and for inactive tasks too
    ridge = smallest_ridge(matrix, torch.ones_like(norms))
    matrix = matrix + ridge[..., None, None] * identity
    return Correlations(norms, matrix, torch.linalg.cholesky_ex(matrix).L, ridge)
