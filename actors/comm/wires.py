"""What each TCP connection of this process carried, and how fast, from the kernel's own counts.

A collective that ends late says only that somebody was late: all its members end together. The kernel counts for every
connection the time in which data were under way, so neither waiting for a peer that computes, nor for one that does not read,
makes a connection look slow. Linux only, and TCP only: elsewhere nothing is reported.
"""

from __future__ import annotations

import os
import socket
import stat
import struct
from dataclasses import dataclass

_FAMILIES = (socket.AF_INET, socket.AF_INET6)
# struct tcp_info of linux/tcp.h: tcpi_bytes_acked, tcpi_bytes_received; tcpi_busy_time, tcpi_rwnd_limited (microseconds)
_BYTES, _BYTES_AT, _TIMES, _TIMES_AT = struct.Struct("=QQ"), 120, struct.Struct("=QQ"), 168
_INFO_SIZE = _TIMES_AT + _TIMES.size


@dataclass(frozen=True, slots=True)
class Wire:
    """One connection since the report before. local, peer: its ends, as "address port"; the peer's report has them swapped.

    bytes: of data that the peer has acknowledged. seconds: in which data of ours were under way and the peer had room for them.
    """

    local: str
    peer: str
    bytes: int
    seconds: float


@dataclass(frozen=True, slots=True)
class _Counts:
    sent: int
    received: int
    microseconds: int


class Wires:
    """The connections of this process, whoever opened them; `since` finds them anew every time."""

    def __init__(self) -> None:
        self._before: dict[tuple[str, str], _Counts] = {}

    def since(self) -> tuple[Wire, ...]:
        """Connections that carried anything, either way, since the last call. One that ends meanwhile is left out."""
        now = _connections()
        found = []
        for ends, counts in now.items():
            before = self._before.get(ends, _Counts(0, 0, 0))
            if before.sent > counts.sent or before.received > counts.received:  # other sockets that have the same ends by chance
                before = _Counts(0, 0, 0)
            if counts.sent > before.sent or counts.received > before.received:
                seconds = max(counts.microseconds - before.microseconds, 0) / 1e6
                found.append(Wire(*ends, counts.sent - before.sent, seconds))
        self._before = now
        return tuple(found)


def _connections() -> dict[tuple[str, str], _Counts]:
    try:
        descriptors = [int(name) for name in os.listdir("/proc/self/fd")]
    except OSError:
        return {}
    found = {}
    for descriptor in descriptors:
        try:
            if stat.S_ISSOCK(os.fstat(descriptor).st_mode) and (read := _read(descriptor)) is not None:
                found[read[0]] = read[1]
        except OSError:  # closed meanwhile, or not connected
            continue
    return found


def _read(descriptor: int) -> tuple[tuple[str, str], _Counts] | None:
    """Ends and counts; None: not TCP, or a kernel that does not count. Raises OSError. The socket stays its owner's."""
    borrowed = socket.socket(fileno=descriptor)
    try:
        if borrowed.family not in _FAMILIES or borrowed.type != socket.SOCK_STREAM:
            return None
        ends = _text(borrowed.getsockname()), _text(borrowed.getpeername())
        info = borrowed.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _INFO_SIZE)
    finally:
        borrowed.detach()
    if len(info) < _INFO_SIZE:
        return None
    (sent, received), (busy, reader_full) = _BYTES.unpack_from(info, _BYTES_AT), _TIMES.unpack_from(info, _TIMES_AT)
    return ends, _Counts(sent, received, max(busy - reader_full, 0))


def _text(address: tuple) -> str:
    return f"{address[0].removeprefix('::ffff:')} {address[1]}"
