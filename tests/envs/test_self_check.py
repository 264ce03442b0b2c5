"""The start-up check finds a bit that differs, and the task is then stepped as Meta-World does."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

from mtrl_imgrad.envs import MetaworldVectorEnv, TaskEnv, fast_env, fast_rows, make_goals, self_check
from mtrl_imgrad.envs.fast_env import FastStepping, FastTask

TASKS = ("reach-v3", "door-open-v3")


@pytest.fixture(scope="module")
def goals():
    return make_goals(TASKS, goal_seed=3)


@pytest.fixture
def fresh_classes():
    """Fast classes are made once and remembered: forget those of a test."""
    fast_env.fast_class.cache_clear()
    yield
    fast_env.fast_class.cache_clear()


def rewards_of(env) -> np.ndarray:
    env.reset(options={"goals": np.zeros((env.num_envs, 1), int)})
    actions = np.random.default_rng(0).uniform(-1, 1, (10, env.num_envs, 4)).astype(np.float32)
    return np.stack([env.step(action)[1] for action in actions])


def assert_falls_back(goals, message: str) -> None:
    plain = MetaworldVectorEnv(TASKS, goals, seed=0, fast=False)
    with pytest.warns(RuntimeWarning, match=message) as caught:
        env = MetaworldVectorEnv(TASKS, goals, seed=0)
    assert len(caught) == 1
    assert rewards_of(env).tobytes() == rewards_of(plain).tobytes()
    env.close()
    plain.close()


def test_nothing_is_said_where_all_bits_agree(goals):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        env = MetaworldVectorEnv(TASKS, goals, seed=0)
    env.close()


def test_one_bit_of_an_observation_is_enough(goals, monkeypatch):
    observe = fast_rows.FastRows._observe

    def wrong(self):
        observations = observe(self)
        observations[:, 4] = np.nextafter(observations[:, 4], 9.0)
        return observations

    monkeypatch.setattr(fast_rows.FastRows, "_observe", wrong)
    assert_falls_back(goals, r"reach-v3: step 0 .* differs; door-open-v3: step 0 .* differs$")


def test_a_task_that_differs_is_named_and_the_other_stays_fast(goals, monkeypatch, fresh_classes):
    objects = FastStepping.objects

    def wrong(self, entries):
        objects(self, entries)
        if self.frame_skip and "Door" in type(self).__name__:
            entries[6] += 1e-9

    monkeypatch.setattr(FastStepping, "objects", wrong)
    with pytest.warns(RuntimeWarning, match=r"door-open-v3: step 0") as caught:
        env = MetaworldVectorEnv(TASKS, goals, seed=0)
    assert "reach-v3" not in str(caught[0].message)
    assert [type(row).__name__ for _, row in env._section._chunk._rows] == ["TaskEnv"]
    env.close()


def test_a_metaworld_that_is_made_differently_is_told(goals, monkeypatch, fresh_classes):
    def missing(self):
        raise KeyError("leftpad_geom")

    monkeypatch.setattr(FastStepping, "become_fast", missing)
    assert_falls_back(goals, r"reach-v3: KeyError: 'leftpad_geom'")


def test_a_reset_that_depends_on_the_past_is_told(goals, monkeypatch):
    task = FastTask("reach-v3", goals.metaworld_tasks("reach-v3"))
    drift = iter(range(100))
    reset_model = task.env_class.reset_model

    def drifting(self):
        observation = reset_model(self)
        self.data.qpos[0] += 1e-6 * next(drift)
        return observation

    monkeypatch.setattr(task.env_class, "reset_model", drifting)
    assert self_check.difference(task, "reach-v3", "v2", 1) == "a reset's outcome depends on the episode before"


@pytest.mark.parametrize(("task", "reward"), [("door-open-v3", "v2"), ("disassemble-v3", "v1")])
def test_a_row_that_sees_the_model_of_another_goal_is_told(monkeypatch, task, reward):
    """In the second task only the reward reads the model, after the physics of all rows."""
    goals = make_goals([task], goal_seed=3)
    farthest = int(np.abs(goals.vectors[task] - goals.vectors[task][0]).sum(1).argmax())
    evaluate = task == "disassemble-v3"
    place, observe = fast_rows.FastRows._place, fast_rows.FastRows._observe

    def observed(self):
        observations = observe(self)
        if evaluate:
            monkeypatch.setattr(fast_rows.FastRows, "_place", lambda self, row: None)
        return observations

    def advanced(self, *arguments):
        monkeypatch.setattr(fast_rows.FastRows, "_place", place if evaluate else lambda self, row: None)
        return advance(self, *arguments)

    advance = fast_rows.FastRows._advance
    monkeypatch.setattr(fast_rows.FastRows, "_observe", observed)
    monkeypatch.setattr(fast_rows.FastRows, "_advance", advanced)
    shared = FastTask(task, goals.metaworld_tasks(task))
    assert self_check.difference(shared, task, reward, farthest) == "step 0 of the start-up check differs"


def test_the_check_can_be_left_out(goals, monkeypatch):
    monkeypatch.setattr(self_check, "difference", lambda *_: pytest.fail("checked"))
    MetaworldVectorEnv(TASKS, goals, seed=0, self_check=False).close()


def test_a_task_is_checked_once_per_reward_version(goals, monkeypatch):
    checked = []
    monkeypatch.setattr(self_check, "difference", lambda shared, task, reward, _: checked.append((task, reward)))
    env = MetaworldVectorEnv(TASKS, goals, seed=0, envs_per_task=2)
    others = [MetaworldVectorEnv(TASKS, goals, seed=0, reward=reward, share=env) for reward in ("v2", "v1")]
    assert checked == [("reach-v3", "v2"), ("door-open-v3", "v2"), ("reach-v3", "v1"), ("door-open-v3", "v1")]
    for each in (*others, env):
        each.close()


def test_fast_rows_of_one_task_share_a_model_and_keep_their_goals(goals):
    """Two environments of one task with two goals: the door is where each one's goal has it."""
    task = "door-open-v3"
    env = MetaworldVectorEnv([task], goals, seed=0, envs_per_task=2, self_check=False)
    env.reset(options={"goals": np.array([[1], [2]])})
    plain = [TaskEnv(task, goals.metaworld_tasks(task), horizon=500, reward="v2", action_repeat=1) for _ in range(2)]
    for row, goal in zip(plain, (1, 2), strict=True):
        row.reset(goal)
    for actions in np.random.default_rng(0).uniform(-1, 1, (10, 2, 4)).astype(np.float32):
        observations, rewards, _, _, _ = env.step(actions)
        expected = [row.step(action) for row, action in zip(plain, actions, strict=True)]
        assert observations.tobytes() == np.stack([result[0] for result in expected]).astype(np.float32).tobytes()
        assert rewards.tolist() == [result[1] for result in expected]
    assert len({id(model) for model, _, _ in env._section._chunk._fast._simulations}) == 1
    env.close()
