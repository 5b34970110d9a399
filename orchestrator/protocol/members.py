"""Rank processes by name, by which rules one counts as lost, and what is remembered of the place of each and of its node."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from orchestrator.config.run_config import ElasticSection
from orchestrator.topology import Node

SILENCE_SECONDS, SILENCE_ON_ONE_HOST_SECONDS = 1.5, 15.0
"""What `elastic.silence_seconds` is where it is auto."""
ENDS_TOGETHER_SECONDS = 0.5
"""In which the ends of all processes of a node that is gone are told, mostly."""
DOUBLINGS = 5
"""Of the cool-down, at most."""
STARTS_IN_VAIN = 3
"""Of processes for rank 0 of a node that never were ready, after which a run does not count on it. It is tried again nevertheless."""


@dataclass(frozen=True, slots=True, order=True)
class Member:
    """One rank process. `local`: its index on its node. A process that takes its place has the next incarnation."""

    node: str
    local: int
    incarnation: int = 0

    def __str__(self) -> str:
        return f"{self.node}/{self.local}" + (f"#{self.incarnation}" if self.incarnation else "")


@dataclass(frozen=True, slots=True)
class MembershipRules:
    """max_nodes: None: no limit. Seconds as in the section `elastic` of the configuration."""

    min_nodes: int = 1
    max_nodes: int | None = None
    silence_seconds: float = 1.0
    cool_down_seconds: float = 30.0

    @classmethod
    def of(cls, section: ElasticSection, *, one_host: bool = False) -> MembershipRules:
        """one_host: all nodes are virtual. None of them is cut off, and a busy host keeps everybody waiting."""
        most = None if section.max_nodes == "auto" else section.max_nodes
        silence = section.silence_seconds
        if silence == "auto":
            silence = max(SILENCE_ON_ONE_HOST_SECONDS if one_host else SILENCE_SECONDS, 4 * section.beat_seconds)
        return cls(section.min_nodes, most, silence, section.cool_down_seconds)

    def cool_down(self, losses: int) -> float:
        """Seconds after so many losses in a row; none after none."""
        return self.cool_down_seconds * 2 ** min(losses - 1, DOUBLINGS) if losses > 0 else 0.0

    def counted(self, losses: int, until: float, now: float) -> int:
        """Losses in a row with one more now, where the cool-down of the last one ended at `until`."""
        return (losses if now - until <= self.cool_down(DOUBLINGS + 1) else 0) + 1


@dataclass(frozen=True)
class Decision:
    """What follows from what was seen.

    lost: seated, gone: abort and plan anew. leaving: seated, their node drains: plan anew at the next step boundary.
    nodes: what the next layout may use, longest present first; `ranks` of each: its members 0..ranks-1 are ready.
    draining: what could still be used until its deadline, if nothing else can.
    joining: `nodes` has more than was seated, or than was planned for.
    start: processes to start now, each in place of whatever is left of its earlier incarnations.
    fence: lost, yet heard from: to be told to let go.
    wait: there are fewer nodes than the minimum: a sentence that says which and why; else None.
    reasons: why a member is lost or leaving, why a node is not in `nodes`.
    """

    lost: tuple[Member, ...]
    leaving: tuple[Member, ...]
    nodes: tuple[Node, ...]
    draining: tuple[Node, ...]
    joining: bool
    start: tuple[Member, ...]
    fence: tuple[Member, ...]
    wait: str | None
    reasons: Mapping[Member | str, str]


@dataclass(frozen=True, slots=True)
class PlaceRecord:
    """Where one rank process runs at a time.

    trusted: the least incarnation that is. running: the one that was started; None: none is. since: when it was ready.
    lost, reason: of its last loss. losses: in a row, by itself. until: end of its own cool-down. alone: the last was its own.
    in_vain: processes in a row that were started and never were ready.
    """

    trusted: int = 0
    running: int | None = None
    warm: bool = False
    since: float = float("-inf")
    lost: float = float("-inf")
    losses: int = 0
    until: float = float("-inf")
    alone: bool = False
    reason: str = ""
    in_vain: int = 0

    def retired(self, now: float, reason: str) -> PlaceRecord:
        return replace(self, trusted=self.running + 1, running=None, warm=False, lost=now, alone=False, reason=reason,
                       in_vain=0 if self.warm else self.in_vain + 1)


@dataclass(frozen=True, slots=True)
class NodeRecord:
    """A node. down: its last loss is counted, and nothing on it has been ready since. until: end of its cool-down."""

    ranks: int = 0
    present: bool = False
    since: float = float("-inf")
    draining: bool = False
    deadline: float | None = None
    expired: bool = False
    down: bool = False
    losses: int = 0
    until: float = float("-inf")
    reason: str = ""

    def open(self, now: float) -> bool:
        """Whether processes on it may be started and used."""
        return self.present and not self.draining and now >= self.until
