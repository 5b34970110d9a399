"""The compiled schedule says what `dependencies` says, in numbers."""

from __future__ import annotations

import pytest
from hypothesis import given, settings

from orchestrator.schedule.ir.actions import ActionKind, Payload, dependencies, parse_csv
from orchestrator.schedule.ir.check import ScheduleError
from orchestrator.schedule.ir.graph import compiled
from orchestrator.schedule.ir.lower import lower
from orchestrator.schedule.ir.stages import BOTH, SEARCHED, Stages, V
from orchestrator.schedule.kinds.registry import generate
from tests.orchestrator.schedule.examples import schedules
from tests.reference.programs import works


@settings(max_examples=60, deadline=None)
@given(schedules())
def test_needs_and_arrivals_are_the_dependencies(schedule):
    graph = compiled(schedule)
    at = {compute: (position, index) for position, row in enumerate(schedule.rows) for index, action in enumerate(row)
          for compute in action.computes}
    assert graph.actions == tuple(action for row in schedule.rows for action in row)
    for number, action in enumerate(graph.actions):
        position, index = graph.position[number], graph.index(number)
        assert schedule.rows[position][index] == action and number in graph.numbers(position)
        needed = [at[compute] for compute in dependencies(action, schedule)]
        for found, here in ((graph.needs, True), (graph.arrivals, False)):
            places = [(graph.position[n], graph.index(n)) for n in found[number]]
            assert places == [place for place in needed if (place[0] == position) == here]


@settings(max_examples=60, deadline=None)
@given(schedules())
def test_the_order_respects_rows_and_dependencies(schedule):
    graph = compiled(schedule)
    try:
        when = {number: time for time, number in enumerate(graph.order)}
    except ScheduleError:
        assert not works(lower(schedule), schedule)
        return
    assert sorted(when) == list(range(len(graph.actions)))
    for number, time in when.items():
        before = [*graph.needs[number], *graph.arrivals[number]] + ([number - 1] if graph.index(number) else [])
        assert all(when[other] < time for other in before)


@settings(max_examples=60, deadline=None)
@given(schedules())
def test_every_sort_is_alike_but_for_the_microbatch(schedule):
    graph = compiled(schedule)
    sorts, of = graph.sorts
    described = [(sort.position, type(sort.action), *((c.kind, c.stage) for c in sort.action.computes)) for sort in sorts]
    assert len(set(described)) == len(sorts)
    for position, action, sort in zip(graph.position, graph.actions, of, strict=True):
        assert described[sort] == (position, type(action), *((c.kind, c.stage) for c in action.computes))


@settings(max_examples=60, deadline=None)
@given(schedules())
def test_crossings_go_from_position_to_position(schedule):
    graph = compiled(schedule)
    carried = [(crossing.maker, crossing.user) for crossing in graph.crossings]
    assert sorted(carried) == sorted((maker, user) for user, makers in enumerate(graph.arrivals) for maker in makers)
    assert [maker for maker, _ in carried] == sorted(maker for maker, _ in carried)
    for crossing in graph.crossings:
        send, receive = crossing.send, crossing.receive
        assert (receive.peer, send.peer) == (graph.position[crossing.maker], graph.position[crossing.user])
        assert (send.payload, send.stage, send.microbatch, send.tag) == (
            receive.payload, receive.stage, receive.microbatch, receive.tag)
        assert any((c.slot, c.microbatch) == (send.slot, send.microbatch) and c.stage == send.stage + (
            -1 if send.payload is Payload.ACTIVATION else 1) for c in graph.actions[crossing.maker].computes)
        assert any((c.stage, c.slot, c.kind is ActionKind.FORWARD) == (receive.stage, receive.slot,
                                                                       send.payload is Payload.ACTIVATION)
                   for c in graph.actions[crossing.user].computes)


def test_what_a_pair_makes_leaves_in_its_order():
    """The user of the second one's tensor comes first in the numbers of actions."""
    schedule = parse_csv("F0.0,F1.0,F0.1,B1.0,F1.1|B0.0,B1.1,I0.1,W0.1\nF1.0,F0.0,F1.1,B0.0,F0.1|B1.0,B0.1,I1.1,W1.1\n",
                         "dualpipe", Stages(BOTH, 2))
    made = [str(crossing.send) for crossing in compiled(schedule).crossings if crossing.receive.peer == 1]
    assert made == [f"SEND {tensor} to 0" for tensor in (
        "activation 1.0", "activation 1.1", "gradient 0.0", "gradient 0.1")]
    pairs = parse_csv("F0.0,F0.1|F1.0\nF0.0,F1.0|F0.1\n", "forward_only", Stages(BOTH, 2))
    assert [str(c.send) for c in compiled(pairs).crossings] == ["SEND activation 0.0 to 1", "SEND activation 0.1 to 1",
                                                                "SEND activation 1.0 to 0"]


def test_one_schedule_is_compiled_once():
    schedule = generate("dualpipe", 4, 8)
    graph = compiled(schedule)
    assert compiled(schedule) is compiled(generate("dualpipe", 4, 8)) is compiled(graph) is graph


def test_no_order():
    schedule = parse_csv("F0.0,B0.0,F1.0,B1.0\n", SEARCHED, Stages(V, 1, 2))
    graph = compiled(schedule)
    with pytest.raises(ScheduleError, match="position 0, action 1: B0.0 waits for B1.0 of stage 1, for ever\n.*>B0.0<"):
        _ = graph.order
