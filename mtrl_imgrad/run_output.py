"""What every run writes, whatever learns in it: its folder, its log, and the copies for TensorBoard and wandb."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from mtrl_imgrad import weights_and_biases
from mtrl_imgrad.checkpoint import Checkpoint, Parts, save_checkpoint, step_name
from mtrl_imgrad.config import Config
from mtrl_imgrad.csv_files import read_rows
from mtrl_imgrad.evaluation import drop_rows_after
from mtrl_imgrad.files import FolderLock, is_storage_failure, sync
from mtrl_imgrad.kept_checkpoints import BEST, best_success, prune
from mtrl_imgrad.logs import RunLog
from mtrl_imgrad.run_description import create_run, describe_run
from mtrl_imgrad.tensorboard import describe
from mtrl_imgrad.world import World

DROPPED = ("eval_training.csv", "gradient_cosines.csv")
"""Tables that lose what the run wrote after the checkpoint from which it goes on; so does progress.csv, by its log."""


class RunOutput:
    """The run folder, held by this process, and what is written there as training goes on.

    Args:
        config: of the run.
        world: its environments.
        held: the lock of a run folder to go on with; None makes a new one.
        loaded: the checkpoint to go on from, None at the start; what the folder has of later steps is dropped.
        non_finite: as for `RunLog`.

    Raises:
        FileExistsError: a new folder has a name that is taken.
        ValueError: the configuration cannot be written down, or a file of the folder is damaged.
    """

    def __init__(
        self,
        config: Config,
        world: World,
        held: FolderLock | None,
        loaded: Checkpoint | None,
        non_finite: Tensor | None = None,
    ) -> None:
        self.config, self.tasks, self.saved = config, world.tasks, loaded
        start = loaded.step if loaded else 0
        self.lock = held or create_run(config, world.description)
        self.folder: Path = self.lock.folder
        if held:
            for name in ("progress.csv", "eval.csv", *DROPPED):  # an error is told before anything is changed
                read_rows(self.folder / name)
            describe_run(self.folder, config, start)
            for name in DROPPED:
                drop_rows_after(self.folder / name, start)
        self.wandb = weights_and_biases.start(self.folder, config) if config.log.wandb else None
        self.describe()
        self.log = RunLog(self.folder, config.sac.steps, start, config.log.tensorboard, non_finite)

    def describe(self, step: int = 0, final: dict[str, float] | None = None) -> None:
        """Describe the run in TensorBoard, at its end with the tags of the final evaluation."""
        if self.config.log.tensorboard:
            describe(self.folder, self.config, self.tasks, step, final)

    def save(self, step: int, state: dict[str, Any], parts: Parts, blocks: Parts, required: bool) -> None:
        """Save a checkpoint and remove what is kept no longer. Where the disk fails, say so and leave the earlier
        checkpoints as they are; the next interval tries again.

        Args:
            step: simulator steps per task.
            state: as for `save_checkpoint`.
            parts: as for `save_checkpoint`.
            blocks: as for `save_checkpoint`.
            required: whether there is no next interval.

        Raises:
            OSError: the disk failed, and the checkpoint is required.
        """
        before, kept = (self.saved.step, self.saved.kept) if self.saved else (0, False)
        if step > before:
            every = self.config.checkpoint.keep_every
            kept = every > 0 and step // every > before // every
        with_replay = blocks if self.config.checkpoint.replay else None
        base = self.saved
        try:
            for table in self.folder.glob("*.csv"):  # their rows are not to be younger than the checkpoint
                sync(table)
            self.saved = save_checkpoint(
                self.folder, step_name(step), step, state, parts, with_replay, base=base, kept=kept
            )
        except OSError as error:
            if required or not is_storage_failure(error):
                raise
            self._tell_unsaved(f"the checkpoint of step {step:,}", error)
            return
        try:
            prune(self.folder, self.saved, base)
        except OSError as error:
            if not is_storage_failure(error):
                raise
            self.log.print(f"warning: older checkpoints could not be removed ({error.strerror}); training goes on")

    def save_best(self, step: int, evaluated: dict[str, float], state: dict[str, Any], parts: Parts) -> None:
        """Save a checkpoint without replay as `best` if the evaluation's mean success is higher than that of the one
        that is there."""
        success = evaluated["eval/success_rate"]
        if success <= best_success(self.folder):
            return
        try:
            save_checkpoint(self.folder, BEST, step, state | {"success": success}, parts)
        except OSError as error:
            if not is_storage_failure(error):
                raise
            self._tell_unsaved(f"the best checkpoint, of step {step:,},", error)

    def _tell_unsaved(self, what: str, error: OSError) -> None:
        before = f"that of step {self.saved.step:,} stays" if self.saved else "there is none before it"
        self.log.print(f"warning: {what} could not be saved ({error.strerror}); {before}, and training goes on")

    def finish_log(self, failed: bool) -> None:
        """Write out what is pending. The folder is held until `lock.release`."""
        self.log.close()
        if self.wandb:
            self.wandb.finish(exit_code=1 if failed else 0)
