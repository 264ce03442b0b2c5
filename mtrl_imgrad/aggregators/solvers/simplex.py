"""The one optimisation problem behind MGDA, CAGrad, IMGrad, ConicGrad and SDMGrad, and two ways to solve it.

    minimise  f(w) = p.w + r sqrt(w'Mw) + (q/2) w'Mw   over the simplex {w >= 0, sum w = 1},   r, q >= 0

* device route: a primal-dual interior point in torch. Batched, fixed number of steps, nothing waits for the host.
* host route: an active set in numpy, for CPU tensors (`active_set`). Each support has a closed-form minimiser; block
  pivoting (Kim and Park 2011, for non-negative least squares) finds the support, usually in 2 to 7 factorisations. It
  is exact to rounding. A Gramian that it cannot certify goes to the device route.

Both see M + delta diag(M) with the smallest delta of 1e-13, 1e-10, ..., 0.1 that lets Cholesky succeed. For a float64
Gramian that is 1e-13, as if every task had a private coordinate of 3e-7 times its norm, and makes w unique. Larger
values occur only for Gramians that are not positive semi-definite, such as those of products in float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mtrl_imgrad.aggregators.solvers.active_set import TIE_BREAK, active_set, near_zero
from mtrl_imgrad.aggregators.solvers.ridges import smallest_ridge

Route = Literal["auto", "device", "host"]
ROUTES: tuple[Route, ...] = ("auto", "device", "host")

UNCERTIFIED = 1e-6  # a gap above this after all steps occurs only at the kink J^T w = 0
INTERIOR_POINT_STEPS = 25
ROOT_STEPS = 6
CENTRING = 0.15  # every step aims at this fraction of the present complementarity
TO_BOUNDARY = 0.995


@dataclass(frozen=True)
class SimplexSolution:
    """A minimiser of the kernel and its certificate."""

    weights: Float[Tensor, "*batch tasks"]
    """w, on the simplex, 0 for inactive tasks."""

    unit: Float[Tensor, "*batch tasks"]
    """Row weights w / ||J^T w|| of the unit vector; all 0 where J^T w vanishes at the optimum (0 lies in the hull of
    the gradients) and no direction is defined: where ||J^T w||^2 is at most 1e-10 + 2 (rounding + delta) times
    sum_i w_i ||g_i||^2."""

    gap: Float[Tensor, "*batch"]
    """(f(w) - the lower bound that the gradient at w gives) / |f(uniform weights)|, for the Gramian with its delta.
    Where `unit` is 0 for want of a direction the bound is loose and the gap may be large."""

    relative_gap: Float[Tensor, "*batch"]
    """The same difference over the size of f's own terms at w, |p|.w + r ||J^T w|| + (q/2) ||J^T w||^2: the figure to
    read where some gradients are much longer than others, so that f(w) is tiny beside f(uniform weights). In float64
    it grows with the ratio of the lengths, to about 1e-13 times it; above 1e-3 the direction is in doubt.
    It is computed in float64 too: beyond a ratio of 1e8 a small value is no proof."""

    @property
    def gaps(self) -> dict[str, Float[Tensor, "*batch"]]:
        """Both, as rules report them."""
        return {"gap": self.gap, "relative_gap": self.relative_gap}

    def larger_gaps(self, other: SimplexSolution) -> dict[str, Float[Tensor, "*batch"]]:
        """`gaps` of a rule that takes two solves."""
        return {name: torch.maximum(gap, other.gaps[name]) for name, gap in self.gaps.items()}


class Problem(NamedTuple):
    """The kernel's data."""

    matrix: Tensor
    linear: Tensor
    norm: Tensor
    quadratic: Tensor
    row_norms: Tensor
    active: Tensor
    rounding: Tensor


