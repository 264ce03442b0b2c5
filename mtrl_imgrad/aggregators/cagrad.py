"""CAGrad: the best worst-case direction within a ball around the mean gradient (Liu et al. 2021)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from mtrl_imgrad.aggregators.base import Aggregation, Aggregator, Given, check_choice, check_range
from mtrl_imgrad.aggregators.solvers import ROUTES, Route, minimise_on_simplex

Rescale = Literal[0, 1, 2]


def rescale_factor(c: float, rescale: Rescale) -> float:
    """0: 1; 1: 1 / (1 + c^2), as in the published code; 2: 1 / (1 + c)."""
    return {0: 1.0, 1: 1.0 / (1.0 + c * c), 2: 1.0 / (1.0 + c)}[rescale]


def mean_gradient(
    gramian: Float[Tensor, "*batch tasks tasks"],
) -> tuple[Float[Tensor, "*batch tasks"], Float[Tensor, "*batch"]]:
    """<g_i, g0> for every task, and ||g0||, of the mean gradient g0 = J^T 1/K."""
    products = gramian.mean(-1)
    return products, products.mean(-1).clamp_min(0.0).sqrt()


@dataclass(frozen=True)
class CAGrad(Aggregator):
    """max over d of min_i <g_i, d> subject to ||d - g0|| <= c ||g0|| (Eq. 2 of the paper), g0 the mean gradient.

    Solved through its dual, min over w in the simplex of <gw, g0> + c ||g0|| ||gw|| with gw = J^T w; then
    d = g0 + c ||g0|| gw / ||gw||, times the rescale factor. The mean scale is used: K identical gradients g give
    (1 + c) g times the factor; the supervised codes multiply by K.

    Differences: the published RL code minimises by 20 steps of softmax SGD with 1e-4 added to the norms, the
    supervised code by SLSQP with an absolute tolerance; this is the exact minimiser at every gradient scale.

    RL values in the published command lines: MT10 c = 0.9, MT50 c = 0.5 (both with the 'fast' sub-sampling, which is
    `CAGradFast`); the default c = 0.4 is our choice. No state. Cost: one solve. Where gw = 0 see
    `SimplexSolution.unit`. Diagnostics: `gap`, `relative_gap`.

    Identities: c = 0 gives g0; before rescaling ||d - g0|| = c ||g0|| and min_i <g_i, d> equals the dual optimum;
    c < 1 gives <g0, d> > 0; the direction tends to MGDA's as c grows.
    """

    paper = "Liu et al. 2021, arXiv 2110.14048"

    c: float = 0.4
    """Radius of the ball as a fraction of the mean gradient's norm (>= 0)."""

    rescale: Rescale = 1
    """Factor on the direction: 0 none, 1 divides by 1 + c^2 (published code), 2 divides by 1 + c."""

    solver: Route = "auto"
    """Where the K x K problem is solved: host (numpy), device (torch, no host copy), or auto (host for CPU tensors)."""

    def __post_init__(self) -> None:
        check_range("CAGrad.c", self.c, 0.0, math.nextafter(math.inf, 0.0))
        check_choice("CAGrad.rescale", self.rescale, (0, 1, 2))
        check_choice("CAGrad.solver", self.solver, ROUTES)

    def solve(self, given: Given) -> Aggregation:
        gramian, active = given.gramian, given.active
        products, mean_norm = mean_gradient(gramian)
        radius = self.c * mean_norm
        solution = minimise_on_simplex(
            gramian,
            products,
            radius,
            torch.zeros_like(radius),
            active,
            solver=self.solver,
            rounding=given.rounding,
        )
        weights = 1.0 / gramian.shape[-1] + radius[..., None] * solution.unit
        return Aggregation(weights * rescale_factor(self.c, self.rescale), solution.gaps)
