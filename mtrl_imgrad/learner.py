"""One multi-task SAC update, and the only owner of parameters and optimisers.

An update is a function of the batch and of random numbers drawn beforehand; nothing in it waits for the host. Its order
is stable-baselines3's: temperature, critics, actor, target critics, all with the temperatures' values from before their
step. An update with a non-finite loss or gradient changes nothing but the counters of `non_finite`.
"""

from __future__ import annotations

import copy
import math
import time
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mtrl_imgrad import losses as sac
from mtrl_imgrad.aggregators import Aggregation, Aggregator, Mean
from mtrl_imgrad.config import Config
from mtrl_imgrad.diagnostics import gradient_statistics
from mtrl_imgrad.networks import Actor, Layout, ObservationInput, Tape, TwinCritic
from mtrl_imgrad.replay import Batch
from mtrl_imgrad.task_gradients import TaskGradients, task_gradients

BETAS = (0.9, 0.999)
"""Adam's decay rates, torch's defaults."""
LOSSES = ("critic loss", "actor loss", "temperature loss")
"""The rows of `Learner.non_finite`."""
PRODUCT_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class NonFiniteError(ArithmeticError):
    """Training met a NaN or an infinity, and `sac.nan_policy` is `raise`."""


@dataclass(frozen=True)
class Noise:
    """Every random number of one update.

    Attributes:
        actions: standard normal, for the policy's action at s and at s'.
        critic, actor: what the aggregators asked for in `draw_noise`, or None.
    """

    actions: Float[Tensor, "2 tasks rows actions"]
    critic: Tensor | None
    actor: Tensor | None


@dataclass(frozen=True)
class Metrics:
    """What an update reports, on the device: numbers per task `[K]` and scalars, by tag."""

    per_task: dict[str, Float[Tensor, " tasks"]]
    scalars: dict[str, Float[Tensor, ""]]


def adamw(
    state: dict[str, Tensor],
    name: str,
    gradient: Float[Tensor, " parameters"],
    step: Float[Tensor, ""],
    lr: float,
    eps: float,
    weight_decay: float,
) -> dict[str, Tensor]:
    """One AdamW step (Loshchilov and Hutter 2019, algorithm 2, as torch.optim.AdamW) of `state[name]`, as new tensors.

    Its moments are `state[name + '/m']` and `state[name + '/v']`; `step` counts from 1.
    """
    old, old_m, old_v = state[name], state[f"{name}/m"], state[f"{name}/v"]
    m = torch.lerp(old_m, gradient, 1 - BETAS[0])
    v = torch.lerp(old_v, gradient * gradient, 1 - BETAS[1])
    correction_m, correction_v = 1 - BETAS[0] ** step, 1 - BETAS[1] ** step
    scale = (lr / correction_m).to(old.dtype)
    root = (v / correction_v.to(old.dtype)).sqrt() + eps
    return {name: old * (1 - lr * weight_decay) - scale * m / root, f"{name}/m": m, f"{name}/v": v}


