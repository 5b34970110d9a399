"""Simulated annealing of a schedule: small changes of one row, kept if the whole gets shorter, sometimes if it gets longer.

Most changes are tried where actions have no slack, since no other can shorten the makespan. Where a schedule of DualPipe's
placement is the mirror image of itself, and costs are, both images change at once: half the choices, twice the depth.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass

from orchestrator.schedule.ir.stages import BOTH
from orchestrator.schedule.search.evaluator import IncrementalEvaluator, differing
from orchestrator.schedule.search.problem import NEVER, B, I, Part, Problem, Rows, SearchAction, W

_STEPS = (-1, -1, -1, -2, -2, -3, -4, 1, 1, 2, 3, 5, 8)
_NEAR = 5
_LATER = 12
_TRIES = 1000


@dataclass(frozen=True, slots=True)
class Cooling:
    """From temperature `start` to `end`, in forwards of a whole rank; `critical`: share of changes where there is no
    slack."""

    evaluations: int
    start: float
    end: float
    critical: float


def anneal(problem: Problem, rows: Rows, cooling: Cooling, seed: int) -> tuple[float, Rows]:
    """(makespan, rows) of the best schedule met."""
    chance = random.Random(seed)
    evaluator = IncrementalEvaluator(problem, rows)
    both_at_once = is_mirrored(problem, rows)
    best, best_rows = evaluator.makespan, list(evaluator.rows)
    for step in range(cooling.evaluations):
        temperature = problem.unit * cooling.start * (cooling.end / cooling.start) ** (step / cooling.evaluations)
        position, changed = _propose(problem, evaluator, chance, cooling.critical)
        if changed is None:
            break
        changes = {position: changed}
        if both_at_once:
            other = problem.positions - 1 - position
            changes[other] = _mirror_change(problem, other, evaluator.rows[position], changed, evaluator.rows[other])
        trial = evaluator.attempt(changes, evaluator.makespan - temperature * math.log(1.0 - chance.random()))
        if trial is not None:
            evaluator.accept(trial)
            if evaluator.makespan < best - 1e-9:
                best, best_rows = evaluator.makespan, list(evaluator.rows)
    return best, best_rows


def is_mirrored(problem: Problem, rows: Rows) -> bool:
    """Whether position P-1-p runs what p does, with the directions exchanged, in the same times."""
    if problem.stages.placement != BOTH or problem.slots == 1:
        return False
    last = problem.positions - 1
    return all(_mirror(problem, last - p, rows[p]) == rows[last - p]
               and [move.duration for move in rows[p]] == [move.duration for move in rows[last - p]]
               for p in range(problem.positions))


def mirrored(problem: Problem, rows: Rows) -> Rows | None:
    """The first half of `rows` and its mirror image; None: they wait for each other for ever."""
    half = problem.positions // 2
    twin = rows[:half] + [_mirror(problem, problem.positions - 1 - p, rows[p]) for p in reversed(range(half))]
    return twin if len(twin) == len(rows) and problem.makespan(twin) < NEVER else None


def _mirror(problem: Problem, position: int, row: list[SearchAction]) -> list[SearchAction]:
    return [problem.move(position, tuple((kind, 1 - slot, m) for kind, slot, m in move.parts), move.split) for move in row]


def _mirror_change(problem: Problem, position: int, old: list[SearchAction], new: list[SearchAction],
                   image: list[SearchAction]) -> list[SearchAction]:
    """The mirror image of `new`, made of `image`, that of `old`."""
    first, common = differing(old, new)
    return [*image[:first], *_mirror(problem, position, new[first:len(new) - common]), *image[len(image) - common:]]


def _propose(problem: Problem, evaluator: IncrementalEvaluator,
             chance: random.Random, critical: float) -> tuple[int, list[SearchAction] | None]:
    """A row that may take the place of a position's row; None: none was found in many tries."""
    for _ in range(_TRIES):
        position, changed = _try(problem, evaluator, chance, critical)
        if changed is not None and evaluator.allows(position, changed):
            return position, changed
    return 0, None


def _try(problem: Problem, evaluator: IncrementalEvaluator,
         chance: random.Random, critical: float) -> tuple[int, list[SearchAction] | None]:
    if chance.random() < critical:
        position, index = chance.choice(evaluator.critical)
    else:
        position = chance.randrange(problem.positions)
        index = chance.randrange(len(evaluator.rows[position]))
    row = evaluator.rows[position]
    change = shift if chance.random() < 0.35 else chance.choice(OF_PAIRS if len(row[index].parts) == 2 else OF_SINGLES)
    return position, change(problem, position, row, index, chance)


# --- changes: each gives a new row, or None where it does not apply -----------------------------------------------------

def shift(problem: Problem, position: int, row: list[SearchAction], index: int, chance: random.Random) -> list[SearchAction] | None:
    """Another place for one action."""
    target = index + chance.choice(_STEPS)
    if not 0 <= target < len(row):
        return None
    changed = list(row)
    changed.insert(target, changed.pop(index))
    return changed


