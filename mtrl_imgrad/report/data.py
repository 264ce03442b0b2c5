"""The numbers of a report as CSV, one tidy row each, for other programs."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Sequence

from mtrl_imgrad.report.results import Results
from mtrl_imgrad.statistics import Estimate


def csv_files(results: Results) -> dict[str, str]:
    """File name -> content. An empty cell is a number that does not exist (no interval, not reached)."""
    return {
        "final.csv": _csv(("group", "seed", "task", "success"), _final(results)),
        "curves.csv": _csv(("group", "seed", "step", "success"), _curves(results)),
        "estimates.csv": _csv(("group", "quantity", "value", "low", "high", "runs"), _estimates(results)),
        "steps_to_reach.csv": _csv(("group", "success", "seed", "step"), _reach(results)),
        "pairs.csv": _csv(
            ("a", "b", "quantity", "value", "low", "high", "runs", "p_paired_t_test", "remains_after_holm"),
            _pairs(results),
        ),
    }


def _csv(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows([columns, *rows])
    return buffer.getvalue()


def _final(results: Results) -> Iterable[Sequence[object]]:
    for label, final in results.finals.items():
        for i, seed in enumerate(final.scores.seeds):
            for j, task in enumerate(final.scores.tasks):
                yield label, seed, task, final.scores.values[i, j]


def _curves(results: Results) -> Iterable[Sequence[object]]:
    for label, curve in results.curves.items():
        for seed, values in curve.by_seed.items():
            yield from ((label, seed, step, value) for step, value in zip(curve.steps, values, strict=True))


def _estimates(results: Results) -> Iterable[Sequence[object]]:
    for label, final in results.finals.items():
        for name, estimate in (("mean", final.mean), ("interquartile mean", final.iqm), *final.per_task.items()):
            yield label, name, *_numbers(estimate)


def _reach(results: Results) -> Iterable[Sequence[object]]:
    for label, curve in results.curves.items():
        for reach in curve.to_reach:
            for seed, step in reach.by_seed.items():
                yield label, reach.threshold, seed, int(step) if math.isfinite(step) else ""


def _pairs(results: Results) -> Iterable[Sequence[object]]:
    for pair in results.pairs:
        yield pair.a, pair.b, "probability of improvement", *_numbers(pair.improvement), "", ""
        if pair.difference:
            tested = ("", "") if pair.p_value is None else (pair.p_value, pair.holm)
            yield pair.a, pair.b, "difference by seed", *_numbers(pair.difference.mean), *tested


def _numbers(estimate: Estimate) -> tuple[object, ...]:
    ends = (estimate.interval.low, estimate.interval.high) if estimate.interval else ("", "")
    return estimate.value, *ends, " against ".join(map(str, estimate.runs))
