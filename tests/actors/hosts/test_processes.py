"""Rank processes as such: what they host here needs no torch, so that they start at once."""

from __future__ import annotations

import os
import queue
import select
import signal
import subprocess
import sys
import threading
import time

import pytest

from actors.calls.rank_calls import LOST, Arrived, News, Reply
from actors.hosts import processes
from actors.hosts.processes import ProcessRanks
from actors.hosts.seated_answers import RankFailed, call
from orchestrator.config.run_config import RunConfig
from orchestrator.protocol.commands import CallLane
from orchestrator.protocol.events import (
    CallId,
    Ended,
    Failed,
    FailKind,
    Fault,
    NodeDraining,
    NodeJoined,
    NodeLeft,
    NodeStays,
    NotMade,
)
from orchestrator.protocol.members import Member
from orchestrator.topology import Node


class Host:
    def __init__(self, config: RunConfig):
        self.seed, self.aborted = config.run.seed, threading.Event()

    def abort(self):
        self.aborted.set()

    def echo(self, *values):
        return values

    def about(self):
        return os.getpid(), self.seed, "torch" in sys.modules, signal.getsignal(signal.SIGINT) == signal.SIG_IGN

    def fail(self):
        raise ValueError("first line\nsecond line")

    def block(self):
        self.aborted.wait()
        self.aborted.clear()
        raise ValueError("aborted")

    def work(self, fails):
        return self.fail() if fails else self.block()

    def saved(self):
        self.aborted.wait()
        return "written"

    def stay(self):
        while True:
            signal.pause()


class Called(Host):
    """One that takes calls of the control protocol, and has its own way to serve them."""

    def __init__(self, config: RunConfig):
        super().__init__(config)
        self.attached = ()

    def attach(self, *arguments):
        self.attached = arguments

    def arrives(self, call, generation):
        return Fault(FailKind.SUPERSEDED, "too late") if call.epoch == 0 else None

    def serve(self, call, generation, method, arguments):
        try:
            return Reply((generation, getattr(self, method)(*arguments)))
        except ValueError as error:
            return Fault(FailKind.OWN, str(error).splitlines()[0])

    def told(self):
        return self.attached


class Refusing:
    def __init__(self, config: RunConfig):
        os._exit(3)


@pytest.fixture
def ranks():
    with ProcessRanks(RunConfig(), 3, Host) as found:
        yield found


def ended(pids, seconds=20.0):
    """Whether all of them are gone, zombies too; waits for those of others."""
    for pid in pids:
        try:
            descriptor = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        if not select.select([descriptor], [], [], seconds)[0]:
            return False
        os.close(descriptor)
    return True


def test_each_rank_gets_its_own_arguments_in_a_process_of_its_own(ranks):
    assert ranks.start("echo", [(0, "a"), (1, "b"), ()]).results(30) == [(0, "a"), (1, "b"), ()]
    assert ranks.start("echo", [(5,)]).results(30) == [(5,)]  # rank 0 only
    about = ranks.start("about", [()] * 3).results(30)
    assert [found[0] for found in about] == ranks.pids and os.getpid() not in ranks.pids
    assert [found[1:] for found in about] == [(RunConfig().run.seed, False, True)] * 3


def test_a_failure_is_one_line(ranks):
    with pytest.raises(RankFailed) as caught:
        ranks.start("fail", [()]).results(30)
    assert caught.value.rank == 0 and str(caught.value) == "rank 0: ValueError: first line"


def test_late_answers_to_a_call_that_failed_are_dropped(ranks):
    with pytest.raises(RankFailed, match="rank 0: no answer within 0.01 s"):
        ranks.start("block", [()] * 2).results(0.01)
    ranks.abort()
    assert ranks.start("echo", [(2,)] * 2).results(30) == [(2,), (2,)]
    assert not ranks._mail and not ranks._awaited


def test_when_one_fails_the_others_are_set_free(ranks):
    """Ranks 0 and 2 would be blocked for ever; afterwards all take calls again."""
    with pytest.raises(RankFailed, match="rank 1: ValueError"):
        call(ranks, "work", [(False,), (True,), (False,)], 30)
    assert ranks.start("echo", [(n,) for n in range(3)]).results(30) == [(0,), (1,), (2,)]


def test_files_are_waited_for_beside_other_calls(ranks):
    pending = ranks.start("saved", [()] * 2)
    assert ranks.start("echo", [(1,), (2,)]).results(30) == [(1,), (2,)] and not pending.done()
    ranks.abort()
    assert pending.results(30) == ["written"] * 2


