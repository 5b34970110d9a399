"""Schedules and programs as data: what each pipeline position runs, in which order, and what an action waits for.

Contract: frozen values and pure functions. A `Schedule` names compute only; `lower.py` turns it into one `Program` per
position. A schedule's text is one line a position, actions separated by commas, in execution order: `F0.3` is the forward of
microbatch 3 in slot 0, `B` a full backward, `I` for the input only, `W` for the weights only, `F0.3|B1.1` a pair, `F0.3/2` a
forward whose two half microbatches hide each other's communication.
Words: stage = a run of layers, slot = which of a position's stages, position = place in the pipeline, 0..P-1.
Text and values round-trip: `parse_csv(to_csv(s), s.kind, s.stages) == s`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from enum import StrEnum

from orchestrator.schedule.ir.operations import IssueOrder
from orchestrator.schedule.ir.stages import FORWARD_ONLY, Place, Stages


class ActionKind(StrEnum):
    FORWARD = "F"
    BACKWARD = "B"
    BACKWARD_INPUT = "I"
    BACKWARD_WEIGHT = "W"
    PAIR = "PAIR"
    SPLIT = "SPLIT"
    SEND = "SEND"
    RECEIVE = "RECEIVE"
    REDUCE = "REDUCE"


class Payload(StrEnum):
    ACTIVATION = "activation"
    GRADIENT = "gradient"


_COMPUTE = (ActionKind.FORWARD, ActionKind.BACKWARD, ActionKind.BACKWARD_INPUT, ActionKind.BACKWARD_WEIGHT)
_NUMBER = "(0|[1-9][0-9]{0,8})"
_ACTION = re.compile(rf"([{''.join(_COMPUTE)}]){_NUMBER}\.{_NUMBER}")
_SPLIT_MARK = "/2"


@dataclass(frozen=True, slots=True)
class Compute:
    """One stage's work on one microbatch. Within a schedule, the four fields name one action on one position."""

    kind: ActionKind
    stage: int
    slot: int
    microbatch: int

    def __post_init__(self) -> None:
        if self.kind not in _COMPUTE:
            raise ValueError(f"{self.kind} is no compute action; these are: {', '.join(_COMPUTE)}")

    def __str__(self) -> str:
        return f"{self.kind}{self.slot}.{self.microbatch}"

    @property
    def computes(self) -> tuple[Compute, ...]:
        return (self,)


@dataclass(frozen=True, slots=True)
class Pair:
    """Two actions on different microbatches whose compute and communication overlap; F comes before B, I, W in this order.

    DualPipe has F|B only. Two W have no communication to hide, so they are no pair.
    """

    first: Compute
    second: Compute

    def __post_init__(self) -> None:
        kinds = [_COMPUTE.index(compute.kind) for compute in self.computes]
        if kinds != sorted(kinds) or self.first.kind is ActionKind.BACKWARD_WEIGHT:
            raise ValueError(f"{self} is no pair: at least one of F, B, I, in this order, then W")
        if (self.first.slot, self.first.microbatch) == (self.second.slot, self.second.microbatch):
            raise ValueError(f"{self} is no pair: both of one microbatch")

    def __str__(self) -> str:
        return f"{self.first}|{self.second}"

    @property
    def kind(self) -> ActionKind:
        return ActionKind.PAIR

    @property
    def computes(self) -> tuple[Compute, ...]:
        return (self.first, self.second)


@dataclass(frozen=True, slots=True)
class SplitAction:
    """An F, B or I done as two half microbatches, whose compute and communication overlap; to others it is one action."""

    whole: Compute

    def __post_init__(self) -> None:
        if self.whole.kind is ActionKind.BACKWARD_WEIGHT:
            raise ValueError(f"{self.whole} has no communication to hide, so it is not split")

    def __str__(self) -> str:
        return f"{self.whole}{_SPLIT_MARK}"

    @property
    def kind(self) -> ActionKind:
        return ActionKind.SPLIT

    @property
    def computes(self) -> tuple[Compute, ...]:
        return (self.whole,)


