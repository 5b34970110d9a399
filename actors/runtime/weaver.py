"""Strands of segments, and how a rank runs those of one action: compute here, exchanges on their lane, in a given order.

A strand is one microbatch's (or half microbatch's) way through a forward or backward, as segments in order; weight gradients
alone are a strand without segments. The order is a list of strand numbers as in orchestrator/schedule/ir/pieces.py: `k` is the next
segment of strand k, `~k` the oldest weight gradients that it has left and that have not run. It never depends on time or on how
many tokens there are. So weight gradients are always added up in the same order, and all ranks of an EP group, which have the
same order, enter the same collectives in the same one.

Two threads touch a tape. Compute segments and weight gradients run on the thread that runs the action, exchange segments on the
lane's. An exchange is started when all that stands before it in its strand has run or been started before it on the same lane; a
compute segment begins when the exchanges that it needs are done. In between only a segment that does not need the exchange
(`Segment.after`) runs on the same tape: the shared expert, which reads what the exchange reads and writes what it leaves alone.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from actors.model.segment import Lane, Segment
from actors.model.weights import WeightGradients
from actors.runtime.exchange_lane import Exchange, Exchanges
from orchestrator.schedule.ir.pieces import Order
from orchestrator.schedule.ir.spans import Span

Closures = list[Callable[[], None]]


@dataclass(frozen=True, slots=True)
class SegmentStream:
    """`label` begins the names of its spans.

    backward: each of its compute segments leaves weight gradients, be they none.
    later: where those go; None: they run when the order says so.
    released: weight gradients that wait from the start.
    """

    label: str
    segments: Sequence[Segment] = ()
    backward: bool = False
    later: list[Closures] | None = None
    released: Iterable[Closures] = ()


@dataclass(slots=True)
class _Progress:
    """of: the strand. begun: segments that have run or been started. underway: exchanges not waited for, by place."""

    of: SegmentStream
    waiting: deque[Closures]
    begun: int = 0
    underway: deque[tuple[int, Exchange]] = field(default_factory=deque)


class Weaver:
    """Runs strands. `queue`: where their backward passes put weight gradients; only the calling thread's segments do."""

    def __init__(self, rank: int, queue: WeightGradients, exchanges: Exchanges):
        self._rank, self._queue, self._exchanges = rank, queue, exchanges

    def run(self, strands: Sequence[SegmentStream], order: Order | None, spans: list[Span]) -> None:
        """All of all strands, in this order, or `alternating`; what happened is added to `spans`.

        Raises what a segment raises; ValueError: the order is not one of these strands.
        """
        progress = [_Progress(strand, deque(strand.released)) for strand in strands]
        for mark in alternating(strands) if order is None else order:
            strand = progress[mark if mark >= 0 else ~mark]
            if mark >= 0 and strand.begun < len(strand.of.segments):
                self._run_segment(strand, spans)
            elif mark < 0 and strand.waiting:
                self._run_weights(strand, spans)
            else:
                raise _unfit(order, strands)
        for strand in progress:
            self._wait(strand, len(strand.of.segments), spans)
            if strand.begun < len(strand.of.segments) or strand.waiting:
                raise _unfit(order, strands)

    def _run_segment(self, strand: _Progress, spans: list[Span]) -> None:
        place, segment = strand.begun, strand.of.segments[strand.begun]
        strand.begun += 1
        if segment.lane is Lane.EXCHANGE:
            strand.underway.append((place, self._exchanges.start(segment.run)))
            return
        self._wait(strand, place - segment.after + 1, spans)
        started = time.perf_counter()
        segment.run()
        spans.append(Span(self._rank, Lane.COMPUTE.value, _name(strand.of, segment), started, time.perf_counter()))
        if strand.of.backward:
            (strand.waiting if strand.of.later is None else strand.of.later).append(self._queue.take())

    def _wait(self, strand: _Progress, end: int, spans: list[Span]) -> None:
        """For the exchanges that stand before place `end`."""
        while strand.underway and strand.underway[0][0] < end:
            place, exchange = strand.underway.popleft()
            exchange.wait()
            name = _name(strand.of, strand.of.segments[place])
            spans.append(Span(self._rank, Lane.EXCHANGE.value, name, exchange.started, exchange.ended))

    def _run_weights(self, strand: _Progress, spans: list[Span]) -> None:
        if not (closures := strand.waiting.popleft()):
            return
        started = time.perf_counter()
        for accumulate in closures:
            accumulate()
        spans.append(Span(self._rank, Lane.COMPUTE.value, strand.of.label, started, time.perf_counter()))


def alternating(strands: Sequence[SegmentStream]) -> Order:
    """A segment of each strand in turn, weight gradients right behind their segment. What is left of the longest comes last."""
    order: list[int] = []
    lengths = [len(strand.segments) or len(list(strand.released)) for strand in strands]
    for turn in range(max(lengths, default=0)):
        for k, strand in enumerate(strands):
            if turn >= lengths[k]:
                continue
            if not strand.segments:
                order.append(~k)
                continue
            order.append(k)
            if strand.backward and strand.later is None and strand.segments[turn].lane is Lane.COMPUTE:
                order.append(~k)
    return tuple(order)


def _name(strand: SegmentStream, segment: Segment) -> str:
    return f"{strand.label} {segment.name}" if segment.layer < 0 else f"{strand.label} {segment.name} {segment.layer}"


def _unfit(order: Order | None, strands: Sequence[SegmentStream]) -> ValueError:
    sizes = ", ".join(f"{strand.label} with {len(strand.segments)} segments" for strand in strands)
    return ValueError(f"the program's order {order} is not one of {sizes}")
