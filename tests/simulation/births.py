"""What befalls a new process, by name; and what all faults note."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from orchestrator.protocol import commands as orders
from orchestrator.protocol.events import Ending, FailKind
from tests.simulation.rank_model import RankModel, Refused
from tests.simulation.settings import COOL_DOWN, SILENCE

if TYPE_CHECKING:
    from tests.simulation.world import World


def between(world: World, low: float, high: float) -> float:
    return low + (high - low) * world.random.random()


def over(world: World, at: float) -> None:
    world.calm_at = max(world.calm_at, at)


def own_fault_on(world: World, node: str) -> None:
    """A second node that fails by itself makes it look as if the step did it; so does the only one, the second time."""
    world.own_faults.append(node)
    others = [host for host in world.hosts.values() if host.present and host.up and not host.draining and host.name != node
              and world.now - host.lost_at > 60.0]
    if len(set(world.own_faults)) > 1 or len(world.own_faults) > 1 and not others:
        world.excused.add(Ending.OWN_FAULT)


def _without_memory(world: World, rank: RankModel) -> None:
    rank.ills.setdefault(orders.Form, []).append(Refused(FailKind.NO_MEMORY, "out of memory"))
    own_fault_on(world, rank.member.node)
    world.harmed.add(rank.member)
    over(world, world.now)


def _short_lived(world: World, rank: RankModel) -> None:
    world.later(between(world, 0.0, 4.0), world.kill, rank)
    over(world, world.now + 4.0)


def _hanging(world: World, rank: RankModel) -> None:
    rank.hung = True
    world.harmed.add(rank.member)
    over(world, world.now)


def _faulty(world: World, rank: RankModel) -> None:
    own_fault_on(world, rank.member.node)
    rank.ills.setdefault(orders.Step, []).append(Refused(FailKind.OWN, "a sum that does not add up"))
    world.harmed.add(rank.member)
    over(world, world.now)


def _unreachable(world: World, rank: RankModel) -> None:
    name, seconds = rank.member.node, between(world, 20.0, 100.0)
    links = [(other, name) for other in world.hosts if other != name] + [(name, other) for other in world.hosts if other != name]
    world.links.cut |= set(links)
    for other in world.hosts:  # which end of a link is to go is anybody's guess
        world.suspect(other, world.now + seconds + 4 * SILENCE)
    world.later(seconds, world.heal, links)
    over(world, world.now + seconds)


def _harmed(world: World, rank: RankModel) -> None:
    world.harmed.add(rank.member)
    over(world, world.now + COOL_DOWN)


BIRTHS: dict[str, Callable[[World, RankModel], None]] = {
    "memory": _without_memory, "short": _short_lived, "hung": _hanging, "faulty": _faulty, "unreachable": _unreachable,
    "mute": _harmed, "slow": _harmed,
}
