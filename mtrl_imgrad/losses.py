"""Soft actor-critic as pure functions: every loss is `[K]`, one number per task.

Notation: s observation, a action, alpha_k task k's temperature, H target entropy, pi the tanh-Gaussian policy, Q_1 and
    Q_2 the twin critics, a bar for the target critics, m <= n the decisions in an n-step window, gamma the discount per
    decision. Definitions and order are stable-baselines3's; Haarnoja et al. 2018 (arXiv 1812.05905), equations 5-7 and
    18, with one loss per task instead of a mean over all rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

Values = Float[Tensor, "2 tasks rows"]
Rows = Float[Tensor, "tasks rows"]
PerTask = Float[Tensor, " tasks"]


def tanh_gaussian(
    mean: Float[Tensor, "tasks rows actions"],
    log_std: Float[Tensor, "tasks rows actions"],
    noise: Float[Tensor, "tasks rows actions"],
) -> tuple[Float[Tensor, "tasks rows actions"], Rows]:
    """Reparametrised action `a = tanh(u)`, `u = mean + std * noise`, and its log-probability.

        log pi(a|s) = sum_j log N(u_j; mean_j, std_j) - log(1 - tanh(u_j)^2),   log(1 - tanh(u)^2) = 2 (log 2 - u -
        softplus(-2u))

    The second form is exact for every u. stable-baselines3 uses log(1 - a^2 + 1e-6), which departs from it for |a| near
    1.
    """
    u = mean + log_std.exp() * noise
    log_normal = -0.5 * noise**2 - log_std - 0.5 * math.log(2 * math.pi)
    log_slope = 2 * (math.log(2) - u - functional.softplus(-2 * u))
    return torch.tanh(u), (log_normal - log_slope).sum(-1)


def temperature_losses(log_alpha: PerTask, log_prob: Rows, target_entropy: float) -> PerTask:
    """`J(alpha_k) = -log alpha_k * mean(log pi + H)`, the log probability taken as a constant.

    As in stable-baselines3 and softlearning, log alpha stands where the paper's equation 18 has alpha.
    """
    return -log_alpha * (log_prob.detach() + target_entropy).mean(1)


def soft_target(rewards: Rows, discounts: Rows, next_values: Values, next_log_prob: Rows, alpha: PerTask) -> Rows:
    """`y = R + gamma^m (1 - terminated) (min_i Qbar_i(s', a') - alpha log pi(a'|s'))` with a' drawn at the *next*
    observation s'.

    `rewards` is the window's sum of gamma^j r_j and `discounts` is gamma^m (1 - terminated). For n > 1 the entropy
    enters at the bootstrap state only.
    """
    return rewards + discounts * (next_values.amin(0) - alpha[:, None] * next_log_prob)


def actor_losses(alpha: PerTask, log_prob: Rows, values: Values) -> PerTask:
    """`mean(alpha_k log pi(a|s) - min_i Q_i(s, a))` with a reparametrised action; alpha's value is the one before its
    own step."""
    return (alpha[:, None] * log_prob - values.amin(0)).mean(1)


class CriticLoss(Protocol):
    """What the critic's output means: its values, and its loss against scalar targets.

    Attributes:
        outputs: numbers per critic that the network gives for one row.
    """

    @property
    def outputs(self) -> int: ...

    def values(self, outputs: Float[Tensor, "2 tasks rows outputs"]) -> Values: ...

    def losses(self, outputs: Float[Tensor, "2 tasks rows outputs"], targets: Rows) -> PerTask: ...


@dataclass(frozen=True)
class SquaredLoss:
    """`0.5 * sum_i mean((Q_i - y)^2)`, stable-baselines3's."""

    outputs: int = 1

    def values(self, outputs: Float[Tensor, "2 tasks rows 1"]) -> Values:
        return outputs.squeeze(-1)

    def losses(self, outputs: Float[Tensor, "2 tasks rows 1"], targets: Rows) -> PerTask:
        return 0.5 * ((outputs.squeeze(-1) - targets) ** 2).mean(2).sum(0)


@dataclass(frozen=True)
class CategoricalLoss:
    """HL-Gauss (Farebrother et al. 2024, arXiv 2403.03950, section 3.1): cross-entropy against a Gaussian around y,
    histogrammed.

    `sum_i mean(-sum_b p_b(y) log softmax(logits_i)_b)` where p_b is the mass of N(y, sigma^2), truncated to [low,
    high], in bin b; sigma is 0.75 bin widths as in that paper. A value is the expectation of the bin centres. Targets
    beyond the range are clipped to it.
    """

    outputs: int
    low: float
    high: float

    SMOOTHING = 0.75

    def _edges(self, like: Tensor) -> Tensor:
        return torch.linspace(self.low, self.high, self.outputs + 1, dtype=like.dtype, device=like.device)

    def values(self, outputs: Float[Tensor, "2 tasks rows bins"]) -> Values:
        edges = self._edges(outputs)
        return outputs.softmax(-1) @ ((edges[1:] + edges[:-1]) / 2)

    def target_distribution(self, targets: Rows) -> Float[Tensor, "tasks rows bins"]:
        """The histogram p(y) of each target."""
        sigma = self.SMOOTHING * (self.high - self.low) / self.outputs
        clipped = targets.clamp(self.low, self.high)
        cumulative = torch.special.ndtr((self._edges(targets) - clipped[..., None]) / sigma)
        mass = cumulative.diff(dim=-1)
        return mass / (cumulative[..., -1:] - cumulative[..., :1])

    def losses(self, outputs: Float[Tensor, "2 tasks rows bins"], targets: Rows) -> PerTask:
        return -(self.target_distribution(targets) * outputs.log_softmax(-1)).sum(-1).mean(2).sum(0)
