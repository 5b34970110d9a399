"""Writes one position's row, action by action, so that a generator states only which kind and which slot comes next."""

from __future__ import annotations

from collections import Counter

from orchestrator.schedule.ir.actions import ActionKind, Compute, Pair, Row, Work
from orchestrator.schedule.ir.stages import Stages


class RowWriter:
    """Each action takes the next microbatch of its slot; an F has its own count, B and I share one."""

    def __init__(self, stages: Stages, position: int):
        self._stage = stages.hosted(position)
        self._actions: list[Work] = []
        self._done: Counter[tuple[bool, int]] = Counter()
        self._deferred: list[Compute] = []

    @property
    def row(self) -> Row:
        return tuple(self._actions)

    def forward(self, slot: int) -> None:
        self._actions.append(self._next(ActionKind.FORWARD, slot))

    def backward(self, slot: int) -> None:
        self._actions.append(self._next(ActionKind.BACKWARD, slot))

    def backward_input(self, slot: int) -> None:
        self._deferred.append(self._next(ActionKind.BACKWARD_INPUT, slot))
        self._actions.append(self._deferred[-1])

    def weights(self, slot: int | None = None) -> None:
        """The oldest deferred weight gradient, of `slot` or (None) whichever slot it is of."""
        index = next(i for i, deferred in enumerate(self._deferred) if slot in (None, deferred.slot))
        oldest = self._deferred.pop(index)
        self._actions.append(Compute(ActionKind.BACKWARD_WEIGHT, oldest.stage, oldest.slot, oldest.microbatch))

    def pair(self, forward_slot: int, backward_slot: int) -> None:
        self._actions.append(Pair(self._next(ActionKind.FORWARD, forward_slot), self._next(ActionKind.BACKWARD, backward_slot)))

    def _next(self, kind: ActionKind, slot: int) -> Compute:
        counter = (kind is ActionKind.FORWARD, slot)
        self._done[counter] += 1
        return Compute(kind, self._stage[slot], slot, self._done[counter] - 1)
