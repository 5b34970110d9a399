"""The state of a run, and what an event does to it.

`handle` is all there is: an event and the time in, commands out; deterministic, without clock, thread, file or exception for what
may happen. What a run does at a time is a phase (phases.py, changes.py, saves.py): it says what is waited for, what follows, and what
its deadline means. Trouble is answered alike in all of them: let go, recall, name who is to go, choose the state that goes on, finish,
plan, move. A coordinator that takes over begins in the middle of that.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from statistics import median
from typing import Any

from orchestrator.membership import Decision, Member, Membership, Rules
from orchestrator.protocol import events as happened
from orchestrator.protocol.commands import Abort, Append, Call, Command, EndRun, Fence, Line, NeedBatch, Request, Spawn, Tell
from orchestrator.protocol.deadlines import Deadlines
from orchestrator.protocol.events import Base, CallId, Ending, Event, FailKind, Fault, Goal, Plan, Seen
from orchestrator.protocol.interruption import Interruption, Trials
from orchestrator.protocol.phases import Opening, Pausing, Phase, WaitingForNodes
from orchestrator.protocol.planner import Planner
from orchestrator.protocol.recovering import LettingGo
from orchestrator.protocol.saving import Saver
from orchestrator.protocol.stepping import next_step
from orchestrator.topology import Node

_TELLING = frozenset({FailKind.OWN, FailKind.NO_MEMORY, FailKind.UNREADABLE, FailKind.AWAY, FailKind.REFUSED})
_REMEMBERED_STEPS = 20
_MOST_TURNS = 64  # of one event: what would still be to do then is done at the next


class Run:
    """One run under one coordinator. Made anew by each coordinator: nothing of it outlives one.

    epoch: of this coordinator. committed: steps whose line is durable. pending: the committed step whose update rides on the next
    call; None: all have it. base: the generation whose state goes on; None: none has. seated: who serves in it, by rank.
    generation: the highest number used. wake: when `Tick` is due; None: nothing is waited for.
    """

    def __init__(self, rules: Rules, deadlines: Deadlines, planner: Planner):
        self.bounds, self.planner, self.membership = deadlines, planner, Membership(rules)
        self.epoch, self.goal, self.now = 0, Goal(0), 0.0
        self.committed, self.generation, self.pending = 0, 0, None
        self.base: Base | None = None
        self.seated: tuple[Member, ...] = ()
        self.planned: tuple[Node, ...] = ()
        self.checkpoints: list[Seen] = []
        self.phase: Phase = Phase()
        self.saver = Saver()
        self.trials = Trials()
        self.interruption: Interruption | None = None
        self.due: set[str] = set()
        self.placement: int | None = None
        self.validated: int | None = None
        self.batches: set[int] = set()
        self.loading: Seen | None = None
        self.taking_part: set[Member] = set()
        self.redone, self.troubles_at_the_end = 0, 0
        self.repeated: int | None = None
        self.told_lost_at: int | None = None
        self.away_since: float | None = None
        self.release_at = self.change_since = 0.0
        self.stopping, self.ended, self.left_behind, self.loaded = False, False, False, False
        self.ending: tuple[Ending, str] | None = None
        self.committed_at = self.awake_since = 0.0
        self.step_seconds: deque[float] = deque(maxlen=_REMEMBERED_STEPS)
        self._out: list[Command] = []
        self._calls = self._orders = 0
        self._starting: dict[Member, float] = {}
        self._never: set[Member] = set()
        self._opens: float | None = None
        self._asked_batch: int | None = None
        self._told: dict[str, Any] = {}
        self._handlers: dict[type, Callable[[Any], None]] = {
            happened.Started: self._started, happened.Answered: self._answered, happened.Failed: self._failed,
            happened.Hello: self._hello, happened.Ended: self._connection_ended, happened.Heard: self._heard,
            happened.LetGo: lambda event: self.phase.let_go(self, event),
            happened.NodeJoined: self._node_joined, happened.NodeLeft: self._node_left,
            happened.NodeDraining: self._node_draining, happened.NodeStays: self._node_stays, happened.NotMade: self._not_made,
            happened.Stored: self._stored, happened.StoreFailed: self._store_failed, happened.LineRefused: self._line_refused,
            happened.BatchReady: self._batch_ready, happened.BatchFailed: self._batch_failed,
            happened.PlacementFound: lambda event: self.phase.placement_found(self, event),
            happened.StopAsked: self._stop_asked, happened.Tick: lambda event: None}

    # --- events in, commands out ---------------------------------------------------------------------------------------------

    def handle(self, event: Event, now: float) -> list[Command]:
        """What follows from an event at `now`, in seconds of any clock that does not go back."""
        if self.ended:
            return []
        self._out, before = [], self.membership
        if now - self.now > self.bounds.silence / 2:  # this side was away, and heard nobody: what is overdue is nobody's fault yet
            self._put_off(now - self.now)
            self.awake_since = now
        self.now = now
        self._handlers[type(event)](event)
        look = isinstance(event, happened.Tick | happened.Heard)
        for _ in range(_MOST_TURNS):
            if self.ended:
                break
            if look or self.membership is not before:
                before, look = self.membership, False
                self._look()
            elif not self._meet_deadline():
                break
        return self._out

    @property
    def wake(self) -> float | None:
        found = [at for at in (self.phase.deadline, self.saver.deadline) if at is not None]
        found += [since + self.bounds.start for since in self._starting.values()]
        if self._opens is not None:
            found.append(self._opens)
        return min(found, default=None)

    def trusts(self, member: Member) -> bool:
        """Whether it is ready and was never lost."""
        return self.membership.trusts(member)

    def snapshot(self) -> tuple:
        """What matters of the state, as a value."""
        return (self.epoch, self.committed, self.generation, self.pending, self.base, self.seated, self.phase.name, self.ended)

    # --- what phases use -----------------------------------------------------------------------------------------------------

    def enter(self, phase: Phase) -> None:
        """Go over to another phase."""
        self.phase = phase
        phase.since = self.now
        phase.enter(self)

    def order(self, command: Command) -> None:
        self._out.append(command)

    def call(self, member: Member, request: Request) -> CallId:
        self._calls += 1
        number = CallId(self.epoch, self._calls)
        self.order(Call(number, member, self.generation, request))
        return number

    def new_order(self) -> int:
        self._orders += 1
        return self._orders

    def append(self, line: Line) -> int:
        number = self.new_order()
        self.order(Append(number, line))
        return number

    def tell(self, kind: str, **details: Any) -> None:
        self.order(Tell(kind, details))

    def tell_once(self, kind: str, key: str, value: Any, **details: Any) -> None:
        """Unless the last thing told under `key` was the same."""
        if self._told.get(key) != value:
            self._told[key] = value
            self.tell(kind, **details)

    def forget_told(self, key: str) -> None:
        self._told.pop(key, None)

    def need_batch(self, step: int) -> None:
        """Have the batch of a step read, unless that has been asked for."""
        if step < self.goal.steps and step not in self.batches and self._asked_batch != step:
            self._asked_batch = step
            self.order(NeedBatch(step))

    def batch_again(self) -> None:
        """What was asked for may not come."""
        self._asked_batch = None

    def lose(self, member: Member, reason: str, *, fence: bool = False, cool: bool = False) -> None:
        """A member is lost. fence: its process may live, and is to be ended. cool: not to be tried again at once."""
        self._starting.pop(member, None)
        if member.incarnation < self.membership.trusted_from(member.node, member.local):
            return
        if cool:
            self.trials.suspected.add(member.node)
            self.membership = self.membership.suspected(member, self.now, reason)
        else:
            self.membership = self.membership.ended(member, self.now, reason)
        if self.trials.failed(member, self.now):
            self.tell("barred", member=str(member), node=member.node, reason=reason,
                      tried=self.trials.most)
        if fence:
            self.order(Fence(member, reason))

    def still_starts(self, member: Member) -> None:
        """It is there, as far as is known, but has not said so: nobody waits for it, and it has its time."""
        self._starting[member] = self.now

    def trouble(self, member: Member | None = None, reason: str = "") -> None:
        """Something does not go on: whoever that is due to, everybody lets go first. member, reason: the first sign of it."""
        if self.goal.replay and self.loaded:
            return self.end(Ending.OWN_FAULT, f"{member}: {reason}" if member is not None else reason or "somebody was lost")
        if self.interruption is None:
            self.interruption, self.change_since = Interruption(self.now, member, reason), self.now
        else:
            self.interruption.again(member, reason)
        self.placement = None
        self.enter(LettingGo())

    def wind_up(self, ending: Ending, text: str) -> None:
        """The run ends, once what is committed is saved. Not where it ends already."""
        if self.ending is None:
            self.ending = ending, text

    def end(self, ending: Ending, text: str = "") -> None:
        self.ended = True
        self.order(EndRun(ending, text, self.committed, self.newest_readable == self.committed))

    @property
    def newest_readable(self) -> int | None:
        """Committed steps in the newest checkpoint that can be read."""
        return max((seen.step for seen in self.checkpoints if seen.readable), default=None)

    @property
    def decision(self) -> Decision:
        """What follows from who is there."""
        return self.membership.decide(self.seated, self.now, self.planned)

    def plan(self, nodes: tuple[Node, ...], base: Base | None) -> Plan | None:
        """The layout for these nodes; in a repeated run the recorded one."""
        ready = self.membership.ready_members()
        if self.goal.replay:
            change = [change for change in self.goal.replay if change.step <= self.committed][-1]
            return self.planner.recorded(change.layout, change.placement, ready)
        return self.planner.plan(nodes, base, ready) if nodes else None

    def plan_now(self, base: Base | None) -> Plan | None:
        """The layout for those who can be used; if there is none without those that were suspected, with them."""
        return self.plan(self.usable, base) or self.plan(self.decision.nodes, base)

    @property
    def step_median(self) -> float | None:
        return median(self.step_seconds) if self.step_seconds else None

    @property
    def release_seconds(self) -> float:
        return max(self.bounds.release, 2 * (self.step_median or 0.0))

    # --- what happens --------------------------------------------------------------------------------------------------------

    def _started(self, event: happened.Started) -> None:
        self.epoch, self.goal, self.left_behind = event.epoch, event.goal, event.left_behind
        self.committed, self.generation = event.head.committed, event.head.generation
        self.checkpoints = sorted(event.checkpoints, key=lambda seen: seen.step)
        self.committed_at = self.awake_since = self.now
        counts: dict[str, int] = {}
        for member in event.members:
            counts[member.node] = max(counts.get(member.node, 0), member.local + 1)
        self.planned = tuple(Node(name, count) for name, count in counts.items())
        for node in self.planned:
            self.membership = self.membership.node_joined(node, self.now)
        for member in event.members:
            self.membership = self.membership.started(member, self.now)
        self.seated = event.members
        self.enter(Opening(event.members, self.bounds.adopt if event.left_behind else self.bounds.start))

    def _answered(self, event: happened.Answered) -> None:
        if event.call in self.phase.calls:
            self.phase.answered(self, event)
        elif self.saver.waits_for(event.call):
            self.saver.answered(self, event.call)

    def _failed(self, event: happened.Failed) -> None:
        if event.kind is FailKind.SUPERSEDED:
            return self.end(Ending.SUPERSEDED, f"{event.member} obeys another coordinator: {event.text}")
        if event.kind is FailKind.GONE:
            self.lose(event.member, "its process or node was lost")
        if self.interruption is not None and event.kind in _TELLING:
            self.interruption.faults.setdefault(event.member, Fault(event.kind, event.text))
        if event.call in self.phase.calls:
            self.phase.failed(self, event)
        elif self.saver.waits_for(event.call):
            self.saver.failed(self, event.call, event.kind, f"{event.member}: {event.text}")
        return None

    def _hello(self, event: happened.Hello) -> None:
        self._starting.pop(event.member, None)
        self.membership = self.membership.ready(event.member, self.now)
        self.phase.said_hello(self, event.member)

    def _connection_ended(self, event: happened.Ended) -> None:
        self.lose(event.member, f"its process or node ended ({event.how})")

    def _heard(self, event: happened.Heard) -> None:
        self.membership = self.membership.listened({member: beat.at for member, beat in event.beats.items()}, self.now)
        self.phase.heard(self, event)

    def _node_joined(self, event: happened.NodeJoined) -> None:
        if not self.membership.present(event.node.name):
            self.trials.forgive(event.node.name)
        self.membership = self.membership.node_joined(event.node, self.now)

    def _node_left(self, event: happened.NodeLeft) -> None:
        self.membership = self.membership.node_left(event.name, self.now, event.reason)

    def _node_draining(self, event: happened.NodeDraining) -> None:
        self.membership = self.membership.node_draining(event.name, event.deadline, self.now)

    def _node_stays(self, event: happened.NodeStays) -> None:
        self.membership = self.membership.node_undrained(event.name, self.now)
        self.forget_told("nowhere")

    def _not_made(self, event: happened.NotMade) -> None:
        self._never.add(event.member)
        self.lose(event.member, event.reason, cool=True)

    def _stored(self, event: happened.Stored) -> None:
        if event.order == self.phase.order:
            self.phase.stored(self)
        else:
            self.saver.stored(self, event.order)

    def _store_failed(self, event: happened.StoreFailed) -> None:
        if event.order == self.phase.order:
            self.phase.not_stored(self, event.text)
        else:
            self.saver.not_stored(self, event.order, event.text)

    def _line_refused(self, event: happened.LineRefused) -> None:
        if event.ending is Ending.SUPERSEDED:
            self.end(event.ending, event.text)
        elif event.order == self.phase.order:
            self.phase.refused(self, event.ending, event.text)

    def _batch_ready(self, event: happened.BatchReady) -> None:
        if event.step == self._asked_batch:
            self.batches.add(event.step)
            self.phase.batch_ready(self)

    def _batch_failed(self, event: happened.BatchFailed) -> None:
        if event.step == self._asked_batch:
            self.batch_again()
            if event.lasting:
                self.wind_up(Ending.OWN_FAULT, f"the data of step {event.step} cannot be read: {event.text}")
            self.phase.batch_failed(self, event.text)

    def _stop_asked(self, event: happened.StopAsked) -> None:
        self.stopping = True
        self.phase.stop_asked(self)

    # --- who is there, and how late it is ------------------------------------------------------------------------------------

    def _look(self) -> None:
        """Have processes started and ended as who is there demands, and tell the phase who is lost to it."""
        for member, since in list(self._starting.items()):
            if not self.membership.may_come(member):
                del self._starting[member]
            elif self.now >= since + self.bounds.start:
                self.lose(member, f"did not start within {self.bounds.start:g} s", fence=True, cool=True)
        decision = self.decision
        for member in decision.fence:
            self.order(Fence(member, "it was given up, yet is heard from"))
        for member in decision.start:
            if member not in self._never and not self.trials.bars(member):
                self.membership = self.membership.started(member, self.now)
                self._starting[member] = self.now
                self.order(Spawn(member))
        self._opens = self.membership.next_change(self.now)
        self._tell_idle(decision)
        self.saver.look(self)
        while dead := [member for member in self.phase.involved(self) if not self.trusts(member)]:
            phase = self.phase
            self.phase.lost(self, dead)
            if self.ended or self.phase is phase:
                break
        if not self.ended:
            self.phase.changed(self)

    def _put_off(self, seconds: float) -> None:
        self.release_at += seconds
        for holder in (self.phase, self.saver):
            if holder.deadline is not None:
                holder.deadline += seconds
        self._starting = {member: since + seconds for member, since in self._starting.items()}

    def _tell_idle(self, decision: Decision) -> None:
        """Why a node that is there is not used, and until when: once for each loss."""
        for name, until in self.membership.cooling(self.now):
            self.tell_once("idle", f"idle {name}", until, node=name, reason=decision.reasons.get(name, ""),
                           seconds=round(until - self.now, 1))

    def _meet_deadline(self) -> bool:
        """Whether one has passed."""
        if self.phase.deadline is not None and self.now >= self.phase.deadline:
            self.phase.deadline = None
            self.phase.late(self)
        elif self.saver.deadline is not None and self.now >= self.saver.deadline:
            self.saver.late(self)
        else:
            return False
        return True

    # --- shared turns --------------------------------------------------------------------------------------------------------

    def go_on(self) -> None:
        """Between two things: what comes next."""
        next_step(self)

    def dead(self, members: Iterable[Member]) -> list[Member]:
        return [member for member in members if not self.trusts(member)]

    def safe_without(self, member: Member) -> bool:
        """Whether all state of the base lives on if this one goes."""
        base = self.base
        if base is None:
            return True
        left = [other for other in base.members if other is not None and other != member and self.trusts(other)]
        return self.planner.covered(base, left) is None

    def pause(self, seconds: float, then: Callable[[Run], None]) -> None:
        self.enter(Pausing(seconds, then))

    def wait_for_nodes(self, formed: bool) -> None:
        self.enter(WaitingForNodes(formed))

    @property
    def usable(self) -> tuple[Node, ...]:
        """Nodes for the next generation: without those of which one was suspected since the last committed step, if that leaves as
        many as are wanted at least."""
        nodes = self.decision.nodes
        left = tuple(node for node in nodes if node.name not in self.trials.suspected)
        return left if len(left) >= max(1, self.membership.rules.min_nodes) else nodes

    @property
    def has_enough(self) -> bool:
        """Whether those who serve are on as many nodes as the run wants at least."""
        return len({member.node for member in self.seated}) >= self.membership.rules.min_nodes

    def newcomers(self) -> set[Member]:
        """Those on trial."""
        return self.trials.on_trial
