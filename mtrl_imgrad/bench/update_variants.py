"""What `bench update` measures: whole updates on random data, each with networks and a replay of its own."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeAlias

import torch

from mtrl_imgrad.aggregators import Aggregator, Mean, resolve
from mtrl_imgrad.bench.update_references import (
    ACTIONS,
    OBSERVATION,
    Gradient,
    Size,
    StableBaselines3,
    actor_losses,
    cagrad_by_slsqp,
    cagrad_by_torchjd,
    critic_losses,
    mean_gradient,
    soft_targets,
    updated,
)
from mtrl_imgrad.compilation import CompiledUpdate
from mtrl_imgrad.config import Config, NetworkConfig, SacConfig
from mtrl_imgrad.learner import Learner
from mtrl_imgrad.networks import Tape
from mtrl_imgrad.replay import Batch, Replay
from mtrl_imgrad.sac_update import Metrics, Noise, State, adamw, remembered
from mtrl_imgrad.task_gradients import task_gradients

CPU = torch.device("cpu")
MODES: dict[str, dict[str, Any]] = {
    "eager": {"compile": False},
    "compiled": {},
    "eager-bfloat16": {"compile": False, "precision": "bfloat16"},
    "compiled-bfloat16": {"precision": "bfloat16"},
}
"""Fields of Config by mode."""
PLAIN, SLSQP, TORCHJD, SB3 = "plain mean", "K backward passes + SLSQP", "TorchJD CAGrad", "stable-baselines3"
Way: TypeAlias = tuple[str, str]
"""Name and mode of a variant."""
PARTS: tuple[str, ...] = (
    "sampling",
    "forward",
    "backward to layer outputs",
    "J",
    "Gramian",
    "solve",
    "combine",
    "optimiser and targets",
)
REST = "metrics, temperature, and the guard against non-finite numbers"
"""What an update has besides its parts."""


class Update:
    """A learner with random weights, and a replay full of random transitions. Called, it makes one update.

    Args:
        size: shapes.
        rule: the aggregator.
        fields: others of Config.
    """

    def __init__(self, size: Size, rule: Aggregator, fields: dict[str, Any]) -> None:
        self.compiles = fields.get("compile", True)
        network, settings = NetworkConfig(width=size.width, depth=size.depth), SacConfig(batch_per_task=size.rows)
        config = Config(network=network, sac=settings, aggregator=rule, **fields)
        self.random = torch.Generator().manual_seed(1)
        self.learner = Learner(config, size.tasks, OBSERVATION, ACTIONS, CPU, self.random)
        self.replay = Replay(
            size.transitions,
            size.tasks,
            1,
            OBSERVATION,
            ACTIONS,
            gamma=settings.gamma,
            n_step=settings.n_step,
            device=CPU,
        )
        lead = (size.transitions, size.tasks, 1)
        replay = self.replay
        replay.observations[:] = torch.randn(*lead, OBSERVATION, generator=self.random)
        replay.next_observations[:] = torch.randn(*lead, OBSERVATION, generator=self.random)
        replay.actions[:] = torch.rand(*lead, ACTIONS, generator=self.random) * 2 - 1
        replay.rewards[:] = torch.rand(lead, generator=self.random) * 10
        replay.written = size.transitions

        self.compile()

    def compile(self) -> None:
        """As the mode says.

        Raises:
            RuntimeError: it failed.
        """
        if self.compiles and (failure := self.learner.compile()):
            raise RuntimeError(f"the update is not compiled ({failure})")

    def sample(self) -> tuple[Batch, Noise]:
        """A batch, and the random numbers of an update."""
        batch = self.replay.gather(self.replay.draw(self.learner.config.sac.batch_per_task, self.random))
        return batch, self.learner.draw_noise(self.random, self.random)

    def __call__(self) -> None:
        self.learner.update(*self.sample())


class ReferenceUpdate(Update):
    """The same update by another way to the gradient, see `update_references`."""

    def __init__(self, size: Size, rule: Aggregator, fields: dict[str, Any], gradient: Gradient) -> None:
        self.gradient = gradient
        super().__init__(size, rule, fields)

    def step(self, state: State, batch: Batch, noise: Noise) -> tuple[State, Metrics]:
        """The update as a pure function, without metrics."""
        return updated(self.learner.sac, self.gradient, state, batch, noise), Metrics({}, {}, {})

    def compile(self) -> None:
        self.run: Any = self.step
        if self.compiles:
            self.run = CompiledUpdate(self.step, self.learner.state, *self.sample())

    def __call__(self) -> None:
        self.learner.state |= self.run(self.learner.state, *self.sample())[0]


def dissected(update: Update) -> dict[str, float]:
    """Make an eager update part by part, one after another, and return the milliseconds of each.

    J's time is that of `task_gradients`, which makes the backward pass too, less that of this pass alone.
    """
    spent, learner, sac = dict.fromkeys(PARTS, 0.0), update.learner, update.learner.sac

    @contextmanager
    def part(name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        spent[name] += (time.perf_counter() - started) * 1e3

    with part("sampling"):
        batch, noise = update.sample()
    state, new = learner.state, {"updates": learner.state["updates"] + 1}
    with part("forward"):
        inputs = sac.inputs(state["statistics"], batch.observations)
        targets = soft_targets(sac, state, batch, noise.actions[1])
    for name, network, drawn, lr in (
        ("critic", sac.critic, noise.critic, sac.settings.critic_lr),
        ("actor", sac.actor, noise.actor, sac.settings.actor_lr),
    ):
        tape, vector, rule = Tape(), state[name], sac.rules[name]
        with part("forward"):
            if name == "critic":
                losses, _ = critic_losses(sac, batch, inputs, targets, vector, tape)
            else:
                losses, _ = actor_losses(sac, state, new["critic"], inputs, noise.actions[0], vector, tape)
        with part("backward to layer outputs"):
            torch.autograd.grad(losses.sum(), [use.output for use in tape.uses], retain_graph=True)
        with part("J"):
            gradients = task_gradients(losses, tape, network.layout)
            jacobian = gradients.dense() if rule.needs == "jacobian" else None
        with part("Gramian"):
            gramian = gradients.gramian()
        with part("solve"):
            found = rule.aggregate(gramian, drawn, losses, jacobian, remembered(name, state), gradients.rounding)
            new |= {f"{name}/rule/{key}": value for key, value in found.state.items()}
        with part("combine"):
            if found.direction is None:
                direction = gradients.combine(found.weights, found.own_weights)
            else:
                direction = torch.cat([found.direction, *gradients.own_parts(found.own_weights)])
        with part("optimiser and targets"):
            new |= adamw(state, name, direction, new["updates"], lr, sac.settings.adam_eps, sac.settings.weight_decay)
    with part("optimiser and targets"):
        new["target_critic"] = torch.lerp(state["target_critic"], new["critic"], sac.settings.tau)
    learner.state |= new
    spent["J"] -= spent["backward to layer outputs"]
    return spent


def makers(size: Size, aggregators: Sequence[str], modes: Sequence[str]) -> tuple[dict[Way, Callable[[], Any]], str]:
    """What makes each variant, and a line about what is not installed, or an empty one.

    The plain mean and ours are there in every mode.

    Args:
        size: shapes.
        aggregators: names for `resolve`; the mean is added.
        modes: keys of MODES.

    Raises:
        ValueError: there is no such aggregator or mode.
    """
    found: dict[Way, Callable[[], Any]] = {}
    rules = {name: resolve(name) for name in dict.fromkeys(("mean", *aggregators))}
    for mode in modes:
        if mode not in MODES:
            raise ValueError(f"mode: there is no {mode!r}; there are {', '.join(map(repr, MODES))}")
        found[PLAIN, mode] = partial(ReferenceUpdate, size, Mean(), MODES[mode], mean_gradient)
        for name, rule in rules.items():
            found[f"ours {name}", mode] = partial(Update, size, rule(), MODES[mode])
    found[SLSQP, "eager"] = partial(ReferenceUpdate, size, Mean(), MODES["eager"], cagrad_by_slsqp)
    missing = ""
    try:
        found[TORCHJD, "eager"] = partial(ReferenceUpdate, size, Mean(), MODES["eager"], cagrad_by_torchjd())
    except ImportError as error:
        missing = f"{TORCHJD} is left out: pip install 'mtrl_imgrad[torchjd]' ({' '.join(str(error).split())})"
    found[SB3, "eager"] = partial(StableBaselines3, size)
    return found, missing
