"""Journals and the run folder: what stands in them after a crash, on a full disk, in an object store."""

from __future__ import annotations

import datetime
import errno
import fcntl
import json
import os

import pytest
from pyarrow._fs import _MockFileSystem

from actors.files import journal as journal_module
from actors.files import storage
from actors.files.journal import Journal, Overtaken
from actors.files.run_folder import RunFolder
from actors.files.storage import StorageError
from orchestrator.told.kinds import CheckpointWritten, UnknownEvent
from orchestrator.told.lines import Told


def test_lines_are_appended_at_once(tmp_path):
    path = tmp_path / "new" / "lines.jsonl"
    journal = Journal(str(path))
    for number in range(3):
        journal.append(f"line {number}")
        assert path.read_text() == "".join(f"line {n}\n" for n in range(number + 1))
    assert journal.lines() == Journal(str(path)).lines() == ["line 0", "line 1", "line 2"]
    assert Journal(str(tmp_path / "none")).lines() == []


def test_a_line_holds_whatever_json_may(tmp_path):
    journal, line = Journal(str(tmp_path / "j")), json.dumps({"text": "a\u2028b\x0bc\u0085 é"}, ensure_ascii=False)
    journal.append(line)
    assert journal.lines() == [line]


@pytest.mark.parametrize("cut", ["", '{"st', "\u00e9"[:1]])
def test_a_line_that_a_crash_cut_off_goes(tmp_path, cut):
    path = tmp_path / "j"
    path.write_text("one\ntwo\n" + cut)
    journal = Journal(str(path))
    assert journal.lines() == ["one", "two"]
    journal.append("three")
    assert path.read_text() == "one\ntwo\nthree\n"


def test_a_durable_line_is_flushed_before_append_returns(tmp_path, monkeypatch):
    path, flushed = tmp_path / "j", []

    def flush(descriptor):
        target = os.readlink(f"/proc/self/fd/{descriptor}")
        flushed.append((target, path.read_text()))

    monkeypatch.setattr(os, "fsync", flush)
    durable = Journal(str(path), durable=True)
    durable.append("one")
    durable.append("two")
    assert flushed == [(str(tmp_path), ""), (str(path), "one\n"), (str(path), "one\ntwo\n")]
    Journal(str(tmp_path / "other")).append("one")
    assert len(flushed) == 3


def test_a_line_that_is_not_durable_does_not_count(tmp_path, monkeypatch):
    journal = Journal(str(tmp_path / "j"), durable=True)
    journal.append("one")

    def fail(descriptor):
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(StorageError, match="Input/output error"):
            journal.append("two")
    assert journal.lines() == ["one"]
    journal.append("three")
    assert journal.lines() == ["one", "three"]


def test_a_full_disk_takes_whole_lines_or_none(small_disk):
    journal = Journal(str(small_disk.folder / "j"), durable=True)
    line, written = "x" * 299, 0
    journal.append(line)
    small_disk.fill()
    with pytest.raises(StorageError, match="No space left on device") as caught:
        for _ in range(100):
            written += 1
            journal.append(line)
    assert "\n" not in str(caught.value)
    assert (small_disk.folder / "j").read_text() == (line + "\n") * written
    small_disk.free()
    journal.append("last")
    assert Journal(str(small_disk.folder / "j")).lines() == [line] * written + ["last"]


def test_rewriting_is_atomic(tmp_path, monkeypatch):
    path = tmp_path / "j"
    journal = Journal(str(path))
    journal.append("one")
    journal.append("two")

    def fail(source, target):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        with pytest.raises(StorageError):
            journal.rewrite(["one"])
    assert journal.lines() == ["one", "two"]
    journal.rewrite(["one"])
    journal.append("three")
    assert path.read_text() == "one\nthree\n" and [entry.name for entry in tmp_path.iterdir()] == ["j"]


# --- an object store: no appending -----------------------------------------------------------------------------------


@pytest.fixture
def memory(monkeypatch):
    system, resolve = _MockFileSystem(datetime.datetime(2020, 1, 1)), storage.resolve
    system.create_dir("bucket/run")
    monkeypatch.setattr(storage, "resolve", lambda uri: (system, uri[7:]) if uri.startswith("mock://") else resolve(uri))
    return "mock://bucket/j"


