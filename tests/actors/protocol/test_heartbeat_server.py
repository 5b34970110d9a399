"""The coordinator's end of heartbeat connections, to which a test talks as members and as strangers do."""

from __future__ import annotations

import json
import queue
import socket
import threading
import time

import pytest
from heartbeat_tools import BEAT, RUN, beats_on, expect, heard

from actors.protocol import heartbeat_server, heartbeat_wire
from actors.protocol.heartbeat_client import HeartbeatClient
from actors.protocol.heartbeat_server import End, HeartbeatServer
from orchestrator.protocol.events import LetGo
from orchestrator.protocol.members import Member


@pytest.fixture
def server():
    with HeartbeatServer("127.0.0.1", run=RUN) as found:
        yield found


def hello(of, pid=1, **changes):
    return {"lifeline": 2, "run": RUN, "epoch": 0, "member": [of.node, of.local, of.incarnation],
            "about": {"pid": pid, "host": "somewhere"}} | changes


def connect(server, text=b""):
    """A socket on which `text` was said."""
    peer = socket.create_connection(server.address, timeout=10)
    peer.sendall(text)
    return peer


def introduced(server, *arguments, **options):
    return connect(server, json.dumps(hello(*arguments, **options)).encode() + b"\n")


def answer(peer):
    return json.loads(peer.makefile().readline())


def closed(peer):
    """Whether the other side closes it."""
    try:
        return peer.recv(1) == b""
    except ConnectionResetError:
        return True


STRANGE = [
    b"GET / HTTP/1.1\r\nHost: here\r\n\r\n", b"\n", b"\x16\x03\x01\x02\x00\x01\xfc\n", b"[]\n", b"7\n", b"{}\n",
    b"[" * 60_000 + b"\n", b"x" * (heartbeat_wire._LINE_BYTES + 5000),
    json.dumps(hello(Member("a", 0), lifeline=1)).encode() + b"\n",
    json.dumps(hello(Member("a", 0), member=["a", "0", 0])).encode() + b"\n",
    json.dumps(hello(Member("a", 0), member=["a", True, 0])).encode() + b"\n",
    json.dumps(hello(Member("a", 0), about={})).encode() + b"\n", json.dumps(hello(Member("a", 0), run=None)).encode() + b"\n"]


@pytest.mark.parametrize("text", STRANGE, ids=range(len(STRANGE)))
def test_a_stranger_is_dropped_without_harm(server, text):
    with introduced(server, Member("b", 0)) as member, connect(server, text) as stranger:
        assert answer(member) == {"welcome": 2, "epoch": 0} and closed(stranger)
        server.hello()
        assert heard(server).keys() == {Member("b", 0)} and server.ended() == []
        before = heard(server)[Member("b", 0)]
        member.sendall(b"\n")
        assert beats_on(server, Member("b", 0), before=before)


def test_who_says_nothing_is_dropped(monkeypatch):
    monkeypatch.setattr(heartbeat_server, "INTRODUCTION_SECONDS", 0.2)
    monkeypatch.setattr(heartbeat_server, "_TICK_SECONDS", 0.1)
    with HeartbeatServer("127.0.0.1", run=RUN) as server, connect(server) as silent, introduced(server, Member("a", 0)) as member:
        assert answer(member) == {"welcome": 2, "epoch": 0} and closed(silent) and heard(server).keys() == {Member("a", 0)}


def test_a_member_that_talks_nonsense_is_dropped_and_told_of(server):
    member = Member("a", 0)
    with introduced(server, member) as peer:
        expect(server, server.hello)
        peer.sendall(b"nonsense\n")
        assert [(lost, how) for lost, _, how in expect(server, server.ended)] == [(member, End.MALFORMED)]


@pytest.mark.parametrize("line", [b'{"aborted": Infinity, "seconds": 0}\n', b'{"aborted": 1, "seconds": 1' + b"0" * 400 + b"}\n"])
def test_numbers_that_are_none_end_one_connection_and_no_other(server, line):
    bad, good = Member("a", 0), Member("b", 0)
    with introduced(server, good) as other, introduced(server, bad) as peer:
        peer.sendall(line)
        assert [(lost, how) for lost, _, how in expect(server, server.ended)] == [(bad, End.MALFORMED)]
        other.sendall(b'{"aborted": 3, "seconds": 0.25}\n')
        assert server.aborted([good], 3, 10.0) == {good: 0.25}


def test_lines_may_come_in_pieces_and_together(server):
    member = Member("a", 0)
    text = json.dumps(hello(member)).encode() + b"\n\n\n" + b'{"aborted":3,"seconds":0.25}\n\n{"abor'
    with connect(server, text[:20]) as peer:
        for byte in text[20:-30]:
            peer.sendall(bytes([byte]))
        peer.sendall(text[-30:])
        expect(server, server.hello)
        assert server.aborted([member], 3, 10.0) == {member: 0.25}
        peer.sendall(b'ted":4,"seconds":1}\n')
        assert server.aborted([member], 4, 10.0) == {member: 1.0}


def test_of_two_incarnations_the_newer_has_the_place(server):
    old, new = Member("a", 0, 1), Member("a", 0, 2)
    with introduced(server, old) as first:
        expect(server, server.hello)
        with introduced(server, new, pid=2) as second:
            assert answer(second) == {"welcome": 2, "epoch": 0} and heard(server).keys() == {new}
            assert [(lost, how) for lost, _, how in expect(server, server.ended)] == [(old, End.REPLACED)]
            assert answer(first) == {"welcome": 2, "epoch": 0} and closed(first)
            with introduced(server, old) as again:
                assert answer(again) == {"refused": "incarnation 2 is in its place"} and closed(again)
        assert expect(server, server.ended)[0][0] == new
        with introduced(server, old) as again:  # also when the newer one is gone
            assert "refused" in answer(again)
    assert [member for member, _ in server.hello()] == [new]


