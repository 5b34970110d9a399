"""Append-only text files, a JSON object a line, on a disk or in an object store."""

from __future__ import annotations

import contextlib
import os
import time
from typing import BinaryIO

from pyarrow import fs

from actors import storage

_REWRITE_SECONDS = 5.0


class Journal:
    """Lines of one file. `durable`: a line is on the medium when `append` returns.

    Object stores cannot append: there the whole object is put again, at each line where durable, else every few seconds.
    """

    def __init__(self, uri: str, *, durable: bool = False):
        self._uri, self._durable = uri, durable
        system, self._path = storage.resolve(uri)
        self._local = isinstance(system, fs.LocalFileSystem)
        self._stream = None
        self._lines = [] if self._local else self.lines()
        self._unwritten, self._written_at = False, 0.0

    def append(self, line: str) -> None:
        """Raises StorageError (no space, read-only, ...): then the line does not count, and is not in the file."""
        try:
            if self._local:
                self._append_local(line.encode() + b"\n")
            else:
                self._append_remote(line)
        except storage.StorageError:
            raise
        except OSError as error:
            raise storage.StorageError(self._uri, error.strerror or str(error)) from error

    def lines(self) -> list[str]:
        """All whole lines; one that a crash cut off is left out."""
        if not storage.exists(self._uri):
            return []
        text = storage.read_bytes(self._uri).decode(errors="replace")
        return text.split("\n")[:-1]

    def rewrite(self, lines: list[str]) -> None:
        """Replace the content, atomically."""
        self.close()
        storage.write_atomic(self._uri, _content(lines))
        self._lines = [] if self._local else list(lines)

    def close(self) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None
        if self._unwritten:
            self._put(self._lines)

    def _append_local(self, content: bytes) -> None:
        if self._stream is None:
            self._stream = self._open()
        before = os.fstat(self._stream.fileno()).st_size
        try:
            while content:  # a disk that is nearly full takes a part without an error
                content = content[self._stream.write(content) :]
            if self._durable:
                os.fsync(self._stream.fileno())
        except OSError:
            with contextlib.suppress(OSError):
                self._stream.truncate(before)
            raise

    def _append_remote(self, line: str) -> None:
        if self._durable or time.monotonic() - self._written_at > _REWRITE_SECONDS:
            self._put([*self._lines, line])
        else:
            self._unwritten = True
        self._lines.append(line)

    def _open(self) -> BinaryIO:
        """Open for appending, on a line of its own: what a crash left of a line is cut off."""
        folder = os.path.dirname(self._path)
        os.makedirs(folder, exist_ok=True)
        stream = open(self._path, "ab+", buffering=0)
        stream.seek(0)
        stream.truncate(stream.read().rfind(b"\n") + 1)
        if self._durable:
            _flush(folder)
        return stream

    def _put(self, lines: list[str]) -> None:
        storage.write_atomic(self._uri, _content(lines))
        self._unwritten, self._written_at = False, time.monotonic()


def _flush(folder: str) -> None:
    """A new file survives a power cut once its folder is on the medium, too."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _content(lines: list[str]) -> bytes:
    return "".join(line + "\n" for line in lines).encode()
