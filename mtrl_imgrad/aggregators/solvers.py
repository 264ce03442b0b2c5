"""The one optimisation problem behind MGDA, CAGrad, IMGrad and ConicGrad, and two ways to solve it.

    minimise  f(w) = p.w + r sqrt(w'Mw) + (q/2) w'Mw   over the simplex {w >= 0, sum w = 1},   r, q >= 0

* device route: a primal-dual interior point in torch. Batched, fixed number of steps, nothing waits for the host.
* host route: an active set in numpy, for CPU tensors. Each support has a closed-form minimiser; block pivoting
  (Kim and Park 2011, for non-negative least squares) finds the support, usually in 2 to 7 factorisations. It is exact
  to rounding. A Gramian that it cannot certify, or where J^T w vanishes, goes to the device route, so that both
  routes answer degenerate cases alike.

Both see M + delta diag(M) with the smallest delta of 1e-13, 1e-10, ..., 0.1 that lets Cholesky succeed. For a float64
Gramian that is 1e-13, as if every task had a private coordinate of 3e-7 times its norm, and makes w unique. Larger
values occur only for Gramians that are not positive semi-definite, such as rounded ones.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from scipy.linalg.lapack import dposv, dpotrf
from torch import Tensor

Route = Literal["auto", "device", "host"]
ROUTES: tuple[Route, ...] = ("auto", "device", "host")

# J^T w counts as zero where ||J^T w||^2 is at most this fraction of sum_i w_i ||g_i||^2.
NEAR_ZERO = 1e-10
# Ties in a linear objective go to the shortest J^T w, through an r of at least this fraction of max|p| + r + q.
TIE_BREAK = 1e-10
RIDGES = (1e-13, 1e-10, 1e-7, 1e-4, 1e-1)
CERTIFIED = 1e-9  # the relative gap above which the host route hands over
UNCERTIFIED = 1e-6  # a gap above this after all steps occurs only at the kink J^T w = 0
INTERIOR_POINT_STEPS = 25
ROOT_STEPS = 6
CENTRING = 0.15  # every step aims at this fraction of the present complementarity
TO_BOUNDARY = 0.995
PIVOTS = 60


@dataclass(frozen=True)
class SimplexSolution:
    """A minimiser of the kernel and its certificate."""

    weights: Float[Tensor, "*batch tasks"]
    """w, on the simplex, 0 for inactive tasks."""

    unit: Float[Tensor, "*batch tasks"]
    """Row weights w / ||J^T w|| of the unit vector; all 0 where J^T w vanishes at the optimum (0 lies in the hull of the
    gradients) and no direction is defined."""

    gap: Float[Tensor, "*batch"]
    """(f(w) - the lower bound that the gradient at w gives) / |f(uniform weights)|, for the Gramian with its delta.
    Where `unit` is 0 for want of a direction the bound is loose and the gap may be large."""


class Problem(NamedTuple):
    """The kernel's data, p, r and q divided by max|p| + r + q; the host route holds the same as numpy arrays."""

    matrix: Tensor
    linear: Tensor
    norm: Tensor
    quadratic: Tensor
    row_norms: Tensor
    active: Tensor


def minimise_on_simplex(
    gramian: Float[Tensor, "*batch tasks tasks"],
    linear: Float[Tensor, "*batch tasks"],
    norm: Float[Tensor, "*batch"],
    quadratic: Float[Tensor, "*batch"],
    active: Bool[Tensor, "*batch tasks"],
    row_norms: Float[Tensor, "*batch tasks"] | None = None,
    solver: Route = "auto",
) -> SimplexSolution:
    """Minimises p.w + r sqrt(w'Mw) + (q/2) w'Mw over the simplex of the active tasks; all float64.

    Args:
        gramian: M, of mean diagonal about 1, with zero rows for inactive tasks.
        linear: p. norm: r >= 0. quadratic: q >= 0.
        active: at least one per Gramian.
        row_norms: squared norms that delta is relative to, where M is a difference; by default M's diagonal.
        solver: the route; `auto` takes the host for plain CPU tensors outside of torch.compile.
    """
    row_norms = gramian.diagonal(dim1=-2, dim2=-1) if row_norms is None else row_norms
    size = torch.where(active, linear, 0.0).abs().amax(-1) + norm + quadratic
    scale = torch.where(size > 0, size, 1.0)
    norm = torch.clamp(norm / scale, min=TIE_BREAK)
    problem = Problem(gramian, linear / scale[..., None], norm, quadratic / scale, row_norms, active)
    on_host = type(gramian) is Tensor and gramian.device.type == "cpu" and not torch.compiler.is_compiling()
    if solver == "host" or (solver == "auto" and on_host):
        return host_route(problem)
    return device_route(problem)


