"""A run's parts put together (the composition root), and how they are saved and found again."""

from __future__ import annotations

import shlex
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from mtrl_imgrad import ring_blocks, weights_and_biases
from mtrl_imgrad.averages import Averages
from mtrl_imgrad.checkpoint import Checkpoint
from mtrl_imgrad.config import Config, aggregator_name
from mtrl_imgrad.evaluation import Evaluator
from mtrl_imgrad.faults import Faults, require_finite
from mtrl_imgrad.files import FolderLock, read_object
from mtrl_imgrad.interruption import Interruption
from mtrl_imgrad.kept_checkpoints import choose_checkpoint, has_checkpoint
from mtrl_imgrad.learner import Learner
from mtrl_imgrad.logs import EpisodeStatistics
from mtrl_imgrad.precision import precision_warning
from mtrl_imgrad.replay import Replay
from mtrl_imgrad.rewards import RewardNormalizer
from mtrl_imgrad.run_output import RunOutput
from mtrl_imgrad.saved_state import check_like, check_same, count, entry
from mtrl_imgrad.world import MakeWorld, metaworld

CPU = torch.device("cpu")
EMA_RATE = 0.001
"""Rate of mtrl's reward normalisation."""
STREAMS = ("envs", "replay", "policy", "aggregation", "network")
"""What draws random numbers, in the order of `SeedSequence(seed).spawn`; new streams go to the end, or old seeds change
their meaning."""


class Saved(Protocol):
    """A part whose tensors a checkpoint holds."""

    def state_dict(self) -> dict[str, Tensor]: ...

    def load_state_dict(self, state: dict[str, Tensor]) -> None: ...


