"""Everything that befalls the nodes of a run, on real raylets: the curve does not move, nothing is used twice or left out.

DUALRAY_CHAOS: how many things happen, in place of a few; DUALRAY_CHAOS_SEED: another sequence of them. Needs root.
"""

from __future__ import annotations

import os
import random

import pytest

from jobs.benches.raylets import RayletCluster
from tests.cluster import committed
from tests.cluster.chaos import CONFIG, NODES, Chaos, command_of, finished, lines, tokens

KINDS = ("cut", "drain", "two_at_once", "frozen", "coordinator", "rank", "node", "again_while_it_recovers")
FEW = KINDS[:5]
"""Of the others two are in `two_at_once`, and one is in tests/actors/test_recovery.py."""
NUMBER, SEED = int(os.environ.get("DUALRAY_CHAOS", len(FEW))), int(os.environ.get("DUALRAY_CHAOS_SEED", 1))
COMPARED = 200
"""Steps until which rounding errors stay where they are: training multiplies them."""


@pytest.fixture(scope="module")
def cluster():
    with RayletCluster(NODES, 1, environment={"RAY_memory_monitor_refresh_ms": "0"}) as found:  # others use memory too
        yield found


def sequence(number: int, seed: int) -> list[str]:
    """All kinds in some order, again and again."""
    chance, found = random.Random(seed), []
    while len(found) < number:
        kinds = KINDS if number > len(FEW) else FEW
        found += chance.sample(kinds, len(kinds))
    return found[:number]


def test_a_run_survives_everything(cluster, tmp_path):
    data = tokens(cluster, tmp_path)
    chaos = Chaos(cluster, tmp_path, data, SEED)
    try:
        for kind in sequence(NUMBER, SEED):
            chaos.befall(kind)
        assert chaos.stop() == 130, chaos.log()[-4000:]
    finally:
        chaos.close()
    assert not chaos.told("state_lost", "started_over")
    steps = chaos.steps + 5
    finished(cluster, tmp_path, "end", *chaos.command, "--set", f"training.steps={steps}")
    assert not [pid for node in range(NODES + 1) for pid in chaos.ranks(node)] and chaos.coordinator() is None
    told = finished(cluster, tmp_path, "audit", "jobs.status", "audit", str(chaos.path))
    assert "each sequence was used exactly once" in told
    assert [line["step"] for line in committed(chaos.path / "ledger.jsonl")] == list(range(steps))

    alone = command_of(tmp_path, data, "alone", training={"steps": min(steps, COMPARED), "microbatch_sequences": 8},
                       layout={"pipeline": 1, "expert": 1}, topology={"virtual_nodes": 1, "ranks_per_node": 1},
                       checkpoint={"every": 0})
    finished(cluster, tmp_path, "alone", *alone)
    found, wanted = (lines(tmp_path / "runs" / name / "metrics.jsonl") for name in ("chaos", "alone"))
    for key in ("loss", "balance_loss", "gradient_norm"):
        assert [step[key] for step in found[: len(wanted)]] == pytest.approx([step[key] for step in wanted], rel=1e-9), key
    assert CONFIG["training"]["dtype"] == "float64"
