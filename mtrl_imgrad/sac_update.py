"""One multi-task SAC update as a pure function of state, batch and random numbers.

Nothing in it waits for the host, so that it can be compiled as one graph. Its order is stable-baselines3's:
temperature, critics, actor, target critics, all with the temperatures' values from before their step. An update with a
non-finite loss or gradient changes nothing but the counters of `non_finite`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from mtrl_imgrad import losses as sac
from mtrl_imgrad.aggregators import Aggregation, Aggregator, Mean
from mtrl_imgrad.config import Config, SacConfig
from mtrl_imgrad.diagnostics import gradient_cosines, gradient_statistics
from mtrl_imgrad.networks import Actor, Layout, ObservationInput, Tape, TwinCritic
from mtrl_imgrad.precision import PRODUCT_DTYPES
from mtrl_imgrad.replay import Batch
from mtrl_imgrad.task_gradients import Gradients, TaskGradients, chunked_task_gradients, task_gradients

BETAS = (0.9, 0.999)
"""Adam's decay rates, torch's defaults."""
LOSSES = ("critic loss", "actor loss", "temperature loss")
"""The rows of the state's `non_finite`."""
State: TypeAlias = dict[str, Tensor]
"""Everything that training changes, by name."""


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
    """What an update reports, on the device: numbers per task `[K]`, scalars, and numbers per two tasks `[K, K]`."""

    per_task: dict[str, Float[Tensor, " tasks"]]
    scalars: dict[str, Float[Tensor, ""]]
    per_pair: dict[str, Float[Tensor, "tasks tasks"]]


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


def temperature_gradient(log_prob: Float[Tensor, "tasks rows"], settings: SacConfig) -> Float[Tensor, " tasks"]:
    """The derivative of `temperature_losses` by log alpha. One temperature for all tasks is K temperatures that start
    equal and move by the mean gradient."""
    gradient = -(log_prob.detach() + settings.target_entropy).mean(1)
    return gradient.mean().expand_as(gradient) if settings.shared_temperature else gradient


def reward_scales(return_size: Float64[Tensor, " tasks"], scale: float) -> Float64[Tensor, " tasks"]:
    """The factor on each task's rewards: `scale`, by the size of the task's returns where one has been seen."""
    return scale / torch.where(return_size > 0, return_size, 1.0)


