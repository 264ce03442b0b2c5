"""The plain sum of the task gradients."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mtrl_imgrad.aggregators.base import Aggregation, Aggregator, Given


@dataclass(frozen=True)
class Sum(Aggregator):
    """d = sum_i g_i, the gradient of the sum of the losses; K times the mean, so not on the mean scale.

    K identical gradients g give K g. Each task's own parameters get g_i instead of g_i / K, so under Adam without
    clipping it is the mean with an epsilon K times smaller. No hyper-parameters (none for MT10 and MT50), no
    state, cost O(K).
    """

    def solve(self, given: Given) -> Aggregation:
        ones = torch.ones_like(given.gramian[..., 0])
        return Aggregation(ones, own_weights=ones)
