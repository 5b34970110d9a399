"""Trouble, and taking over: everybody lets go and says what it holds; who is to go is named; the state that goes on is chosen.

Evidence, not memory: what a coordinator believed before counts for nothing here, so one that has just begun is the normal case.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from orchestrator.protocol import suspicion
from orchestrator.protocol.base import Begin, Carry, Load, Nothing, choose
from orchestrator.protocol.changing import Finishing, Forming, cut
from orchestrator.protocol.commands import Abort, Probe, Recall
from orchestrator.protocol.events import Answered, Ending, Failed, FailKind, Fault, LetGo, Recalled, Seen
from orchestrator.protocol.members import Member
from orchestrator.protocol.phases import Phase
from orchestrator.told.kinds import CheckpointUnreadable, CommittedStateLost, Interrupted, RanksAborted, RanksLost, StorageAway

if TYPE_CHECKING:
    from orchestrator.protocol.run import Run

MOST_TROUBLES_AT_THE_END = 3
_LOOK_AGAIN_SECONDS = 1.0


class LettingGo(Phase):
    """Whoever is ready ends everything up to this generation."""

    name = "letting go"

    def enter(self, run: Run) -> None:
        run.release_at = self.deadline = run.now + run.release_seconds
        self._waiting = set(run.membership.ready_members())
        if self._waiting:
            run.order(Abort(tuple(sorted(self._waiting)), run.generation))
        else:
            self._go_on(run)

    def involved(self, run: Run) -> Iterable[Member]:
        return self._waiting

    def lost(self, run: Run, dead: Sequence[Member]) -> None:
        self._waiting.difference_update(dead)
        self._go_on(run)

    def said_hello(self, run: Run, member: Member) -> None:
        if member in self._waiting:  # the same process again: it may not have been told
            run.order(Abort((member,), run.generation))

    def let_go(self, run: Run, event: LetGo) -> None:
        if event.generation == run.generation:
            self._waiting.discard(event.member)
            run.interruption.aborted[event.member] = event.seconds
            self._go_on(run)

    def late(self, run: Run) -> None:
        for member in sorted(self._waiting):
            run.interruption.silent.add(member)
            run.lose(member, f"did not let go within {run.release_seconds:g} s", fence=True)
        self._waiting.clear()
        self._go_on(run)

    def _go_on(self, run: Run) -> None:
        """However long that took, the others have time to answer."""
        if not self._waiting:
            run.enter(Recalling(max(run.release_at, run.now + run.bounds.silence + 2 * run.bounds.recall)))


class Recalling(Phase):
    """Everybody ready says what it holds, once its compute lane is free. until: who is not free by then hangs; but whoever is at making
    process groups, which nothing ends but time, has that time: a link may be cut. Who comes later has its own time."""

    name = "recalling"

    def __init__(self, until: float | None = None):
        super().__init__()
        self._until, self._busy, self._free_by = until, set(), {}

    def enter(self, run: Run) -> None:
        until = self._until or run.now + run.release_seconds
        self._free_by = dict.fromkeys(run.membership.ready_members(), until)
        self.ask(run, self._free_by, lambda member: Recall(run.bounds.recall), until - run.now)

    def involved(self, run: Run) -> Iterable[Member]:
        return [*self.calls.values(), *self.answers]

    def put_off(self, seconds: float) -> None:
        super().put_off(seconds)
        self._free_by = {member: until + seconds for member, until in self._free_by.items()}

    def said_hello(self, run: Run, member: Member) -> None:
        if run.trusts(member) and member not in self.answers and member not in self.calls.values():
            self._free_by[member] = run.now + run.release_seconds
            self.calls[run.call(member, Recall(run.bounds.recall))] = member

    def answered(self, run: Run, event: Answered) -> None:
        member = event.member
        if event.value.busy is None:
            return super().answered(run, event)
        self._busy.add(member)
        if event.value.forming:  # what it was at before this phase began ends before this
            self._free_by[member] = self.since + run.bounds.making + 2 * run.bounds.recall + run.bounds.silence
        if run.now < self._free_by[member]:  # after that it hangs, as `late` will say
            del self.calls[event.call]
            self.calls[run.call(member, Recall(run.bounds.recall))] = member
        return None

    def failed(self, run: Run, event: Failed) -> None:
        if event.kind is not FailKind.GONE:
            run.lose(event.member, f"cannot say what it holds: {event.text}", fence=True)
        self.lost(run, [event.member])

    def lost(self, run: Run, dead: Sequence[Member]) -> None:
        for member in dead:
            self.answers.pop(member, None)
        self.without(run, dead)

    def late(self, run: Run) -> None:
        for call, member in list(self.calls.items()):
            if run.now >= self._free_by[member]:
                why = "its computing hangs" if member in self._busy else "does not answer"
                run.lose(member, f"{why}: not free {run.release_seconds:g} s after it was told to let go", fence=True, cool=True)
                del self.calls[call]
        if self.calls:
            self.deadline = min(self._free_by[member] for member in self.calls.values())
            return None
        return self.done(run)

    def done(self, run: Run) -> None:
        recalled = {member: answer for member, answer in self.answers.items() if run.trusts(member)}
        understand(run, recalled)


class Probing(Phase):
    """Nobody is known to be at fault: is there a link that carries nothing?"""

    name = "probing"

    def __init__(self, recalled: Mapping[Member, Recalled]):
        super().__init__()
        self._recalled = recalled

    def enter(self, run: Run) -> None:
        members = [member for member in _company(run) if member in self._recalled]
        self.ask(run, members, lambda member: Probe(tuple(peer for peer in members if peer != member), run.bounds.probe),
                 run.bounds.probe + run.release_seconds)

    def involved(self, run: Run) -> Iterable[Member]:
        return self.calls.values()

    def failed(self, run: Run, event: Failed) -> None:
        self.lost(run, [event.member])

    def lost(self, run: Run, dead: Sequence[Member]) -> None:
        self.without(run, dead)

    def late(self, run: Run) -> None:
        self.calls.clear()
        self.done(run)

    def done(self, run: Run) -> None:
        run.interruption.probed = True
        said = {member: answer.not_reached for member, answer in self.answers.items() if run.trusts(member)}
        cut = {member: [peer for peer in peers if run.trusts(peer)] for member, peers in said.items()}
        found = run.by_links(cut, _on_trial(run), self._recalled)
        if found is not None:
            run.lose(found.member, found.reason, fence=True, cool=True)
        understand(run, {member: answer for member, answer in self._recalled.items() if run.trusts(member)})


# --- what it means ---------------------------------------------------------------------------------------------------


def understand(run: Run, recalled: Mapping[Member, Recalled]) -> None:
    """Name who is to go, if anybody is, and go on from the state that is left."""
    if run.broken_off is not None:  # nobody begins to copy state any more
        (seen, since, members), run.broken_off = run.broken_off, None
        run.saver.broken_off(run, seen, since, [member for member in members if run.trusts(member)])
    run.generation = max([run.generation, *(holding.generation for answer in recalled.values() for holding in answer.held)])
    if run.interruption is None or run.interruption.understood:  # a coordinator that begins; or all that is known has been said
        if run.interruption is not None and (lost := _newly_lost(run)):
            _tell_lost(run, lost)
        run.seated = tuple(member for member in run.seated if run.trusts(member))
        return _go_on(run, recalled)
    run.interruption.understood = True
    faults = _faults(run, recalled)
    refused = [f"{member}: {fault.text}" for member, fault in faults.items() if fault.kind is FailKind.REFUSED]
    if refused and not run.loaded and not any(holding.applied for answer in recalled.values() for holding in answer.held):
        return run.end(Ending.REFUSED, refused[0])  # where there is state, it costs a member its place
    explained = _blame_storage(run, faults)
    if run.ended:
        return None
    lost = _newly_lost(run)
    if not lost and not explained:
        found = suspicion.by_fault(faults, _on_trial(run), run.trials.struck.get(run.committed, {}),
                                    run.membership.promising(run.trials.barred))
        if isinstance(found, suspicion.Hopeless):
            run.wind_up(Ending.REFUSED if refused else Ending.OWN_FAULT, found.text)
        elif found is not None:
            for member, text in suspicion.own_errors(faults).items():
                if member not in _on_trial(run):
                    run.trials.struck.setdefault(run.committed, {})[member.node] = f"{member}: {text}"
            if found.perhaps:
                run.trials.excuse(found.member)
            run.lose(found.member, found.reason, fence=True, cool=True)
        elif not run.interruption.probed and len(_company(run)) > 1:
            run.interruption.understood = False
            return run.enter(Probing(recalled))
        else:
            run.trials.unnamed += 1
            if run.trials.unnamed > 1:
                for member in sorted(_on_trial(run)):
                    run.lose(member, "a generation with it does not stand", fence=True, cool=True)
        lost = _newly_lost(run)
    _tell(run, lost)
    if run.now - run.committed_at > run.bounds.give_up:
        run.wind_up(Ending.NO_PROGRESS, f"no step was committed for {run.now - run.committed_at:.0f} s; {_suspects(run)}")
    if run.ending is not None:
        run.troubles_at_the_end += 1
        if run.troubles_at_the_end > MOST_TROUBLES_AT_THE_END:
            return run.end(*run.ending)
    recalled = {member: answer for member, answer in recalled.items() if run.trusts(member)}
    if run.away_since is not None:
        return run.pause(min(5.0, run.bounds.first_pause + (run.now - run.away_since) / 2), again)
    if not lost and not explained and run.trials.unnamed > 1:
        seconds = min(run.bounds.last_pause, run.bounds.first_pause * 2 ** run.trials.unnamed)
        return run.pause(seconds, lambda run: run.enter(Recalling()))
    return _go_on(run, recalled)


def _faults(run: Run, recalled: Mapping[Member, Recalled]) -> dict[Member, Fault]:
    """What members raised in what was interrupted: an error of before is still remembered by those whom nothing has called since."""
    told = {member: fault for member, fault in run.interruption.faults.items() if member in recalled}
    told |= {member: answer.fault for member, answer in recalled.items() if answer.fault is not None}
    first = run.interruption.first_call
    return {member: fault for member, fault in told.items()
            if fault.call is None or fault.call.epoch == run.epoch and fault.call.number >= first}


def _blame_storage(run: Run, faults: Mapping[Member, Fault]) -> bool:
    """Whether a checkpoint that was being read is to blame, or the storage that it is on: that one is waited for, and for too long it
    ends the run, for older checkpoints are there as well; what is damaged is passed over from now on."""
    texts = [fault.text for fault in faults.values() if fault.kind is FailKind.UNREADABLE]
    away = [fault.text for fault in faults.values() if fault.kind is FailKind.AWAY]
    if run.loading is None or not texts and not away:
        return False
    if not texts:
        run.away_since = run.now if run.away_since is None else run.away_since
        run.tell_once(StorageAway(away[0]), "storage", True)
        if run.now - run.away_since > run.bounds.storage:
            run.end(Ending.STORAGE, f"{run.loading.directory} could not be read for {run.now - run.away_since:.0f} s: {away[0]}")
        return True
    seen, run.loading, run.away_since = run.loading, None, None
    run.checkpoints = [Seen(other.step, other.directory, other.readable and other.directory != seen.directory)
                       for other in run.checkpoints]
    run.tell(CheckpointUnreadable(seen.step, seen.directory, texts[0]))
    return True


def _on_trial(run: Run) -> Collection[Member]:
    """Nobody, where nobody else is there: then it is not the newcomers' doing."""
    return () if run.newcomers().issuperset(_company(run)) else run.newcomers()


