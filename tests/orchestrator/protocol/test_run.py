"""The state machine of a run in a world where everybody answers, but for what a test does to it."""

from __future__ import annotations

import pytest
from company import Company, is_call, node

from orchestrator.protocol import commands, events
from orchestrator.protocol.events import Ending, FailKind, Fault, Goal, Head, Seen
from orchestrator.protocol.members import Member, MembershipRules

A, B, C = (Member(name, 0) for name in "abc")


def steps(company: Company) -> list[int]:
    return [line.step for line in company.ledger if isinstance(line, commands.StepLine)]


def test_an_undisturbed_run_commits_every_step_and_saves_at_the_end():
    company = Company(goal=Goal(6, save_every=2, validate_every=3, place_every=4, keep=2))
    company.go()
    assert (company.ended.ending, company.ended.step, company.ended.saved) == (Ending.DONE, 6, True)
    assert steps(company) == [0, 1, 2, 3, 4, 5]
    assert [details["step"] for details in company.details("validation")] == [3, 6]
    assert [details["step"] for details in company.details("checkpoint")] == [2, 4, 6]
    assert [command.directory[-1] for command in company.commands if isinstance(command, commands.Discard)] == ["2"]
    assert [details["step"] for details in company.details("placement")] == [4]


@pytest.mark.parametrize("ledger_line", [2, 3])
def test_a_loss_costs_no_committed_step_and_no_survivor(ledger_line):
    company = Company()
    company.go(lambda: len(steps(company)) == ledger_line)
    company.die(B)
    company.go()
    assert company.ended.ending is Ending.DONE and steps(company) == [0, 1, 2, 3, 4, 5]
    assert company.details("lost")[0]["members"] == ["b/0"]
    assert not [command for command in company.commands if isinstance(command, commands.Fence)]
    assert not any(isinstance(line, commands.CutLine) for line in company.ledger)


def test_a_second_loss_inside_the_recovery_goes_on_from_what_is_held():
    company = Company(4)
    company.go(lambda: len(steps(company)) == 2)
    company.die(B)
    company.go(lambda: company.run.phase.name == "moving")
    company.die(Member("d", 0))
    company.go()
    assert company.ended.ending is Ending.DONE and steps(company) == [0, 1, 2, 3, 4, 5]
    assert [details["members"] for details in company.details("lost")] == [["b/0"], ["d/0"]]


def test_more_is_lost_than_owners_cover():
    company = Company(goal=Goal(8, save_every=3))
    company.go(lambda: len(steps(company)) == 5)
    company.die(B)
    company.die(C)
    company.go()
    assert company.ended.ending is Ending.DONE and company.details("state_lost")[0]["step"] == 5
    assert company.details("resumed")[0]["step"] == 3
    cut, = (line for line in company.ledger if isinstance(line, commands.CutLine))
    assert cut.step == 3 and steps(company) == [0, 1, 2, 3, 4, 3, 4, 5, 6, 7]


def loaded(company) -> list[float | None]:
    return [tell.event.recovery_seconds for tell in company.told if isinstance(tell.event, commands.LoadedRef)]


def test_state_that_is_loaded_is_a_recovery_but_for_the_first_time():
    """Whatever it is loaded from; its seconds count from the moment at which the coordinator knew of the loss."""
    for goal, saved in ((Goal(8, save_every=3), [3]), (Goal(8), [])):
        company = Company(goal=goal)
        company.go(lambda: len(steps(company)) == 5)
        assert loaded(company) == [None]

        def slow(command):
            if is_call(command, commands.Restore) or is_call(command, commands.Initialise):
                company.now += 0.3
            return None
        company.twist, knew = slow, company.now
        company.die(B)
        company.die(C)
        company.go(lambda: len(loaded(company)) == 2)
        assert 0.3 <= loaded(company)[1] <= company.now - knew + 1e-4
        assert [details["step"] for details in company.details("resumed")] == saved


def test_a_run_that_goes_on_where_one_ended_has_recovered_from_nothing():
    company = Company(goal=Goal(4), head=events.Head(3, 2, 1, 3), checkpoints=(events.Seen(3, "there"),))
    company.go()
    assert company.ended.ending is Ending.DONE and len(company.details("resumed")) == 1 and loaded(company) == [None]


