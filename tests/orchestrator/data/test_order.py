from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.config.training import BatchRamp, TrainingSection
from orchestrator.data.order import (
    Permutation,
    SplitShape,
    batch_size,
    deal,
    first_position,
    label_counts,
    sequences_of,
    window_at,
    windows_of,
)

small = settings(max_examples=60, deadline=None)
shapes = st.builds(SplitShape, st.integers(1, 150), st.integers(1, 9))
seeds, windows = st.integers(0, 2**40), st.integers(1, 6)


@small
@given(st.integers(1, 400), st.integers(0, 2**64))
def test_permutation_is_a_bijection_and_inverse_undoes_it(n, key):
    permutation = Permutation(n, key, "test")
    values = [permutation(i) for i in range(n)]
    assert sorted(values) == list(range(n))
    assert [permutation.inverse(value) for value in values] == list(range(n))


@small
@given(shapes, seeds, windows)
def test_each_epoch_uses_each_sequence_once(shape, seed, window):
    n = shape.sequences
    order = sequences_of(shape, seed, window, 0, 3 * n)
    for epoch in range(3):
        assert sorted(order[epoch * n:(epoch + 1) * n]) == list(range(n))


@small
@given(shapes, seeds, windows, st.data())
def test_any_stretch_is_the_same_whatever_was_asked_before(shape, seed, window, data):
    whole = sequences_of(shape, seed, window, 0, 3 * shape.sequences)
    first = data.draw(st.integers(0, len(whole)))
    count = data.draw(st.integers(0, len(whole) - first))
    assert sequences_of(shape, seed, window, first, count) == whole[first:first + count]


@small
@given(shapes, seeds, windows)
def test_a_window_is_a_permutation_of_its_groups(shape, seed, window):
    """The rows of a window are those of its row groups: at most `window` of them, each group in one window of an epoch."""
    position, groups = 0, []
    while position < shape.sequences:
        found = window_at(shape, seed, window, position)
        rows = [g * shape.rows_per_group + i for g in found.groups for i in range(shape.group_rows(g))]
        assert found.first == position and 0 < len(found.groups) <= window
        assert sorted(found.sequences(0, found.rows)) == sorted(rows)
        groups.extend(found.groups)
        position += found.rows
    assert position == shape.sequences and sorted(groups) == list(range(shape.groups))


