"""The eigenvalues and eigenvectors of symmetric matrices, without waiting for the device.

`torch.linalg.eigh` looks at its error code on the host, so on a GPU every update would wait for it. The device route is
Jacobi's method instead: half of all pairs of rows are disjoint, so K / 2 rotations at a time are one matrix product,
and K - 1 such rounds are a sweep. Convergence is quadratic at the end: 5 to 8 sweeps to rounding for
K <= 50, 11 where most eigenvalues are 0.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from mtrl_imgrad.aggregators.solvers.simplex import Route, takes_host

SWEEPS = 12


def symmetric_eigen(
    matrix: Float[Tensor, "*batch size size"], solver: Route = "auto"
) -> tuple[Float[Tensor, "*batch size"], Float[Tensor, "*batch size size"]]:
    """Eigenvalues in ascending order and the eigenvectors as columns.

    Args:
        matrix: symmetric, float64.
        solver: the route; `auto` takes the host (LAPACK) for plain CPU tensors outside of torch.compile.
    """
    if takes_host(matrix, solver):
        values, vectors = torch.linalg.eigh(matrix.cpu())
        return values.to(matrix.device), vectors.to(matrix.device)
    return jacobi(matrix)


def jacobi(
    matrix: Float[Tensor, "*batch size size"],
) -> tuple[Float[Tensor, "*batch size"], Float[Tensor, "*batch size size"]]:
    """Jacobi's method in round-robin order: rows i and i + n/2 meet, then all but the first move on by one place."""
    size = matrix.shape[-1]
    half = (size + 1) // 2
    matrix = torch.nn.functional.pad(matrix, (0, 2 * half - size, 0, 2 * half - size))
    vectors = torch.eye(2 * half, dtype=matrix.dtype, device=matrix.device).expand(matrix.shape)
    for _ in range(SWEEPS * (2 * half - 1)):
        diagonal = matrix.diagonal(dim1=-2, dim2=-1)
        product = matrix.diagonal(offset=half, dim1=-2, dim2=-1)
        meets = product.abs() > 1e-300
        ratio = (diagonal[..., half:] - diagonal[..., :half]) / (2.0 * torch.where(meets, product, 1.0))
        sign = torch.where(ratio < 0, -1.0, 1.0)
        tangent = torch.where(meets, sign / (ratio.abs() + torch.hypot(ratio, torch.ones_like(ratio))), 0.0)
        cosine = 1.0 / (1.0 + tangent.square()).sqrt()
        sine = torch.diag_embed(tangent * cosine)
        cosine = torch.diag_embed(cosine)
        top, bottom = torch.cat([cosine, -sine], dim=-2), torch.cat([sine, cosine], dim=-2)
        rotation = torch.cat(
            [top[..., :1], bottom[..., :1], top[..., 1:-1], bottom[..., 1:], top[..., max(half - 1, 1) :]], dim=-1
        )
        matrix = rotation.mT @ matrix @ rotation
        matrix = (matrix + matrix.mT) / 2
        vectors = vectors @ rotation
    # A sweep brings every row back to its place, so the padding is the last one again.
    values, order = matrix.diagonal(dim1=-2, dim2=-1)[..., :size].sort(dim=-1)
    return values, vectors[..., :size, :size].take_along_dim(order[..., None, :], dim=-1)
