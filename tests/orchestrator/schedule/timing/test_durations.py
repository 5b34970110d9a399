from __future__ import annotations

from dataclasses import replace

import pytest

from orchestrator.schedule.ir.actions import ActionKind, Compute, Pair, SplitAction
from orchestrator.schedule.ir.spans import Lane
from orchestrator.schedule.ir.stages import Stages
from orchestrator.schedule.timing.durations import UNIT, Durations, per_chunk, with_communication

F, B, I, W = ActionKind.FORWARD, ActionKind.BACKWARD, ActionKind.BACKWARD_INPUT, ActionKind.BACKWARD_WEIGHT


def compute(kind, stage=0, microbatch=0):
    return Compute(kind, stage, 0, microbatch)


def test_unit_costs():
    assert [UNIT.of(compute(kind)) for kind in (F, B, I, W)] == [1, 2, 1, 1]
    assert UNIT.of(Pair(compute(F), compute(B, microbatch=1))) == 3
    assert UNIT.of(SplitAction(compute(F))) == 1


def test_durations_of_each_stage_and_position():
    durations = Durations((1.0, 5.0), 2.0, (0.5, 0.25), slowdown=(1.0, 3.0))
    assert durations.of(compute(F, stage=1)) == 5
    assert durations.of(compute(B, stage=1), position=1) == 3 * 2.25
    assert durations.of(Pair(compute(F, stage=0), compute(W, 1, 1))) == 1.25


def test_known_durations_of_pair_and_backward_go_before_operations():
    durations = replace(with_communication(UNIT, 1.0), pair=2.4, backward=7.0)
    assert durations.of(Pair(compute(F), compute(B, microbatch=1))) == 2.4
    assert durations.of(compute(B)) == 7.0
    assert durations.of(Pair(compute(F), compute(I, microbatch=1))) > 2.4


def test_operations_of_a_known_pair_are_stretched_to_it():
    pair = Pair(compute(F), compute(B, microbatch=1))
    free = with_communication(UNIT, 1.0).template(pair)
    known = replace(with_communication(UNIT, 1.0), pair=2 * free.duration).template(pair)
    assert known.spans == tuple((lane, pytest.approx(2 * start), pytest.approx(2 * end)) for lane, start, end in free.spans)


def test_a_slow_position_computes_slower_and_communicates_as_fast():
    durations = replace(with_communication(UNIT, 1.0), slowdown=(1.0, 2.0))
    assert durations.of(compute(F), 1) - durations.of(compute(F), 0) == pytest.approx(1.0)


def test_a_position_with_a_slow_link_communicates_slower_and_computes_as_fast():
    """Alone: the forward of a microbatch 1, and 1.5 of communication that nothing hides."""
    durations = replace(with_communication(UNIT, 1.0), exchange_slowdown=(1.0, 4.0))
    assert [durations.of(compute(F), position) for position in (0, 1)] == pytest.approx([1 + 1.5, 1 + 4 * 1.5])
    assert [durations.of(compute(W), position) for position in (0, 1)] == [1, 1]
    lanes = [sum(end - start for lane, start, end in durations.template(compute(B), 1).spans if lane is which) for which in Lane]
    assert dict(zip(Lane, lanes))[Lane.EXCHANGE] == pytest.approx(4 * 1.5)


def test_known_durations_are_of_a_position_that_is_not_slow():
    """A slow one takes as much longer as its operations do."""
    pair = Pair(compute(F), compute(B, microbatch=1))
    free = replace(with_communication(UNIT, 1.0), slowdown=(1.0, 1.0, 2.0), exchange_slowdown=(1.0, 4.0, 1.0))
    known = replace(free, pair=2.4)
    for position in range(3):
        assert known.of(pair, position) == pytest.approx(2.4 * free.of(pair, position) / free.of(pair, 0))
    assert replace(UNIT, pair=2.4, slowdown=(1.0, 2.0)).of(pair, 1) == 4.8
    assert Durations(0.0, 0.0, 0.0, pair=2.4, slowdown=(1.0, 2.0)).of(pair, 1) == 4.8


def test_communication_is_a_share_of_all_compute_half_in_each_direction():
    durations = with_communication(UNIT, 0.913)
    assert durations.of(compute(F)) == pytest.approx(1 + 0.913 * 3 / 2)
    assert durations.of(compute(I)) == durations.of(compute(F))
    assert durations.of(compute(W)) == 1


def test_halves_can_cost_more_compute_than_the_whole():
    assert replace(UNIT, halves=1.25).of(SplitAction(compute(F))) == 1.25


def test_chunks_are_equal_parts_of_a_rank():
    whole = with_communication(Durations(4.0, 4.0, 4.0, hop=0.5), 1.0)
    quarter = per_chunk(whole, Stages("loop", 2, 4))
    assert (quarter.forward, quarter.dispatch, quarter.layers, quarter.hop) == (1.0, 0.75, 1, 0.5)
    assert 4 * quarter.of(compute(F)) == pytest.approx(whole.of(compute(F)))


def test_tensors_take_the_hop_or_what_their_link_takes():
    durations = Durations(1, 1, 1, hop=0.25, links={(0, 1): 2.0})
    assert [durations.arrival(*way) for way in ((0, 1), (1, 0), (1, 1))] == [2.0, 0.25, 0.0]


@pytest.mark.parametrize("wrong", [{"forward": -1.0}, {"hop": -0.1}, {"dispatch": (0.0, -1.0)}, {"layers": 0},
                                   {"slowdown": (1.0, 0.0)}, {"exchange_slowdown": (1.0, -2.0)}, {"halves": 0.0}])
def test_impossible_durations_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        replace(UNIT, **wrong)
