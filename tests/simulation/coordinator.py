"""One machine, with what carries its commands out: a model of the shell around it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from orchestrator.protocol import commands as orders
from orchestrator.protocol import events as happened
from orchestrator.protocol.commands import Call
from orchestrator.protocol.events import Answered, Beat, CallId, Ended, Event, Failed, FailKind, LetGo
from orchestrator.protocol.members import Member
from orchestrator.protocol.run import Run
from orchestrator.told.kinds import NodeBarred
from orchestrator.topology import Node
from tests.simulation.births import BIRTHS
from tests.simulation.invariants import Violation
from tests.simulation.rank_model import RankModel
from tests.simulation.settings import SILENCE
from tests.simulation.storage_model import Clerk

if TYPE_CHECKING:
    from tests.simulation.world import World


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
        self.snapshots: dict[str, int] = {}  # the generation of the last one in each folder
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
        if self.clerk.sees_the_ledger() and self.clerk.is_overtaken():
            self.handle(happened.LineRefused(0, happened.Ending.SUPERSEDED, "the ledger has lines of another coordinator"))
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
        if type(call.request) is orders.Snapshot:
            self.snapshots[call.request.directory] = call.generation
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
        if rank.keeps:
            return
        rank.abort(generation)
        self.post(LetGo(rank.member, generation), world.delay() / 4)

    def _fence(self, order: orders.Fence) -> None:
        self.world.invariants.fence(self, order)
        rank = self.world.ranks.get(order.member)
        if rank is not None:
            if self is not self.world.coordinator:  # it was replaced, and could not find that out
                self.world.harmed.add(rank.member)
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
        self.world.told.append(order.event)
        if isinstance(order.event, NodeBarred):
            self.world.barred.add(order.event.node)

    def _end(self, order: orders.EndRun) -> None:
        world = self.world
        world.invariants.end(self, order)
        self.alive, world.ended[self.epoch] = False, order.ending
        if self is not world.coordinator:
            return
        if order.ending is happened.Ending.SUPERSEDED:
            if not world.superseded:
                raise Violation("L2", f"superseded by nobody: {order.text}")
            world.coordinator = None
            world.later(0.5, world.restart)
        else:
            world.outcome = order
