from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.schedule.ir.check import check
from orchestrator.schedule.ir.lower import lower
from orchestrator.schedule.ir.stages import Stages
from orchestrator.schedule.search.build import build, rules
from orchestrator.schedule.search.problem import Problem
from orchestrator.schedule.timing.durations import UNIT, with_communication
from orchestrator.schedule.timing.simulate import simulate

PLACEMENTS = [Stages("both", 4), Stages("both", 3), Stages("v", 3, 2), Stages("v", 2, 4), Stages("loop", 4), Stages("loop", 3, 3)]


@settings(max_examples=40, deadline=None)
@given(stages=st.sampled_from(PLACEMENTS), microbatches=st.integers(1, 7), kept=st.integers(1, 5), splits=st.booleans(),
       ratio=st.sampled_from([0.0, 0.9]))
def test_what_is_built_is_complete_and_keeps_within_the_bound(stages, microbatches, kept, splits, ratio):
    """Two directions need room for one microbatch each; everything else works with room for one."""
    microbatches *= len(stages.paths)
    kept = max(kept, stages.slots // stages.chunks)
    durations = with_communication(UNIT, ratio)
    problem = Problem(stages, microbatches, durations, kept, splits=splits)
    for chosen in rules(problem):
        rows = build(problem, chosen)
        assert rows is not None, chosen
        schedule = problem.schedule(rows)
        check(schedule, lower(schedule), most_activations=kept * stages.chunks)
        assert simulate(schedule, durations).makespan == pytest.approx(problem.makespan(rows))


def test_rules_differ_in_what_they_build():
    problem = Problem(Stages("both", 4), 16, with_communication(UNIT, 0.9), 5, splits=False)
    rows = [build(problem, chosen) for chosen in rules(problem)]
    assert sum(a != b for a, b in product(rows, rows)) > len(rows)
