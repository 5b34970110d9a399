"""Programs: what is sent where, and when receives are posted."""

from __future__ import annotations

from collections import defaultdict
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.schedule.ir.actions import ActionKind, Payload, Reduce, Transfer, parse_csv
from orchestrator.schedule.ir.check import ScheduleError, check
from orchestrator.schedule.ir.lower import lower
from orchestrator.schedule.ir.stages import BOTH, LOOP, Stages, V
from orchestrator.schedule.kinds.forward_only import forward_only
from orchestrator.schedule.kinds.registry import KINDS, TABLE, generate, smallest_microbatches

SIZES = [(2, 4), (2, 10), (4, 8), (6, 12), (8, 20)]


def of(program, kind):
    return [action for action in program.actions if action.kind is kind]


def test_a_small_program_word_for_word():
    assert list(map(str, lower(generate("dualpipe", 2, 4), lookahead=2)[0].actions)) == [
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
    for program in lower(generate("dualpipe", positions, microbatches)):
        at = program.position
        expected = [
            (payload, peer, slot, microbatch)
            for microbatch in range(microbatches // 2)
            for payload, slot, peer in [(Payload.ACTIVATION, 0, at + 1), (Payload.ACTIVATION, 1, at - 1),
                                        (Payload.GRADIENT, 0, at - 1), (Payload.GRADIENT, 1, at + 1)]
            if 0 <= peer < positions
        ]
        sends = [(a.payload, a.peer, a.slot, a.microbatch) for a in of(program, ActionKind.SEND)]
        assert sorted(sends) == sorted(expected)


@pytest.mark.parametrize("lookahead", [0, 1, 2, 5])
@pytest.mark.parametrize("positions, microbatches", SIZES)
def test_sends_and_receives_are_in_one_order_with_distinct_small_tags(positions, microbatches, lookahead):
    ends = defaultdict(lambda: ([], []))
    for program in lower(generate("dualpipe", positions, microbatches), lookahead):
        for action in program.actions:
            if isinstance(action, Transfer):
                sender, receiver = (program.position, action.peer)[:: 1 if action.kind is ActionKind.SEND else -1]
                ends[sender, receiver][action.kind is ActionKind.RECEIVE].append(action)
    for sent, received in ends.values():
        tags = [action.tag for action in sent]
        assert tags == [action.tag for action in received]
        assert [(a.payload, a.stage, a.microbatch) for a in sent] == [(a.payload, a.stage, a.microbatch) for a in received]
        assert len(set(tags)) == len(tags) and 0 <= min(tags) and max(tags) < 2 * microbatches


@pytest.mark.parametrize("lookahead", [0, 1, 2, 5])
def test_receives_are_posted_ahead(lookahead):
    for program in lower(generate("dualpipe", 8, 20), lookahead):
        actions = program.actions
        computes = [index for index, action in enumerate(actions) if hasattr(action, "computes")]
        users = {(compute.kind is ActionKind.FORWARD, compute.slot, compute.microbatch): number
                 for number, index in enumerate(computes)
                 for compute in actions[index].computes if compute.kind is not ActionKind.BACKWARD_WEIGHT}
        for index, action in enumerate(actions):
            if action.kind is ActionKind.RECEIVE:
                number = users[action.payload is Payload.ACTIVATION, action.slot, action.microbatch]
                assert index < computes[max(0, number - lookahead)]


def test_gradients_are_reduced_at_the_end():
    for program in lower(generate("dualpipe", 4, 8)):
        assert program.actions[-1] == Reduce() and len(of(program, ActionKind.REDUCE)) == 1


def test_one_position_transfers_nothing():
    assert list(map(str, lower(generate("dualpipe", 1, 2))[0].actions)) == ["F0.0", "F0.1|B0.0", "B0.1", "REDUCE"]


def test_refused():
    with pytest.raises(ValueError, match="lookahead = -1: at least 0"):
        lower(generate("dualpipe", 2, 4), -1)
    with pytest.raises(ScheduleError, match=r"position 0, action 0: F1.0 needs F1.0 of stage 0, which no position runs"):
        lower(parse_csv("F1.0\nF0.0\n", "dualpipe", Stages(BOTH, 2)))


@settings(max_examples=100, deadline=None)
@given(kind=st.sampled_from(KINDS), positions=st.sampled_from((1, 2, 3, 4, 6)), wanted=st.integers(1, 12),
       chunks=st.integers(1, 3), lookahead=st.integers(0, 4))
def test_any_kind_crosses_once_between_stages_on_different_positions(kind, positions, wanted, chunks, lookahead):
    positions += not TABLE[kind].takes(positions)
    chunks = None if TABLE[kind].chunks else chunks
    schedule = generate(kind, positions, smallest_microbatches(kind, positions, wanted, chunks), chunks)
    each = schedule.microbatches // len(schedule.stages.paths)
    expected = []
    for path in schedule.stages.paths:
        for stage, ((before, _), (after, _)) in enumerate(pairwise(path)):
            if before != after:
                expected += [(Payload.ACTIVATION, before, after, stage + 1, m) for m in range(each)]
                expected += [(Payload.GRADIENT, after, before, stage, m) for m in range(each)]
    programs = lower(schedule, lookahead)
    sent = [(a.payload, p.position, a.peer, a.stage, a.microbatch) for p in programs for a in of(p, ActionKind.SEND)]
    received = [(a.payload, a.peer, p.position, a.stage, a.microbatch) for p in programs for a in of(p, ActionKind.RECEIVE)]
    assert sorted(sent) == sorted(received) == sorted(expected)
    tags = [(p.position, a.peer, a.tag) for p in programs for a in of(p, ActionKind.SEND)]
    assert len(set(tags)) == len(tags) and all(0 <= tag < 2 * schedule.slots * each for _, _, tag in tags)


def test_a_turn_and_a_loop_of_one_position_send_nothing():
    assert not any(of(program, ActionKind.SEND) for program in lower(forward_only(Stages(LOOP, 1, 3), 2)))
    assert [str(action) for action in lower(forward_only(Stages(V, 2, 2), 1))[1].actions] == [
        "RECEIVE activation 0.0 from 0", "F0.0", "F1.0", "SEND activation 1.0 to 0"]


def outstanding(program):
    """Most receives posted whose tensors are not used, at any time."""
    most, posted = 0, set()
    for action in program.actions:
        if action.kind is ActionKind.RECEIVE:
            posted.add((action.payload, action.slot, action.microbatch))
        most = max(most, len(posted))
        for compute in getattr(action, "computes", ()):
            if compute.kind is not ActionKind.BACKWARD_WEIGHT:
                posted.discard((Payload.ACTIVATION if compute.kind is ActionKind.FORWARD else Payload.GRADIENT, compute.slot,
                                compute.microbatch))
    return most


@pytest.mark.parametrize("lookahead", [0, 2, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_never_more_than_the_bound_outstanding(kind, lookahead):
    schedule = generate(kind, 4, 12)
    free = lower(schedule, lookahead)
    least = max(map(outstanding, lower(schedule, 0)))                # nobody can do with less than posting as late as possible
    for bound in range(1, 9):
        if bound < least:
            with pytest.raises(ScheduleError, match=f"posted, one more than {bound} outstanding\n.*"):
                lower(schedule, lookahead, most_outstanding=bound)
            continue
        programs = lower(schedule, lookahead, most_outstanding=bound)
        assert max(map(outstanding, programs)) <= bound
        check(schedule, programs)
        if bound >= max(map(outstanding, free)):
            assert programs == free
    with pytest.raises(ScheduleError, match="one more than 0 outstanding"):
        lower(schedule, lookahead, most_outstanding=0)


def test_a_bound_delays_no_more_than_it_must():
    schedule = generate("1f1b", 2, 4)
    texts = [list(map(str, lower(schedule, 3, most_outstanding=bound)[1].actions)) for bound in (1, 2)]
    receive = "RECEIVE activation 0.{} from 0".format
    assert texts[0] == [receive(0), "F0.0", receive(1), "B0.0", "SEND gradient 0.0 to 0", "F0.1", receive(2), "B0.1",
                        "SEND gradient 0.1 to 0", "F0.2", receive(3), "B0.2", "SEND gradient 0.2 to 0", "F0.3", "B0.3",
                        "SEND gradient 0.3 to 0", "REDUCE"]
    assert texts[1][:4] == [receive(0), receive(1), "F0.0", receive(2)]


def test_receives_of_one_sender_that_are_used_in_another_order():
    """What is used first was sent second: so the one sent first is posted no later."""
    schedule = parse_csv("F0.0,F0.1\nF0.1,F0.0\n", "forward_only", Stages(LOOP, 2))
    for lookahead in (0, 1, 4):
        assert [str(a) for a in lower(schedule, lookahead)[1].actions] == [
            "RECEIVE activation 0.0 from 0", "RECEIVE activation 0.1 from 0", "F0.1", "F0.0"]
    with pytest.raises(ScheduleError, match=r"position 1, action 0: F0.1 needs RECEIVE activation 0.1 from 0 posted, one more"):
        lower(schedule, most_outstanding=1)