def _company(run: Run) -> list[Member]:
    """Who serves, or was about to."""
    return list(dict.fromkeys([*run.seated, *sorted(run.taking_part)]))


def _newly_lost(run: Run) -> list[Member]:
    return [member for member in _company(run) if not run.trusts(member) and member not in run.interruption.told]


def _tell_lost(run: Run, lost: Sequence[Member]) -> None:
    run.interruption.told.update(lost)
    run.trials.unnamed = 0
    run.tell(RanksLost(tuple(map(str, lost)), run.generation, tuple(sorted({run.membership.why_lost(member) for member in lost}))))


def _tell(run: Run, lost: Sequence[Member]) -> None:
    interruption = run.interruption
    if lost:
        _tell_lost(run, lost)
    else:
        first = None if interruption.first is None else str(interruption.first)
        run.tell(Interrupted(first, interruption.sign, run.generation))
    run.seated = tuple(member for member in run.seated if run.trusts(member))
    run.taking_part = {member for member in run.taking_part if run.trusts(member)}
    run.tell(RanksAborted(len(interruption.aborted), round(max(interruption.aborted.values(), default=0.0), 4),
                          tuple(sorted(map(str, interruption.silent))), round(run.now - interruption.since, 4)))


def _suspects(run: Run) -> str:
    interruption = run.interruption
    return f"last: {interruption.first or 'nobody'}: {interruption.sign or 'no sign'}"


