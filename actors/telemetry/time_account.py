"""The account of a run's time, kept by this process's clock."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from actors.calls.messages import StepReport
from actors.telemetry.step_metrics import mean_figures
from orchestrator.telemetry.goodput import TimeAccount


class ClockedTimeAccount:
    """A TimeAccount by the monotonic clock. Nested `on` blocks: the innermost one counts."""

    def __init__(self) -> None:
        self._account, self._redone = TimeAccount(time.monotonic()), 0.0

    @contextmanager
    def on(self, kind: str) -> Iterator[None]:
        before = self._account.enter(kind, time.monotonic())
        try:
            yield
        finally:
            self._account.enter(before, time.monotonic())

    def to(self, kind: str) -> None:
        """From now on time goes there."""
        self._account.enter(kind, time.monotonic())

    def step_lost(self) -> None:
        self._account.step_lost()

    def redone(self, undone: Iterable[Mapping[str, Any]]) -> None:
        """Steps of metrics.jsonl that will be done again."""
        seconds = sum(seconds for step in undone for seconds in step.get("spent", {}).values())
        self._redone += seconds
        self._account.redone(seconds)

    def take_redone(self) -> float:
        """Seconds of steps that were undone since the last time: told before as theirs, and now once more as recovery."""
        found, self._redone = self._redone, 0.0
        return found

    def step_done(self, reports: Sequence[StepReport]) -> dict[str, float]:
        """Seconds of every kind since the step before."""
        mean = mean_figures(reports)
        bubble = sum(report.figures.bubble_ratio * report.seconds for report in reports) / len(reports)
        spent = self._account.step_done(time.monotonic(), mean.compute_seconds, mean.exposed_communication_seconds, bubble)
        return {kind: round(seconds, 6) for kind, seconds in spent.items()}
