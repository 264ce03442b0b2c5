"""Nash-MTL: the direction that the tasks would agree on in Nash's bargaining game (Navon et al. 2022)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from mtrl_imgrad.aggregators.base import Aggregation, Aggregator, Given, State, check_choice, check_range
from mtrl_imgrad.aggregators.cagrad import mean_gradient
from mtrl_imgrad.aggregators.solvers.alpha_fair import solve_alpha_fair

Norm = Literal["mean", "own"]
NORMS: tuple[Norm, ...] = ("mean", "own")


def direction_norm(
    gramian: Float[Tensor, "*batch tasks tasks"], weights: Float[Tensor, "*batch tasks"]
) -> Float[Tensor, "*batch"]:
    """||J^T weights||."""
    return (weights * (gramian @ weights[..., None]).squeeze(-1)).sum(-1).clamp_min(0.0).sqrt()


def at_length_of_mean(
    gramian: Float[Tensor, "*batch tasks tasks"], weights: Float[Tensor, "*batch tasks"]
) -> Float[Tensor, "*batch tasks"]:
    """The weights of the direction J^T weights at the length of the mean gradient; 0 where the direction is."""
    length, mean_norm = direction_norm(gramian, weights), mean_gradient(gramian)[1]
    return weights * torch.where(length > 0, mean_norm / torch.where(length > 0, length, 1.0), 0.0)[..., None]


@dataclass(frozen=True)
class NashMTL(Aggregator):
    """M a = 1 / a with a > 0, d = J^T a: the maximiser of sum_i log <g_i, d> over a ball (Eq. 2 and 3 of the paper).

    a is the minimiser of the strictly convex a'Ma / 2 - sum_i log a_i, found by Newton (`solvers.alpha_fair`) to a
    residual |a_i (Ma)_i - 1| of about 1e-16 over the smallest eigenvalue of the cosines between the gradients, whatever
    their norms: 1e-11 for two at a cosine of -1 + 1e-5, 1e-6 for two at -1 + 1e-10.

    Differences: the published code approximates a by up to 20 convex programs from ECOS, started at the last a; it
    fails for K = 1, for a task without gradient (left out here) and for norm ratios of 1e4, where its residual was 1e3.
    Its RL version divides by max_norm = 1 instead of clipping, so its ||d|| is always sqrt(K); `max_norm` really clips.
    If 0 lies in the hull of the gradients there is no solution: d = 0, as for MGDA.

    ||J^T a|| = sqrt(K) whatever the gradients (degree 0), so `norm` offers the length of the mean gradient instead, the
    default. RL values in the published code: update_weights_every = 1, norm "own", max_norm 1 without effect; for MT10
    and MT50: unknown beyond these defaults.

    State, only for update_weights_every > 1: `alpha` (a, for the raw gradients) and `step`. Cost: 16 Cholesky
    factorisations. Diagnostics: `residual`, of the present solution even when older weights are in use.

    Identities: scaling single gradients by positive numbers keeps the direction J^T a; norm "own": ||d||^2 = K and K
    identical gradients g give sqrt(K) g / ||g||; norm "mean": ||d|| = ||g0||, degree 1, and they give g.
    """

    norm: Norm = "mean"
    """Length of the direction: that of the mean gradient, or the solution's own, which is sqrt(K)."""

    max_norm: float = 0.0
    """Longest direction; longer ones are scaled down to it (0: no limit)."""

    update_weights_every: int = 1
    """Calls between two solves; in between the last solution's weights are used on the present gradients."""

    paper: ClassVar[str] = "Navon et al. 2022, arXiv 2202.01017"

    def __post_init__(self) -> None:
        check_choice("NashMTL.norm", self.norm, NORMS)
        check_range("NashMTL.max_norm", self.max_norm, 0.0, math.nextafter(math.inf, 0.0))
        check_range("NashMTL.update_weights_every", self.update_weights_every, 1, 2**31)

    def initial_state(self, shape: tuple[int, ...], parameters: int) -> State:
        """Nothing if every call solves."""
        if self.update_weights_every == 1:
            return {}
        return {"alpha": torch.ones(shape, dtype=torch.float64), "step": torch.zeros(shape[:-1], dtype=torch.int64)}

    def solve(self, given: Given) -> Aggregation:
        gramian, root = given.gramian, given.scale.sqrt()
        solution = solve_alpha_fair(gramian, given.active, 1.0, given.rounding)
        weights, state = solution.weights / root[..., None], {}
        if self.update_weights_every > 1:
            step = given.state["step"]
            fresh = step % self.update_weights_every == 0
            weights = torch.where(fresh[..., None], weights, given.state["alpha"])
            state = {"alpha": weights, "step": step + 1}
            weights = torch.where(given.active, weights, 0.0)
        if self.norm == "mean":
            weights = at_length_of_mean(gramian, weights)
        if self.max_norm > 0:
            length = root * direction_norm(gramian, weights)
            weights = weights * (self.max_norm / length.clamp_min(self.max_norm))[..., None]
        return Aggregation(weights, {"residual": solution.residual}, state)
