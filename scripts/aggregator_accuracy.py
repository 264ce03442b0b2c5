"""How exact every rule is: Gramian families x numbers of tasks x scales of the gradients, against independent answers.

    python scripts/aggregator_accuracy.py

prints Markdown and writes docs/results/aggregator_accuracy.md. The families and oracles are those of the tests. A rule
is checked by its entry in CHECKS; one without an entry, by what should hold for any: scaling the gradients leaves the
direction's direction, permuting the tasks too.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests" / "aggregators"))

import oracles  # noqa: E402
from gradient_families import FAMILIES, gradients  # noqa: E402
from scipy.optimize import nnls  # noqa: E402

from mtrl_imgrad.aggregators import AGGREGATORS, Aggregator  # noqa: E402

Array = NDArray[np.float64]
NUMBERS_OF_TASKS = (1, 2, 3, 10, 50)
SCALES = (1e-4, 1.0, 1e4)
IN_HULL = 1e-10
"""0 counts as a point of the hull of the gradients where ||gm||^2 is below this fraction of the mean squared norm."""


@dataclass(frozen=True)
class Given:
    """One rule on one matrix of gradients.

    Attributes:
        rows: J, of mean squared norm 1, in a basis of its span.
        weights, direction: what the rule returned for `scale` times the rows; the direction divided by the scale.
        gap: what the rule certified, or None.
        noise: the random numbers of the call.
    """

    rule: Aggregator
    rows: Array
    scale: float
    weights: Array
    direction: Array
    gap: float | None
    noise: torch.Tensor | None

    @property
    def gramian(self) -> Array:
        return self.rows @ self.rows.T


@dataclass(frozen=True)
class Error:
    """What a check found; None where the measure does not apply.

    Attributes:
        residual: the certified relative gap, or the residual of the rule's equations.
        angle: 1 - cos(direction, the oracle's).
        distance: ||direction - the oracle's|| / ||the oracle's||.
    """

    residual: float | None = None
    angle: float | None = None
    distance: float | None = None


def nothing(given: Given) -> Error:
    """Compared with d = 0."""
    return Error(given.gap, None, float(np.linalg.norm(given.direction)))


def against(given: Given, expected: Array, unit: bool = False) -> Error:
    """Compared with a direction; `unit` leaves lengths out."""
    length = float(np.linalg.norm(expected))
    if length == 0:
        return nothing(given)
    size = float(np.linalg.norm(given.direction))
    angle = 1 - float(expected @ given.direction) / (size * length) if size else 1.0
    # The difference of unit vectors keeps the digits that 1 - cos loses.
    if size and angle < 1e-6:
        angle = float(np.sum((given.direction / size - expected / length) ** 2)) / 2
    off = None if unit else float(np.linalg.norm(given.direction - expected)) / length
    return Error(given.gap, angle, off)


def hull(rows: Array) -> bool:
    """Whether 0 lies numerically in the hull of the rows."""
    return float(np.sum((oracles.mgda_weights(rows) @ rows) ** 2)) < IN_HULL


# ---------------------------------------------------------------------------------------------------------------------
# One check a rule
# ---------------------------------------------------------------------------------------------------------------------


def check_mean(given: Given) -> Error:
    return against(given, sum(given.rows) / len(given.rows))


def check_sum(given: Given) -> Error:
    return against(given, sum(given.rows))  # pyright: ignore[reportArgumentType]


def check_pcgrad(given: Given) -> Error:
    assert given.noise is not None
    return against(given, oracles.pcgrad_direction(given.rows, given.noise.argsort(-1).numpy()))


def check_mgda(given: Given) -> Error:
    if hull(given.rows):
        return nothing(given)
    return against(given, oracles.mgda_weights(given.rows) @ given.rows)


def in_ball(given: Given, linear: float, norm: float, quadratic: float) -> Error:
    """CAGrad's assembly from the minimiser of linear <gw, g0> + norm R ||gw|| + quadratic ||gw||^2."""
    mean, c = given.rows.mean(0), vars(given.rule)["c"]
    radius = c * float(np.linalg.norm(mean))
    weights = oracles.simplex_kernel(given.rows, linear * given.rows @ mean, norm * radius, 2 * quadratic)
    combined = weights @ given.rows
    factor = {0: 1.0, 1: 1 / (1 + c * c), 2: 1 / (1 + c)}[vars(given.rule)["rescale"]]
    return against(given, factor * (mean + radius * combined / np.linalg.norm(combined)))


def check_cagrad(given: Given) -> Error:
    return Error() if hull(given.rows) else in_ball(given, 1.0, 1.0, 0.0)


def check_imgrad(given: Given) -> Error:
    if hull(given.rows):
        return Error()
    mean, shortest = given.rows.mean(0), oracles.mgda_weights(given.rows) @ given.rows
    cosine = float(mean @ shortest / np.linalg.norm(mean) / np.linalg.norm(shortest))
    variants = {
        "official": (1.5 - cosine, cosine, 0.0),
        "eq9": (1 - cosine, 1 - cosine, cosine),
        "eq11": (1 - cosine, cosine, 0.0),
    }
    return in_ball(given, *variants[vars(given.rule)["variant"]])


def check_conicgrad(given: Given) -> Error:
    if hull(given.rows):
        return Error()
    expected, value = oracles.conic_primal(given.rows, vars(given.rule)["c"])
    return against(given, expected) if value > 1e-8 else Error(given.gap)


def check_sdmgrad(given: Given) -> Error:
    strength = next(value for name, value in vars(given.rule).items() if name.startswith("lam"))
    mean = given.rows.mean(0)
    weights = oracles.mgda_weights(given.rows + strength * mean)  # MGDA of the rows g_i + lambda g0
    return against(given, (weights @ given.rows + strength * mean) / (1 + strength))


def cone_projection(rows: Array, u: Array) -> Array:
    """J^T v for the v >= u of smallest ||J^T v||, by NNLS on v - u."""
    shift, _ = nnls(rows.T, -rows.T @ u, maxiter=1000)
    return (u + shift) @ rows


def check_upgrad(given: Given) -> Error:
    if hull(given.rows):
        return nothing(given)  # no direction hurts no task
    count = len(given.rows)
    return against(given, sum(cone_projection(given.rows, np.eye(count)[i]) for i in range(count)) / count)  # pyright: ignore[reportArgumentType]


def check_dualproj(given: Given) -> Error:
    if hull(given.rows):
        return nothing(given)
    return against(given, cone_projection(given.rows, np.full(len(given.rows), 1 / len(given.rows))))


def proportional(products: Array) -> float:
    """How far numbers that should be equal are from their mean, relatively."""
    return float(np.abs(products / products.mean() - 1).max())


def check_nashmtl(given: Given) -> Error:
    """w_i (M w)_i is the same for all tasks, whatever the length."""
    return Error() if hull(given.rows) else Error(proportional(given.weights * (given.gramian @ given.weights)))


def check_fairgrad(given: Given) -> Error:
    """w_i^(1 / alpha) (M w)_i is the same for all tasks, whatever the length."""
    if hull(given.rows):
        return Error()
    fair = np.maximum(given.weights, 0) ** (1 / vars(given.rule)["alpha"])
    return Error(proportional(fair * (given.gramian @ given.weights)))


def check_imtlg(given: Given) -> Error:
    """The direction's projections onto all unit gradients are equal."""
    if hull(given.rows) or np.linalg.matrix_rank(given.rows) < len(given.rows):
        return Error()
    return Error(proportional(given.rows @ given.direction / np.linalg.norm(given.rows, axis=1)))


def check_alignedmtl(given: Given) -> Error:
    """By a singular value decomposition of J: sqrt(s) U V' summed over the rows, s the smallest squared singular value;
    the length is left out."""
    if np.linalg.matrix_rank(given.rows, rtol=1e-6) < len(given.rows):
        return Error()
    left, _, right = np.linalg.svd(given.rows, full_matrices=False)
    return against(given, (left @ right).sum(0), unit=True)


Check = Callable[[Given], Error]


def check_adatask(given: Given) -> Error:
    """In the first call Adam's corrected moments are g and g^2."""
    rows = given.rows * given.scale
    return against(given, (rows / (np.abs(rows) + vars(given.rule)["eps"])).mean(0) / given.scale)


CHECKS: dict[str, Check] = {
    "mean": check_mean,
    "sum": check_sum,
    "pcgrad": check_pcgrad,
    "mgda": check_mgda,
    "cagrad": check_cagrad,
    "imgrad": check_imgrad,
    "conicgrad": check_conicgrad,
    "adatask": check_adatask,
    "sdmgrad": check_sdmgrad,
    "upgrad": check_upgrad,
    "dualproj": check_dualproj,
    "nashmtl": check_nashmtl,
    "fairgrad": check_fairgrad,
    "imtlg": check_imtlg,
    "alignedmtl": check_alignedmtl,
}
MEANINGS = {
    "residual": "the rule's certified gap over the objective at uniform weights, or the residual of its equations",
    "angle": "1 - cos(direction, the oracle's)",
    "distance": "||direction - the oracle's|| / ||the oracle's||",
}


# ---------------------------------------------------------------------------------------------------------------------
# Running the checks
# ---------------------------------------------------------------------------------------------------------------------


def variants() -> dict[str, Aggregator]:
    """Every rule, on both routes where it has them, and in every variant."""
    found: dict[str, Aggregator] = {}
    for name, rule in AGGREGATORS.items():
        fields = {field.name for field in dataclasses.fields(rule)}  # pyright: ignore[reportArgumentType]
        kinds = ("official", "eq9", "eq11") if name == "imgrad" else (None,)
        routes = ("host", "device") if "solver" in fields else (None,)
        for kind in kinds:
            for route in routes:
                chosen = {key: value for key, value in (("variant", kind), ("solver", route)) if value}
                found[" ".join([name, *chosen.values()])] = rule(**chosen)
    return found


def call(rule: Aggregator, rows: Array, scale: float = 1.0, order: Array | None = None) -> Given:
    """The rule on `scale` times the rows, and on permuted tasks where an order is given; fresh, without a state."""
    count = len(rows)
    order = np.arange(count) if order is None else order
    jacobian = torch.from_numpy(rows[order] * scale)
    noise = rule.draw_noise(count, torch.Generator().manual_seed(3), rows.shape[1])
    if noise is not None and noise.shape == (count, count):
        noise = noise[order][:, order]
    losses = torch.linspace(1, 2, count, dtype=torch.float64)[order] * scale
    result = rule.aggregate(jacobian @ jacobian.mT, noise, losses, jacobian if rule.needs == "jacobian" else None)
    direction = result.weights @ jacobian if result.direction is None else result.direction
    gap = float(result.diagnostics["gap"]) if "gap" in result.diagnostics else None
    return Given(rule, rows, scale, result.weights.numpy(), direction.numpy() / scale, gap, noise)


def generic(given: Given) -> Error:
    """Against the same rule on unscaled gradients, tasks in another order unless random numbers belong to the tasks."""
    count = len(given.rows)
    permutes = given.noise is None or given.noise.shape == (count, count)
    order = np.random.default_rng(0).permutation(count) if permutes else None
    return against(given, call(given.rule, given.rows, order=order).direction, unit=True)


def worst(errors: list[Error]) -> Error:
    """The largest of each measure."""
    largest = {}
    for measure in MEANINGS:
        values = [value for error in errors if (value := getattr(error, measure)) is not None]
        largest[measure] = None if not values else float(np.max(values))
    return Error(**largest)


def shown(error: Error) -> str:
    return " / ".join("-" if value is None else f"{value:.0e}" for value in dataclasses.astuple(error))


def cell(error: Error) -> str:
    return "not compared" if error == Error() else shown(error)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rules", nargs="+", choices=list(AGGREGATORS), default=list(AGGREGATORS), metavar="NAME")
    parser.add_argument("--tasks", nargs="+", type=int, default=NUMBERS_OF_TASKS, metavar="K")
    parser.add_argument("--out", type=Path, default=ROOT / "docs/results/aggregator_accuracy.md")
    arguments = parser.parse_args()
    torch.set_num_threads(1)

    tables: list[str] = []
    summary = ["| rule | check | residual | 1 - cos | distance |", "|---|---|---|---|---|"]
    for label, rule in variants().items():
        name = label.split()[0]
        if name not in arguments.rules:
            continue
        started = time.perf_counter()
        check = CHECKS.get(name, generic)
        columns = " | ".join(f"K = {count}" for count in arguments.tasks)
        lines = [f"### {label}", "", f"| family | {columns} |", "|---" * (1 + len(arguments.tasks)) + "|"]
        all_errors = []
        for family in FAMILIES:
            cells = []
            for count in arguments.tasks:
                rows = oracles.coordinates(gradients(family, count, 1).numpy())
                errors = [check(call(rule, rows, scale)) for scale in SCALES]
                all_errors += errors
                cells.append(cell(worst(errors)))
            lines.append(f"| {family} | " + " | ".join(cells) + " |")
        tables.append("\n".join(lines))
        kind = "oracle" if name in CHECKS else "scale and order only"
        summary.append(f"| {label} | {kind} | {' | '.join(shown(worst(all_errors)).split(' / '))} |")
        print(f"{label}: {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)

    meanings = "\n".join(f"* {name}: {meaning}." for name, meaning in MEANINGS.items())
    text = f"""# Accuracy of the aggregators

Made by `python scripts/aggregator_accuracy.py`. Each cell is the worst over gradients scaled by {SCALES} of

{meanings}

"-" where a measure does not apply. The oracle of a minimiser is scipy's NNLS or CLARABEL through cvxpy with tolerances
of 1e-13; CLARABEL has about 1e-7 of the direction, 1e-14 of the cosine, and less where norms differ by 1e4
(`imbalanced`). Where 0 lies in the hull of the gradients (`lowrank` above K = 5) a minimiser is not unique or has no
direction: nothing is compared there, but that the d of MGDA and of the dual-cone projections is 0: its length over the
root mean square norm stands under distance.

## Worst of all

{chr(10).join(summary)}

## By family and number of tasks

Cells: residual / 1 - cos / distance.

"""
    text += "\n\n".join(tables) + "\n"
    print(text)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(text)


if __name__ == "__main__":
    main()
