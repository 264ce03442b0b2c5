"""All runs of a comparison brought to their end, wherever each of them is trained."""

from __future__ import annotations

import contextlib
import functools
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import Protocol

from mtrl_imgrad.comparison.plan import PlannedRun, State
from mtrl_imgrad.parsing import UserError


class StartedRun(Protocol):
    """A run that this comparison has started."""

    def failure(self) -> str | None:
        """None while it is trained; once it has ended why it failed, empty where it did not."""
        ...

    def terminate(self) -> None:
        """Ask it to end."""
        ...

    def wait(self) -> None:
        """Until it has ended; after a while it is killed."""
        ...


class FailedRun(Exception):  # noqa: N818 - it is the run's error, not this program's
    """Why a run failed."""


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
    start: Callable[[PlannedRun], StartedRun],
    at_once: int,
    show: Callable[[Progress], None],
    every: float = 1.0,
) -> Progress:
    """Bring all runs to their end. A finished one is not touched, an interrupted one is resumed, one that fails does
    not stop the others, and one that another process is training is waited for.

    Args:
        runs: what to train.
        start: starts a run, or goes on with it.
        at_once: how many.
        show: told of the progress.
        every: seconds between two looks.

    Raises:
        KeyboardInterrupt: the user, or a SIGTERM, stopped it; the runs have ended.
    """
    progress = Progress(runs, {})
    for run in runs:
        _note(progress, run, run.state)
    started: dict[str, StartedRun] = {}
    with sigterm_as_interrupt():
        try:
            while True:
                for run in progress.of("running"):
                    if run.name not in started:  # another process's, perhaps of an earlier comparison
                        _note(progress, run, run.state)
                    else:
                        _note(progress, run, functools.partial(_look, run, started[run.name]))
                        if progress.states[run.name] != "running":
                            del started[run.name]
                for run in progress.of("to do", "interrupted")[: at_once - len(started)]:
                    _note(progress, run, functools.partial(_begin, run, start, started))
                show(progress)
                if not progress.of("running"):
                    return progress
                time.sleep(every)
        finally:
            for run in started.values():
                run.terminate()
            for run in started.values():
                run.wait()


def _note(progress: Progress, run: PlannedRun, find: Callable[[], State]) -> None:
    """A run's state; one that cannot be found is a failure of that run alone."""
    try:
        progress.states[run.name] = find()
    except (FailedRun, UserError, ValueError, OSError) as error:
        progress.states[run.name], progress.reasons[run.name] = "failed", " ".join(str(error).split())


def _look(run: PlannedRun, started: StartedRun) -> State:
    failure = started.failure()
    if failure is None:
        return "running"
    if failure:
        raise FailedRun(failure)
    if run.state() != "finished":
        raise FailedRun("it ended well, but its folder is not complete")
    return "finished"


def _begin(run: PlannedRun, start: Callable[[PlannedRun], StartedRun], started: dict[str, StartedRun]) -> State:
    started[run.name] = start(run)
    return "running"


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
