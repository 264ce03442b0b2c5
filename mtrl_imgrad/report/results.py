"""The numbers of a report: what `statistics` and `success_curves` say about each group and each pair of groups."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float, Int
from scipy import stats

from mtrl_imgrad.config import Config
from mtrl_imgrad.report.groups import Group, Selection, sharing
from mtrl_imgrad.run_folder import RunFolder
from mtrl_imgrad.statistics import (
    LEVEL,
    Estimate,
    PairedDifference,
    Scores,
    interquartile_mean,
    mean_success,
    paired_difference,
    probability_of_improvement,
)
from mtrl_imgrad.success_curves import (
    StepsToReach,
    SuccessCurve,
    final_success,
    mean_curve,
    steps_to_reach,
)

THRESHOLDS = (0.5, 0.8)


@dataclass(frozen=True)
class Curve:
    """Success against steps of one group, at the evaluations that all of its runs have; `left_out` are seeds of runs
    that were evaluated at none of these."""

    steps: Int[np.ndarray, " steps"]
    estimates: Sequence[Estimate]
    by_seed: Mapping[int, Float[np.ndarray, " steps"]]
    to_reach: tuple[StepsToReach, ...]
    """One for each of `THRESHOLDS`."""
    left_out: tuple[int, ...] = ()


@dataclass(frozen=True)
class Final:
    """Final success of one group, of the runs that have it.

    Attributes:
        scores: of each seed and task.
        mean: over tasks and seeds.
        iqm: interquartile mean over seeds and tasks.
        per_task: mean over seeds.
    """

    scores: Scores
    mean: Estimate
    iqm: Estimate
    per_task: Mapping[str, Estimate]


@dataclass(frozen=True)
class GroupResults:
    """One group; `final` is None until a run has it, `curve` until a run was evaluated."""

    group: Group
    final: Final | None
    curve: Curve | None

    @property
    def label(self) -> str:
        return self.group.label

    @property
    def missing(self) -> list[RunFolder]:
        """Runs without a final evaluation."""
        return [run for run in self.group.runs.values() if run.final_success is None]


@dataclass(frozen=True)
class Pair:
    """Two groups, final success of A against that of B.

    Attributes:
        improvement: probability that a run of A beats one of B on a task.
        difference: A minus B by seed; None if no seed with the same goals is in both.
        other_goals: seeds that both have, with different goals, which are not compared.
        p_value: of a paired t-test of the differences; None below two seeds or where they do not vary.
        holm: whether the difference remains at 5 % after Holm's correction for all pairs of the report.
    """

    a: str
    b: str
    improvement: Estimate
    difference: PairedDifference | None
    other_goals: tuple[int, ...]
    p_value: float | None
    holm: bool = False

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval of the mean difference, taken alone, excludes 0."""
        interval = self.difference.mean.interval if self.difference else None
        return interval is not None and not interval.low <= 0 <= interval.high


@dataclass(frozen=True)
class Results:
    """All numbers of a report."""

    selection: Selection
    tasks: tuple[str, ...]
    groups: tuple[GroupResults, ...]
    pairs: tuple[Pair, ...]

    @property
    def config(self) -> Config:
        """The configuration of any run, for what all runs have in common."""
        return self.selection.runs[0].config

    @property
    def finals(self) -> dict[str, Final]:
        """By label, of the groups that have it."""
        return {one.label: one.final for one in self.groups if one.final}

    @property
    def curves(self) -> dict[str, Curve]:
        """By label, of the groups that have it."""
        return {one.label: one.curve for one in self.groups if one.curve}


def results(selection: Selection) -> Results:
    """The numbers of the selected runs."""
    tasks = selection.runs[0].tasks
    groups = tuple(GroupResults(group, _final(group, tasks), _curve(group, tasks)) for group in selection.groups)
    ended = [(one.group, one.final) for one in groups if one.final]
    pairs = [_pair(*a, *b) for a, b in itertools.combinations(ended, 2)]
    return Results(selection, tasks, groups, tuple(_holm(pairs)))


def _final(group: Group, tasks: Sequence[str]) -> Final | None:
    found = {seed: run.final_success for seed, run in group.runs.items()}
    ended = {seed: _in_order(curve, tasks) for seed, curve in found.items() if curve}
    if not ended:
        return None
    scores = final_success(ended)
    per_task = {task: mean_success(scores.of_task(task)) for task in tasks}
    return Final(scores, mean_success(scores), interquartile_mean(scores), per_task)


def _curve(group: Group, tasks: Sequence[str]) -> Curve | None:
    found = {seed: run.training_curve for seed, run in group.runs.items()}
    evaluated = {seed: _in_order(curve, tasks) for seed, curve in found.items() if curve}
    if not evaluated:
        return None
    shared = sharing({seed: {int(step) for step in curve.steps} for seed, curve in evaluated.items()})
    runs = {seed: curve for seed, curve in evaluated.items() if seed in shared}
    steps, estimates = mean_curve(runs)
    by_seed = {seed: curve.success[np.isin(curve.steps, steps)].mean(1) for seed, curve in runs.items()}
    to_reach = tuple(steps_to_reach(runs, threshold) for threshold in THRESHOLDS)
    return Curve(steps, estimates, by_seed, to_reach, tuple(seed for seed in evaluated if seed not in shared))


def _in_order(curve: SuccessCurve, tasks: Sequence[str]) -> SuccessCurve:
    return SuccessCurve(curve.steps, tuple(tasks), curve.success[:, [curve.tasks.index(task) for task in tasks]])


def _pair(group_a: Group, a: Final, group_b: Group, b: Final) -> Pair:
    shared = set(a.scores.seeds) & set(b.scores.seeds)
    other_goals = tuple(sorted(s for s in shared if group_a.runs[s].goals != group_b.runs[s].goals))
    kept_a, kept_b = _without(a.scores, other_goals), _without(b.scores, other_goals)
    difference = paired_difference(kept_a, kept_b) if kept_a and kept_b else None
    p_value = None
    if difference and difference.mean.t_interval:
        p_value = float(stats.ttest_1samp(list(difference.by_seed.values()), 0.0)[1])  # pyright: ignore[reportArgumentType]
    improvement = probability_of_improvement(a.scores, b.scores)
    return Pair(
        group_a.label, group_b.label, improvement, difference, other_goals, None if p_value is None else float(p_value)
    )


def _without(scores: Scores, seeds: Sequence[int]) -> Scores | None:
    kept = [row for row, seed in enumerate(scores.seeds) if seed not in seeds]
    if not kept:
        return None
    return replace(scores, values=scores.values[kept], seeds=tuple(scores.seeds[row] for row in kept))


def _holm(pairs: Sequence[Pair]) -> list[Pair]:
    """Holm's step-down procedure (1979) over all pairs that have a p-value, at a family-wise level of 5 %."""
    tested = sorted((pair for pair in pairs if pair.p_value is not None), key=lambda pair: pair.p_value or 0.0)
    rejected: set[tuple[str, str]] = set()
    for rank, pair in enumerate(tested):
        if (pair.p_value or 0.0) > (1 - LEVEL) / (len(tested) - rank):
            break
        rejected.add((pair.a, pair.b))
    return [replace(pair, holm=(pair.a, pair.b) in rejected) for pair in pairs]