# --- what goes on ----------------------------------------------------------------------------------------------------


def _go_on(run: Run, recalled: Mapping[Member, Recalled]) -> None:
    if run.interruption is None and (unknown := _unknown_to_the_ledger(run, recalled)):
        return run.end(Ending.SUPERSEDED, unknown)  # what they hold is the run that another ledger is of
    choice = choose(recalled, run.committed, run.checkpoints, run.planner)
    if not (isinstance(choice, Carry) and choice.applied == run.committed) and run.expects_somebody:
        return run.pause(_LOOK_AGAIN_SECONDS, again)  # before what cannot be taken back: who is missing may hold everything
    match choice:
        case Carry(base, having, applied):
            run.base, run.loading, run.away_since = base, None, None
            if applied < run.committed:
                run.tell(CommittedStateLost(f"the last {run.committed - applied} steps are in nobody's memory", run.committed))
                return cut(run, applied, "older state in memory", again)
            return run.enter(Finishing(having))
        case Load(seen, lost):
            return _load(run, recalled, seen, lost)
        case Begin(lost):
            return _load(run, recalled, None, lost)
        case Nothing(text):
            return run.end(Ending.NO_STATE, text)


def _unknown_to_the_ledger(run: Run, recalled: Mapping[Member, Recalled]) -> str:
    """An update is made once its step's line is durable: who has more of them than there ever were lines has them of another ledger.
    As when the folder of the run is not mounted where a new coordinator is, or was deleted. Ranks that were not left behind by this run
    may have served another one."""
    for member in sorted(recalled) if run.left_behind else ():
        applied = max((holding.applied or 0 for holding in recalled[member].held), default=0)
        if applied > max(run.furthest, run.committed):
            return (f"{member} holds {applied} steps, and by the ledger there never were more than {run.furthest}: it is not the ledger "
                    "of this run (is run.directory mounted, was it deleted?); ranks are left alone for elastic.orphan_seconds")
    return ""


