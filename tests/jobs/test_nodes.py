"""A run over several raylets: nodes that Ray knows, one rank for each unit of `rank` that they offer."""

from __future__ import annotations

import json
import os
import re
import signal

import pytest

from jobs.session import rank_kind
from tests.cluster import eventually


@pytest.mark.parametrize("offered, kind", [
    ([{"CPU": 8.0}, {"CPU": 8.0, "GPU": 4.0}], "GPU"),
    ([{"CPU": 8.0}, {"CPU": 8.0, "rank": 2.0}], "rank"),
    ([{"CPU": 8.0}], "CPU"),
])
def test_a_rank_takes_the_same_of_every_node(offered, kind):
    assert rank_kind(offered) == kind


@pytest.fixture
def two_nodes(cluster, ray_local):
    """The head and two raylets that offer one rank each."""
    added = [cluster.add_node({"rank": 1}) for _ in range(2)]
    yield
    for process in added:
        cluster.remove_node(process)
    eventually(lambda: not ray_local.cluster_resources().get("rank"), 60, "the nodes are gone")


def test_rows_on_two_raylets_and_a_lost_rank_ends_the_run_in_one_line(cluster, settings, two_nodes, ray_local):
    """EP over two nodes; then the SIGKILL of one rank in mid-run: exit 1 within seconds, state kept, no actor left."""
    nodes = {"layout__pipeline": 1, "layout__expert": 2, "layout__data": 1, "topology__virtual_nodes": 0,
             "topology__ranks_per_node": "auto"}
    done = cluster.run(*settings("whole", **nodes))
    assert done.returncode == 0, done.stderr
    layout = json.loads((settings.runs / "whole" / "ledger.jsonl").read_text().splitlines()[0])["layout"]
    offering = {node["NodeID"] for node in ray_local.nodes() if node["Alive"] and node["Resources"].get("rank")}
    assert set(layout["nodes"]) == offering and len(offering) == 2
    process = cluster.start(*settings("lost", **nodes, training__steps=100_000, training__validate_every=0))
    metrics = settings.runs / "lost" / "metrics.jsonl"
    eventually(lambda: process.poll() is not None or (metrics.exists() and metrics.read_text().count("\n") >= 3), 90, "three steps")
    rank = next(pid for pid, command in cluster.processes() if command.startswith(b"ray::StageActor"))
    os.kill(rank, signal.SIGKILL)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 1, (out, err)
    told = [line for line in err.splitlines() if line.strip()]
    assert len(told) == 1 and re.search(r"^rank \d: its process or node was lost$", told[0]), err
    assert "Traceback" not in out + err and "worker" not in out, out  # nor Ray's own paragraph about it
    eventually(lambda: not cluster.actors(), 20, "no actor is left")
