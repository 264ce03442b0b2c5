"""From Meta-World's observation to the network's input: previous frame, per-task normalisation, task one-hot."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from mtrl_imgrad.config import NetworkConfig

FRAME = 18
"""Entries of one frame: hand, gripper, two objects with orientation. An observation is current frame, previous frame,
goal: 18 + 18 + 3."""
CLIP = 10.0
"""Standardised observations are clipped to this many standard deviations, as stable-baselines3's VecNormalize does."""
VARIANCE_FLOOR = 1e-6
"""Added to the variance: entries that do not move (padding is exactly zero) must not be blown up; (1 mm)^2 in
metres."""


class ObservationInput:
    """Maps observations `[tasks, rows, entries]` to network inputs `[tasks, rows, size]`.

    Meta-World's own observation bounds are wrong after `set_task`, so nothing here uses them; the statistics come from
    the data.

    Attributes:
        size: entries of the network input.
    """

    def __init__(self, config: NetworkConfig, tasks: int, observation_size: int) -> None:
        self.difference = config.previous_frame == "difference"
        self.normalization = config.observation_normalization
        self.one_hot = config.task_input == "one_hot"
        self.tasks = tasks
        self.size = observation_size + (tasks if self.one_hot else 0)
        if self.difference and observation_size < 2 * FRAME:
            raise ValueError(
                "network.previous_frame: 'difference' needs Meta-World's 39 entries; "
                f"these observations have {observation_size}."
            )

    def initial_statistics(self, observation_size: int, device: torch.device) -> Float[Tensor, "three tasks entries"]:
        """Count, mean and sum of squared deviations per task and entry, float64."""
        return torch.zeros(3, self.tasks, observation_size, dtype=torch.float64, device=device)

    def frames(self, observations: Float[Tensor, "tasks rows entries"]) -> Float[Tensor, "tasks rows entries"]:
        """The observation with the previous frame as it is, or as the difference to the current one."""
        if not self.difference:
            return observations
        now, before, rest = observations.split([FRAME, FRAME, observations.shape[-1] - 2 * FRAME], dim=-1)
        return torch.cat([now, now - before, rest], dim=-1)

    def observe(
        self, statistics: Float[Tensor, "three tasks entries"], observations: Float[Tensor, "tasks rows entries"]
    ) -> None:
        """Take new rows into the running statistics, in place (Chan, Golub and LeVeque 1979, pairwise update)."""
        rows = self.frames(observations).double()
        count, mean, squares = statistics
        new = rows.shape[1]
        new_mean = rows.mean(1)
        delta = new_mean - mean
        total = count + new
        squares += ((rows - new_mean[:, None]) ** 2).sum(1) + delta**2 * count * new / total
        mean += delta * new / total
        count += new

    def __call__(
        self, statistics: Float[Tensor, "three tasks entries"], observations: Float[Tensor, "tasks rows entries"]
    ) -> Float[Tensor, "tasks rows size"]:
        """The network's input. Before the first observation the statistics are zero mean and unit variance."""
        x = self.frames(observations)
        if self.normalization:
            count, mean, squares = statistics
            variance = torch.where(count > 0, squares / count.clamp(min=1), 1.0)
            scale = (variance + VARIANCE_FLOOR).rsqrt()
            x = ((x - mean[:, None].to(x.dtype)) * scale[:, None].to(x.dtype)).clamp(-CLIP, CLIP)
        if self.one_hot:
            identity = torch.eye(self.tasks, dtype=x.dtype, device=x.device)
            x = torch.cat([x, identity[:, None, :].expand(-1, x.shape[1], -1)], dim=-1)
        return x
