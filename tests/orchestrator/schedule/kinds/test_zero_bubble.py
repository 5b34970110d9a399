"""The zero-bubble kinds against torch's (zbv) and their closed formulas."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.schedule.ir.actions import ActionKind, to_csv
from orchestrator.schedule.ir.check import check
from orchestrator.schedule.ir.lower import lower
from orchestrator.schedule.kinds.registry import generate
from orchestrator.schedule.timing.durations import UNIT, Durations
from orchestrator.schedule.timing.simulate import simulate
from tests.reference.torch_schedules import torch_rows

SIZES = st.tuples(st.integers(1, 8), st.integers(1, 20))


def test_zb_h1_by_hand():
    assert to_csv(generate("zb_h1", 2, 3)) == (
        "F0.0,F0.1,I0.0,W0.0,F0.2,I0.1,W0.1,I0.2,W0.2\n"
        "F0.0,I0.0,F0.1,I0.1,W0.0,F0.2,I0.2,W0.1,W0.2\n")


@settings(max_examples=30, deadline=None)
@given(SIZES)
def test_zb_h1_is_1f1b_with_weights_later(sizes):
    without = [[str(a).replace("I", "B") for a in row if a.kind is not ActionKind.BACKWARD_WEIGHT]
               for row in generate("zb_h1", *sizes).rows]
    assert without == [list(map(str, row)) for row in generate("1f1b", *sizes).rows]


@settings(max_examples=40, deadline=None)
@given(positions=st.integers(1, 8), more=st.integers(0, 12), weights=st.integers(1, 9), forward=st.integers(0, 9),
       inputs=st.integers(0, 9))
def test_bubble_and_peak_of_zb_h1(positions, more, weights, forward, inputs):
    """(P - 1)(F + B - 2W) on every position, where W is at most F and I, and M >= P."""
    forward, inputs, microbatches = weights + forward, weights + inputs, positions + more
    schedule = generate("zb_h1", positions, microbatches)
    assert check(schedule, lower(schedule)) == (positions,) * positions
    work = microbatches * (forward + inputs + weights)
    bubble = simulate(schedule, Durations(forward, inputs, weights)).makespan - work
    assert bubble == (positions - 1) * (forward + (inputs + weights) - 2 * weights)


@settings(max_examples=60, deadline=None)
@given(SIZES)
def test_zbv_is_torchs(sizes):
    schedule = generate("zbv", *sizes)
    assert to_csv(schedule).splitlines() == torch_rows("ScheduleZBVZeroBubble", schedule.stages, sizes[1])
    peaks = check(schedule, lower(schedule))
    assert max(peaks) <= min(2 * sizes[0], 2 * sizes[1])


@settings(max_examples=40, deadline=None)
@given(positions=st.integers(1, 8), more=st.integers(0, 12))
def test_zbv_never_idles_between_its_first_and_last_action(positions, more):
    """Where F = I = W and M >= 2P - 1; what is left of the bubble is that position r cannot start before r."""
    schedule = generate("zbv", positions, 2 * positions - 1 + more)
    timeline = simulate(schedule, UNIT)
    for position, row in enumerate(timeline.rows):
        assert row[0].start == position
        assert row[-1].end - row[0].start == 6 * schedule.microbatches
    assert timeline.makespan == 6 * schedule.microbatches + positions - 1
    assert check(schedule, lower(schedule)) == (2 * positions,) * positions
