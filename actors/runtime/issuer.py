"""Operation streams as segments, and how a rank issues those of one action: compute here, exchanges on their lane, in order.

A stream is one microbatch's (or half microbatch's) way through a forward or backward, as segments in order; weight gradients
alone are a stream without segments. The order is a list of stream numbers as in orchestrator/schedule/ir/operations.py: `k` is
the next segment of stream k, `~k` the oldest weight gradients that it has left and that have not run. It never depends on time or
on how many tokens there are. So weight gradients are always added up in the same order, and all ranks of an EP group, which have
the same order, enter the same collectives in the same one.

Two threads touch a tape. Compute segments and weight gradients run on the thread that runs the action, exchange segments on the
lane's. An exchange is started when all that stands before it in its stream has run or been started before it on the same lane; a
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
from orchestrator.schedule.ir.operations import IssueOrder
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
    """of: the stream. begun: segments that have run or been started. underway: exchanges not waited for, by place."""

    of: SegmentStream
    waiting: deque[Closures]
    begun: int = 0
    underway: deque[tuple[int, Exchange]] = field(default_factory=deque)


class Issuer:
    """Runs streams. `queue`: where their backward passes put weight gradients; only the calling thread's segments do."""

    def __init__(self, rank: int, queue: WeightGradients, exchanges: Exchanges):
        self._rank, self._queue, self._exchanges = rank, queue, exchanges

    def run(self, streams: Sequence[SegmentStream], order: IssueOrder | None, spans: list[Span]) -> None:
        """All of all streams, in this order, or `alternating`; what happened is added to `spans`.

        Raises what a segment raises; ValueError: the order is not one of these streams.
        """
        progress = [_Progress(stream, deque(stream.released)) for stream in streams]
        for mark in alternating(streams) if order is None else order:
            stream = progress[mark if mark >= 0 else ~mark]
            if mark >= 0 and stream.begun < len(stream.of.segments):
                self._run_segment(stream, spans)
            elif mark < 0 and stream.waiting:
                self._run_weights(stream, spans)
            else:
                raise _unfit(order, streams)
        for stream in progress:
            self._wait(stream, len(stream.of.segments), spans)
            if stream.begun < len(stream.of.segments) or stream.waiting:
                raise _unfit(order, streams)

    def _run_segment(self, stream: _Progress, spans: list[Span]) -> None:
        place, segment = stream.begun, stream.of.segments[stream.begun]
        stream.begun += 1
        if segment.lane is Lane.EXCHANGE:
            stream.underway.append((place, self._exchanges.start(segment.run)))
            return
        self._wait(stream, place - segment.after + 1, spans)
        started = time.perf_counter()
        segment.run()
        spans.append(Span(self._rank, Lane.COMPUTE.value, _name(stream.of, segment), started, time.perf_counter()))
        if stream.of.backward:
            (stream.waiting if stream.of.later is None else stream.of.later).append(self._queue.take())

    def _wait(self, stream: _Progress, end: int, spans: list[Span]) -> None:
        """For the exchanges that stand before place `end`."""
        while stream.underway and stream.underway[0][0] < end:
            place, exchange = stream.underway.popleft()
            exchange.wait()
            name = _name(stream.of, stream.of.segments[place])
            spans.append(Span(self._rank, Lane.EXCHANGE.value, name, exchange.started, exchange.ended))

    def _run_weights(self, stream: _Progress, spans: list[Span]) -> None:
        if not (closures := stream.waiting.popleft()):
            return
        started = time.perf_counter()
        for accumulate in closures:
            accumulate()
        spans.append(Span(self._rank, Lane.COMPUTE.value, stream.of.label, started, time.perf_counter()))


def alternating(streams: Sequence[SegmentStream]) -> IssueOrder:
    """A segment of each stream in turn, weight gradients right behind their segment. What is left of the longest comes last."""
    order: list[int] = []
    lengths = [len(stream.segments) or len(list(stream.released)) for stream in streams]
    for turn in range(max(lengths, default=0)):
        for k, stream in enumerate(streams):
            if turn >= lengths[k]:
                continue
            if not stream.segments:
                order.append(~k)
                continue
            order.append(k)
            if stream.backward and stream.later is None and stream.segments[turn].lane is Lane.COMPUTE:
                order.append(~k)
    return tuple(order)


def _name(stream: SegmentStream, segment: Segment) -> str:
    return f"{stream.label} {segment.name}" if segment.layer < 0 else f"{stream.label} {segment.name} {segment.layer}"


def _unfit(order: IssueOrder | None, streams: Sequence[SegmentStream]) -> ValueError:
    sizes = ", ".join(f"{stream.label} with {len(stream.segments)} segments" for stream in streams)
    return ValueError(f"the program's order {order} is not one of {sizes}")
