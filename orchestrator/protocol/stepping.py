"""Steps, and what is due between two of them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from math import inf
from typing import TYPE_CHECKING

from orchestrator.protocol.changing import Finishing, greet
from orchestrator.protocol.commands import (
    Apply,
    Evaluate,
    FindPlacement,
    PlacedRef,
    Rearrange,
    Step,
    StepLine,
    StepLost,
    ValidatedStep,
)
from orchestrator.protocol.events import Base, Beat, Ending, Heard, PlacementFound
from orchestrator.protocol.members import Member
from orchestrator.protocol.phases import Phase, Recording
from orchestrator.protocol.saving import AwaitingSave, Snapshotting
from orchestrator.told.kinds import DataAway, NodesDraining, NodesJoining, RanksLost, Replayed

if TYPE_CHECKING:
    from orchestrator.protocol.run import Run

_DATA_SECONDS = 30.0
"""Data that is not there by then is said to be away: what Ray Data does not bring in half of it is read without it."""
PLACE, VALIDATE, SAVE = "place", "validate", "save"


def next_step(run: Run) -> None:
    """All ranks are idle and have the state of the base: what comes next. The order matters: a checkpoint is begun before anybody is taken
    in, so that no generation forms while state is copied."""
    if dead := run.dead(run.seated):
        return run.trouble(dead[0], "its process or node was lost")
    run.release_drained()
    if run.ending is not None or run.stopping or run.committed >= run.goal.steps:
        return _toward_the_end(run)
    if PLACE in run.due:
        return run.enter(Placing())
    if run.placement is not None:
        return run.enter(Applying() if run.pending is not None else Rearranging(run.placement))
    if VALIDATE in run.due:
        return run.enter(Applying() if run.pending is not None else Evaluating())
    if SAVE in run.due and not run.saver.busy and not run.saver.clearing(run.committed):
        return run.enter(Applying() if run.pending is not None else Snapshotting())
    if _meet_changes(run):
        return None
    if run.decision.wait and not run.has_enough:
        return run.wait_for_nodes(formed=True)
    return run.enter(Stepping() if run.committed in run.batches else FetchingBatch())


def _toward_the_end(run: Run) -> None:
    goal, natural = run.goal, run.ending is None and not run.stopping
    if natural and goal.validate and run.validated != run.committed:
        return run.enter(Applying() if run.pending is not None else Evaluating())
    if goal.evaluate is None:
        if run.saver.busy or run.saver.clearing(run.committed):
            return run.enter(AwaitingSave())
        if run.newest_readable != run.committed:
            if run.saver.hopeless(run):
                ending, text = run.ending or (Ending.STORAGE, "")
                return run.end(ending, "; ".join(filter(None, (text, f"no checkpoint of step {run.committed}: {run.saver.trouble}"))))
            if (seconds := run.saver.pause(run)) > 0:
                return run.pause(seconds, next_step)
            return run.enter(Applying() if run.pending is not None else Snapshotting())
    if goal.replay and natural:
        run.tell(Replayed(run.committed))
    return run.end(*(run.ending or (Ending.DONE if natural else Ending.STOPPED, "")))


def _meet_changes(run: Run) -> bool:
    """Leave nodes that drain, and take in those that have joined, where the layout is better for it: whether anything changes."""
    if run.goal.replay:
        change = any(change.step == run.committed > 0 for change in run.goal.replay) and run.repeated != run.committed
        if change:
            run.repeated, run.change_since = run.committed, run.now
            run.enter(Finishing(run.base.members))
        return change
    decision = run.decision
    if not decision.leaving and (not decision.joining or run.trials.wary and run.has_enough):
        return False
    if not decision.nodes:
        if decision.leaving:
            run.tell_once(_draining(decision.leaving, "there is no other node yet"), "nowhere", decision.leaving)
        return False
    nodes = run.usable
    if not decision.leaving and nodes == run.planned:
        return False
    plan = run.plan(nodes, run.base)
    if plan is None:
        return False
    if not decision.leaving and run.planner.same_layout(run.base, plan):
        run.planned = nodes
        return False
    if decision.leaving:
        run.tell(_draining(decision.leaving))
    else:
        known = {member.node for member in run.seated}
        run.tell(NodesJoining(tuple(sorted({node.name for node in nodes} - known))))
    run.change_since = run.now
    having = [member for member in run.base.members if member is not None and run.trusts(member)]
    greet(run, plan, having, lambda run: run.enter(Finishing(having)), _refused, costs_newcomers_only=True)
    return True


def _draining(leaving: Collection[Member], reason: str | None = None) -> NodesDraining:
    return NodesDraining(tuple(map(str, leaving)), tuple(sorted({member.node for member in leaving})), reason)


def _refused(run: Run, member: Member, reason: str) -> None:
    """A newcomer is not taken in: nothing changes for those who serve."""
    run.taking_part = set()
    run.tell(RanksLost((str(member),), run.generation, (reason,)))
    run.go_on()


class Working(Phase):
    """Ranks compute together. Where nobody finishes anything for too long, somebody hangs, or a link is cut: better to look now than
    at the deadline, which has room for the longest step."""

    def __init__(self) -> None:
        super().__init__()
        self._operations: dict[Member, int] = {}
        self._moved_at: float | None = None

    def heard(self, run: Run, event: Heard) -> None:
        now = {member: event.beats.get(member, Beat(0.0)).operation for member in self.calls.values()}
        if now != self._operations or self._moved_at is None:
            self._operations, self._moved_at = now, run.now
        median = run.step_median  # before the first step nobody knows how long one takes: only a bound that was set holds
        stuck = run.bounds.stuck if not run.bounds.stuck_times else inf if median is None else max(
            run.bounds.stuck, run.bounds.stuck_times * median)
        since = max(self._moved_at, run.awake_since)
        if self.calls and run.now - since > stuck:
            run.trouble(None, f"nobody finished anything for {run.now - since:.1f} s")


class FetchingBatch(Phase):
    """The next step's sequences are not there yet. That a read fails, or does not end, is told, and lasts no longer than storage may
    be away."""

    name = "fetching batch"

    def enter(self, run: Run) -> None:
        run.need_batch(run.committed)
        self._asked, self.deadline = True, run.now + _DATA_SECONDS

    def batch_ready(self, run: Run) -> None:
        if run.committed in run.batches:
            run.forget_told("data")
            run.data_away_since = None
            run.go_on()

    def batch_failed(self, run: Run, text: str) -> None:
        self._asked = False
        self._away(run, text, run.now)

    def _away(self, run: Run, text: str, since: float) -> None:
        if run.ending is not None:
            return run.go_on()
        if run.data_away_since is None:
            run.data_away_since = since
        failing = run.now - run.data_away_since
        if failing > run.bounds.storage:
            run.wind_up(Ending.STORAGE, f"the data could not be read for {failing:.0f} s: {text}")
            return run.go_on()
        run.tell_once(DataAway(text), "data", text)
        self.deadline = run.now + min(5.0, max(run.bounds.first_pause, failing / 2))
        return None

    def late(self, run: Run) -> None:
        if self._asked:
            return self._away(run, "a read does not end", self.since)
        return self.enter(run)

    def stop_asked(self, run: Run) -> None:
        run.go_on()

    def changed(self, run: Run) -> None:
        decision = run.decision
        if decision.leaving and decision.nodes:
            run.go_on()


class Stepping(Working):
    """Compute and reduce; nothing that lasts changes, but for the update of the step before."""

    name = "stepping"

    def enter(self, run: Run) -> None:
        request = Step(run.committed, run.pending)
        self.ask(run, run.seated, lambda member: request, run.bounds.step)
        run.need_batch(run.committed + 1)
        run.waited_seconds = 0.0
        run.forget_told("waiting")

    def interrupted(self, run: Run) -> None:
        run.tell(StepLost())

    def done(self, run: Run) -> None:
        run.step_seconds.append(run.now - self.since)
        run.pending = None
        run.enter(Committing(run.committed, run.generation))


class Committing(Recording):
    """The ledger's line: the step counts once it is durable."""

    name = "committing"

    def __init__(self, step: int, generation: int):
        super().__init__(StepLine(step, generation), self._stored)
        self._step = step

    def lost(self, run: Run, dead: Sequence[Member]) -> None:
        if self.order is None:  # between two tries: the line is not there
            run.trouble(dead[0], "its process or node was lost")

    def not_stored(self, run: Run, text: str) -> None:
        super().not_stored(run, text)
        if run.phase is self and (dead := run.dead(run.seated)):
            run.trouble(dead[0], "its process or node was lost")

    def give_up(self, run: Run, text: str) -> None:
        run.wind_up(Ending.STORAGE, f"the ledger could not be written for {run.now - self.since:.0f} s: {text}")
        run.go_on()

    def refused(self, run: Run, ending: Ending, text: str) -> None:
        run.wind_up(ending, text)
        run.go_on()

    def _stored(self, run: Run) -> None:
        goal = run.goal
        run.committed, run.pending = self._step + 1, self._step
        run.committed_at, run.interruption = run.now, None
        run.trials.passed(run.seated, run.committed)
        run.batches.discard(self._step)
        run.saver.committed()
        for name, every in ((PLACE, goal.place_every), (VALIDATE, goal.validate_every), (SAVE, goal.save_every)):
            if every and run.committed % every == 0 and run.committed < goal.steps:
                run.due.add(name)
        run.go_on()


