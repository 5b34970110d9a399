"""The schedules there are, by the name that a user gives."""

from __future__ import annotations

from collections.abc import Callable

from orchestrator.config import ConfigError
from orchestrator.schedule.actions import FORWARD_ONLY, Schedule
from orchestrator.schedule.dualpipe import dualpipe
from orchestrator.schedule.forward_only import forward_only

GENERATORS: dict[str, Callable[[int, int], Schedule]] = {"dualpipe": dualpipe, FORWARD_ONLY: forward_only}


def generate(kind: str, positions: int, microbatches: int) -> Schedule:
    """The schedule of that kind. Raises ConfigError with key `kind`, `positions` or `microbatches`."""
    if kind not in GENERATORS:
        raise ConfigError("kind", kind, f"one of {', '.join(GENERATORS)}")
    return GENERATORS[kind](positions, microbatches)
