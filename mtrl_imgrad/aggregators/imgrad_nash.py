"""IMGrad on Nash-MTL: from Eq. 13 of arXiv 2503.08006v1, unverified; experimental."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from mtrl_imgrad.aggregators.base import Aggregation, Aggregator, Given, check_choice
from mtrl_imgrad.aggregators.mgda import minimum_norm_point
from mtrl_imgrad.aggregators.nashmtl import NORMS, Norm, at_length_of_mean
from mtrl_imgrad.aggregators.solvers import ROUTES, Route
from mtrl_imgrad.aggregators.solvers.alpha_fair import solve_alpha_fair
from mtrl_imgrad.aggregators.solvers.correlations import correlations

STEPS = 60
CENTRING = 0.3
TO_BOUNDARY = 0.7
LEAST_CURVATURE = 0.1  # of that of the constraints
CONVERGED = 1e-6  # far from what rounding leaves, so that it does not choose the answer
OPTIMAL = 1e-9


@dataclass(frozen=True)
class IMGradNash(Aggregator):
    """Nash-MTL's weights where the gradients are balanced, other ones where they are not; experimental.

    From Eq. 13 of the IMGrad paper, unverified: its appendix was not read, and no code of it is published. With
    phi_i(a) = log a_i + log (Ma)_i and cos = cos(g0, gm), gm the minimum-norm point of the hull (MGDA):

        minimise  (1 - cos) sum_i (Ma)_i + cos sum_i phi_i(a)   subject to  phi_i(a) >= 0 for all i,   d = J^T a

    Nash-MTL's solution has all phi_i = 0 and is the answer for cos = 1. It remains the answer while it satisfies the
    optimality conditions above, and then this rule returns it: the multipliers cos + (1 - cos) l must be >= 0, where
    (I + B) l = B (1 / a) and B_ij = a_i M_ij a_j. They are not where norms differ much and gradients conflict; then the
    optimum has phi_i > 0 for the tasks with small gradients: they bargain with power exp(phi_i) > 1.

    Choices of this reading:

    * The two terms have different units (the length of a gradient, and none), so M is first divided by the mean of its
      diagonal over the tasks with a gradient. The paper does not say; Nash-MTL's code divides by the norm of M.
    * Eq. 13 does not repeat the constraints of Eq. 12; they are kept, as without them a = 0 is optimal.
    * The objective is not convex (phi_i is concave). Nash-MTL's code linearises phi and solves a convex program, again
      and again, from the last step's weights; here one interior-point method, started at Nash-MTL's solution, takes 60
      steps for the same optimality conditions. Weights depend on the present gradients alone.
    * If 0 lies in the hull there is no feasible a: d = 0, as for NashMTL here; the paper keeps the last step's weights.
    * Where 60 steps do not reach a residual of 1e-6, Nash-MTL's weights are returned, with that residual. It happens
      for nearly opposed gradients (a cosine of -1 + 1e-8). For norm ratios of up to 1e4 the residual is mostly below
      1e-9, at times 2e-8 for K = 50; it grows where gradients cancel. As cos differs in its last digits, directions of
      the two routes then differ by up to 1e-5.

    RL values: none published. No state. Cost: one solve as for MGDA, one as for NashMTL, 60 QR
    factorisations of 3K x K.
    Diagnostics: `cos_theta`, `residual`.

    Identities: norm "mean": ||d|| = ||g0||, homogeneous of degree 1, K identical gradients g give g; norm "own": degree
    0; orthonormal gradients, or equal norms and no conflict, give NashMTL's direction.
    """

    norm: Norm = "mean"
    """Length of the direction: that of the mean gradient, or the solution's own."""

    solver: Route = "auto"
    """Where cos is solved for: host (numpy), device (torch, no host copy), or auto (host for CPU tensors)."""

    paper: ClassVar[str] = "Zhou et al. 2025, arXiv 2503.08006 (Eq. 13, unverified)"

    def __post_init__(self) -> None:
        check_choice("IMGradNash.norm", self.norm, NORMS)
        check_choice("IMGradNash.solver", self.solver, ROUTES)

    def solve(self, given: Given) -> Aggregation:
        gramian, active = given.gramian, given.active
        cosine = minimum_norm_point(given, self.solver)[2]
        nash = solve_alpha_fair(gramian, active, 1.0, given.rounding).weights
        exists = (nash > 0).any(-1, keepdim=True)
        cosines = correlations(gramian, active)
        ones = active.to(torch.float64)
        mean_square = (ones * cosines.norms.square()).sum(-1, keepdim=True) / ones.sum(-1, keepdim=True)
        lengths = cosines.norms / mean_square.sqrt()
        pull = ones * (cosines.matrix @ (ones * lengths)[..., None]).squeeze(-1) + (1.0 - ones)
        problem = Problem(cosines.matrix, pull, cosine[..., None])
        start = torch.where(active & exists, nash * cosines.norms, 1.0)
        scaled, residual = minimise(problem, start)
        scaled = torch.where((residual <= CONVERGED)[..., None], scaled, start)
        weights = torch.where(exists, ones * scaled / cosines.norms, 0.0)
        if self.norm == "mean":
            weights = at_length_of_mean(gramian, weights)
        else:
            weights = weights / given.scale.sqrt()[..., None]
        residual = torch.where(exists.squeeze(-1), residual, 0.0)
        return Aggregation(weights, {"cos_theta": cosine, "residual": residual})


