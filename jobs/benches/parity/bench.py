"""Every layout and kind of schedule against one plain process: the same data, losses and final parameters.

Exchanges run on their lane under compute, as they do unless a configuration says otherwise, in one hop or two. One layout of each
form also runs with exchanges and compute in turn: both must give the same bits.
"""

from __future__ import annotations

import multiprocessing
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy

from actors.data.batching import Batch
from actors.files.run_folder import RunFolder
from actors.hosts.processes import ProcessRanks
from actors.hosts.seated_answers import call
from actors.protocol.trainer import Sources, Trainer
from actors.state import checkpoint
from jobs.benches.shared import plain
from jobs.benches.shared.text import batches_of_text
from orchestrator.config.run_config import RunConfig, parse
from orchestrator.layout.layout import choose
from orchestrator.topology import virtual_nodes

STEPS = 10
LAYOUTS: dict[str, tuple] = {  # name: (pipeline, expert, data, nodes, ranks per node, further settings)
    "1x1x1": (1, 1, 1, 1, 1), "PP2": (2, 1, 1, 2, 1), "PP4": (4, 1, 1, 2, 2), "EP2": (1, 2, 1, 2, 1), "EP4": (1, 4, 1, 4, 1),
    "DP2": (1, 1, 2, 2, 1), "PP2xEP2": (2, 2, 1, 2, 2), "PP2xEP2xDP2": (2, 2, 2, 4, 2), "PP4xEP2": (4, 2, 1, 2, 4),
    "dualpipev PP2xEP2": (2, 2, 1, 2, 2, "schedule.kind=dualpipev"), "dualpipev PP1": (1, 1, 1, 1, 1, "schedule.kind=dualpipev"),
    "zb_h1 PP3": (3, 1, 1, 3, 1, "schedule.kind=zb_h1"), "zb_h1 PP2xEP2": (2, 2, 1, 2, 2, "schedule.kind=zb_h1"),
    "zbv PP2xEP2": (2, 2, 1, 2, 2, "schedule.kind=zbv"), "zbv PP2xDP2": (2, 1, 2, 2, 2, "schedule.kind=zbv"),
    "1f1b PP4": (4, 1, 1, 2, 2, "schedule.kind=1f1b"), "1f1b PP2xEP2": (2, 2, 1, 2, 2, "schedule.kind=1f1b"),
    "interleaved_1f1b PP2xEP2": (2, 2, 1, 2, 2, "schedule.kind=interleaved_1f1b"),
    "interleaved_1f1b PP1, 4 chunks": (1, 1, 1, 1, 1, "schedule.kind=interleaved_1f1b", "schedule.chunks=4"),
    "merged_interleaved_1f1b PP2xEP2": (2, 2, 1, 2, 2, "schedule.kind=merged_interleaved_1f1b"),
    "gpipe PP2xEP2": (2, 2, 1, 2, 2, "schedule.kind=gpipe"), "gpipe PP3": (3, 1, 1, 3, 1, "schedule.kind=gpipe"),
    **{f"searched PP2xEP2 {placement}": (2, 2, 1, 2, 2, "schedule.kind=searched", f"schedule.placement={placement}")
       for placement in ("both", "v")},
    "searched PP2xEP2 loop": (2, 2, 1, 2, 2, "schedule.kind=searched", "schedule.placement=loop", "schedule.chunks=2"),
    "EP4, two ranks a node, one hop": (1, 4, 1, 2, 2, "layout.shape=[1, 2]", "layout.hops=1"),
    "EP4, two hops": (1, 4, 1, 2, 2, "layout.shape=[1, 2]", "layout.hops=2"),
    "EP8, two hops": (1, 8, 1, 2, 4, "layout.shape=[1, 4]", "layout.hops=2"),
    "EP4xDP2, two hops": (1, 4, 2, 4, 2, "layout.shape=[1, 2]", "layout.hops=2"),
    **{f"{kind} PP2xEP4, two hops": (2, 4, 1, 2, 4, f"schedule.kind={kind}", "layout.shape=[2, 2]", "layout.hops=2")
       for kind in ("dualpipe", "dualpipev", "zbv", "1f1b", "searched")},
}
IN_TURN = ("EP4", "PP2xEP2", "PP2xEP2xDP2", "dualpipev PP2xEP2", "zb_h1 PP3", "zbv PP2xDP2", "1f1b PP2xEP2",
           "interleaved_1f1b PP2xEP2", "merged_interleaved_1f1b PP2xEP2", "gpipe PP2xEP2", "searched PP2xEP2 both",
           "searched PP2xEP2 v", "searched PP2xEP2 loop", "EP4, two ranks a node, one hop", "EP4, two hops", "EP8, two hops",
           "EP4xDP2, two hops", "dualpipe PP2xEP4, two hops", "zbv PP2xEP4, two hops", "searched PP2xEP4, two hops")
"""One layout of each form: these run with overlap and without."""
BARS = {"float64": {"loss": 1e-10, "parameters": 1e-10}, "float32": {"loss": 1e-4}}
_TIMEOUT_SECONDS = 600.0


def run(config: RunConfig) -> dict:
    """Relative differences of every layout and dtype; `valid` says whether all bars hold, and overlap changes no bit."""
    return compare(config, list(LAYOUTS), list(BARS), STEPS)


