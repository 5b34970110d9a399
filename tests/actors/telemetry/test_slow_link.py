"""A node whose link becomes slow in truth is named while it is so: real ranks, one in each of three network namespaces.

Needs root, like the namespaces that it makes.
"""

from __future__ import annotations

import json

import pytest
from runtime import TIMEOUT_SECONDS, VOCABULARY, Batches

from actors.files.run_folder import RunFolder
from actors.hosts.processes import ProcessRanks
from actors.protocol.trainer import Sources, Trainer
from actors.telemetry.exporter import RunMetrics
from jobs.benches.overlap.tiny import rank_inside
from jobs.benches.shared.networks import Network
from orchestrator.config.run_config import parse
from orchestrator.layout.layout import choose
from orchestrator.schedule.ir.spans import Lane
from orchestrator.topology import virtual_nodes

NODES, MEGABITS, SLOW_SHARE = 3, 30.0, 0.1
SLOW, SLOW_FROM, SLOW_UNTIL, STEPS = 1, 3, 8, 14
SETTINGS = {
    "model": {"vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 2, "first_k_dense_replace": 0,
              "moe_intermediate_size": 16, "n_routed_experts": 6, "num_experts_per_tok": 2, "n_group": 3, "topk_group": 2,
              "num_attention_heads": 2, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4,
              "v_head_dim": 8},
    "data": {"sequence_length": 8},
    "training": {"steps": STEPS, "batch_sequences": 48, "microbatch_sequences": 8, "dtype": "float32", "validate_every": 0,
                 "validation_sequences": 0},
    "layout": {"pipeline": 1, "expert": NODES, "data": 1},
    "checkpoint": {"every": 0},
}


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """A run of which one node's interface is slow for some steps: events of links from its file, and at every step what the
    metrics say of links, by (rank, node, peer, lane)."""
    config = parse(SETTINGS)
    layout = choose(virtual_nodes(NODES, 1), config.layout, config.model, config.stages)
    folder, metrics, shown = tmp_path_factory.mktemp("run"), RunMetrics(), {}

    def watch(kind, values):
        metrics.observe(kind, values)
        if kind == "step":  # its events come after it, those of the step before are known
            shown[values["step"]] = {tuple(sample.labels[name] for name in ("rank", "node", "peer", "lane")): sample.value
                                     for family in metrics.registry.collect() for sample in family.samples
                                     if sample.name == "dualray_slow_factor" and sample.labels["lane"] != Lane.COMPUTE}

    with Network(NODES, MEGABITS) as network:
        slow = network.interface(SLOW)
        before = {SLOW_FROM: lambda: network.set_rate(slow, MEGABITS * SLOW_SHARE),
                  SLOW_UNTIL: lambda: network.set_rate(slow, MEGABITS)}
        failed = []

        def reached(step: int) -> None:
            trainer.wait_until(lambda run: run.phase.name == "fetching batch" and run.committed == step, TIMEOUT_SECONDS)
        sources = Sources(lambda step: Batches(config, step, before, reached, failed.append), lambda: None)
        own = [(interface.namespace, interface.address) for interface in network.interfaces]
        with ProcessRanks(config, NODES, rank_inside, own, start_method="forkserver") as ranks:
            trainer = Trainer(config, layout, ranks, RunFolder(str(folder), "run"), sources, host=network.host, watch=watch)
            trainer.run()
    assert not failed
    events = [json.loads(line) for line in (folder / "run" / "events.jsonl").read_text().splitlines()]
    # the cores are shared, also with others, so a rank may well compute slowly: that is another test's
    return [event for event in events if event["event"] in ("slow", "slow_over") and event["lane"] != Lane.COMPUTE], shown


def test_the_node_with_the_slow_link_is_named_and_nobody_else(told):
    events, _ = told
    assert [(event["event"], event["rank"], event["node"], event["peer"], event["lane"]) for event in events] == [
        (kind, SLOW, f"virtual-{SLOW}", None, Lane.EXCHANGE) for kind in ("slow", "slow_over")]


def test_it_is_named_within_five_steps_and_over_within_six(told):
    (named, over), _ = told
    assert SLOW_FROM <= named["step"] < SLOW_FROM + 5 and named["factor"] >= 2
    assert SLOW_UNTIL <= over["step"] < SLOW_UNTIL + 6 and over["factor"] < 2


def test_the_metrics_say_so_while_it_lasts(told):
    (named, over), shown = told
    series = {(str(SLOW), f"virtual-{SLOW}", "", "exchange"): named["factor"]}
    assert shown == {step: series if named["step"] < step <= over["step"] else {} for step in range(STEPS)}
