"""The documents of a corpus: found in files, folders, URIs or Python's standard library, and read one by one.

Kinds by the end of a file's name: `.jsonl` and `.parquet` hold many documents under a text key; any other file is one
document, its bytes as they are. `.gz` at the very end means compressed. Hidden files and folders are left out of folders.
Documents are bytes here; what becomes of bytes that are not UTF-8 is the tokenizer's business.

The built-in corpus `stdlib` is the Python source of the running interpreter's standard library (PSF licence) without its
tests, its installed packages and the files that a build writes.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import numpy
import pyarrow
from pyarrow import parquet

from actors.data.tokenizer import Tokenizer
from actors.files import storage
from orchestrator.config.run_config import ConfigError

STDLIB = "stdlib"
_NOT_CORPUS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "idlelib", "__pycache__"}
_UNIT_BYTES = 1 << 20
_MOST_UNITS = 1000
_LARGEST_UNIT = 32 << 20
_BLOCK_TOKENS = 1 << 20


class DocumentError(ValueError):
    """A source file that cannot be read as documents. `str()` is one line that names the file and place."""


@dataclass(frozen=True)
class Source:
    """A file with documents. `name` is its stable name: relative to the input that it was found in; `modified`: nanoseconds."""

    name: str
    uri: str
    bytes: int
    modified: int


def find(inputs: list[str]) -> list[Source]:
    """The source files of `inputs` in a fixed order: inputs as given, folders walked and sorted by name.

    Raises ConfigError: an input does not exist, cannot be listed, or holds no files.
    """
    sources = []
    for name in inputs:
        try:
            found = _standard_library() if name == STDLIB else _find_one(name)
        except storage.StorageError as error:
            raise ConfigError("--input", name, f"an existing file, folder or URI, or {STDLIB} ({error.reason})") from None
        if not found:
            raise ConfigError("--input", name, "a folder with files in it")
        sources.extend(found)
    return sources


def units(sources: list[Source]) -> list[list[Source]]:
    """Consecutive sources in bundles of about 1 MB (more for a large corpus), each the work of one task."""
    limit = min(_LARGEST_UNIT, max(_UNIT_BYTES, sum(source.bytes for source in sources) // _MOST_UNITS))
    bundles: list[list[Source]] = []
    size = 0
    for source in sources:
        if not bundles or size + source.bytes > limit:
            bundles.append([])
            size = 0
        bundles[-1].append(source)
        size += source.bytes
    return bundles


def read(source: Source, text_key: str) -> Iterator[tuple[str, bytes]]:
    """(identity, content) of each document of a file, in order. Raises DocumentError, StorageError."""
    kind = source.name.lower().removesuffix(".gz").rpartition(".")[2]
    if kind == "parquet":
        yield from _read_parquet(source, text_key)
    elif kind == "jsonl":
        yield from _read_lines(source, text_key)
    else:
        with _open(source) as stream:
            yield source.name, stream.read()


def is_held_out(identity: str, content: bytes, fraction: float) -> bool:
    """Whether a document belongs to the validation split: a stable hash of its name and content falls under `fraction`."""
    digest = hashlib.blake2b(identity.encode("utf-8", "surrogateescape") + b"\0", digest_size=8)
    digest.update(content)
    return int.from_bytes(digest.digest(), "little") < fraction * 2**64


@dataclass(frozen=True)
class UnitTokenizer:
    """The map of jobs.tokenize: units of sources in, tables of tokenised documents out.

    A document that only an already finished part of the output needs is left out unread or untokenised. Columns: `unit`,
    `document` (its number within the unit), `held_out`, `bytes`, `tokens` list<int32>, `error` (null, or why reading stopped).
    """

    tokenizer: Tokenizer
    text_key: str
    validation_fraction: float

    def __call__(self, table: pyarrow.Table) -> Iterator[pyarrow.Table]:
        for unit in table.to_pylist():
            sources = [Source(**source) for source in json.loads(unit["sources"])]
            wanted = {False: unit["train"], True: unit["validation"]}
            block = _Block(unit["unit"])
            try:
                for number, (identity, content) in enumerate(pair for source in sources for pair in read(source, self.text_key)):
                    held_out = is_held_out(identity, content, self.validation_fraction)
                    if wanted[held_out]:
                        block.add(number, held_out, len(content), self.tokenizer.encode(content))
                    if block.tokens >= _BLOCK_TOKENS:
                        yield block.table()
                        block = _Block(unit["unit"])
            except (DocumentError, OSError, pyarrow.ArrowException) as error:
                yield block.table(error=" ".join(str(error).split()))
                return
            yield block.table()


def unit_row(number: int, sources: list[Source], train: bool, validation: bool) -> dict[str, object]:
    """A unit as UnitTokenizer takes it; `train`, `validation`: whether documents of that split are wanted."""
    listed = json.dumps([asdict(source) for source in sources])
    return {"unit": number, "sources": listed, "train": train, "validation": validation}


class _Block:
    def __init__(self, unit: int):
        self._unit, self.tokens = unit, 0
        self._rows: list[tuple[int, bool, int]] = []
        self._tokens: list[numpy.ndarray] = []

    def add(self, number: int, held_out: bool, size: int, tokens: numpy.ndarray) -> None:
        """An empty document has nothing to learn from and is dropped."""
        if len(tokens):
            self._rows.append((number, held_out, size))
            self._tokens.append(tokens)
            self.tokens += len(tokens)

    def table(self, error: str | None = None) -> pyarrow.Table:
        rows = [*self._rows, (0, False, 0)] if error else self._rows
        tokens = [*self._tokens, numpy.empty(0, numpy.int32)] if error else self._tokens
        offsets = numpy.concatenate([[0], numpy.cumsum([len(t) for t in tokens])]).astype(numpy.int32)
        flat = numpy.concatenate(tokens) if tokens else numpy.empty(0, numpy.int32)
        numbers, held_out, sizes = (list(column) for column in zip(*rows)) if rows else ([], [], [])
        return pyarrow.table({
            "unit": pyarrow.array([self._unit] * len(rows), pyarrow.int64()), "document": pyarrow.array(numbers, pyarrow.int64()),
            "held_out": pyarrow.array(held_out, pyarrow.bool_()), "bytes": pyarrow.array(sizes, pyarrow.int64()),
            "tokens": pyarrow.ListArray.from_arrays(pyarrow.array(offsets), pyarrow.array(flat, pyarrow.int32())),
            "error": pyarrow.array([None] * len(self._rows) + [error] * bool(error), pyarrow.string())})


def _find_one(name: str) -> list[Source]:
    if not storage.is_folder(name):
        entry = storage.stat(name)
        return [Source(entry.name, name, entry.bytes, entry.modified)]
    return [Source(entry.name, entry.uri, entry.bytes, entry.modified) for entry in storage.list_folder(name, recursive=True)
            if not entry.is_folder and not any(part.startswith(".") for part in entry.name.split("/"))]


def _standard_library() -> list[Source]:
    """Without modification times: the same Python installed again is the same corpus."""
    top = sysconfig.get_path("stdlib")
    found = []
    for folder, below, files in os.walk(top):
        below[:] = sorted(name for name in below if name not in _NOT_CORPUS and not name.startswith("config-"))
        for file in files:
            if file.endswith(".py") and not file.startswith("_sysconfigdata"):
                path = os.path.join(folder, file)
                found.append(Source(os.path.relpath(path, top).replace(os.sep, "/"), path, os.path.getsize(path), 0))
    return sorted(found, key=lambda source: source.name)


def _open(source: Source) -> io.BufferedIOBase:
    """The file as a stream of bytes, decompressed where its name ends in .gz."""
    system, path = storage.resolve(source.uri)
    try:
        raw = io.BufferedReader(system.open_input_stream(path, compression=None), 1 << 20)
    except (OSError, pyarrow.ArrowException) as error:
        raise storage.StorageError(source.uri, " ".join(str(error).split())[:200]) from error
    return _Gzip(raw, source) if source.name.lower().endswith(".gz") else raw


class _Gzip(gzip.GzipFile):
    """Reports damage as DocumentError."""

    def __init__(self, raw: io.BufferedReader, source: Source):
        super().__init__(fileobj=raw, mode="rb")
        self._uri = source.uri

    def read(self, size: int | None = -1) -> bytes:
        try:
            return super().read(size)
        except (OSError, EOFError) as error:
            raise DocumentError(f"{self._uri}: damaged gzip file ({error})") from error

    def readline(self, size: int = -1) -> bytes:
        try:
            return super().readline(size)
        except (OSError, EOFError) as error:
            raise DocumentError(f"{self._uri}: damaged gzip file ({error})") from error


def _read_lines(source: Source, text_key: str) -> Iterator[tuple[str, bytes]]:
    with _open(source) as stream:
        for number, line in enumerate(iter(stream.readline, b"")):
            if not line.strip():
                continue
            try:
                text = json.loads(line)[text_key]
            except (ValueError, KeyError, TypeError):
                raise DocumentError(f"{source.uri} line {number + 1}: not a JSON object with a {text_key!r} key") from None
            if not isinstance(text, str):
                raise DocumentError(f"{source.uri} line {number + 1}: {text_key!r} is not a string")
            yield f"{source.name}#{number}", text.encode("utf-8", "surrogatepass")


def _read_parquet(source: Source, text_key: str) -> Iterator[tuple[str, bytes]]:
    number = 0
    with storage.open_input(source.uri, random_access=True) as stream:
        try:
            file = parquet.ParquetFile(stream)
            if text_key not in file.schema_arrow.names:
                raise DocumentError(f"{source.uri}: no column {text_key!r}; it has {', '.join(file.schema_arrow.names)}")
            for batch in file.iter_batches(batch_size=1024, columns=[text_key]):
                for text in batch.column(0).cast(pyarrow.large_binary()).to_pylist():
                    yield f"{source.name}#{number}", text or b""
                    number += 1
        except (OSError, pyarrow.ArrowException) as error:
            raise DocumentError(f"{source.uri}: not a readable Parquet file ({' '.join(str(error).split())[:200]})") from error
