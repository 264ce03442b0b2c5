"""Trained policies of stable-baselines3's SAC, as the policies of all tasks at once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from gymnasium.spaces import Box
from jaxtyping import Float
from stable_baselines3.sac.policies import SACPolicy
from torch import Tensor

from mtrl_imgrad.config import Config
from mtrl_imgrad.saved_state import check_like


class Sb3Policies:
    """One policy for all tasks, or one for each.

    Args:
        policies: one, or as many as tasks.
        tasks: number of tasks.
        one_hot: whether the policies see the task's one-hot behind the observation.
    """

    def __init__(self, policies: Sequence[SACPolicy], tasks: int, one_hot: bool) -> None:
        self.policies = policies
        self.identity = torch.eye(tasks, tasks if one_hot else 0)

    def act(
        self, observations: Float[Tensor, "tasks rows entries"], deterministic: bool = True
    ) -> Float[Tensor, "tasks rows actions"]:
        """SB3's `predict` for some observations of every task. Sampled actions come from torch's global generator."""
        identity = self.identity[:, None].expand(-1, observations.shape[1], -1)
        inputs = torch.cat([observations.cpu(), identity], dim=-1)
        actions = [
            policy.predict(rows.flatten(0, 1).numpy(), deterministic=deterministic)[0]
            for policy, rows in zip(self.policies, inputs.chunk(len(self.policies)), strict=True)
        ]
        return torch.from_numpy(np.concatenate(actions)).unflatten(0, observations.shape[:2])


def sees_task(config: Config) -> bool:
    """Whether the networks are given the task's one-hot."""
    return config.algorithm == "sb3-sac"


def count_models(config: Config, tasks: int) -> int:
    """How many networks learn, each from the same number of tasks."""
    return tasks if config.algorithm == "sb3-sac-single" else 1


def load_policies(
    config: Config, tasks: int, state: dict[str, Tensor], sizes: tuple[int, int], device: torch.device
) -> Sb3Policies:
    """The policies of a checkpoint, without what only training needs.

    Args:
        config: of the run.
        tasks: number of tasks.
        state: the checkpoint's `learner` tensors.
        sizes: entries of an observation and of an action.
        device: where the networks go.

    Raises:
        ValueError: the tensors are not those of such networks.
    """
    one_hot = sees_task(config)
    inputs = Box(-np.inf, np.inf, (sizes[0] + (tasks if one_hot else 0),), np.float32)
    actions = Box(-1.0, 1.0, (sizes[1],), np.float32)
    policies: list[SACPolicy] = []
    for number in range(count_models(config, tasks)):
        prefix = f"{number}.policy."
        with torch.random.fork_rng(devices=[]):  # its first parameters are replaced at once
            policy = SACPolicy(inputs, actions, lambda _: config.sb3.learning_rate, list(config.sb3.net_arch))
        own = {name.removeprefix(prefix): x for name, x in state.items() if name.startswith(prefix)}
        check_like(own, policy.state_dict())
        policy.load_state_dict(own)
        policies.append(policy.to(device))
    return Sb3Policies(policies, tasks, one_hot)
