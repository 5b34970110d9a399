"""Whether bytes go both ways between two processes, over links that are whole, cut, or cut one way.

The cuts need root, like the network namespaces that they are made in.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time

import pytest
from heartbeat_tools import REPOSITORY

from actors.runtime.probe import ProbeListener, Prober
from jobs.benches.shared.networks import Network
from orchestrator.protocol.members import Member

SECONDS = 20.0
A, B, C = (Member(name, 0) for name in "abc")

LISTENER = """
import sys
from actors.runtime.probe import ProbeListener
listener = ProbeListener(sys.argv[1])
print(listener.address[1], flush=True)
sys.stdin.read()
"""
PROBER = """
import sys
from actors.runtime.probe import Prober
from orchestrator.protocol.members import Member
peers = {Member(text.split("=")[0], 0): (text.split("=")[1], int(text.split("=")[2])) for text in sys.argv[2:]}
print(*(member.node for member in Prober().not_reached(peers, float(sys.argv[1]))))
"""


@pytest.fixture
def listener():
    found = ProbeListener("127.0.0.1")
    yield found
    found.close()


@pytest.fixture
def deaf():
    """Takes connections, and does nothing with them."""
    with socket.create_server(("127.0.0.1", 0)) as found:
        yield found.getsockname()


def test_a_whole_link_is_reached(listener):
    began = time.monotonic()
    assert Prober().not_reached({A: listener.address, B: listener.address}, SECONDS) == ()
    assert Prober().not_reached({}, SECONDS) == () and time.monotonic() - began < SECONDS / 2


def test_nobody_listens_there_and_no_such_address(listener):
    began = time.monotonic()
    peers = {A: ("127.0.0.1", 1), B: listener.address, C: ("no address", 1)}
    assert Prober().not_reached(peers, SECONDS) == (A, C) and time.monotonic() - began < SECONDS / 2


def test_one_that_does_not_answer_costs_no_more_than_the_bound(listener, deaf):
    began = time.monotonic()
    assert Prober().not_reached({A: deaf, B: listener.address}, 0.5) == (A,)
    assert 0.5 <= time.monotonic() - began < SECONDS / 2


def test_other_bytes_than_were_sent_are_no_answer():
    with socket.create_server(("127.0.0.1", 0)) as server:
        def answer() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(10)
                connection.sendall(bytes(10))
        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        assert Prober().not_reached({A: server.getsockname()}, SECONDS, count=10) == (A,)
        thread.join(SECONDS)


def test_many_probe_at_once(listener):
    found = []
    threads = [threading.Thread(target=lambda: found.append(Prober().not_reached({A: listener.address}, SECONDS))) for _ in range(32)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS)
    assert found == [()] * 32


def test_closing_leaves_nothing_behind():
    before, threads = set(os.listdir("/proc/self/fd")), threading.active_count()
    listener = ProbeListener("127.0.0.1")
    with socket.create_connection(listener.address) as caller:
        caller.sendall(b"left open")
        assert caller.recv(9) == b"left open"
        listener.close()
        assert caller.recv(1) == b""
    assert set(os.listdir("/proc/self/fd")) == before and threading.active_count() == threads


def inside(namespace: str, source: str, *arguments: object) -> list[str]:
    return ["ip", "netns", "exec", namespace, sys.executable, "-c", source, *map(str, arguments)]


def test_a_link_that_is_cut_in_one_direction_is_not_reached_from_either_side():
    """Three nodes. What the first sends to the second gets lost; all else arrives."""
    with Network(3, 1000.0) as network:
        addresses = [network.interface(node).address for node in range(3)]
        listeners = [subprocess.Popen(inside(namespace, LISTENER, address), cwd=REPOSITORY, stdin=subprocess.PIPE,
                                      stdout=subprocess.PIPE, text=True)
                     for namespace, address in zip(network.namespaces, addresses)]
        try:
            ports = [int(listener.stdout.readline()) for listener in listeners]
            subprocess.run(["ip", "netns", "exec", network.namespaces[0], "ip", "route", "replace", "blackhole", f"{addresses[1]}/32"],
                           check=True)

            def not_reached(node: int) -> set[str]:
                peers = [f"{other}={addresses[other]}={ports[other]}" for other in range(3) if other != node]
                done = subprocess.run(inside(network.namespaces[node], PROBER, 2.0, *peers), cwd=REPOSITORY, check=True,
                                      capture_output=True, text=True)
                return set(done.stdout.split())

            assert [not_reached(node) for node in range(3)] == [{"1"}, {"0"}, set()]
        finally:
            for listener in listeners:
                listener.kill()
                listener.wait()
                listener.stdin.close()
                listener.stdout.close()
