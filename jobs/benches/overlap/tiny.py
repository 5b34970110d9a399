"""The real model on a link that is slow in truth: with and without overlap, on two nodes of one rank each."""

from __future__ import annotations

import statistics
import tempfile
from typing import Any

from actors.files.run_folder import RunFolder
from actors.hosts.processes import ProcessRanks
from actors.protocol.trainer import Sources, Trainer
from jobs.benches.overlap.cluster import say
from jobs.benches.shared.networks import Network, enter
from jobs.benches.shared.text import batches_of_text
from orchestrator.config.run_config import RunConfig, parse
from orchestrator.layout.layout import choose
from orchestrator.topology import virtual_nodes

_WARM_UP = 2
_ROUNDS = 2


def rank_inside(config: RunConfig, namespace: str, address: str) -> Any:
    """The rank that a process hosts, in a namespace."""
    enter(namespace)
    from actors.runtime.rank import Rank

    return Rank(config, host=address)


def tiny(config: RunConfig, steps: int, megabits: float) -> dict[str, Any]:
    """Seconds of a step and overlap, of both ways, in turn. One pipeline position, DualPipeV, two ranks that share the experts.

    Raises NetworkRefused.
    """
    base = parse(config.model_dump(), [
        f"training.steps={steps + _WARM_UP}", "training.validation_sequences=0", "training.validate_every=0",
        "checkpoint.every=0",
        "schedule.kind=dualpipev", "layout.pipeline=1", "layout.expert=2", "layout.data=1"])
    batches = batches_of_text(base, steps + _WARM_UP)
    layout = choose(virtual_nodes(2, 1), base.layout, base.model, base.stages)
    found: dict[str, list[dict[str, float]]] = {"overlap": [], "in turn": []}
    losses: dict[str, list[float]] = {}
    with Network(2, megabits) as network:
        own = [(interface.namespace, interface.address) for interface in network.interfaces]
        with ProcessRanks(base, 2, rank_inside, own, start_method="forkserver") as ranks:
            for name in list(found) * _ROUNDS:
                way = parse(base.model_dump(), [f"schedule.overlap={'true' if name == 'overlap' else 'false'}"])
                lines: list[dict[str, Any]] = []

                def watch(kind: str, values: dict[str, Any], lines: list = lines) -> None:
                    if kind == "step":
                        lines.append(values)

                with tempfile.TemporaryDirectory() as folder:
                    sources = Sources(lambda step: _FixedFeed(batches[step:]), lambda: None)
                    Trainer(way, layout, ranks, RunFolder(folder, "overlap"), sources, host=network.host, watch=watch).run()
                losses[name] = [line["loss"] for line in lines]
                found[name].append({key: statistics.median(line[key] for line in lines[_WARM_UP:]) for key in (
                    "rank_seconds", "overlap_ratio", "exposed_comm_seconds", "compute_seconds")})
                say(f"tiny model, {name}: {found[name][-1]}")
    seconds = {name: [one["rank_seconds"] for one in ones] for name, ones in found.items()}
    return {"layout": layout.describe(), "megabits": megabits, "steps": steps, "seconds": seconds, "figures": found,
            "same_losses": losses["overlap"] == losses["in turn"],
            "ratio": statistics.median(seconds["in turn"]) / statistics.median(seconds["overlap"])}


class _FixedFeed:
    def __init__(self, batches: list):
        self._batches = iter(batches)

    def next(self) -> Any:
        return next(self._batches)

    def close(self) -> None:
        pass
