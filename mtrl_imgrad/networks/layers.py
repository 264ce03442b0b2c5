"""Layers as functions of named parameters, and the tape from which per-task gradients are made.

Activations are `[members, tasks, rows, features]`: members is 2 for the twin critics and 1 for the actor, and task k's
rows only ever meet task k's loss. A tape notes, for every use of parameters, the layer's input and output;
`task_gradients` turns them and one backward pass into all K gradients.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from mtrl_imgrad.networks.layout import Slot

Activation = Float[Tensor, "members tasks rows features"]


@dataclass(frozen=True)
class Use:
    """One use of a parameter pair: `output = input (x) weight + bias`, with (x) a matrix product or an element-wise
    product."""

    kind: Literal["linear", "scale"]
    name: str
    input: Activation
    output: Activation


@dataclass
class Tape:
    """The uses of one forward pass, in order."""

    uses: list[Use] = field(default_factory=list)

    def record(self, kind: Literal["linear", "scale"], name: str, inputs: Tensor, output: Tensor) -> Tensor:
        """Note a use and return its output. Parameters carry no autograd state: the graph starts at the first recorded
        output."""
        if not output.requires_grad:
            output.requires_grad_()
        self.uses.append(Use(kind, name, inputs.detach(), output))
        return output


@dataclass(frozen=True)
class Linear:
    """`y = x W + b`, one weight for all tasks, or one per task where `tasks` is given.

    Matrix products run in `product_dtype`; the result returns to the input's dtype. Initial values are
    torch.nn.Linear's, U(-1/sqrt(inputs), 1/sqrt(inputs)).
    """

    name: str
    members: int
    inputs: int
    outputs: int
    tasks: int | None
    product_dtype: torch.dtype

    def slots(self) -> list[Slot]:
        lead = (self.members,) if self.tasks is None else (self.members, self.tasks)
        spread = self.inputs**-0.5
        shared = self.tasks is None
        return [
            Slot(f"{self.name}.weight", (*lead, self.inputs, self.outputs), shared, spread),
            Slot(f"{self.name}.bias", (*lead, self.outputs), shared, spread),
        ]

    def __call__(self, parameters: dict[str, Tensor], x: Activation, tape: Tape | None) -> Activation:
        weight, bias = parameters[f"{self.name}.weight"].to(self.product_dtype), parameters[f"{self.name}.bias"]
        taken = x.to(self.product_dtype)
        if self.tasks is None:
            product = torch.bmm(taken.flatten(1, 2), weight).view(*x.shape[:-1], self.outputs)
            output = product.to(x.dtype) + bias[:, None, None, :]
        else:
            output = (taken @ weight).to(x.dtype) + bias[:, :, None, :]
        return output if tape is None else tape.record("linear", self.name, taken, output)


@dataclass(frozen=True)
class LayerNorm:
    """Layer normalisation over the features (Ba et al. 2016); `affine` adds a learned scale and shift, shared between
    tasks."""

    name: str
    members: int
    width: int
    affine: bool

    def slots(self) -> list[Slot]:
        shape = (self.members, self.width)
        pair = [Slot(f"{self.name}.weight", shape, True, 0.0, 1.0), Slot(f"{self.name}.bias", shape, True, 0.0)]
        return pair if self.affine else []

    def __call__(self, parameters: dict[str, Tensor], x: Activation, tape: Tape | None) -> Activation:
        normal = functional.layer_norm(x, (self.width,))
        if not self.affine:
            return normal
        weight, bias = parameters[f"{self.name}.weight"], parameters[f"{self.name}.bias"]
        output = normal * weight[:, None, None, :] + bias[:, None, None, :]
        return output if tape is None else tape.record("scale", self.name, normal, output)


@dataclass(frozen=True)
class Mlp:
    """Hidden layers: linear, LayerNorm if asked for, ReLU; all shared between tasks."""

    layers: tuple[tuple[Linear, LayerNorm | None], ...]

    @staticmethod
    def build(
        name: str,
        members: int,
        sizes: list[int],
        layer_norm: Literal["none", "plain", "affine"],
        product_dtype: torch.dtype,
    ) -> Mlp:
        """An MLP through the given sizes, the input's first."""
        layers = []
        for i, (inputs, outputs) in enumerate(pairwise(sizes)):
            linear = Linear(f"{name}.{i}", members, inputs, outputs, None, product_dtype)
            norm = LayerNorm(f"{name}.{i}.norm", members, outputs, layer_norm == "affine")
            layers.append((linear, None if layer_norm == "none" else norm))
        return Mlp(tuple(layers))

    def slots(self) -> list[Slot]:
        return [slot for linear, norm in self.layers for slot in linear.slots() + (norm.slots() if norm else [])]

    def __call__(self, parameters: dict[str, Tensor], x: Activation, tape: Tape | None) -> Activation:
        for linear, norm in self.layers:
            x = linear(parameters, x, tape)
            if norm is not None:
                x = norm(parameters, x, tape)
            x = functional.relu(x)
        return x
