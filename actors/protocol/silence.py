"""How long somebody has not shown up, counted only while this process runs: one that was frozen must not think others were."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

LOOK_SECONDS = 0.25
_MOST_AT_A_LOOK = 4 * LOOK_SECONDS


class Silence:
    """`seconds` since `broken` was last called. To be `looked` at every LOOK_SECONDS or so."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock, self._lock = clock, threading.Lock()
        self._looked, self._seconds = clock(), 0.0

    @property
    def seconds(self) -> float:
        with self._lock:
            return self._seconds

    def broken(self) -> None:
        with self._lock:
            self._seconds = 0.0

    def look(self) -> float:
        """How long it has lasted by now."""
        with self._lock:
            now = self._clock()
            self._seconds += min(now - self._looked, _MOST_AT_A_LOOK)
            self._looked = now
            return self._seconds
