"""How a trainer reaches its rank processes: one interface, `RankCalls`, of two transports: Ray actors (ray_ranks.py), and plain
processes (processes.py)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from orchestrator.protocol.commands import CallLane
from orchestrator.protocol.events import CallId, Failed, Fault, NodeDraining, NodeJoined, NodeLeft, NodeStays
from orchestrator.protocol.members import Member
from orchestrator.topology import Node

LOST = "its process or node was lost"


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


def answered(call: CallId, member: Member, answer: Reply | Fault) -> Arrived | Failed:
    """What is posted of an answer that has come."""
    if isinstance(answer, Fault):
        return Failed(call, member, answer.kind, answer.text)
    return Arrived(call, member, answer.value)


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
        """Have a process keep a heartbeat connection to `address`, as this member of `run`; as soon as there is one."""
        ...

    def spawn(self, member: Member) -> bool:
        """Have a process made for this member, in place of whatever is left of its earlier incarnations. It must be `attach`ed. False,
        and NotMade: there never will be one."""
        ...

    def dismiss(self, member: Member) -> None:
        """End a process, if there is one."""
        ...

    def send(self, call: CallId, member: Member, generation: int, method: str, arguments: tuple, lane: CallLane) -> None:
        """Call a method of a rank. generation: that the call is meant for; 0: it belongs to none. The arguments may be changed
        afterwards. Calls of one lane of one member are carried out in order."""
        ...

    def abort(self) -> None:
        """End every blocked communication of them all, whatever its generation: the run is over."""
        ...
