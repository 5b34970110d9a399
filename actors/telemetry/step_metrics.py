"""What a trainer writes down: a step's metrics from what its ranks report, and what the ledger says of a generation."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, astuple
from typing import Any

from actors.calls.messages import LossSums, StepReport
from actors.data.batching import Batch
from orchestrator.config.run_config import RunConfig
from orchestrator.layout.layout import Layout
from orchestrator.layout.placement import Placement
from orchestrator.schedule.ir.spans import Figures


def step_metrics(step: int, batch: Batch, losses: dict[str, float], rate: float, reports: Sequence[StepReport], seconds: float,
                 generation: int, nodes: int) -> dict[str, Any]:
    """One object of `metrics.jsonl`, but for what it costs (`spent`, `mfu`)."""
    tokens, mean = int((batch.valid - 1).sum()), mean_figures(reports)
    return {
        "step": step, "time": round(time.time(), 3), "began": round(min(report.began for report in reports), 3), **losses,
        "tokens": tokens, "tokens_per_second": tokens / seconds, "seconds": seconds,
        "overlap_ratio": mean.overlap_ratio, "bubble_ratio": mean.bubble_ratio,
        "exposed_comm_seconds": mean.exposed_communication_seconds, "generation": generation, "nodes": nodes,
        "gradient_norm": reports[0].gradient_norm, "learning_rate": rate, "busiest_expert": busiest(reports),
        "sequences": len(batch.valid), "compute_seconds": mean.compute_seconds,
        "communication_seconds": mean.communication_seconds, "rank_seconds": max(report.seconds for report in reports),
        "bytes_across_nodes": sum(report.exchanged.across for report in reports),
        "bytes_inside_nodes": sum(report.exchanged.inside for report in reports),
    }


def generation_record(config: RunConfig, layout: Layout, placement: Placement) -> dict[str, Any]:
    """What the ledger keeps of a generation, in the line of its first committed step."""
    return {"layout": asdict(layout) | {"pipeline": layout.pipeline, "nodes": list(layout.nodes)},
            "layers_per_stage": config.layout.layers_per_stage, "schedule": config.schedule.model_dump(mode="json"),
            "placement": placement_record(placement)}


def losses_of(sums: LossSums, batch: Batch, config: RunConfig) -> dict[str, float]:
    """Means over the batch. `loss` is the next-token cross-entropy in nats a token."""
    divisors = batch.divisors
    found = {"loss": sums.next_token / divisors.next_token}
    if config.model.num_nextn_predict_layers:
        found["mtp_loss"] = sums.mtp / divisors.mtp
    found["balance_loss"] = sums.balance / divisors.sequences
    return found


def scores_of(sums: LossSums, batch: Batch, config: RunConfig) -> dict[str, float]:
    """`accuracy`: share of next tokens that are the likeliest ones. `mtp_acceptance`: share of tokens after them that multi-token
    prediction would be believed."""
    found = {"accuracy": sums.correct / batch.divisors.next_token}
    if config.model.num_nextn_predict_layers:
        found["mtp_acceptance"] = sums.accepted / batch.divisors.mtp
    return found


def mean_figures(reports: Sequence[StepReport]) -> Figures:
    """Every figure as the mean over ranks."""
    columns = zip(*(astuple(report.figures) for report in reports))
    return Figures(*(sum(column) / len(reports) for column in columns))


def busiest(reports: Sequence[StepReport]) -> float:
    """Largest expert load divided by the mean, in the worst layer; 1 where there are no experts."""
    return max((max(load) * len(load) / sum(load) for load in loads_of(reports).values() if sum(load)), default=1.0)


SHOWN_RANKS = 32


def timeline(step: int, reports: Sequence[StepReport]) -> dict[str, Any]:
    """What ranks did in a step: (rank, lane, start, end), seconds since each one's own begin, of all that took a thousandth of it."""
    seconds, found = max(report.seconds for report in reports), []
    for report in reports[:SHOWN_RANKS]:
        began = min((span.start for span in report.spans), default=0.0)
        found += [(span.rank, str(span.lane), round(span.start - began, 4), round(span.end - began, 4)) for span in report.spans
                  if span.end - span.start >= seconds / 1000]
    return {"step": step, "seconds": round(seconds, 4), "spans": found}


def loads_of(reports: Sequence[StepReport]) -> dict[int, list[int]]:
    """By layer: tokens that chose each expert."""
    return {layer: load for report in reports for layer, load in report.load.items()}


def placement_record(placement: Placement) -> list[dict[str, Any]]:
    """Of every layer at every (replica, position) that hosts it: expert ids by index in the EP group, in slot order."""
    return [{"replica": entry.replica, "position": entry.position, "layer": entry.layer, "experts": entry.experts}
            for entry in placement.placed]