@dataclass(frozen=True)
class Generators:
    """The random streams that draw tensors on the training device."""

    replay: torch.Generator
    policy: torch.Generator
    aggregation: torch.Generator

    def state_dict(self) -> dict[str, Tensor]:
        return {name: generator.get_state() for name, generator in vars(self).items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        check_like(state, self.state_dict())
        for name, generator in vars(self).items():
            try:
                generator.set_state(state[name].cpu())
            except RuntimeError as error:
                raise ValueError(f"{name!r} is no state of a random stream ({error})") from error


def choose_device(name: str) -> torch.device:
    """cuda where there is one, unless `cpu` is asked for.

    Raises:
        ValueError: cuda is asked for and there is none.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: 'cuda' is not available here; allowed are 'auto' and 'cpu'.")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


class Run:
    """Everything that one training run owns. A context manager: it closes its environments and files.

    Args:
        config: what to train.
        resume: a run folder to go on with from its newest checkpoint, or from the start where it has none yet; None
            starts a new one.
        make_world: makes the environments.
        started: the time, as time.time(), from which `time/elapsed` counts; None is now.

    Raises:
        ValueError: a field is not allowed, or the folder cannot be resumed, or is in use.
        MemoryError: the replay does not fit.
        FileExistsError: the run folder exists.
    """

    def __init__(
        self,
        config: Config,
        resume: Path | None = None,
        make_world: MakeWorld = metaworld,
        started: float | None = None,
    ) -> None:
        self.started = time.time() if started is None else started
        self.config, self.device = config, choose_device(config.device)
        if config.log.wandb:
            weights_and_biases.check()
        lock = FolderLock(resume) if resume else None
        if config.threads:
            torch.set_num_threads(config.threads)
        self.world = make_world(config, read_object(resume / "goals.json") if resume else None)
        self.tasks = self.world.tasks
        self.rows = (len(self.tasks), config.envs.envs_per_task)

        streams = dict(zip(STREAMS, np.random.SeedSequence(config.seed).spawn(len(STREAMS)), strict=True))
        seeds = {name: int(stream.generate_state(1, np.uint64)[0]) for name, stream in streams.items()}
        self.envs: Any = self.world.training(streams["envs"], self.tasks)
        sizes = (self.envs.single_observation_space.shape[0], self.envs.single_action_space.shape[0])
        self.generators = Generators(
            *(torch.Generator(self.device).manual_seed(seeds[name]) for name in ("replay", "policy", "aggregation"))
        )
        network_generator = torch.Generator().manual_seed(seeds["network"])
        self.learner = Learner(config, len(self.tasks), *sizes, self.device, network_generator)
        self.replay = Replay(
            config.replay.capacity,
            *self.rows,
            *sizes,
            gamma=config.sac.gamma,
            n_step=config.sac.n_step,
            device=self.device,
        )
        self.normalizer = RewardNormalizer(
            len(self.tasks), EMA_RATE if config.envs.reward_normalization == "ema" else 0.0
        )
        self.interruption = Interruption()
        self.averages, self.cosines = Averages(), Averages()  # since the last log row; since the last evaluation
        self.episodes = EpisodeStatistics(len(self.tasks))
        self.faults = Faults(config.sac.nan_policy)

        self.start = 0
        self.loaded: Checkpoint | None = None
        first = self._restore(resume) if resume else None
        if first is None:
            first, _ = self.envs.reset()
        require_finite(self.tasks, first)
        (self.observations,) = self.on_device(first)
        self.output = RunOutput(config, self.world, lock, self.loaded, self.learner.non_finite)
        self.folder, self.log = self.output.folder, self.output.log
        self.evaluator = Evaluator(config, self.world, self.folder, self.envs, self.log.print)

    def __enter__(self) -> Run:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.output.finish_log(failed=kind is not None)
        finally:  # where nothing more can be written, no process stays behind either
            self.envs.close()
            self.evaluator.close()
            self.output.lock.release()

    def on_device(self, *arrays: np.ndarray) -> list[Tensor]:
        """Rows `[K * E, .]` of the environments as `[K, E, .]` on the training device, float32, by one copy for all."""
        columns = [array.reshape(len(array), -1) for array in arrays]
        together = torch.from_numpy(np.concatenate(columns, axis=1, dtype=np.float32, casting="unsafe"))
        if self.device.type == "cuda":
            together = together.pin_memory()
        moved = together.to(self.device, non_blocking=True).unflatten(0, self.rows)
        parts = moved.split([column.shape[1] for column in columns], dim=-1)
        return [part if array.ndim > 1 else part[..., 0] for part, array in zip(parts, arrays, strict=True)]

    def act(self, observations: Tensor) -> Tensor:
        """The deterministic policy, for evaluation."""
        return self.learner.act(observations.to(self.device), None)

    def announce(self) -> None:
        """What a user wants to know before training begins."""
        shared, own = self.learner.parameter_counts()
        config = self.config
        for line in (
            f"run folder: {self.folder}" + (f" (going on from step {self.start:,})" if self.start else ""),
            f"tasks: {', '.join(self.tasks)}",
            f"aggregator: {aggregator_name(config.aggregator)}; evaluation protocol: {config.protocol}",
            f"device: {self.device}, {torch.get_num_threads()} threads; "
            f"parameters: {shared:,} shared, {own:,} of single tasks",
            f"replay: {self.replay.bytes / 2**20:,.0f} MiB for {config.replay.capacity:,} transitions per task",
            f"watch: tensorboard --logdir {shlex.quote(str(self.folder / 'tensorboard'))}"
            if config.log.tensorboard
            else "TensorBoard is off",
            precision_warning(config.precision, self.device),
        ):
            if line:
                self.log.print(line)

    def compile_update(self) -> None:
        """Compile the update where that is configured and there is one to come, and say how long it took."""
        if not self.config.compile or max(self.start, self.config.sac.warmup) >= self.config.sac.steps:
            return
        self.log.print("compiling the update; later runs find it on disk")
        started = time.perf_counter()
        failure = self.learner.compile()
        if failure is None:
            self.log.print(f"compiled in {time.perf_counter() - started:.0f} s")
            self.log.started = time.perf_counter()  # the time that is left is told without it
        else:
            self.log.print(f"warning: the update is not compiled, which is slower ({failure})")

    def _saved(self) -> dict[str, Saved]:
        return {
            "learner": self.learner,
            "generators": self.generators,
            "rewards": self.normalizer,
            "averages": self.averages,
            "cosines": self.cosines,
            "episodes": self.episodes,
        }

    def save(self, step: int, required: bool = False) -> None:
        """Write a checkpoint, from which a resume gives the same numbers as going on. One that is required raises an
        OSError where it cannot be written; another is skipped with a warning.

        Raises:
            NonFiniteError: as `RunLog.tell_non_finite`: a resumed run takes what was counted for told.
        """
        self.log.tell_non_finite(self.learner.non_finite, self.tasks, self.config.sac.nan_policy)
        blocks = ring_blocks.blocks("replay", self.replay.rings(), self.replay.written)
        replay = self.replay
        counts = {"written": replay.written, "held_back": replay.held_back, "left_out": self.faults.count}
        state = self._description() | counts | {"envs": self.envs.state_dict()}
        self.output.save(step, state, {name: part.state_dict for name, part in self._saved().items()}, blocks, required)

    def keep_best(self, step: int, evaluated: dict[str, float]) -> None:
        """Save the networks as `best` if no evaluation before had a higher mean success."""
        self.output.save_best(step, evaluated, self._description(), {"learner": self.learner.state_dict})

    def _description(self) -> dict[str, Any]:
        sizes = {"observation_size": self.replay.observations.shape[-1], "action_size": self.learner.action_size}
        return {"tasks": list(self.tasks), "world": self.world.digest} | sizes

    def _restore(self, folder: Path) -> np.ndarray | None:
        """Take back everything, and return the first observations; None where there is nothing to take."""
        if not has_checkpoint(folder):  # it was stopped before its first one
            return None
        self.loaded = checkpoint = choose_checkpoint(folder, resume=True)
        with checkpoint.taken():
            state = checkpoint.state()
            check_same(state, self._description())
            for name, part in self._saved().items():
                part.load_state_dict(checkpoint.part(name, self.device))
            self.replay.written = count(state, "written")
            self.replay.held_back = count(state, "held_back")
            self.faults.count = count(state, "left_out")
            if (self.replay.written + self.replay.held_back) * self.config.vector_step != checkpoint.step:
                raise ValueError(f"'written' is {self.replay.written}, which is not that of step {checkpoint.step}")
            stored = (checkpoint.part(name, CPU) for name in checkpoint.blocks("replay"))
            ring_blocks.fill(self.replay.rings(), self.replay.written, stored)
            first, _ = self.envs.load_state_dict(entry(state, "envs", dict))
            self._check_continuity(first)
        self.start = checkpoint.step
        return first

    def _check_continuity(self, observations: np.ndarray) -> None:
        """Where an episode goes on, its next observation is stored already. Another simulator gives another."""
        if not self.replay.written:
            return
        newest = (self.replay.written - 1) % self.replay.length
        going_on = ~(self.replay.ended | self.replay.repeated)[newest].cpu()
        stored, found = self.replay.next_observations[newest].cpu(), self.on_device(observations)[0].cpu()
        differ = (going_on & (stored != found).any(-1)).any(-1)
        if differ.any():
            task = self.tasks[int(differ.int().argmax())]
            raise ValueError(
                f"its episode of {task} is not the one that the environment goes on with; MuJoCo, Meta-World or the "
                "world is another one, see versions.json"
            )

    def elapsed(self) -> float:
        """Wall-clock seconds since the start."""
        return time.time() - self.started
