"""What must hold, whatever happens. Checked at the event at which it could break, against what the world knows and the machine
cannot.

Safety: state (what an update is applied to, whose history it has), the ledger (what is committed, and what may be cut),
checkpoints (what a manifest lists, what may be deleted), members (who may be ended), calls. Liveness: progress after the last
fault, and an end that the faults account for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from orchestrator.protocol.commands import (
    Append,
    Call,
    CallLane,
    CutLine,
    Discard,
    EndRun,
    EpochLine,
    Fence,
    Form,
    FormerRef,
    OriginLine,
    Spawn,
    StepLine,
    WriteManifest,
)
from orchestrator.protocol.events import Base, Ending
from orchestrator.protocol.members import Member
from tests.simulation.checkpoint_model import Checkpoint
from tests.simulation.histories import INITIAL, NEVER
from tests.simulation.settings import COOL_DOWN

if TYPE_CHECKING:
    from tests.simulation.rank_model import RankModel
    from tests.simulation.world import Coordinator, World

PROGRESS_SECONDS = 600.0
"""From the last fault, or the last committed step, to the next one or the end of the run."""
STOP_SECONDS = 400.0
SEATED_SECONDS = 150.0
"""The longest cool-down of the simulated rules, with a start and a generation."""


class Violation(Exception):
    """rule: short, the same for all violations of a kind. text: with what was seen."""

    def __init__(self, rule: str, text: str):
        super().__init__(f"{rule}: {text}")
        self.rule, self.text = rule, text


class Invariants:
    """committed: the history of state after so many committed steps, since initial values."""

    def __init__(self, world: World):
        self.world = world
        self.committed: list[int] = [INITIAL]
        self.progress_at, self._farthest, self._nodes = 0.0, 0, 0
        self._planned: Form | None = None

    def broken(self, text: str, rule: str = "S2") -> None:
        raise Violation(rule, text)

    # --- state -------------------------------------------------------------------------------------------------------------

    def may_be_updated(self, rank: RankModel, history: int, step: int) -> None:
        if history == NEVER:
            raise Violation("S1", f"{rank.member} applies step {step} to state that was never initialised")
        updates = self.world.histories.updates(history)
        if updates != step:
            raise Violation("S2", f"{rank.member} applies step {step} to state with {updates} updates")

    def brings(self, rank: RankModel, former: FormerRef, place: int) -> None:
        """It is to bring state into a new generation."""
        state = rank.held.get(former.base.generation)
        if state is None:
            raise Violation("S2", f"{rank.member} is to bring state of generation {former.base.generation}, and has none")
        if state.applied != former.applied or state.rank != former.came_from[place]:
            raise Violation("S2", f"{rank.member} is to bring state of {former.applied} steps as rank "
                                  f"{former.came_from[place]}, and has {state.applied} as rank {state.rank}")

    def moved(self, payloads: Mapping[Member, Mapping[int, int] | None], former: FormerRef | None) -> dict[int, int]:
        """What all bring together, by key."""
        found: dict[int, int] = {}
        for content in payloads.values():
            if content:
                for key, history in content.items():
                    if found.setdefault(key, history) != history:
                        raise Violation("S13", f"owners of key {key} have different state")
        if (former is not None or any(payloads.values())) and len(found) < self.world.planner.keys:
            raise Violation("S6", f"{self.world.planner.keys - len(found)} keys have no owner left, and were not missed")
        if former is not None and any(self.world.histories.updates(history) != former.applied for history in found.values()):
            raise Violation("S2", f"state that is carried over as that of {former.applied} steps is not")
        return found

    def reduced(self, payloads: Mapping[Member, int | None], step: int) -> bool:
        """All compute one step, on one state."""
        if len({history for history in payloads.values() if history is not None}) > 1:
            raise Violation("S13", f"step {step} is computed on different states")
        return True

    # --- the ledger --------------------------------------------------------------------------------------------------------

    def append(self, coordinator: Coordinator, order: Append) -> None:
        line = order.line
        if coordinator is not self.world.coordinator:
            return  # of another one: storage refuses it
        projected = len(self.world.storage.steps)
        for waiting in coordinator.clerk.lines():
            projected = projected + 1 if type(waiting) is StepLine else waiting.step if type(waiting) is CutLine else projected
        if type(line) is StepLine:
            self._step(coordinator, line, projected)
        elif type(line) is CutLine:
            self._cut(coordinator, line.step, projected)
        elif type(line) is OriginLine:
            if line.step != projected:
                raise Violation("S3", f"state of {line.step} steps goes on where {projected} are committed")
        elif type(line) is EpochLine and line.epoch != coordinator.epoch:
            raise Violation("S9", f"coordinator {coordinator.epoch} says that it is {line.epoch}")

    def _step(self, coordinator: Coordinator, line: StepLine, projected: int) -> None:
        step = line.step
        if step != projected:
            raise Violation("S3", f"step {step} is committed after {projected} steps")
        wanted, ranks = self.committed[step], self.world.ranks
        for member in coordinator.run.seated:
            rank = ranks.get(member)
            if rank is None or not rank.alive:
                continue
            state = rank.held.get(line.generation)
            if state is None or state.applied != step or rank.reduced != step or rank.reduced_in.number != line.generation:
                raise Violation("S3", f"step {step} is committed, but {member} has not reduced it in generation "
                                      f"{line.generation} (it has reduced {rank.reduced})")
            for history in state.content.values():
                if history != wanted:
                    rule = "S1" if history == NEVER else "S2"
                    raise Violation(rule, f"step {step} is committed on state that is not that of all steps before ({member})")

    def step_stored(self, coordinator: Coordinator, line: StepLine) -> None:
        del self.committed[line.step + 1:]
        after = self.world.histories.after
        self._nodes = len({member.node for member in coordinator.run.seated})
        self.committed.append(after(self.committed[line.step], line.step, coordinator.epoch, line.generation))
        if line.step >= self._farthest:  # what is done again is no progress
            self._farthest, self.progress_at = line.step + 1, self.world.now

    def cut_stored(self, line: CutLine) -> None:
        del self.committed[line.step + 1:]

    def _spread(self) -> bool:
        """Whether the last step was made on more nodes than there are copies: a run that has just begun may have no others yet."""
        return self._nodes > self.world.scenario.copies

    def _cut(self, coordinator: Coordinator, step: int, projected: int) -> None:
        """Committed steps may be dropped only where nobody who could be asked has the state of all of them."""
        if step >= projected:
            raise Violation("S4", f"{projected} committed steps are cut to {step}")
        world = self.world
        having: dict[tuple[int, int, int, int], dict[int, Member]] = {}
        for rank in world.ranks.values():
            if not world.answers(rank) or not coordinator.run.trusts(rank.member):
                continue
            for number, state in rank.held.items():
                due = state.applied == projected - 1 and rank.reduced == projected - 1 and rank.reduced_in.number == number
                if state.applied == projected or due:
                    having.setdefault((number, state.layout, state.placement, 0), {})[state.rank] = rank.member
        for (number, layout, placement, _), members in having.items():
            size = 1 + max(members)
            base = Base(number, layout, placement, tuple(members.get(place) for place in range(size)))
            whole = all(any(owner in members for owner in owners) for owners in world.planner.owned(layout, placement).by_key)
            if whole:
                raise Violation("S5", f"{projected - step} committed steps are cut, though {list(map(str, base.members))} have "
                                      f"all state of generation {number}")
        if world.redundancy_was_whole() and self._spread() and step < projected:
            raise Violation("S5", f"{projected - step} committed steps are cut, though few nodes were lost at a time")
        if world.now < world.storage.unread_until or world.reads_failed:
            return
        for found in world.storage.whole():
            known = found.epoch == coordinator.epoch or found.directory in coordinator.listed
            if step < found.step <= projected and known and not found.unlisted:
                raise Violation("S5", f"{projected} committed steps are cut to {step}, though {found.directory} can be read")

    # --- checkpoints -------------------------------------------------------------------------------------------------------

    def manifest(self, coordinator: Coordinator, order: WriteManifest) -> None:
        if coordinator is not self.world.coordinator:
            return
        found = self.world.storage.checkpoints.get(order.directory, Checkpoint(order.directory))
        self.listed(coordinator, found, order)

    def listed(self, coordinator: Coordinator, found: Checkpoint, order: WriteManifest) -> dict[int, int]:
        """What the manifest lists, by key: pieces of one generation, of all keys, and of the state of that step."""
        generation, keys = coordinator.snapshots.get(order.directory, 0), range(self.world.planner.keys)
        missing = [key for key in keys if (generation, key) not in found.pieces]
        if missing:
            raise Violation("S10", f"{order.directory} lacks keys {missing}")
        content = {key: found.pieces[generation, key] for key in keys}
        if coordinator is self.world.coordinator and (
                order.step >= len(self.committed) or any(history != self.committed[order.step] for history in content.values())):
            raise Violation("S10", f"{order.directory} has pieces of other state than that of {order.step} steps")
        return content

    def discard(self, coordinator: Coordinator, order: Discard) -> None:
        storage = self.world.storage
        found = storage.checkpoints.get(order.directory)
        if found is None or found.manifest is None or found.damaged or found.unreadable or found.step > len(storage.steps):
            return
        newer = sum(other.manifest is not None and other.step > found.step for other in storage.checkpoints.values())
        if newer < self.world.goal.keep:
            raise Violation("S12", f"{order.directory} is deleted, and {newer} newer ones are there")

    # --- members -----------------------------------------------------------------------------------------------------------

    def fence(self, coordinator: Coordinator, order: Fence) -> None:
        coordinator.fenced.add(order.member)
        if not order.reason:
            raise Violation("L5", f"{order.member} is ended without a reason")
        self._healthy(coordinator, order.member, f"ended ({order.reason})")

    def spawn(self, coordinator: Coordinator, order: Spawn) -> None:
        """Whatever runs in its place is ended."""
        for rank in self.world.at(order.member.node, order.member.local):
            if rank.member.incarnation >= order.member.incarnation:
                raise Violation("S7", f"{order.member} is to be made, and {rank.member} is there")
            self._healthy(coordinator, rank.member, f"replaced by {order.member}")
            coordinator.fenced.add(rank.member)

    def _healthy(self, coordinator: Coordinator, member: Member, what: str) -> None:
        rank = self.world.ranks.get(member)
        if rank is not None and rank.alive and coordinator is self.world.coordinator and not self.world.is_harmed(member):
            raise Violation("S7", f"{member} is healthy, and is {what}")

    # --- calls -------------------------------------------------------------------------------------------------------------

    def call(self, coordinator: Coordinator, call: Call, lane: CallLane) -> None:
        if call.call.epoch != coordinator.epoch:
            raise Violation("S9", f"coordinator {coordinator.epoch} calls as {call.call.epoch}")
        if lane is CallLane.COMPUTE and coordinator is self.world.coordinator:
            if call.member in coordinator.fenced:
                raise Violation("S8", f"{call.member} is called for {_name(call)} after it was given up")
            if type(call.request) is Form:
                self._plan(call)

    def begins(self, rank: RankModel, call: Call) -> None:
        """A call for the compute lane comes to a rank."""
        before = rank.call
        if before is not None and before.call.epoch == call.call.epoch:
            raise Violation("S11", f"{rank.member} is called for {_name(call)} while it runs {_name(before)}")

    def _plan(self, call: Call) -> None:
        request = call.request
        if request is self._planned:
            return
        self._planned, plan, former = request, request.plan, request.former
        everybody = plan.members + (plan.leaving if former else ())
        if call.member not in everybody or len(set(everybody)) < len(everybody):
            raise Violation("S8", f"{call.member} is called to a layout of {list(map(str, everybody))}")
        if former is not None and len(former.came_from) != len(everybody):
            raise Violation("S2", f"{len(former.came_from)} places for {len(everybody)} members")

    # --- the whole run -----------------------------------------------------------------------------------------------------

    def progress(self) -> None:
        """To be asked now and then."""
        world = self.world
        since = max(self.progress_at, world.calm_at)
        if world.now - since > PROGRESS_SECONDS and not world.enough() and world.failing_step is None:
            world.outcome = EndRun(Ending.NO_NODES, "it waits for nodes, and none will come", len(self.committed) - 1, False)
        elif world.now - since > PROGRESS_SECONDS:
            run = world.coordinator.run if world.coordinator else None
            where = f"{run.phase.name}, {run.committed} committed" if run else "no coordinator"
            raise Violation("L1", f"no progress for {PROGRESS_SECONDS:g} s after the last fault ({where})")
        if world.stop_at is not None and world.now - max(world.stop_at, world.calm_at) > STOP_SECONDS:
            raise Violation("L3", f"asked to stop {world.now - world.stop_at:.0f} s ago, and it goes on")

    def everybody(self, coordinator: Coordinator) -> None:
        """Nodes that have been well for long take part."""
        world = self.world
        if world.barred or world.links.cut or world.now - world.calm_at < SEATED_SECONDS:
            return
        seated = {member.node for member in coordinator.run.seated}
        for host in world.hosts.values():
            well = host.present and host.up and not host.draining and world.now - host.lost_at > SEATED_SECONDS
            if well and host.name not in seated:
                raise Violation("L4", f"{host.name} has been well for {SEATED_SECONDS:g} s, and is not used")

    def end(self, coordinator: Coordinator, order: EndRun) -> None:
        world, steps = self.world, len(self.world.storage.steps)
        if coordinator is not world.coordinator:
            done = order.ending is Ending.DONE and order.step == steps == world.goal.steps
            lonely = order.ending is Ending.NO_NODES and world.scenario.wait is not None  # nobody listens to it any more
            if order.ending is not Ending.SUPERSEDED and not done and not lonely:
                raise Violation("S9", f"a coordinator of before ends the run: {order.ending}: {order.text}")
            return
        if order.ending is Ending.DONE:
            if steps != world.goal.steps or order.step != steps:
                raise Violation("L2", f"done after {steps} of {world.goal.steps} steps")
            self.everybody(coordinator)
        elif not self._excused(order.ending):
            raise Violation("L2", f"the run ends ({order.ending}: {order.text})")
        if order.step != steps and order.ending is not Ending.SUPERSEDED:
            raise Violation("L2", f"ended as of {order.step} steps where {steps} are committed")
        saved = any(found.step == steps and found.manifest is not None for found in world.storage.checkpoints.values())
        if order.saved and steps and not saved:
            raise Violation("S10", f"ended as saved, and there is no checkpoint of {steps} steps")
        if order.ending in (Ending.DONE, Ending.STOPPED) and not order.saved and not world.storage_harmed:
            raise Violation("L2", f"ended ({order.ending}) without a checkpoint")
        self.committed_state(coordinator)

    def _excused(self, ending: Ending) -> bool:
        world = self.world
        if ending is Ending.SUPERSEDED:
            return bool(world.superseded)
        return ending in world.excused or ending is Ending.NO_NODES and (not world.somebody_came or self._waited_in_vain())

    def _waited_in_vain(self) -> bool:
        """Whether there were too few nodes, or some had just come back, all the time that a run waits for more."""
        world, wait = self.world, self.world.scenario.wait
        if wait is None:
            return False
        longest = wait + 32 * COOL_DOWN  # from the loss of somebody who is back
        return not world.enough() or any(world.now - max(host.lost_at, host.told_at) < longest for host in world.hosts.values())

    def committed_state(self, coordinator: Coordinator) -> None:
        """Checkpoints of committed steps are the state of these steps."""
        for found in self.world.storage.checkpoints.values():
            if found.manifest is not None and found.step < len(self.committed) and not found.damaged:
                if any(history != self.committed[found.step] for history in found.manifest.values()):
                    raise Violation("S10", f"{found.directory} is not the state of {found.step} committed steps")


def _name(call: Call) -> str:
    return type(call.request).__name__
