"""Independent answers: scipy's NNLS, cvxpy with CLARABEL, and loops over explicit vectors."""

from __future__ import annotations

import warnings

import cvxpy as cp
import numpy as np
from mpmath import mp
from numpy.typing import NDArray
from scipy.optimize import nnls

Array = NDArray[np.float64]
TOLERANCES = {"tol_gap_abs": 1e-13, "tol_gap_rel": 1e-13, "tol_feas": 1e-13}


def solve(problem: cp.Problem) -> None:
    """To the last digit that CLARABEL has; that it stops short of 1e-13 is expected and covered by the tolerances."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Solution may be inaccurate", category=UserWarning)
        problem.solve(solver=cp.CLARABEL, **TOLERANCES)
    assert problem.status in (cp.OPTIMAL, cp.OPTIMAL_INACCURATE)


def coordinates(jacobian: Array) -> Array:
    """The rows in an orthonormal basis of their span, scaled to mean squared norm 1: same geometry, fewer columns."""
    triangle = np.linalg.qr(jacobian.T, mode="r").T
    return triangle / np.sqrt((triangle**2).sum(1).mean())


def mgda_weights(jacobian: Array) -> Array:
    """min ||J^T w|| over the simplex is NNLS on [J^T; 1] w = [0; 1], normalised."""
    rows = coordinates(jacobian)
    system = np.vstack([rows.T, np.ones(len(rows))])
    weights, _ = nnls(system, np.append(np.zeros(rows.shape[1]), 1.0), maxiter=1000)
    return weights / weights.sum()


def simplex_kernel(jacobian: Array, linear: Array, norm: float, quadratic: float) -> Array:
    """argmin of p.w + r ||J^T w|| + (q/2) ||J^T w||^2 over the simplex."""
    weights = cp.Variable(len(jacobian))
    combined = jacobian.T @ weights
    objective = linear @ weights + norm * cp.norm(combined) + quadratic / 2 * cp.sum_squares(combined)
    solve(cp.Problem(cp.Minimize(objective), [weights >= 0, cp.sum(weights) == 1]))
    return np.asarray(weights.value)


def cagrad_primal(jacobian: Array, c: float) -> Array:
    """argmax over d of min_i <g_i, d> subject to ||d - g0|| <= c ||g0||."""
    mean = jacobian.mean(0)
    direction = cp.Variable(jacobian.shape[1])
    constraints = [cp.norm(direction - mean) <= c * np.linalg.norm(mean)]
    solve(cp.Problem(cp.Maximize(cp.min(jacobian @ direction)), constraints))
    return np.asarray(direction.value)


def conic_primal(jacobian: Array, c: float) -> tuple[Array, float]:
    """argmax and max of min_i <g_i, d> subject to <g0, d> >= c ||g0|| ||d||, ||d|| <= ||g0||."""
    mean = jacobian.mean(0)
    length = float(np.linalg.norm(mean))
    direction = cp.Variable(jacobian.shape[1])
    constraints = [c * length * cp.norm(direction) <= mean @ direction, cp.norm(direction) <= length]
    problem = cp.Problem(cp.Maximize(cp.min(jacobian @ direction)), constraints)
    solve(problem)
    return np.asarray(direction.value), float(problem.value)


def pcgrad_direction(jacobian: Array, order: NDArray[np.int64]) -> Array:
    """Algorithm 1 of the PCGrad paper on explicit vectors, task i meeting the others in `order[i]`; the mean."""
    projected = []
    for task, gradient in enumerate(jacobian):
        own = gradient.copy()
        for other in order[task]:
            partner = jacobian[other]
            if other != task and own @ partner < 0:
                own = own - (own @ partner) / (partner @ partner) * partner
        projected.append(own)
    return np.mean(projected, axis=0)


def exact_kernel(jacobian: Array, linear: Array, norm: float, quadratic: float, weights: Array) -> tuple[Array, float]:
    """J^T w for the minimiser of p.w + r ||J^T w|| + (q/2) ||J^T w||^2 on the support of `weights`, in 60 digits, and
    max_i (w - e_i).grad f over the size of f's terms, which is 0 where w minimises over the whole simplex."""
    with mp.workdps(60):
        rows, tilt = mp.matrix(jacobian.tolist()), mp.matrix(linear.tolist())
        r, q = mp.mpf(norm), mp.mpf(quadratic)
        support = [int(index) for index in np.flatnonzero(weights)]
        gramian = rows * rows.T
        system = mp.matrix([[gramian[i, j] for j in support] for i in support])
        ones, tilted = mp.ones(len(support), 1), mp.matrix([tilt[i] for i in support])
        by_ones, by_tilt = mp.lu_solve(system, ones), mp.lu_solve(system, tilted)
        a, b = mp.fdot(ones, by_ones), mp.fdot(ones, by_tilt)
        d = mp.fdot(tilted, by_tilt) - b**2 / a
        if q == 0:
            k = mp.sqrt(a * (r**2 - d))
        elif r == 0:
            k = q
        else:
            k = mp.findroot(lambda k: (k - q) * mp.sqrt(1 / a + d / k**2) - r, (q, q + r * mp.sqrt(a)), "anderson")
        values = ((k + b) / a * by_ones - by_tilt) / k
        best = mp.zeros(len(weights), 1)
        for index, value in zip(support, values, strict=True):
            best[index] = value
        combined = rows.T * best
        length = mp.sqrt(mp.fdot(combined, combined))
        slope = tilt + (r / length + q) * (rows * combined)
        terms = sum(abs(p) * x for p, x in zip(tilt, best, strict=True)) + r * length + q / 2 * length**2
        lacking = max(mp.mpf(0), -min(values))
        return np.array([float(x) for x in combined]), float((mp.fdot(best, slope) - min(slope)) / terms + lacking)


