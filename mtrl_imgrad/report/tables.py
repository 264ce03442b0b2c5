"""The tables of a report, as text that HTML, Markdown and the console share."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from mtrl_imgrad.report.diagnostics import cost
from mtrl_imgrad.report.results import Pair, Results
from mtrl_imgrad.run_folder import RunFolder
from mtrl_imgrad.statistics import Estimate

NONE = "-"


@dataclass(frozen=True)
class Table:
    """Text cells; the first column is the row's name, the others are right-aligned."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()
    """Sentences below the table, each once."""


def printable(raw: str) -> str:
    """Text from a file without the control characters that would steer a terminal or break a page."""
    return "".join(c if c.isprintable() else " " for c in raw)


def final_table(results: Results) -> Table:
    """Final success of each group: mean, interquartile mean and every seed."""
    rows: list[tuple[str, ...]] = []
    for one in results.groups:
        count = f"{len(one.group.runs) - len(one.missing)} of {len(one.group.runs)}"
        final = one.final
        seeds = zip(final.scores.seeds, final.scores.values.mean(1), strict=True) if final else ()
        cells = (_estimate(final.mean), _estimate(final.iqm)) if final else (NONE, NONE)
        rows.append((one.label, count, *cells, ", ".join(f"{seed}: {value:.2f}" for seed, value in seeds) or NONE))
    missing = [
        f"No final success yet: {one.label} seed {run.config.seed} ({state(run)})."
        for one in results.groups
        for run in one.missing
    ]
    estimates = [estimate for final in results.finals.values() for estimate in (final.mean, final.iqm)]
    return Table(
        ("", "runs evaluated", "mean", "interquartile mean", "seed: mean over tasks"),
        tuple(rows),
        (*missing, *_meanings(estimates)),
    )


def state(run: RunFolder) -> str:
    """How far a run is."""
    if run.final_success:
        return "finished"
    if run.finished:
        return f"trained, not evaluated: mtrl-imgrad evaluate {run.path}"
    if run.last_step > run.planned_steps:
        return f"trained to step {run.last_step:,}, beyond the {run.planned_steps:,} of its config.yaml"
    return f"at step {run.last_step:,} of {run.planned_steps:,}"


def task_table(results: Results) -> Table:
    """Final success of each task: mean over seeds and, in brackets, the lowest and the highest seed."""
    finals = results.finals
    rows = [
        (task, *(_spread(final.scores.of_task(task).values[:, 0].tolist(), ".2f") for final in finals.values()))
        for task in results.tasks
    ]
    rows.append(("mean over tasks", *(_spread(f.scores.values.mean(1).tolist(), ".2f") for f in finals.values())))
    note = "Mean over seeds; in brackets the lowest and the highest seed, which is a range and no interval."
    return Table(("task", *finals), tuple(rows), (note,))


def reach_table(results: Results) -> Table:
    """Steps per task until the mean success over tasks first reached each threshold."""
    rows: list[tuple[str, ...]] = []
    for label, curve in results.curves.items():
        for reach in curve.to_reach:
            interval = reach.interval
            shown = f" [{_steps(interval.low)}, {_steps(interval.high)}]" if interval else ""
            seeds = ", ".join(f"{seed}: {_steps(step)}" for seed, step in reach.by_seed.items())
            counted = f"{reach.reached} of {len(reach.by_seed)}"
            rate, end = f"{100 * reach.threshold:.0f} %", f"{reach.horizon:,}"
            rows.append((label, rate, counted, f"{_steps(reach.median)}{shown}", end, seeds))
    columns = ("", "success", "runs that reached it", "median over runs", "looked at up to step", "seed: steps")
    notes = ["A run counts at the first evaluation at or above the rate; one that never was counts as later."]
    intervals = [reach.interval for curve in results.curves.values() for reach in curve.to_reach]
    if any(intervals):
        notes.append("Brackets: 95 % interval of the median from order statistics.")
    if not all(intervals):
        notes.append("A median of fewer than 6 runs has no 95 % interval.")
    return Table(columns, tuple(rows), tuple(notes))


def improvement_table(results: Results) -> Table:
    """Probability that a run of the row beats a run of the column on a task."""
    names = list(results.finals)
    cells = {(pair.a, pair.b): _estimate(pair.improvement) for pair in results.pairs}
    for pair in results.pairs:
        interval = pair.improvement.interval
        shown = f" [{1 - interval.high:.2f}, {1 - interval.low:.2f}]" if interval else ""
        cells[pair.b, pair.a] = f"{1 - pair.improvement.value:.2f}{shown}"
    rows = tuple((a, *(cells.get((a, b), NONE) for b in names)) for a in names)
    return Table(("row beats column", *names), rows, _meanings(pair.improvement for pair in results.pairs))


