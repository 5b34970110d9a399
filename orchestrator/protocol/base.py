"""Which state goes on: from what members hold, what is committed, and which checkpoints there are; and what the state machine asks of
layouts for that, since it does not know what they are made of."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from orchestrator.protocol.events import Base, LayoutRef, PlacementRef, Recalled, Seen, WorkerAssignment
from orchestrator.protocol.members import Member
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


@dataclass(frozen=True, slots=True)
class Carry:
    """State in memory: of these members, after `applied` committed steps (fewer than are committed: the rest is to be redone)."""

    base: Base
    having: frozenset[Member]
    applied: int


@dataclass(frozen=True, slots=True)
class Load:
    """A checkpoint. lost: why nobody's memory will do."""

    seen: Seen
    lost: str


@dataclass(frozen=True, slots=True)
class Begin:
    """Initial values."""

    lost: str


@dataclass(frozen=True, slots=True)
class Nothing:
    """There is no state of this run any more."""

    text: str


Choice = Carry | Load | Begin | Nothing


def choose(recalled: Mapping[Member, Recalled], committed: int, checkpoints: Sequence[Seen], planner: Planner) -> Choice:
    """In this order: the newest generation of which those who have all committed steps (or all but the last, whose reduced gradients
    they hold) own everything; an older state in memory that is newer than every checkpoint; the newest readable checkpoint; initial
    values, where no checkpoint was ever made.
    """
    generations = _generations(recalled)
    lost = None
    for key in sorted(generations, reverse=True):
        base, applied = generations[key]
        having = {member for member, count in applied.items()
                  if count == committed or count == committed - 1 == recalled[member].reduced}
        missing = planner.covered(base, having)
        if missing is None:
            return Carry(base, frozenset(having), committed)
        lost = lost or missing
    lost = lost or "no rank holds any state"
    readable = [seen for seen in checkpoints if seen.readable and seen.step <= committed]
    newest = max(readable, key=lambda seen: seen.step, default=None)
    older = _older(generations, committed, newest.step if newest else 0, planner)
    if older is not None:
        return older
    if newest is not None:
        return Load(newest, lost)
    if checkpoints:
        return Nothing(f"{lost}, and none of {len(checkpoints)} checkpoints can be read or is of the {committed} committed steps")
    return Begin(lost)


_Generations = dict[tuple[int, int], tuple[Base, dict[Member, int]]]


def _generations(recalled: Mapping[Member, Recalled]) -> _Generations:
    """By epoch and number: the generation, and how many updates the state of each of its members has; those without are left out."""
    found: _Generations = {}
    places: dict[tuple[int, int], dict[int, Member]] = {}
    for member in sorted(recalled):
        for holding in recalled[member].held:
            key = holding.epoch, holding.generation
            places.setdefault(key, {})[holding.rank] = member
            base = Base(holding.generation, holding.layout, holding.placement, ())
            _, applied = found.setdefault(key, (base, {}))
            if holding.applied is not None:
                applied[member] = holding.applied
    for key, (base, applied) in found.items():
        size = 1 + max(places[key])
        members = tuple(places[key].get(rank) for rank in range(size))
        found[key] = Base(base.generation, base.layout, base.placement, members), applied
    return found


def _older(generations: _Generations, committed: int, least: int, planner: Planner) -> Carry | None:
    """State of fewer steps than are committed, yet more than `least`."""
    best = None
    for key in sorted(generations, reverse=True):
        base, applied = generations[key]
        for count in sorted({count for count in applied.values() if least < count < committed}, reverse=True):
            having = frozenset(member for member, its in applied.items() if its == count)
            if (best is None or count > best.applied) and planner.covered(base, having) is None:
                best = Carry(base, having, count)
    return best
