"""The account of a run's time, kept by this process's clock."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from orchestrator.goodput import TimeAccount
from orchestrator.schedule.spans import Figures


class Spending:
    """Nested `on` blocks: the innermost one counts."""

    def __init__(self) -> None:
        self._account = TimeAccount(time.monotonic())

    @contextmanager
    def on(self, kind: str) -> Iterator[None]:
        before = self._account.enter(kind, time.monotonic())
        try:
            yield
        finally:
            self._account.enter(before, time.monotonic())

    def step_lost(self) -> None:
        self._account.step_lost()

    def step_done(self, mean: Figures, rank_seconds: float) -> dict[str, float]:
        """Seconds of every kind since the step before. mean: figures over ranks; rank_seconds: of the slowest."""
        spent = self._account.step_done(time.monotonic(), mean.compute_seconds, mean.exposed_communication_seconds,
                                        mean.bubble_ratio * rank_seconds)
        return {kind: round(seconds, 6) for kind, seconds in spent.items()}
