"""Reads a whole checkpoint at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mtrl_imgrad.checkpoint import newest_checkpoint, read_part


def load_checkpoint(folder: Path, device: torch.device) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]]:
    """The newest checkpoint's state, and all its groups of tensors."""
    place, state = newest_checkpoint(folder)
    return state, {path.stem: read_part(place, path.stem, device) for path in place.glob("*.safetensors")}
