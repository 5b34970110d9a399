"""What an autoscaler is asked for."""

from __future__ import annotations

import pytest

from actors.hosts import cluster
from actors.hosts.cluster import wanted_bundles
from orchestrator.config.run_config import parse


def node(alive: bool = True, pool: str = "a", **resources: float) -> dict:
    return {"NodeID": f"node-{resources}", "Alive": alive, "Resources": resources, "Labels": {"pool": pool}}


@pytest.mark.parametrize("overrides, table, wanted", [
    (["elastic.max_nodes=3"], [node(CPU=8, GPU=4), node(CPU=8, GPU=8)], [{"GPU": 8}] * 3),
    (["elastic.max_nodes=3"], [node(CPU=8), node(CPU=8, rank=2)], [{"rank": 2}] * 3),
    (["elastic.max_nodes=3"], [node(CPU=8, rank=2), node(CPU=8, rank=4, alive=False)], [{"rank": 2}] * 3),
    (["elastic.min_nodes=2"], [node(CPU=8, rank=2)], [{"rank": 2}] * 2),
    ([], [node(CPU=8, rank=2)], []),  # no limit, and one node is enough
    (["elastic.max_nodes=3"], [node(CPU=8)], []),  # Ray is not asked for CPUs
    (["elastic.max_nodes=3"], [], []),
    (["elastic.max_nodes=3", "topology.resource=GPU", "topology.ranks_per_node=8"], [], [{"GPU": 8}] * 3),  # told how large they are
    (["topology.resource=GPU", "topology.ranks_per_node=8"], [], [{"GPU": 8}]),
    (["elastic.max_nodes=2", "topology.labels.pool=a"], [node(CPU=8, GPU=4), node(pool="b", CPU=8, GPU=8)], [{"GPU": 4}] * 2),
    (["elastic.max_nodes=2", "topology.labels.pool=a"], [node(pool="b", CPU=8, GPU=8)], []),
    (["elastic.max_nodes=2", "topology.resource=NPU"], [node(CPU=8, GPU=4, NPU=2)], [{"NPU": 2}] * 2),
    (["elastic.max_nodes=2", "topology.ranks_per_node=1"], [node(CPU=8, rank=2)], [{"rank": 1}] * 2),
])
def test_as_many_nodes_as_the_run_may_use(overrides, table, wanted):
    config = parse({"topology": {"virtual_nodes": 0, "ranks_per_node": "auto"}}, overrides)
    assert wanted_bundles(config, table) == wanted


@pytest.mark.parametrize("overrides, selectors", [([], {}), (["topology.labels.pool=a"], {
    "bundle_label_selectors": [{"pool": "a"}] * 2})])
def test_nodes_are_asked_for_with_their_labels(monkeypatch, overrides, selectors):
    asked = []
    monkeypatch.setattr(cluster.ray, "nodes", lambda: [node(CPU=8, GPU=4)])
    monkeypatch.setattr(cluster, "request_resources", lambda **wanted: asked.append(wanted))
    cluster.ask_for_nodes(parse({}, ["elastic.max_nodes=2", *overrides]))
    assert asked == [{"bundles": [{"GPU": 4}] * 2} | selectors]


def test_what_was_asked_for_is_taken_back(monkeypatch):
    asked = []
    monkeypatch.setattr(cluster.ray, "nodes", lambda: [node(CPU=8, GPU=4)])
    monkeypatch.setattr(cluster, "request_resources", lambda **wanted: asked.append(wanted))
    cluster.ask_for_no_more(parse({}, ["elastic.max_nodes=2"]))
    cluster.ask_for_no_more(parse({}))  # it had asked for nothing
    assert asked == [{"bundles": []}]


def test_what_a_rank_takes_is_settled_once(monkeypatch):
    """A node with a GPU that joins a run on CPUs is no reason to leave the others."""
    table = [node(CPU=8), node(CPU=4)]
    monkeypatch.setattr(cluster.ray, "nodes", lambda: table)
    config = cluster.settled(parse({}, ["topology.ranks_per_node=2"]))
    assert config.topology.resource == "CPU" and [found.ranks for found in cluster.nodes(config)] == [2, 2]
    table.append(node(CPU=8, GPU=8))
    assert [found.ranks for found in cluster.nodes(config)] == [2, 2, 2]
    assert cluster.settled(config) == config


def test_a_node_without_cpus_for_us_offers_none(monkeypatch):
    monkeypatch.setattr(cluster.ray, "nodes", lambda: [node(CPU=0), node(CPU=8)])
    assert [found.ranks for found in cluster.nodes(parse({}, ["topology.ranks_per_node=2"]))] == [2]


def test_a_rank_that_may_be_anywhere_is_on_a_node_with_the_labels(monkeypatch):
    monkeypatch.setattr(cluster.ray, "nodes", lambda: [node(CPU=8, GPU=4)])
    config = parse({}, ["topology.labels.pool=in(a, b)"])
    assert cluster.actor_options(config, None) == {"num_gpus": 1, "label_selector": {"pool": "in(a, b)"}}