def test_a_step_touches_few_row_groups():
    shape, window, count = SplitShape(100_003, 64), 8, 256
    for position in range(0, 300_000, 7_001):
        pieces = list(windows_of(shape, 5, window, position, count))
        groups = {row // 64 for row in sequences_of(shape, 5, window, position, count)}
        assert groups <= {group for found, _, _ in pieces for group in found.groups}
        assert sum(len(found.groups) for found, _, _ in pieces) <= window * 3


def test_no_work_grows_with_the_position():
    assert len(sequences_of(SplitShape(10**12 + 7, 64), 1, 32, 10**17, 100)) == 100


def test_the_order_is_pinned():
    """A run resumed by another version must go on with the same sequences: changing the order is a breaking change."""
    assert sequences_of(SplitShape(20, 3), 1234, 2, 15, 10) == [4, 5, 12, 18, 19, 3, 5, 19, 4, 18]



def test_shuffling_mixes():
    n = 4096
    shape = SplitShape(n, 64)
    for seed, window in itertools.product((1, 2), (4, 64)):
        order = sequences_of(shape, seed, window, 0, n)
        mean = (n - 1) / 2
        correlation = sum((i - mean) * (row - mean) for i, row in enumerate(order)) / sum((i - mean) ** 2 for i in range(n))
        assert abs(correlation) < (0.06 if window == 64 else 0.5)
        neighbours = sum(b == a + 1 for a, b in zip(order, order[1:]))
        assert neighbours < n / 100
    assert sequences_of(shape, 1, 4, 0, n) != sequences_of(shape, 2, 4, 0, n)
    assert sequences_of(shape, 1, 4, 0, n) != sequences_of(shape, 1, 4, n, n)


@pytest.mark.parametrize("n", [3, 4, 5])
def test_small_permutations_are_near_uniform(n):
    """Where each value lands, over many keys: every place about equally often."""
    keys = 3000
    counts = [[0] * n for _ in range(n)]
    for key in range(keys):
        for i in range(n):
            counts[i][Permutation(n, key)(i)] += 1
    assert all(abs(count * n / keys - 1) < 0.15 for row in counts for count in row)


@small
@given(st.integers(1, 60), st.integers(0, 60), st.integers(1, 40), st.integers(0, 90))
def test_first_position_is_the_sum_of_earlier_batches(start, rise, steps, step):
    training = TrainingSection(batch_sequences=start + rise, batch_ramp=BatchRamp(start_sequences=start, steps=steps))
    assert first_position(training, step) == sum(batch_size(training, earlier) for earlier in range(step))
    exact = start + rise * min(1, step / steps)
    assert exact - 1 < batch_size(training, step) <= exact + 1e-9
    assert batch_size(training, steps) == start + rise and batch_size(training, 0) == (start if steps else start + rise)


def test_without_a_ramp():
    training = TrainingSection(batch_sequences=7)
    assert [batch_size(training, t) for t in (0, 5)] == [7, 7] and first_position(training, 9) == 63


def test_label_counts_of_full_and_short_rows():
    length = 8
    assert label_counts([length + 1] * 3) == (3 * length, 3 * (length - 1))
    assert label_counts([length + 1, 3, 2, 1, 0]) == (length + 2 + 1, length - 1 + 1)


@small
@given(st.integers(0, 200), st.integers(1, 6), st.sampled_from([1, 2]), st.integers(1, 5), st.integers(0, 7))
def test_deal(count, streams, entrances, size, surplus):
    asked = []

    def smallest(wanted):
        asked.append(wanted)
        return wanted + (wanted % 2 if entrances > 1 else 0) + 2 * surplus

    dealt = deal(count, streams=streams, entrances=entrances, microbatch_sequences=size, smallest_microbatches=smallest)
    assert len(dealt.held) == streams and all(len(stream) == entrances for stream in dealt.held)
    everything = [i for stream in range(streams) for i in dealt.of_stream(stream)]
    assert sorted(everything) == list(range(count))
    for stream in range(streams):
        assert len(dealt.of_stream(stream)) in (count // streams, -(-count // streams))
        for entrance in range(entrances):
            sizes = [len(dealt.indices(stream, entrance, m)) for m in range(dealt.microbatches // entrances)]
            assert len(sizes) == len(dealt.held[stream][entrance]) and max(sizes) <= size
            assert sizes == sorted(sizes, reverse=True) and sum(0 < held < size for held in sizes) <= 1
            assert {(entrance, m): held for m, held in enumerate(sizes)}.items() <= dealt.sizes(stream).items()
    of_entrance = [sum(len(m) for stream in dealt.held for m in stream[entrance]) for entrance in range(entrances)]
    assert max(of_entrance) - min(of_entrance) <= 1
    largest = max(sum(map(len, entrance)) for stream in dealt.held for entrance in stream)
    assert asked == [entrances * max(1, -(-largest // size))]


def test_a_microbatch_has_one_size_in_all_slots_that_it_passes():
    """One entrance: three slots of the same microbatches. Two: each slot has its own."""
    one = deal(5, streams=1, entrances=1, microbatch_sequences=2, smallest_microbatches=lambda wanted: wanted + 1)
    assert one.sizes(0, 3) == {(slot, m): size for slot in range(3) for m, size in enumerate((2, 2, 1, 0))}
    both = deal(5, streams=1, entrances=2, microbatch_sequences=2, smallest_microbatches=lambda wanted: wanted)
    assert both.sizes(0, 2) == {(0, 0): 2, (0, 1): 1, (1, 0): 2, (1, 1): 0}


@pytest.mark.parametrize("given_microbatches", [2, 5])
def test_deal_refuses_an_illegal_number_of_microbatches(given_microbatches):
    with pytest.raises(ValueError, match=f"{given_microbatches} microbatches"):
        deal(16, streams=1, entrances=2, microbatch_sequences=4, smallest_microbatches=lambda wanted: given_microbatches)
