"""What happens inside one action: its operations on a compute lane and a communication lane, and the order they are issued in.

A forward walks its layers as attention, dispatch, experts, combine; a backward for the input walks them back: either is an
operation stream. An operation of compute waits for its own stream's communication only; weight gradients wait for their own input
gradients only, so they fill what is left of the compute lane. One stream alone leaves one of the lanes idle; two streams hide each other's communication:
a pair, or the halves of a split microbatch (DeepSeek-V3 report, section 3.2.1 and figure 4).

One thread issues in a fixed order: it runs compute itself, and hands communication to a lane that works through it in that
order. So an order is a list of stream numbers. `k`: the next operation of stream k; `~k` (that is -1-k): the oldest weight
gradient that stream k has released and not yet run. All ranks with the same order enter the same collectives in the same order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import permutations, product

from orchestrator.schedule.ir.spans import Lane

_TINY = 1e-12
IssueOrder = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Operation:
    """One operation of an operation stream. `name`, `layer`: those of the stage's segment that it stands for, if any.

    weights: duration of the weight gradients that it releases; None: it releases none.
    after: compute only; it waits for the communication up to so many places before it in its stream. With 1 that is all of it;
        a shared expert, which stands behind a dispatch that it does not need, has 2. Communication waits for all before it.
    """

    lane: Lane
    duration: float
    weights: float | None = None
    after: int = 1
    name: str = ""
    layer: int = -1

    def scaled(self, compute: float, exchange: float) -> Operation:
        """With factors on durations, by lane."""
        if self.lane is Lane.EXCHANGE:
            return replace(self, duration=exchange * self.duration)
        return replace(self, duration=compute * self.duration, weights=None if self.weights is None else compute * self.weights)


@dataclass(frozen=True, slots=True)
class OperationStream:
    """One (half) microbatch's way through an action. released: weight gradients that wait from the start, as durations."""

    operations: tuple[Operation, ...] = ()
    released: tuple[float, ...] = ()

    def scaled(self, compute: float, exchange: float) -> OperationStream:
        """With factors on durations, by lane."""
        if compute == exchange == 1:
            return self
        return OperationStream(tuple(operation.scaled(compute, exchange) for operation in self.operations),
                               tuple(compute * length for length in self.released))


@dataclass(frozen=True, slots=True)
class Cost:
    """One compute action in parts: time of all layers together. `weights`: of weight gradients; alone, all there is.

    backward: communication comes first in each layer, not last.
    """

    layers: int
    compute: float
    dispatch: float = 0.0
    combine: float = 0.0
    weights: float = 0.0
    backward: bool = False

    def halved(self, factor: float) -> Cost:
        """One of two halves, whose compute together takes `factor` times that of the whole."""
        return replace(self, compute=factor / 2 * self.compute, weights=factor / 2 * self.weights,
                       dispatch=self.dispatch / 2, combine=self.combine / 2)


@dataclass(frozen=True, slots=True)
class Template:
    """What an action does, from its start. spans: (lane, start, end) in order of their starts."""

    duration: float
    spans: tuple[tuple[Lane, float, float], ...]

    @staticmethod
    def block(duration: float) -> Template:
        """Compute without communication."""
        return Template(duration, ((Lane.COMPUTE, 0.0, duration),))

    def stretched(self, duration: float) -> Template:
        """The same in another time."""
        if not self.duration:
            return Template.block(duration)
        factor = duration / self.duration
        return Template(duration, tuple((lane, factor * start, factor * end) for lane, start, end in self.spans))


@dataclass(frozen=True, slots=True)
class PlannedOrder:
    """An order, and what it takes."""

    order: IssueOrder
    template: Template


@cache
def _overlapped(costs: tuple[Cost, ...]) -> Template:
    if not any(cost.dispatch or cost.combine for cost in costs):
        return Template.block(sum(cost.compute + cost.weights for cost in costs))
    return planned(tuple(stream_of(cost) for cost in costs)).template


def overlapped(costs: Sequence[Cost]) -> Template:
    """What `planned` finds for uniform layers. One cost: a lone action. Two: a pair, or two halves."""
    return _overlapped(tuple(costs))


@cache
def planned(streams: tuple[OperationStream, ...]) -> PlannedOrder:
    """The shortest found among list schedules that differ in who goes first and whether weight gradients may delay others."""
    free = any(operation.after > 1 for stream in streams for operation in stream.operations)
    choices = product(permutations(range(len(streams))), (False, True), (False, True) if free else (False,))
    orders = dict.fromkeys(_Listing(streams).order(*choice) for choice in choices)
    return min((PlannedOrder(order, timed(streams, order)) for order in orders), key=lambda plan: plan.template.duration)


