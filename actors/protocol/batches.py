"""The batches of a run, read one ahead on a thread of their own."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from actors.data.batching import Batch
from actors.errors import named_line
from orchestrator.protocol.events import BatchFailed, BatchReady

logger = logging.getLogger(__name__)

_END_SECONDS = 5.0


class Batches(Protocol):
    """Where batches come from: `next()` gives those of consecutive steps."""

    def next(self) -> Batch: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Sources:
    """`training(first_step)` opens the batches from a step on; `validation()` gives the held-out batch, or None. `answers()`: whether
    the storage of the data does: then what cannot be read again and again is missing or damaged, else it is waited for."""

    training: Callable[[int], Batches]
    validation: Callable[[], Batch | None]
    answers: Callable[[], bool] = lambda: False


class Reader:
    """Answers `need(step)` by posting BatchReady or BatchFailed; the batch is then there to be taken. From one thread."""

    def __init__(self, open_at: Callable[[int], Batches], post: Callable[[object], None],
                 answers: Callable[[], bool] = lambda: False):
        self._open_at, self._post, self._answers = open_at, post, answers
        self._wanted: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._lock, self._read = threading.Lock(), {}
        self._thread = threading.Thread(target=self._work, name="batches", daemon=True)
        self._thread.start()

    def need(self, step: int) -> None:
        self._wanted.put(step)

    def batch(self, step: int) -> Batch:
        """One that was announced. It is kept until `forget`."""
        with self._lock:
            return self._read[step]

    def forget(self, before: int) -> None:
        """Let go of the batches of steps before this one."""
        with self._lock:
            self._read = {step: batch for step, batch in self._read.items() if step >= before}

    def close(self) -> None:
        """End the thread, unless it is stuck in a read: it is a daemon then."""
        self._wanted.put(None)
        self._thread.join(_END_SECONDS)

    # --- on its own thread ---------------------------------------------------------------------------------------

    def _work(self) -> None:
        source, due, failures = None, None, 0
        while (step := self._wanted.get()) is not None:
            with self._lock:
                known = step in self._read
            if known:
                self._post(BatchReady(step))
                continue
            try:
                if source is None or step != due:
                    if source is not None:
                        source.close()
                    source, due = self._open_at(step), step
                batch = source.next()
            except Exception as error:  # of whatever the data is read with: it is told, and tried again
                logger.exception("the batch of step %d cannot be read", step)
                source, failures = _closed(source), failures + 1
                lasting = isinstance(error, _LASTING) or failures >= _MOST_FAILURES and self._answers()
                self._post(BatchFailed(step, named_line(error), lasting))
                continue
            due, failures = step + 1, 0
            with self._lock:
                self._read[step] = batch
            self._post(BatchReady(step))
        _closed(source)


_MOST_FAILURES = 3
"""In a row, of a storage that answers: one may have been a moment's."""
_LASTING = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, AssertionError, NameError)
"""What no second try mends, wherever the data is."""


def _closed(source: Batches | None) -> None:
    if source is not None:
        try:
            source.close()
        except Exception:  # it has failed already, or is not needed any more
            logger.exception("batches cannot be closed")
