"""Success against steps over several runs: final success, mean curve, area, and steps to reach a rate."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import scipy  # its parts load when used, as only reports need them
from jaxtyping import Float, Int

from mtrl_imgrad.statistics import LEVEL, Estimate, Interval, Scores, mean_success


@dataclass(frozen=True)
class SuccessCurve:
    """One run: success rate of each task at each evaluation, steps ascending."""

    steps: Int[np.ndarray, " evaluations"]
    tasks: tuple[str, ...]
    success: Float[np.ndarray, "evaluations tasks"]


@dataclass(frozen=True)
class StepsToReach:
    """When runs first reached a success rate; `math.inf` stands for "not up to step `horizon`".

    Attributes:
        by_seed: the first evaluation at which the mean over tasks was at least the threshold.
        reached: how many runs got there.
        median: over all runs, those that never got there included as infinitely late.
        interval: of the median, or None.
    """

    threshold: float
    horizon: int
    by_seed: Mapping[int, float]
    reached: int
    median: float
    interval: Interval | None
    meaning: str


def success_curve(rows: Iterable[Mapping[str, str]]) -> SuccessCurve:
    """One run from the rows of its `eval.csv`, as `csv.DictReader` gives them."""
    won: dict[int, dict[str, list[int]]] = {}
    for row in rows:
        won.setdefault(int(row["step"]), {}).setdefault(row["task"], []).append(int(row["success"]))
    if not won:
        raise ValueError("no evaluation")
    steps = sorted(won)
    tasks = tuple(won[steps[0]])
    for step in steps:
        if set(won[step]) != set(tasks):
            raise ValueError(f"step {step} evaluates {sorted(won[step])}, step {steps[0]} {sorted(tasks)}")
    success = np.array([[np.mean(won[step][task]) for task in tasks] for step in steps])
    return SuccessCurve(np.array(steps), tasks, success)


def common_steps(curves: Iterable[SuccessCurve]) -> Int[np.ndarray, " steps"]:
    """The steps at which all of these runs have been evaluated: what may be compared while some are still going."""
    found = sorted(set.intersection(*({int(step) for step in curve.steps} for curve in curves)))
    if not found:
        raise ValueError("the runs share no evaluation step")
    return np.array(found)


def final_success(runs: Mapping[int, SuccessCurve], step: int | None = None) -> Scores:
    """Success of each seed and task at one evaluation: the last that all runs have, or that at `step`.

    Never the best point of a curve, as several published tables have it, which rises with the number of evaluations.
    """
    steps, success = _aligned(runs, None)
    if step is not None and step not in steps:
        raise ValueError(f"not all runs were evaluated at step {step}")
    tasks = runs[min(runs)].tasks
    return Scores(success[:, -1 if step is None else list(steps).index(step)], tuple(sorted(runs)), tasks)


def area_under_curve(runs: Mapping[int, SuccessCurve], until: int | None = None) -> Scores | None:
    """Mean success over training, of each seed and task: trapezoids between the first and the last evaluation that all
    runs have, divided by the steps between. None with a single evaluation."""
    steps, success = _aligned(runs, until)
    if len(steps) == 1:
        return None
    areas = scipy.integrate.trapezoid(success, steps, axis=1) / (steps[-1] - steps[0])
    return Scores(np.clip(areas, 0.0, 1.0), tuple(sorted(runs)), runs[min(runs)].tasks)  # 1 + a rounding is no rate


def mean_curve(
    runs: Mapping[int, SuccessCurve], until: int | None = None, seed: int = 0
) -> tuple[Int[np.ndarray, " steps"], list[Estimate]]:
    """Mean success against steps, at the evaluations that all runs have.

    The intervals make a pointwise band: each is at its level by itself, the band as a whole is not. An evaluation that
    only some runs have is left out, as the mean would jump where runs end.
    """
    steps, success = _aligned(runs, until)
    tasks = runs[min(runs)].tasks
    return steps, [mean_success(Scores(success[:, k], tuple(sorted(runs)), tasks), seed) for k in range(len(steps))]


def steps_to_reach(runs: Mapping[int, SuccessCurve], threshold: float, until: int | None = None) -> StepsToReach:
    """Steps until the mean success over tasks is at least `threshold`, up to the last evaluation that all runs have.

    A run that does not get there is later than all that do: leaving it out would favour the rule that fails most. The
    interval of the median is from order statistics (binomial, free of assumptions; at least 95 %, so none exists below
    6 runs). Its lower end is the evaluation before, as the threshold was passed somewhere between the two.
    """
    steps, success = _aligned(runs, until)
    above = success.mean(2) >= threshold - 1e-12  # a mean of tasks may miss its decimal by a rounding
    first = np.where(above.any(1), steps[above.argmax(1)], math.inf)
    by_seed = dict(zip(sorted(runs), first.tolist(), strict=True))
    n, horizon, reached = len(runs), int(steps[-1]), int(above.any(1).sum())
    order = int(scipy.stats.binom.ppf((1 - LEVEL) / 2, n, 0.5))  # 1-based: P(Binomial < order) <= 2.5 %
    text = (
        f"{reached} of {n} run{'s' * (n > 1)} reached {100 * threshold:g} % by step {horizon}; others count as later."
    )
    interval = None
    if order == 0:
        text += " The median has no 95 % interval: that takes 6 runs."
    else:
        ordered = np.sort(first)
        earlier = steps[steps < ordered[order - 1]]
        interval = Interval(float(earlier[-1]) if len(earlier) else 0.0, float(ordered[n - order]))
        text += " Interval: order statistics of the median, at least 95 %; infinite means beyond the last step."
    return StepsToReach(threshold, horizon, by_seed, reached, float(np.median(first)), interval, text)


def _aligned(
    runs: Mapping[int, SuccessCurve], until: int | None
) -> tuple[Int[np.ndarray, " steps"], Float[np.ndarray, "seeds steps tasks"]]:
    """Runs in the order of their seeds, at their common steps, tasks in the order of the first run."""
    if not runs:
        raise ValueError("no runs")
    curves = [runs[seed] for seed in sorted(runs)]
    tasks = curves[0].tasks
    if any(set(curve.tasks) != set(tasks) for curve in curves):
        raise ValueError("the runs have different tasks")
    steps = common_steps(curves)
    steps = steps if until is None else steps[steps <= until]
    if not len(steps):
        raise ValueError(f"the runs share no evaluation up to step {until}")
    columns = [[curve.tasks.index(task) for task in tasks] for curve in curves]
    return steps, np.stack(
        [curve.success[np.isin(curve.steps, steps)][:, column] for curve, column in zip(curves, columns, strict=True)]
    )
