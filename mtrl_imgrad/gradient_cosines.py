"""The K x K cosines between the tasks' gradients, as tidy rows and as a picture.

What is shown is the mean of every update's cosines since the last evaluation, not one update's: those of a single batch
are mostly noise. The mean over its task pairs is the mean of `gradients/*/cosine_mean` over the same updates.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float64, UInt8
from torch import Tensor

from mtrl_imgrad.csv_files import csv_text
from mtrl_imgrad.files import append_whole

COLUMNS = ("step", "network", "task_a", "task_b", "cosine")
DOTS_PER_INCH = 100
NUMBERED = 12
"""Up to so many tasks, a cell has room for its number."""


def append_rows(
    path: Path, step: int, tasks: Sequence[str], cosines: dict[str, Float64[Tensor, "tasks tasks"]]
) -> None:
    """Add one evaluation's cosines to a tidy CSV: each pair of tasks once, to five decimals.

    Args:
        path: the file, made where it does not exist.
        step: simulator steps per task.
        tasks: task names.
        cosines: by tag, `gradients/<network>/cosine`.
    """
    new = not path.exists() or path.stat().st_size == 0
    pairs = list(itertools.combinations(range(len(tasks)), 2))
    rows = [
        (step, tag.split("/")[1], tasks[i], tasks[j], f"{matrix[i, j]:.5f}")
        for tag, matrix in cosines.items()
        for i, j in pairs
    ]
    append_whole(path, csv_text([COLUMNS, *rows] if new else rows))


def heat_map(
    cosines: Float64[np.ndarray, "tasks tasks"], tasks: Sequence[str], title: str
) -> UInt8[np.ndarray, "height width 3"]:
    """A picture of the matrix: row and column i are task i, from -1 (blue) over 0 (white) to 1 (red)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # takes a second, which only a picture is worth
    from matplotlib.figure import Figure

    numbered = len(tasks) <= NUMBERED
    font = 9 if numbered else 6
    side = max(2.0, (0.5 if numbered else 0.17) * len(tasks))  # this and the following in inches
    names = 0.2 + 0.0085 * font * max(len(task) for task in tasks)
    title_width = 0.2 + 0.0085 * (font + 1) * len(title)
    width, height = max(names + side + 1.0, title_width), names + side + 0.4
    figure = Figure(figsize=(width, height), dpi=DOTS_PER_INCH)
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_axes((names / width, names / height, side / width, side / height))
    image = axes.imshow(cosines, cmap="RdBu_r", vmin=-1, vmax=1, interpolation="nearest")
    axes.set_xticks(range(len(tasks)), tasks, rotation=90, fontsize=font)
    axes.set_yticks(range(len(tasks)), tasks, fontsize=font)
    figure.text(0.1 / width, 1 - 0.1 / height, title, fontsize=font + 1, va="top")
    if numbered:
        for (i, j), value in np.ndenumerate(cosines.round(2) + 0.0):  # + 0.0: no minus before a zero
            colour = "white" if abs(value) > 0.6 else "black"
            axes.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=font - 1, color=colour)
    scale = figure.add_axes(((names + side + 0.15) / width, names / height, 0.15 / width, side / height))
    figure.colorbar(image, cax=scale).ax.tick_params(labelsize=font)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
