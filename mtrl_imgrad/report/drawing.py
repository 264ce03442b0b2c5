"""What all figures of a report share: style, axes, heat maps, and how they become files.

Figures are drawn without pyplot and its global state. The same results give the same bytes: no dates, no random
identifiers. Text from files is never read as mathematics.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's palette without yellow, which is too light for lines; groups beyond the seventh are dashed."""
STYLES = ("-", (0, (4, 1.5)), (0, (1, 1)))
SETTINGS: dict[Any, Any] = {
    "svg.hashsalt": "mtrl-imgrad",
    "svg.fonttype": "path",
    "text.parse_math": False,
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "axes.linewidth": 0.7,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "legend.frameon": False,
}
WIDTH = 7.4
"""Inches of a figure that takes the whole width."""
PNG_DPI = 160


Style = Mapping[str, Any]
Styles = Mapping[str, Style]
Made = tuple[Figure, str, str] | None
"""A figure, what it shows for those who cannot see it, and how to read it; None where there are no numbers."""


def styles_of(labels: Sequence[str]) -> Styles:
    """The same colour for a group in every figure."""
    styles = [{"color": color, "linestyle": style} for style in STYLES for color in COLORS]
    return {label: styles[i % len(styles)] for i, label in enumerate(labels)}


def saved(figure: Figure, kind: str) -> bytes:
    """The figure as `svg` or `png`."""
    buffer = io.BytesIO()
    metadata = {"Date": None, "Creator": None} if kind == "svg" else {"Software": None}
    figure.savefig(buffer, format=kind, metadata=metadata, dpi=PNG_DPI)
    return buffer.getvalue()


def heat_map(
    values: Float[np.ndarray, "rows columns"],
    rows: Sequence[str],
    columns: Sequence[str],
    title: str,
    colors: str = "viridis",
) -> Figure:
    """Numbers between 0 and 1 as coloured cells with the number in each."""
    figure = Figure(figsize=(min(WIDTH, 2.6 + 0.9 * len(columns)), 1.3 + 0.23 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    cells = axes.pcolormesh(values, cmap=colors, vmin=0, vmax=1, edgecolors="white", linewidth=0.6)
    for i, j in np.argwhere(np.isfinite(values)).tolist():
        red, green, blue, _ = cells.to_rgba(values[i, j])
        dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
        axes.text(
            j + 0.5, i + 0.5, f"{values[i, j]:.2f}", ha="center", va="center", fontsize=7.5 if len(columns) < 9 else 6,
            color="white" if dark else "black",
        )  # fmt: skip
    axes.set_xticks(np.arange(len(columns)) + 0.5, [wrapped(name, 16) for name in columns], fontsize=8)
    if sum(len(name) for name in columns) > 60:
        axes.tick_params(axis="x", labelrotation=35)
        for text in axes.get_xticklabels():
            text.set(ha="left", rotation_mode="anchor")
    axes.xaxis.tick_top()
    axes.set_yticks(np.arange(len(rows)) + 0.5, [cut(name, 34) for name in rows], fontsize=8)
    axes.set_ylim(len(rows), 0)
    axes.tick_params(length=0)
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    axes.set_xlabel(title)
    return figure


def step_axis(axes: Axes) -> None:
    """Few ticks, as 400 k or 1.2 M."""
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _compact(value)))


def plain_numbers(axes: Axes) -> None:
    """A logarithmic axis with numbers as they are: powers would be set as mathematics, which is off."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=6))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _compact(steps: float) -> str:
    for size, letter in ((1e6, "M"), (1e3, "k")):
        if abs(steps) >= size:
            return f"{steps / size:g} {letter}"
    return f"{steps:g}"


def wrapped(text: str, width: int = 28) -> str:
    """A label in lines, at most four."""
    return "\n".join(textwrap.wrap(text, width, break_on_hyphens=False)[:4]) or text


def columns_of(labels: Sequence[str]) -> int:
    """Columns of a legend above a figure that takes the whole width."""
    longest = max(len(line) for label in labels for line in wrapped(label).splitlines())
    return max(1, min(len(labels), 90 // (longest + 6)))


def cut(text: str, length: int) -> str:
    """A label that is not longer than that."""
    return text if len(text) <= length else f"{text[: length - 1]}…"
