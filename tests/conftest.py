"""One thread of torch and no deadline in any test: neither figures nor verdicts depend on the machine's speed."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

import hypothesis
import pytest
import torch
from gymnasium.error import DependencyNotInstalled

from mtrl_imgrad.envs.rendering import graphics_library

hypothesis.settings.register_profile("no deadline", deadline=None)
hypothesis.settings.load_profile("no deadline")

Rows = list[dict[str, str]]


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def needs_graphics() -> None:
    """Skips what draws where there is no graphics library to draw with."""
    try:
        graphics_library()
    except DependencyNotInstalled as missing:
        pytest.skip(str(missing))


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
