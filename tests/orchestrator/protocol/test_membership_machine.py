"""Membership under any sequence of events, two at once and during recovery: what must hold whatever happens.

The machine has a world of its own: nodes, processes that beat, are frozen or die, a cluster that says so or does not, and a
trainer whose seats change only when it plans. Membership sees no more of it than a coordinator would.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from orchestrator.protocol.members import DOUBLINGS, Member, MembershipRules
from orchestrator.protocol.membership import Membership
from orchestrator.topology import Node

NODES = {"a": 2, "b": 2, "c": 1, "d": 3}
BEAT = 0.1
names = st.sampled_from(sorted(NODES))
picks = st.integers(0, 20)


@dataclass
class Process:
    frozen: bool = False
    starting: bool = True
    heard: float = field(default=float("-inf"))


class Machine(RuleBasedStateMachine):
    @initialize(most=st.sampled_from([None, 2, 3]), least=st.integers(1, 3))
    def begin(self, most, least):
        self.rules_ = MembershipRules(min(least, most or 3), most, 1.0, 5.0)
        self.state = Membership(self.rules_)
        self.now, self.seated, self.planned = 0.0, (), ()
        self.processes: dict[Member, Process] = {}
        self.present, self.draining = set(), {}
        self.touched: set[Member] = set()  # something befell them that may count as a loss
        self.given_up: set[Member] = set()  # what membership ever said is lost
        self.newest: dict[tuple[str, int], int] = {}

    def on(self, name):
        return [member for member in self.processes if member.node == name]

    def pick(self, members, index):
        return sorted(members)[index % len(members)]

    def beat(self, seconds):
        for _ in range(round(seconds / BEAT)):
            self.now += BEAT
            for process in self.processes.values():
                if not process.frozen:
                    process.heard = self.now
            self.expire()
            self.state = self.state.listened(self.heard(), self.now)

    def heard(self):
        return {member: process.heard for member, process in self.processes.items() if process.heard > float("-inf")}

    def expire(self):
        for name, deadline in self.draining.items():
            if deadline is not None and deadline <= self.now:
                self.touched.update(self.on(name))

    # ---- the world

    @rule(name=names)
    def joins(self, name):
        if name not in self.present:
            self.present.add(name)
        self.state = self.state.node_joined(Node(name, NODES[name]), self.now)

    @rule(name=names, kills=st.booleans())
    def leaves(self, name, kills):
        """With its processes, or without: a raylet's death does not end them at once."""
        self.touched.update(self.on(name))
        self.present.discard(name)
        self.draining.pop(name, None)
        self.state = self.state.node_left(name, self.now, "the cluster says so")
        if kills:
            self.killed(self.on(name))

    def killed(self, members):
        for member in sorted(members):
            self.touched.add(member)
            del self.processes[member]
            self.state = self.state.ended(member, self.now, "killed")

    @precondition(lambda self: self.processes)
    @rule(index=picks)
    def one_is_killed(self, index):
        self.killed([self.pick(self.processes, index)])

    @rule(name=names)
    def all_are_killed(self, name):
        self.killed(self.on(name))

    @rule(name=names, seconds=st.sampled_from([0.3, 1.4]))
    def node_freezes(self, name, seconds):
        for member in self.on(name):
            self.processes[member].frozen = True
            self.touched.add(member)
        self.beat(seconds)

    @precondition(lambda self: self.processes)
    @rule(index=picks, seconds=st.sampled_from([0.3, 1.4]))
    def one_freezes(self, index, seconds):
        member = self.pick(self.processes, index)
        self.processes[member].frozen = True
        self.touched.add(member)
        self.beat(seconds)

    @rule()
    def all_thaw(self):
        for process in self.processes.values():
            process.frozen = False
        self.beat(0.2)

    @rule(name=names, ahead=st.sampled_from([None, 0.5, 3.0]))
    def drains(self, name, ahead):
        if name in self.present:
            self.draining[name] = None if ahead is None else self.now + ahead
            self.state = self.state.node_draining(name, self.draining[name], self.now)

    @rule(name=names)
    def is_not_drained(self, name):
        self.draining.pop(name, None)
        self.state = self.state.node_undrained(name, self.now)

    @rule(seconds=st.sampled_from([0.1, 0.7, 6.0]))
    def time_passes(self, seconds):
        self.beat(seconds)

    @rule(seconds=st.sampled_from([0.7, 2.0, 60.0]))
    def listener_is_frozen(self, seconds):
        """Nobody is lost because of it, though their beats are old now."""
        before = {member for member in self.processes if self.state.trusts(member)}
        heard = self.heard()
        self.now += seconds
        self.expire()
        drained = {member for name, deadline in self.draining.items() if deadline is not None and deadline <= self.now
                   for member in self.on(name)}
        self.state = self.state.listened(heard, self.now)
        assert all(self.state.trusts(member) for member in before - drained)
        self.beat(0.2)

    # ---- what is carried out

    @rule(count=st.integers(1, 3))
    def some_are_started(self, count):
        for member in self.state.decide(self.seated, self.now, self.planned).start[:count]:
            self.start(member)

    def start(self, member):
        for older in [other for other in self.on(member.node) if other.local == member.local]:
            del self.processes[older]  # whoever starts one ends what is left
            self.touched.add(older)
        assert member.incarnation > self.newest.get((member.node, member.local), -1)
        assert member.node in self.present and member.node not in self.draining
        self.newest[member.node, member.local] = member.incarnation
        self.processes[member] = Process()
        self.state = self.state.started(member, self.now)

    @rule(count=st.integers(1, 4))
    def some_are_ready(self, count):
        for member in sorted(m for m, process in self.processes.items() if process.starting)[:count]:
            self.processes[member].starting = False
            self.state = self.state.ready(member, self.now)

    @rule()
    def the_fenced_let_go(self):
        for member in self.state.decide(self.seated, self.now).fence:
            if member in self.processes and not self.processes[member].frozen:
                self.seated = tuple(other for other in self.seated if other != member)
                process = self.processes.pop(member)
                following = Member(member.node, member.local, member.incarnation + 1)
                self.newest[member.node, member.local] = following.incarnation
                self.processes[following] = Process(starting=False, heard=process.heard)
                self.state = self.state.ready(following, self.now)

    @rule()
    def plans(self):
        found = self.state.decide(self.seated, self.now, self.planned)
        if found.wait is None:
            self.planned = found.nodes
            self.seated = self.offered(found.nodes)
            assert not self.state.decide(self.seated, self.now, self.planned).joining

    def offered(self, nodes):
        ready = {(member.node, member.local): member for member in self.state.ready_members()}
        return tuple(ready.get((node.name, local)) for node in nodes for local in range(node.ranks))

    # ---- what holds

    @invariant()
    def holds(self):
        found = self.state.decide(self.seated, self.now, self.planned)
        assert found == self.state.decide(self.seated, self.now, self.planned)
        assert set(found.lost) <= self.touched, "lost without a cause"
        self.given_up.update(found.lost)
        self.given_up.update(found.fence)
        offered = self.offered(found.nodes)
        assert None not in offered and not self.given_up & set(offered)
        assert all(member in self.processes or member in self.touched for member in offered)
        assert {node.name for node in found.nodes} <= self.present - set(self.draining)
        assert (found.wait is None) == (len(found.nodes) >= self.rules_.min_nodes)
        assert self.rules_.max_nodes is None or len(found.nodes) <= self.rules_.max_nodes
        assert set(found.leaving) <= {member for member in self.seated if member.node in self.draining} - set(found.lost)
        assert set(found.lost) | set(found.leaving) <= set(found.reasons)
        assert all(found.reasons[member] for member in (*found.lost, *found.leaving))
        assert all(name in found.reasons for name in self.present - {node.name for node in found.nodes})

    def teardown(self):
        """Whatever is present and quiet for long enough is used in the end."""
        if not hasattr(self, "state"):
            return
        for name in list(self.draining):
            self.is_not_drained(name)
        self.all_thaw()
        for _ in range(3):
            self.now += 5.0 * 2 ** DOUBLINGS
            self.state = self.state.listened(self.heard(), self.now)
            self.beat(0.2)
            for member in self.state.decide((), self.now).start:
                self.start(member)
            self.some_are_ready(100)
        used = {node.name: node.ranks for node in self.state.decide((), self.now).nodes}
        assert all(NODES[name] == ranks for name, ranks in used.items())
        assert len(used) == min(len(self.present), self.rules_.max_nodes or len(NODES))
        assert self.state.decide((), self.now).start == ()


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
