"""Run folders, read as they lie on disk: finished, still going, or cut off in the middle of a line.

Training writes a run folder and everything else only reads it. What is read here are the text files; networks are
loaded by `mtrl_imgrad.agent`.
"""

from __future__ import annotations

import csv
import difflib
import hashlib
import io
import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from mtrl_imgrad.config import Config
from mtrl_imgrad.csv_files import is_step
from mtrl_imgrad.kept_checkpoints import newest_step
from mtrl_imgrad.run_description import read_settings
from mtrl_imgrad.success_curves import SuccessCurve, success_curve

Rows = tuple[Mapping[str, str], ...]


@dataclass(frozen=True)
class RunFolder:
    """One run as its folder showed it when it was read.

    Attributes:
        path: the folder.
        settings: its configuration as `to_dict` gives it; the aggregator as the folder has it.
        config: its configuration, for everything but the aggregator. A rule of the user's is not imported to read a
            folder, so the default one stands in its place.
        tasks: task names, in the order of the network's task index.
        goals: a digest of goals.json; runs with equal digests have the same goals.
        versions: entries of versions.json, one for the start and one for every resume; the last is in force.
        commands: lines of command.txt.
        progress: columns of progress.csv by tag, none where there is no row; nan where a cell is empty.
        training_rows: rows of eval_training.csv: a few goals, during training.
        evaluation_rows: rows of eval.csv: all goals.
        checkpoint_step: step of the newest checkpoint, 0 without one.
        modified: time of the last change to any of the files, in seconds since 1970.
    """

    path: Path
    settings: Mapping[str, Any]
    config: Config
    tasks: tuple[str, ...]
    goals: str
    versions: tuple[Mapping[str, str], ...]
    commands: tuple[str, ...]
    progress: Mapping[str, Float[np.ndarray, " rows"]]
    training_rows: Rows
    evaluation_rows: Rows
    checkpoint_step: int
    modified: float

    @property
    def method(self) -> str:
        """What tables call the run's method: its aggregator, or the baseline."""
        return str(self.settings["aggregator"]["name"]) if self.config.algorithm == "mtsac" else self.config.algorithm

    @property
    def goal_seed(self) -> int:
        """Seed of the goal positions."""
        return self.config.seed if self.config.envs.goal_seed is None else self.config.envs.goal_seed

    @property
    def planned_steps(self) -> int:
        """Simulator steps per task at which training ends: whole vector steps only."""
        return self.config.sac.steps - self.config.sac.steps % self.config.vector_step

    @property
    def last_step(self) -> int:
        """Simulator steps per task that the run is known to have reached."""
        steps = [*self.progress.get("step", np.zeros(0)), self.checkpoint_step]
        return max([int(step) for step in steps] + [int(row["step"]) for row in self.evaluation_rows])

    @property
    def training_curve(self) -> SuccessCurve | None:
        """Success at the evaluations during training, on a few goals."""
        return _curve(self.training_rows, self.tasks)

    @property
    def final_success(self) -> SuccessCurve | None:
        """Success at the planned end on every goal, as a curve of one evaluation; None until that is measured, and
        where the run was trained beyond its plan, as that took another budget."""
        curve = _curve(self.evaluation_rows, self.tasks, self.config.benchmark.goals)
        if curve is None or curve.steps[-1] != self.planned_steps:
            return None
        return SuccessCurve(curve.steps[-1:], curve.tasks, curve.success[-1:])

    @property
    def finished(self) -> bool:
        """Whether training has ended, with its final evaluation where the configuration has one."""
        trained = not self.config.eval.final and self.checkpoint_step == self.planned_steps
        return trained or self.final_success is not None

    def package(self, name: str) -> str:
        """The versions of a package that the run was trained under, the first one first."""
        return ", then ".join(dict.fromkeys(str(entry.get(name, "unknown")) for entry in self.versions)) or "unknown"


