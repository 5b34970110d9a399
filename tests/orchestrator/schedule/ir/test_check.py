"""The checker against a twin that runs programs with self-describing tensors and knows nothing of `dependencies`."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.schedule.ir.actions import (
    ActionKind,
    Compute,
    Pair,
    Program,
    Reduce,
    Schedule,
    SplitAction,
    Transfer,
    parse_csv,
    to_csv,
)
from orchestrator.schedule.ir.check import ScheduleError, check, peak_activations, relative_activations
from orchestrator.schedule.ir.graph import compiled
from orchestrator.schedule.ir.lower import lower
from orchestrator.schedule.ir.stages import BOTH, FORWARD_ONLY, LOOP, SEARCHED, Stages
from orchestrator.schedule.kinds.forward_only import forward_only
from orchestrator.schedule.kinds.registry import KINDS, generate, smallest_microbatches, stages_of
from orchestrator.schedule.timing.simulate import simulate
from tests.orchestrator.schedule.examples import attempt, schedules
from tests.reference.programs import works


def changed(action, change):
    """The action with `change` (from compute action or transfer to another one) in it; None: there is no such action."""
    if isinstance(action, Pair):
        return attempt(lambda: Pair(change(action.first), action.second))
    if isinstance(action, SplitAction):
        return attempt(lambda: SplitAction(change(action.whole)))
    return None if isinstance(action, Reduce) else change(action)


def mutations(actions, stages, position):
    """(name, actions with something wrong, as a rule)."""
    hosted = stages.hosted(position)
    slots = max(2, len(hosted))

    def other_slot(action):
        return replace(action, slot=(action.slot + 1) % slots)

    def other_place(action):
        slot = (action.slot + 1) % len(hosted)
        return replace(action, slot=slot, stage=hosted[slot])

    changes = {
        "slot": other_slot, "place": other_place, "stage": lambda action: replace(action, stage=action.stage + 1),
        "microbatch": lambda action: replace(action, microbatch=action.microbatch ^ 1),
        "kind": lambda action: replace(action, kind={
            ActionKind.BACKWARD: ActionKind.BACKWARD_INPUT, ActionKind.BACKWARD_INPUT: ActionKind.BACKWARD}.get(
            action.kind, ActionKind.BACKWARD_WEIGHT)),
    }
    ends = {
        "tag": lambda action: replace(action, tag=action.tag + 1), "peer": lambda action: replace(action, peer=action.peer + 1),
        "turned": lambda action: replace(action, kind=ActionKind.SEND if action.kind is ActionKind.RECEIVE else ActionKind.RECEIVE),
    }
    for i, action in enumerate(actions):
        rest = (*actions[:i], *actions[i + 1:])
        yield "drop", rest
        yield "double", (*actions[:i + 1], *actions[i:])
        for j in (i + 1, i + 2, i + 5):
            if j < len(actions) and action != actions[j]:
                swapped = list(actions)
                swapped[i], swapped[j] = swapped[j], swapped[i]
                yield "swap", tuple(swapped)
        for j in (i - 4, i + 4, len(rest)):
            if 0 <= j <= len(rest) and i != j:
                yield "move", (*rest[:j], action, *rest[j:])
        names = {**changes, **ends} if isinstance(action, Transfer) else changes
        for name, change in names.items():
            if not (isinstance(action, Transfer) and name in ("place", "kind")):
                found = changed(action, change)
                if found not in (None, action):
                    yield name, (*actions[:i], found, *actions[i + 1:])


def accepted(schedule, programs, **bounds):
    """Whether the checker takes it. A refusal says where, and marks the place in the grid."""
    try:
        return bool(check(schedule, programs, **bounds))
    except ScheduleError as error:
        first, *grid = str(error).splitlines()
        assert "position " in first and len(grid) == len(schedule.rows), error
        assert any(word.startswith(">") and word.endswith("<") for line in grid for word in line.split()), error
        return False


def mutated_programs(schedule, programs, position):
    for name, actions in mutations(programs[position].actions, schedule.stages, position):
        yield name, (*programs[:position], replace(programs[position], actions=actions), *programs[position + 1:])


@settings(max_examples=150, deadline=None)
@given(schedule=schedules(), lookahead=st.integers(0, 3), seed=st.integers(0, 1000))
def test_what_is_accepted_works_and_what_is_refused_does_not(schedule, lookahead, seed):
    programs = lower(schedule, lookahead)
    assert accepted(schedule, programs) == works(programs, schedule, seed=seed)


@settings(max_examples=120, deadline=None)
@given(schedule=schedules(), lookahead=st.integers(0, 3), seed=st.integers(0, 1000))
def test_every_mutated_program_is_refused_or_works(schedule, lookahead, seed):
    programs, rng = lower(schedule, lookahead), random.Random(seed)
    if not accepted(schedule, programs):
        return
    found = list(mutated_programs(schedule, programs, rng.randrange(schedule.positions)))
    for name, mutated in rng.sample(found, min(len(found), 12)):
        if accepted(schedule, mutated):
            assert name in ("swap", "move") and works(mutated, schedule, seed=seed), name


@pytest.mark.parametrize("schedule", [
    generate("dualpipe", 2, 4), generate("dualpipe", 4, 8), *(generate(kind, 3, 6) for kind in KINDS if kind != "dualpipe"),
    parse_csv("F0.0,F0.1|I0.0,W0.0,I0.1/2,W0.1\n", SEARCHED, Stages(LOOP, 1)),
], ids=lambda schedule: f"{schedule.kind}-{schedule.positions}")
def test_all_mutations_of_small_programs(schedule):
    programs = lower(schedule)
    assert works(programs, schedule)
    outcomes = Counter()
    for position in range(schedule.positions):
        for name, mutated in mutated_programs(schedule, programs, position):
            fine = accepted(schedule, mutated)
            outcomes[name, fine] += 1
            assert not fine or works(mutated, schedule), (name, position, list(map(str, mutated[position].actions)))
    assert {name for name, fine in outcomes if fine} <= {"swap", "move"}
    refused = {name for name, fine in outcomes if not fine}
    assert {"drop", "double", "swap", "move", "slot", "stage", "microbatch", "kind"} <= refused
    if schedule.positions > 1:
        assert {"tag", "peer", "turned"} <= {name for name, _ in outcomes} and outcomes["swap", True]


@settings(max_examples=120, deadline=None)
@given(schedule=schedules(), seed=st.integers(0, 1000))
def test_a_mutated_schedule_is_refused_exactly_if_it_does_not_work(schedule, seed):
    rng = random.Random(seed)
    position = rng.randrange(schedule.positions)
    found = list(mutations(schedule.rows[position], schedule.stages, position))
    for name, row in rng.sample(found, min(len(found), 12)):
        mutated = replace(schedule, rows=(*schedule.rows[:position], row, *schedule.rows[position + 1:]))
        try:
            programs = lower(mutated)
        except ScheduleError:
            assert name not in ("swap", "move") and not accepted(mutated, ())
            continue
        fine = accepted(mutated, programs)
        assert fine == works(programs, mutated, seed=seed), (name, position, list(map(str, row)))
        assert not fine or simulate(mutated).makespan > 0


@settings(max_examples=150, deadline=None)
@given(schedule=schedules(), lookahead=st.integers(0, 3), room=st.sampled_from((0, 1, 2, None)),
       outstanding=st.sampled_from((1, 2, 3, None)), seed=st.integers(0, 1000))
def test_blocking_sends_and_bounded_buffers(schedule, lookahead, room, outstanding, seed):
    programs = lower(schedule, lookahead)
    fine = accepted(schedule, programs, unreceived_sends=room, outstanding_receives=outstanding)
    assert fine == works(programs, schedule, seed=seed, room=room, outstanding=outstanding)


@pytest.mark.parametrize("kind", KINDS)
def test_three_actions_ahead_no_kind_needs_links_that_hold_anything(kind):
    for positions in (1, 2, 4):
        for wanted in (1, positions, 2 * positions + 1):
            schedule = generate(kind, positions, smallest_microbatches(kind, positions, wanted))
            check(schedule, lower(schedule), unreceived_sends=0)


def test_blocking_sends_deadlock_where_both_send_first():
    schedule = parse_csv("F0.0,F1.0\nF1.0,F0.0\n", FORWARD_ONLY, Stages(BOTH, 2))
    programs = lower(schedule, lookahead=0)
    check(schedule, programs, unreceived_sends=1)
    with pytest.raises(ScheduleError) as refusal:
        check(schedule, programs, unreceived_sends=0)
    assert str(refusal.value).splitlines()[0] == (
        "deadlock: position 0 at SEND activation 0.0 to 1; position 1 at SEND activation 1.0 to 0")
    check(schedule, lower(schedule, lookahead=1), unreceived_sends=0)


@pytest.mark.parametrize("change, message, marks", [
    (lambda send, receive: ((), (receive,)),
     "transfer 1 from position 0 to 1: nothing meets RECEIVE activation 0.1 from 0", (1,)),
    (lambda send, receive: ((send,), ()), "transfer 1 from position 0 to 1: SEND activation 0.1 to 1 meets nothing", (0,)),
    (lambda send, receive: ((send,), (replace(receive, microbatch=0),)),
     "transfer 1 from position 0 to 1: SEND activation 0.1 to 1 meets RECEIVE activation 0.0 from 0", (0, 1)),
    (lambda send, receive: ((send,) * 2, (receive,) * 2), "from position 0 to 1: tag 2 is used 2 times", (0,)),
    (lambda send, receive: ((replace(send, peer=2),), (receive,)),
     "position 0, action 2: SEND activation 0.1 to 2, which is no other position", (0,)),
    (lambda send, receive: ((replace(send, slot=1),), (receive,)),
     "position 0, action 2: SEND activation 1.1 to 1 but no action before has made this tensor for that position", (0,)),
    (lambda send, receive: ((send,), (replace(receive, slot=1),)),
     "position 1, action 1: RECEIVE activation 1.1 from 0 but no action uses this tensor", (1,)),
])
def test_transfers_that_do_not_meet(change, message, marks):
    schedule = parse_csv("F0.0,F0.1\nF0.0,F0.1\n", FORWARD_ONLY, Stages(LOOP, 2))
    first, last = lower(schedule, lookahead=0)
    sends, receives = change(first.actions[-1], last.actions[2])
    programs = (replace(first, actions=(*first.actions[:-1], *sends)),
                replace(last, actions=(*last.actions[:2], *receives, last.actions[3])))
    with pytest.raises(ScheduleError) as refusal:
        check(schedule, programs)
    line, *grid = str(refusal.value).splitlines()
    assert line == message and [position for position, row in enumerate(grid) if ">" in row] == list(marks)


def test_a_deadlock_of_many_names_some_and_shows_all():
    schedule = generate("zbv", 12, 24)
    with pytest.raises(ScheduleError) as refusal:
        check(schedule, lower(schedule, lookahead=2), unreceived_sends=0)
    first, *grid = str(refusal.value).splitlines()
    assert first.count("position") == 8 and first.endswith(" and 4 more")
    assert len(grid) == 12 and all(">" in line for line in grid)


def test_deadlock_shows_who_waits_and_the_grid():
    schedule = parse_csv("F1.0,F0.0\nF0.0,F1.0\n", FORWARD_ONLY, Stages(BOTH, 2))
    with pytest.raises(ScheduleError) as refusal:
        check(schedule, lower(schedule))
    first, *grid = str(refusal.value).splitlines()
    assert first == "deadlock: position 0 at F1.0; position 1 at F0.0"
    assert [line.split() for line in grid] == [["0:", ">F1.0<", "F0.0", "(end)"], ["1:", ">F0.0<", "F1.0", "(end)"]]
    with pytest.raises(ScheduleError, match="F1.0 waits for F1.0 of stage 0, for ever"):
        simulate(schedule)


@pytest.mark.parametrize("text, kind, positions, message", [
    ("F0.0,F1.0\nF1.0\n", FORWARD_ONLY, 2, "position 1: microbatch 0.0 has no action, not F"),
    ("F0.0,F1.0,F0.0\nF1.0,F0.0\n", FORWARD_ONLY, 2, "position 0, action 2: F0.0 a second time"),
    ("F0.0,F1.0,B1.0\nF1.0,F0.0\n", FORWARD_ONLY, 2, "position 0: microbatch 1.0 has F B, not F"),
    ("F0.0,I0.0\n", "zb_h1", 1, "position 0: microbatch 0.0 has F I, not F B or F I W"),
    ("F0.0,W0.0,I0.0\n", "zb_h1", 1, "position 0, action 1: W0.0 needs I0.0 first"),
    ("F0.0,W0.0\n", "zb_h1", 1, "position 0, action 1: W0.0 needs I0.0 of stage 0, which no position runs"),
    ("F0.0,F0.1|W0.0,I0.0/2,B0.1\n", "zb_h1", 1, "position 0, action 1: F0.1|W0.0 needs I0.0/2 first"),
    ("F0.0,B0.0/2,I0.0,W0.0\n", "zb_h1", 1, "position 0: microbatch 0.0 has F B I W, not F B or F I W"),
    ("F0.0|F1.0,I1.0,B0.0,W1.0\n", "zbv", 1, "position 0, action 0: F0.0|F1.0 needs the other one of the pair first"),
    ("F0.0,F1.0,B1.0|B0.0\n", "dualpipev", 1, "position 0, action 2: B1.0|B0.0 needs the other one of the pair first"),
])
def test_wrong_rows(text, kind, positions, message):
    stages = Stages(BOTH, positions) if kind == FORWARD_ONLY else stages_of(kind, positions)
    schedule = parse_csv(text, kind, stages)
    with pytest.raises(ScheduleError) as refusal:
        check(schedule, lower(schedule))
    first, *grid = str(refusal.value).splitlines()
    assert first == message and len(grid) == positions and ">" in "".join(grid)


def test_an_action_of_another_position_or_of_no_microbatch():
    schedule = forward_only(Stages(BOTH, 2), 2)
    for stray, message in [(Compute(ActionKind.FORWARD, 1, 0, 0), "of stage 1 is not of this position"),
                           (Compute(ActionKind.FORWARD, 0, 2, 0), "is for no microbatch 2.0"),
                           (Compute(ActionKind.FORWARD, 0, 0, 5), "is for no microbatch 0.5")]:
        rows = ((stray, *schedule.rows[0]), schedule.rows[1])
        with pytest.raises(ScheduleError, match=f"position 0, action 0: {stray} {message}"):
            check(replace(schedule, rows=rows), ())


@pytest.mark.parametrize("rows, microbatches, message", [
    (((Compute(ActionKind.FORWARD, 0, 0, 0),),), 1, "1 rows for 2 positions"), ((), 1, "0 rows for 2 positions"),
    (((), ()), 3, "3 microbatches do not divide among 2 entrances"),
])
def test_wrong_numbers(rows, microbatches, message):
    with pytest.raises(ScheduleError, match=message):
        check(Schedule(FORWARD_ONLY, Stages(BOTH, 2), microbatches, rows), ())


@pytest.mark.parametrize("numbers, reduced, message", [
    ((1, 0), True, r"programs are for positions \[1, 0\]"), ((0,), True, r"programs are for positions \[0\]"),
    ((0, 1, 1), True, r"programs are for positions \[0, 1, 1\]"),
    ((0, 1), False, "position 0: the program must have one reduction, at its end"),
])
def test_wrong_programs(numbers, reduced, message):
    schedule = generate("dualpipe", 2, 4)
    programs = [lower(schedule)[number] for number in numbers]
    if not reduced:
        programs = [replace(program, actions=program.actions[:-1]) for program in programs]
    with pytest.raises(ScheduleError, match=message):
        check(schedule, programs)
    with pytest.raises(ScheduleError, match="position 0: the program is for 6 microbatches, not 4"):
        check(schedule, [Program(program.position, 6, program.actions) for program in lower(schedule)])


def test_a_weight_gradient_after_the_reduction_is_refused_where_it_happens():
    schedule = generate("zb_h1", 2, 3)
    first, last = lower(schedule)
    *actions, weights, reduce = last.actions
    with pytest.raises(ScheduleError) as refusal:
        check(schedule, (first, replace(last, actions=(*actions, reduce, weights))))
    message, *grid = str(refusal.value).splitlines()
    assert message == "position 1: the program must have one reduction, at its end" and f">{weights}<" in grid[1]


@settings(max_examples=60, deadline=None)
@given(schedule=schedules())
def test_programs_are_a_function_of_the_schedule(schedule):
    """All ranks of an EP group are at one position; so all run the same collectives in the same order."""
    again = parse_csv(to_csv(schedule), schedule.kind, schedule.stages)
    assert again is not schedule and lower(again) == lower(schedule) == lower(compiled(schedule))


def test_activations_within_a_bound():
    schedule = generate("dualpipe", 4, 8)
    assert check(schedule, lower(schedule), most_activations=5) == (5, 5, 5, 5) == peak_activations(schedule)
    with pytest.raises(ScheduleError, match=r"position 0: 5 microbatches in flight at once, at most 4 allowed\n"):
        check(schedule, lower(schedule), most_activations=4)


@settings(max_examples=80, deadline=None)
@given(schedule=schedules())
def test_peaks_are_what_counting_finds(schedule):
    """A microbatch is there from its F to its last action; without backwards, during its F."""
    for position, row in enumerate(schedule.rows):
        lives = {}
        for index, action in enumerate(row):
            for compute in action.computes:
                lives.setdefault((compute.slot, compute.microbatch), []).append(
                    (index, compute.kind in (ActionKind.FORWARD, ActionKind.BACKWARD, ActionKind.BACKWARD_WEIGHT)))
        spans = [(min(i for i, _ in life), max(i for i, counts in life if counts)) for life in lives.values()]
        most = max(sum(first <= index <= last for first, last in spans) for index in range(len(row)))
        assert peak_activations(schedule)[position] == most
        assert relative_activations(schedule)[position] == most / schedule.stages.chunks


@pytest.mark.parametrize("text, peak", [
    ("F0.0,F0.1,I0.0,B0.1|W0.0,F0.2|F0.3,B0.2|B0.3\n", 2), ("F0.0|F0.1,F0.2|B0.0,B0.1|B0.2\n", 3),
])
def test_peaks_of_pairs_of_all_kinds(text, peak):
    schedule = parse_csv(text, SEARCHED, Stages(LOOP, 1))
    assert check(schedule, lower(schedule)) == (peak,)


@pytest.mark.parametrize("kind, relative", [
    ("dualpipe", 5), ("1f1b", 4), ("zb_h1", 4), ("gpipe", 9), ("dualpipev", 4.5), ("zbv", 4),
])
def test_memory_of_kinds_on_four_ranks_in_microbatches_on_all_layers(kind, relative):
    """As published: PP + 1, PP, PP, M, PP + 1 of half-stages on half the ranks (2 x 4 + 1 of them), and 1F1B's for ZBV."""
    assert max(relative_activations(generate(kind, 4, 9 + (kind == "dualpipe")))) == relative


@pytest.mark.parametrize("positions", [2, 4, 6, 8])
def test_four_outstanding_receives_are_enough(positions):
    schedule = generate("dualpipe", positions, 2 * positions + 2)
    check(schedule, lower(schedule), outstanding_receives=4)
    with pytest.raises(ScheduleError, match="deadlock: .*RECEIVE"):
        check(schedule, lower(schedule), outstanding_receives=1)


def test_places_far_along_are_shown_with_what_is_around_them():
    schedule = generate("interleaved_1f1b", 4, 40, 3)
    row = schedule.rows[2]
    rows = (*schedule.rows[:2], (*row[:100], row[101], row[100], *row[102:]), schedule.rows[3])
    wrong = replace(schedule, rows=rows)
    with pytest.raises(ScheduleError) as refusal:
        check(wrong, lower(schedule))
    first, *grid = str(refusal.value).splitlines()
    assert "position 2, action 100" in first and f">{row[101]}<" in grid[2]
    assert all(1 + len(list(islice(row, 96, 105))) == len(line.split()) for row, line in zip(rows, grid, strict=True))
    assert schedule.stages == stages_of("interleaved_1f1b", 4, 3)
