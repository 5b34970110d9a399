"""Streams in a program's order, with compute and exchanges that the test holds: what runs beside what, and what waits."""

from __future__ import annotations

import threading
import time
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.model.segment import Lane, Segment
from actors.model.weights import WeightGradients
from actors.runtime.exchange_lane import ExchangeLane, InTurn
from actors.runtime.issuer import Issuer, SegmentStream, alternating
from orchestrator.schedule.ir.actions import ActionKind
from orchestrator.schedule.ir.operations import planned
from orchestrator.schedule.ir.orders import streams_of
from orchestrator.schedule.ir.spans import Span, figures
from orchestrator.schedule.timing.durations import Durations

C, X = Lane.COMPUTE, Lane.EXCHANGE
BOUND_SECONDS = 20.0


@pytest.fixture
def lane():
    lane = ExchangeLane()
    yield lane
    lane.close()


def segment(lane, name, run=lambda: None, after=1):
    return Segment(lane, name, -1, run, after)


def run(streams, order, exchanges, queue=None):
    spans = []
    Issuer(0, WeightGradients() if queue is None else queue, exchanges).run(streams, order, spans)
    return spans


class Gate:
    """An exchange that does not end before something else, which waits for its begin, has run."""

    def __init__(self):
        self._begun, self._opened = threading.Event(), threading.Event()

    def __call__(self):
        self._begun.set()
        if not self._opened.wait(BOUND_SECONDS):
            raise TimeoutError("nothing ran beside this exchange")

    def open(self):
        assert self._begun.wait(BOUND_SECONDS), "the exchange did not begin"
        self._opened.set()


def together(one, other):
    """Whether two spans have a time in common."""
    return one.start < other.end and other.start < one.end


def test_one_streams_exchange_runs_under_the_others_compute(lane):
    gate, log = Gate(), []
    one = SegmentStream("F", [segment(C, "a"), segment(X, "x", gate), segment(C, "b", lambda: log.append("b"))])
    other = SegmentStream("B", [segment(C, "c", lambda: (log.append("c"), gate.open()))])
    spans = run([one, other], (0, 0, 1, 0), lane)
    assert log == ["c", "b"]
    named = {span.label: span for span in spans}
    assert named["F x"].lane == "exchange" and named["B c"].lane == "compute"
    assert together(named["F x"], named["B c"]) and named["F x"].end <= named["F b"].start


def test_in_turn_it_does_not(monkeypatch):
    monkeypatch.setattr("test_issuer.BOUND_SECONDS", 0.01)
    gate = Gate()
    one, other = SegmentStream("F", [segment(C, "a"), segment(X, "x", gate)]), SegmentStream("B", [segment(C, "c", gate.open)])
    with pytest.raises(TimeoutError, match="nothing ran beside"):
        run([one, other], (0, 0, 1), InTurn())


def test_what_does_not_need_an_exchange_does_not_wait_for_it(lane):
    gate = Gate()
    shared = segment(C, "shared", gate.open, after=2)
    spans = run([SegmentStream("F", [segment(C, "a"), segment(X, "dispatch", gate), shared,
                                     segment(C, "experts", after=2)])], (0,) * 4,
                lane)
    named = {span.label: span for span in spans}
    assert together(named["F shared"], named["F dispatch"]) and named["F dispatch"].end <= named["F experts"].start


def test_weight_gradients_run_under_their_own_streams_exchange(lane):
    gate, queue, log = Gate(), WeightGradients(), []
    stream = SegmentStream("B", [segment(C, "experts", lambda: queue.defer(gate.open)), segment(X, "dispatch", gate),
                                 segment(C, "attention", lambda: log.append("attention"))], backward=True)
    spans = run([stream], (0, 0, ~0, 0, ~0), lane, queue)
    assert log == ["attention"]
    assert [span.label for span in spans if span.lane == "compute"] == ["B experts", "B", "B attention"]


def test_deferred_weight_gradients_fill_as_a_stream_of_their_own(lane):
    gate, queue, later = Gate(), WeightGradients(), []
    first = SegmentStream("I", [segment(C, "experts", lambda: queue.defer(gate.open)), segment(C, "nothing")], True, later)
    run([first], (0, 0), lane, queue)
    assert [len(closures) for closures in later] == [1, 0]
    run([SegmentStream("F", [segment(X, "x", gate)]), SegmentStream("W", released=later)], (0, ~1, ~1), lane, queue)


@pytest.mark.parametrize("order", [(0,), (0, 0, 0), (~0, 0, 0), (0, 0)])
def test_an_order_of_other_streams_is_refused(order, lane):
    stream = SegmentStream("B", [segment(C, "a"), segment(C, "b")], backward=True)
    with pytest.raises(ValueError, match=r"is not one of B with 2 segments"):
        run([stream], order, lane)


def test_an_error_inside_a_segment_is_its_own(lane):
    with pytest.raises(KeyError):
        run([SegmentStream("F", [segment(C, "a", lambda: {}.popitem())])], (0,), lane)


def test_without_an_order_streams_alternate():
    backward = SegmentStream("B", [segment(X, "combine"), segment(C, "experts")], backward=True)
    forward = SegmentStream("F", [segment(C, "a"), segment(X, "x"), segment(C, "b")])
    weights = SegmentStream("W", released=[[], []])
    assert alternating([forward, backward, weights]) == (0, 1, ~2, 0, 1, ~1, ~2, 0)


# --- any order, any delays -------------------------------------------------------------------------------------------


