from __future__ import annotations

import numpy as np
import pytest
import torch

from mtrl_imgrad.config import NetworkConfig
from mtrl_imgrad.networks import ObservationInput

TASKS, ENTRIES = 3, 39
CPU = torch.device("cpu")


def _input(**settings) -> ObservationInput:
    defaults = {"task_input": "none", "previous_frame": "raw", "observation_normalization": True}
    return ObservationInput(NetworkConfig(**(defaults | settings)), TASKS, ENTRIES)


def _data(rows: int, seed: int = 1) -> np.ndarray:
    """Observations far from zero with small spread, as positions in metres are: the hard case for a variance."""
    return np.random.default_rng(seed).normal(0.6, 0.05, (TASKS, rows, ENTRIES)).astype(np.float32)


@pytest.mark.parametrize("chunks", [[200], [1] * 200, [3, 97, 1, 99]], ids=["at_once", "one_by_one", "uneven"])
def test_running_statistics_equal_numpys_mean_and_variance(chunks):
    inputs, data = _input(), _data(200)
    statistics = inputs.initial_statistics(ENTRIES, CPU)
    for part in np.split(data, np.cumsum(chunks)[:-1], axis=1):
        inputs.observe(statistics, torch.from_numpy(part))
    exact = data.astype(np.float64)
    count, mean, squares = statistics.numpy()
    np.testing.assert_array_equal(count, 200)
    np.testing.assert_allclose(mean, exact.mean(1), rtol=1e-12)
    np.testing.assert_allclose(squares / count, exact.var(1), rtol=1e-9)
    expected = (exact - exact.mean(1, keepdims=True)) / np.sqrt(exact.var(1, keepdims=True) + 1e-6)
    ours = inputs(statistics, torch.from_numpy(data))
    assert ours.dtype == torch.float32
    np.testing.assert_allclose(ours.numpy(), expected, atol=2e-5)


def test_tasks_have_statistics_of_their_own():
    inputs, data = _input(), torch.from_numpy(_data(50))
    statistics, other = inputs.initial_statistics(ENTRIES, CPU), inputs.initial_statistics(ENTRIES, CPU)
    inputs.observe(statistics, data)
    changed = data.clone()
    changed[1] += 5
    inputs.observe(other, changed)
    assert statistics[:, [0, 2]].equal(other[:, [0, 2]])
    assert not statistics[:, 1].equal(other[:, 1])


def test_before_the_first_observation_inputs_pass_through():
    inputs, data = _input(), torch.from_numpy(_data(4))
    torch.testing.assert_close(inputs(inputs.initial_statistics(ENTRIES, CPU), data), data, rtol=1e-6, atol=0)


def test_far_outliers_are_clipped_to_ten_standard_deviations():
    inputs, data = _input(), torch.from_numpy(_data(100))
    statistics = inputs.initial_statistics(ENTRIES, CPU)
    inputs.observe(statistics, data)
    far = torch.full((TASKS, 1, ENTRIES), 1e6)
    assert inputs(statistics, far).eq(10).all()
    assert inputs(statistics, -far).eq(-10).all()


def test_constant_entries_stay_finite_and_are_not_blown_up():
    inputs, data = _input(), torch.from_numpy(_data(100))
    data[..., 7] = 0.0
    data[..., 8] = 0.123
    statistics = inputs.initial_statistics(ENTRIES, CPU)
    inputs.observe(statistics, data)
    result = inputs(statistics, data)
    assert torch.isfinite(result).all()
    assert result[..., 7].eq(0).all()
    assert result[..., 8].abs().max() < 1e-4
    # A tenth of a millimetre away from a constant is a tenth of a unit, not an outlier.
    assert inputs(statistics, data + 1e-4)[..., 7].max() == pytest.approx(0.1, rel=1e-3)


def test_difference_replaces_the_previous_frame_by_the_change_and_keeps_the_rest():
    inputs = _input(observation_normalization=False, previous_frame="difference")
    data = _data(5)
    result = inputs(inputs.initial_statistics(ENTRIES, CPU), torch.from_numpy(data)).numpy()
    np.testing.assert_array_equal(result[..., :18], data[..., :18])
    np.testing.assert_array_equal(result[..., 18:36], data[..., :18] - data[..., 18:36])
    np.testing.assert_array_equal(result[..., 36:], data[..., 36:])


def test_difference_is_normalised_by_its_own_statistics():
    inputs, data = _input(previous_frame="difference"), torch.from_numpy(_data(400))
    statistics = inputs.initial_statistics(ENTRIES, CPU)
    inputs.observe(statistics, data)
    torch.testing.assert_close(inputs(statistics, data).std(1), torch.ones(TASKS, ENTRIES), rtol=5e-3, atol=0)


def test_difference_needs_both_frames():
    config = NetworkConfig(previous_frame="difference")
    with pytest.raises(ValueError, match=r"network\.previous_frame.*have 35"):
        ObservationInput(config, TASKS, 35)


def test_one_hot_names_the_task_and_is_not_normalised():
    inputs, data = _input(task_input="one_hot"), torch.from_numpy(_data(100))
    statistics = inputs.initial_statistics(ENTRIES, CPU)
    inputs.observe(statistics, data)
    result = inputs(statistics, data)
    assert inputs.size == ENTRIES + TASKS == result.shape[-1]
    for task in range(TASKS):
        assert result[task, :, ENTRIES:].eq(torch.eye(TASKS)[task]).all()
    assert result[..., :ENTRIES].equal(_input()(statistics, data))
