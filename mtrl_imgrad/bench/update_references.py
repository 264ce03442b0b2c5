"""Other ways to make a multi-task SAC update, for `bench update` to compare with.

`updated` is the learner's update with the gradients of one function, from a network's K losses to the direction of its
step: the mean by one ordinary backward pass, K backward passes with SLSQP as in the literature's codes, or TorchJD. It
leaves out what a training run wants besides: metrics, the norm clip and the guard against non-finite numbers.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

import gymnasium
import numpy as np
import torch
from gymnasium.spaces import Box
from jaxtyping import Float
from stable_baselines3 import SAC
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.logger import Logger
from torch import Tensor

from mtrl_imgrad import losses as sac
from mtrl_imgrad.bench.solver_references import RADIUS, slsqp, weights_by
from mtrl_imgrad.networks import Tape
from mtrl_imgrad.replay import Batch
from mtrl_imgrad.sac_update import Noise, SacUpdate, State, adamw, reward_scales, temperature_gradient

OBSERVATION, ACTIONS = 39, 4
"""Entries of Meta-World's observations and actions."""
LossesOf: TypeAlias = Callable[[Tensor], tuple[Tensor, Tensor]]
"""From a network's parameter vector to its losses `[K]`, and something else that is computed on the way."""
Gradient: TypeAlias = Callable[[LossesOf, Tensor], tuple[Tensor, Tensor]]
"""From such a function and a vector `[P]` to the direction `[P]` of the vector's step, and that something."""


@dataclass(frozen=True)
class Size:
    """Shapes of an update.

    Attributes:
        tasks: K.
        rows: transitions of each task in a batch.
        transitions: of each task in the replay.
        width, depth: of the networks' hidden layers.
    """

    tasks: int
    rows: int = 128
    transitions: int = 2000
    width: int = 400
    depth: int = 3


# ---------------------------------------------------------------------------------------------------------------------
# The update, with the learner's networks, losses and optimiser
# ---------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def soft_targets(update: SacUpdate, state: State, batch: Batch, noise: Tensor) -> Float[Tensor, "tasks rows"]:
    """What the critics are to learn."""
    inputs = update.inputs(state["statistics"], batch.next_observations)
    encoding = update.critic.encode(state["critic"], inputs)
    actions, log_prob = sac.tanh_gaussian(*update.actor(state["actor"], encoding), noise)
    encoding = update.critic.encode(state["target_critic"], inputs)
    values = update.critic_loss.values(update.critic(state["target_critic"], encoding, actions))
    scales = reward_scales(state["return_size"], update.settings.reward_scale).to(batch.rewards.dtype)
    rewards = batch.rewards * scales[:, None]
    return sac.soft_target(rewards, batch.discounts, values, log_prob, state["log_alpha"].exp())


def critic_losses(
    update: SacUpdate, batch: Batch, inputs: Tensor, targets: Tensor, vector: Tensor, tape: Tape | None = None
) -> tuple[Float[Tensor, " tasks"], Tensor]:
    """The critics' losses at their parameters `vector`, and their outputs."""
    outputs = update.critic(vector, update.critic.encode(vector, inputs, tape), batch.actions, tape)
    return update.critic_loss.losses(outputs, targets), outputs


def actor_losses(
    update: SacUpdate,
    state: State,
    critic: Tensor,
    inputs: Tensor,
    noise: Tensor,
    vector: Tensor,
    tape: Tape | None = None,
) -> tuple[Float[Tensor, " tasks"], Float[Tensor, "tasks rows"]]:
    """The actor's losses at its parameters `vector` with the new critics' parameters `critic`, and the actions' log
    probabilities."""
    encoding = update.critic.encode(state["critic"], inputs)
    actions, log_prob = sac.tanh_gaussian(*update.actor(vector, encoding, tape), noise)
    values = update.critic_loss.values(update.critic(critic, update.critic.encode(critic, inputs), actions))
    return sac.actor_losses(state["log_alpha"].exp(), log_prob, values), log_prob


