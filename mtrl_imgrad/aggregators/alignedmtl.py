"""Aligned-MTL: the mean of the task gradients made orthogonal and equally long (Senushkin et al. 2023)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from mtrl_imgrad.aggregators.base import Aggregation, Aggregator, Given, check_choice
from mtrl_imgrad.aggregators.solvers import ROUTES, Route
from mtrl_imgrad.aggregators.solvers.eigen import symmetric_eigen

ScaleMode = Literal["min", "median", "rmse"]
SCALE_MODES: tuple[ScaleMode, ...] = ("min", "median", "rmse")


@dataclass(frozen=True)
class AlignedMTL(Aggregator):
    """d = J^T B 1/K with B = sqrt(s) M^(-1/2): the mean of the rows of B J, orthogonal and of length sqrt(s).

    M = V diag(l) V', and M^(-1/2) is taken over the eigenvalues above the tolerance K eps max l (the range of M, rank
    r), eps being how well M is known (`Given.rounding`). s is the smallest of these (paper), their median (the lower
    one for an even count) or their mean.

    Differences: the published code sums over the tasks, this is the mean. It cuts the matrices at the rank, which looks
    at the device; here eigenvalues outside the range get the factor 0.

    Hazards of the method: with the smallest eigenvalue the length of d is that of the weakest principal component, so
    nearly dependent gradients give tiny steps, of a relative error eps max l / min l; and the rank jumps where an
    eigenvalue crosses the tolerance.

    Values for MT10 and MT50: unknown. No state. Cost: one eigen-decomposition. Diagnostics: `condition` (largest over
    smallest eigenvalue of the range), `rank`.

    Identities: B M B = s times the projection onto the range of M; homogeneous of degree 1; K identical gradients g, or
    one, give g; an opposed equal pair gives 0.
    """

    scale_mode: ScaleMode = "min"
    """Common squared length of the aligned gradients: the smallest, median or mean eigenvalue of M."""

    solver: Route = "auto"
    """Where the eigen-decomposition is done: host (LAPACK), device (torch, no host copy), or auto (host for CPU
    tensors)."""

    paper: ClassVar[str] = "Senushkin et al. 2023, arXiv 2305.19000"

    def __post_init__(self) -> None:
        check_choice("AlignedMTL.scale_mode", self.scale_mode, SCALE_MODES)
        check_choice("AlignedMTL.solver", self.solver, ROUTES)

    def solve(self, given: Given) -> Aggregation:
        gramian = given.gramian
        num_tasks = gramian.shape[-1]
        values, vectors = symmetric_eigen(gramian, self.solver)
        largest = values[..., -1:]
        in_range = values > num_tasks * given.rounding * largest
        rank = in_range.sum(-1, keepdim=True)
        smallest = torch.where(in_range, values, torch.inf).amin(-1, keepdim=True)
        if self.scale_mode == "min":
            scale = smallest
        elif self.scale_mode == "median":
            scale = values.gather(-1, num_tasks - rank + (rank - 1) // 2)
        else:
            scale = torch.where(in_range, values, 0.0).sum(-1, keepdim=True) / rank
        factors = torch.where(in_range, (scale / torch.where(in_range, values, 1.0)).sqrt(), 0.0)
        weights = (vectors * (factors * vectors.mean(-2))[..., None, :]).sum(-1)
        condition = (largest / smallest).squeeze(-1)
        return Aggregation(weights, {"condition": condition, "rank": rank.squeeze(-1).to(torch.float64)})
