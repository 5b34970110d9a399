"""From what ranks report of a step to the events that name who is slow."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from actors.calls.messages import StepReport, StepRequest
from orchestrator.layout.layout import Layout
from orchestrator.layout.placement import Placement
from orchestrator.telemetry.stragglers import Flow, StragglerChange, Watch, Work
from orchestrator.told.kinds import Slow, SlowOver


class SlowWatch:
    """The watch of one generation."""

    def __init__(self, layout: Layout, placement: Placement):
        self._layout, self._watch = layout, Watch(layout)
        self._experts: dict[int, dict[int, tuple[int, ...]]] = {rank: {} for rank in range(layout.size)}  # by layer
        for entry in placement.placed:
            for rank, experts in zip(entry.ranks, entry.experts, strict=True):
                self._experts[rank][entry.layer] = experts

    def after(self, step: int, requests: Sequence[StepRequest], reports: Sequence[StepReport]) -> list[Slow | SlowOver]:
        """Events of a step."""
        rows = self._rows(reports)
        works = {report.rank: Work(report.figures.compute_seconds, sum(request.sizes.values()), rows[report.rank])
                 for request, report in zip(requests, reports, strict=True)}
        self._watch, changes = self._watch.after(works, flows(reports))
        return [self._event(step, change) for change in changes]

    def _rows(self, reports: Iterable[StepReport]) -> dict[int, int]:
        """Tokens of the global batch that chose the experts of each rank, over the layers of its stages."""
        by_stages: dict[frozenset[int], dict[int, list[int]]] = {}
        for report in reports:
            if report.load:
                by_stages[self._peers(report.rank)] = report.load
        return {rank: sum(load[expert] for layer, load in by_stages.get(self._peers(rank), {}).items()
                          for expert in held[layer]) for rank, held in self._experts.items()}

    def _peers(self, rank: int) -> frozenset[int]:
        return frozenset(self._layout.peers(self._layout.places[rank].position))

    def _event(self, step: int, change: StragglerChange) -> Slow | SlowOver:
        slow, places = change.straggler, self._layout.places
        return (SlowOver if change.over else Slow)(
            step, slow.rank, places[slow.rank].node, slow.peer, None if slow.peer is None else places[slow.peer].node,
            slow.lane.value, round(slow.factor, 2))


def flows(reports: Iterable[StepReport]) -> dict[tuple[int, int], Flow]:
    """What every rank sent every other one: their connections, matched end to end. Others are left out."""
    reports = list(reports)
    rank_at = {(wire.local, wire.peer): report.rank for report in reports for wire in report.wires}
    found: dict[tuple[int, int], Flow] = {}
    for report in reports:
        for wire in report.wires:
            peer = rank_at.get((wire.peer, wire.local))
            if peer is not None and peer != report.rank:
                before = found.get((report.rank, peer), Flow(0, 0.0))
                found[report.rank, peer] = Flow(before.bytes + wire.bytes, before.seconds + wire.seconds)
    return found
