"""Who lives and who serves: a crew over processes of which nothing is asked but a lifeline."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest

import actors.crew
from actors.crew import Crew
from actors.lifeline import Lifeline
from actors.processes import ProcessRanks
from actors.ranks import LOST, News, RankFailed
from orchestrator.config import RunConfig, parse
from orchestrator.layout import choose
from orchestrator.membership import Member
from orchestrator.topology import Node

SECONDS = 30.0


class Host:
    """What a rank is to a crew."""

    def __init__(self, config: RunConfig):
        self._line, self._aborted, self._stubborn = None, [], threading.Event()

    def attach(self, member, address, beat_seconds, run):
        self._line = Lifeline(address, member, self._let_go, beat_seconds, run=run)

    def _let_go(self, generation):
        self._aborted.append(generation)
        if self._stubborn.is_set():
            time.sleep(60)

    def aborted(self):
        return self._aborted

    def be_stubborn(self):
        self._stubborn.set()

    def pid(self):
        return os.getpid()

    def abort(self):
        pass


def settings(*more: str):
    return parse({"layout": {"pipeline": 1, "expert": 4, "data": 1}, "model": {"n_routed_experts": 8},
                  "topology": {"ranks_per_node": 2},
                  "elastic": {"silence_seconds": 20, "cool_down_seconds": 0.2, "abort_seconds": 0.5, "beat_seconds": 0.1}},
                 list(more))


def layout_of(config, *nodes):
    return choose(nodes, config.layout.model_copy(update={"expert": "auto"}), config.model, config.stages)


A, B = Node("a", 2), Node("b", 2)
FOUR = [Member("a", 0), Member("a", 1), Member("b", 0), Member("b", 1)]


@pytest.fixture
def opened():
    """A crew of four on two nodes: (crew, its processes)."""
    crews = []

    def open_(*more):
        config = settings(*more)
        ranks = ProcessRanks(config, 4, Host)
        crew = Crew(config, ranks, "127.0.0.1")
        crews.append((crew, ranks))
        crew.open(FOUR)
        return crew, ranks
    yield open_
    for crew, ranks in crews:
        crew.close()
        ranks.close()


def until(crew, condition):
    """The first decision of which `condition` holds."""
    deadline = time.monotonic() + SECONDS
    while not condition(decision := crew.look()):
        assert time.monotonic() < deadline, decision
        crew.wait(0.02)
    return decision


def calm(crew):
    decision = crew.look()
    return not (decision.lost or decision.leaving or decision.joining or decision.start or decision.wait)


def test_those_who_were_made_are_seated_in_order(opened):
    crew, ranks = opened()
    assert [str(member) for member in crew.seated] == ["a/0", "a/1", "b/0", "b/1"]
    assert crew.start("pid", [()] * 4).results(SECONDS) == [ranks.pid_of(member) for member in crew.seated]
    assert calm(crew) and crew.check() is None


def test_who_does_not_come_is_told_when_it_opens(monkeypatch):
    config = settings()
    with ProcessRanks(config, 4, Host) as ranks:
        ranks.start("pid", [()] * 4).results(SECONDS)
        os.kill(ranks.pids[2], signal.SIGKILL)
        monkeypatch.setattr(actors.crew, "START_SECONDS", 3.0)
        with Crew(config, ranks, "127.0.0.1") as crew, pytest.raises(RankFailed) as caught:
            crew.open(FOUR)
        assert caught.value.rank == 2 and caught.value.lost


def test_those_who_answer_another_coordinator_are_adopted(opened, monkeypatch):
    """By another crew, which knows them by name; one of them is gone, and comes again."""
    monkeypatch.setattr(actors.crew, "ADOPT_SECONDS", 3.0)
    first, ranks = opened()
    os.kill(ranks.pids[3], signal.SIGKILL)
    first.close()
    with Crew(settings(), ranks, "127.0.0.1") as crew:
        crew.adopt(FOUR)
        assert crew.seated == (*FOUR[:3],)
        until(crew, lambda decision: decision.nodes == (A, B))
        assert crew.trusts(Member("b", 1, 1))


def test_a_killed_one_is_lost_and_replaced_by_its_next_incarnation(opened):
    crew, ranks = opened()
    os.kill(ranks.pids[3], signal.SIGKILL)
    decision = until(crew, lambda decision: decision.lost)
    assert decision.lost == (Member("b", 1),) and not crew.trusts(Member("b", 1))
    deadline = time.monotonic() + SECONDS
    while (failed := crew.check()) is None:
        assert time.monotonic() < deadline
    assert (failed.rank, failed.reason) == (3, LOST)
    until(crew, lambda decision: decision.nodes == (A, B))
    assert crew.trusts(Member("b", 1, 1)) and decision.lost
    crew.seat(layout_of(settings(), A, B), (A, B))
    assert [str(member) for member in crew.seated] == ["a/0", "a/1", "b/0", "b/1#1"]
    assert crew.start("pid", [()] * 4).results(SECONDS) == [ranks.pid_of(member) for member in crew.seated] and calm(crew)


def test_a_place_without_anybody_cannot_be_taken(opened):
    crew, ranks = opened("elastic.cool_down_seconds=600")
    for rank in (2, 3):
        os.kill(ranks.pids[rank], signal.SIGKILL)
    until(crew, lambda decision: len(decision.lost) == 2)
    with pytest.raises(RankFailed, match=LOST):
        crew.seat(layout_of(settings(), A, B), (A, B))


def test_the_transports_word_counts_as_well(opened):
    crew, _ = opened()
    crew.blame(RankFailed(1, "Aborted: the peer went"))
    assert calm(crew)
    crew.blame(RankFailed(1, LOST))
    assert crew.look().lost == (Member("a", 1),)


def test_an_abort_reaches_the_living_and_waits_for_no_dead(opened):
    crew, ranks = opened()
    os.kill(ranks.pids[0], signal.SIGKILL)
    began = time.monotonic()
    abort = crew.abort(7)
    assert time.monotonic() - began < 5 and not abort.missing and len(abort.seconds) >= 3
    crew.use(crew.seated[1:])
    assert crew.start("aborted", [()] * 3).results(SECONDS) == [[7]] * 3


def test_who_does_not_let_go_in_time_is_lost(opened):
    crew, _ = opened()
    crew.start("be_stubborn", [()] * 2).results(SECONDS)  # ranks 0 and 1
    abort = crew.abort(3)
    assert set(abort.missing) == {Member("a", 0), Member("a", 1)} and set(abort.seconds) == {Member("b", 0), Member("b", 1)}
    decision = crew.look()
    assert set(decision.lost) == set(abort.missing) and "did not let go within 0.5 s" in decision.reasons[Member("a", 0)]


def test_a_frozen_node_is_lost_by_silence_and_ended_when_it_thaws(opened):
    crew, ranks = opened("elastic.silence_seconds=1.0", "elastic.cool_down_seconds=600")
    pids = ranks.pids[2:]
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    decision = until(crew, lambda decision: len(decision.lost) == 2)
    assert {member.node for member in decision.lost} == {"b"} and "cut off or frozen" in decision.reasons[Member("b", 0)]
    for pid in pids:
        os.kill(pid, signal.SIGCONT)
    until(crew, lambda decision: not any(os.path.exists(f"/proc/{pid}") for pid in pids))


def test_a_draining_node_leaves_and_a_new_one_joins(opened):
    crew, ranks = opened()
    ranks.tell(News("draining", B, "spot", time.monotonic() + 60))
    decision = crew.look()
    assert decision.leaving == (Member("b", 0), Member("b", 1)) and decision.nodes == (A,) and not decision.lost
    crew.seat(layout_of(settings(), A), (A,))
    crew.dismiss(decision.leaving)
    ranks.tell(News("left", B, "gone"))
    until(crew, lambda decision: not decision.lost and decision.nodes == (A,))
    ranks.tell(News("joined", Node("c", 2)))
    decision = until(crew, lambda decision: decision.joining)
    while len(decision.nodes) < 2 or decision.nodes[1].ranks < 2:
        decision = until(crew, lambda decision: decision.joining)
    assert decision.nodes == (A, Node("c", 2)) and crew.trusts(Member("c", 1))
    crew.plan_for(decision.nodes)
    assert calm(crew)


def test_a_drain_is_called_off_and_one_that_expires_is_a_loss(opened):
    crew, ranks = opened()
    ranks.tell(News("draining", B))
    assert crew.look().leaving
    ranks.tell(News("stays", B))
    assert calm(crew)
    ranks.tell(News("draining", B, "", time.monotonic() + 0.2))
    decision = until(crew, lambda decision: decision.lost)
    assert {member.node for member in decision.lost} == {"b"} and "deadline" in decision.reasons[Member("b", 0)]


def test_a_place_that_cannot_be_filled_is_not_asked_for_again(opened):
    crew, ranks = opened()
    asked = []
    ranks.spawn = lambda member: bool(asked.append(member))
    os.kill(ranks.pids[3], signal.SIGKILL)
    until(crew, lambda decision: decision.lost)
    for _ in range(5):
        crew.look()
    assert asked == [Member("b", 1, 1)]
