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

RECORDED = 200_000
"""Events that are kept, for whoever wants to repeat what happened; each beat counts as one."""
_LOOKS_IN_SILENCE = 4
_AFTER = 0.001  # seconds; a silence has to be longer than the bound


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

    def returned(self, seconds: float) -> Event | None:
        """This side was away: whether somebody else conducts the run by now, as far as that is found out within so long."""
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
    """run: the machine. silence_seconds: beats are told to it four times in it. `recorded`: (event, time) of the newest events.
    `seconds`: spent in the machine, all events together."""

    def __init__(self, run: Run, silence_seconds: float, clock: Callable[[], float] = time.monotonic):
        self.run, self._clock, self._every = run, clock, silence_seconds / _LOOKS_IN_SILENCE
        self._items: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._stop, self._stop_told = threading.Event(), False
        self._lock, self._waiting = threading.Lock(), []
        self._end: EndRun | None = None
        self._last = float("inf")
        self._over = False
        self.recorded: deque[tuple[Event, float]] = deque()
        self._recorded = 0
        self.seconds = 0.0

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
            listen = self._clock() + self._every
            while self._end is None:
                now = self._clock()
                if now >= listen:
                    heard = shell.heard()
                    events, listen = [heard], self._next_look(heard, now)
                else:
                    events = list(self._next(listen - now, shell))
                if self._was_away() and (superseded := shell.returned(4 * self._every)) is not None:
                    events = [superseded]  # whatever else there is: it is another coordinator's by now
                for event in events:
                    self._feed(event, shell)
            return self._end
        finally:
            with self._lock:
                self._over, waiting, self._waiting = True, self._waiting, []
            for waiter in waiting:
                waiter.done.set()

    def _next_look(self, heard: Heard, now: float) -> float:
        """When to listen again: as soon as the silence of somebody may be too long, if nothing comes."""
        too_long = (beat.at + _LOOKS_IN_SILENCE * self._every + _AFTER for beat in heard.beats.values())
        return min((at for at in too_long if now < at < now + self._every), default=now + self._every)

    def _was_away(self) -> bool:
        """Whether this process stood still, while it waited or before; nothing that came meanwhile has been looked at."""
        return self._clock() - self._last > 2 * self._every

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
        now = self._last = self._clock()
        self._record(event, now)
        began = time.perf_counter()
        commands = self.run.handle(event, now)
        self.seconds += time.perf_counter() - began
        for command in commands:
            if isinstance(command, EndRun):
                self._end = command
            shell.carry_out(command)
        shell.after(self.run)
        if self._waiting:
            self._look()

    def _record(self, event: Event, now: float) -> None:
        self.recorded.append((event, now))
        self._recorded += _weight(event)
        while self._recorded > RECORDED:
            self._recorded -= _weight(self.recorded.popleft()[0])

    def _look(self) -> None:
        with self._lock:
            waiting = list(self._waiting)
        for waiter in waiting:
            if waiter.predicate(self.run):
                waiter.held = True
                with self._lock:
                    self._waiting.remove(waiter)
                waiter.done.set()


def _weight(event: Event) -> int:
    return 1 + len(event.beats) if isinstance(event, Heard) else 1


class _Waiter:
    def __init__(self, predicate: Callable[[Run], bool]):
        self.predicate, self.done, self.held = predicate, threading.Event(), False
