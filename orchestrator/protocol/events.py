"""What may happen to a run, as its state machine is told: frozen values, without a tensor or a token.

Members are named by (node, local, incarnation), never by an index of some layout. Numbers (epochs, generations, steps, calls,
orders) only grow. Layouts and placements are keys into tables that whoever carries commands out keeps: they are compared only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from orchestrator.protocol.members import Member
from orchestrator.topology import Node

LayoutRef = int
PlacementRef = int


class FailKind(StrEnum):
    """How a call failed. GONE: the process has ended. ABORTED: somebody else went, or it was told to let go, or it is not where the
    caller thinks. OWN: an error of its own. REFUSED: what it was told to use cannot be used by anybody. UNREADABLE: a checkpoint is
    damaged. AWAY: storage does not answer now. NO_MEMORY: of the host or of the device. SUPERSEDED: it obeys a newer coordinator."""

    GONE = "gone"
    ABORTED = "aborted"
    OWN = "own"
    REFUSED = "refused"
    UNREADABLE = "unreadable"
    AWAY = "away"
    NO_MEMORY = "no memory"
    SUPERSEDED = "superseded"


class Ending(StrEnum):
    """Why a run ends."""

    DONE = "done"
    STOPPED = "stopped"
    WAITED = "stopped while waiting"
    OWN_FAULT = "own fault"
    NOT_FINITE = "not finite"
    NO_STATE = "no state"
    NO_NODES = "no nodes"
    STORAGE = "storage"
    NO_PROGRESS = "no progress"
    REFUSED = "refused"
    SUPERSEDED = "superseded"


@dataclass(frozen=True, slots=True)
class CallId:
    """Of one call to one member. Epochs count coordinators of a run, numbers the calls of one."""

    epoch: int
    number: int


@dataclass(frozen=True, slots=True)
class ReplayedChange:
    """Of a ledger that is repeated: the layout and placement from a step on."""

    step: int
    layout: LayoutRef
    placement: PlacementRef


@dataclass(frozen=True, slots=True)
class Goal:
    """What a run is to do. steps: to be committed in the end. *_every: steps between two, 0: never. keep: checkpoints.

    validate: whether there is anything to validate with. evaluate: a checkpoint of which only the losses are wanted: none is saved
    then. replay: layouts to be repeated; then nobody may be lost. folder: of checkpoints.
    """

    steps: int
    save_every: int = 0
    validate_every: int = 0
    place_every: int = 0
    keep: int = 3
    validate: bool = True
    evaluate: str | None = None
    replay: tuple[ReplayedChange, ...] = ()
    folder: str = "checkpoints"


@dataclass(frozen=True, slots=True)
class Head:
    """What the ledger says. committed: steps. generation: the highest number used. epoch: the highest that began. furthest: steps that
    were ever committed, with those that a cut has made void."""

    committed: int = 0
    generation: int = 0
    epoch: int = 0
    furthest: int = 0


@dataclass(frozen=True, slots=True)
class Seen:
    """A checkpoint: committed steps in it, where it is, whether its manifest can be read."""

    step: int
    directory: str
    readable: bool = True


@dataclass(frozen=True, slots=True)
class Holding:
    """State of one generation that a member has: as which rank, of which layout. applied: updates in it; None: it was never
    initialised, restored or carried over. epoch: of the coordinator that had it formed: one that took over may use a number again
    that it was never told of."""

    generation: int
    layout: LayoutRef
    placement: PlacementRef
    rank: int
    applied: int | None
    epoch: int = 0


@dataclass(frozen=True, slots=True)
class Base:
    """A generation that has state. members: by rank; None, or beyond the end: nobody known has been that."""

    generation: int
    layout: LayoutRef
    placement: PlacementRef
    members: tuple[Member | None, ...]


@dataclass(frozen=True, slots=True)
class WorkerAssignment:
    """A layout with who serves as which rank. leaving: members of the base who only hand over what nobody else has. planned: the
    nodes that it was made for."""

    layout: LayoutRef
    placement: PlacementRef
    members: tuple[Member, ...]
    planned: tuple[Node, ...]
    leaving: tuple[Member, ...] = ()


# --- answers of members --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Fault:
    """How the last call on a member's compute lane failed, if it did. call: which one; None: whoever tells does not know."""

    kind: FailKind
    text: str
    call: CallId | None = None


