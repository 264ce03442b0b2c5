"""Per-task scales of rewards: the older Meta-World literature's, before they are stored, and that of the value-based
literature, when they are sampled."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor, as_tensor

from mtrl_imgrad.saved_state import check_like


class RewardNormalizer:
    """Divides each task's reward by the root of its exponential moving variance.

    `m <- (1 - rate) m + rate r`, `v <- (1 - rate) v + rate (r - m)^2`, result `r / sqrt(v)`, from m = 0, v = 1: mtrl's
    wrapper (rate 0.001), with which the CAGrad family of papers trains. Rewards are normalised before they are stored,
    so the replay mixes scales, as theirs does. Rate 0 changes nothing. A reward that is not finite is not taken into
    the statistics, and its result is not finite either.
    """

    def __init__(self, tasks: int, rate: float) -> None:
        self.rate = rate
        self.mean, self.variance = np.zeros(tasks), np.ones(tasks)

    def __call__(self, rewards: Float[np.ndarray, " rows"]) -> Float[np.ndarray, " rows"]:
        """Take one vector step's rewards (task-major rows) into the statistics, one environment after another, and
        normalise them."""
        if not self.rate:
            return rewards.copy()
        normalized = np.empty_like(rewards)
        by_task, result = rewards.reshape(len(self.mean), -1), normalized.reshape(len(self.mean), -1)
        for env, reward in enumerate(by_task.T):
            rate = np.where(np.isfinite(reward), self.rate, 0.0)
            known = np.where(np.isfinite(reward), reward, self.mean)
            self.mean += rate * (known - self.mean)
            self.variance += rate * ((known - self.mean) ** 2 - self.variance)
            with np.errstate(all="ignore"):  # rewards that never change let the variance decay to 0
                result[:, env] = reward / np.sqrt(self.variance)
        return normalized

    def state_dict(self) -> dict[str, Tensor]:
        return {"mean": as_tensor(self.mean.copy()), "variance": as_tensor(self.variance.copy())}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        check_like(state, self.state_dict())
        self.mean, self.variance = (state[name].cpu().numpy().copy() for name in ("mean", "variance"))


def observe_returns(
    returns: Float64[Tensor, "tasks envs"],
    size: Float64[Tensor, " tasks"],
    steps: Float64[Tensor, ""],
    rewards: Float[Tensor, "tasks envs"],
    ended: Bool[Tensor, "tasks envs"],
    gamma: float,
    measure: Literal["largest", "rms"],
) -> None:
    """Take one vector step's rewards into the running discounted returns and the size of each task's, in place.

    `G <- gamma G + r` within an episode, from 0. `largest`: `size <- max(size, |G|)`; `rms`: the root of the mean of
    G^2 over all steps so far. To divide a task's rewards by that size gives all tasks values of one size, however far
    each of them has got. SimbaV2 (Lee et al. 2025, arXiv 2502.15280, reward scaling) has the same G and divides by
    `max(sqrt(var G), max |G| / 5)`; BRC (Nauman et al. 2025, arXiv 2505.23150) by the largest return-to-go of an
    episode over 10, per task. `largest` takes BRC's measure of SimbaV2's G, without what BRC adds for the steps after a
    truncation and for entropy; `rms` is SimbaV2's without the bound, about 0 instead of the mean; Schaul et al. (2021,
    arXiv 2105.05347, return-based scaling) have E[G^2] too, beside the variance of rewards. As G grows from 0 in each
    episode, a value is larger than its `rms`: 1.4 times for a constant reward in episodes of 100 decisions at gamma
    0.97. Rewards are stored as they are, so that a new size scales old transitions too. All in float64, where the
    square of any float32 reward is finite.

    Args:
        returns: G of every environment.
        size: of every task's returns so far; 0 before the first reward.
        steps: vector steps so far.
        rewards: of the step; 0 for a transition that is left out.
        ended: where the episode ended with it.
        gamma: discount per decision.
        measure: which size.
    """
    returns.mul_(gamma).add_(rewards)
    steps.add_(1)
    if measure == "largest":
        torch.maximum(size, returns.abs().amax(1), out=size)
    else:
        size.copy_(torch.lerp(size.square(), returns.square().mean(1), 1 / steps).sqrt())
    returns.masked_fill_(ended, 0.0)
