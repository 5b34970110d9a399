"""The search's integers against the checker and the simulator, which know nothing of them."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from orchestrator.schedule.ir.actions import ActionKind, Compute, SplitAction, parse_csv, to_csv
from orchestrator.schedule.ir.check import ScheduleError, check
from orchestrator.schedule.ir.lower import lower
from orchestrator.schedule.ir.stages import LOOP, Stages
from orchestrator.schedule.kinds.registry import KINDS, generate, smallest_microbatches
from orchestrator.schedule.search.anneal import Cooling, anneal
from orchestrator.schedule.search.problem import NEVER, Problem
from orchestrator.schedule.timing.durations import UNIT, Durations, with_communication
from orchestrator.schedule.timing.simulate import simulate

COSTS = {
    "unit": UNIT,
    "communication": with_communication(UNIT, 0.913),
    "uneven": replace(with_communication(Durations(2.0, 3.0, 1.0, hop=0.3), 0.5), slowdown=(1.0, 1.5, 1.0, 0.5),
                      links={(1, 2): 4.0}),
    "a slow link": replace(with_communication(UNIT, 0.913), exchange_slowdown=(1.0, 1.0, 10.0, 1.0)),
}


def problem_of(schedule, durations, kept=100.0, splits=True):
    return Problem(schedule.stages, schedule.microbatches, durations, kept, splits=splits)


@pytest.mark.parametrize("costs", COSTS)
@pytest.mark.parametrize("kind", KINDS)
def test_makespan_and_starts_are_those_of_the_simulator(kind, costs):
    schedule = generate(kind, 4, smallest_microbatches(kind, 4, 9))
    problem = problem_of(schedule, COSTS[costs])
    rows, starts = problem.rows(schedule), [[] for _ in range(4)]
    timeline = simulate(schedule, COSTS[costs])
    assert problem.makespan(rows, starts=starts) == pytest.approx(timeline.makespan)
    for found, spans in zip(starts, timeline.rows, strict=True):
        assert found == pytest.approx([span.start for span in spans])


@pytest.mark.parametrize("kind", KINDS)
def test_rows_and_schedules_are_the_same_thing(kind):
    schedule = generate(kind, 4, smallest_microbatches(kind, 4, 9))
    problem = problem_of(schedule, UNIT)
    assert problem.schedule(problem.rows(schedule)).rows == schedule.rows


def test_a_makespan_above_the_bound_is_not_worked_out():
    schedule = generate("1f1b", 4, 8)
    problem = problem_of(schedule, UNIT)
    rows = problem.rows(schedule)
    exact = problem.makespan(rows)
    assert (problem.makespan(rows, exact), problem.makespan(rows, exact - 0.5)) == (exact, NEVER)


def test_rows_that_wait_for_each_other_take_for_ever():
    schedule = generate("1f1b", 2, 2)
    problem = problem_of(schedule, UNIT)
    rows = problem.rows(schedule)
    rows[0] = [problem.move(0, ((kind, 0, m),)) for kind, m in ((0, 0), (1, 0), (0, 1), (1, 1))]
    rows[1] = [problem.move(1, ((0, 0, m),)) for m in (0, 1)] + [problem.move(1, ((1, 0, m),)) for m in (1, 0)]
    assert problem.makespan(rows) == NEVER


def test_what_the_search_allows_is_what_the_checker_accepts():
    """Rows with one action moved, in a schedule that annealing has mixed thoroughly."""
    kept = 5
    schedule = generate("dualpipe", 4, 8)
    problem = problem_of(schedule, COSTS["communication"], kept)
    _, rows = anneal(problem, problem.rows(schedule), Cooling(3000, 0.5, 0.5, 0.2), 3)
    mixed = problem.schedule(rows)
    check(mixed, lower(mixed), most_activations=kept)
    chance, refused, accepted = random.Random(1), 0, 0
    for _ in range(400):
        position = chance.randrange(4)
        row = list(rows[position])
        row.insert(chance.randrange(len(row)), row.pop(chance.randrange(len(row))))
        changed = [*rows[:position], row, *rows[position + 1:]]
        ours = problem.allows(row) and problem.makespan(changed) < NEVER
        try:
            moved = problem.schedule(changed)
            check(moved, lower(moved), most_activations=kept)
            theirs = True
        except ScheduleError:
            theirs = False
        assert ours == theirs, to_csv(problem.schedule(changed))
        refused, accepted = refused + (not ours), accepted + ours
    assert refused > 50 and accepted > 50


def test_activations_are_counted_in_microbatches_on_all_layers_of_a_rank():
    schedule = generate("zbv", 4, 8)
    assert problem_of(schedule, UNIT, kept=4).limit == 8
    assert all(map(problem_of(schedule, UNIT, kept=4).allows, problem_of(schedule, UNIT, kept=4).rows(schedule)))
    assert not all(map(problem_of(schedule, UNIT, kept=3.5).allows, problem_of(schedule, UNIT, kept=3.5).rows(schedule)))


def test_a_split_action_is_kept_as_one():
    text = "F0.0/2,B0.0/2\nF0.0,I0.0/2,W0.0\n"
    schedule = parse_csv(text, "1f1b", Stages(LOOP, 2))
    problem = problem_of(schedule, COSTS["communication"])
    assert to_csv(problem.schedule(problem.rows(schedule))) == text
    assert problem.rows(schedule)[0][0].duration == COSTS["communication"].of(SplitAction(Compute(ActionKind.FORWARD, 0, 0, 0)))
