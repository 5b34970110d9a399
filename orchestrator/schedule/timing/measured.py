"""One step of a run as measured, beside the schedule that it ran: for pictures, traces, and durations of a simulation.

A measured span is named after the action, then the segment: `F0.3 attention 2`; a weight gradient has no segment. Times here
are milliseconds from the first span of the step. Spans of compute and exchange belong to actions; those of lane pipeline are
waits for another position, those of lane reduce the reduction of gradients.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from orchestrator.schedule.ir.actions import ActionKind, Compute, Schedule, Work
from orchestrator.schedule.ir.spans import Interval, Lane, Span, measure, union
from orchestrator.schedule.ir.stages import Stages
from orchestrator.schedule.timing.durations import Durations

_ACTION = re.compile(r"([FBIW])(\d+)\.(\d+)(?:/2)?")
_WORK = (Lane.COMPUTE, Lane.EXCHANGE)
_LEAST = 1e-3
"""Share of an action that is compute at least: one that only communicates does not exist."""
_UNEVEN = 1.2
"""How much longer two positions may communicate for the same stages before the slower one counts as slow."""


@dataclass(frozen=True)
class MeasuredStep:
    """One step. rows: by position, the spans of one rank at it, in order of their starts."""

    step: int
    rows: tuple[tuple[Span, ...], ...]

    @cached_property
    def actions(self) -> tuple[dict[str, list[Span]], ...]:
        """By position: the spans of each compute action, by its name; waits included."""
        found: list[dict[str, list[Span]]] = []
        for row in self.rows:
            found.append(defaultdict(list))
            for span in row:
                for name in _names(span.label):
                    found[-1][name].append(span)
        return tuple(found)

    @property
    def makespan(self) -> float:
        """To the end of the last action; the reduction comes after."""
        return max((span.end for row in self.rows for span in row if span.lane in _WORK), default=0.0)

    @property
    def end(self) -> float:
        return max((span.end for row in self.rows for span in row), default=0.0)

    def spans(self, position: int, compute: Compute, *lanes: Lane) -> list[Span]:
        """Of one action, on these lanes (compute and exchange, unless told)."""
        return [span for span in self.actions[position].get(str(compute), ()) if span.lane in (lanes or _WORK)]

    def pieces(self, position: int, compute: Compute) -> list[Interval]:
        """When the rank worked on an action."""
        return union((span.start, span.end) for span in self.spans(position, compute))

    def length(self, position: int, action: Work) -> float:
        """From an action's first span to its last, without waits for other positions in between; 0 if there was none."""
        spans = [span for compute in action.computes for span in self.spans(position, compute)]
        if not spans:
            return 0.0
        start, end = min(span.start for span in spans), max(span.end for span in spans)
        waits = (span for compute in action.computes for span in self.spans(position, compute, Lane.PIPELINE))
        return end - start - measure((max(wait.start, start), min(wait.end, end)) for wait in waits)

    def microbatches(self, stages: Stages) -> int:
        """Of the step, as the names of the actions tell."""
        numbers = (int(found[3]) for row in self.actions for name in row if (found := _ACTION.fullmatch(name)))
        return (max(numbers, default=-1) + 1) * len(stages.paths)


def _names(label: str) -> Iterator[str]:
    """Compute actions that a span is named after: two if it is of a whole pair, none if of something else."""
    for word in label.partition(" ")[0].split("|"):
        if _ACTION.fullmatch(word):
            yield word.removesuffix("/2")


def read_trace(text: str, positions: int, step: int | None = None) -> MeasuredStep:
    """The step of a run's trace (the last one, unless told), as `trace_json` wrote it.

    Where events name their rank's place, the ranks of row 0 and width 0 are read; else rank and position are the same.
    Raises ValueError, with what is wanted: no such trace or step, or not one of `positions` positions.
    """
    found: dict[int, dict[int, list[Span]]] = defaultdict(lambda: defaultdict(list))
    try:
        for event in json.loads(text)["traceEvents"]:
            if event["ph"] == "X" and not event["args"].get("row") and not event["args"].get("width"):
                position, start = event["args"].get("position", event["pid"]), event["ts"] / 1e3
                span = Span(position, Lane(event["cat"]), event["name"], start, start + event["dur"] / 1e3)
                found[event["args"]["step"]][position].append(span)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError("the trace of a run's steps, which this file is not") from error
    if not found or step not in (None, *found):
        raise ValueError(f"a step that the trace has: {', '.join(map(str, sorted(found))) or 'it has none'}")
    step = max(found) if step is None else step
    rows = found[step]
    if sorted(rows) != list(range(positions)):
        raise ValueError(f"the trace of a pipeline of {positions} ranks; this one has {len(rows)}")
    zero = min(span.start for row in rows.values() for span in row)
    return MeasuredStep(step, tuple(tuple(_shifted(rows[position], zero)) for position in range(positions)))


def _shifted(row: Iterable[Span], zero: float) -> Iterator[Span]:
    for span in sorted(row, key=lambda span: (span.start, span.end)):
        yield Span(span.rank, span.lane, span.label, span.start - zero, span.end - zero)


def refuse_another_schedule(measured: MeasuredStep, schedule: Schedule) -> None:
    """Raises ValueError, with what is wanted: the step did not run this schedule."""
    for position, row in enumerate(schedule.rows):
        known = {str(compute) for action in row for compute in action.computes}
        wanted = {name for name in known if not name.startswith(ActionKind.BACKWARD_WEIGHT)}  # it may have had nothing to do
        ran = {name for name, spans in measured.actions[position].items() if any(span.lane in _WORK for span in spans)}
        for names, words in ((sorted(wanted - ran), "did not run"), (sorted(ran - known), "ran")):
            if names:
                raise ValueError(f"the trace of this schedule ({schedule.kind}, {schedule.microbatches} microbatches); "
                                 f"rank {position} {words} {names[0]}")


