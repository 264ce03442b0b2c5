"""Checkpoints: folders of safetensors and JSON that say of themselves whether they are whole. Nothing is unpickled.

    checkpoints/0000150000/  manifest.json  state.json  learner.safetensors ...  replay-<start>-<written>.safetensors
    checkpoints/best/        the same without the replay

`manifest.json` has the format, the step, and size and SHA-256 of every other file. A checkpoint is written in
`<name>.tmp`, the manifest last, brought to the disk and renamed; a reader verifies what it is about to read. Blocks of
the replay that have not changed are hard links to those of the checkpoint before: each folder is whole by itself, and
two of them need little more than one. (What a failing disk spoils in a shared block is spoilt in both.)

Which of them a run has and keeps is in `kept_checkpoints`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from mtrl_imgrad.files import read_object, sync, write_whole

FORMAT = 5
"""1 held no running episodes, and neither 1 nor 2 had a manifest."""
READS = f"this version reads {FORMAT}; use the one that versions.json names."
FILE_NAME = re.compile(r"[a-z0-9_-]+\.(json|safetensors)")
REPLAY = "replay"
"""Begins the names of the replay's files."""

Tensors = dict[str, Tensor]
Parts = Mapping[str, Callable[[], Tensors]]
"""Name -> what makes the tensors of one file when it is about to be written."""


class DamagedError(ValueError):
    """A checkpoint is not what was saved."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose manifest was read.

    Attributes:
        place: its folder.
        step: simulator steps per task.
        kept: whether it stays, without its replay, when it is no longer one of the newest.
        resumable: whether it has the replay, without which training cannot go on.
        files: file name -> {"size": bytes, "sha256": hexadecimal}.
    """

    place: Path
    step: int
    kept: bool
    resumable: bool
    files: dict[str, dict[str, Any]]

    def state(self) -> dict[str, Any]:
        """Everything that is not a tensor.

        Raises:
            ValueError: it cannot be read.
        """
        return read_object(self.place / "state.json")

    def part(self, name: str, device: torch.device | str) -> Tensors:
        """The tensors of one file, given without its suffix.

        Raises:
            ValueError: it is not there, is not in the manifest, or is not safetensors.
        """
        if f"{name}.safetensors" not in self.files:
            raise ValueError(f"{name}.safetensors is not in its manifest")
        try:
            return load_file(self.place / f"{name}.safetensors", device=str(device))
        except (OSError, ValueError, SafetensorError) as error:
            raise ValueError(f"{name}.safetensors cannot be read, {type(error).__name__}") from None

    def blocks(self, prefix: str) -> list[str]:
        """Names of the replay's files, without suffix, that begin so."""
        return sorted(Path(name).stem for name in self.files if name.startswith(f"{prefix}-"))

    @contextlib.contextmanager
    def taken(self) -> Iterator[None]:
        """Take what it holds: a ValueError inside says why that does not belong to this run, and is told as one of the
        checkpoint's."""
        try:
            yield
        except ValueError as error:
            why = f"{str(error).rstrip('.')}); remove it to use an earlier one."
            raise ValueError(f"run: checkpoint {self.place} is none of this run ({why}") from None


def save_checkpoint(
    folder: Path,
    name: str,
    step: int,
    state: dict[str, Any],
    parts: Parts,
    blocks: Parts | None = None,
    *,
    base: Checkpoint | None = None,
    kept: bool = False,
) -> Checkpoint:
    """Write `checkpoints/<name>`. One of the same name stays readable until the new one has its place.

    Args:
        folder: the run folder.
        name: `step_name(step)`, or `best`.
        step: simulator steps per task.
        state: everything that is not a tensor, as JSON keeps it.
        parts: the files to write, named without suffix.
        blocks: files whose names tell their contents; those that `base` has are linked. None: without the replay.
        base: the checkpoint that this process saved last, or loaded.
        kept: whether to mark it to be kept.

    Raises:
        OSError: it cannot be written; earlier checkpoints are as they were.
    """
    place = folder / "checkpoints" / name
    beside = place.with_suffix(".tmp")
    remove(beside)
    try:
        beside.mkdir(parents=True)
        files = {"state.json": _write(beside / "state.json", json.dumps(state).encode())}
        for part, make in (*parts.items(), *(blocks or {}).items()):
            file = f"{part}.safetensors"
            if blocks and part in blocks and base and file in base.files and _linked(base.place / file, beside / file):
                files[file] = base.files[file]
            else:
                files[file] = _write(beside / file, save(_on_host(make())))
        for file in files:  # together, after all are written: the disk takes them in one go
            sync(beside / file)
        made = Checkpoint(place, step, kept, blocks is not None, files)
        _write_manifest(made, beside)
        sync(beside)
        if place.exists():
            shutil.rmtree(place.with_suffix(".old"), ignore_errors=True)
            os.replace(place, place.with_suffix(".old"))
        os.replace(beside, place)
        sync(place.parent)
    except OSError:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    remove(place.with_suffix(".old"))
    return made


