"""Reward normalisation per task, as the older Meta-World literature trains with."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float
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
