"""The projection of a combination J^T u onto the dual cone {d: <g_i, d> >= 0 for all i} of the gradients.

    d = J^T v  where v minimises  v'Mv / 2  subject to v >= u

With s = v - u and z = M v, the optimum is s, z >= 0 and s_i z_i = 0: the projection adds only gradients that d is
orthogonal to. d is unique. Every u is solved for by itself, in terms of the cosines C between the gradients, so the
answer does not depend on how unequal their norms are; C carries the ridge of `correlations`, normally 1e-13.

* device route: a primal-dual interior point in torch.
* host route: block pivoting on the support in numpy, for CPU tensors; an answer without certificate is left to the
  device route.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from scipy.linalg import get_lapack_funcs
from torch import Tensor

from mtrl_imgrad.aggregators.solvers.active_set import PIVOTS, Array, Mask, Pivoting, near_zero
from mtrl_imgrad.aggregators.solvers.correlations import correlations
from mtrl_imgrad.aggregators.solvers.simplex import Route, step_length, takes_host

INTERIOR_POINT_STEPS = 25
CENTRING = 0.15
CERTIFIED = 1e-12  # the relative gap above which the host route withholds its answer

solve_positive, solve_triangular = get_lapack_funcs(("posv", "trtrs"), dtype=np.float64)


@dataclass(frozen=True)
class DualConeSolution:
    """Projections onto the dual cone and their certificate."""

    weights: Float[Tensor, "*batch sides tasks"]
    """Row weights v of every projection, 0 for inactive tasks; all 0 where ||J^T v||^2 is at most 1e-10 + 2 (rounding +
    delta) times (sum_i |v_i| ||g_i||)^2, the projection being 0 but for rounding. So <g_i, J^T v> is at least
    -1e-8 ||g_i|| ||J^T v||, what the ridge may cost, for a float64 Gramian."""

    gap: Float[Tensor, "*batch"]
    """The largest (objective - its lower bound from the dual problem) / (objective at v = u), for C with its ridge."""


def project_onto_dual_cone(
    gramian: Float[Tensor, "*batch tasks tasks"],
    sides: Float[Tensor, "*batch sides tasks"],
    active: Bool[Tensor, "*batch tasks"],
    solver: Route = "auto",
    rounding: float = 0.0,
) -> DualConeSolution:
    """Projects J^T u for every row u of `sides`; all float64.

    Args:
        gramian: M, with zero rows for inactive tasks.
        sides: u >= 0 or of any sign.
        active: at least one per Gramian.
        solver: the route; `auto` takes the host for plain CPU tensors outside of torch.compile.
        rounding: how well M is known, see `Given.rounding`.
    """
    cosines = correlations(gramian, active)
    scaled = torch.where(active[..., None, :], sides * cosines.norms[..., None, :], 0.0)
    size = scaled.abs().amax(-1, keepdim=True)
    size = torch.where(size > 0, size, 1.0)
    route = host_route if takes_host(gramian, solver) else device_route
    added, gap = route(cosines.matrix, cosines.factor, scaled / size, active)
    weights = scaled / size + added
    squared_norm = ((weights @ cosines.matrix) * weights).sum(-1)
    zero = near_zero(rounding + cosines.ridge)[..., None] * weights.abs().sum(-1).square()
    nonzero = active[..., None, :] & (squared_norm > zero)[..., None]
    weights = torch.where(nonzero, size * weights / cosines.norms[..., None, :], 0.0)
    return DualConeSolution(weights, gap.amax(-1))


# ---------------------------------------------------------------------------------------------------------------------
# Device route
# ---------------------------------------------------------------------------------------------------------------------


def device_route(matrix: Tensor, factor: Tensor, sides: Tensor, active: Tensor) -> tuple[Tensor, Tensor]:
    """s and the gap of every side. Of s = 0 and the last three iterates the one with the smallest gap is returned."""
    inactive = (~active).to(torch.float64)[..., None, :]  # an inactive s_i costs 1, touches nothing else, and goes to 0
    start = sides @ matrix + inactive  # z where s = 0
    added, slope = torch.ones_like(sides), torch.ones_like(sides)
    best, best_gap = torch.zeros_like(sides), relative_gap(matrix, factor, sides, torch.zeros_like(sides))
    for step in range(INTERIOR_POINT_STEPS):
        complementarity = (added * slope).mean(-1, keepdim=True)
        target = CENTRING * complementarity / added
        newton = matrix[..., None, :, :] + torch.diag_embed(slope / added)
        residual = target - start - added @ matrix
        d_added = torch.cholesky_solve(residual[..., None], torch.linalg.cholesky_ex(newton).L).squeeze(-1)
        d_slope = target - slope - slope / added * d_added
        added, slope = added + step_length(added, d_added) * d_added, slope + step_length(slope, d_slope) * d_slope
        if step >= INTERIOR_POINT_STEPS - 3:
            best, best_gap = keep_better(matrix, factor, sides, added * (1.0 - inactive), best, best_gap)
    return best, best_gap


def keep_better(
    matrix: Tensor, factor: Tensor, sides: Tensor, candidate: Tensor, best: Tensor, best_gap: Tensor
) -> tuple[Tensor, Tensor]:
    """The candidate where its gap is smaller (a NaN never is)."""
    gap = relative_gap(matrix, factor, sides, candidate)
    better = gap < best_gap
    return torch.where(better[..., None], candidate, best), torch.where(better, gap, best_gap)


def relative_gap(matrix: Tensor, factor: Tensor, sides: Tensor, added: Tensor) -> Float[Tensor, "*batch sides"]:
    """(v'Cv / 2 - the dual value) / (u'Cu / 2) for s >= 0.

    The dual is max over z >= 0 of z'u - z'C^-1 z / 2. At the positive part of z = C v, with n its negative part, the
    difference is s'(z + n) + n'C^-1 n / 2.
    """
    slope = (sides + added) @ matrix
    negative = (-slope).clamp_min(0.0)
    whitened = torch.linalg.solve_triangular(factor[..., None, :, :], negative[..., None], upper=False)
    gap = (added * slope.clamp_min(0.0)).sum(-1) + whitened.square().sum((-1, -2)) / 2
    size = ((sides @ matrix) * sides).sum(-1) / 2
    return gap / torch.where(size > 1e-12, size, 1.0)


# ---------------------------------------------------------------------------------------------------------------------
# Host route
# ---------------------------------------------------------------------------------------------------------------------


def host_route(matrix: Tensor, factor: Tensor, sides: Tensor, active: Tensor) -> tuple[Tensor, Tensor]:
    """Pivots one side after another; Gramians with a side that fails go all together to the device route."""
    num_sides, num_tasks = sides.shape[-2:]
    flat = [tensor.reshape(-1, *shape) for tensor, shape in (
        (matrix, (num_tasks, num_tasks)), (factor, (num_tasks, num_tasks)), (sides, (num_sides, num_tasks)),
        (active, (num_tasks,)),
    )]  # fmt: skip
    arrays = [tensor.numpy(force=True) for tensor in flat]
    added, gap = np.zeros_like(arrays[2]), np.zeros(arrays[2].shape[:2])
    failed = []
    for index, (square, triangle, rows, present) in enumerate(zip(*arrays, strict=True)):
        answers = [pivot(square, triangle, row, present) for row in rows]
        if any(answer is None for answer in answers):
            failed.append(index)
            continue
        for row, answer in enumerate(answers):
            added[index, row], gap[index, row] = answer  # pyright: ignore[reportGeneralTypeIssues]
    device = matrix.device
    added, gap = torch.from_numpy(added).to(device), torch.from_numpy(gap).to(device)
    if failed:
        added[failed], gap[failed] = device_route(*(tensor[failed] for tensor in flat))
    return added.reshape(sides.shape), gap.reshape(sides.shape[:-1])


def pivot(matrix: Array, factor: Array, side: Array, active: Mask) -> tuple[Array, float] | None:
    """s and its gap by block pivoting, or None without a certified answer.

    Drop negative s_i from the support, let in tasks with z_i < 0, until neither is left.
    """
    start = matrix @ side
    support, slope, added = np.zeros(len(side), dtype=bool), start, np.zeros(len(side))
    pivoting = Pivoting(len(side))
    for _ in range(PIVOTS):
        wrong = active & np.where(support, added < 0, slope < -1e-14)
        if not pivoting.change_sides(support, wrong):
            break
        chosen = support.nonzero()[0]
        added = np.zeros(len(side))
        if len(chosen):
            added[chosen] = solve_positive(matrix[chosen[:, None], chosen], -start[chosen], lower=1)[1]
        slope = start + matrix @ added
    else:
        return None
    slope = matrix @ (side + added)
    negative = np.maximum(-slope, 0.0)
    whitened = solve_triangular(factor, negative, lower=1)[0]
    size = float(start @ side) / 2
    gap = float(added @ np.maximum(slope, 0.0) + whitened @ whitened / 2) / (size if size > 1e-12 else 1.0)
    return (added, gap) if gap <= CERTIFIED else None
