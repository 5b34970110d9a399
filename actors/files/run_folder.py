"""`runs/<name>/`: what a run leaves behind, on any pyarrow.fs URI.

`ledger.jsonl` is the commit: a line is durable before the step counts, and the file only grows (orchestrator/data/ledger.py). The metrics
of steps that are to be done again are cut off, so that each step stands in them once.
"""

from __future__ import annotations

import fcntl
import json
import os
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from pyarrow import fs

from actors.files import storage
from actors.files.journal import Journal
from orchestrator.data import ledger
from orchestrator.told import lines
from orchestrator.told.lines import Told

CHECKPOINTS, LEDGER, LIVE = "checkpoints", "ledger.jsonl", "live.json"
_PARTIAL_SECONDS = 600.0
"""Nobody takes so long to write a file of this folder."""
IN_USE = "another run with this name is under way; give one of them another run.name"


@dataclass(frozen=True, slots=True)
class Token:
    """A file in a run's folder, with a content that only those know who see that folder. directory: of all runs."""

    directory: str
    path: str
    content: str

    def read(self) -> bool:
        """Whether this process sees it, now."""
        return reads(self.path, self.content)


def reads(path: str, content: str) -> bool:
    """Whether this process sees a file with this content."""
    try:
        return storage.read_bytes(path) == content.encode()
    except storage.StorageError:
        return False


class RunFolder:
    """The folder of one run. Raises StorageError where it cannot be written."""

    def __init__(self, directory: str, name: str):
        self._directory, self.path = directory, storage.join(directory, name)
        self._ledger = Journal(storage.join(self.path, LEDGER), durable=True, alone=True)
        self._newest = ""
        self._metrics = Journal(storage.join(self.path, "metrics.jsonl"))
        self._events = Journal(storage.join(self.path, "events.jsonl"))

    @property
    def checkpoints(self) -> str:
        return storage.join(self.path, CHECKPOINTS)

    @contextmanager
    def held(self) -> Iterator[bool]:
        """Keep other runs out of this folder while the `with` block runs, however the process ends. False where there are no locks, as
        in object stores and on some network file systems. Raises StorageError: another run holds it."""
        system, path = storage.resolve(self.path)
        if not isinstance(system, fs.LocalFileSystem):
            yield False
            return
        try:
            os.makedirs(path, exist_ok=True)
            lock = open(os.path.join(path, ".lock"), "ab")
        except OSError as error:
            raise storage.StorageError(self.path, error.strerror or str(error)) from error
        with lock:
            locked = True
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise storage.StorageError(self.path, IN_USE) from None
            except OSError:
                locked = False
            yield locked

    def write(self, name: str, content: str | bytes) -> str:
        """A whole file, atomically; returns its path."""
        path = storage.join(self.path, name)
        storage.write_atomic(path, content.encode() if isinstance(content, str) else content)
        return path

    def clear_partial(self) -> None:
        """Delete what writers that were killed have left; others may be writing. Raises StorageError."""
        storage.delete_partial(self.path, _PARTIAL_SECONDS)

    def token(self, name: str) -> Token:
        """A new one. Raises StorageError."""
        content = uuid.uuid4().hex
        return Token(self._directory, self.write(name, content), content)

    def ledger(self) -> ledger.Ledger:
        """What is committed. Raises StorageError: it cannot be read, or is not as it was written."""
        try:
            found = ledger.read(self._ledger.lines())
        except ledger.LedgerDamaged as error:
            raise storage.Damaged(storage.join(self.path, LEDGER), str(error)) from None
        self._newest = found.newest
        return found

    def append(self, values: Mapping[str, Any]) -> None:
        """One more line of the ledger, durable when this returns; after `ledger` has been read. Raises StorageError: it is not there;
        Overtaken."""
        line = ledger.chained(values, self._newest)
        self._ledger.append(line)
        self._newest = ledger.line_hash(line)

    def check(self) -> None:
        """Raises Overtaken: another coordinator writes the ledger now. StorageError."""
        self._ledger.check()

    def metrics(self, values: dict[str, Any]) -> None:
        self._metrics.append(json.dumps(values))

    def told(self, event: Told) -> None:
        """One line of `events.jsonl`."""
        self._events.append(json.dumps(lines.to_json(event)))

    def ledger_lines(self) -> list[dict[str, Any]]:
        """Of the committed steps; a line that a crash cut off is none. Raises StorageError."""
        return list(map(dict, self.ledger().steps))

    def trim_metrics(self, step: int) -> list[dict[str, Any]]:
        """Keep the metrics of steps before `step`. Returns the others."""
        written = self._metrics.lines()
        steps = [values for values in _objects(written) if type(values.get("step")) is int]
        kept = [values for values in steps if values["step"] < step]
        if len(kept) == len(written):
            return []
        self._metrics.rewrite([json.dumps(values) for values in kept])
        return [values for values in steps if values["step"] >= step]

    def metric_lines(self) -> list[dict[str, Any]]:
        return _objects(self._metrics.lines())

    def events(self) -> list[Told]:
        """What was told, but for lines that are damaged."""
        return lines.read(_objects(self._events.lines()))

    def close(self) -> None:
        for journal in (self._ledger, self._metrics, self._events):
            journal.close()


def _objects(written: Iterable[str]) -> list[dict[str, Any]]:
    """What lines say, but for those that a crash or a disk has damaged: nothing depends on one of them."""
    found = []
    for line in written:
        try:
            found.append(json.loads(line))
        except (ValueError, RecursionError):
            continue
    return [values for values in found if isinstance(values, dict)]
