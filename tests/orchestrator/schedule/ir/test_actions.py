"""Actions as values and as text."""

from __future__ import annotations

import pytest

from orchestrator.schedule.ir.actions import (
    ActionKind,
    Compute,
    Pair,
    Schedule,
    SplitAction,
    Transfer,
    dependencies,
    parse_csv,
    to_csv,
)
from orchestrator.schedule.ir.stages import BOTH, LOOP, Stages, V

TWO = Stages(BOTH, 2)
F, B, I, W = ActionKind.FORWARD, ActionKind.BACKWARD, ActionKind.BACKWARD_INPUT, ActionKind.BACKWARD_WEIGHT

SMALL = """\
F0.0,F1.0,F0.1,B1.0,F1.1|B0.0,B1.1,I0.1,W0.1
F1.0,F0.0,F1.1,B0.0,F0.1|B1.0,B0.1,I1.1,W1.1
"""


def test_text_becomes_values_and_back():
    schedule = parse_csv(SMALL, "dualpipe", TWO)
    assert (schedule.positions, schedule.microbatches, to_csv(schedule)) == (2, 4, SMALL)
    assert schedule.rows[0][0] == Compute(F, stage=0, slot=0, microbatch=0)
    assert schedule.rows[0][1] == Compute(F, stage=1, slot=1, microbatch=0)
    assert schedule.rows[1][4] == Pair(Compute(F, 1, 0, 1), Compute(B, 0, 1, 0))
    assert schedule.rows[1][7] == Compute(W, 0, 1, 1)


@pytest.mark.parametrize("word, value", [
    ("F0.1|F1.0", Pair(Compute(F, 0, 0, 1), Compute(F, 1, 1, 0))),
    ("F0.1|W0.0", Pair(Compute(F, 0, 0, 1), Compute(W, 0, 0, 0))),
    ("B1.0|I0.0", Pair(Compute(B, 1, 1, 0), Compute(I, 0, 0, 0))),
    ("F0.1/2", SplitAction(Compute(F, 0, 0, 1))),
    ("I1.0/2", SplitAction(Compute(I, 1, 1, 0))),
])
def test_pairs_of_all_kinds_and_splits_round_trip(word, value):
    text = f"{word}\nF0.1\n"
    schedule = parse_csv(text, "dualpipe", TWO)
    assert schedule.rows[0] == (value,)
    assert to_csv(schedule) == text


def test_a_split_is_the_whole_action_to_others():
    schedule = parse_csv(SMALL.replace("F0.1,", "F0.1/2,"), "dualpipe", TWO)
    split, whole = schedule.rows[1][4].first, Compute(F, 1, 0, 1)
    assert split == whole
    assert schedule.rows[0][2].computes == (Compute(F, 0, 0, 1),)
    assert dependencies(SplitAction(whole), schedule) == dependencies(whole, schedule) == (Compute(F, 0, 0, 1),)


@pytest.mark.parametrize("word, quoted", [
    *((word, word) for word in (
        "F0.3junk", " F0.3", "F0.03", "F0", "X0.3", "f0.3", "F0.-1", "", "F2.0", "F٣.0", "F0.9999999999", "F0.3/3", "F0.3/2/2",
        "W0.1/2")),
    ("F0.3|", ""), ("F0.3|B0.1x", "B0.1x"), ("F0.3|B0.1|B0.2", "F0.3|B0.1|B0.2"), ("B0.1|F0.3", "B0.1|F0.3"),
    ("W0.1|W0.0", "W0.1|W0.0"), ("F0.1|B0.1", "F0.1|B0.1"), ("F0.1/2|B0.0", "F0.1/2"), ("F0.1\r", "F0.1\r"),
])
def test_what_is_no_action_is_refused_and_quoted(word, quoted):
    with pytest.raises(ValueError, match="position 0") as refusal:
        parse_csv(SMALL.replace("F0.1,", word + ",", 1), "dualpipe", TWO)
    assert repr(quoted) in str(refusal.value)


@pytest.mark.parametrize("stages, slot, route", [
    (Stages(BOTH, 1), 0, [(0, 0)]),
    (Stages(BOTH, 4), 0, [(0, 0), (1, 0), (2, 0), (3, 0)]),
    (Stages(BOTH, 4), 1, [(3, 1), (2, 1), (1, 1), (0, 1)]),
    (Stages(V, 2, 2), 1, [(0, 0), (1, 0), (1, 1), (0, 1)]),
    (Stages(LOOP, 2, 2), 1, [(0, 0), (1, 0), (0, 1), (1, 1)]),
])
def test_route(stages, slot, route):
    assert list(Schedule("searched", stages, 8, ()).route(slot, 3)) == route


