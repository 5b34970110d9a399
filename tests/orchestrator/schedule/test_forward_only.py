"""The evaluation schedule: right, and as short as any can be."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.config import ConfigError
from orchestrator.schedule.actions import Kind, Reduce, to_csv
from orchestrator.schedule.check import check
from orchestrator.schedule.forward_only import forward_only
from orchestrator.schedule.lower import lower
from orchestrator.schedule.simulate import simulate

SIZES = st.one_of(
    st.tuples(st.just(1), st.integers(1, 9)),
    st.tuples(st.integers(1, 5).map(lambda half: 2 * half), st.integers(1, 15).map(lambda each: 2 * each)),
)


@settings(max_examples=25, deadline=None)
@given(SIZES)
def test_right_and_shortest(sizes):
    positions, microbatches = sizes
    schedule = forward_only(positions, microbatches)
    programs = lower(schedule)
    assert check(schedule, programs, most_activations=1) == (1,) * positions
    assert all(half.kind is Kind.FORWARD for row in schedule.rows for action in row for half in action.halves)
    assert not any(isinstance(action, Reduce) for program in programs for action in program.actions)
    assert simulate(schedule).makespan == microbatches + max(positions - 2, 0)


def test_directions_alternate():
    assert to_csv(forward_only(2, 6)) == "F0.0,F1.0,F0.1,F1.1,F0.2,F1.2\nF1.0,F0.0,F1.1,F0.1,F1.2,F0.2\n"
    assert to_csv(forward_only(1, 3)) == "F0.0,F0.1,F0.2\n"


@pytest.mark.parametrize("positions, microbatches, message", [
    (3, 4, "positions = 3: forward_only takes 1 or an even number"),
    (2, 3, "microbatches = 3: forward_only takes an even number, at least 2, for more than one position"),
    (1, 0, "microbatches = 0: forward_only takes at least 1"),
])
def test_refused_in_one_line(positions, microbatches, message):
    with pytest.raises(ConfigError) as refusal:
        forward_only(positions, microbatches)
    assert str(refusal.value) == message
