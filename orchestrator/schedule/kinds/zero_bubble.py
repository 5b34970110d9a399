"""Schedules in which deferred weight gradients fill the bubble: every backward is an I, and its W comes when nothing else can.

zb_h1   1F1B's order, one stage a position. Bubble (P - 1)(F + I - W) = (P - 1)(F + B - 2W), where W is at most F and I and
        M >= P; peak P microbatches on every position.
zbv     two stages a position, in a V. Where F = I = W and M >= 2P - 1, no position idles between its first and its last
        action; peak 2P microbatches of one stage, which is what P of a whole position take.
Sources: "Zero Bubble Pipeline Parallelism" (arXiv 2401.10241), sections 2 and 6; "Pipeline Parallelism with Controllable
Memory" (arXiv 2405.15362).
"""

from __future__ import annotations

from orchestrator.schedule.ir.actions import Row
from orchestrator.schedule.ir.stages import Stages
from orchestrator.schedule.kinds.writer import RowWriter

DOWN, UP = 0, 1
"""Slots: the legs of the V."""


def zb_h1(stages: Stages, microbatches: int) -> tuple[Row, ...]:
    """W of a microbatch comes r backwards late on position r."""
    return tuple(_h1_row(stages, position, microbatches) for position in range(stages.positions))


def _h1_row(stages: Stages, position: int, microbatches: int) -> Row:
    row = RowWriter(stages, position)
    ahead = min(stages.positions - position, microbatches)
    for _ in range(ahead):
        row.forward(0)
    for microbatch in range(microbatches):
        row.backward_input(0)
        if microbatch >= position:
            row.weights()
        if microbatch + ahead < microbatches:
            row.forward(0)
    for _ in range(min(position, microbatches)):
        row.weights()
    return row.row


def zbv(stages: Stages, microbatches: int) -> tuple[Row, ...]:
    """The handcrafted order; it needs 2P - 1 microbatches, so with fewer, those that there are not are left out of it."""
    positions = stages.positions
    rows = (_v_row(stages, position, max(microbatches, 2 * positions - 1)) for position in range(positions))
    return tuple(tuple(action for action in row if action.computes[0].microbatch < microbatches) for row in rows)


def _v_row(stages: Stages, position: int, microbatches: int) -> Row:
    to_turn = stages.positions - position               # stages from here to the turn of the V
    row = RowWriter(stages, position)

    # Warm-up: F down until the first one is back
    for _ in range(2 * to_turn - 1):
        row.forward(DOWN)
    # F up, F down
    for _ in range(position):
        row.forward(UP)
        row.forward(DOWN)
    # F up and its backward, while that of the way down is not here
    for _ in range(to_turn):
        _turn(row)
    # Steady: F down with a backward of the way down, F up with one of the way up; then without F down
    ahead = 2 * to_turn - 1 + position
    for repeat in range(microbatches - stages.positions):
        if ahead + repeat < microbatches:
            row.forward(DOWN)
        row.backward_input(DOWN)
        row.weights(DOWN)
        _turn(row)
    # Cool-down: I alone, so that other positions get their gradients early; W where there is nothing to hurry for
    for _ in range(position):
        row.backward_input(DOWN)
        row.backward_input(UP)
    for _ in range(to_turn):
        row.backward_input(DOWN)
        row.weights(DOWN)
    for slot in (UP, DOWN):
        for _ in range(position):
            row.weights(slot)
    return row.row


def _turn(row: RowWriter) -> None:
    row.forward(UP)
    row.backward_input(UP)
    row.weights(UP)
