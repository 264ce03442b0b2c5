"""GradVac: turn each task's gradient towards the usual angle with the others (Wang et al. 2021, Algorithm 1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from mtrl_imgrad.aggregators.base import Aggregation, Aggregator, Given, State, check_range
from mtrl_imgrad.aggregators.solvers.pairwise import Meeting, current_norms, draw_orders, meet_in_turn

# Targets keep this distance from 1 and -1, where the sine of a cosine is rounding error.
FROM_ONE = 1e-12


@dataclass(frozen=True)
class GradVac(Aggregator):
    """Gradient vaccine in random order.

    For each task i, for every other task j in an order drawn for i alone, with phi = cos(p_i, g_j) and p_i = g_i at
    first: if phi < t_ij then p_i is given the angle arccos t_ij with g_j by adding g_j times

        ||p_i|| (t_ij sqrt(1 - phi^2) - phi sqrt(1 - t_ij^2)) / (||g_j|| sqrt(1 - t_ij^2));

    in both cases t_ij <- (1 - beta) t_ij + beta phi. Then d = (1/K) sum_i p_i. The targets t_ij start at 0.

    Differences: the paper and the codes sum, this is the mean. LibMTL adds 1e-8 to norms; Samsung's code moves the
    target only where it has changed p_i; here it moves always, as in Algorithm 1, and tasks without gradient are
    skipped and leave their targets as they are. Targets are taken as at most 1 - 1e-12, where the multiple still has a
    bound. Where p_i vanishes there is no angle: nothing is added, phi counts as 0.

    beta = 0.5 is LibMTL's, TorchJD's and Samsung's default; we recall 0.01 from the paper. MT10 and MT50 values:
    unknown. State: `target_cosines` [K, K]. Cost: K vectorised steps on coefficients, O(K^3), only M is needed.

    Identities: beta = 0 is PCGrad; K identical gradients g give g; homogeneous of degree 1, the state of degree 0;
    permuting tasks, noise and state together permutes weights and state.
    """

    paper: ClassVar[str] = "Wang et al. 2021, arXiv 2010.05874"

    beta: float = 0.5
    """Share of the new cosine in the moving average of the target (0 to 1)."""

    def __post_init__(self) -> None:
        check_range("GradVac.beta", self.beta, 0.0, 1.0)

    def initial_state(self, shape: tuple[int, ...], parameters: int) -> State:
        return {"target_cosines": torch.zeros(*shape, shape[-1], dtype=torch.float64)}

    def draw_noise(
        self, num_tasks: int, generator: torch.Generator | None = None, parameters: int = 0
    ) -> Float[Tensor, "tasks tasks"]:
        """Row i, sorted, is the order in which task i meets its partners."""
        return draw_orders(num_tasks, generator)

    def solve(self, given: Given) -> Aggregation:
        lengths = given.gramian.diagonal(dim1=-2, dim2=-1).sqrt()
        old = given.state["target_cosines"]
        new = old

        def vaccinate(meeting: Meeting) -> Tensor:
            nonlocal new
            length, partner_length = current_norms(meeting, lengths, given.rounding), meeting.partner_norm.sqrt()
            there = length > 0
            cosine = torch.where(there, meeting.product / torch.where(there, length * partner_length, 1.0), 0.0)
            cosine = cosine.clamp(-1.0, 1.0)
            target = old.gather(-1, meeting.partner)
            moved = torch.where(meeting.meets, (1.0 - self.beta) * target + self.beta * cosine, target)
            new = new.scatter(-1, meeting.partner, moved)
            target = target.clamp(-1.0 + FROM_ONE, 1.0 - FROM_ONE)
            sine, target_sine = (1.0 - cosine**2).sqrt(), (1.0 - target**2).sqrt()
            multiple = length * (target * sine - cosine * target_sine) / (partner_length * target_sine)
            return torch.where(cosine < target, multiple, 0.0)

        weights = meet_in_turn(given.gramian, given.noise, vaccinate).mean(-2)
        return Aggregation(weights, state={"target_cosines": new})
