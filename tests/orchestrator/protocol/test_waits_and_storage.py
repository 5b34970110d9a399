"""Waiting for nodes and for storage, and what is written meanwhile, where something else happens at the same time."""

from __future__ import annotations

from dataclasses import replace

import pytest
from company import Company, Halves, cuts, fenced, gone, is_call, steps

from orchestrator.protocol import commands, events
from orchestrator.protocol.deadlines import Deadlines
from orchestrator.protocol.events import Ending, FailKind, Fault, Goal, Head, Seen
from orchestrator.protocol.members import Member, MembershipRules
from orchestrator.topology import Node

A, B, C, D = (Member(name, 0) for name in "abcd")


def test_a_long_wait_for_nodes_then_a_loss_is_not_no_progress():
    """`elastic.wait_seconds` null: for ever. give_up counts the waiting when a member is lost during it."""
    company = Company(4, rules=MembershipRules(min_nodes=4, silence_seconds=1.5, cool_down_seconds=5.0),
                      bounds=Deadlines(wait=None))
    company.go(lambda: len(steps(company)) == 2)
    gone(company, D)
    company.go(lambda: company.run.phase.name == "waiting for nodes")
    company.go(seconds=2000.0)
    assert company.ended is None and company.run.phase.name == "waiting for nodes"
    gone(company, C)
    company.go(seconds=100.0)
    assert company.ended is None, company.ended
    for name in "cd":
        company.tell(events.NodeJoined(Node(name, 1)))
    company.go(seconds=1000.0)
    assert company.ended.ending is Ending.DONE


def _stop_then_nobody(event):
    company = Company(2, rules=MembershipRules(min_nodes=2, silence_seconds=1.5, cool_down_seconds=5.0), goal=Goal(9))
    company.go(lambda: len(steps(company)) == 3)
    company.twist = lambda command: [] if is_call(command, commands.Step) else None
    company.go(lambda: company.run.phase.name == "stepping", seconds=50)
    event(company)
    company.go(seconds=1.0)
    gone(company, A)
    gone(company, B)
    company.go(seconds=20_000.0)
    return company


def test_a_stop_that_came_before_the_wait_for_nodes_ends_it():
    """A stop is heard while it waits for nodes (Ending.WAITED), but not if it came a moment before."""
    company = _stop_then_nobody(lambda company: company.tell(events.StopAsked()))
    assert company.ended is not None, (company.run.phase.name, company.run.wake, company.now)
    assert company.ended.ending is Ending.WAITED and not company.ended.saved
    assert 180.0 <= company.now < 195.0, "as long as a process may take to start; what came before took a few seconds"


class _Pairs(Halves):
    """No layout for less than two."""

    def plan(self, nodes, base, ready):
        found = super().plan(nodes, base, ready)
        return found if found and len(found.members) > 1 else None


def _nothing_fits(stop):
    """b has gone; a holds the state of three steps, which is in no checkpoint, but has no layout. stop: asked for before."""
    company = Company(2, goal=Goal(9, save_every=2))
    company.run.planner = _Pairs()
    company.go(lambda: len(steps(company)) == 3)
    company.twist = lambda command: [] if is_call(command, commands.Step) else None
    company.go(lambda: company.run.phase.name == "stepping", seconds=50)
    if stop:
        company.tell(events.StopAsked())
    gone(company, B)
    company.go(lambda: company.run.phase.name == "waiting for nodes")
    company.twist = lambda command: None
    return company, company.now


def test_a_stop_of_before_waits_for_those_who_help_to_save_what_is_in_memory():
    company, began = _nothing_fits(stop=True)
    company.go(seconds=100.0)
    assert company.ended is None and company.run.phase.name == "waiting for nodes"
    company.tell(events.NodeJoined(Node("b", 1)))
    company.go()
    assert (company.ended.ending, company.ended.step, company.ended.saved) == (Ending.STOPPED, 3, True)
    assert company.now - began < 110.0 and not cuts(company)


def test_a_stop_of_before_waits_for_nobody_for_longer_than_a_process_may_take_to_start():
    company, began = _nothing_fits(stop=True)
    company.go(seconds=1000.0)
    assert (company.ended.ending, company.ended.step, company.ended.saved) == (Ending.WAITED, 3, False)
    assert 180.0 <= company.now - began < 181.0


