"""The lower bound: below every schedule, and met where the best schedule is known by trying all."""

from __future__ import annotations

from itertools import permutations, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.schedule.durations import UNIT, Durations, with_communication
from orchestrator.schedule.search.anneal import Cooling, anneal
from orchestrator.schedule.search.bound import lower_bound
from orchestrator.schedule.search.build import build, rules
from orchestrator.schedule.search.problem import F, I, Problem, W
from orchestrator.schedule.stages import Stages


def shortest_of_all(problem, microbatches):
    """Every order of F, I and W on every position."""
    parts = [(kind, 0, m) for kind in (F, I, W) for m in range(microbatches)]
    orders = []
    for position in range(problem.positions):
        rows = [[problem.move(position, (part,)) for part in order] for order in permutations(parts)
                if all(order.index((F, 0, m)) < order.index((F, 0, m + 1)) for m in range(microbatches - 1))]
        orders.append([row for row in rows if problem.allows(row)])
    return min(problem.makespan(list(rows)) for rows in product(*orders))


@pytest.mark.parametrize("durations", [
    UNIT, Durations(1.0, 2.0, 1.0, hop=0.25), Durations((1.0, 3.0), (2.0, 1.0), (1.0, 0.5)),
    Durations(1.0, 1.0, 1.0, slowdown=(1.0, 2.0))])
@pytest.mark.parametrize("kept", [1, 2])
def test_against_all_schedules_of_two_positions(durations, kept):
    problem = Problem(Stages("loop", 2), 2, durations, kept, splits=False)
    best = shortest_of_all(problem, 2)
    assert lower_bound(problem) <= best + 1e-9
    starts = [rows for chosen in rules(problem) if (rows := build(problem, chosen))]
    found = min(anneal(problem, rows, Cooling(300, 0.3, 0.05, 0.5), 0)[0] for rows in starts)
    assert found == pytest.approx(best)


def test_it_is_met_where_a_microbatch_is_alone():
    problem = Problem(Stages("v", 4, 2), 1, Durations(1.0, 2.0, 3.0, hop=0.5), 10, splits=False)
    assert lower_bound(problem) == pytest.approx(8 * (1 + 2) + 3 + 2 * 6 * 0.5)


def test_the_middle_positions_of_dualpipe_wait_and_drain():
    """8 ranks, 32 microbatches, 9 kept, F = I = W = 1, communication 0.913 of compute, so F and I take 2.3695 alone.

    The middle: 8 F and 3 I before the first I; 3 F and 8 I and a W after the last F; between them 32 - 9 microbatches, each at
    least one F|B, which takes 3.04625 with four layers.
    """
    problem = Problem(Stages("both", 8), 32, with_communication(UNIT, 0.913), 9, splits=False)
    assert lower_bound(problem) == pytest.approx(11 * 2.3695 + 11 * 2.3695 + 1 + 23 * 3.0461875, rel=1e-4)


sizes = st.integers(1, 12).map(lambda n: n / 4)


@settings(max_examples=40, deadline=None)
@given(stages=st.sampled_from([Stages("both", 4), Stages("v", 3, 2), Stages("loop", 3), Stages("loop", 2, 2)]),
       microbatches=st.integers(1, 5).map(lambda n: 2 * n), kept=st.integers(2, 6), splits=st.booleans(),
       forward=sizes, backward=sizes, weight=sizes, dispatch=sizes, hop=sizes, slow=sizes)
def test_no_schedule_is_below_it(stages, microbatches, kept, splits, forward, backward, weight, dispatch, hop, slow):
    durations = Durations(forward, backward, weight, dispatch=dispatch, combine=dispatch, hop=hop, layers=2,
                          slowdown=(slow,) + (1.0,) * (stages.positions - 1))
    problem = Problem(stages, microbatches, durations, kept, splits=splits)
    bound = lower_bound(problem)
    for chosen in rules(problem):
        if rows := build(problem, chosen):
            assert anneal(problem, rows, Cooling(60, 0.2, 0.02, 0.6), 0)[0] >= bound - 1e-9
