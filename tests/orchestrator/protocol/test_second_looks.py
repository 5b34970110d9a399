"""What goes wrong beside what goes wrong: one who keeps what it is to let go, nodes that all drain, storage that hangs, errors of
before, a coordinator that was away."""

from __future__ import annotations

from itertools import pairwise

import pytest
from company import Company, Halves, is_call

from orchestrator.protocol import commands, events
from orchestrator.protocol.base import Carry, choose
from orchestrator.protocol.deadlines import Deadlines
from orchestrator.protocol.events import CallId, Ending, FailKind, Fault, Goal, Head, Holding, Recalled, Seen
from orchestrator.protocol.members import Member, MembershipRules
from orchestrator.protocol.membership import Membership
from orchestrator.topology import Node

A, B, C = (Member(name, 0) for name in "abc")


def steps(company: Company) -> list[int]:
    return [line.step for line in company.ledger if isinstance(line, commands.StepLine)]


def fenced(company: Company) -> set[Member]:
    return {command.member for command in company.commands if isinstance(command, commands.Fence)}


def test_one_who_does_not_let_go_costs_the_others_nothing():
    company = Company(5)
    company.go(lambda: len(steps(company)) == 2)

    def keeps(command):
        if isinstance(command, commands.Abort):
            return [events.LetGo(member, command.generation) for member in command.members if member != B]
        return None
    company.twist = keeps
    company.die(Member("d", 0))
    company.go()
    assert company.ended.ending is Ending.DONE and fenced(company) == {B}
    assert "state_lost" not in company.kinds() and steps(company) == [0, 1, 2, 3, 4, 5]


def test_where_all_nodes_drain_they_train_on():
    company = Company(2)
    company.go(lambda: len(steps(company)) == 2)
    for name in "ab":
        company.tell(events.NodeDraining(name))
    company.go()
    assert company.ended.ending is Ending.DONE and not fenced(company) and "waiting" not in company.kinds()


def test_where_all_that_is_left_drains_it_is_used_until_another_node_comes():
    company = Company(2, goal=Goal(8))
    company.go(lambda: len(steps(company)) == 2)
    company.tell(events.NodeDraining("a"))
    company.tell(events.NodeLeft("b", "gone"))
    company.alive.discard(B)
    company.go(lambda: len(steps(company)) == 5)
    assert company.run.base.members == (A,) and "state_lost" not in company.kinds()
    company.tell(events.NodeJoined(Node("c", 1)))
    company.go()
    assert company.ended.ending is Ending.DONE and company.run.base.members == (C,) and fenced(company) == {A}


def test_who_waits_for_nodes_says_so_once_and_no_longer_than_it_may():
    company = Company(2, rules=MembershipRules(min_nodes=2, silence_seconds=1.5, cool_down_seconds=10_000.0),
                      bounds=Deadlines(wait=60.0))
    company.go(lambda: len(steps(company)) == 2)
    company.tell(events.NodeLeft("b", "gone"))
    company.alive.discard(B)
    company.go(lambda: company.run.phase.name == "waiting for nodes")
    began = company.now
    company.tell(events.NodeDraining("a"))  # it looks again and again whether that changes anything
    company.go(seconds=1000)
    assert company.ended.ending is Ending.NO_NODES and company.ended.saved
    assert 60.0 <= company.now - began < 70.0 and len(company.details("waiting")) <= 2


def test_storage_that_does_not_answer_while_a_checkpoint_is_read_costs_no_checkpoint():
    company = Company(head=Head(7, 3, 1), checkpoints=(Seen(4, "four"), Seen(6, "six")), goal=Goal(9),
                      bounds=Deadlines(storage=60.0))

    def away(command):
        if isinstance(command, commands.Call) and isinstance(command.request, commands.Restore):
            company.faults[command.member] = Fault(FailKind.AWAY, "timed out", command.call)
            return [events.Failed(command.call, command.member, FailKind.AWAY, "timed out")]
        return None
    company.twist = away
    company.go(seconds=2000)
    assert company.ended.ending is Ending.STORAGE and "six" in company.ended.text
    assert "checkpoint_unreadable" not in company.kinds()
    assert not any(isinstance(line, commands.CutLine) for line in company.ledger)


