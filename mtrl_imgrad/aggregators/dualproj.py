"""DualProj: the mean gradient, projected so that it opposes no task (Lopez-Paz and Ranzato 2017, for any K)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from mtrl_imgrad.aggregators.base import Aggregation, Aggregator, Given, check_choice
from mtrl_imgrad.aggregators.solvers import ROUTES, Route
from mtrl_imgrad.aggregators.solvers.dual_cone import project_onto_dual_cone


@dataclass(frozen=True)
class DualProj(Aggregator):
    """The d nearest to the mean gradient g0 with <g_i, d> >= 0 for all i: its projection onto the dual cone.

    d = J^T v for the v that minimises v'Mv subject to v >= 1/K.

    Differences: the GEM paper projects the gradient of the present task, and its code adds a margin and 1e-3 to the
    diagonal; TorchJD adds 1e-4 trace(M), see `UPGrad`. Here it is 1e-13 ||g_i||^2 on every task.

    Hyper-parameters: none. Values for MT10 and MT50: unknown. No state. Cost: one solve (`solvers.dual_cone`).
    Diagnostics: `gap`.

    Identities: <g_i, d> >= 0 for all i, to a cosine of -1e-8 for the nearest to opposed gradients; <g0, d> = ||d||^2,
    so ||d|| <= ||g0||; if no task opposes g0, d = g0; homogeneous of degree 1; K identical gradients g give g; an
    opposed pair gives 0, and so does 0 inside the hull.
    """

    solver: Route = "auto"
    """Where the K x K problem is solved: host (numpy), device (torch, no host copy), or auto (host for CPU tensors)."""

    paper: ClassVar[str] = "Lopez-Paz and Ranzato 2017, arXiv 1706.08840"

    def __post_init__(self) -> None:
        check_choice("DualProj.solver", self.solver, ROUTES)

    def solve(self, given: Given) -> Aggregation:
        gramian = given.gramian
        side = torch.full_like(gramian[..., :1, :], 1.0 / gramian.shape[-1])
        projection = project_onto_dual_cone(gramian, side, given.active, self.solver, given.rounding)
        return Aggregation(projection.weights.squeeze(-2), {"gap": projection.gap})
