"""Model ranks and real ones side by side: the same calls for both, and what must agree afterwards.

The model goes first; then the real ranks are brought to the same point.
"""

from __future__ import annotations

import itertools
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from actors.protocol.tables import Tables
from orchestrator.config.run_config import RunConfig
from orchestrator.protocol import commands as orders
from orchestrator.protocol.commands import Call, Request
from orchestrator.protocol.events import Answered, CallId, FailKind, Formed, Recalled, Standing
from orchestrator.protocol.members import Member
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


class Sides:
    """Of one sequence. done: what it came to, in words, for whoever reads a failure."""

    def __init__(self, processes: Processes, config: RunConfig):
        self._tables = Tables()
        self._processes, self._members = processes, processes.members
        self._model = Bench(len(self._members), self._tables)
        self._real = RealRanks(processes, config, self._tables, f"sequence {next(_RUNS)}")
        self._epoch = self._numbers = self._generation = 0
        self._partly: set[Member] = set()  # they may have come back from a newer generation that the model's never had
        self._bits: dict[tuple[Key, int], tuple[float, ...]] = {}
        self.done: list[str] = []

    def _rank(self, member: Member) -> Mortal:
        return self._model.ranks[member]

    @property
    def _living(self) -> list[Member]:
        return [member for member in self._members if self._rank(member).alive]

    def _call(self, member: Member, request: Request, generation: int | None = None, epoch: int | None = None) -> Call:
        self._numbers += 1
        return Call(CallId(epoch or self._epoch, self._numbers), member, self._generation if generation is None else generation,
                    request)

    # --- aborts, deaths, coordinators ---------------------------------------------------------------------------------------

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

    # --- a round of calls ---------------------------------------------------------------------------------------------------

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
            calls = [self._call(member, orders.Finish(back or 0, None)) for member in self._living]
            self._round(calls, replace(move, trouble=""), (), partly=partly)

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
            rank = self._rank(call.member)
            stays = found is None or not isinstance(found, Answered) and found.kind is FailKind.ABORTED and rank.site
            if stays and rank.alive:
                going[call.call] = call.member
            else:
                ended.append(call)
        self._real.wait_for(ended)
        if going:
            self._real.come_to(going, {call: self._rank(member).site for call, member in going.items()})

    # --- what must agree ----------------------------------------------------------------------------------------------------

    def _compare_answers(self, calls: Sequence[Call], partly: bool) -> None:
        """partly: some moved state without the one that died, and have been further than the model's, which all come together."""
        for call in calls:
            model, real = (side.answers[call.call] for side in (self._model, self._real))
            kinds = [type(answer.value) if isinstance(answer, Answered) else answer.kind for answer in (model, real)]
            done = isinstance(model, Answered) and isinstance(real, Answered)
            if done and isinstance(call.request, orders.Finish | orders.Recall):
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
