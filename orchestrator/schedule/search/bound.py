"""What no schedule of a placement can beat: a lower bound of the makespan, derived for each position.

Let a position have n microbatches in each slot, and keep at most k activations (all counted for its slots together).
- head: no backward can start here before some microbatch went forward through all stages and back to one of this position's.
  Until then there are forwards only, at most k of them, since nothing is released.
- tail: after the last forward here, its microbatch still goes to the last stage, all the way back, and has its weight gradient
  at the first stage, whether with its backward or after it. Meanwhile this position has backwards and weight gradients only,
  of at most k microbatches.
- body: between head and tail the position runs at least all but k of its forwards, backwards and weight gradients. Whatever the
  actions, that takes at least what the cheapest mix of them does: a linear program, solved at its dual's corners.
The bound of a position is head + body + tail. A position that may keep all its microbatches at once has no such head and
tail; then the bound is when its first forward can arrive, plus the body of everything. No makespan is below the way of one
microbatch, either. All hops count; durations are the shortest of any action that does the work.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations, product

from orchestrator.schedule.search.problem import B, F, I, Part, Problem, W

_TINY = 1e-9


def lower_bound(problem: Problem) -> float:
    """Makespan that no schedule of this problem's actions is below, in the unit of its durations."""
    return max(_way(problem), *(_of_position(problem, position) for position in range(problem.positions)))


def _of_position(problem: Problem, position: int) -> float:
    total, kept = problem.each * problem.slots, problem.limit
    arrival = min(_forward(problem, path, 0, stage) for path, stage in _hosted(problem, position))
    whole = arrival + total * _body(problem, position)
    if total <= kept:
        return whole
    last = problem.count - 1
    head = min(_forward(problem, path, 0, last + 1) + _back(problem, path, last, stage)
               for path, stage in _hosted(problem, position))
    tail = min(_forward(problem, path, stage + 1, last + 1) + _hop_after(problem, path, stage) + _back(problem, path, last, 0)
               + _last(problem, path) for path, stage in _hosted(problem, position))
    return max(whole, head + (total - kept) * _body(problem, position) + tail)


def _way(problem: Problem) -> float:
    """Of one microbatch, there and back."""
    last = problem.count - 1
    return min(_forward(problem, path, 0, last + 1) + _back(problem, path, last, 0) + _last(problem, path)
               for path in range(len(problem.stages.paths)))


def _hosted(problem: Problem, position: int) -> Iterator[tuple[int, int]]:
    """(path, stage) of a position's slots."""
    for number, path in enumerate(problem.stages.paths):
        for stage, (place, _) in enumerate(path):
            if place == position:
                yield number, stage


def _forward(problem: Problem, path: int, first: int, end: int) -> float:
    """From the start of F at stage `first` to when its tensor is at stage `end`; at the last stage, to the end of F."""
    return sum(_shortest(problem, path, stage, F) + _hop_after(problem, path, stage) for stage in range(first, end))


def _back(problem: Problem, path: int, first: int, end: int) -> float:
    """From the start of the backward at stage `first` to when the gradient is at stage `end`."""
    return sum(_shortest(problem, path, stage, I) + _hop_after(problem, path, stage - 1) for stage in range(first, end, -1))


def _last(problem: Problem, path: int) -> float:
    """What a microbatch ends with at stage 0: I and then W, or B, in which W hides under communication."""
    position, slot = problem.stages.paths[path][0]
    whole = min(problem.move(position, ((B, slot, 0),), split).duration for split in _splits(problem, B))
    return min(whole, _shortest(problem, path, 0, I) + _shortest(problem, path, 0, W))


def _hop_after(problem: Problem, path: int, stage: int) -> float:
    """Between `stage` and the next one, forward or back, whichever is shorter; 0 after the last."""
    places = problem.stages.paths[path]
    if stage + 1 >= len(places):
        return 0.0
    here, there = places[stage][0], places[stage + 1][0]
    return min(problem.durations.arrival(here, there), problem.durations.arrival(there, here))


def _shortest(problem: Problem, path: int, stage: int, kind: int) -> float:
    """Of all actions that do this. Known durations of B and F|B may be any, so these are looked at too."""
    position, slot = problem.stages.paths[path][stage]
    found = [problem.move(position, ((kind, slot, 0),), split).duration for split in _splits(problem, kind)]
    if kind == I:
        found += [problem.move(position, ((B, slot, 0),), split).duration for split in _splits(problem, B)]
        found += [problem.move(position, ((F, other, 1), (B, slot, 0))).duration for other in range(problem.slots)]
    if kind == F:
        found += [problem.move(position, ((F, slot, 0), (B, other, 1))).duration for other in range(problem.slots)]
    return min(found)


def _splits(problem: Problem, kind: int) -> tuple[bool, ...]:
    return (False, True) if problem.splits and kind != W else (False,)


def _body(problem: Problem, position: int) -> float:
    """Time of a position for one F, one I and one W, by the cheapest mix of actions: max f + i + w such that no action is
    worth more than it takes."""
    worth = _mixes(problem, position)
    best = 0.0
    corners = [*worth, ((1, 0, 0), 0.0), ((0, 1, 0), 0.0), ((0, 0, 1), 0.0)]  # the latter three: f, i or w is 0
    for chosen in combinations(corners, 3):
        prices = _solve([row for row, _ in chosen], [limit for _, limit in chosen])
        if prices and min(prices) > -_TINY and all(
                sum(n * price for n, price in zip(row, prices)) < limit + _TINY for row, limit in worth):
            best = max(best, sum(prices))
    return best


def _mixes(problem: Problem, position: int) -> list[tuple[tuple[int, int, int], float]]:
    """((F, I, W in it), duration) of every form of action, the shortest over the position's slots."""
    content = {F: (1, 0, 0), B: (0, 1, 1), I: (0, 1, 0), W: (0, 0, 1)}
    found: dict[tuple[int, int, int], float] = {}

    def add(parts: tuple[Part, ...], split: bool) -> None:
        row = tuple(map(sum, zip(*(content[kind] for kind, _, _ in parts))))
        found[row] = min(found.get(row, float("inf")), problem.move(position, parts, split).duration)

    slots = range(problem.slots)
    for kind, slot in product(content, slots):
        for split in _splits(problem, kind):
            add(((kind, slot, 0),), split)
    for (first, a), (second, b) in product(product(content, slots), repeat=2):
        if first <= second and first != W:
            add(((first, a, 0), (second, b, 1)), False)
    return list(found.items())


def _solve(rows: list[tuple[int, int, int]], values: list[float]) -> tuple[float, ...] | None:
    """The three unknowns of three equations (Cramer's rule), if there is one solution."""
    determinant = _determinant(rows)
    if not determinant:
        return None
    found = []
    for column in range(3):
        replaced = [tuple(v if c == column else n for c, n in enumerate(row)) for row, v in zip(rows, values)]
        found.append(_determinant(replaced) / determinant)
    return tuple(found)


def _determinant(m) -> float:
    return (m[0][0] * (m[1][1] * m[2][2] - m[1][2] * m[2][1]) - m[0][1] * (m[1][0] * m[2][2] - m[1][2] * m[2][0])
            + m[0][2] * (m[1][0] * m[2][1] - m[1][1] * m[2][0]))
