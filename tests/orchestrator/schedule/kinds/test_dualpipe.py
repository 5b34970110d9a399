"""DualPipe against rows taken from a simulation of the released code, and against its counts in closed form."""

from __future__ import annotations

import re
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.refusal import ConfigError
from orchestrator.schedule.ir.actions import ActionKind, Pair, parse_csv, to_csv
from orchestrator.schedule.ir.check import check, peak_activations
from orchestrator.schedule.ir.lower import lower
from orchestrator.schedule.kinds.registry import generate

GOLDEN = {
    (2, 4): """\
F0.0,F1.0,F0.1,B1.0,F1.1|B0.0,B1.1,I0.1,W0.1
F1.0,F0.0,F1.1,B0.0,F0.1|B1.0,B0.1,I1.1,W1.1
""",
    (4, 10): """\
F0.0,F0.1,F0.2,F1.0,I1.0,W1.0,F1.1,F0.3|B1.1,F1.2|B0.0,F0.4|B1.2,F1.3|B0.1,B1.3,F1.4|B0.2,B1.4,I0.3,W0.3,I0.4,W0.4
F0.0,F1.0,F0.1,F1.1,F0.2,B1.0,F1.2|B0.0,F0.3|B1.1,F1.3|B0.1,F0.4|B1.2,F1.4|B0.2,B1.3,B0.3,I1.4,I0.4,W1.4,W0.4
F1.0,F0.0,F1.1,F0.1,F1.2,B0.0,F0.2|B1.0,F1.3|B0.1,F0.3|B1.1,F1.4|B0.2,F0.4|B1.2,B0.3,B1.3,I0.4,I1.4,W0.4,W1.4
F1.0,F1.1,F1.2,F0.0,I0.0,W0.0,F0.1,F1.3|B0.1,F0.2|B1.0,F1.4|B0.2,F0.3|B1.1,B0.3,F0.4|B1.2,B0.4,I1.3,W1.3,I1.4,W1.4
""",
    (8, 20): """\
F0.0,F0.1,F0.2,F0.3,F0.4,F0.5,F0.6,F1.0,I1.0,W1.0,F1.1,I1.1,W1.1,F1.2,I1.2,W1.2,F1.3,F0.7|B1.3,F1.4|B0.0,F0.8|B1.4,\
F1.5|B0.1,F0.9|B1.5,F1.6|B0.2,B1.6,F1.7|B0.3,B1.7,F1.8|B0.4,B1.8,F1.9|B0.5,B1.9,I0.6,W0.6,I0.7,W0.7,I0.8,W0.8,I0.9,W0.9
F0.0,F0.1,F0.2,F0.3,F0.4,F1.0,F0.5,F1.1,I1.0,W1.0,F1.2,I1.1,W1.1,F1.3,F0.6|B1.2,F1.4|B0.0,F0.7|B1.3,F1.5|B0.1,F0.8|B1.4,\
F1.6|B0.2,F0.9|B1.5,F1.7|B0.3,B1.6,F1.8|B0.4,B1.7,F1.9|B0.5,B1.8,B0.6,I1.9,I0.7,W1.9,I0.8,W0.7,I0.9,W0.8,W0.9
F0.0,F0.1,F0.2,F1.0,F0.3,F1.1,F0.4,F1.2,I1.0,W1.0,F1.3,F0.5|B1.1,F1.4|B0.0,F0.6|B1.2,F1.5|B0.1,F0.7|B1.3,F1.6|B0.2,F0.8|B1.4,\
F1.7|B0.3,F0.9|B1.5,F1.8|B0.4,B1.6,F1.9|B0.5,B1.7,B0.6,B1.8,I0.7,I1.9,I0.8,W0.7,I0.9,W1.9,W0.8,W0.9
F0.0,F1.0,F0.1,F1.1,F0.2,F1.2,F0.3,F1.3,F0.4,B1.0,F1.4|B0.0,F0.5|B1.1,F1.5|B0.1,F0.6|B1.2,F1.6|B0.2,F0.7|B1.3,F1.7|B0.3,\
F0.8|B1.4,F1.8|B0.4,F0.9|B1.5,F1.9|B0.5,B1.6,B0.6,B1.7,B0.7,I1.8,I0.8,I1.9,I0.9,W1.8,W0.8,W1.9,W0.9
""",
}