def test_a_lost_process_is_told_by_every_call(ranks):
    os.kill(ranks.pids[1], signal.SIGKILL)
    for _ in range(3):
        with pytest.raises(RankFailed, match="rank 1: its process or node was lost"):
            ranks.start("echo", [()] * 3).results(30)
    ranks.abort()


def test_closing_leaves_nothing_behind():
    before = set(os.listdir("/proc/self/fd"))
    ranks = ProcessRanks(RunConfig(), 3, Host)
    ranks.start("echo", [()] * 3).results(30)
    pids = ranks.pids
    os.kill(pids[2], signal.SIGKILL)
    ranks.close()
    ranks.close()
    assert not any(os.path.exists(f"/proc/{pid}") for pid in pids)
    opened = {fd for fd in set(os.listdir("/proc/self/fd")) - before if os.path.exists(f"/proc/self/fd/{fd}")}
    assert len(opened) <= 1  # multiprocessing's resource tracker, once


def test_busy_and_frozen_processes_are_ended_by_force(monkeypatch):
    monkeypatch.setattr(processes, "_END_SECONDS", 0.1)
    monkeypatch.setattr(processes, "_ABORT_SECONDS", 0.1)
    ranks = ProcessRanks(RunConfig(), 2, Host)
    ranks.start("echo", [()] * 2).results(30)
    pids = ranks.pids
    os.kill(pids[0], signal.SIGSTOP)
    ranks.start("stay", [()] * 2)
    started = time.monotonic()
    ranks.abort()  # the frozen one cannot answer
    ranks.close()
    assert time.monotonic() - started < 5
    assert not any(os.path.exists(f"/proc/{pid}") for pid in pids)


def test_a_process_that_does_not_come_up_is_told():
    with ProcessRanks(RunConfig(), 2, Refusing) as ranks, pytest.raises(RankFailed, match="its process or node was lost"):
        ranks.start("echo", [()] * 2).results(30)


# --- calls by name, whose answers are posted -------------------------------------------------------------------------

MEMBERS = [Member("a", 0), Member("a", 1)]
SECONDS = 60.0


class Line:
    """A coordinator's end: its calls, and what was posted."""

    def __init__(self, ranks):
        self.ranks, self._number, self.posted = ranks, 0, queue.SimpleQueue()
        ranks.enlist(MEMBERS)
        ranks.listen(self.posted.put)

    def send(self, member, method, *arguments, lane=CallLane.COMPUTE, generation=3, epoch=1):
        self._number += 1
        made = CallId(epoch, self._number)
        self.ranks.send(made, member, generation, method, arguments, lane)
        return made

    def next(self):
        return self.posted.get(timeout=SECONDS)


@pytest.fixture
def line():
    with ProcessRanks(RunConfig(), 2, Called) as ranks:
        yield Line(ranks)


def test_an_answer_is_posted_with_the_call_and_the_name(line):
    made = [line.send(member, "echo", member.local, generation=5) for member in MEMBERS]
    found = sorted((line.next() for _ in made), key=lambda event: event.call.number)
    assert found == [Arrived(one, member, (5, (member.local,))) for one, member in zip(made, MEMBERS)]


def test_arguments_may_be_changed_once_they_are_sent(line):
    values = [1]
    for turn in range(50):
        values[0] = turn
        line.send(MEMBERS[0], "echo", values)
    assert [line.next().value[1][0][0] for _ in range(50)] == list(range(50))


def test_failures_and_refusals_are_posted(line):
    made = line.send(MEMBERS[0], "fail"), line.send(MEMBERS[0], "echo", epoch=0)
    found = {event.call: event for event in (line.next(), line.next())}
    assert found == {made[0]: Failed(made[0], MEMBERS[0], FailKind.OWN, "first line"),
                     made[1]: Failed(made[1], MEMBERS[0], FailKind.SUPERSEDED, "too late")}


def test_control_and_files_are_served_while_the_compute_lane_is_busy(line):
    written, blocked = line.send(MEMBERS[0], "saved", lane=CallLane.FILES), line.send(MEMBERS[0], "stay")
    asked = line.send(MEMBERS[0], "echo", 1, lane=CallLane.CONTROL)
    assert line.next() == Arrived(asked, MEMBERS[0], (3, (1,)))
    line.ranks.abort()
    assert line.next() == Arrived(written, MEMBERS[0], (3, "written"))
    line.ranks.dismiss(MEMBERS[0])
    assert line.next() == Failed(blocked, MEMBERS[0], FailKind.GONE, LOST)


