"""Rules in which every task meets every other one in a random order and may add a multiple of its gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mtrl_imgrad.aggregators.base import device_of

# ||p_i||^2 counts as zero at this fraction of (sum_j |C_ij| ||g_j||)^2, the error of C M C', besides M's own.
VANISHED = 1e-14


class Meeting(NamedTuple):
    """Every task i with its partner j of this step, p_i = sum_j C_ij g_j being what has become of g_i."""

    partner: Tensor
    """j, [*batch, tasks, 1]."""

    product: Float[Tensor, "*batch tasks 1"]
    """<p_i, g_j>."""

    partner_norm: Float[Tensor, "*batch tasks 1"]
    """||g_j||^2, 1 where it is 0."""

    coefficients: Float[Tensor, "*batch tasks tasks"]
    """C."""

    products: Float[Tensor, "*batch tasks tasks"]
    """<p_i, g_j> for every j."""

    meets: Bool[Tensor, "*batch tasks 1"]
    """False where j = i or a gradient is missing."""


def meet_in_turn(
    gramian: Float[Tensor, "*batch tasks tasks"],
    noise: Tensor | None,
    multiple: Callable[[Meeting], Float[Tensor, "*batch tasks 1"]],
) -> Float[Tensor, "*batch tasks tasks"]:
    """C after task i, for each i, has met its partners in the order in which row i of `noise` sorts them.

    All tasks meet their step-th partner at once, which is exact because g_j itself is added, never p_j: K vectorised
    steps, O(K^3) in all.

    Args:
        gramian: M, with zero rows for tasks without gradient.
        noise: from `draw_orders`.
        multiple: what to add of g_j to p_i; it is ignored where `meets` is false.

    Raises:
        ValueError: the noise does not have M's shape.
    """
    num_tasks = gramian.shape[-1]
    if noise is None or noise.shape[-2:] != gramian.shape[-2:]:
        shape = None if noise is None else tuple(noise.shape)
        raise ValueError(f"noise: got {shape}, need [..., {num_tasks}, {num_tasks}] as drawn by draw_noise")
    order = noise.expand(gramian.shape).argsort(-1)
    squared_norms = gramian.diagonal(dim1=-2, dim2=-1)[..., None, :].expand(gramian.shape)
    own = torch.arange(num_tasks, device=gramian.device)[:, None]
    present = gramian.diagonal(dim1=-2, dim2=-1)[..., :, None] > 0
    coefficients = torch.eye(num_tasks, dtype=gramian.dtype, device=gramian.device).expand(gramian.shape)
    products = gramian
    for step in range(num_tasks):
        partner = order[..., step : step + 1]
        squared_norm = squared_norms.gather(-1, partner)
        meets = (partner != own) & (squared_norm > 0) & present
        meeting = Meeting(
            partner,
            products.gather(-1, partner),
            torch.where(meets, squared_norm, 1.0),
            coefficients,
            products,
            meets,
        )
        shift = torch.where(meets, multiple(meeting), 0.0)
        coefficients = coefficients.scatter_add(-1, partner, shift)
        products = products + shift * gramian.take_along_dim(partner, dim=-2)
    return coefficients


def draw_orders(num_tasks: int, generator: torch.Generator | None) -> Float[Tensor, "tasks tasks"]:
    """Uniform numbers on the generator's device; row i, sorted, is the order in which task i meets its partners."""
    return torch.rand(num_tasks, num_tasks, generator=generator, dtype=torch.float64, device=device_of(generator))


def current_norms(
    meeting: Meeting, lengths: Float[Tensor, "*batch tasks"], rounding: float = 0.0
) -> Float[Tensor, "*batch tasks 1"]:
    """||p_i||, 0 where nothing but rounding error is left of it; `lengths` are the ||g_j||, `rounding` is M's."""
    squared = (meeting.coefficients * meeting.products).sum(-1, keepdim=True)
    largest = (meeting.coefficients.abs() * lengths[..., None, :]).sum(-1, keepdim=True)
    return torch.where(squared > (VANISHED + 2.0 * rounding) * largest**2, squared, 0.0).sqrt()
