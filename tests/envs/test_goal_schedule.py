from __future__ import annotations

import json

import numpy as np
import pytest
from gymnasium.utils import seeding

from mtrl_imgrad.envs import GoalSchedule


def draw(schedule: GoalSchedule, count: int = 30) -> np.ndarray:
    """The next `count` goals of every row, [rows, count]."""
    return np.array([[schedule.next_goal(row) for _ in range(count)] for row in range(schedule.num_rows)])


def test_spawned_rows_draw_from_different_streams():
    rows = draw(GoalSchedule(3, 2, 50, "spawn", 5))
    assert len({tuple(row) for row in rows}) == 6


def test_spawned_streams_are_numpys_grandchildren_of_the_seed():
    streams = [np.random.SeedSequence(5, spawn_key=(task, env)) for task in range(3) for env in range(2)]
    oracle = [np.random.default_rng(stream).choice(50, size=30) for stream in streams]
    np.testing.assert_array_equal(draw(GoalSchedule(3, 2, 50, "spawn", 5)), oracle)


def test_a_tasks_spawned_streams_do_not_depend_on_its_neighbours():
    small = draw(GoalSchedule(2, 1, 50, "spawn", 5))
    large = draw(GoalSchedule(4, 3, 50, "spawn", 5)).reshape(4, 3, -1)
    np.testing.assert_array_equal(small, large[:2, 0])


def test_a_seed_sequence_is_read_and_not_advanced():
    sequence = np.random.SeedSequence(5).spawn(2)[1]
    first = draw(GoalSchedule(2, 1, 50, "spawn", sequence))
    second = draw(GoalSchedule(2, 1, 50, "spawn", sequence))
    np.testing.assert_array_equal(first, second)
    assert sequence.n_children_spawned == 0
    assert not np.array_equal(first, draw(GoalSchedule(2, 1, 50, "spawn", 5)))


def test_metaworld_seeding_gives_every_task_one_sequence():
    rows = draw(GoalSchedule(3, 2, 50, "metaworld", 5)).reshape(3, 2, -1)
    generator, _ = seeding.np_random(5)
    expected = [generator.choice(50) for _ in range(30)]
    np.testing.assert_array_equal(rows[:, 0], [expected] * 3)
    assert not np.array_equal(rows[0, 0], rows[0, 1])


def test_draws_cover_all_goals_evenly():
    counts = np.bincount(draw(GoalSchedule(1, 1, 5, "spawn", 0), count=5000)[0], minlength=5)
    assert np.all(np.abs(counts - 1000) < 5 * np.sqrt(5000 * 0.2 * 0.8))


def test_queued_goals_come_first_and_take_nothing_from_the_streams():
    queue = np.array([[3, 3, 1], [0, 4, 2]])
    schedule = GoalSchedule(2, 1, 50, "spawn", 5)
    schedule.queue(queue)
    rows = draw(schedule)
    np.testing.assert_array_equal(rows[:, :3], queue)
    np.testing.assert_array_equal(rows[:, 3:], draw(GoalSchedule(2, 1, 50, "spawn", 5))[:, :27])


@pytest.mark.parametrize("seeding", ["spawn", "metaworld"])
def test_state_continues_queue_and_streams_through_json(seeding):
    schedule = GoalSchedule(2, 2, 50, seeding, 5)
    draw(schedule, 3)
    schedule.queue(np.arange(12).reshape(4, 3))
    draw(schedule, 1)
    state = json.loads(json.dumps(schedule.state_dict()))
    resumed = GoalSchedule(2, 2, 50, seeding, 99)
    resumed.load_state_dict(state)
    np.testing.assert_array_equal(draw(resumed), draw(schedule))


@pytest.mark.parametrize(
    "goals",
    [
        pytest.param(np.zeros(2, int), id="one axis"),
        pytest.param(np.zeros((3, 1), int), id="too many rows"),
        pytest.param(np.zeros((2, 0), int), id="no episode"),
        pytest.param(np.zeros((2, 1)), id="floating point"),
        pytest.param(np.full((2, 1), 50), id="too large"),
        pytest.param(np.full((2, 1), -1), id="negative"),
    ],
)
def test_wrong_queues_raise(goals):
    with pytest.raises(ValueError, match=r"^goals: "):
        GoalSchedule(2, 1, 50, "spawn", 0).queue(goals)


def test_metaworld_seeding_refuses_a_seed_sequence():
    with pytest.raises(ValueError, match=r"^seed: "):
        GoalSchedule(1, 1, 50, "metaworld", np.random.SeedSequence(0))
