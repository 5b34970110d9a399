"""The table of kinds: what it takes is right at any size, what it does not take is refused in one line."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.refusal import ConfigError
from orchestrator.schedule.ir.actions import parse_csv, to_csv
from orchestrator.schedule.ir.check import check
from orchestrator.schedule.ir.lower import lower
from orchestrator.schedule.ir.stages import chunks_of, stages_of
from orchestrator.schedule.kinds.registry import KINDS, generate, smallest_microbatches

FREE = tuple(kind for kind in KINDS if chunks_of(kind) is None)


@settings(max_examples=150, deadline=None)
@given(kind=st.sampled_from(KINDS), positions=st.integers(1, 7), wanted=st.integers(1, 16), chunks=st.integers(1, 4))
def test_every_kind_is_right_at_any_size(kind, positions, wanted, chunks):
    positions += kind == "dualpipe" and positions > 1 and positions % 2
    chunks = chunks if kind in FREE else None
    microbatches = smallest_microbatches(kind, positions, wanted, chunks)
    schedule = generate(kind, positions, microbatches, chunks)
    check(schedule, lower(schedule))
    assert (schedule.kind, schedule.microbatches) == (kind, microbatches)
    assert schedule.stages == stages_of(kind, positions, chunks)
    assert parse_csv(to_csv(schedule), kind, schedule.stages) == schedule


def test_names():
    assert set(KINDS) == {"dualpipe", "dualpipev", "zb_h1", "zbv", "1f1b", "interleaved_1f1b", "merged_interleaved_1f1b", "gpipe"}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("positions", [1, 2, 4])
def test_smallest_number_of_microbatches_is_what_search_finds(kind, positions):
    def taken(microbatches: int) -> bool:
        try:
            return bool(generate(kind, positions, microbatches))
        except ConfigError:
            return False

    for wanted in range(-1, 20, 3):
        assert smallest_microbatches(kind, positions, wanted) == next(m for m in range(wanted, 40) if taken(m))


def test_chunks():
    assert generate("interleaved_1f1b", 2, 4) == generate("interleaved_1f1b", 2, 4, 2)
    assert generate("zbv", 2, 4) == generate("zbv", 2, 4, 2)
    assert generate("merged_interleaved_1f1b", 2, 4, 3).stages.count == 6


@pytest.mark.parametrize("arguments, message", [
    (("zigzag", 2, 4), f"kind = zigzag: one of {', '.join(KINDS)}"),
    (("dualpipe", 3, 8), "positions = 3: dualpipe takes 1 or an even number"),
    (("zbv", 0, 8), "positions = 0: zbv takes at least 1"),
    (("gpipe", 2, 0), "microbatches = 0: gpipe takes at least 1"),
    (("1f1b", 2, 4, 2), "chunks = 2: 1f1b takes 1"),
    (("dualpipev", 2, 4, 4), "chunks = 4: dualpipev takes 2"),
    (("merged_interleaved_1f1b", 2, 4, 0), "chunks = 0: merged_interleaved_1f1b takes at least 1"),
])
def test_refused_in_one_line(arguments, message):
    with pytest.raises(ConfigError) as refusal:
        generate(*arguments)
    assert str(refusal.value) == message


@pytest.mark.parametrize("arguments, key", [
    (("zigzag", 2, 4), "kind"), (("dualpipe", 3, 8), "positions"), (("1f1b", -1, 8), "positions"), (("zbv", 2, 4, 3), "chunks"),
])
def test_no_smallest_number_for_what_is_refused(arguments, key):
    with pytest.raises(ConfigError) as refusal:
        smallest_microbatches(*arguments)
    assert refusal.value.key == key