def minimise_on_simplex(
    gramian: Float[Tensor, "*batch tasks tasks"],
    linear: Float[Tensor, "*batch tasks"],
    norm: Float[Tensor, "*batch"],
    quadratic: Float[Tensor, "*batch"],
    active: Bool[Tensor, "*batch tasks"],
    row_norms: Float[Tensor, "*batch tasks"] | None = None,
    solver: Route = "auto",
    rounding: float | Float[Tensor, "*batch"] = 0.0,
) -> SimplexSolution:
    """Minimises p.w + r sqrt(w'Mw) + (q/2) w'Mw over the simplex of the active tasks; all float64.

    Args:
        gramian: M, of mean diagonal about 1, with zero rows for inactive tasks.
        linear: p.
        norm: r >= 0.
        quadratic: q >= 0.
        active: at least one per Gramian.
        row_norms: squared norms that delta is relative to, where M is a difference; by default M's diagonal.
        solver: the route; `auto` takes the host for plain CPU tensors outside of torch.compile.
        rounding: how well M is known: M_ij to about this times the roots of its tasks' row_norms, see `Given.rounding`.
    """
    row_norms = gramian.diagonal(dim1=-2, dim2=-1) if row_norms is None else row_norms
    problem = Problem(gramian, linear, norm, quadratic, row_norms, active, torch.zeros_like(norm) + rounding)
    return host_route(problem) if takes_host(gramian, solver) else device_route(scaled(problem))


def takes_host(gramian: Tensor, solver: Route) -> bool:
    """Whether a solver takes its host route; `auto` does for plain CPU tensors outside of torch.compile."""
    plain = type(gramian) is Tensor and gramian.device.type == "cpu" and not torch.compiler.is_compiling()
    return solver == "host" or (solver == "auto" and plain)


# ---------------------------------------------------------------------------------------------------------------------
# Device route
# ---------------------------------------------------------------------------------------------------------------------


def scaled(problem: Problem) -> Problem:
    """The same problem with p, r and q divided by max|p| + r + q, and r at least TIE_BREAK where q = 0."""
    linear, norm, quadratic = problem.linear, problem.norm, problem.quadratic
    size = torch.where(problem.active, linear, 0.0).abs().amax(-1) + norm + quadratic
    scale = torch.where(size > 0, size, 1.0)
    norm, quadratic = norm / scale, quadratic / scale
    norm = torch.where(quadratic > 0, norm, norm.clamp_min(TIE_BREAK))
    return problem._replace(linear=linear / scale[..., None], norm=norm, quadratic=quadratic)


