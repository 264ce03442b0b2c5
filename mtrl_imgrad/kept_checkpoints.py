"""The checkpoints of a run: which are kept, which one is read, and what happens where one is damaged.

Kept are the two newest, and without the replay `best` and one for each `checkpoint.keep_every` steps. `best` had the
highest mean success of an evaluation during training. That is a maximum over noisy estimates and therefore biased
upwards: it is there for using the policy, never for reporting its success.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from mtrl_imgrad.checkpoint import Checkpoint, DamagedError, drop_replay, read_manifest, remove, step_name, verify
from mtrl_imgrad.files import refuse_ways_out

NEWEST = 2
"""Checkpoints that are kept with the replay: one, and one to fall back on."""
BEST = "best"


def prune(folder: Path, newest: Checkpoint, before: Checkpoint | None = None) -> None:
    """Remove what is kept no longer after `newest` was saved: older checkpoints, and what a killed process left. What
    is no checkpoint is left alone.

    Args:
        folder: the run folder.
        newest: saved just now.
        before: the one that the process saved or loaded before. All that are later than it, but for `newest`, belong to
            a future that the run went back from because they are damaged.
    """
    name, found = newest.place.name, _by_step(folder)
    for path in (folder / "checkpoints").glob("*.tmp"):
        if re.fullmatch(rf"(\d{{10}}|{BEST})\.tmp", path.name):
            remove(path)
    damaged = [path for path in found if path.stem > name or (before and before.place.name < path.stem < name)]
    for path in damaged:
        remove(path)
    for path in [path for path in found if path.name < name and path not in damaged][: 1 - NEWEST]:
        try:
            checkpoint = read_manifest(path)
        except ValueError:
            checkpoint = None
        if checkpoint and checkpoint.kept:
            drop_replay(checkpoint)
        else:
            remove(path)


def choose_checkpoint(folder: Path, which: str = "newest", resume: bool = False) -> Checkpoint:
    """A checkpoint whose files are those that were saved; all of them, or without the replay's.

    Args:
        folder: the run folder.
        which: `best`, a step, or `newest`: of those that are whole; what is passed over is told in a line on stderr.
        resume: whether to train from it, for which it must have the replay.

    Raises:
        ValueError: there is none, the one named is damaged, or it has another format.
    """
    refuse_ways_out(folder)
    if which != "newest":
        return _named(folder, which)
    damages: list[DamagedError] = []
    for place in reversed(_by_step(folder)):
        try:
            checkpoint = read_manifest(place)
            if resume and not checkpoint.resumable:
                damages.append(DamagedError(f"checkpoint {place} has no replay"))
                continue
            verify(checkpoint, with_replay=resume)
        except DamagedError as damage:
            damages.append(damage)
            continue
        for damage in damages:
            print(f"{damage}; going on from {checkpoint.place}", file=sys.stderr)
        return checkpoint
    if damages and all(str(damage).endswith("has no replay") for damage in damages):
        raise ValueError(
            f"run: no checkpoint of {folder} has the replay that training goes on with, as they have where "
            "checkpoint.replay is true; the run can be evaluated."
        )
    if damages:
        raise ValueError(f"run: {damages[0]}, and there is no whole one before it; use a copy of the run.")
    raise ValueError(f"run: {folder} has no checkpoint yet.")


def has_checkpoint(folder: Path) -> bool:
    """Whether the run has saved one, damaged or not."""
    return bool(_by_step(folder))


def best_success(folder: Path) -> float:
    """Mean success with which `best` was saved; -1 where there is no whole one."""
    try:
        return float(choose_checkpoint(folder, BEST).state()["success"])
    except (KeyError, TypeError, ValueError):
        return -1.0


def newest_step(folder: Path) -> int:
    """Step of the newest checkpoint that has a manifest, 0 without one. Its files are not verified."""
    for place in reversed(_by_step(folder)):
        try:
            return read_manifest(place).step
        except ValueError:
            continue
    return 0


def _named(folder: Path, which: str) -> Checkpoint:
    name = which if which == BEST else step_name(int(which)) if re.fullmatch("[0-9]{1,18}", which) else None
    place = folder / "checkpoints" / (name or BEST)
    found = [path for path in (place, place.with_suffix(".old")) if path.is_dir()]
    if not found or not name:
        steps = [str(int(path.stem)) for path in _by_step(folder)]
        best = ["best"] if (folder / "checkpoints" / "best").is_dir() else []
        raise ValueError(f"checkpoint: {folder} has no {which!r}; there are {', '.join(['newest', *best, *steps])}.")
    try:
        checkpoint = read_manifest(found[0])
        verify(checkpoint, with_replay=False)
    except DamagedError as damage:
        raise ValueError(f"run: {damage}; choose another one.") from None
    return checkpoint


def _by_step(folder: Path) -> list[Path]:
    """Checkpoints of a run, the newest last; `.old` is left by a process that died while it replaced one."""
    found = [path for path in (folder / "checkpoints").glob("*") if re.fullmatch(r"\d{10}(\.old)?", path.name)]
    return sorted(found, key=lambda path: (path.stem, path.suffix == ""))
