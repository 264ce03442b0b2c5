"""Networks as functions of flat parameter vectors; each says which parameters are shared and which belong to one
task."""

from mtrl_imgrad.networks.actor_critic import Actor, TwinCritic
from mtrl_imgrad.networks.layers import Tape, Use
from mtrl_imgrad.networks.layout import Layout
from mtrl_imgrad.networks.observation import ObservationInput

__all__ = ["Actor", "Layout", "ObservationInput", "Tape", "TwinCritic", "Use"]
