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
    "two coordinators that each find that the other has taken over": Case(
        Scenario(seed=8, steps=3, save_every=0, faults=(Fault(59, "coordinator replaced"), Fault(59, "storage away", 0, 0.7))),
        told=("storage_away", "coordinator_restarted", "generation")),
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
    "a link is cut under a new coordinator while groups are made": Case(
        Scenario(seed=20015040, nodes=(1, 1, 1, 1, 2), steps=2, spread=4.0,
                 faults=(Fault(33, "coordinator replaced", 0), Fault(1, "cut for good", 8)))),
    "no memory, then a cut link while groups are made": Case(
        Scenario(seed=20026077, nodes=(1, 1, 1, 1, 1), steps=2, spread=4.0, faults=(Fault(43, "memory", 1), Fault(267, "cut", 6)))),
    "all processes of a node have ended when a coordinator takes over": Case(
        Scenario(seed=3010012406, nodes=(2, 1), steps=3, min_nodes=2, spread=4.0,
                 faults=(Fault(83, "faulty heir", 3), Fault(83, "flap", 10, 33.3), Fault(276, "kill", 0),
                         Fault(276, "coordinator replaced", 2, 36.8)))),
    "one end of a cut link ends while groups are made": Case(
        Scenario(seed=30007807, steps=2, faults=(Fault(18, "cut both", 2), Fault(18, "kill", 5)))),
    "a process comes as a hung one's time ends": Case(
        Scenario(seed=20028429, steps=5, save_every=2, spread=4.0, cold=True,
                 faults=(Fault(100, "no batches", 1), Fault(182, "hang", 3), Fault(182, "flap", 8, 35.6)))),
    "one end of two cut links, tried with one other at a time": Case(
        Scenario(seed=60007432, save_every=2, min_nodes=2, copies=0,
                 faults=(Fault(175, "cut for good", 2), Fault(221, "coordinator", 7), Fault(313, "cut for good", 4)))),
    "a step that nobody can compute, while newcomers come": Case(
        Scenario(seed=61002076, steps=3, save_every=2, validate_every=2, place_every=2, min_nodes=2,
                 faults=(Fault(55, "memory", 4), Fault(56, "own everywhere", 10), Fault(190, "kill", 11))), Ending.OWN_FAULT),
    "a step that nobody can compute, when links have cost almost all trials": Case(
        Scenario(seed=62022545, nodes=(1, 1), steps=2, min_nodes=2,
                 faults=(Fault(42, "flap", 2), Fault(42, "cut", 9), Fault(1, "own everywhere", 8))), Ending.OWN_FAULT),
    "a link that is cut for longer than five joins take": Case(
        Scenario(seed=63012737, nodes=(1, 1), steps=2, least=2, spread=4.0, faults=(Fault(49, "cut", 8), Fault(49, "own everywhere", 11)))),
    "storage is away before a long recovery": Case(
        Scenario(seed=200046342, steps=3, spread=4.0, faults=(Fault(122, "storage away", 7), Fault(30, "hung heir", 0, 28.3)))),
    "what hung with enough nodes is not waiting for nodes": Case(
        Scenario(seed=40007211, nodes=(1, 1), steps=2, min_nodes=2, wait=30.0, faults=(Fault(1, "hung heir", 4),))),
    "a step that nobody can compute, and the other node is gone but listed": Case(
        Scenario(seed=6040021008, nodes=(1, 1), steps=5, place_every=3, spread=4.0,
                 faults=(Fault(105, "end node", 10), Fault(197, "coordinator", 9), Fault(77, "own everywhere", 4))), Ending.OWN_FAULT),
    "a node ends while nobody looks, and is back when somebody does": Case(
        Scenario(seed=77214817, nodes=(1, 2, 1), steps=3, save_every=2, wait=30.0,
                 faults=(Fault(119, "coordinator paused", 1), Fault(131, "end node", 10)))),
}
