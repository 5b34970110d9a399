from __future__ import annotations

import contextlib
import gzip
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy
import pyarrow
import pytest
import tokenizers
from pyarrow import parquet

from actors.data import documents, packing
from actors.data.dataset import Dataset
from actors.data.tokenizer import ByteTokenizer
from actors.files import storage
from jobs.cli import JobFailed
from jobs.tokenize import load_tokenizer, main, tokenize
from orchestrator.config.run_config import ConfigError, parse

REPOSITORY = Path(__file__).parents[2]
BYTE = ByteTokenizer()
LENGTH = 16


def settings(**data):
    return parse({"data": {"sequence_length": LENGTH, "validation_fraction": 0.2} | data})


@pytest.fixture
def inputs(tmp_path):
    """Thirty files in nested folders, one empty, one not UTF-8, one hidden."""
    rng = random.Random(0)
    folder = tmp_path / "in"
    for number in range(30):
        file = folder / f"d{number % 3}" / f"f{number:02d}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(rng.randbytes(rng.randint(100, 9000)))
    (folder / "d0" / "empty").touch()
    (folder / ".hidden").write_text("not read")
    return folder


def files_in(folder, ignore=("progress.json",)):
    found = [p for p in sorted(Path(folder).rglob("*")) if p.is_file() and p.name not in ignore]
    return {str(p.relative_to(folder)): p.read_bytes() for p in found}


def by_hand(pairs, split, end=256):
    """The token stream of a split from (identity, tokens, content), held-out rule and packing read literally."""
    wanted = split == "validation"
    return [token for identity, tokens, content in pairs
            if len(tokens) and documents.is_held_out(identity, content, 0.2) == wanted for token in [*tokens, end]]


def stream_of(dataset, split):
    rows = dataset.read_groups(split, range(split.shape.groups)).tolist()
    valid = dataset.valid_tokens(split, range(len(rows)))
    return rows[0][:1] + [token for row, count in zip(rows, valid) for token in row[1:count]]


