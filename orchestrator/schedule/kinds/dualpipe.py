"""DualPipe: microbatches enter at both ends, and a forward of one direction overlaps a backward of the other.

Position r hosts stage r (slot 0) and stage P-1-r (slot 1). Peak activations: P+1 microbatches on every position.
Bubble: (P/2 - 1)(F&B + B - 3W) where I = F, whatever the number of microbatches.
Source: DeepSeek-V3 report, section 3.2.1; the order of steps and their counts are those of the released `dualpipe.py`.
"""

from __future__ import annotations

from orchestrator.schedule.ir.actions import ActionKind, Compute, Pair, Row
from orchestrator.schedule.ir.stages import Stages
from orchestrator.schedule.kinds.writer import RowWriter


def dualpipe(stages: Stages, microbatches: int) -> tuple[Row, ...]:
    """The rows of a step of `microbatches`, both directions together.

    One position has one stage and one direction, any number of microbatches, and one extra microbatch in flight so that
    there are pairs. Else both numbers are even and there are at least two microbatches a position.
    """
    positions = stages.positions
    if positions == 1:
        return (_single_row(microbatches),)
    rows = []
    for position in range(positions):
        near = 0 if position < positions // 2 else 1    # the direction that enters at the nearer end
        depth = min(position, positions - 1 - position)
        rows.append(eight_steps(RowWriter(stages, position), positions // 2, depth, near, microbatches // 2))
    return tuple(rows)


def eight_steps(row: RowWriter, half: int, depth: int, near: int, each: int) -> Row:
    """One position's row.

    Args:
        half: half the number of stages: positions from an end of the pipeline to its middle.
        depth: distance from the nearer end, 0..half-1.
        near: the slot whose microbatches come from that end.
        each: microbatches of each slot, at least 2*half.
    """
    middle = half - 1 - depth                           # distance from the middle
    far = 1 - near

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
    for repeat in range(each - 2 * half + depth + 1):
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
    return row.row


def _single_row(microbatches: int) -> Row:
    forwards = [Compute(ActionKind.FORWARD, 0, 0, m) for m in range(microbatches)]
    backwards = [Compute(ActionKind.BACKWARD, 0, 0, m) for m in range(microbatches)]
    return (forwards[0], *map(Pair, forwards[1:], backwards), backwards[-1])
