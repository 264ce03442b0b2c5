"""How long a comparison will take, from a short measurement."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mtrl_imgrad.comparison.plan import PlannedRun, last_row
from mtrl_imgrad.comparison.processes import MTRL_IMGRAD
from mtrl_imgrad.parsing import UserError

WARMUP, UPDATES = 30, 60
"""Vector steps of the measurement before and with updates."""


@dataclass(frozen=True)
class Cost:
    """Seconds of one run's parts.

    Attributes:
        start: construction and compilation.
        step: one vector step.
        update: the updates of one vector step.
    """

    start: float
    step: float
    update: float

    def seconds(self, run: PlannedRun, done: int) -> float:
        """Of the steps that are missing, in-training and final evaluations included, checkpoints left out.

        Args:
            run: which run.
            done: simulator steps per task that it has been trained for.
        """
        config = run.config
        missing, updated = run.last_step - done, run.last_step - max(done, config.sac.warmup)
        training = missing * self.step + max(0, updated) * self.update
        evaluations = run.last_step // config.eval.every - done // config.eval.every if config.eval.every else 0
        episodes = evaluations * config.eval.goals_per_task + config.eval.final * config.benchmark.goals
        decisions = episodes * -(-config.eval.horizon // config.envs.action_repeat)
        return self.start + training / config.vector_step + decisions * self.step


def measure(run: PlannedRun, copies: int, divided: Sequence[str], program: Sequence[str] = MTRL_IMGRAD) -> Cost:
    """Train a run for a moment, as many times at once as the comparison will.

    Args:
        run: which.
        copies: how many at once.
        divided: flags with one run's share of the machine.
        program: what takes the command line of a run.

    Raises:
        UserError: it could not be trained.
    """
    vector_step = run.config.vector_step
    warmup = WARMUP * vector_step + run.config.sac.n_step * vector_step
    short = {"sac.warmup": warmup, "sac.steps": warmup + UPDATES * vector_step, "eval.every": 0, "eval.final": False}
    short |= {"checkpoint.every": 0, "checkpoint.replay": False, "log.tensorboard": False, "log.every": 10**9}
    changed = [word for name, value in short.items() for word in (f"--{name}", str(value))]
    with tempfile.TemporaryDirectory() as scratch:
        folders = [Path(scratch, str(copy)) for copy in range(copies)]
        command = [*program, "train", *run.flags, *divided, *changed, "--run-dir"]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        processes = [subprocess.Popen([*command, str(folder)], **pipes) for folder in folders]
        said = [process.communicate()[0] for process in processes]
        if any(process.returncode for process in processes):
            raise UserError(f"{run.method}: {said[0].strip().splitlines()[-1]}")
        rows = [last_row(folder / "progress.csv") for folder in folders]
    step = max(float(row["time/stepping_ms"]) for row in rows) / 1000
    update = max(float(row["time/update_ms"]) * float(row["train/updates"]) for row in rows) / UPDATES / 1000
    elapsed = max(float(row["time/elapsed"]) for row in rows)
    taken = warmup // vector_step + UPDATES
    return Cost(max(0.0, elapsed - taken * step - UPDATES * update), step, update)
