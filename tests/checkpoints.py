"""Reads a whole checkpoint at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mtrl_imgrad.kept_checkpoints import choose_checkpoint
from mtrl_imgrad.ring_blocks import unpacked


def load_checkpoint(folder: Path, device: torch.device) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]]:
    """The newest checkpoint's state, and all its groups of tensors; the blocks of a replay are put together,
    those of several models under `<model>.<name>`."""
    checkpoint = choose_checkpoint(folder)
    names = [name.removesuffix(".safetensors") for name in checkpoint.files if name.endswith(".safetensors")]
    parts = {name: checkpoint.part(name, device) for name in names if not name.startswith("replay-")}
    replay = checkpoint.blocks("replay")
    for rings in dict.fromkeys(name.rsplit("-", 2)[0] for name in replay):
        blocks = [unpacked(checkpoint.part(name, device)) for name in replay if name.rsplit("-", 2)[0] == rings]
        model = rings.removeprefix("replay").replace("-", "")
        whole = {name: torch.cat([block[name] for block in blocks]) for name in blocks[0]}
        parts.setdefault("replay", {}).update({f"{model}.{name}".lstrip("."): ring for name, ring in whole.items()})
    return checkpoint.state() | {"step": checkpoint.step}, parts