SIZES = st.builds(lambda half, more: (2 * half, 4 * half + 2 * more), st.integers(1, 8), st.integers(0, 12))


def mirrored(line: str) -> str:
    """The row with its directions swapped."""
    return re.sub(r"(?<=[FBIW])[01](?=\.)", lambda slot: "10"[int(slot[0])], line)


@pytest.mark.parametrize("positions, microbatches", GOLDEN)
def test_rows_are_those_of_the_released_code(positions, microbatches):
    golden = GOLDEN[positions, microbatches].splitlines()
    if len(golden) < positions:
        golden += [mirrored(line) for line in reversed(golden)]
    assert to_csv(generate("dualpipe", positions, microbatches)).splitlines() == golden


@settings(max_examples=15, deadline=None)
@given(SIZES)
def test_counts_in_closed_form(sizes):
    positions, microbatches = sizes
    half, each = positions // 2, microbatches // 2
    for position, row in enumerate(generate("dualpipe", positions, microbatches).rows):
        h = min(position, positions - 1 - position)
        kinds = Counter(action.kind for action in row)
        pairs = 2 * (each - positions + h + 1) + (half - h - 1) - (h == half - 1)
        assert kinds[ActionKind.PAIR] == pairs
        assert kinds[ActionKind.FORWARD] == microbatches - pairs
        assert kinds[ActionKind.BACKWARD_INPUT] == kinds[ActionKind.BACKWARD_WEIGHT] == positions - 1 - h
        assert kinds[ActionKind.BACKWARD] == microbatches - pairs - kinds[ActionKind.BACKWARD_INPUT]


@settings(max_examples=15, deadline=None)
@given(SIZES)
def test_invariants_at_any_size(sizes):
    schedule = generate("dualpipe", *sizes)
    assert check(schedule, lower(schedule)) == (sizes[0] + 1,) * sizes[0]
    assert parse_csv(to_csv(schedule), schedule.kind, schedule.stages) == schedule
    lines = to_csv(schedule).splitlines()
    assert lines[::-1] == [mirrored(line) for line in lines]
    for row in schedule.rows:
        splits = [[(a.slot, a.microbatch) for a in row if a.kind is kind]
                  for kind in (ActionKind.BACKWARD_INPUT, ActionKind.BACKWARD_WEIGHT)]
        assert splits[0] == splits[1], "weights are taken first in, first out"
        assert all(a.first.slot != a.second.slot for a in row if isinstance(a, Pair))


@pytest.mark.parametrize("microbatches, line", [
    (1, "F0.0,B0.0"),
    (3, "F0.0,F0.1|B0.0,F0.2|B0.1,B0.2"),
])
def test_one_position(microbatches, line):
    schedule = generate("dualpipe", 1, microbatches)
    assert to_csv(schedule) == line + "\n"
    assert check(schedule, lower(schedule)) == (min(microbatches, 2),) == peak_activations(schedule)


@pytest.mark.parametrize("positions, microbatches, message", [
    (3, 12, "positions = 3: dualpipe takes 1 or an even number"),
    (0, 12, "positions = 0: dualpipe takes 1 or an even number"),
    (-2, 12, "positions = -2: dualpipe takes 1 or an even number"),
    (1, 0, "microbatches = 0: dualpipe takes at least 1"),
    (4, 6, "microbatches = 6: dualpipe takes an even number, at least 8 (2 x positions)"),
    (4, 9, "microbatches = 9: dualpipe takes an even number, at least 8 (2 x positions)"),
])
def test_refused_in_one_line(positions, microbatches, message):
    with pytest.raises(ConfigError) as refusal:
        generate("dualpipe", positions, microbatches)
    assert str(refusal.value) == message
