"""MGDA: the shortest vector in the convex hull of the task gradients (Desideri 2012; Sener and Koltun 2018, Eq. 3)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mtrl_imgrad.aggregators.base import Aggregation, Aggregator, Given, check_choice
from mtrl_imgrad.aggregators.cagrad import mean_gradient
from mtrl_imgrad.aggregators.solvers import ROUTES, Route, SimplexSolution, minimise_on_simplex


def shortest_combination(given: Given, solver: Route) -> SimplexSolution:
    """min over w in the simplex of ||J^T w||^2 / 2."""
    linear = torch.zeros_like(given.gramian[..., 0])
    zero = linear[..., 0]
    return minimise_on_simplex(
        given.gramian, linear, zero, zero + 1.0, given.active, solver=solver, rounding=given.rounding
    )


def minimum_norm_point(
    given: Given, solver: Route
) -> tuple[SimplexSolution, Float[Tensor, "*batch"], Float[Tensor, "*batch"]]:
    """gm, the shortest vector of the hull: the solution, ||gm||^2 and cos(g0, gm) with g0 the mean gradient.

    Where 0 lies numerically in the hull (see `SimplexSolution.unit`), ||gm||^2 and the cosine are 0: the direction of
    gm is rounding noise there. The published IMGrad code, which adds 1e-8, gives 0 too.
    """
    solution = shortest_combination(given, solver)
    gramian, weights = given.gramian, solution.weights
    mean_products, mean_norm = mean_gradient(gramian)
    squared_norm = (weights * (gramian @ weights[..., None]).squeeze(-1)).sum(-1)
    valid = (solution.unit > 0).any(-1) & (squared_norm > 0) & (mean_norm > 0)
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
    identical gradients g give g. Hyper-parameters: none. Values for MT10 and MT50: none. No state. Cost: one solve (see
    `solvers.simplex`). Diagnostics: `gap`, `relative_gap`.
    """

    paper = "Sener and Koltun 2018, arXiv 1810.04650"

    solver: Route = "auto"
    """Where the K x K problem is solved: host (numpy), device (torch, no host copy), or auto (host for CPU tensors)."""

    def __post_init__(self) -> None:
        check_choice("MGDA.solver", self.solver, ROUTES)

    def solve(self, given: Given) -> Aggregation:
        solution = shortest_combination(given, self.solver)
        return Aggregation(solution.weights, solution.gaps)
