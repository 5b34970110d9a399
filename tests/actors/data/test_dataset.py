from __future__ import annotations

import json
import os
import random
from pathlib import Path

import numpy
import pyarrow
import pytest
from corpus import make, rows_by_hand, texts

from actors.data import dataset as dataset_module
from actors.data import packing
from actors.data.dataset import Dataset, DatasetError
from actors.data.packing import Packer, SplitProgress
from actors.data.tokenizer import ByteTokenizer
from actors.files import storage
from orchestrator.config.run_config import ConfigError

LENGTH = 8


@pytest.fixture(autouse=True)
def two_groups_a_shard(monkeypatch):
    monkeypatch.setattr(packing, "_MOST_GROUPS", 2)


@pytest.fixture
def documents():
    return texts(1, 15)


@pytest.fixture
def corpus(tmp_path, documents):
    return make(tmp_path / "data", documents, [b"held out", b"x"], LENGTH)


def test_rows_are_the_packing_rule_read_literally(corpus, documents):
    rows, real = rows_by_hand(documents, LENGTH)
    split = corpus.train
    assert len(split.shards) > 2 and split.sequences == len(rows) and split.last_row_tokens == real
    assert split.tokens == sum(len(text) + 1 for text in documents)
    assert corpus.read_groups(split, range(split.shape.groups)).tolist() == rows
    assert corpus.validation.sequences == 2 and corpus.read_rows(corpus.validation, [1]).tolist() == [[256, 120] + [256] * 7]


def test_every_token_but_the_first_is_a_label_once(corpus, documents):
    split = corpus.train
    ids = list(range(split.sequences))
    valid = corpus.valid_tokens(split, ids)
    labels = [token for row, count in zip(corpus.read_rows(split, ids).tolist(), valid) for token in row[1:count]]
    assert labels == [token for text in documents for token in [*text, 256]][1:]


@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_a_stream_that_ends_at_the_end_of_a_shard(tmp_path, count):
    """Around the border of a full shard (128 rows of 8): no row is lost, none invented."""
    document = bytes(128 * LENGTH - 1 + count - 1)
    data = make(tmp_path / "data", [document], [], LENGTH)
    rows, real = rows_by_hand([document], LENGTH)
    assert (data.train.sequences, data.train.last_row_tokens) == (len(rows), real)
    assert data.read_rows(data.train, range(len(rows))).tolist() == rows


def test_rows_in_any_order(corpus, documents):
    rows, _ = rows_by_hand(documents, LENGTH)
    wanted = random.Random(0).choices(range(len(rows)), k=50) + [len(rows) - 1, 0]
    found = corpus.read_rows(corpus.train, wanted)
    assert found.dtype == numpy.int32 and found.tolist() == [rows[i] for i in wanted]
    assert corpus.read_rows(corpus.train, []).shape == (0, LENGTH + 1)
    groups = corpus.read_groups(corpus.train, [3, 0])
    assert groups.tolist() == rows[3 * 64:4 * 64] + rows[:64]


