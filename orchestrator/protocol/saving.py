"""Checkpoints: begun between two steps, written by the ranks beside the training, made to count when all of it is there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from orchestrator.protocol.commands import Collect, Discard, Snapshot, WriteManifest
from orchestrator.protocol.events import CallId, Ending, FailKind, Seen
from orchestrator.protocol.members import Member
from orchestrator.protocol.phases import Phase
from orchestrator.told.kinds import CheckpointFailed, CheckpointNotDeleted, CheckpointWritten

if TYPE_CHECKING:
    from orchestrator.protocol.run import Run

SAVE = "save"


class Saver:
    """One checkpoint at a time. trouble: why the last one could not be written; empty: it could."""

    def __init__(self) -> None:
        self.deadline: float | None = None
        self.trouble = ""
        self._calls: dict[CallId, Member] = {}
        self._collected: list[CallId] = []
        self._seen: Seen | None = None
        self._order: int | None = None
        self._discards: dict[int, Seen] = {}
        self._doubted: dict[int, tuple[Seen, float]] = {}
        self._since = 0.0
        self._failure: tuple[str, bool] | None = None
        self._failing_since: float | None = None
        self._failed_at = 0.0

    @property
    def busy(self) -> bool:
        return self._seen is not None

    def clearing(self, step: int) -> bool:
        """Whether what there was of a checkpoint of that step is being deleted, or its manifest may still be written: another one may not
        begin there yet."""
        return any(seen.step == step for seen in (*self._discards.values(), *(seen for seen, _ in self._doubted.values())))

    def waits_for(self, call: CallId) -> bool:
        return call in self._calls

    def waits_for_member(self, member: Member) -> bool:
        """Whether it still writes."""
        return member in self._calls.values()

    def put_off(self, seconds: float) -> None:
        """This side was away: nothing of that counts."""
        if self.deadline is not None:
            self.deadline += seconds
        if self._failing_since is not None:
            self._failing_since, self._failed_at = self._failing_since + seconds, self._failed_at + seconds

    def begin(self, run: Run, seen: Seen, since: float) -> None:
        """All ranks have copied their state."""
        self._open(run, seen, since, run.seated)

    def broken_off(self, run: Run, seen: Seen, since: float, members: Sequence[Member]) -> None:
        """Not all could: it will not count. members: may have begun to write, and are waited for before that is deleted."""
        self._failure = "somebody was lost, or failed, while state was copied", True
        self._open(run, seen, since, members)
        self._settle(run)

    def _open(self, run: Run, seen: Seen, since: float, members: Sequence[Member]) -> None:
        self._seen, self._order, self._since = seen, None, since
        request = Collect(seen.directory, seen.step)
        self._calls = {run.call(member, request): member for member in members}
        self._collected = []
        self.deadline = run.now + run.bounds.files

    def answered(self, run: Run, call: CallId) -> None:
        del self._calls[call]
        self._collected.append(call)
        if self._failure is not None:
            self._settle(run)
        elif not self._calls:
            self._order = run.new_order()
            run.order(WriteManifest(self._order, self._seen.directory, self._seen.step, tuple(self._collected)))
            self.deadline = run.now + run.bounds.storage
            run.phase.changed(run)

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
        if self._order is not None:  # all pieces are there: if the manifest is written after all, it counts
            self._doubted[self._order] = self._seen, self._since
            return self._tell_failed(run, f"its manifest was not written within {run.bounds.storage:g} s", lost=False)
        self._calls.clear()
        self._failure = self._failure or (f"not written within {run.bounds.files:g} s", False)
        return self._settle(run)

    def _settle(self, run: Run) -> None:
        if not self._calls:
            (text, lost), self._failure = self._failure, None
            self._discard(run, self._seen)
            self._tell_failed(run, text, lost=lost)

    def stored(self, run: Run, order: int) -> None:
        if order == self._order:
            seen, self._seen, self.deadline, self._order = self._seen, None, None, None
            self._counts(run, seen, self._since)
        elif order in self._doubted:
            self._counts(run, *self._doubted.pop(order))
        elif self._discards.pop(order, None) is not None:
            run.phase.changed(run)

    def not_stored(self, run: Run, order: int, text: str) -> None:
        if order == self._order:
            self._discard(run, self._seen)
            self._tell_failed(run, text, lost=False)
        elif order in self._doubted:
            self._discard(run, self._doubted.pop(order)[0])
        elif (seen := self._discards.pop(order, None)) is not None:
            run.tell(CheckpointNotDeleted(seen.step, text))
            run.phase.changed(run)

    def _counts(self, run: Run, seen: Seen, since: float) -> None:
        self.trouble, self._failing_since = "", None
        run.checkpoints = [*(other for other in run.checkpoints if other.directory != seen.directory), seen]
        run.tell(CheckpointWritten(seen.step, seen.directory, round(run.now - since, 3)))
        self._prune(run)
        run.phase.changed(run)

    def abandon(self, run: Run, step: int) -> None:
        """The state is that of `step` steps now: what is being written of later ones is of no use."""
        for order in [order for order, (seen, _) in self._doubted.items() if seen.step > step]:
            self._discard(run, self._doubted.pop(order)[0])
        if self._seen is not None and self._seen.step > step:
            self._discard(run, self._seen)
            self._over()

    def committed(self) -> None:
        """A line has been written: storage is there."""
        self._failing_since = None

    def pause(self, run: Run) -> float:
        """Seconds until it is worth trying again."""
        return 0.0 if not self.trouble else max(0.0, self._failed_at + 1.0 - run.now)

    def hopeless(self, run: Run) -> bool:
        """Whether storage has been away for longer than it may, as far as was tried: a recovery may have taken long meanwhile."""
        return self._failing_since is not None and self._failed_at - self._failing_since > run.bounds.storage

    def _tell_failed(self, run: Run, text: str, *, lost: bool) -> None:
        seen = self._seen
        self._over()
        if lost:
            run.due.add(SAVE)
        else:
            self.trouble, self._failed_at = text, run.now
            self._failing_since = run.now if self._failing_since is None else self._failing_since
        run.tell(CheckpointFailed(seen.step, text))
        run.phase.changed(run)

    def _over(self) -> None:
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
        self._seen = Seen(run.committed, f"{run.goal.folder}/step-{run.committed:08d}")
        request = Snapshot(self._seen.directory, self._seen.step)
        self.ask(run, run.seated, lambda member: request, run.bounds.step)

    def interrupted(self, run: Run) -> None:
        run.broken_off = self._seen, self.since, run.seated

    def done(self, run: Run) -> None:
        run.due.discard(SAVE)
        run.saver.begin(run, self._seen, self.since)
        run.go_on()


class AwaitingSave(Phase):
    """There is nothing left to do but to save."""

    name = "awaiting save"

    def enter(self, run: Run) -> None:
        self.deadline = run.now + run.bounds.files + run.bounds.storage

    def late(self, run: Run) -> None:
        ending, text = run.ending or (Ending.STORAGE, "")
        run.end(ending, "; ".join(filter(None, (text, f"storage does not answer for {run.now - self.since:.0f} s"))))

    def changed(self, run: Run) -> None:
        if not run.saver.busy and not run.saver.clearing(run.committed):
            run.go_on()
