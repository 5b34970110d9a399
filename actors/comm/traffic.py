"""What the exchanges of a rank sent, across nodes and inside its own."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Sent:
    """Bytes of rows sent to ranks on other nodes, and to other ranks of this node; without counts and without headers."""

    across: int = 0
    inside: int = 0

    def __add__(self, other: Sent) -> Sent:
        return Sent(self.across + other.across, self.inside + other.inside)

    def __sub__(self, other: Sent) -> Sent:
        return Sent(self.across - other.across, self.inside - other.inside)


class Traffic:
    """The sum so far. Any thread may add to it."""

    def __init__(self) -> None:
        self._lock, self._sent = threading.Lock(), Sent()

    def add(self, sent: Sent) -> None:
        with self._lock:
            self._sent += sent

    @property
    def sent(self) -> Sent:
        with self._lock:
            return self._sent


def split(rows: Sequence[int], nodes: Sequence[str], rank: int, row_bytes: int) -> Sent:
    """`rows[i]` rows go from member `rank` to member i, on node `nodes[i]`; none of them to itself counts."""
    across = sum(count for count, node in zip(rows, nodes, strict=True) if node != nodes[rank])
    return Sent(across * row_bytes, (sum(rows) - across - rows[rank]) * row_bytes)
