"""How exact every rule is: Gramian families x numbers of tasks x scales of the gradients, against independent answers.

    python scripts/aggregator_accuracy.py

prints Markdown and writes docs/results/aggregator_accuracy.md. The families and oracles are those of the tests. Every
rule has a check of its own in CHECKS, and a table for each choice that it offers. A rule that remembers is called
several times, and its last direction is checked.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np
import torch
from numpy.typing import NDArray

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests" / "aggregators"))

import loops  # noqa: E402
import oracles  # noqa: E402
from gradient_families import FAMILIES, gradients  # noqa: E402
from scipy.optimize import nnls  # noqa: E402

from mtrl_imgrad.aggregators import AGGREGATORS, Aggregator  # noqa: E402

Array = NDArray[np.float64]
NUMBERS_OF_TASKS = (1, 2, 3, 10, 50)
SCALES = (1e-4, 1.0, 1e4)
CALLS = 5
"""Of rules that remember."""
SHORT = {"dwa": {"window": 2}}
"""Hyper-parameters with which so few calls show what a rule does."""
IN_HULL = 1e-10
"""0 counts as a point of the hull of the gradients where ||gm||^2 is below this fraction of the mean squared norm."""


@dataclass(frozen=True)
class Given:
    """One rule on one matrix of gradients, after those of its earlier calls if it remembers them.

    Attributes:
        rows: J of the last call, of mean squared norm 1, in a basis of its span.
        weights, direction: what the rule returned for `scale` times the rows; the direction divided by the scale.
        gap: what the rule certified, or None.
        jacobians: `scale` times the rows of every call.
        losses: [calls + 1, tasks], before every call's step and after the last.
        noise: the random numbers of every call.
    """

    rule: Aggregator
    rows: Array
    scale: float
    weights: Array
    direction: Array
    gap: float | None
    jacobians: torch.Tensor
    losses: torch.Tensor
    noise: list[torch.Tensor | None]

    @property
    def gramian(self) -> Array:
        return self.rows @ self.rows.T

    @property
    def gramians(self) -> torch.Tensor:
        """Those of every call, as given."""
        return self.jacobians @ self.jacobians.mT

    @property
    def numbers(self) -> Array:
        """The random numbers of the last call."""
        assert self.noise[-1] is not None
        return self.noise[-1].double().numpy()

    def field(self, name: str) -> Any:
        return getattr(self.rule, name)


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


def kept(oracle: Callable[..., Any]) -> Callable[..., Any]:
    """The oracle, asked once for the same arguments: the routes and scales of a rule share its answers."""
    answers: dict[Any, Any] = {}

    @functools.wraps(oracle)
    def ask(*arguments: Any) -> Any:
        key = tuple(x.tobytes() if isinstance(x, np.ndarray) else x for x in arguments)
        if key not in answers:
            answers[key] = oracle(*arguments)
        return answers[key]

    return ask


mgda_weights, simplex_kernel = kept(oracles.mgda_weights), kept(oracles.simplex_kernel)
conic_primal = kept(oracles.conic_primal)


@kept
def cone_projection(rows: Array, u: Array) -> Array:
    """J^T v for the v >= u of smallest ||J^T v||, by NNLS on v - u."""
    shift, _ = nnls(rows.T, -rows.T @ u, maxiter=1000)
    return (u + shift) @ rows


def hull(rows: Array) -> bool:
    """Whether 0 lies numerically in the hull of the rows."""
    return float(np.sum((mgda_weights(rows) @ rows) ** 2)) < IN_HULL


# ---------------------------------------------------------------------------------------------------------------------
# One check a rule
# ---------------------------------------------------------------------------------------------------------------------


def check_mean(given: Given) -> Error:
    return against(given, sum(given.rows) / len(given.rows))


def check_sum(given: Given) -> Error:
    return against(given, sum(given.rows))  # pyright: ignore[reportArgumentType]


def check_pcgrad(given: Given) -> Error:
    return against(given, oracles.pcgrad_direction(given.rows, given.numbers.argsort(-1)))


def check_gradvac(given: Given) -> Error:
    expected, targets = given.rows, np.zeros_like(given.gramian)
    for rows, noise in zip(given.jacobians.numpy(), given.noise, strict=True):
        assert noise is not None
        order = noise.argsort(-1).numpy()
        expected, targets = oracles.gradvac_direction(rows, order, targets, given.field("beta"))
    return against(given, expected / given.scale)


def check_mgda(given: Given) -> Error:
    if hull(given.rows):
        return nothing(given)
    return against(given, mgda_weights(given.rows) @ given.rows)


def in_ball(given: Given, candidates: Array, linear: float, norm: float, quadratic: float) -> Error:
    """CAGrad's assembly from the minimiser of linear <hw, g0> + norm R ||hw|| + quadratic ||hw||^2, hw a combination of
    the candidates."""
    mean, c = given.rows.mean(0), given.field("c")
    radius = c * float(np.linalg.norm(mean))
    weights = simplex_kernel(candidates, linear * candidates @ mean, norm * radius, 2 * quadratic)
    combined = weights @ candidates
    factor = {0: 1.0, 1: 1 / (1 + c * c), 2: 1 / (1 + c)}[given.field("rescale")]
    return against(given, factor * (mean + radius * combined / np.linalg.norm(combined)))


def check_cagrad(given: Given) -> Error:
    return Error() if hull(given.rows) else in_ball(given, given.rows, 1.0, 1.0, 0.0)


def check_cagrad_fast(given: Given) -> Error:
    groups = oracles.fast_groups(given.rows, given.numbers, min(given.field("n"), len(given.rows)))
    return Error() if hull(groups) else in_ball(given, groups, 1.0, 1.0, 0.0)


def cosine_to_shortest(rows: Array) -> float:
    """cos(g0, gm)."""
    mean, shortest = rows.mean(0), mgda_weights(rows) @ rows
    return float(mean @ shortest / np.linalg.norm(mean) / np.linalg.norm(shortest))


def check_imgrad(given: Given) -> Error:
    if hull(given.rows):
        return Error()
    cosine = cosine_to_shortest(given.rows)
    variants = {
        "official": (1.5 - cosine, cosine, 0.0),
        "eq9": (1 - cosine, 1 - cosine, cosine),
        "eq11": (1 - cosine, cosine, 0.0),
    }
    return in_ball(given, given.rows, *variants[given.field("variant")])


def check_conicgrad(given: Given) -> Error:
    """Where no direction in the cone descends, the best one on its surface has no oracle."""
    if given.field("mode") == "single_loop":
        return against(given, loops.by_single_loop(given.jacobians, given.rule)[0][-1].numpy() / given.scale)  # pyright: ignore[reportArgumentType]
    if hull(given.rows):
        return Error()
    expected, value = conic_primal(given.rows, given.field("c"))
    if value > 1e-8:
        return against(given, expected)
    fallback = {"boundary": None, "mean": given.rows.mean(0), "zero": 0 * given.rows[0]}[given.field("on_infeasible")]
    return Error(given.gap) if fallback is None else against(given, fallback)


def regularised(given: Given, rows: Array) -> Error:
    """SDMGrad of these rows: MGDA of g_i + lambda g0, over 1 + lambda."""
    strength = given.field("lam")
    shifted = rows + strength * rows.mean(0)
    return nothing(given) if hull(shifted) else against(given, mgda_weights(shifted) @ shifted / (1 + strength))


def check_sdmgrad(given: Given) -> Error:
    return regularised(given, given.rows)


def check_sdmgrad_os(given: Given) -> Error:
    sample = next(row for row in given.numbers < given.field("n") / len(given.rows) if row.any())
    return regularised(given, given.rows[sample])


def check_upgrad(given: Given) -> Error:
    if hull(given.rows):
        return nothing(given)  # no direction hurts no task
    count = len(given.rows)
    return against(given, sum(cone_projection(given.rows, np.eye(count)[i]) for i in range(count)) / count)  # pyright: ignore[reportArgumentType]


def check_dualproj(given: Given) -> Error:
    if hull(given.rows):
        return nothing(given)
    return against(given, cone_projection(given.rows, np.full(len(given.rows), 1 / len(given.rows))))


def unequal(products: Array) -> float:
    """How far numbers that should be equal are from their mean, relatively."""
    return float(np.abs(products / products.mean() - 1).max())


def length_error(given: Given) -> float:
    """How far the direction is from the mean gradient's length, relatively."""
    return abs(float(np.linalg.norm(given.direction) / np.linalg.norm(given.rows.mean(0))) - 1)


