"""Files by path or URI: one small helper over `pyarrow.fs`, so that a run's data may lie on a disk or in an object store.

A URI is a local path (relative or absolute) or anything that pyarrow.fs understands (`file://`, `s3://`, `gs://`, ...).
Every failure is a `StorageError` with the URI and a short reason.
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow
from pyarrow import fs

_REASONS = {errno.ENOENT: "does not exist", errno.EACCES: "permission denied", errno.EPERM: "permission denied",
            errno.EROFS: "read-only file system", errno.ENOSPC: "no space left on device", errno.EDQUOT: "disk quota exceeded",
            errno.ENOTDIR: "a part of the path is not a folder", errno.EISDIR: "is a folder"}
_TEMPORARY = ".partial"


class StorageError(OSError):
    """A file could not be read or written. `str()` is one line: the URI and why."""

    def __init__(self, uri: str, reason: str):
        self.uri, self.reason = uri, reason
        super().__init__(f"{uri}: {reason}")

    def __str__(self) -> str:
        return f"{self.uri}: {self.reason}"

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.uri, self.reason)


class Damaged(StorageError):
    """It was read, and is not as it was written: no second try mends that."""


@dataclass(frozen=True)
class StorageEntry:
    """A file or folder as found in storage. `bytes`: 0 for a folder; `modified`: nanoseconds since the epoch, 0 if unknown."""

    uri: str
    name: str
    bytes: int
    modified: int
    is_folder: bool


def resolve(uri: str) -> tuple[fs.FileSystem, str]:
    """The file system of `uri` and the path within it. Raises StorageError: an unknown scheme, a malformed URI."""
    if "://" not in uri:
        return fs.LocalFileSystem(), os.path.abspath(os.path.expanduser(uri))
    with _errors(uri):
        return fs.FileSystem.from_uri(uri)


def is_local(uri: str) -> bool:
    """Whether it is a path of this host."""
    return isinstance(resolve(uri)[0], fs.LocalFileSystem)


def join(uri: str, *parts: str) -> str:
    """`uri` with further path parts; an absolute part is refused by ValueError since it would leave the folder."""
    for part in parts:
        if part.startswith("/") or "://" in part:
            raise ValueError(f"{part!r} is not a relative path")
        uri = f"{uri.rstrip('/') or '/'}/{part}" if uri != "/" else f"/{part}"
    return uri


def exists(uri: str) -> bool:
    return _info(uri).type != fs.FileType.NotFound


def is_folder(uri: str) -> bool:
    return _info(uri).type == fs.FileType.Directory


def size(uri: str) -> int:
    """Bytes of a file. Raises StorageError when it is missing or a folder."""
    return stat(uri).bytes


def stat(uri: str) -> StorageEntry:
    """A file's entry. Raises StorageError when it is missing or a folder."""
    info = _info(uri)
    if info.type == fs.FileType.NotFound:
        raise StorageError(uri, "does not exist")
    if info.type == fs.FileType.Directory:
        raise StorageError(uri, "is a folder")
    return _entry(uri, info)


def list_folder(uri: str, *, recursive: bool = False) -> list[StorageEntry]:
    """Files and folders below `uri`, sorted by name relative to it. Raises StorageError when it is missing or a file."""
    system, path = resolve(uri)
    with _errors(uri):
        found = system.get_file_info(fs.FileSelector(path, recursive=recursive))
    prefix = path.rstrip("/") + "/"
    entries = []
    for info in found:
        name = info.path.removeprefix(prefix).rstrip("/")
        entries.append(_entry(join(uri, name), info, name))
    return sorted(entries, key=lambda entry: entry.name)


def read_bytes(uri: str) -> bytes:
    with open_input(uri) as stream, _errors(uri):
        return stream.read()


def read_tail(uri: str, count: int) -> bytes:
    """The last `count` bytes, or all there are."""
    with open_input(uri, random_access=True) as stream, _errors(uri):
        stream.seek(max(0, stream.size() - count))
        return stream.read(count)


@contextlib.contextmanager
def open_input(uri: str, *, random_access: bool = False) -> Iterator[pyarrow.NativeFile]:
    """An open file, bytes as stored (no decompression by its name). Raises StorageError when it cannot be opened."""
    system, path = resolve(uri)
    with _errors(uri):
        stream = system.open_input_file(path) if random_access else system.open_input_stream(path, compression=None)
    with stream:
        yield stream


def write_atomic(uri: str, content: bytes | pyarrow.Buffer) -> None:
    """Make `uri` hold `content`: a reader sees the old file or the new one, whole. Folders are made as needed.

    Local: a temporary file beside it, flushed to the disk, then renamed. Elsewhere: a plain put, which object stores make
    visible only when complete.
    """
    system, path = resolve(uri)
    with _errors(uri):
        if isinstance(system, fs.LocalFileSystem):
            _write_local(path, content)
        else:
            with system.open_output_stream(path) as stream:
                stream.write(content)


def delete(uri: str) -> None:
    """Delete a file; one that is missing already is no error."""
    system, path = resolve(uri)
    if exists(uri):
        with _errors(uri):
            system.delete_file(path)


def delete_tree(uri: str) -> None:
    """Delete a folder and all in it; one that is missing already is no error."""
    system, path = resolve(uri)
    if exists(uri):
        with _errors(uri):
            system.delete_dir(path)


def move(source: str, destination: str) -> None:
    """Rename within one file system. Raises StorageError when the two are on different ones."""
    system, path = resolve(source)
    other, target = resolve(destination)
    if not system.equals(other):
        raise StorageError(destination, f"cannot move here from another file system ({source})")
    with _errors(source):
        system.move(path, target)


def delete_partial(folder: str, least_seconds: float = 0.0) -> None:
    """Delete the temporary files that writers killed in `write_atomic` left in a local folder, at least so long ago."""
    if is_folder(folder):
        latest = (time.time() - least_seconds) * 1e9
        for entry in list_folder(folder):
            if entry.name.startswith(".") and entry.name.endswith(_TEMPORARY) and entry.modified <= latest:
                delete(entry.uri)


def _write_local(path: str, content: bytes | pyarrow.Buffer) -> None:
    folder, name = os.path.split(path)
    os.makedirs(folder, exist_ok=True)
    temporary = os.path.join(folder, f".{name}.{os.getpid()}{_TEMPORARY}")
    try:
        with open(temporary, "wb") as stream:
            stream.write(memoryview(content))
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _info(uri: str) -> fs.FileInfo:
    system, path = resolve(uri)
    with _errors(uri):
        return system.get_file_info(path)


def _entry(uri: str, info: fs.FileInfo, name: str | None = None) -> StorageEntry:
    folder = info.type == fs.FileType.Directory
    return StorageEntry(uri, name or info.base_name, 0 if folder else info.size, info.mtime_ns or 0, folder)


@contextlib.contextmanager
def _errors(uri: str) -> Iterator[None]:
    try:
        yield
    except StorageError:
        raise
    except (OSError, pyarrow.ArrowException) as error:
        raise StorageError(uri, _reason(error)) from error


def _reason(error: Exception) -> str:
    number = getattr(error, "errno", None)
    if number in _REASONS:
        return _REASONS[number]
    text = getattr(error, "strerror", None) or str(error)
    return " ".join(text.split())[:300] or type(error).__name__
