"""The state of a run, and what an event does to it.

`handle` is all there is: an event and the time in, commands out; deterministic, without clock, thread, file or exception for what
may happen. What a run does at a time is a phase (phases.py has a table of them): it says what is waited for, what follows, and what
its deadline means. Trouble is answered alike in all of them: let go, recall, name who is to go, choose the state that goes on, finish,
plan, move. A coordinator that takes over begins in the middle of that.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from statistics import median
from typing import Any

from orchestrator.protocol import events as happened
from orchestrator.protocol.attendance import Attendance
from orchestrator.protocol.base import Planner
from orchestrator.protocol.commands import Append, Call, Command, EndRun, Line, NeedBatch, Request
from orchestrator.protocol.deadlines import Deadlines
from orchestrator.protocol.events import Base, CallId, Ending, Event, FailKind, Fault, Goal, Seen, WorkerAssignment
from orchestrator.protocol.interruption import Interruption
from orchestrator.protocol.members import Member, MembershipRules
from orchestrator.protocol.phases import Opening, Pausing, Phase, WaitingForNodes
from orchestrator.protocol.recovering import LettingGo
from orchestrator.protocol.stepping import next_step
from orchestrator.topology import Node

_TELLING = frozenset({FailKind.OWN, FailKind.NO_MEMORY, FailKind.UNREADABLE, FailKind.AWAY, FailKind.REFUSED})
_REMEMBERED_STEPS = 20
_MOST_TURNS = 64  # of one event: what would still be to do then is done at the next


class Run(Attendance):
    """One run under one coordinator. Made anew by each coordinator: nothing of it outlives one.

    epoch: of this coordinator. committed: steps whose line is durable. furthest: that ever were, when this coordinator began. pending:
    the committed step whose update rides on the next call; None: all have it. generation: the highest number used. waited_seconds: for
    nodes, since a step began. wake: when `Tick` is due; None: nothing is waited for.
    """

    def __init__(self, rules: MembershipRules, deadlines: Deadlines, planner: Planner):
        super().__init__(rules, deadlines, planner)
        self.epoch, self.goal = 0, Goal(0)
        self.committed, self.generation, self.pending = 0, 0, None
        self.furthest = 0
        self.checkpoints: list[Seen] = []
        self.phase: Phase = Phase()
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
        self.waited_seconds = 0.0
        self.broken_off: tuple[Seen, float, tuple[Member, ...]] | None = None
        self.data_away_since: float | None = None
        self.away_since: float | None = None
        self.release_at = self.change_since = 0.0
        self.stopping, self.ended, self.left_behind, self.loaded = False, False, False, False
        self.ending: tuple[Ending, str] | None = None
        self.committed_at = self.awake_since = 0.0
        self.step_seconds: deque[float] = deque(maxlen=_REMEMBERED_STEPS)
        self._calls = self._orders = 0
        self._asked_batch: int | None = None
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

    def snapshot(self) -> tuple:
        """What matters of the state, as a value."""
        return (self.epoch, self.committed, self.generation, self.pending, self.base, self.seated, self.phase.name, self.ended)

    # --- what phases use -----------------------------------------------------------------------------------------------------

    def enter(self, phase: Phase) -> None:
        """Go over to another phase."""
        self.phase = phase
        phase.since, phase.first_call = self.now, self._calls + 1
        phase.enter(self)

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

    def need_batch(self, step: int) -> None:
        """Have the batch of a step read, unless that has been asked for."""
        if step < self.goal.steps and step not in self.batches and self._asked_batch != step:
            self._asked_batch = step
            self.order(NeedBatch(step))

    def batch_again(self) -> None:
        """What was asked for may not come."""
        self._asked_batch = None

    def trouble(self, member: Member | None = None, reason: str = "") -> None:
        """Something does not go on: whoever that is due to, everybody lets go first. member, reason: the first sign of it."""
        if self.goal.replay and self.loaded:
            return self.end(Ending.OWN_FAULT, f"{member}: {reason}" if member is not None else reason or "somebody was lost")
        if self.interruption is None:
            self.interruption, self.change_since = Interruption(self.now, member, reason), self.now
        else:
            self.interruption.again(member, reason)
        self.interruption.first_call = self.phase.first_call
        self.phase.interrupted(self)
        self.placement = None
        self.enter(LettingGo())

    def wind_up(self, ending: Ending, text: str) -> None:
        """The run ends, once what is committed is saved. Not where it ends already."""
        if self.ending is None:
            self.ending = ending, text

    def end(self, ending: Ending, text: str = "") -> None:
        self.ended = True
        saved = self.newest_readable == self.committed and ending is not Ending.SUPERSEDED  # another one may have committed more
        self.order(EndRun(ending, text, self.committed, saved))

    @property
    def to_end(self) -> tuple[Ending, str] | None:
        """How it is to end where nothing can be saved, if it is to."""
        return self.ending or ((Ending.WAITED, "") if self.stopping else None)

    @property
    def newest_readable(self) -> int | None:
        """Committed steps in the newest checkpoint that can be read."""
        return max((seen.step for seen in self.checkpoints if seen.readable), default=None)

    def plan(self, nodes: tuple[Node, ...], base: Base | None) -> WorkerAssignment | None:
        """The layout for these nodes; in a repeated run the recorded one."""
        ready = self.membership.ready_members()
        if self.goal.replay:
            change = [change for change in self.goal.replay if change.step <= self.committed][-1]
            return self.planner.recorded(change.layout, change.placement, ready)
        return self.planner.plan(nodes, base, ready) if nodes else None

    def plan_now(self, base: Base | None) -> WorkerAssignment | None:
        """The layout for those who can be used; if there is none without those that were suspected, with them; if there is none without
        those that drain, with them, as long as they are there."""
        nodes, draining = self.decision.nodes, self.decision.draining
        return self.plan(self.usable, base) or self.plan(nodes, base) or (self.plan(nodes + draining, base) if draining else None)

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
        self.furthest = max(event.head.committed, event.head.furthest)
        self.checkpoints = sorted(event.checkpoints, key=lambda seen: seen.step)
        self.committed_at = self.awake_since = self.change_since = self.now
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
        if event.kind is FailKind.SUPERSEDED and event.call.epoch == self.epoch:  # not what was called by one before this
            return self.end(Ending.SUPERSEDED, f"{event.member} obeys another coordinator: {event.text}")
        if event.kind is FailKind.GONE:
            self.lose(event.member, "its process or node was lost")
        if self.interruption is not None and event.kind in _TELLING:
            self.interruption.faults.setdefault(event.member, Fault(event.kind, event.text, event.call))
        if event.call in self.phase.calls:
            self.phase.failed(self, event)
        elif self.saver.waits_for(event.call):
            self.saver.failed(self, event.call, event.kind, f"{event.member}: {event.text}")
        return None

    def _hello(self, event: happened.Hello) -> None:
        self._starting.pop(event.member, None)
        self.membership = self.membership.ready(event.member, self.now)
        self.phase.said_hello(self, event.member)

    def _heard(self, event: happened.Heard) -> None:
        self.membership = self.membership.listened({member: beat.at for member, beat in event.beats.items()}, self.now)
        self.phase.heard(self, event)

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
        """Tell the phase who is lost to it. The saver is told first: what it still waits for must not keep the phase that follows."""
        self.summon()
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
        self.committed_at += seconds
        self.expected_until += seconds
        self.phase.put_off(seconds)
        self.saver.put_off(seconds)
        self.away_since, self.data_away_since = (
            None if since is None else since + seconds for since in (self.away_since, self.data_away_since))
        self._starting = {member: since + seconds for member, since in self._starting.items()}

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

    def pause(self, seconds: float, then: Callable[[Run], None]) -> None:
        self.enter(Pausing(seconds, then))

    def wait_for_nodes(self, formed: bool) -> None:
        self.enter(WaitingForNodes(formed))
