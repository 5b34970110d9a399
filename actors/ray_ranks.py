"""Rank processes that are Ray actors. The driver creates them, so that they outlive the coordinator; here they are called."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError

from actors.cluster import NodeWatch
from actors.ranks import LOST, NO_ANSWER, POLL_SECONDS, Check, News, RankFailed
from orchestrator.membership import Member


class RayRanks:
    """actors: StageActors of the first layout, in the order of its ranks. ask: have the driver create one for a member, which it
    will `admit`. watch: of the nodes. Safe to be told of actors from any thread."""

    def __init__(self, actors: Sequence[Any], ask: Callable[[Member], None], watch: NodeWatch):
        self._first, self._ask, self._watch = list(actors), ask, watch
        self._seats: list[Any] = list(actors)
        self._lock = threading.Lock()
        self._actors: dict[Member, Any] = {}
        self._to_attach: dict[Member, tuple] = {}

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
        """The driver has created what was asked for."""
        with self._lock:
            self._actors[member] = actor
            waiting = self._to_attach.pop(member, None)
        if waiting is not None:
            actor.attach.remote(member, *waiting)

    def attach(self, member: Member, address: tuple[str, int], beat_seconds: float, run: str) -> None:
        with self._lock:
            actor = self._actors.get(member)
            if actor is None:
                self._to_attach[member] = (address, beat_seconds, run)
        if actor is not None:
            actor.attach.remote(member, address, beat_seconds, run)

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
        if actor is not None:
            ray.kill(actor)

    def news(self) -> list[News]:
        return self._watch.news()

    def start(self, method: str, arguments: Sequence[tuple]) -> RayPending:
        return RayPending([getattr(actor, method).remote(*values) for actor, values in zip(self._seats, arguments)])

    def abort(self) -> None:
        for actor in self._seats:
            actor.abort.remote()


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
