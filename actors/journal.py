"""Append-only text files, a JSON object a line, on a disk or in an object store."""

from __future__ import annotations

import os
import time

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
        self._written_at = 0.0

    def append(self, line: str) -> None:
        """Raises StorageError (no space, read-only, ...): then the line does not count."""
        if not self._local:
            self._lines.append(line)
            if self._durable or time.monotonic() - self._written_at > _REWRITE_SECONDS:
                self._put()
            return
        try:
            if self._stream is None:
                self._mend()
                self._stream = open(self._path, "ab", buffering=0)
            self._stream.write(line.encode() + b"\n")
            if self._durable:
                os.fsync(self._stream.fileno())
        except OSError as error:
            raise storage.StorageError(self._uri, error.strerror or str(error)) from error

    def lines(self) -> list[str]:
        """All whole lines; one that a crash cut off is left out."""
        if not storage.exists(self._uri):
            return []
        text = storage.read_bytes(self._uri).decode(errors="replace")
        return text[: text.rfind("\n") + 1].splitlines()

    def rewrite(self, lines: list[str]) -> None:
        """Replace the content, atomically."""
        self.close()
        self._lines = list(lines)
        storage.write_atomic(self._uri, "".join(line + "\n" for line in lines).encode())

    def close(self) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None
        if not self._local and self._lines:
            self._put()

    def _mend(self) -> None:
        """Cut off what a crash left of a line, so that the next one starts on its own."""
        os.makedirs(os.path.dirname(self._path), exist_ok=True)
        if os.path.exists(self._path):
            with open(self._path, "rb+") as stream:
                content = stream.read()
                stream.truncate(content.rfind(b"\n") + 1)

    def _put(self) -> None:
        storage.write_atomic(self._uri, "".join(line + "\n" for line in self._lines).encode())
        self._written_at = time.monotonic()
