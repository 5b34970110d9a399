"""What is remembered of an interruption until it is over, and of members on trial."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from orchestrator.membership import Member
from orchestrator.protocol.events import Fault

MOST_TRIALS = 5


@dataclass(slots=True)
class Interruption:
    """since: when it was known. first, sign: who failed first, and how. faults: what members raised. told: of whose loss. aborted: how
    long each took to let go. probed: links have been tried. understood: what follows has been told."""

    since: float
    first: Member | None
    sign: str
    faults: dict[Member, Fault] = field(default_factory=dict)
    told: set[Member] = field(default_factory=set)
    aborted: dict[Member, float] = field(default_factory=dict)
    silent: set[Member] = field(default_factory=set)
    probed: bool = False
    understood: bool = False

    def again(self, first: Member | None, sign: str) -> None:
        """What was tried against it has been interrupted itself."""
        self.first, self.sign = first, sign
        self.faults, self.probed, self.understood = {}, False, False


class Trials:
    """Newcomers are on trial until a step is committed with them. What they do meanwhile costs them their place, never the run.

    struck: who has gone for an error of its own, by step and node. unnamed: interruptions in a row that nobody explains.
    """

    most = MOST_TRIALS

    def __init__(self) -> None:
        self.on_trial: set[Member] = set()
        self.proven: set[Member] = set()
        self.struck: dict[int, dict[str, str]] = {}
        self.unnamed = 0
        self._failures: dict[tuple[str, int], int] = {}

    def begin(self, members: Iterable[Member]) -> None:
        """These take part for the first time; those who were on trial before still are."""
        self.on_trial.update(members)

    def passed(self, seated: Iterable[Member]) -> None:
        """A step was committed with these."""
        self.proven.update(seated)
        for member in self.on_trial:
            self._failures.pop((member.node, member.local), None)
        self.on_trial.clear()
        self.struck.clear()
        self.unnamed = 0

    def failed(self, member: Member, now: float) -> bool:
        """A member is lost. Whether that bars its place: it has failed as often as it may, without a step in between."""
        if member not in self.on_trial:
            return False
        self.on_trial.discard(member)
        place = member.node, member.local
        self._failures[place] = self._failures.get(place, 0) + 1
        return self._failures[place] == self.most

    def bars(self, member: Member) -> bool:
        return self._failures.get((member.node, member.local), 0) >= self.most

    def forgive(self, node: str) -> None:
        """It has left, and joined again."""
        self._failures = {place: count for place, count in self._failures.items() if place[0] != node}