def check_alpha_fair(given: Given, alpha: float) -> Error:
    """w > 0 and w_i^(1 / alpha) (M w)_i = 1 for all tasks, M the one that was given; at the mean gradient's length the
    same number for all."""
    if hull(given.rows):
        return nothing(given)
    if given.weights.min() <= 0:
        return Error(math.inf)
    balance = given.weights ** (1 / alpha) * (given.gramian @ given.weights) * given.scale**2
    if given.field("norm") == "own":
        return Error(float(np.abs(balance - 1).max()))
    return Error(unequal(balance), None, length_error(given))


def check_nashmtl(given: Given) -> Error:
    return check_alpha_fair(given, 1.0)


def check_fairgrad(given: Given) -> Error:
    return check_alpha_fair(given, given.field("alpha"))


def check_imgrad_nash(given: Given) -> Error:
    """The optimality conditions of Eq. 13 for relative changes of the weights, multipliers by NNLS. At least one of the
    constraints holds with equality, which tells the weights' own length where they have the mean gradient's."""
    if hull(given.rows):
        return nothing(given)
    if given.weights.min() <= 0:
        return Error(math.inf)
    weights, off = given.weights * given.scale, None
    constraints = np.log(weights) + np.log(given.gramian @ weights)
    if given.field("norm") == "mean":
        off = length_error(given)
        weights, constraints = weights * math.exp(-constraints.min() / 2), constraints - constraints.min()
    cosine, image = cosine_to_shortest(given.rows), given.gramian @ weights
    derivative = np.eye(len(weights)) + given.gramian * weights / image[:, None]
    slope = (1 - cosine) * weights * given.gramian.sum(0) + cosine * derivative.sum(0)
    active = constraints < constraints.min() + 1e-6
    multipliers, _ = nnls(derivative[active].T, slope, maxiter=1000)
    excess = np.abs(derivative[active].T @ multipliers - slope).max() / np.abs(slope).max()
    return Error(float(max(excess, abs(constraints.min()))), None, off)


