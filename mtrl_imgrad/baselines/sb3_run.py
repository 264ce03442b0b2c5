"""Runs of stable-baselines3's SAC: its class and its training loop, in our environments, evaluation and run folders.

What describes the experiment comes from the same fields as in our runs: `benchmark`, `envs` (without `pipeline`),
`eval`, `log`, `checkpoint`, `seed`, `run_dir`, `device`, `threads`, `sac.steps` (length), `sac.warmup` (random steps
per task before the first update, SB3's `learning_starts`) and `sac.nan_policy` (for transitions). Everything that is
SAC comes from `sb3`, whose defaults are SB3's own. No other field is used (`config.unused_fields`).

SB3 updates after each vector step, `sb3.gradient_steps` times whatever the number of environments: with its default of
1, a network that learns from ten environments makes one update for ten transitions. An episode's end by time is a
truncation for SB3 too, and bootstraps, since `MtVecEnv` marks it so.
"""

from __future__ import annotations

import shlex
import time
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import stable_baselines3
import torch
from torch import Tensor

from mtrl_imgrad import ring_blocks, weights_and_biases
from mtrl_imgrad.baselines.sb3_model import LOSSES, Sb3Model
from mtrl_imgrad.baselines.sb3_policy import Sb3Policies, count_models, sees_task
from mtrl_imgrad.checkpoint import Checkpoint, Parts
from mtrl_imgrad.config import Config, unused_fields
from mtrl_imgrad.envs.sb3 import MtVecEnv
from mtrl_imgrad.evaluation import Evaluator
from mtrl_imgrad.faults import Faults
from mtrl_imgrad.files import FolderLock, read_object
from mtrl_imgrad.interruption import Interruption
from mtrl_imgrad.kept_checkpoints import choose_checkpoint, has_checkpoint
from mtrl_imgrad.logs import EpisodeStatistics, Stopwatch
from mtrl_imgrad.rewards import RewardNormalizer
from mtrl_imgrad.run import CPU, EMA_RATE, STREAMS, choose_device
from mtrl_imgrad.run_output import RunOutput
from mtrl_imgrad.saved_state import check_same, count, entry
from mtrl_imgrad.world import MakeWorld, metaworld


