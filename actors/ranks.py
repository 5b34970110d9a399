"""How a trainer reaches its rank processes: one interface, and its two transports (Ray actors; plain processes in processes.py).

Calls go to seats: whoever serves as rank 0, 1, ... of the layout of the day. Who that is, is decided elsewhere (crew.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from orchestrator.membership import Member
from orchestrator.protocol.commands import Lane
from orchestrator.protocol.events import CallId, NodeDraining, NodeJoined, NodeLeft, NodeStays
from orchestrator.topology import Node

LOST = "its process or node was lost"
NO_ANSWER = "no answer within"
POLL_SECONDS = 0.02
"""How often whoever waits for answers looks whether one will not come."""

Check = Callable[[], "RankFailed | None"]


class RankFailed(RuntimeError):
    """A rank raised, died, or did not answer in time. `reason` is one line. `member`: who that is, where the rank is not one
    of those seated."""

    def __init__(self, rank: int, reason: str, member: Member | None = None):
        self.rank, self.reason, self.member = rank, reason, member
        super().__init__(f"rank {rank}: {reason}")

    @property
    def lost(self) -> bool:
        """Whether there is no process any more."""
        return self.reason == LOST

    @property
    def own_fault(self) -> bool:
        """Whether it failed by itself, and not because somebody else went or was silent."""
        return not (self.lost or "Aborted" in self.reason or "OutOfStep" in self.reason or NO_ANSWER in self.reason)


class Pending(Protocol):
    """Calls under way."""

    def done(self) -> bool: ...

    def results(self, timeout_seconds: float, check: Check | None = None) -> list[Any]:
        """One result per rank. Raises RankFailed for the first rank that failed, or what `check` finds while others are waited
        for."""
        ...


@dataclass(frozen=True, slots=True)
class News:
    """What the cluster says of a node. kind: joined, left, draining or stays. deadline: of a drain, on the clock of
    time.monotonic(); None: not known."""

    kind: str
    node: Node
    reason: str = ""
    deadline: float | None = None


def as_event(news: News) -> NodeJoined | NodeLeft | NodeDraining | NodeStays:
    """Raises ValueError: there is no such kind."""
    match news.kind:
        case "joined":
            return NodeJoined(news.node)
        case "left":
            return NodeLeft(news.node.name, news.reason)
        case "draining":
            return NodeDraining(news.node.name, news.deadline)
        case "stays":
            return NodeStays(news.node.name)
    raise ValueError(f"no news: {news}")


@dataclass(frozen=True, slots=True)
class Reply:
    """On its way: what a call brought. Of one that failed it is a Fault."""

    value: Any


@dataclass(frozen=True, slots=True)
class Arrived:
    """What a call brought, as the rank returned it."""

    call: CallId
    member: Member
    value: Any


class RankCalls(Protocol):
    """Processes that are called one by one, by name. Nothing here waits for a rank, and nothing raises because one is gone."""

    def listen(self, post: Callable[[object], None]) -> None:
        """From now on all that happens is posted, from threads of the transport: Arrived; and the events Failed, NotMade, NodeJoined,
        NodeLeft, NodeDraining, NodeStays. `post` must return at once, and not raise."""
        ...

    def enlist(self, members: Sequence[Member]) -> None:
        """Name the processes that there are, which were made for ranks 0, 1, ... of the first layout."""
        ...

    def attach(self, member: Member, address: tuple[str, int], beat_seconds: float, run: str, epoch: int = 0) -> None:
        """Have a process keep a lifeline to `address`, as this member of `run`; as soon as there is one."""
        ...

    def spawn(self, member: Member) -> bool:
        """Have a process made for this member, in place of whatever is left of its earlier incarnations. It must be `attach`ed. False,
        and NotMade: there never will be one."""
        ...

    def dismiss(self, member: Member) -> None:
        """End a process, if there is one."""
        ...

    def send(self, call: CallId, member: Member, generation: int, method: str, arguments: tuple, lane: Lane) -> None:
        """Call a method of a rank. generation: that the call is meant for; 0: it belongs to none. The arguments may be changed
        afterwards. Calls of one lane of one member are carried out in order."""
        ...


class Ranks(Protocol):
    """Actors or processes that can serve as ranks."""

    size: int
    """Of them there are seats for."""

    def enlist(self, members: Sequence[Member]) -> None:
        """Name the processes that there are, which were made for ranks 0, 1, ... of the first layout; they are seated so."""
        ...

    def seat(self, members: Sequence[Member]) -> None:
        """From now on rank i is `members[i]`."""
        ...

    def start(self, method: str, arguments: Sequence[tuple]) -> Pending:
        """Call `method` on ranks 0..len(arguments)-1, each with its own arguments. Raises RankFailed: one is known to be gone."""
        ...

    def attach(self, member: Member, address: tuple[str, int], beat_seconds: float, run: str) -> None:
        """Have a process keep a lifeline to `address`, as this member of `run`. Returns at once."""
        ...

    def spawn(self, member: Member) -> bool:
        """Have a process made for this member, in place of whatever is left of its earlier incarnations. Returns at once: whether
        it is going to be made. It must be `attach`ed."""
        ...

    def dismiss(self, member: Member) -> None:
        """End a process, if there is one. Returns at once."""
        ...

    def news(self) -> list[News]:
        """What the cluster said since the last call."""
        ...

    def abort(self) -> None:
        """End every blocked communication of those that are seated."""
        ...


def call(ranks: Ranks, method: str, arguments: Sequence[tuple], timeout_seconds: float, check: Check | None = None) -> list[Any]:
    """Call and wait. When one rank fails, the communication of all is aborted, so that none waits for it."""
    try:
        return ranks.start(method, arguments).results(timeout_seconds, check)
    except RankFailed:
        ranks.abort()
        raise
