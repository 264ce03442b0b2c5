"""What a run folder says of its run: made when the run starts, added to when it goes on, read by everything else.

runs/<name>/config.yaml command.txt versions.json goals.json progress.csv eval.csv tensorboard/ checkpoints/
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from mtrl_imgrad.aggregators import AGGREGATORS
from mtrl_imgrad.config import Config, from_dict, method_name, to_dict
from mtrl_imgrad.files import (
    FolderLock,
    append_whole,
    check_place,
    is_storage_failure,
    read_json,
    refuse_ways_out,
    write_whole,
)
from mtrl_imgrad.strict_yaml import read_mapping
from mtrl_imgrad.version import __version__

BEFORE_CONFIG = ("goals.json", "goals.json.tmp", "command.txt", "versions.json", "versions.json.tmp", "config.yaml.tmp")
"""What a process that was killed while it made a run folder may have left there, beside its lock."""
PACKAGES = ("torch", "numpy", "gymnasium", "metaworld", "mujoco", "stable_baselines3")


def run_name(config: Config) -> str:
    """`<benchmark>-<method>-s<seed>`."""
    tasks = config.benchmark.tasks
    benchmark = tasks[0].lower() if len(tasks) == 1 else f"{len(tasks)}tasks"
    return f"{benchmark}-{method_name(config).replace(':', '.')}-s{config.seed}"


def create_run(config: Config, goals: Any) -> FolderLock:
    """Make the run folder, hold it, and write what describes the run. Two runs that start together never get the same
    one.

    `config.yaml` comes last: a folder without it, left by a process that was killed here, is no run yet and may be
    taken again.

    Raises:
        FileExistsError: `run_dir` was given and is not empty.
        OSError: it cannot be made.
        ValueError: the configuration cannot be written down, or another process holds the folder.
    """
    to_dict(config)  # a configuration that cannot be written must not leave a folder
    try:
        lock = (
            _given_folder(Path(config.run_dir)) if config.run_dir else _numbered_folder(Path("runs", run_name(config)))
        )
    except FileExistsError:
        raise
    except OSError as error:
        if is_storage_failure(error):
            raise
        raise OSError(f"run_dir: {config.run_dir or 'runs'} cannot be made ({error.strerror}).") from None
    write_whole(lock.folder / "goals.json", json.dumps(goals))
    describe_run(lock.folder, config, 0)
    return lock


def _given_folder(folder: Path) -> FolderLock:
    check_place("run_dir", folder)
    folder.mkdir(parents=True, exist_ok=True)
    _refuse_occupied(folder)  # before the lock's file is put there
    lock = FolderLock(folder)
    _refuse_occupied(folder)
    for leftover in BEFORE_CONFIG:
        (folder / leftover).unlink(missing_ok=True)
    return lock


def _refuse_occupied(folder: Path) -> None:
    if {path.name for path in folder.iterdir()} - {*BEFORE_CONFIG, "lock"}:
        raise FileExistsError(f"run_dir: {folder} exists and is not empty; use --resume {folder} to go on with it.")


def _numbered_folder(wanted: Path) -> FolderLock:
    wanted.parent.mkdir(parents=True, exist_ok=True)
    for number in itertools.count(1):
        folder = wanted if number == 1 else wanted.with_name(f"{wanted.name}-{number}")
        try:
            folder.mkdir()
        except FileExistsError:
            continue
        return FolderLock(folder)
    raise AssertionError("unreachable")


def describe_run(folder: Path, config: Config, step: int) -> None:
    """Write the configuration, and one more entry of the history of commands and of versions.

    Args:
        folder: the run folder.
        config: the configuration from now on.
        step: simulator steps per task trained before.

    Raises:
        ValueError: versions.json is damaged.
        OSError: something cannot be written.
    """
    history = folder / "versions.json"
    entries = read_json(history) if history.exists() else []
    if not isinstance(entries, list) or not all(isinstance(earlier, dict) for earlier in entries):
        raise ValueError(f"run: {history} must be a list of versions, as the run wrote it.")
    versions = {"mtrl_imgrad": __version__, "commit": source_commit()} | {name: version(name) for name in PACKAGES}
    machine = {"python": platform.python_version(), "processor": processor(), "cores": os.cpu_count()}
    entries.append({"from_step": step, "protocol": config.protocol} | machine | versions)
    append_whole(folder / "command.txt", f"{command_line(sys.argv)}\n")
    write_whole(history, json.dumps(entries, indent=1))
    write_whole(folder / "config.yaml", yaml.safe_dump(to_dict(config), sort_keys=False))


def source_commit(file: Path = Path(__file__)) -> str:
    """The commit of the checkout that a file belongs to, by default of this package's, with `-dirty` where tracked
    files differ from it; empty where the package is installed without one."""

    def told(*arguments: str) -> str:
        command = ["git", "--no-optional-locks", "-C", str(file.parent), *arguments]
        return subprocess.run(command, capture_output=True, check=True, text=True).stdout.strip()

    try:
        told("ls-files", "--error-unmatch", file.name)  # a virtual environment may lie in a checkout of something else
        return told("describe", "--always", "--abbrev=40", "--dirty", "--exclude=*")
    except (OSError, subprocess.CalledProcessError):
        return ""


def processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The processor as the system tells it; two of them round differently and differ in speed.

    Virtual machines may give several generations one name, so on Linux for x86 its family and model are added.
    """
    with contextlib.suppress(OSError, KeyError):  # Linux
        first = cpuinfo.read_text().split("\n\n")[0]
        told = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in first.splitlines())}
        kind = [f"{name} {told[key]}" for name, key in (("family", "cpu family"), ("model", "model")) if key in told]
        return ", ".join([told["model name"], *kind])
    return platform.processor() or platform.machine()


