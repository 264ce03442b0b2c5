"""IMGrad: CAGrad whose two terms are weighed by the imbalance of the task gradients (arXiv 2503.08006v1)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

from mtrl_imgrad.aggregators.base import Aggregation, Aggregator, Given, check_choice, check_range
from mtrl_imgrad.aggregators.cagrad import Rescale, mean_gradient, rescale_factor
from mtrl_imgrad.aggregators.mgda import minimum_norm_point
from mtrl_imgrad.aggregators.solvers import ROUTES, Route, minimise_on_simplex

Variant = Literal["official", "eq9", "eq11"]
VARIANTS: tuple[Variant, ...] = ("official", "eq9", "eq11")


@dataclass(frozen=True)
class IMGrad(Aggregator):
    """d = g0 + R gw / ||gw|| with R = c ||g0||, times the rescale factor; g0 the mean gradient, gw = J^T w.

    cos = cos(g0, gm) with gm the minimum-norm point of the hull (MGDA). w minimises over the simplex:

    * official: (1.5 - cos) <gw, g0> + cos R ||gw||            (the published code, nyuv2/utils.py)
    * eq9:      (1 - cos) (<gw, g0> + R ||gw||) + cos ||gw||^2  (Eq. 9 of the paper)
    * eq11:     (1 - cos) <gw, g0> + cos R ||gw||              (Eq. 11; printed with ||gw||^2, whose units do not fit)

    Differences between the sources: the paper weighs <gw, g0> by 1 - cos, the code by 1.5 - cos; the code divides d by
    1 + c^2, which the paper does not state, and multiplies by K, which is left out here (mean scale). The code's SLSQP
    has an absolute tolerance and its min-norm solver may not terminate; this is the exact minimiser at every scale.
    Tasks without gradient are left out (the code gives cos = 0 and d = g0 / (1 + c^2)). Where 0 lies numerically in the
    hull cos is 0; then `official` and `eq11` are linear in w, and ties go to the shortest gw.

    The published supervised run uses c = 0.8; its value for MT10 is unknown; `cagrad.py` names CAGrad's; the default c
    = 0.4 is our choice. No state. Cost: two solves. Diagnostics: `cos_theta`, and the larger `gap` and `relative_gap`
    of the two solves.

    Identities: official equals CAGrad's w at radius c cos / (1.5 - cos), so cos = 0.75 is CAGrad; without rescaling
    ||d - g0|| = c ||g0||; K identical gradients g give (1 + c) g times the factor; c = 0 gives g0.
    """

    paper = "Zhou et al. 2025, arXiv 2503.08006"

    c: float = 0.4
    """Radius of the ball as a fraction of the mean gradient's norm (>= 0)."""

    variant: Variant = "official"
    """Which objective defines the weights: the published code's, or the paper's Eq. 9 or Eq. 11."""

    rescale: Rescale = 1
    """Factor on the direction: 0 none, 1 divides by 1 + c^2 (published code), 2 divides by 1 + c."""

    solver: Route = "auto"
    """Where the K x K problem is solved: host (numpy), device (torch, no host copy), or auto (host for CPU tensors)."""

    def __post_init__(self) -> None:
        check_range("IMGrad.c", self.c, 0.0, math.nextafter(math.inf, 0.0))
        check_choice("IMGrad.variant", self.variant, VARIANTS)
        check_choice("IMGrad.rescale", self.rescale, (0, 1, 2))
        check_choice("IMGrad.solver", self.solver, ROUTES)

    def solve(self, given: Given) -> Aggregation:
        gramian, active = given.gramian, given.active
        shortest, _, cosine = minimum_norm_point(given, self.solver)
        products, mean_norm = mean_gradient(gramian)
        radius = self.c * mean_norm
        zero = torch.zeros_like(cosine)
        linear, norm, quadratic = {
            "official": (1.5 - cosine, cosine * radius, zero),
            "eq9": (1.0 - cosine, (1.0 - cosine) * radius, 2.0 * cosine),
            "eq11": (1.0 - cosine, cosine * radius, zero),
        }[self.variant]
        solution = minimise_on_simplex(
            gramian,
            linear[..., None] * products,
            norm,
            quadratic,
            active,
            solver=self.solver,
            rounding=given.rounding,
        )
        weights = 1.0 / gramian.shape[-1] + radius[..., None] * solution.unit
        diagnostics = {"cos_theta": cosine, **shortest.larger_gaps(solution)}
        return Aggregation(weights * rescale_factor(self.c, self.rescale), diagnostics)