@dataclass
class SacUpdate:
    """What an update needs beside tensors: calling it gives the entries of the state that change, and metrics.

    Attributes:
        settings: the losses' and optimisers' numbers.
        inputs: observations to network inputs.
        critic, actor: the networks.
        critic_loss: what the critics' outputs mean.
        rules: the aggregators of `critic` and `actor`.
        gradients: how the per-task gradients are made.
    """

    settings: SacConfig
    inputs: ObservationInput
    critic: TwinCritic
    actor: Actor
    critic_loss: sac.CriticLoss
    rules: dict[str, Aggregator]
    gradients: Callable[[Tensor, Tape, Layout], Gradients] = task_gradients

    def __call__(self, state: State, batch: Batch, noise: Noise) -> tuple[State, Metrics]:
        """One update of everything, from `B` transitions of each task."""
        settings = self.settings
        step = state["updates"] + 1
        alpha = state["log_alpha"].exp()
        scales = reward_scales(state["return_size"], settings.reward_scale).to(batch.rewards.dtype)
        rewards = batch.rewards * scales[:, None]
        inputs = self.inputs(state["statistics"], batch.observations)
        next_inputs = self.inputs(state["statistics"], batch.next_observations)

        actor_tape = Tape()
        encoding = self.critic.encode(state["critic"], inputs)
        actions, log_prob = sac.tanh_gaussian(*self.actor(state["actor"], encoding, actor_tape), noise.actions[0])

        temperature_losses = sac.temperature_losses(state["log_alpha"], log_prob, settings.target_entropy)
        gradient, adam_eps = temperature_gradient(log_prob, settings), settings.adam_eps
        new = adamw(state, "log_alpha", gradient, step, settings.temperature_lr, adam_eps, weight_decay=0.0)
        if settings.min_temperature:
            new["log_alpha"] = new["log_alpha"].clamp(min=math.log(settings.min_temperature))

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
        critic_step = self._step(state, "critic", critic_losses, critic_tape, self.critic.layout, noise.critic, step)
        new |= critic_step.new
        if self.rules["critic"].sees_new_losses:
            with torch.no_grad():
                encoding_now = self.critic.encode(new["critic"], inputs)
                new_losses = self.critic_loss.losses(self.critic(new["critic"], encoding_now, batch.actions), targets)
            seen = self.rules["critic"].after_step(remembered("critic", new), critic_losses.detach(), new_losses)
            new |= {f"critic/rule/{key}": value for key, value in seen.items()}
            overflown = ~torch.isfinite(new_losses) & critic_step.finite & ~critic_step.bad.any()
            critic_step = replace(critic_step, bad=critic_step.bad | overflown)

        del critic_tape  # its activations are large
        values = self.critic_loss.values(self.critic(new["critic"], self.critic.encode(new["critic"], inputs), actions))
        actor_losses = sac.actor_losses(alpha, log_prob, values)
        actor_step = self._step(state, "actor", actor_losses, actor_tape, self.actor.layout, noise.actor, step)
        new |= actor_step.new

        new["target_critic"] = torch.lerp(state["target_critic"], new["critic"], settings.tau)
        new["updates"] = step
        actor_bad = actor_step.bad & critic_step.finite  # its loss is taken with the new critics
        bad = torch.stack([critic_step.bad, actor_bad, ~torch.isfinite(temperature_losses)])
        accepted = critic_step.finite & actor_step.finite & ~bad.any()
        new = {name: torch.where(accepted, value, state[name]) for name, value in new.items()}
        new["non_finite"] = state["non_finite"] + bad
        per_task = {
            "train/critic_loss": critic_losses,
            "train/actor_loss": actor_losses,
            "train/ent_coef_loss": temperature_losses,
            "train/ent_coef": alpha,
            "train/entropy": -log_prob.mean(1),
            "train/q_mean": self.critic_loss.values(outputs).mean((0, 2)),
            "train/target_mean": targets.mean(1),
            "train/reward_scale": scales,
        }
        return new, Metrics(
            {tag: values.detach() for tag, values in (per_task | critic_step.per_task | actor_step.per_task).items()},
            critic_step.scalars | actor_step.scalars,
            critic_step.per_pair | actor_step.per_pair,
        )

    def _step(
        self,
        state: State,
        name: str,
        task_losses: Float[Tensor, " tasks"],
        tape: Tape,
        layout: Layout,
        noise: Tensor | None,
        step: Float[Tensor, ""],
    ) -> _Step:
        """Per-task losses -> J -> Gramian -> weights -> direction -> clip -> Adam, for the critics or the actor."""
        settings = self.settings
        gradients = self.gradients(task_losses, tape, layout)
        gramian = gradients.gramian()
        rule = self.rules[name]
        jacobian = gradients.dense() if isinstance(gradients, TaskGradients) and rule.needs == "jacobian" else None
        aggregation: Aggregation = rule.aggregate(
            gramian, noise, task_losses, jacobian, remembered(name, state), gradients.rounding
        )
        if aggregation.direction is None:
            direction = gradients.combine(aggregation.weights, aggregation.own_weights)
        else:
            direction = torch.cat([aggregation.direction, *gradients.own_parts(aggregation.own_weights)])
        norm = direction.norm()
        if settings.max_grad_norm and not rule.preconditioned:
            direction = direction * (settings.max_grad_norm / norm).clamp(max=1.0)
        lr = settings.critic_lr if name == "critic" else settings.actor_lr
        new = adamw(state, name, direction, step, lr, settings.adam_eps, settings.weight_decay)
        if rule.preconditioned:
            old, shared = state[name], layout.shared_size
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
            per_pair={f"gradients/{name}/cosine": gradient_cosines(gramian)},
        )


def remembered(name: str, state: State) -> State:
    """What the rule of the critics or of the actor left in a state."""
    prefix = f"{name}/rule/"
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def build_update(config: Config, tasks: int, observation_size: int, action_size: int) -> SacUpdate:
    """The update that a configuration describes, for K tasks."""
    settings, rule, product_dtype = config.sac, config.aggregator, PRODUCT_DTYPES[config.precision]
    loss: sac.CriticLoss = (
        sac.SquaredLoss()
        if settings.critic_loss == "squared"
        else sac.CategoricalLoss(settings.critic_bins, settings.critic_min, settings.critic_max)
    )
    inputs = ObservationInput(config.network, tasks, observation_size)
    critic = TwinCritic(config.network, tasks, inputs.size, action_size, loss.outputs, product_dtype)
    actor = Actor(config.network, tasks, critic.encoding_size, action_size, product_dtype)
    # Copies, since a foreign rule may keep a state of its own.
    rules = {"critic": copy.deepcopy(rule), "actor": Mean() if rule.critic_only else copy.deepcopy(rule)}
    gradients = task_gradients if config.jacobian == "stored" else chunked_task_gradients
    return SacUpdate(settings, inputs, critic, actor, loss, rules, gradients)


@dataclass(frozen=True)
class _Step:
    """What one optimiser step gives back."""

    new: dict[str, Tensor]
    finite: Bool[Tensor, ""]
    bad: Bool[Tensor, " tasks"]
    per_task: dict[str, Float[Tensor, " tasks"]]
    scalars: dict[str, Tensor]
    per_pair: dict[str, Float[Tensor, "tasks tasks"]]
