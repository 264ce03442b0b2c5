"""Whether a fast env has the bits of Meta-World's own, tried at start-up: another version cannot go unnoticed."""

# pyright: reportAttributeAccessIssue=false
# (mujoco does not tell its names to type checkers.)
from __future__ import annotations

import warnings
from typing import Any

import mujoco
import numpy as np
from jaxtyping import Float32, Float64

from mtrl_imgrad.envs.fast_env import FastTask
from mtrl_imgrad.envs.fast_rows import FastRows
from mtrl_imgrad.envs.task_env import RewardVersion

STEPS = 60
"""Simulator steps that are compared: a scripted expert has reached and touched most objects by then."""
NOISE = 0.2
"""Standard deviation added to the expert's actions, which leave [-1, 1] by it."""
FAILURES = (AttributeError, AssertionError, LookupError, TypeError, ValueError, RuntimeError, mujoco.FatalError)
"""What a Meta-World that is made differently raises."""


def difference(shared: FastTask, task: str, reward: RewardVersion, other_goal: int) -> str | None:
    """What differs to the bit between Meta-World's steps and fast ones with the same actions from a restored start of
    the same episode, and between a reset and one that follows another episode; None if nothing does.

    Args:
        shared: what the fast rows of the task share; it knows one more start afterwards.
        task: the task's name.
        reward: version of Meta-World's reward function.
        other_goal: of a row that shares the model with the one that is compared, and must not be noticed; best one
            that is far from goal 0.
    """
    try:
        return _compare(shared, task, reward, other_goal)
    except FAILURES as error:
        return f"{type(error).__name__}: {error}"


def _compare(shared: FastTask, task: str, reward: RewardVersion, other_goal: int) -> str | None:
    env = shared.make(reward)
    start = shared.start(env, 0)
    shared.become_plain(env)
    actions, expected = _plain_steps(env, task, start.observation)
    shared.become_fast_again(env)
    again = shared.simulate_start(env, 0)
    env.close()
    if any(getattr(again, name).tobytes() != getattr(start, name).tobytes() for name in ("state", "observation")):
        return "a reset's outcome depends on the episode before"
    rows = FastRows([shared, shared], reward, STEPS, 1)
    rows.reset(0, 0)
    rows.reset(1, other_goal)
    differing = None
    for step, action in enumerate(actions):
        observations, rewards, successes = rows.step(np.stack((action, -action)))
        if differing is None and _bits(observations[0], rewards[0], successes[0]) != expected[step]:
            differing = f"step {step} of the start-up check differs"
    rows.close()
    return differing


def _plain_steps(
    env: Any, task: str, observation: Float64[np.ndarray, "observation=39"]
) -> tuple[list[Float32[np.ndarray, "action=4"]], list[bytes]]:
    """Actions of Meta-World's scripted expert with noise, and what they lead to."""
    from metaworld.policies import ENV_POLICY_MAP

    policy = ENV_POLICY_MAP[task]()
    random = np.random.default_rng(0)
    actions, results = [], []
    for _ in range(STEPS):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the experts warn of their own gains
            expert = policy.get_action(observation.copy())  # some of them write into it
        actions.append((expert + random.normal(0.0, NOISE, 4)).astype(np.float32))
        observation, reward, _, _, info = env.step(actions[-1])
        results.append(_bits(observation, reward, info["success"] == 1.0))
    return actions, results


def _bits(observation: Float64[np.ndarray, "observation=39"], reward: Any, success: Any) -> bytes:
    return np.append(observation, (float(reward), float(success))).tobytes()