def gradvac_direction(jacobian: Array, order: NDArray[np.int64], targets: Array, beta: float) -> tuple[Array, Array]:
    """Algorithm 1 of the GradVac paper on explicit vectors, and the targets after it; the mean."""
    targets, projected = targets.copy(), []
    for task, gradient in enumerate(jacobian):
        own = gradient.copy()
        for other in order[task]:
            partner = jacobian[other]
            if other == task:
                continue
            length, partner_length = np.linalg.norm(own), np.linalg.norm(partner)
            cosine, target = own @ partner / (length * partner_length), targets[task, other]
            if cosine < target:
                sine, target_sine = np.sqrt(1 - cosine**2), np.sqrt(1 - target**2)
                own = own + length * (target * sine - cosine * target_sine) / (partner_length * target_sine) * partner
            targets[task, other] = (1 - beta) * target + beta * cosine
        projected.append(own)
    return np.mean(projected, axis=0), targets


def graddrop_direction(jacobian: Array, noise: Array, leak: float) -> Array:
    """Algorithm 1 of the GradDrop paper, number by number; the mean over the tasks."""
    out = np.zeros(jacobian.shape[1])
    for column in range(jacobian.shape[1]):
        entries = jacobian[:, column]
        size = np.abs(entries).sum()
        purity = 0.5 * (1 + entries.sum() / size) if size > 0 else 0.5
        for entry in entries:
            kept = (entry > 0 and purity > noise[column]) or (entry < 0 and purity < noise[column])
            out[column] += entry if kept else leak * entry
    return out / len(jacobian)


def config_direction(jacobian: Array) -> Array:
    """Eq. 2 of the ConFIG paper with numpy's pseudo-inverse of the unit gradients; its length the mean projection."""
    units = jacobian / np.linalg.norm(jacobian, axis=1, keepdims=True)
    best = np.linalg.pinv(units, rcond=1e-9) @ np.ones(len(jacobian))
    best = best / np.linalg.norm(best)
    return (jacobian @ best).mean() * best


def aligned_direction(jacobian: Array, scale_mode: str) -> Array:
    """From the singular values of J itself: J = U S V', and Aligned-MTL's gradients are sqrt(s) U V'; their mean."""
    left, singular, right = np.linalg.svd(jacobian, full_matrices=False)
    rank = int((singular > 1e-7 * singular[0]).sum())
    values = singular[:rank][::-1] ** 2
    scale = {"min": values[0], "median": values[(rank - 1) // 2], "rmse": values.mean()}[scale_mode]
    return np.sqrt(scale) * (left[:, :rank] @ right[:rank]).mean(0)


def fast_groups(jacobian: Array, numbers: Array, n: int) -> Array:
    """CAGrad-Fast's h: the n - 1 tasks with the smallest numbers, and the average of all others."""
    order = numbers.argsort()
    return np.vstack([jacobian[order[: n - 1]], jacobian[order[n - 1 :]].mean(0)])