class Problem(NamedTuple):
    """min over u > 0 of (1 - cos) pull.u + cos sum_i phi_i, phi_i = log u_i + log (Cu)_i >= 0, u_i = ||g_i|| a_i."""

    matrix: Tensor
    pull: Tensor
    cosine: Tensor


def minimise(problem: Problem, start: Tensor) -> tuple[Tensor, Tensor]:
    """u and the residual of its optimality conditions, started at Nash-MTL's u.

    Newton on  q(u) = (I + B)' z,  phi(u) = t,  z_i t_i = mu  for relative changes of u, where q is u times the gradient
    of the objective and B_ij = C_ij u_j / (Cu)_i, so that I + B is the derivative of phi by log u. The curvature of the
    Lagrangian is diag(z - cos) + B' diag(z - cos) B; z - cos is replaced by z / 10 where it is less.
    """
    cosine = problem.cosine
    identity = torch.eye(start.shape[-1], dtype=start.dtype, device=start.device)
    # At Nash-MTL's point B is symmetric, and its multipliers solve (I + B) (z - cos) = (1 - cos) u pull.
    derivative = identity + start[..., :, None] * problem.matrix * start[..., None, :]
    side = ((1.0 - cosine) * start * problem.pull)[..., None]
    multipliers = cosine + torch.cholesky_solve(side, torch.linalg.cholesky_ex(derivative).L).squeeze(-1)
    best, best_residual = start, conditions(problem, start, multipliers.clamp_min(0.0)).residual
    elsewhere = best_residual > OPTIMAL  # else Nash-MTL's point is the answer, whatever other optima there are

    u, slack, multipliers = start * 1.5, torch.ones_like(start), torch.ones_like(start)
    for _ in range(STEPS):
        now = conditions(problem, u, multipliers)
        target = CENTRING * (multipliers * slack).mean(-1, keepdim=True)
        curvature = torch.maximum(multipliers - cosine, LEAST_CURVATURE * multipliers)
        # The Newton matrix is F'F for the rows F; factorising F keeps the digits that its square would lose where
        # gradients nearly cancel.
        roots, weight = curvature.sqrt(), (multipliers / slack).sqrt()
        rows = [torch.diag_embed(roots), roots[..., None] * now.share, weight[..., None] * now.derivative]
        triangle = torch.linalg.qr(torch.cat(rows, dim=-2), mode="r").R
        pressure = multipliers + (target - multipliers * now.phi) / slack
        side = (now.derivative.mT @ pressure[..., None]).squeeze(-1) - now.slope
        du = torch.cholesky_solve(side[..., None], triangle, upper=True)
        d_slack = (now.derivative @ du).squeeze(-1) + now.phi - slack
        d_multipliers = (target - multipliers * d_slack) / slack - multipliers
        d_image, du = (now.share @ du).squeeze(-1), du.squeeze(-1)
        length = torch.minimum(torch.minimum(room(du), room(d_image)), room(d_slack / slack))
        u, slack = u * (1.0 + length * du), slack + length * d_slack
        multipliers = multipliers + room(d_multipliers / multipliers) * d_multipliers
        residual = conditions(problem, u, multipliers).residual
        better = (residual < best_residual) & elsewhere
        best, best_residual = torch.where(better[..., None], u, best), torch.where(better, residual, best_residual)
    return best, best_residual


class Conditions(NamedTuple):
    """Values and derivatives at a point."""

    phi: Tensor
    share: Tensor  # B
    derivative: Tensor  # I + B
    slope: Tensor  # q
    residual: Tensor


def conditions(problem: Problem, u: Tensor, multipliers: Tensor) -> Conditions:
    """The residual is the largest of: the stationarity, relative to the slope; -phi; phi times its multiplier."""
    image = (problem.matrix @ u[..., None]).squeeze(-1)
    phi = u.log() + image.log()
    share = problem.matrix * u[..., None, :] / image[..., :, None]
    derivative = share + torch.eye(u.shape[-1], dtype=u.dtype, device=u.device)
    slope = (1.0 - problem.cosine) * u * problem.pull + problem.cosine * derivative.sum(-2)
    excess = (derivative.mT @ multipliers[..., None]).squeeze(-1) - slope
    wrong = torch.maximum(excess.abs() / slope.abs().amax(-1, keepdim=True), torch.maximum(-phi, phi * multipliers))
    return Conditions(phi, share, derivative, slope, wrong.amax(-1))


def room(change: Tensor) -> Tensor:
    """The longest step, at most 1, that keeps 1 + step * change positive with a margin."""
    return TO_BOUNDARY / (-change).amax(-1, keepdim=True).clamp_min(TO_BOUNDARY)