def timed(streams: Sequence[OperationStream], order: IssueOrder) -> Template:
    """What one thread that issues in this order takes.

    Raises ValueError: a stream has no such operation, or no weight gradient waiting, or something is left out.
    """
    at, reached = [0] * len(streams), [[0.0] for _ in streams]  # reached[s][i]: the end of the first i operations of stream s
    waiting = [list(stream.released) for stream in streams]
    free = {Lane.COMPUTE: 0.0, Lane.EXCHANGE: 0.0}
    spans: list[tuple[Lane, float, float]] = []

    def run(lane: Lane, start: float, duration: float) -> float:
        free[lane] = start + duration
        spans.append((lane, start, start + duration))
        return start + duration

    for place, mark in enumerate(order):
        s = mark if mark >= 0 else ~mark
        if s >= len(streams) or (mark < 0 and not waiting[s]) or (mark >= 0 and at[s] == len(streams[s].operations)):
            raise ValueError(f"place {place} of order {order}: stream {s} has nothing more{' to release' * (mark < 0)}")
        if mark < 0:
            run(Lane.COMPUTE, free[Lane.COMPUTE], waiting[s].pop(0))
            continue
        operation = streams[s].operations[at[s]]
        ready = free[Lane.COMPUTE] if operation.lane is Lane.EXCHANGE else reached[s][max(0, at[s] + 1 - operation.after)]
        end = run(operation.lane, max(ready, free[operation.lane]), operation.duration)
        at[s] += 1
        reached[s].append(max(end, reached[s][-1]))
        if operation.weights is not None:
            waiting[s].append(operation.weights)
    for s, stream in enumerate(streams):
        if at[s] < len(stream.operations) or waiting[s]:
            raise ValueError(f"order {order} leaves out {len(stream.operations) - at[s]} operations and {len(waiting[s])} weight "
                             f"gradients of stream {s}")
    spans.sort(key=lambda span: span[1])
    return Template(max((end for _, _, end in spans), default=0.0), tuple(spans))


class _Listing:
    """List scheduling of streams: what can start first goes first."""

    def __init__(self, streams: Sequence[OperationStream]):
        self._streams = streams

    def order(self, first: Sequence[int], patient: bool, early: bool) -> IssueOrder:
        """The order in which operations are issued.

        first: which stream goes first on ties. patient: weight gradients, which run when the compute lane has nothing else to
        start, run only if they end before something else could. early: communication is queued when it is ready, not when
        its lane is; so what stands behind it, but does not need it, can begin.
        """
        self._at, self._reached = [0] * len(self._streams), [[0.0] for _ in self._streams]
        self._free = {Lane.COMPUTE: 0.0, Lane.EXCHANGE: 0.0}
        self._released = [(0.0, s, length) for s, stream in enumerate(self._streams) for length in stream.released]
        self._computes: list[tuple[int, int]] = []   # (mark, operations of the stream before it), as are the exchanges
        self._exchanges: list[tuple[int, int]] = []
        while True:
            starts = {s: self._start(s) for s in first if self._at[s] < len(self._streams[s].operations)}
            keys = {s: self._ready(s) if early and self._next(s).lane is Lane.EXCHANGE else start for s, start in starts.items()}
            chosen = min(keys, key=keys.__getitem__, default=None)
            horizon = min((start for s, start in starts.items() if self._next(s).lane is Lane.COMPUTE), default=float("inf"))
            if self._fill(horizon, float("inf") if chosen is None else keys[chosen], patient):
                continue
            if chosen is None:
                return self._merged()
            self._place(chosen, starts[chosen])

    def _next(self, s: int) -> Operation:
        return self._streams[s].operations[self._at[s]]

    def _ready(self, s: int) -> float:
        operation = self._next(s)
        return self._reached[s][-1 if operation.lane is Lane.EXCHANGE else max(0, self._at[s] + 1 - operation.after)]

    def _start(self, s: int) -> float:
        return max(self._ready(s), self._free[self._next(s).lane])

    def _place(self, s: int, start: float) -> None:
        operation, end = self._next(s), start + self._next(s).duration
        (self._computes if operation.lane is Lane.COMPUTE else self._exchanges).append((s, self._at[s]))
        self._free[operation.lane] = end
        self._at[s] += 1
        self._reached[s].append(max(end, self._reached[s][-1]))
        if operation.weights is not None:
            self._released.append((end, s, operation.weights))

    def _fill(self, horizon: float, otherwise: float, patient: bool) -> bool:
        """Place a weight gradient, if one can run before what could start next on the compute lane."""
        if not self._released:
            return False
        released, s, length = found = min(self._released, key=lambda entry: entry[0])
        begin = max(self._free[Lane.COMPUTE], released)
        if begin >= horizon - _TINY or begin > otherwise or (patient and begin + length > horizon + _TINY):
            return False
        self._released.remove(found)
        self._computes.append((~s, 0))
        self._free[Lane.COMPUTE] = begin + length
        return True

    def _merged(self) -> IssueOrder:
        """Both lanes as one list: communication as soon as what its stream has before it is issued, in its lane's order, but
        never behind what its stream has after it."""
        order: list[int] = []
        issued = [0] * len(self._streams)
        queue = list(self._exchanges)

        def issue(s: int) -> None:
            order.append(s)
            issued[s] += 1

        def issue_ready() -> None:
            while queue and issued[queue[0][0]] == queue[0][1]:
                issue(queue.pop(0)[0])

        issue_ready()
        for mark, before in self._computes:
            if mark < 0:
                order.append(mark)
                continue
            for exchange in [entry for entry in queue if entry[0] == mark and entry[1] < before]:
                queue.remove(exchange)
                issue(mark)
            issue(mark)
            issue_ready()
        return tuple(order)


def stream_of(cost: Cost) -> OperationStream:
    """Of uniform layers. A backward is a forward read backwards, whose gradient of combine costs a dispatch: the two read alike
    but for which communication comes first."""
    weights = cost.weights / (2 * cost.layers) if cost.weights else None
    if not cost.compute:
        return OperationStream(released=() if weights is None else (weights,) * (2 * cost.layers))
    half = Operation(Lane.COMPUTE, cost.compute / (2 * cost.layers), weights)
    dispatch, combine = (Operation(Lane.EXCHANGE, sent / cost.layers) for sent in (cost.dispatch, cost.combine))
    layer = (dispatch, half, combine, half) if cost.backward else (half, dispatch, half, combine)
    return OperationStream(layer * cost.layers)
