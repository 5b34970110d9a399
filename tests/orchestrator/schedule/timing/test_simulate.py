"""The simulator against published formulas and by hand."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import asdict, replace
from itertools import pairwise
from statistics import mean, stdev

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.schedule.ir.actions import Schedule
from orchestrator.schedule.ir.graph import compiled
from orchestrator.schedule.ir.spans import figures
from orchestrator.schedule.ir.stages import BOTH, Stages
from orchestrator.schedule.kinds.forward_only import forward_only
from orchestrator.schedule.kinds.registry import KINDS, TABLE, generate, smallest_microbatches
from orchestrator.schedule.timing.durations import UNIT, Durations
from orchestrator.schedule.timing.simulate import makespan, simulate


@pytest.mark.parametrize("positions, microbatches, makespan, bubble, overlapped", [
    (4, 8, 26, 2, 23.6), (4, 10, 32, 2, 28.4), (8, 16, 54, 6, 48.0), (8, 20, 66, 6, 57.6), (8, 32, 102, 6, 86.4),
    (16, 32, 110, 14, 96.8), (16, 64, 206, 14, 173.6), (16, 120, 374, 14, 308.0),
])
def test_makespan_and_bubble_of_dualpipe(positions, microbatches, makespan, bubble, overlapped):
    """F 1, B 2, W 1, F&B 3, and F&B 2.4: as an independent simulation of the released code has them."""
    timeline = simulate(generate("dualpipe", positions, microbatches))
    assert timeline.makespan == makespan
    assert timeline.bubbles() == pytest.approx([bubble] * positions)
    assert simulate(generate("dualpipe", positions, microbatches), replace(UNIT, pair=2.4)).makespan == pytest.approx(overlapped)


@settings(max_examples=20, deadline=None)
@given(half=st.integers(1, 5), more=st.integers(0, 6), forward=st.integers(2, 9), weight=st.integers(1, 9),
       hidden=st.integers(0, 3))
def test_bubble_of_the_middle_positions_is_the_published_formula(half, more, forward, weight, hidden):
    """(PP/2 - 1)(F&B + B - 3W) where I = F and W <= I; no other position idles more (DeepSeek-V3 report, table 2)."""
    weight = min(weight, forward)
    backward = forward + weight
    pair = forward + backward - min(hidden, weight)
    timeline = simulate(generate("dualpipe", 2 * half, 4 * half + 2 * more), Durations(forward, forward, weight, pair=pair))
    bubbles = timeline.bubbles()
    expected = (half - 1) * (pair + backward - 3 * weight)
    assert bubbles[half - 1:half + 1] == pytest.approx([expected] * 2)
    assert max(bubbles) == pytest.approx(expected)


def test_durations_by_stage_and_hops():
    by_stage = Durations(forward=[1.0, 3.0], backward_input=0.0, backward_weight=0.0, hop=0.5)
    timeline = simulate(forward_only(Stages(BOTH, 2), 2), by_stage)
    assert [[(span.label, span.start, span.end) for span in row] for row in timeline.rows] == [
        [("F0.0", 0.0, 1.0), ("F1.0", 1.5, 4.5)],
        [("F1.0", 0.0, 1.0), ("F0.0", 1.5, 4.5)],
    ]
    assert timeline.makespan == 4.5


def test_one_position_never_idles():
    assert simulate(generate("dualpipe", 1, 5), replace(UNIT, hop=5.0)).bubbles() == (0.0,)


def relaxed(schedule, durations):
    """(start, end) by position and index, by raising starts until all constraints hold. Of the pipeline it knows the paths."""
    users = defaultdict(list)                   # (position, slot, microbatch, forward, weights) -> where it runs
    for position, row in enumerate(schedule.rows):
        for index, action in enumerate(row):
            for c in action.computes:
                users[position, c.slot, c.microbatch, c.kind == "F", c.kind == "W"].append((position, index))
    edges = []                                  # (before, after, time between)
    for path in schedule.stages.paths:
        for microbatch in range(schedule.microbatches // len(schedule.stages.paths)):
            forwards = [users[position, slot, microbatch, True, False][0] for position, slot in path]
            backwards = [users[position, slot, microbatch, False, False] for position, slot in path]
            weights = [users[position, slot, microbatch, False, True] for position, slot in path]
            chain = forwards + [found[0] for found in reversed(backwards) if found]
            hops = {(a, b): durations.links.get((a[0], b[0]), durations.hop) for a, b in pairwise(chain)}
            edges += [(a, b, hop if a[0] != b[0] else 0.0) for (a, b), hop in hops.items()]
            edges += [(i[0], w[0], 0.0) for i, w in zip(backwards, weights, strict=True) if w]
    edges += [((position, index - 1), (position, index), 0.0) for position, row in enumerate(schedule.rows)
              for index in range(1, len(row))]
    length = {(position, index): durations.of(action, position) for position, row in enumerate(schedule.rows)
              for index, action in enumerate(row)}
    start, changed = dict.fromkeys(length, 0.0), True
    while changed:
        changed = False
        for before, after, between in edges:
            earliest = start[before] + length[before] + between
            if earliest > start[after] and before != after:
                start[after], changed = earliest, True
    return {place: (begin, begin + length[place]) for place, begin in start.items()}


COSTS = st.floats(0.1, 3.0)


@st.composite
def cases(draw):
    kind, positions = draw(st.sampled_from(KINDS)), draw(st.sampled_from((1, 2, 3, 4)))
    positions += not TABLE[kind].takes(positions)
    schedule = generate(kind, positions, smallest_microbatches(kind, positions, draw(st.integers(1, 8))))
    stages = schedule.stages.count
    each = st.lists(COSTS, min_size=stages, max_size=stages)
    links = {(a, b): draw(COSTS) for a in range(positions) for b in (a - 1, (a + 1) % positions) if draw(st.booleans())}
    return schedule, Durations(
        forward=draw(COSTS), backward_input=draw(each), backward_weight=draw(each), hop=draw(COSTS), dispatch=draw(each),
        combine=0.2, layers=2, links=links, **{
            name: tuple(draw(COSTS) for _ in range(positions)) if draw(st.booleans()) else ()
            for name in ("slowdown", "exchange_slowdown")})


@settings(max_examples=60, deadline=None)
@given(cases())
def test_times_are_those_of_relaxation(case):
    schedule, durations = case
    timeline, expected = simulate(schedule, durations), relaxed(schedule, durations)
    for position, row in enumerate(timeline.rows):
        for index, span in enumerate(row):
            assert (span.start, span.end) == pytest.approx(expected[position, index])
            assert (span.rank, span.label) == (position, str(schedule.rows[position][index]))
    assert timeline.makespan == pytest.approx(max(end for _, end in expected.values()))
    assert makespan(schedule, durations) == timeline.makespan == simulate(compiled(schedule), durations).makespan


@settings(max_examples=40, deadline=None)
@given(cases(), st.sampled_from((0.0, 0.3)))
def test_lanes_are_the_templates_where_their_actions_are(case, jitter):
    schedule, durations = case[0], replace(case[1], jitter=jitter)
    timeline = simulate(schedule, durations)
    for position, row in enumerate(schedule.rows):
        lanes = iter(timeline.lanes[position])
        for action, whole in zip(row, timeline.rows[position], strict=True):
            template = durations.template(action, position)
            factor = (whole.end - whole.start) / template.duration
            for lane, start, end in template.spans:
                span = next(lanes)
                assert (span.rank, span.lane, span.label) == (position, lane, str(action))
                assert (span.start, span.end) == pytest.approx((whole.start + factor * start, whole.start + factor * end))
        assert next(lanes, None) is None


@settings(max_examples=40, deadline=None)
@given(cases(), st.sampled_from((0.0, 0.3)))
def test_figures_are_those_of_the_lanes(case, jitter):
    timeline = simulate(case[0], replace(case[1], jitter=jitter))
    expected = [figures(lanes, 0.0, timeline.makespan) for lanes in timeline.lanes]
    for found, wanted in zip(timeline.figures(), expected, strict=True):
        assert asdict(found) == pytest.approx(asdict(wanted), abs=1e-9)
    assert timeline.bubbles() == pytest.approx([timeline.makespan * wanted.bubble_ratio for wanted in expected], abs=1e-9)
    assert any(wanted.exposed_communication_seconds > 0 for wanted in expected)


def test_jitter_is_drawn_from_the_seed():
    schedule, noisy = generate("dualpipe", 8, 64), replace(UNIT, jitter=0.2, seed=1)
    stretch = simulate(schedule, noisy).stretch
    assert simulate(schedule, noisy).ends == simulate(schedule, noisy).ends
    assert simulate(schedule, replace(noisy, seed=2)).makespan != simulate(schedule, noisy).makespan == makespan(schedule, noisy)
    assert mean(stretch) == pytest.approx(1.0, abs=0.03) and stdev(stretch) == pytest.approx(0.2, rel=0.15) and min(stretch) >= 0
    assert set(simulate(schedule).stretch) == {1.0}


def test_nothing_to_run():
    empty = Schedule("forward_only", Stages(BOTH, 2), 0, ((), ()))
    assert simulate(empty).makespan == makespan(empty) == 0.0
    with pytest.raises(ValueError, match="no window"):
        simulate(empty).figures()


def test_actions_that_take_no_time_have_no_figures_but_count():
    timeline = simulate(generate("zb_h1", 1, 2), Durations(forward=1.0, backward_input=1.0, backward_weight=0.0))
    assert timeline.makespan == 4.0 and timeline.bubbles() == (0.0,)