def layered(shared, backward):
    """(lane, after) of a stage of two layers with experts."""
    beside = [(C, 2)] if shared else []
    layer = [(X, 1), *beside, (C, 1 + shared), (X, 1), (C, 1)] if backward else [(C, 1), (X, 1), *beside, (C, 1 + shared), (X, 1)]
    return [(C, 1), *layer * 2, (C, 1)]


@settings(max_examples=60, deadline=None)
@given(shapes=st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=3), random=st.randoms(use_true_random=False))
def test_everything_begins_after_what_it_needs_and_lanes_keep_the_order(shapes, random):
    """Segments note their begin and end; exchanges are held for a moment, drawn anew each time."""
    shape_of = [layered(*shape) for shape in shapes]
    order = drawn_order(shape_of, [backward for _, backward in shapes], random)
    logs = []
    for exchanges in (ExchangeLane(), InTurn()):
        log, queue, streams = [], WeightGradients(), []
        for s, (shape, (_, backward)) in enumerate(zip(shape_of, shapes, strict=True)):
            def made(s, i, lane, backward=backward, log=log, queue=queue):
                pause = random.choice([0.0, 0.0, 0.0005]) if lane is X else 0.0

                def work():
                    log.append(("begin", s, i))
                    if pause:
                        time.sleep(pause)
                    if backward and lane is C:
                        queue.defer(lambda: log.append(("weights", s, i)))
                    log.append(("end", s, i))
                return work
            streams.append(SegmentStream(str(s), [Segment(lane, str(i), -1, made(s, i, lane), after)
                                                  for i, (lane, after) in enumerate(shape)], backward))
        run(streams, order, exchanges, queue)
        if isinstance(exchanges, ExchangeLane):
            exchanges.close()
        logs.append(log)
    for log in logs:
        place = {event: at for at, event in enumerate(log)}
        for s, shape in enumerate(shape_of):
            for i, (lane, after) in enumerate(shape):
                needed = range(i) if lane is X else [j for j in range(i) if shape[j][0] is C or j <= i - after]
                assert all(place["end", s, j] < place["begin", s, i] for j in needed)
    compute, exchange = ([[event for event in log if shape_of[event[1]][event[2]][0] is lane or event[0] == "weights"]
                          for log in logs] for lane in (C, X))
    assert compute[0] == compute[1]                       # whatever the times: sums of gradients are the same bits
    begun = [[event for event in log if event[0] != "weights"] for log in exchange]
    assert begun[0] == begun[1] and [event[0] for event in begun[0]] == ["begin", "end"] * (len(begun[0]) // 2)


def drawn_order(shapes, backward, random):
    left, waiting, order = [list(shape) for shape in shapes], [0] * len(shapes), []
    while choices := [k for k, shape in enumerate(left) if shape] + [~k for k, count in enumerate(waiting) if count]:
        mark = random.choice(choices)
        order.append(mark)
        if mark < 0:
            waiting[~mark] -= 1
        elif left[mark].pop(0)[0] is C and backward[mark]:
            waiting[mark] += 1
    return tuple(order)


# --- against the plan: a held lane sleeps for as long as an operation takes; nothing waits for a sleep to have ended ---


def held(operations, unit, queue):
    """Segments that take as long as the operations say, in units of `unit` seconds."""
    def hold(duration):
        return lambda: time.sleep(unit * duration)

    def compute(operation):
        def work():
            time.sleep(unit * operation.duration)
            if operation.weights is not None:
                queue.defer(hold(operation.weights))
        return work
    def run_of(operation):
        return compute(operation) if operation.lane is C else hold(operation.duration)

    return [Segment(operation.lane, operation.name, operation.layer, run_of(operation), operation.after)
            for operation in operations]


@pytest.mark.parametrize("form", [
    ((ActionKind.FORWARD, 0, 1), (ActionKind.BACKWARD, 0, 1)), ((ActionKind.BACKWARD, 0, 1),), ((ActionKind.FORWARD, 0, 2),)],
    ids=["pair", "B", "halves"])
def test_lanes_that_are_held_overlap_as_planned(form, lane):
    """Never faster than the plan, and closer to it than to the sum of all. Best of some runs: the machine is not ours alone."""
    unit, stages = 0.04, [Durations(1.0, 1.0, 1.0, dispatch=0.7, combine=0.7, layers=2).operations(0)]
    parts = streams_of(form, stages, [0])
    plan = planned(parts)
    in_series = sum(operation.duration + (operation.weights or 0.0) for part in parts for operation in part.operations)
    hidden = planned_overlap(plan.template)
    best = 0.0
    for _ in range(3):
        queue = WeightGradients()
        streams = [SegmentStream(str(n), held(part.operations, unit, queue),
                                 any(operation.weights is not None for operation in part.operations))
                   for n, part in enumerate(parts)]
        started = time.perf_counter()
        spans = run(streams, plan.order, lane, queue)
        ended = time.perf_counter()
        assert ended - started >= unit * plan.template.duration
        found = figures(spans, started, ended)
        assert found.compute_seconds + found.communication_seconds >= unit * in_series - 1e-6
        if (ended - started) / unit < (plan.template.duration + in_series) / 2:
            best = max(best, found.overlap_ratio)
    assert hidden > 0.3 and best > 0.75 * hidden
    for lane_of in ("compute", "exchange"):
        row = sorted((span.start, span.end) for span in spans if span.lane == lane_of)
        assert all(before[1] <= after[0] for before, after in pairwise(row))


def planned_overlap(template):
    return figures((Span(0, lane, "", start, end) for lane, start, end in template.spans), 0.0, template.duration).overlap_ratio
