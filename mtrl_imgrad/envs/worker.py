"""A worker process: steps its chunk of every vector env that shares it, until the other side is gone.

Started by `worker_pool` as `python -m mtrl_imgrad.envs.worker DESCRIPTOR PARENT`, so that nothing of the parent is
imported again: no `__main__`, no torch.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import pickle
import socket
import sys
import traceback
from typing import Any

from mtrl_imgrad.envs import channel as messages
from mtrl_imgrad.envs.channel import Channel
from mtrl_imgrad.envs.chunk import Chunk
from mtrl_imgrad.envs.shared_block import attach

ORPHAN_CHECK_SECONDS = 1.0
"""How often an idle worker looks whether its parent still lives: its socket may be open in a fork of the parent."""


def serve(channel: Channel, parent: int) -> None:
    """Answer requests until the parent is gone."""
    chunks: dict[int, Chunk] = {}
    maker: Any = None

    def leave_if_orphaned() -> None:
        if os.getppid() != parent:
            raise EOFError("the parent is gone")

    while True:
        try:
            kind, section, payload = channel.receive(ORPHAN_CHECK_SECONDS)
        except TimeoutError:
            leave_if_orphaned()
            continue
        answer: Any = None
        try:
            if kind == messages.STEP:
                chunks[section].step()
            elif kind == messages.RESET:
                chunks[section].reset()
            elif kind == messages.RESTART:
                chunks[section].restart()
            elif kind == messages.DRAW:
                answer = _picture(chunks[section], *pickle.loads(payload))
            elif kind == messages.CLOSE:
                chunks.pop(section).close()
            else:
                spec, make_maker, rows, workers, index = pickle.loads(payload)
                descriptor = channel.receive_descriptor()
                block = attach(descriptor, rows, workers)
                os.close(descriptor)
                maker = maker or make_maker()
                chunks[section] = Chunk(spec, maker, block, index, leave_if_orphaned)
                answer, maker.warnings = maker.warnings, []
                # What was made stays: the garbage collector need not look at it again.
                gc.collect()
                gc.freeze()
                _return_freed_memory()
        except EOFError:
            raise
        except Exception as error:
            told = f"{type(error).__name__}: {error}", traceback.format_exc()
            channel.send(messages.FAILED, section, pickle.dumps(told))
        else:
            channel.send(messages.DONE, section, b"" if answer is None else pickle.dumps(answer))


def _return_freed_memory() -> None:
    """Give the kernel back what compiling models took for a while, which glibc would keep."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _picture(chunk: Chunk, row: int, camera: str, width: int, height: int) -> Any:
    """A picture, or the exception that tells why there is none."""
    try:
        return chunk.draw(row, camera, width, height)
    except Exception as error:  # the rows are as they were
        return error


def main() -> None:
    connection = socket.socket(fileno=int(sys.argv[1]))
    try:
        serve(Channel(connection), int(sys.argv[2]))
    except (EOFError, OSError):
        # The parent is gone, or has closed the env. Nothing is left to release that the kernel does not.
        os._exit(0)


if __name__ == "__main__":
    main()
