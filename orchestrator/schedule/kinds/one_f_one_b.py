"""The plain schedules of one stage a position: GPipe and 1F1B. Both have full backwards only.

Makespan of both: (M + P - 1)(F + B), so a bubble of (P - 1)(F + B) on every position. Peak activations: M, and P - r.
Sources: GPipe (arXiv 1811.06965); 1F1B: PipeDream-Flush (arXiv 2006.09503), section 3.2.
"""

from __future__ import annotations

from orchestrator.schedule.ir.actions import ActionKind, Compute, Row
from orchestrator.schedule.ir.stages import Stages


def gpipe(stages: Stages, microbatches: int) -> tuple[Row, ...]:
    """All forwards, then all backwards, in the same order."""
    return tuple(_row(position, microbatches, microbatches) for position in range(stages.positions))


def one_f_one_b(stages: Stages, microbatches: int) -> tuple[Row, ...]:
    """P - r forwards on position r, then a backward and a forward in turn."""
    return tuple(_row(position, microbatches, stages.positions - position) for position in range(stages.positions))


def _row(position: int, microbatches: int, ahead: int) -> Row:
    """ahead: forwards before the first backward."""
    forwards = [Compute(ActionKind.FORWARD, position, 0, m) for m in range(microbatches)]
    row = forwards[:ahead]
    for microbatch in range(microbatches):
        row.append(Compute(ActionKind.BACKWARD, position, 0, microbatch))
        row += forwards[ahead + microbatch:ahead + microbatch + 1]
    return tuple(row)