def compare(config: RunConfig, layouts: list[str], dtypes: list[str], steps: int) -> dict:
    """The same for some layouts, dtypes and a number of steps."""
    tree = config.model_dump()
    tree["training"] |= {"steps": steps, "batch_sequences": 16, "microbatch_sequences": 2, "validate_every": 0,
                         "validation_sequences": 0}
    tree["data"] |= {"sequence_length": 32}
    tree["checkpoint"] |= {"every": 0}
    tree["optimizer"] |= {"warmup_steps": 2}
    base = parse(tree)
    batches = batches_of_text(base, steps)
    most = max(LAYOUTS[name][3] * LAYOUTS[name][4] for name in layouts)
    results: dict[str, dict] = {}
    started = time.perf_counter()
    with ProcessRanks(base, most, start_method="forkserver") as ranks:
        for dtype in dtypes:
            config = parse(base.model_dump(), [f"training.dtype={dtype}"])
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
                expected = process.submit(plain.reference, config, batches).result(_TIMEOUT_SECONDS)
            results[dtype] = {name: _compare(config, name, ranks, batches, expected) for name in layouts}
    valid = all(found[key] < bar for dtype in dtypes for found in results[dtype].values() for key, bar in BARS[dtype].items())
    repeated = [same for of_dtype in results.values() for found in of_dtype.values()
                if (same := found.get("same_bits_in_turn")) is not None]
    worst = {f"{dtype} {key}": max(found[key] for found in results[dtype].values())
             for dtype in dtypes for key in ("loss", "parameters")}
    return {"settings": {"steps": steps, "layouts": layouts, "bars": BARS, "reference": "one plain PyTorch process"},
            "seconds": time.perf_counter() - started, "ratio": worst,
            "same_bits_in_turn": f"{sum(repeated)} of {len(repeated)}", "results": results, "valid": valid and all(repeated)}


@dataclass(frozen=True)
class Trained:
    """hops: of a token to its experts. overlap: whether exchanges ran on a lane of their own. hidden: the largest share of
    communication under compute in any step. losses, loads: of every step."""

    layout: str
    hops: int
    overlap: bool
    hidden: float
    losses: list[float]
    loads: list[dict]
    parameters: dict[str, numpy.ndarray]

    def same_bits(self, other: Trained) -> bool:
        mine, theirs = ({name: value.tobytes() for name, value in one.parameters.items()} for one in (self, other))
        return (self.losses, self.loads, mine) == (other.losses, other.loads, theirs)


def _compare(base: RunConfig, name: str, ranks: ProcessRanks, batches: list[Batch], expected: dict) -> dict[str, Any]:
    trained = _train(base, name, ranks, batches)
    found = {"loss": max(abs(a - b) / abs(b) for a, b in zip(trained.losses, expected["losses"], strict=True)),
             "parameters": _difference(trained.parameters, expected["parameters"]),
             "flipped_choices_at_least": _flips(trained.loads, expected["loads"]), "choices": _choices(expected["loads"]),
             "hops": trained.hops, "overlap": trained.overlap, "overlap_ratio": trained.hidden}
    if name in IN_TURN:
        other = _train(base, name, ranks, batches, "schedule.overlap=false")
        found["same_bits_in_turn"] = trained.overlap and not other.hidden and trained.same_bits(other)
    print(f"{base.training.dtype} {name} ({trained.layout}): {found}", file=sys.stderr, flush=True)
    return found


def _train(base: RunConfig, name: str, ranks: ProcessRanks, batches: list[Batch], *changes: str) -> Trained:
    pipeline, expert, data, nodes, per_node, *further = LAYOUTS[name]
    config = parse(base.model_dump(), [f"layout.pipeline={pipeline}", f"layout.expert={expert}", f"layout.data={data}", *further,
                                       *changes])
    layout = choose(virtual_nodes(nodes, per_node), config.layout, config.model, config.stages)
    call(ranks, "configure", [(config,)] * layout.size, _TIMEOUT_SECONDS)
    steps, loads = [], []

    def watch(kind: str, values: dict) -> None:
        if kind == "step":
            steps.append(values)
        elif kind == "load":
            loads.append(values)

    with tempfile.TemporaryDirectory() as folder:
        sources = Sources(lambda step: _BatchList(batches[step:]), lambda: None)
        Trainer(config, layout, ranks, RunFolder(folder, "parity"), sources, watch=watch).run()
        parameters = checkpoint.read_parameters(checkpoint.complete(f"{folder}/parity/checkpoints")[-1])
    hops = 2 if all(layout.two_hops(replica, config.layout.hops) for replica in range(len(layout.replicas))) else 1
    return Trained(layout.describe(), hops, config.schedule.overlap, max(step["overlap_ratio"] for step in steps),
                   [step["loss"] for step in steps], loads, parameters)


class _BatchList:
    def __init__(self, batches: list[Batch]):
        self._batches = iter(batches)

    def next(self) -> Batch:
        return next(self._batches)

    def close(self) -> None:
        pass


def _difference(ours: dict[str, numpy.ndarray], theirs: dict[str, numpy.ndarray]) -> float:
    """Largest difference of any value of a weight, relative to that weight's largest value."""
    if ours.keys() != theirs.keys():
        raise ValueError(f"weights differ: {sorted(ours.keys() ^ theirs.keys())[:4]}")
    return max(float(numpy.abs(ours[name] - value.ravel()).max() / numpy.abs(value).max()) for name, value in theirs.items())


def _flips(ours: list[dict], theirs: list[dict]) -> int:
    """Expert choices that differ, at least: what the loads cannot hide."""
    return sum(abs(a - b) for mine, other in zip(ours, theirs, strict=True) for layer in other
               for a, b in zip(mine[layer], other[layer], strict=True)) // 2


def _choices(loads: list[dict]) -> int:
    return sum(sum(load) for step in loads for load in step.values())
