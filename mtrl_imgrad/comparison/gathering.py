"""A run folder copied from the machine that trains to the one that compares, while it grows."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

Stamps = dict[str, tuple[int, int]]
"""Time of change in ns and size of each file, by path in the folder."""


@dataclass(frozen=True)
class Changes:
    """What is new in a run folder.

    Attributes:
        files: content of each new or changed file, by path in the folder. Checkpoints are whole or not in it.
        checkpoints: names of all checkpoints that there are.
        others: paths in the folder of all files that there are outside of checkpoints.
    """

    files: Mapping[str, bytes]
    checkpoints: tuple[str, ...]
    others: tuple[str, ...]


def changes(folder: Path, known: Stamps) -> tuple[Changes, Stamps]:
    """What differs from what is known, and what is known then."""
    files: dict[str, bytes] = {}
    stamps: Stamps = {}
    checkpoints = sorted(path for path in (folder / "checkpoints").glob("*") if not path.name.endswith(".tmp"))
    others = _others(folder)
    for unit in [[folder / name] for name in others] + [sorted(checkpoint.iterdir()) for checkpoint in checkpoints]:
        try:
            found = {str(path.relative_to(folder)): _stamp(path) for path in unit}
            if any(known.get(name) != stamp for name, stamp in found.items()):
                files |= {name: (folder / name).read_bytes() for name in found}
        except FileNotFoundError:  # the run has just replaced it
            continue
        stamps |= found
    return Changes(files, tuple(checkpoint.name for checkpoint in checkpoints), tuple(others)), stamps


def apply(changed: Changes, folder: Path) -> None:
    """Bring a copy up to date. At every moment it is a folder that a run can go on from.

    Raises:
        ValueError: a file would lie outside of the folder.
    """
    whole: dict[str, list[str]] = {}
    for name, content in changed.files.items():
        path = folder / name
        if not path.resolve().is_relative_to(folder.resolve()):
            raise ValueError(f"run: {name} lies outside of the run folder.")
        if name.startswith("checkpoints/"):
            checkpoint = Path(name).parts[1]
            whole.setdefault(checkpoint, []).append(name)
            path = folder / "checkpoints" / f"{checkpoint}.tmp" / Path(name).name
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f"{path.name}.tmp")
        beside.write_bytes(content)
        os.replace(beside, path)
    for checkpoint in whole:
        place = folder / "checkpoints" / checkpoint
        shutil.rmtree(place, ignore_errors=True)
        os.replace(place.with_name(f"{checkpoint}.tmp"), place)
    if any((folder / "checkpoints" / name).exists() for name in changed.checkpoints):
        for path in (folder / "checkpoints").iterdir():
            if path.name not in changed.checkpoints:
                shutil.rmtree(path)

    for name in set(_others(folder)) - set(changed.others):
        (folder / name).unlink()


def _others(folder: Path) -> list[str]:
    """Files outside of checkpoints, without the lock and what is being written."""
    paths = (path for path in folder.rglob("*") if path.is_file() and folder / "checkpoints" not in path.parents)
    return sorted(str(path.relative_to(folder)) for path in paths if path.name != "lock" and path.suffix != ".tmp")


def _stamp(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_mtime_ns, status.st_size
