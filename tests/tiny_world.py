"""A known-answer world with the interface of `mtrl_imgrad.envs.MetaworldVectorEnv`, at microseconds per step.

A point starts at the origin of the plane and moves by `SPEED` times the action. Task k's goal lies in direction
2 pi k / K at a distance that depends on the goal's index. An observation is position and distance of the goal, so that
the direction can only be known from the task's identity: a policy that ignores the task cannot solve two of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from gymnasium.spaces import Box
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from mtrl_imgrad.config import BenchmarkConfig, Config, EnvsConfig, EvalConfig, LogConfig, NetworkConfig, SacConfig
from mtrl_imgrad.envs import GoalSchedule
from mtrl_imgrad.envs.episode_script import EpisodeScript, steps_of
from mtrl_imgrad.world import MakeWorld, World

SPEED = 0.2
"""Longest way per simulator step and axis."""
NEAR = 0.15
"""Distance from the goal that counts as success."""
GOAL_DISTANCES = np.linspace(0.6, 1.0, 50)


class TinyVectorEnv(VectorEnv):
    """K points on planes; see the module and `MetaworldVectorEnv` for the meaning of rows and infos.

    Args:
        tasks: task names.
        num_goals: goals per task.
        seed: of the goal streams.
        envs_per_task, horizon, action_repeat: as in `MetaworldVectorEnv`.
        constant_reward: reward of every step in place of minus the distance.
        terminates: whether an episode's end is a termination rather than a truncation.
        directions: of each task's goal, in radians; None takes K of them evenly around the circle.
    """

    metadata = {"autoreset_mode": AutoresetMode.SAME_STEP, "render_modes": []}  # noqa: RUF012

    def __init__(
        self,
        tasks: Sequence[str],
        num_goals: int,
        seed: int | np.random.SeedSequence,
        *,
        envs_per_task: int = 1,
        horizon: int = 10,
        action_repeat: int = 1,
        constant_reward: float | None = None,
        terminates: bool = False,
        directions: np.ndarray | None = None,
    ) -> None:
        self.num_envs = len(tasks) * envs_per_task
        self.single_observation_space = Box(-np.inf, np.inf, (3,), np.float32)
        self.single_action_space = Box(-1.0, 1.0, (2,), np.float32)
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self.action_space = batch_space(self.single_action_space, self.num_envs)
        self.horizon, self.action_repeat = horizon, action_repeat
        self.constant_reward, self.terminates = constant_reward, terminates
        self.task_names, self.num_tasks, self.envs_per_task = tuple(tasks), len(tasks), envs_per_task
        angles = np.repeat(directions if directions is not None else circle(len(tasks)), envs_per_task)
        self.directions = np.stack([np.cos(angles), np.sin(angles)], axis=1)
        self.schedule = GoalSchedule(len(tasks), envs_per_task, num_goals, "spawn", seed)
        self.script = EpisodeScript()
        self.position = np.zeros((self.num_envs, 2))
        self.goal = np.zeros(self.num_envs, np.int64)
        self.success = np.zeros(self.num_envs, bool)
        self.episode_return = np.zeros(self.num_envs)
        self.episode_length = np.zeros(self.num_envs, np.int64)
        self.clock = 0
        self.to_restart: list[int] = []
        self.steps_taken = 0
        """Simulator steps of each row since construction."""

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        if options:
            self.schedule.queue(options["goals"])
        else:
            self.schedule.clear_queue()
        if seed is not None:
            self.schedule.reseed(seed)
        self._start(np.arange(self.num_envs))
        return self._observe(), {"goal": self.goal.copy()}

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, np.ndarray]]:
        self.script.add(np.asarray(actions, np.float32))
        rewards = np.zeros(self.num_envs)
        for _ in range(min(self.action_repeat, self.horizon - self.clock)):
            self.position = np.clip(self.position + SPEED * np.clip(actions, -1, 1), -1.5, 1.5)
            distance = np.linalg.norm(self.position - GOAL_DISTANCES[self.goal, None] * self.directions, axis=1)
            rewards += -distance if self.constant_reward is None else self.constant_reward
            self.success |= distance < NEAR
            self.episode_length += 1
            self.clock += 1
            self.steps_taken += 1
        final_obs = self._observe()
        self.spoil(rewards, final_obs)
        broken = ~np.isfinite(rewards) | ~np.isfinite(final_obs).all(axis=1)
        broken[self.to_restart] = True
        self.episode_return += np.where(broken, 0.0, rewards)
        all_ended = np.full(self.num_envs, self.clock == self.horizon)
        ended = all_ended | broken
        infos = {
            "final_obs": final_obs,
            "_final_obs": ended.copy(),
            "success": self.success.copy(),
            "goal": self.goal.copy(),
            "episode_return": self.episode_return.copy(),
            "episode_length": self.episode_length.copy(),
            "unstable": np.zeros(self.num_envs, bool),
        }
        if broken.any() and not all_ended.any():
            self._begin(broken)
            self.script.restart(np.flatnonzero(broken).tolist())
        self._start(np.flatnonzero(all_ended))
        never = np.zeros_like(ended)
        terminated, truncated = (all_ended & ~broken, broken) if self.terminates else (never, ended)
        return self._observe(), rewards, terminated, truncated, infos

    def step_async(self, actions: np.ndarray) -> None:
        self.actions = actions

    def step_wait(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, np.ndarray]]:
        return self.step(self.actions)

    def state_dict(self) -> dict[str, Any]:
        return self.script.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> tuple[np.ndarray, dict[str, Any]]:
        self._start(np.arange(self.num_envs))
        self.schedule.load_state_dict(state["start"]["schedule"])
        self.goal[:] = state["start"]["goal"]
        self.script.begin(state["start"])
        for actions, rows in steps_of(state, self.num_envs):
            self.to_restart = rows
            self.step(actions)
        self.to_restart = []
        return self._observe(), {"goal": self.goal.copy()}

    def _start(self, rows: np.ndarray) -> None:
        for row in rows.tolist():
            self.goal[row] = self.schedule.next_goal(row)
        self._begin(rows)
        if len(rows):  # all rows begin together
            self.clock = 0
            self.script.begin({"goal": self.goal.tolist(), "schedule": self.schedule.state_dict()})

    def _begin(self, rows: np.ndarray) -> None:
        self.position[rows] = 0.0
        self.success[rows] = False
        self.episode_return[rows] = 0.0
        self.episode_length[rows] = 0

    def spoil(self, rewards: np.ndarray, final_obs: np.ndarray) -> None:
        """For what is derived from this: put something that is not finite into the arrays of a step."""

    def _observe(self) -> np.ndarray:
        return np.column_stack([self.position, GOAL_DISTANCES[self.goal]]).astype(np.float32)


def circle(tasks: int) -> np.ndarray:
    """The direction of each task's goal, in radians."""
    return 2 * np.pi * np.arange(tasks) / tasks


