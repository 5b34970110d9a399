"""One TCP connection from every rank process to the coordinator, beside all training: what goes over it.

A rank says who it is (`hello`), then beats. When its process ends, the kernel closes the connection, which the coordinator sees
at once; when its node is cut off or frozen, there is only silence. The other way goes `abort`: to end the rank's blocked
communication, from a thread of the heartbeat's own, whatever the rank's other threads are doing.

On the wire: lines of UTF-8 JSON; a line of digits is a beat: how much the member has finished so far, of whatever it does.
    member       {"lifeline": 2, "run": "...", "epoch": 1, "member": ["node", 0, 0], "about": {"pid": 1, ...}}
    coordinator  {"welcome": 2, "epoch": 1} or {"refused": "why"}
    coordinator  {"abort": 3}
    member       {"aborted": 3, "seconds": 0.01}
An epoch counts the coordinators of a run: the member's is that of the newest one that it knows, whose aborts alone it obeys.
Neither side ever waits for the other: what the kernel does not take at once is kept, up to a bound, and at the bound the
connection is given up. TCP_USER_TIMEOUT gives up one whose bytes are not acknowledged. Nobody is authenticated: what keeps
strangers out is that they do not speak like this, and the name of the run.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import socket
import threading
from collections.abc import Mapping
from enum import StrEnum
from typing import Any

_FIRST = -10
Address = tuple[str, int]
VERSION = 2
INTRODUCTION_SECONDS = 5.0  # from the connection to hello, or to welcome
_RECEIVE_BYTES = 4096
_LINE_BYTES = 1 << 16
_UNSENT_BYTES = 1 << 16
_UNACKNOWLEDGED_SECONDS = 5.0


class End(StrEnum):
    """How a connection ended. After `EOF` and `RESET` its process is gone (or has closed its client); after the others it may
    live."""

    EOF = "EOF"
    RESET = "reset"
    TIMED_OUT = "timed out"
    UNREACHABLE = "unreachable"
    UNREAD = "does not read"
    MALFORMED = "malformed"
    REPLACED = "replaced"


class ConnectionEnded(Exception):
    def __init__(self, how: End):
        self.how = how
        super().__init__(str(how))


class LineSocket:
    """A connected socket that takes and gives whole lines and never blocks. Its methods raise ConnectionEnded."""

    def __init__(self, connection: socket.socket):
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux. Elsewhere the kernel's own, longer limit holds
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(_UNACKNOWLEDGED_SECONDS * 1000))
            # probes, so that what is left of a node that vanished without a word does not stay open for ever
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, round(_UNACKNOWLEDGED_SECONDS))
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 1)
        self.socket = connection
        self._received = b""
        self._unsent = b""

    @property
    def unsent(self) -> bool:
        return bool(self._unsent)

    def receive(self) -> list[bytes]:
        """Lines that have come, without their ends: what one read gives, maybe none."""
        try:
            data = self.socket.recv(_RECEIVE_BYTES)
        except (BlockingIOError, InterruptedError):
            return []
        except OSError as error:
            raise ConnectionEnded(_how(error)) from error
        if not data:
            raise ConnectionEnded(End.EOF)
        *lines, self._received = (self._received + data).split(b"\n")
        if len(self._received) > _LINE_BYTES:
            raise ConnectionEnded(End.MALFORMED)
        return lines

    def send(self, message: Mapping[str, Any]) -> None:
        self._unsent += json.dumps(message, separators=(",", ":")).encode() + b"\n"
        self.flush()

    def beat(self, finished: int) -> None:
        if not self._unsent:  # what is on its way says as much
            self._unsent = beat = b"%d\n" % finished
            self.flush()
            self._unsent = b"" if self._unsent == beat else self._unsent

    def flush(self) -> None:
        try:
            while self._unsent:
                self._unsent = self._unsent[self.socket.send(self._unsent):]
        except (BlockingIOError, InterruptedError):
            pass
        except OSError as error:
            raise ConnectionEnded(_how(error)) from error
        if len(self._unsent) > _UNSENT_BYTES:
            raise ConnectionEnded(End.UNREAD)


def read_message(line: bytes) -> dict[str, Any]:
    """Raises ConnectionEnded."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise ConnectionEnded(End.MALFORMED)
    return found


def wanted_events(wire: LineSocket) -> int:
    return selectors.EVENT_READ | (selectors.EVENT_WRITE if wire.unsent else 0)


def bell_and_rope() -> tuple[socket.socket, socket.socket]:
    """What wakes a thread that waits for sockets: one end to wait for, one to ring."""
    bell, rope = socket.socketpair()
    bell.setblocking(False)
    rope.setblocking(False)
    return bell, rope


def ring(rope: socket.socket) -> None:
    with contextlib.suppress(OSError):  # it rings already; or nobody is there any more
        rope.send(b"!")


def silence(bell: socket.socket) -> None:
    with contextlib.suppress(BlockingIOError):
        while bell.recv(_RECEIVE_BYTES):
            pass


def _how(error: OSError) -> End:
    if isinstance(error, ConnectionResetError | BrokenPipeError):
        return End.RESET
    return End.TIMED_OUT if isinstance(error, TimeoutError) else End.UNREACHABLE


def go_first() -> None:
    """Have the calling thread run before others of this host, where that is allowed: it needs microseconds, but in time."""
    with contextlib.suppress(OSError):  # only root may
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _FIRST)