class Sb3Run:
    """Everything that one run of stable-baselines3's SAC owns; arguments, errors and use are those of `Run`."""

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
        self.faults = Faults(config.sac.nan_policy)
        self.models = self._make_models(make_world)
        self.interruption = Interruption()
        self.policies = Sb3Policies([model.sac.policy for model in self.models], len(self.tasks), sees_task(config))
        self.episodes = EpisodeStatistics(len(self.tasks))

        self.loaded = self._restore(resume) if resume else None
        self.start = self.loaded.step if self.loaded else 0
        self.output = RunOutput(config, self.world, lock, self.loaded)
        self.folder, self.log = self.output.folder, self.output.log
        beside = self.models[0].envs.envs if len(self.models) == 1 else None
        self.evaluator = Evaluator(config, self.world, self.folder, beside, self.log.print)

    def __enter__(self) -> Sb3Run:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.output.finish_log(failed=kind is not None)
        finally:  # where nothing more can be written, no process stays behind either
            for model in self.models:
                model.envs.close()
            self.evaluator.close()
            self.output.lock.release()

    def _make_models(self, make_world: MakeWorld) -> list[Sb3Model]:
        """One for all tasks, in the environments of a run of ours; or one per task, each with its own environments."""
        config, world, count = self.config, self.world, count_models(self.config, len(self.tasks))
        streams = dict(zip(STREAMS, np.random.SeedSequence(config.seed).spawn(len(STREAMS)), strict=True))
        of_envs = [streams["envs"]]
        if count > 1:
            # The environments of one task step alone, where a worker would save no time.
            own_process = replace(config, envs=replace(config.envs, workers=0))
            world, of_envs = make_world(own_process, self.world.description), streams["envs"].spawn(count)
        rate = EMA_RATE if config.envs.reward_normalization == "ema" else 0.0
        models: list[Sb3Model] = []
        for seed, of_env, tasks in zip(
            model_seeds(config, count), of_envs, np.array_split(self.tasks, count), strict=True
        ):
            envs: Any = world.training(of_env, tuple(tasks.tolist()))
            adapter = MtVecEnv(envs, task_one_hot=sees_task(config))
            normalizer = RewardNormalizer(len(tasks), rate)
            models.append(Sb3Model(config, adapter, normalizer, self.faults, seed, self.device))
        return models

    def act(self, observations: Tensor) -> Tensor:
        """The deterministic policies, for evaluation."""
        return self.policies.act(observations)

    def parameters(self) -> dict[str, Tensor]:
        """Of all networks, by name; those of one task's network begin with its name."""
        names = [""] if len(self.models) == 1 else [f"{task}/" for task in self.tasks]
        return {
            f"{prefix}{name}": parameter.detach()
            for prefix, model in zip(names, self.models, strict=True)
            for name, parameter in model.sac.policy.named_parameters()
        }

    def learn(self, vector_steps: int, watch: Stopwatch) -> None:
        """Let every model go on for as many vector steps."""
        rows = len(self.tasks) * self.config.envs.envs_per_task
        for number, model in enumerate(self.models):
            own = slice(number * model.envs.num_envs, (number + 1) * model.envs.num_envs)

            def ended(done: np.ndarray, infos: dict[str, np.ndarray], own: slice = own) -> None:
                self.episodes.add(_placed(done, own, rows), {tag: _placed(x, own, rows) for tag, x in infos.items()})

            def measured(name: str, seconds: float, count: int, number: int = number) -> None:
                watch.add(name, seconds, 0 if number else count)  # a step, or an update, is one of every model

            model.learn(vector_steps, ended, measured)

    def losses(self) -> dict[str, float]:
        """Means over the updates since the last call; of single-task models, also per task."""
        means = [model.losses.pop() for model in self.models]
        tags = {tag: float(np.mean([own[tag] for own in means])) for tag in LOSSES if tag in means[0]}
        if len(means) > 1:
            tags |= {
                f"{tag}/{task}": value
                for task, own in zip(self.tasks, means, strict=True)
                for tag, value in own.items()
            }
        return tags

    def announce(self) -> None:
        """What a user wants to know before training begins."""
        config, settings = self.config, self.config.sb3
        envs = self.models[0].envs.num_envs
        per_step = envs if settings.gradient_steps == -1 else settings.gradient_steps
        whose = {
            "sb3-sac": "one for all tasks, which sees the task's one-hot",
            "sb3-sac-blind": "one for all tasks, which does not see the task",
            "sb3-sac-single": f"one for each of {len(self.models)} tasks",
        }
        parameters = sum(parameter.numel() for parameter in self.models[0].sac.policy.parameters())
        for line in (
            f"run folder: {self.folder}" + (f" (going on from step {self.start:,})" if self.start else ""),
            f"tasks: {', '.join(self.tasks)}",
            f"{config.algorithm}: SAC of stable-baselines3 {stable_baselines3.__version__}, "
            f"{whose[config.algorithm]}; evaluation protocol: {config.protocol}",
            f"each SAC: {envs} environments, updates per vector step: {per_step}, of {settings.batch_size} transitions",
            f"device: {self.device}, {torch.get_num_threads()} threads; "
            f"parameters of each SAC: {parameters:,} with target critics",
            "used: benchmark, envs, eval, log, checkpoint, seed, device, threads, sac.steps, sac.warmup, "
            "sac.nan_policy and sb3; "
            f"not used: {', '.join(name for name in unused_fields(config.algorithm) if not name.startswith('sac.'))} "
            "and the rest of sac",
            f"watch: tensorboard --logdir {shlex.quote(str(self.folder / 'tensorboard'))}"
            if config.log.tensorboard
            else "TensorBoard is off",
        ):
            self.log.print(line)

    def save(self, step: int, required: bool = False) -> None:
        """Write a checkpoint, from which a resume gives the same numbers as going on. One that is required raises an
        OSError where it cannot be written; another is skipped with a warning."""
        parts: Parts = {
            "learner": self._networks,
            "generators": lambda: _joined([model.streams.state_dict() for model in self.models]),
            "rewards": lambda: _joined([model.normalizer.state_dict() for model in self.models]),
            "episodes": self.episodes.state_dict,
        }
        blocks: Parts = {
            name: make
            for number, model in enumerate(self.models)
            for name, make in ring_blocks.blocks(f"replay-{number}", model.rings(), model.written).items()
        }
        counters = {"models": [model.counters() for model in self.models], "left_out": self.faults.count}
        state = self._description() | counters
        self.output.save(step, state, parts, blocks, required)

    def keep_best(self, step: int, evaluated: dict[str, float]) -> None:
        """Save the networks as `best` if no evaluation before had a higher mean success."""
        self.output.save_best(step, evaluated, self._description(), {"learner": self._networks})

    def _networks(self) -> dict[str, Tensor]:
        return _joined([model.networks() for model in self.models])

    def _description(self) -> dict[str, Any]:
        buffer: Any = self.models[0].sac.replay_buffer
        entries = buffer.obs_shape[0] - (len(self.tasks) if sees_task(self.config) else 0)
        sizes = {"observation_size": entries, "action_size": buffer.action_dim}
        return {"tasks": list(self.tasks), "world": self.world.digest} | sizes

    def _restore(self, folder: Path) -> Checkpoint | None:
        if not has_checkpoint(folder):  # it was stopped before its first one
            return None
        checkpoint = choose_checkpoint(folder, resume=True)
        with checkpoint.taken():
            state, models = checkpoint.state(), len(self.models)
            check_same(state, self._description())
            counters = entry(state, "models", list)
            self.faults.count = count(state, "left_out")
            learner, generators, rewards = (
                _split(checkpoint.part(part, CPU), models) for part in ("learner", "generators", "rewards")
            )
            if len(counters) != models:
                raise ValueError(f"'models' are {len(counters)} and must be {models}")
            for number, model in enumerate(self.models):
                model.load_networks(learner[number])
                model.load_counters(counters[number])
                if model.vector_steps * self.config.vector_step != checkpoint.step:
                    raise ValueError(f"'timesteps' are not those of step {checkpoint.step}")
                stored = (checkpoint.part(name, CPU) for name in checkpoint.blocks(f"replay-{number}"))
                ring_blocks.fill(model.rings(), model.written, stored)
                model.streams.load_state_dict(generators[number])
                model.normalizer.load_state_dict(rewards[number])
            self.episodes.load_state_dict(checkpoint.part("episodes", CPU))
        return checkpoint

    def elapsed(self) -> float:
        """Wall-clock seconds since the start."""
        return time.time() - self.started


def model_seeds(config: Config, models: int) -> list[int]:
    """The seeds of the models' random numbers."""
    streams = dict(zip(STREAMS, np.random.SeedSequence(config.seed).spawn(len(STREAMS)), strict=True))
    return [int(stream.generate_state(1)[0]) for stream in streams["policy"].spawn(models)]


def _placed(values: np.ndarray, rows: slice, total: int) -> np.ndarray:
    """One model's rows among those of all tasks, the others zero."""
    placed = np.zeros(total, values.dtype)
    placed[rows] = values
    return placed


def _joined(states: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The models' tensors under one set of names, `<model>.<name>`."""
    return {f"{number}.{name}": value for number, state in enumerate(states) for name, value in state.items()}


def _split(joined: dict[str, Tensor], models: int) -> list[dict[str, Tensor]]:
    """Undo `_joined`.

    Raises:
        ValueError: a name is of none of the models.
    """
    states: dict[str, dict[str, Tensor]] = {str(number): {} for number in range(models)}
    for key, value in joined.items():
        number, _, name = key.partition(".")
        if number not in states:
            raise ValueError(f"{key!r} is of none of {models} models")
        states[number][name] = value
    return list(states.values())
