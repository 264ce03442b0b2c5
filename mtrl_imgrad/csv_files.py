"""The run folder's tables: CSV files whose first column is the step, read without their half-written rows."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any


def csv_text(rows: Iterable[Sequence[Any]]) -> str:
    """Rows as the text of a CSV file."""
    text = io.StringIO(newline="")
    csv.writer(text).writerows(rows)
    return text.getvalue()


def is_step(text: str) -> bool:
    """Whether a cell has a number of simulator steps, as a run writes it."""
    return re.fullmatch("[0-9]{1,18}", text) is not None


def read_rows(path: Path) -> list[list[str]]:
    """Header and rows of a table; none where there is no file, and without what follows the last whole row: a killed
    process leaves half a row there, a power cut zeros.

    Raises:
        ValueError: it is not a table, or its first column is not a whole number.
    """
    try:
        content = path.read_bytes()
        text = content[: content.rfind(b"\n") + 1].decode()
        lines = list(csv.reader(io.StringIO(text, newline="")))
        whole = [line for number, line in enumerate(lines, 1) if len(line) == len(lines[0]) or number < len(lines)]
        if content and (not whole or "\0" in text or {len(line) for line in whole} != {len(lines[0])}):
            raise ValueError
        if not all(is_step(line[0]) for line in whole[1:]):
            raise ValueError
    except FileNotFoundError:
        return []
    except (OSError, IndexError, ValueError, csv.Error) as error:
        raise ValueError(
            f"run: {path} is not a table of a run ({type(error).__name__}); it must be as the run wrote it."
        ) from None
    return whole
