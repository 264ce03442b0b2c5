"""GradNorm: weights under which all tasks' gradients have norms that fit their rates of training (Chen et al. 2018)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from mtrl_imgrad.aggregators.base import Aggregation, Aggregator, Given, Needs, State, check_range
from mtrl_imgrad.aggregators.weight_optimiser import adam, initial_adam

# A norm this close to its target, as a fraction of the mean norm, has reached it: its sign would be rounding noise.
REACHED = 1e-12


@dataclass(frozen=True)
class GradNorm(Aggregator):
    """d = (1/K) sum_i w_i g_i; w descends sum_i |w_i n_i - mean_j(w_j n_j) r_i^alpha| (Eq. 2), mean and r held fixed.

    n_i = ||g_i||; r_i = (L_i / L_i(0)) / mean_j(L_j / L_j(0)), task i's relative inverse rate of training, L(0) the
    losses of the first call. A call weighs by the w from before its step.

    Differences: the paper steps w itself and rescales it to sum K, which may leave a weight negative; here w = K
    softmax(xi) and Adam steps xi, so that w > 0 and sum w = K always (LibMTL has a softmax too). n_i is the norm over
    all shared parameters, the root of M's diagonal, as in metaworld-algorithms; the paper takes the last shared layer
    alone. The norms are divided by their root mean square in each call, so that the scale of the gradients does not
    matter. mtrl's code overwrites L(0) at every step and never stores the rescaled weights. Where L_i(0) = 0 the ratio
    counts as 1. Tasks without gradient are left out of the objective.

    Values: alpha = 0.12 and Adam at 3e-4 in metaworld-algorithms (MT10, MT50); mtrl has alpha = 1 and 1e-6; the paper's
    alpha is 1.5 or 0.12, by data set. Losses must not be negative: critics only. State: xi and its Adam, L(0). Cost
    O(K), besides the gradients.

    Identities: equal norms and equal rates leave w = 1; K identical gradients g with one loss give g; a factor on one
    task's losses changes r not at all.
    """

    needs: ClassVar[Needs] = "losses"
    paper: ClassVar[str] = "Chen et al. 2018, arXiv 1711.02257"
    critic_only: ClassVar[bool] = True

    alpha: float = 0.12
    """Strength of the pull towards equal rates of training; 0 asks for equal norms."""

    w_lr: float = 3e-4
    """Adam step size of the logits xi."""

    def __post_init__(self) -> None:
        check_range("GradNorm.alpha", self.alpha, 0.0, 100.0)
        check_range("GradNorm.w_lr", self.w_lr, 0.0, 1.0)

    def initial_state(self, shape: tuple[int, ...], parameters: int) -> State:
        return initial_adam("logits", shape) | {"initial_losses": torch.zeros(shape, dtype=torch.float64)}

    def solve(self, given: Given) -> Aggregation:
        losses, active, state = given.losses, given.active, given.state
        assert losses is not None
        count = active.sum(-1, keepdim=True)
        initial = torch.where(state["adam_step"] == 0, losses, state["initial_losses"])
        ratios = torch.where(initial > 0, losses / torch.where(initial > 0, initial, 1.0), 1.0)
        mean_ratio = (ratios * active).sum(-1, keepdim=True) / count
        rates = torch.where(mean_ratio > 0, ratios / torch.where(mean_ratio > 0, mean_ratio, 1.0), 1.0)

        norms = given.gramian.diagonal(dim1=-2, dim2=-1).sqrt()
        shares = state["logits"].softmax(-1)
        among_active = shares * active / (shares * active).sum(-1, keepdim=True)
        weighted = count * among_active * norms
        mean_norm = weighted.sum(-1, keepdim=True) / count
        excess = weighted - mean_norm * rates**self.alpha
        slope = torch.where(excess.abs() > REACHED * mean_norm, excess.sign(), 0.0) * norms
        # The softmax's Jacobian, K (diag(z) - z z^T), times the slope.
        slope = count * among_active * (slope - (among_active * slope).sum(-1, keepdim=True))
        new = adam(state, "logits", slope, self.w_lr) | {"initial_losses": initial}
        return Aggregation(shares, state=new, own_weights=shares)
