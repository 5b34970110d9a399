"""The checker against a twin that runs programs with self-describing tensors over links without tags.

The twin knows nothing of `dependencies`: each payload says what it is, and whoever uses one looks whether it is the right one.
"""

from __future__ import annotations

import random
from collections import defaultdict, deque
from dataclasses import replace

import pytest

from orchestrator.schedule.actions import Compute, Kind, Pair, Payload, Program, Reduce, Schedule, Transfer, parse_csv
from orchestrator.schedule.check import ScheduleError, check, peak_activations
from orchestrator.schedule.dualpipe import dualpipe
from orchestrator.schedule.forward_only import forward_only
from orchestrator.schedule.lower import lower
from orchestrator.schedule.simulate import simulate


class Wrong(Exception):
    """The twin found something that is not what it says."""


class Twin:
    """One position of a bidirectional pipeline that trains."""

    def __init__(self, program, positions, links):
        self.at, self.positions, self.links = program.position, positions, links
        self.todo = deque(program.actions)
        self.made, self.inbox, self.posted = {}, {}, defaultdict(deque)
        self.forwards, self.inputs, self.weights = set(), set(), []
        self.reduced = None

    def stage(self, slot):
        return self.at if slot == 0 else self.positions - 1 - self.at

    def advance(self):
        """Run one action; False: it has to wait."""
        for peer, posted in self.posted.items():
            while posted and self.links[peer, self.at]:
                self.inbox[posted.popleft()] = self.links[peer, self.at].popleft()
        action = self.todo[0]
        if isinstance(action, Compute | Pair):
            halves = action.halves
            if any(self.waits(half) for half in halves):
                return False
            for half in halves:
                self.compute(half)
        elif isinstance(action, Reduce):
            self.reduced = sorted(self.weights)
        elif action.kind is Kind.RECEIVE:
            self.posted[action.peer].append((action.payload, action.slot, action.microbatch))
        else:
            key = (action.payload, action.slot, action.microbatch)
            if key not in self.made:
                raise Wrong(f"nothing to send: {action}")
            self.links[self.at, action.peer].append(self.made.pop(key))
        self.todo.popleft()
        return True

    def outer(self, half):
        """The tensor that comes from outside, if any: its key."""
        stage = self.stage(half.slot)
        if half.kind is Kind.FORWARD and stage > 0:
            return Payload.ACTIVATION, half.slot, half.microbatch
        if half.kind in (Kind.BACKWARD, Kind.BACKWARD_INPUT) and stage < self.positions - 1:
            return Payload.GRADIENT, half.slot, half.microbatch
        return None

    def waits(self, half):
        key = self.outer(half)
        if key is None or key in self.inbox:
            return False
        if not any(key in posted for posted in self.posted.values()):
            raise Wrong(f"{half}: no receive posted")
        return True

    def compute(self, half):
        stage, name = self.stage(half.slot), (half.slot, half.microbatch)
        key = self.outer(half)
        if key and self.inbox.pop(key) != (key[0], stage, *name):
            raise Wrong(f"{half}: another tensor")
        if half.kind is Kind.FORWARD:
            if name in self.forwards or half.stage != stage:
                raise Wrong(f"{half}: again, or elsewhere")
            self.forwards.add(name)
            if stage < self.positions - 1:
                self.made[Payload.ACTIVATION, *name] = (Payload.ACTIVATION, stage + 1, *name)
            return
        if half.kind is Kind.BACKWARD_WEIGHT:
            if name not in self.inputs:
                raise Wrong(f"{half}: no input gradient")
            self.inputs.remove(name)
            self.weights.append(name)
            return
        if name not in self.forwards:
            raise Wrong(f"{half}: no forward")
        if stage > 0:
            self.made[Payload.GRADIENT, *name] = (Payload.GRADIENT, stage - 1, *name)
        if half.kind is Kind.BACKWARD:
            self.weights.append(name)
        else:
            self.inputs.add(name)


