"""What an autoscaler is asked for."""

from __future__ import annotations

import pytest

from actors.cluster import wanted_bundles
from orchestrator.config import parse


def node(alive: bool = True, **resources: float) -> dict:
    return {"NodeID": f"node-{resources}", "Alive": alive, "Resources": resources}


@pytest.mark.parametrize("overrides, table, wanted", [
    (["elastic.max_nodes=3"], [node(CPU=8, GPU=4), node(CPU=8, GPU=8)], [{"GPU": 8}] * 3),
    (["elastic.max_nodes=3"], [node(CPU=8), node(CPU=8, rank=2)], [{"rank": 2}] * 3),
    (["elastic.max_nodes=3"], [node(CPU=8, rank=2), node(CPU=8, rank=4, alive=False)], [{"rank": 2}] * 3),
    (["elastic.min_nodes=2"], [node(CPU=8, rank=2)], [{"rank": 2}] * 2),
    ([], [node(CPU=8, rank=2)], []),  # no limit, and one node is enough
    (["elastic.max_nodes=3"], [node(CPU=8)], []),  # Ray is not asked for CPUs
    (["elastic.max_nodes=3"], [], []),
    (["elastic.max_nodes=2", "topology.ranks_per_node=1"], [node(CPU=8, rank=2)], [{"rank": 1}] * 2),
])
def test_as_many_nodes_as_the_run_may_use(overrides, table, wanted):
    config = parse({"topology": {"virtual_nodes": 0, "ranks_per_node": "auto"}}, overrides)
    assert wanted_bundles(config, table) == wanted
