"""UPGrad: the mean of the task gradients, each projected so that it opposes no task (Quinton and Rey 2024)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from mtrl_imgrad.aggregators.base import Aggregation, Aggregator, Given, check_choice
from mtrl_imgrad.aggregators.solvers import ROUTES, Route
from mtrl_imgrad.aggregators.solvers.dual_cone import project_onto_dual_cone


@dataclass(frozen=True)
class UPGrad(Aggregator):
    """d = (1/K) sum_i P(g_i), with P the projection onto the dual cone {d: <g_j, d> >= 0 for all j}.

    P(g_i) = J^T v for the v that minimises v'Mv subject to v >= e_i (Proposition 1 of the paper).

    Differences: TorchJD, the authors' code, adds 1e-4 trace(M) to the diagonal of M, which gives up the one property
    that the rule is for: with norm ratios of 1e4, <g_i, d> gets a cosine of -0.1. Here it is 1e-13 ||g_i||^2 on every
    task.

    Hyper-parameters: none. Values for MT10 and MT50: unknown. No state. Cost: K solves (`solvers.dual_cone`).
    Diagnostics: `gap` (the largest of the solves').

    Identities: <g_i, d> >= 0 for all i, to a cosine of -1e-8 with every projection; without conflict d
    is the mean gradient; scaling g_i alone by c > 0 scales its own term alone, so d is linear in the lengths of the
    gradients; homogeneous of degree 1; K identical gradients g give g; an opposed pair gives 0, and so does 0 inside
    the hull.
    """

    solver: Route = "auto"
    """Where the K x K problem is solved: host (numpy), device (torch, no host copy), or auto (host for CPU tensors)."""

    paper: ClassVar[str] = "Quinton and Rey 2024, arXiv 2406.16232"

    def __post_init__(self) -> None:
        check_choice("UPGrad.solver", self.solver, ROUTES)

    def solve(self, given: Given) -> Aggregation:
        gramian = given.gramian
        sides = torch.eye(gramian.shape[-1], dtype=gramian.dtype, device=gramian.device).expand(gramian.shape)
        projection = project_onto_dual_cone(gramian, sides, given.active, self.solver, given.rounding)
        return Aggregation(projection.weights.mean(-2), {"gap": projection.gap})
