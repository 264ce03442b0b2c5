"""stable-baselines3's view of the vector env: its interface, its own algorithms, and the same numbers."""

from __future__ import annotations

import json

import numpy as np
import pytest
from gymnasium.wrappers import TimeLimit
from stable_baselines3 import SAC
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import VecEnv, VecFrameStack, VecMonitor, VecNormalize

from mtrl_imgrad.envs import MetaworldVectorEnv, make_goals
from mtrl_imgrad.envs.sb3 import MtVecEnv

TASKS = ("reach-v3", "drawer-close-v3")
HORIZON = 6


@pytest.fixture(scope="module")
def goals():
    return make_goals(TASKS, goal_seed=3, num_goals=5)


@pytest.fixture
def make_env(goals):
    """Constructs vector envs and closes them after the test."""
    envs = []

    def make(**arguments):
        envs.append(MetaworldVectorEnv(TASKS, goals, seed=0, horizon=HORIZON, **arguments))
        return envs[-1]

    yield make
    for env in envs:
        env.close()


@pytest.fixture
def make_vec_env(make_env):
    def make(*, task_one_hot=False, **arguments):
        return MtVecEnv(make_env(**arguments), task_one_hot=task_one_hot)

    return make


def random_actions(steps, rows, seed=0):
    return np.random.default_rng(seed).uniform(-1, 1, (steps, rows, 4)).astype(np.float32)


def test_it_gives_the_vector_envs_numbers_over_autoresets(make_env, make_vec_env):
    plain, ours = make_env(envs_per_task=2), make_vec_env(envs_per_task=2)
    np.testing.assert_array_equal(ours.reset(), plain.reset()[0])
    ends = 0
    for action in random_actions(2 * HORIZON + 1, 4):
        expected_obs, expected_rewards, _, expected_truncated, expected = plain.step(action)
        obs, rewards, dones, infos = ours.step(action)
        np.testing.assert_array_equal(obs, expected_obs)
        np.testing.assert_array_equal(rewards, np.float32(expected_rewards))
        np.testing.assert_array_equal(dones, expected_truncated)
        assert isinstance(infos, list)
        for row, info in enumerate(infos):
            assert info["is_success"] == expected["success"][row]
            assert info["goal"] == expected["goal"][row]
            assert info["TimeLimit.truncated"] is bool(expected_truncated[row])
            assert ("terminal_observation" in info) == ("episode" in info) == dones[row]
            if dones[row]:
                ends += 1
                np.testing.assert_array_equal(info["terminal_observation"], expected["final_obs"][row])
                assert info["episode"]["r"] == expected["episode_return"][row]
                assert info["episode"]["l"] == HORIZON
    assert ends == 2 * 4


def test_the_one_hot_names_the_rows_task_in_every_observation(make_vec_env):
    ours = make_vec_env(task_one_hot=True, envs_per_task=2)
    expected = np.array([[1, 0], [1, 0], [0, 1], [0, 1]], np.float32)
    assert ours.observation_space.shape == (41,)
    assert (ours.observation_space.low[39:] == 0).all()
    assert (ours.observation_space.high[39:] == 1).all()
    observations = [ours.reset()]
    for action in random_actions(HORIZON, 4):
        obs, _, _, infos = ours.step(action)
        observations.append(obs)
    observations.append(np.stack([info["terminal_observation"] for info in infos]))
    for obs in observations:
        assert obs.dtype == np.float32
        assert all(ours.observation_space.contains(row) for row in obs)
        np.testing.assert_array_equal(obs[:, 39:], expected)


def test_attributes_and_methods_of_rows(make_vec_env):
    ours = make_vec_env()
    assert isinstance(ours, VecEnv)
    assert ours.get_attr("task_name") == list(TASKS)
    assert ours.get_attr("task", indices=[1]) == [1]
    assert ours.get_attr("render_mode") == [None, None]
    assert ours.get_attr("action_space", 0) == [ours.action_space]
    ours.set_attr("note", "mine", indices=1)
    assert ours.get_attr("note", indices=1) == ["mine"]
    assert ours.has_attr("task")
    assert not ours.has_attr("note")  # row 0 has none
    with pytest.raises(AttributeError, match="no_such_method"):
        ours.env_method("no_such_method")
    ours.reset()
    with pytest.raises(RuntimeError, match="render_mode='rgb_array'"):
        ours.env_method("render", indices=0)


def test_it_reports_episodes_as_a_monitor_does_and_is_wrapped_in_nothing_else(make_vec_env):
    ours = make_vec_env()
    assert ours.env_is_wrapped(Monitor) == [True, True]
    assert ours.env_is_wrapped(Monitor, indices=[0]) == [True]
    assert ours.env_is_wrapped(TimeLimit) == [False, False]
    with pytest.warns(UserWarning, match="already wrapped with a `Monitor`"):
        VecMonitor(ours)


