"""Schedules and programs as data: what each pipeline position runs, in which order, and what an action waits for.

Contract: frozen values and pure functions. A `Schedule` names compute only; `lower.py` turns it into one `Program` per
position. A schedule's text is one line a position, actions separated by commas, in execution order: `F0.3` is the forward of
microbatch 3 in slot 0, `B` a full backward, `I` for the input only, `W` for the weights only, `F0.3|B1.1` a pair.
Words: stage = a run of layers, slot = which of a position's stages, position = place in the pipeline, 0..P-1.
Text and values round-trip: `parse_csv(to_csv(s), s.kind) == s`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cache

FORWARD_ONLY = "forward_only"
"""The kind of schedule without backward passes."""

Place = tuple[int, int]
"""(position, slot)."""


class Kind(StrEnum):
    FORWARD = "F"
    BACKWARD = "B"
    BACKWARD_INPUT = "I"
    BACKWARD_WEIGHT = "W"
    PAIR = "PAIR"
    SEND = "SEND"
    RECEIVE = "RECEIVE"
    REDUCE = "REDUCE"


class Payload(StrEnum):
    ACTIVATION = "activation"
    GRADIENT = "gradient"


_COMPUTE = (Kind.FORWARD, Kind.BACKWARD, Kind.BACKWARD_INPUT, Kind.BACKWARD_WEIGHT)
_NUMBER = "(0|[1-9][0-9]{0,8})"
_ACTION = re.compile(rf"([{''.join(_COMPUTE)}]){_NUMBER}\.{_NUMBER}")


@dataclass(frozen=True, slots=True)
class Compute:
    """One stage's work on one microbatch. Within a schedule, the four fields name one action on one position."""

    kind: Kind
    stage: int
    slot: int
    microbatch: int

    def __post_init__(self) -> None:
        if self.kind not in _COMPUTE:
            raise ValueError(f"{self.kind} is no compute action; these are: {', '.join(_COMPUTE)}")

    def __str__(self) -> str:
        return f"{self.kind}{self.slot}.{self.microbatch}"

    @property
    def halves(self) -> tuple[Compute, ...]:
        return (self,)


@dataclass(frozen=True, slots=True)
class Pair:
    """A forward and a full backward, of different microbatches, whose compute and communication overlap."""

    forward: Compute
    backward: Compute

    def __post_init__(self) -> None:
        if (self.forward.kind, self.backward.kind) != (Kind.FORWARD, Kind.BACKWARD):
            raise ValueError(f"{self} is no pair: a pair is F|B")

    def __str__(self) -> str:
        return f"{self.forward}|{self.backward}"

    @property
    def kind(self) -> Kind:
        return Kind.PAIR

    @property
    def halves(self) -> tuple[Compute, ...]:
        return (self.forward, self.backward)


@dataclass(frozen=True, slots=True)
class Transfer:
    """One end of a tensor's way between two positions.

    kind: SEND (never blocks), or RECEIVE (post the receive; the compute action that uses the tensor waits for it).
    peer: the position at the other end. stage: the stage that uses the tensor. slot: this end's slot.
    tag: the same at both ends, distinct among a step's transfers from one position to another, at least 0 and less than
    twice the number of slots times the microbatches of a slot.
    """

    kind: Kind
    payload: Payload
    peer: int
    stage: int
    slot: int
    microbatch: int
    tag: int

    def __post_init__(self) -> None:
        if self.kind not in (Kind.SEND, Kind.RECEIVE):
            raise ValueError(f"{self.kind} is no transfer; these are: {Kind.SEND}, {Kind.RECEIVE}")

    def __str__(self) -> str:
        way = "to" if self.kind is Kind.SEND else "from"
        return f"{self.kind} {self.payload} {self.slot}.{self.microbatch} {way} {self.peer}"


@dataclass(frozen=True, slots=True)
class Reduce:
    """Reduction of all gradients of the position: the end of a training program."""

    @property
    def kind(self) -> Kind:
        return Kind.REDUCE

    def __str__(self) -> str:
        return str(self.kind)


Action = Compute | Pair | Transfer | Reduce
Row = tuple[Compute | Pair, ...]


