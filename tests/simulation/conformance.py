"""The same sequence of calls, aborts and deaths on model ranks and on real ones.

A sequence is a list of moves. What a move means depends on what the model ranks hold: calls of a coordinator that knows that, or (the
`wrong` ones) of one that does not. The model goes first; then the real ranks are brought to the same point. After each move the
answers, what everybody recalls, and which state is equal bit by bit must agree.
"""

from __future__ import annotations

import itertools
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from actors.protocol.planning import RealPlanner
from actors.protocol.tables import Tables
from orchestrator.config import RunConfig
from orchestrator.membership import Member
from orchestrator.placement import Placement
from orchestrator.protocol import commands as orders
from orchestrator.protocol.commands import Call, Request
from orchestrator.protocol.events import Answered, Base, CallId, FailKind, Formed, Plan, Recalled, Standing
from orchestrator.topology import Node
from tests.simulation.bench import Bench, Mortal
from tests.simulation.hosted import SECONDS, Key, Processes
from tests.simulation.real_ranks import RealRanks

PLACES = {"compute": "compute", "communication": "reduced", "reduce": "reduced", "update": "begin", "publish": "published",
          "gather": "published", "form": "begin", "carry": "moved", "finish": "begin", "snapshot": "begin"}
"""Places of tests/actors/faults.py, and what a model rank comes to there."""
_RUNS = itertools.count()


@dataclass(frozen=True, slots=True)
class Move:
    """kind: a method of Play. pick: chooses among what there is. trouble: what goes wrong. who: whom that befalls."""

    kind: str
    pick: int = 0
    trouble: str = ""
    who: int = 0

    def __str__(self) -> str:
        return f'Move("{self.kind}", {self.pick}, "{self.trouble}", {self.who})'


class Differ(AssertionError):
    """Model and ranks do."""


