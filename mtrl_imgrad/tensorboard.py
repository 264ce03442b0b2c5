"""The TensorBoard view of a run folder. It is a view: all its numbers are in the folder's text files too.

Two event files, which TensorBoard shows as one run. *Events* are what training writes as it goes; what an interrupted
process wrote after the checkpoint is hidden. The *description* (configuration, command, versions, hyper-parameters, the
layout of the charts, the final results) is a file that is written anew when the run starts, goes on, or ends, so that
none of it is ever there twice. It needs no writer of torch's: wandb would follow the folder once for each of them.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float64
from stable_baselines3.common.logger import TensorBoardOutputFormat
from tensorboard.compat.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue] (made at import)
from tensorboard.summary.writer.record_writer import RecordWriter
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import custom_scalars, hparams, scalar, text

from mtrl_imgrad.config import Config, to_dict
from mtrl_imgrad.files import is_storage_failure
from mtrl_imgrad.gradient_cosines import heat_map
from mtrl_imgrad.overlays import CHANGEABLE

FOLDER = "tensorboard"
DESCRIPTION = ".description"
"""Ends the name of the description's event file."""
METRICS = ("eval/success_rate", "final/success_rate")
"""What the hyper-parameters are compared by."""
DISTRIBUTIONS = ("eval/success_rate", "gradients/critic/weight", "gradients/actor/weight")
DISTRIBUTIONS += ("gradients/critic/norm", "gradients/actor/norm")
"""Tags of which a histogram shows how their values are distributed over the tasks."""
TASKS_PER_CHART = 10


class TensorBoard(TensorBoardOutputFormat):
    """stable-baselines3's TensorBoard writer, which hides what an interrupted run left from `purge_step` on, with
    pictures of an evaluation.

    The file is written by a thread of TensorBoard's. What it fails with is raised by a later call.
    """

    def __init__(self, folder: Path, purge_step: int) -> None:
        self.folder = folder
        self.writer = SummaryWriter(str(folder), purge_step=purge_step)
        self._is_closed = False

    def write(
        self,
        key_values: dict[str, Any],
        key_excluded: dict[str, tuple[str, ...]],
        step: int = 0,
    ) -> None:
        with self._named():
            super().write(key_values, key_excluded, step)

    def close(self) -> None:
        with self._named():
            super().close()

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.folder)) from None

    def evaluation(
        self,
        step: int,
        tasks: Sequence[str],
        values: dict[str, float],
        cosines: dict[str, Float64[Tensor, "tasks tasks"]],
        parameters: dict[str, Tensor],
    ) -> None:
        """Draw what one evaluation shows.

        Args:
            step: simulator steps per task.
            tasks: task names.
            values: the log row of the evaluation.
            cosines: between the tasks' gradients, by tag.
            parameters: of all networks, by name.
        """
        with self._named():
            for tag, matrix in cosines.items():
                title = f"{tag} at step {step:,}"
                self.writer.add_image(tag, heat_map(matrix.numpy(), tasks, title), step, dataformats="HWC")
            for tag in DISTRIBUTIONS:
                over_tasks = [values[f"{tag}/{task}"] for task in tasks if f"{tag}/{task}" in values]
                self._histogram(f"over_tasks/{tag}", np.array(over_tasks), step)
            for name, tensor in parameters.items():
                self._histogram(f"parameters/{name}", tensor.detach().cpu().numpy(), step)

    def _histogram(self, tag: str, values: np.ndarray, step: int) -> None:
        finite = values[np.isfinite(values)]
        if finite.size:  # a histogram of nothing, or of a NaN, raises
            self.writer.add_histogram(tag, finite, step)


@contextlib.contextmanager
def storage_failures_told_once() -> Iterator[None]:
    """Within it, a full disk is told by the call that raises it, and not by a traceback of TensorBoard's thread too."""
    before = threading.excepthook

    def hook(failure: threading.ExceptHookArgs) -> None:
        if not (isinstance(failure.exc_value, OSError) and is_storage_failure(failure.exc_value)):
            before(failure)

    threading.excepthook = hook
    try:
        yield
    finally:
        threading.excepthook = before


