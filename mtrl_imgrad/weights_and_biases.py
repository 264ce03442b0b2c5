"""The optional Weights & Biases sink: it copies what goes to TensorBoard, and nothing else is logged to it."""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Any

from mtrl_imgrad.config import Config, to_dict
from mtrl_imgrad.files import write_whole

PROJECT = "mtrl_imgrad"
IDENTITY = "wandb_id.txt"
"""Holds, in the run folder, what wandb knows the run by."""


def check() -> None:
    """See that a run can be sent, before anything is written.

    Raises:
        ValueError: wandb is not installed, or nobody is logged in.
    """
    try:
        import wandb  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ValueError('log.wandb: wandb is not installed; `pip install "mtrl_imgrad[wandb]"` does it.') from None
    if wandb.setup().settings.mode in ("online", "shared"):
        try:
            wandb.login()
        except wandb.Error as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"log.wandb: {reason} WANDB_MODE=offline needs no key.") from None


def start(run: Path, config: Config) -> Any:
    """Begin to copy what torch's TensorBoard writers, from now on, write; a run that goes on keeps its identity.

    Args:
        run: the run folder.
        config: the configuration, shown with the run.

    Returns:
        wandb's run, to be finished.
    """
    import wandb  # pyright: ignore[reportMissingImports]

    identity = run / IDENTITY
    if not identity.exists():
        write_whole(identity, secrets.token_hex(8))
    return wandb.init(
        project=wandb.setup().settings.project or PROJECT,
        name=run.resolve().name,
        id=identity.read_text().strip(),
        resume="allow",
        dir=run,
        config=to_dict(config),
        sync_tensorboard=True,
    )
