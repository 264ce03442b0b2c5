"""What a measurement ran on, and processes to measure in."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

MOST_ROUNDS = 100_000


def check_range(name: str, given: int, least: int, most: int) -> None:
    """Raise the ValueError of an option that is out of range."""
    if not least <= given <= most:
        raise ValueError(f"{name}: {given} is not between {least} and {most}.")


def as_json(figures: Mapping[str, Any], settings: Mapping[str, Any], packages: Sequence[str]) -> str:
    """What was measured, the settings, and what it was measured on.

    Args:
        figures: goes into the object under its own keys.
        settings: of the command.
        packages: whose versions matter; one that is not installed gets null.
    """
    machine = {
        "processor": platform.processor() or platform.machine(),
        "logical_cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in packages},
    }
    return json.dumps({"settings": settings, "machine": machine} | dict(figures), indent=1) + "\n"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def busy_cores(interval: float) -> float:
    """How many cores' time all programs use within so many seconds."""
    return psutil.cpu_percent(interval=interval) / 100 * (psutil.cpu_count() or 1)


def others_before(cores: float) -> str:
    """How busy the machine was with other things before a run, in a line."""
    return f"other programs used {cores:.1f} of {psutil.cpu_count()} cores before the run"


def environment() -> dict[str, str]:
    """This process's environment variables, with the folder of this package on Python's path."""
    paths = [str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths)}


def answer_of(module: str, arguments: Sequence[str], variables: Mapping[str, str]) -> Any:
    """Run a module in a process of its own and read the JSON that it prints.

    Args:
        module: its full name.
        arguments: its command line.
        variables: environment variables besides this process's.

    Raises:
        ChildProcessError: the process failed. The message has the last line that it said.
    """
    command = [sys.executable, "-W", "ignore", "-m", module, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment() | dict(variables))
    if done.returncode:
        said = done.stderr.strip().splitlines() or ["nothing was said"]
        raise ChildProcessError(f"bench: the measurement ended with exit code {done.returncode}: {said[-1]}")
    return json.loads(done.stdout)
