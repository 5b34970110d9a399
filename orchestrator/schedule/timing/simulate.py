"""When each action of a schedule runs, given how long each takes: the ideal that a run is compared with.

Every position runs its row in order, starting each action as soon as it is free and what the action depends on has arrived.
Links are asynchronous and never full: a tensor arrives `hop` after the action (both of a pair) that made it.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cached_property

from orchestrator.schedule.ir.actions import Schedule
from orchestrator.schedule.ir.graph import Graph, Sort, compiled
from orchestrator.schedule.ir.spans import Figures, Lane, Span, figures, together
from orchestrator.schedule.timing.durations import UNIT, Durations


@dataclass(frozen=True, eq=False)
class Timeline:
    """What a simulation found. starts, ends, stretch: by action number of the graph; stretch: the action's jitter, as a factor.

    Spans are made when they are asked for: there may be millions.
    """

    graph: Graph
    durations: Durations
    starts: tuple[float, ...]
    ends: tuple[float, ...]
    stretch: tuple[float, ...]
    makespan: float

    @cached_property
    def rows(self) -> tuple[tuple[Span, ...], ...]:
        """By position, a span for each action of the schedule's row, in its order, on lane compute, from time 0."""
        actions, starts, ends = self.graph.actions, self.starts, self.ends
        return tuple(
            tuple(Span(position, Lane.COMPUTE, str(actions[n]), starts[n], ends[n]) for n in self.graph.numbers(position))
            for position in range(self.graph.schedule.positions)
        )

    @cached_property
    def lanes(self) -> tuple[tuple[Span, ...], ...]:
        """By position, what its lanes do during its actions: spans on lanes compute and exchange, action by action."""
        sorts, sort_of = self.graph.sorts
        pieces = [self.durations.template(sort.action, sort.position).spans for sort in sorts]
        found: list[list[Span]] = [[] for _ in range(self.graph.schedule.positions)]
        for number, (position, action) in enumerate(zip(self.graph.position, self.graph.actions, strict=True)):
            start, stretch, label = self.starts[number], self.stretch[number], str(action)
            found[position] += [Span(position, lane, label, start + stretch * begin, start + stretch * end)
                                for lane, begin, end in pieces[sort_of[number]]]
        return tuple(map(tuple, found))

    def figures(self) -> tuple[Figures, ...]:
        """By position, over the whole makespan: those of `lanes`, since the actions of a position come one after the other.

        Raises ValueError: nothing takes any time.
        """
        sorts, sort_of = self.graph.sorts
        of_sort = [_figures(self.durations, sort) for sort in sorts]
        return tuple(
            together(((of_sort[sort_of[n]], self.stretch[n]) for n in self.graph.numbers(position)), self.makespan)
            for position in range(self.graph.schedule.positions)
        )

    def bubbles(self) -> tuple[float, ...]:
        """Time in which a position neither computes nor communicates, by position."""
        return tuple(self.makespan * found.bubble_ratio for found in self.figures())


def simulate(schedule: Schedule | Graph, durations: Durations = UNIT) -> Timeline:
    """Run `schedule`. Raises ScheduleError: it never ends, since actions wait for each other or for one that is missing."""
    graph = compiled(schedule)
    stretch = _stretch(graph, durations)
    starts, ends = _run(graph, durations, stretch)
    return Timeline(graph, durations, tuple(starts), tuple(ends), stretch, max(ends, default=0.0))


def makespan(schedule: Schedule | Graph, durations: Durations = UNIT) -> float:
    """That of `simulate`, and nothing else. Raises ScheduleError like it."""
    graph = compiled(schedule)
    return max(_run(graph, durations, _stretch(graph, durations))[1], default=0.0)


def _run(graph: Graph, durations: Durations, stretch: tuple[float, ...]) -> tuple[list[float], list[float]]:
    """Starts and ends of all actions."""
    sorts, sort_of = graph.sorts
    length_of_sort = [durations.of(sort.action, sort.position) for sort in sorts]
    lengths = [length_of_sort[sort] for sort in sort_of]
    if durations.jitter:
        lengths = [length * factor for length, factor in zip(lengths, stretch, strict=True)]
    arrivals, position_of, hop = graph.arrivals, graph.position, durations.hop
    arrival = durations.arrival if durations.links else None
    free = [0.0] * graph.schedule.positions
    starts, ends = [0.0] * len(lengths), [0.0] * len(lengths)
    for action in graph.order:
        position = position_of[action]
        start = free[position]
        for maker in arrivals[action]:
            start = max(start, ends[maker] + (arrival(position_of[maker], position) if arrival else hop))
        starts[action] = start
        free[position] = ends[action] = start + lengths[action]
    return starts, ends


def _stretch(graph: Graph, durations: Durations) -> tuple[float, ...]:
    """Factors with mean 1 (a normal distribution, cut off at 0), drawn by action number."""
    if not durations.jitter:
        return (1.0,) * len(graph.actions)
    rng = random.Random(durations.seed)
    return tuple(max(0.0, rng.gauss(1.0, durations.jitter)) for _ in graph.actions)


def _figures(durations: Durations, sort: Sort) -> Figures:
    """Of one action. One that takes no time has a window that is as good as any."""
    template = durations.template(sort.action, sort.position)
    spans = (Span(sort.position, lane, "", start, end) for lane, start, end in template.spans)
    return figures(spans, 0.0, template.duration or 1.0)
