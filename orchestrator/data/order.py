"""Which sequences make up step t, and where in the pipelines they go: pure functions of (seed, t) with random access.

Words of this module: a *row id* numbers the sequences of a split, 0..sequences-1, in the order they are stored; a *row
group* is `rows_per_group` of them that are read from storage together (the last one may be short); a *position* counts the
sequences that training has used, over all epochs without a gap, so a step may straddle two epochs. Steps count from 0.

The order of one epoch: the row groups are permuted by a keyed bijection; `data.shuffle_window` consecutive permuted groups
form a window; the rows of a window are permuted among each other by another keyed bijection. Each epoch uses each row
exactly once. Any position is computed from (seed, position) in constant time, so nothing that lies before it is read or
replayed, and reading one step touches only the groups of the windows that it overlaps.

The bijection is a Feistel network over Z_a x Z_b with a*b slightly above n, walked until the value falls below n (cycle
walking), which keeps it a bijection of 0..n-1. It mixes data; it is no cipher.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from orchestrator.config.run_config import TrainingSection

_ROUNDS = 8
_MASK = (1 << 64) - 1


# ---- how many sequences a step has

def batch_size(training: TrainingSection, step: int) -> int:
    """Sequences of step `step`: from `batch_ramp.start_sequences` at step 0, linear, to `batch_sequences` at step `steps`."""
    ramp = training.batch_ramp
    if ramp is None or step >= ramp.steps:
        return training.batch_sequences
    return ramp.start_sequences + (training.batch_sequences - ramp.start_sequences) * step // ramp.steps


def first_position(training: TrainingSection, step: int) -> int:
    """Position of the first sequence of `step`: the sum of all earlier batch sizes, in O(log ramp.steps)."""
    ramp = training.batch_ramp
    if ramp is None:
        return step * training.batch_sequences
    ramped = min(step, ramp.steps)
    rise = _floor_sum(ramped, ramp.steps, training.batch_sequences - ramp.start_sequences)
    return ramped * ramp.start_sequences + rise + (step - ramped) * training.batch_sequences


def _floor_sum(n: int, m: int, a: int) -> int:
    """Sum of a*i // m for i in 0..n-1, by the Euclidean reduction that counts lattice points under a line."""
    total, b = 0, 0
    while n > 0:
        total += (n - 1) * n // 2 * (a // m) + n * (b // m)
        a, b = a % m, b % m
        top = a * n + b
        if top < m:
            break
        n, b, m, a = top // m, top % m, a, m
    return total


# ---- the seeded order