def test_durable_lines_are_put_at_once_others_now_and_then(memory, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(journal_module.time, "monotonic", lambda: now[0])
    durable, other = Journal(memory, durable=True), Journal(memory + "2")
    for number in range(3):
        durable.append(str(number))
        other.append(str(number))
    assert Journal(memory).lines() == ["0", "1", "2"] and Journal(memory + "2").lines() == ["0"]
    now[0] += 6
    other.append("3")
    assert Journal(memory + "2").lines() == ["0", "1", "2", "3"]
    other.append("4")
    other.close()
    assert Journal(memory + "2").lines() == ["0", "1", "2", "3", "4"]
    continued = Journal(memory, durable=True)
    continued.append("3")
    assert continued.lines() == ["0", "1", "2", "3"]


def test_a_put_that_fails_leaves_the_line_out(memory, monkeypatch):
    journal = Journal(memory, durable=True)
    journal.append("one")

    def fail(uri, content):
        raise StorageError(uri, "no route")

    with monkeypatch.context() as patch:
        patch.setattr(storage, "write_atomic", fail)
        with pytest.raises(StorageError):
            journal.append("two")
    journal.append("three")
    assert journal.lines() == ["one", "three"]


def test_an_object_that_was_deleted_is_missed(memory):
    journal = Journal(memory, durable=True, alone=True)
    journal.append("one")
    storage.delete(memory)
    for look in (journal.check, lambda: journal.append("two")):
        with pytest.raises(StorageError, match="does not exist"):
            look()


def test_a_reader_that_closes_writes_nothing(memory):
    writer = Journal(memory, durable=True)
    writer.append("one")
    reader = Journal(memory)
    writer.append("two")
    reader.close()
    assert writer.lines() == ["one", "two"]


# --- the run folder --------------------------------------------------------------------------------------------------


def test_a_run_that_goes_back_stands_in_its_metrics_once(tmp_path):
    folder = RunFolder(str(tmp_path), "run")
    for step in range(5):
        folder.metrics({"step": step, "loss": 1.0})
    folder.close()
    with open(tmp_path / "run" / "metrics.jsonl", "a") as stream:
        stream.write('{"step": 5}\n{"ste')
    again = RunFolder(str(tmp_path), "run")
    assert [line["step"] for line in again.trim_metrics(3)] == [3, 4, 5]
    again.metrics({"step": 3})
    assert [line["step"] for line in again.metric_lines()] == [0, 1, 2, 3]
    assert again.trim_metrics(4) == []


def test_nor_does_it_twice_in_an_object_store(memory):
    """Where the newest lines are kept back for seconds."""
    bucket = memory.removesuffix("/j")
    folder = RunFolder(bucket, "run")
    for step in range(5):
        folder.metrics({"step": step})
    assert [line["step"] for line in folder.trim_metrics(3)] == [3, 4]
    for step in range(3, 6):
        folder.metrics({"step": step})
    folder.close()
    assert [line["step"] for line in RunFolder(bucket, "run").metric_lines()] == [0, 1, 2, 3, 4, 5]


def test_lines_that_are_damaged_are_passed_over(tmp_path):
    folder = RunFolder(str(tmp_path), "run")
    for name, good in (("metrics.jsonl", '{"step": 1}'), ("events.jsonl", '{"time": 1, "event": "b"}')):
        (tmp_path / "run").mkdir(exist_ok=True)
        (tmp_path / "run" / name).write_text("\0\0\n0\n[1]\n" + good + '\n{"st\n')
    assert folder.metric_lines() == [{"step": 1}] and folder.events() == [Told(1, UnknownEvent("b", {}))]


def test_events_and_files(tmp_path):
    folder = RunFolder(str(tmp_path), "run")
    event = Told(1.5, CheckpointWritten(4, "there", 0.25))
    folder.told(event)
    assert (tmp_path / "run" / "events.jsonl").read_text() == (
        '{"time": 1.5, "event": "checkpoint", "step": 4, "path": "there", "seconds": 0.25}\n')
    assert folder.events() == [event] and folder.checkpoints == f"{tmp_path}/run/checkpoints"
    assert (tmp_path / "run" / "config.yaml").samefile(folder.write("config.yaml", "a: 1\n"))
    assert (tmp_path / "run" / "config.yaml").read_text() == "a: 1\n"


def test_a_folder_is_held_by_one_and_where_there_are_no_locks_that_is_said(tmp_path, monkeypatch):
    folder = RunFolder(str(tmp_path), "run")
    with folder.held() as locked:
        assert locked is True
        with pytest.raises(StorageError, match="another run with this name is under way"), RunFolder(str(tmp_path), "run").held():
            pass

    def unknown(*arguments):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", unknown)
    with folder.held() as locked:
        assert locked is False


# --- one writer ------------------------------------------------------------------------------------------------------


def test_who_finds_that_another_has_written_writes_no_more(tmp_path):
    old = Journal(str(tmp_path / "j"), durable=True, alone=True)
    old.append("one")
    new = Journal(str(tmp_path / "j"), durable=True, alone=True)
    assert new.lines() == ["one"]
    new.append("two")
    for _ in range(2):
        with pytest.raises(Overtaken, match="has taken this run over"):
            old.append("three")
    new.append("four")
    assert new.lines() == ["one", "two", "four"]


def test_who_read_before_the_other_wrote_writes_no_more(tmp_path):
    old, new = (Journal(str(tmp_path / "j"), alone=True) for _ in range(2))
    old.append("one")
    assert new.lines() == ["one"]
    old.append("two")
    assert new.lines() == ["one", "two"]
    with pytest.raises(Overtaken):
        new.append("three")
    assert old.lines() == ["one", "two"]


class Stuck:
    """A handle whose file cannot be changed, for ever: a new one could."""

    def __init__(self, stream, *fail: str):
        self._stream, self._fail = stream, fail

    def __getattr__(self, name):
        return self._refuse if name in self._fail else getattr(self._stream, name)

    def _refuse(self, *arguments):
        raise OSError(errno.ESTALE, "Stale file handle")


@pytest.mark.parametrize("left", [b"tw", b"two\n"])
def test_what_an_append_of_ones_own_left_is_cut_off(tmp_path, monkeypatch, left):
    """The disk fails while the line is flushed, and once more when it is to be taken back."""
    journal = Journal(str(tmp_path / "j"), durable=True, alone=True)
    journal.append("one")

    def fail(descriptor):
        (tmp_path / "j").write_bytes(b"one\n" + left)
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        journal._stream = Stuck(journal._stream, "truncate")
        with pytest.raises(StorageError, match="Input/output error"):
            journal.append("two")
    journal.append("two")
    assert (tmp_path / "j").read_text() == "one\ntwo\n"


def test_a_handle_that_went_stale_is_opened_again(tmp_path):
    journal = Journal(str(tmp_path / "j"), durable=True, alone=True)
    journal.append("one")
    journal._stream = Stuck(journal._stream, "write", "truncate")
    with pytest.raises(StorageError, match="Stale"):
        journal.append("two")
    journal.append("three")
    assert journal.lines() == ["one", "three"]


def test_what_was_opened_again_has_not_grown_by_another_hand(tmp_path):
    journal = Journal(str(tmp_path / "j"), durable=True, alone=True)
    journal.append("one")
    journal._stream = Stuck(journal._stream, "write", "truncate")
    with pytest.raises(StorageError, match="Stale"):
        journal.append("two")
    with open(tmp_path / "j", "a") as other:
        other.write("of another\n")
    for look in (journal.check, lambda: journal.append("three")):
        with pytest.raises(Overtaken):
            look()
    assert journal.lines() == ["one", "of another"]


def test_a_record_that_was_deleted_is_missed_and_not_begun_anew(tmp_path):
    """As a folder that is not mounted any more looks; what comes back is the same file."""
    journal, path = Journal(str(tmp_path / "j"), durable=True, alone=True), tmp_path / "j"
    journal.append("one")
    path.rename(tmp_path / "away")
    for _ in range(2):
        for look in (journal.check, lambda: journal.append("two")):
            with pytest.raises(StorageError, match="was there") as caught:
                look()
            assert not isinstance(caught.value, Overtaken)
    (tmp_path / "away").rename(path)
    journal.append("two")
    assert path.read_text() == "one\ntwo\n"


def test_any_other_file_that_was_deleted_is_begun_anew(tmp_path):
    journal = Journal(str(tmp_path / "j"))
    journal.append("one")
    (tmp_path / "j").unlink()
    journal.append("two")
    assert journal.lines() == ["two"]


def test_a_writer_that_froze_with_the_lock_does_not_block_for_ever(tmp_path, monkeypatch):
    monkeypatch.setattr(journal_module, "_LOCK_SECONDS", 0.05)
    journal = Journal(str(tmp_path / "j"), alone=True)
    journal.append("one")
    with open(tmp_path / "j", "ab") as frozen:
        fcntl.flock(frozen, fcntl.LOCK_EX)
        with pytest.raises(StorageError, match="locked"):
            journal.append("two")
    journal.append("three")
    assert journal.lines() == ["one", "three"]


def test_one_writer_of_an_object(memory):
    old, new = (Journal(memory, durable=True, alone=True) for _ in range(2))
    new.append("one")
    with pytest.raises(Overtaken):
        old.append("two")
    new.append("three")
    assert Journal(memory).lines() == ["one", "three"]


def test_a_ledger_that_was_changed_is_refused_in_one_line(tmp_path):
    folder = RunFolder(str(tmp_path), "run")
    assert folder.ledger().committed == 0
    for step in range(3):
        folder.append({"step": step, "generation": 1})
    folder.append({"kind": "cut", "step": 2, "reason": "lost"})
    assert [line["step"] for line in RunFolder(str(tmp_path), "run").ledger_lines()] == [0, 1]
    path = tmp_path / "run" / "ledger.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], lines[1].replace("1", "7", 1), *lines[2:]]) + "\n")
    with pytest.raises(StorageError, match="ledger.jsonl: line 2 is damaged: ") as caught:
        RunFolder(str(tmp_path), "run").ledger()
    assert "\n" not in str(caught.value)
