"""Whether a schedule and its programs are right, found out before any rank runs them.

Complete, in an order that `dependencies` allows, free of deadlock, transfers matched, activations within a bound, gradients
reduced when all are there. All ranks of an EP group are at one position, and a program is a function of schedule and
position alone; so they all enter the same collectives in the same order, and there is nothing more to check about it.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence

from orchestrator.schedule.actions import Action, Compute, Kind, Pair, Program, Reduce, Schedule, Transfer, dependencies
from orchestrator.schedule.grid import ScheduleError, failure
from orchestrator.schedule.lower import crossings

__all__ = ["ScheduleError", "check", "peak_activations"]


def check(schedule: Schedule, programs: Sequence[Program], *,
          most_activations: int | None = None, outstanding_receives: int | None = None) -> tuple[int, ...]:
    """Check `programs` against `schedule`, and the schedule itself.

    Args:
        most_activations: bound on `peak_activations`.
        outstanding_receives: how many receives a position can have posted whose tensor is not there yet; one more blocks.
    Returns: peak activations in flight by position.
    Raises ScheduleError: the first line says what is wrong and where, the others show the grid around it.
    """
    _check_complete(schedule)
    _check_lowering(schedule, programs)
    _check_matching(schedule, programs)
    _Run(schedule, programs, outstanding_receives).finish()
    peaks = peak_activations(schedule)
    for position, peak in enumerate(peaks):
        if most_activations is not None and peak > most_activations:
            index = _live(schedule, position).index(most_activations + 1)
            raise failure(f"position {position}: {peak} microbatches in flight at once, at most {most_activations} allowed",
                          schedule.rows, {position: index})
    return peaks


def peak_activations(schedule: Schedule) -> tuple[int, ...]:
    """Most microbatches whose activations a position keeps at once, by position; both slots together.

    A microbatch counts from its F to the end of its B or W, so both of a pair count during the pair. Without backward
    passes only the running microbatch counts.
    """
    return tuple(max(_live(schedule, position), default=0) for position in range(schedule.positions))


def _live(schedule: Schedule, position: int) -> list[int]:
    """Microbatches alive during each action of a row."""
    live, during = 0, []
    for action in schedule.rows[position]:
        kinds = [half.kind for half in action.halves]
        live += Kind.FORWARD in kinds
        during.append(live)
        live -= not schedule.trains or Kind.BACKWARD in kinds or Kind.BACKWARD_WEIGHT in kinds
    return during


def _check_complete(schedule: Schedule) -> None:
    """Every stage runs every microbatch's F once, and in training its B once, or its I and W once."""
    if len(schedule.rows) != schedule.positions:
        raise failure(f"{len(schedule.rows)} rows for {schedule.positions} positions", schedule.rows, {})
    seen: set[Compute] = set()
    for position, row in enumerate(schedule.rows):
        for index, action in enumerate(row):
            for half in action.halves:
                if reason := _misplaced(half, position, schedule) or ("a second time" if half in seen else None):
                    raise failure(f"position {position}, action {index}: {half} {reason}", schedule.rows, {position: index})
                seen.add(half)
    for slot, microbatch in schedule.entries():
        for stage, (position, here) in enumerate(schedule.route(slot, microbatch)):
            kinds = "".join(kind for kind in (Kind.FORWARD, Kind.BACKWARD, Kind.BACKWARD_INPUT, Kind.BACKWARD_WEIGHT)
                            if Compute(kind, stage, here, microbatch) in seen)
            allowed = ("FB", "FIW") if schedule.trains else ("F",)
            if kinds not in allowed:
                raise failure(f"position {position}: microbatch {here}.{microbatch} has {' '.join(kinds) or 'no action'}, "
                              f"not {' or '.join(' '.join(a) for a in allowed)}",
                              schedule.rows, {position: len(schedule.rows[position])})


def _misplaced(half: Compute, position: int, schedule: Schedule) -> str | None:
    try:
        route = schedule.route(half.slot, half.microbatch)
    except ValueError as error:
        return f"is for {error}"
    if half.stage not in range(len(route)) or route[half.stage] != (position, half.slot):
        return f"of stage {half.stage} is not of this position"
    return None


def _check_lowering(schedule: Schedule, programs: Sequence[Program]) -> None:
    """A program is its row, plus transfers, plus one reduction at the end of training."""
    if [program.position for program in programs] != list(range(schedule.positions)):
        raise failure(f"programs are for positions {[p.position for p in programs]}", schedule.rows, {})
    for position, program in enumerate(programs):
        row, computes = schedule.rows[position], [a for a in program.actions if isinstance(a, Compute | Pair)]
        if tuple(computes) != row:
            index = next((i for i, (a, b) in enumerate(zip(row, computes, strict=False)) if a != b), min(len(row), len(computes)))
            found = computes[index] if index < len(computes) else "nothing"
            raise failure(f"position {position}, action {index}: the program has {found} here", schedule.rows, {position: index})
        reductions = [isinstance(action, Reduce) for action in program.actions]
        if any(reductions[:-1]) or reductions[-1:] != [schedule.trains]:
            wanted = "one reduction, at its end" if schedule.trains else "no reduction"
            raise failure(f"position {position}: the program must have {wanted}", schedule.rows, {position: len(row)})


