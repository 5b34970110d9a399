"""GPipe and 1F1B against torch's and their closed formulas."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.schedule.ir.actions import to_csv
from orchestrator.schedule.ir.check import check
from orchestrator.schedule.ir.lower import lower
from orchestrator.schedule.kinds.registry import generate
from orchestrator.schedule.timing.durations import Durations
from orchestrator.schedule.timing.simulate import simulate
from tests.reference.torch_schedules import torch_rows

SIZES = st.tuples(st.integers(1, 8), st.integers(1, 16))


def test_by_hand():
    assert to_csv(generate("1f1b", 2, 3)) == "F0.0,F0.1,B0.0,F0.2,B0.1,B0.2\nF0.0,B0.0,F0.1,B0.1,F0.2,B0.2\n"
    assert to_csv(generate("1f1b", 3, 1)) == "F0.0,B0.0\n" * 3
    assert to_csv(generate("gpipe", 2, 2)) == "F0.0,F0.1,B0.0,B0.1\n" * 2


@settings(max_examples=30, deadline=None)
@given(SIZES)
def test_gpipe_is_torchs(sizes):
    schedule = generate("gpipe", *sizes)
    assert to_csv(schedule).splitlines() == torch_rows("ScheduleGPipe", schedule.stages, sizes[1])


@settings(max_examples=30, deadline=None)
@given(positions=st.integers(1, 8), more=st.integers(0, 9))
def test_1f1b_is_torchs(positions, more):
    """torch takes no fewer microbatches than stages. On the last stage, where it runs no forward before the alternation, its
    numbers of forwards are one too high."""
    schedule = generate("1f1b", positions, positions + more)
    *others, last = torch_rows("Schedule1F1B", schedule.stages, positions + more)
    words = [f"F0.{int(word[3:]) - 1}" if word[0] == "F" else word for word in last.split(",")]
    assert to_csv(schedule).splitlines() == [*others, ",".join(words)]


@pytest.mark.parametrize("kind", ["gpipe", "1f1b"])
@settings(max_examples=30, deadline=None)
@given(sizes=SIZES, forward=st.integers(1, 9), inputs=st.integers(1, 9), weights=st.integers(0, 9))
def test_makespan_and_peak(kind, sizes, forward, inputs, weights):
    positions, microbatches = sizes
    schedule = generate(kind, *sizes)
    peaks = check(schedule, lower(schedule))
    assert peaks == tuple(microbatches if kind == "gpipe" else min(positions - r, microbatches) for r in range(positions))
    timeline = simulate(schedule, Durations(forward, inputs, weights))
    assert timeline.makespan == (microbatches + positions - 1) * (forward + inputs + weights)