# ---------------------------------------------------------------------------------------------------------------------
# Device route
# ---------------------------------------------------------------------------------------------------------------------


def with_ridge(problem: Problem) -> Tensor:
    """M + delta diag(row_norms) for the smallest delta that makes it numerically positive definite."""
    ridges = torch.logspace(-13, -1, len(RIDGES), dtype=torch.float64, device=problem.matrix.device)
    diagonals = torch.where(problem.active[..., None, :], ridges[:, None] * problem.row_norms[..., None, :], 1.0)
    failed = torch.linalg.cholesky_ex(problem.matrix[..., None, :, :] + torch.diag_embed(diagonals)).info != 0
    index = failed.int().cumprod(-1).sum(-1).clamp(max=len(RIDGES) - 1)
    return problem.matrix + torch.diag_embed(ridges[index][..., None] * problem.row_norms)


def certificate(problem: Problem, matrix: Tensor, weights: Tensor) -> Float[Tensor, "*batch"]:
    """f(w) - f* is at most this: max_i (w - e_i).grad f(w), the Frank-Wolfe gap of a convex f. NaN where J^T w = 0."""
    image = (matrix @ weights[..., None]).squeeze(-1)
    length = (weights * image).sum(-1, keepdim=True).sqrt()
    gradient = problem.linear + (problem.norm[..., None] / length + problem.quadratic[..., None]) * image
    lowest = torch.where(problem.active, gradient, torch.inf).amin(-1)
    return (weights * gradient).sum(-1) - lowest


def step_length(value: Tensor, change: Tensor) -> Tensor:
    """The largest step in (0, 1] that keeps value + step * change positive, with a margin."""
    room = torch.where(change < 0, -value / torch.where(change < 0, change, -1.0), torch.inf)
    return (TO_BOUNDARY * room.amin(-1, keepdim=True)).clamp(max=1.0)


