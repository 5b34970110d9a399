"""Answers of processes to one call, for whoever waits for them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Protocol

from actors.ranks import LOST, NO_ANSWER, POLL_SECONDS, Check, RankFailed


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

    def results(self, timeout_seconds: float, check: Check | None = None) -> list[Any]:
        deadline = time.monotonic() + timeout_seconds
        try:
            while True:
                left = deadline - time.monotonic()
                found = self._ranks.answers(self._call, self._numbers, left if check is None else min(left, POLL_SECONDS))
                for rank, answer in enumerate(found):
                    if answer is not None and not answer[0]:
                        raise RankFailed(rank, answer[1])
                if None not in found:
                    return [answer[1] for answer in found]
                if check is not None and (failed := check()) is not None:
                    raise failed
                if left <= 0:
                    raise RankFailed(found.index(None), f"{NO_ANSWER} {timeout_seconds:g} s")
        finally:
            self._ranks.forget(self._call)
