from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from mtrl_imgrad.rewards import RewardNormalizer, observe_returns


def _rewards(steps: int, rows: int) -> np.ndarray:
    return np.random.default_rng(1).normal(2.0, 5.0, (steps, rows))


@pytest.mark.parametrize("rate", [0.001, 0.3, 0.9])
@pytest.mark.parametrize("envs", [1, 3])
def test_equals_the_recursion_by_hand(rate, envs):
    tasks, rewards = 2, _rewards(20, 2 * envs)
    normalizer = RewardNormalizer(tasks, rate)
    mean, variance = [0.0] * tasks, [1.0] * tasks
    for row in rewards:
        expected = []
        for task in range(tasks):
            for reward in row[task * envs : (task + 1) * envs]:
                mean[task] = (1 - rate) * mean[task] + rate * reward
                variance[task] = (1 - rate) * variance[task] + rate * (reward - mean[task]) ** 2
                expected.append(reward / math.sqrt(variance[task]))
        np.testing.assert_allclose(normalizer(row), expected, rtol=1e-10)


def test_rate_zero_changes_nothing():
    normalizer = RewardNormalizer(2, 0.0)
    for row in _rewards(5, 4):
        np.testing.assert_array_equal(normalizer(row), row)


def test_input_is_left_alone_and_dtype_kept():
    normalizer, row = RewardNormalizer(2, 0.1), _rewards(1, 4)[0].astype(np.float32)
    before = row.copy()
    assert normalizer(row).dtype == np.float32
    np.testing.assert_array_equal(row, before)


def test_a_long_run_of_rewards_ends_near_unit_variance():
    normalizer = RewardNormalizer(1, 0.01)
    results = np.concatenate([normalizer(row) for row in _rewards(4000, 1)])
    assert results[1000:].std() == pytest.approx(1.0, rel=0.1)


def test_state_round_trip_goes_on_with_the_same_numbers():
    first, second = RewardNormalizer(2, 0.1), RewardNormalizer(2, 0.1)
    rewards = _rewards(10, 4)
    for row in rewards[:5]:
        first(row)
    second.load_state_dict(first.state_dict())
    # All of one before any of the other: a state that moved with its source would show.
    expected = [first(row) for row in rewards[5:]]
    np.testing.assert_array_equal([second(row) for row in rewards[5:]], expected)


@pytest.mark.parametrize("measure", ["largest", "rms"])
def test_the_size_of_returns_is_that_over_all_parts_of_episodes_of_the_task(measure):
    """By hand, episode by episode: the sum of gamma^(t - j) r_j from the episode's start to every t."""
    random, gamma, steps, tasks, envs = np.random.default_rng(2), 0.8, 40, 3, 2
    rewards, ended = random.normal(0.3, 1.0, (steps, tasks, envs)), random.random((steps, tasks, envs)) < 0.2
    state = return_state(tasks, envs)
    for step in range(steps):
        observe_returns(*state, torch.tensor(rewards[step]), torch.tensor(ended[step]), gamma, measure)
        for task in range(tasks):
            seen = []
            for env in range(envs):
                start = 0
                for t in range(step + 1):
                    discounts = gamma ** np.arange(t - start, -1, -1)
                    seen.append(abs(discounts @ rewards[start : t + 1, task, env]))
                    start = t + 1 if ended[t, task, env] else start
            expected = max(seen) if measure == "largest" else math.sqrt(np.mean(np.square(seen)))
            assert float(state[1][task]) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("measure", ["largest", "rms"])
def test_values_of_tasks_of_any_size_get_one_size(measure):
    """Constant rewards: a long episode's return, divided by the size, is near 1 for every task."""
    rewards, gamma = torch.tensor([[0.01], [1.0], [100.0]], dtype=torch.float64), 0.9
    state = return_state(3, 1)
    for _ in range(2000):
        observe_returns(*state, rewards, torch.zeros(3, 1, dtype=torch.bool), gamma, measure)
    values = rewards[:, 0] / (1 - gamma) / state[1]
    torch.testing.assert_close(values, torch.ones(3, dtype=torch.float64), atol=0.01, rtol=0)


def test_one_lucky_return_is_outweighed_by_time_in_the_root_mean_square_alone():
    sizes = {}
    for measure in ("largest", "rms"):
        state = return_state(1, 1)
        for step in range(1000):
            reward = torch.full((1, 1), 100.0 if step == 10 else 0.1, dtype=torch.float64)
            observe_returns(*state, reward, torch.ones(1, 1, dtype=torch.bool), 0.9, measure)
        sizes[measure] = float(state[1])
    assert sizes["largest"] == 100
    assert sizes["rms"] == pytest.approx(math.sqrt((100**2 + 999 * 0.1**2) / 1000))
    assert sizes["rms"] < 4


def return_state(tasks: int, envs: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns, sizes and steps as a learner starts with them, in float64."""
    returns, size = torch.zeros(tasks, envs, dtype=torch.float64), torch.zeros(tasks, dtype=torch.float64)
    return returns, size, torch.zeros((), dtype=torch.float64)
