"""What the coordinator and the ranks say to each other. Frozen values, small enough to pickle at every step."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy

from actors.comm.traffic import Sent
from actors.comm.wires import Wire
from orchestrator.config.run_config import RunConfig
from orchestrator.layout.layout import Layout
from orchestrator.layout.placement import Placement
from orchestrator.protocol.events import CallId, Ending, Fault
from orchestrator.protocol.members import Member
from orchestrator.recovery.replay import Replay
from orchestrator.schedule.ir.actions import Program
from orchestrator.schedule.ir.spans import Figures, Span


@dataclass(frozen=True)
class Former:
    """The generation whose state is carried over. `config`: the run's, as it was then. `applied`: updates in that state.

    `came_from`: of every rank, and after them of those that only hand over what they have, which rank it was there; None: it has
    nothing. `leaving`: nodes of the latter. `publish`: rebuild all working weights, for some may not be those of the state.
    """

    generation: int
    config: RunConfig
    layout: Layout
    placement: Placement
    applied: int
    came_from: tuple[int | None, ...]
    leaving: tuple[str, ...] = ()
    publish: bool = False


@dataclass(frozen=True)
class Assignment:
    """A rank's place in one generation, shipped once. `store`: (host, port) of a TCPStore that outlives generations;
    `prefix`: of this formation's keys there. `placement`: of experts, at first. `config`: the run's, as it is from now on.
    `rank`: beyond the layout for those that leave. `former`: None: there is no state yet.
    `meeting_seconds`: bound on everybody's arrival, before any group is made. `epoch`: of the coordinator.

    Programs follow when a number of microbatches comes up for the first time (`Rank.learn`).
    """

    generation: int
    rank: int
    config: RunConfig
    layout: Layout
    placement: Placement
    store: tuple[str, int]
    prefix: str
    former: Former | None = None
    meeting_seconds: float = 60.0
    epoch: int = 0


@dataclass(frozen=True)
class FormationReport:
    """A rank's answer: seconds that making groups took, and moving state; bytes of state that it sent and received."""

    grouping_seconds: float
    moving_seconds: float
    sent: int = 0
    received: int = 0


@dataclass(frozen=True)
class Recollection:
    """What a rank holds. held: its places in generations, oldest first, and the updates in the state that it has of each; None: it
    was never initialised, restored or carried over. reduced, published: as of RankState. busy: the call that its compute thread
    carries out; forming: that is to take its place in a generation. fault: how the last one failed, if it did.
    """

    held: tuple[tuple[Assignment, int | None], ...]
    reduced: int | None
    published: bool
    busy: CallId | None = None
    fault: Fault | None = None
    forming: bool = False


@dataclass(frozen=True)
class RankState:
    """Where a rank stands between steps. `generation`: whose state it has; None: it has none. `applied`: updates in it; None: none
    that counts.
    `reduced`: the step whose reduced gradients it still holds. `published`: whether its working weights are those of the state.
    """

    generation: int | None
    applied: int | None
    reduced: int | None
    published: bool


@dataclass(frozen=True)
class Rearrangement:
    """Another placement of experts on the same layout, and the number of the generation that begins with it."""

    generation: int
    placement: Placement


@dataclass(frozen=True)
class Rearranged:
    """A rank's answer. Bytes of state that it sent and received; seconds of its own, waiting for others included."""

    sent: int
    received: int
    seconds: float


@dataclass(frozen=True)
class PendingUpdate:
    """Finish committed step `step`: the pending update, at this learning rate."""

    step: int
    learning_rate: float


@dataclass(frozen=True)
class LossDivisors:
    """Counts of the global batch: labels of the next-token loss, of the multi-token loss, and sequences."""

    next_token: int
    mtp: int
    sequences: int


@dataclass(frozen=True)
class StepRequest:
    """One step for one rank. `microbatches` names the program; `sizes`: sequences of each (slot, microbatch) of its stream.

    `tokens` int32 [n, S+1] and `valid` int32 [n] (real tokens of a row): the stream's sequences, entrance by entrance,
    microbatch by microbatch; only the ranks that host the first or the last stage get them.
    `program`: to be learned first; None: the rank has it.
    """

    step: int
    apply: PendingUpdate | None
    microbatches: int
    sizes: dict[tuple[int, int], int]
    divisors: LossDivisors
    tokens: numpy.ndarray | None
    valid: numpy.ndarray | None
    keep_spans: bool = False
    program: Program | None = None


@dataclass(frozen=True)
class LossSums:
    next_token: float = 0.0
    mtp: float = 0.0
    balance: float = 0.0
    correct: int = 0
    accepted: int = 0

    def __add__(self, other: LossSums) -> LossSums:
        return LossSums(self.next_token + other.next_token, self.mtp + other.mtp, self.balance + other.balance,
                        self.correct + other.correct, self.accepted + other.accepted)


@dataclass(frozen=True)
class StepReport:
    """A rank's answer after the reduce; nothing persistent has changed yet."""

    rank: int
    step: int
    losses: LossSums
    gradient_norm: float
    digests: tuple[int, int]  # of the sequences that entered the pipeline here, and of those whose labels were used here
    figures: Figures
    seconds: float
    bytes_sent: int
    load: dict[int, list[int]]  # tokens of the global batch that chose each expert, by layer; from one rank of each stage
    spans: tuple[Span, ...] = field(default=())
    exchanged: Sent = Sent()  # by dispatch and combine, while bytes_sent are those of activations and their gradients
    wires: tuple[Wire, ...] = ()  # every connection that carried anything since the step before
    began: float = 0.0  # first action of the program, seconds since the epoch


@dataclass(frozen=True)
class SavedPiece:
    """The flat range [start, stop) of one kind of state of one weight, in a file of a checkpoint."""

    name: str
    kind: str
    start: int
    stop: int
    file: str
    sha256: str


@dataclass(frozen=True)
class Failure:
    """Why a run ended, in one line: what a coordinator answers instead of raising what another process could not read. ending: in a
    word, where the state machine has said it."""

    reason: str
    ending: Ending | None = None


@dataclass(frozen=True)
class Outcome:
    """How a run ended. `interrupted`: it was asked to stop; `saved`: and has saved, which it cannot while it waits for nodes."""

    step: int
    interrupted: bool
    validation_loss: float | None
    scores: dict[str, float] | None = None
    saved: bool = True


@dataclass(frozen=True)
class Start:
    """How a run begins. members: the processes there are, where they are more than the first layout has places; None: as many.

    left_behind: another coordinator of this run has died, and these are what it left. replay: layouts to repeat, and losses that
    must come out. evaluate: a checkpoint of which nothing is wanted but the losses of the held-out text.
    """

    members: tuple[Member, ...] | None = None
    left_behind: bool = False
    replay: Replay | None = None
    evaluate: str | None = None
