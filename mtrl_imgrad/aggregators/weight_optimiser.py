"""Adam (Kingma and Ba 2015) for the few numbers that a rule learns by itself, one per task."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from mtrl_imgrad.aggregators.base import State

BETAS = (0.9, 0.999)
EPSILON = 1e-8
"""torch's defaults, which the published codes leave as they are."""


def initial_adam(name: str, shape: tuple[int, ...]) -> State:
    """Zeros called `name`, and Adam's memory of them."""
    return {
        name: torch.zeros(shape, dtype=torch.float64),
        "adam_m": torch.zeros(shape, dtype=torch.float64),
        "adam_v": torch.zeros(shape, dtype=torch.float64),
        "adam_step": torch.zeros((), dtype=torch.float64),
    }


def adam(state: State, name: str, gradient: Float[Tensor, "*batch tasks"], lr: float) -> State:
    """`state[name]` one step further, as torch.optim.Adam takes it; new tensors."""
    step = state["adam_step"] + 1
    m = BETAS[0] * state["adam_m"] + (1 - BETAS[0]) * gradient
    v = BETAS[1] * state["adam_v"] + (1 - BETAS[1]) * gradient * gradient
    root = (v / (1 - BETAS[1] ** step)).sqrt() + EPSILON
    value = state[name] - lr / (1 - BETAS[0] ** step) * m / root
    return {name: value, "adam_m": m, "adam_v": v, "adam_step": step}
