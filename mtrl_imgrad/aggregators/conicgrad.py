"""ConicGrad: the best worst-case direction within a cone around the mean gradient (arXiv 2502.00217v1).

Derived from the abstract; paper equations not read. The problem below is our reading of it, solved exactly.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from mtrl_imgrad.aggregators.base import Aggregation, Aggregator, Given, State, check_choice, check_range
from mtrl_imgrad.aggregators.cagrad import mean_gradient
from mtrl_imgrad.aggregators.mgda import minimum_norm_point
from mtrl_imgrad.aggregators.solvers import ROUTES, Route, minimise_on_simplex, takes_host
from mtrl_imgrad.aggregators.solvers.active_set import near_zero
from mtrl_imgrad.aggregators.weight_optimiser import adam, initial_adam

Mode = Literal["exact", "single_loop"]
MODES: tuple[Mode, ...] = ("exact", "single_loop")
Infeasible = Literal["boundary", "mean", "zero"]
INFEASIBLE: tuple[Infeasible, ...] = ("boundary", "mean", "zero")
# Up to this many rounding errors of M, ||g0||^2 is nothing but these: the cone has no axis and d = g0.
NO_AXIS = 5


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

    `single_loop` does not minimise: w = softmax(logits), d is the best direction for that one w, that is the maximum of
    <gw, d> over the same set (||g0|| gw / ||gw|| inside the cone, the direction of 2 outside, `on_infeasible` where
    c <gw, u> + s ||P gw|| <= 0), and then the logits take one Adam step along the gradient of <J d, softmax(logits)>
    at fixed d, plus gamma times the logits. By Danskin's theorem that is the gradient of the dual. J d is taken for
    gradients of mean squared norm 1, so the scale of the gradients does not matter. What the paper does may differ.

    Values of c, lr and gamma for MT10 and MT50: unknown; lr and gamma are those of FAMO's MT10 command, whose weights
    follow the same kind of step. State: none in `exact`; `logits` [K] and their Adam in `single_loop`. Cost: two
    solves, or O(K^2). Diagnostics: `cos_theta`, `gap`, `relative_gap`; none in `single_loop`.

    Identities: ||d|| = ||g0|| and, in `exact`, cos(d, g0) = max(c, cos_theta); c = 1 gives g0; c <= cos_theta gives
    MGDA's direction; K identical gradients g give g. In `single_loop` cos(d, g0) >= c wherever ||d|| = ||g0||.
    """

    paper: ClassVar[str] = (
        "Hassanpour et al. 2025, arXiv 2502.00217 (derived from the abstract; paper equations not read)"
    )

    c: float = 0.5
    """Cosine of the cone's half-angle around the mean gradient (0 to 1)."""

    on_infeasible: Infeasible = "boundary"
    """If no direction in the cone descends for all tasks: the best on its surface, the mean gradient, or zero."""

    mode: Mode = "exact"
    """Solve for the task weights at every step (fields c, on_infeasible, solver), or move them by one gradient step a
    call (c, on_infeasible, lr, gamma)."""

    lr: float = 0.025
    """Adam's learning rate of the logits in single_loop (> 0)."""

    gamma: float = 0.01
    """Decay of the logits in single_loop, added to their gradient (>= 0)."""

    solver: Route = "auto"
    """Where the K x K problem of exact is solved: host (numpy), device (torch, no host copy), or auto (host for CPU
    tensors)."""

    def __post_init__(self) -> None:
        check_range("ConicGrad.c", self.c, 0.0, 1.0)
        check_choice("ConicGrad.on_infeasible", self.on_infeasible, INFEASIBLE)
        check_choice("ConicGrad.mode", self.mode, MODES)
        check_range("ConicGrad.lr", self.lr, math.nextafter(0.0, 1.0), math.nextafter(math.inf, 0.0))
        check_range("ConicGrad.gamma", self.gamma, 0.0, math.nextafter(math.inf, 0.0))
        check_choice("ConicGrad.solver", self.solver, ROUTES)

    def initial_state(self, shape: tuple[int, ...], parameters: int) -> State:
        if self.mode == "exact":
            return {}
        return initial_adam("logits", shape)

    def solve(self, given: Given) -> Aggregation:
        return self.solve_exactly(given) if self.mode == "exact" else self.take_one_step(given)

    def take_one_step(self, given: Given) -> Aggregation:
        """The best direction for the present task weights, and the weights of the next call."""
        gramian, active, state = given.gramian, given.active, given.state
        num_tasks, sine = gramian.shape[-1], math.sqrt(1.0 - self.c**2)
        logits = state["logits"]
        tasks = torch.where(active, logits, -torch.inf).softmax(-1)
        products, mean_norm = mean_gradient(gramian)
        image = (gramian @ tasks[..., None]).squeeze(-1)
        squared_norm = (tasks * image).sum(-1)
        has_axis = mean_norm**2 > NO_AXIS * given.rounding
        zero = near_zero(given.rounding)
        has_direction = squared_norm > zero * (tasks * gramian.diagonal(dim1=-2, dim2=-1)).sum(-1)
        length = torch.where(has_direction, squared_norm, 1.0).sqrt()
        axis_norm = torch.where(has_axis, mean_norm, 1.0)
        along = (tasks * products).sum(-1) / axis_norm  # <gw, u>

        inside = tasks * (mean_norm / length)[..., None]
        # P gw = gw - <gw, u> u has these row weights; its norm comes from its own Gramian form, not a difference.
        projected = tasks - (along / axis_norm / num_tasks)[..., None]
        squared_across = (projected * (gramian @ projected[..., None]).squeeze(-1)).sum(-1)
        sideways = squared_across > zero * squared_norm
        across = torch.where(sideways, squared_across, 1.0).sqrt()
        boundary = self.c / num_tasks + sine * (mean_norm / across)[..., None] * projected
        mean = torch.full_like(tasks, 1.0 / num_tasks)
        boundary = torch.where(sideways[..., None], boundary, mean)
        spread = torch.where(sideways, across, 0.0)
        fallback = {"boundary": boundary, "mean": mean, "zero": torch.zeros_like(mean)}[self.on_infeasible]
        outside = torch.where((self.c * along + sine * spread > 0)[..., None], boundary, fallback)
        within = has_direction & (along >= self.c * length)
        weights = torch.where(within[..., None], inside, outside)
        weights = torch.where(has_axis[..., None], weights, mean)

        progress = (gramian @ weights[..., None]).squeeze(-1)  # <g_i, d>
        slope = tasks * (progress - (tasks * progress).sum(-1, keepdim=True)) + self.gamma * logits
        new = adam(state, "logits", slope, self.lr)
        kept = {name: torch.where(active, new[name], state[name]) for name in ("logits", "adam_m", "adam_v")}
        return Aggregation(weights, state=new | kept)

    def solve_exactly(self, given: Given) -> Aggregation:
        """The best worst case in the cone."""
        gramian, active = given.gramian, given.active
        num_tasks = gramian.shape[-1]
        sine = math.sqrt(1.0 - self.c**2)
        shortest, shortest_squared_norm, cosine = minimum_norm_point(given, self.solver)
        products, mean_norm = mean_gradient(gramian)
        has_axis = mean_norm**2 > NO_AXIS * given.rounding
        axis_norm = torch.where(has_axis, mean_norm, 1.0)
        along = torch.where(has_axis[..., None], products / axis_norm[..., None], 0.0)  # <g_i, u>
        across = gramian - along[..., :, None] * along[..., None, :]  # the Gramian of the rows P g_i

        # Regime 1: the minimum-norm point, at the length of the mean gradient.
        stretch = mean_norm / torch.where(shortest_squared_norm > 0, shortest_squared_norm, 1.0).sqrt()
        inside = shortest.weights * stretch[..., None]
        # Regime 2: on the cone's surface. The row weights of P J^T unit are unit - <J^T unit, u> / (K ||g0||).
        # Where the cone is slack its answer is not used and J^T w may vanish: an easier problem takes its place.
        slack = (shortest_squared_norm > 0) & (cosine >= self.c)
        if takes_host(gramian, self.solver) and bool((slack & has_axis).all()):
            return Aggregation(inside, {"cos_theta": cosine, **shortest.gaps})
        surface = minimise_on_simplex(
            torch.where(slack[..., None, None], gramian, across),
            torch.where(slack[..., None], 0.0, self.c * along),
            torch.full_like(mean_norm, sine),
            torch.zeros_like(mean_norm),
            active,
            row_norms=gramian.diagonal(dim1=-2, dim2=-1),
            solver=self.solver,
            rounding=given.rounding * (1.0 + 1.0 / axis_norm) ** 2,  # of M and of the two factors that were taken off
        )
        unit_along = (surface.unit * along).sum(-1, keepdim=True)
        projected = mean_norm[..., None] * surface.unit - unit_along / num_tasks
        boundary = self.c / num_tasks + sine * projected
        squared_norm = (boundary * (gramian @ boundary[..., None]).squeeze(-1)).sum(-1)
        stretch = mean_norm / torch.where(squared_norm > 1e-15 * mean_norm**2, squared_norm, mean_norm**2).sqrt()
        boundary = boundary * torch.where(has_axis, stretch, 1.0)[..., None]
        mean = torch.full_like(boundary, 1.0 / num_tasks)
        fallback = {"boundary": boundary, "mean": mean, "zero": torch.zeros_like(boundary)}[self.on_infeasible]
        spread = (surface.weights * (across @ surface.weights[..., None]).squeeze(-1)).sum(-1).clamp_min(0.0).sqrt()
        value = self.c * (surface.weights * along).sum(-1) + sine * spread
        feasible = (value > 0) & (surface.unit > 0).any(-1)
        weights = torch.where(slack[..., None], inside, torch.where(feasible[..., None], boundary, fallback))
        weights = torch.where(has_axis[..., None], weights, mean)
        larger = shortest.larger_gaps(surface)
        gaps = {name: torch.where(slack, gap, larger[name]) for name, gap in shortest.gaps.items()}
        return Aggregation(weights, {"cos_theta": cosine, **gaps})
