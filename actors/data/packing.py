"""Token streams to fixed rows in Parquet shards, cut the same way however often the work is interrupted.

A split's stream is its documents' tokens, each document followed by an end-of-document id. Row i holds tokens i*S .. i*S+S of
the stream, so the last token of a row is the first of the next and every token but the stream's first is a label exactly
once. The last row is padded with end-of-document ids. A shard is a fixed number of rows, so its bytes depend on the stream alone,
and a finished shard also says where in the stream, as (document, token), the next one begins: packing can resume there.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy
import pyarrow
from pyarrow import parquet

from actors.data.dataset import COLUMN, Shard, matrix_to_list

ROWS_PER_GROUP = 64
_SHARD_BYTES = 64 << 20
_MOST_GROUPS = 64

Key = tuple[int, int]  # (unit of input, document within it): documents in the order in which they are packed


def groups_per_shard(sequence_length: int) -> int:
    """Row groups of a full shard: 64, fewer where rows are so long that a shard would pass 64 MB of int32 tokens."""
    return max(1, min(_MOST_GROUPS, _SHARD_BYTES // (4 * (sequence_length + 1) * ROWS_PER_GROUP)))


@dataclass(frozen=True)
class Point:
    """Where the next shard of a split begins: `offset` tokens into document `key`; counts are of the documents before it."""

    key: Key = (0, 0)
    offset: int = 0
    documents: int = 0
    bytes: int = 0
    tokens: int = 0


@dataclass(frozen=True)
class SplitProgress:
    point: Point = Point()
    shards: tuple[Shard, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(tree: dict[str, Any]) -> SplitProgress:
        point = dict(tree["point"])
        return SplitProgress(Point(**point | {"key": tuple(point["key"])}), tuple(Shard(**shard) for shard in tree["shards"]))


@dataclass
class Packer:
    """Packs one split. `write(name, content)` stores a shard; `shard_done()` is called when `progress` includes it.

    Only full shards are points to resume from; the short last one, written by `close`, is written again after a resume.
    """

    split: str
    sequence_length: int
    end_of_document: int
    write: Callable[[str, pyarrow.Buffer], None]
    progress: SplitProgress = SplitProgress()
    shard_done: Callable[[], None] = lambda: None
    last_row_tokens: int = 0
    _total: Point = field(init=False)
    _pending: deque[tuple[Point, numpy.ndarray]] = field(init=False, default_factory=deque)
    _held: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self._total = replace(self.progress.point, offset=0)

    @property
    def total(self) -> Point:
        """Counts of all documents so far."""
        return self._total

    def add(self, key: Key, tokens: numpy.ndarray, size: int) -> None:
        """Append a document of `size` bytes, finishing shards as they fill. Documents packed before are ignored."""
        point = self.progress.point
        if key < point.key:
            return
        stream = numpy.append(tokens, numpy.int32(self.end_of_document))
        total = self._total
        start = replace(total, key=key, offset=point.offset if key == point.key else 0)
        self._total = Point((key[0], key[1] + 1), 0, total.documents + 1, total.bytes + size, total.tokens + len(stream))
        self._pending.append((start, stream[start.offset:]))
        self._held += len(stream) - start.offset
        full = ROWS_PER_GROUP * groups_per_shard(self.sequence_length)
        while self._held > full * self.sequence_length:
            self._finish_shard(full)
            self.shard_done()

    def close(self) -> None:
        """Write the last, short shard, if any tokens are left that are not yet labels."""
        rows = -(-(self._held - 1) // self.sequence_length) if self._held > 1 else 0
        if rows:
            self.last_row_tokens = self._held - (rows - 1) * self.sequence_length
            padding = rows * self.sequence_length + 1 - self._held
            self._pending.append((self._total, numpy.full(padding, self.end_of_document, dtype=numpy.int32)))
            self._held += padding
            self._finish_shard(rows)
        elif self.progress.shards:
            self.last_row_tokens = self.sequence_length + 1

    def _finish_shard(self, rows: int) -> None:
        length = self.sequence_length
        stream = self._front(rows * length + 1)
        matrix = numpy.lib.stride_tricks.sliding_window_view(stream, length + 1)[::length]
        name = f"{self.split}/shard-{len(self.progress.shards):05d}.parquet"
        content = shard_bytes(matrix)
        self.write(name, content)
        shard = Shard(name, rows, hashlib.sha256(content).hexdigest(), content.size)
        self._drop(rows * length)
        self.progress = SplitProgress(self._pending[0][0], (*self.progress.shards, shard))

    def _front(self, count: int) -> numpy.ndarray:
        parts, left = [], count
        for _, tokens in self._pending:
            parts.append(tokens[:left])
            left -= len(parts[-1])
            if not left:
                break
        return numpy.concatenate(parts)

    def _drop(self, count: int) -> None:
        self._held -= count
        while count:
            start, tokens = self._pending.popleft()
            if len(tokens) > count:
                self._pending.appendleft((replace(start, offset=start.offset + count), tokens[count:]))
            count -= min(count, len(tokens))


def shard_bytes(rows: numpy.ndarray) -> pyarrow.Buffer:
    """The Parquet file of int32 [n, S+1] rows: row groups of ROWS_PER_GROUP, Zstandard, page checksums; no time, no host."""
    sink = pyarrow.BufferOutputStream()
    table = pyarrow.table({COLUMN: matrix_to_list(rows)})
    parquet.write_table(table, sink, row_group_size=ROWS_PER_GROUP, compression="zstd", use_dictionary=False,
                        write_statistics=False, write_page_checksum=True)
    return sink.getvalue()
