"""When each action of a schedule runs, given how long each takes: the ideal that a run is compared with.

Every position runs its row in order, starting each action as soon as it is free and what the action depends on has arrived.
Links are asynchronous and never full: a tensor arrives `hop` after the action (both halves, for a pair) that made it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from orchestrator.schedule.actions import Compute, Kind, Pair, Schedule, dependencies
from orchestrator.schedule.grid import failure
from orchestrator.schedule.spans import Lane, Span, figures

PerStage = float | Sequence[float]


@dataclass(frozen=True, slots=True)
class Durations:
    """Durations in seconds (or any unit): one for all stages, or one for each stage.

    pair: a pair with this stage's forward. hop: from one position to a neighbour, for every tensor.
    """

    forward: PerStage
    backward: PerStage
    backward_input: PerStage
    backward_weight: PerStage
    pair: PerStage
    hop: float = 0.0

    def of(self, action: Compute | Pair) -> float:
        duration = getattr(self, _FIELDS[action.kind])
        stage = action.halves[0].stage
        return duration[stage] if isinstance(duration, Sequence) else duration


_FIELDS = {
    Kind.FORWARD: "forward", Kind.BACKWARD: "backward", Kind.BACKWARD_INPUT: "backward_input",
    Kind.BACKWARD_WEIGHT: "backward_weight", Kind.PAIR: "pair",
}

UNIT = Durations(forward=1.0, backward=2.0, backward_input=1.0, backward_weight=1.0, pair=3.0)
"""The usual unit costs: a backward is twice a forward, half of it for the weights; a pair hides no compute."""


@dataclass(frozen=True, slots=True)
class Timeline:
    """rows: by position, a span for each action of the schedule's row, in its order, on lane compute, from time 0."""

    rows: tuple[tuple[Span, ...], ...]
    makespan: float

    def bubbles(self) -> tuple[float, ...]:
        """Time in which a position has nothing to run, by position."""
        return tuple(self.makespan * figures(row, 0.0, self.makespan).bubble_ratio for row in self.rows)


def simulate(schedule: Schedule, durations: Durations = UNIT) -> Timeline:
    """Run `schedule`. Raises ScheduleError: it never ends, since actions wait for each other or for one that is missing."""
    ends: dict[Compute, float] = {}
    spans: list[list[Span]] = [[] for _ in schedule.rows]
    progress = True
    while progress:
        progress = False
        for position, row in enumerate(schedule.rows):
            while len(spans[position]) < len(row):
                action = row[len(spans[position])]
                needed = dependencies(action, schedule)
                if not all(action in ends for action in needed):
                    break
                free = spans[position][-1].end if spans[position] else 0.0
                start = max([free, *(ends[n] + (durations.hop if schedule.position(n) != position else 0.0) for n in needed)])
                end = start + durations.of(action)
                spans[position].append(Span(position, Lane.COMPUTE, str(action), start, end))
                ends.update(dict.fromkeys(action.halves, end))
                progress = True
    stuck = {p: len(spans[p]) for p, row in enumerate(schedule.rows) if len(spans[p]) < len(row)}
    if stuck:
        position, index = next(iter(stuck.items()))
        action = schedule.rows[position][index]
        missing = next(n for n in dependencies(action, schedule) if n not in ends)
        raise failure(f"position {position}, action {index}: {action} waits for {missing} of stage {missing.stage}, for ever",
                      schedule.rows, stuck)
    return Timeline(tuple(map(tuple, spans)), max((row[-1].end for row in spans if row), default=0.0))
