"""Who is slow: ranks that compute slowly, and links that transfer slowly. Pure: what was measured is an argument.

A rank is compared with the others that host its stages, a link with the other links of its kind (between nodes, or inside one):
by how much it exceeds their median, itself left out, so that of two the slower one is named. Compute is the rank's own compute
time, without waiting; it counts as slow only if more work does not explain it. A link is judged by its rate while data were
under way, so those who wait for a slow peer do not look slow. What a rank exchanges with other nodes is as fast as its best
link, in either direction: one that is slow itself has no fast link, all others have one among themselves.

What cannot be told: a rank that alone hosts its stages, and all being equally slow, for there is nothing to compare with; which
of two nodes holds up the other where there are no more; which end of a slow pair is the cause.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

from orchestrator.layout.layout import Layout
from orchestrator.schedule.ir.spans import Lane

WINDOW_STEPS = 5
MAJORITY = WINDOW_STEPS // 2 + 1
"""One is named as soon as so many steps of the window were slow, and over as soon as fewer are."""
LEAST_BYTES = 65536
"""What a link must carry in a step to be judged: the time of smaller messages is that of acknowledgements."""

Key = tuple[int, int | None, Lane]
"""rank, peer, lane. compute: the rank, peer None. exchange, pipeline: the link from rank to peer; None: with all other nodes."""


@dataclass(frozen=True, slots=True)
class Threshold:
    """Slow from factor `slow` on, and until it is below `over`; never for less than `seconds` lost in a step."""

    slow: float
    over: float
    seconds: float


COMPUTE = Threshold(slow=1.5, over=1.25, seconds=0.01)
NETWORK = Threshold(slow=2.0, over=1.5, seconds=0.02)
"""Of all that a rank exchanges with other nodes."""
LINK = Threshold(slow=6.0, over=3.0, seconds=0.02)
"""Of one pair. Messages of pairs differ in size, and small ones spend most of their time on acknowledgements: where everybody
waits for one slow node, pairs of others seemed slower by up to 5."""


@dataclass(frozen=True, slots=True)
class Work:
    """One rank's compute in a step. sequences: of its stream, rows: tokens that its experts got; what the seconds depend on."""

    seconds: float
    sequences: int
    rows: int


@dataclass(frozen=True, slots=True)
class Flow:
    """What one rank sent another in a step. seconds: with data under way."""

    bytes: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Straggler:
    """`rank` is slower than its like by `factor` on `lane`. peer: of a link; None: in compute, or with all other nodes."""

    rank: int
    peer: int | None
    lane: Lane
    factor: float


@dataclass(frozen=True, slots=True)
class StragglerChange:
    """A straggler that is new, or that is over."""

    straggler: Straggler
    over: bool


@dataclass(frozen=True)
class Watch:
    """The last steps of one generation. recent: factors, oldest first; named: who is slow at present."""

    layout: Layout
    recent: Mapping[Key, tuple[float, ...]] = field(default_factory=dict)
    named: frozenset[Key] = frozenset()

    def after(self, works: Mapping[int, Work], flows: Mapping[tuple[int, int], Flow]) -> tuple[Watch, tuple[StragglerChange, ...]]:
        """The watch with one more step, and what changed in it. What a step has nothing of keeps the factors that it had."""
        factors = _compute_factors(self.layout, works) | _link_factors(self.layout, flows)
        recent = dict(self.recent)
        for key, factor in factors.items():
            recent[key] = (*recent.get(key, ()), factor)[-WINDOW_STEPS:]
        usual = {key: sorted(values)[-MAJORITY] for key, values in recent.items() if len(values) >= MAJORITY}
        slow = {key for key, factor in usual.items()
                if factor >= (_threshold(key).over if key in self.named else _threshold(key).slow)}
        named = frozenset(slow - _explained(self.layout, slow))
        ended, begun = sorted(self.named - named, key=_order), sorted(named - self.named, key=_order)
        changes = [StragglerChange(Straggler(*key, usual[key]), over)
                   for keys, over in ((ended, True), (begun, False)) for key in keys]
        return Watch(self.layout, recent, named), tuple(changes)


