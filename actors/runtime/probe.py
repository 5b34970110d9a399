"""Whether two rank processes can exchange bytes, both ways: asked when they accuse each other, or nobody knows who is to blame.

Every rank process listens on the address at which its peers reach it, on threads that do nothing else, so that a rank whose compute
hangs still answers. Whoever probes sends so many bytes and wants the same ones back: where one direction of the link is cut, either
the bytes do not arrive, or what comes back does not.
"""

from __future__ import annotations

import contextlib
import errno
import os
import selectors
import socket
import threading
import time
from collections.abc import Mapping

from actors.protocol.heartbeat_wire import Address
from orchestrator.protocol.members import Member

ECHOED_BYTES = 1 << 16
"""More than fits one packet, or the first window: a link that lets only small ones through is not whole."""
_CHUNK_BYTES = 1 << 16
_IDLE_SECONDS = 10.0
_MOST_CALLERS = 1024
_TICK_SECONDS = 1.0


class ProbeListener:
    """Echoes whatever comes, on a thread of its own, until its process ends or `close`. address: (host, port).

    host: an address of this machine. Raises OSError: it is none.
    """

    def __init__(self, host: str):
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listener = socket.create_server((host, 0), family=family, backlog=_MOST_CALLERS)
        self._listener.setblocking(False)
        self.address: Address = self._listener.getsockname()[:2]
        self._callers: dict[socket.socket, _Caller] = {}
        self._closing = False
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._serve, name="probe", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._closing = True
        with contextlib.suppress(OSError), socket.create_connection(self.address, timeout=_TICK_SECONDS):
            pass  # it wakes the thread up; without it, that looks within a tick
        self._thread.join()

    def _serve(self) -> None:
        while not self._closing:
            for key, events in self._selector.select(_TICK_SECONDS):
                if key.fileobj is self._listener:
                    self._accept()
                else:
                    self._echo(key.fileobj, events)
            now = time.monotonic()
            for connection in [one for one, caller in self._callers.items() if now - caller.since > _IDLE_SECONDS]:
                self._drop(connection)
        for connection in list(self._callers):
            self._drop(connection)
        self._selector.close()
        self._listener.close()

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError:  # whoever called has gone, or there are no descriptors: the next look tries again
            return
        connection.setblocking(False)
        self._callers[connection] = _Caller()
        self._selector.register(connection, selectors.EVENT_READ)
        if len(self._callers) > _MOST_CALLERS:
            self._drop(next(iter(self._callers)))

    def _echo(self, connection: socket.socket, events: int) -> None:
        caller = self._callers.get(connection)
        if caller is None:
            return  # dropped in this very round
        try:
            if events & selectors.EVENT_READ and not caller.unsent:
                caller.unsent = connection.recv(_CHUNK_BYTES)
                if not caller.unsent:
                    return self._drop(connection)
                caller.since = time.monotonic()
            with contextlib.suppress(BlockingIOError):
                caller.unsent = caller.unsent[connection.send(caller.unsent):]
        except BlockingIOError:
            return
        except OSError:
            return self._drop(connection)
        self._selector.modify(connection, selectors.EVENT_WRITE if caller.unsent else selectors.EVENT_READ)

    def _drop(self, connection: socket.socket) -> None:
        del self._callers[connection]
        self._selector.unregister(connection)
        connection.close()


class _Caller:
    """A connection as the listener sees it. since: when it last brought something."""

    __slots__ = ("since", "unsent")

    def __init__(self) -> None:
        self.since, self.unsent = time.monotonic(), b""


class Prober:
    """Asks many peers at once, on the thread that calls."""

    def not_reached(self, peers: Mapping[Member, Address], seconds: float, count: int = ECHOED_BYTES) -> tuple[Member, ...]:
        """Peers from which `count` bytes did not come back within `seconds`."""
        pending: dict[socket.socket, _Trial] = {}
        missing = set(peers)
        payload = os.urandom(count)
        deadline = time.monotonic() + seconds
        with selectors.DefaultSelector() as selector:
            try:
                for member, address in peers.items():
                    with contextlib.suppress(OSError):  # no such address, or no way there: it is not reached
                        connection = _begin(address)
                        pending[connection] = _Trial(member, payload)
                        selector.register(connection, selectors.EVENT_READ | selectors.EVENT_WRITE)
                while pending and (left := deadline - time.monotonic()) > 0:
                    for key, _ in selector.select(left):
                        trial = pending[key.fileobj]
                        if (whole := trial.go_on(key.fileobj, payload)) is None:
                            if not trial.unsent:
                                selector.modify(key.fileobj, selectors.EVENT_READ)
                            continue
                        if whole:
                            missing.discard(trial.member)
                        selector.unregister(key.fileobj)
                        del pending[key.fileobj]
                        key.fileobj.close()
            finally:
                for connection in pending:
                    connection.close()
        return tuple(member for member in peers if member in missing)


class _Trial:
    """One peer of whom bytes are wanted back."""

    __slots__ = ("came", "member", "unsent")

    def __init__(self, member: Member, payload: bytes):
        self.member, self.unsent, self.came = member, payload, b""

    def go_on(self, connection: socket.socket, wanted: bytes) -> bool | None:
        """Send and take what can be. Whether all came back as it went; None: not all has come yet."""
        try:
            with contextlib.suppress(BlockingIOError):
                if self.unsent:
                    self.unsent = self.unsent[connection.send(self.unsent):]
            with contextlib.suppress(BlockingIOError):
                data = connection.recv(_CHUNK_BYTES)
                if not data:
                    return False
                self.came += data
        except OSError as error:
            return None if error.errno == errno.ENOTCONN else False
        return self.came == wanted if len(self.came) >= len(wanted) else None


def _begin(address: Address) -> socket.socket:
    """A connection that is being made. Raises OSError: it cannot be."""
    host, port = address
    connection = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    try:
        connection.setblocking(False)
        if (code := connection.connect_ex((host, port))) not in (0, errno.EINPROGRESS):
            raise OSError(code, os.strerror(code))
    except BaseException:
        connection.close()
        raise
    return connection
