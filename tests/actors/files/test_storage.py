from __future__ import annotations

import errno
import os
import pickle
import subprocess
import sys

import pytest

from actors.files import storage
from actors.files.storage import StorageError


@pytest.fixture(params=["path", "uri", "relative"])
def folder(request, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return {"path": str(tmp_path), "uri": tmp_path.as_uri(), "relative": "."}[request.param]


def test_what_is_written_is_read_listed_moved_and_deleted(folder):
    file = storage.join(folder, "a", "b.txt")
    storage.write_atomic(file, b"one")
    storage.write_atomic(file, b"two")
    storage.write_atomic(storage.join(folder, "a", "c", "d"), b"")
    assert storage.read_bytes(file) == b"two" and storage.size(file) == 3
    assert [(e.name, e.bytes, e.is_folder) for e in storage.list_folder(storage.join(folder, "a"), recursive=True)] == [
        ("b.txt", 3, False), ("c", 0, True), ("c/d", 0, False)]
    assert [storage.read_bytes(e.uri) for e in storage.list_folder(storage.join(folder, "a")) if not e.is_folder] == [b"two"]
    storage.move(storage.join(folder, "a"), storage.join(folder, "z"))
    assert storage.exists(storage.join(folder, "z", "b.txt")) and not storage.exists(file)
    storage.delete_tree(storage.join(folder, "z"))
    storage.delete_tree(storage.join(folder, "z"))
    storage.delete(file)
    assert not storage.exists(storage.join(folder, "z"))


def test_names_with_blanks_and_percent_signs(tmp_path):
    for base in (str(tmp_path), tmp_path.as_uri()):
        storage.write_atomic(f"{base}/x", b"1")
    file = str(tmp_path / "a b%20c.txt")
    storage.write_atomic(file, b"2")
    assert "a b%20c.txt" in os.listdir(tmp_path) and storage.read_bytes(file) == b"2"


@pytest.mark.parametrize("action, reason", [
    (lambda d: storage.read_bytes(d + "/none"), "does not exist"), (lambda d: storage.list_folder(d + "/none"), ""),
    (lambda d: storage.size(d), "is a folder"), (lambda d: storage.read_bytes("nosuchscheme://x/y"), ""),
    (lambda d: storage.write_atomic(d + "/file/below", b""), "")])
def test_failures_are_one_line_with_the_uri(tmp_path, action, reason):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError) as caught:
        action(str(tmp_path))
    text = str(caught.value)
    assert caught.value.uri in text and reason in text and "\n" not in text
    assert str(pickle.loads(pickle.dumps(caught.value))) == text


@pytest.mark.parametrize("number, reason", [(errno.ENOSPC, "no space left"), (errno.EACCES, "permission denied")])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, number, reason):
    file = str(tmp_path / "f")
    storage.write_atomic(file, b"old")

    def refuse(descriptor):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(StorageError, match=reason):
        storage.write_atomic(file, b"new")
    assert storage.read_bytes(file) == b"old" and os.listdir(tmp_path) == ["f"]


def test_a_writer_killed_before_the_rename_leaves_the_old_file(tmp_path):
    file = str(tmp_path / "f")
    storage.write_atomic(file, b"old")
    program = ("import os; from actors.files import storage; os.replace = lambda *_: os.kill(os.getpid(), 9); "
               f"storage.write_atomic({file!r}, b'new')")
    assert subprocess.run([sys.executable, "-c", program]).returncode == -9
    assert storage.read_bytes(file) == b"old" and len(os.listdir(tmp_path)) == 2
    storage.delete_partial(str(tmp_path), 60.0)
    assert len(os.listdir(tmp_path)) == 2, "it may be written at this moment"
    storage.delete_partial(str(tmp_path))
    assert os.listdir(tmp_path) == ["f"]


def test_join_refuses_what_would_leave_the_folder():
    with pytest.raises(ValueError, match="not a relative path"):
        storage.join("data", "/etc/passwd")


@pytest.mark.parametrize("count, found", [(3, b"efg"), (7, b"abcdefg"), (100, b"abcdefg")])
def test_the_end_of_a_file(tmp_path, count, found):
    (tmp_path / "file").write_bytes(b"abcdefg")
    assert storage.read_tail(str(tmp_path / "file"), count) == found
