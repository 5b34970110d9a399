"""Everything that befalls the nodes of a run, on real raylets: the curve does not move, nothing is used twice or left out.

DUALRAY_CHAOS: how many things happen, in place of a few; DUALRAY_CHAOS_SEED: another sequence of them. Needs root.
"""

from __future__ import annotations

import os
import random

import pytest

from jobs.benches.chaos.company import CONFIG
from jobs.benches.chaos.raylet_commands import command_of, finished, lines, tokens
from jobs.benches.chaos.raylet_hosts import NODES, Hosts, cluster_of
from jobs.benches.chaos.raylets import RayletCompany
from tests.cluster import committed, eventually

NOTICED = "noticed"
BLOWS = (("node cut off",), ("drain",), ("rank killed", "node killed"), ("node frozen",), ("coordinator killed",),
         ("rank killed",), ("node killed",), ("rank killed", NOTICED, "rank killed"))
"""What happens at once, or when what was before it is noticed."""
FEW = BLOWS[:5]
"""Of the others two are in the third, and one is in tests/actors/elastic/test_recovery.py."""
NUMBER, SEED = int(os.environ.get("DUALRAY_CHAOS", len(FEW))), int(os.environ.get("DUALRAY_CHAOS_SEED", 1))
COMPARED = 200
"""Steps until which rounding errors stay where they are: training multiplies them."""
SECONDS = 180.0
"""Bound on what a busy machine takes to go on, and to bring a node back."""


@pytest.fixture(scope="module")
def cluster():
    with cluster_of() as found:
        yield found


def sequence(number: int, chance: random.Random) -> list[tuple[str, ...]]:
    """All of them in some order, again and again."""
    found = []
    while len(found) < number:
        blows = BLOWS if number > len(FEW) else FEW
        found += chance.sample(blows, len(blows))
    return found[:number]


def told(company: RayletCompany, before: int = 0) -> set[str]:
    """Kinds of events, after so many."""
    return {told.name for told in company.events[before:]}


def befall(company: RayletCompany, blow: tuple[str, ...], chance: random.Random) -> None:
    """One after the other on different nodes, until the run uses all nodes again."""
    nodes = chance.sample(sorted(company.nodes()), len(company.nodes()))
    before = len(company.events)
    for kind in blow:
        if kind == NOTICED:
            eventually(lambda: "lost" in told(company, before), SECONDS, "it is noticed")
        else:
            company.strike(kind, [nodes.pop() for _ in range(company.kinds[kind].nodes)], chance)
    eventually(lambda: "generation" in told(company, before) and company.whole(), SECONDS, f"the run goes on after {blow}")


def test_a_run_survives_everything(cluster, tmp_path):
    data, chance = tokens(cluster, tmp_path), random.Random(SEED)
    company = RayletCompany(Hosts(cluster), tmp_path, data, "chaos")
    try:
        eventually(company.whole, SECONDS, f"{NODES} nodes")
        for blow in sequence(NUMBER, chance):
            befall(company, blow, chance)
        company.stop()
    finally:
        company.close()
    assert not {"state_lost", "started_over"} & told(company)
    steps = company.steps + 5
    finished(cluster, tmp_path, "end", *company.command, "--set", f"training.steps={steps}")
    assert not company.left()
    audit = finished(cluster, tmp_path, "audit", "jobs.status", "audit", str(company.folder))
    assert "each sequence was used exactly once" in audit
    assert [line["step"] for line in committed(company.folder / "ledger.jsonl")] == list(range(steps))

    alone = command_of(tmp_path, data, "alone", training={"steps": min(steps, COMPARED), "microbatch_sequences": 8},
                       layout={"pipeline": 1, "expert": 1}, topology={"virtual_nodes": 1, "ranks_per_node": 1},
                       checkpoint={"every": 0})
    finished(cluster, tmp_path, "alone", *alone)
    found, wanted = (lines(tmp_path / "runs" / name / "metrics.jsonl") for name in ("chaos", "alone"))
    for key in ("loss", "balance_loss", "gradient_norm"):
        assert [step[key] for step in found[: len(wanted)]] == pytest.approx([step[key] for step in wanted], rel=1e-9), key
    assert CONFIG["training"]["dtype"] == "float64"