def test_a_stop_while_no_layout_fits_ends_it_at_once_with_the_newest_checkpoint():
    company, _ = _nothing_fits(stop=False)
    company.go(seconds=400.0)
    assert company.ended is None and company.details("waiting")[0]["reason"] == "no layout for the nodes that can be used"
    company.tell(events.StopAsked())
    company.go(seconds=1.0)
    assert (company.ended.ending, company.ended.step, company.ended.saved) == (Ending.WAITED, 3, False)
    assert [details["step"] for details in company.details("checkpoint")] == [2]


def test_a_stop_in_opening_and_too_few_nodes():
    company = Company(1, rules=MembershipRules(min_nodes=2, silence_seconds=1.5, cool_down_seconds=5.0))
    company.tell(events.StopAsked())
    company.go(seconds=20_000.0)
    assert company.ended is not None, (company.run.phase.name, company.run.wake, company.now)


def test_a_run_that_is_to_end_for_a_loss_that_is_not_finite_does_not_wait_for_nodes():
    company = Company(2, rules=MembershipRules(min_nodes=2, silence_seconds=1.5, cool_down_seconds=5.0), goal=Goal(9))

    def poison(command):
        if isinstance(command, commands.Append) and isinstance(command.line, commands.StepLine) and command.line.step == 3:
            return [events.LineRefused(command.order, Ending.NOT_FINITE, "nan")]
        return [] if is_call(command, commands.Apply | commands.Snapshot) else None
    company.twist = poison
    company.go(lambda: company.run.ending is not None, seconds=100)
    assert company.run.ending[0] is Ending.NOT_FINITE
    gone(company, A)
    gone(company, B)
    company.go(seconds=20_000.0)
    assert company.ended is not None, (company.run.phase.name, company.run.wake, company.now)


def _unheard(goal):
    """A coordinator that takes over from one that has committed four steps with a and b: these have not said hello to it yet.
    c was just being made: it is there, with nothing."""
    first = Company(2, goal=goal)
    first.go(lambda: len(steps(first)) == 4)
    second = Company(3, goal=goal, head=Head(4, first.run.generation, 1), checkpoints=(Seen(2, "two"),), left_behind=True)
    second.held.update(first.held)
    second.reduced = first.reduced
    second._queue = type(second._queue)(event for event in second._queue
                                        if not (isinstance(event, events.Hello) and event.member in (A, B)))
    second.alive = {C}
    return second


def test_a_coordinator_that_takes_over_and_is_frozen_for_a_moment_still_waits_for_those_who_were_there():
    """`Where the coordinator itself was away, its bounds count from its return`: expected_until is not put off."""
    def taken_over(frozen):
        second = _unheard(Goal(9))
        second.go(lambda: second.run.phase.name == "pausing", seconds=30)
        assert second.run.phase.name == "pausing"
        second.now += frozen  # nobody could say hello meanwhile
        second.go(seconds=2.5)
        for member in (A, B):
            second.alive.add(member)
            second.tell(events.Hello(member))
        second.go()
        assert second.ended.ending is Ending.DONE
        return cuts(second)
    assert not taken_over(0.0), "they come 2.5 s later: waited for"
    assert not taken_over(20.0), "the same 2.5 s after the coordinator thawed"


def test_what_storage_was_away_for_is_over_when_state_came_from_memory():
    """A coordinator takes over; nobody says hello in time; the checkpoint does not answer; then they come, and their state goes
    on. An hour later nothing of that is to count."""
    second = _unheard(Goal(30))
    away = [True]

    def fails(command):
        if away and is_call(command, commands.Restore):
            second.faults[command.member] = Fault(FailKind.AWAY, "timed out", command.call)
            return [events.Failed(command.call, command.member, FailKind.AWAY, "timed out")]
        return None
    second.twist = fails
    second.go(lambda: second.run.away_since is not None, seconds=300)
    assert second.run.away_since is not None
    for member in (A, B):
        second.alive.add(member)
        second.tell(events.Hello(member))
    second.go(lambda: len(steps(second)) == 3, seconds=300)
    assert not cuts(second) and second.ended is None
    away.clear()
    second.faults.clear()
    second.twist = lambda command: [] if is_call(command, commands.Step) else None  # a long step
    second.now += 0.5
    second.go(seconds=400.0)
    second.twist = fails
    began = second.now
    second.die(C)
    second.go(lambda: len(steps(second)) == 4, seconds=100)
    assert second.run.away_since is None and second.now - began < 4.0, (second.run.away_since, second.now - began)


