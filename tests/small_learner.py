"""A small learner, and batches and noise for it, shared by the tests of the learner."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mtrl_imgrad.aggregators import AGGREGATORS, Aggregator, Mean
from mtrl_imgrad.config import Config, NetworkConfig, SacConfig
from mtrl_imgrad.learner import Learner
from mtrl_imgrad.networks import Actor, TwinCritic
from mtrl_imgrad.replay import Batch
from mtrl_imgrad.sac_update import Metrics, Noise

TASKS, ROWS, ENTRIES, ACTIONS = 3, 16, 5, 2
CPU = torch.device("cpu")
RULES: dict[str, Aggregator] = {name: cls() for name, cls in AGGREGATORS.items()}


def small_learner(
    network: dict[str, Any] | None = None,
    *,
    tasks: int = TASKS,
    double: bool = False,
    rule: Aggregator | None = None,
    precision: str = "float32",
    **sac: Any,
) -> Learner:
    """A learner with these fields of NetworkConfig and SacConfig; `double` puts all of it in float64."""
    networks = NetworkConfig(**({"width": 12, "depth": 2} | (network or {})))
    settings = SacConfig(**({"batch_per_task": ROWS, "target_entropy": -2.0, "initial_temperature": 0.3} | sac))
    config = Config(network=networks, sac=settings, aggregator=rule or Mean(), precision=precision)
    learner = Learner(config, tasks, ENTRIES, ACTIONS, CPU, torch.Generator().manual_seed(1))
    if double:
        outputs = learner.sac.critic_loss.outputs
        learner.sac.critic = TwinCritic(networks, tasks, learner.sac.inputs.size, ACTIONS, outputs, torch.float64)
        learner.sac.actor = Actor(networks, tasks, learner.sac.critic.encoding_size, ACTIONS, torch.float64)
        learner.state = {
            name: value.double() if value.is_floating_point() else value for name, value in learner.state.items()
        }
    return learner


def random_batch(seed: int = 1, tasks: int = TASKS, rows: int = ROWS, dtype: torch.dtype = torch.float32) -> Batch:
    generator = torch.Generator().manual_seed(seed)

    def draw(*last: int) -> Tensor:
        return torch.randn(tasks, rows, *last, generator=generator, dtype=torch.float64).to(dtype)

    return Batch(draw(ENTRIES), draw(ACTIONS).tanh(), draw(), draw(ENTRIES), 0.97 * (draw() > -1).to(dtype))


def draw_noise(learner: Learner, seed: int = 1) -> Noise:
    policy, aggregation = (torch.Generator().manual_seed(seed + i) for i in (100, 200))
    noise = learner.draw_noise(policy, aggregation)
    return replace(noise, actions=noise.actions.to(learner.state["actor"].dtype))


def update(learner: Learner, batch: Batch | None = None, seed: int = 1) -> Metrics:
    """One update from the given batch, or from a random one, with noise of the seed."""
    dtype = learner.state["actor"].dtype
    return learner.update(batch or random_batch(seed, learner.tasks, dtype=dtype), draw_noise(learner, seed))


def state_copy(learner: Learner) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in learner.state_dict().items()}


def changed(before: dict[str, Tensor], learner: Learner) -> set[str]:
    """Names in the learner's state that differ from `before`."""
    return {name for name, value in learner.state_dict().items() if not value.equal(before[name])}