def device_route(problem: Problem) -> SimplexSolution:
    """Primal-dual interior point, then the closed-form minimiser on the support that it found.

    Unknowns: w, its multipliers z, and the row weights v of a vector of norm <= 1 with ||J^T w|| v = w (the linearisation
    of Conn and Overton for sums of norms; Newton on the norm itself may cycle near J^T w = 0). The Newton matrix is singular along w when q = 0; adding a multiple of 11', which the constraint sum w = 1 makes
    harmless, cures that (without it the gap stalls near 1e-8). The kink at J^T w = 0 is rounded off by a
    ridge that shrinks with the complementarity. Of the uniform weights, every iterate and the closed form, the one with
    the smallest certified gap is returned, so steps lost to rounding cost nothing.
    """
    matrix = with_ridge(problem)
    active, norm, quadratic = problem.active, problem.norm[..., None], problem.quadratic[..., None]
    ones = active.to(torch.float64)
    count = ones.sum(-1, keepdim=True)
    linear = torch.where(active, problem.linear, 1.0)  # an inactive w_i costs 1, touches nothing else, and goes to 0
    uniform = ones / count
    best_weights, best_gap = uniform, certificate(problem, matrix, uniform).nan_to_num(nan=torch.inf)
    image = (matrix @ uniform[..., None]).squeeze(-1)
    length = ((uniform * image).sum(-1, keepdim=True) + (uniform * problem.row_norms).sum(-1, keepdim=True)).sqrt()
    slope = linear + (norm / length + quadratic) * image
    lowest = torch.where(active, slope, torch.inf).amin(-1, keepdim=True)
    highest = torch.where(active, slope, -torch.inf).amax(-1, keepdim=True)
    multipliers = torch.where(active, slope - 2.0 * lowest + highest + 1e-3, 1.0)
    weights = torch.where(active, uniform, 1.0 / count)
    unit = uniform / length
    support = active

    for _ in range(INTERIOR_POINT_STEPS):
        complementarity = (ones * weights * multipliers).sum(-1, keepdim=True) / count
        smooth = matrix + torch.diag_embed(complementarity**2 * problem.row_norms)
        image = (smooth @ weights[..., None]).squeeze(-1)
        length = (weights * image).sum(-1, keepdim=True).sqrt()
        unit_image = (smooth @ unit[..., None]).squeeze(-1)
        excess = (unit * unit_image).sum(-1, keepdim=True).clamp_min(1.0).sqrt()
        unit, unit_image = unit / excess, unit_image / excess
        cross = unit_image[..., :, None] * image[..., None, :]
        curvature = norm / length + quadratic
        lift = curvature * length**2 + 1.0
        newton = (
            curvature[..., None] * smooth
            - (norm / (2.0 * length**2))[..., None] * (cross + cross.mT)
            + torch.diag_embed(multipliers / weights)
            + lift[..., None] * ones[..., :, None] * ones[..., None, :]
        )
        factor = torch.linalg.cholesky_ex(newton).L
        target = CENTRING * complementarity / weights
        solved = torch.cholesky_solve(torch.stack([target - linear - curvature * image, ones], dim=-1), factor)
        missing = 1.0 - (ones * (weights + solved[..., 0])).sum(-1, keepdim=True)
        d_weights = solved[..., 0] + missing / (ones * solved[..., 1]).sum(-1, keepdim=True) * solved[..., 1]
        d_multipliers = target - multipliers - (multipliers / weights) * d_weights
        d_length = (image * d_weights).sum(-1, keepdim=True) / length
        primal_step = step_length(weights, d_weights)
        unit = unit + primal_step * ones * (weights + d_weights - (length + d_length) * unit) / length
        d_weights, d_multipliers = primal_step * d_weights, step_length(multipliers, d_multipliers) * d_multipliers
        # On the support z shrinks faster than w, elsewhere w faster than z (Tapia's indicator), whatever their scales.
        support = active & (d_weights / weights > d_multipliers / multipliers)
        weights, multipliers = weights + d_weights, multipliers + d_multipliers
        best_weights, best_gap = keep_better(problem, matrix, ones * weights, best_weights, best_gap)

    closed_form = on_support(problem, matrix, support, curvature)
    best_weights, best_gap = keep_better(problem, matrix, closed_form, best_weights, best_gap)
    gap = relative_gap(best_gap, objective(problem, matrix, uniform))
    squared_norm = (best_weights * (matrix @ best_weights[..., None]).squeeze(-1)).sum(-1)
    defined = (squared_norm > NEAR_ZERO * (best_weights * problem.row_norms).sum(-1)) & (gap <= UNCERTIFIED)
    unit = best_weights / torch.where(defined, squared_norm, torch.inf).sqrt()[..., None]
    return SimplexSolution(best_weights, unit, gap)


def keep_better(
    problem: Problem, matrix: Tensor, candidate: Tensor, best_weights: Tensor, best_gap: Tensor
) -> tuple[Float[Tensor, "*batch tasks"], Float[Tensor, "*batch"]]:
    """The candidate, brought onto the simplex, where its gap is smaller (a NaN never is)."""
    candidate = candidate.clamp_min(0.0)
    candidate = candidate / candidate.sum(-1, keepdim=True)
    gap = certificate(problem, matrix, candidate)
    better = gap < best_gap
    return torch.where(better[..., None], candidate, best_weights), torch.where(better, gap, best_gap)


