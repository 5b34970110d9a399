"""What a rank's time went to: the one computation of overlap, bubble and exposed communication.

The same arithmetic serves spans that were measured and spans that were simulated. A span is the occupation of one of a
rank's lanes. Times are seconds (or a simulation's units) on any clock of that rank.

compute    computing
exchange   dispatch and combine: the all-to-all between the ranks of an EP group
reduce     reduction of gradients
pipeline   waiting for a neighbour's tensor: nothing moves because of it, so it counts as neither compute nor communication
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

Interval = tuple[float, float]


class Lane(StrEnum):
    COMPUTE = "compute"
    EXCHANGE = "exchange"
    PIPELINE = "pipeline"
    REDUCE = "reduce"


COMMUNICATION = frozenset({Lane.EXCHANGE, Lane.REDUCE})


@dataclass(frozen=True, slots=True)
class Span:
    """`rank` did `label` on `lane` from `start` to `end`. Simulated spans have the pipeline position as rank."""

    rank: int
    lane: str
    label: str
    start: float
    end: float


@dataclass(frozen=True, slots=True)
class Figures:
    """One rank's window in figures. Seconds are measures of unions: what overlaps itself counts once."""

    compute_seconds: float
    communication_seconds: float
    exposed_communication_seconds: float
    bubble_ratio: float
    overlap_ratio: float


def figures(spans: Iterable[Span], start: float, end: float) -> Figures:
    """The figures of one rank between `start` and `end`; what lies outside is cut off.

    Returns:
        compute_seconds: time with compute.
        communication_seconds: time with exchange or reduce.
        exposed_communication_seconds: time with exchange or reduce and no compute.
        bubble_ratio: share of the window with neither (the rank waits for the pipeline), 0..1.
        overlap_ratio: share of the communication that compute hides, 0..1; 0 where there is none, for nothing was hidden.
    Raises ValueError: the window is empty, a span's lane is unknown, or the spans are of more than one rank.
    """
    if not end > start:
        raise ValueError(f"no window from {start} to {end}")
    compute, communication, ranks = [], [], set()
    for span in spans:
        ranks.add(span.rank)
        interval = (max(span.start, start), min(span.end, end))
        lane = Lane(span.lane)
        if lane is Lane.COMPUTE:
            compute.append(interval)
        elif lane in COMMUNICATION:
            communication.append(interval)
    if len(ranks) > 1:
        raise ValueError(f"spans of more than one rank: {sorted(ranks)}")
    compute_seconds, communication_seconds, busy = measure(compute), measure(communication), measure(compute + communication)
    exposed = min(max(busy - compute_seconds, 0.0), communication_seconds)
    return Figures(
        compute_seconds=compute_seconds,
        communication_seconds=communication_seconds,
        exposed_communication_seconds=exposed,
        bubble_ratio=min(max(1 - busy / (end - start), 0.0), 1.0),
        overlap_ratio=1 - exposed / communication_seconds if communication_seconds else 0.0,
    )


def together(parts: Iterable[tuple[Figures, float]], length: float) -> Figures:
    """The figures of a window of `length` that has, one after the other, the parts: (figures of a window, factor by which that
    one is longer here). Nothing happens in what is left. Raises ValueError: the window is empty."""
    if not length > 0:
        raise ValueError(f"no window of length {length}")
    compute = communication = exposed = 0.0
    for part, factor in parts:
        compute += factor * part.compute_seconds
        communication += factor * part.communication_seconds
        exposed += factor * part.exposed_communication_seconds
    return Figures(
        compute_seconds=compute,
        communication_seconds=communication,
        exposed_communication_seconds=exposed,
        bubble_ratio=min(max(1 - (compute + exposed) / length, 0.0), 1.0),
        overlap_ratio=1 - exposed / communication if communication else 0.0,
    )


def measure(intervals: Iterable[Interval]) -> float:
    """Length of the union. An interval that does not end after it starts is empty."""
    return sum(end - start for start, end in union(intervals))


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """The same set of points as disjoint intervals in order."""
    merged: list[Interval] = []
    for start, end in sorted(interval for interval in intervals if interval[1] > interval[0]):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((start, end))
    return merged
