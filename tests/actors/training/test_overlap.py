"""Exchanges on a lane of their own, in real rank processes: the same results, an end to every wait, no thread left behind."""

from __future__ import annotations

import threading
import time
from dataclasses import replace

import pytest
from random_schedule import draw_schedules
from runtime import TIMEOUT_SECONDS, batch_of, configured, form, on_all, same, state, train

from actors.data.batching import Dealer
from orchestrator.plan.scheduling import programs_for
from orchestrator.schedule.ir.actions import SplitAction

STEPS = "training.steps=3", "training.batch_sequences=25", "training.microbatch_sequences=3"


def both_ways(ranks, folder, name, *further):
    """The run with overlap and without, and what the ranks held at the end of each."""
    found = []
    for overlap in ("true", "false"):
        config, layout = configured(name, f"schedule.overlap={overlap}", *STEPS, *further)
        run = train(ranks, folder / overlap, config, layout)
        assert run.error is None, run.error
        found.append((run, state(ranks, layout)))
    return found


@pytest.mark.parametrize("name, further", [
    ("PP2xEP2", ["schedule.kind=dualpipe"]), ("EP4", ["schedule.kind=dualpipev"]), ("one node", ["schedule.kind=zbv"]),
    ("PP2xEP2", ["schedule.kind=1f1b", "training.recompute=selective"]),
    ("EP4", ["schedule.kind=merged_interleaved_1f1b", "model.n_shared_experts=0", "training.recompute=full"])])
def test_overlap_changes_no_bit(ranks, tmp_path, name, further):
    (one, weights), (other, others) = both_ways(ranks, tmp_path, name, *further)
    assert one.losses == other.losses and same(weights, others)
    assert all(step["overlap_ratio"] == 0.0 for step in other.steps)
    assert max(step["overlap_ratio"] for step in one.steps) > 0.0


def test_overlap_changes_no_bit_of_halves_and_pairs_of_all_kinds(ranks, tmp_path, monkeypatch):
    """The order of operations is the program's, so the sums of gradients are the same also with split microbatches."""
    used = draw_schedules(monkeypatch)
    further = "schedule.kind=searched", "schedule.placement=both", "training.batch_sequences=61"
    (one, weights), (other, others) = both_ways(ranks, tmp_path, "PP2xEP2", *further)
    assert one.losses == other.losses and same(weights, others)
    assert any(isinstance(action, SplitAction) for row in used[0].rows for action in row)


def lanes_of(host):
    return [thread.name for thread in threading.enumerate()].count("exchange")


def test_a_generation_has_one_lane_and_takes_it_with_it(ranks):
    for generation, (name, overlap, expected) in enumerate(
            [("PP2xEP2", "true", 1), ("EP4", "true", 1), ("PP2xEP2", "false", 0), ("PP4", "true", 1)]):
        config, layout = configured(name, f"schedule.overlap={overlap}")
        form(ranks, config, layout, generation)
        assert on_all(ranks, lanes_of, layout.size) == [expected] * layout.size
    on_all(ranks, leave, layout.size)
    assert on_all(ranks, lanes_of, layout.size) == [0] * layout.size


def leave(host):
    host.close()


def aborted_step(host, program, request, alone):
    """(error, seconds from the abort to it), of the rank that runs the step alone and aborts as soon as an exchange begins."""
    if host._assignment.rank != alone:
        return None
    exchange = next(layer._exchange for layer in host._chunks[0]._layers.values() if hasattr(layer, "_exchange"))
    begun, times, dispatch = threading.Event(), [], exchange.dispatch

    def dispatch_and_tell(*arguments):
        begun.set()
        return dispatch(*arguments)

    def abort():
        assert begun.wait(TIMEOUT_SECONDS)
        times.append(time.monotonic())
        host.abort()

    exchange.dispatch, aborting = dispatch_and_tell, threading.Thread(target=abort)
    aborting.start()
    try:
        host.step(replace(request, program=program))
    except Exception as error:
        ended = time.monotonic()
        aborting.join()
        return str(error), ended - times[0]
    return "the step ended", 0.0


@pytest.mark.parametrize("overlap", ["true", "false"])
def test_an_abort_ends_a_step_that_waits_for_an_exchange(ranks, overlap):
    """Its peers take no part. Their being there keeps the exchange from failing by itself."""
    config, layout = configured("EP4", f"schedule.overlap={overlap}", *STEPS)
    form(ranks, config, layout, 7)
    ranks.start("initialise", [()] * layout.size).results(TIMEOUT_SECONDS)
    request = Dealer(config, layout).requests(batch_of(config, 0), None, training=True)[1]
    program = programs_for(config, layout.folding, request.microbatches, training=True)[0]
    error, seconds = on_all(ranks, aborted_step, layout.size, program, request, 1)[1]
    assert error.startswith("generation 7, position 0, action F0.0: Aborted: "), error
    assert seconds < 0.2
