"""MoCo: the minimum-norm weights tracked step by step, on gradients averaged over time (Fernando et al. 2023)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from mtrl_imgrad.aggregators.base import Aggregation, Aggregator, Given, Needs, State, check_choice, check_range
from mtrl_imgrad.aggregators.solvers.projection import project_onto_simplex

Projection = Literal["simplex", "softmax"]
Normalization = Literal["gramian", "none"]
PROJECTIONS: tuple[Projection, ...] = ("simplex", "softmax")
NORMALIZATIONS: tuple[Normalization, ...] = ("gramian", "none")


@dataclass(frozen=True)
class MoCo(Aggregator):
    """In call t: Y <- Y - beta_t (Y - H); w <- projection(w - gamma_t (Y Y^T + rho I) w); d = Y^T w.

    beta_t = beta / t^beta_decay, gamma_t = gamma / t^gamma_decay; rows of H are the task gradients g_i, Y starts at 0
    and w at 1/K.

    Options: the paper projects onto the simplex; LibMTL's code, by the authors, takes a softmax instead, which draws w,
    already on the simplex, towards 1/K (`projection`). `normalization` decides what gamma is relative to: `gramian`
    divides Y Y^T by its mean diagonal, so that the scale of the gradients does not matter; `none` is the paper's.

    Left out: in LibMTL's code H has rows L_i g_i / ||g_i||. The paper has no such factor, and an actor's loss may be
    negative, where it would lead uphill.

    A task without gradient in a call has weight 0 in it; as a row of zeros it would draw all the weight.

    Values for RL are unknown; the defaults are LibMTL's beta = .5 / t^.5, gamma = .1 / t^.5, rho = 0. State: Y [K, P],
    w, t. Needs J. Cost O(K^2 P). The logged weights are w.

    Identities: beta = 1, beta_decay = 0 gives Y = H, then gamma = 0 gives the mean and K identical gradients g give g;
    homogeneous of degree 1 for `gramian` (`none`: if gamma and rho are rescaled); w lies on the simplex. As Y starts at
    0, the first directions are short.
    """

    needs: ClassVar[Needs] = "jacobian"
    paper: ClassVar[str] = "Fernando et al. 2023, arXiv 2210.12624"

    beta: float = 0.5
    """Step of the gradient average in the first call (0 to 1)."""

    beta_decay: float = 0.5
    """Exponent with which that step falls over the calls."""

    gamma: float = 0.1
    """Step of the weights in the first call."""

    gamma_decay: float = 0.5
    """Exponent with which that step falls over the calls."""

    rho: float = 0.0
    """Regularisation of the weights towards 1/K."""

    projection: Projection = "simplex"
    """How the weights return to the simplex: nearest point (paper) or softmax (LibMTL)."""

    normalization: Normalization = "gramian"
    """What the gradients are divided by in the step of the weights: gramian, their root mean square norm; none."""

    def __post_init__(self) -> None:
        check_range("MoCo.beta", self.beta, 0.0, 1.0)
        check_range("MoCo.gamma", self.gamma, 0.0, 1e30)
        for name in ("beta_decay", "gamma_decay"):
            check_range(f"MoCo.{name}", getattr(self, name), 0.0, 10.0)
        check_range("MoCo.rho", self.rho, 0.0, 1e30)
        check_choice("MoCo.projection", self.projection, PROJECTIONS)
        check_choice("MoCo.normalization", self.normalization, NORMALIZATIONS)

    def initial_state(self, shape: tuple[int, ...], parameters: int) -> State:
        return {
            "tracked": torch.zeros(*shape, parameters),
            "weights": torch.full(shape, 1.0 / shape[-1], dtype=torch.float64),
            "calls": torch.zeros((), dtype=torch.float64),
        }

    def solve(self, given: Given) -> Aggregation:
        rows = given.jacobian
        assert rows is not None
        calls, weights = given.state["calls"] + 1, given.state["weights"]
        tracked = given.state["tracked"].to(rows.dtype)
        tracked = tracked + (self.beta / calls**self.beta_decay).to(rows.dtype) * (rows - tracked)
        products = (tracked @ tracked.mT).double()
        if self.normalization == "gramian":
            size = products.diagonal().mean()
            products = products / torch.where(size > 0, size, torch.inf)
        gamma = self.gamma / calls**self.gamma_decay
        moved = weights - gamma * (products @ weights + self.rho * weights)
        present = given.active & (tracked.abs().amax(-1) > 0)
        moved = torch.where(present | ~present.any(), moved, -torch.inf)
        weights = project_onto_simplex(moved) if self.projection == "simplex" else moved.softmax(-1)
        state = {"tracked": tracked, "weights": weights, "calls": calls}
        return Aggregation(weights, state=state, direction=weights.to(rows.dtype) @ tracked)
