"""Turns text into the packed, sharded corpus that training reads.

    python -m jobs.tokenize --input PATH... --tokenizer byte|FILE --output DIR [--config FILE] [--set data.sequence_length=256]

Inputs are files, folders, URIs, or `stdlib`, the source of Python's own standard library. Ray Data tokenises the documents
on all free CPUs, in order; packing (actors.data.packing) is sequential and cheap. The output depends on the inputs and settings
alone. After each shard `progress.json` says where the next one begins: the same command continues there after a kill and
gives the same bytes. `manifest.json` comes last and says what the folder holds; it is the same for the same inputs, while
`progress.json` also remembers when the input files were last changed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy

from actors.data import documents, packing
from actors.data import tokenizer as tokenizers
from actors.data.dataset import FORMAT, MANIFEST, Dataset, DatasetError
from actors.data.documents import Source
from actors.data.packing import Packer, SplitProgress
from actors.data.tokenizer import Tokenizer, TokenizerError
from actors.files import storage
from jobs import cli
from jobs.driver import session
from orchestrator.config.run_config import ConfigError, RunConfig

PROGRESS = "progress.json"
SPLITS = ("train", "validation")
_PLAIN_SECONDS = 5.0
_CPU_PATIENCE_SECONDS = 60.0

Show = Callable[[int, int, int], None]


def main(argv: list[str] | None = None) -> None:
    """Raises ConfigError, UsageError: refused. JobFailed: a file cannot be read or written, or Ray has no free CPU."""
    parser = cli.Parser(prog=cli.program("tokenize"), description=__doc__.splitlines()[0], examples=(
        "--input notes.txt books --output data/books", "--input stdlib --output data/stdlib-256 --set data.sequence_length=256"))
    cli.arguments(parser)
    parser.add_argument("--input", nargs="+", default=[documents.STDLIB], metavar="PATH",
                        help="files, folders, URIs, or stdlib (the default): the source of Python's standard library")
    parser.add_argument("--tokenizer", help="byte, or the path of a tokenizer.json (default: data.tokenizer)")
    parser.add_argument("--end-token", help="the end-of-document token of a tokenizer.json, where the file leaves it unclear")
    parser.add_argument("--text-key", default="text", metavar="KEY", help="text in .jsonl and .parquet files (default: text)")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder for the corpus: a path or URI")
    options = parser.parse_args(argv)
    config = cli.configuration(options)
    tokenizer = load_tokenizer(options.tokenizer or config.data.tokenizer, options.end_token)
    show = _Meter(sys.stderr)
    dataset = tokenize(options.input, tokenizer, options.output, config, text_key=options.text_key, show=show)
    show.close()
    train, validation = dataset.train, dataset.validation
    print(f"{options.output}: {train.sequences} training sequences of {dataset.sequence_length} tokens ({train.documents} "
          f"documents, {train.tokens} tokens), {validation.sequences} held out ({validation.documents})", file=sys.stderr)


def load_tokenizer(name: str, end_token: str | None = None) -> Tokenizer:
    """`actors.data.tokenizer.load`, refusing as a setting does. Raises ConfigError."""
    try:
        return tokenizers.load(name, end_token)
    except TokenizerError as error:
        raise ConfigError("data.tokenizer", name, str(error)) from None


def tokenize(inputs: list[str], tokenizer: Tokenizer, output: str, config: RunConfig, *, text_key: str = "text",
             show: Show | None = None) -> Dataset:
    """Make (or finish, or just open) the corpus in the folder `output`, on the running Ray or on a local one of its own.

    Args:
        show: called with (bytes done, bytes in all, shards written) as work proceeds.
    Raises ConfigError: an input is missing, or `output` holds a corpus with other inputs or settings. JobFailed: a file
    cannot be read or written, or Ray has no free CPU.
    """
    sources = documents.find(inputs)
    settings = _settings(sources, tokenizer, config, text_key)
    try:
        if done := _finished(output, settings, sources):
            return done
        progress = _progress(output, settings, sources)
        storage.delete_partial(output)
        for split in SPLITS:
            storage.delete_partial(storage.join(output, split))
        work = _Tokenization(output, settings, sources, tokenizer, progress)
        with _ray():
            work.run(documents.UnitTokenizer(tokenizer, text_key, config.data.validation_fraction), show or (lambda *_: None))
        work.finish()
        return Dataset.open(output)
    except (storage.StorageError, DatasetError, documents.DocumentError) as error:
        raise cli.JobFailed(str(error)) from error


class _Tokenization:
    """One run over the documents that the output still lacks."""

    def __init__(self, output: str, settings: dict[str, Any], sources: list[Source], tokenizer: Tokenizer,
                 progress: dict[str, SplitProgress]):
        self._output, self._settings, self._sources, self._tokenizer = output, settings, sources, tokenizer
        self._units = documents.units(sources)
        length, end = settings["data.sequence_length"], tokenizer.end_of_document
        self._packers = {split: Packer(split, length, end, self._write, progress[split], self._save) for split in SPLITS}

    def run(self, reader: documents.UnitTokenizer, show: Show) -> None:
        total, done, unit = sum(source.bytes for source in self._sources), 0, 0
        self._save()
        for table in _tables(reader, self._wanted()):
            errors = [text for text in table.column("error").to_pylist() if text]
            if errors:
                raise documents.DocumentError(errors[0])
            self._pack(table)
            for passed in self._units[unit: table.column("unit")[-1].as_py()] if table.num_rows else []:
                done, unit = done + sum(source.bytes for source in passed), unit + 1
            show(done, total, self._shards())
        for packer in self._packers.values():
            packer.close()
        show(total, total, self._shards())

    def finish(self) -> None:
        manifest = {
            "format": FORMAT,
            "tokenizer": {"kind": self._tokenizer.kind, "fingerprint": self._tokenizer.fingerprint,
                          "vocab_size": self._tokenizer.vocab_size, "end_of_document": self._tokenizer.end_of_document},
            "sequence_length": self._settings["data.sequence_length"], "settings": self._settings,
            "splits": {split: _split_entry(packer) for split, packer in self._packers.items()}}
        if not self._packers["train"].progress.shards:
            held_out = self._packers["validation"].total.documents
            why = f" ({held_out} documents, held out for validation)" if held_out else ""
            raise documents.DocumentError(f"{self._output}: the inputs hold no text to train on{why}")
        storage.write_atomic(storage.join(self._output, MANIFEST), _json(manifest))

    def _wanted(self) -> list[dict[str, Any]]:
        """The units that some split still needs; what was packed before is not tokenised again."""
        rows = []
        for number, sources in enumerate(self._units):
            train, validation = (number >= self._packers[split].progress.point.key[0] for split in SPLITS)
            if train or validation:
                rows.append(documents.unit_row(number, sources, train, validation))
        return rows

    def _pack(self, table: Any) -> None:
        columns = [table.column(name).to_pylist() for name in ("unit", "document", "held_out", "bytes")]
        tokens = table.column("tokens").combine_chunks()
        flat, offsets = tokens.values.to_numpy(), tokens.offsets.to_numpy()
        for unit, number, held_out, size, low, high in zip(*columns, offsets, offsets[1:]):
            packer = self._packers["validation" if held_out else "train"]
            packer.add((unit, number), numpy.asarray(flat[low:high], dtype=numpy.int32), size)

    def _write(self, name: str, content: Any) -> None:
        storage.write_atomic(storage.join(self._output, name), content)

    def _save(self) -> None:
        progress = {"settings": self._settings, "modified": _modified(self._sources),
                    "splits": {split: packer.progress.to_json() for split, packer in self._packers.items()}}
        storage.write_atomic(storage.join(self._output, PROGRESS), _json(progress))

    def _shards(self) -> int:
        return sum(len(packer.progress.shards) for packer in self._packers.values())


def _tables(reader: documents.UnitTokenizer, rows: list[dict[str, Any]]) -> Iterator[Any]:
    """The units' tables in order, tokenised by Ray Data, one task a unit."""
    if not rows:
        return
    import ray.data

    from actors.data.feed import quiet_context

    _wait_for_cpu()
    with ray.data.DataContext.current(quiet_context()):
        source = ray.data.from_items(rows, override_num_blocks=len(rows))
        tokenised = source.map_batches(reader.__call__, batch_size=None, batch_format="pyarrow")
        yield from tokenised.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=1)


