"""Forward passes only, for evaluation: microbatches enter at both ends as in training, nothing is kept for a backward.

Microbatch i of a direction reaches its stage s at time 2i + s, in units of one forward. On a position the two directions
come at times of different parity, so nobody waits and the makespan is M + P - 2: the middle positions cannot start before
P/2 - 1, run M forwards, and what they run last still has P/2 - 1 stages to go, so no order is shorter.
"""

from __future__ import annotations

from orchestrator.config import ConfigError
from orchestrator.schedule.actions import FORWARD_ONLY, Compute, Kind, Schedule, paths


def smallest_microbatches(positions: int, wanted: int) -> int:
    """The smallest legal number that is at least `wanted`: any even one, any at all where there is one position."""
    return max(1, wanted) if positions == 1 else max(2, wanted + wanted % 2)


def forward_only(positions: int, microbatches: int) -> Schedule:
    """The schedule of `microbatches` forward passes, both directions together.

    Raises ConfigError (a ValueError) with key `positions` or `microbatches`: positions are neither 1 nor even,
    microbatches are not positive, or odd with two directions.
    """
    if positions < 1 or (positions > 1 and positions % 2):
        raise ConfigError("positions", positions, f"{FORWARD_ONLY} takes 1 or an even number")
    directions = paths(FORWARD_ONLY, positions)
    if microbatches < 1 or microbatches % len(directions):
        wanted = "an even number, at least 2, for more than one position" if positions > 1 else "at least 1"
        raise ConfigError("microbatches", microbatches, f"{FORWARD_ONLY} takes {wanted}")
    rows: list[list[tuple[int, Compute]]] = [[] for _ in range(positions)]
    for path in directions:
        for stage, (position, slot) in enumerate(path):
            for microbatch in range(microbatches // len(directions)):
                rows[position].append((2 * microbatch + stage, Compute(Kind.FORWARD, stage, slot, microbatch)))
    in_order = (sorted(row, key=lambda timed: timed[0]) for row in rows)
    return Schedule(FORWARD_ONLY, positions, microbatches, tuple(tuple(action for _, action in row) for row in in_order))