def test_an_error_of_an_earlier_call_says_nothing_of_this_one():
    """b could not read a checkpoint long ago, and has been called for nothing since; what breaks off now is a's doing."""
    company = Company(head=Head(7, 3, 1), checkpoints=(Seen(4, "four"), Seen(6, "six")), goal=Goal(9))
    company.faults[B] = Fault(FailKind.UNREADABLE, "hash differs", CallId(0, 3))
    broken = []

    def breaks(command):
        if isinstance(command, commands.Call) and isinstance(command.request, commands.Restore) and not broken:
            broken.append(command)
            return [events.Failed(command.call, command.member, FailKind.ABORTED, "a peer has gone")]
        return None
    company.twist = breaks
    company.go()
    assert company.ended.ending is Ending.DONE and company.details("resumed")[0]["step"] == 6
    assert "checkpoint_unreadable" not in company.kinds()


def test_a_checkpoint_whose_copying_was_broken_off_is_cleared_away_and_made_again():
    company = Company(4, goal=Goal(8, save_every=3))
    company.go(lambda: company.run.phase.name == "snapshotting")
    company.die(C)
    company.go()
    assert company.ended.ending is Ending.DONE and [found["step"] for found in company.details("checkpoint")] == [3, 6, 8]
    discarded = next(index for index, command in enumerate(company.commands) if isinstance(command, commands.Discard))
    collected = [index for index, command in enumerate(company.commands)
                 if isinstance(command, commands.Call) and isinstance(command.request, commands.Collect)]
    assert company.commands[discarded].directory.endswith("3") and collected[0] < discarded
    manifest = next(command for command in company.commands if isinstance(command, commands.WriteManifest))
    after = {command.call for command in company.commands[discarded:]
             if isinstance(command, commands.Call) and isinstance(command.request, commands.Collect)}
    assert set(manifest.collected) <= after, "what the first try brought does not count"


def test_what_was_away_with_the_coordinator_counts_from_its_return():
    for bounds in (Deadlines(give_up=600.0), Deadlines(storage=60.0)):
        company = Company(bounds=bounds)
        company.go(lambda: len(steps(company)) == 2)
        company.now += 3000.0
        company.die(C)
        failing = [True]

        def fails_once(command, failing=failing):
            if isinstance(command, commands.Append) and failing:
                failing.clear()
                return [events.StoreFailed(command.order, "away")]
            return None
        company.twist = fails_once
        company.go()
        assert company.ended.ending is Ending.DONE, company.ended


def test_a_ledger_that_hangs_ends_the_run_in_time():
    company = Company(bounds=Deadlines(storage=60.0))
    company.go(lambda: len(steps(company)) == 2)
    company.twist = lambda command: [] if isinstance(command, commands.Append) else None
    began = company.now
    company.go(seconds=1000)
    assert company.ended.ending is Ending.STORAGE and "does not answer" in company.ended.text and company.now - began < 90.0


def test_numbers_that_two_coordinators_used_are_told_apart():
    """The one that died had a generation 5 of two members formed, of which only c knows; its successor another one."""
    recalled = {A: Recalled((Holding(5, 2, 0, 0, 9, epoch=2),)), B: Recalled((Holding(5, 2, 0, 1, 9, epoch=2),)),
                C: Recalled((Holding(5, 3, 7, 1, 8, epoch=1),))}
    choice = choose(recalled, 9, (), Halves())
    assert isinstance(choice, Carry) and choice.having == {A, B} and choice.base.members == (A, B) and choice.base.placement == 0


def test_who_takes_over_waits_a_little_for_those_without_whom_all_would_be_lost():
    first = Company(2, goal=Goal(9))
    first.go(lambda: len(steps(first)) == 4)
    second = Company(2, goal=Goal(9), head=Head(4, first.run.generation, 1), left_behind=True)
    second.held, second.reduced = first.held, first.reduced
    second._queue = type(second._queue)(event for event in second._queue if not isinstance(event, events.Hello))
    second.alive = set()
    second.go(lambda: second.now > Deadlines().adopt + 1.0)
    assert second.ended is None and second.run.phase.name in ("pausing", "recalling")
    for member in (A, B):
        second.alive.add(member)
        second.tell(events.Hello(member))
    second.go()
    assert second.ended.ending is Ending.DONE and steps(second) == [4, 5, 6, 7, 8] and "state_lost" not in second.kinds()


def test_a_newcomer_that_does_not_reach_the_others_changes_nothing_for_them():
    company = Company(2)
    company.go(lambda: len(steps(company)) == 2)
    generation = company.run.generation
    company.tell(events.NodeJoined(Node("c", 1)))

    def apart(command):
        if isinstance(command, commands.Call) and isinstance(command.request, commands.Probe):
            not_reached = tuple(peer for peer in command.request.peers if command.member == C or peer == C)
            return [events.Answered(command.call, command.member, events.Probed(not_reached))]
        return None
    company.twist = apart
    company.go()
    assert company.ended.ending is Ending.DONE and company.run.generation == generation and company.run.base.members == (A, B)
    lost = company.details("lost")[0]
    assert lost["members"] == ["c/0"] and "no way between it and a/0, b/0" in lost["reasons"][0]


