"""Noticing that a raylet or the control store is gone: with stand-ins for both."""

from __future__ import annotations

import queue
import socket

import pytest
from ray.exceptions import RpcError

from jobs.driver import lost
from jobs.driver.lost import ClusterWatch

SECONDS = 30.0


class Store:
    """A control store's client. address: of one that listens, if it does."""

    def __init__(self, listens: bool):
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address, self.answers, self.asked = f"127.0.0.1:{self._listener.getsockname()[1]}", True, queue.SimpleQueue()
        if not listens:
            self._listener.close()

    def check_alive(self, nodes, timeout):
        self.asked.put(timeout)
        if not self.answers:
            raise RpcError("no answer")

    def close(self):
        self._listener.close()


@pytest.fixture
def raylet(tmp_path):
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(f"{tmp_path}/raylet")
    listener.listen()
    with listener:
        yield listener


@pytest.fixture
def watched(raylet, monkeypatch):
    """Makes a watch of a store, and the queue of what it tells."""
    monkeypatch.setattr(lost, "_LOOK_SECONDS", 0.02)
    made = []

    def watch(store):
        told = queue.SimpleQueue()
        made.append((watching := ClusterWatch("go home", told.put, raylet.getsockname(), store), store))
        watching.__enter__()
        connection, _ = raylet.accept()
        return told, connection
    yield watch
    for watching, store in made:
        watching.__exit__()
        store.close()


def test_a_raylet_that_ends_is_told_at_once(watched):
    told, connection = watched(Store(listens=True))
    connection.close()
    assert told.get(timeout=SECONDS) == "this host's raylet has ended: go home"


def test_a_raylet_that_was_gone_before_is_told(tmp_path):
    told = queue.SimpleQueue()
    store = Store(listens=True)
    with ClusterWatch("go home", told.put, f"{tmp_path}/nothing", store):
        assert told.get(timeout=SECONDS).startswith("this host's raylet is gone (")
    store.close()


def test_what_a_raylet_says_is_no_end(watched):
    told, connection = watched(store := Store(listens=True))
    connection.sendall(b"hello")
    for _ in range(3):
        store.asked.get(timeout=SECONDS)
    assert told.empty()
    connection.close()


def test_a_store_where_nobody_listens_is_given_up_sooner_than_one_that_is_silent(watched, monkeypatch):
    monkeypatch.setattr(lost, "REFUSED_SECONDS", 0.1)
    gone, connection = watched(nobody := Store(listens=False))
    nobody.answers = False
    assert gone.get(timeout=SECONDS).startswith("Ray's control store has not answered for ")
    connection.close()


def test_a_silent_store_may_be_busy(watched, monkeypatch):
    monkeypatch.setattr(lost, "REFUSED_SECONDS", 0.0)
    told, connection = watched(store := Store(listens=True))
    store.answers = False
    for _ in range(10):
        store.asked.get(timeout=SECONDS)
    assert told.empty()
    monkeypatch.setattr(lost, "SILENT_SECONDS", 0.0)
    assert told.get(timeout=SECONDS).startswith("Ray's control store")
    connection.close()


def test_after_the_block_nothing_is_told(raylet):
    told, store = queue.SimpleQueue(), Store(listens=True)
    with ClusterWatch("go home", told.put, raylet.getsockname(), store):
        connection, _ = raylet.accept()
    assert connection.recv(1) == b""  # the watch has left
    connection.close()
    store.close()
    assert told.empty()
