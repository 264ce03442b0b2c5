"""`mtrl-imgrad bench solvers`: what one call of a rule costs on one CPU thread, beside other ways to solve its problem.

The measurement runs in a process of its own, because the libraries read their number of threads when they start:
`python -m mtrl_imgrad.bench_solvers TASKS,... ROUNDS` prints every time as JSON. Times are CPU times of that process,
over all its threads, so that other programs on the machine count less.

* ours: the whole call from the Gramian to the weights, for every rule that needs no more; where a rule has a solver, on
  each of its routes.
* clarabel: the interior-point solver called directly; the problem is built beforehand, handing over the Gramian's
  factor and solving is timed, as is reading off the weights.
* slsqp: scipy's, on the Gramian divided by its mean diagonal, with the analytic gradient.
* torchjd: the class of that name in TorchJD, called on the Gramian.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from numpy.typing import NDArray
from scipy import sparse
from scipy.optimize import minimize

from mtrl_imgrad.aggregators import AGGREGATORS

Array = NDArray[np.float64]
Call = Callable[[torch.Tensor], object]
"""Solves for one Gramian."""

FAMILIES = ("gauss", "shared", "imbalanced", "parallel", "conflict", "lowrank")
THREADS = ("OMP", "MKL", "OPENBLAS", "RAYON", "NUMEXPR")
RADIUS = 0.4
"""c of CAGrad and IMGrad."""
CONE = 0.5
"""c of ConicGrad."""
RIDGE = 1e-13
TORCHJD: dict[str, tuple[str, dict[str, Any]]] = {
    "mgda": ("MGDAWeighting", {}),
    "cagrad": ("CAGradWeighting", {"c": RADIUS}),
    "sdmgrad": ("SDMGradWeighting", {"lambda_": 0.6}),
    "upgrad": ("UPGradWeighting", {}),
    "dualproj": ("DualProjWeighting", {}),
    "fairgrad": ("FairGradWeighting", {"alpha": 2.0}),
    "imtlg": ("IMTLGWeighting", {}),
    "alignedmtl": ("AlignedMTLWeighting", {}),
    "pcgrad": ("PCGradWeighting", {}),
    "gradvac": ("GradVacWeighting", {}),
}
"""TorchJD's class for the same problem."""


def random_gramian(family: str, num_tasks: int, seed: int) -> Array:
    """M = J J^T of random gradients of length 4 K + 7."""
    random = np.random.default_rng(seed)
    length = 4 * num_tasks + 7
    rows, common = random.standard_normal((num_tasks, length)), random.standard_normal(length)
    rank = min(num_tasks, 5)
    jacobian = {
        "gauss": rows,
        "shared": rows + 2.0 * common,
        "imbalanced": rows * np.logspace(-2, 2, num_tasks)[:, None],
        "parallel": common + 1e-3 * rows,
        "conflict": rows - 0.8 * rows.mean(0),
        "lowrank": random.standard_normal((num_tasks, rank)) @ random.standard_normal((rank, length)),
    }[family]
    return jacobian @ jacobian.T


# ---------------------------------------------------------------------------------------------------------------------
# The problem behind the rules, min over the simplex of p.w + r ||J^T w|| + (q/2) ||J^T w||^2, by other solvers
# ---------------------------------------------------------------------------------------------------------------------

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


# ---------------------------------------------------------------------------------------------------------------------
# Measuring
# ---------------------------------------------------------------------------------------------------------------------


def measured_rules() -> list[str]:
    """Rules that need the Gramian alone."""
    return [name for name, rule in AGGREGATORS.items() if rule.needs == "gramian"]


def options(num_tasks: int) -> tuple[dict[tuple[str, str], Call], list[str]]:
    """Every (rule, way) for K tasks, and a line for each way that is not installed."""
    found: dict[tuple[str, str], Call] = {}
    missing = []
    try:
        clarabel = Clarabel(num_tasks)
    except ImportError:
        clarabel = None
        missing.append("clarabel is not installed: pip install clarabel")
    try:
        torchjd = importlib.import_module("torchjd.aggregation")
    except ImportError:
        torchjd = None
        missing.append("torchjd is not installed: pip install 'torchjd[full]'")
    for name in measured_rules():
        rule: Any = AGGREGATORS[name]
        constants = {"cagrad": {"c": RADIUS}, "imgrad": {"c": RADIUS}, "conicgrad": {"c": CONE}}.get(name, {})
        if any(field.name == "solver" for field in dataclasses.fields(rule)):
            for route in ("host", "device"):
                found[name, f"ours, {route}"] = _ours(rule(**constants, solver=route), num_tasks)
        else:
            found[name, "ours"] = _ours(rule(), num_tasks)
        if name in KERNEL_RULES:
            if clarabel:
                found[name, "clarabel"] = _baseline(name, clarabel)
            found[name, "slsqp"] = _baseline(name, slsqp)
        if torchjd and name in TORCHJD:
            class_name, arguments = TORCHJD[name]
            try:
                found[name, "torchjd"] = getattr(torchjd, class_name)(**arguments)
            except ImportError as error:
                missing.append(f"torchjd's {class_name}: {' '.join(str(error).split())}")
    return found, missing


