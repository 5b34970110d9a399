"""What a run does at a time: what is waited for, what follows, and what it means when that takes too long.

A phase changes the run by its public methods only, and goes over to the next one by `run.enter`. Those here wait; the others are in
recovering.py (trouble and take-over), changing.py (generations), stepping.py (steps) and saving.py (checkpoints).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from orchestrator.membership import Member
from orchestrator.protocol.commands import EpochLine, Line, Request
from orchestrator.protocol.events import Answer, Answered, CallId, Ending, Failed, Heard, LetGo, PlacementFound

if TYPE_CHECKING:
    from orchestrator.protocol.run import Run


class Phase:
    """calls: open ones, by number. answers: that have come. deadline: when `late` is due. order: something is being written."""

    name = "nothing"

    def __init__(self) -> None:
        self.calls: dict[CallId, Member] = {}
        self.answers: dict[Member, Answer] = {}
        self.deadline: float | None = None
        self.order: int | None = None
        self.since = 0.0

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
        self._waiting, self._seconds, self._written = set(members), seconds, False

    def enter(self, run: Run) -> None:
        self._end = self.deadline = run.now + self._seconds
        self.order = run.append(EpochLine(run.epoch))

    def involved(self, run: Run) -> Iterable[Member]:
        return ()

    def stored(self, run: Run) -> None:
        self._written, self.order = True, None
        self._go_on(run)

    def not_stored(self, run: Run, text: str) -> None:
        if run.now - self.since > run.bounds.storage:
            return run.end(Ending.STORAGE, text)
        self.order = None
        run.tell_once("storage_away", "storage", True, reason=text)
        self.deadline = run.now + run.bounds.first_pause * 10
        return None

    def changed(self, run: Run) -> None:
        self._go_on(run)

    def late(self, run: Run) -> None:
        if not self._written and self.order is None:
            self.order = run.append(EpochLine(run.epoch))
        if run.now < self._end:
            self.deadline = self._end
            return
        for member in sorted(self._waiting):
            if run.left_behind:  # it may only have been asked for just before
                run.still_starts(member)
            else:
                run.lose(member, f"did not say hello within {self._seconds:g} s", fence=True)
        self._waiting.clear()
        self._go_on(run)

    def _go_on(self, run: Run) -> None:
        self._waiting = {member for member in self._waiting if not run.trusts(member) and run.membership.may_come(member)}
        if self._waiting or not self._written:
            return
        from orchestrator.protocol.recovering import Recalling
        if run.left_behind:
            run.tell("coordinator_restarted", step=run.committed, members=len(run.membership.ready_members()))
        return run.enter(Recalling())


class Recording(Phase):
    """A line of the ledger besides those of steps. Tried again until it is there, but not for ever."""

    name = "recording"

    def __init__(self, line: Line, then: Callable[[Run], None]):
        super().__init__()
        self._line, self._then, self._pause = line, then, None

    def enter(self, run: Run) -> None:
        self._write(run)

    def _write(self, run: Run) -> None:
        self.order = run.append(self._line)

    def lost(self, run: Run, dead: Sequence[Member]) -> None:
        pass  # ranks do nothing now; whether the line is there must be known first

    def stored(self, run: Run) -> None:
        self.order = None
        run.forget_told("storage")
        self._then(run)

    def not_stored(self, run: Run, text: str) -> None:
        self.order = None
        if run.now - self.since > run.bounds.storage:
            return self.give_up(run, text)
        run.tell_once("storage_away", "storage", True, reason=text)
        self._pause = min(run.bounds.last_pause / 10, 2 * (self._pause or run.bounds.first_pause / 2))
        self.deadline = run.now + self._pause
        return None

    def give_up(self, run: Run, text: str) -> None:
        run.end(Ending.STORAGE, f"the ledger could not be written for {run.now - self.since:.0f} s: {text}")

    def late(self, run: Run) -> None:
        self._write(run)


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
    or nowhere."""

    name = "waiting for nodes"

    def __init__(self, formed: bool):
        super().__init__()
        self._formed = formed

    def enter(self, run: Run) -> None:
        decision = run.decision
        self._nodes = decision.nodes
        run.tell("waiting", reason=decision.wait or "no layout for the nodes that can be used")
        self.deadline = None if run.bounds.wait is None else run.now + run.bounds.wait

    def involved(self, run: Run) -> Iterable[Member]:
        return run.seated if self._formed else ()

    def changed(self, run: Run) -> None:
        decision = run.decision
        if self._formed and (decision.wait is None or decision.leaving or decision.joining):
            run.committed_at = run.now
            run.go_on()
        elif not self._formed and decision.nodes != self._nodes:
            from orchestrator.protocol.recovering import Recalling
            run.committed_at = run.now
            run.enter(Recalling())

    def stop_asked(self, run: Run) -> None:
        if self._formed:
            run.go_on()
        else:
            run.end(Ending.WAITED)

    def late(self, run: Run) -> None:
        run.wind_up(Ending.NO_NODES, f"no more nodes within elastic.wait_seconds = {run.bounds.wait:g}: {run.decision.wait}")
        if self._formed:
            run.go_on()
        else:
            run.end(*run.ending)
