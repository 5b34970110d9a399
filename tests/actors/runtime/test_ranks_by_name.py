"""Real ranks, called by name as the control protocol calls them: from the attach to what a newer coordinator finds."""

from __future__ import annotations

import queue
import time
from dataclasses import replace

import pytest
import runtime
from heartbeat_tools import expect
from runtime import batch_of, configured, meeting_place, placement_of

from actors.calls.messages import Assignment, PendingUpdate, RankState, StepReport
from actors.calls.rank_calls import Arrived
from actors.data.batching import Dealer
from actors.hosts.processes import ProcessRanks
from actors.protocol.heartbeat_server import HeartbeatServer
from orchestrator.plan.scheduling import programs_for
from orchestrator.protocol.commands import CallLane
from orchestrator.protocol.events import CallId, Failed, FailKind
from orchestrator.protocol.members import Member

CONFIG, LAYOUT = configured("PP2", "model.num_hidden_layers=2")
MEMBERS = [Member(place.node, place.local) for place in LAYOUT.places]
FIRST, SECOND = MEMBERS
RATE, SECONDS, RUN = 1e-2, 60.0, "a run"


class Coordinator:
    """One of an epoch: its calls and their answers."""

    def __init__(self, ranks: ProcessRanks, epoch: int):
        self._ranks, self._epoch, self._number = ranks, epoch, 0
        self._posted: queue.SimpleQueue = queue.SimpleQueue()
        ranks.listen(self._posted.put)
        self.lines = HeartbeatServer("127.0.0.1", run=RUN, epoch=epoch)
        for member in MEMBERS:
            ranks.attach(member, self.lines.address, 0.05, RUN, epoch)
        self.about = {}
        while len(self.about) < len(MEMBERS):
            self.about |= dict(expect(self.lines, self.lines.hello, SECONDS))

    def send(self, member: Member, method: str, *arguments, generation: int = 0, lane: CallLane = CallLane.COMPUTE) -> CallId:
        self._number += 1
        call = CallId(self._epoch, self._number)
        self._ranks.send(call, member, generation, method, arguments, lane)
        return call

    def answers(self, *calls: CallId) -> list:
        """In the order of the calls: values of those that arrived, and events of those that failed."""
        found = {}
        while len(found) < len(calls):
            event = self._posted.get(timeout=SECONDS)
            assert event.call in calls
            found[event.call] = event.value if isinstance(event, Arrived) else event
        return [found[call] for call in calls]

    def all(self, method: str, *arguments, generation: int = 0, lane: CallLane = CallLane.COMPUTE) -> list:
        return self.answers(*(self.send(member, method, *arguments, generation=generation, lane=lane) for member in MEMBERS))

    def form(self, generation: int) -> list:
        store, placement = meeting_place(), placement_of(CONFIG, LAYOUT)
        place = ("127.0.0.1", store.port), f"formation-{store.add('formations', 1)}"
        assignments = [Assignment(generation, rank, CONFIG, LAYOUT, placement, *place) for rank in range(LAYOUT.size)]
        return self.answers(*(self.send(member, "form", assignment, generation=generation)
                              for member, assignment in zip(MEMBERS, assignments)))

    def recall(self, seconds: float) -> list:
        return self.all("recall", seconds, lane=CallLane.CONTROL)


def requests(step: int, apply: PendingUpdate | None = None) -> list:
    found = Dealer(CONFIG, LAYOUT).requests(batch_of(CONFIG, step), apply, training=True)
    programs = programs_for(CONFIG, LAYOUT.folding, found[0].microbatches, training=True)
    return [replace(request, program=programs[place.position]) for request, place in zip(found, LAYOUT.places)]


@pytest.fixture(scope="module")
def ranks():
    with ProcessRanks(CONFIG, 2, runtime.host, start_method="forkserver") as found:
        found.enlist(MEMBERS)
        yield found


def test_from_the_first_coordinator_to_the_next(ranks):
    one = Coordinator(ranks, 1)
    probes = {member: tuple(about["probe"]) for member, about in one.about.items()}
    assert one.answers(one.send(FIRST, "probe", probes | {Member("nobody", 0): ("127.0.0.1", 1)}, SECONDS,
                                lane=CallLane.CONTROL)) == [
        (Member("nobody", 0),)]
    one.form(1)
    assert [found.held[0][1] for found in one.recall(SECONDS)] == [None, None]
    one.all("initialise", generation=1)
    reports = one.answers(*(one.send(member, "step", request, generation=1) for member, request in zip(MEMBERS, requests(0))))
    assert all(isinstance(report, StepReport) and report.step == 0 for report in reports)
    assert [(found.held[0][1], found.reduced, found.busy) for found in one.recall(SECONDS)] == [(0, 0, None)] * 2

    # the first does not come: the second is blocked, but answers, lets go, and says what became of its call
    blocked, deadline = one.send(SECOND, "step", requests(1, PendingUpdate(0, RATE))[1], generation=1), time.monotonic() + SECONDS
    while one.answers(one.send(SECOND, "recall", 0.0, lane=CallLane.CONTROL))[0].busy != blocked:
        assert time.monotonic() < deadline
    recalled, = one.answers(one.send(SECOND, "recall", 0.3, lane=CallLane.CONTROL))
    assert recalled.busy == blocked
    one.lines.abort([FIRST, SECOND], 1)
    assert one.lines.aborted([FIRST, SECOND], 1, SECONDS).keys() == {FIRST, SECOND}
    failed, = one.answers(blocked)
    assert isinstance(failed, Failed) and failed.kind is FailKind.ABORTED
    after, = one.answers(one.send(SECOND, "recall", SECONDS, lane=CallLane.CONTROL))
    assert after.busy is None and after.fault.kind is FailKind.ABORTED
    late, = one.answers(one.send(FIRST, "step", requests(1, PendingUpdate(0, RATE))[0], generation=1))
    assert late.kind is FailKind.ABORTED and "generation 1 was given up" in late.text

    # each completes the step alone, once
    standings = one.all("finish", PendingUpdate(0, RATE), 1)
    assert [(found.generation, found.applied, found.published) for found in standings] == [(1, 1, False)] * 2
    assert isinstance(standings[0], RankState)

    two = Coordinator(ranks, 2)
    refused, = of_an_older(ranks, two)
    assert refused.kind is FailKind.SUPERSEDED
    assert [found.held[0][1] for found in two.recall(SECONDS)] == [1, 1]
    two.form(1)  # it counts generations on its own, if it has to
    two.all("initialise", generation=1)
    assert two.answers(two.send(FIRST, "evaluate", requests(0)[0], generation=7))[0].kind is FailKind.ABORTED
    one.lines.close()
    two.lines.close()


def of_an_older(ranks: ProcessRanks, newer: Coordinator) -> list:
    call = CallId(1, 999)
    ranks.send(call, FIRST, 0, "finish", (None, 1), CallLane.COMPUTE)
    return newer.answers(call)


def test_a_rank_that_gets_on_says_so_with_its_beats(ranks):
    coordinator = Coordinator(ranks, 3)
    coordinator.form(5)
    coordinator.all("initialise", generation=5)
    before = coordinator.lines.beats()
    coordinator.answers(*(coordinator.send(member, "step", request, generation=5) for member, request in zip(MEMBERS, requests(0))))
    deadline = time.monotonic() + SECONDS
    while any(beat.operation <= before[member].operation + 10 for member, beat in coordinator.lines.beats().items()):
        assert time.monotonic() < deadline
    coordinator.lines.close()
