"""The kinds of event that a run tells: one frozen class each, named after what happened. `name` is the word in `events.jsonl`.

Fields are those of the line, in its order. One that may be left out of the line has None by default, and stands there only with a
value; any other None is a null. Steps are counts of committed steps; seconds are rounded by whoever tells. Members are written
node/local, as `str(Member)` is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar, dataclass_transform

KINDS: list[type[Event]] = []
"""All of them, in the order of this file."""
Class = TypeVar("Class", bound=type)


class Event:
    """What happened, without its time."""

    __slots__ = ()
    name: ClassVar[str]


@dataclass_transform(frozen_default=True)
def _told_as(name: str) -> Callable[[Class], Class]:
    """A frozen class of events that are told under this name."""
    def made(plain: Class) -> Class:
        kind = dataclass(frozen=True, slots=True)(plain)
        kind.name = name
        KINDS.append(kind)
        return kind
    return made


# --- generations ---------------------------------------------------------------------------------------------------------


@_told_as("layout")
class LayoutPlanned(Event):
    """For a new generation. seconds: since the change was noticed. notes: what the planner left aside, and why."""

    layout: str
    nodes: int
    notes: tuple[str, ...]
    seconds: float


@_told_as("generation")
class GenerationFormed(Event):
    """A new generation, with the state that its ranks, or those before them, had in memory. bytes: of state that moved, all ranks.
    grouping_seconds, moving_seconds: of the slowest rank; seconds: since the change was noticed."""

    generation: int
    layout: str
    nodes: int
    step: int
    bytes: int
    grouping_seconds: float
    moving_seconds: float
    seconds: float
    ranks: int | None = None


@_told_as("generation")
class GenerationLoaded(Event):
    """A new generation whose state came from a checkpoint, or is the initial one. In its line, unlike that of the other, are no
    `seconds`. recovery_seconds: since the change was noticed; None: there was none, a run begins or goes on where one ended."""

    generation: int
    layout: str
    nodes: int
    step: int
    recovery_seconds: float | None = None
    ranks: int | None = None


@_told_as("resumed")
class Resumed(Event):
    """From a checkpoint. steps_to_redo: that were committed after it."""

    step: int
    checkpoint: str
    steps_to_redo: int


@_told_as("started_over")
class StartedOver(Event):
    """From initial values, though steps had been committed."""

    reason: str
    steps_to_redo: int


@_told_as("placement")
class ExpertsPlaced(Event):
    """Experts are on other ranks. experts: that moved. unevenness: the largest load of a rank over the mean, worst layer."""

    step: int
    generation: int
    experts: int
    bytes: int
    seconds: float
    unevenness_before: float
    unevenness_after: float


# --- recoveries ----------------------------------------------------------------------------------------------------------


@_told_as("lost")
class RanksLost(Event):
    """All that were lost at once."""

    members: tuple[str, ...]
    generation: int
    reasons: tuple[str, ...]


@_told_as("interrupted")
class Interrupted(Event):
    """Something did not go on, and nobody is lost for it. member: whose sign was the first one."""

    member: str | None
    reason: str
    generation: int


@_told_as("aborted")
class RanksAborted(Event):
    """All have let go, but for those who did not answer. seconds: since the first sign."""

    ranks: int
    slowest_rank_seconds: float
    unanswered: tuple[str, ...]
    seconds: float


@_told_as("state_lost")
class CommittedStateLost(Event):
    """Committed steps are in nobody's memory."""

    reason: str
    step: int


@_told_as("coordinator_restarted")
class CoordinatorRestarted(Event):
    """Another coordinator goes on with the ranks that one has left behind. members: who said hello."""

    step: int
    members: int


# --- members and nodes ---------------------------------------------------------------------------------------------------


@_told_as("joining")
class NodesJoining(Event):
    """Nodes are to be taken in."""

    nodes: tuple[str, ...]


@_told_as("draining")
class NodesDraining(Event):
    """Nodes are to be left. reason: why they cannot be yet."""

    members: tuple[str, ...]
    nodes: tuple[str, ...]
    reason: str | None = None


@_told_as("waiting")
class NodesAwaited(Event):
    """There are fewer than the run wants."""

    reason: str


@_told_as("idle")
class NodeIdle(Event):
    """It is there and not used, for so many seconds."""

    node: str
    reason: str
    seconds: float


@_told_as("barred")
class NodeBarred(Event):
    """It is not tried any more, after so many tries."""

    member: str
    node: str
    reason: str
    tried: int


@_told_as("slow")
class Slow(Event):
    """A rank, or its link to `peer`, is slower than its like. lane: compute, exchange or pipeline. peer: None: none, or all other
    nodes."""

    step: int
    rank: int
    node: str
    peer: int | None
    peer_node: str | None
    lane: str
    factor: float


@_told_as("slow_over")
class SlowOver(Event):
    """It is as fast as its like again."""

    step: int
    rank: int
    node: str
    peer: int | None
    peer_node: str | None
    lane: str
    factor: float


# --- storage -------------------------------------------------------------------------------------------------------------


@_told_as("checkpoint")
class CheckpointWritten(Event):
    """It counts from now on. seconds: since it was begun."""

    step: int
    path: str
    seconds: float


@_told_as("checkpoint_failed")
class CheckpointFailed(Event):
    """It could not be written."""

    step: int
    reason: str


@_told_as("checkpoint_unreadable")
class CheckpointUnreadable(Event):
    """It is passed over from now on."""

    step: int
    path: str
    reason: str


@_told_as("checkpoint_not_deleted")
class CheckpointNotDeleted(Event):
    """It is one too many, and stays."""

    step: int
    reason: str


@_told_as("storage_away")
class StorageAway(Event):
    """It is waited for."""

    reason: str


@_told_as("data_away")
class DataAway(Event):
    """The next step's sequences are waited for."""

    reason: str


@_told_as("control_store_away")
class ControlStoreAway(Event):
    """Ray's; it has not answered for so long."""

    seconds: float


@_told_as("control_store_back")
class ControlStoreBack(Event):
    """Ray's, after so long."""

    seconds: float


# --- losses --------------------------------------------------------------------------------------------------------------


@_told_as("validation")
class Validated(Event):
    """loss: nats a token. accuracy: share of next tokens that are the likeliest ones; older runs did not tell it."""

    step: int
    loss: float
    accuracy: float | None = field(default=None, kw_only=True)
    seconds: float


@_told_as("not_finite")
class NotFinite(Event):
    """A step whose losses or gradient norm are not: it ends the run. Each as text, since JSON has no word for them."""

    step: int
    gradient_norm: str
    loss: str
    mtp_loss: str | None = field(default=None, kw_only=True)
    balance_loss: str


@_told_as("replayed")
class Replayed(Event):
    """All steps of a ledger have been repeated."""

    steps: int


# --- of other versions ---------------------------------------------------------------------------------------------------


@_told_as("")
class UnknownEvent(Event):
    """A line that this version has no class for, or that lacks a field of it. written: its other fields, as they stand there."""

    called: str
    written: dict[str, Any]
