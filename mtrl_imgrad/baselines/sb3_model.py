"""One `stable_baselines3.SAC` in a run: its environments, its random streams, and its state without pickle."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool
from stable_baselines3 import SAC
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.vec_env import VecEnvWrapper, VecNormalize
from torch import Tensor

from mtrl_imgrad.baselines.global_streams import GlobalStreams
from mtrl_imgrad.config import Config
from mtrl_imgrad.envs.sb3 import MtVecEnv
from mtrl_imgrad.faults import Faults, Transitions, require_finite
from mtrl_imgrad.learner import NonFiniteError
from mtrl_imgrad.rewards import RewardNormalizer
from mtrl_imgrad.saved_state import check_like, check_same, count, entry, restore_stream

LOSSES = ("train/critic_loss", "train/actor_loss", "train/ent_coef", "train/ent_coef_loss")
"""What SB3's SAC reports of its updates, under our names for the same."""
STORED = ("observations", "next_observations", "actions", "rewards", "dones", "timeouts")
"""Arrays of SB3's replay buffer, `[buffer_size // environments, environments, ...]`."""

EndedEpisodes = Callable[[Bool[np.ndarray, " rows"], dict[str, np.ndarray]], None]
"""Told of each vector step in which episodes ended: which rows, and their success, return and length."""
Measured = Callable[[str, float, int], None]
"""Told what took how many seconds, and how often it happened in them."""


class StorableSteps(VecEnvWrapper):
    """What SB3 may store: rewards divided as `RewardNormalizer` does (the returns of episodes stay as they are), and a
    mark, `broken` in a row's infos, on transitions that are worth nothing, which `FiniteReplayBuffer` leaves out.

    Args:
        venv: the environments.
        normalizer: of the rewards.
        faults: is told of the transitions that are worth nothing.
    """

    def __init__(self, venv: MtVecEnv, normalizer: RewardNormalizer, faults: Faults) -> None:
        super().__init__(venv)
        self.envs, self.tasks = venv, venv.envs.task_names
        self.normalizer, self.faults = normalizer, faults
        self.actions = np.empty(0)

    def reset(self) -> Any:
        observations: Any = self.venv.reset()
        require_finite(self.tasks, observations)
        return observations

    def step_async(self, actions: np.ndarray) -> None:
        self.actions = actions
        self.venv.step_async(actions)

    def step_wait(self) -> Any:
        observations, rewards, dones, infos = self.envs.step_wait()
        arrays = self.envs.step_infos
        transitions = Transitions(self.tasks, self.actions, rewards, arrays["final_obs"], arrays)
        stored_rewards, broken = self.faults.sift(transitions, self.normalizer)
        require_finite(self.tasks, observations)
        for row in np.flatnonzero(broken).tolist():
            infos[row]["broken"] = True
        return observations, stored_rewards, dones, infos


class FiniteReplayBuffer(ReplayBuffer):
    """SB3's replay buffer, in which the slot of a broken transition repeats the row's transition before, as in
    `Replay`. Where there is none yet, nothing is stored of the whole vector step.

    Attributes:
        held_back: vector steps of which nothing is stored, all before the first slot.
    """

    held_back = 0

    def add(
        self,
        obs: np.ndarray,
        next_obs: np.ndarray,
        action: np.ndarray,
        reward: np.ndarray,
        done: np.ndarray,
        infos: list[dict[str, Any]],
    ) -> None:
        rows = [row for row, info in enumerate(infos) if "broken" in info]
        if rows and not self.size():
            self.held_back += 1
            return
        before, at = self.pos - 1, self.pos
        kept = {name: getattr(self, name)[before, rows].copy() for name in STORED} if rows else {}
        super().add(obs, next_obs, action, reward, done, infos)
        for name, values in kept.items():
            getattr(self, name)[at, rows] = values

    def sample(self, batch_size: int, env: VecNormalize | None = None) -> Any:
        """
        Raises:
            NonFiniteError: nothing is stored.
        """
        if not self.size():
            raise NonFiniteError(
                "the first update has nothing to learn from: every vector step had a number not finite."
            )
        return super().sample(batch_size, env)


