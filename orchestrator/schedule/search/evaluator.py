"""Rows under annealing, with what makes trying a change cheap: times before the change stay, and most bad changes show soon.

An action's tail is the time from its start to the end of everything that waits for it. After the last changed action tails
are as they were, so a change is given up at the first action that starts too late for its tail, long before the end.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Mapping
from dataclasses import dataclass

from orchestrator.schedule.search.problem import B, F, Problem, Rows, SearchAction, W

_NEVER, _TINY = float("inf"), 1e-9


@dataclass(frozen=True, slots=True)
class Trial:
    """A change that ends within its bound. `kept`: by position, actions before the change in time; `starts`: of the others;
    `ready`: arrivals of the tensors that they make, `made`: when each of these starts."""

    rows: Mapping[int, list[SearchAction]]
    makespan: float
    kept: list[int]
    starts: list[list[float]]
    ready: dict[int, float]
    made: dict[int, float]


class IncrementalEvaluator:
    """Raises ValueError: the rows wait for each other for ever."""

    def __init__(self, problem: Problem, rows: Rows):
        self._problem = problem
        self.rows = [list(row) for row in rows]
        self._starts: list[list[float]] = [[] for _ in rows]
        self._ready, self._made = [-1.0] * problem.tensors, [_NEVER] * problem.tensors  # arrival; start of what makes it
        self._live = [_live(row) for row in self.rows]
        self._tails: list[list[float]] = [[] for _ in rows]
        self.critical: list[tuple[int, int]] = []
        first = self._run({}, [0] * len(rows), [len(row) for row in rows], _NEVER)
        if first is None:
            raise ValueError("the rows wait for each other for ever")
        self.accept(first)

    def attempt(self, changes: Mapping[int, list[SearchAction]], bound: float) -> Trial | None:
        """The rows, with others at some positions; None: it would end after `bound`, or never."""
        bound *= 1 + _TINY  # a tail is a sum in another order
        begin, end = _NEVER, 0.0
        suffix = {}
        for position, row in changes.items():
            old = self.rows[position]
            first, common = differing(old, row)
            begin = min(begin, self._starts[position][first - 1] + old[first - 1].duration if first else 0.0)
            end = max(end, self._starts[position][len(old) - common - 1] if len(old) > common else 0.0)
            suffix[position] = len(row) - common
        kept = [bisect_left(starts, begin) for starts in self._starts]
        sure = [bisect_right(starts, end) for starts in self._starts]
        for position, index in suffix.items():
            shift = len(changes[position]) - len(self.rows[position])
            sure[position] = max(index, sure[position] + shift)
        return self._run(changes, kept, sure, bound, begin)

    def allows(self, position: int, row: list[SearchAction]) -> bool:
        """`Problem.allows`, by looking at what differs from the present row only: what comes before and after it is right."""
        old = self.rows[position]
        first, common = differing(old, row)
        live = self._problem.live_after(row[first:len(row) - common], self._live[position][first])
        return live == self._live[position][len(old) - common]

    def accept(self, trial: Trial) -> None:
        for position, row in trial.rows.items():
            self.rows[position] = row
            self._live[position] = _live(row)
        for position, (kept, starts) in enumerate(zip(trial.kept, trial.starts)):
            self._starts[position][kept:] = starts
        for tensor, arrival in trial.ready.items():
            self._ready[tensor], self._made[tensor] = arrival, trial.made[tensor]
        self.makespan = trial.makespan
        self._find_tails()

    def _run(self, changes: Mapping[int, list[SearchAction]], kept: list[int], sure: list[int], bound: float,
             begin: float = 0.0) -> Trial | None:
        """Times from `begin` on. `sure`: by position, from which action on tails hold."""
        positions = range(len(self.rows))
        rows = [changes.get(position, row) for position, row in enumerate(self.rows)]
        before, made_before = self._ready, self._made
        ready: dict[int, float] = {}
        made: dict[int, float] = {}
        starts: list[list[float]] = [[] for _ in positions]
        at = list(kept)
        free = [self._starts[p][kept[p] - 1] + self.rows[p][kept[p] - 1].duration if kept[p] else 0.0 for p in positions]
        waiting: dict[int, int] = {}
        todo = list(positions)
        while todo:
            position = todo.pop()
            row, index, now, tails = rows[position], at[position], free[position], self._tails[position]
            length, certain, note = len(row), sure[position], starts[position].append
            while index < length:
                move, start = row[index], now
                for tensor in move.needs:
                    if made_before[tensor] < begin:
                        arrival = before[tensor]
                    elif tensor in ready:
                        arrival = ready[tensor]
                    else:
                        waiting[tensor] = position
                        break
                    if arrival > start:
                        start = arrival
                else:
                    now = start + move.duration
                    if (start + tails[index - length] if index >= certain else now) > bound:
                        return None
                    note(start)
                    for tensor, way in move.makes:
                        ready[tensor] = now + way
                        made[tensor] = start
                        if tensor in waiting:
                            todo.append(waiting.pop(tensor))
                    index += 1
                    continue
                break
            at[position], free[position] = index, now
        if any(index < len(row) for index, row in zip(at, rows)):
            return None
        return Trial(changes, max(free), kept, starts, ready, made)

    def _find_tails(self) -> None:
        """From the ends of the rows back; and the actions without slack."""
        positions = range(len(self.rows))
        found: list[list[float]] = [[] for _ in positions]  # backwards
        following = [0.0] * len(self.rows)
        at = [len(row) for row in self.rows]
        needed = [-1.0] * self._problem.tensors  # time from a tensor's arrival to the end
        waiting: dict[int, int] = {}
        todo = list(positions)
        while todo:
            position = todo.pop()
            row, index, tail = self.rows[position], at[position], following[position]
            while index:
                move, after = row[index - 1], tail
                for tensor, way in move.makes:
                    time = needed[tensor]
                    if time < 0:
                        waiting[tensor] = position
                        break
                    if time + way > after:
                        after = time + way
                else:
                    tail = after + move.duration
                    found[position].append(tail)
                    for tensor in move.needs:
                        needed[tensor] = tail
                        if tensor in waiting:
                            todo.append(waiting.pop(tensor))
                    index -= 1
                    continue
                break
            at[position], following[position] = index, tail
        self._tails = [tails[::-1] for tails in found]
        limit = self.makespan * (1 - _TINY)
        self.critical = [(p, i) for p in positions for i, (start, tail) in enumerate(zip(self._starts[p], self._tails[p]))
                         if start + tail > limit]


def _live(row: list[SearchAction]) -> list[int]:
    """Activations kept before each action, and after the last."""
    found = [0]
    for move in row:
        found.append(found[-1] + sum((kind == F) - (kind in (B, W)) for kind, _, _ in move.parts))
    return found


def differing(old: list[SearchAction], new: list[SearchAction]) -> tuple[int, int]:
    """(first index at which two rows differ, how many actions at their ends are the same)."""
    shorter = min(len(old), len(new))
    first = next((i for i in range(shorter) if old[i] is not new[i]), shorter)
    common = 0
    while common < shorter - first and old[-1 - common] is new[-1 - common]:
        common += 1
    return first, common
