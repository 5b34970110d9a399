"""Heartbeat connections between real processes: what the coordinator sees of one that ends, freezes, is cut off, comes again; what
a member sees of a coordinator that ends; who is let in.

The cut needs root, like the network namespaces that it is made in.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
from heartbeat_tools import BEAT, REPOSITORY, RUN, Process, beats_on, expect, heard

from actors.protocol import heartbeat_wire
from actors.protocol.heartbeat_client import HeartbeatClient
from actors.protocol.heartbeat_server import End, HeartbeatServer
from actors.protocol.heartbeat_wire import LineSocket
from jobs.benches.shared.networks import Network
from orchestrator.protocol.members import Member


@pytest.fixture
def server():
    with HeartbeatServer("127.0.0.1", run=RUN) as found:
        yield found


@pytest.fixture
def begin():
    """Begin a member's process; all are ended."""
    begun = []

    def one(*arguments, **options):
        begun.append(Process(*arguments, **options))
        return begun[-1]

    yield one
    for process in begun:
        process.end()


def silence(server, member):
    """Seconds of it, after five beats should have come; what was under way when it fell silent has arrived by then."""
    threading.Event().wait(5 * BEAT)
    return time.monotonic() - heard(server)[member]


def test_a_member_says_who_it_is_and_beats(server, begin):
    member = Member("a", 1, 3)
    process = begin(server.address, member)
    assert expect(server, server.hello) == [
        (member, {"pid": process.pid, "host": socket.gethostname(), "generation": 7})]
    assert server.hello() == [] and heard(server).keys() == {member}
    assert all(beats_on(server, member) for _ in range(3)) and server.ended() == []


def test_an_end_is_noticed_within_a_tenth_of_a_second(server, begin):
    """The best of three: the cores are shared."""
    taken = []
    for incarnation in range(3):
        member = Member("a", 0, incarnation)
        process = begin(server.address, member)
        expect(server, server.hello)
        before = time.monotonic()
        process.signal(signal.SIGKILL)
        (lost, when, how), = expect(server, server.ended)
        assert lost == member and how in (End.EOF, End.RESET) and before <= when
        assert heard(server) == {} and server.ended() == []
        taken.append(when - before)
    assert min(taken) < 0.1


def test_of_a_frozen_process_there_is_silence_until_it_is_thawed(server, begin):
    member = Member("a", 0)
    process = begin(server.address, member)
    expect(server, server.hello)
    process.signal(signal.SIGSTOP)
    assert silence(server, member) > 3 * BEAT and server.ended() == []
    server.abort([member], 1)
    assert server.aborted([member], 1, 0.1) == {}
    process.signal(signal.SIGCONT)
    assert beats_on(server, member) and server.ended() == server.hello() == []
    assert server.aborted([member], 1, 5.0).keys() == {member}  # it reads what was sent meanwhile


@pytest.mark.parametrize("how", ["idle", "lock", "loop", "torch"])
def test_abort_is_answered_whatever_the_main_thread_does(server, begin, how):
    """The best of five: the cores are shared."""
    member = Member("a", 0)
    process = begin(server.address, member, how)
    expect(server, server.hello, 60)
    taken = []
    for generation in range(5):
        assert all(beats_on(server, member) for _ in range(2))
        started = time.monotonic()
        server.abort([member], generation)
        assert time.monotonic() - started < 0.01
        seconds = server.aborted([member], generation, 5.0)[member]
        taken.append(time.monotonic() - started)
        assert 0 <= seconds <= taken[-1] and process.told() == f"abort {generation}"
    assert min(taken) < 0.05


def test_who_cannot_answer_is_not_waited_for_longer_than_asked(server, begin):
    """A member that has gone, one that never was, one that is frozen."""
    here, gone, frozen = members = [Member("a", n) for n in range(3)]
    processes = [begin(server.address, member) for member in members]
    while heard(server).keys() != set(members):
        expect(server, server.hello)
    processes[1].signal(signal.SIGKILL)
    expect(server, server.ended)
    started = time.monotonic()
    server.abort([here, gone, Member("b", 0)], 4)
    assert server.aborted([here, gone, Member("b", 0)], 4, 30.0).keys() == {here} and time.monotonic() - started < 15
    processes[2].signal(signal.SIGSTOP)
    server.abort([here, frozen], 5)
    started = time.monotonic()
    assert server.aborted([here, frozen], 5, 2.0).keys() == {here} and 2.0 <= time.monotonic() - started < 10
    assert server.aborted([here], 4, 0.0) == {}  # an answer is to one generation


def test_when_a_member_ends_it_is_no_longer_waited_for(server, begin):
    member = Member("a", 0)
    process = begin(server.address, member)
    expect(server, server.hello)
    process.signal(signal.SIGSTOP)
    server.abort([member], 1)
    timer = threading.Timer(0.2, process.signal, [signal.SIGKILL])
    timer.start()
    started = time.monotonic()
    assert server.aborted([member], 1, 30.0) == {} and time.monotonic() - started < 5
    timer.join()


