"""Files that are always whole, links that lead nowhere else, and a lock that a dead process does not keep."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import weakref
from pathlib import Path
from typing import Any

STORAGE_FAILURES = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)
"""No space, no quota, too large a file, a failing disk, a disk that has become read-only."""


def is_storage_failure(error: OSError) -> bool:
    """Whether it is the disk that failed, and neither a wrong path nor a bug."""
    return error.errno in STORAGE_FAILURES


def write_whole(path: Path, text: str) -> None:
    """Write a text file beside its place and rename it, so that a reader, or a run that goes on after the process was
    killed or the power failed, finds either the old text or the new one.

    Raises:
        OSError: it cannot be written; it names the file, and the old text is still there.
    """
    beside = path.with_name(f"{path.name}.tmp")
    content = text.encode()
    try:
        beside.write_bytes(content)
        sync(beside)
        os.replace(beside, path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from None


def append_whole(path: Path, text: str) -> None:
    """Add lines to a text file, all of them or none.

    Raises:
        OSError: they cannot be written; it names the file, which is as it was.
    """
    with path.open("ab", buffering=0) as file:
        before, content = file.tell(), text.encode()
        try:
            while content:  # a disk that fills up takes a part
                content = content[file.write(content) or 0 :]
        except OSError as error:
            file.truncate(before)
            raise OSError(error.errno, error.strerror, str(path)) from None


def sync(path: Path) -> None:
    """Wait until the disk has a file's content, or a folder's names, so that a later rename cannot get ahead of it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        ValueError: it is not there, or is not JSON.
    """
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:  # the last: brackets in brackets
        why = type(error).__name__
        raise ValueError(f"run: {path} cannot be read ({why}); it must be as the run wrote it.") from None


def refuse_ways_out(folder: Path) -> None:
    """Refuse a run folder in which a link leads out of it, or nowhere: what is read would be foreign, what is written
    would be lost there. What is neither a file nor a folder is refused too, since who opens a pipe waits for ever.

    Raises:
        ValueError: it names the path.
    """
    inside = Path(os.path.realpath(folder))
    for path in folder.rglob("*"):
        if path.is_symlink() and not Path(os.path.realpath(path)).is_relative_to(inside):
            raise ValueError(f"run: {path} is a link that leads out of the run folder; put what it means in its place.")
        if not (os.path.isfile(path) or os.path.isdir(path)):  # noqa: PTH112, PTH113  (Path's own raise at links in a circle)
            raise ValueError(f"run: {path} is neither a file nor a folder; remove it.")


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        ValueError: there is none, or it is damaged.
    """
    found = read_json(path)
    if not isinstance(found, dict):
        raise ValueError(f"run: {path} must be a JSON object; it is {type(found).__name__}.")
    return found


def check_place(name: str, folder: Path) -> None:
    """Whether a folder is there or may be made, as far as that can be known without making it.

    Args:
        name: of the option that gives the folder.
        folder: which.

    Raises:
        ValueError: there is something else at it or above it, or its name is none.
    """
    above = folder
    try:
        while not above.exists() and above != above.parent:
            above = above.parent
    except OSError as error:  # such as a name that is too long
        raise ValueError(f"{name}: {folder} cannot be a folder ({error.strerror}); choose another one.") from None
    if "\0" in str(folder):
        raise ValueError(f"{name}: {str(folder)!r} cannot be a folder (it has a NUL); choose another one.")
    if not above.is_dir():
        raise ValueError(f"{name}: {above} is no folder; choose another place.")


def check_file(name: str, path: Path) -> None:
    """Whether a file can be written into a folder that is there; found out by opening it, which changes nothing.

    Raises:
        ValueError: there is something else at it, or it cannot be written there.
    """
    try:
        new = not path.exists()
        if not new and not path.is_file():
            raise ValueError(f"{name}: {path} is no file; choose another name.")
        path.open("ab").close()
        if new:
            path.unlink()
    except OSError as error:
        raise ValueError(f"{name}: {path} cannot be written ({error.strerror}); choose another place.") from None


def make_folder(name: str, folder: Path) -> None:
    """Make a folder, with those above it.

    Raises:
        ValueError: there is something else at it or above it, or it cannot be made there.
    """
    check_place(name, folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{name}: {folder} cannot be made ({error.strerror}); choose another place.") from None


class FolderLock:
    """Holds a folder for this process, by the kernel's lock on its file `lock`; whoever dies lets go.

    Args:
        folder: which.
        field: what an error calls it.

    Raises:
        ValueError: another process holds it.
    """

    def __init__(self, folder: Path, field: str = "run") -> None:
        self.folder = folder
        descriptor = _locked(folder)
        if descriptor is None:
            holder = (folder / "lock").read_text(errors="replace").strip() or "unknown"
            raise ValueError(f"{field}: {folder} is in use by another process ({holder}).")
        self.release = weakref.finalize(self, os.close, descriptor)
        """Let go. The file stays: whoever removed it could remove another process's lock."""
        os.truncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()}\n".encode())


def is_locked(folder: Path) -> bool:
    """Whether a living process holds the folder."""
    if not (folder / "lock").exists():
        return False
    descriptor = _locked(folder)
    if descriptor is not None:
        os.close(descriptor)
    return descriptor is None


def _locked(folder: Path) -> int | None:
    descriptor = os.open(folder / "lock", os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor
