"""PCGrad: project each task's gradient off those that it conflicts with (Yu et al. 2020, Algorithm 1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from mtrl_imgrad.aggregators.base import Aggregation, Aggregator, Given
from mtrl_imgrad.aggregators.solvers.pairwise import Meeting, draw_orders, meet_in_turn


@dataclass(frozen=True)
class PCGrad(Aggregator):
    """Gradient surgery in random order.

    For each task i, for every other task j in an order drawn for i alone:
    if <p_i, g_j> < 0 then p_i <- p_i - <p_i, g_j> / ||g_j||^2 g_j, starting at p_i = g_i. Then d = (1/K) sum_i p_i.

    Differences: the paper and its TensorFlow code sum, mtrl's code takes the mean; this is the mean. mtrl adds 1e-8 to
    the partners' norms; here tasks without gradient are skipped instead. Everything is done on the coefficients of
    p_i = sum_j C_ij g_j, so only M is needed: K vectorised steps, O(K^3). No hyper-parameters (none for MT10 and MT50),
    no state.

    Identities: no conflict gives the mean; K = 2 with g12 < 0 gives weights (1 - g12/g11, 1 - g12/g22) / 2; opposed
    equal gradients give 0; permuting the tasks and `noise` together permutes the weights.
    """

    paper: ClassVar[str] = "Yu et al. 2020, arXiv 2001.06782"

    def draw_noise(
        self, num_tasks: int, generator: torch.Generator | None = None, parameters: int = 0
    ) -> Float[Tensor, "tasks tasks"]:
        """Row i, sorted, is the order in which task i meets its partners."""
        return draw_orders(num_tasks, generator)

    def solve(self, given: Given) -> Aggregation:
        def project(meeting: Meeting) -> Tensor:
            return torch.where(meeting.product < 0, -meeting.product / meeting.partner_norm, 0.0)

        return Aggregation(meet_in_turn(given.gramian, given.noise, project).mean(-2))
