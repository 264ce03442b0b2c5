"""AdaTask: Adam with moments of each task's own for the shared parameters (Yang et al. 2023)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from mtrl_imgrad.aggregators.base import Aggregation, Aggregator, Given, Needs, State, check_choice, check_range

Combine = Literal["mean", "sum"]
COMBINES: tuple[Combine, ...] = ("mean", "sum")


@dataclass(frozen=True)
class AdaTask(Aggregator):
    """u_i = mhat_i / (sqrt(vhat_i) + eps), m_i and v_i being Adam's moments of g_i alone; d = mean or sum of the u_i.

    It is an optimiser rather than a rule: the learner multiplies d by the learning rate and does nothing else to it (no
    clip by `sac.max_grad_norm`, no second Adam; decoupled weight decay stays). Each task's own parameters get ordinary
    Adam, as in the published code, which sums. The sum's steps are up to K times as long as Adam's, so the default is
    the mean. The paper has AdaGrad and RMSProp forms too; this is the Adam form.

    Values for RL are unknown; Adam's are torch's defaults, as in the published code. State: m, v [K, P] and the count
    of calls, i.e. 2 K P numbers for the critics and as many for the actor. Needs J; cost O(K P). The logged weight of a
    task is its share of the steps' length, ||u_i|| / sum_j ||u_j||.

    Identities: K = 1 is Adam; K identical gradients give Adam's step (K times it for `sum`); a constant factor on a
    task's loss changes nothing, eps aside, so directions are homogeneous of degree 0.
    """

    needs: ClassVar[Needs] = "jacobian"
    paper: ClassVar[str] = "Yang et al. 2023, arXiv 2211.15055"
    preconditioned: ClassVar[bool] = True

    combine: Combine = "mean"
    """Whether the tasks' steps are averaged or summed (published code)."""

    beta1: float = 0.9
    """Adam's decay rate of the first moments."""

    beta2: float = 0.999
    """Adam's decay rate of the second moments."""

    eps: float = 1e-8
    """Adam's epsilon."""

    def __post_init__(self) -> None:
        check_choice("AdaTask.combine", self.combine, COMBINES)
        for name in ("beta1", "beta2"):
            check_range(f"AdaTask.{name}", getattr(self, name), 0.0, 1 - 1e-12)
        check_range("AdaTask.eps", self.eps, 1e-30, 1.0)

    def initial_state(self, shape: tuple[int, ...], parameters: int) -> State:
        moments = torch.zeros(*shape, parameters)
        return {"m": moments, "v": moments.clone(), "calls": torch.zeros((), dtype=torch.float64)}

    def solve(self, given: Given) -> Aggregation:
        rows, calls = given.jacobian, given.state["calls"] + 1
        assert rows is not None
        m = torch.lerp(given.state["m"].to(rows.dtype), rows, 1 - self.beta1)
        v = torch.lerp(given.state["v"].to(rows.dtype), rows * rows, 1 - self.beta2)
        correction_m = (1 - self.beta1**calls).to(rows.dtype)
        correction_v = (1 - self.beta2**calls).to(rows.dtype)
        steps = m / correction_m / ((v / correction_v).sqrt() + self.eps)
        direction = steps.mean(0) if self.combine == "mean" else steps.sum(0)
        lengths = steps.norm(dim=-1).double()
        total = lengths.sum()
        return Aggregation(
            lengths / torch.where(total > 0, total, 1.0), state={"m": m, "v": v, "calls": calls}, direction=direction
        )
