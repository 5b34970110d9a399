"""The plain schedules of one stage a position: GPipe and 1F1B. Both have full backwards only.

Makespan of both: (M + P - 1)(F + B), so a bubble of (P - 1)(F + B) on every position. Peak activations: M, and P - r.
Sources: GPipe (arXiv 1811.06965); 1F1B: PipeDream-Flush (arXiv 2006.09503), section 3.2.
"""

from __future__ import annotations

from orchestrator.schedule.ir.actions import Compute, Kind, Row, Schedule
from orchestrator.schedule.ir.stages import stages_of
from orchestrator.schedule.kinds.sizes import Sizes

GPIPE, ONE_F_ONE_B = Sizes("gpipe"), Sizes("1f1b")


def gpipe(positions: int, microbatches: int) -> Schedule:
    """All forwards, then all backwards, in the same order. Raises ConfigError with key `positions` or `microbatches`."""
    return _schedule(GPIPE, positions, microbatches, [microbatches] * positions)


def one_f_one_b(positions: int, microbatches: int) -> Schedule:
    """P - r forwards on position r, then a backward and a forward in turn. Raises ConfigError with key `positions` or
    `microbatches`."""
    return _schedule(ONE_F_ONE_B, positions, microbatches, [positions - position for position in range(positions)])


def _schedule(sizes: Sizes, positions: int, microbatches: int, ahead: list[int]) -> Schedule:
    """ahead: forwards before the first backward, by position."""
    sizes.check(positions, microbatches)
    rows = tuple(_row(position, microbatches, ahead[position]) for position in range(positions))
    return Schedule(sizes.kind, stages_of(sizes.kind, positions), microbatches, rows)


def _row(position: int, microbatches: int, ahead: int) -> Row:
    forwards = [Compute(Kind.FORWARD, position, 0, m) for m in range(microbatches)]
    row = forwards[:ahead]
    for microbatch in range(microbatches):
        row.append(Compute(Kind.BACKWARD, position, 0, microbatch))
        row += forwards[ahead + microbatch:ahead + microbatch + 1]
    return tuple(row)
