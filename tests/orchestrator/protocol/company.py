"""A perfect world for the state machine: everybody answers at once, in order, unless a test says otherwise."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

from orchestrator.protocol import commands, events
from orchestrator.protocol.deadlines import Deadlines
from orchestrator.protocol.events import Beat, Goal, Head, Holding, Recalled, Seen, Standing
from orchestrator.protocol.members import Member, MembershipRules
from orchestrator.protocol.run import Run
from orchestrator.topology import Node


class Halves:
    """A planner of two keys: rank i owns key i % 2 and, where there are others, the next rank owns it too."""

    def plan(self, nodes, base, ready):
        members = {(member.node, member.local): member for member in ready}
        chosen = tuple(members[node.name, local] for node in nodes for local in range(node.ranks) if (node.name, local) in members)
        return events.WorkerAssignment(len(chosen), 0, chosen, nodes) if chosen else None

    def recorded(self, layout, placement, ready):
        return events.WorkerAssignment(layout, placement, tuple(sorted(ready)[:layout]), ()) if len(ready) >= layout else None

    def _owners(self, size: int, key: int) -> set[int]:
        return {key % size, (key + 1) % size}

    def covered(self, base, having):
        size, members = base.layout, dict(enumerate(base.members))
        for key in range(size):
            if not any(members.get(rank) in having for rank in self._owners(size, key)):
                return f"no owner is left of key {key}"
        return None

    def hands_over(self, base, plan, having):
        return tuple(member for member in having if member not in plan.members) if self.covered(
            base, set(having) & set(plan.members)) else ()

    def same_layout(self, base, plan):
        return plan.members == base.members


class Company:
    """Members that do what they are told. `told`: events for users, by kind. `deaf`: members that answer nothing. `finished`:
    what beats say of operations. `twist`: has the first look at every command; what it returns (a list of events) replaces the
    answer."""

    def __init__(self, nodes: int = 3, *, goal: Goal = Goal(6), checkpoints: tuple[Seen, ...] = (), head: Head = Head(),
                 rules: MembershipRules = MembershipRules(silence_seconds=1.5, cool_down_seconds=5.0),
                 bounds: Deadlines = Deadlines(),
                 left_behind: bool = False):
        self.run, self.now, self.goal = Run(rules, bounds, Halves()), 0.0, goal
        self.members = tuple(Member(chr(97 + number), 0) for number in range(nodes))
        self.alive = set(self.members)
        self.deaf: set[Member] = set()
        self.finished: dict[Member, int] = {}
        self.held: dict[Member, dict[int, Holding]] = {member: {} for member in self.members}
        self.reduced: dict[Member, int | None] = {}
        self.faults: dict[Member, events.Fault] = {}
        self.ledger: list[commands.Line] = []
        self.told: list[commands.Tell] = []
        self.commands: list[commands.Command] = []
        self.ended: commands.EndRun | None = None
        self.twist: Callable[[commands.Command], list[events.Event] | None] = lambda command: None
        self._queue: deque[events.Event] = deque()
        self.tell(events.Started(1, self.members, head, checkpoints, goal, left_behind))
        for member in self.members:
            self.tell(events.Hello(member))

    def tell(self, event: events.Event) -> None:
        self._queue.append(event)

    def kinds(self) -> list[str]:
        return [tell.event.name for tell in self.told]

    def details(self, kind: str) -> list[dict[str, Any]]:
        return [{name: list(value) if isinstance(value, tuple) else value for name, value in asdict(tell.event).items()}
                for tell in self.told if tell.event.name == kind]

    def go(self, until: Callable[[], bool] = lambda: False, seconds: float = 600.0) -> None:
        """Until the run has ended, or something holds, or nothing more happens in so many seconds."""
        end = self.now + seconds
        while self.ended is None and not until() and self.now < end:
            if self._queue:
                event = self._queue.popleft()
            else:
                self.now += 0.25
                event = events.Heard({member: Beat(self.now, self.finished.get(member, 0)) for member in self.alive})
            for command in self.run.handle(event, self.now):
                self.commands.append(command)
                found = self.twist(command)
                for answer in self._answers(command) if found is None else found:
                    self.tell(answer)

    def die(self, member: Member) -> None:
        self.alive.discard(member)
        self.tell(events.Ended(member, "EOF"))

    def _answers(self, command: commands.Command) -> list[events.Event]:
        match command:
            case commands.Call():
                if command.member not in self.alive or command.member in self.deaf:
                    return []
                value = self._do(command.member, command.generation, command.request)
                return [events.Answered(command.call, command.member, value)]
            case commands.Abort():
                return [events.LetGo(member, command.generation) for member in command.members if member in self.alive]
            case commands.Spawn(member):
                self.alive.add(member)
                self.held[member] = {}
                return [events.Hello(member)]
            case commands.Fence(member):
                if member in self.alive:
                    self.alive.discard(member)
                    return [events.Ended(member, "EOF")]
            case commands.Append(order, line):
                self.ledger.append(line)
                return [events.Stored(order)]
            case commands.WriteManifest(order) | commands.Discard(order):
                return [events.Stored(order)]
            case commands.NeedBatch(step):
                return [events.BatchReady(step)]
            case commands.FindPlacement(step):
                return [events.PlacementFound(step, 1)]
            case commands.Tell():
                self.told.append(command)
            case commands.EndRun():
                self.ended = command
        return []

    def _do(self, member: Member, generation: int, request: commands.Request) -> events.Answer:
        held = self.held[member]
        newest = max(held, default=None)
        match request:
            case commands.Recall():
                return Recalled(tuple(held.values()), self.reduced.get(member), True, None, self.faults.get(member))
            case commands.Finish(base, apply):
                self.held[member] = held = {number: one for number, one in held.items() if number == base}
                if base not in held:
                    return Standing(None, None, False)
                if apply is not None and held[base].applied == apply == self.reduced.get(member):
                    held[base] = replace(held[base], applied=apply + 1)
                return Standing(base, held[base].applied, True)
            case commands.Form(plan, former):
                rank = (*plan.members, *plan.leaving).index(member)
                held[generation] = Holding(generation, plan.layout, plan.placement, rank, former.applied if former else None)
                return events.Formed()
            case commands.Initialise():
                held[newest] = replace(held[newest], applied=0)
            case commands.Restore(_, step):
                held[newest] = replace(held[newest], applied=step)
            case commands.Step(step, apply):
                self._update(member, newest, apply)
                assert held[newest].applied == step
                self.reduced[member] = step
            case commands.Apply(step):
                self._update(member, newest, step)
            case commands.Rearrange(placement):
                held[generation] = replace(held[newest], generation=generation, placement=placement)
                return events.Formed()
            case commands.Probe():
                return events.Probed()
        return events.Done()

    def _update(self, member: Member, newest: int, apply: int | None) -> None:
        held = self.held[member]
        if apply is not None:
            assert held[newest].applied == apply == self.reduced[member]
            held[newest] = replace(held[newest], applied=apply + 1)
        self.held[member] = {newest: held[newest]}


def node(member: Member) -> Node:
    return Node(member.node, 1)


def steps(company):
    return [line.step for line in company.ledger if isinstance(line, commands.StepLine)]


def cuts(company):
    return [line for line in company.ledger if isinstance(line, commands.CutLine)]


def fenced(company):
    return {command.member for command in company.commands if isinstance(command, commands.Fence)}


def is_call(command, kind):
    return isinstance(command, commands.Call) and isinstance(command.request, kind)


def gone(company, member):
    company.alive.discard(member)
    company.tell(events.NodeLeft(member.node, "gone"))