def step_name(step: int) -> str:
    """The folder of a step's checkpoint; sorted by name, they are sorted by step."""
    return f"{step:010d}"


def read_manifest(place: Path) -> Checkpoint:
    """The manifest of a checkpoint.

    Raises:
        DamagedError: there is none, or it is none that this version writes.
        ValueError: it has another format.
    """
    try:
        manifest = json.loads((place / "manifest.json").read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, FileNotFoundError) and (former := _former_format(place)):
            raise ValueError(f"run: checkpoint {place} has format {former}; {READS}") from None
        raise DamagedError(f"checkpoint {place} is damaged (manifest.json: {type(error).__name__})") from None
    if isinstance(manifest, dict) and isinstance(manifest.get("format"), int) and manifest["format"] != FORMAT:
        raise ValueError(f"run: checkpoint {place} has format {manifest['format']}; {READS}")
    try:
        step, kept, resumable, files = (manifest[name] for name in ("step", "kept", "resumable", "files"))
        plain = {name: {"size": int(file["size"]), "sha256": str(file["sha256"])} for name, file in files.items()}
        named = type(step) is int and (place.stem == "best" or place.stem == step_name(step))
        allowed = all(FILE_NAME.fullmatch(name) for name in plain)
        allowed &= resumable is True or not any(name.startswith(REPLAY) for name in plain)
        if not (named and allowed and "state.json" in plain):
            raise ValueError
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError):
        raise DamagedError(f"checkpoint {place} is damaged (manifest.json is not one of this checkpoint)") from None
    return Checkpoint(place, step, bool(kept), bool(resumable), plain)


def verify(checkpoint: Checkpoint, with_replay: bool = True) -> None:
    """Compare the files with the manifest.

    Raises:
        DamagedError: one is missing or different; it is named.
    """
    for name, expected in checkpoint.files.items():
        if name.startswith(REPLAY) and not with_replay:
            continue
        path = checkpoint.place / name
        if not path.is_file():
            raise DamagedError(f"checkpoint {checkpoint.place} is damaged ({name} is missing)")
        try:
            with path.open("rb") as file:
                size, digest = os.fstat(file.fileno()).st_size, hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise DamagedError(f"checkpoint {checkpoint.place} is damaged ({name}: {error.strerror})") from None
        if (size, digest) != (expected["size"], expected["sha256"]):
            what = "another checksum" if size == expected["size"] else f"{size:,} bytes of {expected['size']:,}"
            raise DamagedError(f"checkpoint {checkpoint.place} is damaged ({name} has {what})")


def drop_replay(checkpoint: Checkpoint) -> None:
    """Remove the replay's files; the manifest first, so that at every moment it names only files that are there."""
    left = {name: file for name, file in checkpoint.files.items() if not name.startswith(REPLAY)}
    if checkpoint.resumable:
        without = Checkpoint(checkpoint.place, checkpoint.step, checkpoint.kept, False, left)
        _write_manifest(without, checkpoint.place)
    for path in checkpoint.place.glob(f"{REPLAY}*"):
        path.unlink()


def remove(place: Path) -> None:
    """Remove a checkpoint's folder. It is renamed first, so that nobody takes what is left of it for a damaged one."""
    gone = place.with_suffix(".tmp")
    if gone.is_file():
        gone.unlink()
    if place != gone and place.exists():
        shutil.rmtree(gone, ignore_errors=True)
        os.replace(place, gone)
    shutil.rmtree(gone, ignore_errors=True)


def _former_format(place: Path) -> int | None:
    """1 or 2 where the state says so, as it did before there were manifests."""
    try:
        state = json.loads((place / "state.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return next((number for number in (1, 2) if isinstance(state, dict) and state.get("format") == number), None)


def _write(path: Path, content: bytes) -> dict[str, Any]:
    try:
        path.write_bytes(content)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    return {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def _write_manifest(checkpoint: Checkpoint, folder: Path) -> None:
    manifest = {"format": FORMAT, "step": checkpoint.step, "kept": checkpoint.kept, "resumable": checkpoint.resumable}
    write_whole(folder / "manifest.json", json.dumps(manifest | {"files": checkpoint.files}, indent=1))


def _linked(existing: Path, new: Path) -> bool:
    """Whether a file could be linked, or copied where the file system has no links."""
    try:
        os.link(existing, new)
    except OSError:
        try:
            shutil.copyfile(existing, new)
        except FileNotFoundError:
            return False
    return True


def _on_host(tensors: Tensors) -> Tensors:
    return {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
