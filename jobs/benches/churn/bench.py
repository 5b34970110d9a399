"""A run whose nodes come and go: how much of the time is useful, how much speed is left, and that the curve does not move.

The product's trainer drives plain processes: on two cores, raylets and actors that start beside the run would take the very cores
whose work is to be measured. Ranks have a real model in float64 and compute lanes that are held (`churn_rank.py`), so that more
ranks than cores can be told apart. Nodes are processes of this machine, and what a cluster would say of them is said by a
thread: a node is killed, drains with notice, freezes, joins. Every layout that the run passes through is also run by itself,
undisturbed: that is the speed to compare with, and the curve.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

from pydantic import Field

from actors.data.dataset import Dataset
from actors.files.run_folder import RunFolder
from actors.hosts.processes import ProcessRanks
from jobs import audit, corpus
from jobs.benches.churn.rank import held_rank
from jobs.benches.churn.run import Churn, Said, TokenizedBatches, changes, train
from jobs.driver import session
from orchestrator.config.run_config import Real, RunConfig, Section, parse
from orchestrator.layout.layout import choose
from orchestrator.told import kinds, lines
from orchestrator.told.consumers import Selection
from orchestrator.topology import virtual_nodes

BAR, CURVE_BAR, STEP_BAR = 0.95, 1e-9, 0.5
_SHORTEST_STEP = 0.1
_WARM_UP = 3
_READ = Selection((kinds.GenerationFormed, kinds.RanksAborted), leaves=(
    kinds.LayoutPlanned, kinds.GenerationLoaded, kinds.Resumed, kinds.StartedOver, kinds.ExpertsPlaced, kinds.RanksLost,
    kinds.Interrupted, kinds.CommittedStateLost, kinds.CoordinatorRestarted, kinds.NodesJoining, kinds.NodesDraining,
    kinds.NodesAwaited, kinds.NodeIdle, kinds.NodeBarred, kinds.Slow, kinds.SlowOver, kinds.CheckpointWritten,
    kinds.CheckpointFailed, kinds.CheckpointUnreadable, kinds.CheckpointNotDeleted, kinds.StorageAway, kinds.DataAway,
    kinds.ControlStoreAway, kinds.ControlStoreBack, kinds.Validated, kinds.NotFinite, kinds.Replayed, kinds.UnknownEvent))


class Settings(Section):
    """What `--option KEY=VALUE` sets."""

    seconds: Real = Field(600.0, gt=0)
    every: Real = Field(30.0, gt=0, description="seconds between changes")
    seed: int = Field(1, ge=0)
    nodes: int = Field(4, ge=2)
    ranks: int = Field(2, ge=1, description="of a node")
    least: int = Field(2, ge=1, description="nodes that are always left")
    milliseconds: Real = Field(8.0, gt=0, description="of each compute segment of a layer, for a sequence")
    sequences: int = Field(16, ge=1, description="of a step")
    silence_seconds: Real = Field(1.0, gt=0)
    cool_down_seconds: Real = Field(0.5, ge=0)
    curve_steps: int = Field(200, ge=1, description="whose losses are compared with those of an undisturbed run")
    alone_steps: int = Field(40, ge=4, description="undisturbed steps of each other layout")


def run(config: RunConfig, settings: Settings) -> dict[str, Any]:
    """Shares of time and speed, the audit, the curve, and whether the bars hold."""
    started, load = time.perf_counter(), [os.getloadavg()]
    data = session.data_path(config)
    corpus.prepare(config, data)
    config, dataset = _configured(config, settings, data), Dataset.open(data)
    most_steps = max(settings.curve_steps, settings.alone_steps, int(settings.seconds / _SHORTEST_STEP)) + 1
    rows = TokenizedBatches(config, dataset, most_steps)
    folder = tempfile.mkdtemp(prefix="dualray-churn-")
    try:
        told, done = _disturbed(config, settings, rows, f"{folder}/churn")
        path = f"{folder}/churn/{config.run.name}"
        ledger, audited = RunFolder(f"{folder}/churn", config.run.name).ledger_lines(), audit.audit(path, config, dataset)
        load.append(os.getloadavg())
        passed = sorted({step["nodes"] for step in told.steps} | {settings.nodes}, reverse=True)
        alone = {nodes: _alone(config, settings, rows, nodes, f"{folder}/alone-{nodes}") for nodes in passed}
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    load.append(os.getloadavg())
    result = figures(told, {nodes: found.steps for nodes, found in alone.items()}, settings.curve_steps)
    return {"settings": settings.model_dump(), **result, "changes": [dataclasses.asdict(change) for change, _ in done],
            "events": dict(Counter(event.name for event in told.events)),
            "phases": _phases(told.events), "audit": {"steps": audited.steps, "sequences": audited.sequences,
                                                      "problems": [problem.text for problem in audited.problems]},
            "load_average": load, "run_seconds": time.perf_counter() - started,
            **_verdict(settings, result, audited, ledger, len(done))}


def small(config: RunConfig, nodes: int, ranks: int, overrides: Sequence[str]) -> RunConfig:
    """A model so small that its work is short beside the holds, on so many nodes; nothing in its steps but training."""
    return parse(config.model_dump(), [
        "training.steps=1000000", "training.microbatch_sequences=1", "training.validate_every=0", "training.validation_sequences=0",
        "checkpoint.every=0", "model.num_hidden_layers=2", "model.first_k_dense_replace=0", "model.num_nextn_predict_layers=0",
        "model.hidden_size=32", "model.intermediate_size=48", "model.moe_intermediate_size=16", "model.num_experts_per_tok=2",
        "model.num_attention_heads=2", "model.q_lora_rank=16", "model.kv_lora_rank=16", "model.qk_nope_head_dim=8",
        "model.qk_rope_head_dim=4", "model.v_head_dim=8", "layout.pipeline=2", "layout.expert=auto", "layout.data=auto",
        f"topology.virtual_nodes={nodes}", f"topology.ranks_per_node={ranks}", *overrides])


def _configured(config: RunConfig, settings: Settings, data: str) -> RunConfig:
    return small(config, settings.nodes, settings.ranks, [
        "run.name=churn", f"data.path={data}", f"training.batch_sequences={settings.sequences}", "training.dtype=float64",
        f"elastic.silence_seconds={settings.silence_seconds}", f"elastic.cool_down_seconds={settings.cool_down_seconds}"])


def _disturbed(config: RunConfig, settings: Settings, rows: TokenizedBatches, folder: str) -> tuple[Said, list]:
    layout = choose(virtual_nodes(settings.nodes, settings.ranks), config.layout, config.model, config.stages)
    planned = changes(layout.nodes, settings.least, int((settings.seconds - 1e-9) // settings.every), settings.every, settings.seed)
    with _processes(config, settings, layout.size) as ranks:
        churn = Churn(ranks, settings.ranks, planned, settings.seconds)
        told = train(ranks, config, layout, rows, folder, beside=churn)
    say(f"{len(told.steps)} steps, {len(churn.done)} changes, {dict(Counter(event.name for event in told.events))}")
    return told, churn.done


def _alone(config: RunConfig, settings: Settings, rows: TokenizedBatches, nodes: int, folder: str) -> Said:
    """The same run on so many nodes from begin to end."""
    layout = choose(virtual_nodes(nodes, settings.ranks), config.layout, config.model, config.stages)
    steps = settings.curve_steps if nodes == settings.nodes else settings.alone_steps
    with _processes(config, settings, layout.size) as ranks:
        told = train(ranks, config, layout, rows, folder, stop_after=steps)
    say(f"{nodes} nodes alone: {statistics.median(_intervals(told.steps)):.4f} s a step")
    return told


def _processes(config: RunConfig, settings: Settings, size: int) -> ProcessRanks:
    return ProcessRanks(config, size, held_rank, [(settings.milliseconds / 1000,)] * size, start_method="forkserver")


# --- figures -----------------------------------------------------------------------------------------------------------

def figures(told: Said, alone: dict[int, list[dict[str, Any]]], curve_steps: int) -> dict[str, Any]:
    """alone: metrics of an undisturbed run by number of nodes. Time counts from the commit of the first steps on.

    useful: time inside the calls of steps that were committed ÷ wall time. throughput: wall time that the same steps would have
    taken in undisturbed runs of the layouts that did them ÷ wall time.
    """
    steps = told.steps[_WARM_UP:]
    wall = steps[-1]["time"] - told.steps[_WARM_UP - 1]["time"]
    undisturbed = {nodes: statistics.median(_intervals(found)) for nodes, found in alone.items()}
    expected = sum(undisturbed[step["nodes"]] for step in steps)
    reference = alone[max(alone)]
    apart = [abs(one["loss"] - other["loss"]) / abs(other["loss"])
             for one, other in zip(told.steps[:curve_steps], reference, strict=False)]
    by_nodes = Counter(step["nodes"] for step in steps)
    return {"seconds": {"wall": wall, "step": {nodes: statistics.median(step["seconds"] for step in steps if step["nodes"] == nodes)
                                               for nodes in by_nodes}, "step_alone": undisturbed},
            "ratio": {"useful": sum(step["seconds"] for step in steps) / wall, "throughput": expected / wall},
            "steps": {"committed": len(told.steps), "by_nodes": dict(by_nodes)},
            "curve": {"steps": len(apart), "largest_relative_difference": max(apart)}}


def _intervals(steps: list[dict[str, Any]]) -> list[float]:
    """Seconds from one commit to the next, warm-up left out."""
    return [after["time"] - before["time"] for before, after in zip(steps[_WARM_UP - 1:], steps[_WARM_UP:], strict=False)]


def _phases(events: list[lines.Told]) -> dict[str, list[float]]:
    """Seconds of the phases of all changes, as the events have them."""
    formed = [one.event for one in _READ.of(events, kinds.GenerationFormed)]
    return {"aborted": [one.event.seconds for one in _READ.of(events, kinds.RanksAborted)],
            "generation": [event.seconds for event in formed], "grouping": [event.grouping_seconds for event in formed],
            "moving": [event.moving_seconds for event in formed]}


def _verdict(settings: Settings, result: dict[str, Any], audited: audit.Audited, ledger: list[dict[str, Any]], done: int
             ) -> dict[str, Any]:
    slowest = max(result["seconds"]["step"].values())
    checks = {
        f"useful time / wall time >= {BAR}": result["ratio"]["useful"] >= BAR,
        f"throughput / that of the layouts passed through, undisturbed >= {BAR}": result["ratio"]["throughput"] >= BAR,
        f"steps take at most {STEP_BAR} s, median, in every layout": slowest <= STEP_BAR,
        "the audit is clean: each sequence of each step was used exactly once": not audited.problems,
        "every step is in the ledger once, none is missing": [line["step"] for line in ledger] == list(range(len(ledger))),
        f"losses of the first {settings.curve_steps} steps differ by at most {CURVE_BAR:g} from the undisturbed run's": (
            result["curve"]["steps"] == settings.curve_steps and result["curve"]["largest_relative_difference"] <= CURVE_BAR),
        "a change happened at each of its times": done == int((settings.seconds - 1e-9) // settings.every)}
    return {"checks": checks, "valid": all(checks.values())}


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
