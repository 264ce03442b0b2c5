"""Multi-task reinforcement learning with gradient aggregation on Meta-World."""

from mtrl_imgrad.agent import Agent, Policy, load
from mtrl_imgrad.config import Config
from mtrl_imgrad.trainer import train
from mtrl_imgrad.version import __version__

__all__ = ["Agent", "Config", "Policy", "__version__", "load", "train"]
