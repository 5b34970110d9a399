"""Checkpoints from the coordinator's side: begun between two steps, written by the ranks beside the training, made to count when
all of it is there."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass

from actors import checkpoint
from actors.formation import Formation
from actors.ranks import Pending, RankFailed
from actors.run_folder import RunFolder
from actors.storage import StorageError
from orchestrator.config import RunConfig


@dataclass(frozen=True)
class _UnderWay:
    """A checkpoint that ranks are writing: the state after `step` steps."""

    step: int
    directory: str
    pieces: Pending
    since: float


class Saver:
    """One checkpoint at a time. tell(kind, **details): an event. `wanted`: one is due, or failed and is to be made up for."""

    def __init__(self, config: RunConfig, formation: Formation, folder: RunFolder, tell: Callable[..., None]):
        self._config, self._formation, self._folder, self._tell = config, formation, folder, tell
        self._under_way: _UnderWay | None = None
        self.wanted = False

    @property
    def busy(self) -> bool:
        return self._under_way is not None

    @property
    def newest_step(self) -> int | None:
        """Of the newest checkpoint, be it complete or being written."""
        if self._under_way is not None:
            return self._under_way.step
        found = checkpoint.complete(self._folder.checkpoints)
        return checkpoint.read_manifest(found[-1]).step if found else None

    def begin(self, step: int) -> None:
        """A checkpoint of the state after `step` steps, which all ranks have applied; the writing goes on beside the training.

        Raises RankFailed.
        """
        self.collect(wait=True)
        self.wanted = False
        directory = checkpoint.folder(self._folder.checkpoints, step)
        self._formation.everywhere("snapshot", directory)
        pieces = self._formation.crew.start("saved", [()] * self._formation.layout.size)
        self._under_way = _UnderWay(step, directory, pieces, time.perf_counter())

    def collect(self, *, wait: bool, last: bool = False) -> None:
        """Make a finished checkpoint count. One that failed is dropped and told.

        Raises, if it is the last one, RankFailed: whoever wrote a part of it was lost; CheckpointError: it cannot be written.
        """
        if self._under_way is None:
            return
        saving = self._under_way
        try:
            if not (wait or saving.pieces.done()):
                return
            self._commit(saving)
        except (RankFailed, checkpoint.CheckpointError) as error:
            self._drop(saving)
            lost = isinstance(error, RankFailed) and error.lost
            self.wanted |= lost
            self._tell("checkpoint_failed", step=saving.step, reason=str(error))
            if last and lost:
                raise
            if last:
                raise checkpoint.CheckpointError(f"no checkpoint of step {saving.step}: {error}") from error
            return
        self._under_way = None
        self._tell("checkpoint", step=saving.step, path=saving.directory, seconds=round(time.perf_counter() - saving.since, 3))
        try:
            checkpoint.prune(self._folder.checkpoints, self._config.checkpoint.keep)
        except StorageError as error:
            self._tell("checkpoint_not_deleted", reason=str(error))

    def abandon(self) -> None:
        """What is being written is of no use: the state is an earlier one now."""
        if self._under_way is not None:
            self._drop(self._under_way)

    def _commit(self, saving: _UnderWay) -> None:
        found = saving.pieces.results(self._config.training.step_timeout_seconds, self._formation.crew.check)
        pieces = tuple(piece for of_rank in found for piece in of_rank)
        model = self._config.model.model_dump(mode="json")
        checkpoint.commit(saving.directory, checkpoint.Manifest(saving.step, model, self._config.training.dtype, pieces))

    def _drop(self, saving: _UnderWay) -> None:
        self._under_way = None
        with contextlib.suppress(StorageError):  # what is left of it does not count, and the next start clears it
            checkpoint.discard(saving.directory)
