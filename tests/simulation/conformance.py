"""The same sequence of calls, aborts and deaths on model ranks and on real ones.

A sequence is a list of moves. What a move means depends on what the model ranks hold: calls of a coordinator that knows that, or
(the `wrong` ones) of one that does not. After each move the answers, what everybody recalls, and which state is equal bit by bit
must agree.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from actors.protocol.planning import RealPlanner
from orchestrator.config.run_config import RunConfig
from orchestrator.layout.placement import Placement
from orchestrator.protocol import commands as orders
from orchestrator.protocol.commands import Request
from orchestrator.protocol.events import Base, WorkerAssignment
from orchestrator.protocol.members import Member
from orchestrator.topology import Node
from tests.simulation.hosted import SECONDS, Processes
from tests.simulation.sides import Move, Sides


class Play(Sides):
    """One sequence."""

    def __init__(self, processes: Processes, config: RunConfig):
        super().__init__(processes, config)
        self._planner = RealPlanner(config, self._tables)
        self._plans: dict[int, WorkerAssignment] = {}
        self._folder = "/nowhere"

    def play(self, moves: Sequence[Move]) -> None:
        """Raises Differ."""
        try:
            self._take_over()
            for move in moves:
                if not self._living:
                    return
                self.done.append(str(move))
                getattr(self, move.kind)(move)
                self._compare_all()
        except BaseException:
            if self._real.waits:
                self._processes.spoil()
            raise
        finally:
            self._real.close()

    # --- what there is ------------------------------------------------------------------------------------------------------

    def _seated(self) -> list[Member]:
        """Members of the newest generation, where all of them live and take part in it; else nobody."""
        plan = self._plans.get(self._generation)
        if plan is None or not all(self._takes_part(member) for member in plan.members):
            return []
        return list(plan.members)

    def _takes_part(self, member: Member) -> bool:
        rank = self._rank(member)
        return (rank.alive and rank.newest == self._generation and rank.group is not None and not rank.broken
                and rank.group.number == self._generation and not rank.group.broken and rank.watermark < self._generation)

    def _base(self) -> tuple[Base, int, list[Member]] | None:
        """The newest generation of which those who live have all state, as of the most updates; and who has it."""
        for generation in sorted({held for member in self._living for held in self._rank(member).held}, reverse=True):
            states = {member: self._rank(member).held[generation] for member in self._living
                      if generation in self._rank(member).held}
            applied = max((state.applied for state in states.values() if state.applied is not None), default=None)
            if applied is None:
                continue
            having = {state.rank: member for member, state in states.items() if state.applied == applied}
            some = next(iter(states.values()))
            members = tuple(having.get(rank) for rank in range(self._tables.layout(some.layout).size))
            base = Base(generation, some.layout, some.placement, members)
            if self._planner.covered(base, having.values()) is None:
                return base, applied, list(having.values())
        return None

    # --- moves: a coordinator that knows what it does -----------------------------------------------------------------------

    def begin(self, move: Move) -> None:
        """A generation without state."""
        plan = self._plan_of(move.pick, None)
        self._form(plan, None, move)

    def form(self, move: Move) -> None:
        """A generation with the state of the newest base."""
        found = self._base()
        if found is None:
            return
        base, applied, having = found
        plan = self._plan_of(move.pick, base)
        leaving = self._planner.hands_over(base, plan, having)
        plan = replace(plan, leaving=leaving)
        former = self._former(base, applied, having, plan, claims=False)
        self._form(plan, former, move)

    def _former(self, base: Base, applied: int, having: Sequence[Member], plan: WorkerAssignment, *,
                claims: bool) -> orders.FormerRef:
        """claims: of everybody who was a member of the base that it brings the state, too."""
        places = {member: rank for rank, member in enumerate(base.members) if member in having}
        if claims:
            places |= {member: self._rank(member).held[base.generation].rank for member in plan.members
                       if base.generation in self._rank(member).held}
        came_from = tuple(places.get(member) for member in (*plan.members, *plan.leaving))
        ready = all(self._rank(member).published and self._rank(member).newest == base.generation for member in having)
        return orders.FormerRef(base, applied, came_from, publish=not ready)

    def _plan_of(self, pick: int, base: Base | None) -> WorkerAssignment:
        living = self._living
        chosen = [member for index, member in enumerate(living) if pick >> index & 1] or living
        return self._planner.plan(tuple(Node(member.node, 1) for member in chosen), base, chosen)

    def _form(self, plan: WorkerAssignment, former: orders.FormerRef | None, move: Move) -> None:
        self._generation += 1
        self._plans[self._generation] = plan
        everybody = (*plan.members, *(plan.leaving if former else ()))
        places = ("form", "carry") if former else ("form",)
        back = former.base.generation if former else None
        self._round([self._call(member, orders.Form(plan, former)) for member in everybody], move, places, back=back)

    def initialise(self, move: Move) -> None:
        self._together(orders.Initialise(), move, ("publish", "gather"))

    def step(self, move: Move) -> None:
        """The one that is due, with the update of the one before, if that is pending."""
        seated = self._seated()
        ranks = [self._rank(member) for member in seated]
        if not seated or len({(rank.state.applied, rank.reduced) for rank in ranks}) > 1 or ranks[0].state.applied is None:
            return
        applied, pending = ranks[0].state.applied, ranks[0].reduced == ranks[0].state.applied
        if not pending and not all(rank.published for rank in ranks):
            return
        request = orders.Step(applied + 1, applied) if pending else orders.Step(applied, None)
        places = ("compute", "reduce", *(("update", "publish", "gather") if pending else ("communication",) * (len(seated) > 1)))
        self._together(request, move, places)

    def apply(self, move: Move) -> None:
        """The update that is pending."""
        seated = self._seated()
        due = {self._rank(member).state.applied for member in seated} | {self._rank(member).reduced for member in seated}
        if len(due) == 1 and None not in due:
            self._together(orders.Apply(due.pop()), move, ("update", "publish", "gather"))

    def rearrange(self, move: Move) -> None:
        """Experts elsewhere. No update is pending."""
        seated = self._seated()
        ranks = [self._rank(member) for member in seated]
        if not seated or any(rank.state.applied in (None, rank.reduced) or not rank.published for rank in ranks):
            return
        before = self._plans[self._generation]
        placement = self._other_placement(before, move.pick)
        self._generation += 1
        self._plans[self._generation] = replace(before, placement=placement, leaving=())
        self._round([self._call(member, orders.Rearrange(placement)) for member in seated], move, (), back=self._generation - 1)

    def _other_placement(self, plan: WorkerAssignment, pick: int) -> int:
        """Each rank has the experts of the one that is so many places before it."""
        placed = []
        for entry in self._tables.placement(plan.placement).placed:
            by = 1 + pick % max(1, len(entry.experts) - 1)
            placed.append(replace(entry, experts=entry.experts[by:] + entry.experts[:by]))
        return self._tables.placement_ref(Placement(tuple(placed)))

    def snapshot(self, move: Move) -> None:
        """With what collects it, unless somebody died meanwhile."""
        seated, directory = self._seated(), f"{self._folder}/{self._numbers}"
        if not seated or self._rank(seated[0]).state.applied is None:
            return
        step = self._rank(seated[0]).state.applied
        self._together(orders.Snapshot(directory, step), move, ("snapshot",))
        if len(self._seated()) == len(seated):
            self._round([self._call(member, orders.Collect(directory, step)) for member in seated], replace(move, trouble=""), ())

    def write_into(self, folder: Path) -> None:
        """Where snapshots go."""
        self._folder = str(folder)

    def _together(self, request: Request, move: Move, places: Sequence[str]) -> None:
        self._round([self._call(member, request) for member in self._seated()], move, places)

    def finish(self, move: Move) -> None:
        """Some go back to a generation: the newest, one before, or one that nobody knows."""
        known = sorted({held for member in self._living for held in self._rank(member).held}, reverse=True)
        base = [*known, 0][move.pick // 2 % (len(known) + 1)]
        due = {state.applied for member in self._living if (state := self._rank(member).held.get(base)) is not None}
        apply = [None, *sorted(one for one in due if one is not None)][-1 if move.pick % 2 else 0]
        chosen = self._living if move.pick < 8 else self._living[: 1 + move.who % len(self._living)]
        calls = [self._call(member, orders.Finish(base, apply)) for member in chosen]
        self._round(calls, replace(move, trouble=move.trouble and "doom"), ("finish",))

    # --- moves: one that does not -------------------------------------------------------------------------------------------

    def wrong(self, move: Move) -> None:
        """Calls that are to be refused, or that come to nothing."""
        request = [orders.Apply(7), orders.Initialise(), orders.Snapshot(f"{self._folder}/never", 0),
                   orders.Finish(self._generation, None), orders.Recall(SECONDS)][move.pick % 5]
        kind = ("older epoch", "stale generation", "later generation", "another step")[move.who % 4]
        members = self._living
        if kind == "older epoch":
            calls = [self._call(member, request, epoch=self._epoch - 1) for member in members] if self._epoch > 1 else []
        elif kind == "another step":
            seated = self._seated()
            applied = self._rank(seated[0]).state.applied if seated else None
            if applied is None or not all(self._rank(member).published for member in seated):
                return
            asked = orders.Step(applied + 2, None) if move.pick % 2 else orders.Apply(applied + 1)
            calls = [self._call(member, asked) for member in seated]
        else:
            number = self._generation + 3 if kind == "later generation" else max(0, self._generation - 1)
            if number == 0 or isinstance(request, orders.Recall | orders.Finish):
                return
            calls = [self._call(member, request, generation=number) for member in members]
        self._round(calls, replace(move, trouble=""), ())

    def claim(self, move: Move) -> None:
        """A generation to which somebody is said to bring state that it has not."""
        found = self._base()
        if found is None:
            return
        base, applied, having = found
        plan = self._plan_of(15, base)
        if set(plan.members) - set(having):
            self._form(plan, self._former(base, applied, having, plan, claims=True), replace(move, trouble=""))

    def bare(self, move: Move) -> None:
        """State is carried over, and working weights are not rebuilt though some are not those of the state."""
        found = self._base()
        if found is not None:
            base, applied, having = found
            plan = self._plan_of(move.pick, base)
            plan = replace(plan, leaving=self._planner.hands_over(base, plan, having))
            former = replace(self._former(base, applied, having, plan, claims=False), publish=False)
            self._form(plan, former, replace(move, trouble=""))

    # --- moves: aborts, deaths, coordinators --------------------------------------------------------------------------------

    def abort(self, move: Move) -> None:
        """Nothing is under way. What comes later for these generations is refused."""
        self._abort(max(1, self._generation + (move.pick % 3) - 1))

    def kill(self, move: Move) -> None:
        self._kill(self._living[move.who % len(self._living)])

    def take_over(self, move: Move) -> None:
        self._take_over()
