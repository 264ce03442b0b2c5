from __future__ import annotations

import csv
import math
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from mtrl_imgrad.statistics import Interval, mean_success
from mtrl_imgrad.success_curves import (
    SuccessCurve,
    area_under_curve,
    common_steps,
    final_success,
    mean_curve,
    steps_to_reach,
    success_curve,
)

QUICKSTART = Path(__file__).parents[1] / "docs" / "results" / "quickstart"


def _run(means, steps=None, tasks=("a", "b")) -> SuccessCurve:
    """A run with these means over tasks, the tasks 0.1 apart where that leaves them rates."""
    means = np.asarray(means, dtype=float)
    apart = np.where((means > 0.05) & (means < 0.95), 0.05, 0.0)
    steps = np.arange(1, len(means) + 1) * 100 if steps is None else np.asarray(steps)
    return SuccessCurve(steps, tuple(tasks), np.stack([means - apart, means + apart], axis=1))


def _rows(step, **tasks):
    return [{"step": str(step), "task": task, "success": str(won)} for task, wins in tasks.items() for won in wins]


def test_curve_of_rows():
    curve = success_curve(_rows(200, b=[1, 1], a=[0, 1]) + _rows(100, a=[0, 0], b=[1, 0]))
    assert (curve.steps.tolist(), curve.tasks) == ([100, 200], ("a", "b"))
    np.testing.assert_array_equal(curve.success, [[0.0, 0.5], [0.5, 1.0]])


def test_an_evaluation_without_one_of_the_tasks_is_refused():
    with pytest.raises(ValueError, match="step 200"):
        success_curve(_rows(100, a=[0], b=[1]) + _rows(200, a=[0]))
    with pytest.raises(ValueError, match="no evaluation"):
        success_curve([])


def test_the_quick_start_s_runs():
    runs = {}
    for seed in (1, 2, 3):
        with (QUICKSTART / f"s{seed}_eval.csv").open(newline="") as file:
            runs[seed] = success_curve(csv.DictReader(file))
    scores = final_success(runs)
    assert scores.seeds == (1, 2, 3)
    np.testing.assert_allclose(scores.values.mean(1), [0.92, 0.94, 0.992], atol=1e-9)
    assert scores.of_task("reach-v3").values[:, 0] == pytest.approx([0.84, 0.82, 0.96])
    interval = mean_success(scores).interval
    assert interval is not None
    assert interval.low == pytest.approx(0.9507 - 4.3027 * 0.0372 / math.sqrt(3), abs=1e-3)
    assert interval.high == 1.0  # 1.043, cut
    assert area_under_curve(runs) is None  # one evaluation


def test_final_success_is_the_last_common_evaluation_not_the_best():
    runs = {2: _run([0.9, 0.3, 0.5]), 1: _run([0.2, 0.4])}
    scores = final_success(runs)
    assert scores.seeds == (1, 2)
    assert scores.values.mean(1) == pytest.approx([0.4, 0.3])
    assert final_success(runs, 100).values.mean(1) == pytest.approx([0.2, 0.9])
    with pytest.raises(ValueError, match="step 300"):
        final_success(runs, 300)


def test_tasks_in_another_order_are_the_same_tasks():
    swapped = SuccessCurve(np.array([100]), ("b", "a"), np.array([[0.8, 0.1]]))
    scores = final_success({1: SuccessCurve(np.array([100]), ("a", "b"), np.array([[0.3, 0.4]])), 2: swapped})
    np.testing.assert_array_equal(scores.values, [[0.3, 0.4], [0.1, 0.8]])


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        ({}, "no runs"),
        ({1: _run([0.1]), 2: _run([0.1], tasks=("a", "c"))}, "different tasks"),
        ({1: _run([0.1], [100]), 2: _run([0.1], [150])}, "share no evaluation"),
    ],
)
def test_refused_runs(runs, message):
    with pytest.raises(ValueError, match=message):
        final_success(runs)


def test_mean_curve_has_a_pointwise_band_at_the_common_steps():
    runs = {1: _run([0.0, 0.2, 0.6, 0.9]), 2: _run([0.0, 0.4, 0.6]), 3: _run([0.0, 0.3, 0.9])}
    steps, points = mean_curve(runs)
    assert steps.tolist() == common_steps(runs.values()).tolist() == [100, 200, 300]
    assert [point.value for point in points] == pytest.approx([0.0, 0.3, 0.7])
    assert points[0].interval is None  # all at 0
    expected = stats.ttest_1samp([0.2, 0.4, 0.3], 0).confidence_interval(0.95)
    assert points[1].interval is not None
    assert (points[1].interval.low, points[1].interval.high) == pytest.approx(tuple(expected))
    assert mean_curve(runs, until=250)[0].tolist() == [100, 200]
    with pytest.raises(ValueError, match="up to step 50"):
        mean_curve(runs, until=50)


