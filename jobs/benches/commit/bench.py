"""What it costs that every optimizer shard has two owners on different nodes, so that no committed step can be lost with a node:
step time with `elastic.copies: 1` against `elastic.copies: 0`.

Nodes are network namespaces with shaped links; ranks are processes in them with a real model and held compute lanes
(`churn_rank.py`), driven by the product's trainer. Both settings run in the same processes, in turn; every repeat is reported.
DualPipe hosts every stage twice, on different nodes, so two owners hold the weights anyway; with 1f1b the second owner of an expert
is a rank that does not hold it, and its gradients travel there.
"""

from __future__ import annotations

import os
import shutil
import statistics
import sys
import tempfile
import time
from typing import Any, Literal

from pydantic import Field

from actors.data.dataset import Dataset
from actors.hosts.processes import ProcessRanks
from jobs import corpus
from jobs.benches.churn.bench import small
from jobs.benches.churn.rank import Home, held_rank
from jobs.benches.churn.run import TokenizedBatches, train
from jobs.benches.shared.networks import Network, NetworkRefused
from jobs.driver import session
from orchestrator.config.run_config import Real, RunConfig, Section, parse
from orchestrator.layout.layout import Layout, choose
from orchestrator.refusal import ConfigError
from orchestrator.schedule.kinds.registry import NAMES
from orchestrator.topology import virtual_nodes

BAR = 1.02
_WARM_UP = 3


class Settings(Section):
    """What `--option KEY=VALUE` sets."""

    kinds: list[Literal[NAMES]] = Field(["dualpipe", "1f1b"], min_length=1, description="of schedules; the bar is on the first")
    nodes: int = Field(4, ge=2)
    ranks: int = Field(2, ge=1, description="of a node")
    megabits: Real = Field(200.0, gt=0, description="a second, of every rank's interface, in each direction")
    milliseconds: Real = Field(10.0, gt=0, description="of each compute segment of a layer, for a sequence")
    sequences: int = Field(16, ge=1, description="of a step")
    intermediate: int = Field(128, ge=1, description="of an expert: how much there is to reduce")
    steps: int = Field(15, ge=5, description="of a repeat")
    repeats: int = Field(5, ge=1)


def run(config: RunConfig, settings: Settings) -> dict[str, Any]:
    """Step times, their ratios, and whether the bar holds. Raises ConfigError."""
    started, load = time.perf_counter(), [os.getloadavg()]
    data = session.data_path(config)
    corpus.prepare(config, data)
    dataset, results = Dataset.open(data), {}
    try:
        for kind in settings.kinds:
            results[kind] = _measure(_configured(config, settings, data, kind), settings, dataset)
    except NetworkRefused as error:
        raise ConfigError("bench", "commit", f"a machine that gives it network namespaces: {error}") from None
    load.append(os.getloadavg())
    ratio = {kind: found["ratio"] for kind, found in results.items()}
    first = settings.kinds[0]
    checks = {f"{first}: step time with two owners / one owner <= {BAR}": ratio[first] <= BAR,
              "two owners hold the same curve as one": all(found["same_losses"] for found in results.values())}
    return {"settings": settings.model_dump(), "seconds": {kind: found["seconds"] for kind, found in results.items()},
            "ratio": ratio, "ratios": {kind: found["ratios"] for kind, found in results.items()},
            "state": {kind: found["owned"] for kind, found in results.items()}, "load_average": load,
            "run_seconds": time.perf_counter() - started, "checks": checks, "valid": all(checks.values())}


def _configured(config: RunConfig, settings: Settings, data: str, kind: str) -> RunConfig:
    return small(config, settings.nodes, settings.ranks, [
        "run.name=commit", f"data.path={data}", f"training.batch_sequences={settings.sequences}", "training.dtype=float32",
        f"model.moe_intermediate_size={settings.intermediate}", f"schedule.kind={kind}", "elastic.silence_seconds=15"])


def _measure(config: RunConfig, settings: Settings, dataset: Dataset) -> dict[str, Any]:
    layout = choose(virtual_nodes(settings.nodes, settings.ranks), config.layout, config.model, config.stages)
    rows, kind = TokenizedBatches(config, dataset, settings.steps + 1), config.schedule.kind
    seconds: dict[str, list[float]] = {"one owner": [], "two owners": []}
    losses: set[tuple[float, ...]] = set()
    with Network(settings.nodes, settings.megabits, settings.ranks) as network:
        homes = [_home(network, layout, rank) for rank in range(layout.size)]
        own = [(settings.milliseconds / 1000, home) for home in homes]
        with ProcessRanks(config, layout.size, held_rank, own, start_method="forkserver") as ranks:
            for repeat in range(settings.repeats):
                for copies in (0, 1) if repeat % 2 == 0 else (1, 0):
                    mine = parse(config.model_dump(), [f"elastic.copies={copies}"])
                    told = _train(ranks, mine, layout, rows, network.host, settings.steps)
                    times = [after["time"] - before["time"] for before, after in zip(told[_WARM_UP:], told[_WARM_UP + 1:],
                                                                                     strict=False)]
                    seconds[("one owner", "two owners")[copies]].append(statistics.median(times))
                    losses.add(tuple(step["loss"] for step in told))
                say(f"{kind}, repeat {repeat}: " + ", ".join(f"{name} {found[-1]:.4f} s" for name, found in seconds.items()))
    ratios = [two / one for one, two in zip(seconds["one owner"], seconds["two owners"], strict=True)]
    return {"seconds": seconds, "ratios": ratios, "ratio": statistics.median(ratios), "same_losses": len(losses) == 1,
            "owned": {"ranks": layout.size, "layout": layout.describe()}}


def _train(ranks: ProcessRanks, config: RunConfig, layout: Layout, rows: TokenizedBatches, host: str, steps: int
           ) -> list[dict[str, Any]]:
    folder = tempfile.mkdtemp(prefix="dualray-commit-")
    try:
        return train(ranks, config, layout, rows, folder, host, stop_after=steps).steps
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _home(network: Network, layout: Layout, rank: int) -> Home:
    """A virtual node's namespace, and the interface of this rank in it."""
    place = layout.places[rank]
    interface = network.interface(int(place.node.rpartition("-")[2]), place.local)
    return Home(interface.namespace, interface.address)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
