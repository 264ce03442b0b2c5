"""What all commands share: tyro's parser of dataclasses, and how a user's mistake is told."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import tyro

from mtrl_imgrad.files import is_storage_failure

PROGRAM = "mtrl-imgrad"
LONGEST = 800
"""Characters of a message's line: the list of all aggregators fits, and a value of any length leaves both ends."""


class UserError(Exception):
    """A mistake of the user's, told in at most two lines."""


def printable(message: str) -> str:
    """A message as a terminal may see it: at most two lines of LONGEST characters, their middle left out where they are
    longer, and control characters, which may come from any value, spelled out."""
    first, *others = message.rstrip("\n").split("\n")
    lines = [first, " ".join(others)] if others else [first]
    return "\n".join(_shortened("".join(map(_spelled, line))) for line in lines)


def _spelled(character: str) -> str:
    return character if character.isprintable() else character.encode("unicode_escape").decode()


def _shortened(line: str) -> str:
    return line if len(line) <= LONGEST else f"{line[: LONGEST // 2]} [...] {line[-LONGEST // 2 + 7 :]}"


@contextlib.contextmanager
def told_as_user_errors() -> Iterator[None]:
    """Errors that a wrong field, path or task raises, as a UserError. Training itself does not run under it: a bug
    there must show its traceback."""
    try:
        yield
    except (ValueError, MemoryError, OSError) as error:
        if isinstance(error, OSError) and is_storage_failure(error):
            raise  # no mistake of the user's
        raise UserError(str(error)) from None


def parse(
    kind: Any, arguments: Sequence[str], command: str, description: str | None = None, switches: bool = False
) -> Any:
    """tyro's parser, with its boxed messages told in two lines.

    Args:
        kind: the dataclass of options.
        arguments: the command line after the command's name.
        command: its name.
        description: of the command in its help.
        switches: whether a yes-or-no option is switched on by its name alone, as in `--dry-run`, and not by
            `--name True`.

    Raises:
        UserError: an argument is wrong.
        SystemExit: help was asked for and printed.
    """
    message = io.StringIO()
    config = (tyro.conf.FlagCreatePairsOff if switches else tyro.conf.FlagConversionOff,)
    parsed = partial(tyro.cli, kind, prog=f"{PROGRAM} {command}", description=description, config=config)
    try:
        with contextlib.redirect_stderr(message):
            return parsed(args=list(arguments))
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
    shown = ["".join(map(_spelled, argument)) or "''" for argument in arguments]
    if shown != list(arguments):  # the boxes' colours are taken out below, and a user's own would go with them
        again = io.StringIO()
        with contextlib.redirect_stderr(again), contextlib.suppress(SystemExit):
            parsed(args=shown)
        message = again if again.getvalue() else message
    lines = [re.sub(r"[│╭╮╰╯├┤─]|\x1b\[[0-9;]*m", " ", line).strip(" -") for line in message.getvalue().splitlines()]
    filled = [line for line in lines if line]
    ends = ("Perhaps you meant", "Argument helptext", "For full helptext", "Arguments similar")
    until = next((i for i, line in enumerate(filled) if line.startswith(ends)), len(filled))
    raise UserError(f"{' '.join(filled[1:until]).rstrip('.')}.\nSee `{PROGRAM} {command} --help`.")
