"""What the state machine of a run may order: frozen values. Whoever carries them out decides nothing."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar

from orchestrator.protocol.events import Base, CallId, Ending, LayoutRef, PlacementRef, WorkerAssignment
from orchestrator.protocol.members import Member
from orchestrator.told import kinds


class CallLane(StrEnum):
    """Of a member: calls of one lane run in order. CONTROL is served while the compute lane is busy, or hung."""

    COMPUTE = "compute"
    CONTROL = "control"
    FILES = "files"


# --- requests: what a call asks a member for -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Recall:
    """What do you hold? Answered once the compute lane is free, after `seconds` at the latest. Recalled."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Finish:
    """Go back to the state of generation `base`, dropping all others; complete the update of step `apply` there from what you hold,
    without the others, if that is the one that is due. Standing."""

    base: int
    apply: int | None


@dataclass(frozen=True, slots=True)
class FormerRef:
    """Where state is carried over from. applied: updates in it. came_from: by rank of the plan, and after them of those leaving,
    which rank each was in the base; None: it brings nothing. publish: all working weights are to be rebuilt."""

    base: Base
    applied: int
    came_from: tuple[int | None, ...]
    publish: bool


@dataclass(frozen=True, slots=True)
class Form:
    """Take your place in the generation of this call. former: None: without state, until Initialise or Restore. Formed."""

    plan: WorkerAssignment
    former: FormerRef | None


@dataclass(frozen=True, slots=True)
class Initialise:
    """State of step 0. Done."""


@dataclass(frozen=True, slots=True)
class Restore:
    """State of a checkpoint. Done; fails as UNREADABLE, or as AWAY."""

    directory: str
    step: int


@dataclass(frozen=True, slots=True)
class Step:
    """Apply the update of step `apply`, if one is pending, then compute and reduce this one. Done."""

    step: int
    apply: int | None


@dataclass(frozen=True, slots=True)
class Apply:
    """Done."""

    step: int


@dataclass(frozen=True, slots=True)
class Rearrange:
    """Another placement of experts, in the generation of this call. Formed."""

    placement: PlacementRef


@dataclass(frozen=True, slots=True)
class Evaluate:
    """Done."""

    step: int


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Copy what you are first owner of, and begin to write it. Done."""

    directory: str
    step: int


@dataclass(frozen=True, slots=True)
class Collect:
    """Wait for what Snapshot began. Done; fails as AWAY or UNREADABLE where it could not be written."""

    directory: str
    step: int


@dataclass(frozen=True, slots=True)
class Probe:
    """Exchange bytes with each of these, within `seconds`. Probed."""

    peers: tuple[Member, ...]
    seconds: float


Request = Recall | Finish | Form | Initialise | Restore | Step | Apply | Rearrange | Evaluate | Snapshot | Collect | Probe


def lane_of(request: Request) -> CallLane:
    if isinstance(request, Recall | Probe):
        return CallLane.CONTROL
    return CallLane.FILES if isinstance(request, Collect) else CallLane.COMPUTE


# --- lines of the ledger -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class StepLine:
    """A committed step. Everything else of its line is known to whoever carries this out."""

    step: int
    generation: int


@dataclass(frozen=True, slots=True)
class EpochLine:
    """A coordinator begins. One that finds a higher epoch than its own is superseded."""

    epoch: int


@dataclass(frozen=True, slots=True)
class OriginLine:
    """State after `step` steps was loaded into `generation`. source: a checkpoint's folder; None: initial values."""

    generation: int
    step: int
    source: str | None


@dataclass(frozen=True, slots=True)
class CutLine:
    """Steps from `step` on are to be done again: written before any of them is."""

    step: int
    reason: str


Line = StepLine | EpochLine | OriginLine | CutLine


# --- what is told, but for what only whoever carries it out has: descriptions, scores ---------------------------------------


@dataclass(frozen=True, slots=True)
class PlannedRef:
    """As kinds.LayoutPlanned."""

    name: ClassVar[str] = kinds.LayoutPlanned.name
    layout: LayoutRef
    seconds: float


@dataclass(frozen=True, slots=True)
class FormedRef:
    """As kinds.GenerationFormed."""

    name: ClassVar[str] = kinds.GenerationFormed.name
    generation: int
    layout: LayoutRef
    step: int
    bytes: int
    grouping_seconds: float
    moving_seconds: float
    seconds: float


@dataclass(frozen=True, slots=True)
class LoadedRef:
    """As kinds.GenerationLoaded."""

    name: ClassVar[str] = kinds.GenerationLoaded.name
    generation: int
    layout: LayoutRef
    step: int
    recovery_seconds: float | None


@dataclass(frozen=True, slots=True)
class PlacedRef:
    """As kinds.ExpertsPlaced."""

    name: ClassVar[str] = kinds.ExpertsPlaced.name
    step: int
    generation: int
    placement: PlacementRef
    before: PlacementRef
    bytes: int
    seconds: float


@dataclass(frozen=True, slots=True)
class ValidatedStep:
    """As kinds.Validated."""

    name: ClassVar[str] = kinds.Validated.name
    step: int


@dataclass(frozen=True, slots=True)
class StepLost:
    """The step under way will be done again. For the account of time only: users are told why."""

    name: ClassVar[str] = "step_lost"


InReferences = PlannedRef | FormedRef | LoadedRef | PlacedRef | ValidatedStep | StepLost


# --- commands ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Call:
    """To be answered by Answered or Failed. generation: the one that it is meant for; a member that was told to give that up refuses
    it (but for Recall, Finish, Probe and Collect, which belong to none)."""

    call: CallId
    member: Member
    generation: int
    request: Request


@dataclass(frozen=True, slots=True)
class Abort:
    """Have them end everything up to this generation, begun or not. Answered by LetGo."""

    members: tuple[Member, ...]
    generation: int


@dataclass(frozen=True, slots=True)
class Fence:
    """End this process: it is not to take part any more."""

    member: Member
    reason: str


@dataclass(frozen=True, slots=True)
class Spawn:
    """Have a process made for this member, in place of whatever is left of its earlier incarnations. Answered by Hello, or NotMade."""

    member: Member


@dataclass(frozen=True, slots=True)
class Append:
    """Of the ledger. Answered by Stored, StoreFailed, or (a step) LineRefused."""

    order: int
    line: Line


@dataclass(frozen=True, slots=True)
class WriteManifest:
    """Make a checkpoint count whose pieces all are there. collected: the calls that brought them: of others that were asked about the
    same folder nothing counts. Answered by Stored or StoreFailed."""

    order: int
    directory: str
    step: int
    collected: tuple[CallId, ...] = ()


@dataclass(frozen=True, slots=True)
class Discard:
    """Delete a checkpoint, or what there is of it. Answered by Stored or StoreFailed."""

    order: int
    directory: str


@dataclass(frozen=True, slots=True)
class NeedBatch:
    """Answered by BatchReady or BatchFailed. Steps are asked for in order; another one than the next begins anew there."""

    step: int


@dataclass(frozen=True, slots=True)
class FindPlacement:
    """Answered by PlacementFound."""

    step: int


@dataclass(frozen=True, slots=True)
class Tell:
    """What users are to know: a line of events.jsonl."""

    event: kinds.Event | InReferences


@dataclass(frozen=True, slots=True)
class EndRun:
    """The last command. step: committed steps; saved: whether a checkpoint has them all."""

    ending: Ending
    text: str
    step: int
    saved: bool


Command = Call | Abort | Fence | Spawn | Append | WriteManifest | Discard | NeedBatch | FindPlacement | Tell | EndRun
