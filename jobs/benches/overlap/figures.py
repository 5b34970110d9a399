"""What a step's spans say about its communication: over the whole step, and in its steady phase.

That is made of pairs of a forward and a whole backward; what a search pairs elsewhere (a forward with a backward for the input
only) has less compute to hide as much communication under, and counts in the step only.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from orchestrator.schedule.ir.actions import Action, ActionKind, Pair
from orchestrator.schedule.ir.spans import Figures, Span, figures, together


@dataclass(frozen=True)
class Shares:
    """Of one rank. step: from its start to its end. pairs: of all its steady pairs, each from its first span to its last, waits
    for other positions left out; None: it has none. pair_seconds: their mean length."""

    step: Figures
    pairs: Figures | None
    pair_seconds: float


def steady(action: Action) -> bool:
    """Whether it pairs a forward with a whole backward."""
    return isinstance(action, Pair) and {compute.kind for compute in action.computes} == {ActionKind.FORWARD, ActionKind.BACKWARD}


def shares(spans: Sequence[Span], actions: Iterable[Action], start: float, end: float) -> Shares:
    """`spans` are named after their action, then the segment; `actions`: of the program."""
    by_name: dict[str, list[Span]] = defaultdict(list)
    for span in spans:
        by_name[span.label.partition(" ")[0]].append(span)
    found = []
    for pair in filter(steady, actions):
        mine = [span for compute in pair.computes for span in by_name[str(compute)]]
        mine = [span for span in mine if span.lane in ("compute", "exchange")]
        begin, finish = min(span.start for span in mine), max(span.end for span in mine)
        found.append((figures(mine, begin, finish), finish - begin))
    length = sum(seconds for _, seconds in found)
    pairs = together(((figure, 1.0) for figure, _ in found), length) if found else None
    return Shares(figures(spans, start, end), pairs, length / len(found) if found else 0.0)