@dataclass(frozen=True, slots=True)
class Transfer:
    """One end of a tensor's way between two positions.

    kind: SEND (never blocks), or RECEIVE (post the receive; the compute action that uses the tensor waits for it).
    peer: the position at the other end. stage: the stage that uses the tensor. slot: this end's slot.
    tag: the same at both ends, distinct among a step's transfers from one position to another, at least 0 and less than
    twice the number of slots times the microbatches of a slot.
    """

    kind: ActionKind
    payload: Payload
    peer: int
    stage: int
    slot: int
    microbatch: int
    tag: int

    def __post_init__(self) -> None:
        if self.kind not in (ActionKind.SEND, ActionKind.RECEIVE):
            raise ValueError(f"{self.kind} is no transfer; these are: {ActionKind.SEND}, {ActionKind.RECEIVE}")

    def __str__(self) -> str:
        way = "to" if self.kind is ActionKind.SEND else "from"
        return f"{self.kind} {self.payload} {self.slot}.{self.microbatch} {way} {self.peer}"


@dataclass(frozen=True, slots=True)
class Reduce:
    """Reduction of all gradients of the position: the end of a training program."""

    @property
    def kind(self) -> ActionKind:
        return ActionKind.REDUCE

    def __str__(self) -> str:
        return str(self.kind)


Work = Compute | Pair | SplitAction
"""What a schedule consists of."""
Action = Work | Transfer | Reduce
Row = tuple[Work, ...]


Form = tuple[tuple[ActionKind, int, int], ...]
"""What the order of operations in an action depends on: of each compute in it kind, slot, and how many parts its
microbatch is in."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """The compute actions of every position in order. `microbatches`: per step, all directions together."""

    kind: str
    stages: Stages
    microbatches: int
    rows: tuple[Row, ...]
    _input_only: frozenset[tuple[int, int, int]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        inputs = (c for row in self.rows for a in row for c in a.computes if c.kind is ActionKind.BACKWARD_INPUT)
        object.__setattr__(self, "_input_only", frozenset((c.stage, c.slot, c.microbatch) for c in inputs))

    @property
    def positions(self) -> int:
        return self.stages.positions

    @property
    def trains(self) -> bool:
        """Whether there are backward passes (else it is for evaluation)."""
        return self.kind != FORWARD_ONLY

    @property
    def slots(self) -> int:
        """Stages a position hosts."""
        return self.stages.slots

    def route(self, slot: int, microbatch: int) -> tuple[Place, ...]:
        """Where the microbatch called `microbatch` in `slot` passes: a (position, slot) for each stage, in stage order.

        Raises ValueError: there is no such slot or microbatch.
        """
        found = self.stages.route(slot)
        if found is None or not 0 <= microbatch < self.microbatches // len(self.stages.paths):
            raise ValueError(f"no microbatch {slot}.{microbatch} in {self.kind} with {self.positions} positions "
                             f"and {self.microbatches} microbatches")
        return found

    def entries(self) -> Iterator[tuple[int, int]]:
        """Every microbatch of a step once, as (slot, microbatch) where it enters the pipeline."""
        for slot in self.stages.entrances:
            for microbatch in range(self.microbatches // len(self.stages.paths)):
                yield slot, microbatch

    def position(self, action: Compute) -> int:
        """Where the action runs."""
        return self.route(action.slot, action.microbatch)[action.stage][0]

    def backward(self, stage: int, slot: int, microbatch: int) -> Compute:
        """The action that yields this stage's input gradient: its I if the schedule has one, else its B."""
        split = (stage, slot, microbatch) in self._input_only
        return Compute(ActionKind.BACKWARD_INPUT if split else ActionKind.BACKWARD, stage, slot, microbatch)


@dataclass(frozen=True, slots=True)
class Program:
    """What the ranks of one position run in a step, in order. A function of the schedule and the position alone.

    orders: in which order each form of action issues the operations of its streams (operations.py); forms that are left out
        alternate.
    """

    position: int
    microbatches: int
    actions: tuple[Action, ...]
    orders: tuple[tuple[Form, IssueOrder], ...] = ()

    @property
    def halved(self) -> frozenset[tuple[int, int]]:
        """(slot, microbatch) of those that are worked on in two halves here: any of their actions is split."""
        return halved_of(self.actions)


def halved_of(actions: Iterable[Action]) -> frozenset[tuple[int, int]]:
    """(slot, microbatch) of those of which any action is split."""
    return frozenset((action.whole.slot, action.whole.microbatch) for action in actions if isinstance(action, SplitAction))


