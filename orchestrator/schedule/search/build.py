"""List scheduling: a first schedule, built in the order of time, from a few rules and numbers.

Whenever a position is free it takes the best of what has arrived: a forward with a backward as a pair; else, if the missing
half is about to come, weight gradients or a short wait; else a lone action, split where it may be. Forwards leave room for
the stages still to come, so that a microbatch on its way can always go on.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from orchestrator.schedule.ir.stages import BOTH
from orchestrator.schedule.search.problem import NEVER, B, F, I, Part, Problem, Rows, SearchAction, W

_SOON = 1e-9


@dataclass(frozen=True, slots=True)
class BuildRules:
    """patience: how long, in forwards, a position waits for the missing half of a pair. share: how many of the kept
    activations may be of a stage early in the pipeline, as a factor on its share of a microbatch's way.
    whole: lone backwards are B, not I. doubles: two forwards, or two backwards, make a pair.
    """

    patience: float = 1.0
    share: float = 1.0
    whole: bool = False
    doubles: bool = True


def rules(problem: Problem) -> Iterator[BuildRules]:
    """A few, very different from each other."""
    shares = (0.85, 1.0) if problem.stages.placement == BOTH and problem.slots > 1 else (1.0,)
    others = ((False, True), (False, False)) if problem.splits else ((False, True), (True, False))
    for patience, share, (whole, doubles) in product((0.0, 0.25, 1.0, 2.0), shares, others):
        yield BuildRules(patience / problem.stages.chunks, share, whole, doubles)


def build(problem: Problem, chosen: BuildRules) -> Rows | None:
    """Rows by these rules; None: they lead nowhere."""
    return _Builder(problem, chosen).run()


class _Builder:
    def __init__(self, problem: Problem, chosen: BuildRules):
        self._problem, self._rules = problem, chosen
        positions, slots = range(problem.positions), problem.slots
        self._rows: Rows = [[] for _ in positions]
        self._free = [0.0 for _ in positions]
        self._next = {(position, kind): [0] * slots for position in positions for kind in (F, I)}
        self._live = [[0] * slots for _ in positions]
        self._deferred: list[list[Part]] = [[] for _ in positions]
        self._arrival: dict[tuple[int, Part], float] = {}
        self._left = [3 * slots * problem.each for _ in positions]
        for path in problem.stages.paths:
            for microbatch in range(problem.each):
                self._arrival[path[0][0], (F, path[0][1], microbatch)] = 0.0

    def run(self) -> Rows | None:
        """Event by event: (time, position) when a position is free, or when something reaches one that has nothing to do."""
        self._events = [(0.0, position) for position in range(self._problem.positions)]
        while self._events:
            now, position = heapq.heappop(self._events)
            if self._free[position] > now or not self._left[position]:
                continue
            move, wait = self._choose(position, now)
            if move is not None:
                self._perform(position, move, now)
            elif wait < NEVER:
                heapq.heappush(self._events, (wait, position))
        return None if any(self._left) else self._rows

    # --- choices -------------------------------------------------------------------------------------------------

    def _choose(self, position: int, now: float) -> tuple[SearchAction | None, float]:
        """What to run now; else how long to wait at most for something that is on its way."""
        forwards, f_soon = self._candidates(position, F, now)
        backwards, b_soon = self._candidates(position, I, now)
        soon = min(f_soon, b_soon)
        weight = self._deferred[position][0] if self._deferred[position] else None
        if forwards and backwards:
            forward, (_, slot, microbatch) = forwards[0], backwards[0]
            parts = (forward, (B, slot, microbatch)) if forward[1:] != (slot, microbatch) else ((B, slot, microbatch),)
            return self._problem.move(position, parts), NEVER
        if not forwards and not backwards:
            return (self._problem.move(position, (weight,)) if weight else None), soon
        missing = b_soon if forwards else f_soon
        if missing - now <= self._rules.patience * self._problem.unit:
            if weight is None:
                return None, missing
            filler = self._problem.move(position, (weight,))
            if missing - now > filler.duration / 2:
                return filler, NEVER
        return self._alone(position, forwards or backwards, weight), NEVER

    def _alone(self, position: int, found: list[Part], weight: Part | None) -> SearchAction:
        """Only forwards, or only backwards, are there."""
        kind, slot, microbatch = found[0]
        if kind == I and self._rules.whole:
            return self._problem.move(position, ((B, slot, microbatch),))
        if self._problem.splits:
            return self._problem.move(position, (found[0],), split=True)
        if self._rules.doubles and len(found) > 1 and (kind == I or self._both_may_enter(position, found)):
            return self._problem.move(position, (found[0], found[1]))
        return self._problem.move(position, (found[0], weight) if weight and weight[1:] != found[0][1:] else (found[0],))

    def _candidates(self, position: int, kind: int, now: float) -> tuple[list[Part], float]:
        """The next microbatch of each slot, if it is there: forwards of late stages first, backwards as they came; and when
        the first that is not there yet comes."""
        there, soon = [], NEVER
        for slot, microbatch in enumerate(self._next[position, kind]):
            part = (kind, slot, microbatch)
            arrival = self._arrival.get((position, part), NEVER)
            if microbatch >= self._problem.each or (kind == F and not self._may_enter(position, slot)):
                continue
            if arrival <= now + _SOON:
                there.append((-self._problem.stage_at[position][slot] if kind == F else arrival, part))
            else:
                soon = min(soon, arrival)
        there.sort()
        return [part for _, part in there], soon

    def _room(self, position: int) -> int:
        return self._problem.limit - sum(self._live[position])

    def _may_enter(self, position: int, slot: int) -> bool:
        """Whether a forward leaves room for the later stages that this position hosts."""
        problem, live = self._problem, self._live[position]
        stages = problem.stage_at[position]
        if self._room(position) < 1 + self._reserved(position, slot):
            return False
        if problem.stages.placement != BOTH:
            return True
        way = (2 * (problem.count - stages[slot]) - 1) / (2 * problem.count)  # of a microbatch, from F here to I here
        return live[slot] < problem.limit * way * self._rules.share + 1 - _SOON

    def _both_may_enter(self, position: int, found: list[Part]) -> bool:
        return self._room(position) >= 2 + max(self._reserved(position, slot) for _, slot, _ in found[:2])

    def _reserved(self, position: int, slot: int) -> int:
        """Later stages here that keep nothing now and still will: a place for each."""
        problem, live = self._problem, self._live[position]
        stages = problem.stage_at[position]
        return sum(stages[s] > stages[slot] and not live[s] and self._next[position, F][s] < problem.each
                   for s in range(problem.slots))

    # --- effects -------------------------------------------------------------------------------------------------

    def _perform(self, position: int, move: SearchAction, now: float) -> None:
        problem, end = self._problem, now + move.duration
        self._rows[position].append(move)
        self._free[position] = end
        heapq.heappush(self._events, (end, position))
        for kind, slot, microbatch in move.parts:
            self._left[position] -= 2 if kind == B else 1
            if kind == W:
                self._deferred[position].remove((W, slot, microbatch))
            else:
                self._next[position, F if kind == F else I][slot] += 1
            if kind == I:
                self._deferred[position].append((W, slot, microbatch))
            self._live[position][slot] += (kind == F) - (kind in (B, W))
            if (user := problem.user[position, kind, slot]) is not None:
                self._pass_on(position, user, F if kind == F else I, microbatch, end)
            elif kind == F:  # at the last stage, where the backward follows from it
                self._arrive(position, (I, slot, microbatch), end)

    def _pass_on(self, origin: int, place: tuple[int, int], kind: int, microbatch: int, end: float) -> None:
        target, slot = place
        self._arrive(target, (kind, slot, microbatch), end + self._problem.durations.arrival(origin, target))

    def _arrive(self, position: int, part: Part, when: float) -> None:
        self._arrival[position, part] = when
        heapq.heappush(self._events, (when, position))
