"""The rank processes of a run: who lives, who serves as which rank, and who must let go.

It gathers what lifelines, the cluster and failed calls say, has orchestrator/membership.py decide what that means, and has
processes started and ended accordingly. What a change means for the training is the trainer's business.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Self

from actors.lifelines import Lifelines
from actors.ranks import LOST, NO_ANSWER, POLL_SECONDS, Pending, RankFailed, Ranks
from orchestrator.config import RunConfig
from orchestrator.layout import Layout
from orchestrator.membership import Decision, Member, Membership, Rules
from orchestrator.topology import Node

logger = logging.getLogger(__name__)

START_SECONDS = 180.0
"""What a process may take from being asked for to its first beat: importing torch takes many seconds on a busy host."""

CHECK_SECONDS = 0.1
"""How often silence is looked for while answers are waited for. Ends are noticed at once."""
ADOPT_SECONDS = 3.0
"""How long a coordinator that was restarted waits for processes of which it does not know whether they live."""


@dataclass(frozen=True)
class Abort:
    """seconds: until each member had let go, by its own clock. missing: did not within the bound; they count as lost."""

    seconds: dict[Member, float]
    missing: tuple[Member, ...]


class Crew:
    """To be used by one thread. `seated[i]` serves as rank i. `about`: what members said of themselves. A context manager.

    host: the address of this node that rank processes can reach.
    """

    def __init__(self, config: RunConfig, ranks: Ranks, host: str):
        self._elastic, self._ranks, self._run = config.elastic, ranks, config.run.name
        self._lines = Lifelines(host, run=config.run.name)
        self.rules = Rules.of(config.elastic, one_host=config.topology.virtual_nodes > 0)
        self._membership = Membership(self.rules)
        self._starting: dict[Member, float] = {}
        self._impossible: set[Member] = set()
        self._planned: tuple[Node, ...] = ()
        self.seated: tuple[Member, ...] = ()
        self.about: dict[Member, dict[str, Any]] = {}
        self._checked = float("-inf")

    @property
    def planned(self) -> tuple[Node, ...]:
        """What the present layout was made for."""
        return self._planned

    @property
    def address(self) -> tuple[str, int]:
        """Where lifelines lead to."""
        return self._lines.address

    def open(self, members: Sequence[Member]) -> None:
        """Take over processes that have just been made, and wait until all have said that they live. They are seated as listed.

        Raises RankFailed: one has not.
        """
        self._take_on(members)
        deadline = time.monotonic() + START_SECONDS
        while silent := [rank for rank, member in enumerate(members) if not self._membership.trusts(member)]:
            self._listen()
            ended = [rank for rank in silent if members[rank] not in self._starting and not self._membership.trusts(members[rank])]
            if ended:
                raise RankFailed(ended[0], LOST)
            if time.monotonic() > deadline:
                raise RankFailed(silent[0], f"{NO_ANSWER} {START_SECONDS:g} s")
            self._lines.wake.wait(POLL_SECONDS)

    def adopt(self, members: Sequence[Member]) -> None:
        """Take over processes that another coordinator has left behind. Those who answer are seated, however many; the others
        are replaced."""
        self._take_on(members)
        deadline = time.monotonic() + ADOPT_SECONDS
        while time.monotonic() < deadline and not all(map(self._membership.trusts, members)):
            self._listen()
            self._lines.wake.wait(POLL_SECONDS)
        present = [member for member in members if self._membership.trusts(member)]
        for member in members:
            if member not in present:
                self._membership = self._membership.ended(member, time.monotonic(), f"{NO_ANSWER} {ADOPT_SECONDS:g} s")
                self._starting.pop(member, None)
        self.use(present)

    def _take_on(self, members: Sequence[Member]) -> None:
        now, counts = time.monotonic(), _counts(members)
        self._planned = tuple(Node(name, count) for name, count in counts.items())
        for node in self._planned:
            self._membership = self._membership.node_joined(node, now)
        self._ranks.enlist(members)
        self.seated = tuple(members)
        for member in members:
            self._attach(member, now)

    def close(self) -> None:
        self._lines.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # --- what is going on ----------------------------------------------------------------------------------------

    def look(self) -> Decision:
        """What follows from everything heard so far. Processes that are wanted are being started, and those that are declared
        lost are ended."""
        self._listen()
        now = time.monotonic()
        decision = self._decide(now)
        for member in decision.fence:
            self._ranks.dismiss(member)
        for member in decision.start:
            if member in self._impossible:
                continue
            if self._ranks.spawn(member):
                self._membership = self._membership.started(member, now)
                self._attach(member, now)
            else:
                self._impossible.add(member)
        return decision

    def check(self) -> RankFailed | None:
        """Whether somebody is lost who is waited for; to be asked again and again meanwhile."""
        now = time.monotonic()
        if not self._lines.wake.is_set() and now - self._checked < CHECK_SECONDS:
            return None
        self._checked = now
        decision = self.look()
        return RankFailed(self.seated.index(decision.lost[0]), LOST) if decision.lost else None

    def blame(self, failed: RankFailed) -> None:
        """The transport says that a rank's process has ended."""
        member = failed.member
        if member is None and failed.rank < len(self.seated):
            member = self.seated[failed.rank]
        if failed.lost and member is not None:
            self._membership = self._membership.ended(member, time.monotonic(), LOST)

    def wait(self, seconds: float) -> None:
        """Until somebody comes or goes, at most this long."""
        self._lines.wake.wait(seconds)

    # --- what is to be done --------------------------------------------------------------------------------------

    def abort(self, generation: int) -> Abort:
        """Have everybody who is seated and alive end all communication of a generation. Bounded by `elastic.abort_seconds`."""
        told = [member for member in self.seated if self._membership.trusts(member)]
        self._lines.abort(told, generation)
        deadline = time.monotonic() + self._elastic.abort_seconds
        while True:
            answered = self._lines.aborted(told, generation, POLL_SECONDS)
            self._listen()
            missing = [member for member in told if member not in answered and self._membership.trusts(member)]
            if not missing:
                return Abort(answered, ())
            if time.monotonic() > deadline:
                break
        for member in missing:
            self._membership = self._membership.ended(
                member, time.monotonic(), f"did not let go within {self._elastic.abort_seconds:g} s")
        return Abort(answered, tuple(missing))

    def trusts(self, member: Member) -> bool:
        """Whether it lives, as far as is known, and was never lost."""
        return self._membership.trusts(member)

    def seat(self, layout: Layout, nodes: tuple[Node, ...] | None = None) -> None:
        """Give the places of a layout made for `nodes` to the processes there. Raises RankFailed: one has been lost meanwhile."""
        present = {(member.node, member.local): member for member in self._present()}
        members = []
        for place in layout.places:
            member = present.get((place.node, place.local))
            if member is None:
                raise RankFailed(place.rank, LOST, self._last_at(place.node, place.local))
            members.append(member)
        self._planned = self._planned if nodes is None else nodes
        self.use(members)

    def plan_for(self, nodes: tuple[Node, ...]) -> None:
        """The present layout is the one for these nodes, though it leaves some of their ranks idle."""
        self._planned = nodes

    def use(self, members: Iterable[Member]) -> None:
        """From now on calls go to these, in order."""
        self.seated = tuple(members)
        self._ranks.seat(self.seated)

    def start(self, method: str, arguments: list[tuple]) -> Pending:
        """Call the first ranks, each with its own arguments. Raises RankFailed."""
        return self._ranks.start(method, arguments)

    def dismiss(self, members: Iterable[Member]) -> None:
        """End processes that serve no more."""
        for member in members:
            self._ranks.dismiss(member)

    # --- inside --------------------------------------------------------------------------------------------------

    def _listen(self) -> None:
        """Take in all that was said."""
        self._lines.wake.clear()
        state, now = self._membership, time.monotonic()
        for news in self._ranks.news():
            state = _told(state, news, now)
        for member, about in self._lines.hello():
            state = state.ready(member, now)
            self.about[member] = about
            self._starting.pop(member, None)
        for member, when, how in self._lines.ended():
            state = state.ended(member, when, f"its process or node ended ({how})")
            self._starting.pop(member, None)
        state = state.listened(self._lines.heard(), now)
        for member, since in list(self._starting.items()):
            if now - since > START_SECONDS:
                state = state.ended(member, now, f"did not start within {START_SECONDS:g} s")
                del self._starting[member]
        self._membership = state

    def _last_at(self, node: str, local: int) -> Member:
        """Who was there last, or is to be."""
        known = [member for member in (*self.about, *self._starting) if (member.node, member.local) == (node, local)]
        return max(known, default=Member(node, local))

    def _decide(self, now: float) -> Decision:
        return self._membership.decide(self.seated, now, self._planned)

    def _attach(self, member: Member, now: float) -> None:
        self._membership = self._membership.started(member, now)
        self._starting[member] = now
        self._ranks.attach(member, self._lines.address, self._elastic.beat_seconds, self._run)

    def _present(self) -> list[Member]:
        return [member for member in self._lines.heard() if self._membership.trusts(member)]


def _told(state: Membership, news: Any, now: float) -> Membership:
    match news.kind:
        case "joined":
            return state.node_joined(news.node, now)
        case "left":
            return state.node_left(news.node.name, now, news.reason)
        case "draining":
            return state.node_draining(news.node.name, news.deadline, now)
        case "stays":
            return state.node_undrained(news.node.name, now)
    raise ValueError(news)


def _counts(members: Iterable[Member]) -> dict[str, int]:
    """Processes of each node: locals count from 0."""
    found: dict[str, int] = {}
    for member in members:
        found[member.node] = max(found.get(member.node, 0), member.local + 1)
    return found
