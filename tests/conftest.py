"""One thread of torch for all tests, so that their figures and their speed do not depend on the machine."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

Rows = list[dict[str, str]]


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def read_csv() -> Callable[[Path], Rows]:
    """Reads a CSV file as a list of rows."""

    def read(path: Path) -> Rows:
        with path.open(newline="") as file:
            return list(csv.DictReader(file))

    return read


@pytest.fixture(scope="session")
def read_progress(read_csv: Callable[[Path], Rows]) -> Callable[[Path], Rows]:
    """Reads the progress.csv of a run folder without its wall-clock columns."""

    def read(folder: Path) -> Rows:
        rows = read_csv(folder / "progress.csv")
        return [{tag: value for tag, value in row.items() if not tag.startswith("time/")} for row in rows]

    return read
