"""A small corpus on disk without Ray: what jobs.tokenize writes, from a list of documents per split."""

from __future__ import annotations

import json
from pathlib import Path

import numpy

from actors.data import packing
from actors.data.dataset import Dataset
from actors.data.packing import Packer
from actors.data.tokenizer import ByteTokenizer


def make(folder: Path, train: list[bytes], validation: list[bytes], length: int) -> Dataset:
    byte, splits = ByteTokenizer(), {}
    for split, texts in (("train", train), ("validation", validation)):
        (folder / split).mkdir(parents=True)
        packer = Packer(split, length, 256, lambda name, content: (folder / name).write_bytes(content))
        for number, text in enumerate(texts):
            packer.add((0, number), byte.encode(text), len(text))
        packer.close()
        shards = packer.progress.shards
        splits[split] = {"sequences": sum(s.rows for s in shards), "tokens": packer.total.tokens, "documents": len(texts),
                         "bytes": packer.total.bytes, "last_row_tokens": packer.last_row_tokens,
                         "rows_per_group": packing.ROWS_PER_GROUP,
                         "groups_per_shard": packing.groups_per_shard(length), "shards": [vars(s) for s in shards]}
    tokenizer = {"kind": "byte", "fingerprint": byte.fingerprint, "vocab_size": 257, "end_of_document": 256}
    manifest = {"format": 1, "tokenizer": tokenizer, "sequence_length": length, "splits": splits}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return Dataset.open(str(folder))


def texts(seed: int, count: int, longest: int = 400) -> list[bytes]:
    rng = numpy.random.default_rng(seed)
    return [rng.integers(0, 256, rng.integers(1, longest), dtype=numpy.uint8).tobytes() for _ in range(count)]


def rows_by_hand(documents: list[bytes], length: int) -> tuple[list[list[int]], int]:
    """The packing rule read literally: (rows, real tokens of the last row)."""
    stream = [token for text in documents for token in [*text, 256]]
    rows, at = [], 0
    while at + 1 < len(stream):
        rows.append(stream[at:at + length + 1])
        at += length
    real = len(rows[-1])
    rows[-1] += [256] * (length + 1 - real)
    return rows, real
