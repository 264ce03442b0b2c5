"""What a run tells: progress.csv, TensorBoard and the console, through stable-baselines3's Logger.

Every tag is explained in docs/metrics.md; a test fails when one is missing there.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from stable_baselines3.common.logger import KVWriter, Logger
from torch import Tensor

from mtrl_imgrad.csv_files import csv_text, read_rows
from mtrl_imgrad.files import append_whole, write_whole
from mtrl_imgrad.learner import NonFiniteError
from mtrl_imgrad.sac_update import LOSSES
from mtrl_imgrad.saved_state import check_like
from mtrl_imgrad.tensorboard import FOLDER, TensorBoard


class ProgressCsv(KVWriter):
    """A CSV file that survives a resume and takes columns that appear later. (stable-baselines3's writer erases the
    file when it is opened.)

    Args:
        path: the file.
        keep_to: rows beyond this step are dropped when the file is opened, because the run that continues writes them
            again.
    """

    def __init__(self, path: Path, keep_to: int) -> None:
        self.path = path
        self.columns: list[str]
        self.columns, *rows = read_rows(path) or [["step"]]
        self._rewrite([row for row in rows if int(row[0]) <= keep_to])

    def write(self, key_values: dict[str, Any], key_excluded: dict[str, tuple[str, ...]], step: int = 0) -> None:
        new = sorted(set(key_values) - set(self.columns))
        if new:
            rows = read_rows(self.path)[1:]
            self.columns += new
            self._rewrite([[*row, *[""] * len(new)] for row in rows])
        values = {"step": step} | key_values
        append_whole(self.path, csv_text([[values.get(column, "") for column in self.columns]]))

    def close(self) -> None:
        """Nothing is kept open between rows."""

    def _rewrite(self, rows: Sequence[Sequence[str]]) -> None:
        write_whole(self.path, csv_text([self.columns, *rows]))


class EpisodeStatistics:
    """Success, return and length of the training episodes that ended since the last log row, per task."""

    def __init__(self, tasks: int) -> None:
        self.ended = np.zeros((4, tasks))  # episodes, successes, returns, lengths

    def add(self, done: np.ndarray, infos: dict[str, np.ndarray]) -> None:
        """Take the episodes that ended in one vector step, without those whose return is not finite; rows are
        task-major."""
        if done.any():
            values = np.stack([np.ones(len(done)), infos["success"], infos["episode_return"], infos["episode_length"]])
            values = np.where(done & np.isfinite(infos["episode_return"]), values, 0.0)
            self.ended += values.reshape(4, self.ended.shape[1], -1).sum(-1)

    def pop(self, tasks: Sequence[str]) -> dict[str, float]:
        """Tag -> value, without tasks of which no episode ended; then starts anew."""
        tags: dict[str, float] = {}
        episodes = self.ended[0]
        with_episodes = episodes > 0
        means = self.ended[1:] / np.maximum(episodes, 1)
        for tag, values in zip(
            ("rollout/success_rate", "rollout/ep_rew_mean", "rollout/ep_len_mean"), means, strict=True
        ):
            if with_episodes.any():
                tags[tag] = float(values[with_episodes].mean())
            tags |= {f"{tag}/{task}": float(values[k]) for k, task in enumerate(tasks) if with_episodes[k]}
        self.ended[:] = 0
        return tags

    def state_dict(self) -> dict[str, Tensor]:
        return {"ended": torch.as_tensor(self.ended.copy())}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        check_like(state, self.state_dict())
        self.ended = state["ended"].cpu().numpy().copy()


class Stopwatch:
    """Where the wall-clock time between two log rows goes. On a GPU, an update's time is the time to launch it."""

    def __init__(self, step: int) -> None:
        self.step, self.started = step, time.perf_counter()
        self.begun = self.started
        self.totals: dict[str, float] = {"stepping": 0.0, "update": 0.0, "evaluation": 0.0}
        self.seconds: dict[str, float] = {}
        self.counts: dict[str, int] = {}

    @contextmanager
    def measure(self, name: str, count: int = 1) -> Iterator[None]:
        """Add what happens inside to the time of `name`; `count` is 0 where it belongs to what was counted before."""
        before = time.perf_counter()
        yield
        self.add(name, time.perf_counter() - before, count)

    def add(self, name: str, seconds: float, count: int = 1) -> None:
        """Add what was measured elsewhere to the time of `name`."""
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds
        self.totals[name] += seconds
        self.counts[name] = self.counts.get(name, 0) + count

    def shares(self) -> str:
        """Where all the time since the start went."""
        whole = time.perf_counter() - self.begun
        shares = {name: seconds / whole for name, seconds in self.totals.items()}
        shares["the rest"] = 1 - sum(shares.values())
        return ", ".join(f"{name} {share:.1%}" for name, share in shares.items())

    def pop(self, step: int, tasks: int) -> dict[str, float]:
        """Tags of the interval that ends at `step`; then starts anew."""
        now = time.perf_counter()
        training = now - self.started - self.seconds.get("evaluation", 0.0)
        counted = {name: total for name, total in self.seconds.items() if self.counts[name]}
        tags = {f"time/{name}_ms": 1000 * total / self.counts[name] for name, total in counted.items()}
        tags["time/fps"] = (step - self.step) * tasks / training
        self.step, self.started, self.seconds, self.counts = step, now, {}, {}
        return tags


