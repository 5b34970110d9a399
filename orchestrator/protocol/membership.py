"""Which rank processes there are and may be used: what was seen, in; what follows, out. A state machine.

Contract: pure. A `Membership` is a value, each event returns the next one, and time is an argument: seconds of any one clock
that does not go back. `decide` only looks: what it says is carried out elsewhere and comes back as events (`started`, `ended`,
`ready`), so asking twice is harmless.

What counts as lost, and what comes after:
- A process that has ended (or is to blame for an error) is lost alone. The next incarnation is started at once; from its second
  loss on the place is on a cool-down first.
- A process that is silent alone is lost like one that has ended: whoever starts the next incarnation ends what is left of it.
- A node is lost with all its processes: it left the cluster, its processes all ended, all fell silent (cut off or frozen: from
  outside they look the same), or it still drains at its deadline. It is on a cool-down, counted from the loss, which doubles with
  each further one. A loss counts once, whatever is seen of it. Losses that were followed by more quiet than the longest
  cool-down are forgotten.
- An incarnation that was lost is never trusted again. If its process is heard from after that, it is to be told to let go
  (`Decision.fence`); it may then be `ready` as the next incarnation, without being started anew. Where it is not by the end
  of the cool-down, a new process is started in its place.
- A node with several processes of which one is lost offers the ranks below it: layouts count a node's ranks from 0. That loses
  the upper ones for the seconds that a restart takes, but keeps the node, and with it a second home for all state.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from orchestrator.protocol.members import (
    ENDS_TOGETHER_SECONDS,
    STARTS_IN_VAIN,
    Decision,
    Member,
    MembershipRules,
    NodeRecord,
    PlaceRecord,
)
from orchestrator.topology import Node


@dataclass(frozen=True)
class Membership:
    """Everything seen so far, as far as it matters. An event about something unknown, or about an incarnation that was lost
    before, changes nothing."""

    rules: MembershipRules
    hosts: Mapping[str, NodeRecord] = field(default_factory=dict)
    places: Mapping[str, Mapping[int, PlaceRecord]] = field(default_factory=dict)
    heard: Mapping[Member, float] = field(default_factory=dict)
    listened_at: float | None = None
    awake_since: float = float("-inf")

    # ---- what the cluster says

    def node_joined(self, node: Node, now: float) -> Membership:
        """It appears in the cluster, or comes back. May be repeated; a node that fell silent is not back because of it."""
        state = self._at(now)
        host = state.hosts.get(node.name, NodeRecord())
        if not host.present:
            host = replace(host, present=True, since=now, draining=False, deadline=None, expired=False, down=False)
        beyond = [local for local in range(node.ranks, host.ranks) if state._place(node.name, local).running is not None]
        for local in beyond:
            state = state._place_set(node.name, local, state._place(node.name, local).retired(
                now, f"{node.name} offers {node.ranks} ranks now"))
        return state._host_set(node.name, replace(host, ranks=node.ranks))

    def node_left(self, name: str, now: float, reason: str) -> Membership:
        """The cluster says that it is gone."""
        state = self._at(now)
        host = state.hosts.get(name)
        if host is None or not host.present:
            return state
        state = state._lose_node(name, now, reason)
        return state._host_set(name, replace(state.hosts[name], present=False, draining=False, deadline=None, reason=reason))

    def node_draining(self, name: str, deadline: float | None, now: float) -> Membership:
        """It is to go, at `deadline` if that is known. May be repeated, with another deadline too."""
        state = self._at(now)
        host = state.hosts.get(name)
        if host is None or not host.present:
            return state
        return state._host_set(name, replace(host, draining=True, deadline=deadline))._at(now)

    def node_undrained(self, name: str, now: float) -> Membership:
        """It stays after all. Those whose deadline had passed were lost, and start anew."""
        state = self._at(now)
        host = state.hosts.get(name)
        return state if host is None else state._host_set(name, replace(host, draining=False, deadline=None, expired=False))

    # ---- what processes do

    def started(self, member: Member, now: float) -> Membership:
        """Its process is being started."""
        return self._runs(member, now, warm=False)

    def ready(self, member: Member, now: float) -> Membership:
        """It has said hello and is warm: just started, let go and back as the next incarnation, or running since before."""
        return self._runs(member, now, warm=True)

    def ended(self, member: Member, now: float, reason: str) -> Membership:
        """Its process has ended or could not be started, or it raised what is its own fault."""
        state = self._at(now)
        if member.incarnation < state._place(member.node, member.local).trusted:
            return state
        state = state._lose_alone(member, now, reason)
        ranks = state.hosts[member.node].ranks if member.node in state.hosts else 0
        places = [state._place(member.node, local) for local in range(ranks)]
        together = all(not place.warm and now - place.lost <= self.rules.silence_seconds for place in places)
        return state._lose_node(member.node, now, f"all its processes ended: {reason}") if ranks > 1 and together else state

    def suspected(self, member: Member, now: float, reason: str) -> Membership:
        """It lives, but is not to take part: it hangs, cannot be reached, failed on trial. Lost alone, with a cool-down from the
        first time on."""
        state = self._at(now)
        place = state._place(member.node, member.local)
        if member.incarnation < place.trusted:
            return state
        losses = state.rules.counted(place.losses, place.until, now)
        gone = replace(place, running=member.incarnation).retired(now, reason)
        return state._place_set(member.node, member.local, replace(
            gone, alone=True, losses=losses, until=now + state.rules.cool_down(losses)))

    def listened(self, heard: Mapping[Member, float], now: float) -> Membership:
        """When the last beat of each came, as the listener has it. To be called at least twice in `silence_seconds`.

        Where the listener itself was away (frozen, starved), beats could not come in: silence counts from its return.
        A member is silent beyond `silence_seconds`; all of a node are if, besides, none was heard from for half of that, for
        their beats do not come at the same time.
        """
        state = self._at(now)
        limit = self.rules.silence_seconds
        away = state.listened_at is None or now - state.listened_at > limit / 2
        awake = now if away else state.awake_since
        kept, silent = dict(heard), {}
        for member, place in state._warm():
            if member not in kept and member in state.heard:
                kept[member] = state.heard[member]
            silence = now - max(kept.get(member, place.since), place.since, awake)
            silent.setdefault(member.node, []).append((silence, member))
        state = replace(state, heard=kept, listened_at=now, awake_since=awake)
        for node, members in silent.items():
            if max(members)[0] <= limit:
                continue
            if min(members)[0] > limit / 2:
                state = state._lose_node(node, now, f"cut off or frozen: not heard from for {max(members)[0]:.2f} s")
                continue
            for silence, member in members:
                if silence > limit:
                    state = state._lose_alone(member, now, f"not heard from for {silence:.2f} s, while others of its node were")
        return state

    # ---- what follows

    def decide(self, seated: Collection[Member], now: float, planned: Iterable[Node] = (), barred: Collection[str] = ()) -> Decision:
        """`seated`: the members of the present layout. `planned`: the nodes it was made for, so that those that it leaves idle
        are not `joining`; none: the seated. `barred`: nodes on which nothing is started any more."""
        state = self._at(now)
        lost = tuple(sorted(member for member in seated if not state.trusts(member)))
        gone = set(lost)
        alive = [member for member in seated if member not in gone]
        leaving = tuple(sorted(member for member in alive if state.hosts[member.node].draining))
        with_seats = {member.node for member in alive}
        ranks = {name: state._ready_ranks(name) for name, host in state.hosts.items() if host.open(now)}
        most = self.rules.max_nodes if self.rules.max_nodes is not None else len(ranks)
        by_age = sorted(ranks, key=lambda name: state.hosts[name].since)
        usable = sorted((name for name in by_age if ranks[name]), key=lambda name: name not in with_seats)[:most]
        startable = [name for name in by_age if ranks[name] or name not in barred and state._may_start(name, now)]
        wanted = sorted(startable, key=lambda name: (name not in with_seats, not ranks[name]))[:most]
        chosen = set(usable)
        reasons: dict[Member | str, str] = {member: state._place(member.node, member.local).reason for member in lost}
        reasons |= {member: f"{member.node} drains" for member in leaving}
        reasons |= {name: state._why_unused(name, now) for name in state.hosts if name not in chosen}
        nodes = tuple(Node(name, ranks[name]) for name in by_age if name in chosen)
        staying = tuple(Node(name, state._ready_ranks(name)) for name, host in state.hosts.items()
                        if host.present and host.draining and not host.expired and state._ready_ranks(name))
        return Decision(lost, leaving, nodes, staying, _more(nodes, planned, alive), state._to_start(wanted, now), state._fenced(now),
                        state._waits(nodes, reasons), reasons)

    def trusts(self, member: Member) -> bool:
        """Whether it is ready and was never lost."""
        place = self._place(member.node, member.local)
        return place.warm and place.running == member.incarnation

    def trusted_from(self, node: str, local: int) -> int:
        """The least incarnation at a place that has not been lost."""
        return self._place(node, local).trusted

    def may_come(self, member: Member) -> bool:
        """Whether it is expected: it has been started, and was not lost since."""
        return self._place(member.node, member.local).running == member.incarnation

    def may_not_be_alone(self, member: Member) -> float | None:
        """Until when the loss before it may turn out to be one of its whole node, where nothing should be started; None: it is not."""
        place = self._place(member.node, member.local)
        ranks = self.hosts[member.node].ranks if member.node in self.hosts else 0
        return place.lost + ENDS_TOGETHER_SECONDS if place.alone and ranks > 1 else None

    def why_lost(self, member: Member) -> str:
        """Of the last loss at its place."""
        return self._place(member.node, member.local).reason

    def present(self, node: str) -> bool:
        """Whether it is in the cluster."""
        return node in self.hosts and self.hosts[node].present

    def promising(self, barred: Collection[str] = ()) -> tuple[str, ...]:
        """Nodes of the cluster that have a ready rank or may soon: none where nothing is started any more (`barred`), nor where start
        after start came to nothing, for the cluster may list for long what is gone."""
        return tuple(name for name, host in self.hosts.items() if host.present and (
            self._ready_ranks(name) or name not in barred and self._place(name, 0).in_vain < STARTS_IN_VAIN))

    def drains(self, node: str) -> bool:
        return node in self.hosts and self.hosts[node].draining

    def cooling(self, now: float) -> list[tuple[str, float]]:
        """Nodes that are there, but left alone after a loss: with the end of that."""
        return [(name, host.until) for name, host in self.hosts.items() if host.present and not host.draining and now < host.until]

    def next_change(self, now: float) -> float | None:
        """When `decide` may say something else though nothing happens: a cool-down or a drain ends."""
        found = []
        for name, host in self.hosts.items():
            if not host.present:
                continue
            found += [at for at in (host.until, host.deadline if not host.expired else None) if at is not None and at > now]
            found += [place.until for place in self.places.get(name, {}).values() if place.running is None and place.until > now]
        return min(found, default=None)

    def ready_members(self) -> tuple[Member, ...]:
        """All that are ready, on whatever node."""
        return tuple(sorted(member for member, _ in self._warm()))

    def _ready_ranks(self, name: str) -> int:
        ranks = self.hosts[name].ranks
        return next((local for local in range(ranks) if not self._place(name, local).warm), ranks)

    def _may_start(self, name: str, now: float) -> bool:
        """Whether something starts there, or may be started: else another node is better asked."""
        places = [self._place(name, local) for local in range(self.hosts[name].ranks)]
        return any(place.running is not None or now >= place.until for place in places)

    def _to_start(self, names: Iterable[str], now: float) -> tuple[Member, ...]:
        found = []
        for name in names:
            for local in range(self.hosts[name].ranks):
                place = self._place(name, local)
                if place.running is None and now >= place.until:
                    found.append(Member(name, local, place.trusted))
        return tuple(sorted(found))

    def _fenced(self, now: float) -> tuple[Member, ...]:
        found = []
        for member, beat in self.heard.items():
            place = self._place(member.node, member.local)
            if member.incarnation < place.trusted and beat > place.lost and now - beat <= self.rules.silence_seconds:
                found.append(member)
        return tuple(sorted(found))

    def _waits(self, nodes: tuple[Node, ...], reasons: Mapping[Member | str, str]) -> str | None:
        if len(nodes) >= self.rules.min_nodes:
            return None
        others = [f"{name}: {why}" for name, why in reasons.items() if isinstance(name, str)]
        return "; ".join([f"{len(nodes)} of at least {self.rules.min_nodes} nodes can be used", *others])

    def _why_unused(self, name: str, now: float) -> str:
        host = self.hosts[name]
        if not host.present:
            return f"not in the cluster ({host.reason})" if host.reason else "not in the cluster"
        if host.draining:
            return "drains, and its deadline has passed" if host.expired else "drains"
        if now < host.until:
            times = f" {host.losses} times in a row" if host.losses > 1 else ""
            return f"on a cool-down of {self.rules.cool_down(host.losses):g} s: lost{times} ({host.reason})"
        ready = self._ready_ranks(name)
        if ready or not host.ranks:
            return f"elastic.max_nodes = {self.rules.max_nodes}" if ready else "offers no ranks"
        first = self._place(name, 0)
        if now < first.until:
            return f"its rank 0 is on a cool-down after {first.losses} losses ({first.reason})"
        return "its rank 0 is not ready yet"

    # ---- how events change it

    def _at(self, now: float) -> Membership:
        """With the deadlines that have passed."""
        state = self
        for name, host in self.hosts.items():
            if host.deadline is not None and host.deadline <= now and not host.expired:
                state = state._lose_node(name, host.deadline, "it still drained at its deadline")
                state = state._host_set(name, replace(state.hosts[name], expired=True))
        return state

    def _runs(self, member: Member, now: float, *, warm: bool) -> Membership:
        state = self._at(now)
        place = state._place(member.node, member.local)
        if member.incarnation < place.trusted:
            return state
        if place.running is not None and place.running < member.incarnation:
            state = state._lose_alone(replace(member, incarnation=place.running), now, f"{member} took its place")
            place = state._place(member.node, member.local)
        host = state.hosts.get(member.node, NodeRecord())
        if warm and not place.warm:
            place, host = replace(place, warm=True, since=now), replace(host, down=host.down and not host.present)
        place = replace(place, trusted=member.incarnation, running=member.incarnation)
        return state._host_set(member.node, host)._place_set(member.node, member.local, place)

    def _lose_alone(self, member: Member, now: float, reason: str) -> Membership:
        """At first without a cool-down."""
        place = self._place(member.node, member.local)
        losses = self.rules.counted(place.losses, place.until, now)
        gone = replace(place, running=member.incarnation).retired(now, reason)
        return self._place_set(member.node, member.local, replace(
            gone, alone=True, losses=losses, until=now + self.rules.cool_down(losses - 1)))

    def _lose_node(self, name: str, now: float, reason: str) -> Membership:
        """With all that runs on it. Processes that ended just before were the first sign of it, and no losses of their own."""
        places = dict(self.places.get(name, {}))
        for local, place in places.items():
            if place.alone and now - place.lost <= self.rules.silence_seconds:
                place = replace(place, alone=False, losses=place.losses - 1, until=now)
            places[local] = place if place.running is None else place.retired(now, reason)
        host = self.hosts.get(name, NodeRecord())
        if not host.down:
            losses = self.rules.counted(host.losses, host.until, now)
            host = replace(host, down=True, losses=losses, until=now + self.rules.cool_down(losses), reason=reason)
        return replace(self, places={**self.places, name: places})._host_set(name, host)

    def _place(self, name: str, local: int) -> PlaceRecord:
        return self.places.get(name, {}).get(local, _NOWHERE)

    def _warm(self) -> Iterator[tuple[Member, PlaceRecord]]:
        for name, places in self.places.items():
            for local, place in places.items():
                if place.warm:
                    yield Member(name, local, place.running), place

    def _place_set(self, name: str, local: int, place: PlaceRecord) -> Membership:
        return replace(self, places={**self.places, name: {**self.places.get(name, {}), local: place}})

    def _host_set(self, name: str, host: NodeRecord) -> Membership:
        return replace(self, hosts={**self.hosts, name: host})


_NOWHERE = PlaceRecord()


def _more(nodes: Iterable[Node], planned: Iterable[Node], seated: Iterable[Member]) -> bool:
    known = {node.name: node.ranks for node in planned}
    if not known:
        for member in seated:
            known[member.node] = known.get(member.node, 0) + 1
    return any(node.ranks > known.get(node.name, 0) for node in nodes)
