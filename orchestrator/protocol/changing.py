"""From one generation to the next: with the state of the base, or with state that is loaded."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from orchestrator.protocol.commands import (
    CutLine,
    Finish,
    Form,
    FormedRef,
    FormerRef,
    Initialise,
    LoadedRef,
    OriginLine,
    PlannedRef,
    Probe,
    Restore,
)
from orchestrator.protocol.events import Base, Failed, Seen, WorkerAssignment
from orchestrator.protocol.members import Member
from orchestrator.protocol.phases import Phase, Recording
from orchestrator.told.kinds import Resumed, StartedOver

if TYPE_CHECKING:
    from orchestrator.protocol.run import Run


class Finishing(Phase):
    """Those who hold the base go back to it and complete the last committed step, each alone; then the layout is planned."""

    name = "finishing"

    def __init__(self, having: Collection[Member]):
        super().__init__()
        self._having = having

    def enter(self, run: Run) -> None:
        apply = run.committed - 1 if run.committed else None
        request = Finish(run.base.generation, apply)
        self.ask(run, sorted(member for member in self._having if run.trusts(member)), lambda member: request, run.bounds.finish)

    def involved(self, run: Run) -> Iterable[Member]:
        return dict.fromkeys([*self.calls.values(), *self.answers])

    def done(self, run: Run) -> None:
        good = {member for member, standing in self.answers.items()
                if (standing.generation, standing.applied) == (run.base.generation, run.committed)}
        if (missing := run.planner.covered(run.base, good)) is not None:
            return run.trouble(None, missing)
        plan = run.plan_now(run.base)
        if plan is None:
            return run.wait_for_nodes(formed=False)
        publish = not all(standing.published for standing in self.answers.values())
        return greet(run, plan, good, lambda run: run.enter(Moving(plan, good, publish)),
                     lambda run, member, reason: run.trouble(member, reason))


class Greeting(Phase):
    """Newcomers try whether they reach everybody, before anybody waits for them: over a link that is cut process groups are made until
    time ends that. Whom they do not reach is asked, too, for it may have been asleep."""

    name = "greeting"

    def __init__(self, newcomers: Collection[Member], everybody: Collection[Member], then: Callable[[Run], None],
                 otherwise: Callable[[Run, Member, str], None], may_go: Collection[Member]):
        super().__init__()
        self._newcomers, self._everybody, self._then, self._otherwise = newcomers, everybody, then, otherwise
        self._may_go, self._second = may_go, False

    def enter(self, run: Run) -> None:
        run.taking_part = set(self._everybody)
        run.trials.begin(self._newcomers)
        self._probe(run, {member: [peer for peer in self._everybody if peer != member] for member in self._newcomers})

    def involved(self, run: Run) -> Iterable[Member]:
        return dict.fromkeys([*run.seated, *self.calls.values()])

    def failed(self, run: Run, event: Failed) -> None:
        self.without(run, [event.member])

    def lost(self, run: Run, dead: Sequence[Member]) -> None:
        if set(dead) & set(run.seated):
            return super().lost(run, dead)
        return self.without(run, dead)

    def late(self, run: Run) -> None:
        self.calls.clear()
        self.done(run)

    def done(self, run: Run) -> None:
        if dead := run.dead(self._newcomers):
            return self._otherwise(run, dead[0], run.membership.why_lost(dead[0]))
        if deaf := [member for member in self._newcomers if member not in self.answers]:
            return self._refuse(run, deaf[0], "it does not answer")
        said = {member: answer.not_reached for member, answer in self.answers.items()}
        doubted = {peer for member in self._newcomers for peer in said.get(member, ())} - said.keys()
        if doubted and not self._second:
            self._second = True
            return self._probe(run, {peer: list(self._newcomers) for peer in sorted(doubted)})
        found = run.by_links(said, self._newcomers, self._may_go)
        return self._then(run) if found is None else self._refuse(run, found.member, found.reason)

    def _refuse(self, run: Run, member: Member, reason: str) -> None:
        if member in self._newcomers:  # a link may be cut for long, and trying it costs seconds
            run.trials.excuse(member)
        run.lose(member, reason, fence=True, cool=True)
        self._otherwise(run, member, reason)

    def _probe(self, run: Run, peers: Mapping[Member, Sequence[Member]]) -> None:
        self.ask(run, peers, lambda member: Probe(tuple(peers[member]), run.bounds.probe), run.bounds.probe + run.release_seconds)


def greet(run: Run, plan: WorkerAssignment, having: Collection[Member], then: Callable[[Run], None],
          otherwise: Callable[[Run, Member, str], None], *, costs_newcomers_only: bool = False) -> None:
    """Go on to `then` if all who are new in a plan reach all others, to `otherwise` with the one that is to blame if not. So a join is
    tried twice: before anything changes, and when all who serve have finished their step."""
    newcomers = [member for member in plan.members if member not in having]
    everybody = dict.fromkeys([*plan.members, *having])
    if newcomers and len(plan.members) > 1:
        return run.enter(Greeting(newcomers, everybody, then, otherwise, newcomers if costs_newcomers_only else everybody))
    return then(run)


class Moving(Phase):
    """A new generation in the living processes, with the state of the base."""

    name = "moving"

    def __init__(self, plan: WorkerAssignment, good: Collection[Member], publish: bool):
        super().__init__()
        self._plan, self._good, self._publish = plan, good, publish

    def enter(self, run: Run) -> None:
        base, plan = run.base, self._plan
        leaving = run.planner.hands_over(base, plan, self._good)
        self._plan = plan = WorkerAssignment(plan.layout, plan.placement, plan.members, plan.planned, leaving)
        rank_of = {member: rank for rank, member in enumerate(base.members) if member in self._good}
        everybody = (*plan.members, *leaving)
        former = FormerRef(base, run.committed, tuple(rank_of.get(member) for member in everybody), self._publish)
        run.trials.begin(member for member, came in zip(plan.members, former.came_from) if came is None)
        run.taking_part = set(everybody)
        run.generation += 1
        run.tell(PlannedRef(plan.layout, round(run.now - run.change_since, 4)))
        request = Form(plan, former)
        self.ask(run, everybody, lambda member: request, run.bounds.form)

    def involved(self, run: Run) -> Iterable[Member]:
        return dict.fromkeys([*self.calls.values(), *self.answers])

    def done(self, run: Run) -> None:
        plan = self._plan
        settle(run, plan)
        formed = self.answers.values()
        run.tell(FormedRef(run.generation, plan.layout, run.committed, sum(answer.bytes for answer in formed),
                           round(max(answer.grouping_seconds for answer in formed), 4),
                           round(max(answer.moving_seconds for answer in formed), 4), round(run.now - run.change_since, 4)))
        run.interruption = None
        run.go_on()


class Forming(Phase):
    """A generation without state, which is loaded then. seen: the checkpoint; None: initial values. lost: why memory will not do."""

    name = "forming"

    def __init__(self, seen: Seen | None, lost: str):
        super().__init__()
        self._seen, self._lost = seen, lost

    def enter(self, run: Run) -> None:
        plan = self._plan = run.plan_now(None)
        if plan is None:
            return run.wait_for_nodes(formed=False)
        run.generation += 1
        run.seated, run.loading = plan.members, self._seen
        run.taking_part = set(plan.members)
        if run.loaded:
            run.trials.begin(member for member in plan.members if member not in run.trials.proven)
        request = Form(plan, None)
        return self.ask(run, plan.members, lambda member: request, run.bounds.form)

    def done(self, run: Run) -> None:
        run.enter(Loading(self._plan, self._seen, self._lost))


class Loading(Phase):
    """Everybody reads its part of a checkpoint, or makes initial values. Steps are cut only when all have: a checkpoint that nobody can
    read costs none."""

    name = "loading"

    def __init__(self, plan: WorkerAssignment, seen: Seen | None, lost: str):
        super().__init__()
        self._plan, self._seen, self._lost = plan, seen, lost

    def enter(self, run: Run) -> None:
        request = Restore(self._seen.directory, self._seen.step) if self._seen else Initialise()
        self.ask(run, self._plan.members, lambda member: request, run.bounds.load)

    def done(self, run: Run) -> None:
        step = self._seen.step if self._seen else 0
        run.redone = run.committed - step
        if run.redone:
            cut(run, step, self._lost, self._begins)
        else:
            self._begins(run)

    def _begins(self, run: Run) -> None:
        line = OriginLine(run.generation, run.committed, self._seen.directory if self._seen else None)
        run.enter(Recording(line, self._loaded))

    def _loaded(self, run: Run) -> None:
        seen, plan, recovers = self._seen, self._plan, run.loaded or run.left_behind
        settle(run, plan)
        if seen is not None:
            run.tell(Resumed(run.committed, seen.directory, run.redone))
        elif run.redone:
            run.tell(StartedOver("no checkpoint", run.redone))
        run.tell(LoadedRef(run.generation, plan.layout, run.committed, round(run.now - run.change_since, 4) if recovers else None))
        run.redone, run.interruption = 0, None
        run.go_on()


def cut(run: Run, step: int, reason: str, then: Callable[[Run], None]) -> None:
    """Steps from `step` on are to be redone: the ledger says so before any of them is."""
    def cut_(run: Run) -> None:
        run.committed, run.pending, run.validated = step, None, None
        run.batches.clear()
        run.batch_again()
        run.due.clear()
        run.saver.abandon(run, step)
        then(run)
    run.enter(Recording(CutLine(step, reason), cut_))


def settle(run: Run, plan: WorkerAssignment) -> None:
    """All have arrived: this generation's state is the run's."""
    run.base = Base(run.generation, plan.layout, plan.placement, plan.members)
    run.seated, run.planned, run.pending, run.placement = plan.members, plan.planned, None, None
    run.taking_part = set()
    run.loaded, run.loading, run.away_since = True, None, None