class Applying(Working):
    """The update of the last committed step, without another step."""

    name = "applying"

    def enter(self, run: Run) -> None:
        request = Apply(run.pending)
        self.ask(run, run.seated, lambda member: request, run.bounds.step)

    def done(self, run: Run) -> None:
        run.pending = None
        run.go_on()


class Evaluating(Working):
    """Losses of the held-out text."""

    name = "evaluating"

    def enter(self, run: Run) -> None:
        request = Evaluate(run.committed)
        self.ask(run, run.seated, lambda member: request, run.bounds.step)

    def done(self, run: Run) -> None:
        run.validated = run.committed
        run.due.discard(VALIDATE)
        run.tell(ValidatedStep(run.committed))
        run.go_on()


class Placing(Phase):
    """Would the load of the last steps be evener with experts on other ranks?"""

    name = "placing"

    def enter(self, run: Run) -> None:
        run.due.discard(PLACE)
        run.order(FindPlacement(run.committed))
        self.deadline = run.now + run.bounds.form

    def placement_found(self, run: Run, event: PlacementFound) -> None:
        if event.step == run.committed:
            run.placement = event.placement
            run.go_on()

    def late(self, run: Run) -> None:
        run.go_on()


class Rearranging(Working):
    """Experts move, with all their state: a new generation in the same groups."""

    name = "rearranging"

    def __init__(self, placement: int):
        super().__init__()
        self._placement = placement

    def enter(self, run: Run) -> None:
        run.placement = None
        run.generation += 1
        request = Rearrange(self._placement)
        self.ask(run, run.seated, lambda member: request, run.bounds.form)

    def done(self, run: Run) -> None:
        base = run.base
        run.base = Base(run.generation, base.layout, self._placement, run.seated)
        run.tell(PlacedRef(run.committed, run.generation, self._placement, base.placement,
                           sum(answer.bytes for answer in self.answers.values()), round(run.now - self.since, 3)))
        run.go_on()
