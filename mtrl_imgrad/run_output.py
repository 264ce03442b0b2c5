"""What every run writes, whatever learns in it: its folder, its log, and the copies for TensorBoard and wandb."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from mtrl_imgrad import weights_and_biases
from mtrl_imgrad.checkpoint import create_run, describe_run
from mtrl_imgrad.config import Config
from mtrl_imgrad.evaluation import drop_rows_after
from mtrl_imgrad.files import FolderLock
from mtrl_imgrad.logs import RunLog
from mtrl_imgrad.tensorboard import describe
from mtrl_imgrad.world import World


class RunOutput:
    """The run folder, held by this process, and what is written there as training goes on.

    Args:
        config: of the run.
        world: its environments.
        held: the lock of a run folder to go on with; None makes a new one.
        start: simulator steps per task trained before; what the folder has of later ones is dropped.
        non_finite: as for `RunLog`.

    Raises:
        FileExistsError: a new folder has a name that is taken.
        ValueError: the configuration cannot be written down.
    """

    def __init__(
        self, config: Config, world: World, held: FolderLock | None, start: int, non_finite: Tensor | None = None
    ) -> None:
        self.config, self.tasks = config, world.tasks
        self.lock = held or create_run(config, world.description)
        self.folder: Path = self.lock.folder
        if held:
            for name in ("eval_training.csv", "gradient_cosines.csv"):
                drop_rows_after(self.folder / name, start)
            describe_run(self.folder, config, start)
        self.wandb = weights_and_biases.start(self.folder, config) if config.log.wandb else None
        self.describe()
        self.log = RunLog(self.folder, config.sac.steps, start, config.log.tensorboard, non_finite)

    def describe(self, step: int = 0, final: dict[str, float] | None = None) -> None:
        """Describe the run in TensorBoard, at its end with the tags of the final evaluation."""
        if self.config.log.tensorboard:
            describe(self.folder, self.config, self.tasks, step, final)

    def finish_log(self, failed: bool) -> None:
        """Write out what is pending. The folder is held until `lock.release`."""
        self.log.close()
        if self.wandb:
            self.wandb.finish(exit_code=1 if failed else 0)
