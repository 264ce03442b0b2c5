"""gymnasium's names for the environments."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env as check_with_gymnasium
from stable_baselines3.common.env_checker import check_env as check_with_sb3

from mtrl_imgrad.envs import MetaworldTaskEnv, MetaworldVectorEnv, make_goals, task_sets
from mtrl_imgrad.envs.registration import SETS, TASKS

ROOT = Path(__file__).parents[2]
WITHOUT_AN_IMPORT = """
import gymnasium
envs = gymnasium.make_vec("mtrl_imgrad:mtrl_imgrad/drawer-close-v3", num_goals=1, horizon=3)
print(envs.reset()[0].shape, "metaworld" in globals())
envs.close()
"""


def random_actions(steps, *rows, seed=0):
    return np.random.default_rng(seed).uniform(-1, 1, (steps, *rows, 4)).astype(np.float32)


def test_every_set_and_every_task_has_a_name():
    assert sorted(f"{name}-v3" for name in TASKS) == sorted(task_sets()["MT50"])
    assert set(SETS) == set(task_sets())
    ours = {name for name in gymnasium.registry if name.startswith("mtrl_imgrad/")}
    assert ours == {f"mtrl_imgrad/{name}-v0" for name in SETS} | {f"mtrl_imgrad/{name}" for name in task_sets()["MT50"]}


def test_make_vec_makes_the_vector_env_of_a_set():
    envs = gymnasium.make_vec("mtrl_imgrad/MT10-v0", seed=5, num_goals=2, horizon=4, reward="v1", workers=2)
    assert isinstance(envs, MetaworldVectorEnv)
    assert envs.task_names == task_sets()["MT10"]
    assert envs.spec is not None
    assert envs.spec.id == "mtrl_imgrad/MT10-v0"
    direct = MetaworldVectorEnv(envs.task_names, make_goals(envs.task_names, 5, 2), seed=5, horizon=4, reward="v1")
    np.testing.assert_array_equal(envs.reset()[0], direct.reset()[0])
    for action in random_actions(5, 10):
        for made, expected in zip(envs.step(action)[:4], direct.step(action)[:4], strict=True):
            np.testing.assert_array_equal(made, expected)
    envs.close()
    direct.close()


@pytest.mark.parametrize(
    "arguments",
    [{"num_envs": 3}, {"envs_per_task": 3}, {"num_envs": 3, "envs_per_task": 3}],
    ids=["num_envs", "envs_per_task", "both"],
)
def test_the_number_of_rows_can_be_given_in_all_or_per_task(arguments):
    envs = gymnasium.make_vec("mtrl_imgrad/reach-v3", num_goals=1, **arguments)
    assert isinstance(envs, MetaworldVectorEnv)
    assert (envs.num_envs, envs.num_tasks, envs.envs_per_task) == (3, 1, 3)
    envs.close()


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("MT10-v0", {"num_envs": 15}, "num_envs: 15 rows cannot be dealt to 10 tasks x envs_per_task$"),
        ("MT10-v0", {"num_envs": 20, "envs_per_task": 3}, "num_envs: 20 rows .* 10 tasks x envs_per_task 3$"),
        ("reach-v3", {"horizon": 501}, "horizon: 501"),
        ("reach-v3", {"reward": "v3"}, "reward: 'v3'"),
        ("reach-v3", {"render_mode": "human"}, "render_mode: 'human'"),
    ],
)
def test_what_does_not_fit_is_named(name, arguments, message):
    with pytest.raises(ValueError, match=message):
        gymnasium.make_vec(f"mtrl_imgrad/{name}", **arguments)


def test_a_set_has_no_single_environment_to_vectorise():
    with pytest.raises(gymnasium.error.Error, match="doesn't have an entry point"):
        gymnasium.make_vec("mtrl_imgrad/MT10-v0", vectorization_mode="sync")


def test_a_single_task_equals_the_one_row_vector_env():
    """Also under gymnasium's own vectoriser, which resets at the step after an episode's end."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        single = gymnasium.make("mtrl_imgrad/reach-v3", seed=4, num_goals=6, horizon=5)
        sync = gymnasium.make_vec(
            "mtrl_imgrad/reach-v3",
            vectorization_mode="sync",
            vector_kwargs={"autoreset_mode": gymnasium.vector.AutoresetMode.SAME_STEP},
            seed=4,
            num_goals=6,
            horizon=5,
        )
    ours = gymnasium.make_vec("mtrl_imgrad/reach-v3", seed=4, num_goals=6, horizon=5)
    observation, infos = single.reset()
    expected, expected_infos = ours.reset()
    np.testing.assert_array_equal(observation, expected[0])
    np.testing.assert_array_equal(sync.reset()[0], expected)
    assert infos["goal"] == expected_infos["goal"][0]
    for action in random_actions(12, 1):
        expected, reward, _, truncated, expected_infos = ours.step(action)
        observation, own_reward, own_terminated, own_truncated, infos = single.step(action[0])
        np.testing.assert_array_equal(observation, expected_infos["final_obs"][0])
        assert (own_reward, own_terminated, own_truncated) == (reward[0], False, truncated[0])
        assert infos["success"] == infos["is_success"] == expected_infos["success"][0]
        assert infos["goal"] == expected_infos["goal"][0]
        np.testing.assert_array_equal(sync.step(action)[0], expected)
        if own_truncated:
            np.testing.assert_array_equal(single.reset()[0], expected[0])
    for envs in (single, sync, ours):
        envs.close()


def test_single_tasks_pass_gymnasiums_and_sb3s_checks():
    env = MetaworldTaskEnv("drawer-close-v3", num_goals=3, horizon=20)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # both warn of the unbounded observation space
        check_with_gymnasium(env, skip_render_check=True)
        check_with_sb3(env)
    env.close()


def test_a_single_task_plays_the_goal_asked_for():
    env = MetaworldTaskEnv("reach-v3", num_goals=6, seed=1)
    chosen, infos = env.reset(options={"goal": 3})
    assert infos["goal"] == 3
    again, _ = env.reset(options={"goal": 3})
    np.testing.assert_array_equal(chosen, again)
    with pytest.raises(ValueError, match="goals: 6 to 6 is not within 0 to 5"):
        env.reset(options={"goal": 6})
    with pytest.raises(ValueError, match="options: unknown 'goals'"):
        env.reset(options={"goals": 3})
    env.close()


def test_no_import_is_needed_where_the_name_says_the_package():
    command = [sys.executable, "-c", WITHOUT_AN_IMPORT]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "(1, 39) False\n"
