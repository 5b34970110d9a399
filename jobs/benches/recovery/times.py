"""What a run's own files say of a fault: how long each phase of the way back took, and what was lost. Pure.

Times in the files are of the host's wall clock, which the bench that did the fault shares.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator.told import kinds
from orchestrator.told.consumers import Selection
from orchestrator.told.lines import Told

Line = Mapping[str, Any]
READ = Selection((
    kinds.RanksAborted, kinds.LayoutPlanned, kinds.GenerationFormed, kinds.GenerationLoaded, kinds.RanksLost, kinds.Interrupted,
    kinds.NodesJoining), leaves=(
    kinds.Resumed, kinds.StartedOver, kinds.ExpertsPlaced, kinds.CommittedStateLost, kinds.CoordinatorRestarted,
    kinds.NodesDraining, kinds.NodesAwaited, kinds.NodeIdle, kinds.NodeBarred, kinds.Slow, kinds.SlowOver,
    kinds.CheckpointWritten, kinds.CheckpointFailed, kinds.CheckpointUnreadable, kinds.CheckpointNotDeleted, kinds.StorageAway,
    kinds.DataAway, kinds.ControlStoreAway, kinds.ControlStoreBack, kinds.Validated, kinds.NotFinite, kinds.Replayed,
    kinds.UnknownEvent))
"""What this bench looks up."""


@dataclass(frozen=True, slots=True)
class Phases:
    """Seconds. They add up to the time from the fault to the first action of the re-planned step.

    notice: until the run knew. abort: until all survivors had let go, and who is lost was settled. decide: standings, the
    committed update completed, a layout; failed attempts too. regroup: until the last rank had its process groups. move: until
    all state was where it belongs, and working weights were rebuilt. resume: until the action.
    """

    notice: float
    abort: float
    decide: float
    regroup: float
    move: float
    resume: float


@dataclass(frozen=True, slots=True)
class Incident:
    """A fault and what came of it; seconds from the fault.

    share: of a step, at which it struck. slowest_abort: the rank that took longest to let go, by its own clock. first_action: of
    the re-planned step, on its first rank. full_batch: until a step of the whole batch was committed. step: seconds of that one.
    attempts: how often the run had to begin again. bytes: moved from rank to rank. ranks, nodes: after it.
    steps_lost: committed before, and not any more. steps_redone: begun before and done again; tokens_lost: of both the steps
    lost and what the first step lacks of a whole batch. survivors_restarted: rank processes that the fault did not touch and that
    are gone.
    """

    kind: str
    share: float
    noticed: float
    aborted: float
    slowest_abort: float
    first_action: float
    full_batch: float
    step: float
    phases: Phases
    attempts: int
    bytes: int
    nodes: int
    steps_lost: int
    steps_redone: int
    tokens_lost: int
    survivors_restarted: int


def incident(kind: str, at: float, share: float, steps: Sequence[Line], events: Sequence[Told], ledger_before: Sequence[Line],
             ledger_after: Sequence[Line], *, whole: int, length: int, restarted: int) -> Incident:
    """at: of the fault. ledger_before: as it was at the fault. whole: sequences of a step; length: tokens of each.

    Raises ValueError: the files do not tell of a fault at that time, or of no step after it, or of state that was loaded.
    """
    after = [told for told in events if told.time >= at - 0.001]
    aborts, generations = READ.of(after, kinds.RanksAborted), READ.of(after, kinds.GenerationFormed)
    if not aborts or not generations:
        raise ValueError(f"no fault is told of after {at}: {[told.name for told in after]}")
    if READ.of(after, kinds.GenerationLoaded):
        raise ValueError(f"state was loaded after {at}: {[told.name for told in after]}")
    first = next((step for step in steps if step["generation"] >= generations[0].event.generation), None)
    if first is None:
        raise ValueError(f"no step of generation {generations[0].event.generation}")
    formed = [told for told in generations if told.event.generation <= first["generation"]]
    last, end = formed[-1].event, formed[-1].time
    noticed, aborted = aborts[0].time - aborts[0].event.seconds, aborts[0].time
    decided = max(told.time for told in READ.of(after, kinds.LayoutPlanned) if told.time <= end)
    grouped = min(decided + last.grouping_seconds, end)
    phases = Phases(noticed - at, aborted - noticed, decided - aborted, grouped - decided, end - grouped, first["began"] - end)
    attempts = [told for told in READ.of(after, kinds.RanksLost, kinds.Interrupted) if told.time <= first["time"]]
    kept = {(line["step"], line["digest"]) for line in ledger_after}
    lost = sum((line["step"], line["digest"]) not in kept for line in ledger_before)
    return Incident(
        kind, share, noticed - at, aborted - at, max(told.event.slowest_rank_seconds for told in aborts), first["began"] - at,
        first["time"] - at, first["seconds"], phases, len(attempts), sum(told.event.bytes for told in formed), last.nodes, lost,
        1 if attempts else 0, (lost * whole + max(0, whole - first["sequences"])) * length, restarted)


@dataclass(frozen=True, slots=True)
class Fitted:
    """y = constant + slope * x. r2: share of the variance of y that it explains."""

    constant: float
    slope: float
    r2: float


def line_through(points: Sequence[tuple[float, float]]) -> Fitted:
    """Least squares. Raises statistics.StatisticsError: fewer than two different x."""
    x, y = zip(*points)
    slope, constant = statistics.linear_regression(x, y)
    left = sum((b - constant - slope * a) ** 2 for a, b in points)
    mean = statistics.fmean(y)
    whole = sum((b - mean) ** 2 for b in y)
    return Fitted(constant, slope, 1 - left / whole if whole else 1.0)