def describe(
    run: Path, config: Config, tasks: Sequence[str], step: int = 0, final: dict[str, float] | None = None
) -> None:
    """Write a run's description in place of an earlier one.

    Args:
        run: the run folder; its `command.txt` and `versions.json` are shown.
        config: the configuration.
        tasks: task names.
        step: simulator steps per task before the final evaluation.
        final: its tags; None while the run is going on.
    """
    fields = flattened(to_dict(config))
    commands = (run / "command.txt").read_text().splitlines()
    versions = json.loads((run / "versions.json").read_text())
    columns = tuple(dict.fromkeys(key for entry in versions for key in entry))
    experiment, start, end = hparams(hyperparameters(fields), dict.fromkeys(METRICS, 0.0))
    summaries = [
        text("configuration", markdown_table([("field", "value"), *fields.items()])),
        text("command", "\n".join(f"    {command}" for command in commands)),
        text(
            "versions", markdown_table([columns, *(tuple(entry.get(key, "") for key in columns) for entry in versions)])
        ),
        custom_scalars(layout(tasks)),
        experiment,
        start,
    ]
    events = [Event(wall_time=time.time(), file_version="brain.Event:2")]
    events += [Event(wall_time=time.time(), step=0, summary=summary) for summary in summaries]
    if final is not None:
        results = [*(scalar(tag, value) for tag, value in final.items()), end]
        events += [Event(wall_time=time.time(), step=step, summary=summary) for summary in results]
    folder = run / FOLDER
    folder.mkdir(exist_ok=True)
    # Readers take files in the order of their names, each to its end; events of the same second have a process's number
    # where this has a word. At the start it comes before them, and at the end after, or they would hide its results.
    moment = "0" if final is None else "end"
    place = folder / f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{moment}{DESCRIPTION}"
    beside = run / "description.tmp"
    with beside.open("wb") as file:
        writer = RecordWriter(file)
        for event in events:
            writer.write(event.SerializeToString())
    earlier = set(folder.glob(f"*{DESCRIPTION}")) - {place}
    os.replace(beside, place)
    for path in earlier:
        path.unlink()


def flattened(section: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one, with dotted names."""
    flat: dict[str, Any] = {}
    for name, value in section.items():
        flat |= flattened(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def hyperparameters(fields: dict[str, Any]) -> dict[str, float | str]:
    """The fields that decide a run's numbers: those that a resumed run may not change, and the length of training."""

    def may_change(name: str) -> bool:
        return name != "sac.steps" and any(name == other or name.startswith(f"{other}.") for other in CHANGEABLE)

    # TensorBoard has neither lists nor None, and torch writes a bool as a number.
    return {
        name: value if type(value) in (int, float) else cell(value)
        for name, value in fields.items()
        if not may_change(name)
    }


def markdown_table(rows: Sequence[Sequence[Any]]) -> str:
    """Rows as a Markdown table, the first as its head."""
    head, *body = (f"| {' | '.join(cell(value) for value in row)} |" for row in rows)
    return "\n".join([head, "|---" * len(rows[0]) + "|", *body])


def cell(value: Any) -> str:
    """A value as one cell of a Markdown table."""
    line = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return " ".join(line.split()).replace("|", "&#124;")


def layout(tasks: Sequence[str]) -> dict[str, dict[str, list[Any]]]:
    """The custom-scalar charts: category -> chart -> its kind and regular expressions of tags.

    A chart of one line per task has at most `TASKS_PER_CHART` of them.
    """

    def chart(*tags: str) -> list[Any]:
        return ["Multiline", [f"^{re.escape(tag)}$" for tag in tags]]

    def per_task(name: str, tag: str) -> dict[str, list[Any]]:
        starts = range(0, len(tasks), TASKS_PER_CHART)
        groups = [(start, tasks[start : start + TASKS_PER_CHART]) for start in starts]
        return {
            name if len(groups) == 1 else f"{name}, tasks {start + 1}-{start + len(group)}": chart(
                *(f"{tag}/{task}" for task in group)
            )
            for start, group in groups
        }

    def both(tag: str) -> list[Any]:
        return chart(f"gradients/critic/{tag}", f"gradients/actor/{tag}")

    return {
        "Success per task": {"mean over tasks": chart("rollout/success_rate", *METRICS)}
        | per_task("training", "rollout/success_rate")
        | per_task("evaluation", "eval/success_rate"),
        "Weights per task": per_task("critic", "gradients/critic/weight") | per_task("actor", "gradients/actor/weight"),
        "Losses": {"critic": chart("train/critic_loss"), "actor": chart("train/actor_loss")}
        | per_task("critic per task", "train/critic_loss")
        | per_task("actor per task", "train/actor_loss"),
        "Gradient conflict": {
            "mean cosine": both("cosine_mean"),
            "share of task pairs in conflict": both("conflict_fraction"),
            "largest over smallest norm": both("norm_ratio"),
        },
    }
