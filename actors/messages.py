"""What the coordinator and the ranks say to each other. Frozen values, small enough to pickle at every step."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy

from actors.comm.traffic import Sent
from actors.comm.wires import Wire
from orchestrator.layout import Layout
from orchestrator.schedule.spans import Figures, Span


@dataclass(frozen=True)
class Assignment:
    """A rank's place in one generation, shipped once. `store`: (host, port) of a TCPStore that outlives generations;
    `prefix`: of this formation's keys there.

    Programs follow when a number of microbatches comes up for the first time (`Rank.learn`).
    """

    generation: int
    rank: int
    layout: Layout
    store: tuple[str, int]
    prefix: str


@dataclass(frozen=True)
class Apply:
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
    """

    step: int
    apply: Apply | None
    microbatches: int
    sizes: dict[tuple[int, int], int]
    divisors: LossDivisors
    tokens: numpy.ndarray | None
    valid: numpy.ndarray | None
    keep_spans: bool = False


@dataclass(frozen=True)
class LossSums:
    next_token: float = 0.0
    mtp: float = 0.0
    balance: float = 0.0

    def __add__(self, other: LossSums) -> LossSums:
        return LossSums(self.next_token + other.next_token, self.mtp + other.mtp, self.balance + other.balance)


@dataclass(frozen=True)
class StepReport:
    """A rank's answer after the reduce; nothing persistent has changed yet."""

    rank: int
    step: int
    losses: LossSums
    gradient_norm: float
    digest: int
    figures: Figures
    seconds: float
    bytes_sent: int
    load: dict[int, list[int]]  # tokens of the global batch that chose each expert, by layer; from one rank of each stage
    spans: tuple[Span, ...] = field(default=())
    exchanged: Sent = Sent()  # by dispatch and combine, while bytes_sent are those of activations and their gradients
    wires: tuple[Wire, ...] = ()  # every connection that carried anything since the step before


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
    """Why a run ended, in one line: what a coordinator answers instead of raising what another process could not read."""

    reason: str
