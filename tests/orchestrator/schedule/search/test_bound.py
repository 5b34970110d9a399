"""The lower bound: below every schedule, and met where the best schedule is known by trying all."""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.schedule.ir.check import check
from orchestrator.schedule.ir.lower import lower
from orchestrator.schedule.ir.stages import Stages
from orchestrator.schedule.search import searched
from orchestrator.schedule.search.anneal import Cooling, anneal
from orchestrator.schedule.search.bound import lower_bound
from orchestrator.schedule.search.build import build, rules
from orchestrator.schedule.search.problem import B, F, I, Problem, W
from orchestrator.schedule.timing.durations import UNIT, Durations, at, with_communication
from orchestrator.schedule.timing.simulate import makespan


def shortest_of_all(problem):
    """Every order of F, I and W, or F and B, on every position, with every lone action whole or split, and neighbours that can be
    a pair apart or paired."""
    keys = list(product(range(problem.slots), range(problem.each)))
    orders = []
    for position in range(problem.positions):
        rows = []
        for kinds in product(*[((F, I, W), (F, B))] * len(keys)):
            parts = [(kind, *key) for key, those in zip(keys, kinds) for kind in those]
            for order in permutations(parts):
                if all(order.index((F, slot, m)) < order.index((F, slot, m + 1)) for slot, m in keys if m + 1 < problem.each):
                    rows += forms(problem, position, order)
        orders.append([row for row in rows if problem.allows(row)])
    return min(problem.makespan(list(rows)) for rows in product(*orders))


def forms(problem, position, order):
    """Ways to run parts in this order."""
    if not order:
        return [[]]
    first, *rest = order
    forms_of_one = (False, True) if problem.splits and first[0] != W else (False,)
    alone = [problem.move(position, (first,), split) for split in forms_of_one]
    found = [[move, *others] for others in forms(problem, position, rest) for move in alone]
    pair = sorted(order[:2])
    if len(pair) == 2 and pair[0][0] != W and pair[0][1:] != pair[1][1:]:
        found += [[problem.move(position, tuple(pair)), *others] for others in forms(problem, position, order[2:])]
    return found


@pytest.mark.parametrize("durations", [
    UNIT, Durations(1.0, 2.0, 1.0, hop=0.25), Durations((1.0, 3.0), (2.0, 1.0), (1.0, 0.5)),
    Durations(1.0, 1.0, 1.0, slowdown=(1.0, 2.0)), Durations(1.0, 1.0, 1.0, backward=1.5),
    Durations(1.0, 1.0, 1.0, dispatch=0.5, combine=0.5, layers=1, exchange_slowdown=(4.0, 1.0)),
    Durations(1.0, 1.0, 1.0, pair=0.5),
    Durations(0.1, 0.1, 1.0, dispatch=1.0, combine=1.0, layers=2)])
@pytest.mark.parametrize("kept", [1, 2])
@pytest.mark.parametrize("positions", [1, 2])
def test_against_all_schedules_of_two_positions(durations, kept, positions):
    if positions == 1:  # of every stage's duration, the first
        names = ("forward", "backward_input", "backward_weight")
        of_stages = {name: at(getattr(durations, name), 0) for name in names}
        durations = replace(durations, **of_stages, slowdown=durations.slowdown[:1],
                            exchange_slowdown=durations.exchange_slowdown[:1])
    problem = Problem(Stages("loop", positions), 2, durations, kept, splits=positions == 1)
    best = shortest_of_all(problem)
    assert lower_bound(problem) <= best + 1e-9
    starts = [rows for chosen in rules(problem) if (rows := build(problem, chosen))]
    found = min(anneal(problem, rows, Cooling(300, 0.3, 0.05, 0.5), seed)[0] for rows in starts for seed in range(4))
    assert found == pytest.approx(best)


@pytest.mark.parametrize("slow", [(1.0, 5.0), (5.0, 1.0), (2.0, 0.5)])
def test_against_all_schedules_of_dualpipes_placement_with_a_slow_link(slow):
    """The same stage is at both positions, and communicates slowly at one of them."""
    durations = Durations((1.0, 1.5), 1.0, (0.5, 1.0), dispatch=0.5, combine=0.25, layers=1, hop=0.25, exchange_slowdown=slow)
    stages = Stages("both", 2)
    best = shortest_of_all(Problem(stages, 2, durations, 2, splits=False))
    found = searched(stages, 2, durations, 2, splits=False, effort=200_000)
    check(found.schedule, lower(found.schedule), most_activations=2)
    assert found.lower_bound <= best + 1e-9
    assert makespan(found.schedule, durations) == pytest.approx(best)


def test_it_is_met_where_a_microbatch_is_alone():
    problem = Problem(Stages("v", 4, 2), 1, Durations(1.0, 2.0, 3.0, hop=0.5), 10, splits=False)
    assert lower_bound(problem) == pytest.approx(8 * (1 + 2) + 3 + 2 * 6 * 0.5)


def test_the_middle_positions_of_dualpipe_wait_and_drain():
    """8 ranks, 32 microbatches, 9 kept, F = I = W = 1, communication 0.913 of compute, so F and I take 2.3695 alone.

    The middle: 8 F and 3 I before the first I; 3 F, 7 I and a B of 2.4945 after the last F; between them 32 - 9 microbatches, each
    at least one F|B, which takes 3.04625 with four layers.
    """
    problem = Problem(Stages("both", 8), 32, with_communication(UNIT, 0.913), 9, splits=False)
    assert lower_bound(problem) == pytest.approx(11 * 2.3695 + 10 * 2.3695 + 2.4945 + 23 * 3.0461875, rel=1e-4)


sizes = st.integers(1, 12).map(lambda n: n / 4)


@settings(max_examples=40, deadline=None)
@given(stages=st.sampled_from([Stages("both", 4), Stages("v", 3, 2), Stages("loop", 3), Stages("loop", 2, 2), Stages("v", 1, 2),
                               Stages("both", 1)]),
       microbatches=st.integers(1, 6), kept=st.integers(1, 6), splits=st.booleans(),
       forward=sizes, backward=sizes, weight=sizes, known=st.none() | sizes, dispatch=sizes, hop=sizes, slow=sizes, link=sizes)
def test_no_schedule_is_below_it(stages, microbatches, kept, splits, forward, backward, weight, known, dispatch, hop, slow, link):
    microbatches *= len(stages.paths)
    durations = Durations(forward, backward, weight, backward=known, dispatch=dispatch, combine=dispatch, hop=hop, layers=2,
                          slowdown=(slow,) + (1.0,) * (stages.positions - 1),
                          exchange_slowdown=(1.0,) * (stages.positions - 1) + (link,))
    problem = Problem(stages, microbatches, durations, kept, splits=splits)
    bound = lower_bound(problem)
    for chosen in rules(problem):
        if kept * stages.chunks >= stages.slots and (rows := build(problem, chosen)):
            assert anneal(problem, rows, Cooling(60, 0.2, 0.02, 0.6), 0)[0] >= bound - 1e-9
