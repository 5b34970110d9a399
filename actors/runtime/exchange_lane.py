"""The lane on which a rank's exchanges run: beside its compute thread, one after the other, in the order in which it is given
them. That order is the program's, so all ranks of an EP group enter their collectives in the same one.

The compute thread starts an exchange and, before a segment that needs its result, waits for it. Nothing else is shared: what an
exchange reads was written before it was started, and nobody touches what it writes until it was waited for.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from typing import Protocol

import torch

from actors.comm.groups import Aborted

_PATIENCE_SECONDS, _CLOSE_SECONDS = 0.05, 10.0


class Exchange:
    """An exchange under way. started, ended: when it ran, in seconds of time.perf_counter, once it was waited for."""

    __slots__ = ("_done", "_error", "_event", "_run", "ended", "started")

    def __init__(self, run: Callable[[], torch.cuda.Event | None]):
        self._run, self._error, self._event = run, None, None
        self.started = self.ended = 0.0
        self._done = threading.Lock()
        self._done.acquire()

    def wait(self) -> None:
        """Block until it has run; once. Raises what it, or an exchange before it, raised; Aborted: the lane was closed."""
        self._done.acquire()
        if self._error is not None:
            raise self._error
        if self._event is not None:
            torch.cuda.current_stream().wait_event(self._event)

    def perform(self) -> BaseException | None:
        """Run it here. What it raises is kept for `wait`, and returned."""
        self.started = time.perf_counter()
        try:
            self._event = self._run()
        except BaseException as error:  # whatever it is, somebody waits for it
            self._error = error
        self.ended = time.perf_counter()
        self._run = None
        self._done.release()
        return self._error

    def refuse(self, error: BaseException) -> None:
        """Have `wait` raise this."""
        self._error, self._run = error, None
        self._done.release()


class Exchanges(Protocol):
    """Where exchanges run."""

    def start(self, run: Callable[[], None]) -> Exchange:
        """Have `run` run after those that were started before it."""


class InTurn:
    """No lane: an exchange runs where it is started, and compute stands still."""

    def start(self, run: Callable[[], None]) -> Exchange:
        exchange = Exchange(run)
        if (error := exchange.perform()) is not None:
            raise error
        return exchange


class ExchangeLane:
    """A thread of its own, from here to `close`. Once an exchange fails, all behind it do: a peer would wait for them in vain.

    An exchange that blocks is ended by aborting its process group.
    """

    def __init__(self, name: str = "exchange"):
        self._queue: queue.SimpleQueue[Exchange | None] = queue.SimpleQueue()
        self._broken: BaseException | None = None
        self._closed, self._lock = False, threading.Lock()
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def start(self, run: Callable[[], None]) -> Exchange:
        exchange = Exchange(run)
        with self._lock:
            if self._closed:
                exchange.refuse(Aborted("the lane is closed"))
            else:
                self._queue.put(exchange)
        return exchange

    def close(self, abort: Callable[[], None] = lambda: None) -> None:
        """End the thread; what has not begun is refused. `abort`: ends an exchange that blocks; called if one does.

        Raises TimeoutError: one still does.
        """
        with self._lock:
            self._closed = True
            self._broken = self._broken or Aborted("the lane is closed")
            self._queue.put(None)
        self._thread.join(_PATIENCE_SECONDS)
        if self._thread.is_alive():
            abort()
            self._thread.join(_CLOSE_SECONDS)
        if self._thread.is_alive():
            raise TimeoutError(f"an exchange is still under way after {_CLOSE_SECONDS:.0f} s")

    def _work(self) -> None:
        with torch.no_grad():  # gradient mode is a thread's own
            while (exchange := self._queue.get()) is not None:
                if self._broken is not None:
                    exchange.refuse(self._broken)
                elif (error := exchange.perform()) is not None:
                    self._broken = error
                del exchange  # it would keep a segment, and with it a microbatch, until the next one comes


class StreamLane(ExchangeLane):
    """The same on a GPU: exchanges are queued on a stream of their own, behind what the compute stream had when they were
    started; waiting for one has the compute stream wait, not its thread. The thread is still needed, since an exchange waits for
    its counts. Tensors that cross streams must be recorded on the one that uses them (`crossed` in segment.py)."""

    def __init__(self, name: str = "exchange"):
        self._stream = torch.cuda.Stream()
        super().__init__(name)

    def start(self, run: Callable[[], None]) -> Exchange:
        before = torch.cuda.current_stream().record_event()

        def on_stream() -> torch.cuda.Event:
            with torch.cuda.stream(self._stream):
                self._stream.wait_event(before)
                run()
                return self._stream.record_event()

        return super().start(on_stream)


def lane_for(device: torch.device) -> ExchangeLane:
    return StreamLane() if device.type == "cuda" else ExchangeLane()
