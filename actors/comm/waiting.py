"""Waiting for what a group has under way, so that an abort always ends the wait.

Closing a group's connections ends all of gloo's operations but one: a receive of which a part has come already (gloo 2026,
transport/tcp/pair.cc: an exception is signalled to what is queued, not to what is being read). It would end with its timeout,
many minutes later. So whoever waits here goes away without it; what gloo still holds on to is kept until gloo lets go.
"""

from __future__ import annotations

import datetime
import itertools
import queue
import threading

import torch.distributed as dist

from actors.errors import first_line

_SLICE = datetime.timedelta(milliseconds=100)
"""How late an abort may be noticed by a wait that it does not end itself: one for a message of which a part has come."""
_GRACE = datetime.timedelta(milliseconds=50)
_kept: list[tuple[dist.Work, dist.Backend]] = []
_idle: list[_WaitingThread] = []


class Aborted(RuntimeError):
    """A communication ended because its group was aborted, timed out, or lost a member."""


class OutOfStep(Aborted):
    """Aborted, before anything was done: what was asked for does not follow on what this rank has."""


class OperationCounter:
    """How much a rank has finished, of whatever it does: a number that grows while it gets anywhere."""

    def __init__(self) -> None:
        self._numbers, self.count = itertools.count(1), 0

    def finished(self) -> None:
        """Something. From any thread."""
        self.count = next(self._numbers)


class GroupOperation:
    """One under way: to be waited for once. Operations that can only end by themselves or with their connection. progress: where its
    end is counted."""

    def __init__(self, work: dist.Work, progress: OperationCounter):
        self._work, self._progress = work, progress

    def is_completed(self) -> bool:
        """Of collectives only: gloo does not know it of single messages before they are waited for."""
        return self._work.is_completed()

    def wait(self) -> None:
        """Block until done. Raises Aborted."""
        try:
            self._work.wait()
        except RuntimeError as error:
            raise Aborted(first_line(error)) from error
        self._progress.finished()


class Collective(GroupOperation):
    """gloo runs it on a thread of its own; waiting for that with a timeout does no harm. aborted: of the group, when it is."""

    def __init__(self, work: dist.Work, progress: OperationCounter, backend: dist.Backend, aborted: threading.Event):
        super().__init__(work, progress)
        self._backend, self._aborted = backend, aborted

    def wait(self) -> None:
        while True:
            last = self._aborted.is_set()
            try:
                self._work.wait(_GRACE if last else _SLICE)
                return self._progress.finished()
            except RuntimeError:
                if self._work.is_completed():
                    return super().wait()
            if last:
                _keep(self._work, self._backend)
                raise Aborted("aborted while a message was arriving")


class Receive(GroupOperation):
    """A wait with a timeout would close all connections, so another thread waits. aborted: as above; waiting: of the group, those
    whom `let_go` must end."""

    def __init__(self, work: dist.Work, progress: OperationCounter, aborted: threading.Event, waiting: set[Receive]):
        super().__init__(work, progress)
        self._aborted, self._waiting = aborted, waiting
        self._error: RuntimeError | None = None
        self._done = threading.Event()

    def wait(self) -> None:
        self._waiting.add(self)
        try:
            if not self._aborted.is_set():
                (_idle.pop() if _idle else _WaitingThread()).give(self)
                self._done.wait()
        finally:
            self._waiting.discard(self)
        if self._error is not None:
            raise Aborted(first_line(self._error)) from self._error
        if not self._done.is_set() or self._aborted.is_set():
            raise Aborted("aborted while a message was awaited")
        self._progress.finished()

    def let_go(self) -> None:
        """Have the waiting thread go on. From any thread."""
        self._done.set()

    def perform(self) -> None:
        """Wait for it here."""
        try:
            self._work.wait()
        except RuntimeError as error:
            self._error = error
        self._done.set()


class _WaitingThread:
    """A thread that waits in the place of another."""

    def __init__(self) -> None:
        self._given: queue.SimpleQueue[Receive] = queue.SimpleQueue()
        threading.Thread(target=self._run, name="receive", daemon=True).start()

    def give(self, receive: Receive) -> None:
        self._given.put(receive)

    def _run(self) -> None:
        while True:
            receive = self._given.get()
            receive.perform()
            del receive  # it would keep its tensor until the next one comes
            _idle.append(self)


def _keep(work: dist.Work, backend: dist.Backend) -> None:
    """Ending a backend waits for its threads, and one of them is stuck."""
    _kept[:] = [entry for entry in _kept if not entry[0].is_completed()]
    _kept.append((work, backend))