def with_ridge(problem: Problem) -> tuple[Tensor, Tensor]:
    """M + delta diag(row_norms) for the smallest delta that makes it numerically positive definite, and that delta."""
    ridge = smallest_ridge(problem.matrix, torch.where(problem.active, problem.row_norms, 1.0))
    return problem.matrix + torch.diag_embed(ridge[..., None] * problem.row_norms), ridge


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

    Unknowns: w, its multipliers z, and the row weights v of a vector of norm <= 1 with ||J^T w|| v = w, linearised as
    Conn and Overton do for sums of norms (Newton on the norm itself may cycle near J^T w = 0). The kink at J^T w = 0 is
    rounded off by a ridge that shrinks with the complementarity. The Newton matrix is singular along w when q = 0;
    adding a multiple of 11', which the constraint sum w = 1 makes harmless, cures that (without it the gap stalls near
    1e-8, and a multiple much above w'(k M)w would bury the rows of short gradients). Of the uniform weights, every
    iterate and the closed form, the one with the smallest certified gap is returned, so steps lost to rounding cost
    nothing.
    """
    matrix, ridge = with_ridge(problem)
    active, norm, quadratic = problem.active, problem.norm[..., None], problem.quadratic[..., None]
    ones = active.to(torch.float64)
    count = ones.sum(-1, keepdim=True)
    linear = torch.where(active, problem.linear, 1.0)  # an inactive w_i costs 1, touches nothing else, and goes to 0
    uniform = ones / count
    best_weights, best_gap = uniform, certificate(problem, matrix, uniform).nan_to_num(nan=torch.inf)
    # The start must suit gradients of very different lengths, since each step shrinks w_i z_i by 1 / CENTRING at most:
    # all w_i ||g_i|| alike, and z of the order of f - min f at least.
    lengths = torch.where(active, problem.row_norms, 1.0).sqrt()
    weights = 1.0 / (lengths * (ones / lengths).sum(-1, keepdim=True))
    image = (matrix @ (ones * weights)[..., None]).squeeze(-1)
    length = ((weights * image).sum(-1, keepdim=True) + (ones * weights * lengths).sum(-1, keepdim=True) ** 2).sqrt()
    slope = linear + (norm / length + quadratic) * image
    level = (ones * weights * slope).sum(-1, keepdim=True)
    terms = (ones * weights * linear.abs()).sum(-1, keepdim=True) + (norm + quadratic * length) * length
    terms = terms - (ones * linear).amin(-1, keepdim=True).clamp(max=0.0)
    multipliers = torch.where(active, (slope - level).abs() + terms, 1.0)
    unit, support, curvature = ones * weights / length, active, norm / length + quadratic

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
        lift = curvature * length**2
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
    gap = over_uniform(best_gap, objective(problem, matrix, uniform))
    squared_norm = (best_weights * (matrix @ best_weights[..., None]).squeeze(-1)).sum(-1)
    terms = objective(problem._replace(linear=problem.linear.abs()), matrix, best_weights)
    own_gap = best_gap.clamp_min(0.0) / torch.where(terms > 0, terms, 1.0)
    zero = near_zero(problem.rounding + ridge) * (best_weights * problem.row_norms).sum(-1)
    defined = (squared_norm > zero) & (gap <= UNCERTIFIED)
    unit = best_weights / torch.where(defined, squared_norm, torch.inf).sqrt()[..., None]
    return SimplexSolution(best_weights, unit, gap, own_gap)


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
    shares = ones / torch.where(support, problem.row_norms, 1.0)
    offset = (shares * problem.linear).sum(-1, keepdim=True) / shares.sum(-1, keepdim=True)
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


def over_uniform(gap: Tensor, uniform_value: Tensor) -> Tensor:
    """The gap over |f(uniform)|; where that is 0 next to max|p| + r + q = 1, the gap itself."""
    size = uniform_value.abs()
    return gap.clamp_min(0.0) / torch.where(size > 1e-12, size, 1.0)


# ---------------------------------------------------------------------------------------------------------------------
# Host route
# ---------------------------------------------------------------------------------------------------------------------


def host_route(problem: Problem) -> SimplexSolution:
    """Solves one Gramian after another in numpy; those that fail, all together on the device route."""
    batch, num_tasks = problem.norm.shape, problem.linear.shape[-1]
    flat = Problem(*(tensor.reshape(-1, *tensor.shape[len(batch) :]) for tensor in problem))
    arrays = [tensor.numpy(force=True) for tensor in flat]
    count = len(arrays[0])
    weights, unit = np.zeros((count, num_tasks)), np.zeros((count, num_tasks))
    gap, own_gap = np.zeros(count), np.zeros(count)
    failed = []
    for index, data in enumerate(zip(*arrays, strict=True)):
        answer = active_set(*data)
        if answer is None:
            failed.append(index)
        else:
            weights[index], unit[index], gap[index], own_gap[index] = answer
    answers = [torch.from_numpy(array).to(problem.matrix.device) for array in (weights, unit, gap, own_gap)]
    if failed:
        rest = device_route(scaled(Problem(*(tensor[failed] for tensor in flat))))
        for answer, part in zip(answers, (rest.weights, rest.unit, rest.gap, rest.relative_gap), strict=True):
            answer[failed] = part
    shape = (*batch, num_tasks)
    return SimplexSolution(
        answers[0].reshape(shape), answers[1].reshape(shape), answers[2].reshape(batch), answers[3].reshape(batch)
    )
