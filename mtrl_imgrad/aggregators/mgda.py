"""MGDA: the shortest vector in the convex hull of the task gradients (Desideri 2012; Sener and Koltun 2018, Eq. 3)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mtrl_imgrad.aggregators.base import Aggregation, Aggregator, Given, check_choice
from mtrl_imgrad.aggregators.cagrad import mean_gradient
from mtrl_imgrad.aggregators.solvers import ROUTES, Route, SimplexSolution, minimise_on_simplex
from mtrl_imgrad.aggregators.solvers.active_set import NEAR_ZERO


def shortest_combination(
    gramian: Float[Tensor, "*batch tasks tasks"], active: Bool[Tensor, "*batch tasks"], solver: Route
) -> SimplexSolution:
    """min over w in the simplex of ||J^T w||^2 / 2."""
    zero = torch.zeros_like(gramian[..., 0, 0])
    return minimise_on_simplex(gramian, torch.zeros_like(gramian[..., 0]), zero, zero + 1.0, active, solver=solver)


def minimum_norm_point(
    gramian: Float[Tensor, "*batch tasks tasks"], active: Bool[Tensor, "*batch tasks"], solver: Route
) -> tuple[SimplexSolution, Float[Tensor, "*batch"], Float[Tensor, "*batch"]]:
    """gm, the shortest vector of the hull: the solution, ||gm||^2 and cos(g0, gm) with g0 the mean gradient.

    Where 0 lies numerically in the hull (||gm||^2 <= 1e-10 sum_i w_i ||g_i||^2), ||gm||^2 and the cosine are 0: the
    direction of gm is rounding noise there. The published IMGrad code, which adds 1e-8, gives 0 too.
    """
    solution = shortest_combination(gramian, active, solver)
    weights = solution.weights
    mean_products, mean_norm = mean_gradient(gramian)
    squared_norm = (weights * (gramian @ weights[..., None]).squeeze(-1)).sum(-1)
    own_norms = (weights * gramian.diagonal(dim1=-2, dim2=-1)).sum(-1)
    valid = (squared_norm > NEAR_ZERO * own_norms) & (mean_norm > 0)
    length = torch.where(valid, squared_norm.clamp_min(0.0).sqrt() * mean_norm, 1.0)
    cosine = torch.where(valid, (weights * mean_products).sum(-1) / length, 0.0).clamp(0.0, 1.0)
    return solution, torch.where(valid, squared_norm, 0.0), cosine


@dataclass(frozen=True)
class MGDA(Aggregator):
    """min over w in the simplex of ||J^T w||^2; d = J^T w.

    Differences: the published Frank-Wolfe and projected-gradient codes stop early (K = 2 clamps w to [.001, .999]) and
    have no cap on a NaN; this is the exact minimiser, without normalisation of the gradients. A task without gradient
    is left out: taken literally the method would return d = 0 for it.

    Identities: <g_i, d> >= ||d||^2 with equality on the support; ||d|| <= min_i ||g_i||; d = 0 iff 0 is in the hull;
    identical gradients g give g. No state. Cost: one solve (see `solvers.simplex`). Diagnostics: `gap`, `relative_gap`.
    """

    paper = "Sener and Koltun 2018, arXiv 1810.04650"

    solver: Route = "auto"
    """Where the K x K problem is solved: host (numpy), device (torch, no host copy), or auto (host for CPU tensors)."""

    def __post_init__(self) -> None:
        check_choice("MGDA.solver", self.solver, ROUTES)

    def solve(self, given: Given) -> Aggregation:
        gramian, active = given.gramian, given.active
        solution = shortest_combination(gramian, active, self.solver)
        return Aggregation(solution.weights, solution.gaps)
