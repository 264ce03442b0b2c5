"""The vector env's rules on a scripted task that costs nothing: its observation counts, its success comes and goes."""

from __future__ import annotations

import pickle
from typing import Any

import mujoco
import numpy as np
import pytest
from gymnasium.wrappers.vector import DictInfoToList, RecordEpisodeStatistics
from metaworld import env_dict

from mtrl_imgrad.envs import Goals, GoalSchedule, MetaworldVectorEnv

TASKS = ("reach-v3", "push-v3")
SUCCESSFUL_STEP = 3


class ScriptedEnv:
    """Stands in for a Meta-World env: observation 100 x goal + steps taken, reward the action's first entry."""

    def __init__(self, reward_function_version):
        self.steps = 0
        self.data = mujoco.MjData(mujoco.MjModel.from_xml_string("<mujoco/>"))

    def set_task(self, task):
        self.goal = pickle.loads(task.data)["rand_vec"][0]

    def _observe(self):
        return np.full(39, 100 * self.goal + self.steps)

    def reset(self):
        self.steps = 0
        return self._observe(), {}

    def step(self, action):
        self.steps += 1
        return self._observe(), float(action[0]), False, False, {"success": float(self.steps == SUCCESSFUL_STEP)}

    def close(self):
        pass


@pytest.fixture
def make_env(monkeypatch):
    for task in TASKS:
        monkeypatch.setitem(env_dict.ALL_V3_ENVIRONMENTS, task, ScriptedEnv)
    goals = Goals(0, {task: np.arange(50.0)[:, None] for task in TASKS})

    def make(*, seed=0, **arguments: Any):
        return MetaworldVectorEnv(TASKS, goals, seed=seed, fast=False, **arguments)

    return make


def ones(env):
    return np.ones((env.num_envs, 4), np.float32)


def test_success_is_latched_until_the_episode_ends_and_not_beyond(make_env):
    env = make_env(horizon=5)
    env.reset()
    successes = [env.step(ones(env))[4]["success"].tolist() for _ in range(10)]
    assert successes == 2 * [[False] * 2, [False] * 2, [True] * 2, [True] * 2, [True] * 2]


def test_success_in_any_repeated_step_counts(make_env):
    env = make_env(horizon=8, action_repeat=4)
    env.reset()
    assert env.step(ones(env))[4]["success"].all()


def test_infos_belong_to_the_episode_that_ends(make_env):
    env = make_env(horizon=4)
    env.reset(options={"goals": np.array([[5, 6], [7, 8]])})
    observations, _, terminated, truncated, infos = [env.step(ones(env)) for _ in range(4)][-1]
    assert truncated.all()
    assert not terminated.any()
    assert observations[:, 0].tolist() == [600, 800]
    assert infos["final_obs"][:, 0].tolist() == [504, 704]
    assert infos["goal"].tolist() == [5, 7]
    assert infos["episode_return"].tolist() == [4.0, 4.0]
    assert infos["episode_length"].tolist() == [4, 4]
    infos = env.step(ones(env))[4]
    assert (infos["goal"].tolist(), infos["episode_return"].tolist()) == ([6, 8], [1.0, 1.0])


def test_explicit_goals_are_played_in_order_and_then_drawn_again(make_env):
    env = make_env(horizon=1, seed=3)
    queue = np.array([[1, 2, 1], [9, 9, 0]])
    env.reset(options={"goals": queue})
    played = np.stack([env.step(ones(env))[4]["goal"] for _ in range(8)], axis=1)
    np.testing.assert_array_equal(played[:, :3], queue)
    schedule = GoalSchedule(2, 1, 50, "spawn", 3)
    drawn = [[schedule.next_goal(row) for _ in range(5)] for row in range(2)]
    np.testing.assert_array_equal(played[:, 3:], drawn)


def test_a_later_reset_drops_queued_goals(make_env):
    env = make_env(horizon=1, seed=3)
    env.reset(options={"goals": np.full((2, 9), 7)})
    _, infos = env.reset()
    _, expected = make_env(horizon=1, seed=3).reset()
    assert infos["goal"].tolist() == expected["goal"].tolist()


@pytest.mark.parametrize("seeding", ["spawn", "metaworld"])
def test_goals_of_the_tasks_follow_the_seeding(make_env, seeding):
    env = make_env(horizon=1, seeding=seeding)
    env.reset()
    first, second = np.stack([env.step(ones(env))[4]["goal"] for _ in range(20)], axis=1)
    assert np.array_equal(first, second) == (seeding == "metaworld")


def test_returned_arrays_and_given_actions_are_not_shared(make_env):
    env = make_env(horizon=2)
    first, _ = env.reset()
    actions = ones(env)
    env.step_async(actions)
    actions[:] = 7.0
    observations, rewards, terminated, truncated, infos = env.step_wait()
    assert rewards.tolist() == [1.0, 1.0]
    kept = [first, observations, rewards, terminated, truncated, *infos.values()]
    copies = [array.copy() for array in kept]
    env.step(ones(env))
    for array, copy in zip(kept, copies, strict=True):
        np.testing.assert_array_equal(array, copy)
    observations[:] = -1.0
    assert not (infos["final_obs"] == -1.0).any()


def test_state_is_refused_before_the_first_reset_and_inside_a_step(make_env):
    env = make_env(horizon=2)
    with pytest.raises(RuntimeError, match="state_dict is valid after reset"):
        env.state_dict()
    env.reset()
    env.state_dict()
    env.step_async(ones(env))
    with pytest.raises(RuntimeError, match="between two steps"):
        env.state_dict()
    env.step_wait()
    assert len(env.state_dict()["actions"]) == 1
    env.step(ones(env))
    assert env.state_dict()["actions"] == [], "the next episode has begun"


@pytest.mark.parametrize("field", ["tasks", "envs_per_task"])
def test_the_state_of_another_env_is_refused(make_env, field):
    env = make_env()
    env.reset()
    state = env.state_dict() | {field: {"tasks": ["push-v3"], "envs_per_task": 2}[field]}
    with pytest.raises(ValueError, match=f"^{field}: "):
        env.load_state_dict(state)


def test_steps_out_of_order_raise(make_env):
    env = make_env()
    with pytest.raises(RuntimeError, match="call reset"):
        env.step(ones(env))
    env.reset()
    with pytest.raises(RuntimeError, match="step_async first"):
        env.step_wait()
    with pytest.raises(ValueError, match=r"^actions: "):
        env.step_async(np.ones(4, np.float32))
    env.step_async(ones(env))
    with pytest.raises(RuntimeError, match="step_wait first"):
        env.step_async(ones(env))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param({"goal": np.zeros((2, 1), int)}, "options: unknown 'goal'", id="misspelt option"),
        pytest.param({"goals": np.full((2, 1), 50)}, "goals: 50 to 50 is not within 0 to 49", id="goal out of range"),
    ],
)
def test_wrong_options_of_reset_are_named(make_env, options, message):
    with pytest.raises(ValueError, match=message):
        make_env().reset(options=options)


def test_gymnasiums_vector_wrappers_work(make_env):
    env = DictInfoToList(RecordEpisodeStatistics(make_env(horizon=3)))
    env.reset()
    steps = [env.step(np.full((2, 4), 0.5, np.float32)) for _ in range(3)]
    for info in steps[-1][4]:
        assert info["episode"]["r"] == info["episode_return"] == 1.5
        assert info["episode"]["l"] == info["episode_length"] == 3
