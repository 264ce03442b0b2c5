"""ConicGrad: the best worst-case direction within a cone around the mean gradient (arXiv 2502.00217v1).

Derived from the abstract; paper equations not read. The problem below is our reading of it, solved exactly.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

from mtrl_imgrad.aggregators.base import Aggregation, Aggregator, Given, check_choice, check_range
from mtrl_imgrad.aggregators.cagrad import mean_gradient
from mtrl_imgrad.aggregators.mgda import minimum_norm_point
from mtrl_imgrad.aggregators.solvers import ROUTES, Route, minimise_on_simplex

Infeasible = Literal["boundary", "mean", "zero"]
INFEASIBLE: tuple[Infeasible, ...] = ("boundary", "mean", "zero")
# Below this fraction of the mean squared task norm ||g0||^2 is rounding error: the cone has no axis and d = g0.
NO_AXIS = 1e-15


@dataclass(frozen=True)
class ConicGrad(Aggregator):
    """Best worst-case direction in a cone around the mean; derived from the abstract, paper equations not read.

    max over d of min_i <g_i, d> subject to cos(d, g0) >= c and ||d|| <= ||g0||, g0 the mean gradient. With
    u = g0 / ||g0|| and s = sqrt(1 - c^2):

    1. gm, the minimum-norm point of the hull. If cos(g0, gm) >= c, d = ||g0|| gm / ||gm|| (the cone is not active).
    2. Otherwise w minimises c <gw, u> + s ||P gw|| over the simplex, P the projection orthogonal to g0, and
       d = ||g0|| (c u + s P gw / ||P gw||), with cos(d, g0) = c.

    If the optimum of 2 is <= 0 no direction in the cone descends for every task, and `on_infeasible` decides. Where
    P gw vanishes at the optimum (only then, and only if K exceeds the rank) `boundary` has no unit vector: d = g0.

    Values of c for MT10 and MT50: unknown. No state. Cost: two solves. Diagnostics: `cos_theta`, `gap`.

    Identities: ||d|| = ||g0|| and cos(d, g0) = max(c, cos_theta); c = 1 gives g0; c <= cos_theta gives MGDA's
    direction; K identical gradients g give g.
    """

    paper = "Hassanpour et al. 2025, arXiv 2502.00217"

    c: float = 0.5
    """Cosine of the cone's half-angle around the mean gradient (0 to 1)."""

    on_infeasible: Infeasible = "boundary"
    """If no direction in the cone descends for all tasks: the best on its surface, the mean gradient, or zero."""

    solver: Route = "auto"
    """Where the K x K problem is solved: host (numpy), device (torch, no host copy), or auto (host for CPU tensors)."""

    def __post_init__(self) -> None:
        check_range("ConicGrad.c", self.c, 0.0, 1.0)
        check_choice("ConicGrad.on_infeasible", self.on_infeasible, INFEASIBLE)
        check_choice("ConicGrad.solver", self.solver, ROUTES)

    def solve(self, given: Given) -> Aggregation:
        gramian, active = given.gramian, given.active
        num_tasks = gramian.shape[-1]
        sine = math.sqrt(1.0 - self.c**2)
        shortest, shortest_squared_norm, cosine = minimum_norm_point(gramian, active, self.solver)
        products, mean_norm = mean_gradient(gramian)
        has_axis = mean_norm**2 > NO_AXIS
        axis_norm = torch.where(has_axis, mean_norm, 1.0)
        along = torch.where(has_axis[..., None], products / axis_norm[..., None], 0.0)  # <g_i, u>
        across = gramian - along[..., :, None] * along[..., None, :]  # the Gramian of the rows P g_i

        # Regime 1: the minimum-norm point, at the length of the mean gradient.
        stretch = mean_norm / torch.where(shortest_squared_norm > 0, shortest_squared_norm, 1.0).sqrt()
        inside = shortest.weights * stretch[..., None]
        # Regime 2: on the cone's surface. The row weights of P J^T unit are unit - <J^T unit, u> / (K ||g0||).
        # Where the cone is slack its answer is not used and J^T w may vanish: an easier problem takes its place.
        slack = (shortest_squared_norm > 0) & (cosine >= self.c)
        surface = minimise_on_simplex(
            torch.where(slack[..., None, None], gramian, across),
            torch.where(slack[..., None], 0.0, self.c * along),
            torch.full_like(mean_norm, sine),
            torch.zeros_like(mean_norm),
            active,
            row_norms=gramian.diagonal(dim1=-2, dim2=-1),
            solver=self.solver,
        )
        unit_along = (surface.unit * along).sum(-1, keepdim=True)
        projected = mean_norm[..., None] * surface.unit - unit_along / num_tasks
        boundary = self.c / num_tasks + sine * projected
        squared_norm = (boundary * (gramian @ boundary[..., None]).squeeze(-1)).sum(-1)
        stretch = mean_norm / torch.where(squared_norm > NO_AXIS * mean_norm**2, squared_norm, mean_norm**2).sqrt()
        boundary = boundary * torch.where(has_axis, stretch, 1.0)[..., None]
        mean = torch.full_like(boundary, 1.0 / num_tasks)
        fallback = {"boundary": boundary, "mean": mean, "zero": torch.zeros_like(boundary)}[self.on_infeasible]
        spread = (surface.weights * (across @ surface.weights[..., None]).squeeze(-1)).sum(-1).clamp_min(0.0).sqrt()
        value = self.c * (surface.weights * along).sum(-1) + sine * spread
        feasible = (value > 0) & (surface.unit > 0).any(-1)
        weights = torch.where(slack[..., None], inside, torch.where(feasible[..., None], boundary, fallback))
        weights = torch.where(has_axis[..., None], weights, mean)
        gap = torch.where(slack, shortest.gap, torch.maximum(shortest.gap, surface.gap))
        return Aggregation(weights, {"cos_theta": cosine, "gap": gap})
