"""A tokenised corpus on disk: what its manifest says, and its rows, verified as they are read.

Layout of a data folder (written by jobs.tokenize): `manifest.json`, and for each split (`train`, `validation`)
`<split>/shard-00000.parquet`, ... with one column `tokens`, fixed_size_list<int32>[S+1]. Row ids and row groups number the
rows of a split over all its shards; every row group but the split's last has `rows_per_group` rows and every shard but
the last `groups_per_shard` groups. The last token of a row is the first of the next; the split's last row holds
`last_row_tokens` real tokens and is padded with end-of-document ids.

Verification: a shard's size is compared with the manifest at every read and its sha256 at the first read in a process,
so a damaged corpus fails before it is trained on. Hashing runs at about 1 GB/s, some milliseconds for shards of the size
that jobs.tokenize makes (at most a few ten MB); later damage is caught by the page checksums inside the Parquet file.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy
import pyarrow
from pyarrow import parquet

from actors.files import storage
from orchestrator.config.run_config import ConfigError
from orchestrator.data.order import SplitShape

MANIFEST = "manifest.json"
FORMAT = 1
COLUMN = "tokens"


class DatasetError(RuntimeError):
    """A corpus that is missing, incomplete or damaged. `str()` is one line that names the manifest or shard. Its cause is a StorageError
    where it was not read at all."""


@dataclass(frozen=True)
class Shard:
    """`name` is relative to the data folder; `bytes` and `sha256` are those of the file."""

    name: str
    rows: int
    sha256: str
    bytes: int


@dataclass(frozen=True)
class Split:
    """`tokens` counts each token of the packed text once, end-of-document ids included; `bytes` is the text's size."""

    name: str
    sequences: int
    tokens: int
    documents: int
    bytes: int
    last_row_tokens: int
    rows_per_group: int
    groups_per_shard: int
    shards: tuple[Shard, ...]

    @property
    def shape(self) -> SplitShape:
        """Sizes for orchestrator.data.order. Raises DatasetError when the split is empty."""
        if not self.sequences:
            raise DatasetError(f"{self.name}: the corpus has no sequences in this split")
        return SplitShape(self.sequences, self.rows_per_group)


