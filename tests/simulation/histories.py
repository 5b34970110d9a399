"""What was done to a piece of state, as a number: equal numbers are equal bits.

A history is what it began with and each update since: which step, and of which gradients. The same step that is reduced in
another generation has other gradients, since sums are made in another order.
"""

from __future__ import annotations

NEVER = 0
"""State that was neither initialised, restored nor carried over: whatever was in memory."""
INITIAL = 1


class Histories:
    def __init__(self) -> None:
        self._known: dict[tuple[int, int, int, int], int] = {}
        self._updates = [0, 0]

    def after(self, history: int, step: int, epoch: int, generation: int) -> int:
        """One more update: of a step, with gradients that were reduced in a generation of a coordinator."""
        key = history, step, epoch, generation
        found = self._known.get(key)
        if found is None:
            found = self._known[key] = len(self._updates)
            self._updates.append(self._updates[history] + 1)
        return found

    def updates(self, history: int) -> int:
        return self._updates[history]
