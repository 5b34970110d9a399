"""One rank process, as far as the protocol can see it: what it holds, what it refuses, where it waits.

Calls are generators: they yield seconds (compute, or what takes time otherwise) or what they meet the others for, and return
their answer. No numbers are computed: state is a history for each key."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator
from typing import TYPE_CHECKING, Any

from orchestrator.protocol import commands as orders
from orchestrator.protocol.commands import Call, CallLane
from orchestrator.protocol.events import Done, FailKind, Fault, Formed, Holding, Recalled, Standing
from orchestrator.protocol.members import Member
from tests.simulation.histories import INITIAL, NEVER
from tests.simulation.network import Group

if TYPE_CHECKING:
    from tests.simulation.world import World

Work = Generator[Any, Any, Any]
CONNECTING = 20.0
"""Seconds that are tried to make groups over a link that is cut: more than may pass until everybody has let go."""


class Refused(Exception):
    """How a call fails."""

    def __init__(self, kind: FailKind, text: str):
        super().__init__(text)
        self.kind, self.text = kind, text


class State:
    """Of one generation. content: history by key; replaced, never changed. applied: as the rank tells it."""

    __slots__ = ("applied", "content", "epoch", "layout", "placement", "rank")

    def __init__(self, layout: int, placement: int, rank: int, content: dict[int, int], applied: int | None, epoch: int):
        self.layout, self.placement, self.rank, self.content, self.applied = layout, placement, rank, content, applied
        self.epoch = epoch


class RankModel:
    """thaws: until when the process is frozen. deaf: until when nothing passes between it and coordinators. hung: its compute
    lane never goes on. keeps: it beats, but does not let go. operation: of the heartbeat. ills: what its next calls fail with, by request type."""

    counts_from_form = False
    ignores_epochs = False
    keeps_newer_generations = False
    forgets_aborts = False

    def __init__(self, world: World, member: Member):
        self.world, self.member = world, member
        self.keeps = False
        self.alive, self.hung, self.thaws, self.deaf, self.slowness = True, False, 0.0, 0.0, 1.0
        self.stopped_at: float | None = None
        self.epoch, self.watermark, self.operation = 0, 0, 0
        self.ills: dict[type, list[Refused]] = {}
        self.arrivals: dict[tuple[int, CallLane], float] = {}
        # state
        self.held: dict[int, State] = {}
        self.newest: int | None = None
        self.reduced: int | None = None
        self.reduced_in: Group | None = None
        self.published = False
        # compute lane
        self.queue: deque[Call] = deque()
        self.call: Call | None = None
        self.work: Work | None = None
        self.ticket = 0
        self.fault: Fault | None = None
        self.recalls: list[Call] = []
        # groups
        self.group: Group | None = None
        self.broken, self.met, self.waits = False, 0, None
        self.writing: dict[str, tuple[float, tuple[tuple[int, int], ...]]] = {}

    # --- what its two hosts, the call server and the heartbeat, do -----------------------------------------------------------

    def attach(self, epoch: int) -> bool:
        """Whether it obeys the coordinator of that epoch from now on."""
        if epoch < self.epoch:
            return False
        if epoch > self.epoch:
            self._obey(epoch)
        return True

    def _obey(self, epoch: int) -> None:
        self.epoch, self.watermark = epoch, 0
        if not self.ignores_epochs:
            self._break_off()

    def abort(self, generation: int) -> None:
        if not self.forgets_aborts:
            self.watermark = max(self.watermark, generation)
        if self.group is not None and self.group.number <= generation:
            self._break_off()

    def finds_broken(self, group: Group, kind: str) -> bool:
        """Whether it cannot meet its group for this. Who is alone has nobody to let go of; who has not met anybody yet does not know
        who has ended."""
        if kind == "met":
            return self.broken or group.number <= self.watermark
        return len(group.members) > 1 and (self.broken or group.number <= self.watermark or group.broken)

    def _break_off(self) -> None:
        """Whatever it communicates ends, and its groups are of no use any more."""
        self.broken = True
        if self.waits is not None:
            self.waits.waiting.remove(self)
            self.waits = None
            self.world.resume(self, Refused(FailKind.ABORTED, "told to let go"))

    def peer_ended(self) -> None:
        """Of a member of the group, whose connections have told so: there are none yet where the group is about to be made."""
        if self.waits is not None and self.waits.kind != "met":
            self.waits.waiting.remove(self)
            self.waits = None
            self.world.resume(self, Refused(FailKind.ABORTED, "a peer has gone"))

    def end(self) -> None:
        self.alive = False
        self.ticket += 1
        self.work = self.call = self.waits = None
        self.queue.clear()
        self.recalls.clear()

    def refusal(self, call: Call) -> Refused | None:
        """Of a call that comes, or that is to begin."""
        epoch = call.call.epoch
        if epoch > self.epoch:
            self._obey(epoch)
        elif epoch < self.epoch and not self.ignores_epochs:
            return Refused(FailKind.SUPERSEDED, f"epoch {self.epoch} is obeyed here")
        if type(call.request) not in _OF_NO_GENERATION and call.generation <= self.watermark:
            return Refused(FailKind.ABORTED, f"generation {self.watermark} was given up")
        return None

    def recalled(self) -> Recalled:
        held = tuple(Holding(number, state.layout, state.placement, state.rank, state.applied, state.epoch)
                     for number, state in self.held.items())
        return Recalled(held, self.reduced, self.published, self.call.call if self.call else None, self.fault,
                        self.call is not None and type(self.call.request) is orders.Form)

    @property
    def state(self) -> State:
        return self.held[self.newest]

    # --- calls of the compute lane ------------------------------------------------------------------------------------------

    def begin(self, call: Call) -> Work:
        request = call.request
        kind = type(request)
        if kind not in _ANYWHERE and not self._is_in(call.generation) and (kind is not orders.Rearrange or self.newest is None):
            raise Refused(FailKind.ABORTED, f"it is in generation {self.newest}")
        return _WORK[kind](self, call, request)

    def _is_in(self, generation: int) -> bool:
        """Whether it takes part there, with state."""
        return self.newest == generation and self.group is not None and self.group.number == generation

    def back_to(self, generation: int | None) -> None:
        self.held = {known: state for known, state in self.held.items() if known == generation}
        if self.newest != generation:
            self.reduced, self.published = None, False
        self.newest = generation if self.held else None

    def settle(self) -> None:
        if len(self.held) > 1:
            self.held = {self.newest: self.held[self.newest]}

    def ill(self, request: object) -> None:
        """Raises what this call is to fail with, if anything."""
        if self.ills and (found := self.ills.get(type(request))):
            raise found.pop(0)
        if (common := self.world.common_fault(request)) is not None:
            raise common

    def finish(self, call: Call, request: orders.Finish) -> Work:
        if not self.keeps_newer_generations:
            self.back_to(request.base)
        if self.newest is None:
            return Standing(None, None, False)
        if request.apply is not None and self.reduced == request.apply and self.state.applied == request.apply:
            self.update(request.apply)
        return Standing(self.newest, self.state.applied, self.published)
        yield  # a generator, as the others

    def form(self, call: Call, request: orders.Form) -> Work:
        plan, former, world = request.plan, request.former, self.world
        everybody = plan.members + plan.leaving if former else plan.members
        base = former.base.generation if former else None
        self.back_to(base)
        self.group, self.broken, self.met = world.group(call.call.epoch, call.generation, everybody), False, 0
        rank = self.group.index[self.member]
        was_published = self.published
        brings = former is not None and former.came_from[rank] is not None
        if brings:
            world.invariants.brings(self, former, rank)
            if base not in self.held or self.held[base].applied != former.applied:
                raise Refused(FailKind.ABORTED, f"state of {former.applied} steps of generation {base} is not here")
        yield "met"
        if world.links.cut and not all(world.links.whole(one, other) for one in everybody for other in everybody):
            yield CONNECTING  # whoever it is between: nobody has all connections, and no abort ends that
            raise Refused(FailKind.ABORTED, "no connection within the time for it")
        self.ill(request)
        payload = self.held[base].content if brings else None
        meeting = yield "moved", payload
        if rank >= len(plan.members):
            return Formed()
        if meeting.result is None:
            meeting.result = world.invariants.moved(meeting.payloads, former)
        keys = world.planner.owned(plan.layout, plan.placement).by_rank[rank]
        content = {key: meeting.result[key] if former else NEVER for key in keys}
        applied = former.applied if former else 0 if self.counts_from_form else None
        self.held[call.generation] = State(plan.layout, plan.placement, rank, content, applied, call.call.epoch)
        self.newest = call.generation
        self.reduced, self.published = None, False
        if former is not None:
            if plan.leaving:
                self.group, self.met = world.group(call.call.epoch, call.generation, plan.members), 0
            yield "published"
            self.published = former.publish or not brings or was_published
        return Formed()

    def _load(self, content: dict[int, int], applied: int) -> Work:
        state = self.state
        state.content, state.applied, self.reduced, self.published = content, None, None, False
        yield "published"
        self.published = True
        state.applied = applied

    def initialise(self, call: Call, request: orders.Initialise) -> Work:
        self.settle()
        self.ill(request)
        yield from self._load(dict.fromkeys(self.state.content, INITIAL), 0)
        return Done()

    def restore(self, call: Call, request: orders.Restore) -> Work:
        self.settle()
        self.ill(request)
        yield self.world.delay()
        content = self.world.storage.read(request.directory, request.step, self.state.content)
        if content is None:
            if self.world.now < self.world.storage.unread_until:
                raise Refused(FailKind.AWAY, f"{request.directory} cannot be read now")
            raise Refused(FailKind.UNREADABLE, f"{request.directory} is damaged")
        yield from self._load(content, request.step)
        return Done()

    def step(self, call: Call, request: orders.Step) -> Work:
        self.settle()
        if request.apply is not None:
            self.update(request.apply)
            yield "published"
            self.published = True
        if self.state.applied != request.step:
            raise Refused(FailKind.ABORTED, f"step {request.step} on a state of {self.state.applied} steps")
        self.reduced = self.reduced_in = None
        if not self.published:
            self.world.invariants.broken(f"step {request.step} is computed with weights that are not those of the state")
        yield self.world.compute() * self.slowness
        self.ill(request)
        meeting = yield "reduced", next(iter(self.state.content.values()), None)
        if meeting.result is None:
            meeting.result = self.world.invariants.reduced(meeting.payloads, request.step)
        self.reduced, self.reduced_in = request.step, self.group
        return Done()

    def update(self, step: int) -> None:
        state = self.state
        if state.applied != step:
            raise Refused(FailKind.ABORTED, f"it has {state.applied} updates: that of step {step} is not due")
        group = self.reduced_in
        if self.reduced != step or group is None:
            raise Refused(FailKind.ABORTED, f"it has no gradients of step {step}")
        known, after = {}, self.world.histories.after
        for history in state.content.values():
            if history not in known:
                self.world.invariants.may_be_updated(self, history, step)
                known[history] = after(history, step, group.epoch, group.number)
        state.content = {key: known[history] for key, history in state.content.items()}
        state.applied, self.published = step + 1, False

    def apply(self, call: Call, request: orders.Apply) -> Work:
        self.settle()
        self.ill(request)
        self.update(request.step)
        yield "published"
        self.published = True
        return Done()

    def rearrange(self, call: Call, request: orders.Rearrange) -> Work:
        self.settle()
        self.ill(request)
        state, world = self.state, self.world
        self.group = world.group(call.call.epoch, call.generation, self.group.members)
        self.met = 0
        yield "met"
        meeting = yield "moved", state.content
        if meeting.result is None:
            meeting.result = world.invariants.moved(meeting.payloads, None)
        keys = world.planner.owned(state.layout, request.placement).by_rank[state.rank]
        content = {key: meeting.result[key] for key in keys}
        self.held[call.generation] = State(state.layout, request.placement, state.rank, content, state.applied, call.call.epoch)
        self.newest = call.generation
        was_published, self.reduced, self.published = self.published, None, False
        yield "published"
        self.published = was_published
        return Formed()

    def evaluate(self, call: Call, request: orders.Evaluate) -> Work:
        if not self.published:
            self.world.invariants.broken("evaluated with weights that are not those of the state")
        yield self.world.compute() * self.slowness
        self.ill(request)
        yield "evaluated"
        return Done()

    def snapshot(self, call: Call, request: orders.Snapshot) -> Work:
        self.settle()
        self.ill(request)
        state = self.state
        first = self.world.planner.owned(state.layout, state.placement).first[state.rank]
        pieces = {(call.generation, key): state.content[key] for key in first}
        self.writing[request.directory] = self.world.storage.write_pieces(self, request.directory, pieces), tuple(pieces)
        return Done()
        yield  # a generator, as the others


_OF_NO_GENERATION = frozenset({orders.Recall, orders.Finish, orders.Probe, orders.Collect})
_ANYWHERE = frozenset({orders.Finish, orders.Form})
_WORK = {
    orders.Finish: RankModel.finish, orders.Form: RankModel.form, orders.Initialise: RankModel.initialise,
    orders.Restore: RankModel.restore, orders.Step: RankModel.step, orders.Apply: RankModel.apply,
    orders.Rearrange: RankModel.rearrange, orders.Evaluate: RankModel.evaluate, orders.Snapshot: RankModel.snapshot,
}