def _wait_for_cpu() -> None:
    """Ray Data waits for ever, silently, where actors hold every CPU."""
    import ray

    deadline = time.monotonic() + _CPU_PATIENCE_SECONDS
    while ray.available_resources().get("CPU", 0.0) < 1.0:
        if time.monotonic() > deadline:
            raise cli.JobFailed(f"the Ray cluster had no free CPU for {_CPU_PATIENCE_SECONDS:g} s; tokenising needs one")
        time.sleep(0.5)


@contextlib.contextmanager
def _ray() -> Iterator[None]:
    """The Ray that runs here already, else the one that `session.connect` finds or starts, for as long as needed."""
    import ray

    if ray.is_initialized():
        yield
        return
    session.connect()
    try:
        yield
    finally:
        session.disconnect()


def _settings(sources: list[Source], tokenizer: Tokenizer, config: RunConfig, text_key: str) -> dict[str, Any]:
    """Everything that the output depends on, files by name and size."""
    listing = hashlib.sha256(json.dumps([(source.name, source.bytes) for source in sources]).encode()).hexdigest()
    return {"inputs": listing, "files": len(sources),
            "tokenizer": tokenizer.fingerprint, "end_of_document": tokenizer.end_of_document,
            "data.sequence_length": config.data.sequence_length, "data.validation_fraction": config.data.validation_fraction,
            "text_key": text_key, "rows_per_group": packing.ROWS_PER_GROUP,
            "groups_per_shard": packing.groups_per_shard(config.data.sequence_length)}


