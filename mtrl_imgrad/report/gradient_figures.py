"""Figures of the gradients over training: how they conflict, and how the aggregator weighs tasks."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure

from mtrl_imgrad.report.diagnostics import DIAGNOSTICS, SIDES, Lines, Weights, lines, task_weights
from mtrl_imgrad.report.drawing import WIDTH, Made, Styles, columns_of, cut, plain_numbers, step_axis, wrapped
from mtrl_imgrad.report.results import Results


def diagnostics(results: Results, styles: Styles) -> Made:
    found = {
        (name, side): {one.label: lines(one.group, f"gradients/{side}/{name}") for one in results.groups}
        for name in DIAGNOSTICS
        for side in SIDES
    }
    shown = [name for name in DIAGNOSTICS if any(any(found[name, side].values()) for side in SIDES)]
    if not shown:
        return None
    figure = Figure(figsize=(WIDTH, 0.7 + 1.9 * len(shown)), layout="constrained")
    panels = figure.subplots(len(shown), len(SIDES), squeeze=False, sharex=True, sharey="row")
    handles: dict[str, Any] = {}
    for row, name in enumerate(shown):
        for column, side in enumerate(SIDES):
            axes: Axes = panels[row, column]
            for label, line in found[name, side].items():
                if line:
                    for values in line.by_seed.values():
                        axes.plot(line.steps, values, linewidth=0.5, alpha=0.4, **styles[label])
                    marker = "." if len(line.steps) == 1 else ""
                    (handles[label],) = axes.plot(line.steps, line.mean, marker=marker, linewidth=1.6, **styles[label])
            if name == "norm_ratio":
                plain_numbers(axes)
            step_axis(axes)
            if row == 0:
                axes.set_title(side, fontsize=9)
            if column == 0:
                axes.set_ylabel(textwrap.fill(DIAGNOSTICS[name], 22))
    figure.supxlabel("simulator steps per task", fontsize=9)
    labels = [wrapped(label) for label in handles]
    figure.legend(handles.values(), labels, loc="outside upper center", ncols=columns_of(list(handles)))
    caption = (
        "Gradients of the tasks' losses with respect to the shared parameters. Thick: mean over seeds. Thin: every "
        "seed. Each point is the mean over the rows of progress.csv around it. cos theta, where a rule has it, is the "
        "cosine between the mean gradient and the minimum-norm point of the gradients' hull. "
    ) + _runs_used(results, {label: [line[label] for line in found.values()] for label in handles})
    return figure, "Cosine, conflict, norm ratio and cos theta of task gradients over training.", caption


def weights(results: Results, styles: Styles) -> Made:
    found = {one.label: [task_weights(one.group, side, results.tasks) for side in SIDES] for one in results.groups}
    shown = {label: sides for label, sides in found.items() if any(sides)}
    if not shown:
        return None
    tasks = len(results.tasks)
    height = 0.55 + max(1.0, 0.16 * tasks if tasks <= 20 else 0.115 * tasks)
    figure = Figure(figsize=(WIDTH, 0.9 + height * len(shown)), layout="constrained")
    panels = figure.subplots(len(shown), len(SIDES), squeeze=False, sharex=True)
    values = np.concatenate([side.relative.ravel() for sides in shown.values() for side in sides if side])
    low, high = np.quantile(values, [0.02, 0.98])
    norm = TwoSlopeNorm(1.0, min(0.0, low), max(2.0, high))
    names = [cut(task, 26) for task in results.tasks]
    for row, (label, sides) in enumerate(shown.items()):
        for column, side in enumerate(sides):
            axes: Axes = panels[row, column]
            axes.grid(visible=False)
            axes.set_ylim(tasks, 0)
            axes.set_yticks(np.arange(tasks) + 0.5, names, fontsize=7 if tasks <= 20 else 5.5)
            axes.tick_params(axis="y", left=column == 0, labelleft=column == 0)
            axes.set_title(f"{wrapped(label, 40)}, {SIDES[column]}", fontsize=8)
            if side:
                borders = (_edges(side.steps), np.arange(tasks + 1))
                axes.pcolormesh(*borders, side.relative, cmap="PuOr_r", norm=norm, rasterized=True)
            step_axis(axes)
    mappable = ScalarMappable(norm, "PuOr_r")
    bar = figure.colorbar(
        mappable, ax=panels[-1, :], location="bottom", shrink=0.5, aspect=40, extend="both", pad=0.15 / height
    )
    bar.set_label("weight over the mean size of all weights, against simulator steps per task")
    caption = (
        "Weight of each task in the direction, over the mean size of all weights, mean over seeds: 1 (white) is the "
        "share that the plain mean gives to every task. A weight multiplies a gradient, and these differ in norm. "
    ) + _runs_used(results, shown)
    return figure, "Heat maps of the weight of each task over training, for the critic and the actor.", caption


def _runs_used(results: Results, shown: Mapping[str, Sequence[Lines | Weights | None]]) -> str:
    """How many runs of each group are in what is shown of it; those without rows yet are not."""
    used: list[str] = []
    for one in results.groups:
        counts = [len(item.seeds) for item in shown.get(one.label, ()) if item]
        if counts:
            fewest, most = min(counts), max(counts)
            shown_count = f"{most}" if fewest == most else f"{fewest} to {most}"
            used.append(f"{one.label} {shown_count} of {len(one.group.runs)}")
    return f"Runs with these rows: {', '.join(used)}."


def _edges(steps: Float[np.ndarray, " some"]) -> Float[np.ndarray, " some"]:
    """Borders of cells around steps."""
    if len(steps) == 1:
        return np.array([0.0, 2 * steps[0]])
    middles = (steps[1:] + steps[:-1]) / 2
    return np.concatenate([[steps[0] - (middles[0] - steps[0])], middles, [2 * steps[-1] - middles[-1]]])
