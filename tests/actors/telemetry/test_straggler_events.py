"""Who is slow, from real rank processes: one whose compute really takes longer is named while it does."""

from __future__ import annotations

import json
import socket
import threading
import time
from dataclasses import replace
from functools import partial

import pytest
from runtime import configured, on_all, train

from actors.calls.messages import LossSums, StepReport, StepRequest
from actors.comm.wires import Wire, Wires
from actors.telemetry.straggler_events import SlowWatch, flows
from orchestrator.layout.placement import default_placement
from orchestrator.schedule.ir.spans import Figures, Lane

SLOW_FROM, SLOW_UNTIL, STEPS, FACTOR = 6, 13, 22, 5.0


def stretched(segment):
    """Keeps its core busy for FACTOR times as long."""
    if segment.lane is not Lane.COMPUTE:
        return segment

    def run():
        started = time.perf_counter()
        segment.run()
        end = started + FACTOR * (time.perf_counter() - started)
        while time.perf_counter() < end:
            pass

    return replace(segment, run=run)


def all_stretched(segments, tape):
    return [stretched(segment) for segment in segments(tape)]


def slow_down(host, rank):
    for chunk in host._chunks.values() if host._assignment.rank == rank else ():
        for name in ("forward", "backward"):
            setattr(chunk, name, partial(all_stretched, getattr(chunk, name)))


def recover(host, rank):
    for chunk in host._chunks.values() if host._assignment.rank == rank else ():
        del chunk.forward, chunk.backward


def test_a_rank_that_computes_slowly_is_named_while_it_does(ranks, tmp_path):
    """Not the other one, which spends its steps waiting."""
    config, layout = configured("one node", f"training.steps={STEPS}", "training.batch_sequences=16")
    before = {SLOW_FROM: lambda: on_all(ranks, slow_down, layout.size, 1),
              SLOW_UNTIL: lambda: on_all(ranks, recover, layout.size, 1)}
    run = train(ranks, tmp_path, config, layout, before=before)
    assert run.error is None, run.error
    lines = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    mine = [event for event in lines if event["event"] in ("slow", "slow_over") and event["lane"] == "compute"]
    assert [(event["event"], event["rank"], event["node"], event["peer"]) for event in mine] == [
        ("slow", 1, layout.places[1].node, None), ("slow_over", 1, layout.places[1].node, None)]
    assert SLOW_FROM <= mine[0]["step"] < SLOW_FROM + 5 and SLOW_UNTIL <= mine[1]["step"] < SLOW_UNTIL + 5
    # on shared cores the other rank's times grow with the first one's, so the factor is only bounded by the threshold
    assert 1.5 <= mine[0]["factor"] < 2 * FACTOR and mine[1]["factor"] < 1.25


def test_what_crosses_nodes_is_in_the_metrics(ranks, tmp_path):
    """Without a choice of nodes and with all experts used, both layouts send something; only one has a second node."""
    for name, across in (("EP4", True), ("one node", False)):
        run = train(ranks, tmp_path / name, *configured(name, "training.steps=2"))
        assert run.error is None, run.error
        assert all((step["bytes_across_nodes"] > 0, step["bytes_inside_nodes"] > 0) == (across, not across) for step in run.steps)


def report(rank, *, seconds=1.0, wires=(), load=None):
    return StepReport(rank=rank, step=0, losses=LossSums(), gradient_norm=1.0, digests=(0, 0), seconds=seconds, bytes_sent=0,
                      figures=Figures(seconds, 0.0, 0.0, 0.0, 0.0), load=load or {}, wires=tuple(wires))


def request(sequences):
    return StepRequest(0, None, 1, {(0, 0): sequences}, None, None, None)


def test_connections_are_matched_end_to_end():
    found = flows([report(0, wires=[Wire("a 1", "b 2", 100, 0.5), Wire("a 3", "b 4", 20, 0.25), Wire("a 5", "store 9", 7, 1.0)]),
                   report(1, wires=[Wire("b 2", "a 1", 10, 0.125), Wire("b 4", "a 3", 0, 0.0)])])
    assert {ends: (flow.bytes, flow.seconds) for ends, flow in found.items()} == {(0, 1): (120, 0.75), (1, 0): (10, 0.125)}


@pytest.mark.parametrize("busy, expected", [(True, []), (False, ["slow"])])
def test_a_rank_whose_experts_are_chosen_more_is_not_slow(busy, expected):
    config, layout = configured("one node")
    placement = default_placement(config.model, layout)
    hot = placement.at(0, 0, 1)[1]
    load = {1: [40 if busy and expert in hot else 10 for expert in range(config.model.n_routed_experts)]}
    watch, told = SlowWatch(layout, placement), []
    for _ in range(5):
        told += watch.after(0, [request(4), request(4)], [report(0, load=load), report(1, seconds=4.0)])
    assert [event.name for event in told] == expected


def test_a_wire_counts_bytes_and_the_time_of_the_transfer_alone():
    """Its reader starts late: that is not the wire's time."""
    wires, size, late = Wires(), 50_000_000, 0.5
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as sender:
        reader, _ = server.accept()
        with reader:
            wires.since()
            writing = threading.Thread(target=sender.sendall, args=(bytes(size),))
            writing.start()
            threading.Event().wait(late)
            left = size
            while left:
                left -= len(reader.recv(1 << 20))
            writing.join()
            found = {wire.local: wire for wire in wires.since()}
            ends = ["{} {}".format(*end.getsockname()) for end in (sender, reader)]
            assert set(ends) <= found.keys() and found[ends[0]].peer == ends[1]
            assert size - 1_000_000 <= found[ends[0]].bytes <= size  # the last ones may not be acknowledged yet
            assert 0 < found[ends[0]].seconds < 0.8 * late
            assert found[ends[1]].bytes == 0
            assert not {wire.local for wire in wires.since() if wire.bytes > 1_000_000} & set(ends)
