"""Rank processes that are Ray actors. They outlive the coordinator; here they are called."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

import ray
from ray.exceptions import (
    ActorUnavailableError,
    ActorUnschedulableError,
    NodeDiedError,
    ObjectLostError,
    RayActorError,
    RayError,
    RayTaskError,
)

from actors.calls.rank_calls import LOST, Arrived, answered, as_event
from actors.errors import named_line
from actors.files.run_folder import Token
from actors.hosts.cluster import NodeWatch
from orchestrator.protocol.commands import CallLane
from orchestrator.protocol.events import CallId, Ended, Failed, FailKind, NotMade
from orchestrator.protocol.members import Member

logger = logging.getLogger(__name__)

_NOT_REACHED = "Ray cannot reach its process now"
_ATTEMPTS, _AGAIN_SECONDS = 10, 1.0
"""To attach a process that Ray cannot reach: it may live, and its connection may be made anew."""
_GONE = (RayActorError, ActorUnschedulableError, NodeDiedError, ObjectLostError)
"""What is said of a process that is no more, or cannot be made any more because its node is none."""


class RayRanks:
    """actors: StageActors of the first layout, in the order of its ranks. ask: have one created for a member, which is to be
    answered by `admit` or `not_made`. watch: of the nodes. Safe to be told of actors from any thread.

    Answers of `send` are posted from Ray's own thread, as they come: nothing here polls.
    """

    def __init__(self, actors: Sequence[Any], ask: Callable[[Member], None], watch: NodeWatch):
        self._first, self._ask, self._watch = list(actors), ask, watch
        self._lock = threading.Lock()
        self._actors: dict[Member, Any] = {}
        self._to_attach: dict[Member, tuple] = {}
        self._tokens: dict[Member, Token] = {}
        self._dismissed: set[Member] = set()
        self._closed = False
        self._post: Callable[[object], None] = lambda event: None
        self._open: dict[CallId | Member, Future] = {}
        self._ending: queue.SimpleQueue[Any] = queue.SimpleQueue()
        threading.Thread(target=self._end, name="endings", daemon=True).start()

    def enlist(self, members: Sequence[Member]) -> None:
        with self._lock:
            self._actors |= dict(zip(members, self._first))

    def admit(self, member: Member, actor: Any, token: Token | None = None) -> None:
        """What was asked for has been created. token: one who does not see that is not made."""
        with self._lock:
            waiting = self._to_attach.pop(member, None)
            if token is not None:
                self._tokens[member] = token
            wanted = not self._closed and member not in self._dismissed
            if wanted:
                self._actors[member] = actor
        if not wanted:
            self._ending.put(actor)
        elif waiting is not None:
            self._attach(actor, member, waiting)

    def wanted(self, member: Member) -> bool:
        """Whether what was asked for is still to be created: it was not given up meanwhile."""
        with self._lock:
            return not self._closed and member not in self._dismissed

    def not_made(self, member: Member, reason: str) -> None:
        """What was asked for cannot be created."""
        with self._lock:
            self._to_attach.pop(member, None)
        self._post(NotMade(member, reason))

    def close(self, seconds: float) -> None:
        """End all actors, and those that are still to be admitted. Waits for Ray no longer than this."""
        with self._lock:
            self._closed, actors, self._actors = True, list(self._actors.values()), {}
        for actor in actors:
            self._ending.put(actor)
        done = threading.Event()
        self._ending.put(done)
        done.wait(seconds)

    def attach(self, member: Member, address: tuple[str, int], beat_seconds: float, run: str, epoch: int = 0) -> None:
        with self._lock:
            actor = self._actors.get(member)
            if actor is None:
                self._to_attach[member] = (address, beat_seconds, run, epoch)
        if actor is not None:
            self._attach(actor, member, (address, beat_seconds, run, epoch))

    def _attach(self, actor: Any, member: Member, wanted: tuple) -> None:
        def attach() -> None:
            self._call(actor, member, "attach", (member, *wanted), lambda _: None)

        def seen(sees: bool) -> None:
            if sees:
                attach()
            else:  # on a thread for it: storage may have to be waited for
                threading.Thread(target=self._not_seen, args=(member, token, attach), name="token", daemon=True).start()

        with self._lock:
            token = self._tokens.pop(member, None)
        if token is None:
            attach()
        else:
            self._call(actor, member, "reads", (token.path, token.content), seen)

    def _not_seen(self, member: Member, token: Token, attach: Callable[[], None]) -> None:
        if token.read():
            self.dismiss(member)
            self._post(NotMade(member, f"its node does not see run.directory = {token.directory}"))
        else:  # nobody does, at present
            attach()

    def _call(self, actor: Any, member: Member, method: str, arguments: tuple, then: Callable[[Any], None],
              attempts: int = _ATTEMPTS) -> None:
        """Of a process that has not said hello. One that has ended, or stays out of reach, is told of: it never will."""
        def over(future: Future) -> None:
            self._open.pop(member, None)
            error = future.exception()
            if error is None:
                then(future.result())
            elif isinstance(error, ActorUnavailableError) and attempts > 1:
                again = threading.Timer(_AGAIN_SECONDS, self._call, (actor, member, method, arguments, then, attempts - 1))
                again.daemon = True
                again.start()
            elif isinstance(error, _GONE):
                self._post(Ended(member, LOST))
            else:
                logger.warning("%s of %s: %s", method, member, named_line(error))

        with self._lock:
            if self._actors.get(member) is not actor:  # it was given up meanwhile
                return
        self._open[member] = future = getattr(actor, method).remote(*arguments).future()
        future.add_done_callback(over)

    def spawn(self, member: Member) -> bool:
        with self._lock:
            before = [known for known in self._actors if (known.node, known.local) == (member.node, member.local)]
        for known in before:
            self.dismiss(known)
        self._ask(member)
        return True

    def dismiss(self, member: Member) -> None:
        with self._lock:
            actor = self._actors.pop(member, None)
            self._to_attach.pop(member, None)
            self._tokens.pop(member, None)
            self._dismissed.add(member)
        if actor is not None:
            self._ending.put(actor)

    def listen(self, post: Callable[[object], None]) -> None:
        """As RankCalls says."""
        self._post = post
        self._watch.listen(lambda news: post(as_event(news)))

    def send(self, call: CallId, member: Member, generation: int, method: str, arguments: tuple, lane: CallLane) -> None:
        """As RankCalls says."""
        with self._lock:
            actor = self._actors.get(member)
        try:
            if actor is None:
                raise RayActorError
            future = getattr(actor, lane.value).remote(call, generation, method, arguments).future()
        except RayError as error:
            future = Future()
            future.set_exception(error)
        self._open[call] = future  # it keeps the answer from being dropped by Ray
        future.add_done_callback(lambda done: self._answered(call, member, done))

    def _answered(self, call: CallId, member: Member, future: Future) -> None:
        self._open.pop(call, None)
        self._post(_event_of(call, member, future))

    def _end(self) -> None:
        """On a thread for it: Ray may have to be waited for."""
        while True:
            actor = self._ending.get()
            if isinstance(actor, threading.Event):
                actor.set()
                continue
            try:
                ray.kill(actor)
            except (RayError, ValueError, RuntimeError) as error:
                logger.warning("cannot end an actor: %s", error)

    def abort(self) -> None:
        with self._lock:
            actors = list(self._actors.values())
        for actor in actors:
            actor.abort.remote()


def _event_of(call: CallId, member: Member, future: Future) -> Arrived | Failed:
    error = future.exception()
    if error is None:
        return answered(call, member, future.result())
    if isinstance(error, ActorUnavailableError):  # of the errors that follow the only one of which nobody has ended
        return Failed(call, member, FailKind.ABORTED, _NOT_REACHED)
    if isinstance(error, _GONE):
        return Failed(call, member, FailKind.GONE, LOST)
    cause = error.cause if isinstance(error, RayTaskError) and error.cause is not None else error
    return Failed(call, member, FailKind.OWN, named_line(cause))