def works(programs, microbatches, seed=0):
    """Whether the programs end, in a random interleaving, with every gradient there once before the reduction."""
    links, rng = defaultdict(deque), random.Random(seed)
    twins = [Twin(program, len(programs), links) for program in programs]
    everything = sorted((slot, m) for slot in (0, 1) for m in range(microbatches // 2))
    waiting = set()
    try:
        while running := [t for t in twins if t.todo]:
            ready = [t for t in running if t.at not in waiting]
            if not ready:
                return False
            twin = rng.choice(ready)
            if twin.advance():
                waiting.clear()
            else:
                waiting.add(twin.at)
    except Wrong:
        return False
    return all(twin.reduced == everything for twin in twins) and not any(links.values())


def accepted(schedule, programs):
    try:
        return bool(check(schedule, programs))
    except ScheduleError:
        return False


def other_slot(action):
    if isinstance(action, Pair):
        return Pair(other_slot(action.forward), other_slot(action.backward))
    return replace(action, slot=1 - action.slot) if isinstance(action, Compute | Transfer) else action


def mutations(actions):
    for i, action in enumerate(actions):
        yield "drop", (*actions[:i], *actions[i + 1:])
        yield "double", (*actions[:i + 1], *actions[i:])
        for j in (i + 1, i + 2, i + 5):
            if j < len(actions) and action != actions[j]:
                swapped = list(actions)
                swapped[i], swapped[j] = swapped[j], swapped[i]
                yield "swap", tuple(swapped)
        if not isinstance(action, Reduce):
            yield "slot", (*actions[:i], other_slot(action), *actions[i + 1:])
        if isinstance(action, Transfer):
            yield "tag", (*actions[:i], replace(action, tag=action.tag + 1), *actions[i + 1:])
            yield "peer", (*actions[:i], replace(action, peer=action.peer + 1), *actions[i + 1:])
            yield "microbatch", (*actions[:i], replace(action, microbatch=action.microbatch ^ 1), *actions[i + 1:])


@pytest.mark.parametrize("positions, microbatches", [(2, 4), (4, 8)])
def test_every_mutated_program_is_refused_or_works(positions, microbatches):
    schedule = dualpipe(positions, microbatches)
    programs = lower(schedule)
    assert works(programs, microbatches)
    outcomes = defaultdict(lambda: [0, 0])
    for position, program in enumerate(programs):
        for name, actions in mutations(program.actions):
            mutated = (*programs[:position], Program(position, microbatches, actions), *programs[position + 1:])
            fine = accepted(schedule, mutated)
            outcomes[name][fine] += 1
            assert not fine or works(mutated, microbatches), (name, position, list(map(str, actions)))
    assert {name for name, (_, fine) in outcomes.items() if fine} == {"swap"}
    assert outcomes["swap"][0] > outcomes["swap"][1] > 0


@pytest.mark.parametrize("positions, microbatches", [(2, 4), (4, 8)])
def test_a_mutated_schedule_is_refused_exactly_if_it_does_not_work(positions, microbatches):
    schedule = dualpipe(positions, microbatches)
    outcomes = {True: 0, False: 0}
    for position in range(positions // 2):
        for name, row in mutations(schedule.rows[position]):
            rows = (*schedule.rows[:position], row, *schedule.rows[position + 1:])
            mutated = Schedule("dualpipe", positions, microbatches, rows)
            try:
                programs = lower(mutated)
            except ScheduleError:
                assert name in ("drop", "slot")
                continue
            fine = accepted(mutated, programs)
            outcomes[fine] += 1
            assert fine == works(programs, microbatches), (name, position, list(map(str, row)))
            assert not fine or simulate(mutated).makespan > 0
    assert min(outcomes.values()) > 5


def test_deadlock_shows_who_waits_and_the_grid():
    schedule = parse_csv("F1.0,F0.0\nF0.0,F1.0\n", "forward_only")
    with pytest.raises(ScheduleError) as refusal:
        check(schedule, lower(schedule))
    first, *grid = str(refusal.value).splitlines()
    assert first == "deadlock: position 0 at F1.0; position 1 at F0.0"
    assert [line.split() for line in grid] == [["0:", ">F1.0<", "F0.0", "(end)"], ["1:", ">F0.0<", "F1.0", "(end)"]]
    with pytest.raises(ScheduleError, match="F1.0 waits for F1.0 of stage 0, for ever"):
        simulate(schedule)


@pytest.mark.parametrize("text, message", [
    ("F0.0,F1.0\nF1.0\n", "position 1: microbatch 0.0 has no action, not F"),
    ("F0.0,F1.0,F0.0\nF1.0,F0.0\n", "position 0, action 2: F0.0 a second time"),
    ("F0.0,F1.0,B1.0\nF1.0,F0.0\n", "position 0: microbatch 1.0 has F B, not F"),
])
def test_incomplete(text, message):
    schedule = parse_csv(text, "forward_only")
    with pytest.raises(ScheduleError) as refusal:
        check(schedule, ())
    assert str(refusal.value).splitlines()[0] == message


def test_an_action_of_another_position_or_of_no_microbatch():
    schedule = forward_only(2, 2)
    for stray, message in [(Compute(Kind.FORWARD, 1, 0, 0), "of stage 1 is not of this position"),
                           (Compute(Kind.FORWARD, 0, 0, 5), "is for no microbatch 0.5")]:
        rows = ((stray, *schedule.rows[0]), schedule.rows[1])
        with pytest.raises(ScheduleError, match=f"position 0, action 0: {stray} {message}"):
            check(Schedule("forward_only", 2, 2, rows), ())


def test_activations_within_a_bound():
    schedule = dualpipe(4, 8)
    assert check(schedule, lower(schedule), most_activations=5) == (5, 5, 5, 5) == peak_activations(schedule)
    with pytest.raises(ScheduleError, match=r"position 0: 5 microbatches in flight at once, at most 4 allowed\n"):
        check(schedule, lower(schedule), most_activations=4)


@pytest.mark.parametrize("positions", [2, 4, 6, 8])
def test_three_outstanding_receives_are_enough(positions):
    schedule = dualpipe(positions, 2 * positions + 2)
    check(schedule, lower(schedule), outstanding_receives=3)
    with pytest.raises(ScheduleError, match="deadlock: .*RECEIVE"):
        check(schedule, lower(schedule), outstanding_receives=1)


def test_programs_for_other_positions():
    schedule = dualpipe(2, 4)
    with pytest.raises(ScheduleError, match=r"programs are for positions \[1, 0\]"):
        check(schedule, lower(schedule)[::-1])
