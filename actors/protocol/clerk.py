"""Everything that a run writes, by two threads, each in order: the ledger and manifests; journals and other files.

What the state machine orders is answered with Stored, StoreFailed or LineRefused. Everything else (metrics, events, traces) never
stops a run, nor holds it up: that it cannot be written is logged once, and once more when it can again.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from actors.files.journal import Overtaken
from actors.files.run_folder import RunFolder
from actors.files.storage import StorageError
from actors.state import checkpoint
from actors.state.checkpoint import CheckpointError, Manifest
from orchestrator.protocol.events import Ending, LineRefused, Stored, StoreFailed

logger = logging.getLogger(__name__)

MOST_WAITING = 10_000
"""Jobs that nobody waits for: where storage is away for long, further ones are dropped."""
_END_SECONDS = 60.0


class Clerk:
    """folder: of the run, whose ledger has been read. post: what is called with each answer, from a thread of the clerk's."""

    def __init__(self, folder: RunFolder, post: Callable[[object], None]):
        self._folder, self._post = folder, post
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._chores: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._trouble: dict[str, str] = {}
        self._dropped = 0
        self._threads = [threading.Thread(target=_work, args=(jobs,), name=name, daemon=True)
                         for name, jobs in (("clerk", self._jobs), ("chores", self._chores))]
        for thread in self._threads:
            thread.start()

    def append(self, order: int, values: Mapping[str, Any]) -> None:
        """A line of the ledger."""
        def write() -> None:
            try:
                self._folder.append(values)
            except Overtaken as error:
                self._post(LineRefused(order, Ending.SUPERSEDED, str(error)))
            except (StorageError, OSError) as error:
                self._post(StoreFailed(order, str(error)))
            else:
                self._post(Stored(order))
        self._jobs.put(write)

    def manifest(self, order: int, directory: str, manifest: Manifest) -> None:
        """Make a checkpoint count."""
        self._ordered(order, lambda: checkpoint.commit(directory, manifest))

    def discard(self, order: int, directory: str) -> None:
        """Delete a checkpoint, or what there is of it."""
        self._ordered(order, lambda: checkpoint.discard(directory))

    def superseded(self, seconds: float) -> LineRefused | None:
        """Whether another coordinator writes the ledger by now; None: not, or that was not found out in time."""
        answers: queue.SimpleQueue[LineRefused | None] = queue.SimpleQueue()

        def look() -> None:
            try:
                self._folder.check()
            except Overtaken as error:
                answers.put(LineRefused(0, Ending.SUPERSEDED, str(error)))
            except (StorageError, OSError):
                answers.put(None)
            else:
                answers.put(None)
        self._jobs.put(look)
        with contextlib.suppress(queue.Empty):
            return answers.get(timeout=seconds)
        return None

    def chore(self, what: str, job: Callable[[], None]) -> None:
        """Something that nobody waits for; what: a word or two, by which its failures are told."""
        if self._chores.qsize() > MOST_WAITING:
            self._dropped += 1
            return
        self._chores.put(lambda: self._try(what, job))

    def close(self) -> None:
        """Return when everything is written, within a bound: storage may be away."""
        for jobs in (self._jobs, self._chores):
            jobs.put(None)
        until = time.monotonic() + _END_SECONDS
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))
        if any(thread.is_alive() for thread in self._threads):
            logger.error("some of what the run tells is not written: %s does not answer", self._folder.path)
        else:
            with contextlib.suppress(StorageError, OSError):
                self._folder.close()

    # --- inside --------------------------------------------------------------------------------------------------

    def _ordered(self, order: int, job: Callable[[], None]) -> None:
        """Unless another coordinator writes by now: checkpoints are its business then."""
        def carry_out() -> None:
            try:
                self._folder.check()
                job()
            except Overtaken as error:
                self._post(LineRefused(order, Ending.SUPERSEDED, str(error)))
            except (CheckpointError, StorageError, OSError) as error:
                self._post(StoreFailed(order, str(error)))
            else:
                self._post(Stored(order))
        self._jobs.put(carry_out)

    def _try(self, what: str, job: Callable[[], None]) -> None:
        try:
            job()
        except Exception as error:  # whatever it is: the run goes on without it
            if self._trouble.get(what) != str(error):
                self._trouble[what] = str(error)
                logger.error("%s cannot be written: %s", what, error)
            return
        if self._trouble.pop(what, None) is not None:
            dropped, self._dropped = self._dropped, 0
            logger.warning("%s can be written again%s", what, f"; {dropped} lines were dropped meanwhile" if dropped else "")


def _work(jobs: queue.SimpleQueue[Callable[[], None] | None]) -> None:
    while (job := jobs.get()) is not None:
        job()
