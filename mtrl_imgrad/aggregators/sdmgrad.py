"""SDMGrad: MGDA regularised towards the mean gradient; SDMGrad-OS: of a random sample of tasks (Xiao et al. 2023)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mtrl_imgrad.aggregators.base import Aggregation, Aggregator, Given, check_choice, check_range, device_of
from mtrl_imgrad.aggregators.solvers import ROUTES, Route, minimise_on_simplex

# Samples drawn at once, of which the first that is not empty counts. With n >= 1 expected tasks a sample is empty with
# probability below exp(-n), so all of them are below 2e-7.
ATTEMPTS = 16


def regularised_shortest(
    gramian: Float[Tensor, "*batch tasks tasks"],
    reference: Float[Tensor, "*batch tasks"],
    lam: float,
    active: Bool[Tensor, "*batch tasks"],
    solver: Route,
) -> Aggregation:
    """min over w in the simplex of ||gw + lam g0||^2, and the row weights of d = (gw + lam g0) / (1 + lam).

    Args:
        gramian: M, with zero rows for inactive tasks.
        reference: row weights of g0.
        lam: lambda.
        active: at least one per Gramian.
        solver: the route.
    """
    products = (gramian @ reference[..., None]).squeeze(-1)
    zero = torch.zeros_like(gramian[..., 0, 0])
    # Divided by 1 + lambda, so that no lambda buries the other term.
    linear, quadratic = lam / (1.0 + lam) * products, zero + 1.0 / (1.0 + lam)
    solution = minimise_on_simplex(gramian, linear, zero, quadratic, active, solver=solver)
    weights = solution.weights / (1.0 + lam) + lam / (1.0 + lam) * reference
    return Aggregation(weights, solution.gaps)


@dataclass(frozen=True)
class SDMGrad(Aggregator):
    """min over w in the simplex of ||gw + lambda g0||^2; d = (gw + lambda g0) / (1 + lambda), g0 the mean gradient.

    Differences: the paper estimates the gradient in w from two independent batches and keeps w between steps; the
    published RL code uses one batch and starts w anew at 1/K, but its projected gradient descent diverges on Gramians
    of mean diagonal 1 and, keeping its best iterate, mostly returns the mean. This is the exact minimiser for the
    batch at hand, so there is no state. The supervised code multiplies by K; this is the mean scale.

    Published command lines: lambda = 0.6 for MT10 and MT50. Cost: one solve. Diagnostics: `gap`, `relative_gap`.

    Identities: it is MGDA of the gradients g_i + lambda g0, over 1 + lambda, hence <d', g_i + lambda g0> >= ||d'||^2
    for d' = (1 + lambda) d. It is the shortest combination whose weights are all >= lambda / ((1 + lambda) K), so
    lambda has no effect where those of MGDA are anyway. lambda = 0 is MGDA, lambda towards infinity the mean; K
    identical gradients g give g.
    """

    paper: ClassVar[str] = "Xiao et al. 2023, arXiv 2305.18409"

    lam: float = 0.6
    """Lambda, the weight of the mean gradient in the regularisation (>= 0)."""

    solver: Route = "auto"
    """Where the K x K problem is solved: host (numpy), device (torch, no host copy), or auto (host for CPU tensors)."""

    def __post_init__(self) -> None:
        check_range("SDMGrad.lam", self.lam, 0.0, 1e12)
        check_choice("SDMGrad.solver", self.solver, ROUTES)

    def solve(self, given: Given) -> Aggregation:
        reference = torch.full_like(given.gramian[..., 0], 1.0 / given.gramian.shape[-1])
        return regularised_shortest(given.gramian, reference, self.lam, given.active, self.solver)


@dataclass(frozen=True)
class SDMGradOS(Aggregator):
    """SDMGrad over a random subset of the tasks, each of which is in it with probability n / K ('objective sampling').

    As in the published code g0 is the mean over the sample, the other tasks get weight 0, nothing is divided by n / K,
    and an empty sample is drawn again: d = (gw + lambda g0) / (1 + lambda) with w and g0 over the sample. So E[d] is
    not SDMGrad's d.

    Differences: the exact minimiser, where the published code takes 20 diverging steps (see `SDMGrad`). 16 samples
    are drawn at once and the first with a gradient in it counts; should all be empty (below 2e-7), the task with the
    smallest number. Tasks without gradient may be drawn, and count in the mean over the sample as in every mean here.

    Published command lines: MT10 n = 4, MT50 n = 8, lambda = 0.6 for both. No state. Cost: one solve. Diagnostics:
    `gap`, `relative_gap`, `sampled` (the number of tasks).

    Identities: n >= K is SDMGrad; K identical gradients g give g, whatever the sample.
    """

    paper: ClassVar[str] = "Xiao et al. 2023, arXiv 2305.18409"

    n: int = 4
    """Expected number of tasks in the sample (>= 1)."""

    lam: float = 0.6
    """Lambda, the weight of the sample's mean gradient in the regularisation (>= 0)."""

    solver: Route = "auto"
    """Where the K x K problem is solved: host (numpy), device (torch, no host copy), or auto (host for CPU tensors)."""

    def __post_init__(self) -> None:
        check_range("SDMGradOS.n", self.n, 1, math.inf)
        check_range("SDMGradOS.lam", self.lam, 0.0, 1e12)
        check_choice("SDMGradOS.solver", self.solver, ROUTES)

    def draw_noise(
        self, num_tasks: int, generator: torch.Generator | None = None, parameters: int = 0
    ) -> Float[Tensor, "attempts tasks"]:
        """Uniform numbers on the generator's device; a task is in the sample of a row if its number is below n / K."""
        return torch.rand(ATTEMPTS, num_tasks, generator=generator, dtype=torch.float64, device=device_of(generator))

    def solve(self, given: Given) -> Aggregation:
        gramian, active, noise = given.gramian, given.active, given.noise
        num_tasks = gramian.shape[-1]
        if noise is None or noise.shape[-2:] != (ATTEMPTS, num_tasks):
            shape = None if noise is None else tuple(noise.shape)
            raise ValueError(
                f"noise: got {shape}, need [..., {ATTEMPTS}, {num_tasks}] as drawn by SDMGradOS.draw_noise"
            )
        samples = noise < self.n / num_tasks
        useful = (samples & active[..., None, :]).any(-1)
        first = useful & (useful.cumsum(-1) == 1)
        sample = (samples & first[..., None]).any(-2)
        last = torch.where(active, noise[..., -1, :], torch.inf)
        sample = torch.where(useful.any(-1)[..., None], sample, last == last.amin(-1, keepdim=True))
        counted = sample.to(gramian.dtype)
        count = counted.sum(-1, keepdim=True)
        inside = sample & active
        masked = torch.where(inside[..., :, None] & inside[..., None, :], gramian, 0.0)
        masked = masked / masked.diagonal(dim1=-2, dim2=-1).amax(-1)[..., None, None]  # the weights do not see a factor
        result = regularised_shortest(masked, counted / count, self.lam, inside, self.solver)
        return Aggregation(result.weights, {**result.diagnostics, "sampled": count.squeeze(-1)})
