"""Runs that went wrong once, or that have to go in a certain way: by name, as data.

`ending` is how each ends. A line is what shrinking prints; `told` are the kinds of events that users read, in this order
(others may come between)."""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.protocol.events import Ending
from tests.simulation.settings import Fault, Scenario


@dataclass(frozen=True, slots=True)
class Case:
    scenario: Scenario
    ending: Ending = Ending.DONE
    told: tuple[str, ...] = ()


SCENARIOS: dict[str, Case] = {
    # --- ends
    "nothing happens": Case(Scenario(place_every=2, validate_every=2)),
    "one node, one rank": Case(Scenario(nodes=(1,), copies=0)),
    "nothing is there yet": Case(Scenario(cold=True)),
    "a stop": Case(Scenario(faults=(Fault(80, "stop"),)), Ending.STOPPED, ("checkpoint",)),
    "a loss that is not finite": Case(Scenario(faults=(Fault(60, "not finite", 1),)), Ending.NOT_FINITE, ("checkpoint",)),
    "a step that nobody can compute": Case(Scenario(faults=(Fault(60, "own everywhere", 1),)), Ending.OWN_FAULT),
    # --- losses
    "a process ends": Case(Scenario(faults=(Fault(80, "kill", 1),)), told=("lost", "generation")),
    "a node ends without a word": Case(Scenario(faults=(Fault(80, "lose node", 1),)), told=("lost", "generation")),
    "a hung rank": Case(Scenario(faults=(Fault(100, "hang", 1),)), told=("lost", "generation")),
    "a cut link": Case(Scenario(faults=(Fault(100, "cut", 1),)), told=("lost", "generation")),
    "two losses at once": Case(
        Scenario(nodes=(1, 1, 1, 1), copies=2, faults=(Fault(100, "kill", 0), Fault(100, "kill", 2, 0.2)))),
    "everybody at once": Case(Scenario(faults=(Fault(100, "kill", 0), Fault(100, "kill", 0), Fault(100, "kill", 0)))),
    "a node drains": Case(Scenario(faults=(Fault(60, "drain", 1),)), told=("draining", "generation")),
    # --- coordinators
    "a coordinator dies before state is initialised": Case(
        Scenario(faults=(Fault(18, "coordinator"),)), told=("coordinator_restarted",)),
    "a coordinator dies between steps": Case(Scenario(faults=(Fault(90, "coordinator"),)), told=("coordinator_restarted",)),
    "a coordinator dies, and a rank hangs": Case(Scenario(faults=(Fault(90, "coordinator"), Fault(90, "hang", 1, 0.1)))),
    # --- found by seeds
    "a node ends before anything began": Case(Scenario(seed=19, nodes=(1, 1), steps=2, faults=(Fault(1, "end node", 9),))),
    "no memory before the first step": Case(Scenario(seed=5375, nodes=(1, 1), steps=2, least=2, faults=(Fault(1, "memory", 4),))),
    "a drained node, and the other one hangs": Case(
        Scenario(seed=6803, nodes=(1, 1), steps=2, faults=(Fault(1, "hang", 11), Fault(1, "drain until", 4)))),
    "a step that the last node cannot compute": Case(
        Scenario(seed=22615, nodes=(1, 1), save_every=2,
                 faults=(Fault(47, "cut", 1), Fault(157, "drain until", 2), Fault(157, "own everywhere", 3))), Ending.OWN_FAULT),
    "a coordinator that stands still": Case(
        Scenario(seed=20035, nodes=(1, 1, 1, 2, 1), steps=2,
                 faults=(Fault(44, "memory", 10), Fault(88, "coordinator paused", 3, 0.139)))),
}