def test_area_is_that_of_trapezoids_over_uneven_steps():
    runs = {1: _run([0.0, 0.4, 0.8], [100, 200, 500]), 2: _run([1.0, 1.0, 1.0], [100, 200, 500])}
    scores = area_under_curve(runs)
    assert scores is not None
    assert scores.values.mean(1) == pytest.approx([(0.2 * 100 + 0.6 * 300) / 400, 1.0])
    up_to = area_under_curve(runs, until=200)
    assert up_to is not None
    assert up_to.values.mean(1) == pytest.approx([0.2, 1.0])


def test_a_constant_curve_s_area_is_its_height():
    scores = area_under_curve({1: _run([0.3, 0.3, 0.3], [1, 7, 1000])})
    assert scores is not None
    assert mean_success(scores).value == pytest.approx(0.3)


def test_steps_to_reach_counts_runs_that_never_do_as_later_than_all():
    runs = {1: _run([0.2, 0.5, 0.4]), 2: _run([0.1, 0.2, 0.3]), 3: _run([0.6, 0.7, 0.8])}
    found = steps_to_reach(runs, 0.5)
    assert found.by_seed == {1: 200, 2: math.inf, 3: 100}
    assert (found.reached, found.horizon, found.median) == (2, 300, 200)  # not 150, the mean of those that did
    assert found.interval is None  # 3 runs
    assert "2 of 3 runs" in found.meaning
    assert "takes 6" in found.meaning


def test_median_is_infinite_where_half_of_the_runs_never_get_there():
    runs = {1: _run([0.2, 0.9]), 2: _run([0.9, 0.9]), 3: _run([0.0, 0.0]), 4: _run([0.0, 0.1])}
    assert steps_to_reach(runs, 0.8).median == math.inf
    assert steps_to_reach({1: _run([0.2])}, 0.8).by_seed == {1: math.inf}


def test_steps_are_compared_up_to_the_last_common_evaluation():
    runs = {1: _run([0.0, 0.0, 0.9]), 2: _run([0.0, 0.9])}
    found = steps_to_reach(runs, 0.5)
    assert (found.by_seed, found.horizon) == ({1: math.inf, 2: 200}, 200)
    assert steps_to_reach(runs, 0.5, until=100).reached == 0


def test_a_mean_that_misses_its_decimal_by_a_rounding_counts():
    curve = SuccessCurve(np.array([100]), ("a", "b", "c"), np.array([[0.7, 0.8, 0.9]]))
    assert curve.success.mean() < 0.8
    assert steps_to_reach({1: curve}, 0.8).by_seed == {1: 100}


def test_interval_of_the_median_is_of_order_statistics():
    def reaching(evaluation):
        return _run([0.9 if 0 <= evaluation <= k else 0.1 for k in range(5)])

    at_once = {seed: reaching(1) for seed in range(8)}
    assert steps_to_reach(at_once, 0.5).interval == Interval(100, 200)  # the resolution of the evaluations, not 0
    none = {seed: reaching(-1) for seed in range(8)}
    assert steps_to_reach(none, 0.5).interval == Interval(500, math.inf)
    some = {seed: reaching(e) for seed, e in enumerate([0, 1, 2, 2, 3, 4, -1])}
    # 7 runs: lowest and highest hold the median with 1 - 2 / 2^7 = 98 %, the next with 88 %
    assert steps_to_reach(some, 0.5).interval == Interval(0, math.inf)
    assert steps_to_reach({seed: reaching(seed % 5) for seed in range(5)}, 0.5).interval is None


def test_interval_of_the_median_covers():
    generator = np.random.default_rng(0)
    steps = np.arange(1, 41) * 25
    held = 0
    for _ in range(300):
        times = generator.exponential(600, size=9)  # median 600 ln 2 = 416; a fifth never gets there
        curves = {seed: _run(np.where(steps >= time, 0.9, 0.1), steps) for seed, time in enumerate(times)}
        interval = steps_to_reach(curves, 0.5).interval
        assert interval is not None
        held += interval.low <= 600 * math.log(2) <= interval.high
    assert held / 300 >= 0.93  # exactly 96.1 % before rounding to evaluations; its standard error is 1.1 %
