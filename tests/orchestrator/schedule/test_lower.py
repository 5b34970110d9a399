"""Programs: what is sent where, and when receives are posted."""

from __future__ import annotations

from collections import defaultdict

import pytest

from orchestrator.schedule.actions import Kind, Payload, Reduce, Transfer, parse_csv
from orchestrator.schedule.check import ScheduleError
from orchestrator.schedule.dualpipe import dualpipe
from orchestrator.schedule.lower import lower

SIZES = [(2, 4), (2, 10), (4, 8), (6, 12), (8, 20)]


def of(program, kind):
    return [action for action in program.actions if action.kind is kind]


def test_a_small_program_word_for_word():
    assert list(map(str, lower(dualpipe(2, 4))[0].actions)) == [
        "RECEIVE activation 1.0 from 1",
        "F0.0", "SEND activation 0.0 to 1",
        "F1.0",
        "RECEIVE activation 1.1 from 1", "RECEIVE gradient 0.0 from 1",
        "F0.1", "SEND activation 0.1 to 1",
        "B1.0", "SEND gradient 1.0 to 1",
        "RECEIVE gradient 0.1 from 1",
        "F1.1|B0.0",
        "B1.1", "SEND gradient 1.1 to 1",
        "I0.1", "W0.1",
        "REDUCE",
    ]


@pytest.mark.parametrize("positions, microbatches", SIZES)
def test_what_crosses(positions, microbatches):
    """Each microbatch crosses each boundary between stages once down and once up, between neighbours."""
    for program in lower(dualpipe(positions, microbatches)):
        at = program.position
        expected = [
            (payload, peer, slot, microbatch)
            for microbatch in range(microbatches // 2)
            for payload, slot, peer in [(Payload.ACTIVATION, 0, at + 1), (Payload.ACTIVATION, 1, at - 1),
                                        (Payload.GRADIENT, 0, at - 1), (Payload.GRADIENT, 1, at + 1)]
            if 0 <= peer < positions
        ]
        sends = [(a.payload, a.peer, a.slot, a.microbatch) for a in of(program, Kind.SEND)]
        assert sorted(sends) == sorted(expected)


@pytest.mark.parametrize("lookahead", [0, 1, 2, 5])
@pytest.mark.parametrize("positions, microbatches", SIZES)
def test_sends_and_receives_are_in_one_order_with_distinct_small_tags(positions, microbatches, lookahead):
    ends = defaultdict(lambda: ([], []))
    for program in lower(dualpipe(positions, microbatches), lookahead):
        for action in program.actions:
            if isinstance(action, Transfer):
                sender, receiver = (program.position, action.peer)[:: 1 if action.kind is Kind.SEND else -1]
                ends[sender, receiver][action.kind is Kind.RECEIVE].append(action)
    for sent, received in ends.values():
        tags = [action.tag for action in sent]
        assert tags == [action.tag for action in received]
        assert [(a.payload, a.stage, a.microbatch) for a in sent] == [(a.payload, a.stage, a.microbatch) for a in received]
        assert len(set(tags)) == len(tags) and 0 <= min(tags) and max(tags) < 2 * microbatches


@pytest.mark.parametrize("lookahead", [0, 1, 2, 5])
def test_receives_are_posted_ahead(lookahead):
    for program in lower(dualpipe(8, 20), lookahead):
        actions = program.actions
        computes = [index for index, action in enumerate(actions) if hasattr(action, "halves")]
        users = {(half.kind is Kind.FORWARD, half.slot, half.microbatch): number for number, index in enumerate(computes)
                 for half in actions[index].halves if half.kind is not Kind.BACKWARD_WEIGHT}
        for index, action in enumerate(actions):
            if action.kind is Kind.RECEIVE:
                number = users[action.payload is Payload.ACTIVATION, action.slot, action.microbatch]
                assert index < computes[max(0, number - lookahead)]


def test_gradients_are_reduced_at_the_end():
    for program in lower(dualpipe(4, 8)):
        assert program.actions[-1] == Reduce() and len(of(program, Kind.REDUCE)) == 1


def test_one_position_transfers_nothing():
    assert list(map(str, lower(dualpipe(1, 2))[0].actions)) == ["F0.0", "F0.1|B0.0", "B0.1", "REDUCE"]


def test_refused():
    with pytest.raises(ValueError, match="lookahead = -1: at least 0"):
        lower(dualpipe(2, 4), -1)
    with pytest.raises(ScheduleError, match=r"position 0, action 0: F1.0 needs F1.0 of stage 0, which no position runs"):
        lower(parse_csv("F1.0\nF0.0\n"))
