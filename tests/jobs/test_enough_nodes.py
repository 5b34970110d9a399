"""A run that is started before its nodes are there."""

from __future__ import annotations

import re

import pytest

from tests.cluster import eventually


@pytest.mark.parametrize("changes, code, told", [
    ({"elastic__min_nodes": 3}, 2, "elastic.min_nodes = 3: at most topology.virtual_nodes = 1"),
    ({"elastic__min_nodes": 40, "elastic__wait_seconds": 0.5, "topology__virtual_nodes": 0}, 1,
     r"no more than \d+ of at least 40 nodes within elastic.wait_seconds = 0.5"),
])
def test_too_few_nodes_are_one_line(cluster, settings, changes, code, told):
    done = cluster.run(*settings("few", **changes))
    assert done.returncode == code
    assert len(done.stderr.splitlines()) == 1
    assert re.search(told, done.stderr), done.stderr


def test_it_waits_for_the_least_number_of_nodes(cluster, settings, ray_local):
    """The head offers ranks by CPUs until nodes with the resource `rank` come; the run takes these."""
    process = cluster.start(*settings("waiting", elastic__min_nodes=2, topology__virtual_nodes=0, topology__ranks_per_node=1,
                                      training__steps=3))
    eventually(lambda: "waiting: 1 of at least 2 nodes are there" in process.stdout.readline(), 60, "it says that it waits")
    added = cluster.add_nodes({"rank": 1}, ["", ""])
    try:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, (out, err)
    finally:
        for node in added:
            cluster.remove_node(node)
        eventually(lambda: not ray_local.cluster_resources().get("rank"), 60, "the nodes are gone")
