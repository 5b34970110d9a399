"""DualPipeV against DualPipe of twice the length, against torch's, and against the published bubble."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.refusal import ConfigError
from orchestrator.schedule.ir.actions import to_csv
from orchestrator.schedule.ir.check import check
from orchestrator.schedule.ir.lower import lower
from orchestrator.schedule.kinds.registry import generate
from orchestrator.schedule.timing.durations import Durations
from orchestrator.schedule.timing.simulate import simulate
from tests.reference.torch_schedules import torch_rows

SIZES = st.builds(lambda positions, more: (positions, 2 * positions + more), st.integers(1, 8), st.integers(0, 9))


@settings(max_examples=30, deadline=None)
@given(SIZES)
def test_rows_are_the_first_half_of_dualpipe(sizes):
    positions, microbatches = sizes
    schedule = generate("dualpipev", positions, microbatches)
    assert to_csv(schedule).splitlines() == to_csv(generate("dualpipe", 2 * positions, 2 * microbatches)).splitlines()[:positions]
    assert check(schedule, lower(schedule)) == (2 * positions + 1,) * positions


@settings(max_examples=30, deadline=None)
@given(SIZES)
def test_rows_are_torchs(sizes):
    schedule = generate("dualpipev", *sizes)
    assert to_csv(schedule).splitlines() == torch_rows("ScheduleDualPipeV", schedule.stages, sizes[1])


@settings(max_examples=30, deadline=None)
@given(sizes=SIZES, forward=st.integers(2, 9), weights=st.integers(1, 9), hidden=st.integers(0, 3))
def test_bubble_of_the_last_position_is_the_published_formula(sizes, forward, weights, hidden):
    """(PP/2 - 1)(F&B + B - 3W) with PP = 2n stages, where I = F and W <= I; no other position idles more."""
    weights = min(weights, forward)
    backward = forward + weights
    pair = forward + backward - min(hidden, weights)
    durations = Durations(forward, forward, weights, pair=pair)
    schedule = generate("dualpipev", *sizes)
    makespan = simulate(schedule, durations).makespan
    bubbles = [makespan - sum(map(durations.of, row)) for row in schedule.rows]
    assert bubbles[-1] == max(bubbles) == (sizes[0] - 1) * (pair + backward - 3 * weights)


@pytest.mark.parametrize("positions, microbatches, message", [
    (0, 4, "positions = 0: dualpipev takes at least 1"),
    (1, 1, "microbatches = 1: dualpipev takes at least 2"),
    (3, 5, "microbatches = 5: dualpipev takes at least 6 (2 x positions)"),
])
def test_refused_in_one_line(positions, microbatches, message):
    with pytest.raises(ConfigError) as refusal:
        generate("dualpipev", positions, microbatches)
    assert str(refusal.value) == message