def check_streams(dataset, pairs, end=256):
    for split in (dataset.train, dataset.validation):
        stream = by_hand(pairs, split.name, end)
        assert stream_of(dataset, split) == stream and split.tokens == len(stream)
        assert split.sequences == -(-(len(stream) - 1) // LENGTH)


def test_folder_of_files(ray_local, inputs, tmp_path):
    found = tokenize([str(inputs)], BYTE, str(tmp_path / "out"), settings())
    names = sorted(str(p.relative_to(inputs)) for p in inputs.rglob("*") if p.is_file() and not p.name.startswith("."))
    contents = [(inputs / name).read_bytes() for name in names]
    check_streams(found, [(name, list(content), content) for name, content in zip(names, contents)])
    assert found.train.documents + found.validation.documents == 30
    assert found.train.bytes + found.validation.bytes == sum(map(len, contents))
    assert (found.tokenizer, found.vocab_size, found.sequence_length) == ("byte", 257, LENGTH)
    first = parquet.ParquetFile(tmp_path / "out" / "train" / "shard-00000.parquet")
    assert first.schema_arrow.field("tokens").type == pyarrow.list_(pyarrow.int32(), LENGTH + 1)
    assert first.metadata.row_group(0).num_rows == 64 and first.metadata.num_row_groups == 64


def test_two_runs_give_the_same_bytes_however_units_are_cut(ray_local, inputs, tmp_path, monkeypatch):
    tokenize([str(inputs)], BYTE, str(tmp_path / "a"), settings())
    monkeypatch.setattr(documents, "_UNIT_BYTES", 20_000)
    shutil.copytree(inputs, tmp_path / "copy")
    tokenize([str(tmp_path / "copy")], BYTE, str(tmp_path / "b"), settings())
    assert files_in(tmp_path / "a") == files_in(tmp_path / "b")


@pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.gz", "x.parquet"])
def test_files_of_many_documents(ray_local, tmp_path, name):
    texts = [f"document {i} " + "é" * i for i in range(40)] + ["", "\ud800 alone"][: 1 if name == "x.parquet" else 2]
    lines = "".join(json.dumps({"body": text, "n": 1}) + "\n" for text in texts).encode()
    file = tmp_path / name
    if name.endswith("parquet"):
        parquet.write_table(pyarrow.table({"body": texts, "n": [1] * len(texts)}), file)
    else:
        file.write_bytes(gzip.compress(lines) if name.endswith("gz") else lines)
    found = tokenize([str(file)], BYTE, str(tmp_path / "out"), settings(), text_key="body")
    contents = [text.encode("utf-8", "surrogatepass") for text in texts]
    check_streams(found, [(f"{name}#{i}", list(content), content) for i, content in enumerate(contents)])


def test_tokenizer_json(ray_local, tmp_path):
    texts = [f"the cat sat on the mat {'on ' * i}" for i in range(30)]
    vocabulary = {word: i for i, word in enumerate(["[UNK]", "the", "cat", "sat", "on", "</s>"])}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "x.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    tokenizer = load_tokenizer(str(tmp_path / "tokenizer.json"))
    found = tokenize([str(tmp_path / "x.jsonl")], tokenizer, str(tmp_path / "out"), settings())
    tokens = [[vocabulary.get(word, 0) for word in text.split()] for text in texts]
    check_streams(found, [(f"x.jsonl#{i}", tokens[i], text.encode()) for i, text in enumerate(texts)], end=5)
    assert (found.tokenizer, found.vocab_size, found.end_of_document) == ("tokenizer.json", 6, 5)


class Killed(Exception):
    pass


@pytest.mark.parametrize("writes", [1, 4, 9, 16, "manifest"])
def test_resumes_after_any_write(ray_local, inputs, tmp_path, monkeypatch, writes):
    """Stopped before the n-th file is written: the next run leaves finished shards alone and ends with the same bytes."""
    monkeypatch.setattr(packing, "_MOST_GROUPS", 4)
    monkeypatch.setattr(documents, "_UNIT_BYTES", 20_000)
    tokenize([str(inputs)], BYTE, str(tmp_path / "whole"), settings())
    written, real = [], storage.write_atomic

    def write(uri, content):
        if len(written) == writes or (writes == "manifest" and uri.endswith("manifest.json")):
            raise Killed
        written.append(uri)
        real(uri, content)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(storage, "write_atomic", write)
        tokenize([str(inputs)], BYTE, str(tmp_path / "out"), settings())
    saved = json.loads((tmp_path / "out" / "progress.json").read_text())
    finished = [shard["name"] for split in saved["splits"].values() for shard in split["shards"]]
    stored = [uri for uri in written if uri.endswith(".parquet")]
    assert len(finished) >= len(stored) - (2 if writes == "manifest" else 1)  # all but the last, short shards; all but the newest
    times = {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in finished}
    tokenize([str(inputs)], BYTE, str(tmp_path / "out"), settings())
    assert files_in(tmp_path / "out") == files_in(tmp_path / "whole")
    assert times == {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in finished}


@pytest.fixture
def short_folder():
    """For the temporary files of a killed process; Ray's socket names leave no room for pytest's folders."""
    folder = tempfile.mkdtemp(prefix="dualray-")
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def test_continues_after_sigkill(ray_local, tmp_path, short_folder):
    rng = numpy.random.default_rng(0)
    for number in range(40):
        file = tmp_path / "in" / f"{number:02d}"
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(rng.integers(0, 256, 200_000, dtype=numpy.uint8).tobytes())
    command = [sys.executable, "-m", "jobs.tokenize", "--input", str(tmp_path / "in"), "--output", str(tmp_path / "out"),
               "--set", f"data.sequence_length={LENGTH}", "--set", "data.validation_fraction=0.2"]
    job = subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.PIPE, start_new_session=True,
                           env=os.environ | {"TMPDIR": short_folder})
    deadline = time.monotonic() + 120
    while len(list((tmp_path / "out").glob("train/shard-*"))) < 3 and time.monotonic() < deadline:
        with contextlib.suppress(subprocess.TimeoutExpired):
            job.wait(0.02)
            break
    os.killpg(job.pid, signal.SIGKILL)  # its Ray too, whose agents would outlive it
    shown = job.communicate()[1].decode()
    assert job.returncode == -signal.SIGKILL and not (tmp_path / "out" / "manifest.json").exists(), shown
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").glob("train/shard-0000[01].parquet")}
    assert len(before) == 2
    tokenize([str(tmp_path / "in")], BYTE, str(tmp_path / "out"), settings())
    tokenize([str(tmp_path / "in")], BYTE, str(tmp_path / "whole"), settings())
    assert files_in(tmp_path / "out") == files_in(tmp_path / "whole")
    assert before == {p: p.stat().st_mtime_ns for p in before}