def test_one_who_was_asleep_for_a_moment_does_not_cost_a_newcomer_its_place():
    company = Company(2)
    company.go(lambda: len(steps(company)) == 2)
    company.tell(events.NodeJoined(Node("c", 1)))

    def asleep(command):
        if isinstance(command, commands.Call) and isinstance(command.request, commands.Probe):
            return [events.Answered(command.call, command.member, events.Probed((A,) if command.member == C else ()))]
        return None
    company.twist = asleep
    company.go()
    assert company.ended.ending is Ending.DONE and company.run.base.members == (A, B, C) and not fenced(company)


def test_a_node_that_is_barred_or_cools_down_keeps_no_other_from_starting():
    rules = MembershipRules(max_nodes=2, silence_seconds=1.5, cool_down_seconds=1000.0)
    state = Membership(rules)
    for name in "abc":
        state = state.node_joined(Node(name, 1), 0.0)
    state = state.started(A, 0.0).ready(A, 1.0).started(B, 0.0).ready(B, 1.0)
    assert not state.decide((A, B), 2.0).start
    cooling = state.suspected(B, 3.0, "it hangs")
    assert [member.node for member in cooling.decide((A,), 4.0).start] == ["c"]
    back = cooling.decide((A,), 1004.0)
    assert [member.node for member in back.start] == ["b"] and [member.node for member in cooling.decide(
        (A,), 1004.0, barred=("b",)).start] == ["c"]


def _breaks_off(command):
    """Every step does, and nobody says why."""
    if is_call(command, commands.Step):
        return [events.Failed(command.call, command.member, FailKind.ABORTED, "a peer has gone")]
    return None


def test_where_nobody_is_to_blame_the_step_is_redone_after_pauses_that_double():
    """The first time at once: it may have been nothing. Pauses that fit the beats of this world, so that they can be read off."""
    company = Company(bounds=Deadlines(first_pause=0.5, last_pause=8.0))
    company.go(lambda: len(steps(company)) == 2)
    company.twist, tries = _breaks_off, []

    def tried():
        if company.run.phase.name == "stepping":
            tries.append(company.now)
        return len(set(tries)) == 6
    company.go(tried)
    at = list(dict.fromkeys(tries))
    assert [late - early for early, late in pairwise(at)] == [2.0, 4.0, 8.0, 8.0, 8.0], at
    told = company.details("interrupted")
    assert len(told) == 6 and {details["reason"] for details in told} == {"a peer has gone"}
    company.twist = lambda command: None
    company.go()
    assert company.ended.ending is Ending.DONE and steps(company) == [0, 1, 2, 3, 4, 5]
    assert not company.details("lost") and not fenced(company)


def test_a_run_that_commits_nothing_for_too_long_ends_and_saves():
    company = Company(bounds=Deadlines(give_up=300.0))
    company.go(lambda: len(steps(company)) == 2)
    company.twist, began = _breaks_off, company.now
    company.go(seconds=5000)
    assert (company.ended.ending, company.ended.step, company.ended.saved) == (Ending.NO_PROGRESS, 2, True)
    assert 300.0 < company.now - began < 300.0 + 2 * Deadlines().last_pause and "a peer has gone" in company.ended.text


@pytest.mark.parametrize("kept, seconds", [(set(), 10.0), ({Member("d", 0)}, 13.5)])
def test_one_who_does_not_say_what_it_holds_is_lost_alone(kept, seconds):
    """It lets go, and beats. It has as long as for letting go; silence and two seconds where another one took all of that."""
    company = Company(6)
    company.go(lambda: len(steps(company)) == 2)

    def mute(command):
        if isinstance(command, commands.Abort):
            return [events.LetGo(member, command.generation) for member in command.members if member not in kept]
        return [] if is_call(command, commands.Recall) and command.member == B else None
    company.twist, began = mute, company.now
    company.die(Member("f", 0))
    company.go(lambda: B in fenced(company), seconds=60)
    assert seconds <= company.now - began <= seconds + 0.5
    company.twist = lambda command: None
    company.go()
    assert company.ended.ending is Ending.DONE and steps(company) == [0, 1, 2, 3, 4, 5] and fenced(company) == {B, *kept}
    assert "does not answer" in company.run.membership.why_lost(B)
    assert any("does not answer: not free" in reason for lost in company.details("lost") for reason in lost["reasons"])
