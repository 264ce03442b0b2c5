"""FAMO: all losses made to fall at the same relative rate, from losses alone (Liu et al. 2023)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from mtrl_imgrad.aggregators.base import Aggregation, Aggregator, Given, Needs, State, check_choice, check_range
from mtrl_imgrad.aggregators.weight_optimiser import adam, initial_adam

Variant = Literal["paper", "official_rl"]
VARIANTS: tuple[Variant, ...] = ("paper", "official_rl")
EPSILON = 1e-8
"""Added to every loss, as in the published codes."""


@dataclass(frozen=True)
class FAMO(Aggregator):
    """z = softmax(xi), c = sum_j z_j / L_j; after the step xi learns from what became of the losses.

    Weights, from the gradient of sum_i z_i log L_i divided by c (Algorithm 1), or, in the published RL code, times c:

    * paper: w_i = z_i / (L_i c), a convex combination
    * official_rl: w_i = c z_i / L_i, whose sum is c^2: small losses make large steps

    Then, with L' the losses on the same batch, against the same targets, after the step: delta_i = log L_i - log L'_i,
    and xi takes an Adam step along (diag(z) - z z^T) delta + gamma xi: a task whose loss fell more gets less.

    1e-8 is added to every loss, as in the codes; the paper's lower bounds of the losses are 0, which a critic's loss
    never undercuts. The RL code applies the rule to the critics alone and takes the mean for the actor, as here; it
    keeps the graph of the old loss alive, and clips the update's norm at 1: see `sac.max_grad_norm`.

    Values: its MT10 command has gamma = 0.01 and w_lr = 0.025 (its configuration file .001 and .01); for MT50 none is
    known. State: xi and its Adam. Cost O(K), and one more forward pass of the critics. Used by hand, an object learns
    by `load_state_dict(after_step(state_dict(), losses, new_losses))`.

    Identities: `paper`: sum w = 1, K identical gradients g give g (`official_rl`: c^2 g), a factor on all losses
    changes nothing (`official_rl`: a factor s divides w by s^2); xi = 0: w_i ~ 1 / L_i; equal relative falls leave only
    the decay.
    """

    needs: ClassVar[Needs] = "losses"
    paper: ClassVar[str] = "Liu et al. 2023, arXiv 2306.03792"
    critic_only: ClassVar[bool] = True
    sees_new_losses: ClassVar[bool] = True

    variant: Variant = "paper"
    """Whether the sum of logarithms is divided by c (paper) or multiplied by it (published RL code)."""

    gamma: float = 0.01
    """Weight decay of xi (published MT10 command: 0.01)."""

    w_lr: float = 0.025
    """Adam step size of xi (published MT10 command: 0.025)."""

    def __post_init__(self) -> None:
        check_choice("FAMO.variant", self.variant, VARIANTS)
        check_range("FAMO.gamma", self.gamma, 0.0, 100.0)
        check_range("FAMO.w_lr", self.w_lr, 0.0, 1.0)

    def initial_state(self, shape: tuple[int, ...], parameters: int) -> State:
        return initial_adam("logits", shape)

    def solve(self, given: Given) -> Aggregation:
        assert given.losses is not None
        shares = given.state["logits"].softmax(-1) / (given.losses + EPSILON)
        total = shares.sum(-1, keepdim=True)
        weights = shares / total if self.variant == "paper" else shares * total
        return Aggregation(weights, own_weights=weights)

    def after_step(self, state: State, losses: Tensor, new_losses: Tensor) -> State:
        shares = state["logits"].softmax(-1)
        fall = (losses.double() + EPSILON).log() - (new_losses.double() + EPSILON).log()
        slope = shares * (fall - (shares * fall).sum(-1, keepdim=True)) + self.gamma * state["logits"]
        return dict(state) | adam(state, "logits", slope, self.w_lr)