def _ours(rule: Any, num_tasks: int) -> Call:
    noise = rule.draw_noise(num_tasks, torch.Generator().manual_seed(0))
    return lambda gramian: rule.aggregate(gramian, noise)


def _baseline(rule: str, kernel: Kernel) -> Call:
    return lambda gramian: weights_by(rule, kernel, gramian)


def measure(tasks: Sequence[int], rounds: int) -> dict[str, Any]:
    """CPU seconds of every call, by K, rule, way and family: one list entry a round. In a round every option is called
    once on every Gramian, the options in turn, so that a change of the machine's speed meets all; a first round is
    not counted."""
    torch.set_num_threads(1)
    seconds: dict[str, Any] = {}
    missing: list[str] = []
    for num_tasks in tasks:
        gramians = {family: torch.from_numpy(random_gramian(family, num_tasks, seed=1)) for family in FAMILIES}
        calls, missing = options(num_tasks)
        into = {option: {family: [] for family in FAMILIES} for option in calls}
        for turn in range(rounds + 1):
            for family, gramian in gramians.items():
                for option, call in calls.items():
                    started = time.process_time()
                    call(gramian)
                    if turn:
                        into[option][family].append(time.process_time() - started)
        by_rule = seconds.setdefault(str(num_tasks), {})
        for (rule, way), times in into.items():
            by_rule.setdefault(rule, {})[way] = times
    return {"seconds": seconds, "missing": missing}


def bench_solvers(tasks: Sequence[int], rounds: int) -> dict[str, Any]:
    """`measure` in a process of its own with one thread.

    Raises:
        ValueError: a number of tasks or `rounds` is not positive.
        ChildProcessError: the process failed. The message has the last line that it said.
    """
    if not tasks or min(tasks) < 2:
        raise ValueError(f"tasks: {' '.join(map(str, tasks))!r} is not allowed; numbers of tasks are 2 or more")
    if rounds < 1:
        raise ValueError(f"repeats: {rounds} is less than 1")
    environment = os.environ | {f"{name}_NUM_THREADS": "1" for name in THREADS}
    paths = [str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "mtrl_imgrad.bench_solvers",
        ",".join(map(str, tasks)),
        str(rounds),
    ]
    others = psutil.cpu_percent(interval=0.5) / 100 * (psutil.cpu_count() or 1)
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment | {"PYTHONPATH": os.pathsep.join(paths)}
    )
    if done.returncode:
        said = done.stderr.strip().splitlines() or ["nothing was said"]
        raise ChildProcessError(f"bench: the measurement ended with exit code {done.returncode}: {said[-1]}")
    return json.loads(done.stdout) | {"others": others}


Times = dict[str, list[float]]


def ratio(ours: Times, theirs: Times) -> float:
    """The median over families of our median over rounds, over theirs."""
    return statistics.median(statistics.median(ours[family]) / statistics.median(theirs[family]) for family in ours)


HEADER = (
    f"{'K':>3}  {'rule':<12}{'way':<14}{'x clarabel':>11}{'x its CAGrad':>14}{'x torchjd':>11}{'ms':>9}  slowest family"
)


def table(measured: dict[str, Any]) -> str:
    """Ratios first: to clarabel on the same rule, to clarabel on CAGrad (one solve), to TorchJD on the same rule; then
    the median over families of the median over rounds, and the family with the largest median."""
    lines = [HEADER]
    for num_tasks, rules in measured["seconds"].items():
        one_solve = rules.get("cagrad", {}).get("clarabel")
        for rule, ways in rules.items():
            for way, times in ways.items():
                others = [ways.get("clarabel"), one_solve if rule in KERNEL_RULES else None, ways.get("torchjd")]
                ratios = ["-" if other is None else f"{ratio(times, other):.2f}" for other in others]
                medians = {family: 1e3 * statistics.median(each) for family, each in times.items()}
                milliseconds = statistics.median(medians.values())
                slowest = max(medians, key=lambda family: medians[family])
                lines.append(
                    f"{num_tasks:>3}  {rule:<12}{way:<14}{ratios[0]:>11}{ratios[1]:>14}{ratios[2]:>11}"
                    f"{milliseconds:>9.3f}  {slowest} {medians[slowest]:.3f}"
                )
    lines += measured["missing"]
    lines.append(f"other programs used {measured['others']:.1f} of {psutil.cpu_count()} cores before the run")
    return "\n".join(lines)


def as_json(measured: dict[str, Any], settings: dict[str, Any]) -> str:
    """Every round, the settings, and what they were measured on."""
    versions = {}
    for name in ("torch", "numpy", "scipy", "clarabel", "torchjd"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    machine = {
        "processor": platform.processor() or platform.machine(),
        "logical_cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": versions,
    }
    return json.dumps({"settings": settings, "machine": machine} | measured, indent=1) + "\n"


if __name__ == "__main__":
    print(json.dumps(measure([int(number) for number in sys.argv[1].split(",")], int(sys.argv[2]))))
