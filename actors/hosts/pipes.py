"""Pipes to processes that may stop in the middle of anything: whoever reads and writes here waits for none of them."""

from __future__ import annotations

import contextlib
import os
import pickle
import queue
import socket
import struct
import threading
from multiprocessing.connection import Connection
from typing import Any

_RECEIVE_BYTES = 1 << 18
_LENGTH, _LONG_LENGTH = struct.Struct("!i"), struct.Struct("!Q")  # what Connection.send puts before a message; -1: a long one follows


class Inbox:
    """What comes through a pipe, message by message, whole ones only. fileno: to be waited for."""

    def __init__(self, connection: Connection):
        self._socket = socket.socket(fileno=os.dup(connection.fileno()))
        self._data = bytearray()

    def fileno(self) -> int:
        return self._socket.fileno()

    def receive(self) -> list[Any]:
        """Messages that have come, maybe none. Raises EOFError: the other end is closed."""
        try:
            data = self._socket.recv(_RECEIVE_BYTES, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return []
        except OSError:
            data = b""
        if not data:
            raise EOFError
        self._data += data
        found = []
        while (message := self._next()) is not None:
            found.append(pickle.loads(message))
        return found

    def close(self) -> None:
        self._socket.close()

    def _next(self) -> bytes | None:
        data, start = self._data, _LENGTH.size
        if len(data) < start:
            return None
        length, = _LENGTH.unpack_from(data)
        if length == -1:
            start += _LONG_LENGTH.size
            if len(data) < start:
                return None
            length, = _LONG_LENGTH.unpack_from(data, _LENGTH.size)
        if len(data) < start + length:
            return None
        message = bytes(data[start : start + length])
        del data[: start + length]
        return message


class Outbox:
    """What goes through a pipe, in order, from a thread of its own: `send` returns at once, also where nobody reads. A message for a
    closed pipe is dropped: whoever waits for its end is told by the other direction."""

    def __init__(self, connection: Connection):
        self._connection = connection
        self._messages: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def send(self, message: Any) -> None:
        """Pickled before this returns."""
        self._messages.put(pickle.dumps(message, pickle.HIGHEST_PROTOCOL))
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="outbox", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """No more comes. The other end is closed by now, or a message that it does not take would keep this waiting."""
        self._messages.put(None)
        if self._thread is not None:
            self._thread.join()
        self._connection.close()

    def _run(self) -> None:
        while (message := self._messages.get()) is not None:
            with contextlib.suppress(OSError):
                self._connection.send_bytes(message)
