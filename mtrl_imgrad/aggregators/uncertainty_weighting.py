"""Uncertainty weighting: losses divided by a learned variance (Kendall et al. 2018)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from mtrl_imgrad.aggregators.base import Aggregation, Aggregator, Given, Needs, State, check_range
from mtrl_imgrad.aggregators.weight_optimiser import adam, initial_adam


@dataclass(frozen=True)
class UncertaintyWeighting(Aggregator):
    """w_i = exp(-s_i) / K with s_i the learned log variance of task i's loss.

    s descends sum_i (exp(-s_i) L_i + s_i) / 2 by its own Adam, from s = 0.

    Mean scale: the paper's loss is sum_i (exp(-s_i) L_i + s_i) / 2, i.e. K / 2 times this one's; its step of s is the
    one taken here. A call weighs by the s from before its step, as one optimiser for both would.

    Differences: the published code for RL (FAMO's `uw.py`) applies the rule to the actor too, with an s of its own; an
    actor's loss may be negative, where the objective is unbounded below, so here the actor gets the mean. LibMTL starts
    s at -0.5. A loss of exactly 0 has no best s and leaves its own as it is (by the formula s would sink for ever).

    The published RL configuration has w_lr = 0.01 (its class default is 0.025). State: s and its Adam. Cost O(K).

    Identities: s_i = log L_i is stationary, there w_i = 1 / (K L_i); K identical gradients g with one loss give
    exp(-s) g, at first g; the direction is linear in the gradients for given losses and state.
    """

    needs: ClassVar[Needs] = "losses"
    paper: ClassVar[str] = "Kendall et al. 2018, arXiv 1705.07115"
    critic_only: ClassVar[bool] = True

    w_lr: float = 0.01
    """Adam step size of the log variances (published RL configuration: 0.01)."""

    def __post_init__(self) -> None:
        check_range("UncertaintyWeighting.w_lr", self.w_lr, 0.0, 1.0)

    def initial_state(self, shape: tuple[int, ...], parameters: int) -> State:
        return initial_adam("log_variance", shape)

    def solve(self, given: Given) -> Aggregation:
        losses, state = given.losses, given.state
        assert losses is not None
        precision = torch.exp(-state["log_variance"])
        slope = torch.where(losses > 0, 0.5 * (1 - precision * losses), 0.0)
        weights = precision / losses.shape[-1]
        return Aggregation(weights, state=adam(state, "log_variance", slope, self.w_lr), own_weights=weights)
