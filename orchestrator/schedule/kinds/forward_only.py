"""Forward passes only, for evaluation: microbatches enter as in training, nothing is kept for a backward.

When microbatch j of a group of g is at stage s, in units of one forward, from the group's start:

loop       j + s, and where g > P, g - P more for each chunk passed: the next chunk begins when all of the group have passed
both, v    2j + s, and 2(g - P) more for each V passed: on a position, the ways down and up have times of different parity

So nobody waits and no order is shorter: the last position (`both`: the middle) starts when the first microbatch can be there,
runs all that it has without a break, and what it runs last goes straight to its end. Makespan with c chunks:
loop  cM + P - 1, or cP + M - 1 for M < P
v     cM + 2P - 2, or cP + 2M - 2 for M < P
both  M + P - 2 if P is even, M + P - 1 if it is odd: the middle position has two stages of one parity
"""

from __future__ import annotations

from collections.abc import Iterator

from orchestrator.refusal import ConfigError
from orchestrator.schedule.ir.actions import ActionKind, Compute, Schedule
from orchestrator.schedule.ir.stages import FORWARD_ONLY, LOOP, Stages
from orchestrator.schedule.kinds.interleaved import groups


def forward_only(stages: Stages, microbatches: int) -> Schedule:
    """The schedule of `microbatches` forward passes, all entrances together.

    Raises ConfigError (a ValueError) with key `microbatches`: not positive, or odd with two entrances.
    """
    if stages.shared_evenly(microbatches) != microbatches:
        wanted = "at least 1" if len(stages.paths) == 1 else "an even number, at least 2, with two entrances"
        raise ConfigError("microbatches", microbatches, f"{FORWARD_ONLY} takes {wanted}")
    rows: list[list[tuple[int, Compute]]] = [[] for _ in range(stages.positions)]
    for path in stages.paths:
        for microbatch, enters, pause in _entries(stages, microbatches // len(stages.paths)):
            for stage, (position, slot) in enumerate(path):
                time = enters + stage + pause * (stage // _period(stages))
                rows[position].append((time, Compute(ActionKind.FORWARD, stage, slot, microbatch)))
    in_order = (sorted(row, key=lambda timed: timed[0]) for row in rows)
    return Schedule(FORWARD_ONLY, stages, microbatches, tuple(tuple(action for _, action in row) for row in in_order))


def _entries(stages: Stages, microbatches: int) -> Iterator[tuple[int, int, int]]:
    """Of one entrance: (microbatch, when it enters, how long it pauses after each period)."""
    pace, start = _pace(stages), 0
    for group in groups(microbatches, stages.positions):
        pause = pace * max(0, len(group) - stages.positions)
        for index, microbatch in enumerate(group):
            yield microbatch, start + pace * index, pause
        start += len(group) * max(pace, stages.chunks)


def _pace(stages: Stages) -> int:
    """Time from one microbatch of an entrance to the next."""
    return 1 if stages.placement == LOOP or stages.positions == stages.chunks == 1 else 2


def _period(stages: Stages) -> int:
    """Stages after which a microbatch is back where it entered, on the way down."""
    return _pace(stages) * stages.positions