def check_imtlg(given: Given) -> Error:
    """The direction's projections onto all unit gradients are equal, and the weights sum to 1."""
    if np.linalg.matrix_rank(given.rows) < len(given.rows):
        return nothing(given)
    projections = given.rows @ given.direction / np.linalg.norm(given.rows, axis=1)
    return Error(unequal(projections), None, abs(float(given.weights.sum()) - 1))


def check_alignedmtl(given: Given) -> Error:
    return against(given, oracles.aligned_direction(given.rows, given.field("scale_mode")))


def check_config(given: Given) -> Error:
    return against(given, oracles.config_direction(given.rows))


def check_graddrop(given: Given) -> Error:
    return against(given, oracles.graddrop_direction(given.rows, given.numbers, given.field("leak")))


def check_rlw(given: Given) -> Error:
    exponents = np.exp(given.numbers)
    return against(given, exponents / exponents.sum() @ given.rows)


Check = Callable[[Given], Error]


def last_of(loop: Callable[..., torch.Tensor], *names: str, weights: bool = False) -> Check:
    """The check against a loop over the calls, which takes the attributes named and the rule, and gives the directions
    or the weights of every call."""

    def check(given: Given) -> Error:
        last = loop(*(getattr(given, name) for name in names), given.rule)[-1].numpy()
        return against(given, last @ given.rows if weights else last / given.scale)

    return check


