"""The host route of `simplex` for one Gramian: block pivoting with a closed form on every support, in numpy.

Meant for few tasks, where the overhead of array calls counts more than arithmetic: 2 to 7 small factorisations.
"""

from __future__ import annotations

import math
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import get_lapack_funcs
from torch import Tensor

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]
Number = TypeVar("Number", float, Tensor)

NEAR_ZERO = 1e-10  # see `near_zero`
# Where q = 0, r is at least this fraction of max|p| + r: ties of a linear objective go to the shortest J^T w.
TIE_BREAK = 1e-10
RIDGES = (1e-13, 1e-10, 1e-7, 1e-4, 1e-1)  # fractions of diag(M) to add, see `simplex`
CERTIFIED = 1e-9  # the relative gap above which the answer is withheld
PIVOTS = 60
ROUNDING = 1e-15  # slopes within this fraction of their terms of one another count as equal

solve_positive, factorise = get_lapack_funcs(("posv", "potrf"), dtype=np.float64)


def near_zero(error: Number) -> Number:
    """The fraction of sum_i w_i ||g_i||^2 up to which ||J^T w||^2 counts as zero: NEAR_ZERO, and twice what errors of M
    of up to `error` ||g_i|| ||g_j|| (its rounding, its ridge) can add to it."""
    return NEAR_ZERO + 2.0 * error


def active_set(
    matrix: Array, linear: Array, norm: float, quadratic: float, row_norms: Array, active: Mask, rounding: float
) -> tuple[Array, Array, float, float] | None:
    """Minimises p.w + r sqrt(w'Mw) + (q/2) w'Mw over the simplex of the active tasks.

    Block pivoting on the support: drop negative weights, let in tasks that would lower f, until neither is left.

    Returns:
        w, w / ||J^T w||, and the gap, over |f(uniform)| and over the size of f's terms at w; None without a certified
        answer. Where J^T w vanishes the second is 0, and with r > 0 the gap may be large (see `SimplexSolution`).
    """
    if not active.all():
        keep = np.flatnonzero(active)
        part = matrix[np.ix_(keep, keep)]
        answer = active_set(part, linear[keep], norm, quadratic, row_norms[keep], active[keep], rounding)
        if answer is None:
            return None
        weights, unit = np.zeros(len(active)), np.zeros(len(active))
        weights[keep], unit[keep] = answer[0], answer[1]
        return weights, unit, answer[2], answer[3]

    norm, quadratic, num_tasks = float(norm), float(quadratic), len(linear)
    scale = float(np.abs(linear).max()) + norm + quadratic or 1.0
    linear, norm, quadratic = linear / scale, norm / scale, quadratic / scale
    norm = norm if quadratic > 0.0 else max(norm, TIE_BREAK)
    ridged = ((ridge, matrix + np.diag(ridge * row_norms)) for ridge in RIDGES)
    found = next((candidate for candidate in ridged if factorise(candidate[1], lower=1)[1] == 0), None)
    if found is None:
        return None
    ridge, matrix = found
    lengths, shares = np.sqrt(row_norms), 1.0 / row_norms
    support, weights = np.ones(num_tasks, dtype=bool), np.zeros(num_tasks)
    pivoting = Pivoting(num_tasks)
    for _ in range(PIVOTS):
        chosen = support.nonzero()[0]
        values, curvature, level = support_minimiser(
            matrix[chosen[:, None], chosen], linear[chosen], norm, quadratic, shares[chosen]
        )
        wrong = np.zeros(num_tasks, dtype=bool)
        wrong[chosen] = values < 0
        if curvature > 0:
            weights[:] = 0.0
            weights[chosen] = values
            image = matrix @ weights
            # |M| w is at most ||g_i|| sum_j w_j ||g_j||, so gradients of all lengths are judged by their own rounding.
            terms = curvature * float(lengths @ np.abs(weights)) * lengths + np.abs(linear) + abs(level)
            wrong |= (linear + curvature * image < level - ROUNDING * terms) & ~support
        if not pivoting.change_sides(support, wrong, may_empty=False):  # an empty support has no minimiser
            break
    else:
        return None

    weights /= weights.sum()
    image = matrix @ weights
    squared_norm = float(weights @ image)
    if not squared_norm > 0:
        return None
    length = math.sqrt(squared_norm)
    defined = squared_norm > near_zero(rounding + ridge) * float(weights @ row_norms)
    gradient = linear + (norm / length + quadratic) * image
    gap = max(float(weights @ gradient - gradient.min()), 0.0)
    uniform = float(matrix.mean())
    size = abs(float(linear.mean()) + norm * math.sqrt(max(uniform, 0.0)) + quadratic / 2 * uniform)
    own_size = float(np.abs(linear) @ weights) + norm * length + quadratic / 2 * squared_norm
    relative_gap, gap = gap / own_size, gap / size if size > 1e-12 else gap
    if gap > CERTIFIED and (defined or norm == 0.0):
        return None
    return weights, weights / length if defined else np.zeros(num_tasks), gap, relative_gap


class Pivoting:
    """Block pivoting (Kim and Park 2011): all violators change sides at once; after three rounds without progress only
    the last one does (Murty's rule)."""

    def __init__(self, num_tasks: int) -> None:
        self.fewest, self.patience = num_tasks + 1, 3

    def change_sides(self, support: Mask, wrong: Mask, may_empty: bool = True) -> bool:
        """Changes the support in place; False where nobody is wrong."""
        num_wrong = np.count_nonzero(wrong)
        if num_wrong == 0:
            return False
        self.patience = 3 if num_wrong < self.fewest else self.patience - 1
        self.fewest = min(num_wrong, self.fewest)
        if self.patience >= 0 and (may_empty or not np.array_equal(support, wrong)):
            support ^= wrong
        else:
            support[wrong.nonzero()[0][-1]] ^= True
        return True


def support_minimiser(
    matrix: Array, linear: Array, norm: float, quadratic: float, shares: Array
) -> tuple[Array, float, float]:
    """The minimiser of f over sum w = 1 (signs free), its k = r / ||J^T w|| + q, and the multiplier of the constraint.

    Stationarity is p + k M w = level 1. With A = 1'M^-1 1, B = 1'M^-1 p and D = p'M^-1 p - B^2 / A it gives
    w = M^-1 ((k + B) / A 1 - p) / k and ||J^T w||^2 = 1 / A + D / k^2, so (k - q) sqrt(1 / A + D / k^2) = r, whose left
    side grows with k. If q = 0 and D >= r^2 there is no minimiser: the direction of descent comes back, with k = 0.
    p is taken from its mean under `shares`, 1 / ||g_i||^2: a mean in which long gradients outweigh short ones would
    round off the entries of the latter.
    """
    offset = float(linear @ shares) / float(shares.sum())
    sides = np.ones((len(linear), 2), order="F")
    sides[:, 1] = linear - offset
    solved = solve_positive(matrix, sides, lower=1)[1]
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