@dataclass(frozen=True, slots=True)
class Recalled:
    """What a member holds. reduced: the step whose reduced gradients it has. published: whether its working weights are those of
    the newest state. busy: the call that its compute lane still runs; forming: it is at making process groups. fault: of the last one
    that it ran."""

    held: tuple[Holding, ...]
    reduced: int | None = None
    published: bool = False
    busy: CallId | None = None
    fault: Fault | None = None
    forming: bool = False


@dataclass(frozen=True, slots=True)
class Standing:
    """Of a member that was told to finish. generation: None: it does not have the base."""

    generation: int | None
    applied: int | None
    published: bool


@dataclass(frozen=True, slots=True)
class Formed:
    """bytes: of state that it sent. Seconds of its own."""

    bytes: int = 0
    grouping_seconds: float = 0.0
    moving_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Probed:
    """Peers that a member could, and could not, exchange bytes with."""

    not_reached: tuple[Member, ...] = ()


@dataclass(frozen=True, slots=True)
class Done:
    """Of everything else: what it brought is not the machine's business."""


Answer = Recalled | Standing | Formed | Probed | Done


# --- events --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Started:
    """The first event. members: processes that there are, connected or not. left_behind: another coordinator of this run had them
    before."""

    epoch: int
    members: tuple[Member, ...]
    head: Head
    checkpoints: tuple[Seen, ...]
    goal: Goal
    left_behind: bool = False


@dataclass(frozen=True, slots=True)
class Answered:
    call: CallId
    member: Member
    value: Answer


@dataclass(frozen=True, slots=True)
class Failed:
    call: CallId
    member: Member
    kind: FailKind
    text: str


@dataclass(frozen=True, slots=True)
class Hello:
    """A process is connected and ready."""

    member: Member


@dataclass(frozen=True, slots=True)
class Ended:
    """Its connection has ended."""

    member: Member
    how: str


@dataclass(frozen=True, slots=True)
class Beat:
    """When a member was last heard from, on the clock of `handle`. operation: grows whenever it finishes something."""

    at: float
    operation: int = 0


@dataclass(frozen=True, slots=True)
class Heard:
    """Of everybody connected. To be told at least four times in `elastic.silence_seconds`."""

    beats: Mapping[Member, Beat]


@dataclass(frozen=True, slots=True)
class LetGo:
    """Answer to Abort, from the heartbeat's thread. seconds: that it took there."""

    member: Member
    generation: int
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class NodeJoined:
    node: Node


@dataclass(frozen=True, slots=True)
class NodeLeft:
    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class NodeDraining:
    """deadline: on the clock of `handle`; None: not known."""

    name: str
    deadline: float | None = None


@dataclass(frozen=True, slots=True)
class NodeStays:
    name: str


@dataclass(frozen=True, slots=True)
class NotMade:
    """A process that was to be spawned will never be."""

    member: Member
    reason: str


@dataclass(frozen=True, slots=True)
class Stored:
    """What was ordered to be written is durable."""

    order: int


@dataclass(frozen=True, slots=True)
class StoreFailed:
    """It could not be written, and is not there."""

    order: int
    text: str


@dataclass(frozen=True, slots=True)
class LineRefused:
    """The step's line must not be written: what the ranks reported forbids it (not finite, other sequences, another loss than the one
    that is repeated). Or, as SUPERSEDED, nothing that was ordered: another coordinator writes now."""

    order: int
    ending: Ending
    text: str


@dataclass(frozen=True, slots=True)
class BatchReady:
    step: int


@dataclass(frozen=True, slots=True)
class BatchFailed:
    """lasting: it is of no use to try again."""

    step: int
    text: str
    lasting: bool = False


@dataclass(frozen=True, slots=True)
class PlacementFound:
    """placement: None: experts stay."""

    step: int
    placement: PlacementRef | None


@dataclass(frozen=True, slots=True)
class StopAsked:
    pass


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed."""


Event = (Started | Answered | Failed | Hello | Ended | Heard | LetGo | NodeJoined | NodeLeft | NodeDraining | NodeStays | NotMade | Stored
         | StoreFailed | LineRefused | BatchReady | BatchFailed | PlacementFound | StopAsked | Tick)