class Learner:
    """Networks, temperatures, optimisers and aggregators of one run.

    Args:
        config: the run's configuration.
        tasks: number of tasks K.
        observation_size, action_size: entries of one observation and action.
        device: where everything lives.
        generator: CPU generator for the initial parameters.
    """

    def __init__(
        self,
        config: Config,
        tasks: int,
        observation_size: int,
        action_size: int,
        device: torch.device,
        generator: torch.Generator,
    ) -> None:
        self.config, self.tasks, self.action_size, self.device = config, tasks, action_size, device
        settings, product_dtype = config.sac, PRODUCT_DTYPES[config.precision]
        self.critic_loss: sac.CriticLoss = (
            sac.SquaredLoss()
            if settings.critic_loss == "squared"
            else sac.CategoricalLoss(settings.critic_bins, settings.critic_min, settings.critic_max)
        )
        self.inputs = ObservationInput(config.network, tasks, observation_size)
        self.critic = TwinCritic(
            config.network, tasks, self.inputs.size, action_size, self.critic_loss.outputs, product_dtype
        )
        self.actor = Actor(config.network, tasks, self.critic.encoding_size, action_size, product_dtype)
        rule = config.aggregator
        # Copies, since a foreign rule may keep a state of its own.
        self.rules: dict[str, Aggregator] = {
            "critic": copy.deepcopy(rule),
            "actor": Mean() if rule.critic_only else copy.deepcopy(rule),
        }
        self.aggregation_seconds = 0.0

        critic = self.critic.layout.initial(generator).to(device)
        actor = self.actor.layout.initial(generator).to(device)
        log_alpha = torch.full((tasks,), math.log(settings.initial_temperature), device=device)
        self.state: dict[str, Tensor] = {
            "target_critic": critic.clone(),
            "updates": torch.zeros((), dtype=torch.float64, device=device),
        }
        for name, vector in (("critic", critic), ("actor", actor), ("log_alpha", log_alpha)):
            self.state |= {name: vector, f"{name}/m": torch.zeros_like(vector), f"{name}/v": torch.zeros_like(vector)}
        for name, network in (("critic", self.critic), ("actor", self.actor)):
            parameters = network.layout.shared_size if self.rules[name].needs == "jacobian" else 0
            remembered = self.rules[name].initial_state((tasks,), parameters)
            self.state |= {f"{name}/rule/{key}": value.to(device) for key, value in remembered.items()}
        self.statistics = self.inputs.initial_statistics(observation_size, device)
        self.non_finite = torch.zeros(len(LOSSES), tasks, dtype=torch.int64, device=device)
        # One temperature for all tasks is K temperatures that start equal and move by the mean gradient.
        mixing = torch.full((tasks, tasks), 1 / tasks) if settings.shared_temperature else torch.eye(tasks)
        self.temperature_mixing = mixing.to(device)

    def observe(self, observations: Float[Tensor, "tasks envs entries"]) -> None:
        """Take observations from the environments into the running statistics."""
        if self.inputs.normalization:
            self.inputs.observe(self.statistics, observations)

    @torch.no_grad()
    def act(
        self, observations: Float[Tensor, "tasks rows entries"], noise: Float[Tensor, "tasks rows actions"] | None
    ) -> Float[Tensor, "tasks rows actions"]:
        """Actions in [-1, 1]: sampled with the given standard normal noise, or the mean's tanh where it is None."""
        encoding = self.critic.encode(self.state["critic"], self.inputs(self.statistics, observations))
        mean, log_std = self.actor(self.state["actor"], encoding)
        return torch.tanh(mean if noise is None else mean + log_std.exp() * noise)

    def draw_noise(self, policy: torch.Generator, aggregation: torch.Generator) -> Noise:
        """The random numbers of the next update, each from its own stream."""
        shape = (2, self.tasks, self.config.sac.batch_per_task, self.action_size)
        return Noise(
            torch.randn(shape, generator=policy, device=self.device),
            self.rules["critic"].draw_noise(self.tasks, aggregation, self.critic.layout.shared_size),
            self.rules["actor"].draw_noise(self.tasks, aggregation, self.actor.layout.shared_size),
        )

    def update(self, batch: Batch, noise: Noise) -> Metrics:
        """One update of everything, from `B` transitions of each task."""
        settings, state = self.config.sac, self.state
        step = state["updates"] + 1
        alpha = state["log_alpha"].exp()
        rewards = batch.rewards * settings.reward_scale
        inputs = self.inputs(self.statistics, batch.observations)
        next_inputs = self.inputs(self.statistics, batch.next_observations)

        actor_tape = Tape()
        encoding = self.critic.encode(state["critic"], inputs)
        actions, log_prob = sac.tanh_gaussian(*self.actor(state["actor"], encoding, actor_tape), noise.actions[0])

        temperature_losses = sac.temperature_losses(state["log_alpha"], log_prob, settings.target_entropy)
        temperature_gradient = -(log_prob.detach() + settings.target_entropy).mean(1)
        new = adamw(
            state,
            "log_alpha",
            self.temperature_mixing @ temperature_gradient,
            step,
            settings.temperature_lr,
            settings.adam_eps,
            0.0,
        )

        with torch.no_grad():
            next_encoding = self.critic.encode(state["critic"], next_inputs)
            next_actions, next_log_prob = sac.tanh_gaussian(
                *self.actor(state["actor"], next_encoding), noise.actions[1]
            )
            target_encoding = self.critic.encode(state["target_critic"], next_inputs)
            next_values = self.critic_loss.values(self.critic(state["target_critic"], target_encoding, next_actions))
            targets = sac.soft_target(rewards, batch.discounts, next_values, next_log_prob, alpha)
        critic_tape = Tape()
        outputs = self.critic(
            state["critic"], self.critic.encode(state["critic"], inputs, critic_tape), batch.actions, critic_tape
        )
        critic_losses = self.critic_loss.losses(outputs, targets)
        critic_step = self._step("critic", critic_losses, critic_tape, self.critic.layout, noise.critic, step)
        new |= critic_step.new
        if self.rules["critic"].sees_new_losses:
            with torch.no_grad():
                encoding_now = self.critic.encode(new["critic"], inputs)
                new_losses = self.critic_loss.losses(self.critic(new["critic"], encoding_now, batch.actions), targets)
            seen = self.rules["critic"].after_step(self._remembered("critic", new), critic_losses.detach(), new_losses)
            new |= {f"critic/rule/{key}": value for key, value in seen.items()}
            overflown = ~torch.isfinite(new_losses) & critic_step.finite & ~critic_step.bad.any()
            critic_step = replace(critic_step, bad=critic_step.bad | overflown)

        values = self.critic_loss.values(self.critic(new["critic"], self.critic.encode(new["critic"], inputs), actions))
        actor_losses = sac.actor_losses(alpha, log_prob, values)
        actor_step = self._step("actor", actor_losses, actor_tape, self.actor.layout, noise.actor, step)
        new |= actor_step.new

        new["target_critic"] = torch.lerp(state["target_critic"], new["critic"], settings.tau)
        new["updates"] = step
        actor_bad = actor_step.bad & critic_step.finite  # its loss is taken with the new critics
        bad = torch.stack([critic_step.bad, actor_bad, ~torch.isfinite(temperature_losses)])
        self._accept(new, bad, critic_step.finite & actor_step.finite)
        per_task = {
            "train/critic_loss": critic_losses,
            "train/actor_loss": actor_losses,
            "train/ent_coef_loss": temperature_losses,
            "train/ent_coef": alpha,
            "train/entropy": -log_prob.mean(1),
            "train/q_mean": self.critic_loss.values(outputs).mean((0, 2)),
            "train/target_mean": targets.mean(1),
        }
        return Metrics(
            {tag: values.detach() for tag, values in (per_task | critic_step.per_task | actor_step.per_task).items()},
            critic_step.scalars | actor_step.scalars,
        )

    def _step(
        self,
        name: str,
        task_losses: Float[Tensor, " tasks"],
        tape: Tape,
        layout: Layout,
        noise: Tensor | None,
        step: Float[Tensor, ""],
    ) -> _Step:
        """Per-task losses -> J -> Gramian -> weights -> direction -> clip -> Adam, for the critics or the actor."""
        settings = self.config.sac
        gradients: TaskGradients = task_gradients(task_losses, tape, layout)
        gramian = gradients.gramian()
        started = time.perf_counter()
        rule = self.rules[name]
        jacobian = gradients.dense() if rule.needs == "jacobian" else None
        aggregation: Aggregation = rule.aggregate(gramian, noise, task_losses, jacobian, self._remembered(name))
        self.aggregation_seconds += time.perf_counter() - started
        if aggregation.direction is None:
            direction = gradients.combine(aggregation.weights, aggregation.own_weights)
        else:
            direction = torch.cat([aggregation.direction, gradients.own_direction(aggregation.own_weights)])
        norm = direction.norm()
        if settings.max_grad_norm and not rule.preconditioned:
            direction = direction * (settings.max_grad_norm / norm).clamp(max=1.0)
        lr = settings.critic_lr if name == "critic" else settings.actor_lr
        new = adamw(self.state, name, direction, step, lr, settings.adam_eps, settings.weight_decay)
        if rule.preconditioned:
            old, shared = self.state[name], layout.shared_size
            stepped = old * (1 - lr * settings.weight_decay) - lr * direction
            new[name] = torch.cat([stepped[:shared], new[name][shared:]])
        bad = ~torch.isfinite(task_losses.detach() + gramian.diagonal())
        bad = bad | (~torch.isfinite(aggregation.weights) & ~bad.any())  # a loss that the rule cannot take
        scalars = gradient_statistics(gramian) | aggregation.diagnostics | {"direction_norm": norm}
        return _Step(
            new=new | {f"{name}/rule/{key}": value for key, value in aggregation.state.items()},
            finite=torch.isfinite(norm),
            bad=bad | ~(torch.isfinite(norm) | bad.any()),  # an overflow that no task's row shows counts for all
            per_task={
                f"gradients/{name}/weight": aggregation.weights,
                f"gradients/{name}/norm": gramian.diagonal().sqrt(),
            },
            scalars={f"gradients/{name}/{tag}": value for tag, value in scalars.items()},
        )

    def _remembered(self, name: str, state: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
        """What the rule of the critics or of the actor left in a state, by default in the present one."""
        prefix, state = f"{name}/rule/", self.state if state is None else state
        return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}

    def _accept(self, new: dict[str, Tensor], bad: Bool[Tensor, "losses tasks"], finite: Bool[Tensor, ""]) -> None:
        """Take the new state if everything is finite, else keep the old one and count whose fault it was; decided on
        the device."""
        self.non_finite += bad
        accepted = finite & ~bad.any()
        for name, value in new.items():
            self.state[name].copy_(torch.where(accepted, value, self.state[name]))

    def pop_aggregation_seconds(self) -> float:
        """Host seconds spent in aggregators since the last call."""
        seconds, self.aggregation_seconds = self.aggregation_seconds, 0.0
        return seconds

    def parameter_counts(self) -> tuple[int, int]:
        """Parameters of actor and critics: shared between tasks, and belonging to one task."""
        layouts = (self.actor.layout, self.critic.layout)
        return sum(x.shared_size for x in layouts), sum(x.size - x.shared_size for x in layouts)

    def state_dict(self) -> dict[str, Tensor]:
        """Everything that training changes, by name."""
        return self.state | {"statistics": self.statistics, "non_finite": self.non_finite}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take back what `state_dict` gave.

        Raises:
            ValueError: a name or shape differs, e.g. because the networks differ.
        """
        own = self.state_dict()
        if {name: x.shape for name, x in own.items()} != {name: x.shape for name, x in state.items()}:
            raise ValueError(
                "checkpoint: its parameters have other names or shapes than this configuration's networks."
            )
        for name, value in own.items():
            value.copy_(state[name])


@dataclass(frozen=True)
class _Step:
    """What one optimiser step gives back."""

    new: dict[str, Tensor]
    finite: Bool[Tensor, ""]
    bad: Bool[Tensor, " tasks"]
    per_task: dict[str, Float[Tensor, " tasks"]]
    scalars: dict[str, Tensor]