class LossMeans(Logger):
    """The logger that SB3 writes to: it averages the numbers of the updates between two log rows."""

    def __init__(self) -> None:
        super().__init__(None, [])
        self.sums: dict[str, float] = defaultdict(float)
        self.count = 0

    def record(self, key: str, value: Any, exclude: Any = None) -> None:
        """Take one number; after SB3's updates of one vector step, it is their mean.

        Raises:
            NonFiniteError: it is not finite. SB3 has stepped already, so its networks are worth nothing now.
        """
        if key in LOSSES:
            if not np.isfinite(value):
                raise NonFiniteError(f"{key} of stable-baselines3's SAC is {value:g}.")
            self.sums[key] += float(value)
            self.count += key == LOSSES[0]

    def pop(self) -> dict[str, float]:
        """Tag -> mean; then starts anew."""
        means = {tag: total / self.count for tag, total in self.sums.items()}
        self.sums.clear()
        self.count = 0
        return means


class Observer(BaseCallback):
    """Sees SB3's loop from within: which episodes end, and where its time goes."""

    def __init__(self, ended: EndedEpisodes, measured: Measured) -> None:
        super().__init__()
        self.ended, self.measured = ended, measured

    def _on_training_start(self) -> None:
        self.lap, self.updates = time.perf_counter(), self.model._n_updates

    def _on_rollout_start(self) -> None:
        self._updated()

    def _on_step(self) -> bool:
        infos = self.locals["infos"]
        done = self.locals["dones"] & ~np.array(["broken" in info for info in infos])
        if done.any():
            episodes = [info.get("episode", {"r": 0.0, "l": 0}) for info in infos]
            values = {
                "success": np.array([info["is_success"] for info in infos]),
                "episode_return": np.array([episode["r"] for episode in episodes]),
                "episode_length": np.array([episode["l"] for episode in episodes]),
            }
            self.ended(done, values)
        return True

    def _on_rollout_end(self) -> None:
        self._measure("stepping", 1)

    def _on_training_end(self) -> None:
        self._updated()

    def _updated(self) -> None:
        self._measure("update", self.model._n_updates - self.updates)
        self.updates = self.model._n_updates

    def _measure(self, name: str, count: int) -> None:
        now = time.perf_counter()
        self.measured(name, now - self.lap, count)
        self.lap = now