def updated(update: SacUpdate, gradient: Gradient, state: State, batch: Batch, noise: Noise) -> State:
    """One update of a state: what changes, as new tensors. A pure function."""
    settings, step = update.settings, state["updates"] + 1
    inputs = update.inputs(state["statistics"], batch.observations)

    targets = soft_targets(update, state, batch, noise.actions[1])
    direction, _ = gradient(partial(critic_losses, update, batch, inputs, targets), state["critic"])
    decay = settings.weight_decay
    new = adamw(state, "critic", direction, step, settings.critic_lr, settings.adam_eps, decay)

    losses_of = partial(actor_losses, update, state, new["critic"], inputs, noise.actions[0])
    direction, log_prob = gradient(losses_of, state["actor"])
    new |= adamw(state, "actor", direction, step, settings.actor_lr, settings.adam_eps, decay)

    direction = temperature_gradient(log_prob, settings)
    new |= adamw(state, "log_alpha", direction, step, settings.temperature_lr, settings.adam_eps, 0.0)
    new["target_critic"] = torch.lerp(state["target_critic"], new["critic"], settings.tau)
    new["updates"] = step
    return new


# ---------------------------------------------------------------------------------------------------------------------
# From the losses to a direction
# ---------------------------------------------------------------------------------------------------------------------


def mean_gradient(losses_of: LossesOf, vector: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of the mean loss, by one ordinary backward pass to the weights."""
    leaf = vector.detach().requires_grad_()
    losses, other = losses_of(leaf)
    return torch.autograd.grad(losses.mean(), leaf)[0], other


def cagrad_by_slsqp(losses_of: LossesOf, vector: Tensor) -> tuple[Tensor, Tensor]:
    """CAGrad's direction by K backward passes over the whole batch, the Gramian copied to the host, and scipy's SLSQP
    there, as in LibMTL's and other codes after https://github.com/Cranial-XIX/CAGrad. Those let SLSQP differentiate its
    objective numerically; here it gets the derivative, which takes fewer evaluations."""
    leaf = vector.detach().requires_grad_()
    losses, other = losses_of(leaf)
    jacobian = torch.stack([torch.autograd.grad(loss, leaf, retain_graph=True)[0] for loss in losses])
    weights = weights_by("cagrad", slsqp, (jacobian @ jacobian.T).cpu().double())
    return torch.from_numpy(weights).to(jacobian) @ jacobian, other


def cagrad_by_torchjd() -> Gradient:
    """The direction of TorchJD's CAGrad (not divided by 1 + c^2), J by its autojac: every parameter is shared, so that
    its `backward` does what `mtl_backward` would do.

    Raises:
        ImportError: it or what its CAGrad needs is not installed.
    """
    autojac = importlib.import_module("torchjd.autojac")
    rule = importlib.import_module("torchjd.aggregation").CAGrad(c=RADIUS)

    def gradient(losses_of: LossesOf, vector: Tensor) -> tuple[Tensor, Tensor]:
        leaf = vector.detach().requires_grad_()
        losses, other = losses_of(leaf)
        autojac.backward(losses, inputs=[leaf])
        autojac.jac_to_grad([leaf], rule)
        assert leaf.grad is not None
        return leaf.grad, other

    return gradient


# ---------------------------------------------------------------------------------------------------------------------
# stable-baselines3
# ---------------------------------------------------------------------------------------------------------------------


class _Spaces(gymnasium.Env):
    """Observations with the task's one-hot. Nothing is ever stepped."""

    def __init__(self, tasks: int) -> None:
        self.observation_space = Box(-np.inf, np.inf, (OBSERVATION + tasks,), np.float32)
        self.action_space = Box(-1.0, 1.0, (ACTIONS,), np.float32)


class StableBaselines3:
    """Its SAC on the same number of rows, the task's one-hot in the observation: one loss and one temperature for all.

    Attributes:
        sac: the algorithm, its replay filled.
    """

    def __init__(self, size: Size) -> None:
        capacity, self._rows = size.tasks * size.transitions, size.tasks * size.rows
        layers = {"net_arch": [size.width] * size.depth}
        env = _Spaces(size.tasks)
        self.sac = SAC("MlpPolicy", env, buffer_size=capacity, policy_kwargs=layers, device="cpu")
        self.sac.set_logger(Logger(None, []))
        replay, random = self.sac.replay_buffer, np.random.default_rng(1)
        assert isinstance(replay, ReplayBuffer)
        task = np.eye(size.tasks)[random.integers(size.tasks, size=capacity)]
        for observations in (replay.observations, replay.next_observations):
            observations[:, 0] = np.concatenate([random.standard_normal((capacity, OBSERVATION)), task], 1)
        replay.actions[:] = random.uniform(-1, 1, replay.actions.shape)
        replay.rewards[:] = random.uniform(0, 10, replay.rewards.shape)
        replay.full = True

    def __call__(self) -> None:
        self.sac.train(gradient_steps=1, batch_size=self._rows)