class Play:
    """One sequence. done: what it came to, in words, for whoever reads a failure."""

    def __init__(self, processes: Processes, config: RunConfig):
        self._config, self._tables = config, Tables()
        self._planner = RealPlanner(config, self._tables)
        self._processes, self._members = processes, processes.members
        self._model = Bench(len(self._members), self._tables)
        self._real = RealRanks(processes, config, self._tables, f"sequence {next(_RUNS)}")
        self._epoch = self._numbers = self._generation = 0
        self._plans: dict[int, Plan] = {}
        self._partly: set[Member] = set()  # they may have come back from a newer generation that the model's never had
        self._bits: dict[tuple[Key, int], tuple[float, ...]] = {}
        self.done: list[str] = []

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

    # --- what there is --------------------------------------------------------------------------------------------------------

    def _rank(self, member: Member) -> Mortal:
        return self._model.ranks[member]

    @property
    def _living(self) -> list[Member]:
        return [member for member in self._members if self._rank(member).alive]

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

    def _call(self, member: Member, request: Request, generation: int | None = None, epoch: int | None = None) -> Call:
        self._numbers += 1
        return Call(CallId(epoch or self._epoch, self._numbers), member, self._generation if generation is None else generation,
                    request)

    # --- moves: a coordinator that knows what it does --------------------------------------------------------------------------

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

    def _former(self, base: Base, applied: int, having: Sequence[Member], plan: Plan, *, claims: bool) -> orders.Former:
        """claims: of everybody who was a member of the base that it brings the state, too."""
        places = {member: rank for rank, member in enumerate(base.members) if member in having}
        if claims:
            places |= {member: self._rank(member).held[base.generation].rank for member in plan.members
                       if base.generation in self._rank(member).held}
        came_from = tuple(places.get(member) for member in (*plan.members, *plan.leaving))
        ready = all(self._rank(member).published and self._rank(member).newest == base.generation for member in having)
        return orders.Former(base, applied, came_from, publish=not ready)

    def _plan_of(self, pick: int, base: Base | None) -> Plan:
        living = self._living
        chosen = [member for index, member in enumerate(living) if pick >> index & 1] or living
        return self._planner.plan(tuple(Node(member.node, 1) for member in chosen), base, chosen)

    def _form(self, plan: Plan, former: orders.Former | None, move: Move) -> None:
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
        if not seated or any(rank.state.applied is None or rank.reduced == rank.state.applied or not rank.published for rank in ranks):
            return
        before = self._plans[self._generation]
        placement = self._other_placement(before, move.pick)
        self._generation += 1
        self._plans[self._generation] = replace(before, placement=placement, leaving=())
        self._round([self._call(member, orders.Rearrange(placement)) for member in seated], move, (), back=self._generation - 1)

    def _other_placement(self, plan: Plan, pick: int) -> int:
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

    _folder = "/nowhere"

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
        self._round([self._call(member, orders.Finish(base, apply)) for member in chosen], replace(move, trouble=move.trouble and "doom"),
                    ("finish",))

    # --- moves: one that does not ----------------------------------------------------------------------------------------------

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

    # --- moves: aborts, deaths, coordinators --------------------------------------------------------------------------------------

    def abort(self, move: Move) -> None:
        """Nothing is under way. What comes later for these generations is refused."""
        self._abort(max(1, self._generation + (move.pick % 3) - 1))

    def kill(self, move: Move) -> None:
        self._kill(self._living[move.who % len(self._living)])

    def take_over(self, move: Move) -> None:
        self._take_over()

    def _take_over(self) -> None:
        self._epoch += 1
        for member in self._living:
            self._rank(member).attach(self._epoch)
        self._model.settle()
        self._real.coordinate(self._epoch, self._living)

    def _abort(self, generation: int) -> None:
        living = self._living
        for member in living:
            self._rank(member).abort(generation)
        self._model.settle()
        if living:
            self._real.abort(living, generation)

    def _kill(self, member: Member) -> None:
        self._model.kill(self._rank(member))
        self._model.settle()
        self._real.kill(member)

    # --- a round of calls ---------------------------------------------------------------------------------------------------------

    def _round(self, calls: list[Call], move: Move, places: Sequence[str], back: int | None = -1,
               partly: bool = False) -> None:
        """Calls of all, with what goes wrong meanwhile. back: the generation to go back to where that comes to nothing."""
        if not calls:
            return
        absent, victim = [], None
        if move.trouble.startswith("absent") and len(calls) > 1:
            absent = [calls.pop(move.who % len(calls))]
        elif move.trouble == "before":
            self._abort(calls[0].generation)
        elif move.trouble == "doom" and places:
            place = places[move.pick % len(places)]
            victim = self._doom(calls[move.who % len(calls)], place)
            partly = partly or place == "carry"
        self._model.send(calls)
        self._model.settle()
        self._real.send(calls, {})
        if victim is not None:
            self._real.died(victim)
        self._meet(calls)
        open_ = [call for call in calls if call.call not in self._model.answers]
        if absent:  # elsewhere a real rank may be out of it by now: others have closed their connections
            self._compare_recalled([call.member for call in open_], 0.0)
        if absent and move.trouble == "absent, who dies":
            self._kill(absent[0].member)
            self._meet(calls)
        elif absent and move.trouble == "absent, then another coordinator":
            self._take_over()
        failed = [call for call in calls if not isinstance(self._model.answers.get(call.call), Answered)]
        if victim is not None or any(self._rank(call.member).site for call in failed):
            self._abort(self._generation)
        self._real.wait_for(calls)
        self._compare_answers(calls, partly)
        if failed and back != -1 and victim is not None and self._living:
            self._round([self._call(member, orders.Finish(back or 0, None)) for member in self._living], replace(move, trouble=""), (),
                        partly=partly)

    def _doom(self, call: Call, place: str) -> Member | None:
        """Have somebody die there."""
        if self._rank(call.member).group is None:  # it has been in no generation yet: faults.doom finds nothing to harm
            return None
        self.done.append(f"    {call.member} is to die at {place}")
        site = PLACES[place]
        self._rank(call.member).doom = site
        self._real.doom(call.member, place, signal.SIGKILL)
        return call.member

    def _meet(self, calls: Sequence[Call]) -> None:
        """Until the real ranks are where the model's are."""
        answers, ended, going = self._model.answers, [], {}
        for call in calls:
            found = answers.get(call.call)
            stays = found is None or not isinstance(found, Answered) and found.kind is FailKind.ABORTED and self._rank(call.member).site
            if stays and self._rank(call.member).alive:
                going[call.call] = call.member
            else:
                ended.append(call)
        self._real.wait_for(ended)
        if going:
            self._real.come_to(going, {call: self._rank(member).site for call, member in going.items()})

    # --- what must agree ----------------------------------------------------------------------------------------------------------

    def _compare_answers(self, calls: Sequence[Call], partly: bool) -> None:
        """partly: some moved state without the one that died, and have been further than the model's, for whom all come together."""
        for call in calls:
            model, real = (side.answers[call.call] for side in (self._model, self._real))
            kinds = [type(answer.value) if isinstance(answer, Answered) else answer.kind for answer in (model, real)]
            if isinstance(call.request, orders.Finish | orders.Recall) and isinstance(model, Answered) and isinstance(real, Answered):
                kinds = [_told(answer.value) for answer in (model, real)]
            if not (partly and (_further(*kinds) or kinds == [FailKind.ABORTED, Formed])):
                self._equal(f"{call.member} answers {type(call.request).__name__}", *kinds, f"{model}\n{real}")
            if partly:
                self._partly.add(call.member)
            self.done.append(f"    {call.member} {_short(call.request)} in {call.generation}: {kinds[0]}")

    def _compare_recalled(self, members: Sequence[Member], seconds: float) -> None:
        calls = [self._call(member, orders.Recall(seconds)) for member in members]
        self._model.send(calls)
        self._model.settle_for(seconds)
        self._real.send(calls, {})
        self._real.wait_for(calls)
        for call in calls:
            model, real = (side.answers[call.call].value for side in (self._model, self._real))
            if call.member in self._partly and replace(model, reduced=None, published=False) == real:
                rank = self._rank(call.member)
                rank.reduced, rank.published, model = None, False, real
            self._equal(f"{call.member} recalls", _told(model), _told(real), f"{model}\n{real}")

    def _compare_all(self) -> None:
        living = self._living
        if not living:
            return
        self._compare_recalled(living, SECONDS)
        self._partly.clear()
        for member, (owned, working) in zip(living, self._real.contents(living)):
            rank = self._rank(member)
            for generation, state in rank.held.items():
                if state.applied is not None:
                    self._compare_state(member, owned[generation], state.content)
            if rank.published and rank.state.applied is not None:
                self._compare_working(member, working, max(rank.state.content.values()))

    def _compare_state(self, member: Member, real: Mapping[Key, tuple[float, ...]], model: Mapping[Key, int]) -> None:
        """What has the same history is the same, bit by bit, wherever and whenever it is seen."""
        self._equal(f"{member} owns", set(model), set(real), "")
        for key, history in model.items():
            known = self._bits.setdefault((key, history), real[key])
            if known != real[key]:
                raise Differ(f"{member} has {real[key]} for {key}, others {known}\n{self}")

    def _compare_working(self, member: Member, working: Mapping[Key, float], history: int) -> None:
        for key, value in working.items():
            known = self._bits.get((key, history))
            if known is not None and known[0] != value:
                raise Differ(f"{member} computes with {value} for {key}, and the state is {known[0]}\n{self}")

    def _equal(self, what: str, model: object, real: object, text: str) -> None:
        if model != real:
            raise Differ(f"{what}: the model {model}, the rank {real}\n{text}\n{self}")

    def __str__(self) -> str:
        return "\n".join(self.done)


def _short(request: Request) -> str:
    if not isinstance(request, orders.Form):
        return str(request)
    found = "Form of " + " ".join(str(member) for member in (*request.plan.members, *request.plan.leaving))
    former = request.former
    return found if former is None else f"{found} from {former.came_from} of {former.base.generation} as of {former.applied}"


def _further(model: object, real: object) -> bool:
    """Whether the real one has been in a newer generation, and has come back from it without what that cost."""
    return isinstance(model, Standing) and isinstance(real, Standing) and replace(model, published=False) == real


def _told(answer: object) -> object:
    """An answer without the words of an error."""
    if isinstance(answer, Recalled):
        return replace(answer, fault=answer.fault and answer.fault.kind)
    return answer
