"""Calls of ranks 0, 1, ... of plain processes, for whoever waits for their answers: tests and benchmarks."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Protocol

from actors.calls.rank_calls import LOST


class RankFailed(RuntimeError):
    """A rank raised, died, or did not answer in time. `reason` is one line."""

    def __init__(self, rank: int, reason: str):
        self.rank, self.reason = rank, reason
        super().__init__(f"rank {rank}: {reason}")


class Mail(Protocol):
    """Where answers come in, by the number of their process."""

    def answers(self, call: int, numbers: Sequence[int], seconds: float) -> list[tuple[bool, Any] | None]: ...

    def forget(self, call: int) -> None: ...


class SeatedAnswers:
    """Answers of these processes to one call, as they arrive."""

    def __init__(self, ranks: Mail, call: int, numbers: Sequence[int]):
        self._ranks, self._call, self._numbers = ranks, call, list(numbers)

    def done(self) -> bool:
        """Raises RankFailed: a process has ended."""
        found = self._ranks.answers(self._call, self._numbers, 0)
        if (False, LOST) in found:
            raise RankFailed(found.index((False, LOST)), LOST)
        return None not in found

    def results(self, timeout_seconds: float) -> list[Any]:
        """One per process. Raises RankFailed: the first that failed."""
        deadline = time.monotonic() + timeout_seconds
        try:
            while True:
                left = deadline - time.monotonic()
                found = self._ranks.answers(self._call, self._numbers, left)
                for rank, answer in enumerate(found):
                    if answer is not None and not answer[0]:
                        raise RankFailed(rank, answer[1])
                if None not in found:
                    return [answer[1] for answer in found]
                if left <= 0:
                    raise RankFailed(found.index(None), f"no answer within {timeout_seconds:g} s")
        finally:
            self._ranks.forget(self._call)


class Seats(Protocol):
    """Processes of which rank i is known."""

    def start(self, method: str, arguments: Sequence[tuple]) -> SeatedAnswers:
        """Call `method` on ranks 0..len(arguments)-1, each with its own arguments. Raises RankFailed: one is known to be gone."""
        ...

    def abort(self) -> None:
        """End every blocked communication of theirs."""
        ...


def call(ranks: Seats, method: str, arguments: Sequence[tuple], timeout_seconds: float) -> list[Any]:
    """Call and wait. When one rank fails, the communication of all is aborted, so that none waits for it."""
    try:
        return ranks.start(method, arguments).results(timeout_seconds)
    except RankFailed:
        ranks.abort()
        raise
