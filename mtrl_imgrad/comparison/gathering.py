"""A run folder copied from the machine that trains to the one that compares, while it grows."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

Stamps = dict[str, tuple[int, int, int]]
"""Time of change in ns, size and inode of each file, by path in the folder."""


@dataclass(frozen=True)
class Changes:
    """What is new in a run folder.

    Attributes:
        files: content of each new or changed file, by path in the folder. Checkpoints are whole or not in it.
        links: files of those checkpoints whose content the copy has, or gets with an earlier checkpoint: path in the
            folder -> path where it is. Blocks of the replay that have not changed are not sent again.
        checkpoints: names of all checkpoints that there are.
        others: paths in the folder of all files that there are outside of checkpoints.
    """

    files: Mapping[str, bytes]
    links: Mapping[str, str]
    checkpoints: tuple[str, ...]
    others: tuple[str, ...]


def changes(folder: Path, known: Stamps) -> tuple[Changes, Stamps]:
    """What differs from what is known, and what is known then."""
    files: dict[str, bytes] = {}
    links: dict[str, str] = {}
    stamps: Stamps = {}
    there = {stamp: name for name, stamp in known.items() if name.startswith("checkpoints/")}
    checkpoints = sorted(path for path in (folder / "checkpoints").glob("*") if not path.name.endswith(".tmp"))
    others = _others(folder)
    for unit in [[folder / name] for name in others] + [sorted(checkpoint.iterdir()) for checkpoint in checkpoints]:
        try:
            found = {str(path.relative_to(folder)): _stamp(path) for path in unit}
            if all(known.get(name) == stamp for name, stamp in found.items()):
                new, linked = {}, {}
            else:
                linked = {name: there[stamp] for name, stamp in found.items() if stamp in there}
                new = {name: (folder / name).read_bytes() for name in found if name not in linked}
        except FileNotFoundError:  # the run has just replaced it
            continue
        files, links, stamps = files | new, links | linked, stamps | found
        there |= {stamp: name for name, stamp in found.items() if name.startswith("checkpoints/")}
    return Changes(files, links, tuple(checkpoint.name for checkpoint in checkpoints), tuple(others)), stamps


def apply(changed: Changes, folder: Path) -> None:
    """Bring a copy up to date. At every moment it is a folder that a run can go on from.

    Raises:
        ValueError: a file would lie outside of the folder.
    """
    whole: dict[str, list[str]] = {}
    for name in sorted((*changed.files, *changed.links)):
        for path in (name, changed.links.get(name, name)):
            if not (folder / path).resolve().is_relative_to(folder.resolve()):
                raise ValueError(f"run: {path} lies outside of the run folder.")
        if name.startswith("checkpoints/"):
            whole.setdefault(Path(name).parts[1], []).append(name)
            continue
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f"{path.name}.tmp")
        beside.write_bytes(changed.files[name])
        os.replace(beside, path)
    for checkpoint, names in whole.items():
        place = folder / "checkpoints" / checkpoint
        beside = place.with_name(f"{checkpoint}.tmp")
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        for name in names:
            if name in changed.files:
                (beside / Path(name).name).write_bytes(changed.files[name])
            else:
                os.link(folder / changed.links[name], beside / Path(name).name)
        shutil.rmtree(place, ignore_errors=True)
        os.replace(beside, place)
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


def _stamp(path: Path) -> tuple[int, int, int]:
    status = path.stat()
    return status.st_mtime_ns, status.st_size, status.st_ino