class Sb3Model:
    """One SAC of stable-baselines3, unmodified but for the guard of its replay buffer, and all that belongs to it.

    Args:
        config: of the run; SAC's own settings are those of `config.sb3`.
        envs: what it learns from; it is closed with the model.
        normalizer: of the rewards.
        faults: is told of transitions that are worth nothing.
        seed: of SB3's random numbers: networks, actions and batches.
        device: where the networks go.

    Raises:
        MemoryError: the replay buffer does not fit.
    """

    def __init__(
        self,
        config: Config,
        envs: MtVecEnv,
        normalizer: RewardNormalizer,
        faults: Faults,
        seed: int,
        device: torch.device,
    ) -> None:
        settings = config.sb3
        self.envs, self.normalizer, self.seed = envs, normalizer, seed
        self.streams, self.losses = GlobalStreams(seed, device), LossMeans()
        envs.action_space.seed(seed)
        with self.streams.lent(), _naming_the_buffer(settings.buffer_size):
            self.sac = SAC(
                "MlpPolicy",
                StorableSteps(envs, normalizer, faults),
                replay_buffer_class=FiniteReplayBuffer,
                learning_rate=settings.learning_rate,
                buffer_size=settings.buffer_size,
                learning_starts=config.sac.warmup // config.vector_step * envs.num_envs,
                batch_size=settings.batch_size,
                tau=settings.tau,
                gamma=settings.gamma,
                gradient_steps=settings.gradient_steps,
                ent_coef=settings.ent_coef,
                target_update_interval=settings.target_update_interval,
                target_entropy=settings.target_entropy,
                policy_kwargs={"net_arch": list(settings.net_arch)},
                device=device,
            )
        self.sac.set_logger(self.losses)

    @property
    def updates(self) -> int:
        """Gradient updates so far."""
        return self.sac._n_updates

    def learn(self, vector_steps: int, ended: EndedEpisodes, measured: Measured) -> None:
        """Go on with SB3's own loop. Several calls give the numbers of a single one."""
        with self.streams.lent():
            self.sac.learn(vector_steps * self.envs.num_envs, Observer(ended, measured), reset_num_timesteps=False)

    def networks(self) -> dict[str, Tensor]:
        """Parameters, optimiser moments and the temperature."""
        sac = self.sac
        state = {f"policy.{name}": value for name, value in sac.policy.state_dict().items()}
        for name, optimiser in self._optimisers().items():
            for parameter, moments in optimiser.state_dict()["state"].items():
                state |= {f"{name}.{parameter}.{moment}": value for moment, value in moments.items()}
        return state | ({"log_ent_coef": sac.log_ent_coef.detach()} if sac.log_ent_coef is not None else {})

    def load_networks(self, state: dict[str, Tensor]) -> None:
        """Take back what `networks` gave.

        Raises:
            ValueError: it did not give this, e.g. because the networks differ.
        """
        check_like(state, self._like_networks({key.partition(".")[0] for key in state}))
        self.sac.policy.load_state_dict(_below("policy.", state))
        for name, optimiser in self._optimisers().items():
            moments: dict[int, dict[str, Tensor]] = defaultdict(dict)
            for key, value in _below(f"{name}.", state).items():
                parameter, _, moment = key.partition(".")
                moments[int(parameter)][moment] = value
            groups = optimiser.state_dict()["param_groups"]
            optimiser.load_state_dict({"state": dict(moments), "param_groups": groups})
        if self.sac.log_ent_coef is not None:
            self.sac.log_ent_coef.data.copy_(state["log_ent_coef"])

    def _like_networks(self, groups: Collection[str]) -> dict[str, Tensor]:
        """Names, shapes and types that `networks` gives once the optimisers among the groups have moments."""
        like = self.networks()
        for name, optimiser in self._optimisers().items():
            parameters = [own for group in optimiser.param_groups for own in group["params"]] if name in groups else []
            for number, own in enumerate(parameters):
                moments = {"step": torch.tensor(0.0), "exp_avg": own, "exp_avg_sq": own}
                like |= {f"{name}.{number}.{moment}": value for moment, value in moments.items()}
        return like

    def rings(self) -> dict[str, Tensor]:
        """The arrays of the replay buffer by name, `[slots, environments, ...]`, without a copy."""
        return {name: torch.from_numpy(getattr(self._buffer(), name)) for name in STORED}

    @property
    def written(self) -> int:
        """Slots of the replay buffer written so far, over all laps."""
        return self.vector_steps - self._buffer().held_back

    @property
    def vector_steps(self) -> int:
        """Vector steps taken so far."""
        return self.sac.num_timesteps // self.envs.num_envs

    def counters(self) -> dict[str, Any]:
        """Everything that is not a tensor, as JSON keeps it."""
        buffer = self._buffer()
        return {
            "timesteps": self.sac.num_timesteps,
            "updates": self.sac._n_updates,
            "position": buffer.pos,
            "full": buffer.full,
            "held_back": buffer.held_back,
            "action_space": self.envs.action_space.np_random.bit_generator.state,
            "losses": {"count": self.losses.count, "sums": dict(self.losses.sums)},
            "envs": self.envs.state_dict(),
        }

    def load_counters(self, state: dict[str, Any]) -> None:
        """Take back what `counters` gave.

        Raises:
            ValueError: it did not give this.
        """
        buffer, losses = self._buffer(), entry(state, "losses", dict)
        self.sac.num_timesteps, self.sac._n_updates = count(state, "timesteps"), count(state, "updates")
        buffer.held_back = count(state, "held_back")
        full, position = divmod(self.written, buffer.buffer_size)
        check_same(state, {"position": position, "full": full > 0})
        buffer.pos, buffer.full = position, full > 0
        restore_stream(self.envs.action_space.np_random, entry(state, "action_space", dict))
        self.losses.count, sums = count(losses, "count"), entry(losses, "sums", dict)
        if not sums.keys() <= set(LOSSES):
            raise ValueError(f"'sums' are of {', '.join(sums)} and must be of {', '.join(LOSSES)}")
        self.losses.sums.update({tag: entry(sums, tag, float) for tag in sums})
        self.sac._last_obs = self.envs.load_state_dict(entry(state, "envs", dict))
        require_finite(self.envs.envs.task_names, self.sac._last_obs)

    def _buffer(self) -> Any:
        return self.sac.replay_buffer

    def _optimisers(self) -> dict[str, torch.optim.Optimizer]:
        found = {"actor": self.sac.actor.optimizer, "critic": self.sac.critic.optimizer}
        temperature = self.sac.ent_coef_optimizer
        return found | ({"temperature": temperature} if temperature else {})


@contextmanager
def _naming_the_buffer(size: int) -> Iterator[None]:
    try:
        yield
    except MemoryError as error:
        raise MemoryError(f"sb3.buffer_size: {size:,} transitions do not fit ({error}).") from None


def _below(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
