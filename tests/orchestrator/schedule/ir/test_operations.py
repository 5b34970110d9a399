"""What happens inside an action, by hand and against what any list of operations must obey."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.schedule.ir.operations import Cost, Operation, OperationStream, Template, overlapped, planned, stream_of, timed
from orchestrator.schedule.ir.spans import Lane

C, X = Lane.COMPUTE, Lane.EXCHANGE
forward = Cost(2, compute=4.0, dispatch=1.0, combine=2.0)
backward = Cost(2, compute=4.0, dispatch=1.0, combine=2.0, weights=4.0, backward=True)


def test_a_lone_forward_walks_its_layers_operation_by_operation():
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
    """Four operations of 0.25 in each half, evenly: one half is one operation behind the other."""
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


# --- orders ----------------------------------------------------------------------------------------------------------


def ends_by_rules(streams, order):
    """When each operation ends, from what must be before it: {(stream, place): end}, weight gradients at ("W", stream, place)."""
    at, weights, on_lane, before, length = Counter(), Counter(), {C: [], X: []}, {}, {}
    for mark in order:
        s, last = mark if mark >= 0 else ~mark, {lane: done[-1:] for lane, done in on_lane.items()}
        if mark < 0:
            carriers = [i for i, operation in enumerate(streams[s].operations) if operation.weights is not None]
            given = len(streams[s].released)
            n, weights[s] = weights[s], weights[s] + 1
            name = ("W", s, n)
            length[name] = streams[s].released[n] if n < given else streams[s].operations[carriers[n - given]].weights
            before[name] = last[C] + ([] if n < given else [(s, carriers[n - given])])
            on_lane[C].append(name)
            continue
        place, at[s] = at[s], at[s] + 1
        operation, name = streams[s].operations[place], (s, place)
        length[name] = operation.duration
        if operation.lane is X:
            before[name] = last[X] + last[C] + [(s, i) for i in range(place)]
        else:
            before[name] = last[C] + [(s, i) for i in range(place + 1 - operation.after)]
        on_lane[operation.lane].append(name)
    ends = {}
    for name, others in before.items():                   # in order, so what is before is known
        ends[name] = max((ends[other] for other in others), default=0.0) + length[name]
    return ends


def layered(layers, shared, backward):
    """A stream as a stage with experts has it; all lengths of eighths, so sums are exact."""
    weight = 0.25 if backward else None
    compute, sent = Operation(C, 0.5, weight), Operation(X, 0.375)
    beside = (Operation(C, 0.125, weight, after=2),) if shared else ()
    experts = Operation(C, 0.5, weight, after=1 + len(beside))
    layer = (sent, *beside, experts, sent, compute) if backward else (compute, sent, *beside, experts, sent)
    return OperationStream((Operation(C, 0.0, weight), *layer * layers, Operation(C, 0.125, weight)))


streams_drawn = st.builds(layered, st.integers(0, 3), st.booleans(), st.booleans()) | st.builds(
    lambda n: OperationStream(released=(0.25,) * n), st.integers(0, 3))


@settings(max_examples=150, deadline=None)
@given(streams=st.lists(streams_drawn, min_size=1, max_size=3).map(tuple), seed=st.randoms(use_true_random=False))
def test_an_order_takes_as_long_as_the_longest_chain_of_what_must_wait(streams, seed):
    for order in (planned(streams).order, shuffled(streams, seed)):
        ends = ends_by_rules(streams, order)
        assert timed(streams, order).duration == max(ends.values(), default=0.0)
        assert len(ends) == sum(len(s.operations) + len(s.released) + sum(p.weights is not None for p in s.operations)
                                for s in streams)


def shuffled(streams, random):
    """Any order that the streams allow."""
    left, waiting, order = [list(s.operations) for s in streams], [len(s.released) for s in streams], []
    while choices := [k for k, operations in enumerate(left) if operations] + [~k for k, count in enumerate(waiting) if count]:
        mark = random.choice(choices)
        order.append(mark)
        if mark < 0:
            waiting[~mark] -= 1
        else:
            waiting[mark] += left[mark].pop(0).weights is not None
    return tuple(order)


def best_by_search(streams):
    """The shortest of all orders."""
    def extend(order, left, waiting):
        choices = [k for k, operations in enumerate(left) if operations] + [~k for k, count in enumerate(waiting) if count]
        if not choices:
            return timed(streams, tuple(order)).duration
        found = []
        for mark in choices:
            operations, count = [list(p) for p in left], list(waiting)
            if mark < 0:
                count[~mark] -= 1
            else:
                count[mark] += operations[mark].pop(0).weights is not None
            found.append(extend([*order, mark], operations, count))
        return min(found)
    return extend([], [list(s.operations) for s in streams], [len(s.released) for s in streams])


@pytest.mark.parametrize("streams, off", [
    ((layered(1, True, False),), 1.0), ((layered(1, True, True),), 1.0), ((layered(1, False, True),), 1.0),
    ((OperationStream(layered(1, True, False).operations[1:-1]), OperationStream(layered(1, False, False).operations[1:-1])), 1.0),
    ((OperationStream(layered(1, True, False).operations[1:-1]), OperationStream(released=(0.25,) * 3)), 1.06),
    ((OperationStream(layered(1, False, False).operations[1:-1]), OperationStream(layered(1, False, True).operations[1:-1])), 1.0)])
def test_small_plans_are_as_short_as_any_order_or_nearly(streams, off):
    assert planned(streams).template.duration <= off * best_by_search(streams) + 1e-9


QUEUED_EARLY = (
    OperationStream((Operation(C, 2.0), Operation(X, 2.0), Operation(C, 1.0, after=2),
                     Operation(C, 3.0, after=2), Operation(X, 1.0))),
    OperationStream((Operation(C, 2.0), Operation(X, 3.0), Operation(C, 4.0), Operation(X, 3.0))))
PATIENT = (OperationStream((Operation(X, 2.0), Operation(C, 1.0, 3.0, after=2), Operation(C, 2.0, 1.0, after=2),
                            Operation(X, 3.0), Operation(C, 4.0, 4.0))),)


@pytest.mark.parametrize("streams, shortest", [(QUEUED_EARLY, 13.0), (PATIENT, 16.0)])
def test_what_only_one_of_the_rules_finds(streams, shortest):
    """Communication queued before its lane is free; weight gradients that wait rather than delay others."""
    assert planned(streams).template.duration == shortest == best_by_search(streams)


def test_a_shared_expert_runs_under_the_dispatch_it_does_not_need():
    """Attention 0 to 0.5, dispatch to 0.875 with the shared expert under it, experts to 1.375, combine to 1.75, output."""
    stream = layered(1, True, False)
    plan = planned((stream,))
    assert plan.order == (0,) * 7 and plan.template.duration == 1.875
    assert (C, 0.5, 0.625) in plan.template.spans and (X, 0.5, 0.875) in plan.template.spans


def test_the_order_of_a_pair_is_that_of_the_published_trace():
    """DeepSeek's profile-data, train.json: one layer of a forward and a backward, communication 0.913 of compute."""
    names = ["attn(F)", "dispatch(F)", "mlp(F)", "combine(F)"], ["combine(B)", "mlp(B)", "dispatch(B)", "attn(B)"]
    sent = 0.913 * 3 / 4
    streams = tuple(stream_of(Cost(1, 1.0, sent, sent, weights, backward)) for weights, backward in ((0.0, False), (1.0, True)))
    at, released, lanes = [0, 0], ["mlp(W)", "attn(W)"], {C: [], X: []}
    for mark in planned(streams).order:
        if mark < 0:
            lanes[C].append(released.pop(0))
        else:
            lanes[streams[mark].operations[at[mark]].lane].append(names[mark][at[mark]])
            at[mark] += 1
    assert lanes == {C: ["attn(F)", "mlp(B)", "mlp(W)", "mlp(F)", "attn(B)", "attn(W)"],
                     X: ["combine(B)", "dispatch(F)", "dispatch(B)", "combine(F)"]}


@pytest.mark.parametrize("order, words", [
    ((0, 0, 0), "leaves out 1 operations and 1 weight gradients of stream 0"),
    ((0, 0, 0, 0), "leaves out 0 operations and 1 weight"),
    ((~0, 0, 0, 0, 0), "place 0 of order .*: stream 0 has nothing more to release"), ((0,) * 5, "place 4 .*nothing more$"),
    ((0, 0, 0, 0, ~0, ~0), "place 5 .*nothing more to release"), ((0, 1), "place 1 .*stream 1"), ((0, ~1), "place 1 .*stream 1")])
def test_an_order_of_other_streams_is_refused(order, words):
    streams = (OperationStream((Operation(C, 1.0), Operation(X, 1.0), Operation(C, 1.0, 0.5), Operation(C, 1.0))),)
    assert timed(streams, (0, 0, 0, ~0, 0)).duration == 4.5
    with pytest.raises(ValueError, match=words):
        timed(streams, order)