def test_the_same_process_may_come_again_another_may_not(server):
    member = Member("a", 0)
    with introduced(server, member) as first:
        expect(server, server.hello)
        with introduced(server, member, pid=2) as other:
            assert answer(other) == {"refused": "process 1 on somewhere is this member"}
        with introduced(server, member) as second:
            assert answer(second) == {"welcome": 2, "epoch": 0}
            assert [found for found, _ in expect(server, server.hello)] == [member]
            assert server.ended() == [] and heard(server).keys() == {member}
            assert answer(first) == {"welcome": 2, "epoch": 0} and closed(first)


def test_other_runs_members_are_refused_and_do_not_come_again(caplog):
    def reasons():
        return [record.getMessage() for record in caplog.records if record.name == "actors.protocol.heartbeat_client"]

    with HeartbeatServer("127.0.0.1", run="other") as other, HeartbeatClient(other.address, Member("a", 0), print, BEAT, run=RUN):
        expect(other, reasons)
        time.sleep(0.5)  # many beats: that nothing comes can only be waited for
        assert reasons() == ["refused by the coordinator: this is run 'other'"] and other.hello() == []


def test_who_does_not_read_is_dropped_and_holds_up_nobody(server, monkeypatch):
    monkeypatch.setattr(heartbeat_wire, "_UNACKNOWLEDGED_SECONDS", 100.0)  # which would drop it too
    reader, deaf = Member("a", 0), Member("a", 1)
    with socket.socket() as peer, HeartbeatClient(server.address, reader, lambda generation: None, BEAT, run=RUN):
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        peer.connect(server.address)
        peer.sendall(json.dumps(hello(deaf)).encode() + b"\n")
        while heard(server).keys() != {reader, deaf}:
            expect(server, server.hello)
        started, ended = time.monotonic(), []
        while not ended and time.monotonic() - started < 30:
            server.abort([deaf] * 20_000, 1)
            server.abort([reader], 2)
            assert server.aborted([reader], 2, 20.0).keys() == {reader}
            ended = server.ended()
        assert [(lost, how) for lost, _, how in ended] == [(deaf, End.UNREAD)]


def test_what_comes_together_with_the_welcome_is_not_lost():
    told = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener, HeartbeatClient(listener.getsockname(), Member("a", 0),
                                                                             lambda generation: told.set(), BEAT):
        peer, _ = listener.accept()
        with peer, peer.makefile() as lines:
            assert json.loads(lines.readline())["member"] == ["a", 0, 0]
            peer.sendall(b'{"welcome":2}\n{"abort":3}\n')
            assert json.loads(lines.readline())["aborted"] == 3 and told.is_set()


# --- what is told of members -----------------------------------------------------------------------------------------


def test_beats_tell_how_much_a_member_has_finished(server):
    member = Member("a", 0)
    with introduced(server, member) as peer:
        expect(server, server.hello)
        assert server.beats()[member].operation == 0
        for text, most in ((b"7\n", 7), (b"12\n", 12), (b"9\n", 12), (b"\n", 12)):  # what came late is not less
            before = heard(server)[member]
            peer.sendall(text)
            assert beats_on(server, member, before=before) and server.beats()[member].operation == most
        assert server.beats()[member].at == heard(server)[member]
        peer.sendall(b"1" * 30 + b"\n")
        assert [(lost, how) for lost, _, how in expect(server, server.ended)] == [(member, End.MALFORMED)]


def test_a_member_tells_what_it_has_finished_and_never_less(server):
    member, counts, asked = Member("a", 0), iter((3, 8, 5)), threading.Event()

    def finished() -> int:
        count = next(counts, None)
        if count is None:
            asked.set()
        return 0 if count is None else count

    with HeartbeatClient(server.address, member, lambda generation: None, BEAT, run=RUN, finished=finished):
        expect(server, server.hello)
        assert asked.wait(10) and server.beats()[member].operation == 8


def test_whoever_wants_to_know_is_told_of_hellos_answers_and_ends():
    told, member = queue.SimpleQueue(), Member("a", 0)
    with HeartbeatServer("127.0.0.1", run=RUN, told=lambda: told.put(None)) as server:
        with introduced(server, member) as peer:
            told.get(timeout=10)
            assert [found for found, _ in server.hello()] == [member] and server.let_go() == []
            peer.sendall(b'{"aborted":3,"seconds":0.25}\n')
            told.get(timeout=10)
            assert server.let_go() == [LetGo(member, 3, 0.25)] and server.let_go() == []
        told.get(timeout=10)
        assert [lost for lost, *_ in server.ended()] == [member]


@pytest.mark.parametrize("theirs, known, obeyed", [(2, 1, True), (2, 2, True), (1, 2, False)])
def test_an_older_coordinator_is_not_obeyed(theirs, known, obeyed):
    aborted = []
    with (HeartbeatServer("127.0.0.1", run=RUN, epoch=theirs) as server,
          HeartbeatClient(server.address, Member("a", 0), aborted.append, BEAT, run=RUN, epoch=lambda: known)):
        expect(server, server.hello)
        server.abort([Member("a", 0)], 5)
        found = server.aborted([Member("a", 0)], 5, 10.0 if obeyed else 5 * BEAT)
        assert (found.keys() == {Member("a", 0)}) is obeyed and (aborted == [5]) is obeyed
        assert heard(server)  # but it stays connected
