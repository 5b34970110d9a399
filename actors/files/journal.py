"""Append-only text files, a JSON object a line, on a disk or in an object store."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import time
from collections.abc import Iterator
from typing import BinaryIO

from pyarrow import fs

from actors.files import storage

_REWRITE_SECONDS = 5.0
_LOCK_SECONDS, _POLL_SECONDS = 2.0, 0.02


class Overtaken(storage.StorageError):
    """Somebody else has written to the file since it was read here."""

    def __init__(self, uri: str):
        super().__init__(uri, "another process has written to it: it has taken this run over")


class Journal:
    """Lines of one file. `durable`: a line is on the medium when `append` returns. `alone`: there is one writer; whoever finds that
    the file has grown by somebody else's hand since it was read here writes no more. In object stores that is looked for before a put,
    which leaves a gap of milliseconds; on a disk it is certain.

    Object stores cannot append: there the whole object is put again, at each line where durable, else every few seconds.
    """

    def __init__(self, uri: str, *, durable: bool = False, alone: bool = False):
        self._uri, self._durable, self._alone = uri, durable, alone
        system, self._path = storage.resolve(uri)
        self._local = isinstance(system, fs.LocalFileSystem)
        self._stream = None
        self._size: int | None = None
        self._doubtful = b""
        self._unwritten, self._written_at = False, 0.0
        self._lines = [] if self._local else self.lines()

    def append(self, line: str) -> None:
        """Raises StorageError (no space, read-only, ...): then the line does not count, and is not in the file; Overtaken."""
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
        if self._unwritten:
            self._put(self._lines)
        if not storage.exists(self._uri):
            self._expect(0)
            return []
        content = storage.read_bytes(self._uri)
        whole = content[: content.rfind(b"\n") + 1]
        self._expect(len(whole))
        return whole.decode(errors="replace").split("\n")[:-1]

    def rewrite(self, lines: list[str]) -> None:
        """Replace the content, atomically."""
        self.close()
        content = _content(lines)
        storage.write_atomic(self._uri, content)
        self._lines, self._size = [] if self._local else list(lines), len(content)

    def close(self) -> None:
        self._let_go()
        if self._unwritten:
            self._put(self._lines)

    # --- inside --------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Raises Overtaken: somebody else has written since this one did, or read. StorageError: nobody can tell."""
        try:
            if not self._local:
                self._refuse_overtaken(self._found())
            elif self._size is not None:
                with self._at_its_end():
                    pass
        except OSError as error:
            raise error if isinstance(error, storage.StorageError) else storage.StorageError(self._uri, str(error)) from error

    def _found(self) -> int:
        """Bytes of the object. Raises StorageError: it was there, and is not."""
        return storage.size(self._uri) if self._size or storage.exists(self._uri) else 0

    def _refuse_overtaken(self, found: int) -> None:
        if self._size is not None and found not in (self._size, self._size + len(self._doubtful)):
            raise Overtaken(self._uri)

    def _expect(self, size: int) -> None:
        """What the file was when it was first read; what is read later changes nothing about who wrote it."""
        if self._size is None:
            self._size = size

    def _append_local(self, content: bytes) -> None:
        with self._at_its_end() as (stream, before):
            whole, self._doubtful = content, content
            try:
                while content:  # a disk that is nearly full takes a part without an error
                    content = content[stream.write(content) :]
                if self._durable:
                    os.fsync(stream.fileno())
            except OSError:
                with contextlib.suppress(OSError):
                    stream.truncate(before)
                raise
            self._size, self._doubtful = before + len(whole), b""

    @contextlib.contextmanager
    def _at_its_end(self) -> Iterator[tuple[BinaryIO, int]]:
        """The file that is at the path now, locked where there is one writer, and its size. After an error the next one opens it anew:
        a handle of a file system that was away may be of no use for ever."""
        if self._stream is not None and not self._is_at_the_path(self._stream):
            self._let_go()
        if self._stream is None:
            self._stream = self._open()
        try:
            with _locked(self._stream, self._uri) if self._alone else contextlib.nullcontext():
                yield self._stream, self._checked(self._stream)
        except OSError:
            self._let_go()
            raise

    def _is_at_the_path(self, stream: BinaryIO) -> bool:
        """What was deleted takes lines still, and nobody ever reads them."""
        try:
            return os.path.samestat(os.fstat(stream.fileno()), os.stat(self._path))
        except OSError:
            return False

    def _let_go(self) -> None:
        if self._stream is not None:
            with contextlib.suppress(OSError):  # each line was written when `append` returned
                self._stream.close()
            self._stream = None

    def _checked(self, stream: BinaryIO) -> int:
        """The file's size, as it should be. What an append of ours that failed has left is cut off. Raises Overtaken."""
        size = os.fstat(stream.fileno()).st_size
        if not self._alone or self._size is None or size == self._size:
            return size
        stream.seek(self._size)
        if size < self._size or not self._doubtful.startswith(stream.read()):
            raise Overtaken(self._uri)
        stream.truncate(self._size)
        return self._size

    def _append_remote(self, line: str) -> None:
        if self._durable or time.monotonic() - self._written_at > _REWRITE_SECONDS:
            self._put([*self._lines, line])
        else:
            self._unwritten = True
        self._lines.append(line)

    def _open(self) -> BinaryIO:
        """Open for appending, on a line of its own: what a crash left of a line is cut off. What was there and is not is not begun anew
        where it is a record: lines without those before them would be another's."""
        folder = os.path.dirname(self._path)
        if self._alone and self._size and not os.path.exists(self._path):
            raise FileNotFoundError(errno.ENOENT, "it was there, and is not any more")
        os.makedirs(folder, exist_ok=True)
        stream = open(self._path, "ab+", buffering=0)
        with _locked(stream, self._uri) if self._alone else contextlib.nullcontext():
            stream.seek(0)
            whole = stream.read().rfind(b"\n") + 1
            stream.truncate(whole)
        self._expect(whole)
        if self._durable:
            _flush(folder)
        return stream

    def _put(self, lines: list[str]) -> None:
        content = _content(lines)
        if self._alone:
            self._refuse_overtaken(self._found())
            self._doubtful = content[self._size or 0 :]
        storage.write_atomic(self._uri, content)
        self._size, self._doubtful = len(content), b""
        self._unwritten, self._written_at = False, time.monotonic()


@contextlib.contextmanager
def _locked(stream: BinaryIO, uri: str) -> Iterator[None]:
    """Between looking and writing nobody else writes, where the file system has locks. Raises StorageError: whoever has the lock does
    not let go, as a writer that was frozen in the middle."""
    locked, deadline = False, time.monotonic() + _LOCK_SECONDS
    while not locked:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            locked = True
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise storage.StorageError(uri, f"another process has had it locked for {_LOCK_SECONDS:g} s") from None
            time.sleep(_POLL_SECONDS)
        except OSError:
            break
    try:
        yield
    finally:
        if locked:
            fcntl.flock(stream, fcntl.LOCK_UN)


def _flush(folder: str) -> None:
    """A new file survives a power cut once its folder is on the medium, too."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _content(lines: list[str]) -> bytes:
    return "".join(line + "\n" for line in lines).encode()