def find_run_folders(paths: Sequence[Path]) -> list[Path]:
    """Run folders among the paths and up to two levels below them, each once, sorted within each path.

    Raises:
        ValueError: a path does not exist or holds no run folder.
    """
    found: dict[Path, Path] = {}
    for path in paths:
        if not os.path.exists(path):  # noqa: PTH110  (Path's own raises where a name is too long)
            names = [item.name for item in path.parent.iterdir()] if path.parent.is_dir() else []
            near = difflib.get_close_matches(path.name, names, 1)
            raise ValueError(
                f"runs: {path} does not exist" + (f"; the nearest is {near[0]}." if near else "; give run folders.")
            )
        own = [path] if (path / "config.yaml").is_file() else []
        below = sorted(file.parent for depth in ("*", "*/*") for file in path.glob(f"{depth}/config.yaml"))
        if not own and not below:
            raise ValueError(f"runs: {path} is no run folder and has none in it (folders with config.yaml).")
        for folder in own or below:
            found.setdefault(folder.resolve(), folder)
    return sorted(found.values())


def read_run_folder(path: Path) -> RunFolder:
    """Read a run folder, importing nothing that it names. Half-written last lines and evaluations are left out, and
    missing files count as empty.

    Raises:
        ValueError: it is no run folder, or a file in it is damaged.
    """
    settings, config = read_settings(path)
    try:
        versions = json.loads(_text(path / "versions.json") or "[]")
        goals = json.loads(_text(path / "goals.json") or "{}")
    except (ValueError, RecursionError) as error:  # the latter: brackets in brackets
        raise ValueError(f"run: {path} cannot be read ({error}).") from None
    names = goals.get("goals", dict.fromkeys(config.benchmark.tasks)) if isinstance(goals, dict) else None
    if not isinstance(names, dict):
        raise ValueError(f"run: {path / 'goals.json'} must be an object, and under goals have a list for every task.")
    if isinstance(versions, Mapping):  # one entry, as runs before there was a resume have it
        versions = [versions]
    if not isinstance(versions, list) or not all(isinstance(entry, Mapping) for entry in versions):
        raise ValueError(f"run: {path / 'versions.json'} must be a list of objects, as the run wrote it.")
    training_rows, evaluation_rows = (_rows(path / name) for name in ("eval_training.csv", "eval.csv"))
    return RunFolder(
        path=path,
        settings=settings,
        config=config,
        tasks=tuple(names),
        goals=hashlib.sha256(json.dumps(goals, sort_keys=True).encode()).hexdigest(),
        versions=tuple(versions),
        commands=tuple(_text(path / "command.txt").splitlines()),
        progress=_columns(_rows(path / "progress.csv")),
        training_rows=_well_formed(training_rows),
        evaluation_rows=_well_formed(evaluation_rows),
        checkpoint_step=newest_step(path),
        modified=max(file.stat().st_mtime for file in path.iterdir() if file.suffix in (".yaml", ".csv", ".json")),
    )


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return ""


def _rows(path: Path) -> Rows:
    """Complete lines only: the last one may be in the middle of being written."""
    text = _text(path)
    reader = csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1], newline=""))
    try:
        return tuple(row for row in reader if None not in row and None not in row.values())
    except csv.Error as error:
        raise ValueError(f"run: {path} is not a table of a run ({error}); it must be as the run wrote it.") from None


def _well_formed(rows: Rows) -> Rows:
    """Evaluation rows whose step and success are numbers."""
    return tuple(row for row in rows if is_step(row.get("step", "")) and row.get("success") in ("0", "1"))


def _columns(rows: Rows) -> dict[str, Float[np.ndarray, " rows"]]:
    tags = list(rows[0]) if rows else []
    columns = {tag: np.array([_number(row[tag]) for row in rows]) for tag in tags}
    if "step" not in columns:
        return {}
    known = np.isfinite(columns["step"])
    return {tag: values[known] for tag, values in columns.items()}


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def _curve(rows: Iterable[Mapping[str, str]], tasks: Sequence[str], goals: int | None = None) -> SuccessCurve | None:
    """Success at each evaluation that is complete: every task, all with as many episodes (`goals` of them)."""
    episodes: dict[str, Counter[str]] = {}
    for row in rows:
        episodes.setdefault(row["step"], Counter())[row["task"]] += 1
    complete = {
        step
        for step, counts in episodes.items()
        if set(counts) == set(tasks) and set(counts.values()) == {goals or counts[tasks[0]]}
    }
    kept = [row for row in rows if row["step"] in complete]
    if not kept:
        return None
    curve = success_curve(kept)
    order = [curve.tasks.index(task) for task in tasks]
    return SuccessCurve(curve.steps, tuple(tasks), curve.success[:, order])
