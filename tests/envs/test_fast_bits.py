"""Every bit of the fast envs against Meta-World's own vector env: 50 tasks, both reward versions, autoresets."""

from __future__ import annotations

import warnings
from collections import Counter

import numpy as np
import pytest
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from metaworld import _init_each_env
from metaworld.env_dict import ALL_V3_ENVIRONMENTS
from metaworld.policies import ENV_POLICY_MAP

from mtrl_imgrad.envs import MT50, MetaworldVectorEnv, make_goals

SEED = 5
NOISE = 0.1
"""Standard deviation of what is added to the experts' actions."""
GROUPS = [MT50[start : start + 10] for start in range(0, 50, 10)]


class Oracle:
    """Meta-World's envs with their wrappers in gymnasium's SyncVectorEnv, and an expert for each."""

    def __init__(self, tasks, goals, horizon: int) -> None:
        def maker(task):
            env_class, own_goals = ALL_V3_ENVIRONMENTS[task], goals.metaworld_tasks(task)
            return lambda: _init_each_env(env_class, own_goals, seed=SEED, max_episode_steps=horizon)

        self.tasks, self.horizon = tasks, horizon
        self.envs = SyncVectorEnv([maker(task) for task in tasks], autoreset_mode=AutoresetMode.SAME_STEP)
        self.policies = [ENV_POLICY_MAP[task]() for task in tasks]
        self.random = np.random.default_rng(0)

    def start_again(self, reward: str) -> None:
        """Anew, with this reward version: Meta-World reads it at every step."""
        for env in self.envs.envs:
            env.unwrapped.seed(SEED)
            env.unwrapped.reward_function_version = reward

    def actions(self, observations, expert: bool) -> np.ndarray:
        if not expert:
            return self.random.uniform(-1.2, 1.2, (len(self.tasks), 4)).astype(np.float32)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the experts warn of their own gains
            own = [policy.get_action(row.copy()) for policy, row in zip(self.policies, observations, strict=True)]
        return (np.stack(own) + self.random.normal(0, NOISE, (len(self.tasks), 4))).astype(np.float32)


def compare(oracle: Oracle, ours: MetaworldVectorEnv, episodes: int) -> Counter:
    """Step both through episodes with random actions and with experts by turns; every output must have the same bits.

    Meta-World has one environment per task, which is compared with the first of ours; the others do the opposite.

    Returns:
        What was met: `ends` of episodes, `successes`, resets to a goal for the `first` time and `again`.
    """
    met: Counter = Counter()
    seen: set[tuple[int, int]] = set()
    each = ours.envs_per_task
    expected, _ = oracle.envs.reset()
    observations, infos = ours.reset()
    assert_bits("first observations", observations[::each], expected, np.float32, oracle.tasks)
    goals = infos["goal"][::each].tolist()
    for episode in range(episodes):
        starts = set(enumerate(goals))
        met["first"] += len(starts - seen)
        met["again"] += len(starts & seen)
        seen |= starts
        succeeded = np.zeros(len(oracle.tasks), bool)
        for _ in range(oracle.horizon):
            actions = oracle.actions(expected, expert=episode % 2 == 1)
            expected, reward, terminated, truncated, info = oracle.envs.step(actions)
            own_actions = np.repeat(actions, each, axis=0)
            own_actions[np.arange(len(own_actions)) % each > 0] *= -1
            observations, own_reward, own_terminated, own_truncated, own_info = ours.step(own_actions)
            final = np.stack(info["final_obs"]) if truncated.all() else expected
            succeeded |= (info["final_info"] if truncated.all() else info)["success"] == 1.0
            assert_bits("observations", observations[::each], expected, np.float32, oracle.tasks)
            assert_bits("final observations", own_info["final_obs"][::each], final, np.float32, oracle.tasks)
            assert_bits("rewards", own_reward[::each], reward, np.float64, oracle.tasks)
            assert_bits("success", own_info["success"][::each], succeeded, np.bool_, oracle.tasks)
            assert_bits("truncated", own_truncated[::each], truncated, np.bool_, oracle.tasks)
            assert not own_terminated.any()
            assert not terminated.any()
        met["ends"] += int(truncated.sum())
        met["successes"] += int(succeeded.sum())
        goals = ours.state_dict()["start"]["goal"][::each]
    return met


