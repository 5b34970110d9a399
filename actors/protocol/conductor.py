"""The loop of a run: takes what happens from one queue, hands it to the state machine, has its commands carried out.

It decides nothing, and nothing here waits for anything but the next event. Everybody else posts to it, from any thread.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, Protocol

from orchestrator.protocol.commands import Command, EndRun
from orchestrator.protocol.events import Event, Heard, StopAsked, Tick
from orchestrator.protocol.run import Run

RECORDED = 100_000
"""Events that are kept, for whoever wants to repeat what happened."""
_LOOKS_IN_SILENCE = 4


class NotReached(RuntimeError):
    """What was waited for did not come about. `str()` is one line."""


class Shell(Protocol):
    """What stands between the machine and the world."""

    def seen(self, item: Any) -> Iterable[Event]:
        """What the machine is told of something that was posted."""
        ...

    def heard(self) -> Heard:
        """Of everybody connected."""
        ...

    def before(self, event: Event) -> None:
        """The machine is about to be told this."""
        ...

    def carry_out(self, command: Command) -> None:
        """Return at once."""
        ...

    def after(self, run: Run) -> None:
        """An event has been dealt with."""
        ...


class Conductor:
    """run: the machine. silence_seconds: beats are told to it four times in it. `recorded`: (event, time) of the newest events."""

    def __init__(self, run: Run, silence_seconds: float, clock: Callable[[], float] = time.monotonic):
        self.run, self._clock, self._every = run, clock, silence_seconds / _LOOKS_IN_SILENCE
        self._items: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._stop, self._stop_told = threading.Event(), False
        self._lock, self._waiting = threading.Lock(), []
        self._end: EndRun | None = None
        self._over = False
        self.recorded: deque[tuple[Event, float]] = deque(maxlen=RECORDED)

    # --- from any thread -----------------------------------------------------------------------------------------

    def post(self, item: Any) -> None:
        """An event, something that the shell makes events of, or a function to be called on the conductor's thread."""
        self._items.put(item)

    def stop(self) -> None:
        """Have the run save and end after the step under way. May be called before it begins."""
        self._stop.set()
        self._items.put(Tick())

    def wait_until(self, predicate: Callable[[Run], bool], seconds: float) -> None:
        """Until that holds of the machine; looked at after every event, on the conductor's thread. Not from there.

        Raises NotReached: it took too long, or the run is over.
        """
        waiter = _Waiter(predicate)
        with self._lock:
            over = self._over
            if not over:
                self._waiting.append(waiter)
        self._items.put(Tick())
        if over or not waiter.done.wait(seconds) or not waiter.held:
            with self._lock:
                self._waiting = [other for other in self._waiting if other is not waiter]
            raise NotReached(f"not within {seconds:g} s: {self.run.snapshot()}")

    # --- the loop ------------------------------------------------------------------------------------------------

    def conduct(self, first: Event, shell: Shell) -> EndRun:
        """The whole run, from its first event."""
        try:
            self._feed(first, shell)
            listened = self._clock()
            while self._end is None:
                now = self._clock()
                if now - listened >= self._every:
                    listened = now
                    self._feed(shell.heard(), shell)
                    continue
                for event in self._next(listened + self._every - now, shell):
                    self._feed(event, shell)
            return self._end
        finally:
            with self._lock:
                self._over, waiting, self._waiting = True, self._waiting, []
            for waiter in waiting:
                waiter.done.set()

    def _next(self, seconds: float, shell: Shell) -> Iterable[Event]:
        """What has happened, waiting for it until something is due."""
        wake, now = self.run.wake, self._clock()
        if wake is not None:
            seconds = min(seconds, wake - now)
        try:
            item = self._items.get(timeout=max(0.0, seconds))
        except queue.Empty:
            return (Tick(),) if wake is not None and self._clock() >= wake else ()
        if callable(item):
            item()
            return ()
        return shell.seen(item)

    def _feed(self, event: Event, shell: Shell) -> None:
        shell.before(event)
        if self._stop.is_set() and not self._stop_told and self._end is None:  # before what may begin another step
            self._stop_told = True
            if self.recorded:
                self._handle(StopAsked(), shell)
                self._handle(event, shell)
            else:
                self._handle(event, shell)
                self._handle(StopAsked(), shell)
            return
        self._handle(event, shell)

    def _handle(self, event: Event, shell: Shell) -> None:
        now = self._clock()
        self.recorded.append((event, now))
        for command in self.run.handle(event, now):
            if isinstance(command, EndRun):
                self._end = command
            shell.carry_out(command)
        shell.after(self.run)
        if self._waiting:
            self._look()

    def _look(self) -> None:
        with self._lock:
            waiting = list(self._waiting)
        for waiter in waiting:
            if waiter.predicate(self.run):
                waiter.held = True
                with self._lock:
                    self._waiting.remove(waiter)
                waiter.done.set()


class _Waiter:
    def __init__(self, predicate: Callable[[Run], bool]):
        self.predicate, self.done, self.held = predicate, threading.Event(), False
