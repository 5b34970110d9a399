"""A run with losses on real ranks, told to another machine again: it orders the same, and what was ordered keeps the rules."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
from faults import KILL, STEPS, Fault

from orchestrator.protocol.commands import Append, Call, CallLane, Command, CutLine, EndRun, Fence, Form, Step, StepLine, lane_of
from orchestrator.protocol.events import Answered, CallId, Ending, Event, Failed, Started, Stored
from orchestrator.protocol.members import Member
from orchestrator.protocol.run import Run

Exchange = tuple[Event, float, list[Command]]


@dataclass
class Ruled:
    """Rules of the simulator that hold of events and commands alone. Raises AssertionError at the first that breaks one."""

    epoch: int = 0
    committed: int = 0
    open: dict[Member, Call] = field(default_factory=dict)
    calls: dict[CallId, Call] = field(default_factory=dict)
    fenced: set[Member] = field(default_factory=set)
    seated: frozenset[Member] = frozenset()
    reduced: dict[tuple[int, int], set[Member]] = field(default_factory=dict)
    ordered: dict[int, object] = field(default_factory=dict)
    ended: bool = False

    def happened(self, event: Event) -> None:
        assert not self.ended, "nothing is told after the end"
        match event:
            case Started(epoch, _, head):
                self.epoch, self.committed = epoch, head.committed
            case Answered(number, member) | Failed(number, member):
                call = self.calls.pop(number, None)
                if call is not None and self.open.get(member) is call:
                    del self.open[member]
                if call is not None and isinstance(event, Answered) and isinstance(call.request, Step):
                    self.reduced.setdefault((call.generation, call.request.step), set()).add(member)
            case Stored(order):
                self._stored(self.ordered.pop(order, None))

    def ordered_is(self, command: Command) -> None:
        match command:
            case Call(number, member, _, request):
                assert number.epoch == self.epoch, "one coordinator calls as itself"
                self.calls[number] = command
                if lane_of(request) is CallLane.COMPUTE:
                    assert member not in self.fenced, "who was given up is not called"
                    assert member not in self.open, f"{member} is called for {request} while it runs {self.open.get(member)}"
                    self.open[member] = command
                if isinstance(request, Form):
                    self.seated = frozenset(request.plan.members)
            case Append(order, line):
                self.ordered[order] = line
                if isinstance(line, StepLine):
                    assert line.step == self.committed, "steps are committed one after another"
                    assert self.reduced[line.generation, line.step] >= self.seated, "not all have reduced the step"
            case Fence(member, reason):
                assert reason
                self.fenced.add(member)
                self.open.pop(member, None)
            case EndRun():
                self.ended = True

    def _stored(self, line: object) -> None:
        if isinstance(line, StepLine):
            self.committed += 1
        elif isinstance(line, CutLine):
            assert line.step < self.committed
            self.committed = line.step


def told_again(exchanges: Sequence[Exchange], machine: Run) -> None:
    """Raises AssertionError: another machine orders something else."""
    for number, (event, now, ordered) in enumerate(exchanges):
        assert machine.handle(event, now) == ordered, (number, event)


@pytest.fixture
def exchanges(monkeypatch):
    """What machines are told in this test, and what they order."""
    found: list[Exchange] = []
    handle = Run.handle

    def noted(machine, event, now):
        ordered = handle(machine, event, now)
        found.append((event, now, list(ordered)))
        return ordered
    with monkeypatch.context() as patch:
        patch.setattr(Run, "handle", noted)
        yield found


def test_what_a_run_was_told_makes_another_machine_order_the_same(stage, exchanges):
    more = (STEPS, "checkpoint.every=4")
    run = stage.with_faults("PP2xEP2", [Fault(2, "reduce", 1, 0, KILL), Fault(5, "publish", 2, 0, KILL)], *more, regrown=[4, 7])
    assert run.error is None, run.events
    assert len(run.told("lost")) == 2
    of_the_run = list(exchanges)
    trainer = run.trainer
    assert [(event, now) for event, now, _ in of_the_run] == list(trainer._conductor.recorded)

    ruled = Ruled()
    for event, _, ordered in of_the_run:
        ruled.happened(event)
        for command in ordered:
            ruled.ordered_is(command)
    assert ruled.ended and ruled.committed == 9 and len(ruled.reduced) >= 9
    end = of_the_run[-1][2][-1]
    assert isinstance(end, EndRun) and end.ending is Ending.DONE and end.saved

    told_again(of_the_run, Run(trainer._run.membership.rules, trainer._run.bounds, trainer._planner))
