"""A run in a process of this machine."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from mtrl_imgrad.comparison.plan import PlannedRun
from mtrl_imgrad.config import Config
from mtrl_imgrad.parsing import UserError

MTRL_IMGRAD = (sys.executable, "-m", "mtrl_imgrad")
"""The program of a run."""
PATIENCE = 30.0
"""Seconds that a run has to end after it was asked to."""


class LocalRun:
    """A process that trains, and that ends when this one is killed (on Linux; elsewhere it goes on, and the next
    comparison waits for it).

    Args:
        command: program and arguments.
        log: file that takes what it prints.
        folder: working directory.
    """

    def __init__(self, command: Sequence[str], log: Path, folder: Path | None = None) -> None:
        libc = ctypes.CDLL(None) if sys.platform == "linux" else None
        parent, set_parent_death_signal = os.getpid(), 1  # PR_SET_PDEATHSIG of linux/prctl.h

        def die_with_parent() -> None:
            if libc:
                libc.prctl(set_parent_death_signal, signal.SIGTERM)
                if os.getppid() != parent:
                    os._exit(1)

        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as file:
            self.process = subprocess.Popen(
                command,
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                process_group=0,  # Ctrl-C reaches this process alone, which then ends its runs
                preexec_fn=die_with_parent,
            )

    def failure(self) -> str | None:
        code = self.process.poll()
        return None if code is None else why_failed(code, self.log.read_text(errors="replace"))

    def terminate(self) -> None:
        self.process.terminate()

    def wait(self) -> None:
        try:
            self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def start_here(run: PlannedRun, divided: Sequence[str], logs: Path, program: Sequence[str] = MTRL_IMGRAD) -> LocalRun:
    """Start a run, or go on with it.

    Args:
        run: which.
        divided: flags with this run's share of the machine.
        logs: folder of what runs print.
        program: what takes the command line of a run.
    """
    return LocalRun([*program, *run.command(divided)], logs / f"{run.name}.log")


def why_failed(code: int, printed: str) -> str:
    """In one line; empty where it did not."""
    lines = printed.strip().splitlines() or ["it said nothing"]
    return f"exit code {code}: {lines[-1]}" if code else ""


def share_of_machine(jobs: int, config: Config) -> list[str]:
    """Flags that divide this machine's cores among several runs, where their configuration does not say.

    Raises:
        UserError: there are more jobs than cores.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if jobs > cores:
        raise UserError(f"jobs: {jobs} runs at once are more than this machine's {cores} cores.")
    return flags_of_share(cores // jobs, config)


def flags_of_share(cores: int, config: Config) -> list[str]:
    """Flags that make a run use so many cores, where its configuration does not say. A worker process for each thread;
    with one, stepping in the run's own process saves the hand-over."""
    threads = [] if config.threads else ["--threads", str(cores)]
    workers = [] if config.envs.workers is not None else ["--envs.workers", str(cores if cores > 1 else 0)]
    return threads + workers