def on_support(problem: Problem, matrix: Tensor, support: Tensor, curvature: Tensor) -> Float[Tensor, "*batch tasks"]:
    """`support_minimiser` for a batch; k starts at the interior point's and takes a fixed number of Newton steps."""
    ones = support.to(torch.float64)
    norm, quadratic = problem.norm[..., None], problem.quadratic[..., None]
    offset = (ones * problem.linear).sum(-1, keepdim=True) / ones.sum(-1, keepdim=True)
    tilt = ones * (problem.linear - offset)
    masked = matrix * (ones[..., :, None] * ones[..., None, :]) + torch.diag_embed(1.0 - ones)
    solved = torch.cholesky_solve(torch.stack([ones, tilt], dim=-1), torch.linalg.cholesky_ex(masked).L)
    a, b = solved.sum(-2, keepdim=True).unbind(-1)
    d = ((solved[..., 1] * tilt).sum(-1, keepdim=True) - b**2 / a).clamp_min(0.0)
    k = curvature
    for _ in range(ROOT_STEPS):
        length = (1.0 / a + d / k**2).sqrt()
        excess = (k - quadratic) * length - norm
        k = torch.maximum(k - excess / (length - (k - quadratic) * d / (k**3 * length)), k / 2)
    return ones * ((k + b) / a * solved[..., 0] - solved[..., 1]) / k


def objective(problem: Problem, matrix: Tensor, weights: Tensor) -> Float[Tensor, "*batch"]:
    """f(w)."""
    squared_norm = (weights * (matrix @ weights[..., None]).squeeze(-1)).sum(-1).clamp_min(0.0)
    return (
        (problem.linear * weights).sum(-1) + problem.norm * squared_norm.sqrt() + problem.quadratic / 2 * squared_norm
    )


def relative_gap(gap: Tensor, uniform_value: Tensor) -> Tensor:
    """The gap over |f(uniform)|; where that is 0 next to max|p| + r + q = 1, the gap itself."""
    size = uniform_value.abs()
    return gap.clamp_min(0.0) / torch.where(size > 1e-12, size, 1.0)


# ---------------------------------------------------------------------------------------------------------------------
# Host route
# ---------------------------------------------------------------------------------------------------------------------

Array = NDArray[np.float64]


def host_route(problem: Problem) -> SimplexSolution:
    """Solves one Gramian after another in numpy; those that fail, all together on the device route."""
    batch, num_tasks = problem.norm.shape, problem.linear.shape[-1]
    flat = Problem(*(tensor.reshape(-1, *tensor.shape[len(batch) :]) for tensor in problem))
    arrays = Problem(*(tensor.numpy(force=True) for tensor in flat))
    count = len(arrays.linear)
    weights, unit, gap = np.zeros((count, num_tasks)), np.zeros((count, num_tasks)), np.zeros(count)
    failed = []
    for index in range(count):
        answer = active_set(*(array[index] for array in arrays))
        if answer is None:
            failed.append(index)
        else:
            weights[index], unit[index], gap[index] = answer
    answers = [torch.from_numpy(array).to(problem.matrix.device) for array in (weights, unit, gap)]
    if failed:
        rest = device_route(Problem(*(tensor[failed] for tensor in flat)))
        for answer, part in zip(answers, (rest.weights, rest.unit, rest.gap), strict=True):
            answer[failed] = part
    shape = (*batch, num_tasks)
    return SimplexSolution(answers[0].reshape(shape), answers[1].reshape(shape), answers[2].reshape(batch))


