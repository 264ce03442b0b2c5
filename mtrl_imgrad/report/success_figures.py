"""Figures of success: final, against steps, per task, and one group against another."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mtrl_imgrad.report.drawing import COLORS, WIDTH, Made, Styles, heat_map, step_axis, wrapped
from mtrl_imgrad.report.results import Curve, Results


def final(results: Results, styles: Styles) -> Made:
    groups = results.finals
    if not groups:
        return None
    figure = Figure(figsize=(WIDTH, 0.8 + 0.62 * len(groups)), layout="constrained")
    axes = figure.add_subplot()
    for row, (label, one) in enumerate(groups.items()):
        color = styles[label]["color"]
        for offset, estimate, marker in ((0.0, one.mean, "|"), (0.22, one.iqm, "D")):
            if estimate.interval:
                ends = [estimate.interval.low, estimate.interval.high]
                axes.plot(ends, [row + offset] * 2, color=color, linewidth=2.2, alpha=1.0 if marker == "|" else 0.45)
            axes.plot(
                [estimate.value], [row + offset], marker=marker, color=color, markersize=13 if marker == "|" else 5,
                markeredgewidth=2.5 if marker == "|" else 1, linestyle="none",
            )  # fmt: skip
        seeds = one.scores.values.mean(1)
        axes.plot(seeds, np.full(len(seeds), row - 0.24), "o", color=color, markersize=5, alpha=0.75, markeredgewidth=0)
    axes.set_yticks(range(len(groups)), [wrapped(label) for label in groups])
    axes.set_ylim(len(groups) - 0.5, -0.5)
    axes.set_xlim(-0.02, 1.02)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("success of the last checkpoint, all goals, mean over tasks")
    caption = (
        "Dots: one seed each. Bar: mean over seeds, with its interval. Diamond: interquartile mean of all seeds and "
        "tasks, with its interval in a lighter line. No line: no interval."
    )
    return figure, f"Final success of {', '.join(groups)}; the table beside it has the numbers.", caption


def curves(results: Results, styles: Styles) -> Made:
    groups = results.curves
    if not groups:
        return None
    figure = Figure(figsize=(WIDTH, 3.6 + 0.2 * max(0, len(groups) - 6)), layout="constrained")
    axes = figure.add_subplot()
    for label, curve in groups.items():
        style = styles[label]
        _band(axes, curve, style["color"])
        axes.plot(curve.steps, _means(curve), marker="o", markersize=3, label=wrapped(label), linewidth=1.8, **style)
    _success_axis(axes)
    figure.legend(loc="outside right center")
    caption = (
        "Mean over seeds and tasks at the evaluations that all runs of a group have. Bands are pointwise intervals "
        "over seeds: each holds at its own step, the band as a whole does not. Without a band there is no interval."
    )
    return figure, f"Success against simulator steps per task, mean over seeds, for {', '.join(groups)}.", caption


def curves_by_seed(results: Results, styles: Styles) -> Made:
    groups = results.curves
    if not groups:
        return None
    columns = 2 if len(groups) in (2, 4) else min(3, len(groups))
    rows = -(-len(groups) // columns)
    figure = Figure(figsize=(WIDTH, 0.4 + 2.1 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    for axes, (label, curve) in zip(panels.flat, groups.items(), strict=False):
        color = styles[label]["color"]
        for other in groups.values():
            if other is not curve:
                axes.plot(other.steps, _means(other), color="#d0d0d0", linewidth=0.9)
        _band(axes, curve, color)
        for values in curve.by_seed.values():
            axes.plot(curve.steps, values, color=color, linewidth=0.7, alpha=0.8)
        axes.plot(curve.steps, _means(curve), color=color, linewidth=2.2, marker="o", markersize=3)
        axes.set_title(wrapped(label), fontsize=9)
        _success_axis(axes, labels=False)
    for axes in panels.flat[: len(groups)][-columns:]:  # the lowest of their columns
        axes.tick_params(labelbottom=True)
    for axes in panels.flat[len(groups) :]:
        axes.set_axis_off()
    figure.supxlabel("simulator steps per task", fontsize=9)
    figure.supylabel("success, mean over tasks", fontsize=9)
    caption = "Thin: every seed. Thick: their mean, with the same band as above. Grey: the means of the other groups."
    return figure, f"Success against steps of every seed, one panel each for {', '.join(groups)}.", caption


def tasks(results: Results, styles: Styles) -> Made:
    groups = results.finals
    if not groups:
        return None
    values = np.array([[one.per_task[task].value for one in groups.values()] for task in results.tasks])
    figure = heat_map(values, results.tasks, list(groups), "success, mean over seeds")
    return figure, f"Final success of each task for {', '.join(groups)}; the table has the numbers.", (
        "Final success of each task, mean over seeds."
    )  # fmt: skip


def improvement(results: Results, styles: Styles) -> Made:
    names = list(results.finals)
    if len(names) < 2:
        return None
    values = np.full((len(names), len(names)), np.nan)
    for pair in results.pairs:
        i, j = names.index(pair.a), names.index(pair.b)
        values[i, j], values[j, i] = pair.improvement.value, 1 - pair.improvement.value
    figure = heat_map(values, names, names, "probability that the row beats the column", "PuOr")
    alt = "Probability that a run of the row beats a run of the column on a task; the table has the numbers."
    return figure, alt, "0.5: neither is better. The table has the intervals."


def differences(results: Results, styles: Styles) -> Made:
    pairs = [(pair, pair.difference) for pair in results.pairs if pair.difference]
    if not pairs:
        return None
    figure = Figure(figsize=(WIDTH, 0.8 + 0.34 * len(pairs)), layout="constrained")
    axes = figure.add_subplot()
    axes.axvline(0, color="#555555", linewidth=0.9)
    for row, (pair, difference) in enumerate(pairs):
        mean = difference.mean
        seeds = list(difference.by_seed.values())
        axes.plot(seeds, [row - 0.2] * len(seeds), "o", color="#8a8a8a", markersize=4, markeredgewidth=0)
        color = COLORS[0] if pair.excludes_zero else "#222222"
        if mean.interval:
            axes.plot([mean.interval.low, mean.interval.high], [row + 0.1] * 2, color=color, linewidth=2)
        axes.plot([mean.value], [row + 0.1], "|", color=color, markersize=10, markeredgewidth=2.5)
    axes.set_yticks(range(len(pairs)), [wrapped(f"{pair.a} minus {pair.b}", 44) for pair, _ in pairs])
    axes.set_ylim(len(pairs) - 0.5, -0.6)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("difference of the final success, by seed")
    caption = "Dots: one seed each. Bar: mean difference, with its interval; blue where the interval excludes 0."
    return figure, "Paired differences of the final success; the table has the numbers.", caption


def _means(curve: Curve) -> list[float]:
    return [estimate.value for estimate in curve.estimates]


def _band(axes: Axes, curve: Curve, color: str) -> None:
    low, high = (
        [getattr(e.interval, end) if e.interval else np.nan for e in curve.estimates] for end in ("low", "high")
    )
    axes.fill_between(curve.steps, low, high, color=color, alpha=0.15, linewidth=0)


def _success_axis(axes: Axes, labels: bool = True) -> None:
    axes.set_ylim(-0.02, 1.02)
    step_axis(axes)
    if labels:
        axes.set_xlabel("simulator steps per task")
        axes.set_ylabel("success, mean over tasks")
