"""What belongs to another run is turned down, and the first thing that differs is named."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mtrl_imgrad.saved_state import check_like, check_same, count, entry, restore_stream, rows_of

OWN = {"actor": torch.zeros(3, 2), "updates": torch.zeros((), dtype=torch.float64)}


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ({"actor": OWN["actor"]}, "'updates' is missing"),
        (OWN | {"more": torch.zeros(1)}, "'more' belongs to no part of this run"),
        (OWN | {"actor": torch.zeros(2, 3)}, r"'actor' is float32 \[2, 3\] and must be float32 \[3, 2\]"),
        (OWN | {"actor": torch.zeros(3, 2).half()}, r"'actor' is float16 \[3, 2\] and must be float32 \[3, 2\]"),
    ],
)
def test_tensors_of_other_names_shapes_or_types_are_refused(found, message):
    check_like({name: torch.ones_like(tensor) for name, tensor in OWN.items()}, OWN)
    with pytest.raises(ValueError, match=message):
        check_like(found, OWN)


@pytest.mark.parametrize("value", [True, -1, 11, 3.0, "3", None, [3]])
def test_a_count_is_a_whole_number_in_its_range(value):
    assert [count({"n": n}, "n", 10) for n in (0, 10)] == [0, 10]
    with pytest.raises(ValueError, match=r"'n' is .* must be"):
        count({"n": value}, "n", 10)


@pytest.mark.parametrize("state", [{}, [], None, {"m": 3}])
def test_an_entry_that_is_not_there_is_missing(state):
    with pytest.raises(ValueError, match="'n' is missing"):
        entry(state, "n", int)


@pytest.mark.parametrize("values", [[0], [0, 1, 2], [0, 5], [0, -1], [0, True], [0, 1.0], "01", None])
def test_rows_are_as_many_indices_as_there_are_rows(values):
    assert rows_of({"goal": [0, 4]}, "goal", 2, 5) == [0, 4]
    with pytest.raises(ValueError, match="'goal'"):
        rows_of({"goal": values}, "goal", 2, 5)


def test_an_entry_that_a_run_would_write_otherwise_is_named():
    check_same({"tasks": ["a"], "more": 1}, {"tasks": ["a"]})
    with pytest.raises(ValueError, match=r"'tasks' is \['b'\] and must be \['a'\]"):
        check_same({"tasks": ["b"]}, {"tasks": ["a"]})
    with pytest.raises(ValueError, match="'full' is int and must be bool"):
        check_same({"full": 1}, {"full": True})


def test_a_stream_goes_on_where_the_other_was_and_takes_no_other_kinds_state():
    first, second = np.random.default_rng(1), np.random.default_rng(2)
    first.random(5)
    restore_stream(second, first.bit_generator.state)
    assert second.random() == first.random()
    for state in (None, {}, np.random.MT19937(1).state, first.bit_generator.state | {"uinteger": 2**80}):
        with pytest.raises(ValueError, match="no state of PCG64"):
            restore_stream(second, state)
