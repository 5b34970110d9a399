"""What happens inside one action: its layers' pieces on a compute lane and a communication lane.

A forward walks its layers as attention, dispatch, experts, combine; a backward for the input walks them back. Each piece
waits for the one before in its strand and for its lane. Weight gradients wait for their own input gradients only, so they
fill what is left of the compute lane. One strand alone leaves one of the lanes idle; two strands hide each other's
communication: a pair, or the halves of a split microbatch (DeepSeek-V3 report, section 3.2.1 and figure 4).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import product

from orchestrator.schedule.spans import Lane

_TINY = 1e-12


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


@cache
def _overlapped(costs: tuple[Cost, ...]) -> Template:
    if not any(cost.dispatch or cost.combine for cost in costs):
        return Template.block(sum(cost.compute + cost.weights for cost in costs))
    plans = (_plan(costs, order, patient) for order, patient in product(_orders(len(costs)), (False, True)))
    return min(plans, key=lambda template: template.duration)


def overlapped(costs: Sequence[Cost]) -> Template:
    """The shortest found among list schedules that differ in who goes first and whether weight gradients may delay others.

    One cost: a lone action. Two: a pair, or two halves.
    """
    return _overlapped(tuple(costs))


def _orders(strands: int) -> Sequence[tuple[int, ...]]:
    return ((0,),) if strands == 1 else ((0, 1), (1, 0))


def _plan(costs: Sequence[Cost], order: tuple[int, ...], patient: bool) -> Template:
    """List scheduling: what can start first goes first, the earlier strand of `order` on ties; weight gradients when the
    compute lane has nothing else to start, and, if `patient`, only those that end before something else could start."""
    strands = [_strand(cost) for cost in costs]
    at, ready = [0] * len(strands), [0.0] * len(strands)
    free = {Lane.COMPUTE: 0.0, Lane.EXCHANGE: 0.0}
    released: list[tuple[float, float]] = [(0.0, cost.weights / (2 * cost.layers)) for cost in costs
                                           if cost.weights and not cost.compute for _ in range(2 * cost.layers)]
    spans: list[tuple[Lane, float, float]] = []

    def run(lane: Lane, start: float, duration: float) -> float:
        free[lane] = start + duration
        spans.append((lane, start, start + duration))
        return start + duration

    while True:
        waiting = [s for s in order if at[s] < len(strands[s])]
        starts = {s: max(ready[s], free[strands[s][at[s]][0]]) for s in waiting}
        first = min(waiting, key=starts.__getitem__, default=None)
        horizon = min((starts[s] for s in waiting if strands[s][at[s]][0] is Lane.COMPUTE), default=float("inf"))
        if released:
            index = min(range(len(released)), key=lambda i: released[i][0])
            begin = max(free[Lane.COMPUTE], released[index][0])
            duration = released[index][1]
            if begin < horizon - _TINY and (first is None or begin <= starts[first] or not waiting) and (
                    not patient or begin + duration <= horizon + _TINY):
                released.pop(index)
                run(Lane.COMPUTE, begin, duration)
                continue
        if first is None:
            break
        lane, duration, weight = strands[first][at[first]]
        ready[first] = run(lane, starts[first], duration)
        at[first] += 1
        if weight:
            released.append((ready[first], weight))
    spans.sort(key=lambda span: span[1])
    return Template(max(end for _, _, end in spans), tuple(spans))


def _strand(cost: Cost) -> list[tuple[Lane, float, float]]:
    """(lane, duration, weight gradient it releases) in order. A backward is a forward read backwards, whose gradient of
    combine costs a dispatch: the two read alike but for which communication comes first."""
    if not cost.compute:
        return []
    half = (Lane.COMPUTE, cost.compute / (2 * cost.layers), cost.weights / (2 * cost.layers))
    dispatch, combine = (Lane.EXCHANGE, cost.dispatch / cost.layers, 0.0), (Lane.EXCHANGE, cost.combine / cost.layers, 0.0)
    layer = [dispatch, half, combine, half] if cost.backward else [half, dispatch, half, combine]
    return layer * cost.layers
