"""Blows that overlap, on real raylets, and a stop after them. Needs root."""

from __future__ import annotations

import random

import pytest

from jobs.benches.chaos.raylet_commands import finished, tokens
from jobs.benches.chaos.raylet_hosts import NODES, Hosts, cluster_of
from jobs.benches.chaos.raylets import RayletCompany
from tests.cluster import committed, eventually

SECONDS = 180.0
"""Bound on what a busy machine takes to go on, and to bring a node back."""


@pytest.mark.long
def test_blows_that_overlap_cost_nothing_that_was_committed(tmp_path):
    """A node is frozen, another one's rank ends, and neither coordinator nor driver is there to see it."""
    chance = random.Random(1)
    with cluster_of() as cluster:
        company = RayletCompany(Hosts(cluster), tmp_path, tokens(cluster, tmp_path), "chaos")
        try:
            eventually(company.whole, SECONDS, f"{NODES} nodes")
            names = list(company.nodes())
            pids = {name: set(company.processes(name)) for name in names}
            frozen = company.strike("node frozen", names[:1], chance)
            company.strike("rank killed", names[1:2], chance)
            company.strike("coordinator killed", (), chance)
            company.strike("driver killed", (), chance)
            assert set(company.nodes()) <= set(names[1:])  # it is not told of the rank yet
            eventually(company.whole, SECONDS, "the run uses all nodes again")
            assert frozen.ended and company.hosts.node(names[0]) is None and company.hosts.node(frozen.nodes[-1]) is not None
            assert all(set(company.processes(name)) == pids[name] for name in names[2:])
            company.stop()
        finally:
            company.close()
        assert not company.left()
        assert not {"state_lost", "started_over"} & {told.name for told in company.events}
        audit = finished(cluster, tmp_path, "audit", "jobs.status", "audit", str(company.folder))
        assert "each sequence was used exactly once" in audit
    steps = committed(company.folder / "ledger.jsonl")
    assert [line["step"] for line in steps] == list(range(len(steps)))
