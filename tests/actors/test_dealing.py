"""Dealing a batch: every sequence to one stream, whole, and to both ends of its pipeline."""

from __future__ import annotations

import numpy as np
import pytest
from runtime import LAYOUTS, configured

from actors.dealing import Batch, Dealer, programs_for
from actors.messages import Apply
from orchestrator.schedule import forward_only
from orchestrator.schedule.actions import Kind

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
    batch, apply = batch_of(rows), Apply(2, 0.1)
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


@pytest.mark.parametrize("positions, wanted, smallest", [(1, 0, 1), (1, 3, 3), (2, 1, 2), (2, 3, 4), (4, 6, 6)])
def test_an_evaluation_takes_few_microbatches(positions, wanted, smallest):
    assert forward_only.smallest_microbatches(positions, wanted) == smallest
    programs_for(positions, smallest, training=False)


@pytest.mark.parametrize("pipeline, microbatches", [(1, 3), (2, 4), (4, 10)])
def test_programs_train_each_microbatch_once_and_reduce_at_the_end(pipeline, microbatches):
    for position, program in enumerate(programs_for(pipeline, microbatches, training=True)):
        assert (program.position, program.microbatches) == (position, microbatches)
        assert program.actions[-1].kind is Kind.REDUCE
        halves = [half for action in program.actions if hasattr(action, "halves") for half in action.halves]
        assert len([half for half in halves if half.kind is Kind.FORWARD]) == microbatches
