"""The vector env on real Meta-World tasks, against Meta-World's own envs stepped by hand."""

from __future__ import annotations

import gc
import json
import weakref
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode
from metaworld.env_dict import ALL_V3_ENVIRONMENTS
from metaworld.policies import ENV_POLICY_MAP

from mtrl_imgrad.envs import MT10, MetaworldVectorEnv, make_goals

TASKS = ("reach-v3", "drawer-close-v3")


@pytest.fixture(scope="module")
def goals():
    return make_goals((*TASKS, "button-press-topdown-v3"), goal_seed=3)


@pytest.fixture
def make_env(goals):
    """Constructs vector envs of `TASKS` and closes them after the test."""
    envs = []

    def make(tasks=TASKS, *, seed=0, **arguments: Any):
        envs.append(MetaworldVectorEnv(tasks, goals, seed=seed, **arguments))
        return envs[-1]

    yield make
    for env in envs:
        env.close()


@pytest.fixture
def plain_episode(goals):
    """Steps Meta-World's own env through a list of actions: reset observation, observations, rewards, successes."""

    def play(task, goal, actions, reward="v2"):
        env = ALL_V3_ENVIRONMENTS[task](reward_function_version=reward)
        env.set_task(goals.metaworld_tasks(task)[goal])
        first, _ = env.reset()
        steps = [env.step(action) for action in actions]
        env.close()
        observations, rewards, _, _, infos = zip(*steps, strict=True)
        return (
            np.float32(first),
            np.array(observations, np.float32),
            np.array(rewards),
            [bool(info["success"]) for info in infos],
        )

    return play


def random_actions(steps, rows, seed=0, scale=1.0):
    return np.random.default_rng(seed).uniform(-scale, scale, (steps, rows, 4)).astype(np.float32)


def roll(env, actions):
    """Every output of every step, stacked over time."""
    outputs = []
    for action in actions:
        obs, reward, terminated, truncated, infos = env.step(action)
        outputs.append({"obs": obs, "reward": reward, "terminated": terminated, "truncated": truncated} | infos)
    return {name: np.stack([output[name] for output in outputs]) for name in outputs[0]}


def assert_same(left, right):
    assert left.keys() == right.keys()
    for name in left:
        np.testing.assert_array_equal(left[name], right[name], err_msg=name)


def test_every_output_of_mt10_equals_metaworlds_vector_env_over_autoresets(metaworld_mt10, mt10_goals, mt10_settings):
    env = MetaworldVectorEnv(MT10, mt10_goals, seeding="metaworld", **mt10_settings)
    np.testing.assert_array_equal(env.reset()[0], np.float32(metaworld_mt10.reset()[0]))
    succeeded, returns, ends = np.zeros(10, bool), np.zeros(10), 0
    for action in random_actions(150, 10, scale=1.3):
        expected_obs, expected_reward, _, expected_truncated, expected = metaworld_mt10.step(action)
        obs, reward, terminated, truncated, infos = env.step(action)
        np.testing.assert_array_equal(obs, np.float32(expected_obs))
        np.testing.assert_array_equal(reward, expected_reward)
        np.testing.assert_array_equal(truncated, expected_truncated)
        assert not terminated.any()
        succeeded |= (expected["final_info"] if truncated.all() else expected)["success"] == 1.0
        returns += expected_reward
        np.testing.assert_array_equal(infos["success"], succeeded)
        np.testing.assert_array_equal(infos["episode_return"], returns)
        if truncated.any():
            np.testing.assert_array_equal(infos["final_obs"], np.float32(np.stack(expected["final_obs"])))
            succeeded[:], returns[:] = False, 0.0
            ends += 1
    assert ends == 2
    env.close()


@pytest.mark.parametrize("reward", ["v1", "v2"])
def test_an_episode_equals_the_plain_env_stepped_by_hand(make_env, plain_episode, reward):
    actions = random_actions(15, 2, scale=1.5)
    env = make_env(horizon=15, reward=reward)
    first, infos = env.reset(options={"goals": np.array([[4, 9], [7, 2]])})
    assert infos["goal"].tolist() == [4, 7]
    steps = roll(env, actions)
    for row, (task, goal, next_goal) in enumerate(zip(TASKS, (4, 7), (9, 2), strict=True)):
        plain_first, plain_obs, plain_reward, plain_success = plain_episode(task, goal, actions[:, row], reward)
        np.testing.assert_array_equal(first[row], plain_first)
        np.testing.assert_array_equal(steps["final_obs"][:, row], plain_obs)
        np.testing.assert_array_equal(steps["obs"][:-1, row], plain_obs[:-1])
        np.testing.assert_array_equal(steps["reward"][:, row], plain_reward)
        np.testing.assert_array_equal(steps["success"][:, row], np.logical_or.accumulate(plain_success))
        # The step that ends the episode returns the first observation of the next one.
        np.testing.assert_array_equal(steps["obs"][-1, row], plain_episode(task, next_goal, actions[:1, row])[0])
    assert steps["truncated"][:, 0].tolist() == steps["_final_obs"][:, 1].tolist() == [False] * 14 + [True]


def test_reward_versions_differ(make_env):
    actions = random_actions(5, 2)
    rewards = []
    for version in ("v1", "v2"):
        env = make_env(reward=version)
        env.reset(options={"goals": np.zeros((2, 1), int)})
        rewards.append(roll(env, actions)["reward"])
    assert np.all(rewards[0] != rewards[1])