def _threshold(key: Key) -> Threshold:
    if key[2] is Lane.COMPUTE:
        return COMPUTE
    return NETWORK if key[1] is None else LINK


def _order(key: Key) -> tuple[int, int, str]:
    rank, peer, lane = key
    return rank, -1 if peer is None else peer, lane.value


def _compute_factors(layout: Layout, works: Mapping[int, Work]) -> dict[Key, float]:
    found: dict[Key, float] = {}
    for rank, work in works.items():
        others = [works[other] for other in layout.peers(layout.places[rank].position) if other != rank and other in works]
        if not others:
            continue
        factors = [_quotient(work.seconds, [other.seconds for other in others])]
        for amount in ("sequences", "rows"):
            known = [other for other in others if getattr(other, amount)]
            if known and getattr(work, amount):
                factors.append(_quotient(work.seconds / getattr(work, amount),
                                         [other.seconds / getattr(other, amount) for other in known]))
        found[rank, None, Lane.COMPUTE] = _lasting(min(factors), work.seconds, COMPUTE)
    return found


def _quotient(value: float, others: Iterable[float]) -> float:
    """`value` in terms of the median of the others; 1 where that is zero."""
    usual = median(others)
    return value / usual if usual > 0 else 1.0


def _link_factors(layout: Layout, flows: Mapping[tuple[int, int], Flow]) -> dict[Key, float]:
    pace = {ends: flow.seconds / flow.bytes for ends, flow in flows.items() if flow.bytes >= LEAST_BYTES and flow.seconds > 0}
    alike = {across: sorted(of_pair for ends, of_pair in pace.items() if _across(layout, *ends) == across) for across in (True, False)}
    found: dict[Key, float] = {}
    best: dict[int, tuple[float, float]] = {}
    for (rank, peer), seconds_per_byte in pace.items():
        across = _across(layout, rank, peer)
        if len(alike[across]) > 1:
            factor = seconds_per_byte / _median_of_others(alike[across], seconds_per_byte)
            found[rank, peer, _lane(layout, rank, peer)] = _lasting(factor, flows[rank, peer].seconds, LINK)
        for end in (rank, peer) if across else ():
            best[end] = min(best.get(end, (math.inf, 0.0)), (seconds_per_byte, flows[rank, peer].seconds))
    fastest = sorted(seconds_per_byte for seconds_per_byte, _ in best.values())
    for rank, (seconds_per_byte, seconds) in best.items():
        if len(best) > 2:
            factor = seconds_per_byte / _median_of_others(fastest, seconds_per_byte)
            found[rank, None, Lane.EXCHANGE] = _lasting(factor, seconds, NETWORK)
    return found


def _median_of_others(values: Sequence[float], one: float) -> float:
    """The median of sorted `values`, at least two, without one of them. Not by `median`: there are as many links as pairs of ranks."""
    left_out, half = bisect_left(values, one), (len(values) - 1) // 2

    def at(index: int) -> float:
        return values[index if index < left_out else index + 1]

    return at(half) if len(values) % 2 == 0 else (at(half - 1) + at(half)) / 2


def _lasting(factor: float, seconds: float, threshold: Threshold) -> float:
    """The factor; at most 1 where less was lost than counts."""
    return factor if factor <= 1 or seconds * (1 - 1 / factor) >= threshold.seconds else 1.0


def _across(layout: Layout, rank: int, peer: int) -> bool:
    return layout.places[rank].node != layout.places[peer].node


def _lane(layout: Layout, rank: int, peer: int) -> Lane:
    """What a link is for in the first place: all groups of two ranks share it."""
    one, other = layout.places[rank], layout.places[peer]
    same_line = (one.row, one.width) == (other.row, other.width)
    return Lane.PIPELINE if same_line and one.position != other.position else Lane.EXCHANGE


def _explained(layout: Layout, slow: set[Key]) -> set[Key]:
    """Pairs on different nodes, while all that some rank exchanges with other nodes is slow: it holds up everybody's messages."""
    if not any(peer is None and lane is not Lane.COMPUTE for _, peer, lane in slow):
        return set()
    return {key for key in slow if key[1] is not None and _across(layout, key[0], key[1])}
