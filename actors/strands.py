"""Strands of segments, and how a rank runs one or two of them.

A strand is one microbatch's (or half microbatch's) way through a forward or backward, as segments in order. Two strands are
woven: a segment of one, then one of the other, so that either's dispatch and combine can run under the other's compute:

    first    attention   dispatch    experts     combine
    second               combine     experts     dispatch    attention

The weave depends on the lists alone, never on time or on how many tokens there are. So all ranks of an EP group, which have
the same lists, enter the same collectives in the same order.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest

from actors.model.segment import Lane, Segment
from actors.model.weights import WeightGradients
from orchestrator.schedule.spans import Span

Closures = list[Callable[[], None]]


@dataclass(frozen=True, slots=True)
class Strand:
    """`label` begins the names of its spans. `later`: where the weight gradients go that its segments leave, a list for each
    segment; None: they run right behind their segment.
    """

    label: str
    segments: Sequence[Segment]
    later: list[Closures] | None = None


class Weaver:
    """Runs strands one segment at a time. `queue`: where their backward passes put weight gradients."""

    def __init__(self, rank: int, queue: WeightGradients):
        self._rank, self._queue = rank, queue

    def run(self, strands: Sequence[Strand], spans: list[Span]) -> None:
        """All segments of all strands; what happened is added to `spans`."""
        for strand, segment in woven(strands):
            started = time.perf_counter()
            segment.run()
            ended = time.perf_counter()
            name = f"{strand.label} {segment.name}" if segment.layer < 0 else f"{strand.label} {segment.name} {segment.layer}"
            spans.append(Span(self._rank, segment.lane.value, name, started, ended))
            if len(self._queue):
                self._settle(strand, spans)

    def _settle(self, strand: Strand, spans: list[Span]) -> None:
        """Weight gradients that a segment has left, before another strand leaves its own."""
        if strand.later is not None:
            strand.later.append(self._queue.take())
            return
        started = time.perf_counter()
        self._queue.flush()
        spans.append(Span(self._rank, Lane.COMPUTE.value, strand.label, started, time.perf_counter()))


def woven(strands: Sequence[Strand]) -> Iterator[tuple[Strand, Segment]]:
    """A segment of each strand in turn; what is left of the longest at the end."""
    for turn in zip_longest(*(strand.segments for strand in strands)):
        for strand, segment in zip(strands, turn):
            if segment is not None:
                yield strand, segment


def merged(strands: Sequence[Strand]) -> Strand:
    """Strands of one action as one, in the order in which they would be woven."""
    if len(strands) == 1:
        return strands[0]
    return Strand(strands[0].label, [segment for _, segment in woven(strands)], strands[0].later)


def weights_strand(label: str, released: Sequence[Closures]) -> Strand:
    """Deferred weight gradients as a strand: what each segment of the backward has left is a segment."""
    return Strand(label, [Segment(Lane.COMPUTE, "weights", -1, _all(closures)) for closures in released])


def _all(closures: Closures) -> Callable[[], None]:
    def run() -> None:
        for accumulate in closures:
            accumulate()
    return run
