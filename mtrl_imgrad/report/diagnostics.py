"""Gradient diagnostics and wall-clock cost from progress.csv, over the seeds of a group."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from mtrl_imgrad.report.groups import Group, sharing
from mtrl_imgrad.run_folder import RunFolder

SIDES = ("critic", "actor")
DIAGNOSTICS: dict[str, str] = {
    "cosine_mean": "mean cosine of task pairs",
    "conflict_fraction": "share of pairs in conflict",
    "norm_ratio": "largest over smallest norm",
    "cos_theta": "cos theta",
}
"""Tags `gradients/<side>/<name>` of docs/metrics.md that a figure shows, with the words on its axis."""
POINTS = 120
"""Points that a line has at most: rows are averaged in equal numbers, as more could not be told apart on a page."""


@dataclass(frozen=True)
class Lines:
    """A tag of progress.csv over training: each seed that has it, and the mean over these at each point."""

    steps: Float[np.ndarray, " points"]
    by_seed: Mapping[int, Float[np.ndarray, " points"]]

    @property
    def seeds(self) -> tuple[int, ...]:
        """Seeds of the runs that it is from."""
        return tuple(self.by_seed)

    @property
    def mean(self) -> Float[np.ndarray, " points"]:
        return np.mean(list(self.by_seed.values()), axis=0)


@dataclass(frozen=True)
class Cost:
    """What one run took.

    Attributes:
        minutes: wall-clock minutes up to the last row of progress.csv, over all resumes.
        update_ms: median of `time/update_ms`, in ms per update; nan without updates.
        stepping_ms: median of `time/stepping_ms`, in ms per vector step.
    """

    minutes: float
    update_ms: float
    stepping_ms: float


def lines(group: Group, tag: str) -> Lines | None:
    """A tag at the steps at which all of the group's runs that have it have it, averaged to `POINTS`; None if no run
    has it. A run whose rows are at other steps than those of all others is left out (`groups.sharing`)."""
    known = {seed: values for seed, run in group.runs.items() if (values := _known(run, tag))}
    if not known:
        return None
    known = {seed: known[seed] for seed in sharing({seed: set(values) for seed, values in known.items()})}
    shared = sorted(set.intersection(*(set(values) for values in known.values())))
    size = -(-len(shared) // POINTS)  # the last point may have fewer rows

    def averaged(values: Sequence[float]) -> Float[np.ndarray, " points"]:
        return np.array([np.mean(values[start : start + size]) for start in range(0, len(values), size)])

    by_seed = {seed: averaged([values[step] for step in shared]) for seed, values in known.items()}
    return Lines(averaged(shared), by_seed)


@dataclass(frozen=True)
class Weights:
    """Weights of tasks over training, mean over seeds.

    Attributes:
        steps: of the points.
        relative: over the mean size of all weights.
        seeds: of the runs that they are from.
    """

    steps: Float[np.ndarray, " points"]
    relative: Float[np.ndarray, "tasks points"]
    seeds: tuple[int, ...]


def task_weights(group: Group, side: str, tasks: Sequence[str]) -> Weights | None:
    """The aggregator's weight of each task over the mean size of all weights, mean over seeds: 1 is the share that the
    plain mean gives to every task, whatever the scale of the rule. None where the runs logged no weights."""
    found = [lines(group, f"gradients/{side}/weight/{task}") for task in tasks]
    kept = [line for line in found if line is not None]
    if len(kept) < len(tasks) or len({(len(line.steps), tuple(line.by_seed)) for line in kept}) > 1:
        return None
    weights = np.stack([list(line.by_seed.values()) for line in kept])  # [tasks, seeds, points]
    sizes = np.abs(weights).mean(0)
    relative = np.divide(weights, sizes, out=np.zeros_like(weights), where=sizes > 0)
    return Weights(kept[0].steps, relative.mean(1), tuple(kept[0].by_seed))


def cost(run: RunFolder) -> Cost | None:
    """What a run took so far; None before its first row."""
    elapsed = elapsed_seconds(run)
    if not elapsed:
        return None
    minutes = elapsed[max(elapsed)] / 60
    return Cost(minutes, *(_median(run, f"time/{name}_ms") for name in ("update", "stepping")))


def elapsed_seconds(run: RunFolder) -> dict[float, float]:
    """Simulator steps per task at each row -> wall-clock seconds of training up to it, over all resumes."""
    # The clock starts anew with each resume, and a resume removes the rows after the step that it goes on from. A fall
    # of the clock would not show a part that took longer than all before.
    starts: list[int] = []
    for entry in run.versions:
        start = int(entry.get("from_step", 0))
        starts = [*(earlier for earlier in starts if earlier < start), start]
    found: dict[float, float] = {}
    before, newest, part = 0.0, 0.0, 0
    for step, seconds in _known(run, "time/elapsed").items():
        own = int(np.searchsorted(starts, step, side="left"))
        before, part = (before, part) if own == part else (before + newest, own)
        newest = seconds
        found[step] = before + seconds
    return found


def _known(run: RunFolder, tag: str) -> dict[float, float]:
    """Step -> value of a tag, where it is a number."""
    values = run.progress.get(tag)
    if values is None:
        return {}
    finite = np.isfinite(values)
    return dict(zip(run.progress["step"][finite].tolist(), values[finite].tolist(), strict=True))


def _median(run: RunFolder, tag: str) -> float:
    values = run.progress.get(tag, np.zeros(0))
    values = values[np.isfinite(values)]
    return float(np.median(values)) if len(values) else float("nan")