def _toggle_split(problem: Problem, position: int, row: list[SearchAction], index: int,
                  chance: random.Random) -> list[SearchAction] | None:
    move = row[index]
    if not problem.splits or move.parts[0][0] == W:
        return None
    return [*row[:index], problem.move(position, move.parts, not move.split), *row[index + 1:]]


def _unpair(problem: Problem, position: int, row: list[SearchAction], index: int, chance: random.Random) -> list[SearchAction]:
    """Two actions in place of a pair, in either order; a B among them now and then as I, with its W later."""
    parts = list(row[index].parts)
    chance.shuffle(parts)
    later: list[Part] = []
    if chance.random() < 0.3:
        later = [(W, *part[1:]) for part in parts if part[0] == B]
        parts = [(I, *part[1:]) if part[0] == B else part for part in parts]
    split = problem.splits and chance.random() < 0.7
    single = [problem.move(position, (part,), split and part[0] != W) for part in parts]
    changed = [*row[:index], *single, *row[index + 1:]]
    for part in later:
        changed.insert(min(len(changed), index + 2 + chance.randrange(_LATER)), problem.move(position, (part,)))
    return changed


def _pair_up(problem: Problem, position: int, row: list[SearchAction], index: int,
             chance: random.Random) -> list[SearchAction] | None:
    """A pair of this action and a lone one near it, at the place of either."""
    part = row[index].parts[0]
    near = range(max(0, index - _NEAR), min(len(row), index + _NEAR + 1))
    partners = [i for i in near if i != index and len(row[i].parts) == 1 and _paired(part, row[i].parts[0])]
    if not partners:
        return None
    other = chance.choice(partners)
    place, gone = (index, other) if chance.random() < 0.5 else (other, index)
    changed = list(row)
    changed[place] = problem.move(position, _paired(part, row[other].parts[0]))
    del changed[gone]
    return changed


def _paired(one: Part, other: Part) -> tuple[Part, Part] | None:
    """Sorted, for F < B < I < W is the order that a Pair wants; None: they are no pair."""
    first, second = sorted((one, other))
    return (first, second) if first[0] != W and first[1:] != second[1:] else None


def _repair(problem: Problem, position: int, row: list[SearchAction], index: int,
            chance: random.Random) -> list[SearchAction] | None:
    """A lone action near a pair takes the place of one of its parts, which is then alone."""
    near = range(max(0, index - _NEAR), min(len(row), index + _NEAR + 1))
    lone = [i for i in near if len(row[i].parts) == 1]
    if not lone:
        return None
    other, (stays, leaves) = chance.choice(lone), chance.sample(row[index].parts, 2)
    parts = _paired(stays, row[other].parts[0])
    if parts is None:
        return None
    changed = list(row)
    changed[index] = problem.move(position, parts)
    changed[other] = problem.move(position, (leaves,), problem.splits and leaves[0] != W and chance.random() < 0.5)
    return changed


def _defer(problem: Problem, position: int, row: list[SearchAction], index: int,
           chance: random.Random) -> list[SearchAction] | None:
    """I in place of B, alone or in a pair, and its W some actions later."""
    whole = next((part for part in row[index].parts if part[0] == B), None)
    if whole is None:
        return None
    parts = tuple(sorted((I, *whole[1:]) if part == whole else part for part in row[index].parts))
    changed = list(row)
    changed[index] = problem.move(position, parts, row[index].split)
    changed.insert(min(len(changed), index + 1 + chance.randrange(_LATER)), problem.move(position, ((W, *whole[1:]),)))
    return changed


def _rejoin(problem: Problem, position: int, row: list[SearchAction], index: int,
            chance: random.Random) -> list[SearchAction] | None:
    """B in place of I, alone or in a pair; its W goes."""
    inputs = next((part for part in row[index].parts if part[0] == I), None)
    if inputs is None:
        return None
    weight = (W, *inputs[1:])
    place = next((i for i in range(index + 1, len(row)) if weight in row[i].parts), None)
    if place is None:
        return None
    changed = list(row)
    parts = tuple(sorted((B, *inputs[1:]) if part == inputs else part for part in row[index].parts))
    changed[index] = problem.move(position, parts, row[index].split)
    rest = tuple(part for part in row[place].parts if part != weight)
    if rest:
        changed[place] = problem.move(position, rest, problem.splits and chance.random() < 0.5)
    else:
        del changed[place]
    return changed


_Change = Callable[[Problem, int, list[SearchAction], int, random.Random], list[SearchAction] | None]
OF_PAIRS: tuple[_Change, ...] = (_unpair, _unpair, _repair, _defer, _rejoin)
OF_SINGLES: tuple[_Change, ...] = (_toggle_split, _pair_up, _pair_up, _pair_up, _defer, _rejoin)
