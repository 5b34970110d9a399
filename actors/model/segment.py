"""Segments: a stage's forward or backward of one microbatch, cut wherever communication begins or ends."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from orchestrator.schedule.spans import Lane

__all__ = ["Lane", "Segment"]


@dataclass(frozen=True, slots=True)
class Segment:
    """Runs once, after those before it in its list. `lane` is COMPUTE or EXCHANGE; `layer` is -1 outside of layers."""

    lane: Lane
    name: str
    layer: int
    run: Callable[[], None]
