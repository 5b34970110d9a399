"""Dealing a batch: every sequence to one stream, whole, and to both ends of its pipeline."""

from __future__ import annotations

import numpy as np
import pytest
from runtime import LAYOUTS, configured

from actors.calls.messages import PendingUpdate
from actors.data.batching import Batch, Dealer
from orchestrator.config.run_config import ConfigError, CostsSection, parse
from orchestrator.plan import scheduling
from orchestrator.plan.scheduling import durations_of, programs_for, smallest_microbatches
from orchestrator.schedule.ir.actions import ActionKind, Compute, Schedule, SplitAction
from orchestrator.schedule.ir.check import ScheduleError
from orchestrator.schedule.ir.stages import Stages
from orchestrator.schedule.search import SearchResult
from orchestrator.schedule.timing.durations import Durations

LENGTH = 8


def batch_of(rows):
    valid = np.full(rows, LENGTH + 1, np.int32)
    valid[-1] = 4
    tokens = np.arange(rows, dtype=np.int32)[:, None] * 100 + np.arange(LENGTH + 1, dtype=np.int32)
    return Batch(3, tokens, valid)


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("rows", [1, 3, 8, 29])
@pytest.mark.parametrize("training", [True, False])
def test_each_sequence_goes_down_one_pipeline(name, rows, training):
    config, layout = configured(name, "training.microbatch_sequences=2")
    batch, apply = batch_of(rows), PendingUpdate(2, 0.1)
    requests = Dealer(config, layout).requests(batch, apply, training=training, keep_spans=True)
    assert len(requests) == layout.size and len({request.microbatches for request in requests}) == 1
    entered, left = [], []
    for place, request in zip(layout.places, requests):
        assert (request.step, request.apply, request.keep_spans) == (3, apply, True)
        assert request.divisors == batch.divisors
        assert sum(request.sizes.values()) == sum(requests[layout.rank_at(place.row, 0, place.width)].sizes.values())
        assert max(request.sizes.values()) <= 2 and len(request.sizes) == request.microbatches
        at_an_end = place.position in (0, layout.pipeline - 1)
        assert (request.tokens is None, request.valid is None) == (not at_an_end, not at_an_end)
        if place.position == 0:
            entered += zip(request.tokens[:, 0] // 100, request.valid)
        if place.position == layout.pipeline - 1:
            left += list(request.tokens[:, 0] // 100)
            assert len(request.tokens) == len(request.valid) == sum(request.sizes.values())
    assert sorted(entered) == [(row, 4 if row == rows - 1 else LENGTH + 1) for row in range(rows)]
    assert sorted(left) == list(range(rows))


def test_losses_are_divided_by_counts_of_the_batch():
    divisors = batch_of(5).divisors  # four full rows of 8 labels, 7 for the second token; one of 3 and 2
    assert (divisors.next_token, divisors.mtp, divisors.sequences) == (4 * 8 + 3, 4 * 7 + 2, 5)
    empty = Batch(0, np.zeros((1, LENGTH + 1), np.int32), np.ones(1, np.int32)).divisors
    assert (empty.next_token, empty.mtp) == (1, 1)  # of no label: the sum is 0


@pytest.mark.parametrize("kind, slots", [("zbv", 2), ("dualpipev", 2), ("interleaved_1f1b", 2), ("gpipe", 1)])
@pytest.mark.parametrize("rows", [1, 29])
def test_with_one_entrance_all_slots_of_a_line_have_the_same_microbatches(kind, slots, rows):
    config, layout = configured("PP2xEP2", "training.microbatch_sequences=2", f"schedule.kind={kind}")
    requests = Dealer(config, layout).requests(batch_of(rows), None, training=True)
    with_tokens = {place.position for place, request in zip(layout.places, requests) if request.tokens is not None}
    assert with_tokens == ({0} if kind.endswith("v") else {0, 1})  # where a V begins, it ends
    rows_seen = []
    for place, request in zip(layout.places, requests):
        assert set(request.sizes) == {(slot, m) for slot in range(slots) for m in range(request.microbatches)}
        assert all(request.sizes[slot, m] == request.sizes[0, m] for slot, m in request.sizes)
        assert request.sizes == requests[layout.rank_at(place.row, 0, place.width)].sizes
        if place.position == 0:
            assert len(request.tokens) == sum(size for (slot, _), size in request.sizes.items() if slot == 0)
            rows_seen += list(request.tokens[:, 0] // 100)
    assert sorted(rows_seen) == list(range(rows))


@pytest.mark.parametrize("positions, wanted, smallest", [(1, 0, 1), (1, 3, 3), (2, 1, 2), (2, 3, 4), (4, 6, 6)])
def test_an_evaluation_takes_few_microbatches(positions, wanted, smallest):
    config, stages = parse({}), Stages("both", positions)
    assert smallest_microbatches(config, stages, wanted, training=False) == smallest
    programs_for(config, stages, smallest, training=False)


@pytest.mark.parametrize("kind, stages, microbatches", [
    ("dualpipe", Stages("both", 1), 3), ("dualpipe", Stages("both", 2), 4), ("dualpipe", Stages("both", 4), 10),
    ("zbv", Stages("v", 2, 2), 3), ("dualpipev", Stages("v", 1, 2), 2), ("interleaved_1f1b", Stages("loop", 2, 2), 5),
    ("1f1b", Stages("loop", 3), 1)])
@pytest.mark.parametrize("training", [True, False])
def test_programs_run_each_microbatch_once_and_reduce_at_the_end_of_training(kind, stages, microbatches, training):
    config = parse({}, ["layout.pipeline=1", f"schedule.kind={kind}"])
    for position, program in enumerate(programs_for(config, stages, microbatches, training=training)):
        assert (program.position, program.microbatches) == (position, microbatches)
        assert (program.actions[-1].kind is ActionKind.REDUCE) is training
        computes = [compute for action in program.actions if hasattr(action, "computes") for compute in action.computes]
        assert len([compute for compute in computes if compute.kind is ActionKind.FORWARD]) == microbatches * stages.chunks


@pytest.fixture
def searched(monkeypatch):
    """A search that finds a schedule at once: one microbatch, its forward in two halves."""
    asked = []

    def found(stages, microbatches, durations, most_activations=None, splits=True):
        asked.append((stages, microbatches, durations, most_activations, splits))
        forward, backward = Compute(ActionKind.FORWARD, 0, 0, 0), Compute(ActionKind.BACKWARD, 0, 0, 0)
        return SearchResult(Schedule("searched", stages, microbatches, ((SplitAction(forward), backward),)), 3.0, 3.0, None)

    monkeypatch.setattr(scheduling, "searched", found)
    scheduling._searched.cache_clear()
    yield asked
    scheduling._searched.cache_clear()


def test_what_a_search_is_asked_and_that_it_is_asked_once(searched):
    config = parse({}, ["layout.pipeline=1", "schedule.kind=searched", "schedule.placement=v", "schedule.most_activations=7",
                        "schedule.costs={forward: 3.0, dispatch: 2.0}"])
    stages = Stages("both", 1)
    assert programs_for(config, stages, 1, training=True) == programs_for(config, stages, 1, training=True)
    (asked,) = searched
    durations = Durations(forward=3.0, backward_input=1.0, backward_weight=1.0, dispatch=2.0, combine=0.25, hop=0.05, layers=4)
    assert asked == (stages, 1, durations, 7, True)


def test_costs_are_of_a_whole_position():
    found = durations_of(CostsSection(forward=3.0, hop=0.5), Stages("v", 2, 2), 4)
    assert (found.forward, found.backward_input, found.dispatch, found.hop, found.layers) == (1.5, 0.5, 0.125, 0.5, 2)


def test_one_sequence_cannot_be_cut_in_two():
    config = parse({}, ["layout.pipeline=1", "schedule.kind=searched", "schedule.costs={dispatch: 3.0, combine: 3.0}"])
    whole = parse(config.model_dump(), ["training.microbatch_sequences=1"])
    cut, uncut = (programs_for(c, Stages("v", 1, 2), 2, training=True)[0].halved for c in (config, whole))
    assert cut and not uncut


def test_activations_are_bounded_whatever_the_kind():
    config = parse({}, ["layout.pipeline=1", "schedule.kind=searched", "schedule.most_activations=2"])
    object.__setattr__(config.schedule, "kind", "gpipe")
    with pytest.raises(ScheduleError, match="4 microbatches in flight at once, at most 2 allowed"):
        programs_for(config, Stages("loop", 1), 4, training=True)


def test_a_bound_that_no_schedule_keeps_is_refused_by_its_name(monkeypatch):
    def refuse(*arguments, **options):
        raise ConfigError("most_activations", 1.0, "more: no schedule keeps so few")

    monkeypatch.setattr(scheduling, "searched", refuse)
    scheduling._searched.cache_clear()
    config = parse({}, ["layout.pipeline=1", "schedule.kind=searched", "schedule.most_activations=1"])
    with pytest.raises(ConfigError, match="^schedule.most_activations = 1.0: more: no schedule keeps so few$"):
        programs_for(config, Stages("both", 1), 1, training=True)