class PatientConsole(Console):
    """rich's console, which says nothing more where its reader has gone (`| head`), instead of ending the run."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())  # what is left in the buffer would fail at the end of the program
        os.close(nowhere)


class RunLog:
    """The logger of one run: rows to progress.csv and TensorBoard, a line or a bar to the console.

    Args:
        folder: the run folder.
        total: simulator steps per task at the end of training.
        start: step from which this process trains; later rows of an interrupted run are dropped.
        tensorboard: whether to write TensorBoard events.
        non_finite: the learner's count of non-finite losses at the start, of which nothing is said any more; None
            where it does not count them.
    """

    def __init__(
        self, folder: Path, total: int, start: int, tensorboard: bool, non_finite: Tensor | None = None
    ) -> None:
        self.tensorboard = TensorBoard(folder / FOLDER, start + 1) if tensorboard else None
        writers: list[KVWriter] = [ProgressCsv(folder / "progress.csv", start)]
        self.logger = Logger(str(folder), [*writers, *([self.tensorboard] if self.tensorboard else [])])
        self.console = PatientConsole(highlight=False, soft_wrap=True)
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:3.0f} %"))
        self.progress = Progress(*columns, console=self.console, disable=not self.console.is_terminal)
        self.bar = self.progress.add_task("starting", total=total, completed=start)
        self.total, self.start, self.started = total, start, time.perf_counter()
        self.success: dict[str, float] = {}
        self.non_finite = torch.zeros(()) if non_finite is None else non_finite.clone()
        self.progress.start()

    def print(self, text: str) -> None:
        """A line for the reader, above the progress bar where there is one."""
        self.console.print(text, markup=False)

    def row(self, step: int, values: dict[str, float]) -> None:
        """Write one row to every format and tell the console."""
        for tag, value in values.items():
            self.logger.record(tag, value)
        self.logger.dump(step)
        for name, tag in (("training", "rollout/success_rate"), ("evaluation", "eval/success_rate")):
            if tag in values:
                self.success[name] = values[tag]
        success = (
            ", ".join(f"{name} success {rate:.2f}" for name, rate in self.success.items()) or "no episode ended yet"
        )
        left = (time.perf_counter() - self.started) / (step - self.start) * (self.total - step)
        line = f"step {step:,}/{self.total:,}  {success}  {values['time/fps']:,.0f} steps/s  {left / 60:.1f} min left"
        self.progress.update(self.bar, completed=step, description=line)
        if not self.console.is_terminal:
            self.print(line)

    def tell_non_finite(self, counts: Tensor, tasks: Sequence[str], policy: str) -> None:
        """Say which losses were not finite since the last call, or end the run with it.

        Raises:
            NonFiniteError: there were some, and the policy is `raise`.
        """
        new, self.non_finite = counts - self.non_finite, counts.clone()
        named = [
            f"{loss} of {task}: {number}"
            for loss, numbers in zip(LOSSES, new.tolist(), strict=True)
            for task, number in zip(tasks, numbers, strict=True)
            if number
        ]
        if named:
            text = f"non-finite losses or gradients, their updates were skipped ({'; '.join(named)})"
            if policy == "raise":
                raise NonFiniteError(f"{text}; sac.nan_policy skip would have gone on.")
            self.print(f"warning: {text}")

    def close(self) -> None:
        self.progress.stop()
        self.logger.close()
