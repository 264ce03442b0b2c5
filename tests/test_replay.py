"""Rings and n-step windows against Python lists that hold every transition ever written."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

import mtrl_imgrad.replay
from mtrl_imgrad.replay import Replay

CPU = torch.device("cpu")
TASKS, GAMMA = 2, 0.5  # powers of one half and whole rewards make every sum exact


def _replay(length: int, n_step: int = 1, envs: int = 1, tasks: int = TASKS) -> Replay:
    return Replay(length * envs, tasks, envs, 3, 2, gamma=GAMMA, n_step=n_step, device=CPU)


class Story:
    """Vector steps as plain arrays. An observation is (time, task, env), so that every one is distinct; where an
    episode ends the next observation is a final one (time + 1000) that the next step does not begin with."""

    def __init__(self, seed: int, steps: int, envs: int, tasks: int = TASKS) -> None:
        random = np.random.default_rng(seed)
        shape = (steps, tasks, envs)
        self.steps = steps
        self.observations = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1).astype(np.float32)
        self.terminated = random.random(shape) < 0.12
        self.truncated = random.random(shape) < 0.12
        self.ended = self.terminated | self.truncated
        self.next_observations = self.observations + [1, 0, 0] + self.ended[..., None] * np.array([1000, 0, 0])
        self.rewards = random.integers(-8, 9, shape).astype(np.float32)
        self.actions = random.random((*shape, 2), dtype=np.float32)

    def write(self, replay: Replay, start: int, stop: int) -> None:
        names = ("observations", "actions", "rewards", "next_observations", "terminated", "truncated")
        for t in range(start, stop):
            replay.add(*(torch.as_tensor(getattr(self, name)[t]) for name in names))

    def window(self, t: int, task: int, env: int, n: int) -> tuple[float, np.ndarray, float]:
        """Return, bootstrap observation and discount of the window at t, by recursion."""
        reward = float(self.rewards[t, task, env])
        if n == 1 or self.ended[t, task, env]:
            discount = 0.0 if self.terminated[t, task, env] else GAMMA
            return reward, self.next_observations[t, task, env], discount
        later, final, discount = self.window(t + 1, task, env, n - 1)
        return reward + GAMMA * later, final, GAMMA * discount


def _all_starts(replay: Replay) -> torch.Tensor:
    pairs = torch.tensor(list(itertools.product(range(replay.windows), range(replay.envs_per_task))))
    return pairs.T[:, None, :].expand(2, replay.tasks, -1)


@settings(max_examples=150)
@given(
    seed=st.integers(0, 2**31), steps=st.integers(1, 40), length=st.integers(1, 15), n_step=st.integers(1, 6),
    envs=st.integers(1, 3),
)  # fmt: skip
def test_every_window_equals_the_recursion_by_hand(seed, steps, length, n_step, envs):
    replay, story = _replay(length, n_step, envs), Story(seed, steps, envs)
    story.write(replay, 0, steps)
    held = min(steps, length)
    # Windows across the write position would need steps that are not written yet: none of them may start.
    assert replay.windows == max(0, held - n_step + 1)
    if not replay.windows:
        return
    starts = _all_starts(replay)
    batch = replay.gather(starts)
    for task, row in itertools.product(range(TASKS), range(starts.shape[2])):
        t, env = steps - held + int(starts[0, task, row]), int(starts[1, task, row])
        reward, final, discount = story.window(t, task, env, n_step)
        assert batch.observations[task, row].tolist() == [t, task, env]
        np.testing.assert_array_equal(batch.actions[task, row], story.actions[t, task, env])
        assert float(batch.rewards[task, row]) == reward
        np.testing.assert_array_equal(batch.next_observations[task, row], final)
        assert float(batch.discounts[task, row]) == discount


@pytest.mark.parametrize(
    ("terminated", "truncated", "discount"),
    [(False, False, GAMMA), (False, True, GAMMA), (True, False, 0.0), (True, True, 0.0)],
    ids=["goes_on", "truncated", "terminated", "both"],
)
def test_only_termination_cuts_the_bootstrap_and_the_true_final_observation_is_kept(terminated, truncated, discount):
    replay = _replay(4, tasks=1)
    first, final, restart = torch.zeros(1, 1, 3), torch.full((1, 1, 3), 7.0), torch.full((1, 1, 3), -1.0)
    flag = torch.ones(1, 1, dtype=torch.bool)
    replay.add(first, torch.zeros(1, 1, 2), torch.ones(1, 1), final, flag & terminated, flag & truncated)
    replay.add(restart, torch.zeros(1, 1, 2), torch.ones(1, 1), restart, flag & False, flag & False)
    batch = replay.gather(torch.zeros(2, 1, 1, dtype=torch.int64))
    assert batch.next_observations.flatten().tolist() == [7, 7, 7]
    assert batch.discounts.item() == discount


@pytest.mark.parametrize("written", [20, 37], ids=["not_yet_full", "wrapped"])
def test_draws_are_uniform_over_time_and_environment_and_independent_between_tasks(written):
    envs, rows = 3, 60_000
    replay = _replay(25, n_step=4, envs=envs)
    Story(1, written, envs).write(replay, 0, written)
    cells = replay.windows * envs
    when, env = replay.draw(rows, torch.Generator().manual_seed(5))
    assert when.shape == (TASKS, rows)
    index = (when * envs + env).numpy()
    for task in range(TASKS):
        counts = np.bincount(index[task], minlength=cells)
        assert len(counts) == cells
        assert stats.chisquare(counts).pvalue > 1e-3
    coarse = when.numpy() * 4 // replay.windows
    table = np.histogram2d(coarse[0], coarse[1], bins=4)[0]
    assert stats.chi2_contingency(table).pvalue > 1e-3


def test_draws_come_from_the_given_generator_alone():
    replay = _replay(25)
    Story(1, 20, 1).write(replay, 0, 20)
    before = torch.get_rng_state()
    first = replay.draw(50, torch.Generator().manual_seed(5))
    assert torch.get_rng_state().equal(before)
    assert replay.draw(50, torch.Generator().manual_seed(5)).equal(first)
    assert not replay.draw(50, torch.Generator().manual_seed(6)).equal(first)


def test_capacity_counts_transitions_per_task_over_its_environments():
    replay = Replay(100, TASKS, 4, 3, 2, gamma=GAMMA, n_step=1, device=CPU)
    assert replay.rewards.numel() == 100 * TASKS


def test_promised_bytes_are_those_of_the_rings():
    replay = _replay(10, envs=2)
    rings = [value for value in vars(replay).values() if isinstance(value, torch.Tensor)]
    assert replay.bytes == sum(ring.nbytes for ring in rings)


def test_more_than_is_free_is_refused_in_one_line_that_says_what_fits(monkeypatch):
    sizes = (TASKS, 1, 3, 2)
    needed = Replay(1000, *sizes, gamma=GAMMA, n_step=1, device=CPU).bytes
    monkeypatch.setattr(mtrl_imgrad.replay, "free_memory", lambda device: needed // 4)
    with pytest.raises(MemoryError) as error:
        Replay(1000, *sizes, gamma=GAMMA, n_step=1, device=CPU)
    message = str(error.value)
    assert message.startswith("replay.capacity: 1,000 transitions for each of 2 tasks need")
    assert message.endswith("on cpu; at most 250 fit.")
    assert "\n" not in message
    Replay(250, *sizes, gamma=GAMMA, n_step=1, device=CPU)


def test_a_capacity_beyond_this_machine_is_refused_before_anything_is_allocated():
    with pytest.raises(MemoryError, match=r"replay\.capacity: 1,000,000,000,000 transitions"):
        Replay(10**12, TASKS, 1, 39, 4, gamma=GAMMA, n_step=1, device=CPU)
