"""Run folders with known numbers, without training: what a report reads, written by hand."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from mtrl_imgrad.config import to_dict
from mtrl_imgrad.overlays import parse_config

VERSIONS = {"mtrl_imgrad": "0.1.0", "torch": "2.13.0", "metaworld": "3.1.1", "mujoco": "3.3.0"}
TASKS = ("reach-v3", "push-v3")
GOALS = 10


def write_run(
    folder: Path,
    *flags: str,
    seed: int = 1,
    tasks: Sequence[str] = TASKS,
    final: Mapping[str, int] | None = None,
    training: Mapping[int, int] | None = None,
    progress: Sequence[Mapping[str, float]] = (),
    steps: int = 1000,
    versions: Mapping[str, str] = VERSIONS,
    starts: Sequence[int] = (0,),
    goals: Any = None,
) -> Path:
    """Write a run folder.

    Args:
        folder: where.
        flags: more of the configuration, as on the command line.
        seed: the run's seed.
        tasks: task names; names that Meta-World does not know are allowed.
        final: task -> goals reached of `GOALS` in the final evaluation; None while there is none.
        training: step -> goals reached of 5 in every task at the evaluations during training.
        progress: rows of progress.csv.
        steps: planned simulator steps per task.
        versions: what every entry of versions.json says.
        starts: steps from which training started and was resumed, one for each entry.
        goals: content of goals.json; by default that which the seed stands for.
    """
    base = ["--benchmark.tasks", "reach-v3", "--benchmark.goals", str(GOALS), "--eval.horizon", "100"]
    config = to_dict(parse_config([*base, "--sac.steps", str(steps), "--seed", str(seed), *flags]))
    config["benchmark"]["tasks"] = list(tasks)
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    (folder / "command.txt").write_text(f"mtrl-imgrad train --seed {seed}\n")
    (folder / "versions.json").write_text(json.dumps([{"from_step": step} | dict(versions) for step in starts]))
    if goals is None:
        goals = {"goal_seed": seed, "goals": {task: [[float(seed)]] for task in tasks}}
    (folder / "goals.json").write_text(json.dumps(goals))
    if final is not None:
        _write(folder / "eval.csv", _episodes(steps, final, GOALS))
    if training is not None:
        rows = [row for step, won in training.items() for row in _episodes(step, dict.fromkeys(tasks, won), 5)]
        _write(folder / "eval_training.csv", rows)
    if progress:
        _write(folder / "progress.csv", progress)
    return folder


def _episodes(step: int, won: Mapping[str, int], goals: int) -> list[dict[str, Any]]:
    columns = ("step", "task", "goal", "episode", "success", "return", "steps_to_success")
    return [
        dict(zip(columns, (step, task, goal, goal, int(goal < wins), 1.0, 10 if goal < wins else -1), strict=True))
        for task, wins in won.items()
        for goal in range(goals)
    ]


def _write(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
