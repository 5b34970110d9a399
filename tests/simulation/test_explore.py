"""The state machine of the protocol in a world that tries to break it: some seconds of random seeds, the scenarios that went
wrong once, a large run; and that the explorer finds what it is there for."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest

from orchestrator.protocol.events import Ending
from tests.simulation.defects import DEFECTS, find
from tests.simulation.explore import explore, large, pairs, seeds, tried
from tests.simulation.invariants import Violation
from tests.simulation.scenarios import SCENARIOS
from tests.simulation.settings import Fault, Scenario
from tests.simulation.shrink import line, shrunk
from tests.simulation.world import World

SECONDS_OF_A_DEFECT = 30.0
LONG_SECONDS = 60.0
"""Of CPU. `python -m tests.simulation.explore --seconds` and `--exhaustive` search for as long as one likes."""


def _all(explored) -> list[str]:
    return [f"{line(scenario)}  # {violation}" for cases in explored.found.values() for scenario, violation in cases]


def test_random_seeds_break_no_invariant():
    explored = explore(seeds(0), 20.0)
    assert not _all(explored)
    assert explored.runs > 500


def test_two_faults_at_two_places_break_no_invariant():
    explored = explore(pairs(2), 3.0)
    assert not _all(explored)


@pytest.mark.long
@pytest.mark.parametrize("ranks", [2, 3])
def test_two_faults_at_every_two_places_break_no_invariant(ranks):
    assert not _all(explore(pairs(ranks), LONG_SECONDS))


@pytest.mark.long
def test_many_random_seeds_break_no_invariant():
    assert not _all(explore(seeds(1_000_000), LONG_SECONDS))


@pytest.mark.parametrize("name", SCENARIOS)
def test_scenario(name):
    case = SCENARIOS[name]
    world = World(case.scenario)
    assert world.run().ending is case.ending
    told = iter([event.name for event in world.told])
    assert all(kind in told for kind in case.told), [event.name for event in world.told]


def test_two_coordinators_that_each_find_that_the_other_has_taken_over_both_end_and_leave_ranks_alone():
    """One was frozen, and writes before its successor could: a third one goes on with the same processes, and no step is lost."""
    scenario, found = SCENARIOS["two coordinators that each find that the other has taken over"].scenario, 0
    for seed in range(40):  # in some of them the first one writes just then
        world = World(replace(scenario, seed=seed))
        before = set(world.alive())
        world.run()
        if world.ended == {1: Ending.SUPERSEDED, 2: Ending.SUPERSEDED, 3: Ending.DONE}:
            found += 1
            assert set(world.alive()) == before and not {"lost", "state_lost"} & {event.name for event in world.told}
    assert found


def test_a_run_is_the_same_each_time():
    scenario = Scenario(seed=7, place_every=2, faults=(Fault(60, "kill", 1), Fault(120, "coordinator")))
    first, second = World(scenario), World(scenario)
    for world in (first, second):
        world.trace = []
        world.run()
    assert first.trace == second.trace
    assert first.count == second.count


@pytest.mark.parametrize("name", DEFECTS)
def test_a_correction_that_is_undone_is_found(name):
    explored = find(name, SECONDS_OF_A_DEFECT)
    assert explored.found, f"{explored.runs} runs"


def test_a_violation_is_shrunk_to_what_it_needs():
    name = "a newcomer's own fault ends the run"
    defect, explored = DEFECTS[name], find(name, SECONDS_OF_A_DEFECT)
    (scenario, violation), = explored.found["L2"]

    def broken(candidate: Scenario) -> Violation | None:
        with defect.there():
            return tried(candidate)[0]

    assert broken(scenario).text == violation.text
    small = shrunk(scenario, broken)
    assert broken(small).rule == "L2"
    assert len(small.faults) <= 2
    assert len(small.nodes) <= len(scenario.nodes)
    assert eval(line(small), {"Scenario": Scenario, "Fault": Fault}) == small


def test_two_thousand_ranks_lose_a_node():
    began = time.process_time()
    world = World(large(2048))
    end = world.run()
    assert (end.ending, end.step) == (Ending.DONE, 6)
    assert "lost" in [event.name for event in world.told]
    assert time.process_time() - began < 60.0