@dataclass(frozen=True)
class Dataset:
    path: str
    tokenizer: str
    fingerprint: str
    vocab_size: int
    end_of_document: int
    sequence_length: int
    train: Split
    validation: Split

    @staticmethod
    def open(path: str) -> Dataset:
        """Read the manifest of the data folder `path`. Raises DatasetError: missing, corrupt or of an unknown version."""
        file = storage.join(path, MANIFEST)
        try:
            if not storage.exists(file):
                raise DatasetError(f"{file}: does not exist; make the data with: python -m jobs.tokenize --output "
                                   f"{path}") from storage.StorageError(file, "does not exist")
            manifest = json.loads(storage.read_bytes(file))
            if not isinstance(manifest, dict) or "format" not in manifest:
                raise DatasetError(f"{file}: corrupt (no format version)")
            if manifest["format"] != FORMAT:
                raise DatasetError(f"{file}: format version {manifest['format']}; this program reads version {FORMAT}")
            return _from_manifest(path, manifest)
        except storage.StorageError as error:
            raise DatasetError(str(error)) from error
        except (ValueError, KeyError, TypeError) as error:
            raise DatasetError(f"{file}: corrupt ({type(error).__name__}: {error})") from error

    def check(self, tokenizer: str, fingerprint: str, vocab_size: int, sequence_length: int) -> None:
        """Whether a run can use this corpus. Raises ConfigError naming key, value and what is allowed.

        Args:
            tokenizer, fingerprint: what the run names, and its content. vocab_size: the model's, which may be larger than
                the tokenizer's. sequence_length: the run's S.
        """
        if fingerprint != self.fingerprint:
            raise ConfigError("data.tokenizer", tokenizer, f"the one that {self.path} was made with: {self.tokenizer}, sha256 "
                              f"{self.fingerprint[:12]}; this is {fingerprint[:12]}")
        if vocab_size < self.vocab_size:
            raise ConfigError("model.vocab_size", vocab_size, f"at least {self.vocab_size}, the vocabulary of {self.path}")
        if sequence_length != self.sequence_length:
            raise ConfigError("data.sequence_length", sequence_length,
                              f"{self.sequence_length}, the length that {self.path} was made with")

    def split(self, name: str) -> Split:
        return {"train": self.train, "validation": self.validation}[name]

    def valid_tokens(self, split: Split, rows: Sequence[int]) -> numpy.ndarray:
        """int32 [n]: real tokens of each row; S+1 but for the split's last row."""
        valid = numpy.full(len(rows), self.sequence_length + 1, dtype=numpy.int32)
        valid[numpy.asarray(rows, dtype=numpy.int64) == split.sequences - 1] = split.last_row_tokens
        return valid

    def read_groups(self, split: Split, groups: Sequence[int]) -> numpy.ndarray:
        """int32 [n, S+1]: the rows of the given row groups, in the order given. Raises DatasetError naming the shard."""
        by_shard: dict[int, list[int]] = {}
        for group in dict.fromkeys(groups):
            by_shard.setdefault(group // split.groups_per_shard, []).append(group)
        found: dict[int, numpy.ndarray] = {}
        for shard, members in by_shard.items():
            found.update(self._read_shard(split, shard, members))
        if not found:
            return numpy.empty((0, self.sequence_length + 1), dtype=numpy.int32)
        return numpy.concatenate([found[group] for group in groups])

    def read_rows(self, split: Split, rows: Sequence[int]) -> numpy.ndarray:
        """int32 [n, S+1]: the given row ids, in the order given; reads each row group that they touch once."""
        ids = numpy.asarray(rows, dtype=numpy.int64)
        groups = numpy.unique(ids // split.rows_per_group)
        tokens = self.read_groups(split, groups.tolist())
        slot = numpy.searchsorted(groups, ids // split.rows_per_group)
        return tokens[slot * split.rows_per_group + ids % split.rows_per_group]

    def _read_shard(self, split: Split, number: int, groups: list[int]) -> dict[int, numpy.ndarray]:
        if not 0 <= number < len(split.shards):
            raise DatasetError(f"{self.path}/{split.name}: no row group {groups[0]}; there are {split.shape.groups}")
        shard, width = split.shards[number], self.sequence_length + 1
        uri = storage.join(self.path, shard.name)
        try:
            _verify_size(uri, shard)
            _verify_content(uri, shard)
            with storage.open_input(uri, random_access=True) as source:
                file = parquet.ParquetFile(source, page_checksum_verification=True)
                if file.metadata.num_rows != shard.rows:
                    raise DatasetError(f"{uri}: holds {file.metadata.num_rows} rows, the manifest says {shard.rows}")
                return {group: _matrix(file.read_row_group(group % split.groups_per_shard, [COLUMN]), width) for group in groups}
        except storage.StorageError as error:
            raise DatasetError(str(error)) from error
        except (pyarrow.ArrowException, OSError, IndexError, KeyError, ValueError) as error:
            raise DatasetError(f"{uri}: corrupt ({' '.join(str(error).split())[:200]})") from error


def _verify_size(uri: str, shard: Shard) -> None:
    found = storage.size(uri)
    if found != shard.bytes:
        kind = "truncated" if found < shard.bytes else "corrupt"
        raise DatasetError(f"{uri}: {kind} ({found} bytes, the manifest says {shard.bytes})")


@functools.lru_cache(maxsize=None)
def _verify_content(uri: str, shard: Shard) -> None:
    """Compares the sha256; a success is remembered for the life of the process, a failure is not."""
    digest = hashlib.sha256()
    with storage.open_input(uri) as source:
        while chunk := source.read(1 << 20):
            digest.update(chunk)
    if digest.hexdigest() != shard.sha256:
        raise DatasetError(f"{uri}: corrupt (sha256 is {digest.hexdigest()[:12]}, the manifest says {shard.sha256[:12]})")


def _matrix(table: pyarrow.Table, width: int) -> numpy.ndarray:
    return list_to_matrix(table.column(COLUMN), width)


def list_to_matrix(column: pyarrow.ChunkedArray, width: int) -> numpy.ndarray:
    """int32 [n, width] of a fixed_size_list<int32>[width] column. Raises ValueError on any other type."""
    expected = pyarrow.list_(pyarrow.int32(), width)
    if not column.type.equals(expected):
        raise ValueError(f"column {COLUMN} has type {column.type}, not {expected}")
    parts = [chunk.flatten().to_numpy(zero_copy_only=False).reshape(-1, width) for chunk in column.chunks]
    return numpy.concatenate(parts) if parts else numpy.empty((0, width), dtype=numpy.int32)


def matrix_to_list(rows: numpy.ndarray) -> pyarrow.FixedSizeListArray:
    """The fixed_size_list<int32> column of an int32 [n, width] matrix."""
    flat = pyarrow.array(numpy.ascontiguousarray(rows, dtype=numpy.int32).reshape(-1))
    return pyarrow.FixedSizeListArray.from_arrays(flat, type=pyarrow.list_(pyarrow.int32(), rows.shape[1]))


def _from_manifest(path: str, manifest: dict[str, Any]) -> Dataset:
    tokenizer = manifest["tokenizer"]
    splits = {name: _split(name, manifest["splits"][name]) for name in ("train", "validation")}
    return Dataset(path, str(tokenizer["kind"]), str(tokenizer["fingerprint"]), int(tokenizer["vocab_size"]),
                   int(tokenizer["end_of_document"]), int(manifest["sequence_length"]), **splits)


def _split(name: str, entry: dict[str, Any]) -> Split:
    shards = tuple(Shard(str(s["name"]), int(s["rows"]), str(s["sha256"]), int(s["bytes"])) for s in entry["shards"])
    numbers = {key: int(entry[key]) for key in
               ("sequences", "tokens", "documents", "bytes", "last_row_tokens", "rows_per_group", "groups_per_shard")}
    if sum(shard.rows for shard in shards) != numbers["sequences"]:
        raise ValueError(f"{name}: its shards do not add up to {numbers['sequences']} sequences")
    if numbers["rows_per_group"] < 1 or numbers["groups_per_shard"] < 1:
        raise ValueError(f"{name}: its row groups or shards have no rows")
    return Split(name, **numbers, shards=shards)
