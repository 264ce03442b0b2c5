"""ConFIG: the direction at one angle to all task gradients (Liu et al. 2024)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from mtrl_imgrad.aggregators.base import Aggregation, Aggregator, Given, check_choice
from mtrl_imgrad.aggregators.solvers import ROUTES, Route
from mtrl_imgrad.aggregators.solvers.eigen import symmetric_eigen


@dataclass(frozen=True)
class ConFIG(Aggregator):
    """u = pinv(U) 1 / ||pinv(U) 1||, U the gradients divided by their norms; d = (1/K) sum_i <g_i, u> u (Eq. 2).

    For independent gradients all cos(g_i, u) are the same positive number. With C = U U^T the cosines, pinv(U) = U^T
    pinv(C), so M is enough: the coefficients on the unit gradients are a = pinv(C) 1, and ||pinv(U) 1||^2 = 1^T a.
    Eigenvalues of C below K eps of the largest count as 0, eps being how well M is known (`Given.rounding`); no
    direction is meant where the squared cosine between the ones and the range of C is below eps.

    Differences: the paper's length is the sum of the projections; this is their mean (mean scale). The published code
    and TorchJD take the pseudo-inverse of U itself, whose cut lies at K eps of a singular value, eps of an eigenvalue's
    root: they differ from this where gradients are dependent to between 1e-7 and 1e-14. Tasks without gradient are left
    out but for 1/K.

    Values for RL are unknown; there is nothing to choose. No state. Cost: one K x K eigendecomposition.

    Identities: homogeneous of degree 1; the direction of d does not change with the norms of the gradients; K identical
    gradients g give g; two gradients of one norm give the mean's direction; an opposed pair gives 0, as ones then lie
    outside the range of C.
    """

    solver: Route = "auto"
    """Where the eigen-decomposition is done: host (LAPACK), device (torch, no host copy), or auto (host for CPU
    tensors)."""

    paper: ClassVar[str] = "Liu et al. 2024, arXiv 2408.11104"

    def __post_init__(self) -> None:
        check_choice("ConFIG.solver", self.solver, ROUTES)

    def solve(self, given: Given) -> Aggregation:
        gramian, active = given.gramian, given.active.to(torch.float64)
        norms = gramian.diagonal(dim1=-2, dim2=-1).sqrt()
        inverse = active / torch.where(given.active, norms, 1.0)
        cosines = gramian * inverse[..., :, None] * inverse[..., None, :]
        values, vectors = symmetric_eigen(cosines, self.solver)
        inside = values > values.shape[-1] * given.rounding * values[..., -1:]
        ones = (vectors * active[..., :, None]).sum(-2) * inside
        coefficients = (vectors @ (ones / torch.where(inside, values, 1.0))[..., None]).squeeze(-1)
        squared = (ones * ones / torch.where(inside, values, 1.0)).sum(-1)
        # <u_i, pinv(U) 1> = (C a)_i, the projection of the ones onto the range of C.
        projected = (vectors @ ones[..., None]).squeeze(-1)
        length = (norms * projected).sum(-1) / values.shape[-1]
        valid = (ones * ones).sum(-1) > given.rounding * active.sum(-1)
        factor = torch.where(valid, length / torch.where(valid, squared, 1.0), 0.0)
        return Aggregation(factor[..., None] * coefficients * inverse)
