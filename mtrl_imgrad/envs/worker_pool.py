"""Worker processes that step the rows of vector envs, and what becomes of them when something goes wrong."""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from mtrl_imgrad.envs import channel as messages
from mtrl_imgrad.envs.channel import Channel
from mtrl_imgrad.envs.chunk import Chunk, ChunkSpec, RowMaker
from mtrl_imgrad.envs.shared_block import Block, allocate, attach, private

HANG_SECONDS = 6
"""Seconds without a sign of life after which a worker at work has hung."""
START_SECONDS = 120
"""The same for a worker that starts, whose imports may come from a cold disk that others use too."""
CLOSE_SECONDS = 2.0
"""How long a worker may take to end by itself."""


class WorkerError(RuntimeError):
    """A worker process failed, died or hung. The message has at most two lines and names it."""


class Worker:
    """One process.

    Args:
        index: of the worker.
        tasks: the names of the tasks that it steps.
    """

    def __init__(self, index: int, tasks: Sequence[str]) -> None:
        self.index = index
        shown = ", ".join(tasks[:4]) + (f" and {len(tasks) - 4} more" if len(tasks) > 4 else "")
        self.name = f"worker {index} ({shown})"
        self._working = False
        self._early: dict[int, list[bytes]] = {}
        ours, theirs = socket.socketpair()
        path = os.pathsep.join(str(entry) or str(Path.cwd()) for entry in sys.path)
        threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        descriptor = theirs.fileno()
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", "mtrl_imgrad.envs.worker", str(descriptor), str(os.getpid())],
                stdin=subprocess.DEVNULL,
                pass_fds=[descriptor],
                env=os.environ | threads | {"PYTHONPATH": path},
                start_new_session=True,  # Ctrl-C in a terminal reaches the parent alone, which then ends its workers
            )
        self._channel = Channel(ours)

    def send(self, kind: bytes, section: int, payload: bytes = b"", descriptor: int | None = None) -> None:
        """
        Raises:
            WorkerError: the process has ended.
        """
        try:
            self._channel.send(kind, section, payload)
            if descriptor is not None:
                self._channel.send_descriptor(descriptor)
        except OSError:
            raise self._death() from None

    def receive(self, section: int, progress: Any, patience: int = HANG_SECONDS) -> bytes:
        """Wait for the answer to a request of one vector env; those to others that come before it are kept.

        Args:
            section: number of the vector env.
            progress: the array in which the worker counts what it has done.
            patience: seconds without progress after which it has hung. It has more until it has made its first rows.

        Raises:
            WorkerError: the process has ended, has hung, or has met an error.
        """
        if early := self._early.get(section):
            return early.pop(0)
        last, silent = int(progress[self.index]), 0
        while True:
            try:
                kind, answered, payload = self._channel.receive(timeout=1.0)
            except TimeoutError:
                # Seconds are counted while this process runs, so that nobody has hung who was stopped along with it.
                silent = silent + 1 if progress[self.index] == last else 0
                last = int(progress[self.index])
                self._working |= last > 0
                if silent >= (patience if self._working else START_SECONDS):
                    raise WorkerError(f"{self.name} has not answered for {silent} seconds; it was ended.") from None
                continue
            except EOFError:
                raise self._death() from None
            self._working = True
            if kind == messages.FAILED:
                told, trace = pickle.loads(payload)
                error = WorkerError(f"{self.name} has failed with\n{' '.join(told.split())[:300]}")
                error.add_note(trace)
                raise error
            if answered == section:
                return payload
            self._early.setdefault(answered, []).append(payload)

    def _death(self) -> WorkerError:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(CLOSE_SECONDS)
        code = self.process.poll()
        by = f" ({signal.Signals(-code).name})" if code is not None and -code in set(signal.Signals) else ""
        return WorkerError(f"{self.name} has ended with exit code {code}{by}.")


def _end(workers: Sequence[Worker], owner: int) -> None:
    """End all processes, at first by telling them that nobody listens any more."""
    if os.getpid() != owner:
        return  # a fork of the process that started them
    for worker in workers:
        worker._channel.close()
    until = time.monotonic() + CLOSE_SECONDS
    for worker in workers:
        try:
            worker.process.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            worker.process.kill()
            worker.process.wait()


