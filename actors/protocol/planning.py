"""The layouts, placements and owners that the state machine asks for, as orchestrator/relayout, placement and ownership have them."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import lru_cache

from actors.protocol.tables import Tables
from orchestrator.config.run_config import ConfigError, RunConfig
from orchestrator.layout.layout import Layout
from orchestrator.layout.placement import Placement, default_placement
from orchestrator.protocol.events import Base, LayoutRef, PlacementRef, WorkerAssignment
from orchestrator.protocol.members import Member
from orchestrator.recovery.experts import relaid_placement
from orchestrator.recovery.relayout import Relaid, relaid
from orchestrator.state import ownership
from orchestrator.topology import Node

logger = logging.getLogger(__name__)

_KEPT = 8
_VALUES, _GATES = "values", "biases of gates"


@dataclass(frozen=True, slots=True)
class _Part:
    """State that the same ranks own: how much of it there is, and the name of the first."""

    owners: frozenset[int]
    unit: str
    first: str
    count: int


class RealPlanner:
    """config: the run's, as it was given. first: the layout that it begins with, where the nodes are those of it."""

    def __init__(self, config: RunConfig, tables: Tables, first: Layout | None = None):
        self._config, self._tables, self._first = config, tables, first
        self._parts = lru_cache(_KEPT)(self._parts_of)
        self.notes: tuple[str, ...] = ()
        """What differs from the configuration in the layout that was planned last."""

    def plan(self, nodes: tuple[Node, ...], base: Base | None, ready: Collection[Member]) -> WorkerAssignment | None:
        """As Planner.plan. A refusal is logged."""
        tables, members = self._tables, _by_place(ready)
        try:
            found = self._relaid(nodes, tables.layout(base.layout) if base else None)
        except ConfigError as error:
            logger.error("no layout for the nodes that are left: %s", error)
            return None
        self.notes = found.notes
        placement = _default(found) if base is None else relaid_placement(
            found.config.model, found.layout, tables.layout(base.layout), tables.placement(base.placement),
            layers_per_stage=found.config.layout.layers_per_stage, parts=found.config.layout.group_parts)
        return _plan(tables.layout_ref(found.config, found.layout), tables.placement_ref(placement), found.layout, members, nodes)

    def recorded(self, layout: LayoutRef, placement: PlacementRef, ready: Collection[Member]) -> WorkerAssignment | None:
        """As Planner.recorded."""
        self.notes, found = (), self._tables.layout(layout)
        return _plan(layout, placement, found, _by_place(ready), _nodes_of(ready))

    def covered(self, base: Base, having: Collection[Member]) -> str | None:
        """As Planner.covered."""
        ranks = _ranks(base, having)
        lost = [part for part in self._parts(base.layout, base.placement) if part.owners.isdisjoint(ranks)]
        for unit in (_VALUES, _GATES):
            if of_unit := [part for part in lost if part.unit == unit]:
                return f"no owner is left of {sum(part.count for part in of_unit)} {unit}, the first of them {of_unit[0].first}"
        return None

    def hands_over(self, base: Base, plan: WorkerAssignment, having: Collection[Member]) -> tuple[Member, ...]:
        """As Planner.hands_over."""
        staying, having = set(plan.members), set(having)
        ranks = _ranks(base, [member for member in having if member in staying])
        idle = {rank: member for rank, member in enumerate(base.members) if member in having and member not in staying}
        found: set[int] = set()
        for part in self._parts(base.layout, base.placement):
            if part.owners.isdisjoint(ranks):
                found |= part.owners & idle.keys()
        return tuple(idle[rank] for rank in sorted(found))

    def same_layout(self, base: Base, plan: WorkerAssignment) -> bool:
        """As Planner.same_layout."""
        return self._tables.layout(base.layout) == self._tables.layout(plan.layout)

    # --- inside --------------------------------------------------------------------------------------------------

    def _relaid(self, nodes: tuple[Node, ...], old: Layout | None) -> Relaid:
        """Raises ConfigError."""
        if old is None and self._first is not None and _is_for(self._first, nodes):
            return Relaid(self._config, self._first)
        return relaid(self._config, nodes, old)

    def _parts_of(self, layout: LayoutRef, placement: PlacementRef) -> tuple[_Part, ...]:
        """All state, by who owns it; weights in the order in which they are reduced."""
        config, found = self._tables.config(layout), self._tables.layout(layout)
        counts: dict[tuple[frozenset[int], str], list] = {}
        for bucket in ownership.buckets_of(config, found, self._tables.placement(placement)):
            for shard, owners in enumerate(bucket.owners):
                if values := min(bucket.size, (shard + 1) * bucket.shard_size) - min(bucket.size, shard * bucket.shard_size):
                    name = bucket.pieces(shard)[0][0].name
                    counts.setdefault((frozenset(owners), _VALUES), [name, 0])[1] += values
        for layer, hosts in ownership.gates(config.model, found, config.layout.layers_per_stage).items():
            counts.setdefault((frozenset(hosts), _GATES), [f"layer {layer}", 0])[1] += 1
        return tuple(_Part(owners, unit, first, count) for (owners, unit), (first, count) in counts.items())


def _default(relaid: Relaid) -> Placement:
    config = relaid.config
    return default_placement(config.model, relaid.layout, config.layout.layers_per_stage, config.layout.group_parts)


def _is_for(layout: Layout, nodes: tuple[Node, ...]) -> bool:
    """Whether these are its nodes, and no others, with all its places."""
    ranks = {node.name: node.ranks for node in nodes}
    return set(layout.nodes) == ranks.keys() and all(place.local < ranks[place.node] for place in layout.places)


def _plan(layout: LayoutRef, placement: PlacementRef, found: Layout, members: dict[tuple[str, int], Member],
          nodes: tuple[Node, ...]) -> WorkerAssignment | None:
    """None: a place has nobody."""
    seated = [members.get((place.node, place.local)) for place in found.places]
    return None if None in seated else WorkerAssignment(layout, placement, tuple(seated), nodes)


def _by_place(ready: Collection[Member]) -> dict[tuple[str, int], Member]:
    """Of each place the newest incarnation."""
    return {(member.node, member.local): member for member in sorted(ready)}


def _nodes_of(ready: Iterable[Member]) -> tuple[Node, ...]:
    counts: dict[str, int] = {}
    for member in sorted(ready):
        counts[member.node] = counts.get(member.node, 0) + 1
    return tuple(Node(name, count) for name, count in counts.items())


def _ranks(base: Base, members: Collection[Member]) -> set[int]:
    wanted = members if isinstance(members, set | frozenset) else set(members)
    return {rank for rank, member in enumerate(base.members) if member is not None and member in wanted}