def test_packing_resumes_after_any_shard(documents):
    byte, points, whole = ByteTokenizer(), [], {}

    def pack(progress, written):
        packer = Packer("train", LENGTH, 256, lambda name, content: written.__setitem__(name, content.to_pybytes()), progress,
                        lambda: points.append(packer.progress))
        for number, text in enumerate(documents):
            packer.add((number // 4, number % 4), byte.encode(text), len(text))
        packer.close()
        return packer

    reference = pack(SplitProgress(), whole)
    assert len(points) == len(whole) - 1 > 2
    for point in list(points):
        written: dict = {}
        again = pack(SplitProgress.from_json(json.loads(json.dumps(point.to_json()))), written)
        assert again.progress.shards == reference.progress.shards and again.total == reference.total
        assert again.last_row_tokens == reference.last_row_tokens
        assert written == {name: content for name, content in whole.items() if name in written}
        assert len(written) == len(whole) - len(point.shards)


def storage_path(corpus, name):
    return Path(corpus.path) / name


def damage_missing(file):
    file.unlink()


def damage_truncated(file):
    os.truncate(file, file.stat().st_size // 2)


def damage_corrupt(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 3] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("damage, reason", [
    (damage_missing, "does not exist"), (damage_truncated, "truncated"), (damage_corrupt, "corrupt")])
def test_a_damaged_shard_is_named(corpus, damage, reason):
    name = corpus.train.shards[1].name
    damage(storage_path(corpus, name))
    assert corpus.read_groups(corpus.train, [0]).shape == (64, LENGTH + 1)
    with pytest.raises(DatasetError, match=reason) as caught:
        corpus.read_rows(corpus.train, [200])
    assert name in str(caught.value) and "\n" not in str(caught.value)


def test_damage_after_the_first_read_is_caught_by_page_checksums(corpus):
    corpus.read_groups(corpus.train, [0])
    damage_corrupt(storage_path(corpus, corpus.train.shards[0].name))
    with pytest.raises(DatasetError, match="shard-00000.parquet: corrupt"):
        corpus.read_groups(corpus.train, [0, 1])


def test_a_shard_is_hashed_once(corpus, monkeypatch):
    opened = []
    real = storage.open_input
    monkeypatch.setattr(storage, "open_input", lambda uri, **how: opened.append((uri, bool(how))) or real(uri, **how))
    for _ in range(3):
        corpus.read_groups(corpus.train, [0, 1])
    assert len([1 for _, random_access in opened if not random_access]) == 1


@pytest.mark.parametrize("edit, message", [
    (lambda m: m.update(format=2), "format version 2; this program reads version 1"), (lambda m: m.pop("format"), "corrupt"),
    (lambda m: m.pop("tokenizer"), "corrupt"), (lambda m: m["splits"]["train"]["shards"].pop(), "do not add up")])
def test_a_manifest_that_cannot_be_used(corpus, edit, message):
    file = storage_path(corpus, "manifest.json")
    manifest = json.loads(file.read_text())
    edit(manifest)
    file.write_text(json.dumps(manifest))
    with pytest.raises(DatasetError, match=message) as caught:
        Dataset.open(corpus.path)
    assert "manifest.json" in str(caught.value)


def test_no_manifest_or_half_of_one(tmp_path, corpus):
    with pytest.raises(DatasetError, match="does not exist; make the data with"):
        Dataset.open(str(tmp_path / "none"))
    damage_truncated(storage_path(corpus, "manifest.json"))
    with pytest.raises(DatasetError, match="corrupt"):
        Dataset.open(corpus.path)


@pytest.mark.parametrize("fingerprint, vocab, length, message", [
    ("0" * 64, 257, LENGTH, "data.tokenizer = byte: the one that .*; this is 000000000000"),
    (ByteTokenizer.fingerprint, 256, LENGTH, "model.vocab_size = 256: at least 257"),
    (ByteTokenizer.fingerprint, 257, 16, "data.sequence_length = 16: 8, the length")])
def test_check_names_key_value_and_what_is_allowed(corpus, fingerprint, vocab, length, message):
    corpus.check("byte", ByteTokenizer.fingerprint, 300, LENGTH)
    with pytest.raises(ConfigError, match=message):
        corpus.check("byte", fingerprint, vocab, length)


def test_an_empty_split_has_no_order(tmp_path):
    data = make(tmp_path / "data", [b"abc"], [], LENGTH)
    assert data.validation.sequences == 0
    with pytest.raises(DatasetError, match="validation: the corpus has no sequences"):
        data.validation.shape


def test_matrix_of_another_type_is_refused():
    with pytest.raises(ValueError, match="has type"):
        dataset_module.list_to_matrix(pyarrow.chunked_array([pyarrow.array([[1, 2]])]), 2)
