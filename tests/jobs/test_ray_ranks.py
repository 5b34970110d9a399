"""Calls by name to Ray actors: their answers come by themselves, and so do their ends."""

from __future__ import annotations

import os
import queue

import pytest
import ray

from actors.ranks import LOST, Arrived, News, Reply
from actors.ray_ranks import RayRanks
from orchestrator.membership import Member
from orchestrator.protocol.commands import Lane
from orchestrator.protocol.events import CallId, Failed, FailKind, Fault, NodeJoined
from orchestrator.topology import Node

SECONDS = 60.0
FIRST, SECOND, THIRD = MEMBERS = [Member("a", local) for local in range(3)]


def answering():
    """Its class is made here, so that it is sent to the actor whole: this file is not to be found there."""

    class Answers:
        """What a StageActor is to its caller."""

        def __init__(self) -> None:
            self._attached: tuple = ()

        @ray.method(concurrency_group="compute")
        def compute(self, call, generation, method, arguments):
            if method == "fail":
                return Fault(FailKind.ABORTED, "Aborted: gone")
            if method == "raise":
                raise ValueError("first line\nsecond line")
            if method == "end":
                os._exit(1)
            return Reply((generation, arguments, self._attached))

        @ray.method(concurrency_group="control")
        def control(self, call, generation, method, arguments):
            return Reply("control")

        @ray.method(concurrency_group="control")
        def attach(self, *arguments):
            self._attached = arguments

    return ray.remote(num_cpus=0, max_restarts=0, concurrency_groups={"compute": 1, "control": 2})(Answers)


class Watch:
    def listen(self, told):
        told(News("joined", Node("b", 2)))


@pytest.fixture
def line(ray_local):
    actor = answering()
    made = [actor.remote() for _ in MEMBERS[:2]]
    found = RayRanks(made, lambda member: found.admit(member, actor.remote()), Watch())
    found.enlist(MEMBERS[:2])
    found.posted = queue.SimpleQueue()
    found.listen(found.posted.put)
    assert found.posted.get(timeout=SECONDS) == NodeJoined(Node("b", 2))
    yield found
    for member in MEMBERS:
        found.dismiss(member)


def test_answers_failures_and_ends_are_posted(line):
    def posted(number, member, method, *arguments, lane=Lane.COMPUTE):
        line.send(CallId(1, number), member, 4, method, arguments, lane)
        return line.posted.get(timeout=SECONDS)

    assert posted(1, FIRST, "echo", 7) == Arrived(CallId(1, 1), FIRST, (4, (7,), ()))
    assert posted(2, FIRST, "recall", lane=Lane.CONTROL) == Arrived(CallId(1, 2), FIRST, "control")
    assert posted(3, FIRST, "fail") == Failed(CallId(1, 3), FIRST, FailKind.ABORTED, "Aborted: gone")
    raised = posted(4, FIRST, "raise")
    assert raised.kind is FailKind.OWN and "\n" not in raised.text and "first line" in raised.text
    assert posted(5, SECOND, "end") == Failed(CallId(1, 5), SECOND, FailKind.GONE, LOST)
    assert posted(6, SECOND, "echo") == Failed(CallId(1, 6), SECOND, FailKind.GONE, LOST)
    assert posted(7, THIRD, "echo") == Failed(CallId(1, 7), THIRD, FailKind.GONE, LOST)
    line.attach(THIRD, ("127.0.0.1", 1), 0.5, "a run", 2)
    assert line.spawn(THIRD)
    while not (found := posted(8, THIRD, "echo")).value[2]:
        pass
    assert found.value[2] == (THIRD, ("127.0.0.1", 1), 0.5, "a run", 2)
    line.dismiss(FIRST)
    assert posted(9, FIRST, "echo") == Failed(CallId(1, 9), FIRST, FailKind.GONE, LOST)
