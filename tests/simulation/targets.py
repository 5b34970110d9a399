"""Whom a fault befalls, and how a cluster tells of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from orchestrator.protocol import events as happened
from tests.simulation.births import between
from tests.simulation.host import Host
from tests.simulation.rank_model import RankModel

if TYPE_CHECKING:
    from tests.simulation.world import World


def some_member(world: World, target: int) -> RankModel | None:
    alive = sorted(world.alive(), key=lambda rank: rank.member)
    return alive[target % len(alive)] if alive else None


def some_host(world: World, target: int) -> Host | None:
    up = [host for host in world.hosts.values() if host.up and host.present]
    return up[target % len(up)] if up else None


def ranks_on(world: World, host: Host) -> list[RankModel]:
    return [rank for rank in world.ranks.values() if rank.alive and rank.member.node == host.name]


def watch(world: World, event: happened.Event, low: float, high: float) -> None:
    """What the cluster says of a node reaches the coordinator late, but in its order: one thread asks."""
    host = world.hosts[event.node.name if isinstance(event, happened.NodeJoined) else event.name]
    host.told_at = max(world.now + between(world, low, high), host.told_at + 1e-6)
    world.later(host.told_at - world.now, seen, world, event)


def seen(world: World, event: happened.Event) -> None:
    if world.coordinator is not None:
        world.coordinator.receive(event)
