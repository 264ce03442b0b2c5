"""All figures of a report."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import matplotlib as mpl

from mtrl_imgrad.report import gradient_figures, success_figures
from mtrl_imgrad.report.drawing import SETTINGS, Made, Styles, saved, styles_of
from mtrl_imgrad.report.results import Results

FIGURES: dict[str, Callable[[Results, Styles], Made]] = {
    "final": success_figures.final,
    "curves": success_figures.curves,
    "curves_by_seed": success_figures.curves_by_seed,
    "tasks": success_figures.tasks,
    "differences": success_figures.differences,
    "improvement": success_figures.improvement,
    "diagnostics": gradient_figures.diagnostics,
    "weights": gradient_figures.weights,
}


@dataclass(frozen=True)
class Drawn:
    """A figure as files.

    Attributes:
        name: stem of its files.
        alt: what it shows, for those who cannot see it.
        caption: how to read it.
        inches: its width.
    """

    name: str
    alt: str
    caption: str
    inches: float
    svg: bytes
    png: bytes


def draw(results: Results) -> list[Drawn]:
    """All figures for which there are numbers."""
    drawn: list[Drawn] = []
    with mpl.rc_context():
        mpl.rcdefaults()  # whatever the user's matplotlibrc says
        mpl.rcParams.update(SETTINGS)
        styles = styles_of([one.label for one in results.groups])
        for name, make in FIGURES.items():
            made = make(results, styles)
            if made:
                figure, alt, caption = made
                files = (saved(figure, "svg"), saved(figure, "png"))
                drawn.append(Drawn(name, alt, caption, figure.get_figwidth(), *files))
    return drawn