BEFORE = {ActionKind.FORWARD: None, ActionKind.BACKWARD: ActionKind.FORWARD, ActionKind.BACKWARD_INPUT: ActionKind.FORWARD,
          ActionKind.BACKWARD_WEIGHT: ActionKind.BACKWARD_INPUT}
"""What the same stage must have done with the same microbatch."""
_WAY = {ActionKind.FORWARD: 1, ActionKind.BACKWARD: -1, ActionKind.BACKWARD_INPUT: -1, ActionKind.BACKWARD_WEIGHT: 0}
"""Along the stages: activations go forward, gradients back, and weights stay."""


def input_stage(kind: ActionKind, stage: int, stages: int) -> int | None:
    """The stage, of so many, that makes what an action takes in: the one before for F, the one after for B and I.

    None: it is none, for a pipeline begins or ends here, or W.
    """
    return _neighbour(stage, -_WAY[kind], stages)


def output_stage(kind: ActionKind, stage: int, stages: int) -> int | None:
    """The stage, of so many, that takes in what an action makes. None: there is none."""
    return _neighbour(stage, _WAY[kind], stages)


def _neighbour(stage: int, way: int, stages: int) -> int | None:
    return stage + way if way and 0 <= stage + way < stages else None


def dependencies(action: Work, schedule: Schedule) -> tuple[Compute, ...]:
    """The compute actions, on whichever position, that must be done before `action` starts.

    First what its own stage must have done, then that which makes its input (`BEFORE`, `input_stage`; of a stage after, whichever
    of B and I the schedule has). A pair needs what both need, a split action what the whole one needs.
    """
    if not isinstance(action, Compute):
        return tuple(needed for compute in action.computes for needed in dependencies(compute, schedule))
    kind, stage, slot, microbatch = action.kind, action.stage, action.slot, action.microbatch
    route, own = schedule.route(slot, microbatch), BEFORE[kind]
    needed = () if own is None else (Compute(own, stage, slot, microbatch),)
    if (maker := input_stage(kind, stage, len(route))) is None:
        return needed
    place = maker, route[maker][1], microbatch
    return *needed, Compute(kind, *place) if kind is ActionKind.FORWARD else schedule.backward(*place)


def to_csv(schedule: Schedule) -> str:
    """One line a position, ending in a newline."""
    return "".join(",".join(map(str, row)) + "\n" for row in schedule.rows)


def parse_csv(text: str, kind: str, stages: Stages) -> Schedule:
    """Read what `to_csv` wrote. Raises ValueError, quoting the text, at the first thing that is not an action.

    The number of microbatches is the highest number of each entrance, plus one; `check.py` finds out what is missing.
    """
    lines = text.removesuffix("\n").split("\n")
    if stages.positions != len(lines):
        raise ValueError(f"{len(lines)} lines for {stages.positions} positions")
    rows = tuple(
        tuple(_parse_action(word, kind, stages, position) for word in line.split(",")) for position, line in enumerate(lines)
    )
    highest = max(compute.microbatch for row in rows for action in row for compute in action.computes)
    return Schedule(kind, stages, (highest + 1) * len(stages.paths), rows)


def _parse_action(text: str, kind: str, stages: Stages, position: int) -> Work:
    words = text.split("|")
    try:
        if len(words) == 2:
            return Pair(*(_parse_compute(word, kind, stages, position) for word in words))
        compute = _parse_compute(text.removesuffix(_SPLIT_MARK), kind, stages, position)
        return SplitAction(compute) if text.endswith(_SPLIT_MARK) else compute
    except ValueError as error:
        raise ValueError(f"position {position}: {text!r}: {error}") from None


def _parse_compute(text: str, kind: str, stages: Stages, position: int) -> Compute:
    match = _ACTION.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is no action; one looks like F0.3 (kinds {', '.join(_COMPUTE)}), F0.3|B1.1 or F0.3/2")
    slot = int(match[2])
    stage = stages.stage_at(position, slot)
    if stage is None:
        raise ValueError(f"{kind} with {stages.positions} positions has no slot {slot} here")
    return Compute(ActionKind(match[1]), stage, slot, int(match[3]))