CHECKS: dict[str, Check] = {
    "mean": check_mean,
    "sum": check_sum,
    "mgda": check_mgda,
    "pcgrad": check_pcgrad,
    "gradvac": check_gradvac,
    "cagrad": check_cagrad,
    "cagrad_fast": check_cagrad_fast,
    "imtlg": check_imtlg,
    "nashmtl": check_nashmtl,
    "fairgrad": check_fairgrad,
    "sdmgrad": check_sdmgrad,
    "sdmgrad_os": check_sdmgrad_os,
    "alignedmtl": check_alignedmtl,
    "upgrad": check_upgrad,
    "dualproj": check_dualproj,
    "imgrad": check_imgrad,
    "imgrad_nash": check_imgrad_nash,
    "conicgrad": check_conicgrad,
    "graddrop": check_graddrop,
    "moco": last_of(loops.by_moco, "jacobians"),
    "dbmtl": last_of(loops.by_dbmtl, "jacobians", "losses"),
    "config": check_config,
    "uw": last_of(loops.by_uncertainty, "losses", weights=True),
    "rlw": check_rlw,
    "dwa": last_of(loops.by_dwa, "losses", weights=True),
    "gradnorm": last_of(loops.by_gradnorm, "gramians", "losses", weights=True),
    "famo": last_of(loops.by_famo, "losses", weights=True),
    "adatask": last_of(loops.by_adatask, "jacobians"),
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
    """Every rule as it is and with each other choice that it offers, on both routes where it has them."""
    found: dict[str, Aggregator] = {}
    for name, rule in AGGREGATORS.items():
        short, hints = SHORT.get(name, {}), get_type_hints(rule)
        options: list[dict[str, Any]] = [{}]
        for field in dataclasses.fields(rule):  # pyright: ignore[reportArgumentType]
            others = () if field.name == "solver" else get_args(hints[field.name])
            options += [{field.name: value} for value in others if value != field.default]
        routes = ({"solver": "host"}, {"solver": "device"}) if "solver" in hints else ({},)
        for option, route in itertools.product(options, routes):
            choices = [f"{field}={value}" for field, value in (short | option).items()]
            found[" ".join([name, *choices, *route.values()])] = rule(**short, **option, **route)
    return found


def remembers(rule: Aggregator) -> bool:
    return bool(rule.initial_state((1,), 1))


def course(family: str, num_tasks: int, calls: int) -> Array:
    """The gradients of every call, of mean squared norm 1, in a basis of their span."""
    rows = np.vstack([gradients(family, num_tasks, seed).numpy() for seed in range(1, calls + 1)])
    return oracles.coordinates(rows).reshape(calls, num_tasks, -1)


def call(rule: Aggregator, rows: Array, scale: float = 1.0) -> Given:
    """A fresh object on `scale` times the rows [calls, tasks, columns], one call after the other. Losses have the scale
    of their gradients."""
    rule = dataclasses.replace(rule)
    if getattr(rule, "normalization", "") == "none":  # MoCo's step of the weights is in the gradients' unit then
        rule = dataclasses.replace(rule, gamma=rule.gamma / scale**2)  # pyright: ignore[reportAttributeAccessIssue, reportCallIssue]
    jacobians = torch.from_numpy(rows) * scale
    calls, num_tasks, columns = rows.shape
    generator = torch.Generator().manual_seed(4)  # its samples for SDMGrad-OS are of several tasks
    losses = scale * (0.5 + torch.rand(calls + 1, num_tasks, generator=generator, dtype=torch.float64))
    noise = [rule.draw_noise(num_tasks, generator, columns) for _ in range(calls)]
    for jacobian, before, after, numbers in zip(jacobians, losses[:-1], losses[1:], noise, strict=True):
        result = rule(jacobian @ jacobian.mT, numbers, before, jacobian if rule.needs == "jacobian" else None)
        if rule.sees_new_losses:
            rule.load_state_dict(rule.after_step(rule.state_dict(), before, after))
    direction = result.weights @ jacobian if result.direction is None else result.direction
    gap = float(result.diagnostics["gap"]) if "gap" in result.diagnostics else None
    return Given(
        rule, rows[-1], scale, result.weights.numpy(), direction.numpy() / scale, gap, jacobians, losses, noise
    )


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
    summary = ["| rule | residual | 1 - cos | distance |", "|---|---|---|---|"]
    for label, rule in variants().items():
        name = label.split()[0]
        if name not in arguments.rules:
            continue
        started = time.perf_counter()
        columns = " | ".join(f"K = {count}" for count in arguments.tasks)
        lines = [f"### {label}", "", f"| family | {columns} |", "|---" * (1 + len(arguments.tasks)) + "|"]
        all_errors = []
        for family in FAMILIES:
            cells = []
            for count in arguments.tasks:
                rows = course(family, count, CALLS if remembers(rule) else 1)
                errors = [CHECKS[name](call(rule, rows, scale)) for scale in SCALES]
                all_errors += errors
                cells.append(cell(worst(errors)))
            lines.append(f"| {family} | " + " | ".join(cells) + " |")
        tables.append("\n".join(lines))
        summary.append(f"| {label} | {' | '.join(shown(worst(all_errors)).split(' / '))} |")
        print(f"{label}: {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)

    meanings = "\n".join(f"* {name}: {meaning}." for name, meaning in MEANINGS.items())
    text = f"""# Accuracy of the aggregators

Made by `python scripts/aggregator_accuracy.py`. Each cell is the worst over gradients scaled by {SCALES} of

{meanings}

"-" where a measure does not apply. Rules that remember are called {CALLS} times, on gradients of one family, and the
last direction is compared with that of a plain loop. The oracle of a minimiser is scipy's NNLS, or CLARABEL through
cvxpy with tolerances of 1e-13; CLARABEL has about 1e-7 of the direction, 1e-14 of the cosine, and less where norms
differ by 1e4 (`imbalanced`). Nash-MTL, FairGrad, IMGrad on Nash-MTL and IMTL-G have the equations that define them
instead; distance is the error of the length (IMTL-G: of the sum of weights) where these leave it open. Where 0 lies in
the hull of the gradients (`lowrank` above K = 5) a minimiser is not unique or has no direction: nothing is compared or,
where the rule says that d is 0, its length over the root mean square norm stands under distance. Choices that are not
named are the defaults.

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
