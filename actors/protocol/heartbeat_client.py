"""A rank's end of its heartbeat connection to the coordinator: it says who it is, beats, and lets go when told to.

All of it on one thread of its own, whatever the rank's other threads are doing.
"""

from __future__ import annotations

import errno
import logging
import os
import selectors
import socket
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, Self

from actors.protocol.heartbeat_wire import (
    INTRODUCTION_SECONDS,
    VERSION,
    Address,
    ConnectionEnded,
    End,
    LineSocket,
    bell_and_rope,
    go_first,
    read_message,
    ring,
    silence,
    wanted_events,
)
from orchestrator.protocol.members import Member

logger = logging.getLogger(__name__)

_RETRY_SECONDS = (0.05, 1.0)  # between attempts to connect: the first, doubling to the last


class HeartbeatClient:
    """A rank's end: a thread of its own, which connects, beats, and lets go when told to. Where the connection ends it tries again;
    where it is refused, since somebody newer is in this member's place or the coordinator is another run's, it rests until closed.

    abort: called with a generation, on this thread; it is to end all communication of that generation, quickly: no beat goes out
        meanwhile. Where it raises, no answer is given.
    about: what to say of oneself at each hello besides pid and host; it must be fit for JSON.
    epoch: of the newest coordinator that is known here. Aborts of one that is older are neither obeyed nor answered.
    finished: how much has been done so far; each beat says it.
    `connected`: whether there is a coordinator who has said welcome, as far as is known here.
    Beats pause while another thread holds the interpreter's lock without a break, as only a call into C can.
    """

    def __init__(self, address: Address, member: Member, abort: Callable[[int], None], beat_seconds: float,
                 *, about: Callable[[], Mapping[str, Any]] = dict, run: str = "", epoch: Callable[[], int] = lambda: 0,
                 finished: Callable[[], int] = lambda: 0):
        self._address, self._member, self._run = address, member, run
        self._abort, self._about = abort, about
        self._beat_seconds, self._epoch, self._finished = beat_seconds, epoch, finished
        self._their_epoch = self._most_finished = 0
        self.connected = self._closing = False
        self._bell, self._rope = bell_and_rope()
        self._thread = threading.Thread(target=self._live, name="heartbeat", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Leave, and end the thread. To be called from any thread but its own."""
        self._closing = True
        ring(self._rope)
        self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # --- the thread ----------------------------------------------------------------------------------------------

    def _live(self) -> None:
        go_first()
        pause = _RETRY_SECONDS[0]
        with selectors.DefaultSelector() as selector, self._bell, self._rope:
            selector.register(self._bell, selectors.EVENT_READ)
            while not self._closing:
                welcome = self._meet(selector)
                if welcome:
                    pause = _RETRY_SECONDS[0]
                elif welcome is None:
                    self._rest(selector, None)
                else:
                    self._rest(selector, pause)
                    pause = min(2 * pause, _RETRY_SECONDS[1])

    def _meet(self, selector: selectors.BaseSelector) -> bool | None:
        """Connect, and stay until the connection ends or this is closed. Whether we were welcome; None: refused."""
        family = socket.AF_INET6 if ":" in self._address[0] else socket.AF_INET
        with socket.socket(family, socket.SOCK_STREAM) as connection:
            try:
                wire = LineSocket(connection)
                if connection.connect_ex(self._address) not in (0, errno.EINPROGRESS):
                    return False
                selector.register(connection, selectors.EVENT_WRITE)
            except OSError:  # no such address, or no way there
                return False
            try:
                return self._attend(selector, wire)
            finally:
                selector.unregister(connection)

    def _attend(self, selector: selectors.BaseSelector, wire: LineSocket) -> bool | None:
        try:
            if (lines := self._introduce(selector, wire)) is None:
                return False
        except ConnectionEnded:
            return False
        except _Refused as refused:
            logger.warning("refused by the coordinator: %s", refused)
            return None
        self.connected = True
        try:
            self._beat_on(selector, wire, lines)
        except ConnectionEnded as ended:
            logger.info("the coordinator's heartbeat connection ended: %s", ended.how)
        finally:
            self.connected = False
        return True

    def _introduce(self, selector: selectors.BaseSelector, wire: LineSocket) -> list[bytes] | None:
        """Wait for the connection, say hello, wait for welcome: the lines that came with it; None: none came in time.

        Raises ConnectionEnded, _Refused.
        """
        deadline, said = time.monotonic() + INTRODUCTION_SECONDS, False
        while not self._closing and (left := deadline - time.monotonic()) > 0:
            ready = self._wait(selector, left)
            if not ready & (selectors.EVENT_READ | selectors.EVENT_WRITE):
                continue
            if not said:
                about = {**self._about(), "pid": os.getpid(), "host": socket.gethostname()}
                member = [self._member.node, self._member.local, self._member.incarnation]
                wire.send({"lifeline": VERSION, "run": self._run, "epoch": self._epoch(), "member": member, "about": about})
                said = True
            selector.modify(wire.socket, wanted_events(wire))
            wire.flush()
            if lines := wire.receive():
                message = read_message(lines[0])
                if "refused" in message:
                    raise _Refused(message["refused"])
                if message.get("welcome") != VERSION:
                    # not a coordinator; maybe ourselves: a port that nobody holds may be our own
                    raise ConnectionEnded(End.MALFORMED)
                self._their_epoch = int(message.get("epoch", 0))
                return lines[1:]
        return None

    def _beat_on(self, selector: selectors.BaseSelector, wire: LineSocket, lines: list[bytes]) -> None:
        """lines: those that came with the welcome. Raises ConnectionEnded."""
        due = time.monotonic()
        for line in lines:
            self._let_go(wire, read_message(line))
        while not self._closing:
            selector.modify(wire.socket, wanted_events(wire))
            ready = self._wait(selector, max(0.0, due - time.monotonic()))
            if ready & selectors.EVENT_READ:
                for line in wire.receive():
                    self._let_go(wire, read_message(line))
            if ready & selectors.EVENT_WRITE:
                wire.flush()
            if (now := time.monotonic()) >= due:
                self._most_finished = max(self._most_finished, self._finished())
                wire.beat(self._most_finished)
                due = now + self._beat_seconds

    def _let_go(self, wire: LineSocket, message: Mapping[str, Any]) -> None:
        """Raises ConnectionEnded."""
        generation, started = message.get("abort"), time.monotonic()
        if not isinstance(generation, int):
            raise ConnectionEnded(End.MALFORMED)
        if self._their_epoch < self._epoch():
            logger.warning("a coordinator of epoch %d is not obeyed any more", self._their_epoch)
            return
        try:
            self._abort(generation)
        except Exception:  # whatever it is, this thread must go on: no answer tells the coordinator that this rank failed to
            logger.exception("cannot abort generation %d", generation)
            return
        wire.send({"aborted": generation, "seconds": time.monotonic() - started})

    def _wait(self, selector: selectors.BaseSelector, seconds: float | None) -> int:
        """Events of the connection, waiting no longer than this, or until this is to close."""
        ready = 0
        for key, events in selector.select(seconds):
            if key.fileobj is self._bell:
                silence(self._bell)
            else:
                ready |= events
        return ready

    def _rest(self, selector: selectors.BaseSelector, seconds: float | None) -> None:
        """Wait this long, None: for ever; or until this is to close."""
        if not self._closing:
            self._wait(selector, seconds)


class _Refused(Exception):
    pass
