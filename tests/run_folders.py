"""Run folders as tests compare them."""

from __future__ import annotations

import csv
import io
from pathlib import Path


def without_times(progress: Path) -> bytes:
    """A `progress.csv` without the columns of wall-clock time, which no two runs share."""
    with progress.open(newline="") as file:
        rows = list(csv.DictReader(file))
    text = io.StringIO()
    columns = [name for name in rows[0] if not name.startswith("time/")]
    writer = csv.DictWriter(text, columns, extrasaction="ignore")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()
