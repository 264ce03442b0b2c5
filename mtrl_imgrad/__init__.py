"""Multi-task reinforcement learning with gradient aggregation on Meta-World."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from mtrl_imgrad import envs as envs  # registers the environments' names
from mtrl_imgrad.version import __version__

if TYPE_CHECKING:
    from mtrl_imgrad.agent import Agent, Policy, load
    from mtrl_imgrad.config import Config
    from mtrl_imgrad.trainer import train

__all__ = ["Agent", "Config", "Policy", "__version__", "load", "train"]

_HOMES = {"Agent": "agent", "Policy": "agent", "load": "agent", "Config": "config", "train": "trainer"}
"""Imported when first used: worker processes, which import this package too, need no torch."""


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"mtrl_imgrad.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
