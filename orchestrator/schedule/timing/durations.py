"""How long actions take, and what they do meanwhile: the costs that simulation, search and pictures share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from orchestrator.schedule.ir.actions import ActionKind, Compute, SplitAction, Work
from orchestrator.schedule.ir.operations import Cost, Template, overlapped, planned, stream_of, timed
from orchestrator.schedule.ir.orders import StageOperations
from orchestrator.schedule.ir.spans import Lane
from orchestrator.schedule.ir.stages import Stages

PerStage = float | Sequence[float]
Factors = tuple[float, float]
"""On compute, on communication."""
_ALIKE: Factors = (1.0, 1.0)


@dataclass(frozen=True)
class Durations:
    """Durations in seconds (or any unit): each one number for all stages, or one for each stage.

    forward, backward_input, backward_weight: compute.
    dispatch, combine: communication of one whole forward: all its layers' dispatches, all their combines. A backward for the
        input has the same: the gradient of combine is sent like a dispatch, that of dispatch like a combine (report, 3.2.1).
    layers: of a stage. Each is attention, dispatch, experts, combine; attention and experts share the compute evenly.
    backward, pair: of a lone B, of F|B (by the forward's stage), if they are known as a whole, where no position is slow: their
        operations are stretched to it; None: what the operations give.
    halves: compute of both halves of a split action, as a factor on the whole one: small products may run less efficiently.
    hop: from one position to another, for every tensor; `links` has those (from, to) that differ.
    slowdown, exchange_slowdown: factors on the compute and on the communication of each position; empty: all alike. Two positions
        that host the same stages have EP groups, and so links, of their own.
    jitter: relative standard deviation of an action's duration, drawn for each from `seed`.
    stages: by stage, the operations that it really has: what happens inside actions is planned from them, as in the programs; none:
        from the durations above, in uniform layers. These stay what a search weighs actions by.
    Raises ValueError: a duration is negative, layers or a slowdown not positive.
    """

    forward: PerStage
    backward_input: PerStage
    backward_weight: PerStage
    backward: PerStage | None = None
    pair: PerStage | None = None
    hop: float = 0.0
    dispatch: PerStage = 0.0
    combine: PerStage = 0.0
    layers: int = 4
    halves: float = 1.0
    slowdown: tuple[float, ...] = ()
    exchange_slowdown: tuple[float, ...] = ()
    links: Mapping[tuple[int, int], float] = field(default_factory=dict)
    jitter: float = 0.0
    seed: int = 0
    stages: tuple[StageOperations, ...] = ()

    def __post_init__(self) -> None:
        for name in ("forward", "backward_input", "backward_weight", "backward", "pair", "hop", "dispatch", "combine", "jitter"):
            values = getattr(self, name)
            if values is not None and min(values if isinstance(values, Sequence) else [values]) < 0:
                raise ValueError(f"{name} = {values}: no duration is negative")
        if self.layers < 1 or self.halves <= 0 or min((*self.slowdown, *self.exchange_slowdown), default=1.0) <= 0:
            raise ValueError(f"layers = {self.layers}, halves = {self.halves}, slowdown = {self.slowdown}, "
                             f"exchange_slowdown = {self.exchange_slowdown}: all positive")

    def of(self, action: Work, position: int = 0) -> float:
        """Duration of `action` on `position`, without jitter."""
        return self.template(action, position).duration

    def template(self, action: Work, position: int = 0) -> Template:
        """What happens on each lane during `action`, from its start."""
        kinds = tuple(compute.kind for compute in action.computes)
        slow = self.factors(position)
        key = (type(action) is SplitAction, kinds, *(compute.stage for compute in action.computes), slow)
        if (found := self._templates.get(key)) is None:
            found = self._templates[key] = self._template(action, kinds, slow)
        return found

    def factors(self, position: int) -> Factors:
        """How much slower than others a position computes and communicates."""
        return (self.slowdown[position] if self.slowdown else 1.0,
                self.exchange_slowdown[position] if self.exchange_slowdown else 1.0)

    def arrival(self, origin: int, target: int) -> float:
        """Time from the end of the action that makes a tensor to its arrival."""
        if origin == target:
            return 0.0
        return self.links.get((origin, target), self.hop) if self.links else self.hop

    def operations(self, stage: int) -> StageOperations:
        """What the stage does with one microbatch at a position that is not slow."""
        if self.stages:
            return self.stages[stage]
        forward, backward = (self._cost(Compute(kind, stage, 0, 0), _ALIKE) for kind in (ActionKind.FORWARD, ActionKind.BACKWARD))
        return StageOperations(stream_of(forward).operations, tuple(
            replace(operation, weights=operation.weights or 0.0) if operation.lane is Lane.COMPUTE else operation
            for operation in stream_of(backward).operations))

    @cached_property
    def _templates(self) -> dict[tuple, Template]:
        return {}

    def _template(self, action: Work, kinds: tuple[ActionKind, ...], slow: Factors) -> Template:
        if self.stages:
            return self._planned(action, slow)
        template = self._from_operations(action, slow)
        known = {(ActionKind.FORWARD, ActionKind.BACKWARD): self.pair, (ActionKind.BACKWARD,): self.backward}.get(kinds)
        if known is None or isinstance(action, SplitAction):
            return template
        whole, usual = at(known, action.computes[0].stage), self._from_operations(action, _ALIKE).duration
        return template.stretched(whole * (template.duration / usual) if usual else slow[0] * whole)

    def _from_operations(self, action: Work, slow: Factors) -> Template:
        costs = [self._cost(compute, slow) for compute in action.computes]
        return overlapped([costs[0].halved(self.halves)] * 2 if isinstance(action, SplitAction) else costs)

    def _planned(self, action: Work, slow: Factors) -> Template:
        """In the order that a program has at a position that is not slow."""
        parts = 2 if isinstance(action, SplitAction) else 1
        streams = tuple(stream for compute in action.computes
                        for stream in self.stages[compute.stage].streams(compute.kind, parts))
        order = planned(streams).order
        return timed([stream.scaled(slow[0] * (self.halves if parts > 1 else 1.0), slow[1]) for stream in streams], order)

    def _cost(self, compute: Compute, slow: Factors) -> Cost:
        stage = compute.stage
        forward, backward_input, backward_weight = (
            slow[0] * at(d, stage) for d in (self.forward, self.backward_input, self.backward_weight))
        sent = (slow[1] * at(self.dispatch, stage), slow[1] * at(self.combine, stage))
        return {
            ActionKind.FORWARD: Cost(self.layers, forward, *sent),
            ActionKind.BACKWARD: Cost(self.layers, backward_input, *sent, weights=backward_weight, backward=True),
            ActionKind.BACKWARD_INPUT: Cost(self.layers, backward_input, *sent, backward=True),
            ActionKind.BACKWARD_WEIGHT: Cost(self.layers, 0.0, weights=backward_weight),
        }[compute.kind]


def at(duration: PerStage, stage: int) -> float:
    return duration[stage] if isinstance(duration, Sequence) else duration


def per_chunk(durations: Durations, stages: Stages) -> Durations:
    """The same work of a whole rank, given by `durations` as single numbers, in stages of which a microbatch passes
    `stages.chunks` on a position."""
    if stages.chunks == 1:
        return durations

    def cut(value: PerStage | None) -> PerStage | None:
        return value / stages.chunks if isinstance(value, int | float) else value

    names = ("forward", "backward_input", "backward_weight", "backward", "pair", "dispatch", "combine")
    return replace(durations, layers=max(1, durations.layers // stages.chunks), **{n: cut(getattr(durations, n)) for n in names})


UNIT = Durations(forward=1.0, backward_input=1.0, backward_weight=1.0)
"""The usual unit costs: a backward is twice a forward, half of it for the weights; no communication, so a pair hides none."""
EXCHANGE_RATIO = 0.913
"""Dispatch and combine over compute, in DeepSeek's published training trace (profile-data, train.json: kernels of one pair)."""


def with_communication(durations: Durations, ratio: float) -> Durations:
    """`durations` with as much dispatch and combine as makes `ratio` of a microbatch's compute, forward and backward alike."""
    compute = durations.forward + durations.backward_input + durations.backward_weight
    return replace(durations, dispatch=ratio * compute / 4, combine=ratio * compute / 4)
