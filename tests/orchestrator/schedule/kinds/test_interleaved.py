"""The interleaved kinds against torch's, against Megatron-Core's table read literally, and against closed formulas."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.refusal import ConfigError
from orchestrator.schedule.ir.actions import ActionKind, Pair, to_csv
from orchestrator.schedule.ir.check import check
from orchestrator.schedule.ir.lower import lower
from orchestrator.schedule.kinds.interleaved import groups
from orchestrator.schedule.kinds.registry import generate
from orchestrator.schedule.timing.durations import Durations
from orchestrator.schedule.timing.simulate import simulate
from tests.reference.torch_schedules import torch_rows

POSITIONS, CHUNKS, MICROBATCHES = st.integers(1, 6), st.integers(1, 4), st.integers(1, 20)


def megatron_rows(positions: int, rounds: int, chunks: int, *, merged: bool) -> list[str]:
    """One virtual microbatch k after another: which chunk and microbatch it is, and after how many the alternation begins."""
    total = rounds * positions * chunks

    def word(kind: str, k: int) -> str:
        chunk = k // positions % chunks
        chunk = chunk if kind == "F" else chunks - 1 - chunk
        return f"{kind}{chunk}.{k // (positions * chunks) * positions + k % positions}"

    rows = []
    for rank in range(positions):
        warm_up = min(total, (positions - rank - 1) * 2 + (chunks - 1) * positions + (1 if merged else 0))
        words = [word("F", k) for k in range(warm_up)]
        for k in range(total - warm_up):
            words.append(word("F", k + warm_up) + ("|" if merged else ",") + word("B", k))
        words += [word("B", k) for k in range(total - warm_up, total)]
        rows.append(",".join(words))
    return rows


@settings(max_examples=40, deadline=None)
@given(positions=POSITIONS, rounds=st.integers(1, 4), chunks=CHUNKS, merged=st.booleans())
def test_rows_are_megatrons(positions, rounds, chunks, merged):
    schedule = generate("merged_interleaved_1f1b" if merged else "interleaved_1f1b", positions, rounds * positions, chunks)
    assert to_csv(schedule).splitlines() == megatron_rows(positions, rounds, chunks, merged=merged)


@settings(max_examples=60, deadline=None)
@given(positions=POSITIONS, microbatches=MICROBATCHES, chunks=CHUNKS)
def test_rows_are_torchs_where_groups_are_equal(positions, microbatches, chunks):
    """torch refuses numbers of microbatches that do not fall into equal groups."""
    schedule = generate("interleaved_1f1b", positions, microbatches, chunks)
    if len({len(group) for group in groups(microbatches, positions)}) > 1:
        with pytest.raises(ValueError, match="multiple of the number of rounds"):
            torch_rows("ScheduleInterleaved1F1B", schedule.stages, microbatches)
    else:
        assert to_csv(schedule).splitlines() == torch_rows("ScheduleInterleaved1F1B", schedule.stages, microbatches)


@settings(max_examples=60, deadline=None)
@given(positions=POSITIONS, microbatches=MICROBATCHES, chunks=CHUNKS, merged=st.booleans(),
       forward=st.integers(1, 9), inputs=st.integers(1, 9), weights=st.integers(0, 9))
def test_makespan(positions, microbatches, chunks, merged, forward, inputs, weights):
    """Bubble (P - 1)(F + B) of one chunk for any M >= P, divisible by P or not; also merged, if a pair hides nothing."""
    schedule = generate("merged_interleaved_1f1b" if merged else "interleaved_1f1b", positions, microbatches, chunks)
    check(schedule, lower(schedule))
    each = forward + inputs + weights
    wanted = chunks * max(positions, microbatches) + min(positions, microbatches) - 1
    assert simulate(schedule, Durations(forward, inputs, weights)).makespan == wanted * each


@settings(max_examples=40, deadline=None)
@given(positions=POSITIONS, rounds=st.integers(1, 4), chunks=CHUNKS, merged=st.booleans())
def test_peak(positions, rounds, chunks, merged):
    """The forwards before the alternation, and the one that comes first in it (merged: the one paired with a backward)."""
    schedule = generate("merged_interleaved_1f1b" if merged else "interleaved_1f1b", positions, rounds * positions, chunks)
    most = chunks * rounds * positions
    expected = [(chunks - 1) * positions + 2 * (positions - 1 - r) + 1 + merged for r in range(positions)]
    assert check(schedule, lower(schedule)) == tuple(min(most, peak) for peak in expected)


@settings(max_examples=40, deadline=None)
@given(positions=POSITIONS, microbatches=MICROBATCHES, chunks=CHUNKS)
def test_every_merged_pair_is_of_different_microbatches(positions, microbatches, chunks):
    schedule = generate("merged_interleaved_1f1b", positions, microbatches, chunks)
    pairs = [action for row in schedule.rows for action in row if isinstance(action, Pair)]
    assert all(pair.first.kind is ActionKind.FORWARD and pair.second.kind is ActionKind.BACKWARD for pair in pairs)
    assert all(pair.first.microbatch != pair.second.microbatch for pair in pairs)
    ahead = (chunks - 1) * len(groups(microbatches, positions)[0]) + 1
    assert sum(isinstance(action, Pair) for action in schedule.rows[-1]) == max(0, chunks * microbatches - ahead)


def test_groups():
    assert [list(map(len, groups(m, 4))) for m in (1, 3, 4, 7, 8, 11, 12, 14)] == [
        [1], [3], [4], [7], [4, 4], [6, 5], [4, 4, 4], [5, 5, 4]]
    for microbatches in range(1, 30):
        for positions in range(1, 9):
            assert [m for group in groups(microbatches, positions) for m in group] == list(range(microbatches))


@pytest.mark.parametrize("sizes, message", [
    ((2, 4, 0), "chunks = 0: at least 1 with placement loop"),
    ((0, 4, 2), "positions = 0: interleaved_1f1b takes at least 1"),
    ((2, 0, 2), "microbatches = 0: interleaved_1f1b takes at least 1"),
])
def test_refused(sizes, message):
    with pytest.raises(ConfigError) as refusal:
        generate("interleaved_1f1b", *sizes)
    assert str(refusal.value) == message