def _modified(sources: list[Source]) -> str:
    return hashlib.sha256(json.dumps([source.modified for source in sources]).encode()).hexdigest()


def _finished(output: str, settings: dict[str, Any], sources: list[Source]) -> Dataset | None:
    """The corpus in `output` when it is finished. Raises ConfigError when it was made with other settings."""
    manifest = _read(output, MANIFEST)
    if manifest is None:
        return None
    _same(output, manifest.get("settings"), settings)
    _unchanged(output, _read(output, PROGRESS), sources)
    return Dataset.open(output)


def _progress(output: str, settings: dict[str, Any], sources: list[Source]) -> dict[str, SplitProgress]:
    """Where an earlier run stopped. Raises ConfigError when what it made is of other settings or of inputs changed since."""
    fresh = {split: SplitProgress() for split in SPLITS}
    saved = _read(output, PROGRESS)
    if saved is None or not any(saved["splits"][split]["shards"] for split in SPLITS):  # an input was bad: nothing to keep
        return fresh
    _same(output, saved.get("settings"), settings)
    _unchanged(output, saved, sources)
    progress = {split: SplitProgress.from_json(saved["splits"][split]) for split in SPLITS}
    for shard in (shard for split in progress.values() for shard in split.shards):
        file = storage.join(output, shard.name)
        if not storage.exists(file) or storage.size(file) != shard.bytes:
            return fresh
    return progress


def _same(output: str, found: Any, wanted: dict[str, Any]) -> None:
    for key, value in wanted.items():
        had = found.get(key) if isinstance(found, dict) else None
        if had != value:
            what = "made from other input files" if key in ("inputs", "files") else f"made with {key} = {had}, not {value}"
            raise ConfigError("--output", output, f"another folder, or delete it: it holds a corpus {what}")


def _unchanged(output: str, saved: dict[str, Any] | None, sources: list[Source]) -> None:
    """Files edited since to the same size are told by their times, which a corpus copied without progress.json no longer has."""
    if saved is not None and saved.get("modified") != _modified(sources):
        raise ConfigError("--output", output, "another folder, or delete it: made of input files that have changed since")


def _read(output: str, name: str) -> dict[str, Any] | None:
    file = storage.join(output, name)
    if not storage.exists(file):
        return None
    try:
        tree = json.loads(storage.read_bytes(file))
    except ValueError:
        tree = None
    if not isinstance(tree, dict):
        raise DatasetError(f"{file}: corrupt; delete the folder to start anew")
    return tree


def _split_entry(packer: Packer) -> dict[str, Any]:
    progress, total = packer.progress, packer.total
    return {"sequences": sum(shard.rows for shard in progress.shards), "tokens": total.tokens, "documents": total.documents,
            "bytes": total.bytes, "last_row_tokens": packer.last_row_tokens, "rows_per_group": packing.ROWS_PER_GROUP,
            "groups_per_shard": packing.groups_per_shard(packer.sequence_length),
            "shards": [vars(shard) for shard in progress.shards]}


def _json(tree: dict[str, Any]) -> bytes:
    return (json.dumps(tree, indent=1) + "\n").encode()


class _Meter:
    """Progress on standard error: one live line on a terminal, else a plain line every few seconds."""

    def __init__(self, stream: Any):
        self._stream, self._live = stream, stream.isatty()
        self._next = time.monotonic() + (0.0 if self._live else _PLAIN_SECONDS)
        self._shown = False

    def __call__(self, done: int, total: int, shards: int) -> None:
        now = time.monotonic()
        if now < self._next and done < total:
            return
        self._next = now + (0.1 if self._live else _PLAIN_SECONDS)
        text = f"tokenize: {done / 1e6:.1f} of {total / 1e6:.1f} MB, {shards} shards"
        self._stream.write(f"\r{text}" if self._live else f"{text}\n")
        self._stream.flush()
        self._shown = True

    def close(self) -> None:
        if self._live and self._shown:
            self._stream.write("\n")


if __name__ == "__main__":
    sys.exit(cli.run(main))
