"""Evaluation: a deterministic policy on its own environments, each goal of each task once, as tidy rows."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gymnasium.vector import VectorEnv
from jaxtyping import Float, Int
from torch import Tensor

from mtrl_imgrad.config import Config
from mtrl_imgrad.csv_files import csv_text, read_rows
from mtrl_imgrad.faults import Fault, Transitions, summary
from mtrl_imgrad.files import write_whole
from mtrl_imgrad.world import World

Act = Callable[[Float[Tensor, "tasks rows entries"]], Float[Tensor, "tasks rows actions"]]


@dataclass(frozen=True)
class Episode:
    """One evaluation episode, a row of `eval.csv`.

    An episode in which a reward or observation is not finite, or the simulation becomes unstable, ends there and has
    failed, also where it had succeeded before; its return is that of the steps before.

    Attributes:
        step: simulator steps per task that the policy had trained for.
        task: task name.
        goal: index of the goal among the run's goals.
        episode: running number of this task's episode in this evaluation.
        success: 1 if some step had Meta-World's success, else 0.
        return: sum of the rewards, unscaled and undiscounted.
        steps_to_success: simulator steps until the first success (rounded up to a decision), or -1.
    """

    step: int
    task: str
    goal: int
    episode: int
    success: int
    return_: float
    steps_to_success: int


def tell_on_stderr(text: str) -> None:
    print(text, file=sys.stderr)


COLUMNS = [item.name.rstrip("_") for item in fields(Episode)]


def goal_subset(goals: int, wanted: int) -> Int[np.ndarray, " chosen"]:
    """A fixed, evenly spaced subset of goal indices."""
    return np.unique(np.linspace(0, goals - 1, min(goals, wanted)).round().astype(int))


def evaluate(
    act: Act,
    envs: VectorEnv,
    tasks: Sequence[str],
    goals: Int[np.ndarray, " chosen"],
    step: int,
    config: Config,
    tell: Callable[[str], None] = tell_on_stderr,
) -> list[Episode]:
    """Run every task (in parallel) through every chosen goal (one after another).

    Args:
        act: observations `[K, 1, .]` -> actions `[K, 1, .]`, deterministic.
        envs: one environment per task, used for nothing else; SAME_STEP autoreset and `options["goals"]` as in
            `MetaworldVectorEnv`.
        tasks: the task names.
        goals: goal indices, the same for every task.
        step: training steps per task, written into the rows.
        config: for the horizon and the action repeat.
        tell: called at the end with a line on the episodes that were cut short, if there are any.
    """
    decisions = -(-config.eval.horizon // config.envs.action_repeat)
    observations, _ = envs.reset(options={"goals": np.tile(goals, (len(tasks), 1))})
    rows: list[Episode] = []
    faults: list[Fault] = []
    for episode, goal in enumerate(goals):
        returns, first_success = np.zeros(len(tasks)), np.full(len(tasks), -1)
        running = np.ones(len(tasks), dtype=bool)
        for decision in range(decisions):
            actions = act(torch.as_tensor(observations)[:, None])
            sent = actions[:, 0].cpu().numpy()
            observations, rewards, terminated, truncated, infos = envs.step(sent)
            transitions = Transitions(tasks, sent, rewards, infos["final_obs"], infos)
            broken = transitions.broken() & running
            faults += transitions.faults(broken)
            running &= ~broken
            first_success[broken] = -1
            returns += np.where(running, rewards, 0.0)
            won = infos["success"] & running & (first_success < 0)
            first_success[won] = min((decision + 1) * config.envs.action_repeat, config.eval.horizon)
            running &= ~(terminated | truncated)
        for k, task in enumerate(tasks):
            to_success = int(first_success[k])
            rows.append(Episode(step, task, int(goal), episode, int(to_success >= 0), float(returns[k]), to_success))
    if faults:
        tell(f"warning: evaluation episodes that ended early and count as failed: {len(faults)} ({summary(faults)})")
    return sorted(rows, key=lambda row: tasks.index(row.task))


def success_per_task(rows: Sequence[Episode]) -> dict[str, float]:
    """Share of successful episodes of each task, in the order of the rows."""
    tasks = dict.fromkeys(row.task for row in rows)
    return {task: float(np.mean([row.success for row in rows if row.task == task])) for task in tasks}


def write_rows(path: Path, episodes: Sequence[Episode]) -> None:
    """Add episodes to a tidy CSV; those of the same step, from an earlier evaluation or an interrupted run, are
    replaced.
    """
    kept = [line for line in read_rows(path)[1:] if int(line[0]) != episodes[0].step]
    _replace_rows(path, [COLUMNS, *kept, *(list(asdict(episode).values()) for episode in episodes)])


def drop_rows_after(path: Path, step: int) -> None:
    """Remove the rows that a run wrote after the checkpoint from which it goes on; the first column is the step.

    Raises:
        ValueError: it is not such a table.
    """
    if path.exists():
        lines = read_rows(path)
        _replace_rows(path, [*lines[:1], *(line for line in lines[1:] if int(line[0]) <= step)])


def _replace_rows(path: Path, lines: Sequence[Sequence[Any]]) -> None:
    write_whole(path, csv_text(lines))


def table(rows: Sequence[Episode]) -> str:
    """Success, return and steps to success of each task and their mean, as text."""
    width = max(len(name) for name in ("mean over tasks", *(row.task for row in rows)))
    lines = [f"{'task':<{width}}  episodes  success   return  steps to success"]
    for task in dict.fromkeys(row.task for row in rows):
        mine = [row for row in rows if row.task == task]
        won = [row.steps_to_success for row in mine if row.success]
        steps = f"{np.mean(won):16.0f}" if won else f"{'-':>16}"
        returns = np.mean([row.return_ for row in mine])
        lines.append(
            f"{task:<{width}}  {len(mine):8d}  {np.mean([row.success for row in mine]):7.2f}  {returns:7.0f}  {steps}"
        )
    mean = np.mean(list(success_per_task(rows).values()))
    return "\n".join([*lines, f"{'mean over tasks':<{width}}  {len(rows):8d}  {mean:7.2f}"])


def success_tags(name: str, episodes: Sequence[Episode]) -> dict[str, float]:
    """`<name>/success_rate` of every task and of their mean."""
    tags = {f"{name}/success_rate/{task}": rate for task, rate in success_per_task(episodes).items()}
    return tags | {f"{name}/success_rate": float(np.mean(list(tags.values())))}


class Evaluator:
    """The evaluations of one training run, in environments that are made when they are first needed.

    Args:
        config: of the run.
        world: makes the environments.
        folder: the run folder.
        beside: the training environments, whose workers these may use; None where there is no one env of all tasks.
        tell: as for `evaluate`.
    """

    def __init__(
        self,
        config: Config,
        world: World,
        folder: Path,
        beside: VectorEnv | None,
        tell: Callable[[str], None] = tell_on_stderr,
    ) -> None:
        self.config, self.world, self.folder, self.beside, self.tell = config, world, folder, beside, tell
        self.some = goal_subset(world.goals, config.eval.goals_per_task)
        self.envs: VectorEnv | None = None

    def during_training(self, act: Act, step: int) -> dict[str, float]:
        """A few goals of each task, written to `eval_training.csv`; the tags of a log row."""
        episodes = self._evaluate(act, self.some, step)
        write_rows(self.folder / "eval_training.csv", episodes)
        return success_tags("eval", episodes)

    def final(self, act: Act, step: int) -> tuple[dict[str, float], str]:
        """Every goal of each task, written to `eval.csv`; the result as tags and as text."""
        started = time.perf_counter()
        episodes = self._evaluate(act, np.arange(self.world.goals), step)
        write_rows(self.folder / "eval.csv", episodes)
        minutes = (time.perf_counter() - started) / 60
        return success_tags("final", episodes), (
            f"{table(episodes)}\nfinal evaluation: {minutes:.2f} minutes; "
            f"protocol {self.config.protocol}, every goal once, deterministic policy"
        )

    def close(self) -> None:
        if self.envs:
            self.envs.close()

    def _evaluate(self, act: Act, goals: Int[np.ndarray, " chosen"], step: int) -> list[Episode]:
        self.envs = self.envs or self.world.evaluation(self.beside)
        return evaluate(act, self.envs, self.world.tasks, goals, step, self.config, self.tell)