def measured_durations(measured: MeasuredStep, schedule: Schedule, hop: float = 0.0) -> Durations:
    """Means by kind and stage, in milliseconds: with them a simulation of `schedule` is comparable with what was measured.

    A lone action lasts as long as it did, from its first span to its last, without waits for other positions; likewise F|B,
    by the forward's stage; 0 at stages that never run one. Other pairs and split actions follow from their parts.
    """
    samples, layers = _samples(measured, schedule)
    stages = range(schedule.stages.count)

    def means(of: str) -> list[float]:
        return [_mean(samples[of, stage]) for stage in stages]

    def compute(kind: ActionKind, sent: Sequence[float]) -> list[float]:
        alone, inside = means(kind), means(f"inside {kind}")
        return [max(length - s, _LEAST * length) if length else part for length, s, part in zip(alone, sent, inside, strict=True)]

    dispatch, combine = means("dispatch"), means("combine")
    sent = [d + c for d, c in zip(dispatch, combine, strict=True)]
    backward, pair = means(ActionKind.BACKWARD), means(ActionKind.PAIR)
    return Durations(
        forward=compute(ActionKind.FORWARD, sent), backward_input=compute(ActionKind.BACKWARD_INPUT, sent),
        backward_weight=compute(ActionKind.BACKWARD_WEIGHT, [0.0] * len(stages)), hop=hop, dispatch=dispatch, combine=combine,
        backward=backward if any(backward) else None, pair=pair if any(pair) else None, layers=layers)


def durations_to_plan_with(measured: MeasuredStep, schedule: Schedule, hop: float = 0.0) -> Durations:
    """The same means in a form that gives a duration to any action, also to those that the step had none of: as its pieces say.

    Where two positions host the same stages, and one communicates more slowly by more than a fifth, it is told apart.
    """
    found = replace(measured_durations(measured, schedule, hop), backward=None, pair=None)
    slow = _exchange_slowdown(measured, schedule)
    if not slow:
        return found
    holders = [schedule.stages.holders(stage) for stage in range(schedule.stages.count)]
    usual = [sum(slow[position] for position in held) / len(held) for held in holders]  # each has as many microbatches
    dispatch, combine = ([value / factor for value, factor in zip(values, usual, strict=True)]
                         for values in (found.dispatch, found.combine))
    return replace(found, dispatch=dispatch, combine=combine, exchange_slowdown=slow)


def _exchange_slowdown(measured: MeasuredStep, schedule: Schedule) -> tuple[float, ...]:
    """By position, against the other one with the same stages; empty if none is slow."""
    sent = [sum(span.end - span.start for action in row for compute in action.computes
                for span in measured.spans(position, compute, Lane.EXCHANGE)) for position, row in enumerate(schedule.rows)]
    factors = []
    for position, stages in enumerate(map(schedule.stages.hosted, range(schedule.positions))):
        least = min(sent[holder] for holder in schedule.stages.holders(stages[0]))
        factors.append(sent[position] / least if least and sent[position] > _UNEVEN * least else 1.0)
    return tuple(factors) if max(factors) > 1 else ()


def _samples(measured: MeasuredStep, schedule: Schedule) -> tuple[dict[tuple[str, int], list[float]], int]:
    """Everything to take a mean of, by what it is and stage; and the layers of a stage that communicate, at least 1.

    What: a kind (alone, or PAIR for F|B), `inside F`, `inside I`, `inside W` (compute wherever it was done; a B is one I and
    one W), `dispatch` and `combine` (the gradient of combine is sent like a dispatch, and the reverse).
    """
    samples, layers = defaultdict(list), 1
    for position, row in enumerate(schedule.rows):
        for action in row:
            kinds = tuple(compute.kind for compute in action.computes)
            if action.kind in kinds or kinds == (ActionKind.FORWARD, ActionKind.BACKWARD):
                samples[action.kind, action.computes[0].stage].append(measured.length(position, action))
            for compute in action.computes:
                for part, length in _parts(compute.kind, measured.spans(position, compute)).items():
                    samples[part, compute.stage].append(length)
                words = [span.label.split() for span in measured.spans(position, compute, Lane.EXCHANGE)]
                layers = max(layers, sum("dispatch" in label for label in words))
    return samples, layers


def _parts(kind: ActionKind, spans: Iterable[Span]) -> dict[str, float]:
    if kind is ActionKind.BACKWARD:
        parts = dict.fromkeys((f"inside {ActionKind.BACKWARD_INPUT}", f"inside {ActionKind.BACKWARD_WEIGHT}"), 0.0)
    else:
        parts = {f"inside {kind}": 0.0}
    if kind is not ActionKind.BACKWARD_WEIGHT:
        parts |= {"dispatch": 0.0, "combine": 0.0}
    for span in spans:
        segment = span.label.partition(" ")[2]
        if span.lane == Lane.EXCHANGE:
            first = segment.startswith("dispatch" if kind is ActionKind.FORWARD else "combine")
            part = "dispatch" if first else "combine"
        else:
            inside = ActionKind.BACKWARD_INPUT if segment else ActionKind.BACKWARD_WEIGHT
            part = f"inside {inside if kind is ActionKind.BACKWARD else kind}"
        parts[part] = parts.get(part, 0.0) + span.end - span.start
    return parts


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
