"""Actor and twin critics as functions of their parameter vectors.

| network.kind | shared between tasks | belongs to one task |
|---|---|---|
| mlp | everything | nothing |
| multi_head | trunk | the last linear layer |

With `share_encoder` the critic's vector begins with an encoder of depth - 1 layers that reads observations only; the
actor reads its detached output.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from mtrl_imgrad.config import NetworkConfig
from mtrl_imgrad.networks.layers import Linear, Mlp, Tape
from mtrl_imgrad.networks.layout import Layout

TWINS = 2


class TwinCritic:
    """Two action-value functions `Q(s, a)` in one batched network (Fujimoto et al. 2018), and the encoder if it is
    shared.

    Attributes:
        layout: the places of its parameters in the vector.
        encoding_size: entries of what the actor reads.
    """

    def __init__(
        self,
        config: NetworkConfig,
        tasks: int,
        input_size: int,
        action_size: int,
        outputs: int,
        product_dtype: torch.dtype,
    ) -> None:
        hidden = [config.width] * config.depth
        head_tasks = tasks if config.kind == "multi_head" else None
        self.encoder: Mlp | None = None
        self.encoding_size = input_size
        if config.share_encoder:
            self.encoder = Mlp.build("encoder", 1, [input_size, *hidden[:-1]], config.layer_norm, product_dtype)
            self.encoding_size, hidden = config.width, hidden[-1:]
        self.trunk = Mlp.build(
            "trunk", TWINS, [self.encoding_size + action_size, *hidden], config.layer_norm, product_dtype
        )
        self.head = Linear("head", TWINS, config.width, outputs, head_tasks, product_dtype)
        encoder_slots = self.encoder.slots() if self.encoder else []
        self.layout = Layout(encoder_slots + self.trunk.slots() + self.head.slots())

    def encode(
        self, vector: Float[Tensor, " parameters"], inputs: Float[Tensor, "tasks rows size"], tape: Tape | None = None
    ) -> Float[Tensor, "tasks rows encoding"]:
        """What actor and critics read: the network input itself, or the shared encoder's output."""
        if self.encoder is None:
            return inputs
        return self.encoder(self.layout.views(vector), inputs[None], tape)[0]

    def __call__(
        self,
        vector: Float[Tensor, " parameters"],
        encoding: Float[Tensor, "tasks rows encoding"],
        actions: Float[Tensor, "tasks rows actions"],
        tape: Tape | None = None,
    ) -> Float[Tensor, "2 tasks rows outputs"]:
        """Both critics' outputs: one value, or the logits over the bins of a categorical critic."""
        parameters = self.layout.views(vector)
        x = torch.cat([encoding, actions], dim=-1).expand(TWINS, -1, -1, -1)
        return self.head(parameters, self.trunk(parameters, x, tape), tape)


class Actor:
    """Mean and log standard deviation of a Gaussian before tanh (Haarnoja et al. 2018, appendix C).

    Attributes:
        layout: the places of its parameters in the vector.
    """

    def __init__(
        self, config: NetworkConfig, tasks: int, encoding_size: int, action_size: int, product_dtype: torch.dtype
    ) -> None:
        hidden = [config.width] * (1 if config.share_encoder else config.depth)
        head_tasks = tasks if config.kind == "multi_head" else None
        self.trunk = Mlp.build("trunk", 1, [encoding_size, *hidden], config.layer_norm, product_dtype)
        self.head = Linear("head", 1, config.width, 2 * action_size, head_tasks, product_dtype)
        self.layout = Layout(self.trunk.slots() + self.head.slots())
        self.log_std_range = (config.log_std_min, config.log_std_max)

    def __call__(
        self,
        vector: Float[Tensor, " parameters"],
        encoding: Float[Tensor, "tasks rows encoding"],
        tape: Tape | None = None,
    ) -> tuple[Float[Tensor, "tasks rows actions"], Float[Tensor, "tasks rows actions"]]:
        """Mean and log standard deviation, the latter clipped to the configured range."""
        parameters = self.layout.views(vector)
        mean, log_std = self.head(parameters, self.trunk(parameters, encoding[None], tape), tape)[0].chunk(2, dim=-1)
        return mean, log_std.clamp(*self.log_std_range)
