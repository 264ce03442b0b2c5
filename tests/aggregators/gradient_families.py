"""Seven families of per-task gradients J [tasks, P], and the rules that the tests run over them."""

from __future__ import annotations

import dataclasses
from collections import UserDict
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mtrl_imgrad.aggregators import (
    IMTLG,
    MGDA,
    RLW,
    Aggregator,
    AlignedMTL,
    CAGrad,
    CAGradFast,
    ConFIG,
    ConicGrad,
    DualProj,
    FairGrad,
    GradVac,
    IMGrad,
    IMGradNash,
    Mean,
    NashMTL,
    PCGrad,
    SDMGrad,
    SDMGradOS,
    Sum,
    UPGrad,
)

FULL_RANK = ("gauss", "shared", "imbalanced", "parallel", "conflict")
FAMILIES = (*FULL_RANK, "lowrank", "mt10")
ROUTES = ("host", "device")


LOGGED = Path(__file__).parents[1] / "data" / "mt10_gramians.npz"
USED = 12
"""Logged Gramians that the tests use, half of them of the critics, evenly spaced over the training."""


@cache
def logged_gramians() -> Tensor:
    """A few of the Gramians that scripts/log_gramians.py kept, in the order of the training."""
    with np.load(LOGGED) as file:
        chosen = np.linspace(0, len(file["steps"]) - 1, USED // 2).astype(int)
        pairs = np.stack([file["critic"][chosen], file["actor"][chosen]], axis=1)
    return torch.from_numpy(pairs.reshape(USED, *pairs.shape[-2:]))


def mt10_gradients(num_tasks: int, length: int, generator: torch.Generator, seed: int) -> Tensor:
    """Some tasks of a logged Gramian, in a random order, as rows in a random orthonormal frame. More tasks than ten are
    those of several Gramians at root mean square norm 1, each in a frame of its own."""
    blocks: list[Tensor] = []
    for block in range(-(-num_tasks // 10)):
        gramian = logged_gramians()[(seed + block) % USED]
        factor = torch.linalg.cholesky(gramian / (gramian.diagonal().mean() if num_tasks > 10 else 1.0))
        frame, _ = torch.linalg.qr(torch.randn(length, 10, generator=generator, dtype=torch.float64))
        order = torch.randperm(10, generator=generator)[: num_tasks - 10 * block]
        blocks.append(factor[order] @ frame.mT)
    return torch.cat(blocks)


def gradients(family: str, num_tasks: int, seed: int = 0) -> Tensor:
    """float64 gradients of length 4 K + 7; `lowrank` has rank min(K, 5), so 0 lies in the hull for larger K; `mt10` has
    the inner products of gradients in training."""
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
    if family == "mt10":
        return mt10_gradients(num_tasks, length, generator, seed)
    raise ValueError(family)


class FreshRules(UserDict[str, Aggregator]):
    """Looked up, a rule has not been called yet, so a state that one test leaves cannot reach the next."""

    def __getitem__(self, name: str) -> Aggregator:
        return dataclasses.replace(super().__getitem__(name))


# Every rule under every variant; the ids are read in test names.
RULES = FreshRules(
    {
        "mean": Mean(),
        "sum": Sum(),
        "mgda": MGDA(),
        "pcgrad": PCGrad(),
        "gradvac": GradVac(),
        "cagrad": CAGrad(),
        "cagrad-fast": CAGradFast(n=3),
        "imtlg": IMTLG(),
        "nashmtl": NashMTL(),
        "fairgrad": FairGrad(),
        "alignedmtl-min": AlignedMTL(),
        "alignedmtl-median": AlignedMTL(scale_mode="median"),
        "alignedmtl-rmse": AlignedMTL(scale_mode="rmse"),
        "upgrad": UPGrad(),
        "dualproj": DualProj(),
        "sdmgrad": SDMGrad(),
        "sdmgrad-os": SDMGradOS(n=3),
        "imgrad-official": IMGrad(variant="official"),
        "imgrad-eq9": IMGrad(variant="eq9"),
        "imgrad-eq11": IMGrad(variant="eq11"),
        "imgrad-nash": IMGradNash(),
        "conicgrad": ConicGrad(),
        "conicgrad-mgda-regime": ConicGrad(c=0.05),
        "conicgrad-single-loop": ConicGrad(mode="single_loop"),
        "config": ConFIG(),
        "rlw": RLW(),
    }
)
SOLVED = (
    "mgda",
    "cagrad",
    "cagrad-fast",
    "upgrad",
    "dualproj",
    "sdmgrad",
    "sdmgrad-os",
    "imgrad-official",
    "imgrad-eq9",
    "imgrad-eq11",
    "conicgrad",
    "conicgrad-mgda-regime",
)
"""Those that report a gap, on both routes."""


def direction(rule: Aggregator, jacobian: Tensor, noise: Tensor | None = None) -> Tensor:
    """d = J^T weights at the rule's first call."""
    return dataclasses.replace(rule)(jacobian @ jacobian.mT, noise).weights @ jacobian


def noise_for(rule: Aggregator, num_tasks: int, seed: int = 0) -> Tensor | None:
    return rule.draw_noise(num_tasks, torch.Generator().manual_seed(seed))


def permuted(rule: Aggregator, noise: Tensor | None, order: Tensor) -> Tensor | None:
    """What the rule would have drawn, had the tasks come in another order."""
    if noise is None:
        return None
    return noise[order][:, order] if isinstance(rule, PCGrad | GradVac) else noise[..., order]


def relative_error(given: Tensor, expected: Tensor) -> float:
    return float((given - expected).norm() / expected.norm())
