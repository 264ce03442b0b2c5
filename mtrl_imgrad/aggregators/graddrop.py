"""GradDrop: every coordinate keeps the gradients of one sign, chosen at random (Chen et al. 2020)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from mtrl_imgrad.aggregators.base import Aggregation, Aggregator, Given, Needs, check_range, device_of


@dataclass(frozen=True)
class GradDrop(Aggregator):
    """Every coordinate keeps the positive or the negative gradients, by a draw that favours the larger sum.

    With p = (1 + sum_i g_i / sum_i |g_i|) / 2 and u uniform in [0, 1), positive g_i are kept if p > u, negative ones if
    p < u (Algorithm 1, lines 10 to 15). d = (1/K) sum_i (leak + (1 - leak) kept_i) g_i.

    Differences: the paper masks the gradient with respect to a shared activation, this the gradient of the shared
    parameters, as CAGrad's and TorchJD's codes do. The paper and TorchJD sum; this is the mean. CAGrad's code adds 1e-8
    to sum |g_i|, which makes small gradients all alike; here a coordinate without gradient stays 0. The paper's leak is
    one number per task, here one for all.

    No value for RL is known. No state but the generator's. Needs J; cost O(K P). The logged weight of a task is the
    part of its squared norm that was kept, over K.

    Identities: where all signs agree, and for leak = 1, d is the mean gradient (K identical g give g); without leak
    each coordinate of d is the sum of its positive or of its negative g_i, over K, and E[d] is the mean gradient;
    homogeneous of degree 1 for given random numbers; the order of the tasks does not matter.
    """

    needs: ClassVar[Needs] = "jacobian"
    paper: ClassVar[str] = "Chen et al. 2020, arXiv 2010.06808"

    leak: float = 0.0
    """Share of the dropped gradients that passes all the same: 0 none, 1 all, which is the mean."""

    def __post_init__(self) -> None:
        check_range("GradDrop.leak", self.leak, 0.0, 1.0)

    def draw_noise(
        self, num_tasks: int, generator: torch.Generator | None = None, parameters: int = 0
    ) -> Float[Tensor, " parameters"]:
        """Uniform numbers on the generator's device, one per parameter."""
        return torch.rand(parameters, generator=generator, device=device_of(generator))

    def solve(self, given: Given) -> Aggregation:
        jacobian, noise = given.jacobian, given.noise
        assert jacobian is not None
        if noise is None or noise.shape != jacobian.shape[1:]:
            shape = None if noise is None else tuple(noise.shape)
            raise ValueError(f"noise: got {shape}, need {tuple(jacobian.shape[1:])} as drawn by GradDrop.draw_noise")
        total, size = jacobian.sum(0), jacobian.abs().sum(0)
        purity = 0.5 * (1 + torch.where(size > 0, total / torch.where(size > 0, size, 1.0), 0.0))
        kept = torch.where(jacobian > 0, purity > noise, purity < noise)
        passed = torch.where(kept, jacobian, self.leak * jacobian)
        squared_norms = (jacobian * jacobian).sum(-1)
        share = (passed * jacobian).sum(-1) / torch.where(squared_norms > 0, squared_norms, 1.0)
        return Aggregation(share.double() / len(jacobian), direction=passed.mean(0))
