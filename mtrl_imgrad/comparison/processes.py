"""Runs in local processes, a few at a time."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from mtrl_imgrad.comparison.plan import PlannedRun, State
from mtrl_imgrad.parsing import UserError

MTRL_IMGRAD = (sys.executable, "-m", "mtrl_imgrad")
"""The program of a run."""
PATIENCE = 30.0
"""Seconds that a run has to end after it was asked to."""


@dataclass
class Progress:
    """How far a comparison is, for whoever shows it.

    Attributes:
        runs: all of them, in the order in which they are started.
        states: of each, by name.
        reasons: why a run failed, by name.
    """

    runs: Sequence[PlannedRun]
    states: dict[str, State]
    reasons: dict[str, str] = field(default_factory=dict)

    def of(self, *states: State) -> list[PlannedRun]:
        """The runs that are in one of these states."""
        return [run for run in self.runs if self.states[run.name] in states]


def run_all(
    runs: Sequence[PlannedRun],
    jobs: int,
    divided: Sequence[str],
    logs: Path,
    show: Callable[[Progress], None],
    program: Sequence[str] | None = None,
    every: float = 1.0,
) -> Progress:
    """Bring all runs to their end. A finished one is not touched, an interrupted one is resumed, one that fails does
    not stop the others, and one that another process is training is waited for.

    Args:
        runs: what to train.
        jobs: how many at once.
        divided: flags with one run's share of the machine.
        logs: folder of what the runs print.
        show: told of the progress.
        program: what takes the command line of a run; None is this package.
        every: seconds between two looks.

    Raises:
        UserError: a run's folder holds something else.
        KeyboardInterrupt: the user, or a SIGTERM, stopped it; its processes have ended.
    """
    progress = Progress(runs, {run.name: run.state() for run in runs})
    logs.mkdir(parents=True, exist_ok=True)
    mine: dict[str, subprocess.Popen[bytes]] = {}
    with sigterm_as_interrupt():
        try:
            while True:
                for run in progress.of("running"):
                    if run.name not in mine:
                        progress.states[run.name] = run.state()  # another process, perhaps of an earlier comparison
                    elif mine[run.name].poll() is not None:
                        _conclude(run, mine.pop(run.name), logs, progress)
                for run in progress.of("to do", "interrupted")[: jobs - len(mine)]:
                    mine[run.name] = _start(
                        [*(program or MTRL_IMGRAD), *run.command(divided)], logs / f"{run.name}.log"
                    )
                    progress.states[run.name] = "running"
                show(progress)
                if not progress.of("running"):
                    return progress
                time.sleep(every)
        finally:
            _stop(list(mine.values()))


def _conclude(run: PlannedRun, process: subprocess.Popen[bytes], logs: Path, progress: Progress) -> None:
    if process.returncode == 0 and run.state() == "finished":
        progress.states[run.name] = "finished"
        return
    said = (logs / f"{run.name}.log").read_text(errors="replace").strip().splitlines()
    progress.states[run.name] = "failed"
    progress.reasons[run.name] = f"exit code {process.returncode}: {said[-1] if said else 'it said nothing'}"


def _start(command: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
    """A run in a process of its own, which ends when this one is killed (on Linux; elsewhere the next comparison waits
    for it)."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    parent = os.getpid()

    def die_with_parent() -> None:
        set_parent_death_signal = 1  # PR_SET_PDEATHSIG of linux/prctl.h
        if libc:
            libc.prctl(set_parent_death_signal, signal.SIGTERM)
            if os.getppid() != parent:
                os._exit(1)

    with log.open("ab") as file:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            process_group=0,  # Ctrl-C reaches this process alone, which then ends its runs
            preexec_fn=die_with_parent,
        )


def _stop(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + PATIENCE
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextlib.contextmanager
def sigterm_as_interrupt() -> Iterator[None]:
    """SIGTERM ends what happens inside as Ctrl-C does."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def share_of_machine(jobs: int, flags: Sequence[str]) -> list[str]:
    """Flags that give each of several runs its part of this machine's cores, where the user has not said.

    Raises:
        UserError: there are more jobs than cores.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if jobs > cores:
        raise UserError(f"jobs: {jobs} runs at once are more than this machine's {cores} cores.")
    threads = cores // jobs
    given = {flag.partition("=")[0].replace("_", "-") for flag in flags}
    own = [] if "--threads" in given else ["--threads", str(threads)]
    # A worker process for each thread; with one, stepping in the run's own process saves the hand-over.
    return own if "--envs.workers" in given else [*own, "--envs.workers", str(threads if threads > 1 else 0)]