def test_seeding_restarts_the_goals_at_the_next_reset_only(make_vec_env):
    ours = make_vec_env(envs_per_task=3)

    def goals_of(resets):
        drawn = []
        for _ in range(resets):
            ours.reset()
            drawn.append([info["goal"] for info in ours.reset_infos])
        return drawn

    assert len(ours.seed(11)) == ours.num_envs
    first = goals_of(4)
    ours.seed(11)
    assert goals_of(4) == first
    assert goals_of(4) != first
    ours.seed(12)
    assert goals_of(4) != first


@pytest.mark.parametrize("options", [{"goals": [4, 1]}, [{"goals": [4, 1]}] * 2], ids=["for all", "row by row"])
def test_options_choose_the_next_goals_once(make_vec_env, options):
    ours = make_vec_env()
    ours.set_options(options)
    ours.reset()
    assert [info["goal"] for info in ours.reset_infos] == [4, 4]
    played = [[info["goal"] for info in ours.step(action)[3]] for action in random_actions(HORIZON + 1, 2)]
    assert played == [[4, 4]] * HORIZON + [[1, 1]]


@pytest.mark.parametrize("moment", [HORIZON, HORIZON + 1], ids=["where episodes begin", "inside of episodes"])
def test_it_goes_back_to_the_moment_of_a_state(make_vec_env, moment):
    first, second = make_vec_env(task_one_hot=True), make_vec_env(task_one_hot=True)
    first.reset()
    actions = random_actions(2 * HORIZON, 2)
    for action in actions[:moment]:
        reached = first.step(action)[0]
    state = json.loads(json.dumps(first.state_dict()))
    later = [first.step(action)[:2] for action in actions[moment:]]
    begun = second.load_state_dict(state)
    np.testing.assert_array_equal(begun, reached)
    assert second.reset_infos == [{"goal": goal} for goal in state["start"]["goal"]]
    for action, (observations, rewards) in zip(actions[moment:], later, strict=True):
        found = second.step(action)
        np.testing.assert_array_equal(found[0], observations)
        np.testing.assert_array_equal(found[1], rewards)


def test_options_for_some_rows_only_are_refused(make_vec_env):
    ours = make_vec_env()
    ours.set_options([{"goals": [4]}, {}])
    with pytest.raises(ValueError, match="options: every row needs the same"):
        ours.reset()


@pytest.mark.parametrize(
    "wrapper", [VecNormalize, lambda env: VecFrameStack(env, 2)], ids=["VecNormalize", "VecFrameStack"]
)
def test_sb3s_wrappers_take_it(make_vec_env, wrapper):
    wrapped = wrapper(make_vec_env())
    wrapped.reset()
    for action in random_actions(HORIZON, 2):
        obs, _, dones, infos = wrapped.step(action)
    assert dones.all()
    assert all(info["terminal_observation"].shape == obs[0].shape for info in infos)


def test_sb3s_sac_learns_on_it_and_its_statistics_are_filled(make_vec_env):
    ours = make_vec_env(task_one_hot=True)
    model = SAC(
        "MlpPolicy", ours, learning_starts=8, batch_size=8, buffer_size=100, policy_kwargs={"net_arch": [16]}, seed=0
    )
    before = [parameter.clone() for parameter in model.actor.parameters()]
    model.learn(total_timesteps=2 * (2 * HORIZON))
    assert any((old != new).any() for old, new in zip(before, model.actor.parameters(), strict=True))
    assert model.ep_info_buffer is not None
    assert [info["l"] for info in model.ep_info_buffer] == [HORIZON] * 4
    assert model.ep_success_buffer is not None
    assert len(model.ep_success_buffer) == 4
    # A time-out bootstraps: SB3 stores the done flag and, apart, that it was a time-out, from our infos.
    buffer = model.replay_buffer
    assert isinstance(buffer, ReplayBuffer)
    assert buffer.timeouts[: buffer.pos].sum() == buffer.dones[: buffer.pos].sum() == 4


def test_sb3s_evaluation_takes_it_without_a_warning(make_vec_env):
    ours = make_vec_env()
    model = SAC("MlpPolicy", ours, policy_kwargs={"net_arch": [16]}, seed=0, buffer_size=10)
    returns, lengths = evaluate_policy(model, ours, n_eval_episodes=4, return_episode_rewards=True)
    assert lengths == [HORIZON] * 4
    assert np.isfinite(returns).all()
