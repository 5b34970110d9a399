"""One training run of the precision bench, in a process of its own."""

from __future__ import annotations

import statistics
import sys
import tempfile

from actors.data.dataset import Dataset
from actors.hosts.processes import ProcessRanks
from jobs.benches.churn.run import TokenizedBatches, train
from orchestrator.config.run_config import RunConfig
from orchestrator.layout.layout import choose
from orchestrator.topology import virtual_nodes


def trained(config: RunConfig, steps: int) -> tuple[list[float], float]:
    """(loss of every step, median seconds of a step's work on a rank). The schedule of the learning rate is that of config."""
    topology = config.topology
    layout = choose(virtual_nodes(topology.virtual_nodes, topology.ranks_per_node), config.layout, config.model, config.stages)
    rows = TokenizedBatches(config, Dataset.open(config.data.path), steps)
    with tempfile.TemporaryDirectory() as folder, ProcessRanks(config, layout.size) as ranks:
        told = train(ranks, config, layout, rows, folder)
    return [step["loss"] for step in told.steps], statistics.median(step["rank_seconds"] for step in told.steps)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
