"""Who is there: which processes, on which nodes, are trusted, started, ended, on trial. What a run knows of its members, whatever it
does with them at the time."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from orchestrator.protocol import events as happened
from orchestrator.protocol import suspicion
from orchestrator.protocol.base import Planner
from orchestrator.protocol.commands import Command, Fence, InReferences, Spawn, Tell
from orchestrator.protocol.deadlines import Deadlines
from orchestrator.protocol.events import Base
from orchestrator.protocol.interruption import Trials
from orchestrator.protocol.members import Decision, Member, MembershipRules
from orchestrator.protocol.membership import Membership
from orchestrator.protocol.saving import Saver
from orchestrator.told.kinds import Event, NodeBarred, NodeIdle
from orchestrator.topology import Node


class Attendance:
    """The part of a Run that knows its members.

    base: the generation whose state goes on; None: none has. seated: who serves in it, by rank. planned: the nodes that its layout was
    made for.
    """

    def __init__(self, rules: MembershipRules, deadlines: Deadlines, planner: Planner):
        self.bounds, self.planner, self.membership = deadlines, planner, Membership(rules)
        self.now = 0.0
        self.base: Base | None = None
        self.seated: tuple[Member, ...] = ()
        self.planned: tuple[Node, ...] = ()
        self.trials, self.saver = Trials(), Saver()
        self.expected_until = 0.0
        self.roll_called = False
        self._out: list[Command] = []
        self._starting: dict[Member, float] = {}
        self._never: set[Member] = set()
        self._opens: float | None = None
        self._told: dict[str, Any] = {}

    # --- orders ----------------------------------------------------------------------------------------------------------

    def order(self, command: Command) -> None:
        self._out.append(command)

    def tell(self, event: Event | InReferences) -> None:
        self.order(Tell(event))

    def tell_once(self, event: Event, key: str, value: Any) -> None:
        """Unless the last thing told under `key` was the same."""
        if self._told.get(key) != value:
            self._told[key] = value
            self.tell(event)

    def forget_told(self, key: str) -> None:
        self._told.pop(key, None)

    # --- who is there ----------------------------------------------------------------------------------------------------

    def trusts(self, member: Member) -> bool:
        """Whether it is ready and was never lost."""
        return self.membership.trusts(member)

    def dead(self, members: Iterable[Member]) -> list[Member]:
        return [member for member in members if not self.trusts(member)]

    def safe_without(self, member: Member) -> bool:
        """Whether all state of the base lives on if this one goes."""
        base = self.base
        if base is None:
            return True
        left = [other for other in base.members if other is not None and other != member and self.trusts(other)]
        return self.planner.covered(base, left) is None

    def by_links(self, not_reached: Mapping[Member, Collection[Member]], newcomers: Collection[Member],
                 may_go: Collection[Member]) -> suspicion.Suspect | None:
        """Who is to go for a link that carries nothing, if one does, by what probed members said."""
        links = suspicion.cut_links(not_reached)
        found = suspicion.by_links(links, self.trials.apart, newcomers, self.safe_without, may_go)
        self.trials.found_apart(links)
        return found

    @property
    def decision(self) -> Decision:
        """What follows from who is there."""
        return self.membership.decide(self.seated, self.now, self.planned, self.trials.barred)

    @property
    def usable(self) -> tuple[Node, ...]:
        """Nodes for the next generation: without those of which one was suspected since the last committed step, if that leaves as
        many as are wanted at least."""
        nodes = self.decision.nodes
        left = tuple(node for node in nodes if node.name not in self.trials.suspected)
        return left if len(left) >= max(1, self.membership.rules.min_nodes) else nodes

    @property
    def has_enough(self) -> bool:
        """Whether those who serve are on as many nodes as the run wants at least."""
        return len({member.node for member in self.seated}) >= self.membership.rules.min_nodes

    def newcomers(self) -> set[Member]:
        """Those on trial."""
        return self.trials.on_trial

    # --- who comes and goes ----------------------------------------------------------------------------------------------

    def lose(self, member: Member, reason: str, *, fence: bool = False, cool: bool = False) -> None:
        """A member is lost. fence: its process may live, and is to be ended. cool: not to be tried again at once."""
        self._starting.pop(member, None)
        if member.incarnation < self.membership.trusted_from(member.node, member.local):
            return
        if cool:
            self.trials.suspected.add(member.node)
            self.membership = self.membership.suspected(member, self.now, reason)
        else:
            self.membership = self.membership.ended(member, self.now, reason)
        if self.trials.failed(member, self.now):
            self.tell(NodeBarred(str(member), member.node, reason, self.trials.most))
        if fence:
            self.order(Fence(member, reason))

    def still_starts(self, member: Member) -> None:
        """It is there, as far as is known, but has not said so: it has its time, and nobody waits for it, but with what cannot be taken
        back, for a while."""
        self._starting[member] = self.now
        self.expected_until = self.now + self.bounds.release

    @property
    def expects_somebody(self) -> bool:
        """Whether some who may hold state have not been heard from yet."""
        return self.now < self.expected_until and any(self.membership.may_come(member) for member in self._starting)

    def release_drained(self) -> None:
        """Between two things: end those whose node drains and who are of no more use, for they neither serve nor still write what they
        had of a checkpoint. They are lost by that, should their node stay after all."""
        for member in self.membership.ready_members():
            if self.membership.drains(member.node) and member not in self.seated and not self.saver.waits_for_member(member):
                self.trials.on_trial.discard(member)
                self.membership = self.membership.ended(member, self.now, "its node drains")
                self.order(Fence(member, "its node drains"))

    def summon(self) -> None:
        """Have processes started and ended as who is there demands. None is started before it is known who of those who are said to
        be there are, and none beside others before it is known whether these have ended as well: where all of a node have ended, one
        that was started for the first of them would be ended for the last."""
        for member, since in list(self._starting.items()):
            if not self.membership.may_come(member):
                del self._starting[member]
            elif self.now >= since + self.bounds.start:
                self.lose(member, f"did not start within {self.bounds.start:g} s", fence=True, cool=True)
        decision = self.decision
        for member in decision.fence:
            self.order(Fence(member, "it was given up, yet is heard from"))
        opens = [self.membership.next_change(self.now)]
        for member in decision.start if self.roll_called else ():
            if member not in self._never and member.node not in self.trials.barred:
                until = self.membership.may_not_be_alone(member)
                if until is not None and self.now < until:
                    opens.append(until)
                    continue
                self.membership = self.membership.started(member, self.now)
                self._starting[member] = self.now
                self.order(Spawn(member))
        self._opens = min((at for at in opens if at is not None), default=None)
        self._tell_idle(decision)

    def _tell_idle(self, decision: Decision) -> None:
        """Why a node that is there is not used, and until when: once for each loss."""
        for name, until in self.membership.cooling(self.now):
            self.tell_once(NodeIdle(name, decision.reasons.get(name, ""), round(until - self.now, 1)), f"idle {name}", until)

    # --- what the cluster says -------------------------------------------------------------------------------------------

    def _connection_ended(self, event: happened.Ended) -> None:
        self.lose(event.member, f"its process or node ended ({event.how})")

    def _node_joined(self, event: happened.NodeJoined) -> None:
        if not self.membership.present(event.node.name):
            self.trials.forgive(event.node.name)
        self.membership = self.membership.node_joined(event.node, self.now)

    def _node_left(self, event: happened.NodeLeft) -> None:
        self.membership = self.membership.node_left(event.name, self.now, event.reason)

    def _node_draining(self, event: happened.NodeDraining) -> None:
        self.membership = self.membership.node_draining(event.name, event.deadline, self.now)

    def _node_stays(self, event: happened.NodeStays) -> None:
        self.membership = self.membership.node_undrained(event.name, self.now)
        self.forget_told("nowhere")

    def _not_made(self, event: happened.NotMade) -> None:
        self._never.add(event.member)
        self.lose(event.member, event.reason, cool=True)