def assert_bits(what, ours, theirs, dtype, tasks) -> None:
    theirs = np.asarray(theirs).astype(dtype)
    assert ours.dtype == dtype
    if ours.tobytes() != theirs.tobytes():
        differing = [task for task, a, b in zip(tasks, ours, theirs, strict=True) if a.tobytes() != b.tobytes()]
        pytest.fail(f"{what} of {', '.join(differing)} differ")


@pytest.fixture(scope="module", params=GROUPS, ids=lambda tasks: f"{tasks[0]} and 9 more")
def goals(request):
    return make_goals(request.param, goal_seed=SEED, num_goals=3)


@pytest.fixture(scope="module")
def oracle(goals):
    made = Oracle(goals.tasks, goals, horizon=16)
    yield made
    made.envs.close()


@pytest.mark.parametrize("reward", ["v2", "v1"])
def test_all_tasks_have_metaworlds_bits(oracle, goals, reward):
    """Six short episodes with three goals, so that some resets are simulated and others restored."""
    oracle.start_again(reward)
    ours = MetaworldVectorEnv(
        goals.tasks,
        goals,
        seed=SEED,
        seeding="metaworld",
        envs_per_task=2,  # two rows on one model, mostly with different goals
        horizon=16,
        reward=reward,
        workers=2,
        self_check=False,
    )
    met = compare(oracle, ours, episodes=6)
    ours.close()
    assert met["ends"] == 60
    assert min(met["first"], met["again"]) >= 10


@pytest.mark.parametrize("bad", ["action", "velocity"])
def test_a_simulation_that_mujoco_resets_has_metaworlds_bits_there_and_when_it_has_started_over(bad):
    """MuJoCo resets a simulation whose state is not finite or too large, and the hand's mount with it."""
    goals = make_goals(["push-v3"], goal_seed=SEED, num_goals=1)
    plain, fast = (MetaworldVectorEnv(goals.tasks, goals, seed=0, fast=way) for way in (False, True))
    for env in (plain, fast):
        env.reset()
    for step, actions in enumerate(np.random.default_rng(1).uniform(-1, 1, (8, 1, 4)).astype(np.float32)):
        if step == 3 and bad == "action":
            actions[0, 1] = np.nan
        if step == 3 and bad == "velocity":
            plain._section._chunk._rows[0][1]._env.data.qvel[3] = 1e11
            fast._section._chunk._fast._simulations[0][1].qvel[3] = 1e11
        expected, ours = plain.step(actions), fast.step(actions)
        final = (expected[4]["final_obs"], ours[4]["final_obs"])
        for left, right in ((expected[0], ours[0]), (expected[1], ours[1]), final):
            assert left.tobytes() == right.tobytes(), step
        assert expected[4]["unstable"] == ours[4]["unstable"] == (step == 3)
    for env in (plain, fast):
        env.close()


@pytest.fixture(scope="module")
def long_oracle(goals):
    made = Oracle(goals.tasks, goals, horizon=500)
    yield made
    made.envs.close()


@pytest.mark.slow
@pytest.mark.parametrize("reward", ["v2", "v1"])
def test_all_tasks_have_metaworlds_bits_for_thousands_of_steps(long_oracle, goals, reward):
    long_oracle.start_again(reward)
    ours = MetaworldVectorEnv(goals.tasks, goals, seed=SEED, seeding="metaworld", reward=reward, workers=1)
    met = compare(long_oracle, ours, episodes=8)
    ours.close()
    assert met["ends"] == 80
    assert met["successes"] >= 30  # of 40 episodes of experts
    assert min(met["first"], met["again"]) >= 10
