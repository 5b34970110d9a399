"""What a run does at a time: what is waited for, what follows, and what it means when that takes too long.

    opening      processes say hello, the ledger learns of this coordinator    -> recalling
    fetching batch, stepping, committing          a step: read, computed, durable    -> the next thing
    applying, placing, rearranging, evaluating, snapshotting    what is due between two steps    -> the next thing
    waiting for nodes, awaiting save, awaiting checkpoint, pausing, recording    as they say    -> where they were

    trouble, whatever the phase:
    letting go -> recalling [-> probing] -> finishing [-> greeting] -> moving    with the state of the base
                                         -> forming -> loading                   with a checkpoint, or initial values
    and so for those who join and nodes that drain, from (greeting or) finishing on. All end at the next thing: stepping.next_step.

A phase changes the run by its public methods only, and goes over to the next one by `run.enter`. Those here wait; the others are in
recovering.py (trouble and take-over), changing.py (generations), stepping.py (steps) and saving.py (checkpoints, which are written
beside all others). A phase hears of the loss of those that it says are `involved`; most need all who serve, so that the default does.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from math import inf
from typing import TYPE_CHECKING

from orchestrator.protocol.commands import EpochLine, Line, Request
from orchestrator.protocol.events import Answer, Answered, CallId, Ending, Failed, Heard, LetGo, PlacementFound
from orchestrator.protocol.members import Member
from orchestrator.told.kinds import CoordinatorRestarted, NodesAwaited, StorageAway

if TYPE_CHECKING:
    from orchestrator.protocol.run import Run


_LEDGER_SECONDS = 10.0
"""Storage that has not taken a line by then is said to be away."""


class Phase:
    """calls: open ones, by number. answers: that have come. deadline: when `late` is due. order: something is being written.
    first_call: the least number that its calls may have."""

    name = "nothing"

    def __init__(self) -> None:
        self.calls: dict[CallId, Member] = {}
        self.answers: dict[Member, Answer] = {}
        self.deadline: float | None = None
        self.order: int | None = None
        self.since, self.first_call = 0.0, 0

    def enter(self, run: Run) -> None:
        """The first thing that happens in it."""

    def ask(self, run: Run, members: Iterable[Member], request: Callable[[Member], Request], seconds: float) -> None:
        """Call these; `done` when all have answered, `late` after so many seconds."""
        self.deadline = run.now + seconds
        for member in members:
            self.calls[run.call(member, request(member))] = member
        if not self.calls:
            self.deadline = None
            self.done(run)

    def involved(self, run: Run) -> Iterable[Member]:
        """Without whom it cannot go on."""
        return dict.fromkeys([*run.seated, *self.calls.values(), *self.answers])

    # --- what may happen ---------------------------------------------------------------------------------------------

    def answered(self, run: Run, event: Answered) -> None:
        self.answers[self.calls.pop(event.call)] = event.value
        if not self.calls:
            self.deadline = None
            self.done(run)

    def failed(self, run: Run, event: Failed) -> None:
        self.calls.pop(event.call)
        run.trouble(event.member, event.text)

    def done(self, run: Run) -> None:
        """All have answered."""

    def lost(self, run: Run, dead: Sequence[Member]) -> None:
        """Some of those involved are."""
        run.trouble(dead[0], "its process or node was lost")

    def late(self, run: Run) -> None:
        """The deadline has passed."""
        member = next(iter(self.calls.values()), None)
        run.trouble(member, f"no answer within {run.now - self.since:.0f} s")

    def without(self, run: Run, members: Collection[Member]) -> None:
        """Nobody waits for these any more."""
        self.calls = {call: member for call, member in self.calls.items() if member not in members}
        if not self.calls:
            self.deadline = None
            self.done(run)

    def interrupted(self, run: Run) -> None:
        """Trouble ends it."""

    def put_off(self, seconds: float) -> None:
        """This side was away: nothing of that counts."""
        self.since += seconds
        if self.deadline is not None:
            self.deadline += seconds

    def let_go(self, run: Run, event: LetGo) -> None:
        pass

    def stored(self, run: Run) -> None:
        pass

    def not_stored(self, run: Run, text: str) -> None:
        pass

    def refused(self, run: Run, ending: Ending, text: str) -> None:
        pass

    def batch_ready(self, run: Run) -> None:
        pass

    def batch_failed(self, run: Run, text: str) -> None:
        pass

    def placement_found(self, run: Run, event: PlacementFound) -> None:
        pass

    def stop_asked(self, run: Run) -> None:
        pass

    def said_hello(self, run: Run, member: Member) -> None:
        pass

    def heard(self, run: Run, event: Heard) -> None:
        pass

    def changed(self, run: Run) -> None:
        """Somebody came or went, or time did."""


class Opening(Phase):
    """The first: the ledger learns of this coordinator, and the processes that there are say hello."""

    name = "opening"

    def __init__(self, members: Sequence[Member], seconds: float):
        super().__init__()
        self._waiting, self._seconds, self._written, self._text = set(members), seconds, False, ""

    def enter(self, run: Run) -> None:
        self._end, self._given_up = run.now + self._seconds, run.now + run.bounds.storage
        self._told = min(run.now + _LEDGER_SECONDS, self._given_up)
        self._write(run)

    def put_off(self, seconds: float) -> None:
        super().put_off(seconds)
        self._end += seconds
        self._given_up += seconds
        self._told += seconds
        self._again += seconds

    def involved(self, run: Run) -> Iterable[Member]:
        return ()

    def stored(self, run: Run) -> None:
        self._written, self.order = True, None
        run.forget_told("storage")
        self._go_on(run)

    def not_stored(self, run: Run, text: str) -> None:
        self.order, self._text = None, text
        if run.now >= self._given_up:
            return run.end(Ending.STORAGE, text)
        run.tell_once(StorageAway(text), "storage", True)
        self._again = run.now + run.bounds.first_pause * 10
        return self._wait(run)

    def changed(self, run: Run) -> None:
        self._go_on(run)

    def late(self, run: Run) -> None:
        if not self._written:
            unanswered = f"the ledger does not answer for {run.now - self.since:.0f} s"
            if run.now >= self._given_up:
                return run.end(Ending.STORAGE, self._text or unanswered)
            if self.order is None and run.now >= self._again:
                self._write(run)
            elif self.order is not None and run.now >= self._told:
                run.tell_once(StorageAway(unanswered), "storage", True)
                self._told = self._given_up
        if run.now >= self._end:
            self._without_those_who_wait(run)
        return self._go_on(run)

    def _write(self, run: Run) -> None:
        self._again = run.now
        self.order = run.append(EpochLine(run.epoch))
        self._wait(run)

    def _wait(self, run: Run) -> None:
        """Until something is due: a hello, a line that was not written, one of which nothing is heard."""
        due = [self._end] if self._waiting else []
        if not self._written:
            due.append(min(self._given_up, self._again if self.order is None else self._told))
        self.deadline = min(due, default=None)

    def _without_those_who_wait(self, run: Run) -> None:
        for member in sorted(self._waiting):
            if run.left_behind:  # it may only have been asked for just before
                run.still_starts(member)
            else:
                run.lose(member, f"did not say hello within {self._seconds:g} s", fence=True)
        self._waiting.clear()

    def _go_on(self, run: Run) -> None:
        self._waiting = {member for member in self._waiting if not run.trusts(member) and run.membership.may_come(member)}
        if self._waiting or not self._written:
            return self._wait(run)
        run.roll_called = True
        from orchestrator.protocol.recovering import Recalling
        if run.left_behind:
            run.tell(CoordinatorRestarted(run.committed, len(run.membership.ready_members())))
        return run.enter(Recalling())


class Recording(Phase):
    """A line of the ledger besides those of steps. Tried again until it is there, but not for ever."""

    name = "recording"

    def __init__(self, line: Line, then: Callable[[Run], None]):
        super().__init__()
        self._line, self._then, self._pause, self._more = line, then, None, 0.0

    def enter(self, run: Run) -> None:
        self._write(run)

    def _write(self, run: Run) -> None:
        self.order = run.append(self._line)
        told_after = min(_LEDGER_SECONDS, run.bounds.storage)
        self.deadline, self._more = run.now + told_after, run.bounds.storage - told_after

    def lost(self, run: Run, dead: Sequence[Member]) -> None:
        pass  # ranks do nothing now; whether the line is there must be known first

    def stored(self, run: Run) -> None:
        self.order = self.deadline = None
        run.forget_told("storage")
        self._then(run)

    def not_stored(self, run: Run, text: str) -> None:
        self.order = self.deadline = None
        if run.now - self.since > run.bounds.storage:
            return self.give_up(run, text)
        run.tell_once(StorageAway(text), "storage", True)
        self._pause = min(run.bounds.last_pause / 10, 2 * (self._pause or run.bounds.first_pause / 2))
        self.deadline = run.now + self._pause
        return None

    def give_up(self, run: Run, text: str) -> None:
        run.end(Ending.STORAGE, f"the ledger could not be written for {run.now - self.since:.0f} s: {text}")

    def late(self, run: Run) -> None:
        if self.order is not None and self._more > 0:
            run.tell_once(StorageAway(f"the ledger does not answer for {run.now - self.since:.0f} s"), "storage", True)
            self.deadline, self._more = run.now + self._more, 0.0
            return None
        if self.order is not None:  # whether it is there nobody knows: nothing may follow
            return run.end(Ending.STORAGE, f"the ledger does not answer for {run.now - self.since:.0f} s")
        return self._write(run)


class Pausing(Phase):
    """Nothing, for a while."""

    name = "pausing"

    def __init__(self, seconds: float, then: Callable[[Run], None]):
        super().__init__()
        self._seconds, self._then = seconds, then

    def enter(self, run: Run) -> None:
        self.deadline = run.now + self._seconds

    def late(self, run: Run) -> None:
        self._then(run)


class WaitingForNodes(Phase):
    """There are fewer nodes than the run wants. formed: state is safe in a generation on those that there are; else it is where it was,
    or nowhere. Only the time that it waits counts against `bounds.wait`: what is tried with enough nodes has bounds of its own."""

    name = "waiting for nodes"

    def __init__(self, formed: bool):
        super().__init__()
        self._formed = formed

    def enter(self, run: Run) -> None:
        decision = run.decision
        self._seen = decision.nodes, decision.draining
        self._reason, most = decision.wait or "no layout for the nodes that can be used", run.bounds.wait
        if not self._formed and run.to_end:
            if run.base is None or run.newest_readable == run.committed:
                return run.end(*run.to_end)
            most = min(run.bounds.start, inf if most is None else most)  # who comes by then helps to save what is in memory
        run.tell_once(NodesAwaited(self._reason), "waiting", self._reason)
        self.deadline = None if most is None else run.now + most - run.waited_seconds
        return None

    def involved(self, run: Run) -> Iterable[Member]:
        return run.seated if self._formed else ()

    def changed(self, run: Run) -> None:
        if self._formed:
            run.release_drained()
        decision = run.decision
        if self._formed and (decision.wait is None or decision.leaving or decision.joining):
            self.interrupted(run)
            run.go_on()
        elif not self._formed and (decision.nodes, decision.draining) != self._seen:
            from orchestrator.protocol.recovering import Recalling
            self.interrupted(run)
            run.enter(Recalling())

    def interrupted(self, run: Run) -> None:
        run.committed_at += run.now - self.since
        run.waited_seconds += run.now - self.since

    def stop_asked(self, run: Run) -> None:
        if self._formed:
            run.go_on()
        else:
            run.end(Ending.WAITED)

    def late(self, run: Run) -> None:
        if not self._formed and run.to_end:
            return run.end(*run.to_end)
        run.wind_up(Ending.NO_NODES, f"no more nodes within elastic.wait_seconds = {run.bounds.wait:g}: "
                    f"{run.decision.wait or self._reason}")
        return run.go_on() if self._formed else run.end(*run.ending)
