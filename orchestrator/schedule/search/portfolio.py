"""The search: many starts, the best of them annealed, a lower bound beside the result.

Starts are the published kinds that fit (so the result is never worse than they are) and what list scheduling builds. The
result is a function of its arguments: random numbers come from a fixed seed, effort is counted in evaluations.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from orchestrator.refusal import ConfigError
from orchestrator.schedule.ir.actions import Schedule
from orchestrator.schedule.ir.stages import BOTH, LOOP, Stages, V
from orchestrator.schedule.kinds.registry import KINDS, TABLE
from orchestrator.schedule.search.anneal import Cooling, anneal, mirrored
from orchestrator.schedule.search.bound import lower_bound
from orchestrator.schedule.search.build import build, rules
from orchestrator.schedule.search.problem import Problem, Rows, SearchAction, W
from orchestrator.schedule.timing.durations import Durations, per_chunk

EFFORT = 36_000_000
"""Actions evaluated, about: some seconds of one core."""
_BEHIND = 1.08
_ROUNDS = ((5, (0.2, 0.03, 0.6)), (2, (0.12, 0.02, 0.6)), (1, (0.08, 0.01, 0.7)))
"""How many go on, and how they cool: temperatures, and the share of changes where there is no slack."""
_MOST_EVALUATIONS = 60_000


@dataclass(frozen=True, slots=True)
class Options:
    """What the search may choose from.

    stages: placements. most_activations: in microbatches on all layers of a rank. splits: half microbatches.
    """

    stages: tuple[Stages, ...]
    most_activations: float
    splits: bool


@dataclass(frozen=True, slots=True)
class SearchResult:
    """lower_bound: no schedule of the same options is below it. published: the best published kind that fits, and its
    makespan; None where no one fits."""

    schedule: Schedule
    makespan: float
    lower_bound: float
    published: tuple[str, float] | None

    @property
    def distance(self) -> float:
        """Above the lower bound, as a share of it."""
        return self.makespan / self.lower_bound - 1


@dataclass(frozen=True, slots=True)
class _Start:
    makespan: float
    problem: Problem
    rows: Rows
    kind: str | None


def options_for(positions: int, microbatches: int, layers: int, most_activations: float | None = None, *, splits: bool = True,
                placement: str | None = None, chunks: int | None = None) -> Options:
    """Every placement with as many chunks as divide `layers` (of a rank), or those of one placement or number of chunks.

    most_activations: None: what DualPipe keeps, positions + 1.
    Raises ConfigError: nothing is left.
    """
    if most_activations is not None and most_activations < 1:
        raise ConfigError("most_activations", most_activations, "at least 1")
    every = [Stages(LOOP, positions, c) for c in range(1, layers + 1) if layers % c == 0]
    every += [Stages(V, positions, c) for c in range(2, layers + 1, 2) if layers % c == 0]
    if positions == 1 or (positions % 2 == 0 and microbatches % 2 == 0):
        every.append(Stages(BOTH, positions))
    chosen = tuple(s for s in every if placement in (None, s.placement) and chunks in (None, s.chunks))
    if not chosen and placement == BOTH and chunks in (None, 1):
        if positions % 2:
            raise ConfigError("positions", positions, f"1 or an even number with placement {BOTH}")
        raise ConfigError("microbatches", microbatches, f"an even number with placement {BOTH}")
    if not chosen:
        raise ConfigError("chunks", chunks, f"a divisor of a rank's {layers} layers that placement {placement or 'auto'} takes")
    return Options(chosen, positions + 1 if most_activations is None else most_activations, splits)


def searched(stages: Stages, microbatches: int, durations: Durations, most_activations: float | None = None, *,
             splits: bool = True, effort: int = EFFORT) -> SearchResult:
    """The shortest schedule found for one placement; `durations` by its stages.

    Raises ConfigError: too few activations; microbatches that the placement's entrances cannot share evenly.
    """
    _refuse_microbatches(microbatches, stages)
    kept = stages.positions + 1 if most_activations is None else most_activations
    return _search([Problem(stages, microbatches, durations, kept, splits=splits)], effort)


def search(microbatches: int, durations: Durations, options: Options, *, effort: int = EFFORT) -> SearchResult:
    """The shortest schedule found; `durations` are of a whole rank, single numbers. Raises ConfigError as `searched` does."""
    for stages in options.stages:
        _refuse_microbatches(microbatches, stages)
    return _search([Problem(stages, microbatches, per_chunk(durations, stages), options.most_activations, splits=options.splits)
                    for stages in options.stages], effort)


def _search(problems: Sequence[Problem], effort: int) -> SearchResult:
    starts = [start for problem in problems for start in (*_published(problem), *_built(problem))]
    if not starts:
        raise ConfigError("most_activations", problems[0].most_activations, "more: no schedule keeps so few")
    known = min((start for start in starts if start.kind), key=lambda start: start.makespan, default=None)
    makespan, rows, problem = _improve(starts, effort)
    return SearchResult(problem.schedule(rows), makespan, min(map(lower_bound, problems)), known and (known.kind, known.makespan))


def _refuse_microbatches(microbatches: int, stages: Stages) -> None:
    if stages.shared_evenly(microbatches) != microbatches:
        raise ConfigError("microbatches", microbatches, "at least 1" if len(stages.paths) == 1 else
                          f"an even number, at least 2, with placement {stages.placement}")


def _improve(starts: Sequence[_Start], effort: int) -> tuple[float, Rows, Problem]:
    """Anneal the best starts, round by round: fewer of them in each, and more effort for each."""
    evaluations = min(_MOST_EVALUATIONS, effort // max(1, sum(map(len, min(starts, key=lambda s: s.makespan).rows))))
    left = [(start.makespan, start.rows, start.problem) for start in _finalists(starts)]
    seed = 0
    for entrants, cooling in _ROUNDS:
        left = sorted(left, key=lambda found: found[0])[:entrants]
        for index, (_, rows, problem) in enumerate(left):
            share = Cooling(evaluations // (len(_ROUNDS) * len(left)), *cooling)
            left[index] = (*anneal(problem, rows, share, seed), problem)
            seed += 1
    return min(left, key=lambda found: found[0])


def _finalists(starts: Sequence[_Start]) -> list[_Start]:
    """The best of each placement, then the next best, until there are enough; none far behind the best."""
    order = sorted(starts, key=lambda start: start.makespan)
    order = [start for start in order if start.makespan <= _BEHIND * order[0].makespan]
    first: dict[Stages, _Start] = {}
    for start in order:
        first.setdefault(start.problem.stages, start)
    heads = list(first.values())
    return (heads + [start for start in order if not any(start is head for head in heads)])[:_ROUNDS[0][0]]


def _published(problem: Problem) -> Iterator[_Start]:
    for kind in (name for name in KINDS if TABLE[name].fits(problem.stages)):
        try:
            rows = problem.rows(TABLE[kind].schedule(problem.stages, problem.microbatches))
        except ConfigError:  # it takes other numbers of microbatches
            continue
        if all(map(problem.allows, rows)):
            yield _Start(problem.makespan(rows), problem, rows, kind)
            if problem.splits:
                rows = [[_split(problem, position, move) for move in row] for position, row in enumerate(rows)]
                yield _Start(problem.makespan(rows), problem, rows, None)


def _split(problem: Problem, position: int, move: SearchAction) -> SearchAction:
    """In halves, if it is a lone action and shorter so."""
    if len(move.parts) > 1 or move.parts[0][0] == W:
        return move
    return min(move, problem.move(position, move.parts, split=True), key=lambda m: m.duration)


def _built(problem: Problem) -> Iterator[_Start]:
    """By list scheduling, with all the activations allowed and with DualPipe's: more of them do not always help its rules."""
    usual = problem.stages.positions + 1
    for most in dict.fromkeys((problem.limit / problem.stages.chunks, min(usual, problem.limit / problem.stages.chunks))):
        tighter = problem.within(most)
        for chosen in rules(tighter):
            if (rows := build(tighter, chosen)) is None:
                continue
            yield _Start(problem.makespan(rows), problem, rows, None)
            if problem.stages.placement == BOTH and (twin := mirrored(problem, rows)):
                yield _Start(problem.makespan(twin), problem, twin, None)
