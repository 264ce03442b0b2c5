"""What `mtrl-imgrad list aggregators` prints: a table as wide as the terminal, or one line per rule in a pipe."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from mtrl_imgrad.aggregators import Aggregator

NEEDS = {"gramian": "Gramian", "jacobian": "J", "losses": "losses"}
COLUMNS = ("name", "paper", "needs", "state", "defaults", "meaning")
WIDE = 140
"""Terminals with fewer columns than this show the last column's cells below one another."""


def facts(name: str, rule: type[Aggregator]) -> tuple[str, ...]:
    """A rule's cells, in the order of COLUMNS."""
    defaults = rule()
    needs = NEEDS[rule.needs] + (", critics only" if rule.critic_only else "")
    state = "yes" if defaults.initial_state((2,), 1) else "no"
    fields = dataclasses.fields(rule)  # pyright: ignore[reportArgumentType]
    values = ", ".join(f"{field.name}={getattr(defaults, field.name)}" for field in fields)
    meaning = (rule.__doc__ or "").strip().partition("\n")[0]
    return name, rule.paper or "-", needs, state, values or "-", meaning


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
            table.add_column(column, no_wrap=column in ("name", "state"))
        for row in rows:
            table.add_row(*row)
        return table
    for column in ("name", "needs", "state"):
        table.add_column(column, no_wrap=True)
    table.add_column("meaning, defaults, paper", ratio=1)
    for name, paper, needs, state, defaults, meaning in rows:
        table.add_row(name, needs, state, "\n".join(cell for cell in (meaning, defaults, paper) if cell != "-"))
    return table


def print_aggregators(rules: Mapping[str, type[Aggregator]]) -> None:
    """Print the table to stdout."""
    rows = [facts(name, rule) for name, rule in rules.items()]
    console = Console(markup=False, highlight=False)
    if console.is_terminal:
        console.print(on_a_terminal(rows, console.width))
    else:
        print(in_a_pipe(rows))
