"""Other solvers for the problem behind the rules, min over the simplex of p.w + r ||J^T w|| + (q/2) ||J^T w||^2."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from scipy.optimize import minimize

Array = NDArray[np.float64]
RADIUS = 0.4
"""c of CAGrad and IMGrad."""
CONE = 0.5
"""c of ConicGrad."""
RIDGE = 1e-13

Kernel = Callable[[Array, Array, float, float], Array]
"""From M, p, r, q to w."""


class Clarabel:
    """Clarabel's problems of one size, built once. Variables are w and, for the norm, t >= ||L^T w|| with M = L L^T."""

    def __init__(self, num_tasks: int) -> None:
        clarabel = importlib.import_module("clarabel")
        settings = clarabel.DefaultSettings()
        settings.verbose, settings.presolve_enable, settings.max_threads = False, False, 1
        self.num_tasks = num_tasks
        self.lower, self.columns = np.tril_indices(num_tasks)
        ones, nothing = np.ones(num_tasks), np.zeros(num_tasks)
        upper = sparse.csc_matrix(np.triu(np.ones((num_tasks, num_tasks))))

        simplex = sparse.vstack([sparse.csc_matrix(ones), -sparse.eye(num_tasks)])
        cones = [clarabel.ZeroConeT(1), clarabel.NonnegativeConeT(num_tasks)]
        bounds = np.append(1.0, nothing)
        self.quadratic = clarabel.DefaultSolver(upper, nothing, sparse.csc_matrix(simplex), bounds, cones, settings)

        # Columns of A: w_j has 1, -1 and row j of -L, i.e. column j of -L^T; t has -1.
        cone = sparse.vstack([sparse.csc_matrix((1, num_tasks)), -upper])
        last = sparse.csc_matrix(([-1.0], ([num_tasks + 1], [0])), shape=(2 * num_tasks + 2, 1))
        constraints = sparse.csc_matrix(sparse.hstack([sparse.vstack([simplex, cone]), last]))
        constraints.sort_indices()
        self.values = constraints.data.copy()
        ends = constraints.indptr
        # In column j of A: 1, -1, then entries 0..j of column j of -L^T
        self.factor_at = np.concatenate([np.arange(ends[j] + 2, ends[j + 1]) for j in range(num_tasks)])
        cones = [*cones, clarabel.SecondOrderConeT(num_tasks + 1)]
        bounds = np.append(bounds, np.zeros(num_tasks + 1))
        empty = sparse.csc_matrix((num_tasks + 1, num_tasks + 1))
        self.conic = clarabel.DefaultSolver(empty, np.append(nothing, 1.0), constraints, bounds, cones, settings)

    def __call__(self, matrix: Array, linear: Array, norm: float, quadratic: float) -> Array:
        if quadratic:
            # Column by column, the upper triangle of M is the lower one row by row.
            self.quadratic.update(P=quadratic * matrix[self.lower, self.columns], q=linear)
            return np.array(self.quadratic.solve().x)
        factor = np.linalg.cholesky(matrix + RIDGE * np.diag(np.diagonal(matrix)))
        self.values[self.factor_at] = -factor[self.lower, self.columns]
        self.conic.update(A=self.values, q=np.append(linear, norm))
        return np.array(self.conic.solve().x)[: self.num_tasks]


def slsqp(matrix: Array, linear: Array, norm: float, quadratic: float) -> Array:
    """scipy's SLSQP from the uniform weights."""

    def value(weights: Array) -> tuple[float, Array]:
        image = matrix @ weights
        length = math.sqrt(max(float(weights @ image), 1e-300))
        objective = linear @ weights + norm * length + quadratic / 2 * length**2
        return float(objective), linear + (norm / length + quadratic) * image

    num_tasks = len(linear)
    total = {"type": "eq", "fun": lambda weights: weights.sum() - 1.0, "jac": lambda weights: np.ones(num_tasks)}
    return minimize(
        value,
        np.full(num_tasks, 1.0 / num_tasks),
        jac=True,
        bounds=[(0.0, 1.0)] * num_tasks,
        constraints=[total],
        method="SLSQP",
        options={"ftol": 1e-9, "maxiter": 200},
    ).x


def weights_by(rule: str, kernel: Kernel, gramian: torch.Tensor) -> Array:
    """Row weights of a rule's direction, its minimisation done by `kernel`."""
    matrix = gramian.numpy()
    matrix = matrix / np.diagonal(matrix).mean()
    num_tasks = len(matrix)
    products = matrix.mean(1)
    mean_norm = math.sqrt(products.mean())
    shortest, cosine = np.zeros(0), 0.0
    if rule in ("mgda", "imgrad", "conicgrad"):
        shortest = kernel(matrix, np.zeros(num_tasks), 0.0, 1.0)
        length = math.sqrt(max(float(shortest @ matrix @ shortest), 1e-20))
        cosine = min(max(float(shortest @ products) / (length * mean_norm), 0.0), 1.0)
        if rule == "mgda":
            return shortest
        if rule == "conicgrad" and cosine >= CONE:
            return mean_norm / length * shortest
    radius, linear, norm = RADIUS * mean_norm, products, RADIUS * mean_norm
    if rule == "imgrad":
        linear, norm = (1.5 - cosine) * products, cosine * radius
    if rule == "conicgrad":
        along = products / mean_norm
        matrix, linear, norm = matrix - np.outer(along, along), CONE * along, math.sqrt(1.0 - CONE**2)
        matrix = matrix + RIDGE * np.eye(num_tasks)
    weights = kernel(matrix, linear, norm, 0.0)
    unit = weights / math.sqrt(max(float(weights @ matrix @ weights), 1e-20))
    if rule == "conicgrad":
        projected = mean_norm * unit - float(unit @ linear) / CONE / num_tasks
        return CONE / num_tasks + norm * projected
    return (1.0 / num_tasks + radius * unit) / (1.0 + RADIUS**2)


KERNEL_RULES = ("mgda", "cagrad", "imgrad", "conicgrad")
"""Rules that `weights_by` knows."""