def difference_table(results: Results) -> Table:
    """Paired differences of the final success, by seed."""
    rows: list[tuple[str, ...]] = []
    notes: list[str] = []
    alone: dict[str, None] = {}
    for pair in results.pairs:
        name, difference = f"{pair.a} minus {pair.b}", pair.difference
        if difference is None:
            rows.append((name, "0", NONE, NONE, NONE))
        else:
            seeds = ", ".join(f"{seed}: {value:+.2f}" for seed, value in difference.by_seed.items())
            p_value = NONE if pair.p_value is None else "< 0.001" if pair.p_value < 1e-3 else f"{pair.p_value:.3f}"
            rows.append((name, str(len(difference.by_seed)), _estimate(difference.mean, "+.2f"), p_value, seeds))
            for label, only in ((pair.a, difference.only_in_a), (pair.b, difference.only_in_b)):
                alone |= {f"{label} seed {seed}": None for seed in only if seed not in pair.other_goals}
        if pair.other_goals:
            notes.append(f"{name}: not paired, as their goals differ: seed {_list(pair.other_goals)}.")
    if alone:
        notes.append(f"Not in every difference, as another group has no final success of the seed: {', '.join(alone)}.")
    meanings = _meanings(pair.difference.mean for pair in results.pairs if pair.difference)
    columns = ("", "seeds", "mean difference", "p (paired t-test)", "seed: difference")
    return Table(columns, tuple(rows), (*notes, *meanings))


def verdict(pairs: Sequence[Pair]) -> list[str]:
    """What the paired differences show, and what several comparisons at once make of it."""
    compared = [pair for pair in pairs if pair.difference]
    with_interval = [pair for pair in compared if pair.difference and pair.difference.mean.interval]
    if not pairs:
        return []
    if not compared:
        return ["No two groups share a seed with the same goals, so nothing is compared by seed."]
    shown = [_sign(pair) for pair in compared if pair.excludes_zero]
    text = [
        f"Of {len(compared)} difference{'s' * (len(compared) > 1)}, {len(with_interval)} "
        f"{'has' if len(with_interval) == 1 else 'have'} an interval"
        + (f", and those that exclude 0 are: {'; '.join(shown)}." if shown else ", and none excludes 0.")
    ]
    if not shown:
        text.append(
            "No difference shown, which does not show that there is none: few seeds can show large differences only."
        )
    tested = sum(pair.p_value is not None for pair in compared)
    if tested > 1:
        expected = 0.05 * tested
        text.append(
            f"These are {tested} comparisons at once: if no rule differed from another, about {expected:.2g} of the "
            "intervals would exclude 0 by chance."
        )
        kept = [_sign(pair) for pair in compared if pair.holm]
        remaining = f"these remain: {'; '.join(kept)}" if kept else "none remains"
        text.append(f"After Holm's correction at 5 % over all of them, {remaining}.")
    return text


def cost_table(results: Results) -> Table:
    """Wall-clock time of each group: mean over its runs, lowest and highest in brackets."""
    rows: list[tuple[str, ...]] = []
    for one in results.groups:
        ended = [run for run in one.group.runs.values() if run.finished]
        costs = [found for run in one.group.runs.values() if (found := cost(run))]
        minutes = [found.minutes for run in ended if (found := cost(run))]
        milliseconds = (_spread([getattr(c, name) for c in costs], ".2f") for name in ("update_ms", "stepping_ms"))
        rows.append((one.label, f"{len(ended)} of {len(one.group.runs)}", _spread(minutes, ".1f"), *milliseconds))
    return Table(
        ("", "finished runs", "minutes of training", "ms per update", "ms per vector step"),
        tuple(rows),
        (
            "Mean over runs, with the lowest and the highest in brackets. Minutes are to the last row of progress.csv, "
            "of finished runs only, over all resumes; milliseconds are each run's median.",
            "Times are those of the machines and of whatever else ran on them: compare them only if these were alike.",
        ),
    )


def run_table(results: Results) -> Table:
    """Every run of the report."""
    rows = tuple(
        (str(run.path), one.label, str(seed), str(run.goal_seed), state(run))
        for one in results.groups
        for seed, run in one.group.runs.items()
    )
    return Table(("folder", "group", "seed", "goal seed", "state"), rows)


def _estimate(estimate: Estimate, form: str = ".2f") -> str:
    interval = estimate.interval
    return f"{estimate.value:{form}}" + (f" [{interval.low:{form}}, {interval.high:{form}}]" if interval else "")


def _meanings(estimates: Iterable[Estimate]) -> tuple[str, ...]:
    """What the intervals mean; sentences that differ in the number of runs only are told once."""
    counts: dict[str, dict[str, None]] = {}
    for estimate in estimates:
        counted = re.search(r"\d+ runs?( against \d+ runs?)?", estimate.meaning)
        shown = counted[0] if counted else ""
        counts.setdefault(estimate.meaning.replace(shown, "{}", 1), {})[shown] = None
    return tuple(meaning.replace("{}", _either(list(shown)), 1) for meaning, shown in counts.items())


def _either(choices: Sequence[str]) -> str:
    return " or ".join([", ".join(choices[:-1]), choices[-1]]) if len(choices) > 1 else choices[0]


def _steps(value: float) -> str:
    return f"{value:,.0f}" if math.isfinite(value) else "not reached"


def _sign(pair: Pair) -> str:
    above = pair.difference is not None and pair.difference.mean.value > 0
    return f"{pair.a} above {pair.b}" if above else f"{pair.b} above {pair.a}"


def _list(seeds: Sequence[int]) -> str:
    return ", ".join(map(str, seeds))


def _spread(values: Sequence[float], form: str) -> str:
    known = [value for value in values if math.isfinite(value)]
    if not known:
        return NONE
    mean = f"{np.mean(known):{form}}"
    return mean if len(known) == 1 else f"{mean} ({min(known):{form}} to {max(known):{form}})"
