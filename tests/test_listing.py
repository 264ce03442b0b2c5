"""The table of the aggregators: what it says of a rule, and that it fits a terminal."""

from __future__ import annotations

import io
import sys
from dataclasses import dataclass

import pytest
import torch
from rich.console import Console

from mtrl_imgrad.aggregators import AGGREGATORS, Aggregation, Aggregator, Given
from mtrl_imgrad.listing import COLUMNS, facts, in_a_pipe, on_a_terminal

ROWS = [facts(name, rule) for name, rule in AGGREGATORS.items()]


@dataclass(frozen=True)
class Remembering(Aggregator):
    """w = f(L).

    More that the table leaves out.
    """

    rate: float = 0.5
    """Rate."""

    needs = "losses"
    critic_only = True
    paper = "Nobody 2020"

    def initial_state(self, shape: tuple[int, ...], parameters: int) -> dict[str, torch.Tensor]:
        return {"seen": torch.zeros(*shape, parameters), "last": torch.zeros(3, *shape), "calls": torch.zeros(())}

    def solve(self, given: Given) -> Aggregation:
        raise NotImplementedError


def cells(name: str, rule: type[Aggregator]) -> dict[str, str]:
    return dict(zip(COLUMNS, facts(name, rule), strict=True))


def test_a_rule_with_state_losses_and_fields():
    assert cells("remembering", Remembering) == {
        "name": "remembering",
        "paper": "Nobody 2020",
        "needs": "losses, critics only",
        "state": "seen [K, P], last [3, K], calls",
        "defaults": "rate=0.5",
        "meaning": (__doc__ or "").splitlines()[0],
    }


@pytest.mark.parametrize("name", AGGREGATORS)
def test_every_rule_says_what_it_means_and_where_it_is_from(name):
    shown = cells(name, AGGREGATORS[name])
    assert shown["meaning"] == (sys.modules[AGGREGATORS[name].__module__].__doc__ or "").splitlines()[0]
    assert shown["meaning"].endswith(".")
    assert shown["paper"] != "-" or name in ("mean", "sum")
    if AGGREGATORS[name]().initial_state((3,), 4):
        assert shown["state"][0].isalpha()
        assert ":" not in shown["state"]


def test_a_state_that_comes_with_an_option_is_shown_behind_it():
    single_loop = "mode=single_loop: logits [K], "
    assert cells("conicgrad", AGGREGATORS["conicgrad"])["state"].startswith(single_loop)
    assert cells("nashmtl", AGGREGATORS["nashmtl"])["state"] == "update_weights_every=2: alpha [K], step"
    assert cells("cagrad", AGGREGATORS["cagrad"])["state"] == "-"


def test_columns_of_a_pipe_are_aligned():
    title, *lines = in_a_pipe([*ROWS, facts("remembering", Remembering)]).splitlines()
    assert len(lines) == len(ROWS) + 1
    for column in COLUMNS[1:]:
        at = title.index(column)
        assert all(line[at - 2 : at] == "  " and line[at] != " " for line in (title, *lines))


@pytest.mark.parametrize("width", [72, 80, 140, 200])
def test_the_table_fits_the_terminal_and_loses_nothing(width):
    file = io.StringIO()
    rows = [*ROWS, facts("remembering", Remembering)]
    Console(file=file, width=width, markup=False, highlight=False).print(on_a_terminal(rows, width))
    lines = file.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    shown = "".join(file.getvalue().split())
    for name, *_ in rows:
        assert name in shown
    if width >= 140:
        titles = next(line for line in lines if line.strip()).split()
        assert titles == list(COLUMNS)
    else:
        assert "rate=0.5state:seen[K,P],last[3,K],callsNobody2020" in shown
