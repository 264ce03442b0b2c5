"""All K per-task gradients of the shared parameters, for about the price of one backward pass.

Task k's loss depends on task k's rows only, so one backward pass of `sum_k L_k` down to each layer's output already
holds every `dL_k / dy` in its own rows; a batched matrix product per layer turns them into the rows of J. The backward
pass skips the weight gradients that it would otherwise have computed, so nothing is computed twice. (K separate
backward passes over the whole batch, as in the literature's codes, cost K times as much.)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from mtrl_imgrad.networks import Layout, Tape, Use


@dataclass(frozen=True)
class TaskGradients:
    """The Jacobian J [K, P_shared] as blocks, one per parameter, and the gradient of each task's own parameters.

    Attributes:
        shared: blocks `[members, K, size]`, in the order of the layout's shared slots.
        own: blocks `[members, K, size]` in the order of the layout's other slots, task k's gradient of its own
            parameters in row k.
    """

    shared: list[Float[Tensor, "members tasks size"]]
    own: list[Float[Tensor, "members tasks size"]]

    def gramian(self) -> Float64[Tensor, "tasks tasks"]:
        """M = J J^T. Block products in the gradients' dtype, summed in float64."""
        return torch.stack([(block @ block.mT).sum(0).double() for block in self.shared]).sum(0)

    def combine(
        self, weights: Float[Tensor, " tasks"], own_weights: Float[Tensor, " tasks"] | None = None
    ) -> Float[Tensor, " parameters"]:
        """The direction for the whole vector: `J^T weights` for the shared part, and each task's own gradient times
        its entry of `own_weights`, by default 1/K.

        With weights 1/K it is exactly the gradient of the mean loss.
        """
        shared = [torch.matmul(weights.to(block.dtype), block).flatten() for block in self.shared]
        return torch.cat([*shared, self.own_direction(own_weights)])

    def own_direction(self, own_weights: Float[Tensor, " tasks"] | None = None) -> Float[Tensor, " own"]:
        """The part of `combine` that belongs to single tasks."""
        if own_weights is None:
            parts = [block.flatten() / block.shape[1] for block in self.own]
        else:
            parts = [(block * own_weights.to(block.dtype)[:, None]).flatten() for block in self.own]
        return torch.cat(parts) if parts else self.shared[0].new_zeros(0)

    def dense(self) -> Float[Tensor, "tasks shared"]:
        """J as one matrix, its columns in the order of the vector's shared part."""
        return torch.cat([block.transpose(0, 1).flatten(1) for block in self.shared], dim=1)


def task_gradients(losses: Float[Tensor, " tasks"], tape: Tape, layout: Layout) -> TaskGradients:
    """Differentiate every task's loss with respect to every parameter of `layout`, by one backward pass.

    Args:
        losses: one loss per task; task k's must depend on rows k of the taped activations only.
        tape: the uses of the layout's parameters in the forward pass of these losses.
        layout: the network's parameters.
    """
    output_gradients = torch.autograd.grad(losses.sum(), [use.output for use in tape.uses])
    by_name: dict[str, Tensor] = {}
    for use, gradient in zip(tape.uses, output_gradients, strict=True):
        by_name |= _parameter_gradients(use, gradient)
    shared = [by_name[slot.name].flatten(2) for slot in layout.slots if slot.shared]
    own = [by_name[slot.name].flatten(2) for slot in layout.slots if not slot.shared]
    return TaskGradients(shared, own)


def _parameter_gradients(use: Use, gradient: Float[Tensor, "members tasks rows outputs"]) -> dict[str, Tensor]:
    """Per-task gradients `[members, tasks, ...]` of the parameters of one use."""
    if use.kind == "linear":
        weight = (use.input.mT @ gradient.to(use.input.dtype)).to(gradient.dtype)
    else:
        weight = (use.input * gradient).sum(2)
    return {f"{use.name}.weight": weight, f"{use.name}.bias": gradient.sum(2)}
