"""The evaluation schedule: right, and as short as any can be."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.refusal import ConfigError
from orchestrator.schedule.ir.actions import ActionKind, Reduce, to_csv
from orchestrator.schedule.ir.check import check
from orchestrator.schedule.ir.lower import lower
from orchestrator.schedule.ir.stages import BOTH, LOOP, Stages, V
from orchestrator.schedule.kinds.forward_only import forward_only
from orchestrator.schedule.timing.durations import UNIT
from orchestrator.schedule.timing.simulate import simulate

EVERY = st.one_of(
    st.builds(Stages, st.just(BOTH), st.integers(1, 10)),
    st.builds(Stages, st.just(V), st.integers(1, 7), st.sampled_from([2, 4, 6])),
    st.builds(Stages, st.just(LOOP), st.integers(1, 7), st.integers(1, 4)),
)


def shortest(stages: Stages, microbatches: int) -> int:
    """No order is shorter: a position waits for the first microbatch, runs all, and the last one goes on to its end.

    With fewer microbatches than positions, time is bound by the last microbatch of an entrance, which goes through all stages.
    On the turn of a V it cannot leave before the two stages there have run all microbatches.
    """
    bounds = [stages.count]
    for position in range(stages.positions):
        here = [(stage, len(path) - 1 - stage) for path in stages.paths for stage, place in enumerate(path)
                if place[0] == position]
        each = microbatches // len(stages.paths)
        bounds.append(min(before for before, _ in here) + each * len(here) + min(after for _, after in here))
    if stages.placement == LOOP:
        bounds.append(microbatches - 1 + stages.count)
    if stages.placement == V:
        bounds.append(stages.positions - 1 + 2 * microbatches + stages.count - stages.positions - 1)
    return max(bounds)


@settings(max_examples=80, deadline=None)
@given(EVERY, st.integers(1, 20))
def test_right_and_shortest(stages, wanted):
    microbatches = stages.shared_evenly(wanted)
    schedule = forward_only(stages, microbatches)
    programs = lower(schedule)
    assert check(schedule, programs, most_activations=1) == (1,) * stages.positions
    assert all(compute.kind is ActionKind.FORWARD for row in schedule.rows for action in row for compute in action.computes)
    assert not any(isinstance(action, Reduce) for program in programs for action in program.actions)
    assert simulate(schedule, UNIT).makespan == shortest(stages, microbatches)


@pytest.mark.parametrize("stages, microbatches, text", [
    (Stages(BOTH, 2), 6, "F0.0,F1.0,F0.1,F1.1,F0.2,F1.2\nF1.0,F0.0,F1.1,F0.1,F1.2,F0.2\n"),
    (Stages(BOTH, 1), 3, "F0.0,F0.1,F0.2\n"),
    (Stages(LOOP, 2), 3, "F0.0,F0.1,F0.2\n" * 2),
    (Stages(LOOP, 2, 2), 3, "F0.0,F0.1,F0.2,F1.0,F1.1,F1.2\n" * 2),
    (Stages(LOOP, 2, 2), 4, "F0.0,F0.1,F1.0,F1.1,F0.2,F0.3,F1.2,F1.3\n" * 2),
    (Stages(V, 1, 4), 2, "F0.0,F1.0,F2.0,F3.0,F0.1,F1.1,F2.1,F3.1\n"),
    (Stages(V, 2, 2), 3, "F0.0,F0.1,F1.0,F0.2,F1.1,F1.2\nF0.0,F1.0,F0.1,F1.1,F0.2,F1.2\n"),
])
def test_by_hand(stages, microbatches, text):
    assert to_csv(forward_only(stages, microbatches)) == text


@pytest.mark.parametrize("stages, microbatches, message", [
    (Stages(BOTH, 2), 3, "microbatches = 3: forward_only takes an even number, at least 2, with two entrances"),
    (Stages(BOTH, 1), 0, "microbatches = 0: forward_only takes at least 1"),
    (Stages(V, 3, 2), -1, "microbatches = -1: forward_only takes at least 1"),
])
def test_refused_in_one_line(stages, microbatches, message):
    with pytest.raises(ConfigError) as refusal:
        forward_only(stages, microbatches)
    assert str(refusal.value) == message
