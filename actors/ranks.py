"""How a trainer reaches its ranks: one interface, and its two transports (Ray actors; plain processes in processes.py)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol


class RankFailed(RuntimeError):
    """A rank raised, died, or did not answer in time. `reason` is one line."""

    def __init__(self, rank: int, reason: str):
        self.rank, self.reason = rank, reason
        super().__init__(f"rank {rank}: {reason}")


class Pending(Protocol):
    """Calls under way."""

    def done(self) -> bool: ...

    def results(self, timeout_seconds: float) -> list[Any]:
        """One result per rank. Raises RankFailed for the first rank that failed."""
        ...


class Ranks(Protocol):
    """Actors or processes that can serve as ranks 0..size-1 of a layout."""

    size: int

    def start(self, method: str, arguments: Sequence[tuple]) -> Pending:
        """Call `method` on ranks 0..len(arguments)-1, each with its own arguments. Raises RankFailed: one is known to be gone."""
        ...

    def abort(self) -> None:
        """End every rank's blocked communication."""
        ...


def call(ranks: Ranks, method: str, arguments: Sequence[tuple], timeout_seconds: float) -> list[Any]:
    """Call and wait. When one rank fails, the communication of all is aborted, so that none waits for it."""
    try:
        return ranks.start(method, arguments).results(timeout_seconds)
    except RankFailed:
        ranks.abort()
        raise
