"""Who is to go after an interruption that no end and no silence explains."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from orchestrator.membership import Member
from orchestrator.protocol.events import FailKind, Fault


@dataclass(frozen=True, slots=True)
class Suspect:
    """It is to go. reason: for the operator."""

    member: Member
    reason: str


@dataclass(frozen=True, slots=True)
class Hopeless:
    """It will fail again, whoever goes."""

    text: str


_OWN = (FailKind.OWN, FailKind.NO_MEMORY)


def by_fault(faults: Mapping[Member, Fault], newcomers: Collection[Member], struck: Mapping[str, str],
             nodes: Collection[str]) -> Suspect | Hopeless | None:
    """Whoever raised an error of its own: a newcomer, where only newcomers did; else a node's once for each step, for an error that
    comes again on the same step and another node (or on the only one) is the step's, not the member's.

    struck: who (and what) has gone for that in this step already, by node. nodes: that can be used.
    """
    own = {member: fault.text for member, fault in faults.items() if fault.kind in _OWN}
    if not own:
        return None
    if own.keys() <= set(newcomers):
        return Suspect(max(own), f"on trial: {own[max(own)]}")
    first = min(own.keys() - set(newcomers))
    where = {member.node for member in own} | struck.keys()
    if len(where) > 1 or struck and where.issuperset(nodes):
        texts = list(struck.values()) + [f"{member}: {text}" for member, text in sorted(own.items())]
        return Hopeless("; ".join(dict.fromkeys(texts[:2])))
    return Suspect(first, own[first])


def by_links(not_reached: Mapping[Member, Collection[Member]], newcomers: Collection[Member],
             safe: Callable[[Member], bool]) -> Suspect | None:
    """Of links that carry nothing, the end that is to go: the one with more of them; else a newcomer; else one whose going
    loses no state; else the later by name.

    not_reached: what every probed member said. Both ends of a link must say so, if both say anything: one that was asleep for a moment
    could not be reached, but reaches everybody afterwards.
    """
    links = {tuple(sorted((member, peer))) for member, peers in not_reached.items() for peer in peers
             if member in not_reached.get(peer, (member,))}
    if not links:
        return None
    ends = Counter(member for link in links for member in link)
    chosen = max(ends, key=lambda member: (ends[member], member in newcomers, safe(member), member))
    others = sorted({member for link in links if chosen in link for member in link} - {chosen})
    return Suspect(chosen, f"no way between it and {', '.join(map(str, others))}")
