"""What is remembered of an interruption until it is over, and of members on trial."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from orchestrator.protocol.events import Fault
from orchestrator.protocol.members import Member

MOST_TRIALS = 5
_TOGETHER_SECONDS = 1.0  # losses of one node that are one


@dataclass(slots=True)
class Interruption:
    """since: when it was known. first, sign: who failed first, and how. faults: what members raised. told: of whose loss. aborted: how
    long each took to let go. first_call: of what was interrupted, for faults of earlier calls say nothing of it. probed: links have been
    tried. understood: what follows has been told."""

    since: float
    first: Member | None
    sign: str
    faults: dict[Member, Fault] = field(default_factory=dict)
    told: set[Member] = field(default_factory=set)
    aborted: dict[Member, float] = field(default_factory=dict)
    silent: set[Member] = field(default_factory=set)
    first_call: int = 0
    probed: bool = False
    understood: bool = False

    def again(self, first: Member | None, sign: str) -> None:
        """What was tried against it has been interrupted itself."""
        self.first, self.sign = first, sign
        self.faults, self.probed, self.understood = {}, False, False


class Trials:
    """Newcomers are on trial until a step is committed with them. What they do meanwhile costs them their place, never the run.

    struck: errors of those who were not on trial, by step and node. apart: nodes between which there was no way since the last step.
    unnamed: interruptions in a row that nobody explains. wary: one of them has failed, so that nobody else is taken in before the next
    step, either, if there are enough.
    """

    most = MOST_TRIALS

    def __init__(self) -> None:
        self.on_trial: set[Member] = set()
        self.suspected: set[str] = set()
        self.proven: set[Member] = set()
        self.struck: dict[int, dict[str, str]] = {}
        self.apart: dict[str, set[str]] = {}
        self.unnamed = 0
        self.wary = False
        self._failures: dict[str, tuple[int, float]] = {}

    def begin(self, members: Iterable[Member]) -> None:
        """These take part for the first time; those who were on trial before still are."""
        self.on_trial.update(members)

    def passed(self, seated: Iterable[Member], committed: int) -> None:
        """A step was committed with these."""
        self.proven.update(seated)
        for member in self.on_trial:
            self._failures.pop(member.node, None)
        self.on_trial.clear()
        self.struck = {step: nodes for step, nodes in self.struck.items() if step >= committed}
        self.unnamed, self.wary = 0, False
        self.suspected.clear()
        self.apart.clear()

    def found_apart(self, links: Iterable[tuple[Member, Member]]) -> None:
        for one, other in links:
            self.apart.setdefault(one.node, set()).add(other.node)
            self.apart.setdefault(other.node, set()).add(one.node)

    def failed(self, member: Member, now: float) -> bool:
        """A member is lost. Whether that bars its node: it has failed as often as it may, without a step in between."""
        if member not in self.on_trial:
            return False
        self.on_trial.discard(member)
        self.wary = True
        count, last = self._failures.get(member.node, (0, -_TOGETHER_SECONDS))
        if now - last < _TOGETHER_SECONDS:
            return False
        self._failures[member.node] = count + 1, now
        return count + 1 == self.most

    def excuse(self, member: Member) -> None:
        """It goes, but that does not count against its node."""
        self.on_trial.discard(member)
        self.wary = True

    @property
    def barred(self) -> tuple[str, ...]:
        """Nodes on which nothing is started any more."""
        return tuple(node for node, (count, _) in self._failures.items() if count >= self.most)

    def forgive(self, node: str) -> None:
        """It has left, and joined again."""
        self._failures.pop(node, None)