def test_who_is_gone_fails_what_is_open_and_what_comes(line):
    open_calls = {line.send(MEMBERS[1], "stay"), line.send(MEMBERS[1], "echo")}
    pid = line.ranks.pid_of(MEMBERS[1])
    os.kill(pid, signal.SIGKILL)
    found = line.next(), line.next()
    assert {event.call for event in found} == open_calls
    assert all(event.kind is FailKind.GONE and event.member == MEMBERS[1] for event in found)
    assert line.next() == Ended(MEMBERS[1], LOST)
    later = line.send(MEMBERS[1], "echo")
    assert line.next() == Failed(later, MEMBERS[1], FailKind.GONE, LOST)
    never = line.send(Member("b", 0), "echo")
    assert line.next() == Failed(never, Member("b", 0), FailKind.GONE, LOST)


def test_a_frozen_one_holds_up_nobody(line):
    """Much more is sent to it than a pipe takes, and what it was sending stays half sent."""
    asked = line.send(MEMBERS[0], "echo", bytes(1 << 23))
    pid = line.ranks.pid_of(MEMBERS[0])
    os.kill(pid, signal.SIGSTOP)
    started = time.monotonic()
    open_calls = {line.send(MEMBERS[0], "echo", bytes(1 << 22)) for _ in range(3)}
    other = line.send(MEMBERS[1], "echo", 1)
    assert time.monotonic() - started < 5
    found = line.next()
    if found.call == asked:  # it was quicker
        found = line.next()
    assert found == Arrived(other, MEMBERS[1], (3, (1,)))
    line.ranks.dismiss(MEMBERS[0])
    gone = [line.next() for _ in open_calls]
    assert {event.call for event in gone} <= open_calls | {asked} and all(event.kind is FailKind.GONE for event in gone)


def test_both_ways_to_call_at_once(line):
    blocked = line.send(MEMBERS[0], "block")
    waiting = line.ranks.start("echo", [(7,), (8,)])
    assert not waiting.done()
    line.ranks.abort()
    assert waiting.results(SECONDS) == [(7,), (8,)]
    found = line.next()
    assert found.call == blocked


def test_a_place_is_filled_again_and_attached_when_it_is_there(line):
    new, before = Member("a", 1, 1), line.ranks.pid_of(MEMBERS[1])
    assert line.ranks.spawn(new)
    line.ranks.attach(new, ("127.0.0.1", 1), 0.5, "a run", 4)
    assert ended([before])
    deadline, found = time.monotonic() + SECONDS, None
    while not isinstance(found, Arrived) or not found.value[1]:
        assert time.monotonic() < deadline
        line.send(new, "told")
        found = line.next()
    assert found.value[1] == (new, ("127.0.0.1", 1), 0.5, "a run", None, 4)


def test_a_place_of_which_nothing_is_known_is_not_made():
    with ProcessRanks(RunConfig(), 2, Owner, own=[(0,), (1,)]) as ranks:
        line = Line(ranks)
        assert not ranks.spawn(Member("b", 0))
        found = line.next()
        assert isinstance(found, NotMade) and found.member == Member("b", 0) and "b" in found.reason


class Owner(Called):
    def __init__(self, config, number):
        super().__init__(config)


def test_what_is_said_of_nodes_is_posted(line):
    node = Node("c", 2)
    for kind in ("joined", "draining", "stays", "left"):
        line.ranks.tell(News(kind, node, "so it is", 5.0))
    assert [line.next() for _ in range(4)] == [NodeJoined(node), NodeDraining("c", 5.0), NodeStays("c"), NodeLeft("c", "so it is")]
    assert line.ranks.news() == []


PARENT = """
import sys
sys.path[:0] = {path!r}
from test_processes import Host, ProcessRanks, RunConfig
if __name__ == "__main__":
    ranks = ProcessRanks(RunConfig(), 2, Host)
    ranks.start("echo", [()] * 2).results(30)
    ranks.start("stay", [()])
    print(*ranks.pids, flush=True)
    sys.stdin.read()
"""


def test_ranks_end_with_whoever_started_them(tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(PARENT.format(path=[entry or os.getcwd() for entry in sys.path]))
    parent = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, stdin=subprocess.PIPE)
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(pids) == 2
    parent.kill()
    parent.wait()
    parent.stdout.close(), parent.stdin.close()
    assert ended(pids)
