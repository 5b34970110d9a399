"""Where stages live, against rows of stages written by hand and against what every placement promises."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.schedule.ir.stages import BOTH, FORWARD_ONLY, LOOP, SEARCHED, Stages, V, chunks_of, stages_of

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


@pytest.mark.parametrize("kind, chunks, stages", [
    ("dualpipe", None, Stages(BOTH, 4)), ("dualpipev", 2, Stages(V, 4, 2)), ("zbv", None, Stages(V, 4, 2)),
    ("zb_h1", 1, Stages(LOOP, 4)), ("1f1b", None, Stages(LOOP, 4)), ("gpipe", None, Stages(LOOP, 4)),
    ("interleaved_1f1b", None, Stages(LOOP, 4, 2)), ("merged_interleaved_1f1b", 3, Stages(LOOP, 4, 3)),
    (SEARCHED, None, Stages(BOTH, 4)), (FORWARD_ONLY, None, Stages(BOTH, 4)),
])
def test_stages_of_a_kind(kind, chunks, stages):
    assert stages_of(kind, 4, chunks) == stages
    assert chunks_of(kind) in (None, stages.chunks)


def test_placement_is_free_where_the_kind_is_no_shape():
    assert stages_of(SEARCHED, 4, placement=V) == Stages(V, 4, 2)
    assert stages_of(FORWARD_ONLY, 4, 3, LOOP) == Stages(LOOP, 4, 3)


@pytest.mark.parametrize("make, message", [
    (lambda: Stages("ring", 2), "placement 'ring': one of both, v, loop"),
    (lambda: Stages(LOOP, 0), "positions = 0: at least 1"),
    (lambda: Stages(LOOP, 2, 0), "chunks = 0: at least 1 with placement loop"),
    (lambda: Stages(V, 2, 3), "chunks = 3: an even number with placement v"),
    (lambda: Stages(BOTH, 2, 2), "chunks = 2: 1 with placement both"),
    (lambda: stages_of("zigzag", 2), "schedule kind 'zigzag': one of dualpipe, dualpipev, "),
    (lambda: stages_of("zbv", 2, 4), "chunks = 4: zbv takes 2"),
    (lambda: stages_of("interleaved_1f1b", 2, 0), "chunks = 0: at least 1 with placement loop"),
    (lambda: stages_of(SEARCHED, 2, placement="ring"), "placement 'ring': one of both, v, loop"),
])
def test_refused(make, message):
    with pytest.raises(ValueError) as refusal:
        make()
    assert str(refusal.value).startswith(message)
