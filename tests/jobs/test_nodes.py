"""A run over several raylets: nodes that Ray knows and that have a label, one rank for each unit of a resource that they offer."""

from __future__ import annotations

import json
import os
import signal

import pytest

from actors.hosts.cluster import rank_kind
from actors.state import checkpoint
from tests.cluster import committed, eventually


@pytest.mark.parametrize("offered, wanted, kind", [
    ([{"CPU": 8.0}, {"CPU": 8.0, "GPU": 4.0}], "auto", "GPU"),
    ([{"CPU": 8.0}, {"CPU": 8.0, "rank": 2.0}], "auto", "rank"),
    ([{"CPU": 8.0}], "auto", "CPU"),
    ([{"CPU": 8.0, "GPU": 4.0, "NPU": 2.0}], "NPU", "NPU"),
])
def test_a_rank_takes_the_same_of_every_node(offered, wanted, kind):
    assert rank_kind(offered, wanted) == kind


@pytest.fixture
def two_nodes(cluster, ray_local):
    """The head and two raylets for training, and one for something else, which offer one unit of `seat` each."""
    added = cluster.add_nodes({"seat": 1}, ["pool=train", "pool=train", "pool=serve"])
    yield
    for process in added:
        cluster.remove_node(process)
    eventually(lambda: not ray_local.cluster_resources().get("seat"), 60, "the nodes are gone")


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]] if path.exists() else []


def test_rows_on_two_raylets_and_a_lost_rank_is_replaced(cluster, settings, two_nodes, ray_local):
    """EP over two nodes. The SIGKILL of one rank in mid-run: on with the other, then with both again; the other was never
    restarted. Ctrl-C saves; no actor is left."""
    nodes = {"layout__pipeline": 1, "layout__expert": 2, "layout__data": 1, "topology__virtual_nodes": 0,
             "topology__ranks_per_node": "auto"}
    nodes |= {"elastic__silence_seconds": 5.0}  # other tests run beside it, and neither of its nodes is to be lost for that
    nodes |= {"topology__resource": "seat", "topology__labels": {"pool": "in(train, both)"}}
    process = cluster.start(*settings("lost", **nodes, training__steps=100_000, training__validate_every=0))
    folder, out, err = settings.runs / "lost", "", ""
    ledger = folder / "ledger.jsonl"

    def until(condition, what, seconds=90):
        eventually(lambda: process.poll() is not None or condition(), seconds, what)
        assert process.poll() is None, process.communicate()

    def generations():
        return [event for event in lines(folder / "events.jsonl") if event["event"] == "generation"]

    def ranks():
        return {pid for pid, command in cluster.processes() if command.startswith(b"ray::StageActor")}

    try:
        until(lambda: len(committed(ledger)) >= 3, "three steps")
        layout = committed(ledger)[0]["layout"]
        offering = {node["NodeID"] for node in ray_local.nodes() if node["Alive"] and node["Labels"].get("pool") == "train"}
        assert set(layout["nodes"]) == offering and len(offering) == 2
        killed, spared = ranks()
        os.kill(killed, signal.SIGKILL)
        until(lambda: len(generations()) >= 3, "a generation without it, and one with another in its place")
        before = len(committed(ledger))
        until(lambda: len(committed(ledger)) >= before + 3, "three more steps")
        assert spared in ranks() and killed not in ranks() and len(ranks()) == 2
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    assert process.returncode == 130, (out, err)
    first, without, again = generations()[:3]
    assert [event["nodes"] for event in (first, without, again)] == [2, 1, 2] and first["layout"] == again["layout"]
    lost, = [event for event in lines(folder / "events.jsonl") if event["event"] == "lost"]
    assert len(lost["members"]) == 1 and lost["members"][0].rpartition("/")[0] in offering
    steps = [line["step"] for line in committed(ledger)]
    assert steps == list(range(len(steps))) and [line["step"] for line in lines(folder / "metrics.jsonl")] == steps
    newest = checkpoint.complete(f"{folder}/checkpoints")[-1]
    assert checkpoint.read_manifest(newest).step == len(steps)
    assert "Traceback" not in out + err and "worker" not in out, out  # nor Ray's own paragraph about it
    eventually(lambda: not cluster.actors(), 20, "no actor is left")
