"""Scenarios by seed: one to four faults, of all kinds, sometimes in pairs that come close to each other."""

from __future__ import annotations

import random

from tests.simulation.faults import KINDS
from tests.simulation.settings import Fault, Scenario

RARE = frozenset({"stop", "not finite", "own everywhere", "unreadable"})
"""They end the run, or excuse that it ends: not in every seed."""
_NAMES = tuple(KINDS) + tuple(name for name in ("kill", "coordinator", "hang", "cut", "memory", "flap", "end node") for _ in range(2))
_CLOSE_SECONDS = 0.4


def scenario(seed: int) -> Scenario:
    chance = random.Random(seed)
    nodes = tuple(chance.choice(((1,), (1,), (1,), (1, 2), (2,)))[0 if chance.random() < 0.6 else -1] for _ in range(chance.choice((2, 3, 3, 4, 5))))
    steps = chance.choice((3, 5, 6, 8))
    return Scenario(
        seed=seed, nodes=nodes, steps=steps, save_every=chance.choice((0, 2, 3)), validate_every=chance.choice((0, 0, 2)),
        place_every=chance.choice((0, 0, 2, 3)), min_nodes=chance.choice((1, 1, 1, 2)), least=chance.choice((1, 1, 1, 2)),
        copies=chance.choice((1, 1, 1, 2, 0)), keys=chance.choice((3, 4, 6)), spread=chance.choice((0.5, 1.0, 4.0)),
        cold=chance.random() < 0.1, faults=_faults(chance, 40 * sum(nodes) + 15 * steps * sum(nodes)))


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
