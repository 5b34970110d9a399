"""Overlap, bubble and exposed communication against counting of whole time units."""

from __future__ import annotations

from dataclasses import asdict
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.schedule.ir.spans import Figures, Lane, Span, figures, together, union

SPANS = st.lists(st.builds(lambda lane, start, length: Span(3, lane, "x", float(start), float(start + length)),
                           st.sampled_from(list(Lane)), st.integers(-5, 30), st.integers(0, 12)), max_size=14)


@settings(max_examples=150, deadline=None)
@given(SPANS, st.integers(0, 10), st.integers(1, 25))
def test_figures_are_what_counting_finds(spans, start, length):
    cells = range(start, start + length)

    def occupied(*lanes):
        return {t for t in cells for s in spans if s.lane in lanes and s.start <= t and t + 1 <= s.end}

    compute, communication = occupied("compute"), occupied("exchange", "reduce")
    exposed = communication - compute
    found = figures(spans, start, start + length)
    assert found.compute_seconds == len(compute)
    assert found.communication_seconds == len(communication)
    assert found.exposed_communication_seconds == len(exposed)
    assert found.bubble_ratio == pytest.approx(1 - len(compute | communication) / length)
    assert found.overlap_ratio == pytest.approx(1 - len(exposed) / len(communication) if communication else 0.0)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), max_size=10), st.lists(st.floats(0, 1), max_size=8))
def test_union_has_the_same_points_and_no_overlap(intervals, points):
    merged = union(intervals)
    assert all(a[1] < b[0] for a, b in pairwise(merged)) and all(a < b for a, b in merged)
    for point in points:
        assert any(a <= point < b for a, b in merged) == any(a <= point < b for a, b in intervals)


def test_a_day_in_figures():
    spans = [Span(0, "compute", "F", 0, 4), Span(0, "exchange", "dispatch", 3, 6), Span(0, "pipeline", "B", 6, 8),
             Span(0, "reduce", "all", 8, 9)]
    assert figures(spans, 0, 10) == Figures(4, 4, 3, pytest.approx(0.3), 0.25)


@settings(max_examples=80, deadline=None)
@given(st.lists(st.tuples(SPANS, st.integers(1, 3)), max_size=4), st.integers(1, 9))
def test_windows_one_after_the_other(windows, rest):
    """Each window is 40 long from -5 on, stretched by a factor; then a rest without anything."""
    parts, shifted, start = [], [], 0
    for spans, factor in windows:
        parts.append((figures(spans, -5, 35), factor))
        shifted += [Span(3, span.lane, "x", *(start + factor * (min(max(time, -5), 35) + 5) for time in (span.start, span.end)))
                    for span in spans]
        start += 40 * factor
    assert asdict(together(parts, start + rest)) == pytest.approx(asdict(figures(shifted, 0, start + rest)), abs=1e-12)
    with pytest.raises(ValueError, match="no window of length 0"):
        together(parts, 0)


def test_nothing_to_hide_is_no_overlap():
    assert figures([], 0, 1) == Figures(0, 0, 0, 1.0, 0.0)


@pytest.mark.parametrize("spans, end, message", [
    ([], 0, "no window from 0 to 0"),
    ([Span(0, "comptue", "F", 0, 1)], 1, "comptue"),
    ([Span(0, "compute", "F", 0, 1), Span(1, "compute", "F", 0, 1)], 1, r"more than one rank: \[0, 1\]"),
])
def test_refused(spans, end, message):
    with pytest.raises(ValueError, match=message):
        figures(spans, 0, end)