def test_a_checkpoint_of_steps_that_stand_is_not_thrown_away_by_a_cut_after_it():
    """The save of step 3 is being written when all are set back to step 4: it is as good as ever."""
    company = Company(3, goal=Goal(12, save_every=3))

    def older(command):
        if is_call(command, commands.Collect):
            return []
        if is_call(command, commands.Step) and command.request.step == 5 and not cuts(company):
            return []
        if is_call(command, commands.Recall) and not cuts(company) and command.call.number > 3:
            held = tuple(replace(one, applied=4) for one in company.held[command.member].values())
            company.held[command.member] = {one.generation: one for one in held}
            company.reduced[command.member] = None
            return [events.Answered(command.call, command.member, events.Recalled(held, None, True))]
        return None
    company.twist = older
    company.go(lambda: company.run.phase.name == "stepping" and company.run.committed == 5)
    call, member = next(iter(company.run.phase.calls.items()))
    company.tell(events.Failed(call, member, FailKind.ABORTED, "a peer has gone"))
    company.go(lambda: len(steps(company)) == 6, seconds=60)
    assert cuts(company)[0].step == 4
    discarded = [command.directory for command in company.commands if isinstance(command, commands.Discard)]
    assert not any(directory.endswith("3") for directory in discarded), discarded


def test_a_checkpoint_that_does_not_answer_once_does_not_end_the_run_because_of_an_earlier_time():
    """As above; 400 s later more is lost than owners cover, and the first read of the checkpoint fails once."""
    second = _unheard(Goal(30))
    away = [True]

    def fails(command):
        if is_call(command, commands.Restore):
            second.faults.pop(command.member, None)
            if away:
                second.faults[command.member] = Fault(FailKind.AWAY, "timed out", command.call)
                return [events.Failed(command.call, command.member, FailKind.AWAY, "timed out")]
        return [] if is_call(command, commands.Step) and len(steps(second)) == 3 and away else None
    second.twist = fails
    second.go(lambda: second.run.away_since is not None, seconds=300)
    for member in (A, B):
        second.alive.add(member)
        second.tell(events.Hello(member))
    second.go(lambda: len(steps(second)) == 3, seconds=300)
    assert not cuts(second) and second.ended is None
    second.go(seconds=400.0)  # a step of 400 s
    for member in second.run.seated:
        second.die(member)
    second.go(lambda: second.run.phase.name == "loading", seconds=60)
    second.go(seconds=2)
    away.clear()
    second.go(seconds=600)
    assert second.ended is not None and second.ended.ending is Ending.DONE, second.ended


def test_a_manifest_that_was_written_late_is_not_deleted():
    """All pieces are there, the manifest is under way when bounds.files passes: it is written (Stored), and deleted then."""
    company = Company(3, goal=Goal(12, save_every=3))
    manifests = []

    def hangs(command):
        if isinstance(command, commands.WriteManifest) and not manifests:
            manifests.append(command)
            return []
        if isinstance(command, commands.Discard) and manifests:
            return []  # one clerk: after the manifest
        return [] if is_call(command, commands.Step) and command.request.step == 5 and company.now < 590 else None
    company.twist = hangs
    company.go(lambda: bool(manifests))
    company.go(seconds=601.0)
    company.tell(events.Stored(manifests[0].order))  # it counts now: Append, WriteManifest and Discard are carried out in order
    company.go(seconds=5.0)
    late = [command.directory for command in company.commands if isinstance(command, commands.Discard)]
    assert manifests[0].directory not in late, late


def _taken_over():
    """A coordinator that finds the state of four steps in the memory of a and b."""
    first = Company(2, goal=Goal(9))
    first.go(lambda: len(steps(first)) == 4)
    second = Company(2, goal=Goal(9), head=Head(4, first.run.generation, 1), bounds=Deadlines(storage=60.0), left_behind=True)
    second.held, second.reduced = first.held, first.reduced
    return second


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("away, ending", [(40.0, Ending.DONE), (1e9, Ending.STORAGE)])
def test_a_take_over_waits_for_a_ledger_that_is_away(away, ending, fails):
    """It hangs, or says that it fails. Nothing is asked of ranks before the ledger knows who asks: they keep what they hold."""
    second, held = _taken_over(), []

    def ill(command):
        if isinstance(command, commands.Append) and isinstance(command.line, commands.EpochLine) and second.now < away:
            held.append(command)
            return [events.StoreFailed(command.order, "no space left")] if fails else []
        return None
    second.twist = ill
    second.go(seconds=min(away, 50.0))
    assert second.ended is None and second.run.phase.name == "opening"
    assert not [command for command in second.commands if isinstance(command, commands.Call | commands.Abort | commands.Fence)]
    assert [details["reason"] for details in second.details("storage_away")] == [
        "no space left" if fails else "the ledger does not answer for 10 s"]
    if ending is Ending.DONE and not fails:
        second.tell(events.Stored(held[0].order))
    second.go()
    assert second.ended.ending is ending and not cuts(second) and not fenced(second)
    if ending is Ending.DONE:
        assert steps(second) == [4, 5, 6, 7, 8] and "state_lost" not in second.kinds()
    else:
        assert 60.0 <= second.now < 65.0 and not steps(second)