def test_seconds_of_events_count_from_the_moment_at_which_the_coordinator_knew():
    """What letting go takes, asking who holds what, and making groups: nothing of it is left out, nor told of the next loss."""
    company = Company(4)
    company.go(lambda: len(steps(company)) == 2)
    told = []

    def slow(command):
        if isinstance(command, commands.Tell) and command.event.name in ("aborted", "layout", "generation"):
            told.append((command.event.name, command.event.seconds, company.run.now - knew))
        elif isinstance(command, commands.Abort) or is_call(command, commands.Recall) or is_call(command, commands.Form):
            company.now += 0.3
        return None
    company.twist = slow
    for member in (B, C):
        knew = company.now
        company.die(member)
        company.go(lambda: told and told[-1][0] == "generation")
        assert [kind for kind, _, _ in told] == ["aborted", "layout", "generation"]
        seconds = [found for _, found, _ in told]
        assert seconds == pytest.approx([wanted for _, _, wanted in told], abs=1e-3) and 0 < seconds[0] <= seconds[1] < seconds[2]
        told.clear()


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before():
    company = Company(head=Head(7, 3, 1), checkpoints=(Seen(4, "four"), Seen(6, "six")), goal=Goal(9))

    def damaged(command):
        if isinstance(command, commands.Call) and command.request == commands.Restore("six", 6):
            company.faults[command.member] = Fault(FailKind.UNREADABLE, "hash differs")
            return [events.Failed(command.call, command.member, FailKind.UNREADABLE, "hash differs")]
        return None
    company.twist = damaged
    company.go(lambda: "checkpoint_unreadable" in company.kinds())
    company.faults.clear()
    company.go()
    assert company.ended.ending is Ending.DONE and company.details("resumed")[0]["step"] == 4
    assert company.details("checkpoint_unreadable")[0]["path"] == "six"


def test_all_damaged_ends_it_and_deletes_nothing():
    company = Company(head=Head(7, 3, 1), checkpoints=(Seen(4, "four", False), Seen(6, "six", False)), goal=Goal(9))
    company.go()
    assert company.ended.ending is Ending.NO_STATE and "none of 2 checkpoints" in company.ended.text
    assert not [command for command in company.commands if isinstance(command, commands.Discard)]


def test_a_hung_member_is_named_and_replaced():
    company = Company(3)
    company.go(lambda: len(steps(company)) == 3)
    company.deaf.add(C)
    busy = events.CallId(1, 1)

    def hung(command):
        if isinstance(command, commands.Call) and command.member == C and isinstance(command.request, commands.Recall):
            company.now += 0.3
            return [events.Answered(command.call, C, events.Recalled((), busy=busy))]
        return None
    company.twist = hung
    company.go()
    assert company.ended.ending is Ending.DONE and "its computing hangs" in company.details("lost")[0]["reasons"][0]
    assert company.details("lost")[0]["members"] == ["c/0"]


def test_an_error_of_its_own_costs_the_member_its_place_once_and_the_run_the_second_time():
    company = Company(goal=Goal(6, save_every=0))
    raised = []

    def faulty(command):
        if isinstance(command, commands.Call) and isinstance(command.request, commands.Step) and command.request.step == 3:
            if len(raised) < 2 and command.member == max(company.run.seated):
                raised.append(command.member)
                text = f"ValueError: boom {len(raised)}"
                company.faults[command.member] = Fault(FailKind.OWN, text)
                return [events.Failed(command.call, command.member, FailKind.OWN, text)]
            return []
        return None
    company.twist = faulty
    company.go()
    assert company.ended.ending is Ending.OWN_FAULT
    assert company.ended.text == f"{raised[0]}: ValueError: boom 1; {raised[1]}: ValueError: boom 2"
    assert len(set(raised)) == 2 and company.ended.step == 3 and company.ended.saved
    assert [lost["members"] for lost in company.details("lost")] == [[str(raised[0])]]


def test_below_min_nodes_copies_are_made_again_and_a_stop_while_it_waits_saves():
    company = Company(rules=MembershipRules(min_nodes=3, silence_seconds=1.5, cool_down_seconds=10_000.0))
    company.go(lambda: len(steps(company)) == 2)
    company.tell(events.NodeLeft("c", "gone"))
    company.alive.discard(C)
    company.go(lambda: company.run.phase.name == "waiting for nodes")
    assert company.run.base.members == (A, B) and "2 of at least 3 nodes" in company.details("waiting")[0]["reason"]
    company.tell(events.StopAsked())
    company.go()
    assert (company.ended.ending, company.ended.step, company.ended.saved) == (Ending.STOPPED, 2, True)