def make_world(config: Config, description: dict[str, Any] | None, **options: Any) -> World:
    """The tiny world as configured, for `train(config, make_world=...)`; `options` go to `TinyVectorEnv`.

    Its goals need no description; the one it writes only shows that a resumed run gets back what the first one wrote.
    """
    tasks, goals = config.benchmark.tasks, config.benchmark.goals
    options |= {"action_repeat": config.envs.action_repeat}

    def training(stream: np.random.SeedSequence, chosen: Sequence[str]) -> TinyVectorEnv:
        own = circle(len(tasks))[[tasks.index(task) for task in chosen]]
        per_task, horizon = config.envs.envs_per_task, config.envs.horizon
        return TinyVectorEnv(chosen, goals, stream, envs_per_task=per_task, horizon=horizon, directions=own, **options)

    def evaluation(beside: Any) -> TinyVectorEnv:
        return TinyVectorEnv(tasks, goals, 0, horizon=config.eval.horizon, **options)

    return World(tasks, goals, description or {"world": "tiny", "made": 1}, training, evaluation)


class PowerCutError(Exception):
    """What ends a run in `dying_world`."""


def dying_world(step: int) -> MakeWorld:
    """A tiny world in which the process dies when a row takes this simulator step."""

    class Dying(TinyVectorEnv):
        def step(self, actions: np.ndarray) -> Any:
            if self.steps_taken == step - 1:
                raise PowerCutError
            return super().step(actions)

    def make(config: Config, description: dict[str, Any] | None) -> World:
        world = make_world(config, description)

        def training(stream: np.random.SeedSequence, tasks: tuple[str, ...]) -> VectorEnv:
            envs = world.training(stream, tasks)
            envs.__class__ = Dying
            return envs

        return replace(world, training=training)

    return make


def tiny_config(run_dir: object, **sections: Any) -> Config:
    """A configuration that learns the tiny world in seconds; `sections` replace whole sections or plain fields."""
    defaults: dict[str, Any] = {
        "run_dir": str(run_dir),
        "device": "cpu",
        "threads": 1,
        "compile": False,
        "benchmark": BenchmarkConfig(tasks=("east", "north", "west", "south"), goals=10),
        "envs": EnvsConfig(horizon=10),
        "network": NetworkConfig(kind="multi_head", width=64, depth=2),
        "sac": tiny_sac(),
        "eval": EvalConfig(every=0, goals_per_task=3, horizon=10),
        "log": LogConfig(every=100, tensorboard=False),
    }
    return Config(**(defaults | sections))


def tiny_sac(**fields: Any) -> SacConfig:
    """Settings under which the tiny world is learned in 600 updates."""
    defaults: dict[str, Any] = {
        "steps": 800,
        "warmup": 200,
        "batch_per_task": 64,
        "gamma": 0.9,
        "tau": 0.02,
        "actor_lr": 2e-3,
        "critic_lr": 2e-3,
        "temperature_lr": 2e-3,
        "initial_temperature": 0.05,
        "target_entropy": -2.0,
    }
    return SacConfig(**(defaults | fields))
