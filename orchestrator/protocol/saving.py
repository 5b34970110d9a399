"""Checkpoints: begun between two steps, written by the ranks beside the training, made to count when all of it is there."""

from __future__ import annotations

from typing import TYPE_CHECKING

from orchestrator.membership import Member
from orchestrator.protocol.commands import Collect, Discard, Snapshot, WriteManifest
from orchestrator.protocol.events import CallId, FailKind, Seen
from orchestrator.protocol.phases import Phase

if TYPE_CHECKING:
    from orchestrator.protocol.run import Run

SAVE = "save"


class Saver:
    """One checkpoint at a time. trouble: why the last one could not be written; empty: it could."""

    def __init__(self) -> None:
        self.deadline: float | None = None
        self.trouble = ""
        self._calls: dict[CallId, Member] = {}
        self._members: tuple[Member, ...] = ()
        self._seen: Seen | None = None
        self._order: int | None = None
        self._discards: dict[int, Seen] = {}
        self._since = 0.0
        self._failure: tuple[str, bool] | None = None
        self._failing_since: float | None = None
        self._failed_at = 0.0

    @property
    def busy(self) -> bool:
        return self._seen is not None

    def clearing(self, step: int) -> bool:
        """Whether what there was of a checkpoint of that step is being deleted: another one may not begin there yet."""
        return any(seen.step == step for seen in self._discards.values())

    def waits_for(self, call: CallId) -> bool:
        return call in self._calls

    def begin(self, run: Run, seen: Seen, since: float) -> None:
        """All ranks have copied their state."""
        self._seen, self._members, self._order, self._since = seen, run.seated, None, since
        request = Collect(seen.directory, seen.step)
        self._calls = {run.call(member, request): member for member in run.seated}
        self.deadline = run.now + run.bounds.files

    def answered(self, run: Run, call: CallId) -> None:
        del self._calls[call]
        if self._failure is not None:
            self._settle(run)
        elif not self._calls:
            self._order = run.new_order()
            run.order(WriteManifest(self._order, self._seen.directory, self._seen.step))

    def failed(self, run: Run, call: CallId, kind: FailKind, text: str) -> None:
        """One could not write its part. The others are waited for: what they still write would stay behind."""
        del self._calls[call]
        self._failure = self._failure or (text, kind in (FailKind.GONE, FailKind.ABORTED))
        self._settle(run)

    def look(self, run: Run) -> None:
        """Whoever still writes a part of it may be lost."""
        if self._calls and (dead := run.dead(self._calls.values())):
            self._calls = {call: member for call, member in self._calls.items() if member not in dead}
            self._failure = self._failure or (f"{dead[0]}: its process or node was lost", True)
            self._settle(run)

    def late(self, run: Run) -> None:
        self._calls.clear()
        self._failure = self._failure or (f"not written within {run.bounds.files:g} s", False)
        self._settle(run)

    def _settle(self, run: Run) -> None:
        if not self._calls:
            (text, lost), self._failure = self._failure, None
            self._fail(run, text, lost=lost)

    def stored(self, run: Run, order: int) -> None:
        if order == self._order:
            seen, self._seen, self.deadline, self._order = self._seen, None, None, None
            self.trouble, self._failing_since = "", None
            run.checkpoints = [*(other for other in run.checkpoints if other.directory != seen.directory), seen]
            run.tell("checkpoint", step=seen.step, path=seen.directory, seconds=round(run.now - self._since, 3))
            self._prune(run)
            run.phase.changed(run)
        elif self._discards.pop(order, None) is not None:
            run.phase.changed(run)

    def not_stored(self, run: Run, order: int, text: str) -> None:
        if order == self._order:
            self._fail(run, text, lost=False)
        elif (seen := self._discards.pop(order, None)) is not None:
            run.tell("checkpoint_not_deleted", step=seen.step, reason=text)
            run.phase.changed(run)

    def abandon(self, run: Run) -> None:
        """What is being written is of no use: the state is an earlier one now."""
        if self._seen is not None:
            self._drop(run)

    def committed(self) -> None:
        """A line has been written: storage is there."""
        self._failing_since = None

    def pause(self, run: Run) -> float:
        """Seconds until it is worth trying again."""
        return 0.0 if not self.trouble else max(0.0, self._failed_at + 1.0 - run.now)

    def hopeless(self, run: Run) -> bool:
        """Whether storage has been away for longer than it may."""
        return self._failing_since is not None and run.now - self._failing_since > run.bounds.storage

    def _fail(self, run: Run, text: str, *, lost: bool) -> None:
        seen = self._seen
        self._drop(run)
        if lost:
            run.due.add(SAVE)
        else:
            self.trouble, self._failed_at = text, run.now
            self._failing_since = run.now if self._failing_since is None else self._failing_since
        run.tell("checkpoint_failed", step=seen.step, reason=text)
        run.phase.changed(run)

    def _drop(self, run: Run) -> None:
        self._discard(run, self._seen)
        self._seen, self._calls, self._order, self.deadline, self._failure = None, {}, None, None, None

    def _discard(self, run: Run, seen: Seen) -> None:
        order = run.new_order()
        self._discards[order] = seen
        run.order(Discard(order, seen.directory))

    def _prune(self, run: Run) -> None:
        """All but the newest that can be read, as many as are to be kept."""
        readable = sorted((seen for seen in run.checkpoints if seen.readable), key=lambda seen: seen.step)
        kept = readable[-run.goal.keep:]
        if len(kept) == run.goal.keep:
            for seen in [seen for seen in run.checkpoints if seen not in kept and seen.step < kept[0].step]:
                run.checkpoints.remove(seen)
                self._discard(run, seen)


class Snapshotting(Phase):
    """Everybody copies what it is first owner of, and begins to write it."""

    name = "snapshotting"

    def enter(self, run: Run) -> None:
        run.due.discard(SAVE)
        self._seen = Seen(run.committed, f"{run.goal.folder}/step-{run.committed:08d}")
        request = Snapshot(self._seen.directory, self._seen.step)
        self.ask(run, run.seated, lambda member: request, run.bounds.step)

    def done(self, run: Run) -> None:
        run.saver.begin(run, self._seen, self.since)
        run.go_on()


class AwaitingSave(Phase):
    """There is nothing left to do but to save."""

    name = "awaiting save"

    def changed(self, run: Run) -> None:
        if not run.saver.busy and not run.saver.clearing(run.committed):
            run.go_on()