def test_a_node_drains_its_state_moves_and_its_processes_end():
    company = Company()
    company.go(lambda: len(steps(company)) == 2)
    company.tell(events.NodeDraining("b"))
    company.go()
    assert company.ended.ending is Ending.DONE and company.run.base.members == (A, C)
    assert [command.member for command in company.commands if isinstance(command, commands.Fence)] == [B]
    assert not company.details("lost")


def test_a_node_joins_at_a_step_boundary():
    company = Company(2)
    company.go(lambda: len(steps(company)) == 2)
    company.tell(events.NodeJoined(node(C)))
    company.go()
    assert company.ended.ending is Ending.DONE and company.run.base.members == (A, B, C)
    assert company.details("joining")[0]["nodes"] == ["c"]


def test_a_newcomer_without_memory_costs_its_place_never_the_run():
    company = Company(2)
    company.go(lambda: len(steps(company)) == 2)
    company.tell(events.NodeJoined(node(C)))

    def poor(command):
        if isinstance(command, commands.Call) and command.member.node == "c" and isinstance(command.request, commands.Form):
            company.faults[command.member] = Fault(FailKind.NO_MEMORY, "out of memory")
            return [events.Failed(command.call, command.member, FailKind.NO_MEMORY, "out of memory")]
        return None
    company.twist = poor
    company.go()
    assert company.ended.ending is Ending.DONE and company.run.base.members == (A, B)
    assert "on trial: out of memory" in company.details("lost")[0]["reasons"][0]


def _refuses(company, member, kind):
    """One that cannot use what it is told to, whenever it is told."""
    def refuses(command):
        if isinstance(command, commands.Call) and command.member.node == member.node and isinstance(command.request, kind):
            text = "data.folder is not there"
            company.faults[command.member] = Fault(FailKind.REFUSED, text, command.call)
            return [events.Failed(command.call, command.member, FailKind.REFUSED, text)]
        return None
    return refuses


@pytest.mark.parametrize("kind", [commands.Form, commands.Initialise])
def test_what_a_rank_cannot_use_ends_a_run_that_begins(kind):
    """At once, by the name of the rank: nobody is replaced for it, and nothing was lost."""
    company = Company()
    company.twist = _refuses(company, B, kind)
    company.go()
    assert (company.ended.ending, company.ended.text) == (Ending.REFUSED, "b/0: data.folder is not there")
    assert not company.details("lost") and not [command for command in company.commands if isinstance(command, commands.Fence)]


def test_what_one_that_joins_cannot_use_costs_its_place_never_the_run():
    company = Company(2)
    company.go(lambda: len(steps(company)) == 2)
    company.tell(events.NodeJoined(node(C)))
    company.twist = _refuses(company, C, commands.Form)
    company.go()
    assert company.ended.ending is Ending.DONE and company.run.base.members == (A, B) and steps(company) == [0, 1, 2, 3, 4, 5]
    assert [lost["members"] for lost in company.details("lost")] == [["c/0"]]
    assert company.details("lost")[0]["reasons"] == ["on trial: data.folder is not there"]


def test_what_one_that_serves_cannot_use_any_more_costs_its_place():
    company = Company(goal=Goal(9))
    company.go(lambda: len(steps(company)) == 4)
    company.twist = _refuses(company, B, commands.Step)
    company.go(lambda: bool(company.details("lost")))
    company.twist = lambda command: None
    company.faults.clear()
    company.go()
    assert company.ended.ending is Ending.DONE and steps(company) == list(range(9))
    assert [lost["members"] for lost in company.details("lost")] == [["b/0"]]


def test_initial_values_that_a_rank_cannot_make_when_all_begins_anew_cost_its_place():
    """More is lost than owners cover, and there was no checkpoint: the run has begun long ago all the same."""
    company = Company()
    company.go(lambda: len(steps(company)) == 4)
    company.twist = _refuses(company, B, commands.Initialise)
    company.die(B)
    company.die(C)
    company.go()
    assert company.ended.ending is Ending.DONE and "started_over" in company.kinds()
    assert [lost["members"] for lost in company.details("lost")] == [["b/0", "c/0"], ["b/0#1"]]
    assert steps(company) == [0, 1, 2, 3, 0, 1, 2, 3, 4, 5] and "b" not in {member.node for member in company.run.base.members}