def _check_matching(schedule: Schedule, programs: Sequence[Program]) -> None:
    """From each position to each other, tags are distinct, and sent in the order in which their receives are posted."""
    sent: dict[tuple[int, int], list[Transfer]] = defaultdict(list)
    received: dict[tuple[int, int], list[Transfer]] = defaultdict(list)
    for program in programs:
        for action in program.actions:
            if isinstance(action, Transfer) and action.kind is Kind.SEND:
                sent[program.position, action.peer].append(action)
            elif isinstance(action, Transfer):
                received[action.peer, program.position].append(action)
    for origin, target in sorted(sent.keys() | received.keys()):
        sends, receives = sent[origin, target], received[origin, target]
        pairs = zip(sends, receives, strict=False)
        number = next((i for i, (a, b) in enumerate(pairs) if _identity(a) != _identity(b)), min(len(sends), len(receives)))
        if number < max(len(sends), len(receives)):
            left, right = (str(ends[number]) if number < len(ends) else "nothing" for ends in (sends, receives))
            raise failure(f"transfer {number} from position {origin} to {target}: {left} meets {right}", schedule.rows, {})
        tag, count = Counter(transfer.tag for transfer in sends).most_common(1)[0]
        if count > 1:
            raise failure(f"from position {origin} to {target}: tag {tag} is used {count} times", schedule.rows, {})


def _identity(transfer: Transfer) -> tuple[object, ...]:
    return transfer.payload, transfer.stage, transfer.microbatch, transfer.tag


class _Run:
    """Runs programs against each other: sends never block, an action with a receive waits until its tensor was sent."""

    def __init__(self, schedule: Schedule, programs: Sequence[Program], outstanding: int | None):
        self._schedule, self._programs, self._outstanding = schedule, programs, outstanding
        ways = crossings(schedule)
        self._maker = {(schedule.position(way.maker), way.send): way.maker for way in ways}
        self._receives: dict[Compute, list[Transfer]] = defaultdict(list)
        for way in ways:
            self._receives[way.user].append(way.receive)
        self._at = [0] * len(programs)                              # next action of each program
        self._done: list[set[Compute]] = [set() for _ in programs]
        self._posted: list[set[Transfer]] = [set() for _ in programs]
        self._sent: set[tuple[int, int, int]] = set()               # (from, to, tag)

    def finish(self) -> None:
        """Run to the end. Raises ScheduleError: an action comes too early, or all that are left wait for each other."""
        progress = True
        while progress:
            progress = False
            for position, program in enumerate(self._programs):
                while self._at[position] < len(program.actions) and self._ready(position, program.actions[self._at[position]]):
                    self._perform(position, program.actions[self._at[position]])
                    self._at[position] += 1
                    progress = True
        stuck = {p: program.actions[self._at[p]] for p, program in enumerate(self._programs)
                 if self._at[p] < len(program.actions)}
        if stuck:
            waits = "; ".join(f"position {position} at {action}" for position, action in stuck.items())
            raise failure(f"deadlock: {waits}", self._schedule.rows, {p: self._compute_index(p) for p in stuck})

    def _ready(self, position: int, action: Action) -> bool:
        if isinstance(action, Transfer):
            if action.kind is Kind.SEND:
                return self._sendable(position, action)
            return self._outstanding is None or self._unarrived(position) < self._outstanding
        if isinstance(action, Reduce):
            return True                                             # it is last, and the program is complete
        for needed in dependencies(action, self._schedule):
            if self._schedule.position(needed) == position and needed not in self._done[position]:
                raise self._too_early(position, action, f"needs {needed} first")
        needs = [transfer for half in action.halves for transfer in self._receives.get(half, ())]
        for transfer in needs:
            if transfer not in self._posted[position]:
                raise self._too_early(position, action, f"needs {transfer} posted first")
        return all(self._arrived(position, transfer) for transfer in needs)

    def _sendable(self, position: int, send: Transfer) -> bool:
        if self._maker.get((position, send)) not in self._done[position]:
            raise self._too_early(position, send, "but no action before has made this tensor for that position")
        return True

    def _perform(self, position: int, action: Action) -> None:
        if isinstance(action, Compute | Pair):
            self._done[position].update(action.halves)
        elif isinstance(action, Transfer) and action.kind is Kind.SEND:
            self._sent.add((position, action.peer, action.tag))
        elif isinstance(action, Transfer):
            self._posted[position].add(action)

    def _arrived(self, position: int, receive: Transfer) -> bool:
        return (receive.peer, position, receive.tag) in self._sent

    def _unarrived(self, position: int) -> int:
        return sum(not self._arrived(position, receive) for receive in self._posted[position])

    def _compute_index(self, position: int) -> int:
        return sum(isinstance(a, Compute | Pair) for a in self._programs[position].actions[:self._at[position]])

    def _too_early(self, position: int, action: Action, reason: str) -> ScheduleError:
        index = self._compute_index(position)
        return failure(f"position {position}, action {index}: {action} {reason}", self._schedule.rows, {position: index})
