"""Calls by name to Ray actors: their answers come by themselves, and so do their ends."""

from __future__ import annotations

import os
import queue
from concurrent.futures import Future
from types import SimpleNamespace

import pytest
import ray
from ray.exceptions import ActorDiedError, ActorUnavailableError, ActorUnschedulableError

from actors.calls.rank_calls import LOST, Arrived, News, Reply
from actors.files.run_folder import RunFolder
from actors.hosts import ray_ranks
from actors.hosts.ray_ranks import RayRanks
from orchestrator.protocol.commands import CallLane
from orchestrator.protocol.events import CallId, Ended, Failed, FailKind, Fault, NodeJoined, NotMade
from orchestrator.protocol.members import Member
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
    def posted(number, member, method, *arguments, lane=CallLane.COMPUTE):
        line.send(CallId(1, number), member, 4, method, arguments, lane)
        return line.posted.get(timeout=SECONDS)

    assert posted(1, FIRST, "echo", 7) == Arrived(CallId(1, 1), FIRST, (4, (7,), ()))
    assert posted(2, FIRST, "recall", lane=CallLane.CONTROL) == Arrived(CallId(1, 2), FIRST, "control")
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


AWAY = ActorUnavailableError("Socket closed", None)
ATTACHED = (FIRST, ("127.0.0.1", 1), 0.5, "a run", 2)


class Answering:
    """An actor that is not there: each method answers what `answers` has for it, one after another, and of the last one always."""

    def __init__(self, **answers):
        self._answers, self.called = answers, queue.SimpleQueue()

    def __getattr__(self, method):
        def remote(*arguments):
            future, given = Future(), self._answers[method]
            answer = given.pop(0) if len(given) > 1 else given[0]
            self.called.put((method, arguments))
            (future.set_exception if isinstance(answer, Exception) else future.set_result)(answer)
            return SimpleNamespace(future=lambda: future)
        return SimpleNamespace(remote=remote)


@pytest.fixture
def posted(monkeypatch):
    """RayRanks for an actor that is admitted as FIRST, with what is posted."""
    monkeypatch.setattr(ray_ranks, "_AGAIN_SECONDS", 0.01)
    monkeypatch.setattr(ray_ranks.ray, "kill", lambda actor: None)

    def of(actor, token=None):
        events = queue.SimpleQueue()
        ranks = RayRanks([], lambda member: None, SimpleNamespace(listen=lambda told: None))
        ranks.listen(events.put)
        ranks.attach(*ATTACHED)
        ranks.admit(FIRST, actor, token)
        return ranks, events
    return of


def test_who_is_out_of_reach_has_not_ended(posted):
    actor = Answering(attach=[AWAY, AWAY, None], compute=[AWAY, ActorDiedError()])
    ranks, events = posted(actor)
    assert [actor.called.get(timeout=SECONDS) for _ in range(3)] == [("attach", ATTACHED)] * 3
    for number, kind in ((1, FailKind.ABORTED), (2, FailKind.GONE)):
        ranks.send(CallId(1, number), FIRST, 4, "echo", (), CallLane.COMPUTE)
        failed = events.get(timeout=SECONDS)
        assert (failed.call, failed.member, failed.kind) == (CallId(1, number), FIRST, kind)
    assert actor.called.get() == ("compute", (CallId(1, 1), 4, "echo", ())) and events.empty()


def test_who_stays_out_of_reach_is_given_up(posted):
    actor = Answering(attach=[AWAY])
    _, events = posted(actor)
    assert events.get(timeout=SECONDS) == Ended(FIRST, LOST)
    assert actor.called.qsize() == ray_ranks._ATTEMPTS


def test_whose_node_went_before_it_was_made_is_lost(posted):
    gone = ActorUnschedulableError("The node does not exist any more")
    _, events = posted(Answering(attach=[gone]))
    assert events.get(timeout=SECONDS) == Ended(FIRST, LOST)
    ranks, events = posted(Answering(attach=[None], compute=[gone]))
    ranks.send(CallId(1, 1), FIRST, 4, "echo", (), CallLane.COMPUTE)
    assert events.get(timeout=SECONDS).kind is FailKind.GONE


def test_who_does_not_see_the_runs_folder_is_not_made(posted, tmp_path):
    token = RunFolder(str(tmp_path), "run").token(".seen")
    seeing = Answering(reads=[AWAY, True], attach=[None])
    _, events = posted(seeing, token)
    question = ("reads", (f"{tmp_path}/run/.seen", token.content))
    assert [seeing.called.get(timeout=SECONDS) for _ in range(3)] == [question, question, ("attach", ATTACHED)]
    blind = Answering(reads=[False])
    _, failed = posted(blind, token)
    assert failed.get(timeout=SECONDS) == NotMade(FIRST, f"its node does not see run.directory = {tmp_path}")
    assert blind.called.qsize() == 1 and events.empty()


def test_where_nobody_sees_the_runs_folder_nobody_is_given_up(posted, tmp_path):
    token = RunFolder(str(tmp_path), "run").token(".seen")
    (tmp_path / "run" / ".seen").unlink()
    actor = Answering(reads=[False], attach=[None])
    _, events = posted(actor, token)
    assert [actor.called.get(timeout=SECONDS)[0] for _ in range(2)] == ["reads", "attach"] and events.empty()
