"""Ctrl-C, SIGTERM and SIGHUP (a terminal that is closed): the training loop takes a checkpoint before it ends."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Stopped(KeyboardInterrupt):
    """The process was asked to end by this signal, and nothing that is worth keeping is lost."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


class Interruption:
    """Whether the process was asked to end.

    Attributes:
        number: of the signal that asked, 0 while none did.
        nothing_to_lose: whether a signal may end the process wherever it is: before the first step, and after the last
            checkpoint. A second signal always does.
    """

    def __init__(self) -> None:
        self.number = 0
        self.nothing_to_lose = True

    def end_if_asked(self) -> None:
        """For the loop, right after it saved.

        Raises:
            Stopped: the process was asked to end.
        """
        if self.number:
            raise Stopped(self.number)

    @contextmanager
    def by_signals(self) -> Iterator[None]:
        """Let signals ask, instead of ending the process where it is. For the main thread of a program. Where
        SIGHUP is ignored, as under `nohup`, it stays so."""

        def ask(number: int, frame: FrameType | None) -> None:
            if self.nothing_to_lose or self.number:
                raise Stopped(number)
            self.number = number
            print("\nstopping after a checkpoint; once more stops at once, without it", file=sys.stderr)

        hangup = [signal.SIGHUP] if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN else []
        before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM, *hangup)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
