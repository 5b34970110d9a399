"""Each correction of the protocol, undone: a mutant of the machine or of the ranks. The explorer has to find every one of them
soon.

An explorer that finds nothing proves something only if it would have found these.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

from orchestrator.protocol import base, changing, phases, recovering, stepping, suspicion
from orchestrator.protocol.events import Ending, FailKind, Recalled
from orchestrator.protocol.members import Member
from orchestrator.protocol.run import Run
from tests.simulation.explore import Explored, explore, seeds, tried
from tests.simulation.rank_model import RankModel
from tests.simulation.settings import Fault, Scenario

Change = tuple[Any, str, Any]


@dataclass(frozen=True, slots=True)
class Defect:
    """rank, machine: what is run instead. changes: of what belongs to the machine: where, which name, what instead. scenarios: in which
    it is looked for; by default any."""

    rank: type[RankModel] = RankModel
    machine: type[Run] = Run
    changes: tuple[Change, ...] = ()
    scenarios: Callable[[int], Iterator[Scenario]] = seeds

    @contextlib.contextmanager
    def there(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for where, name, instead in self.changes:
                stack.enter_context(mock.patch.object(where, name, instead))
            yield


# --- ranks ---------------------------------------------------------------------------------------------------------------


class CountsFromForm(RankModel):
    """State counts as that of step 0 before it is initialised."""

    counts_from_form = True


class KeepsNewerGenerations(RankModel):
    """It finishes in whatever generation is its newest."""

    keeps_newer_generations = True


class IgnoresEpochs(RankModel):
    """It does what a coordinator of before wants."""

    ignores_epochs = True


class ForgetsAborts(RankModel):
    """An abort ends what has begun, and nothing that begins later."""

    forgets_aborts = True


class HidesThatItForms(RankModel):
    """It does not say that it is at making process groups, which no abort ends."""

    def recalled(self) -> Recalled:
        return replace(super().recalled(), forming=False)


# --- the machine -----------------------------------------------------------------------------------------------------------


def _no_time_to_answer(phase: recovering.LettingGo, the_run: Run) -> None:
    """As long as the last one took to let go, so long did the others not have to say what they hold."""
    if not phase._waiting:
        the_run.enter(recovering.Recalling(the_run.release_at))



class BlamesByIndex(Run):
    """Whoever is next to the one that is to go, in the layout."""

    def lose(self, member: Member, reason: str, *, fence: bool = False, cool: bool = False) -> None:
        if cool and member in self.seated and len(self.seated) > 1:
            member = self.seated[(self.seated.index(member) + 1) % len(self.seated)]
        super().lose(member, reason, fence=fence, cool=cool)


class HurriesToAdopt(Run):
    """It waits for those it takes over for less than they may be silent."""

    def __init__(self, rules: Any, deadlines: Any, planner: Any):
        super().__init__(rules, replace(deadlines, adopt=2.0), planner)
        self.still_starts = lambda member: self.lose(member, "did not say hello", fence=True)  # as if it never would


class HurriesToRelease(Run):
    """It waits for ranks to let go for less than they may be silent."""

    def __init__(self, rules: Any, deadlines: Any, planner: Any):
        super().__init__(rules, replace(deadlines, release=2.0), planner)


def _no_older_checkpoint(the_run: Run, faults: Mapping[Member, Any]) -> bool:
    if any(fault.kind is FailKind.UNREADABLE for fault in faults.values()):
        the_run.end(Ending.NO_STATE, "a checkpoint cannot be read")
    return False


def _all_memory_and_the_newest_checkpoint(first: int) -> Iterator[Scenario]:
    """Of random runs too few lose both at once."""
    for seed in itertools.count(first):
        at = 120 + 20 * (seed % 8)
        yield Scenario(seed=seed, nodes=(1, 1), steps=8, save_every=2, faults=(
            Fault(at, "damage"), Fault(at + 2, "end node"), Fault(at + 2, "end node", 1)))


def _a_link_is_cut_and_the_coordinator_dies(first: int) -> Iterator[Scenario]:
    """Of random runs too few are at making groups then."""
    for seed in itertools.count(first):
        at = 1 + 5 * (seed % 24)
        yield Scenario(seed=seed, steps=2, faults=(Fault(1, "cut", seed), Fault(at, "coordinator")))


def _own_fault_ends(faults: Mapping[Member, Any], *rest: Any) -> Any:
    """Newcomers have no trial."""
    own = [fault.text for fault in faults.values() if fault.kind in (FailKind.OWN, FailKind.NO_MEMORY)]
    return suspicion.Hopeless(own[0]) if own else None


def _never_busy(self: recovering.Recalling, the_run: Run, event: Any) -> None:
    """A compute lane that is not free is as good as one that is."""
    phases.Phase.answered(self, the_run, event)


def _recall_interrupted(self: recovering.Recalling, the_run: Run, dead: Sequence[Member]) -> None:
    the_run.end(Ending.NO_STATE, "who was asked what it holds has gone")


def _cut_without_a_line(the_run: Run, step: int, reason: str, then: Callable[[Run], None]) -> None:
    """The ledger learns of it later, if at all."""
    the_run.committed, the_run.pending = step, None
    the_run.batches.clear()
    the_run.batch_again()
    then(the_run)


def _from_memory(recalled: Mapping[Member, Any], committed: int, checkpoints: Any, planner: Any) -> Any:
    """The newest generation that anybody knows, whatever of it is there."""
    generations = base._generations(recalled)
    if not generations:
        return _choose(recalled, committed, checkpoints, planner)
    newest, _ = generations[max(generations)]
    return base.Carry(newest, frozenset(member for member in newest.members if member is not None), committed)


_choose = base.choose


def _line_forgotten(self: stepping.Committing, the_run: Run, dead: Sequence[Member]) -> None:
    """Whether the line is there is not waited for."""
    the_run.trouble(dead[0], "its process or node was lost")


def _not_moved(self: changing.Finishing, the_run: Run) -> None:
    """With fewer nodes than are wanted, state stays where it was."""
    if the_run.decision.wait:
        the_run.wait_for_nodes(formed=False)
    else:
        _finished(self, the_run)


_finished = changing.Finishing.done


def _always(value: Any) -> Callable[..., Any]:
    return lambda *arguments: value


DEFECTS: dict[str, Defect] = {
    "state counts from form on": Defect(rank=CountsFromForm),
    "finish without base": Defect(rank=KeepsNewerGenerations),
    "no epochs": Defect(rank=IgnoresEpochs),
    "abort without watermark": Defect(rank=ForgetsAborts),
    "whoever makes groups over a cut link hangs": Defect(rank=HidesThatItForms,
                                                            scenarios=_a_link_is_cut_and_the_coordinator_dies),
    "one that does not let go costs the others": Defect(changes=((recovering.LettingGo, "_go_on", _no_time_to_answer),)),
    "blame by index": Defect(machine=BlamesByIndex),
    "adopt bound shorter than silence": Defect(machine=HurriesToAdopt),
    "release bound shorter than silence": Defect(machine=HurriesToRelease),
    "a damaged checkpoint ends the run": Defect(changes=((recovering, "_blame_storage", _no_older_checkpoint),),
                                                scenarios=_all_memory_and_the_newest_checkpoint),
    "a newcomer's own fault ends the run": Defect(changes=((suspicion, "by_fault", _own_fault_ends),)),
    "links are not probed": Defect(changes=((suspicion, "by_links", _always(None)),)),
    "a hung rank is not noticed": Defect(changes=((recovering.Recalling, "answered", _never_busy),)),
    "a recall that is interrupted ends the run": Defect(changes=((recovering.Recalling, "lost", _recall_interrupted),)),
    "a cut is not written": Defect(changes=((changing, "cut", _cut_without_a_line),)),
    "the base is the newest generation": Defect(changes=((recovering, "choose", _from_memory),)),
    "a line in doubt is forgotten": Defect(changes=((stepping.Committing, "lost", _line_forgotten),)),
    "state is not moved while nodes are waited for": Defect(changes=((changing.Finishing, "done", _not_moved),)),
}


def find(name: str, seconds: float, first: int = 0) -> Explored:
    """Try seeds until the defect shows: in a run in which nothing is wrong without it."""
    defect = DEFECTS[name]
    sound = (scenario for scenario in defect.scenarios(first) if tried(scenario)[0] is None)
    return explore(sound, seconds, defect.machine, defect.rank, defect.there, enough=lambda violation: True)


def main(seconds: float) -> int:
    missed = 0
    for name in DEFECTS:
        explored = find(name, seconds)
        found = next(iter(explored.found.values()), None)
        missed += found is None
        what = f"seed {found[0][0].seed}: {found[0][1]}" if found else "NOT FOUND"
        print(f"{name}: {explored.runs} runs, {explored.seconds:.1f} s of CPU: {what}")
    return 1 if missed else 0
