"""Groups of ranks that meet, and the links between nodes.

What a group does is done in the same order by all of it, so the n-th meeting of one is the n-th of the others. A meeting ends
for a member when all have come and every link to it is whole. It never ends otherwise: only an abort, or the end of a process
whose connections tell its peers, gets a member out of it."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING

from orchestrator.protocol.members import Member

if TYPE_CHECKING:
    from tests.simulation.rank_model import RankModel

LONGEST = 1.5
"""Seconds that a message between healthy ones takes at most."""


@cache
def delays(spread: float) -> tuple[float, ...]:
    """Seconds of a message, in no order: short ones mostly, and a few that are twenty times as long."""
    chance, found = random.Random(0), []
    for _ in range(4096):
        delay = chance.expovariate(20.0 / spread)
        found.append(min(delay * 20 if chance.random() < 0.03 else delay, LONGEST))
    return tuple(found)


class Meeting:
    __slots__ = ("kind", "payloads", "result", "waiting")

    def __init__(self, kind: str):
        self.kind, self.payloads, self.waiting, self.result = kind, {}, [], None


class Group:
    """Of one generation of one coordinator. `broken`: a process of it has ended, and its connections said so."""

    __slots__ = ("broken", "epoch", "index", "meetings", "members", "number")

    def __init__(self, epoch: int, number: int, members: tuple[Member, ...]):
        self.epoch, self.number, self.members = epoch, number, members
        self.index = {member: rank for rank, member in enumerate(members)}
        self.meetings: list[Meeting] = []
        self.broken = False


class Links:
    """One-way links between nodes that are cut."""

    def __init__(self) -> None:
        self.cut: set[tuple[str, str]] = set()

    def whole(self, sender: Member, receiver: Member) -> bool:
        return (sender.node, receiver.node) not in self.cut

    def both_ways(self, one: Member, other: Member) -> bool:
        return self.whole(one, other) and self.whole(other, one)

    def reach(self, member: Member, others: tuple[Member, ...]) -> bool:
        """Whether a member can be reached from all of them."""
        if not self.cut:
            return True
        return all((other.node, member.node) not in self.cut for other in others)


def meet(group: Group, rank: RankModel, kind: str, payload: object, links: Links, go: Callable[[RankModel, object], None],
         differ: Callable[[str], None]) -> None:
    """A rank comes to its next meeting. go: is called for each whose meeting ends, with the meeting.

    differ: is called where another member of the group has come to something else at the same point.
    """
    number = rank.met
    if number == len(group.meetings):
        group.meetings.append(Meeting(kind))
    meeting = group.meetings[number]
    rank.met = number + 1
    if meeting.kind != kind:
        differ(f"{rank.member} comes to {kind!r} where others of generation {group.number} have come to {meeting.kind!r}")
    meeting.payloads[rank.member] = payload
    meeting.waiting.append(rank)
    rank.waits = meeting
    if len(meeting.payloads) == len(group.members):
        release(group, meeting, links, go)


def release(group: Group, meeting: Meeting, links: Links, go: Callable[[RankModel, object], None]) -> None:
    """Let those go on whose meeting has ended."""
    if len(meeting.payloads) < len(group.members):
        return
    still = []
    for rank in meeting.waiting:
        if meeting.kind == "met" or links.reach(rank.member, group.members):  # they meet at the coordinator's
            rank.waits = None
            go(rank, meeting)
        else:
            still.append(rank)
    meeting.waiting = still
