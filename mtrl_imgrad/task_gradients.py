"""All K per-task gradients of the shared parameters, for about the price of one backward pass.

Task k's loss depends on task k's rows only, so one backward pass of `sum_k L_k` down to each layer's output already
holds every `dL_k / dy` in its own rows; a batched matrix product per layer turns them into the rows of J. The backward
pass skips the weight gradients that it would otherwise have computed, so nothing is computed twice. (K separate
backward passes over the whole batch, as in the literature's codes, cost K times as much.)

`TaskGradients` holds J between the Gramian and the direction. `ChunkedTaskGradients` makes it piece by piece for the
Gramian alone, and the direction by one more product per layer, of rows scaled by their task's weight.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from mtrl_imgrad.networks import Layout, Tape, Use

Block = Float[Tensor, "members tasks size"]
PIECE = 2**24
"""Numbers of J that `ChunkedTaskGradients` holds at a time, where a layer has more: 64 MiB in float32."""

LONGEST = 400
"""Numbers of a row that one float32 product of the Gramian sums at most."""

ROUNDINGS = 4
"""Times the machine epsilon: the largest error of the Gramian's entries."""


@dataclass(frozen=True)
class Gradients(ABC):
    """K gradients with respect to the shared parameters, and each task's gradient of its own parameters.

    Attributes:
        own: blocks of the layout's slots that are not shared, in its order; task k's gradient in row k.
    """

    own: list[Block]

    @abstractmethod
    def gramian(self) -> Float64[Tensor, "tasks tasks"]:
        """M = J J^T. Products in the gradients' dtype, over pieces of J, summed in float64."""

    @property
    @abstractmethod
    def rounding(self) -> float:
        """The relative error of M's entries, see `block_gramian`."""

    @abstractmethod
    def combine_shared(self, weights: Float[Tensor, " tasks"]) -> Float[Tensor, " shared"]:
        """J^T weights, in the gradients' dtype."""

    def combine(
        self, weights: Float[Tensor, " tasks"], own_weights: Float[Tensor, " tasks"] | None = None
    ) -> Float[Tensor, " parameters"]:
        """The direction for the whole vector: `J^T weights` for the shared part, and each task's own gradient times
        its entry of `own_weights`, by default 1/K.

        With weights 1/K it is exactly the gradient of the mean loss.
        """
        return torch.cat([self.combine_shared(weights), *self.own_parts(own_weights)])

    def own_parts(self, own_weights: Float[Tensor, " tasks"] | None = None) -> list[Float[Tensor, " size"]]:
        """The part of `combine` that belongs to single tasks, slot by slot."""
        if own_weights is None:
            return [block.flatten() / block.shape[1] for block in self.own]
        return [(block * own_weights.to(block.dtype)[:, None]).flatten() for block in self.own]


@dataclass(frozen=True)
class TaskGradients(Gradients):
    """The whole Jacobian J [K, P_shared].

    Attributes:
        shared: blocks of the layout's shared slots, in its order.
    """

    shared: list[Block]

    def gramian(self) -> Float64[Tensor, "tasks tasks"]:
        return torch.stack([block_gramian(block) for block in self.shared]).sum(0)

    @property
    def rounding(self) -> float:
        return ROUNDINGS * torch.finfo(self.shared[0].dtype).eps

    def combine_shared(self, weights: Float[Tensor, " tasks"]) -> Float[Tensor, " shared"]:
        return torch.cat([torch.matmul(weights.to(block.dtype), block).flatten() for block in self.shared])

    def dense(self) -> Float[Tensor, "tasks shared"]:
        """J as one matrix, its columns in the order of the vector's shared part."""
        return torch.cat([block.transpose(0, 1).flatten(1) for block in self.shared], dim=1)