@pytest.mark.parametrize("hung", [{B}, {A, B, C}])
def test_who_does_not_come_back_from_reading_a_checkpoint_is_replaced_and_the_checkpoint_is_read_again(hung):
    """Whether storage hangs or the one that reads cannot be told: the bound on loading, and on being free, passes first."""
    company = Company(head=Head(7, 3, 1), checkpoints=(Seen(4, "four"), Seen(6, "six")), goal=Goal(9))
    reading = {}

    def hangs(command):
        if is_call(command, commands.Restore) and command.member in hung:
            reading[command.member] = command.call
            return []
        if is_call(command, commands.Recall) and command.member in reading:
            company.now += 0.1
            return [events.Answered(command.call, command.member, events.Recalled((), busy=reading[command.member]))]
        return None
    company.twist = hangs
    company.go(seconds=599.0)
    assert company.run.phase.name == "loading"
    company.go(lambda: bool(company.details("lost")), seconds=15.0)
    assert 610.0 <= company.now and fenced(company) == hung
    assert company.details("lost")[0]["reasons"] == ["its computing hangs: not free 10 s after it was told to let go"]
    company.go()
    assert company.ended.ending is Ending.DONE and [details["step"] for details in company.details("resumed")] == [6]
    assert "checkpoint_unreadable" not in company.kinds() and [cut.step for cut in cuts(company)] == [6]


def test_what_a_newcomer_cannot_use_ends_no_run_that_was_taken_over():
    """Two hold the state; c, whose process was just being made, refuses its place in the first generation of this coordinator."""
    second, kept = _unheard(Goal(9)), []
    for member in (A, B):
        second.alive.add(member)
        second.tell(events.Hello(member))

    def refuses(command):
        if not kept and is_call(command, commands.Form) and command.member == C:
            kept.append(command)
            second.faults[C] = Fault(FailKind.REFUSED, "data.folder is not there", command.call)
            return [events.Failed(command.call, C, FailKind.REFUSED, "data.folder is not there")]
        return None
    second.twist = refuses
    second.go()
    assert kept and second.ended.ending is Ending.DONE and not cuts(second) and steps(second) == [4, 5, 6, 7, 8]
    assert [lost["members"] for lost in second.details("lost")] == [["c/0"]]


def test_a_run_that_is_to_end_loads_no_checkpoint_any_more():
    """Each time another one never comes back from reading, until the run gives up: what it could save then is gone, and to load
    what is stored would be for nothing."""
    company = Company(5, head=Head(7, 3, 1), checkpoints=(Seen(6, "six"),), goal=Goal(9), bounds=Deadlines(give_up=1000.0))
    hung = {}

    def hangs(command):
        if is_call(command, commands.Restore) and hung.setdefault(command.generation, command.member) == command.member:
            company.faults[command.member] = Fault(FailKind.ABORTED, "", command.call)
            return []
        if is_call(command, commands.Recall) and command.member in hung.values():
            company.now += 0.1
            return [events.Answered(command.call, command.member, events.Recalled((), busy=company.faults[command.member].call))]
        return None
    company.twist = hangs
    company.go(seconds=9000.0)
    assert (company.ended.ending, company.ended.saved) == (Ending.NO_PROGRESS, False)
    assert len(hung) == 2 and company.now < 1250.0, "the read that was under way was the last"


def test_data_that_is_damaged_ends_the_run_once_what_is_committed_is_saved():
    """It is of no use to try again: steps whose data was there already are done first."""
    company = Company(goal=Goal(9))
    company.twist = lambda command: [events.BatchFailed(command.step, "shard 3 is cut short", lasting=True)] if (
        isinstance(command, commands.NeedBatch) and command.step == 4) else None
    company.go()
    assert (company.ended.ending, company.ended.step, company.ended.saved) == (Ending.OWN_FAULT, 4, True)
    assert "the data of step 4 cannot be read: shard 3 is cut short" == company.ended.text
    assert steps(company) == [0, 1, 2, 3] and not {"data_away", "lost", "interrupted"} & set(company.kinds())
    assert len([command for command in company.commands if isinstance(command, commands.NeedBatch) and command.step == 4]) == 1
