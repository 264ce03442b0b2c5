"""IMTL-G: the direction on which all task gradients have equal projections (Liu et al. 2021, ICLR)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from mtrl_imgrad.aggregators.base import Aggregation, Aggregator, Given
from mtrl_imgrad.aggregators.solvers.active_set import near_zero
from mtrl_imgrad.aggregators.solvers.correlations import correlations

# Normalised weights that cancel in their sum to this fraction have no affine combination of finite length.
CANCELLED = 1e-8


@dataclass(frozen=True)
class IMTLG(Aggregator):
    """Weights alpha of sum 1 with <d, g_i / ||g_i||> the same for all tasks, d = J^T alpha.

    In terms of the cosines C = M_ij / (||g_i|| ||g_j||): alpha_i is y_i / ||g_i||, normalised, with C y = 1. The paper
    writes it as alpha_2..K = g_1 U' (D U')^-1 with rows u_1 - u_i of U and g_1 - g_i of D; the two are equal. d points
    to the point of the affine hull of the unit gradients that is nearest to 0.

    Differences: the published code inverts D U' (it fails where rows are dependent), TorchJD takes a pseudo-inverse and
    returns rounding noise of any size where y vanishes. Here C carries a ridge of 1e-13, and duplicate gradients share
    a weight. If the affine hull of the unit gradients contains 0 (squared distance <= 1e-10, more for a Gramian that is
    known less well; in general so for more tasks than dimensions) no direction but 0 has equal projections: d = 0. So
    too where the weights cancel in their sum. The paper's IMTL-L is not part of it.

    Weights may be negative, and if sum_i y_i / ||g_i|| is, then d is uphill for every task alike: a property of the
    method, visible in the diagnostic `projection` (the common <d, g_i / ||g_i||> over the root mean square norm).

    Hyper-parameters: none. Values for MT10 and MT50: none. No state. Cost: one Cholesky factorisation. Diagnostics:
    `projection`.

    Identities: homogeneous of degree 1; scaling single gradients by positive numbers keeps the direction up to its
    sign; K identical gradients g give g.
    """

    paper: ClassVar[str] = "Liu et al. 2021, ICLR"

    def solve(self, given: Given) -> Aggregation:
        cosines = correlations(given.gramian, given.active)
        ones = given.active.to(torch.float64)
        unit = ones * torch.cholesky_solve(ones[..., None], cosines.factor).squeeze(-1)
        weights = unit / cosines.norms
        total = weights.sum(-1, keepdim=True)
        closeness = unit.sum(-1, keepdim=True)  # 1 / the squared distance of 0 from the affine hull
        defined = (
            (closeness > 0)
            & (closeness * near_zero(given.rounding + cosines.ridge)[..., None] < 1)
            & (total.abs() > CANCELLED * weights.abs().sum(-1, keepdim=True))
        )
        weights = torch.where(defined, weights / torch.where(defined, total, 1.0), 0.0)
        projections = ones * (given.gramian @ weights[..., None]).squeeze(-1) / cosines.norms
        return Aggregation(weights, {"projection": projections.sum(-1) / ones.sum(-1)})
