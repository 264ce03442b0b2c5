"""The plain mean of the task gradients."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mtrl_imgrad.aggregators.base import Aggregation, Aggregator, Given


@dataclass(frozen=True)
class Mean(Aggregator):
    """d = (1/K) sum_i g_i, the gradient of the mean loss.

    No hyper-parameters (none for MT10 and MT50), no state, cost O(K).
    """

    def solve(self, given: Given) -> Aggregation:
        gramian = given.gramian
        return Aggregation(torch.full_like(gramian[..., 0], 1.0 / gramian.shape[-1]))