def test_a_coordinator_that_takes_over_believes_what_is_held():
    first = Company(goal=Goal(9))
    first.go(lambda: len(steps(first)) == 4)
    second = Company(goal=Goal(9), head=Head(4, first.run.generation, 1), left_behind=True)
    second.held, second.reduced = first.held, first.reduced
    second.go()
    assert second.ended.ending is Ending.DONE and steps(second) == [4, 5, 6, 7, 8]
    assert "coordinator_restarted" in second.kinds() and "state_lost" not in second.kinds()


@pytest.mark.parametrize("head, checkpoints", [(Head(), ()), (Head(3, 1, 1, 3), (Seen(3, "three"),))])
def test_a_ledger_that_knows_less_than_ranks_hold_is_not_theirs(head, checkpoints):
    """The folder is not mounted where the new coordinator is; or what is there is an old copy."""
    first = Company(goal=Goal(9))
    first.go(lambda: len(steps(first)) == 5)
    second = Company(goal=Goal(9), head=head, checkpoints=checkpoints, left_behind=True)
    second.held, second.reduced = first.held, first.reduced
    second.go()
    assert second.ended.ending is Ending.SUPERSEDED and "there never were more than" in second.ended.text
    assert not [call for call in second.commands if isinstance(call, commands.Call) and not isinstance(call.request, commands.Recall)]
    assert not [command for command in second.commands if isinstance(command, commands.Fence)]


def test_steps_that_were_cut_may_still_be_in_somebodys_memory():
    """A coordinator died after its cut: what was too little to go on with is there still."""
    first = Company(goal=Goal(9))
    first.go(lambda: len(steps(first)) == 5)
    second = Company(goal=Goal(9), head=Head(3, 1, 1, 5), checkpoints=(Seen(3, "three"),), left_behind=True)
    second.held[A], second.reduced[A] = first.held[A], first.reduced[A]
    second.go()
    assert second.ended.ending is Ending.DONE and steps(second) == [3, 4, 5, 6, 7, 8]


@pytest.mark.parametrize("kind, told, text", [
    (commands.Append, "storage_away", "the ledger does not answer for 10 s"), (commands.NeedBatch, "data_away", "a read does not end")])
def test_storage_that_does_not_answer_is_told_and_waited_for_no_longer_than_it_may_be_away(kind, told, text):
    for silent, ending in ((100.0, Ending.DONE), (1e9, Ending.STORAGE)):
        company, held = Company(), []

        def hang(command, company=company, held=held, until=silent):
            if isinstance(command, kind) and company.now < until and len(steps(company)) == 2:
                held.append(command)
                return []
            return None
        company.twist = hang
        company.go(lambda company=company: len(steps(company)) == 2)
        company.go(seconds=min(silent, 50.0))
        assert [details["reason"] for details in company.details(told)] == [text]
        if ending is Ending.DONE:
            for command in held:
                for answer in company._answers(command):
                    company.tell(answer)
        company.go(seconds=320.0)
        assert company.ended.ending is ending and company.kinds().count(told) == 1
        assert company.ended.saved or kind is commands.Append


def test_storage_away_for_a_while_is_waited_for_and_for_good_ends_it():
    for failing, ending in ((5, Ending.DONE), (10_000, Ending.STORAGE)):
        company, left = Company(), [failing]

        def away(command, company=company, left=left):
            if isinstance(command, commands.Append) and isinstance(command.line, commands.StepLine) and left[0]:
                left[0] -= 1
                return [events.StoreFailed(command.order, "no space left")]
            return None
        company.twist = away
        company.go(seconds=5000)
        assert company.ended.ending is ending and len(company.details("storage_away")) == 1


def test_superseded_ends_at_once():
    company = Company()
    company.go(lambda: len(steps(company)) == 2)
    company.tell(events.LineRefused(10_000, Ending.SUPERSEDED, "epoch 2 has begun"))
    company.go()
    assert company.ended.ending is Ending.SUPERSEDED


def test_what_a_rank_refuses_a_coordinator_of_before_ends_no_run():
    """Where both live in one process, an answer to the one may come to the other."""
    company = Company(goal=Goal(9))
    company.go(lambda: len(steps(company)) == 4)
    company.tell(events.Failed(commands.CallId(company.run.epoch - 1, 7), B, FailKind.SUPERSEDED, "epoch 0 is over"))
    company.go()
    assert company.ended.ending is Ending.DONE and not company.details("lost")
