"""DualPipe: microbatches enter at both ends, and a forward of one direction overlaps a backward of the other.

Position r hosts stage r (slot 0) and stage P-1-r (slot 1). Peak activations: P+1 microbatches on every position.
Bubble: (P/2 - 1)(F&B + B - 3W) where I = F, whatever the number of microbatches.
Source: DeepSeek-V3 report, section 3.2.1; the order of steps and their counts are those of the released `dualpipe.py`.
"""

from __future__ import annotations

from collections import Counter, deque

from orchestrator.config import ConfigError
from orchestrator.schedule.actions import Compute, Kind, Pair, Row, Schedule, stage_at

KIND = "dualpipe"


def dualpipe(positions: int, microbatches: int) -> Schedule:
    """The schedule of a step of `microbatches`, both directions together.

    One position has one stage and one direction, any number of microbatches, and one extra microbatch in flight so that
    there are pairs. Else both numbers are even and there are at least two microbatches a position.
    Raises ConfigError (a ValueError) with key `positions` or `microbatches`: other numbers.
    """
    if positions < 1 or (positions > 1 and positions % 2):
        raise ConfigError("positions", positions, f"{KIND} takes 1 or an even number")
    least = least_microbatches(positions)
    if microbatches < least or (positions > 1 and microbatches % 2):
        wanted = f"an even number, at least {least} (2 x positions)" if positions > 1 else f"at least {least}"
        raise ConfigError("microbatches", microbatches, f"{KIND} takes {wanted}")
    if positions == 1:
        return Schedule(KIND, 1, microbatches, (_single_row(microbatches),))
    return Schedule(KIND, positions, microbatches, tuple(_row(r, positions, microbatches) for r in range(positions)))


def least_microbatches(positions: int) -> int:
    return 2 * positions if positions > 1 else 1


def smallest_microbatches(positions: int, wanted: int) -> int:
    """The smallest number of microbatches that `dualpipe` takes and that is at least `wanted`."""
    enough = max(wanted, least_microbatches(positions))
    return enough + enough % 2 if positions > 1 else enough


class _Row:
    """Writes one position's actions; each takes the next microbatch of its direction."""

    def __init__(self, positions: int, position: int):
        self.actions: list[Compute | Pair] = []
        self._stage = [stage_at(KIND, positions, position, slot) for slot in (0, 1)]
        self._done: Counter[tuple[bool, int]] = Counter()
        self._deferred: deque[Compute] = deque()

    def forward(self, slot: int) -> None:
        self.actions.append(self._next(Kind.FORWARD, slot))

    def backward(self, slot: int) -> None:
        self.actions.append(self._next(Kind.BACKWARD, slot))

    def backward_input(self, slot: int) -> None:
        self.actions.append(self._next(Kind.BACKWARD_INPUT, slot))
        self._deferred.append(self.actions[-1])

    def weights(self) -> None:
        """The oldest deferred weight gradient, whichever direction it is of."""
        oldest = self._deferred.popleft()
        self.actions.append(Compute(Kind.BACKWARD_WEIGHT, oldest.stage, oldest.slot, oldest.microbatch))

    def pair(self, forward_slot: int, backward_slot: int) -> None:
        self.actions.append(Pair(self._next(Kind.FORWARD, forward_slot), self._next(Kind.BACKWARD, backward_slot)))

    def _next(self, kind: Kind, slot: int) -> Compute:
        counter = (kind is Kind.FORWARD, slot)
        self._done[counter] += 1
        return Compute(kind, self._stage[slot], slot, self._done[counter] - 1)


def _row(position: int, positions: int, microbatches: int) -> Row:
    half = positions // 2
    depth = min(position, positions - 1 - position)     # distance from the nearer end of the pipeline
    middle = half - 1 - depth                           # distance from the middle
    near = 0 if position < half else 1                  # the direction that enters at the nearer end
    far = 1 - near
    row = _Row(positions, position)

    # Step 1: F near
    for _ in range(2 * middle):
        row.forward(near)
    # Step 2: F near, F far
    for _ in range(depth + 1):
        row.forward(near)
        row.forward(far)
    # Step 3: I far, W, F far
    for _ in range(middle):
        row.backward_input(far)
        row.weights()
        row.forward(far)
    # Step 4, the main one: F near | B far, F far | B near
    for repeat in range(microbatches // 2 - positions + depth + 1):
        if repeat == 0 and middle == 0:
            row.forward(near)           # the two middle positions: unpaired, so that the first activation leaves early
            row.backward(far)
        else:
            row.pair(near, far)
        row.pair(far, near)
    # Step 5: B far, F far | B near
    for _ in range(middle):
        row.backward(far)
        row.pair(far, near)
    # Step 6: B far, B near; in the second half weights are deferred
    for repeat in range(depth + 1):
        for index, slot in enumerate((far, near), start=2 * repeat):
            (row.backward if index <= depth else row.backward_input)(slot)
    # Step 7: W, I near
    for _ in range(middle):
        row.weights()
        row.backward_input(near)
    # Step 8: W
    for _ in range(depth + 1):
        row.weights()
    return tuple(row.actions)


def _single_row(microbatches: int) -> Row:
    forwards = [Compute(Kind.FORWARD, 0, 0, m) for m in range(microbatches)]
    backwards = [Compute(Kind.BACKWARD, 0, 0, m) for m in range(microbatches)]
    return (forwards[0], *map(Pair, forwards[1:], backwards), backwards[-1])
