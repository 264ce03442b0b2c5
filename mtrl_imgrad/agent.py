"""A trained agent from a run folder, with stable-baselines3's `predict`."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mtrl_imgrad.baselines.global_streams import GlobalStreams
from mtrl_imgrad.baselines.sb3_policy import load_policies
from mtrl_imgrad.config import Config
from mtrl_imgrad.csv_files import read_rows
from mtrl_imgrad.evaluation import Episode, evaluate, write_rows
from mtrl_imgrad.files import read_object
from mtrl_imgrad.kept_checkpoints import BEST, choose_checkpoint
from mtrl_imgrad.learner import Learner
from mtrl_imgrad.run import choose_device
from mtrl_imgrad.run_description import read_config
from mtrl_imgrad.saved_state import count, entry
from mtrl_imgrad.world import metaworld


class Act(Protocol):
    """What an agent is, whatever algorithm trained it: actions in [-1, 1] for some observations of every task."""

    def __call__(
        self, observations: Float[Tensor, "tasks rows entries"], deterministic: bool
    ) -> Float[Tensor, "tasks rows actions"]: ...


@dataclass(frozen=True)
class Policy:
    """One task's policy. It applies the stored observation normalisation and the task's identity.

    A policy trained with an action repeat decides every `action_repeat` simulator steps: repeat each action as often.
    """

    agent: Agent
    task: int

    @property
    def action_repeat(self) -> int:
        """Simulator steps per decision, in training and evaluation."""
        return self.agent.config.envs.action_repeat

    def predict(
        self,
        observation: Float[np.ndarray, "*rows entries"],
        state: None = None,
        episode_start: Bool[np.ndarray, ...] | None = None,
        deterministic: bool = False,
    ) -> tuple[Float[np.ndarray, "*rows actions"], None]:
        """Actions in [-1, 1] for one observation `[39]` or several `[n, 39]`, as Meta-World gives them.

        The signature is stable-baselines3's; `state` and `episode_start` are for recurrent policies and not used, and
        the second result is None.
        """
        single = np.ndim(observation) == 1
        rows = torch.as_tensor(np.atleast_2d(observation), dtype=torch.float32)
        # The networks are evaluated for all tasks at once; only this task's rows are kept.
        observations = rows.expand(len(self.agent.tasks), -1, -1)
        actions = self.agent.act(observations, deterministic)[self.task].cpu().numpy()
        return (actions[0] if single else actions), None


@dataclass(frozen=True)
class Agent:
    """A trained multi-task agent.

    Attributes:
        config: the run's configuration.
        tasks: task names, in the order of the network's task index.
        step: simulator steps per task that it was trained for.
        act: its networks. Actions that are not deterministic come from the agent's own random stream.
    """

    config: Config
    tasks: tuple[str, ...]
    step: int
    act: Act

    def policy(self, task: str) -> Policy:
        """The policy of one task.

        Raises:
            ValueError: the agent was not trained on this task.
        """
        if task not in self.tasks:
            near = difflib.get_close_matches(task, self.tasks, 1, 0.0)
            raise ValueError(
                f"task: {task!r} is not one of this agent's {len(self.tasks)}; the nearest is {near[0]!r}."
            )
        return Policy(self, self.tasks.index(task))


def load(run: str | Path, device: str = "cpu", checkpoint: str = "newest") -> Agent:
    """The agent of a run's checkpoint.

    Args:
        run: the run folder.
        device: where its networks go.
        checkpoint: `newest`, a step, or `best`, which an evaluation during training chose: for using the policy, not
            for reporting its success.

    Raises:
        ValueError: the folder is no run's, or has no such checkpoint that is whole.
    """
    folder = Path(run)
    config = read_config(folder)
    chosen = choose_checkpoint(folder, checkpoint)
    make = _mtsac if config.algorithm == "mtsac" else _sb3
    with chosen.taken():
        state, networks = chosen.state(), chosen.part("learner", torch.device(device))
        tasks: list[Any] = entry(state, "tasks", list)
        if not tasks or not all(isinstance(task, str) for task in tasks) or len(set(tasks)) < len(tasks):
            raise ValueError("'tasks' must be names, each once")
        # Networks have more parameters than inputs or tasks; another number would make networks of any size.
        most = max((tensor.numel() for tensor in networks.values()), default=0)
        sizes = (count(state, "observation_size", most), count(state, "action_size", most))
        act = make(config, len(tasks), sizes, networks, torch.device(device))
    return Agent(config, tuple(tasks), chosen.step, act)


def _mtsac(
    config: Config, tasks: int, sizes: tuple[int, int], networks: dict[str, Tensor], device: torch.device
) -> Act:
    generator = torch.Generator().manual_seed(config.seed)
    learner = Learner(config, tasks, *sizes, device, generator)
    learner.load_state_dict(networks)

    def act(observations: Tensor, deterministic: bool) -> Tensor:
        shape = (*observations.shape[:-1], learner.action_size)
        noise = None if deterministic else torch.randn(shape, generator=generator).to(device)
        return learner.act(observations.to(device), noise)

    return act


def _sb3(config: Config, tasks: int, sizes: tuple[int, int], networks: dict[str, Tensor], device: torch.device) -> Act:
    streams = GlobalStreams(config.seed, device)
    policies = load_policies(config, tasks, networks, sizes, device)

    def act(observations: Tensor, deterministic: bool) -> Tensor:
        with streams.lent():
            return policies.act(observations, deterministic)

    return act


def check_tasks(agent: Agent, tasks: Sequence[str]) -> None:
    """Compare an agent's tasks with those of its run's configuration: their order is that of the networks' rows.

    Raises:
        ValueError: the checkpoint has others, or in another order.
    """
    if agent.tasks != tuple(tasks):
        found, must = ", ".join(agent.tasks), ", ".join(tasks)
        raise ValueError(f"run: the tasks of its checkpoint are {found}; they must be those of config.yaml, {must}.")


def evaluate_run(run: str | Path, device: str = "auto", checkpoint: str = "newest") -> tuple[list[Episode], Path, str]:
    """Every goal of every task once with the deterministic policy of a checkpoint; written to the run's `eval.csv`, and
    for `best`, whose success is that of a choice, to `eval_best.csv`, which nothing else reads.

    Returns:
        The episodes, the file, and the name of the protocol.

    Raises:
        ValueError: the folder is no run's, or has no checkpoint.
    """
    folder, chosen = Path(run), choose_device(device)
    agent = load(folder, str(chosen), checkpoint)
    world = metaworld(agent.config, read_object(folder / "goals.json"))
    check_tasks(agent, world.tasks)
    path = folder / ("eval_best.csv" if checkpoint == BEST else "eval.csv")
    read_rows(path)  # before the work, not after it
    envs = world.evaluation(None)
    try:
        goals = np.arange(world.goals)
        episodes = evaluate(lambda x: agent.act(x, True), envs, agent.tasks, goals, agent.step, agent.config)
    finally:
        envs.close()
    write_rows(path, episodes)
    return episodes, path, agent.config.protocol
