"""The coordinator's end of all heartbeat connections: which rank processes are connected, when each was last heard from, and
telling them to let go.

It sees at once when a process ends, since the kernel then closes its connection. Of a node that is cut off or frozen there is
only silence: how much of it is too much is not decided here.
"""

from __future__ import annotations

import json
import logging
import resource
import selectors
import socket
import threading
import time
from collections.abc import Callable, Iterable, Mapping
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
    ring,
    silence,
    wanted_events,
)
from orchestrator.protocol.events import Beat, LetGo
from orchestrator.protocol.members import Member

logger = logging.getLogger(__name__)

_TICK_SECONDS = 0.5
_BACKLOG = 4096
_GATHER_SECONDS = 0.002  # beats that are taken in together cost less; it adds to how late an end is noticed
_GATHER_FROM = 64  # connections
_BEAT_DIGITS = 19


class HeartbeatServer:
    """The coordinator's end: one thread serves all members.

    host: the address of this node that members can reach; port: by default any. run: members of other runs are refused.
    An incarnation older than one that has been seen at its place is refused; a newer one takes the place of an older one that is
    still connected (`End.REPLACED`). A member that comes again from the same process (its link was cut) is told by `hello` again.
    epoch: of this coordinator, said in each welcome; nobody is refused for having another. told: called on every hello, end and answer
    to an abort, from the thread that serves members: it must return at once, and not raise.
    Raises OSError: no such address here.
    """

    def __init__(self, host: str, port: int = 0, run: str = "", *, epoch: int = 0, told: Callable[[], None] = lambda: None):
        self._run, self._epoch, self._told = run, epoch, told
        _allow_descriptors()
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listener = socket.create_server((host, port), family=family, backlog=_BACKLOG)
        self._listener.setblocking(False)
        self.address: Address = self._listener.getsockname()[:2]
        self._changed = threading.Condition()  # guards all below
        self._peers: dict[Member, _Peer] = {}
        self._hellos: list[tuple[Member, dict[str, Any]]] = []
        self._ended: list[tuple[Member, float, str]] = []
        self._aborts: list[tuple[tuple[Member, ...], int]] = []
        self._answers: dict[Member, tuple[int, float]] = {}
        self._let_go: list[LetGo] = []
        self._closing = False
        # of the thread alone
        self._newest: dict[tuple[str, int], int] = {}
        self._strangers: set[_Peer] = set()
        self._bell, self._rope = bell_and_rope()
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._bell, selectors.EVENT_READ, self._rung)
        self._listen(True)
        self._thread = threading.Thread(target=self._serve, name="heartbeats", daemon=True)
        self._thread.start()

    def beats(self) -> dict[Member, Beat]:
        """When each connected member was last heard from, and how much it had finished by then."""
        with self._changed:
            return {member: Beat(peer.heard, peer.finished) for member, peer in self._peers.items()}

    def let_go(self) -> list[LetGo]:
        """Answers to aborts since the last call."""
        with self._changed:
            found, self._let_go = self._let_go, []
        return found

    def hello(self) -> list[tuple[Member, dict[str, Any]]]:
        """Members that have connected since the last call, with what they say of themselves: pid, host, and more."""
        with self._changed:
            found, self._hellos = self._hellos, []
        return found

    def ended(self) -> list[tuple[Member, float, str]]:
        """Members whose connection has ended since the last call: when (time.monotonic()), and how (`End`)."""
        with self._changed:
            found, self._ended = self._ended, []
        return found

    def abort(self, members: Iterable[Member], generation: int) -> None:
        """Tell them to end all communication of a generation. Returns at once; those that are not connected are not told."""
        told = tuple(members)
        with self._changed:
            for member in told:
                self._answers.pop(member, None)
            self._aborts.append((told, generation))
        ring(self._rope)

    def aborted(self, members: Iterable[Member], generation: int, seconds: float) -> dict[Member, float]:
        """Wait until all have answered to the last `abort`, of `generation`, but no longer than `seconds`, nor for those whose
        connection has ended. Seconds that each one took, by its own clock; who is missing did not answer."""
        asked, deadline = set(members), time.monotonic() + seconds
        with self._changed:
            while True:
                found = {member: self._answers[member][1] for member in asked
                         if self._answers.get(member, (None,))[0] == generation}
                left = deadline - time.monotonic()
                if left <= 0 or self._closing or not (asked - found.keys()) & self._peers.keys():
                    return found
                self._changed.wait(left)

    def close(self) -> None:
        """End all connections and the thread. Members find themselves orphaned."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        ring(self._rope)
        self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # --- the thread ----------------------------------------------------------------------------------------------

    def _serve(self) -> None:
        go_first()
        next_tick = 0.0
        try:
            while not self._closing:
                for key, events in self._selector.select(_TICK_SECONDS):
                    if isinstance(key.data, _Peer):
                        self._attend(key.data, events)
                    else:
                        key.data()
                if (now := time.monotonic()) >= next_tick:
                    self._tick(now)
                    next_tick = now + _TICK_SECONDS
                if len(self._peers) >= _GATHER_FROM:
                    time.sleep(_GATHER_SECONDS)
        finally:
            for key in list(self._selector.get_map().values()):
                key.fileobj.close()
            self._selector.close()
            self._rope.close()
            self._listener.close()

    def _tick(self, now: float) -> None:
        """Drop who does not introduce himself; listen again, if for lack of descriptors that was given up."""
        for peer in [peer for peer in self._strangers if now - peer.heard > INTRODUCTION_SECONDS]:
            self._drop(peer, End.MALFORMED)
        self._listen(True)

    def _listen(self, wanted: bool) -> None:
        if wanted and self._listener.fileno() not in self._selector.get_map():
            self._selector.register(self._listener, selectors.EVENT_READ, self._accept)
        elif not wanted:
            self._selector.unregister(self._listener)

    def _rung(self) -> None:
        silence(self._bell)
        with self._changed:
            aborts, self._aborts = self._aborts, []
            told = [(self._peers[member], generation) for members, generation in aborts for member in members
                    if member in self._peers]
        for peer, generation in told:
            self._say(peer, {"abort": generation})

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError:
                logger.exception("cannot take a heartbeat connection; trying again in %g s", _TICK_SECONDS)
                self._listen(False)
                return
            try:
                peer = _Peer(LineSocket(connection), time.monotonic())
            except OSError:  # it is gone already
                connection.close()
                continue
            self._strangers.add(peer)
            self._selector.register(connection, selectors.EVENT_READ, peer)

    def _attend(self, peer: _Peer, events: int) -> None:
        """Take what a connection has for us, and give it what it did not take before."""
        if peer.dropped:
            return  # in this very round
        try:
            if events & selectors.EVENT_WRITE:
                self._flush(peer)
            if events & selectors.EVENT_READ:
                for line in peer.wire.receive():
                    if peer.member is not None and len(line) <= _BEAT_DIGITS and (line.isdigit() or not line):
                        peer.finished = max(peer.finished, int(line or b"0"))
                    else:
                        self._hear(peer, line)
                if peer.member is not None:
                    peer.heard = time.monotonic()
        except ConnectionEnded as ended:
            self._drop(peer, ended.how)

    def _hear(self, peer: _Peer, line: bytes) -> None:
        """One line that is no beat. Raises ConnectionEnded."""
        try:
            message = json.loads(line)
            if peer.member is None:
                self._introduce(peer, message)
                return
            answer = int(message["aborted"]), float(message["seconds"])
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
            raise ConnectionEnded(End.MALFORMED) from None
        with self._changed:
            self._answers[peer.member] = answer
            self._let_go.append(LetGo(peer.member, *answer))
            self._changed.notify_all()
        self._told()

    def _introduce(self, peer: _Peer, message: Any) -> None:
        """Raises ConnectionEnded: refused. ValueError, TypeError, KeyError: that was no hello."""
        member, about = _read_hello(message)
        refusal = self._refusal(member, about, message["run"])
        if refusal is not None:
            logger.warning("refused a heartbeat connection of %s: %s", member, refusal)
            peer.wire.send({"refused": refusal})
            raise ConnectionEnded(End.REPLACED)
        place = member.node, member.local
        before = self._peers.get(Member(*place, self._newest.get(place, 0)))
        self._newest[place] = member.incarnation
        if before is not None:
            self._drop(before, End.REPLACED, told=before.member != member)  # the same process again: nobody ended
        self._strangers.discard(peer)
        peer.member, peer.about, peer.heard = member, about, time.monotonic()
        with self._changed:
            self._peers[member] = peer
            self._hellos.append((member, about))
            self._answers.pop(member, None)
        peer.wire.send({"welcome": VERSION, "epoch": self._epoch})  # now it is one of us
        self._told()

    def _refusal(self, member: Member, about: Mapping[str, Any], run: str) -> str | None:
        if run != self._run:
            return f"this is run {self._run!r}"
        newest = self._newest.get((member.node, member.local), member.incarnation)
        if member.incarnation < newest:
            return f"incarnation {newest} is in its place"
        present = self._peers.get(member)
        if present is not None and (present.about["pid"], present.about["host"]) != (about["pid"], about["host"]):
            return f"process {present.about['pid']} on {present.about['host']} is this member"
        return None

    def _say(self, peer: _Peer, message: Mapping[str, Any]) -> None:
        if peer.dropped:
            return
        try:
            peer.wire.send(message)
            self._watch_writes(peer)
        except ConnectionEnded as ended:
            self._drop(peer, ended.how)

    def _flush(self, peer: _Peer) -> None:
        peer.wire.flush()
        self._watch_writes(peer)

    def _watch_writes(self, peer: _Peer) -> None:
        events = wanted_events(peer.wire)
        if self._selector.get_key(peer.wire.socket).events != events:
            self._selector.modify(peer.wire.socket, events, peer)

    def _drop(self, peer: _Peer, how: End, told: bool = True) -> None:
        peer.dropped = True
        self._selector.unregister(peer.wire.socket)
        peer.wire.socket.close()
        self._strangers.discard(peer)
        if peer.member is not None:
            with self._changed:
                del self._peers[peer.member]
                if told:
                    self._ended.append((peer.member, time.monotonic(), how))
                self._changed.notify_all()
            self._told()


class _Peer:
    """A connection as the coordinator sees it; `member` once it has introduced itself."""

    __slots__ = ("about", "dropped", "finished", "heard", "member", "wire")

    def __init__(self, wire: LineSocket, now: float):
        self.wire, self.heard = wire, now
        self.member: Member | None = None
        self.about: dict[str, Any] = {}
        self.dropped, self.finished = False, 0


def _read_hello(message: Any) -> tuple[Member, dict[str, Any]]:
    """Raises ValueError, TypeError, KeyError: it is none."""
    (node, local, incarnation), about = message["member"], message["about"]
    if message["lifeline"] != VERSION or not (isinstance(node, str) and type(local) is type(incarnation) is int):
        raise ValueError("no hello")
    if not (isinstance(about, dict) and {"pid", "host"} <= about.keys() and isinstance(message["run"], str)
            and type(message["epoch"]) is int):
        raise ValueError("no hello")
    return Member(node, local, incarnation), about


def _allow_descriptors() -> None:
    """As many as this process may have: a member takes one, and the usual limit is 1024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