SERVER = """
import sys
import time
from actors.protocol.heartbeat_server import HeartbeatServer
server = HeartbeatServer("127.0.0.1", int(sys.argv[1]), run="a run")
print(server.address[1], flush=True)
while not (hello := server.beats()):
    time.sleep(0.01)
while server.beats() == hello:  # a beat comes only from who knows that he is welcome
    time.sleep(0.01)
print("connected", flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def coordinator(port=0):
    """In a process of its own: the process, and its port."""
    process = subprocess.Popen([sys.executable, "-c", SERVER, str(port)], cwd=REPOSITORY, stdout=subprocess.PIPE,
                               stdin=subprocess.PIPE, text=True)
    try:
        yield process, int(process.stdout.readline())
    finally:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


def test_a_member_whose_coordinator_dies_is_orphaned_once_and_moves_to_the_next(server, begin):
    member = Member("a", 0)
    with coordinator() as (process, port):
        child = begin(("127.0.0.1", port), member)
        assert process.stdout.readline() == "connected\n"
        process.kill()
        assert child.told() == "orphaned"
    assert child.quiet(0.5)  # while it tries again
    child.say(f"move {server.address[1]}")
    (found, about), = expect(server, server.hello)
    assert found == member and about["pid"] == child.pid and about["generation"] == 7
    assert beats_on(server, member) and child.quiet(0.01)


def test_a_member_finds_a_coordinator_that_comes_back_at_the_same_address(begin):
    with coordinator() as (process, port):
        child = begin(("127.0.0.1", port), Member("a", 0))
        assert process.stdout.readline() == "connected\n"
    assert child.told() == "orphaned"
    with coordinator(port) as (process, _):
        assert process.stdout.readline() == "connected\n"
    assert child.told() == "orphaned"


def test_whoever_moves_leaves_the_coordinator_and_is_not_orphaned(server, begin):
    member = Member("a", 0)
    child = begin(server.address, member)
    expect(server, server.hello)
    with HeartbeatServer("127.0.0.1", run=RUN) as other:
        child.say(f"move {other.address[1]}")
        expect(other, other.hello)
        assert [(lost, how) for lost, _, how in expect(server, server.ended)] == [(member, End.EOF)]
        assert child.quiet(0.01)
        child.say("end")
        assert child.told() == "closed" and expect(other, other.ended)[0][0] == member


def test_an_abort_that_fails_is_not_answered_and_the_heartbeat_lives(server):
    member = Member("a", 0)

    def fail(generation):
        if generation == 1:
            raise RuntimeError("no")

    with HeartbeatClient(server.address, member, fail, BEAT, run=RUN):
        expect(server, server.hello)
        server.abort([member], 1)
        assert server.aborted([member], 1, 0.3) == {}
        server.abort([member], 2)
        assert server.aborted([member], 2, 10.0).keys() == {member} and server.ended() == []


def test_closing_leaves_nothing_behind():
    before, threads = set(os.listdir("/proc/self/fd")), threading.active_count()
    server = HeartbeatServer("127.0.0.1", run=RUN)
    lines = [HeartbeatClient(server.address, Member("a", n), print, BEAT, run=RUN) for n in range(3)]
    while len(heard(server)) < 3:
        expect(server, server.hello)
    lines[0].close()
    server.close()
    for end in (*lines, server):
        end.close()
    assert set(os.listdir("/proc/self/fd")) == before and threading.active_count() == threads


def test_a_link_that_is_cut_is_silence_and_the_server_goes_on(begin):
    """One member on each of two nodes; the link of one is cut, for longer than the kernel tries, then restored."""
    near, far = Member("near", 0), Member("far", 0)
    with Network(2, 100.0) as network, HeartbeatServer(network.host, run=RUN) as server:
        processes = [begin(server.address, member, within=("ip", "netns", "exec", namespace))
                     for member, namespace in zip((near, far), network.namespaces)]
        while heard(server).keys() != {near, far}:
            expect(server, server.hello)
        network.cut(network.interface(1))
        assert silence(server, far) > 3 * BEAT and server.ended() == []
        started = time.monotonic()
        server.abort([near, far], 1)
        assert time.monotonic() - started < 0.05
        assert server.aborted([near, far], 1, 0.3).keys() == {near} and server.ended() == []
        assert beats_on(server, near)
        lost, _, how = expect(server, server.ended, 3 * heartbeat_wire._UNACKNOWLEDGED_SECONDS)[0]
        assert (lost, how) == (far, End.TIMED_OUT) and heard(server).keys() == {near}
        assert processes[1].told(3 * heartbeat_wire._UNACKNOWLEDGED_SECONDS) == "orphaned"
        network.restore(network.interface(1))
        assert [member for member, _ in expect(server, server.hello)] == [far] and beats_on(server, far)
        assert processes[0].told() == "abort 1" and processes[0].quiet(0.01) and processes[1].quiet(0.01)


def test_a_beat_that_does_not_fit_is_left_out():
    """A coordinator that is frozen: its members wait for nothing, and pile up nothing."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        with socket.create_connection(listener.getsockname()) as mine:
            wire = LineSocket(mine)
            with contextlib.suppress(BlockingIOError):
                while True:
                    mine.send(bytes(4096))
            for _ in range(1000):
                wire.beat(7)
            assert not wire.unsent
