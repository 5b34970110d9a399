"""A smaller scenario in which the same rule breaks: fewer faults, nodes, steps and features."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields, replace

from tests.simulation.invariants import Violation
from tests.simulation.settings import Fault, Scenario

Try = Callable[[Scenario], Violation | None]
MOST_TRIES = 400


def shrunk(scenario: Scenario, tried: Try) -> Scenario:
    """tried: what a scenario violates. The one that is given must violate something."""
    wanted, tries = tried(scenario).rule, 0
    again = True
    while again and tries < MOST_TRIES:
        again = False
        for smaller in _smaller(scenario):
            tries += 1
            found = tried(smaller)
            if found is not None and found.rule == wanted:
                scenario, again = smaller, True
                break
    return scenario


def _smaller(scenario: Scenario) -> Iterator[Scenario]:
    for index in range(len(scenario.faults)):
        yield replace(scenario, faults=scenario.faults[:index] + scenario.faults[index + 1:])
    if len(scenario.nodes) > 2:
        yield replace(scenario, nodes=scenario.nodes[:-1])
    if max(scenario.nodes) > 1:
        yield replace(scenario, nodes=tuple(1 for _ in scenario.nodes))
    if scenario.steps > 2:
        yield replace(scenario, steps=scenario.steps - 1)
    simple = Scenario()
    for name in ("place_every", "validate_every", "cold", "least", "min_nodes", "spread", "copies", "keys", "save_every"):
        if getattr(scenario, name) != getattr(simple, name):
            yield replace(scenario, **{name: getattr(simple, name)})
    for index, fault in enumerate(scenario.faults):
        if fault.later:
            yield replace(scenario, faults=_with(scenario, index, replace(fault, later=0.0)))
        if fault.at > 1:
            yield replace(scenario, faults=_with(scenario, index, replace(fault, at=fault.at // 2)))


def _with(scenario: Scenario, index: int, fault: Fault) -> tuple[Fault, ...]:
    return scenario.faults[:index] + (fault,) + scenario.faults[index + 1:]


def line(scenario: Scenario) -> str:
    """As it is written in scenarios.py."""
    simple, parts = Scenario(), []
    for field in fields(Scenario):
        value = getattr(scenario, field.name)
        if field.name != "faults" and value != getattr(simple, field.name):
            parts.append(f"{field.name}={value!r}")
    faults = ", ".join(_fault(fault) for fault in scenario.faults) + ("," if len(scenario.faults) == 1 else "")
    return f"Scenario({', '.join([*parts, f'faults=({faults})'])})"


def _fault(fault: Fault) -> str:
    later = f", {fault.later}" if fault.later else ""
    return f'Fault({fault.at}, "{fault.kind}", {fault.target}{later})'