@pytest.mark.parametrize("stages, slot, microbatch", [
    (Stages(BOTH, 1), 1, 0), (Stages(BOTH, 4), 2, 0), (Stages(BOTH, 4), 0, 4), (Stages(BOTH, 4), 1, -1), (Stages(V, 4, 2), 1, 8),
])
def test_no_such_microbatch(stages, slot, microbatch):
    with pytest.raises(ValueError, match="no microbatch"):
        Schedule("searched", stages, 8, ()).route(slot, microbatch)


def test_entries():
    assert list(Schedule("searched", Stages(BOTH, 2), 4, ()).entries()) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert list(Schedule("searched", Stages(V, 2, 2), 3, ()).entries()) == [(0, 0), (0, 1), (0, 2)]


def test_lines_are_positions():
    with pytest.raises(ValueError, match="2 lines for 3 positions"):
        parse_csv(SMALL, "searched", Stages(BOTH, 3))


def test_chunks_are_told_to_the_parser():
    text = "F0.0,F1.0,F2.0,B2.0,B1.0,B0.0\n"
    schedule = parse_csv(text, "interleaved_1f1b", Stages(LOOP, 1, 3))
    assert (schedule.slots, schedule.microbatches, to_csv(schedule)) == (3, 1, text)


def test_dependencies_from_slot_to_slot():
    """Down a V and up again: the turn is on one position, and slots differ on its two sides."""
    schedule = Schedule("zbv", Stages(V, 2, 2), 1, ((), ()))
    assert dependencies(Compute(F, 2, 1, 0), schedule) == (Compute(F, 1, 0, 0),)
    assert dependencies(Compute(B, 1, 0, 0), schedule) == (Compute(F, 1, 0, 0), Compute(B, 2, 1, 0))
    loop = Schedule("interleaved_1f1b", Stages(LOOP, 2, 2), 1, ((), ()))
    assert dependencies(Compute(F, 2, 1, 0), loop) == (Compute(F, 1, 0, 0),)


def test_dependencies():
    schedule = parse_csv(SMALL, "dualpipe", TWO)
    assert dependencies(Compute(F, 0, 0, 1), schedule) == ()
    assert dependencies(Compute(F, 1, 1, 0), schedule) == (Compute(F, 0, 1, 0),)
    assert dependencies(Compute(B, 1, 0, 0), schedule) == (Compute(F, 1, 0, 0),)
    assert dependencies(Compute(I, 0, 0, 1), schedule) == (Compute(F, 0, 0, 1), Compute(B, 1, 0, 1))
    assert dependencies(Compute(W, 0, 0, 1), schedule) == (Compute(I, 0, 0, 1),)
    pair = Pair(Compute(F, 1, 1, 1), Compute(B, 0, 0, 0))
    assert set(dependencies(pair, schedule)) == {Compute(F, 0, 1, 1), Compute(F, 0, 0, 0), Compute(B, 1, 0, 0)}


def test_a_backward_waits_for_the_split_backward_of_the_next_stage():
    schedule = Schedule("dualpipe", Stages(BOTH, 2), 4, ((Compute(B, 0, 0, 0),), (Compute(I, 1, 0, 0), Compute(W, 1, 0, 0))))
    assert dependencies(Compute(B, 0, 0, 0), schedule) == (Compute(F, 0, 0, 0), Compute(I, 1, 0, 0))


def test_values_of_the_wrong_kind_are_refused():
    with pytest.raises(ValueError, match="SEND is no compute action"):
        Compute(ActionKind.SEND, 0, 0, 0)
    with pytest.raises(ValueError, match=r"W0.0\|W0.1 is no pair"):
        Pair(Compute(W, 0, 0, 0), Compute(W, 0, 0, 1))
    with pytest.raises(ValueError, match="both of one microbatch"):
        Pair(Compute(F, 0, 0, 0), Compute(B, 0, 0, 0))
    with pytest.raises(ValueError, match="W0.0 has no communication to hide"):
        SplitAction(Compute(W, 0, 0, 0))
    with pytest.raises(ValueError, match="REDUCE is no transfer"):
        Transfer(ActionKind.REDUCE, "activation", 1, 1, 0, 0, 0)