@dataclass(frozen=True)
class SplitShape:
    """Sizes of a split as stored: `sequences` rows in groups of `rows_per_group`, the last group possibly short."""

    sequences: int
    rows_per_group: int

    def __post_init__(self) -> None:
        if self.sequences < 1 or self.rows_per_group < 1:
            raise ValueError(f"a split of {self.sequences} sequences in groups of {self.rows_per_group} has no order")

    @property
    def groups(self) -> int:
        return -(-self.sequences // self.rows_per_group)

    @property
    def missing(self) -> int:
        """Rows by which the last group is short."""
        return self.groups * self.rows_per_group - self.sequences

    def group_rows(self, group: int) -> int:
        return self.rows_per_group - (self.missing if group == self.groups - 1 else 0)


class Permutation:
    """A keyed bijection of 0..n-1 with its inverse, both in constant expected time. The same key and n give the same one."""

    def __init__(self, n: int, *key: int | str):
        self.n = n
        self._a = math.isqrt(max(0, n - 1)) + 1
        self._b = max(1, -(-n // self._a))
        digest = hashlib.blake2b(repr((n, key)).encode(), digest_size=8).digest()
        state = int.from_bytes(digest, "little")
        self._keys = [state := _mix(state + round_) for round_ in range(_ROUNDS)]

    def __call__(self, index: int) -> int:
        a, b = self._a, self._b
        while True:
            left, right = divmod(index, b)
            for round_, key in enumerate(self._keys):
                if round_ % 2:
                    right = (right + _mix(left ^ key)) % b
                else:
                    left = (left + _mix(right ^ key)) % a
            index = left * b + right
            if index < self.n:
                return index

    def inverse(self, index: int) -> int:
        a, b = self._a, self._b
        while True:
            left, right = divmod(index, b)
            for round_ in reversed(range(_ROUNDS)):
                if round_ % 2:
                    right = (right - _mix(left ^ self._keys[round_])) % b
                else:
                    left = (left - _mix(right ^ self._keys[round_])) % a
            index = left * b + right
            if index < self.n:
                return index


def _mix(value: int) -> int:
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014): 64 bits in, 64 well-mixed bits out."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


@dataclass(frozen=True)
class Window:
    """Consecutive row groups of the permuted order whose rows are mixed with each other.

    `first`: position of its first sequence; `rows`: how many it has; `groups`: the row groups to read, in permuted order.
    """

    shape: SplitShape
    seed: int
    epoch: int
    number: int
    first: int
    rows: int
    groups: tuple[int, ...]

    def sequences(self, begin: int, end: int) -> list[int]:
        """Row ids at positions first + begin .. first + end - 1 of the order."""
        shuffle = Permutation(self.rows, self.seed, "rows", self.epoch, self.number)
        return [self._row(shuffle(offset)) for offset in range(begin, end)]

    def _row(self, index: int) -> int:
        """Row id of the window's `index`-th row, counted group by group; the short group may lie anywhere."""
        size, missing, last = self.shape.rows_per_group, self.shape.missing, self.shape.groups - 1
        if missing and last in self.groups:
            short = self.groups.index(last)
            if index >= (short + 1) * size - missing:
                index += missing
        slot, row = divmod(index, size)
        return self.groups[slot] * size + row


def window_at(shape: SplitShape, seed: int, window: int, position: int) -> Window:
    """The window that holds `position` (any epoch). `window`: row groups of a window (`data.shuffle_window`)."""
    epoch, offset = divmod(position, shape.sequences)
    order = Permutation(shape.groups, seed, "groups", epoch)
    short_window = order.inverse(shape.groups - 1) // window
    full = window * shape.rows_per_group

    def start(number: int) -> int:
        return number * full - (shape.missing if number > short_window else 0)

    number = offset // full
    if offset >= start(short_window + 1):
        number = (offset + shape.missing) // full
    members = range(number * window, min((number + 1) * window, shape.groups))
    rows = min(start(number + 1), shape.sequences) - start(number)
    first = epoch * shape.sequences + start(number)
    return Window(shape, seed, epoch, number, first, rows, tuple(order(member) for member in members))


def windows_of(shape: SplitShape, seed: int, window: int, position: int, count: int) -> Iterator[tuple[Window, int, int]]:
    """The windows that positions position .. position+count-1 overlap: (window, begin, end) with offsets into the window."""
    end = position + count
    while position < end:
        found = window_at(shape, seed, window, position)
        stop = min(end, found.first + found.rows)
        yield found, position - found.first, stop - found.first
        position = stop


def sequences_of(shape: SplitShape, seed: int, window: int, position: int, count: int) -> list[int]:
    """Row ids at positions position .. position+count-1 of the seeded order."""
    pieces = windows_of(shape, seed, window, position, count)
    return [row for found, begin, end in pieces for row in found.sequences(begin, end)]


def label_counts(valid: Iterable[int]) -> tuple[int, int]:
    """(next-token labels, MTP labels of depth 1) of rows that hold `valid` real tokens each.

    A row of v real tokens predicts v-1 of them from one token before and v-2 from two tokens before; a full row of S+1
    tokens has S and S-1. Only the last row of a split is not full.
    """
    rows = list(valid)
    return sum(max(0, v - 1) for v in rows), sum(max(0, v - 2) for v in rows)


# ---- where a step's sequences go

@dataclass(frozen=True)
class Deal:
    """`held[stream][entrance][microbatch]`: indices into the step's batch. `microbatches`: M, all entrances together.

    A pipeline has two entrances if microbatches enter at both of its ends, else one. Microbatches number 0..M/entrances-1
    within an entrance.
    """

    microbatches: int
    held: tuple[tuple[tuple[tuple[int, ...], ...], ...], ...]

    def indices(self, stream: int, entrance: int, microbatch: int) -> tuple[int, ...]:
        return self.held[stream][entrance][microbatch]

    def sizes(self, stream: int, slots: int | None = None) -> dict[tuple[int, int], int]:
        """Sequences of each (slot, microbatch) of a stream, slot by slot.

        With two entrances a slot is an entrance. With one, a microbatch has the same number in each of `slots` slots that it
        passes (None: one).
        """
        entrances = self.held[stream]
        passed = entrances if len(entrances) > 1 else entrances * (slots or 1)
        return {(slot, number): len(microbatch) for slot, microbatches in enumerate(passed)
                for number, microbatch in enumerate(microbatches)}

    def of_stream(self, stream: int) -> list[int]:
        """All indices of a stream: entrance by entrance, microbatch by microbatch."""
        return [index for entrance in self.held[stream] for microbatch in entrance for index in microbatch]


def deal(count: int, *, streams: int, entrances: int, microbatch_sequences: int,
         smallest_microbatches: Callable[[int], int]) -> Deal:
    """Deal a step of `count` sequences to (stream, entrance, microbatch), as evenly as whole sequences allow.

    Streams differ by at most one sequence, and so do entrances in total. Within an entrance microbatches are filled in
    order, so at most one is partly filled and empty ones come last.
    Args:
        streams: (row, width) pairs of the layout, all pipelines together.
        entrances: where microbatches enter a pipeline: at one end, or at both.
        smallest_microbatches: the schedule's rule: smallest legal M that is at least its argument.
    Raises ValueError: the rule gave fewer microbatches than wanted, or an odd number to two entrances.
    """
    largest = -(-count // (streams * entrances))
    wanted = entrances * max(1, -(-largest // microbatch_sequences))
    microbatches = smallest_microbatches(wanted)
    if microbatches < wanted or microbatches % entrances:
        raise ValueError(f"{microbatches} microbatches where {wanted} or more, a multiple of {entrances}, are wanted")
    sizes = _near_equal(count, streams, entrances)
    held, at = [], 0
    for stream in range(streams):
        of_stream = []
        for entrance in range(entrances):
            end = at + sizes[stream][entrance]
            bounds = [min(end, at + m * microbatch_sequences) for m in range(microbatches // entrances + 1)]
            of_stream.append(tuple(tuple(range(low, high)) for low, high in zip(bounds, bounds[1:])))
            at = end
        held.append(tuple(of_stream))
    return Deal(microbatches, tuple(held))


def _near_equal(count: int, streams: int, entrances: int) -> list[list[int]]:
    """Sizes [stream][entrance] with sum `count`; left-over sequences go to streams in turn, to alternating entrances."""
    each, left = divmod(count, streams * entrances)
    sizes = [[each] * entrances for _ in range(streams)]
    for extra in range(left):
        turn, stream = divmod(extra, streams)
        sizes[stream][(stream + turn) % entrances] += 1
    return sizes
