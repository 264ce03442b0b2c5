"""Six families of per-task gradients J [tasks, P], and the rules that the tests run over them."""

from __future__ import annotations

import torch
from torch import Tensor

from mtrl_imgrad.aggregators import (
    IMTLG,
    MGDA,
    Aggregator,
    AlignedMTL,
    CAGrad,
    ConicGrad,
    DualProj,
    FairGrad,
    IMGrad,
    IMGradNash,
    Mean,
    NashMTL,
    PCGrad,
    Sum,
    UPGrad,
)

FAMILIES = ("gauss", "shared", "imbalanced", "parallel", "conflict", "lowrank")
ROUTES = ("host", "device")


def gradients(family: str, num_tasks: int, seed: int = 0) -> Tensor:
    """float64 gradients of length 4 K + 7; `lowrank` has rank min(K, 5), so 0 lies in the hull for larger K."""
    generator = torch.Generator().manual_seed(seed)
    length = 4 * num_tasks + 7

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    rows, common = normal(num_tasks, length), normal(length)
    if family == "gauss":
        return rows
    if family == "shared":
        return rows + 2.0 * common
    if family == "imbalanced":
        return rows * torch.logspace(-2, 2, num_tasks, dtype=torch.float64)[:, None]
    if family == "parallel":
        return common + 1e-3 * rows
    if family == "conflict":
        return rows - 0.8 * rows.mean(0)
    if family == "lowrank":
        return normal(num_tasks, min(num_tasks, 5)) @ normal(min(num_tasks, 5), length)
    raise ValueError(family)


# Every rule under every variant; the ids are read in test names.
RULES: dict[str, Aggregator] = {
    "mean": Mean(),
    "sum": Sum(),
    "pcgrad": PCGrad(),
    "mgda": MGDA(),
    "cagrad": CAGrad(),
    "imtlg": IMTLG(),
    "nashmtl": NashMTL(),
    "fairgrad": FairGrad(),
    "alignedmtl-min": AlignedMTL(),
    "alignedmtl-median": AlignedMTL(scale_mode="median"),
    "alignedmtl-rmse": AlignedMTL(scale_mode="rmse"),
    "upgrad": UPGrad(),
    "dualproj": DualProj(),
    "imgrad-official": IMGrad(variant="official"),
    "imgrad-eq9": IMGrad(variant="eq9"),
    "imgrad-eq11": IMGrad(variant="eq11"),
    "imgrad-nash": IMGradNash(),
    "conicgrad": ConicGrad(),
    "conicgrad-mgda-regime": ConicGrad(c=0.05),
}
SOLVED = (
    "mgda",
    "cagrad",
    "upgrad",
    "dualproj",
    "imgrad-official",
    "imgrad-eq9",
    "imgrad-eq11",
    "conicgrad",
    "conicgrad-mgda-regime",
)


def direction(rule: Aggregator, jacobian: Tensor, noise: Tensor | None = None) -> Tensor:
    """d = J^T weights."""
    return rule(jacobian @ jacobian.mT, noise).weights @ jacobian


def noise_for(rule: Aggregator, num_tasks: int, seed: int = 0) -> Tensor | None:
    return rule.draw_noise(num_tasks, torch.Generator().manual_seed(seed))


def relative_error(given: Tensor, expected: Tensor) -> float:
    return float((given - expected).norm() / expected.norm())
