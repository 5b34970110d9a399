"""A step's metrics from what three made-up ranks report, each figure by hand."""

from __future__ import annotations

import time

import numpy
import pytest

from actors.calls.messages import LossSums, StepReport
from actors.comm.traffic import Sent
from actors.data.batching import Batch
from actors.telemetry.step_metrics import (
    SHOWN_RANKS,
    busiest,
    generation_record,
    losses_of,
    placement_record,
    scores_of,
    step_metrics,
    timeline,
)
from orchestrator.config.run_config import parse
from orchestrator.layout.layout import choose
from orchestrator.layout.placement import LayerExperts, Placement
from orchestrator.schedule.ir.spans import Figures, Span
from orchestrator.topology import virtual_nodes


def report(rank: int = 0, **fields) -> StepReport:
    blank = {"losses": LossSums(), "gradient_norm": 1.5, "digests": (0, 0), "figures": Figures(0.0, 0.0, 0.0, 0.0, 0.0),
             "seconds": 1.0, "bytes_sent": 0, "load": {}}
    return StepReport(rank=rank, step=7, **blank | fields)


REPORTS = [
    report(0, figures=Figures(1.0, 0.5, 0.25, 0.25, 0.5), seconds=2.0, began=1000.5, exchanged=Sent(30, 7), load={1: [1, 3]}),
    report(1, figures=Figures(2.0, 1.0, 0.5, 0.5, 0.0), seconds=4.0, began=1000.25, exchanged=Sent(40, 0), load={2: [4, 4]}),
    report(2, figures=Figures(3.0, 0.0, 0.0, 0.0, 1.0), seconds=3.0, began=1000.75, exchanged=Sent(50, 2)),
]
BATCH = Batch(7, numpy.zeros((3, 9), numpy.int32), numpy.array([9, 9, 4], numpy.int32))
"""Of 8 + 8 + 3 next tokens, and 7 + 7 + 2 after them."""


def test_a_step_in_metrics():
    before = time.time()
    found = step_metrics(7, BATCH, {"loss": 2.5}, 1e-3, REPORTS, 5.0, generation=3, nodes=2)
    assert before - 0.001 <= found.pop("time") <= time.time() + 0.001
    assert found == {
        "step": 7, "began": 1000.25, "loss": 2.5, "tokens": 19, "tokens_per_second": 3.8, "seconds": 5.0,
        "overlap_ratio": 0.5, "bubble_ratio": 0.25, "exposed_comm_seconds": 0.25, "generation": 3, "nodes": 2, "gradient_norm": 1.5,
        "learning_rate": 1e-3, "busiest_expert": 1.5, "sequences": 3, "compute_seconds": 2.0, "communication_seconds": 0.5,
        "rank_seconds": 4.0, "bytes_across_nodes": 120, "bytes_inside_nodes": 9}


@pytest.mark.parametrize("loads, expected", [
    ([], 1.0), ([{}], 1.0), ([{1: [0, 0]}], 1.0), ([{1: [2, 2, 2, 2]}], 1.0), ([{1: [0, 8, 0, 0]}], 4.0),
    ([{1: [1, 3], 2: [1, 1]}, {3: [9, 1]}], 1.8), ([{1: [0, 0], 2: [1, 3]}], 1.5)])
def test_the_busiest_expert_in_the_worst_layer(loads, expected):
    assert busiest([report(rank, load=load) for rank, load in enumerate(loads)]) == pytest.approx(expected)


@pytest.mark.parametrize("predicts", [0, 1])
def test_losses_and_scores_are_means_over_what_they_are_of(predicts):
    config = parse({}, [f"model.num_nextn_predict_layers={predicts}"])
    sums = LossSums(next_token=38.0, mtp=8.0, balance=1.5, correct=4, accepted=12)
    multi = ({"mtp_loss": 0.5}, {"mtp_acceptance": 0.75}) if predicts else ({}, {})
    assert losses_of(sums, BATCH, config) == {"loss": 2.0, "balance_loss": 0.5} | multi[0]
    assert scores_of(sums, BATCH, config) == {"accuracy": pytest.approx(4 / 19)} | multi[1]


def test_a_timeline_has_what_took_a_thousandth_of_the_step_since_each_rank_began():
    spans = (Span(0, "compute", "F0.0", 10.0, 500.0), Span(0, "exchange", "F0.0 dispatch", 500.0, 503.75),
             Span(0, "compute", "F0.1", 600.0, 604.0))
    waits = (Span(1, "pipeline", "", 90.0, 96.12344),)
    reports = [report(0, seconds=2000.0, spans=spans), report(1, seconds=4000.00006, spans=waits), report(2, seconds=3000.0)]
    assert timeline(7, reports) == {
        "step": 7, "seconds": 4000.0001, "spans": [(0, "compute", 0.0, 490.0), (1, "pipeline", 0.0, 6.1234)]}
    exact = [report(0, seconds=4000.0, spans=spans)]
    assert timeline(8, exact)["spans"] == [(0, "compute", 0.0, 490.0), (0, "compute", 590.0, 594.0)]


def test_a_timeline_is_of_the_first_ranks():
    many = [report(rank, spans=(Span(rank, "compute", "F0.0", 0.0, 1.0),)) for rank in range(SHOWN_RANKS + 3)]
    assert [rank for rank, *_ in timeline(7, many)["spans"]] == list(range(32))


def test_a_ledger_keeps_where_every_expert_was():
    placement = Placement((LayerExperts(0, 1, 2, (4, 5), ((0,), (1, 2))), LayerExperts(1, 0, 3, (6,), ((0, 1, 2),))))
    assert placement_record(placement) == [
        {"replica": 0, "position": 1, "layer": 2, "experts": ((0,), (1, 2))},
        {"replica": 1, "position": 0, "layer": 3, "experts": ((0, 1, 2),)}]
    config = parse({}, ["layout.pipeline=2", "topology.virtual_nodes=2", "topology.ranks_per_node=2"])
    layout = choose(virtual_nodes(2, 2), config.layout, config.model, config.stages)
    found = generation_record(config, layout, placement)
    assert list(found) == ["layout", "layers_per_stage", "schedule", "placement"]
    assert found["placement"] == placement_record(placement)
    assert (found["layout"]["pipeline"], found["layout"]["nodes"], found["layout"]["cells"]) == (
        2, ["virtual-0", "virtual-1"], layout.cells)
