"""Model ranks without a coordinator: calls come from a test, and their answers go there."""

from __future__ import annotations

import heapq
from collections.abc import Generator, Mapping
from functools import cache
from math import inf
from typing import Any

from actors.protocol.tables import Tables
from orchestrator.protocol.commands import Call, CallLane, FormerRef, lane_of
from orchestrator.protocol.events import Answered, CallId, Failed, FailKind
from orchestrator.protocol.members import Member
from orchestrator.state import ownership
from tests.simulation.hosted import STRIDE, Key
from tests.simulation.invariants import Invariants
from tests.simulation.planner_model import Owned
from tests.simulation.rank_model import RankModel, Refused
from tests.simulation.settings import Scenario
from tests.simulation.world import World


class Owners:
    """Who owns which elements of the real model's weights, as the rank model asks for it."""

    def __init__(self, tables: Tables):
        self._tables = tables
        self.owned = cache(self._owned)

    def _owned(self, layout: int, placement: int) -> Owned:
        config, found = self._tables.config(layout), self._tables.layout(layout)
        keys: dict[Key, tuple[int, ...]] = {}
        for bucket in ownership.buckets_of(config, found, self._tables.placement(placement)):
            for shard, owners in enumerate(bucket.owners):
                for spec, start, stop, _ in bucket.pieces(shard):
                    for at in range(-(-start // STRIDE) * STRIDE, stop, STRIDE):
                        keys[spec.name, at] = owners
        for layer, hosts in ownership.gates(config.model, found, config.layout.layers_per_stage).items():
            keys[str(layer), -1] = hosts
        by_rank = [tuple(key for key, owners in keys.items() if rank in owners) for rank in range(found.size)]
        first = [tuple(key for key, owners in keys.items() if rank == owners[0]) for rank in range(found.size)]
        return Owned(tuple(keys.values()), tuple(by_rank), tuple(first))


class Lenient(Invariants):
    """Of calls that no coordinator would make: the rank is to refuse them, not the test."""

    def broken(self, text: str, rule: str = "S2") -> None:
        pass

    def brings(self, rank: RankModel, former: FormerRef, place: int) -> None:
        pass

    def moved(self, payloads: Mapping[Member, Mapping[Any, int] | None], former: FormerRef | None) -> dict[Any, int]:
        found: dict[Any, int] = {}
        for content in payloads.values():
            found |= content or {}
        return found


class Mortal(RankModel):
    """One that can be made to die on its way. doom: "begin" of its next call, or what it then comes to first. site: what it came
    to last in its newest call."""

    def __init__(self, world: World, member: Member):
        super().__init__(world, member)
        self.doom, self.site = "", ""

    def begin(self, call: Call) -> Generator[Any, Any, Any]:
        self.site = ""
        if self.doom == "begin":
            self._die()
        return self._watched(super().begin(call))

    def _watched(self, work: Generator[Any, Any, Any]) -> Generator[Any, Any, Any]:
        try:
            wanted = work.send(None)
            while True:
                self.site = "compute" if isinstance(wanted, float) else wanted[0] if isinstance(wanted, tuple) else wanted
                if self.doom == self.site:
                    self._die()
                try:
                    value = yield wanted
                except Refused as refused:
                    wanted = work.throw(refused)
                else:
                    wanted = work.send(value)
        except StopIteration as done:
            return done.value

    def _die(self) -> None:
        self.world.kill(self)
        raise Refused(FailKind.GONE, "it has ended")


class Bench(World):
    """answers: by call, as they come."""

    def __init__(self, size: int, tables: Tables):
        self.answers: dict[CallId, Answered | Failed] = {}
        super().__init__(Scenario(nodes=(1,) * size), rank=Mortal)
        self.planner, self.invariants = Owners(tables), Lenient(self)

    def coordinate(self, left_behind: bool) -> None:
        """Nobody does."""

    def send(self, calls: list[Call]) -> None:
        for call in calls:
            if lane_of(call.request) is CallLane.COMPUTE:
                self.ranks[call.member].site = ""
            self.arrive(self.ranks[call.member], call, lane_of(call.request))

    def settle(self) -> None:
        """Until nothing goes on by itself."""
        self.settle_for(None)

    def settle_for(self, seconds: float | None) -> None:
        """The same, no longer than this."""
        until = inf if seconds is None else self.now + seconds
        while self._heap and self._heap[0][0] <= until:
            self.now, _, do, arguments = heapq.heappop(self._heap)
            do(*arguments)

    def kill(self, rank: RankModel, quiet: bool = False) -> None:
        if rank.call is not None:
            self.answers[rank.call.call] = Failed(rank.call.call, rank.member, FailKind.GONE, "its process has ended")
        super().kill(rank, quiet)

    def _failed(self, rank: RankModel, call: Call, refused: Refused) -> None:
        if rank.alive:
            super()._failed(rank, call, refused)
        elif call is not None:
            self._gone(rank, call)

    def _gone(self, rank: RankModel, call: Call) -> None:
        self.answers[call.call] = Failed(call.call, rank.member, FailKind.GONE, "its process has ended")

    def _reply(self, rank: RankModel, event: Answered | Failed) -> None:
        if rank.alive:
            self.answers[event.call] = event
