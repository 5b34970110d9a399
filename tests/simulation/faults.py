"""What may go wrong, by name. Each notes what may be suspected because of it, which endings it accounts for, and when it is
over."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from orchestrator.protocol import commands as orders
from orchestrator.protocol import events as happened
from orchestrator.protocol.events import Ending, FailKind
from tests.simulation.births import between, over, own_fault_on
from tests.simulation.node_faults import (
    cut,
    cut_both,
    cut_briefly,
    cut_for_good,
    drain,
    drain_off,
    drain_until,
    end_node,
    join,
    lose_node,
)
from tests.simulation.rank_model import RankModel, Refused
from tests.simulation.settings import SILENCE
from tests.simulation.targets import ranks_on, seen, some_host, some_member

if TYPE_CHECKING:
    from tests.simulation.world import World

Kind = Callable[["World", int], None]


# --- processes -----------------------------------------------------------------------------------------------------------


def kill(world: World, target: int) -> None:
    if rank := some_member(world, target):
        world.kill(rank)


def _kill_with_heir(birth: str, times: int = 1) -> Kind:
    """What takes its place fares ill."""

    def fault(world: World, target: int) -> None:
        if rank := some_member(world, target):
            world.hosts[rank.member.node].births += [birth] * times
            world.kill(rank)

    return fault


def hang(world: World, target: int) -> None:
    """Its compute lane never goes on; its heartbeat does."""
    if rank := some_member(world, target):
        rank.hung = True
        world.harmed.add(rank.member)


def keep(world: World, target: int) -> None:
    """It beats, but whatever it is told to let go it keeps; and another one ends, so that it is told to."""
    if rank := some_member(world, target):
        rank.keeps = True
        world.harmed.add(rank.member)
        over(world, world.now)
    kill(world, target + 1)


def slow(world: World, target: int) -> None:
    """Within all bounds."""
    if rank := some_member(world, target):
        rank.slowness = 8.0


def _freeze(world: World, ranks: list[RankModel], seconds: float, harm: bool) -> None:
    for rank in ranks:
        again = rank.stopped_at is not None  # not one beat came since it stood still before: together that may be too long
        rank.thaws = max(rank.thaws, world.now + seconds)
        if rank.stopped_at is None:
            rank.stopped_at = world.now
        if harm or again:
            world.harmed.add(rank.member)
    over(world, world.now + seconds)


def freeze(world: World, target: int) -> None:
    if rank := some_member(world, target):
        _freeze(world, [rank], between(world, SILENCE + 1, 5 * SILENCE), harm=True)


def freeze_node(world: World, target: int) -> None:
    if host := some_host(world, target):
        seconds = between(world, SILENCE + 1, 5 * SILENCE)
        world.suspect(host.name, world.now + seconds)
        _freeze(world, ranks_on(world, host), seconds, harm=True)


def pause(world: World, target: int) -> None:
    """Shorter than what is tolerated."""
    if rank := some_member(world, target):
        _freeze(world, [rank], between(world, 0.3, 0.7) * SILENCE, harm=False)


def stall(world: World, target: int) -> None:
    """Everything stands still for less than is tolerated, coordinators too."""
    seconds = between(world, 0.3, 0.7) * SILENCE
    _freeze(world, world.alive(), seconds, harm=False)
    if world.coordinator is not None:
        world.coordinator.thaws = max(world.coordinator.thaws, world.now + seconds)


def deaf(world: World, target: int) -> None:
    """A node and the coordinator do not reach each other; ranks reach theirs."""
    if host := some_host(world, target):
        seconds = between(world, SILENCE + 1, 4 * SILENCE)
        world.suspect(host.name, world.now + seconds + 2.0)
        for rank in ranks_on(world, host):
            rank.deaf = max(rank.deaf, world.now + seconds)
            if rank.stopped_at is None:
                rank.stopped_at = world.now
        over(world, world.now + seconds)


def own(world: World, target: int) -> None:
    """One call of one member fails with an error of its own."""
    if rank := some_member(world, target):
        kinds = (orders.Step, orders.Form, orders.Initialise, orders.Apply, orders.Snapshot, orders.Rearrange, orders.Evaluate)
        kind = kinds[0] if target % 3 else kinds[target // 3 % len(kinds)]
        rank.ills.setdefault(kind, []).append(Refused(FailKind.OWN, "a sum that does not add up"))
        world.harmed.add(rank.member)
        own_fault_on(world, rank.member.node)


def own_everywhere(world: World, target: int) -> None:
    """Nobody can compute one of the next steps."""
    if world.coordinator is not None:
        world.failing_step = min(world.coordinator.run.committed + 1 + target % 2, world.goal.steps - 1)
        world.excused.add(Ending.OWN_FAULT)
        world.harmed.update(world.ranks)
        world.all_harmed = True


# --- coordinators ----------------------------------------------------------------------------------------------------------


def coordinator(world: World, target: int) -> None:
    """It dies; the driver starts another."""
    found = world.coordinator
    if found is None:
        return
    found.alive = False
    found.clerk.author_dies()
    world.coordinator = None
    world.later(0.05 + world.delay(), world.restart)


def coordinator_replaced(world: World, target: int) -> None:
    """It is frozen, replaced, and goes on later."""
    found = world.coordinator
    if found is None:
        return
    found.thaws = world.now + between(world, 6.0, 60.0)
    world.later(between(world, 2.0, 5.0), _replaced, world, found)
    over(world, found.thaws)


def _replaced(world: World, found: object) -> None:
    if world.coordinator is found:
        world.supersede()
        world.coordinate(left_behind=True)


def coordinator_paused(world: World, target: int) -> None:
    if world.coordinator is not None:
        world.coordinator.thaws = world.now + between(world, 0.5, 3.0 * SILENCE)
        over(world, world.coordinator.thaws)


def stop(world: World, target: int) -> None:
    world.excused |= {Ending.STOPPED, Ending.WAITED}
    world.stop_at = world.now
    seen(world, happened.StopAsked())


# --- storage and data --------------------------------------------------------------------------------------------------------


def storage_away(world: World, target: int) -> None:
    """Nothing can be written, for less than its patience."""
    world.storage_harmed = True
    world.storage.fails_until = world.now + between(world, 1.0, 60.0)
    over(world, world.storage.fails_until)


def storage_slow(world: World, target: int) -> None:
    world.storage.slowness = 10.0


def unreadable_for_a_while(world: World, target: int) -> None:
    world.reads_failed = world.storage_harmed = True
    world.storage.unread_until = world.now + between(world, 5.0, 60.0)
    world.excused.add(Ending.NO_STATE)
    over(world, world.storage.unread_until)


def damage(world: World, target: int) -> None:
    """Of the newest checkpoint: a piece, or (every third) the manifest itself."""
    whole = world.storage.whole()
    if not whole:
        return
    found = max(whole, key=lambda checkpoint: checkpoint.step)
    world.storage_harmed = True
    if target % 3:
        found.damaged = True
    else:
        found.unreadable = True
    if not world.storage.whole():
        world.excused.add(Ending.NO_STATE)


def unlisted(world: World, target: int) -> None:
    """A listing does not show the newest checkpoint, for a while."""
    whole = world.storage.whole()
    if whole:
        found = max(whole, key=lambda checkpoint: checkpoint.step)
        found.unlisted = True
        world.storage_harmed = True
        world.later(30.0, _listed, found)


def _listed(found: object) -> None:
    found.unlisted = False


def not_finite(world: World, target: int) -> None:
    if world.coordinator is not None:
        step = world.coordinator.run.committed + 1 + target % 2
        if step < world.goal.steps:
            world.not_finite = step
            world.excused.add(Ending.NOT_FINITE)


def no_batches(world: World, target: int) -> None:
    world.batches_fail_until = world.now + between(world, 1.0, 60.0)
    over(world, world.batches_fail_until)


KINDS: dict[str, Kind] = {
    "kill": kill, "flap": _kill_with_heir("short", 2), "memory": _kill_with_heir("memory", 2),
    "unreachable": _kill_with_heir("unreachable"), "hung heir": _kill_with_heir("hung"),
    "faulty heir": _kill_with_heir("faulty", 2), "mute heir": _kill_with_heir("mute"), "slow heir": _kill_with_heir("slow"),
    "no heir": _kill_with_heir("never"), "hang": hang, "slow": slow, "keep": keep, "freeze": freeze, "freeze node": freeze_node,
    "pause": pause, "stall": stall, "deaf": deaf, "own": own, "own everywhere": own_everywhere, "lose node": lose_node,
    "end node": end_node, "join": join, "drain": drain, "drain until": drain_until, "drain off": drain_off, "cut": cut,
    "cut for good": cut_for_good, "cut briefly": cut_briefly, "cut both": cut_both, "coordinator": coordinator,
    "coordinator replaced": coordinator_replaced, "coordinator paused": coordinator_paused, "stop": stop,
    "storage away": storage_away, "storage slow": storage_slow, "unreadable": unreadable_for_a_while, "damage": damage,
    "unlisted": unlisted, "not finite": not_finite, "no batches": no_batches,
}
