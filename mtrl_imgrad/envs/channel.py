"""Messages between a vector env and its workers: a byte that says what, the number of the env, and a payload.

A step is nine bytes each way; the arrays are in shared memory. The end of a process, however it came,
closes its socket, and the other side reads the end of the stream.
"""

from __future__ import annotations

import socket
import struct

_HEADER = struct.Struct("<cII")

OPEN, RESET, RESTART, STEP, DRAW, CLOSE = b"o", b"r", b"a", b"s", b"d", b"c"
"""What a vector env asks for."""
DONE, FAILED = b"=", b"!"
"""What a worker answers."""


class Channel:
    """One end of the connection.

    Args:
        connection: a connected stream socket.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._timeout: float | None = None
        self._socket.settimeout(None)
        self._received = b""

    def send(self, kind: bytes, section: int = 0, payload: bytes = b"") -> None:
        """
        Raises:
            OSError: the other side is gone.
        """
        self._socket.sendall(_HEADER.pack(kind, section, len(payload)) + payload)

    def send_descriptor(self, descriptor: int) -> None:
        """Let the other side have a copy of a file descriptor."""
        socket.send_fds(self._socket, [b"f"], [descriptor])

    def receive(self, timeout: float | None = None) -> tuple[bytes, int, bytes]:
        """The next message: kind, section and payload.

        Raises:
            TimeoutError: none came within so many seconds. What came of it is kept.
            EOFError: the other side is gone.
        """
        if timeout != self._timeout:
            self._timeout = timeout
            self._socket.settimeout(timeout)
        kind, section, length = _HEADER.unpack(self._wait_for(_HEADER.size))
        whole = self._wait_for(_HEADER.size + length) if length else b""
        self._received = b""
        return kind, section, whole[_HEADER.size :]

    def receive_descriptor(self) -> int:
        _, (descriptor, *_), _, _ = socket.recv_fds(self._socket, 1, 1)
        return descriptor

    def close(self) -> None:
        self._socket.close()

    def _wait_for(self, size: int) -> bytes:
        """The first so many bytes of the message that is being received."""
        while len(self._received) < size:
            try:
                more = self._socket.recv(size - len(self._received))
            except TimeoutError:
                raise
            except OSError:  # it has broken off, or this end was closed
                more = b""
            if not more:
                raise EOFError("the other side is gone")
            self._received += more
        return self._received[:size]
