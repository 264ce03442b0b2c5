"""`mtrl-imgrad bench solvers`: what one call of a rule costs on one CPU thread, beside other ways to solve its problem.

The measurement runs in a process of its own, because the libraries read their number of threads when they start:
`python -m mtrl_imgrad.bench.solvers TASKS,... ROUNDS` prints every time as JSON. Times are CPU times of that process,
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
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from mtrl_imgrad.aggregators import AGGREGATORS
from mtrl_imgrad.bench import machine
from mtrl_imgrad.bench.solver_references import (
    CONE,
    KERNEL_RULES,
    RADIUS,
    Array,
    Clarabel,
    Kernel,
    slsqp,
    weights_by,
)

MOST_TASKS = 1000
Call = Callable[[torch.Tensor], object]
"""Solves for one Gramian."""

FAMILIES = ("gauss", "shared", "imbalanced", "parallel", "conflict", "lowrank")
THREADS = ("OMP", "MKL", "OPENBLAS", "RAYON", "NUMEXPR")
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
    if not tasks or min(tasks) < 2 or max(tasks) > MOST_TASKS:
        given = " ".join(map(str, tasks))
        raise ValueError(f"tasks: {given!r} is not allowed; numbers of tasks must be between 2 and {MOST_TASKS}")
    machine.check_range("repeats", rounds, 1, machine.MOST_ROUNDS)
    others = machine.busy_cores(0.5)
    arguments = [",".join(map(str, tasks)), str(rounds)]
    measured = machine.answer_of(__name__, arguments, {f"{name}_NUM_THREADS": "1" for name in THREADS})
    return measured | {"others": others}


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
    lines.append(machine.others_before(measured["others"]))
    return "\n".join(lines)


def as_json(measured: dict[str, Any], settings: dict[str, Any]) -> str:
    """Every round, the settings, and what they were measured on."""
    return machine.as_json(measured, settings, ("torch", "numpy", "scipy", "clarabel", "torchjd"))


if __name__ == "__main__":
    print(json.dumps(measure([int(number) for number in sys.argv[1].split(",")], int(sys.argv[2]))))
