"""A measured step is read back from a run's trace, and its means make a simulation that repeats it."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from actors.telemetry.trace import trace_json
from orchestrator.layout.layout import Place
from orchestrator.schedule.ir.actions import ActionKind, Compute, SplitAction, parse_csv
from orchestrator.schedule.ir.spans import Lane, Span
from orchestrator.schedule.ir.stages import SEARCHED, Stages
from orchestrator.schedule.kinds.registry import generate
from orchestrator.schedule.pictures.trace import schedule_trace
from orchestrator.schedule.timing.durations import Durations
from orchestrator.schedule.timing.measured import measured_durations, read_trace, refuse_another_schedule
from orchestrator.schedule.timing.simulate import simulate

SEGMENTS = {ActionKind.FORWARD: ("dispatch", "combine"), ActionKind.BACKWARD: ("combine", "dispatch"),
            ActionKind.BACKWARD_INPUT: ("combine", "dispatch")}
COSTS = Durations(forward=(0.030, 0.020), backward_input=(0.040, 0.050), backward_weight=(0.010, 0.015), backward=(0.090, 0.100),
                  pair=(0.130, 0.140), dispatch=(0.004, 0.006), combine=(0.008, 0.002), layers=1)


def as_a_run_has_them(schedule, durations, offset=0.0, ranks=None):
    """Spans in seconds such as an executor leaves, of a run that did exactly what the simulation says.

    A lone F or I is compute and communication in turn; a B or pair, whose duration alone is known, compute from end to end.
    """
    timeline = simulate(schedule, durations)
    found = []
    for position, (row, spans) in enumerate(zip(schedule.rows, timeline.rows, strict=True)):
        rank = position if ranks is None else ranks[position]
        found.append(Span(rank, Lane.PIPELINE, str(row[0].computes[0]), offset, offset + spans[0].start))
        for action, span in zip(row, spans, strict=True):
            parts = [(span.start, span.end)] * len(action.computes)
            if len(parts) == 2:
                middle = (span.start + span.end) / 2
                parts = [(span.start, middle), (middle, span.end)]
            for compute, (start, end) in zip(action.computes, parts, strict=True):
                found += segments(rank, compute, durations, offset + start, offset + end)
        found.append(Span(rank, Lane.REDUCE, "REDUCE", offset + timeline.makespan, offset + timeline.makespan + 0.05))
    return timeline, found


def segments(rank, compute, durations, start, end):
    if compute.kind is ActionKind.BACKWARD_WEIGHT:
        return [Span(rank, Lane.COMPUTE, str(compute), start, end)]
    length = {"dispatch": durations.dispatch[compute.stage], "combine": durations.combine[compute.stage]}
    if compute.kind is not ActionKind.FORWARD:                        # a backward sends the gradient of combine like a dispatch
        length = {"combine": length["dispatch"], "dispatch": length["combine"]}
    half = (end - start - sum(length.values())) / 2
    first, second = SEGMENTS[compute.kind]
    ways = [(Lane.COMPUTE, "attention", half), (Lane.EXCHANGE, first, length[first]), (Lane.COMPUTE, "experts", half),
            (Lane.EXCHANGE, second, length[second])]
    found = []
    for lane, name, duration in ways:
        found.append(Span(rank, lane, f"{compute} {name} 0", start, start + duration))
        start += duration
    return found


def test_a_simulation_with_measured_means_repeats_the_step():
    schedule = generate("dualpipe", 2, 6)
    timeline, spans = as_a_run_has_them(schedule, COSTS, offset=12.5)
    other = [Span(span.rank, span.lane, span.label, span.start + 9, span.end + 9.5) for span in spans]
    measured = read_trace(trace_json({3: spans, 4: other}), 2, 3)
    assert (measured.step, measured.microbatches(schedule.stages)) == (3, 6)
    last = read_trace(trace_json({3: spans, 4: other}), 2)
    assert (last.step, min(row[0].start for row in last.rows)) == (4, 0)
    assert measured.makespan == pytest.approx(1e3 * timeline.makespan) and measured.end == pytest.approx(measured.makespan + 50)
    refuse_another_schedule(measured, schedule)
    found = measured_durations(measured, schedule)
    for name in ("forward", "pair", "dispatch", "combine"):
        assert getattr(found, name) == pytest.approx([1e3 * value for value in getattr(COSTS, name)]), name
    assert (found.backward_input[0], found.backward_weight[0]) == pytest.approx((40.0, 10.0))  # this stage alone has I and W,
    assert found.backward == pytest.approx([0.0, 100.0])                # the other alone a B outside pairs
    again = simulate(schedule, found)
    assert again.makespan == pytest.approx(measured.makespan)
    for position, row in enumerate(schedule.rows):
        for action, span in zip(row, again.rows[position], strict=True):
            pieces = [piece for compute in action.computes for piece in measured.pieces(position, compute)]
            assert (span.start, span.end) == pytest.approx((min(pieces)[0], max(end for _, end in pieces)), abs=1e-6)


def test_hops_are_the_callers():
    schedule = generate("dualpipe", 2, 4)
    _, spans = as_a_run_has_them(schedule, COSTS)
    assert measured_durations(read_trace(trace_json({0: spans}), 2), schedule, hop=3.0).hop == 3.0


def test_waits_inside_a_pair_are_no_part_of_its_duration():
    schedule = parse_csv("F0.0,F0.1|B0.0,B0.1\n", SEARCHED, Stages("loop", 1))
    spans = [Span(0, lane, label, start, end) for lane, label, start, end in [
        (Lane.COMPUTE, "F0.0 mlp 0", 0, 1), (Lane.COMPUTE, "F0.1 mlp 0", 1, 2), (Lane.PIPELINE, "B0.0", 2, 5),
        (Lane.COMPUTE, "B0.0 mlp 0", 5, 7), (Lane.COMPUTE, "B0.0", 7, 8),
        (Lane.COMPUTE, "B0.1 mlp 0", 8, 10), (Lane.COMPUTE, "B0.1", 10, 11)]]
    found = measured_durations(read_trace(trace_json({0: spans}), 1), schedule)
    assert (found.forward, found.pair, found.backward) == ([1e3], pytest.approx([4e3]), pytest.approx([3e3]))
    assert (found.backward_input, found.backward_weight) == (pytest.approx([2e3]), pytest.approx([1e3]))  # the parts of its B


def test_split_actions_and_weights_that_had_nothing_to_do():
    schedule = parse_csv("F0.0/2,I0.0,W0.0\n", SEARCHED, Stages("loop", 1))
    spans = [Span(0, Lane.COMPUTE, "F0.0 mlp 0", 0, 2), Span(0, Lane.COMPUTE, "F0.0 mlp 0", 2, 3),
             Span(0, Lane.COMPUTE, "I0.0 mlp 0", 3, 5)]
    measured = read_trace(trace_json({0: spans}), 1)
    refuse_another_schedule(measured, schedule)
    found = measured_durations(measured, schedule)
    assert found.forward == pytest.approx([3e3]) and found.backward_weight == [0.0]
    assert measured.length(0, SplitAction(Compute(ActionKind.FORWARD, 0, 0, 0))) == pytest.approx(3e3)


def test_where_ranks_stood_is_read_from_the_trace():
    schedule = generate("dualpipe", 2, 4)
    _, first = as_a_run_has_them(schedule, COSTS, ranks=(3, 1))
    _, second = as_a_run_has_them(schedule, replace(COSTS, forward=(1.0, 1.0)), ranks=(0, 2))
    stood = [(1, 0), (0, 1), (1, 1), (0, 0)]
    places = [Place(rank, row, position, 0, 0, 0, "a", 0) for rank, (row, position) in enumerate(stood)]
    text = trace_json({0: first + second}, {0: places})
    measured = read_trace(text, 2)
    refuse_another_schedule(measured, schedule)
    assert measured.makespan == pytest.approx(1e3 * simulate(schedule, COSTS).makespan)
    assert [span.rank for span in (row[0] for row in measured.rows)] == [0, 1]
    with pytest.raises(ValueError, match="of 2 ranks; this one has 4"):
        read_trace(trace_json({0: first + second}), 2)


@pytest.mark.parametrize("text, positions, step, wanted", [
    ("{}", 1, None, "the trace of a run's steps"), ("[1]", 1, None, "the trace of a run's steps"),
    ("F0.0", 1, None, "the trace of a run"),
    ('{"traceEvents": []}', 1, None, "a step that the trace has: it has none"),
    (trace_json({step: [Span(0, "compute", "F0.0", 0, 1)] for step in (2, 5)}), 1, 3, "a step that the trace has: 2, 5"),
    (trace_json({2: [Span(0, "compute", "F0.0", 0, 1)]}), 2, 2, "the trace of a pipeline of 2 ranks; this one has 1"),
])
def test_what_is_no_trace_of_such_a_step(text, positions, step, wanted):
    with pytest.raises(ValueError, match=wanted):
        read_trace(text, positions, step)


def test_a_step_that_ran_another_schedule():
    schedule = generate("dualpipe", 2, 4)
    _, spans = as_a_run_has_them(generate("dualpipe", 2, 6), COSTS)
    measured = read_trace(trace_json({0: spans}), 2)
    with pytest.raises(ValueError, match=r"dualpipe, 4 microbatches\); rank 0 did not run I0.1"):
        refuse_another_schedule(measured, schedule)
    _, spans = as_a_run_has_them(schedule, COSTS)
    with pytest.raises(ValueError, match="rank 0 ran B0.2"):
        extra = [*spans, Span(0, Lane.COMPUTE, "B0.2 mlp 0", 0, 1)]
        refuse_another_schedule(read_trace(trace_json({0: extra}), 2), schedule)


def test_both_in_one_trace_on_one_axis():
    schedule = generate("dualpipe", 2, 4)
    timeline, spans = as_a_run_has_them(schedule, COSTS, offset=4.0)
    measured = read_trace(trace_json({6: spans}), 2)
    simulated = simulate(schedule, measured_durations(measured, schedule))
    events = json.loads(schedule_trace(simulated.lanes, measured))["traceEvents"]
    names = {event["args"]["name"]: event["pid"] for event in events if event["name"] == "process_name"}
    assert sorted(names, key=names.get) == ["rank 0 simulated", "rank 0 measured", "rank 1 simulated", "rank 1 measured"]
    ends = {name: max(event["ts"] + event["dur"] for event in events if event["ph"] == "X" and event["pid"] == pid
                      and event["cat"] in ("compute", "exchange")) for name, pid in names.items()}
    for position, row in enumerate(timeline.rows):
        assert ends[f"rank {position} measured"] == pytest.approx(1e6 * row[-1].end)
        assert ends[f"rank {position} simulated"] == pytest.approx(1e6 * row[-1].end)
    lanes = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
    assert all(lanes[event["tid"]] == event["cat"] for event in events if event["ph"] == "X")
    assert {event["args"]["step"] for event in events if event["ph"] == "X" and event["pid"] % 2} == {6}
    alone = json.loads(schedule_trace(simulated.lanes))["traceEvents"]
    assert [event["args"]["name"] for event in alone if event["name"] == "process_name"] == [
        "rank 0 simulated", "rank 1 simulated"]


def test_a_runs_trace():
    spans = [Span(1, "exchange", "F0.0 dispatch 2", 5.0, 5.5), Span(0, "compute", "F0.0 attention 2", 4.0, 5.0)]
    shown = json.loads(trace_json({7: spans}))
    events = [event for event in shown["traceEvents"] if event["ph"] == "X"]
    assert shown["displayTimeUnit"] == "ms"
    assert events == [
        {"name": "F0.0 dispatch 2", "cat": "exchange", "ph": "X", "pid": 1, "tid": 1, "ts": 1e6, "dur": 5e5, "args": {"step": 7}},
        {"name": "F0.0 attention 2", "cat": "compute", "ph": "X", "pid": 0, "tid": 0, "ts": 0.0, "dur": 1e6, "args": {"step": 7}},
    ]
    assert {event["args"]["name"] for event in shown["traceEvents"] if event["name"] == "process_name"} == {"rank 0", "rank 1"}