@dataclass(frozen=True, slots=True)
class Schedule:
    """The compute actions of every position in order. `microbatches`: per step, all directions together."""

    kind: str
    positions: int
    microbatches: int
    rows: tuple[Row, ...]
    _input_only: frozenset[tuple[int, int, int]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        inputs = (c for row in self.rows for a in row for c in a.halves if c.kind is Kind.BACKWARD_INPUT)
        object.__setattr__(self, "_input_only", frozenset((c.stage, c.slot, c.microbatch) for c in inputs))

    @property
    def trains(self) -> bool:
        """Whether there are backward passes (else it is for evaluation)."""
        return self.kind != FORWARD_ONLY

    @property
    def slots(self) -> int:
        """Stages a position hosts."""
        return 1 + max(slot for path in paths(self.kind, self.positions) for _, slot in path)

    def route(self, slot: int, microbatch: int) -> tuple[Place, ...]:
        """Where the microbatch called `microbatch` in `slot` passes: a (position, slot) for each stage, in stage order.

        Raises ValueError: there is no such slot or microbatch.
        """
        found = _route(self.kind, self.positions, slot)
        if found is None or not 0 <= microbatch < self.microbatches // len(paths(self.kind, self.positions)):
            raise ValueError(f"no microbatch {slot}.{microbatch} in {self.kind} with {self.positions} positions "
                             f"and {self.microbatches} microbatches")
        return found

    def entries(self) -> Iterator[tuple[int, int]]:
        """Every microbatch of a step once, as (slot, microbatch) where it enters the pipeline."""
        entrances = paths(self.kind, self.positions)
        for path in entrances:
            for microbatch in range(self.microbatches // len(entrances)):
                yield path[0][1], microbatch

    def position(self, action: Compute) -> int:
        """Where the action runs."""
        return self.route(action.slot, action.microbatch)[action.stage][0]

    def backward(self, stage: int, slot: int, microbatch: int) -> Compute:
        """The action that yields this stage's input gradient: its I if the schedule has one, else its B."""
        split = (stage, slot, microbatch) in self._input_only
        return Compute(Kind.BACKWARD_INPUT if split else Kind.BACKWARD, stage, slot, microbatch)


@dataclass(frozen=True, slots=True)
class Program:
    """What the ranks of one position run in a step, in order. A function of the schedule and the position alone."""

    position: int
    microbatches: int
    actions: tuple[Action, ...]


def dependencies(action: Compute | Pair, schedule: Schedule) -> tuple[Compute, ...]:
    """The compute actions, on whichever position, that must be done before `action` starts.

    F needs the F of the stage before. B and I need the B or I of the stage after, and their own F. W needs its own I.
    A pair needs what its halves need.
    """
    if isinstance(action, Pair):
        return dependencies(action.forward, schedule) + dependencies(action.backward, schedule)
    kind, stage, slot, microbatch = action.kind, action.stage, action.slot, action.microbatch
    route = schedule.route(slot, microbatch)
    if kind is Kind.FORWARD:
        return (Compute(kind, stage - 1, route[stage - 1][1], microbatch),) if stage else ()
    if kind is Kind.BACKWARD_WEIGHT:
        return (Compute(Kind.BACKWARD_INPUT, stage, slot, microbatch),)
    own = Compute(Kind.FORWARD, stage, slot, microbatch)
    if stage + 1 == len(route):
        return (own,)
    return own, schedule.backward(stage + 1, route[stage + 1][1], microbatch)


@cache
def paths(kind: str, positions: int) -> tuple[tuple[Place, ...], ...]:
    """The ways through the pipeline, one for each entrance: a (position, slot) for each stage, in stage order.

    The microbatches of a step are dealt evenly to the entrances. Raises ValueError: unknown kind.
    """
    if kind not in _PATHS:
        raise ValueError(f"schedule kind {kind!r}: one of {', '.join(_PATHS)}")
    return _PATHS[kind](positions)


def _both_directions(positions: int) -> tuple[tuple[Place, ...], ...]:
    """Slot 0 goes from position 0 to P-1, slot 1 back; a single position has one stage."""
    down = tuple((position, 0) for position in range(positions))
    up = tuple((position, 1) for position in reversed(range(positions)))
    return (down, up) if positions > 1 else (down,)


_PATHS = {"dualpipe": _both_directions, FORWARD_ONLY: _both_directions}


@cache
def _route(kind: str, positions: int, slot: int) -> tuple[Place, ...] | None:
    return next((path for path in paths(kind, positions) if any(s == slot for _, s in path)), None)


@cache
def stage_at(kind: str, positions: int, position: int, slot: int) -> int | None:
    """The stage that `position` hosts in `slot`, if any."""
    places = _route(kind, positions, slot) or ()
    return places.index((position, slot)) if (position, slot) in places else None


def to_csv(schedule: Schedule) -> str:
    """One line a position, ending in a newline."""
    return "".join(",".join(map(str, row)) + "\n" for row in schedule.rows)


def parse_csv(text: str, kind: str = "dualpipe") -> Schedule:
    """Read what `to_csv` wrote. Raises ValueError, quoting the text, at the first thing that is not an action.

    The number of microbatches is the highest number of each entrance, plus one; `check.py` finds out what is missing.
    """
    lines = text.removesuffix("\n").split("\n")
    rows = tuple(
        tuple(_parse_action(word, kind, len(lines), position) for word in line.split(",")) for position, line in enumerate(lines)
    )
    highest = max(half.microbatch for row in rows for action in row for half in action.halves)
    return Schedule(kind, len(lines), (highest + 1) * len(paths(kind, len(lines))), rows)


def _parse_action(text: str, kind: str, positions: int, position: int) -> Compute | Pair:
    halves = [_parse_compute(half, kind, positions, position) for half in text.split("|")]
    if len(halves) == 1:
        return halves[0]
    if [half.kind for half in halves] != [Kind.FORWARD, Kind.BACKWARD]:
        raise ValueError(f"position {position}: {text!r} is no pair; a pair looks like F0.3|B1.1")
    return Pair(*halves)


def _parse_compute(text: str, kind: str, positions: int, position: int) -> Compute:
    match = _ACTION.fullmatch(text)
    if match is None:
        raise ValueError(f"position {position}: {text!r} is no action; one looks like F0.3 (kinds {', '.join(_COMPUTE)})")
    slot = int(match[2])
    stage = stage_at(kind, positions, position, slot)
    if stage is None:
        raise ValueError(f"position {position}: {text!r}: {kind} with {positions} positions has no slot {slot} here")
    return Compute(Kind(match[1]), stage, slot, int(match[3]))
