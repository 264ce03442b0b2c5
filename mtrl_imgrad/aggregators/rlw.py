"""RLW: a random convex combination of the losses at every step (Lin et al. 2022)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from mtrl_imgrad.aggregators.base import Aggregation, Aggregator, Given, device_of


@dataclass(frozen=True)
class RLW(Aggregator):
    """w = softmax(z), z ~ N(0, I) anew in every call; d = sum_i w_i g_i.

    Differences: LibMTL and nash-mtl draw from the global generator on the CPU; here the numbers come from `draw_noise`.
    No value for RL is known, and there is nothing to choose. It weighs losses, so each task's own parameters get w_i
    too; which losses does not matter. No state but the generator's. Cost O(K).

    Identities: w > 0, sum w = 1, E[w_i] = 1/K; K identical gradients g give g; permuting the tasks and `noise` together
    permutes the weights.
    """

    paper: ClassVar[str] = "Lin et al. 2022, arXiv 2111.10603"

    def draw_noise(
        self, num_tasks: int, generator: torch.Generator | None = None, parameters: int = 0
    ) -> Float[Tensor, " tasks"]:
        """Standard normal numbers on the generator's device, one per task."""
        return torch.randn(num_tasks, generator=generator, dtype=torch.float64, device=device_of(generator))

    def solve(self, given: Given) -> Aggregation:
        num_tasks, noise = given.gramian.shape[-1], given.noise
        if noise is None or noise.shape[-1:] != (num_tasks,):
            shape = None if noise is None else tuple(noise.shape)
            raise ValueError(f"noise: got {shape}, need [..., {num_tasks}] as drawn by RLW.draw_noise")
        weights = noise.to(torch.float64).expand(given.active.shape).softmax(-1)
        return Aggregation(weights, own_weights=weights)