def active_set(
    matrix: Array, linear: Array, norm: float, quadratic: float, row_norms: Array, active: NDArray[np.bool_]
) -> tuple[Array, Array, float] | None:
    """Block pivoting on the support: drop negative weights, let in tasks that would lower f, until neither is left.

    All violators change sides at once; after three rounds without progress only the last one does (Murty's rule).

    Returns:
        w, w / ||J^T w|| and the relative gap; None without a certified answer or where J^T w vanishes.
    """
    if not active.all():
        keep = np.flatnonzero(active)
        answer = active_set(matrix[np.ix_(keep, keep)], linear[keep], norm, quadratic, row_norms[keep], active[keep])
        if answer is None:
            return None
        weights, unit = np.zeros(len(active)), np.zeros(len(active))
        weights[keep], unit[keep] = answer[0], answer[1]
        return weights, unit, answer[2]

    norm, quadratic, num_tasks = float(norm), float(quadratic), len(linear)
    matrix = matrix.copy()
    matrix.flat[:: num_tasks + 1] += RIDGES[0] * row_norms
    if dpotrf(matrix, lower=1)[1] != 0:
        return None
    support, weights = np.ones(num_tasks, dtype=bool), np.zeros(num_tasks)
    fewest, patience = num_tasks + 1, 3
    for _ in range(PIVOTS):
        chosen = support.nonzero()[0]
        values, curvature, level = support_minimiser(matrix[chosen[:, None], chosen], linear[chosen], norm, quadratic)
        wrong = np.zeros(num_tasks, dtype=bool)
        wrong[chosen] = values < 0
        if curvature > 0:
            weights[:] = 0.0
            weights[chosen] = values
            wrong |= (linear + curvature * (matrix @ weights) < level - 1e-13) & ~support
        num_wrong = int(wrong.sum())
        if num_wrong == 0:
            break
        if num_wrong < fewest:
            fewest, patience = num_wrong, 3
        else:
            patience -= 1
        if patience >= 0:
            support ^= wrong
        else:
            support[wrong.nonzero()[0][-1]] ^= True
    else:
        return None

    weights /= weights.sum()
    image = matrix @ weights
    squared_norm = float(weights @ image)
    if not squared_norm > NEAR_ZERO * float(weights @ row_norms):
        return None
    length = math.sqrt(squared_norm)
    gradient = linear + (norm / length + quadratic) * image
    gap = max(float(weights @ gradient - gradient.min()), 0.0)
    uniform = float(matrix.mean())
    size = abs(float(linear.mean()) + norm * math.sqrt(max(uniform, 0.0)) + quadratic / 2 * uniform)
    gap = gap / size if size > 1e-12 else gap
    return (weights, weights / length, gap) if gap <= CERTIFIED else None


def support_minimiser(matrix: Array, linear: Array, norm: float, quadratic: float) -> tuple[Array, float, float]:
    """The minimiser of f over sum w = 1 (signs free), its k = r / ||J^T w|| + q, and the multiplier of the constraint.

    Stationarity is p + k M w = level 1. With A = 1'M^-1 1, B = 1'M^-1 p and D = p'M^-1 p - B^2 / A it gives
    w = M^-1 ((k + B) / A 1 - p) / k and ||J^T w||^2 = 1 / A + D / k^2, so (k - q) sqrt(1 / A + D / k^2) = r, whose left
    side grows with k. If q = 0 and D >= r^2 there is no minimiser: the direction of descent comes back, with k = 0.
    """
    offset = float(linear.mean())
    sides = np.ones((len(linear), 2), order="F")
    sides[:, 1] = linear - offset
    solved = dposv(matrix, sides, lower=1)[1]
    ones, tilted = solved[:, 0], solved[:, 1]
    a, b = float(ones.sum()), float(tilted.sum())
    d = max(float(tilted @ sides[:, 1]) - b * b / a, 0.0)
    if quadratic == 0.0:
        if norm * norm <= d:
            return (b / a) * ones - tilted, 0.0, 0.0
        curvature = math.sqrt(a * (norm * norm - d))
    else:
        curvature = positive_root(a, d, norm, quadratic)
    level = (curvature + b) / a
    return (level * ones - tilted) / curvature, curvature, level + offset


def positive_root(a: float, d: float, norm: float, quadratic: float) -> float:
    """The k >= q with (k - q) sqrt(1/a + d/k^2) = r: Newton kept inside a shrinking bracket."""
    low, high = quadratic, quadratic + norm * math.sqrt(a)
    k = high
    for _ in range(100):
        length = math.sqrt(1.0 / a + d / (k * k))
        excess = (k - quadratic) * length - norm
        low, high = (low, k) if excess > 0 else (k, high)
        newton = k - excess / (length - (k - quadratic) * d / (k**3 * length))
        new = newton if low <= newton <= high else (low + high) / 2
        if abs(new - k) <= 1e-15 * k:
            break
        k = new
    return k
