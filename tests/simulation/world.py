"""The world that a machine runs in: virtual time, coordinators, ranks, a network, a run folder; one seed.

`World(scenario).run()` raises Violation at the event at which an invariant breaks. All that happens is an entry of one heap.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable, Iterable
from typing import Any

from orchestrator.protocol import commands as orders
from orchestrator.protocol import events as happened
from orchestrator.protocol.commands import InReferences
from orchestrator.protocol.members import Member
from orchestrator.protocol.run import Run
from orchestrator.told.kinds import Event
from tests.simulation.coordinator import Coordinator
from tests.simulation.faults import KINDS
from tests.simulation.histories import Histories
from tests.simulation.host import Host
from tests.simulation.invariants import Invariants, Violation
from tests.simulation.network import Group, Links, delays, release
from tests.simulation.planner_model import KeyPlanner
from tests.simulation.rank_model import RankModel
from tests.simulation.settings import Fault, Scenario
from tests.simulation.storage_model import Storage
from tests.simulation.working import RanksAtWork

MOST_EVENTS = 20_000
"""Of a run, besides what its ranks and steps account for."""
RESTORED_SECONDS = 25.0
"""Within which everything has its copies again after a loss that was told at once."""
_COMPUTE_SECONDS = 0.2


class World(RanksAtWork):
    """ranks: by member, dead ones too. coordinator: the one that the driver knows; None: it is dead, and the next one not there
    yet. calm_at: when the last fault is over. harmed: members that some fault could make anybody suspect. excused: endings that
    the faults account for."""

    def __init__(self, scenario: Scenario, run: type[Run] = Run, rank: type[RankModel] = RankModel):
        self.scenario, self.goal, self.random = scenario, scenario.goal(), random.Random(scenario.seed)
        self.run_class, self.rank_class = run, rank
        self.most_events = MOST_EVENTS + 100 * sum(scenario.nodes) * scenario.steps
        self.now, self.count, self._number = 0.0, 0, 0
        self._heap: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._delays, self._chance = delays(scenario.spread), self.random.random
        self._faults = sorted(scenario.faults, key=lambda fault: -fault.at)
        self.planner = KeyPlanner(scenario.keys, scenario.copies, scenario.least)
        self.histories, self.links, self.storage, self.invariants = Histories(), Links(), Storage(self), Invariants(self)
        self.hosts = {f"n{index}": Host(f"n{index}", ranks) for index, ranks in enumerate(scenario.nodes)}
        self._first_hosts = frozenset(self.hosts)
        self.ranks: dict[Member, RankModel] = {}
        self.places: dict[tuple[str, int], list[RankModel]] = {}
        self.known: dict[tuple[str, int], int] = {}
        self.groups: dict[tuple[int, int, int], Group] = {}
        self.epoch = 0
        self.coordinator: Coordinator | None = None
        self.superseded: list[Coordinator] = []  # frozen, and replaced: they may thaw
        self.outcome: orders.EndRun | None = None
        self.ended: dict[int, happened.Ending] = {}  # by epoch: how each coordinator ended
        self.trace: list[str] | None = None
        self.told: list[Event | InReferences] = []
        # faults
        self.harmed: set[Member] = set()
        self.suspect_nodes: dict[str, float] = {}
        self.calm_at = 0.0
        self.stop_at: float | None = None
        self.excused: set[happened.Ending] = set()
        self.storage_harmed = self.reads_failed = False
        self.not_finite: int | None = None
        self.failing_step: int | None = None
        self.batches_fail_until = 0.0
        self.own_faults: list[str] = []  # the node of each
        self.barred: set[str] = set()
        self.all_harmed = self.somebody_came = False
        self._only_losses, self._losses = True, []
        if not scenario.cold:
            for host in self.hosts.values():
                for local in range(host.ranks):
                    self.make(Member(host.name, local))
        self.coordinate(left_behind=False)

    # --- time ------------------------------------------------------------------------------------------------------------

    def later(self, seconds: float, do: Callable[..., None], *arguments: Any) -> None:
        self._number += 1
        heapq.heappush(self._heap, (self.now + seconds, self._number, do, arguments))

    def delay(self) -> float:
        """Seconds of a message."""
        return self._delays[int(self._chance() * 4096)]

    def compute(self) -> float:
        """Seconds of a step's computation."""
        return _COMPUTE_SECONDS + 0.1 * self._chance()

    def run(self) -> orders.EndRun:
        """To its end. Raises Violation."""
        heap, pop = self._heap, heapq.heappop
        faults = self._faults
        while self.outcome is None:
            while faults and faults[-1].at <= self.count:
                self._befall(faults.pop())
            if not heap:
                raise Violation("L1", "nothing is left to happen")
            self.now, _, do, arguments = pop(heap)
            self.count += 1
            do(*arguments)
            if not self.count & 255:
                self.invariants.progress()
                if self.count > self.most_events:
                    raise Violation("L1", f"{self.count} events, and no end")
        return self.outcome

    def _befall(self, fault: Fault) -> None:
        def now() -> None:
            self.note(f"FAULT {fault.kind} {fault.target}")
            self._only_losses &= fault.kind in ("kill", "end node", "coordinator")
            KINDS[fault.kind](self, fault.target)
            self.calm_at = max(self.calm_at, self.now)

        if fault.later:
            self.later(fault.later, now)
        else:
            now()

    def note(self, text: str) -> None:
        if self.trace is not None:
            self.trace.append(f"{self.now:9.3f} {self.count:6d}  {text}")

    # --- coordinators -----------------------------------------------------------------------------------------------------

    def coordinate(self, left_behind: bool) -> None:
        """The driver starts a coordinator."""
        self.epoch += 1
        members = tuple(Member(node, local, incarnation) for (node, local), incarnation in sorted(self.known.items()))
        run = self.run_class(self.scenario.rules(), self.scenario.bounds(), self.planner)
        self.coordinator = Coordinator(self, self.epoch, run)
        self.coordinator.begin(members, left_behind)

    # --- nodes and processes -----------------------------------------------------------------------------------------------

    def at(self, node: str, local: int) -> list[RankModel]:
        """Processes that run there."""
        return [rank for rank in self.places.get((node, local), ()) if rank.alive]

    def alive(self) -> list[RankModel]:
        return [rank for rank in self.ranks.values() if rank.alive]

    def answers(self, rank: RankModel) -> bool:
        """Whether whoever asks it will be answered soon."""
        return rank.alive and not rank.hung and rank.thaws <= self.now and rank.deaf <= self.now

    def is_harmed(self, member: Member) -> bool:
        return self.all_harmed or member in self.harmed or self.suspect_nodes.get(member.node, -1.0) >= self.now

    def usable(self) -> int:
        """Nodes that a layout could use."""
        there = [host for host in self.hosts.values() if host.present and host.up and not host.draining]
        return sum(host.name not in self.barred for host in there)

    def enough(self) -> bool:
        """Whether a run could go on, with a node to spare where a link is cut."""
        return self.usable() >= max(self.scenario.min_nodes, self.scenario.least) + bool(self.links.cut)

    def redundancy_was_whole(self) -> bool:
        """Whether all state had to be there all the time: processes ended, and nothing else was wrong; so few nodes at a time
        as there are copies; and some node has lost none."""
        if not self._only_losses or self.scenario.copies == 0:
            return False
        for at, _ in self._losses:
            if len({node for when, node in self._losses if at <= when < at + RESTORED_SECONDS}) > self.scenario.copies:
                return False
        return any(host.lost_at < 0 for host in self.hosts.values() if host.name in self._first_hosts)

    def suspect(self, node: str, until: float) -> None:
        """Whoever runs there may be suspected with reason until then."""
        self.suspect_nodes[node] = max(self.suspect_nodes.get(node, 0.0), until)
        self.harmed.update(rank.member for rank in self.ranks.values() if rank.member.node == node)

    def make(self, member: Member) -> RankModel:
        self.known[member.node, member.local] = max(member.incarnation, self.known.get((member.node, member.local), 0))
        rank = self.ranks[member] = self.rank_class(self, member)
        self.places.setdefault((member.node, member.local), []).append(rank)
        return rank

    def kill(self, rank: RankModel, quiet: bool = False) -> None:
        """quiet: the host has gone, so that no connection tells of it."""
        if not rank.alive:
            return
        self.note(f"{rank.member} ends{' without a word' if quiet else ''}")
        group, member = rank.group, rank.member
        rank.stopped_at = self.now
        rank.end()
        self.places[member.node, member.local].remove(rank)
        self.harmed.add(member)
        host = self.hosts[member.node]
        host.lost_at = self.now
        known = self.coordinator.connected if self.coordinator is not None else {}
        self.harmed.update(other.member for local in range(host.ranks) for other in self.at(host.name, local)
                           if other.member not in known)  # it looks as if the node had gone, with what starts there
        self._losses.append((self.now, member.node))
        if quiet:
            return
        if group is not None and not group.broken:
            group.broken = True
            for other in group.members:
                peer = self.ranks.get(other)
                if peer is not None and peer.alive and peer.group is group:
                    peer.peer_ended()
        if self.coordinator is not None:
            self.coordinator.connection_ended(rank)

    def group(self, epoch: int, number: int, members: tuple[Member, ...]) -> Group:
        """Where they meet: each coordinator has a place of its own."""
        key = epoch, number, len(members)  # of one number there is one with those who leave, and one without
        found = self.groups.get(key)
        if found is None:
            found = self.groups[key] = Group(epoch, number, members)
            ranks = self.ranks
            found.broken = any(member not in ranks or not ranks[member].alive and ranks[member].stopped_at is not None
                               and self.hosts[member.node].up for member in members)
        return found

    def heal(self, cut: Iterable[tuple[str, str]]) -> None:
        """Links carry again, and what was sent meanwhile arrives."""
        self.links.cut -= set(cut)
        for group in list(self.groups.values()):
            for meeting in group.meetings:
                if meeting.waiting:
                    release(group, meeting, self.links, self._goes_on)

    def by_epoch(self, epoch: int) -> Coordinator | None:
        """A coordinator that lives."""
        found = self.coordinator
        if found is not None and found.epoch == epoch:
            return found
        return next((other for other in self.superseded if other.epoch == epoch), None)

    def supersede(self) -> None:
        """The driver gives up the coordinator that it knows, which lives."""
        self.superseded.append(self.coordinator)
        self.coordinator = None

    def restart(self) -> None:
        """The driver has found that there is no coordinator."""
        if self.coordinator is None:
            self.coordinate(left_behind=True)
