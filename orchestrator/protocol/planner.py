"""What the state machine asks of layouts: it does not know what they are made of."""

from __future__ import annotations

from collections.abc import Collection
from typing import Protocol

from orchestrator.protocol.events import Base, LayoutRef, PlacementRef, WorkerAssignment
from orchestrator.protocol.membership import Member
from orchestrator.topology import Node


class Planner(Protocol):
    """Pure: the same questions get the same answers."""

    def plan(self, nodes: tuple[Node, ...], base: Base | None, ready: Collection[Member]) -> WorkerAssignment | None:
        """The layout for `nodes`, near the base's, with the members of `ready` that serve in it. None: there is none."""
        ...

    def recorded(self, layout: LayoutRef, placement: PlacementRef, ready: Collection[Member]) -> WorkerAssignment | None:
        """A layout that is repeated. None: some of its places have nobody."""
        ...

    def covered(self, base: Base, having: Collection[Member]) -> str | None:
        """None: together these own all state of the base; else a few words on what nobody of them owns."""
        ...

    def hands_over(self, base: Base, plan: WorkerAssignment, having: Collection[Member]) -> tuple[Member, ...]:
        """Those of `having` who do not serve in the plan, but own what nobody who does owns."""
        ...

    def same_layout(self, base: Base, plan: WorkerAssignment) -> bool:
        """Whether the plan is the layout that the base has, on the same places."""
        ...