def test_action_repeat_sums_rewards_and_shortens_the_last_decision(make_env, plain_episode):
    decisions = random_actions(4, 2)
    lengths = [3, 3, 3, 1]
    env = make_env(horizon=10, action_repeat=3)
    env.reset(options={"goals": np.zeros((2, 1), int)})
    steps = roll(env, decisions)
    np.testing.assert_array_equal(steps["episode_length"], np.cumsum(lengths)[:, None].repeat(2, axis=1))
    np.testing.assert_array_equal(steps["truncated"][:, 0], [False, False, False, True])
    starts = np.cumsum([0, *lengths[:-1]])
    for row, task in enumerate(TASKS):
        _, observations, rewards, _ = plain_episode(task, 0, np.repeat(decisions[:, row], lengths, axis=0))
        np.testing.assert_allclose(steps["reward"][:, row], np.add.reduceat(rewards, starts), rtol=1e-14)
        np.testing.assert_array_equal(steps["final_obs"][:, row], observations[starts + np.array(lengths) - 1])


def test_rows_are_task_major_with_their_own_goals(make_env, plain_episode):
    env = make_env(envs_per_task=3, seed=1)
    observations, infos = env.reset()
    assert (env.num_envs, env.num_tasks, env.envs_per_task, env.task_names) == (6, 2, 3, TASKS)
    assert len(set(infos["goal"].tolist())) > 3
    for row in range(6):
        expected = plain_episode(TASKS[row // 3], infos["goal"][row], random_actions(1, 1)[0])[0]
        np.testing.assert_array_equal(observations[row], expected)


def test_a_resumed_env_goes_on_bit_for_bit(make_env):
    actions = random_actions(50, 4)
    env = make_env(envs_per_task=2, horizon=20, seed=1)
    env.reset(options={"goals": np.arange(12).reshape(4, 3)})
    roll(env, actions[:20])
    state = json.loads(json.dumps(env.state_dict()))
    never_stopped = roll(env, actions)
    resumed = make_env(envs_per_task=2, horizon=20, seed=99)
    observations, infos = resumed.load_state_dict(state)
    assert infos["goal"].tolist() == [1, 4, 7, 10]
    assert_same(roll(resumed, actions), never_stopped)
    # The observations returned are those from which the first step started: the frame before lies in entries 18 to 35.
    np.testing.assert_array_equal(never_stopped["final_obs"][0, :, 18:36], observations[:, :18])


def test_reset_with_a_seed_is_a_new_env_with_that_seed(make_env):
    actions = random_actions(20, 2)
    env, new = make_env(horizon=10, seed=1), make_env(horizon=10, seed=2)
    first, _ = env.reset()
    first_run = roll(env, actions)
    np.testing.assert_array_equal(env.reset(seed=2)[0], new.reset()[0])
    assert_same(roll(env, actions), roll(new, actions))
    np.testing.assert_array_equal(env.reset(seed=1)[0], first)
    assert_same(roll(env, actions), first_run)


@pytest.mark.filterwarnings("ignore:Constant.s. may be too high")
@pytest.mark.parametrize("task", ["drawer-close-v3", "button-press-topdown-v3"])
def test_metaworlds_scripted_policy_succeeds(make_env, task):
    env = make_env([task], envs_per_task=3)
    observations, _ = env.reset(options={"goals": np.array([[0], [20], [49]])})
    policy = ENV_POLICY_MAP[task]()
    steps = []
    for _ in range(500):
        actions = np.stack([policy.get_action(observation) for observation in observations])
        steps.append(env.step(np.clip(actions, -1, 1)))
        observations = steps[-1][0]
    _, _, _, truncated, infos = steps[-1]
    assert truncated.all()
    assert infos["success"].all()
    assert infos["episode_length"].tolist() == [500] * 3


def test_spaces_and_dtypes(make_env):
    env = make_env()
    observations, _ = env.reset()
    assert env.metadata["autoreset_mode"] is AutoresetMode.SAME_STEP
    assert observations in env.observation_space
    assert observations[0] in env.single_observation_space
    env.action_space.seed(0)
    observations, rewards, terminated, truncated, infos = env.step(env.action_space.sample())
    assert observations in env.observation_space
    dtypes = [array.dtype for array in (observations, rewards, terminated, truncated)]
    assert dtypes == [np.float32, np.float64, np.bool_, np.bool_]
    assert {name: (array.dtype, array.shape) for name, array in infos.items()} == {
        "final_obs": (np.float32, (2, 39)),
        "_final_obs": (np.bool_, (2,)),
        "success": (np.bool_, (2,)),
        "goal": (np.int64, (2,)),
        "episode_return": (np.float64, (2,)),
        "episode_length": (np.int64, (2,)),
        "unstable": (np.bool_, (2,)),
    }


def test_close_releases_the_simulators(make_env):
    env = make_env(["reach-v3"])
    env.reset()
    simulator = weakref.ref(env._section._chunk._fast._envs[0])
    env.close()
    env.close()
    gc.collect()
    assert simulator() is None
    with pytest.raises(gymnasium.error.ClosedEnvironmentError):
        env.reset()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param({"horizon": 501}, "horizon: 501", id="horizon beyond Meta-World's"),
        pytest.param({"horizon": 0}, "horizon: 0", id="no horizon"),
        pytest.param({"reward": "v3"}, "reward: 'v3' is not one of v1, v2", id="unknown reward version"),
        pytest.param({"seeding": "same"}, "seeding: 'same' is not one of spawn, metaworld", id="unknown seeding"),
        pytest.param({"envs_per_task": 0}, "envs_per_task: 0", id="no env"),
        pytest.param({"action_repeat": 0}, "action_repeat: 0", id="no step"),
        pytest.param({"tasks": ["sweep-v3"]}, "goals: none for sweep-v3", id="task without goals"),
    ],
)
def test_wrong_arguments_are_named(make_env, arguments, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        make_env(**arguments)