class AwaitingCheckpoint(Phase):
    """The one that is being written may be newer than those that are there: that is settled first."""

    name = "awaiting checkpoint"

    def involved(self, run: Run) -> Iterable[Member]:
        return ()

    def changed(self, run: Run) -> None:
        if not run.saver.busy:
            again(run)


def _load(run: Run, recalled: Mapping[Member, Recalled], seen: Seen | None, lost: str) -> None:
    if not recalled.keys() >= set(run.membership.ready_members()):
        return again(run)  # somebody has come since: it may hold what is missing
    if run.saver.busy:
        return run.enter(AwaitingCheckpoint())
    if run.decision.wait or not run.decision.nodes:
        return run.wait_for_nodes(formed=False)
    if run.ending is not None:  # what could be saved is gone; to load what is stored would be for nothing
        return run.end(*run.ending)
    costs = run.committed - (seen.step if seen else 0)
    if costs and (run.loaded or run.left_behind) and run.told_lost_at != run.committed:
        run.told_lost_at = run.committed
        run.tell(CommittedStateLost(lost, run.committed))
    run.base = None
    if run.dead(run.seated):
        return again(run)
    return run.enter(Forming(seen, lost))


def again(run: Run) -> None:
    """Somebody may have gone meanwhile: ask again."""
    run.enter(Recalling())
