"""The world that a machine runs in: virtual time, coordinators, ranks, a network, a run folder; one seed.

`World(scenario).run()` raises Violation at the event at which an invariant breaks. All that happens is an entry of one heap.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable, Iterable
from typing import Any

from orchestrator.membership import Member
from orchestrator.protocol import commands as orders
from orchestrator.protocol import events as happened
from orchestrator.protocol.commands import Call, Lane
from orchestrator.protocol.events import Answered, Beat, CallId, Done, Ended, Event, Failed, FailKind, LetGo, Probed
from orchestrator.protocol.run import Run
from orchestrator.topology import Node
from tests.simulation.faults import BIRTHS, KINDS
from tests.simulation.histories import Histories
from tests.simulation.invariants import Invariants, Violation
from tests.simulation.network import Group, Links, delays, meet, release
from tests.simulation.planner_model import KeyPlanner
from tests.simulation.rank_model import RankModel, Refused
from tests.simulation.settings import BOUNDS, SILENCE, Fault, Scenario
from tests.simulation.storage_model import Clerk, Storage

MOST_EVENTS = 20_000
"""Of a run, besides what its ranks and steps account for."""
RESTORED_SECONDS = 25.0
"""Within which everything has its copies again after a loss that was told at once."""
_COMPUTE_SECONDS = 0.2


class Host:
    """A node. up: it runs. present: the cluster has it. draining: it is to go. lost_at: when the last process on it ended."""

    __slots__ = ("births", "draining", "lost_at", "name", "present", "ranks", "up")

    def __init__(self, name: str, ranks: int):
        self.name, self.ranks, self.up, self.present, self.draining = name, ranks, True, True, False
        self.lost_at = -SILENCE
        self.births: list[str] = []  # what befalls the next processes that are made here


class World:
    """ranks: by member, dead ones too. coordinator: the one that the driver knows; None: it is dead, and the next one not there yet.
    calm_at: when the last fault is over. harmed: members that some fault could make anybody suspect. excused: endings that the faults
    account for."""

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
        self.trace: list[str] | None = None
        self.told: list[tuple[str, dict[str, Any]]] = []
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
        run = self.run_class(self.scenario.rules(), BOUNDS, self.planner)
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
        return sum(host.present and host.up and not host.draining and host.name not in self.barred for host in self.hosts.values())

    def enough(self) -> bool:
        """Whether a run could go on, with a node to spare where a link is cut."""
        return self.usable() >= max(self.scenario.min_nodes, self.scenario.least) + bool(self.links.cut)

    def redundancy_was_whole(self) -> bool:
        """Whether all state had to be there all the time: processes ended, and nothing else was wrong; so few nodes at a time as there
        are copies; and some node has lost none."""
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
        self.hosts[member.node].lost_at = self.now
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

    # --- what runs on a rank ------------------------------------------------------------------------------------------------

    def common_fault(self, request: object) -> Refused | None:
        """What every rank fails with here."""
        if self.failing_step is not None and type(request) is orders.Step and request.step == self.failing_step:
            return Refused(FailKind.OWN, f"step {request.step} cannot be computed")
        return None

    def arrive(self, rank: RankModel, call: Call, lane: Lane) -> None:
        if not rank.alive:
            self._gone(rank, call)
            return
        until = rank.thaws if rank.thaws > rank.deaf else rank.deaf
        if until > self.now:
            self.later(until - self.now, self.arrive, rank, call, lane)
            return
        refused = rank.refusal(call)
        if refused is not None:
            self.fail(rank, call, refused)
        elif lane is Lane.COMPUTE:
            self.invariants.begins(rank, call)
            rank.queue.append(call)
            if rank.work is None:
                self._next(rank)
        elif lane is Lane.FILES:
            self._collect(rank, call)
        elif type(call.request) is orders.Probe:
            self._probe(rank, call)
        elif rank.work is None:
            self.answer(rank, call, rank.recalled())
        else:
            rank.recalls.append(call)
            self.later(call.request.seconds, self._recall_anyway, rank, call)

    def _recall_anyway(self, rank: RankModel, call: Call) -> None:
        if call in rank.recalls:
            if rank.thaws > self.now:
                self.later(rank.thaws - self.now, self._recall_anyway, rank, call)
                return
            rank.recalls.remove(call)
            self.answer(rank, call, rank.recalled())

    def _next(self, rank: RankModel) -> None:
        """The next call of the compute lane, or whoever waits for it to be free."""
        while rank.queue:
            call = rank.queue.popleft()
            refused = rank.refusal(call)
            if refused is None:
                try:
                    rank.work = rank.begin(call)
                except Refused as refusal:
                    refused = refusal
            if refused is None:
                rank.call, rank.fault = call, None
                self.go(rank, None)
                return
            self._failed(rank, call, refused)
        for call in rank.recalls:
            self.answer(rank, call, rank.recalled())
        rank.recalls.clear()

    def resume(self, rank: RankModel, value: object) -> None:
        """What it waited for has come, or will not come."""
        rank.ticket += 1
        self.later(self.delay(), self._resumed, rank, rank.ticket, value)

    _goes_on = resume

    def _resumed(self, rank: RankModel, ticket: int, value: object) -> None:
        if rank.ticket != ticket or not rank.alive or rank.hung:
            return
        if rank.thaws > self.now:
            self.later(rank.thaws - self.now, self._resumed, rank, ticket, value)
            return
        self.go(rank, value)

    def go(self, rank: RankModel, value: object) -> None:
        work = rank.work
        try:
            if type(value) is Refused:
                wanted = work.throw(value)
            else:
                rank.operation += 1
                wanted = work.send(value)
            if type(wanted) is float:
                rank.ticket += 1
                self.later(wanted, self._resumed, rank, rank.ticket, None)
                return
            kind, payload = wanted if type(wanted) is tuple else (wanted, None)
            group = rank.group
            if rank.broken or group.number <= rank.watermark or group.broken:
                self.go(rank, Refused(FailKind.ABORTED, "told to let go, or a peer has gone"))
                return
            meet(group, rank, kind, payload, self.links, self._goes_on, self.invariants.broken)
        except StopIteration as done:
            call, rank.work, rank.call = rank.call, None, None
            self.answer(rank, call, done.value)
            self._next(rank)
        except Refused as refused:
            call, rank.work, rank.call = rank.call, None, None
            if rank.waits is not None:
                raise AssertionError("a call ended while it waits") from refused
            self._failed(rank, call, refused)
            self._next(rank)

    def _failed(self, rank: RankModel, call: Call, refused: Refused) -> None:
        rank.fault = happened.Fault(refused.kind, refused.text)
        self.fail(rank, call, refused)

    def _collect(self, rank: RankModel, call: Call) -> None:
        begun = rank.writing.get(call.request.directory)
        if begun is None:
            self.fail(rank, call, Refused(FailKind.UNREADABLE, "nothing was begun"))
        else:
            done, keys = begun
            self.later(max(0.0, done - self.now) + 0.001, self._collected, rank, call, keys)

    def _collected(self, rank: RankModel, call: Call, keys: tuple[int, ...]) -> None:
        if not rank.alive:
            return
        if self.storage.has(call.request.directory, keys):
            self.answer(rank, call, Done())
        else:
            self.fail(rank, call, Refused(FailKind.UNREADABLE, "it could not be written"))

    def _probe(self, rank: RankModel, call: Call) -> None:
        lost = []
        for peer in call.request.peers:
            other = self.ranks.get(peer)
            if other is None or not other.alive or other.thaws > self.now or not self.links.both_ways(rank.member, peer):
                lost.append(peer)
        self.later(call.request.seconds if lost else self.delay(), self._probed, rank, call, tuple(lost))

    def _probed(self, rank: RankModel, call: Call, lost: tuple[Member, ...]) -> None:
        if rank.alive:
            self.answer(rank, call, Probed(lost))

    def _gone(self, rank: RankModel, call: Call) -> None:
        """A call to a process that is not there: a dead host says nothing."""
        coordinator = self.coordinator
        if self.hosts[rank.member.node].up and coordinator is not None and coordinator.epoch == call.call.epoch:
            coordinator.post(Failed(call.call, rank.member, FailKind.GONE, "its process has ended"), self.delay())

    def answer(self, rank: RankModel, call: Call, value: happened.Answer) -> None:
        self._reply(rank, Answered(call.call, rank.member, value))

    def fail(self, rank: RankModel, call: Call, refused: Refused) -> None:
        self._reply(rank, Failed(call.call, rank.member, refused.kind, refused.text))

    def _reply(self, rank: RankModel, event: Answered | Failed) -> None:
        coordinator = self.by_epoch(event.call.epoch)
        if coordinator is not None:
            coordinator.post(event, self.delay() + (rank.deaf - self.now if rank.deaf > self.now else 0.0))

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


class Coordinator:
    """One machine with what carries its commands out. thaws: until when it is frozen."""

    def __init__(self, world: World, epoch: int, run: Run):
        self.world, self.epoch, self.run = world, epoch, run
        self.alive, self.thaws = True, 0.0
        self.inbox: list[Event] = []
        self.connected: dict[Member, RankModel] = {}
        self.calls: dict[Member, dict[CallId, Call]] = {}
        self.fenced: set[Member] = set()
        self.listed: frozenset[str] = frozenset()
        self.clerk = Clerk(world, self)
        self._timer: float | None = None
        self._idle_ticks = 0
        self._carry_out = {
            Call: self._call, orders.Abort: self._abort, orders.Fence: self._fence, orders.Spawn: self._spawn,
            orders.Append: self._append, orders.WriteManifest: self._manifest, orders.Discard: self._discard,
            orders.NeedBatch: self._need_batch, orders.FindPlacement: self._find_placement, orders.Tell: self._tell,
            orders.EndRun: self._end,
        }

    def begin(self, members: tuple[Member, ...], left_behind: bool) -> None:
        world, listing = self.world, self.world.storage.listing()
        self.listed = frozenset(seen.directory for seen in listing)
        self.handle(happened.Started(self.epoch, members, world.storage.head(), listing, world.goal, left_behind))
        for host in world.hosts.values():
            if host.present:
                self.handle(happened.NodeJoined(Node(host.name, host.ranks)))
                if host.draining:
                    self.handle(happened.NodeDraining(host.name))
        for member in members:
            self.attach(member)
        self._listen()

    # --- events ------------------------------------------------------------------------------------------------------------

    def post(self, event: Event, delay: float) -> None:
        self.world.later(delay, self.receive, event)

    def receive(self, event: Event) -> None:
        if not self.alive:
            return
        if self.thaws > self.world.now:
            if not self.inbox:
                self.world.later(self.thaws - self.world.now, self._thaw)
            self.inbox.append(event)
            return
        self.handle(event)

    def _thaw(self) -> None:
        if self.thaws > self.world.now:
            self.world.later(self.thaws - self.world.now, self._thaw)
            return
        waiting, self.inbox = self.inbox, []
        for event in waiting:
            if self.alive:
                self.handle(event)

    def handle(self, event: Event) -> None:
        world, run = self.world, self.run
        kind = type(event)
        if kind is Answered or kind is Failed:
            open_ = self.calls.get(event.member)
            if open_ is not None:
                open_.pop(event.call, None)
        if world.trace is not None and kind is not happened.Heard and kind is not happened.Tick:
            world.note(f"[{self.epoch}] {event}")
        before = run.phase.name if world.trace is not None else ""
        for command in run.handle(event, world.now):
            if world.trace is not None:
                world.note(f"[{self.epoch}]     {command}")
            self._carry_out[type(command)](command)
        if world.trace is not None and run.phase.name != before:
            world.note(f"[{self.epoch}]     {before} -> {run.phase.name}")
        if self.alive:
            self._wake()

    def _wake(self) -> None:
        wake, now = self.run.wake, self.world.now
        if wake is not None and (self._timer is None or wake < self._timer or self._timer < now):
            self._timer = max(wake, now)
            self.world.later(self._timer - now, self._tick, self._timer)

    def _tick(self, due: float) -> None:
        if not self.alive or self._timer != due:
            return
        self._timer = None
        wake = self.run.wake
        if wake is None or wake > self.world.now + 1e-9:
            self._wake()
        elif self.thaws > self.world.now:
            self.world.later(self.thaws - self.world.now + 0.001, self._tick_again)
        else:
            self.handle(happened.Tick())
            wake = self.run.wake
            self._idle_ticks = self._idle_ticks + 1 if self.alive and wake is not None and wake <= self.world.now else 0
            if self._idle_ticks > 50:
                raise Violation("L6", f"wakes again and again, and nothing comes of it ({self.run.phase.name})")

    def _tick_again(self) -> None:
        if self.alive:
            self.receive(happened.Tick())

    def _listen(self) -> None:
        """Four times in the silence that is tolerated."""
        if not self.alive:
            return
        now = self.world.now
        self.world.later(SILENCE / 4, self._listen)
        if self.thaws > now:
            return
        chance, beats = self.world.random.random, {}
        for member, rank in self.connected.items():
            if rank.alive and rank.thaws <= now and rank.deaf <= now:
                rank.stopped_at = None
                beats[member] = Beat(now - 0.2 * chance(), rank.operation)
            else:
                beats[member] = Beat(rank.stopped_at if rank.stopped_at is not None else now - 0.2, rank.operation)
        self.handle(happened.Heard(beats))

    # --- connections --------------------------------------------------------------------------------------------------------

    def attach(self, member: Member) -> None:
        rank = self.world.ranks.get(member)
        if rank is not None:
            self.world.later(self.world.delay(), self._attached, rank)

    def _attached(self, rank: RankModel) -> None:
        world = self.world
        if not self.alive:
            return
        if not rank.alive:
            if world.hosts[rank.member.node].up:
                self.post(Ended(rank.member, "its process has ended"), world.delay())
            return
        until = max(rank.thaws, rank.deaf)
        if until > world.now:
            world.later(until - world.now + 0.01, self._attached, rank)
        elif rank.attach(self.epoch):
            world.later(world.delay(), self._hello, rank)

    def _hello(self, rank: RankModel) -> None:
        if self.alive and rank.alive:
            self.world.somebody_came = True
            self.connected[rank.member] = rank
            self.receive(happened.Hello(rank.member))

    def connection_ended(self, rank: RankModel) -> None:
        """Of a process: whoever called it is told, and whoever listened to it."""
        world, member = self.world, rank.member
        late = max(0.0, rank.deaf - world.now)
        if self.connected.pop(member, None) is not None:
            self.post(Ended(member, "its process has ended"), late + world.delay() / 4)
        for call in self.calls.pop(member, {}):
            self.post(Failed(call, member, FailKind.GONE, "its process has ended"), late + world.delay())

    # --- commands -----------------------------------------------------------------------------------------------------------

    def _call(self, call: Call) -> None:
        world, member = self.world, call.member
        lane = orders.lane_of(call.request)
        world.invariants.call(self, call, lane)
        rank = world.ranks.get(member)
        if rank is None:
            raise Violation("S8", f"{member} is called, and does not exist yet")
        self.calls.setdefault(member, {})[call.call] = call
        key = self.epoch, lane
        at = world.now + world.delay()
        before = rank.arrivals.get(key, 0.0)
        if at <= before:
            at = before + 1e-6
        rank.arrivals[key] = at
        world.later(at - world.now, world.arrive, rank, call, lane)

    def _abort(self, order: orders.Abort) -> None:
        for member in order.members:
            rank = self.world.ranks.get(member)
            if rank is not None:
                self.world.later(self.world.delay() / 4, self._aborted, rank, order.generation)

    def _aborted(self, rank: RankModel, generation: int) -> None:
        world = self.world
        if not rank.alive or rank.epoch > self.epoch:
            return
        until = max(rank.thaws, rank.deaf)
        if until > world.now:
            world.later(until - world.now, self._aborted, rank, generation)
            return
        rank.abort(generation)
        self.post(LetGo(rank.member, generation), world.delay() / 4)

    def _fence(self, order: orders.Fence) -> None:
        self.world.invariants.fence(self, order)
        rank = self.world.ranks.get(order.member)
        if rank is not None and self is self.world.coordinator:
            self.world.later(self.world.delay() / 8, self._end_process, rank)

    def _end_process(self, rank: RankModel) -> None:
        """A process that nobody can reach goes on until somebody can, and for a moment after that."""
        world = self.world
        until = max(rank.thaws, rank.deaf)
        if rank.alive and until > world.now:
            world.later(until - world.now + world.delay(), self._end_process, rank)
        else:
            world.kill(rank, quiet=not world.hosts[rank.member.node].up)

    def _spawn(self, order: orders.Spawn) -> None:
        world, member = self.world, order.member
        if self is not world.coordinator:
            return
        world.invariants.spawn(self, order)
        for rank in world.at(member.node, member.local):
            world.later(world.delay() / 8, self._end_process, rank)
        host = world.hosts.get(member.node)
        world.known[member.node, member.local] = member.incarnation
        birth = host.births.pop(0) if host is not None and host.births else ""
        if host is None or not host.up or birth == "never":
            if world.random.random() < 0.7:
                self.post(happened.NotMade(member, "there is no such node"), 0.5)
            return
        slow = 20.0 * world.random.random() if birth == "slow" else 0.0
        world.later(1.0 + slow + world.delay(), self._made, member, birth)

    def _made(self, member: Member, birth: str) -> None:
        world = self.world
        if world.known.get((member.node, member.local)) != member.incarnation or not world.hosts[member.node].up:
            return
        if any(rank.thaws <= world.now for rank in world.at(member.node, member.local)):
            world.later(0.5, self._made, member, birth)  # what is left there is being ended
            return
        rank = world.make(member)
        world.note(f"{member} is made{f' ({birth})' if birth else ''}")
        host = world.hosts[member.node]
        if host.ranks > 1 and world.now - host.lost_at < 2 * SILENCE:  # if others end now, it looks as if the node had gone
            world.harmed.add(member)
        if birth:
            BIRTHS[birth](world, rank)
        if birth != "mute" and world.coordinator is not None:
            world.coordinator.attach(member)

    def _append(self, order: orders.Append) -> None:
        self.world.invariants.append(self, order)
        self.clerk.order(order)

    def _manifest(self, order: orders.WriteManifest) -> None:
        self.world.invariants.manifest(self, order)
        self.clerk.order(order)

    def _discard(self, order: orders.Discard) -> None:
        self.world.invariants.discard(self, order)
        self.clerk.order(order)

    def _need_batch(self, order: orders.NeedBatch) -> None:
        world = self.world
        event = happened.BatchReady(order.step)
        if world.now < world.batches_fail_until:
            event = happened.BatchFailed(order.step, "the data cannot be read")
        self.post(event, world.delay())

    def _find_placement(self, order: orders.FindPlacement) -> None:
        chance = self.world.random.random()
        placement = None if chance < 0.3 else int(chance * 100) % self.world.planner.placements()
        self.post(happened.PlacementFound(order.step, placement), self.world.delay())

    def _tell(self, order: orders.Tell) -> None:
        self.world.told.append((order.kind, dict(order.details)))
        if order.kind == "barred":
            self.world.barred.add(order.details["node"])

    def _end(self, order: orders.EndRun) -> None:
        world = self.world
        world.invariants.end(self, order)
        self.alive = False
        if self is not world.coordinator:
            return
        if order.ending is happened.Ending.SUPERSEDED:
            if not world.superseded:
                raise Violation("L2", f"superseded by nobody: {order.text}")
            world.coordinator = None
            world.later(0.5, world.restart)
        else:
            world.outcome = order
