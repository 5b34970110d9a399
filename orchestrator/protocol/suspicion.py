"""Who is to go after an interruption that no end and no silence explains."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from orchestrator.protocol.events import FailKind, Fault
from orchestrator.protocol.members import Member


@dataclass(frozen=True, slots=True)
class Suspect:
    """It is to go. reason: for the operator. perhaps: it may be no fault of its own."""

    member: Member
    reason: str
    perhaps: bool = False


@dataclass(frozen=True, slots=True)
class Hopeless:
    """It will fail again, whoever goes."""

    text: str


_OWN = (FailKind.OWN, FailKind.NO_MEMORY, FailKind.REFUSED)


def own_errors(faults: Mapping[Member, Fault]) -> dict[Member, str]:
    """Those that others' failures do not explain."""
    return {member: fault.text for member, fault in faults.items() if fault.kind in _OWN}


def by_fault(faults: Mapping[Member, Fault], newcomers: Collection[Member], struck: Mapping[str, str],
             nodes: Collection[str]) -> Suspect | Hopeless | None:
    """Whoever raised an error of its own: a newcomer first, for others may have raised theirs at what it sent, but not twice; else a
    node's once for each step, for an error that comes again on the same step and another node (or on the only one) is the step's, not
    the member's.

    struck: who raised what in this step already, by node, newcomers aside. nodes: that may be used.
    """
    own = own_errors(faults)
    if not own:
        return None
    new = own.keys() & set(newcomers)
    if new and not any(member.node in struck for member in own.keys() - new):
        return Suspect(max(new), f"on trial: {own[max(new)]}", perhaps=len(new) < len(own))
    first = min(own)
    where = {member.node for member in own} | struck.keys()
    if len(where) > 1 or struck and where.issuperset(nodes):
        texts = list(struck.values()) + [f"{member}: {text}" for member, text in sorted(own.items())]
        return Hopeless("; ".join(dict.fromkeys(texts[:2])))
    return Suspect(first, own[first])


def cut_links(not_reached: Mapping[Member, Collection[Member]]) -> list[tuple[Member, Member]]:
    """Of what every probed member said. Both ends of a link must say so, if both say anything: one that was asleep for a moment could
    not be reached, but reaches everybody afterwards."""
    return sorted({tuple(sorted((member, peer))) for member, peers in not_reached.items() for peer in peers
                   if member in not_reached.get(peer, (member,))})


def by_links(links: Collection[tuple[Member, Member]], before: Mapping[str, Collection[str]], newcomers: Collection[Member],
             safe: Callable[[Member], bool], may_go: Collection[Member]) -> Suspect | None:
    """Of links that carry nothing, the end that is to go, among those that may: the one with more of them; else a newcomer; else one
    whose going loses no state; else the later by name.

    before: by node, those to which there was no way when it was tried earlier; they count as well, for whom one end is tried with
    again and again may be a different one each time.
    """
    if not links:
        return None
    peers: dict[Member, list[Member]] = {}
    for one, other in links:
        peers.setdefault(one, []).append(other)
        peers.setdefault(other, []).append(one)

    def count(member: Member) -> int:
        return len(peers[member]) + len(set(before.get(member.node, ())) - {peer.node for peer in peers[member]})

    chosen = max(set(peers) & set(may_go), key=lambda member: (count(member), member in newcomers, safe(member), member))
    return Suspect(chosen, f"no way between it and {', '.join(map(str, sorted(peers[chosen])))}")
