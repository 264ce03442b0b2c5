"""Figures of the gradients over training: how they conflict, and how the aggregator weighs tasks."""

from __future__ import annotations

import textwrap
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mtrl_imgrad.report.diagnostics import DIAGNOSTICS, SIDES, lines, task_weights
from mtrl_imgrad.report.drawing import WIDTH, Made, Styles, cut, plain_numbers, step_axis, wrapped
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
                    (handles[label],) = axes.plot(line.steps, line.mean, linewidth=1.6, **styles[label])
            if name == "norm_ratio":
                plain_numbers(axes)
            step_axis(axes)
            if row == 0:
                axes.set_title(side, fontsize=9)
            if column == 0:
                axes.set_ylabel(textwrap.fill(DIAGNOSTICS[name], 22))
    figure.supxlabel("simulator steps per task", fontsize=9)
    figure.legend(
        handles.values(), [wrapped(label) for label in handles], loc="outside upper center", ncols=min(5, len(handles))
    )
    caption = (
        "Gradients of the tasks' losses with respect to the shared parameters. Thick: mean over seeds. Thin: every "
        "seed. Each point is the mean over the rows of progress.csv around it. cos theta, where a rule has it, is the "
        "cosine between the mean gradient and the minimum-norm point of the gradients' hull."
    )
    return figure, "Cosine, conflict, norm ratio and cos theta of task gradients over training.", caption


def weights(results: Results, styles: Styles) -> Made:
    found = [[task_weights(one.group, side, results.tasks) for one in results.groups] for side in SIDES]
    columns = [j for j in range(len(results.groups)) if any(row[j] for row in found)]
    if not columns:
        return None
    height = max(1.5, 0.15 * len(results.tasks))
    across = min(3, len(columns))
    blocks = [columns[start : start + across] for start in range(0, len(columns), across)]
    figure = Figure(figsize=(WIDTH, (0.5 + height) * len(SIDES) * len(blocks) + 0.6), layout="constrained")
    panels = figure.subplots(len(blocks) * len(SIDES), across, squeeze=False)
    largest = max(float(np.quantile(np.abs(cell[1] - 1), 0.98)) for row in found for cell in row if cell)
    reach = max(largest, 0.1)
    mesh = None
    for block, group_columns in enumerate(blocks):
        for i, side in enumerate(SIDES):
            for place in range(across):
                axes: Axes = panels[block * len(SIDES) + i, place]
                cell = found[i][group_columns[place]] if place < len(group_columns) else None
                if cell is None:
                    axes.set_axis_off()
                    continue
                steps, weights = cell
                edges = _edges(steps)
                mesh = axes.pcolormesh(
                    edges, np.arange(len(weights) + 1), weights, cmap="PuOr_r", vmin=1 - reach, vmax=1 + reach,
                    rasterized=True,
                )  # fmt: skip
                axes.set_ylim(len(weights), 0)
                size = 7 if len(weights) <= 20 else 5.5
                names = [cut(task, 24) for task in results.tasks] if place == 0 else []
                axes.set_yticks(np.arange(len(names)) + 0.5, names, fontsize=size)
                axes.set_title(f"{wrapped(results.groups[group_columns[place]].label)}, {side}", fontsize=8)
                axes.grid(visible=False)
                step_axis(axes)
                axes.tick_params(axis="x", labelsize=7)
    if mesh is not None:
        figure.colorbar(mesh, ax=panels, location="bottom", shrink=0.5, aspect=40, extend="both", pad=0.02)
    figure.supxlabel("weight over the mean size of all weights, against simulator steps per task", fontsize=9)
    caption = (
        "Weight of each task in the direction, over the mean size of all weights, mean over seeds: 1 (white) is the "
        "share that the plain mean gives to every task. A weight multiplies a gradient whose norm differs "
        "between tasks."
    )
    return figure, "Heat maps of the weight of each task over training, for the critic and the actor.", caption


def _edges(steps: Float[np.ndarray, " some"]) -> Float[np.ndarray, " some"]:
    """Borders of cells around steps."""
    if len(steps) == 1:
        return np.array([0.0, 2 * steps[0]])
    middles = (steps[1:] + steps[:-1]) / 2
    return np.concatenate([[steps[0] - (middles[0] - steps[0])], middles, [2 * steps[-1] - middles[-1]]])
