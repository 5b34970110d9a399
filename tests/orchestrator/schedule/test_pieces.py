"""What happens inside an action, by hand and against what any list of pieces must obey."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.schedule.pieces import Cost, Template, overlapped
from orchestrator.schedule.spans import Lane

C, X = Lane.COMPUTE, Lane.EXCHANGE
forward = Cost(2, compute=4.0, dispatch=1.0, combine=2.0)
backward = Cost(2, compute=4.0, dispatch=1.0, combine=2.0, weights=4.0, backward=True)


def test_a_lone_forward_walks_its_layers_piece_by_piece():
    template = overlapped([forward])
    assert template.spans == ((C, 0, 1), (X, 1, 1.5), (C, 1.5, 2.5), (X, 2.5, 3.5),
                              (C, 3.5, 4.5), (X, 4.5, 5), (C, 5, 6), (X, 6, 7))
    assert template.duration == 7


def test_a_lone_backward_begins_with_the_gradient_of_combine_which_costs_a_dispatch():
    template = overlapped([Cost(1, compute=2.0, dispatch=3.0, combine=5.0, backward=True)])
    assert template.spans == ((X, 0, 3), (C, 3, 4), (X, 4, 9), (C, 9, 10))


def test_weight_gradients_fill_the_wait_for_their_own_communication():
    """Layer 2: dispatch 0.5, experts 1, then combine runs 1 under the experts' W of 1, attention 1, and so on; the last W is
    left over."""
    template = overlapped([backward])
    assert template.duration == pytest.approx(7 + 1 + 0.5)  # 7 in series, the last W, and half of one that overhangs a dispatch
    assert sum(end - start for lane, start, end in template.spans if lane is C) == pytest.approx(8)


def test_weight_gradients_alone_are_compute_alone():
    assert overlapped([Cost(4, 0.0, weights=3.0)]) == Template.block(3.0)


def test_without_communication_there_is_nothing_to_hide():
    assert overlapped([Cost(4, 1.0), Cost(4, 1.0, weights=1.0, backward=True)]) == Template.block(3.0)


def test_halves_of_a_microbatch_hide_each_other():
    """Four pieces of 0.25 in each half, evenly: one half is one piece behind the other."""
    template = overlapped([Cost(1, 0.5, 0.25, 0.25)] * 2)
    assert template.duration == pytest.approx(1.25)


durations = st.integers(0, 12).map(lambda n: n / 4)
costs = st.builds(Cost, st.integers(1, 4), st.integers(1, 12).map(lambda n: n / 4), durations, durations, durations,
                  st.booleans())


@settings(max_examples=200, deadline=None)
@given(given_costs=st.lists(costs, min_size=1, max_size=2))
def test_lanes_do_one_thing_at_a_time_all_of_it_and_no_longer_than_in_series(given_costs):
    template = overlapped(given_costs)
    compute = sum(cost.compute + cost.weights for cost in given_costs)
    exchange = sum(cost.dispatch + cost.combine for cost in given_costs)
    for lane, total in ((C, compute), (X, exchange)):
        spans = sorted((start, end) for found, start, end in template.spans if found is lane)
        assert sum(end - start for start, end in spans) == pytest.approx(total)
        assert all(before[1] <= after[0] + 1e-9 for before, after in pairwise(spans))
    critical = max(cost.compute + cost.dispatch + cost.combine for cost in given_costs)
    assert max(compute, exchange, critical) - 1e-9 <= template.duration <= compute + exchange + 1e-9
    assert template.duration == max(end for _, _, end in template.spans)


@settings(max_examples=100, deadline=None)
@given(one=costs, other=costs)
def test_the_order_of_the_two_does_not_matter(one, other):
    assert overlapped([one, other]).duration == pytest.approx(overlapped([other, one]).duration)
