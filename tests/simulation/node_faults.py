"""What may go wrong with nodes and links."""

from __future__ import annotations

from typing import TYPE_CHECKING

from orchestrator.protocol import events as happened
from orchestrator.topology import Node
from tests.simulation.births import between, over
from tests.simulation.host import Host
from tests.simulation.settings import SILENCE
from tests.simulation.targets import ranks_on, some_host, watch

if TYPE_CHECKING:
    from tests.simulation.world import World


def lose_node(world: World, target: int) -> None:
    """A host stops: nothing says so, until the cluster notices."""
    _remove(world, target, quiet=True)


def end_node(world: World, target: int) -> None:
    """A node leaves, with its processes."""
    _remove(world, target, quiet=False)


def _remove(world: World, target: int, quiet: bool) -> None:
    host = some_host(world, target)
    if host is None:
        return
    if quiet:
        host.up = False
    world.suspect(host.name, world.now)
    for rank in ranks_on(world, host):
        world.kill(rank, quiet=quiet)
    host.up = host.present = False
    watch(world, happened.NodeLeft(host.name, "lost"), 0.2, 12.0)
    comes = between(world, 15.0, 60.0)
    over(world, world.now + comes + 2.0)
    if world.random.random() < 0.5:
        world.later(comes, _comes_back, world, host)
    elif world.usable() < max(world.scenario.min_nodes, world.scenario.least):
        world.later(comes, _joins, world)


def _comes_back(world: World, host: Host) -> None:
    host.up = host.present = True
    host.draining = False
    world.note(f"{host.name} is back")
    watch(world, happened.NodeJoined(Node(host.name, host.ranks)), 0.0, 0.3)


def _joins(world: World) -> None:
    name = f"n{len(world.hosts)}"
    host = world.hosts[name] = Host(name, world.scenario.nodes[len(world.hosts) % len(world.scenario.nodes)])
    world.note(f"{name} joins")
    watch(world, happened.NodeJoined(Node(name, host.ranks)), 0.0, 0.3)


def join(world: World, target: int) -> None:
    _joins(world)


def drain(world: World, target: int) -> None:
    _drains(world, target, None, stays=False)


def drain_until(world: World, target: int) -> None:
    _drains(world, target, between(world, 0.5, 20.0), stays=False)


def drain_off(world: World, target: int) -> None:
    _drains(world, target, between(world, 0.5, 20.0) if target % 2 else None, stays=True)


def _drains(world: World, target: int, seconds: float | None, stays: bool) -> None:
    host = some_host(world, target)
    if host is None or host.draining:
        return
    host.draining = True
    until = world.now + (seconds if seconds is not None else 30.0)
    world.suspect(host.name, until + 4 * SILENCE)
    watch(world, happened.NodeDraining(host.name, None if seconds is None else until), 0.1, 1.0)
    world.later(until - world.now + (between(world, -1.0, 10.0) if stays else 3.0), _drained, world, host, stays)
    over(world, until + 10.0)
    if not stays and world.usable() < max(world.scenario.min_nodes, world.scenario.least):
        world.later(40.0, _joins, world)
        over(world, world.now + 42.0)


def _drained(world: World, host: Host, stays: bool) -> None:
    if not host.present:
        return
    if stays:
        host.draining = False
        watch(world, happened.NodeStays(host.name), 0.0, 0.3)
    else:
        for rank in ranks_on(world, host):
            world.kill(rank)
        host.up = host.present = False
        watch(world, happened.NodeLeft(host.name, "drained"), 0.2, 3.0)


def cut(world: World, target: int) -> None:
    """Nothing passes from one node to another, for long."""
    _cut(world, target, between(world, 60.0, 200.0), both=False)


def cut_for_good(world: World, target: int) -> None:
    """One of the two ends has to go."""
    if world.usable() < max(3, world.scenario.min_nodes + 1, world.scenario.least + 1):
        return cut(world, target)
    calm = world.calm_at
    _cut(world, target, 3000.0, both=False)
    world.calm_at = max(calm, world.now)


def cut_briefly(world: World, target: int) -> None:
    _cut(world, target, between(world, 0.5, 25.0), both=False)


def cut_both(world: World, target: int) -> None:
    _cut(world, target, between(world, 30.0, 120.0), both=True)


def _cut(world: World, target: int, seconds: float, both: bool) -> None:
    names = [host.name for host in world.hosts.values() if host.present and host.up]
    if len(names) < 2:
        return
    one = names[target % len(names)]
    other = names[(target // len(names) + target + 1) % len(names)]
    if one == other:
        return
    links = [(one, other), (other, one)] if both else [(one, other)]
    world.links.cut |= set(links)
    for name in (one, other):
        world.suspect(name, world.now + seconds + 4 * SILENCE)
    world.later(seconds, world.heal, links)
    over(world, world.now + seconds)
