"""Where stages live, against rows of stages written by hand and against what every placement promises."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.schedule.ir.stages import BOTH, LOOP, Stages, V

EVERY = st.one_of(
    st.builds(Stages, st.just(BOTH), st.integers(1, 9)),
    st.builds(Stages, st.just(V), st.integers(1, 9), st.sampled_from([2, 4, 6])),
    st.builds(Stages, st.just(LOOP), st.integers(1, 9), st.integers(1, 5)),
)


@pytest.mark.parametrize("stages, hosted", [
    (Stages(BOTH, 1), [(0,)]),
    (Stages(BOTH, 4), [(0, 3), (1, 2), (2, 1), (3, 0)]),
    (Stages(BOTH, 3), [(0, 2), (1, 1), (2, 0)]),
    (Stages(V, 1, 2), [(0, 1)]),
    (Stages(V, 3, 2), [(0, 5), (1, 4), (2, 3)]),
    (Stages(V, 2, 4), [(0, 3, 4, 7), (1, 2, 5, 6)]),
    (Stages(LOOP, 3), [(0,), (1,), (2,)]),
    (Stages(LOOP, 2, 3), [(0, 2, 4), (1, 3, 5)]),
])
def test_stages_of_each_position(stages, hosted):
    assert [stages.hosted(position) for position in range(stages.positions)] == hosted


@settings(deadline=None)
@given(EVERY)
def test_every_entrance_passes_every_stage_once(stages):
    assert len(stages.paths) == len(stages.entrances) == (2 if stages.placement == BOTH and stages.positions > 1 else 1)
    for entrance, path in zip(stages.entrances, stages.paths, strict=True):
        assert path[0][1] == entrance
        assert [stages.stage_at(*place) for place in path] == list(range(stages.count))
        assert len(set(path)) == stages.count == stages.positions * stages.chunks
        assert stages.route(entrance) == path
    places = {place for path in stages.paths for place in path}
    assert places == {(position, slot) for position in range(stages.positions) for slot in range(stages.slots)}
    for stage in range(stages.count):
        assert list(stages.holders(stage)) == [p for p in range(stages.positions) if stage in stages.hosted(p)]


@settings(deadline=None)
@given(EVERY.filter(lambda stages: stages.positions > 1))
def test_the_next_stage_is_next_door(stages):
    """With a V the turn is on one position; with a loop the last position is next to the first."""
    steps = {abs(a - b) for path in stages.paths for (a, _), (b, _) in pairwise(path)}
    assert steps <= {BOTH: {1}, V: {0, 1}, LOOP: {1, stages.positions - 1}}[stages.placement]


def test_what_is_not_there():
    assert Stages(V, 2, 2).route(2) is None
    assert Stages(LOOP, 2).route(-1) is None
    assert Stages(LOOP, 2).stage_at(0, 1) is None


@pytest.mark.parametrize("stages, handovers", [
    (Stages(BOTH, 2), [{}, {}]), (Stages(BOTH, 1), [{}]), (Stages(LOOP, 2, 2), [{}, {}]), (Stages(LOOP, 1, 3), [{1: 0, 2: 1}]),
    (Stages(V, 2, 2), [{}, {1: 0}]), (Stages(V, 3, 2), [{}, {}, {1: 0}]), (Stages(V, 2, 4), [{2: 1}, {1: 0, 3: 2}]),
    (Stages(V, 1, 2), [{1: 0}])])
def test_where_a_slot_feeds_another_of_its_position(stages, handovers):
    assert [stages.handovers(position) for position in range(stages.positions)] == handovers


@pytest.mark.parametrize("stages, smallest", [
    (Stages(BOTH, 4), [2, 2, 2, 4, 4]), (Stages(BOTH, 1), [1, 1, 2, 3, 4]), (Stages(V, 4, 2), [1, 1, 2, 3, 4]),
])
def test_microbatches_that_the_entrances_share(stages, smallest):
    assert [stages.shared_evenly(wanted) for wanted in range(5)] == smallest


@pytest.mark.parametrize("make, message", [
    (lambda: Stages("ring", 2), "placement = ring: one of both, v, loop"),
    (lambda: Stages(LOOP, 0), "positions = 0: at least 1"),
    (lambda: Stages(LOOP, 2, 0), "chunks = 0: at least 1 with placement loop"),
    (lambda: Stages(V, 2, 3), "chunks = 3: an even number with placement v"),
    (lambda: Stages(BOTH, 2, 2), "chunks = 2: 1 with placement both"),
])
def test_refused(make, message):
    with pytest.raises(ValueError) as refusal:
        make()
    assert str(refusal.value).startswith(message)
