"""The simulator against published formulas and by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.schedule.dualpipe import dualpipe
from orchestrator.schedule.forward_only import forward_only
from orchestrator.schedule.simulate import UNIT, Durations, simulate


@pytest.mark.parametrize("positions, microbatches, makespan, bubble, overlapped", [
    (4, 8, 26, 2, 23.6), (4, 10, 32, 2, 28.4), (8, 16, 54, 6, 48.0), (8, 20, 66, 6, 57.6), (8, 32, 102, 6, 86.4),
    (16, 32, 110, 14, 96.8), (16, 64, 206, 14, 173.6), (16, 120, 374, 14, 308.0),
])
def test_makespan_and_bubble_of_dualpipe(positions, microbatches, makespan, bubble, overlapped):
    """F 1, B 2, W 1, F&B 3, and F&B 2.4: as an independent simulation of the released code has them."""
    timeline = simulate(dualpipe(positions, microbatches))
    assert timeline.makespan == makespan
    assert timeline.bubbles() == pytest.approx([bubble] * positions)
    assert simulate(dualpipe(positions, microbatches), replace(UNIT, pair=2.4)).makespan == pytest.approx(overlapped)


@settings(max_examples=20, deadline=None)
@given(half=st.integers(1, 5), more=st.integers(0, 6), forward=st.integers(2, 9), weight=st.integers(1, 9),
       hidden=st.integers(0, 3))
def test_bubble_of_the_middle_positions_is_the_published_formula(half, more, forward, weight, hidden):
    """(PP/2 - 1)(F&B + B - 3W) where I = F and W <= I; no other position idles more (DeepSeek-V3 report, table 2)."""
    weight = min(weight, forward)
    backward = forward + weight
    pair = forward + backward - min(hidden, weight)
    timeline = simulate(dualpipe(2 * half, 4 * half + 2 * more), Durations(forward, backward, forward, weight, pair))
    bubbles = timeline.bubbles()
    expected = (half - 1) * (pair + backward - 3 * weight)
    assert bubbles[half - 1:half + 1] == pytest.approx([expected] * 2)
    assert max(bubbles) == pytest.approx(expected)


def test_durations_by_stage_and_hops():
    by_stage = Durations(forward=[1.0, 3.0], backward=0.0, backward_input=0.0, backward_weight=0.0, pair=0.0, hop=0.5)
    timeline = simulate(forward_only(2, 2), by_stage)
    assert [[(span.label, span.start, span.end) for span in row] for row in timeline.rows] == [
        [("F0.0", 0.0, 1.0), ("F1.0", 1.5, 4.5)],
        [("F1.0", 0.0, 1.0), ("F0.0", 1.5, 4.5)],
    ]
    assert timeline.makespan == 4.5


def test_one_position_never_idles():
    assert simulate(dualpipe(1, 5), replace(UNIT, hop=5.0)).bubbles() == (0.0,)
