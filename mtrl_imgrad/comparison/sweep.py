"""All runs of a comparison brought to their end, wherever each of them is trained."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import Protocol

from mtrl_imgrad.comparison.plan import PlannedRun, State


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
        UserError: a run's folder holds something else.
        KeyboardInterrupt: the user, or a SIGTERM, stopped it; the runs have ended.
    """
    progress = Progress(runs, {run.name: run.state() for run in runs})
    started: dict[str, StartedRun] = {}
    with sigterm_as_interrupt():
        try:
            while True:
                for run in progress.of("running"):
                    if run.name not in started:
                        progress.states[run.name] = run.state()  # of another process, perhaps of an earlier comparison
                        continue
                    failure = started[run.name].failure()
                    if failure is not None:
                        del started[run.name]
                        if not failure and run.state() != "finished":
                            failure = "it ended well, but its folder is not complete"
                        progress.states[run.name] = "failed" if failure else "finished"
                        progress.reasons |= {run.name: failure} if failure else {}
                for run in progress.of("to do", "interrupted")[: at_once - len(started)]:
                    started[run.name] = start(run)
                    progress.states[run.name] = "running"
                show(progress)
                if not progress.of("running"):
                    return progress
                time.sleep(every)
        finally:
            for run in started.values():
                run.terminate()
            for run in started.values():
                run.wait()


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
