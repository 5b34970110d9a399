"""What the contestants of the overlap bench run: schedules, their programs with the order of operations, and their predictions."""

from __future__ import annotations

from statistics import mean

from jobs.benches.overlap.cluster import Alone
from jobs.benches.overlap.compare import OverlapCase
from jobs.benches.overlap.rank import OverlapTask, Torch
from orchestrator.schedule.ir.actions import Program, Schedule
from orchestrator.schedule.ir.check import check
from orchestrator.schedule.ir.lower import lower
from orchestrator.schedule.ir.operations import Operation
from orchestrator.schedule.ir.orders import StageOperations, check_orders, with_orders
from orchestrator.schedule.ir.spans import Lane
from orchestrator.schedule.ir.stages import BOTH, Stages, V
from orchestrator.schedule.kinds.registry import generate
from orchestrator.schedule.search.portfolio import Options, search
from orchestrator.schedule.timing.durations import Durations, at, per_chunk


def durations_of(alone: Alone, layers: int) -> Durations:
    """Of a whole position with `layers` layers, from what was measured alone; dispatch and combine as means over positions, or
    where these differ by more than a fifth, those of the fastest, and how much slower the others are."""
    half, positions = 2 * layers * alone.hold, range(len(alone.exchange))
    sent = [alone.dispatches(p) + alone.combines(p) for p in positions]
    even = max(sent) <= 1.2 * min(sent)
    usual = positions if even else [sent.index(min(sent))]
    dispatch, combine = (layers * mean(map(of, usual)) for of in (alone.dispatches, alone.combines))
    return Durations(half, half, half, hop=alone.hop, dispatch=dispatch, combine=combine, layers=layers,
                     exchange_slowdown=() if even else tuple(value / min(sent) for value in sent))


def fixed(kind: str, positions: int, microbatches: int) -> Schedule:
    return generate(kind, positions, microbatches)


def found(positions: int, microbatches: int, durations: Durations, effort: int) -> Schedule:
    """The best of any placement that has the positions' stages whole or halved."""
    options = Options((Stages(BOTH, positions), Stages(V, positions, 2)), positions + 1, splits=False)
    return search(microbatches, durations, options, effort=effort).schedule


def torch_task(layers: int, microbatches: int) -> Torch:
    """Of a position with `layers` layers."""
    return Torch(microbatches, layers // 2)


def task_of(contestant: OverlapCase, position: int, layers: int) -> OverlapTask:
    """layers: of a position."""
    schedule = contestant.schedule
    program = _programs(schedule, per_chunk(contestant.durations, schedule.stages), contestant.communicates)[position]
    return OverlapTask(schedule.stages, schedule.microbatches, program, layers // schedule.stages.chunks, contestant.communicates,
                       contestant.overlap)


def _programs(schedule: Schedule, durations: Durations, communicates: bool) -> tuple[Program, ...]:
    """With the order of operations inside each action. `durations`: by stage."""
    stages = schedule.stages
    hosted = tuple(map(stages.hosted, range(stages.positions)))
    programs = lower(schedule)
    check(schedule, programs)
    ordered = []
    for program in programs:  # one by one, for the same stage's operations differ where a position is slow
        operations = tuple(_operations(durations, stage, program.position, communicates) for stage in range(stages.count))
        ordered += with_orders([program], operations, hosted)
        check_orders(ordered[-1:], operations, hosted)
    return tuple(ordered)


def _operations(durations: Durations, stage: int, position: int, communicates: bool) -> StageOperations:
    """Of a stage at a position, as LayeredChunk runs it."""
    layers, (slow, slow_exchange) = durations.layers, durations.factors(position)
    forward, backward, weight = (slow * at(value, stage) / (2 * layers) for value in (
        durations.forward, durations.backward_input, durations.backward_weight))
    out, home = (Operation(Lane.EXCHANGE, slow_exchange * at(value, stage) / layers)
                 for value in (durations.dispatch, durations.combine))
    half, back = Operation(Lane.COMPUTE, forward), Operation(Lane.COMPUTE, backward, weight)
    if not communicates:
        return StageOperations((half, half) * layers, (back, back) * layers)
    return StageOperations((half, out, half, home) * layers, (out, back, home, back) * layers)
