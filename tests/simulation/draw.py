"""Scenarios by seed: one to four faults, of all kinds, sometimes in pairs that come close to each other."""

from __future__ import annotations

import random

from tests.simulation.faults import KINDS
from tests.simulation.settings import Fault, Scenario

RARE = frozenset({"stop", "not finite", "own everywhere", "unreadable"})
"""They end the run, or excuse that it ends: not in every seed."""
_FREQUENT = ("kill", "coordinator", "hang", "cut", "memory", "flap", "end node")
_NAMES = (*KINDS, *_FREQUENT, *_FREQUENT)
_CLOSE_SECONDS = 0.4


def scenario(seed: int) -> Scenario:
    chance = random.Random(seed)
    special = chance.random()
    if special < 0.03:
        return _waiting(chance, seed)
    if special < 0.08:
        return _taken_over(chance, seed)
    if special < 0.09:
        return _long(chance, seed)
    nodes = tuple(chance.choice((1, 1, 1, 2)) for _ in range(chance.choice((2, 3, 3, 4, 5))))
    steps = chance.choice((3, 5, 6, 8))
    return Scenario(
        seed=seed, nodes=nodes, steps=steps, save_every=chance.choice((0, 2, 3)), validate_every=chance.choice((0, 0, 2)),
        place_every=chance.choice((0, 0, 2, 3)), min_nodes=chance.choice((1, 1, 1, 2)), least=chance.choice((1, 1, 1, 2)),
        copies=chance.choice((1, 1, 1, 2, 0)), keys=chance.choice((3, 4, 6)), spread=chance.choice((0.5, 1.0, 4.0)),
        cold=chance.random() < 0.1, wait=chance.choice((None,) * 9 + (30.0,)), faults=_faults(chance, 40 * sum(nodes) + 15 * steps * sum(nodes)))


def _waiting(chance: random.Random, seed: int) -> Scenario:
    """As many nodes as are wanted; one goes, and another one while the first is waited for."""
    nodes = (1,) * chance.choice((3, 4))
    first, second = 1 + int(chance.random() * 60 * len(nodes)), round(26.0 + 20.0 * chance.random(), 1)
    faults = (Fault(first, "end node", chance.randrange(12)), Fault(first, "end node", chance.randrange(12), second))
    return Scenario(seed=seed, nodes=nodes, min_nodes=len(nodes), save_every=0, wait=chance.choice((None, 20.0, 60.0)), faults=faults)


def _taken_over(chance: random.Random, seed: int) -> Scenario:
    """A coordinator dies, and something else happens while the next one begins."""
    nodes, at = (1,) * chance.choice((2, 3)), 1 + int(chance.random() * 250)
    others = ("stall", "stall", "pause", "pause", "hang", "kill", "cut", "slow heir", "storage away", "coordinator", "damage",
              "unlisted", "deaf")
    faults = (Fault(at, "coordinator"), Fault(at, chance.choice(others), chance.randrange(12), round(chance.random() ** 3, 3)))
    return Scenario(seed=seed, nodes=nodes, save_every=chance.choice((0, 2)), place_every=chance.choice((0, 2)), faults=faults)


def _long(chance: random.Random, seed: int) -> Scenario:
    """A run that goes on for long after its faults: everybody who is well is to take part again."""
    names = ("kill", "flap", "memory", "faulty heir", "hang", "end node", "freeze", "cut briefly", "join", "mute heir",
             "drain off")
    faults = sorted((Fault(1 + int(chance.random() * 400), chance.choice(names), chance.randrange(12)) for _ in range(3)),
                    key=lambda fault: fault.at)
    return Scenario(seed=seed, nodes=(1,) * 3, steps=900, save_every=200, spread=0.5, faults=tuple(faults))


def _faults(chance: random.Random, length: int) -> tuple[Fault, ...]:
    """length: events of a run without faults, about."""
    found: list[Fault] = []
    for _ in range(chance.choice((1, 1, 2, 2, 3, 4))):
        name = chance.choice(_NAMES)
        if name in RARE and chance.random() < 0.7:
            name = "kill"
        close = found and chance.random() < 0.4
        at = found[-1].at if close else 1 + int(chance.random() * length)
        later = round(chance.random() * _CLOSE_SECONDS, 3) if close else 0.0
        if chance.random() < 0.1:
            later = round(5.0 + chance.random() * 55.0, 1)  # when the run has recovered, or waits for nodes
        found.append(Fault(at, name, chance.randrange(12), later))
    return tuple(sorted(found, key=lambda fault: (fault.at, fault.later)))
