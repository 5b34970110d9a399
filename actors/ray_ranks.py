"""Rank processes that are Ray actors. They outlive the coordinator; here they are called."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, NodeDiedError, ObjectLostError, RayActorError, RayError, RayTaskError

from actors.cluster import NodeWatch
from actors.ranks import LOST, NO_ANSWER, POLL_SECONDS, Arrived, Check, News, RankFailed, as_event
from orchestrator.membership import Member
from orchestrator.protocol.commands import Lane
from orchestrator.protocol.events import CallId, Ended, Failed, FailKind, Fault, NotMade

logger = logging.getLogger(__name__)


class RayRanks:
    """actors: StageActors of the first layout, in the order of its ranks. ask: have one created for a member, which is to be
    answered by `admit` or `not_made`. watch: of the nodes. Safe to be told of actors from any thread.

    Answers of `send` are posted from Ray's own thread, as they come: nothing here polls.
    """

    def __init__(self, actors: Sequence[Any], ask: Callable[[Member], None], watch: NodeWatch):
        self._first, self._ask, self._watch = list(actors), ask, watch
        self._seats: list[Any] = list(actors)
        self._lock = threading.Lock()
        self._actors: dict[Member, Any] = {}
        self._to_attach: dict[Member, tuple] = {}
        self._dismissed: set[Member] = set()
        self._closed = False
        self._post: Callable[[object], None] = lambda event: None
        self._open: dict[CallId | Member, Future] = {}
        self._ending: queue.SimpleQueue[Any] = queue.SimpleQueue()
        threading.Thread(target=self._end, name="endings", daemon=True).start()

    @property
    def size(self) -> int:
        return len(self._seats)

    def enlist(self, members: Sequence[Member]) -> None:
        with self._lock:
            self._actors |= dict(zip(members, self._first))
        self.seat(members)

    def seat(self, members: Sequence[Member]) -> None:
        with self._lock:
            self._seats = [self._actors[member] for member in members]

    def admit(self, member: Member, actor: Any) -> None:
        """What was asked for has been created."""
        with self._lock:
            waiting = self._to_attach.pop(member, None)
            wanted = not self._closed and member not in self._dismissed
            if wanted:
                self._actors[member] = actor
        if not wanted:
            self._ending.put(actor)
        elif waiting is not None:
            self._attach(actor, member, waiting)

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
        """One that has ended is told of: it will never say hello."""
        def attached(future: Future) -> None:
            self._open.pop(member, None)
            if isinstance(future.exception(), RayActorError | NodeDiedError | ObjectLostError):
                self._post(Ended(member, LOST))
        self._open[member] = future = actor.attach.remote(member, *wanted).future()
        future.add_done_callback(attached)

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
            self._dismissed.add(member)
        if actor is not None:
            self._ending.put(actor)

    def news(self) -> list[News]:
        return self._watch.news()

    def listen(self, post: Callable[[object], None]) -> None:
        """As RankCalls says."""
        self._post = post
        self._watch.listen(lambda news: post(as_event(news)))

    def send(self, call: CallId, member: Member, generation: int, method: str, arguments: tuple, lane: Lane) -> None:
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

    def start(self, method: str, arguments: Sequence[tuple]) -> RayPending:
        return RayPending([getattr(actor, method).remote(*values) for actor, values in zip(self._seats, arguments)])

    def abort(self) -> None:
        for actor in self._seats:
            actor.abort.remote()


def _event_of(call: CallId, member: Member, future: Future) -> Arrived | Failed:
    error = future.exception()
    if error is None:
        answer = future.result()
        return Failed(call, member, answer.kind, answer.text) if isinstance(answer, Fault) else Arrived(call, member, answer.value)
    if isinstance(error, RayActorError | NodeDiedError | ObjectLostError):
        return Failed(call, member, FailKind.GONE, LOST)
    cause = error.cause if isinstance(error, RayTaskError) and error.cause is not None else error
    text = str(cause).strip().splitlines()
    return Failed(call, member, FailKind.OWN, f"{type(cause).__name__}: {text[0] if text else ''}")


class RayPending:
    def __init__(self, references: list[ray.ObjectRef]):
        self._references = references
        self._rank_of = {reference: rank for rank, reference in enumerate(references)}

    def done(self) -> bool:
        return len(ray.wait(self._references, num_returns=len(self._references), timeout=0)[0]) == len(self._references)

    def results(self, timeout_seconds: float, check: Check | None = None) -> list[Any]:
        deadline = time.monotonic() + timeout_seconds
        waiting, found = list(self._references), {}
        while waiting:
            left = max(0.0, deadline - time.monotonic())
            ready, waiting = ray.wait(waiting, num_returns=1, timeout=left if check is None else min(left, POLL_SECONDS))
            if ready:
                more, waiting = ray.wait(waiting, num_returns=len(waiting), timeout=0) if waiting else ([], [])
                found |= {reference: self._get(reference, timeout_seconds) for reference in (*ready, *more)}
                continue
            if check is not None and (failed := check()) is not None:
                raise failed
            if left <= 0:
                raise RankFailed(self._rank_of[waiting[0]], f"{NO_ANSWER} {timeout_seconds:g} s")
        return [found[reference] for reference in self._references]

    def _get(self, reference: ray.ObjectRef, timeout_seconds: float) -> Any:
        """A result that is there already, or on its way from a node that may be lost meanwhile."""
        rank = self._rank_of[reference]
        try:
            return ray.get(reference, timeout=timeout_seconds)
        except RayTaskError as error:
            cause = error.cause if error.cause is not None else error
            raise RankFailed(rank, str(cause).splitlines()[0] if str(cause) else type(cause).__name__) from error
        except RayActorError as error:
            raise RankFailed(rank, LOST) from error
        except GetTimeoutError:
            raise RankFailed(rank, f"{NO_ANSWER} {timeout_seconds:g} s") from None
        except RayError as error:
            raise RankFailed(rank, str(error).splitlines()[0]) from error
