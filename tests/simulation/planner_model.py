"""A planner on keys instead of shards: which rank owns what, without a model, tensors or a cost.

A layout is a tuple of nodes with their ranks, a placement a number by which the owners are shifted. Key k has `copies` + 1 owners
on nodes that follow each other (fewer where there are fewer nodes).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from orchestrator.protocol.events import Base, WorkerAssignment
from orchestrator.protocol.members import Member
from orchestrator.topology import Node


@dataclass(frozen=True, slots=True)
class Owned:
    """by_key: ranks that own each key, the first one first. by_rank: keys of each rank. first: those it is the first owner of."""

    by_key: tuple[tuple[int, ...], ...]
    by_rank: tuple[tuple[int, ...], ...]
    first: tuple[tuple[int, ...], ...]


class KeyPlanner:
    """keys: of the state. copies: further owners of each. least: ranks without which there is no layout."""

    def __init__(self, keys: int = 4, copies: int = 1, least: int = 1):
        self.keys, self.copies, self.least = keys, copies, least
        self._layouts: list[tuple[Node, ...]] = []
        self._references: dict[tuple[Node, ...], int] = {}
        self._owned: dict[tuple[int, int], Owned] = {}

    # --- what the machine asks -------------------------------------------------------------------------------------------

    def plan(self, nodes: tuple[Node, ...], base: Base | None, ready: Collection[Member]) -> WorkerAssignment | None:
        if not nodes or sum(node.ranks for node in nodes) < self.least:
            return None
        there = {(member.node, member.local): member for member in sorted(ready)}
        members = tuple(there[node.name, local] for node in nodes for local in range(node.ranks))
        return WorkerAssignment(self._reference(nodes), base.placement if base else 0, members, nodes)

    def recorded(self, layout: int, placement: int, ready: Collection[Member]) -> WorkerAssignment | None:
        there = {(member.node, member.local): member for member in sorted(ready)}
        nodes = self._layouts[layout]
        wanted = [(node.name, local) for node in nodes for local in range(node.ranks)]
        if any(place not in there for place in wanted):
            return None
        return WorkerAssignment(layout, placement, tuple(there[place] for place in wanted), nodes)

    def covered(self, base: Base, having: Collection[Member]) -> str | None:
        having = set(having)
        has = {rank for rank, member in enumerate(base.members) if member in having}
        lost = [key for key, ranks in enumerate(self.owned(base.layout, base.placement).by_key) if has.isdisjoint(ranks)]
        return f"keys {lost} are lost" if lost else None

    def hands_over(self, base: Base, plan: WorkerAssignment, having: Collection[Member]) -> tuple[Member, ...]:
        having, staying, leaving = set(having), set(plan.members), {}
        for ranks in self.owned(base.layout, base.placement).by_key:
            owners = [base.members[rank] for rank in ranks if rank < len(base.members) and base.members[rank] in having]
            if owners and not any(owner in staying or owner in leaving for owner in owners):
                leaving[owners[0]] = None
        return tuple(leaving)

    def same_layout(self, base: Base, plan: WorkerAssignment) -> bool:
        return (base.layout, base.placement) == (plan.layout, plan.placement)

    # --- what the ranks and the invariants ask ---------------------------------------------------------------------------

    def owned(self, layout: int, placement: int) -> Owned:
        found = self._owned.get((layout, placement))
        if found is None:
            found = self._owned[layout, placement] = _owned(self._layouts[layout], placement, self.keys, self.copies)
        return found

    def placements(self) -> int:
        """How many there are: others are the same again."""
        return 3

    def _reference(self, nodes: tuple[Node, ...]) -> int:
        found = self._references.get(nodes)
        if found is None:
            found = self._references[nodes] = len(self._layouts)
            self._layouts.append(nodes)
        return found


def _owned(nodes: Sequence[Node], placement: int, keys: int, copies: int) -> Owned:
    starts, size = [], 0
    for node in nodes:
        starts.append(size)
        size += node.ranks
    by_key = []
    for key in range(keys):
        homes = [(key + placement + further) % len(nodes) for further in range(min(copies + 1, len(nodes)))]
        by_key.append(tuple(starts[home] + (key // len(nodes)) % nodes[home].ranks for home in homes))
    by_rank, first = [[] for _ in range(size)], [[] for _ in range(size)]
    for key, ranks in enumerate(by_key):
        first[ranks[0]].append(key)
        for rank in ranks:
            by_rank[rank].append(key)
    return Owned(tuple(by_key), tuple(map(tuple, by_rank)), tuple(map(tuple, first)))
