"""What Ray says of its nodes, as news: on a real cluster, and what no cluster can be made to say."""

from __future__ import annotations

import queue
import threading
import time
from types import SimpleNamespace

import pytest

from actors.hosts import cluster as ray_cluster
from actors.hosts.cluster import NodeWatch
from jobs.benches.chaos.raylet_commands import drained
from orchestrator.config.run_config import parse
from orchestrator.topology import Node
from tests.cluster import eventually

SETTINGS = {"topology": {"virtual_nodes": 0, "ranks_per_node": "auto"}}


@pytest.fixture
def watch(ray_local):
    found = NodeWatch(parse(SETTINGS))
    yield found
    found.close()


def heard(watch, seconds=60.0):
    """The next piece of news of a node that offers ranks by the resource `rank`."""
    return eventually(watch.news, seconds, "news")


def test_a_node_joins_drains_and_leaves(cluster, ray_local, watch):
    """With an actor on it: an idle one goes as soon as it is told to drain."""
    process = cluster.add_node({"rank": 3})
    resident = ray_local.remote(num_cpus=0, resources={"rank": 1})(threading.Event).remote()  # anything that a worker can import
    try:
        assert ray_local.get(resident.is_set.remote(), timeout=60) is False
        news = []
        while not any(one.kind == "joined" and one.node.ranks == 3 for one in news):
            news += heard(watch)
        name = next(node["NodeID"] for node in ray_local.nodes() if node["Alive"] and node["Resources"].get("rank"))
        assert {one.node.name for one in news if one.node.ranks == 3} == {name}
        drained(cluster.address, name, time.time() + 30)
        draining = None
        while draining is None:
            draining = next((one for one in heard(watch) if one.kind == "draining"), None)
        assert (draining.kind, draining.node) == ("draining", Node(name, 3))
        assert 20 < draining.deadline - time.monotonic() < 30.5
    finally:
        ray_local.kill(resident)
        cluster.remove_node(process)
    left = []
    while not any(one.kind == "left" for one in left):
        left += heard(watch)
    assert [one.node for one in left if one.kind == "left"] == [Node(name, 3)]


def test_a_control_store_that_does_not_answer_is_told_once_and_so_is_its_return(monkeypatch):
    """Whoever asks for the nodes waits as long as it is away."""
    asked, answers, told = threading.Event(), threading.Event(), queue.SimpleQueue()

    def nodes():
        asked.set()
        assert answers.wait(60)
        return []

    monkeypatch.setattr(ray_cluster, "AWAY_SECONDS", 0.5)
    monkeypatch.setattr(ray_cluster, "ask_for_nodes", lambda config: None)
    monkeypatch.setattr(ray_cluster, "ray", SimpleNamespace(nodes=nodes))
    monkeypatch.setattr(ray_cluster, "state", SimpleNamespace(get_draining_nodes=dict))
    watch = NodeWatch(parse(SETTINGS), lambda event: told.put((event.name, event.seconds)))
    try:
        assert asked.wait(60)
        kind, seconds = told.get(timeout=60)
        assert kind == "control_store_away" and seconds > 0.5
        answers.set()
        kind, away = told.get(timeout=60)
        assert kind == "control_store_back" and away > 0.5 and told.empty()
    finally:
        answers.set()
        watch.close()


def test_nodes_are_looked_for_whatever_an_answer_was(monkeypatch):
    answers = queue.SimpleQueue()
    for answer in (ConnectionError("of Ray's client"), [{"NodeID": "a"}], None):
        answers.put(answer)

    def nodes():
        answer = answers.get()
        if isinstance(answer, Exception):
            raise answer
        return answer or [{"NodeID": "a", "Alive": True, "Resources": {"rank": 2}}]

    monkeypatch.setattr(ray_cluster, "ask_for_nodes", lambda config: None)
    monkeypatch.setattr(ray_cluster, "ray", SimpleNamespace(nodes=nodes))
    monkeypatch.setattr(ray_cluster, "state", SimpleNamespace(get_draining_nodes=dict))
    watch = NodeWatch(parse(SETTINGS))
    try:
        assert [(one.kind, one.node) for one in heard(watch)] == [("joined", Node("a", 2))]
    finally:
        watch.close()
        answers.put(None)


def test_who_has_always_been_there_joins_once_and_who_stays_is_told():
    watch = NodeWatch(parse({"topology": {"virtual_nodes": 2, "ranks_per_node": 1}}))  # it asks nobody
    a, b = Node("a", 2), Node("b", 1)
    assert [(one.kind, one.node) for one in watch._compared({"a": a, "b": b}, {})] == [("joined", a), ("joined", b)]
    assert watch._compared({"a": a, "b": b}, {}) == []
    now = time.time()
    first, = watch._compared({"a": a, "b": b}, {"b": int(1000 * (now + 5))})
    assert first.kind == "draining" and first.deadline - time.monotonic() == pytest.approx(5, abs=0.5)
    assert watch._compared({"a": a, "b": b}, {"b": int(1000 * (now + 5))}) == []
    other, = watch._compared({"a": a, "b": b}, {"b": 0})
    assert other.kind == "draining" and other.deadline is None
    assert [(one.kind, one.node) for one in watch._compared({"a": a, "b": b}, {})] == [("stays", b)]
    assert [(one.kind, one.node) for one in watch._compared({"a": a}, {})] == [("left", b)]
    assert [(one.kind, one.node.ranks) for one in watch._compared({"a": Node("a", 1)}, {})] == [("joined", 1)]
