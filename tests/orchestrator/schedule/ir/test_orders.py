"""The orders that programs carry: what they depend on, and that wrong ones are refused."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from orchestrator.schedule.ir.actions import ActionKind, parse_csv
from orchestrator.schedule.ir.grid import ScheduleError
from orchestrator.schedule.ir.lower import lower
from orchestrator.schedule.ir.operations import timed
from orchestrator.schedule.ir.orders import check_orders, forms, streams_of, with_orders
from orchestrator.schedule.ir.spans import Lane
from orchestrator.schedule.ir.stages import LOOP, Stages
from orchestrator.schedule.kinds.registry import generate
from orchestrator.schedule.timing.durations import UNIT, Durations, with_communication

F, B, I, W = ActionKind.FORWARD, ActionKind.BACKWARD, ActionKind.BACKWARD_INPUT, ActionKind.BACKWARD_WEIGHT
COSTS = Durations(1.0, 1.0, 1.0, dispatch=0.5, combine=0.5, layers=2)


def ordered(schedule, durations=COSTS):
    """The schedule's programs with orders, and what these were made from."""
    hosted = [schedule.stages.hosted(position) for position in range(schedule.positions)]
    stages = [durations.operations(stage) for stage in range(schedule.stages.count)]
    return with_orders(lower(schedule), stages, hosted), stages, hosted


@pytest.mark.parametrize("kind", ["dualpipe", "dualpipev", "zbv", "interleaved_1f1b"])
def test_every_action_has_an_order(kind):
    schedule = generate(kind, 4, 16, None)
    programs, stages, hosted = ordered(schedule)
    check_orders(programs, stages, hosted)
    for program, bare in zip(programs, lower(schedule), strict=True):
        assert program.actions == bare.actions and not bare.orders
        assert {form for _, form in forms(program.actions)} == dict(program.orders).keys()
    assert programs == ordered(schedule)[0]                                      # nothing but the schedule decides


def test_the_order_takes_as_long_as_the_simulator_says():
    """The same operations, planned by the same rule, so an action's template is that of its order."""
    schedule = generate("dualpipe", 4, 10, None)
    durations = replace(with_communication(UNIT, 0.913), layers=3)
    programs, stages, hosted = ordered(schedule, durations)
    for program in programs:
        orders = dict(program.orders)
        for action, form in forms(program.actions):
            template = timed(streams_of(form, stages, hosted[program.position]), orders[form])
            assert template.duration == pytest.approx(durations.of(action, program.position))


def test_a_microbatch_of_which_anything_is_split_is_in_two_parts():
    schedule = parse_csv("F0.0/2,F0.1,I0.0,F0.2|W0.0,B0.1/2,B0.2\n", "1f1b", Stages(LOOP, 1))
    assert [form for _, form in forms(schedule.rows[0])] == [
        ((F, 0, 2),), ((F, 0, 2),), ((I, 0, 2),), ((F, 0, 1), (W, 0, 2)), ((B, 0, 2),), ((B, 0, 1),)]
    programs, stages, hosted = ordered(schedule)
    check_orders(programs, stages, hosted)
    counts = {form: Counter(order) for form, order in programs[0].orders}
    assert counts[(F, 0, 2),] == {0: 8, 1: 8} and counts[(I, 0, 2),] == {0: 8, 1: 8}
    assert counts[(B, 0, 1),] == {0: 8, ~0: 4} and counts[(F, 0, 1), (W, 0, 2)] == {0: 8, ~1: 8}


def total(stream):
    return sum(operation.duration for operation in stream.operations)


def test_halves_are_half_as_long_and_alternate():
    stage = COSTS.operations(0)
    whole, (one, other) = stage.streams(F, 1), stage.streams(F, 2)
    assert one == other and 2 * total(one) == total(whole[0])
    order = dict(ordered(parse_csv("F0.0/2,B0.0\n", "1f1b", Stages(LOOP, 1)))[0][0].orders)[(F, 0, 2),]
    lanes = [stage.forward[order[:place].count(mark)].lane for place, mark in enumerate(order)]
    first = lanes.index(Lane.EXCHANGE)
    assert order[first] == 0 and order[first + 1] == 1                          # one's dispatch runs under the other's attention


@pytest.mark.parametrize("change, words", [
    (lambda order: order[:-1], "leaves out"), (lambda order: (*order, 0), "nothing more"),
    (lambda order: (~0, *order), "to release"), (lambda order: None, "has no order")])
def test_a_wrong_order_is_refused_where_it_is_first_used(change, words):
    schedule = generate("1f1b", 2, 4, None)
    programs, stages, hosted = ordered(schedule)
    form = ((B, 0, 1),)
    orders = dict(programs[1].orders)
    orders[form] = change(orders[form])
    kept = tuple((form, order) for form, order in orders.items() if order is not None)
    with pytest.raises(ScheduleError, match=f"position 1, action 1: B0.0: .*{words}"):
        check_orders((programs[0], replace(programs[1], orders=kept)), stages, hosted)
