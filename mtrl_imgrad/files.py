"""Files that are always whole, and a lock that a dead process does not keep."""

from __future__ import annotations

import fcntl
import os
import weakref
from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """Write a text file beside its place and rename it, so that a reader, or a run that goes on after the process was
    killed, finds either the old text or the new one."""
    beside = path.with_name(f"{path.name}.tmp")
    beside.write_text(text)
    os.replace(beside, path)


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
            holder = (folder / "lock").read_text().strip() or "unknown"
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
    descriptor = os.open(folder / "lock", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor
