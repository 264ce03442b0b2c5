"""CAGrad-Fast: CAGrad over a few sampled tasks and the average of the others (Liu et al. 2021, published RL code)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from mtrl_imgrad.aggregators.base import Aggregation, Aggregator, Given, check_choice, check_range, device_of
from mtrl_imgrad.aggregators.cagrad import Rescale, mean_gradient, rescale_factor
from mtrl_imgrad.aggregators.solvers import ROUTES, Route, minimise_on_simplex


@dataclass(frozen=True)
class CAGradFast(Aggregator):
    """max over d of min_k <h_k, d> subject to ||d - g0|| <= c ||g0||, g0 the mean gradient of all tasks.

    h_1 .. h_{n-1} are the gradients of n - 1 tasks drawn without replacement, h_n is the average of the K - n + 1
    others. The dual is CAGrad's: w on the n-simplex minimises <hw, g0> + c ||g0|| ||hw||, hw = sum_k w_k h_k; then
    d = g0 + c ||g0|| hw / ||hw||, times the rescale factor. g0 is that of CAGrad: (1/K, ..., 1/K, 1 - (n-1)/K) over h.

    Differences: the published code leaves one task out of the sum of the others but divides by their number, and
    minimises by SLSQP with an absolute tolerance on gradients divided by 100; it divides the direction by 1 + c.
    There the sample spares backward passes; here all gradients cost about one, and what is left is a smaller problem
    and a coarser worst case. Tasks without gradient are not drawn, nor counted among the others.

    Published command lines: MT10 c = 0.9, n = 4; MT50 c = 0.5, n = 8; the default c = 0.4 is our choice. No state;
    random numbers: one per task. Cost: one solve of size n. Where hw = 0 see `SimplexSolution.unit`. Diagnostics:
    `gap`, `relative_gap`.

    Identities: n >= K is CAGrad; n = 1 and c = 0 give (1 + c) g0 and g0 times the factor; before rescaling
    ||d - g0|| = c ||g0||; K identical gradients g give (1 + c) g times the factor.
    """

    paper: ClassVar[str] = "Liu et al. 2021, arXiv 2110.14048"

    c: float = 0.4
    """Radius of the ball as a fraction of the mean gradient's norm (>= 0)."""

    n: int = 4
    """Number of gradients in the worst case: n - 1 sampled tasks and the average of the others (>= 1)."""

    rescale: Rescale = 2
    """Factor on the direction: 0 none, 1 divides by 1 + c^2, 2 divides by 1 + c (published code)."""

    solver: Route = "auto"
    """Where the n x n problem is solved: host (numpy), device (torch, no host copy), or auto (host for CPU tensors)."""

    def __post_init__(self) -> None:
        check_range("CAGradFast.c", self.c, 0.0, math.nextafter(math.inf, 0.0))
        check_range("CAGradFast.n", self.n, 1, math.inf)
        check_choice("CAGradFast.rescale", self.rescale, (0, 1, 2))
        check_choice("CAGradFast.solver", self.solver, ROUTES)

    def draw_noise(
        self, num_tasks: int, generator: torch.Generator | None = None, parameters: int = 0
    ) -> Float[Tensor, " tasks"]:
        """Uniform numbers on the generator's device; the tasks with the n - 1 smallest ones stand alone."""
        return torch.rand(num_tasks, generator=generator, dtype=torch.float64, device=device_of(generator))

    def solve(self, given: Given) -> Aggregation:
        gramian, active, noise = given.gramian, given.active, given.noise
        num_tasks = gramian.shape[-1]
        if noise is None or noise.shape[-1] != num_tasks:
            shape = None if noise is None else tuple(noise.shape)
            raise ValueError(f"noise: got {shape}, need [..., {num_tasks}] as drawn by CAGradFast.draw_noise")
        size = min(self.n, num_tasks)
        rank = torch.where(active, noise, torch.inf).argsort(-1).argsort(-1)
        group = torch.arange(size, device=gramian.device)[:, None]
        members = ((rank.clamp(max=size - 1)[..., None, :] == group) & active[..., None, :]).to(gramian.dtype)
        present = members.sum(-1) > 0
        members = members / members.sum(-1, keepdim=True).clamp_min(1.0)
        grouped = members @ gramian @ members.mT
        grouped = (grouped + grouped.mT) / 2
        products, mean_norm = mean_gradient(gramian)
        radius = self.c * mean_norm
        solution = minimise_on_simplex(
            grouped,
            (members @ products[..., None]).squeeze(-1),
            radius,
            torch.zeros_like(radius),
            present,
            # The others' average may be short by cancellation; its rounding error goes with their lengths.
            row_norms=(members @ gramian.diagonal(dim1=-2, dim2=-1)[..., None]).squeeze(-1),
            solver=self.solver,
            rounding=given.rounding,
        )
        unit = (solution.unit[..., None, :] @ members).squeeze(-2)
        weights = 1.0 / num_tasks + radius[..., None] * unit
        return Aggregation(weights * rescale_factor(self.c, self.rescale), solution.gaps)
