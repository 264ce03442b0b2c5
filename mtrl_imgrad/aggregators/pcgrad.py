"""PCGrad: project each task's gradient off those that it conflicts with (Yu et al. 2020, Algorithm 1)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mtrl_imgrad.aggregators.base import Aggregation, Aggregator, Given


@dataclass(frozen=True)
class PCGrad(Aggregator):
    """Gradient surgery in random order.

    For each task i, for every other task j in an order drawn for i alone:
    if <p_i, g_j> < 0 then p_i <- p_i - <p_i, g_j> / ||g_j||^2 g_j, starting at p_i = g_i. Then d = (1/K) sum_i p_i.

    Differences: the paper and its TensorFlow code sum, mtrl's code takes the mean; this is the mean. mtrl adds 1e-8 to
    the partners' norms; here tasks without gradient are skipped instead. Everything is done on the coefficients of
    p_i = sum_j C_ij g_j, so only M is needed: K - 1 vectorised steps, O(K^3). No hyper-parameters, no state.

    Identities: no conflict gives the mean; K = 2 with g12 < 0 gives weights (1 - g12/g11, 1 - g12/g22) / 2; opposed
    equal gradients give 0; permuting the tasks and `noise` together permutes the weights.
    """

    paper = "Yu et al. 2020, arXiv 2001.06782"

    def draw_noise(
        self, num_tasks: int, generator: torch.Generator | None = None, parameters: int = 0
    ) -> Float[Tensor, "tasks tasks"]:
        """Uniform numbers on the generator's device; row i, sorted, is the order in which task i meets its partners."""
        device = None if generator is None else generator.device
        return torch.rand(num_tasks, num_tasks, generator=generator, dtype=torch.float64, device=device)

    def solve(self, given: Given) -> Aggregation:
        gramian, noise = given.gramian, given.noise
        num_tasks = gramian.shape[-1]
        if noise is None or noise.shape[-2:] != gramian.shape[-2:]:
            shape = None if noise is None else tuple(noise.shape)
            raise ValueError(f"noise: got {shape}, need [..., {num_tasks}, {num_tasks}] as drawn by PCGrad.draw_noise")
        order = noise.expand(gramian.shape).argsort(-1)
        squared_norms = gramian.diagonal(dim1=-2, dim2=-1)[..., None, :].expand(gramian.shape)
        own = torch.arange(num_tasks, device=gramian.device)[:, None]
        coefficients = torch.eye(num_tasks, dtype=gramian.dtype, device=gramian.device).expand(gramian.shape)
        products = gramian  # products[i, j] = <p_i, g_j>
        for step in range(num_tasks):
            partner = order[..., step : step + 1]
            product = products.gather(-1, partner)
            squared_norm = squared_norms.gather(-1, partner)
            conflict = (product < 0) & (partner != own) & (squared_norm > 0)
            shift = torch.where(conflict, -product / torch.where(conflict, squared_norm, 1.0), 0.0)
            coefficients = coefficients.scatter_add(-1, partner, shift)
            products = products + shift * gramian.take_along_dim(partner, dim=-2)
        return Aggregation(coefficients.mean(-2))