@dataclass(frozen=True)
class ChunkedTaskGradients(Gradients):
    """J in pieces, never whole.

    Attributes:
        uses: the uses of shared parameters, with the gradients of the losses at their outputs.
        layout: the network's parameters.
    """

    uses: list[tuple[Use, Tensor]]
    layout: Layout

    def gramian(self) -> Float64[Tensor, "tasks tasks"]:
        blocks = (block for use, gradient in self.uses for block in pieces(use, gradient))
        return torch.stack([block_gramian(block) for block in blocks]).sum(0)

    @property
    def rounding(self) -> float:
        return ROUNDINGS * torch.finfo(self.uses[0][1].dtype).eps

    def combine_shared(self, weights: Float[Tensor, " tasks"]) -> Float[Tensor, " shared"]:
        by_name: dict[str, Tensor] = {}
        for use, gradient in self.uses:
            scaled = gradient * weights.to(gradient.dtype)[:, None, None]
            if use.kind == "linear":
                rows = use.input.flatten(1, 2)
                weight = (rows.mT @ scaled.flatten(1, 2).to(rows.dtype)).to(gradient.dtype)
            else:
                weight = (use.input * scaled).sum((1, 2))
            by_name |= {f"{use.name}.weight": weight, f"{use.name}.bias": scaled.sum((1, 2))}
        return torch.cat([by_name[slot.name].flatten() for slot in self.layout.slots if slot.shared])


def task_gradients(losses: Float[Tensor, " tasks"], tape: Tape, layout: Layout) -> TaskGradients:
    """Differentiate every task's loss with respect to every parameter of `layout`, by one backward pass.

    Args:
        losses: one loss per task; task k's must depend on rows k of the taped activations only.
        tape: the uses of the layout's parameters in the forward pass of these losses.
        layout: the network's parameters.
    """
    by_name: dict[str, Tensor] = {}
    for use, gradient in output_gradients(losses, tape):
        by_name |= parameter_gradients(use, gradient)
    shared = [by_name[slot.name].flatten(2) for slot in layout.slots if slot.shared]
    own = [by_name[slot.name].flatten(2) for slot in layout.slots if not slot.shared]
    return TaskGradients(own, shared)


def chunked_task_gradients(losses: Float[Tensor, " tasks"], tape: Tape, layout: Layout) -> ChunkedTaskGradients:
    """`task_gradients` without the whole of J."""
    is_shared = {slot.name: slot.shared for slot in layout.slots}
    uses, by_name = [], {}
    for use, gradient in output_gradients(losses, tape):
        if is_shared[f"{use.name}.weight"]:
            uses.append((use, gradient))
        else:
            by_name |= parameter_gradients(use, gradient)
    own = [by_name[slot.name].flatten(2) for slot in layout.slots if not slot.shared]
    return ChunkedTaskGradients(own, uses, layout)


def output_gradients(losses: Float[Tensor, " tasks"], tape: Tape) -> list[tuple[Use, Tensor]]:
    """The gradient of `sum_k L_k` at every use's output."""
    return list(zip(tape.uses, torch.autograd.grad(losses.sum(), [use.output for use in tape.uses]), strict=True))


def parameter_gradients(use: Use, gradient: Float[Tensor, "members tasks rows outputs"]) -> dict[str, Tensor]:
    """Per-task gradients `[members, tasks, ...]` of the parameters of one use."""
    if use.kind == "linear":
        weight = (use.input.mT @ gradient.to(use.input.dtype)).to(gradient.dtype)
    else:
        weight = (use.input * gradient).sum(2)
    return {f"{use.name}.weight": weight, f"{use.name}.bias": gradient.sum(2)}


def pieces(use: Use, gradient: Float[Tensor, "members tasks rows outputs"]) -> Iterator[Block]:
    """`parameter_gradients` in blocks of at most PIECE numbers, split along a layer's inputs."""
    yield gradient.sum(2)
    if use.kind == "scale":
        yield (use.input * gradient).sum(2)
        return
    members, tasks, _, outputs = gradient.shape
    taken = gradient.to(use.input.dtype)
    for columns in use.input.split(max(1, PIECE // (members * tasks * outputs)), dim=-1):
        yield (columns.mT @ taken).to(gradient.dtype).flatten(2)


def block_gramian(block: Block) -> Float64[Tensor, "tasks tasks"]:
    """The block's part of M. Rows are multiplied in pieces of a few hundred numbers, which are summed in float64: for
    opposed gradients of 160,000 numbers one float32 product is off by 5e-6 of their squared norm, this by 1e-8."""
    whole = block.shape[-1] // LONGEST * LONGEST
    products = []
    for member in block:
        parts = member[:, :whole].unflatten(-1, (-1, LONGEST)).transpose(0, 1)
        rest = member[:, whole:]
        products += [torch.bmm(parts, parts.mT).double().sum(0), (rest @ rest.mT).double()]
    return torch.stack(products).sum(0)
