"""What the contestants of the overlap bench run: schedules, their programs with the order of pieces, and their predictions."""

from __future__ import annotations

from jobs.benches.overlap_cluster import Alone
from jobs.benches.overlap_compare import Contestant, staged
from jobs.benches.overlap_rank import Ours, Torch
from orchestrator.schedule.actions import Program, Schedule
from orchestrator.schedule.check import check
from orchestrator.schedule.durations import Durations, at
from orchestrator.schedule.kinds import generate
from orchestrator.schedule.lower import lower
from orchestrator.schedule.orders import StageStrands, check_orders, with_orders
from orchestrator.schedule.pieces import Piece
from orchestrator.schedule.search import searched
from orchestrator.schedule.search.portfolio import Options, search
from orchestrator.schedule.spans import Lane
from orchestrator.schedule.stages import BOTH, Stages, V


def durations_of(alone: Alone, layers: int) -> Durations:
    """Of a whole position with `layers` layers, from what was measured alone; dispatch and combine as means over positions,
    or by position where these differ by more than a fifth."""
    half = 2 * layers * alone.hold
    positions = range(len(alone.exchange))
    dispatch, combine = ([layers * of(p) for p in positions] for of in (alone.dispatches, alone.combines))
    if max(dispatch) <= 1.2 * min(dispatch):
        dispatch, combine = (sum(values) / len(values) for values in (dispatch, combine))
    return Durations(half, half, half, hop=alone.hop, dispatch=dispatch, combine=combine, layers=layers)


def fixed(kind: str, positions: int, microbatches: int) -> Schedule:
    return generate(kind, positions, microbatches)


def found(positions: int, microbatches: int, durations: Durations, effort: int, *, by_position: bool = False) -> Schedule:
    """The best of any placement that has the positions' stages whole or halved. by_position: of those that give each position
    stages of its own, so that durations may differ."""
    if by_position:
        stages = Stages(V, positions, 2)
        return searched(stages, microbatches, staged(durations, stages), splits=False, effort=effort).schedule
    options = Options((Stages(BOTH, positions), Stages(V, positions, 2)), positions + 1, splits=False)
    return search(microbatches, durations, options, effort=effort).schedule


def torch_task(layers: int, microbatches: int) -> Torch:
    """Of a position with `layers` layers."""
    return Torch(microbatches, layers // 2)


def task_of(contestant: Contestant, position: int, layers: int) -> Ours:
    """layers: of a position."""
    schedule = contestant.schedule
    program = _programs(schedule, staged(contestant.durations, schedule.stages), contestant.communicates)[position]
    return Ours(schedule.stages, schedule.microbatches, program, layers // schedule.stages.chunks, contestant.communicates,
                contestant.overlap)


def _programs(schedule: Schedule, durations: Durations, communicates: bool) -> tuple[Program, ...]:
    """With the order of pieces inside each action. `durations`: by stage."""
    stages = schedule.stages
    hosted = tuple(map(stages.hosted, range(stages.positions)))
    strands = tuple(_strands(durations, stage, communicates) for stage in range(stages.count))
    programs = with_orders(lower(schedule), strands, hosted)
    check(schedule, programs)
    check_orders(programs, strands, hosted)
    return programs


def _strands(durations: Durations, stage: int, communicates: bool) -> StageStrands:
    """Of a stage as LayeredChunk runs it."""
    layers = durations.layers
    forward, backward, weight = (at(value, stage) / (2 * layers) for value in (
        durations.forward, durations.backward_input, durations.backward_weight))
    out, home = (Piece(Lane.EXCHANGE, at(value, stage) / layers) for value in (durations.dispatch, durations.combine))
    half, back = Piece(Lane.COMPUTE, forward), Piece(Lane.COMPUTE, backward, weight)
    if not communicates:
        return StageStrands((half, half) * layers, (back, back) * layers)
    return StageStrands((half, out, half, home) * layers, (out, back, home, back) * layers)
