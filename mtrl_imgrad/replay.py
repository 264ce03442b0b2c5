"""Replay on the training device, task-major: rings `[capacity // E, K, E, .]`, sampled uniformly within each task.

The task one-hot is never stored. At the end of an episode the true final observation is kept as the next observation,
so a truncation bootstraps from the state where it happened. An n-step window stays inside one environment's ring and
one episode and never crosses the write position.

All rings are written together. Where a row has nothing to store, its slot repeats the row's transition before, which is
then drawn that much more often, and no window runs into it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Transitions `[K, B, .]`.

    Attributes:
        observations: s at the window's start.
        actions: a at the window's start.
        rewards: sum over the window of gamma^j r_j.
        next_observations: the true observation m decisions later.
        discounts: gamma^m, or 0 where the window ends by termination.
    """

    observations: Float[Tensor, "tasks rows entries"]
    actions: Float[Tensor, "tasks rows actions"]
    rewards: Float[Tensor, "tasks rows"]
    next_observations: Float[Tensor, "tasks rows entries"]
    discounts: Float[Tensor, "tasks rows"]


class Replay:
    """A ring per task and environment.

    Args:
        capacity: transitions per task, over its environments.
        tasks, envs_per_task, observation_size, action_size: shapes.
        gamma: discount per decision.
        n_step: longest window.
        device: where the rings live and batches are made.

    Raises:
        MemoryError: the rings need more memory than is free on the device.
    """

    def __init__(
        self,
        capacity: int,
        tasks: int,
        envs_per_task: int,
        observation_size: int,
        action_size: int,
        *,
        gamma: float,
        n_step: int,
        device: torch.device,
    ) -> None:
        self.length, self.tasks, self.envs_per_task = capacity // envs_per_task, tasks, envs_per_task
        self.gamma, self.n_step, self.device = gamma, n_step, device
        self.written = self.held_back = 0  # vector steps stored, and those before them of which nothing was
        lead = (self.length, tasks, envs_per_task)
        self.bytes = self.length * tasks * envs_per_task * (4 * (2 * observation_size + action_size + 1) + 3)
        free = free_memory(device)
        if self.bytes > free:
            raise MemoryError(
                f"replay.capacity: {capacity:,} transitions for each of {tasks} tasks need "
                f"{self.bytes / 2**30:.2f} GiB, "
                f"but {free / 2**30:.2f} GiB are free on {device}; at most {int(capacity * free / self.bytes):,} fit."
            )
        self.observations = torch.zeros(*lead, observation_size, device=device)
        self.next_observations = torch.zeros(*lead, observation_size, device=device)
        self.actions = torch.zeros(*lead, action_size, device=device)
        self.rewards = torch.zeros(lead, device=device)
        self.terminated = torch.zeros(lead, dtype=torch.bool, device=device)
        self.ended = torch.zeros(lead, dtype=torch.bool, device=device)
        self.repeated = torch.zeros(lead, dtype=torch.bool, device=device)

    @property
    def filled(self) -> int:
        """Vector steps held."""
        return min(self.written, self.length)

    @property
    def windows(self) -> int:
        """Vector steps at which a whole n-step window can start, per environment."""
        return max(0, self.filled - self.n_step + 1)

    def add(
        self,
        observations: Float[Tensor, "tasks envs entries"],
        actions: Float[Tensor, "tasks envs actions"],
        rewards: Float[Tensor, "tasks envs"],
        next_observations: Float[Tensor, "tasks envs entries"],
        terminated: Tensor,
        truncated: Tensor,
        broken: Bool[Tensor, "tasks envs"] | None = None,
    ) -> None:
        """Store one vector step; `next_observations` is the final observation where an episode ended, not the next
        episode's first. Rows that are `broken` repeat the transition before; where there is none yet, nothing is stored
        of the whole vector step."""
        at = self.written % self.length
        new = (observations, next_observations, actions, rewards, terminated, terminated | truncated)
        rings = (self.observations, self.next_observations, self.actions, self.rewards, self.terminated, self.ended)
        if broken is None:
            for ring, values in zip(rings, new, strict=True):
                ring[at] = values
            self.repeated[at] = False
        elif self.written:
            for ring, values in zip(rings, new, strict=True):
                mask = broken.view(*broken.shape, *[1] * (values.ndim - 2))
                ring[at] = torch.where(mask, ring[at - 1], values)
            self.ended[at] |= broken
            self.repeated[at] = broken
        else:
            self.held_back += 1
            return
        self.written += 1

    def draw(self, batch_per_task: int, generator: torch.Generator) -> Int[Tensor, "2 tasks rows"]:
        """Uniform starts (vector step counted from the oldest held, environment) for each task, independent between
        tasks."""
        shape = (self.tasks, batch_per_task)
        when = torch.randint(self.windows, shape, generator=generator, device=self.device)
        env = torch.randint(self.envs_per_task, shape, generator=generator, device=self.device)
        return torch.stack([when, env])

    def gather(self, starts: Int[Tensor, "2 tasks rows"]) -> Batch:
        """The n-step windows that begin at `starts`, each cut at its episode's end."""
        oldest = self.written - self.filled
        steps = torch.arange(self.n_step, device=self.device)
        when = (oldest + starts[0, ..., None] + steps) % self.length  # [K, B, n]
        task = torch.arange(self.tasks, device=self.device)[:, None]
        env = starts[1]

        rows = (task[..., None], env[..., None])
        cut = self.ended[when[..., :-1], *rows] | self.repeated[when[..., 1:], *rows]
        reached = torch.cat([torch.ones_like(when[..., :1], dtype=torch.bool), ~cut], dim=-1).cumprod(-1)
        last = reached.sum(-1, keepdim=True) - 1
        discounted = self.rewards[when, *rows] * self.gamma**steps
        rewards = torch.where(reached > 0, discounted, 0.0).sum(-1)

        first, final = when[..., 0], when.gather(-1, last).squeeze(-1)
        alive = ~self.terminated[final, task, env]
        return Batch(
            observations=self.observations[first, task, env],
            actions=self.actions[first, task, env],
            rewards=rewards,
            next_observations=self.next_observations[final, task, env],
            discounts=alive * self.gamma ** (last.squeeze(-1) + 1),
        )

    def rings(self) -> dict[str, Tensor]:
        """The rings by name, `[slots, K, E, ...]`, for `ring_blocks`."""
        return {name: getattr(self, name) for name in RINGS}


CGROUP = Path("/sys/fs/cgroup")
"""Where Linux tells a container its memory limit (version 2); elsewhere it does not exist."""
RINGS = ("observations", "next_observations", "actions", "rewards", "terminated", "ended", "repeated")


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated on a device; on the CPU also within the control group of a container or job."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    available = psutil.virtual_memory().available
    limit, used = CGROUP / "memory.max", CGROUP / "memory.current"
    if limit.exists() and used.exists() and (most := limit.read_text().strip()) != "max":
        available = min(available, int(most) - int(used.read_text()))
    return available