def test_a_finished_corpus_is_opened_at_once_or_refused(ray_local, inputs, tmp_path, monkeypatch):
    out = str(tmp_path / "out")
    made = tokenize([str(inputs)], BYTE, out, settings())
    monkeypatch.setattr("jobs.tokenize._tables", lambda *_: pytest.fail("read again"))
    assert tokenize([str(inputs)], BYTE, out, settings()) == made == Dataset.open(out)
    for change, message in ((dict(sequence_length=32), "made with data.sequence_length = 16, not 32"),
                            (dict(validation_fraction=0.1), "made with data.validation_fraction = 0.2, not 0.1")):
        with pytest.raises(ConfigError, match=message):
            tokenize([str(inputs)], BYTE, out, settings(**change))
    file = inputs / "d1" / "f01.txt"
    file.write_bytes(file.read_bytes()[::-1])
    os.utime(file, (1, 1))
    with pytest.raises(ConfigError, match="input files that have changed"):
        tokenize([str(inputs)], BYTE, out, settings())
    file.unlink()
    with pytest.raises(ConfigError, match="made from other input files"):
        tokenize([str(inputs)], BYTE, out, settings())


@pytest.mark.parametrize("name, content, message", [
    ("x.jsonl", b'{"text": "a"}\nnot json\n', "x.jsonl line 2: not a JSON object with a 'text' key"),
    ("x.jsonl", b'{"txt": "a"}\n', "line 1: not a JSON object with a 'text' key"),
    ("x.jsonl", b'{"text": 3}\n', "line 1: 'text' is not a string"),
    ("x.jsonl.gz", b"not gzip", "damaged gzip"), ("x.parquet", b"not parquet", "not a readable Parquet file"),
    ("x.txt", b"", "no text to train on")])
def test_unreadable_input_fails_in_one_line(ray_local, tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(JobFailed, match=message) as caught:
        tokenize([str(tmp_path / name)], BYTE, str(tmp_path / "out"), settings())
    assert "\n" not in str(caught.value) and not (tmp_path / "out" / "manifest.json").exists()


def test_an_input_that_was_bad_can_be_put_right(ray_local, tmp_path):
    file = tmp_path / "in.jsonl"
    file.write_text('{"text": 5}\n')
    with pytest.raises(JobFailed, match="line 1"):
        tokenize([str(file)], BYTE, str(tmp_path / "out"), settings())
    file.write_text("".join(json.dumps({"text": f"put right {number}" * 9}) + "\n" for number in range(20)))
    made = tokenize([str(file)], BYTE, str(tmp_path / "out"), settings())
    assert made.train.documents + made.validation.documents == 20


def test_command_line_refusals_before_ray_starts(tmp_path, capsys):
    (tmp_path / "folder").mkdir()
    for arguments, message in ((["--input", "/none/such"], "--input = /none/such: an existing file"),
                               (["--input", str(tmp_path / "folder")], "with files in it"),
                               (["--tokenizer", "/none.json"], "data.tokenizer = /none.json"),
                               (["--set", "data.sequence_length=2"], "data.sequence_length = 2")):
        with pytest.raises(ConfigError, match=message):
            main([*arguments, "--output", str(tmp_path / "out")])
    done = subprocess.run([sys.executable, "-m", "jobs.tokenize", "--input", "/none/such", "--output", str(tmp_path / "out")],
                          cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and done.stdout == ""


def test_command_line_reports_on_standard_error(ray_local, inputs, tmp_path, capsys):
    main(["--input", str(inputs), "--output", str(tmp_path / "out"), "--set", f"data.sequence_length={LENGTH}"])
    shown = capsys.readouterr()
    assert shown.out == "" and "\r" not in shown.err
    assert "tokenize:" in shown.err and "training sequences of 16 tokens" in shown.err


def test_standard_library_is_found_without_tests_and_packages():
    sources = documents.find(["stdlib"])
    names = [source.name for source in sources]
    assert names == sorted(names) and {"ast.py", "json/decoder.py"} < set(names)
    assert not any(part in ("test", "tests", "site-packages") for name in names for part in name.split("/"))
    assert sum(source.bytes for source in sources) > 5_000_000
    assert sum(map(len, documents.units(sources))) == len(sources)


def test_held_out_share_is_near_the_fraction_and_stable():
    held = [documents.is_held_out(f"f{i}", b"x", 0.1) for i in range(5000)]
    assert 400 < sum(documents.is_held_out("f", b"%d" % i, 0.1) for i in range(5000)) < 600
    assert 400 < sum(held) < 600 and held == [documents.is_held_out(f"f{i}", b"x", 0.1) for i in range(5000)]
    assert not documents.is_held_out("f", b"x", 0.0) and documents.is_held_out("f", b"x", 1.0)