def command_line(arguments: Sequence[str]) -> str:
    """How a process was started, as one would type it again: without the place of the program on this machine."""
    program = Path(arguments[0])
    module = program.name == "__main__.py"  # of a package
    return shlex.join([*(["python", "-m", program.parent.name] if module else [program.name]), *arguments[1:]])


def read_config(folder: Path) -> Config:
    """The configuration of a run. Imports the module of an aggregator `module:Class`.

    Raises:
        ValueError: the folder is not a run's, a link in it leads out of it, or its configuration is from another
            version.
    """
    with _told_of(folder) as path:
        return from_dict(read_mapping(path))


def read_settings(folder: Path) -> tuple[dict[str, Any], Config]:
    """The configuration of a run, importing nothing that the folder names.

    Returns:
        The configuration as `to_dict` gives it, and as a `Config`. An aggregator that is not in AGGREGATORS stands in
        the first as config.yaml has it; the second has the default one instead.

    Raises:
        ValueError: the folder is not a run's, a link in it leads out of it, or its configuration is from another
            version.
    """
    with _told_of(folder) as path:
        plain = read_mapping(path)
        rule = plain.get("aggregator")
        name = rule.get("name") if isinstance(rule, dict) else None
        if not isinstance(name, str) or name in AGGREGATORS:
            config = from_dict(plain)
            return to_dict(config), config
        config = from_dict({key: value for key, value in plain.items() if key != "aggregator"})
        return to_dict(config) | {"aggregator": rule}, config


@contextlib.contextmanager
def _told_of(folder: Path) -> Iterator[Path]:
    """A run's config.yaml, and what it raises where it is damaged as one ValueError that names it."""
    path = folder / "config.yaml"
    if not os.path.isfile(path):  # noqa: PTH113  (Path's own raises where a name is too long)
        raise ValueError(f"run: {folder} is no run folder; it has no config.yaml.")
    refuse_ways_out(folder)
    try:
        yield path
    except (ValueError, OSError) as error:
        raise ValueError(f"run: {path} is not a configuration of this version: {error}") from None