class WorkerPool:
    """Worker processes. Vector envs can share them: each opens a section, with a chunk of its rows in every worker.

    Args:
        dealt: the names of each worker's tasks.
        maker: makes rows, in each process. A class or function that workers can import.
    """

    def __init__(self, dealt: Sequence[Sequence[str]], maker: Callable[[], RowMaker]) -> None:
        self.dealt = dealt
        self._maker = maker
        self.workers = [Worker(index, tasks) for index, tasks in enumerate(dealt)]
        self._sections_made = 0
        self._open: set[int] = set()
        self._end = weakref.finalize(self, _end, self.workers, os.getpid())

    def open(self, specs: Sequence[ChunkSpec], rows: int) -> WorkerSection:
        """Make the rows of a vector env in the workers, and the memory through which they are stepped.

        Args:
            specs: the chunk of each worker.
            rows: of all chunks.

        Raises:
            WorkerError: a worker could not make its rows.
        """
        number, count = self._sections_made, len(self.workers)
        self._sections_made += 1
        self._open.add(number)
        descriptor = allocate(rows, count)
        try:
            section = WorkerSection(self, number, attach(descriptor, rows, count))
            for index, spec in enumerate(specs):
                payload = pickle.dumps((spec, self._maker, rows, count, index))
                self.ask(index, messages.OPEN, number, payload, descriptor)
        finally:
            os.close(descriptor)
        section.pending = list(range(len(specs)))
        answers = section.wait(START_SECONDS)  # models are read from a disk and compiled, on cores that others may use
        section.warnings += [line for answer in answers for line in pickle.loads(answer)]
        return section

    def ask(self, index: int, kind: bytes, section: int, payload: bytes = b"", descriptor: int | None = None) -> None:
        try:
            self.workers[index].send(kind, section, payload, descriptor)
        except WorkerError:
            self.end()
            raise

    def answer(self, index: int, section: int, block: Block, patience: int = HANG_SECONDS) -> bytes:
        try:
            return self.workers[index].receive(section, block.progress, patience)
        except WorkerError:
            self.end()
            raise

    def leave(self, section: int) -> bool:
        """Whether others are still there; without them, the processes end."""
        self._open.discard(section)
        if not self._open:
            self._end()
        return bool(self._open) and self._end.alive

    def end(self) -> None:
        """End all processes at once."""
        for worker in self.workers:
            worker.process.kill()
        self._end()


class WorkerSection:
    """The rows of one vector env in the workers of a pool.

    Attributes:
        block: the arrays over these rows.
        warnings: a line for each task that is stepped by the plain path though the fast one was asked for.
        pending: the workers whose answer has not been read, also where an exception came between.
    """

    def __init__(self, pool: WorkerPool, number: int, block: Block) -> None:
        self.pool, self.block = pool, block
        self.warnings: list[str] = []
        self.pending: list[int] = []
        self._number = number

    def start(self, kind: bytes) -> None:
        """Let all workers step, reset or restart."""
        for index in range(len(self.pool.workers)):
            self.pending.append(index)
            self.pool.ask(index, kind, self._number)

    def wait(self, patience: int = HANG_SECONDS) -> list[bytes]:
        """Until all have done so.

        Args:
            patience: seconds without progress after which a worker has hung.

        Raises:
            WorkerError: one has failed, died or hung. All have been ended.
        """
        answers = []
        while self.pending:
            answers.append(self.pool.answer(self.pending[0], self._number, self.block, patience))
            del self.pending[0]
        return answers

    def draw(self, task: str, row: int, camera: str, width: int, height: int) -> UInt8[np.ndarray, "height width 3"]:
        """A picture of a row of this task."""
        index = next(index for index, tasks in enumerate(self.pool.dealt) if task in tasks)
        self.pool.ask(index, messages.DRAW, self._number, pickle.dumps((row, camera, width, height)))
        # The first one looks for a graphics library that works.
        picture = pickle.loads(self.pool.answer(index, self._number, self.block, START_SECONDS))
        if isinstance(picture, Exception):
            raise picture
        return picture

    def close(self) -> None:
        """Release these rows."""
        if self.pool.leave(self._number):
            self.wait()
            self.start(messages.CLOSE)
            self.wait()


class ThisProcess:
    """A pool without workers: everything happens here, while `wait` is called. See `WorkerPool`."""

    def __init__(self, tasks: Sequence[str], maker: Callable[[], RowMaker]) -> None:
        self.dealt = [list(tasks)]
        self._maker = maker()

    def open(self, specs: Sequence[ChunkSpec], rows: int) -> LocalSection:
        block = private(rows)
        (spec,) = specs
        section = LocalSection(Chunk(spec, self._maker, block), block)
        section.warnings, self._maker.warnings = self._maker.warnings, []
        return section


class LocalSection:
    """The rows of one vector env in this process; the interface of `WorkerSection`."""

    def __init__(self, chunk: Chunk, block: Block) -> None:
        self.block = block
        self.warnings: list[str] = []
        self._chunk = chunk
        self._kind = b""

    def start(self, kind: bytes) -> None:
        self._kind = kind

    def wait(self) -> None:
        kind, self._kind = self._kind, b""
        does = {
            messages.STEP: self._chunk.step,
            messages.RESET: self._chunk.reset,
            messages.RESTART: self._chunk.restart,
        }
        if kind:
            does[kind]()

    def draw(self, task: str, row: int, camera: str, width: int, height: int) -> UInt8[np.ndarray, "height width 3"]:
        return self._chunk.draw(row, camera, width, height)

    def close(self) -> None:
        self._chunk.close()
