"""What `mtrl-imgrad list aggregators` prints: a table as wide as the terminal, or one line per rule in a pipe."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, get_args, get_type_hints

from rich import box
from rich.console import Console
from rich.table import Table

from mtrl_imgrad.aggregators import Aggregator

NEEDS = {"gramian": "Gramian", "jacobian": "J", "losses": "losses"}
COLUMNS = ("name", "paper", "needs", "state", "defaults", "meaning")
WIDE = 140
"""Terminals with fewer columns than this show the last column's cells below one another."""


SIZES = {97: "K", 101: "P"}
"""Numbers of tasks and parameters that no rule's own sizes are equal to."""


def facts(name: str, rule: type[Aggregator]) -> tuple[str, ...]:
    """A rule's cells, in the order of COLUMNS. The meaning is the sentence that opens the rule's file; its class opens
    with the formula."""
    needs = NEEDS[rule.needs] + (", critics only" if rule.critic_only else "")
    defaults = ", ".join(f"{field}={value}" for field, value in default_fields(rule).items())
    meaning = (sys.modules[rule.__module__].__doc__ or "").partition("\n")[0]
    return name, rule.paper or "-", needs, remembered(rule), defaults or "-", meaning


def default_fields(rule: type[Aggregator]) -> dict[str, Any]:
    """The hyper-parameters by name."""
    defaults = rule()
    return {field.name: getattr(defaults, field.name) for field in dataclasses.fields(rule)}  # pyright: ignore[reportArgumentType]


def remembered(rule: type[Aggregator]) -> str:
    """The state's names and shapes; where the defaults have none, behind the option that has one."""
    for options in ({}, *other_options(rule)):
        state = rule(**options).initial_state((97,), 101)
        if state:
            condition = "".join(f"{field}={value}: " for field, value in options.items())
            return condition + ", ".join(f"{key}{shape(value.shape)}" for key, value in state.items())
    return "-"


def other_options(rule: type[Aggregator]) -> Iterator[dict[str, Any]]:
    """One field at a time away from its default: every other choice, and one more of a count."""
    hints = get_type_hints(rule)
    for field, default in default_fields(rule).items():
        counts = (default + 1,) if hints[field] is int else ()
        yield from ({field: value} for value in (*get_args(hints[field]), *counts) if value != default)


def shape(sizes: Sequence[int]) -> str:
    """In letters; nothing for a single number."""
    return f" [{', '.join(SIZES.get(size, str(size)) for size in sizes)}]" if sizes else ""


def in_a_pipe(rows: Sequence[Sequence[str]]) -> str:
    """One line per rule; columns are separated by at least two blanks."""
    widths = [max(map(len, cells)) for cells in zip(COLUMNS, *rows, strict=True)]
    lines = ("  ".join(map(str.ljust, row, widths)).rstrip() for row in (COLUMNS, *rows))
    return "\n".join(lines)


def on_a_terminal(rows: Sequence[Sequence[str]], width: int) -> Table:
    """As a table whose cells are broken to the width."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_lines=width < WIDE, leading=int(width >= WIDE))
    if width >= WIDE:
        for column in COLUMNS:
            table.add_column(column, no_wrap=column == "name")
        for row in rows:
            table.add_row(*row)
        return table
    for column in ("name", "needs"):
        table.add_column(column, no_wrap=True)
    table.add_column("meaning, defaults, state, paper", ratio=1)
    for name, paper, needs, state, defaults, meaning in rows:
        state = state if state == "-" else f"state: {state}"
        table.add_row(name, needs, "\n".join(cell for cell in (meaning, defaults, state, paper) if cell != "-"))
    return table


def print_aggregators(rules: Mapping[str, type[Aggregator]]) -> None:
    """Print the table to stdout."""
    rows = [facts(name, rule) for name, rule in rules.items()]
    console = Console(markup=False, highlight=False)
    if console.is_terminal:
        console.print(on_a_terminal(rows, console.width))
    else:
        print(in_a_pipe(rows))
