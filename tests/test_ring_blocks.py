"""Blocks hold every bit of the rings, and change their names exactly where their content changes."""

from __future__ import annotations

import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_replay import TASKS, Story, _all_starts, _replay

from mtrl_imgrad import ring_blocks
from mtrl_imgrad.checkpoint import save_checkpoint, step_name
from mtrl_imgrad.replay import Replay
from mtrl_imgrad.ring_blocks import blocks, changed, fill


def stored(replay: Replay) -> list[dict[str, torch.Tensor]]:
    made = blocks("replay", replay.rings(), replay.written)
    return [{name: tensor.clone() for name, tensor in made[name]().items()} for name in sorted(made)]


def restore(into: Replay, written: int, found: list[dict[str, torch.Tensor]]) -> None:
    fill(into.rings(), written, found)
    into.written = written


@pytest.fixture(params=[1, 3, 4, 100], ids=lambda slots: f"blocks of {slots}")
def _blocks(request, monkeypatch) -> None:
    slot = sum(ring[0].nbytes for ring in _replay(10, 3, 2).rings().values())
    monkeypatch.setattr(ring_blocks, "BLOCK_BYTES", request.param * slot)


@pytest.mark.usefixtures("_blocks")
@pytest.mark.parametrize("written", [6, 10, 23], ids=["partly filled", "just full", "wrapped"])
def test_a_restored_replay_gives_the_same_batches_and_goes_on_alike(written):
    story, original, restored = Story(3, 40, 2), _replay(10, 3, 2), _replay(10, 3, 2)
    story.write(original, 0, written)
    restore(restored, written, stored(original))
    for stop in (written, written + 5, 40):
        story.write(original, original.written, stop)
        story.write(restored, restored.written, stop)
        ours, theirs = original.gather(_all_starts(original)), restored.gather(_all_starts(restored))
        for name, value in vars(ours).items():
            assert value.equal(getattr(theirs, name)), name


def test_every_bit_comes_back_also_of_signed_zeros_and_nans():
    original, restored = _replay(4), _replay(4)
    original.observations[:] = torch.tensor([0.0, float("nan"), 1.0])
    original.next_observations[:] = torch.tensor([-0.0, float("nan"), 1.0])
    restore(restored, 4, stored(_written(original, 4)))
    for name, ring in original.rings().items():
        kind = torch.int32 if ring.dtype == torch.float32 else ring.dtype
        assert restored.rings()[name].view(kind).equal(ring.view(kind)), name


def _written(replay: Replay, count: int) -> Replay:
    replay.written = count
    return replay


def test_next_observations_that_are_the_following_observations_are_not_stored_again():
    replay, length = _replay(100), 100
    replay.observations.normal_()
    replay.next_observations[:-1] = replay.observations[1:]
    replay.next_observations[49] = 7.0  # the end of an episode
    (block,) = stored(_written(replay, length))
    assert block["other"].any(-1).any(-1).nonzero().flatten().tolist() == [49, 99]
    assert block["other_next_observations"].shape == (2 * TASKS, 3)


@settings(max_examples=200)
@given(
    length=st.integers(1, 12), size=st.integers(1, 5), first=st.integers(0, 40), more=st.integers(0, 30)
)  # fmt: skip
def test_a_block_keeps_its_name_exactly_if_none_of_its_slots_was_written(length, size, first, more):
    """Against rings that hold, in each slot, the number of the write that filled it."""

    def names(written: int) -> dict[tuple[int, int], list[int]]:
        ring = [-1] * length
        for number in range(written):
            ring[number % length] = number
        filled = min(written, length)
        spans = [(start, min(start + size, filled)) for start in range(0, filled, size)]
        return {(start, changed(start, stop, written, length)): ring[start:stop] for start, stop in spans}

    before, after = names(first), names(first + more)
    assert len(after) == -(-min(first + more, length) // size)
    for name, slots in after.items():
        assert (before.get(name) == slots) == (slots in before.values())
        if name in before:
            assert before[name] == slots


def test_what_is_stored_is_what_is_filled():
    replay = _replay(10, envs=2)
    Story(3, 4, 2).write(replay, 0, 4)
    assert [len(block["observations"]) for block in stored(replay)] == [4]


def test_other_shapes_and_missing_blocks_are_refused(monkeypatch):
    monkeypatch.setattr(ring_blocks, "BLOCK_BYTES", 1)
    original = _replay(10, envs=2)
    Story(3, 5, 2).write(original, 0, 5)
    found = stored(original)
    with pytest.raises(ValueError, match=r"'other' is bool \[1, 2, 2\] and must be bool \[1, 2, 1\]"):
        restore(_replay(10, envs=1), 5, found)
    with pytest.raises(ValueError, match="replay: 4 slots are stored, not 5"):
        restore(_replay(10, envs=2), 5, found[:-1])
    with pytest.raises(ValueError, match="replay: a block begins at 2, where 1 of 10 slots are filled"):
        restore(_replay(10, envs=2), 5, [found[0], *found[2:]])
    with pytest.raises(ValueError, match="replay: a block begins at 3"):
        restore(_replay(3, envs=2), 5, found)


@pytest.mark.slow
def test_checkpoints_of_mt50_take_less_than_the_replay_itself(tmp_path):
    """configs/mt50.yaml's rings at its checkpoints, until they are full and beyond; `-s` shows what training waits."""
    length, episode = 100_000, 500
    replay = Replay(length, 50, 1, 39, 4, gamma=0.99, n_step=1, device=torch.device("cpu"))
    torch.nn.init.normal_(replay.observations, generator=torch.Generator().manual_seed(1))
    replay.next_observations[:-1] = replay.observations[1:]
    replay.next_observations[episode - 1 :: episode] += 1.0  # the last of an episode is not the first of the next
    torch.nn.init.normal_(replay.actions)
    saved = None
    for step in (50_000, 100_000, 150_000):
        replay.written = step
        before = time.perf_counter()
        made = blocks("replay", replay.rings(), replay.written)
        saved = save_checkpoint(tmp_path, step_name(step), step, {}, {}, made, base=saved)
        print(f"step {step:,}: {time.perf_counter() - before:.1f} s")
    files = [path.stat() for path in tmp_path.rglob("*") if path.is_file()]
    one = sum(file["size"] for file in saved.files.values())
    both = sum({file.st_ino: file.st_size for file in files}.values())
    print(f"rings {replay.bytes / 1e6:,.0f} MB, a checkpoint {one / 1e6:,.0f} MB, two of them {both / 1e6:,.0f} MB")
    assert both < replay.bytes
