"""The fixed point behind Nash-MTL and FairGrad: M w = w^(-1/alpha) with w > 0.

It is the stationary point of the strictly convex w'Mw / 2 - sum_i psi(w_i), psi'(w) = w^(-1/alpha), so there is one
solution at most; there is none iff 0 lies in the convex hull of the gradients, where w would grow without bound.

Nothing is approximated: Newton on the pair of equations C u = v, log v_i + e log u_i = (1 - e) log(1 / ||g_i||), with
u_i = ||g_i|| w_i, C the cosines between the gradients and e = 1 / alpha. Keeping v as a variable of its own makes every
Newton matrix C + diag(e v / u) positive definite whatever the step, and the logarithms make a step's length
independent of the size of u; Newton on w alone needs damping and stalls on unequal norms unless alpha = 1. The steps
start at alpha = 1, where the solution does not depend on the norms, and move alpha to its value by and by. Nash-MTL
needs 4 to 7 of its 16 steps, FairGrad with alpha = 2 about 12 of 24.

C carries the ridge of `correlations`, normally 1e-13; the last steps take it off the equation, not off the Newton
matrix.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mtrl_imgrad.aggregators.solvers.active_set import near_zero
from mtrl_imgrad.aggregators.solvers.correlations import correlations

ALPHA_RANGE = (0.5, 10.0)  # beyond, w spans so many orders of magnitude that the number of steps is no longer safe
NASH_STEPS = 16
STEPS_PER_OCTAVE = 8  # further steps for one doubling or halving of alpha; n of them take n^2 times as many
UNRIDGED_STEPS = 4  # the last ones, for the equation without the ridge: it would show where gradients nearly cancel
TO_BOUNDARY = 0.95


@dataclass(frozen=True)
class AlphaFairSolution:
    """The solution of M w = w^(-1/alpha) and its certificate."""

    weights: Float[Tensor, "*batch tasks"]
    """w > 0; 0 for inactive tasks, and for all tasks where there is no solution: where ||J^T w||^2 is at most 1e-10 +
    2 (rounding + delta) times sum_i w_i^2 ||g_i||^2, that is, where 0 lies numerically in the hull."""

    residual: Float[Tensor, "*batch"]
    """max_i |(M w)_i w_i^(1/alpha) - 1| for M without ridge, 0 where the weights are 0."""


def solve_alpha_fair(
    gramian: Float[Tensor, "*batch tasks tasks"],
    active: Bool[Tensor, "*batch tasks"],
    alpha: float,
    rounding: float = 0.0,
) -> AlphaFairSolution:
    """Solves M w = w^(-1/alpha); all float64.

    Args:
        gramian: M, with zero rows for inactive tasks.
        active: at least one per Gramian.
        alpha: within ALPHA_RANGE.
        rounding: how well M is known, see `Given.rounding`.
    """
    cosines = correlations(gramian, active)
    ones = active.to(torch.float64)
    moving = STEPS_PER_OCTAVE * math.log2(alpha) ** 2
    uniform = torch.ones_like(cosines.norms)
    plain = cosines.matrix - torch.diag_embed(cosines.ridge[..., None] * uniform)
    length = (cosines.matrix.sum(-1) * uniform).sum(-1, keepdim=True).sqrt()
    u = uniform * math.sqrt(gramian.shape[-1]) / length  # the best multiple of 1 for alpha = 1
    v = 1.0 / u
    steps = NASH_STEPS + math.ceil(moving)
    for step in range(steps):
        ridge = cosines.ridge[..., None] if step < steps - UNRIDGED_STEPS else 0.0
        exponent = alpha ** -(min(1.0, step / moving) if moving else 1.0)
        target = (exponent - 1.0) * cosines.norms.log()
        excess = target - exponent * u.log() - v.log()
        newton = u[..., :, None] * cosines.matrix * u[..., None, :] + torch.diag_embed(exponent * v * u)
        image = (plain @ u[..., None]).squeeze(-1) + ridge * u
        side = u * (v * (1.0 + excess) - image)
        du = torch.cholesky_solve(side[..., None], torch.linalg.cholesky_ex(newton).L).squeeze(-1)  # relative to u
        dv = excess - exponent * du  # relative to v
        shrink = torch.maximum((-du).amax(-1, keepdim=True), (-dv).amax(-1, keepdim=True))
        length = TO_BOUNDARY / shrink.clamp_min(TO_BOUNDARY)
        u, v = u * (1.0 + length * du), v * (1.0 + length * dv)

    weights = ones * u / cosines.norms
    image = (gramian @ weights[..., None]).squeeze(-1)
    squared_norm = (weights * image).sum(-1)
    own_norms = (ones * u * u).sum(-1)
    exists = squared_norm > near_zero(rounding + cosines.ridge) * own_norms
    excess = image * torch.where(active, weights, 1.0).pow(1.0 / alpha) - 1.0
    residual = torch.where(active, excess.abs(), 0.0).amax(-1)
    return AlphaFairSolution(torch.where(exists[..., None], weights, 0.0), torch.where(exists, residual, 0.0))
