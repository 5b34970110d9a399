"""The state machine of a run in a world where everybody answers, but for what a test does to it."""

from __future__ import annotations

import pytest
from company import Company, node

from orchestrator.membership import Member, Rules
from orchestrator.protocol import commands, events
from orchestrator.protocol.events import Ending, FailKind, Fault, Goal, Head, Seen

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
                company.faults[command.member] = Fault(FailKind.OWN, "ValueError: boom")
                return [events.Failed(command.call, command.member, FailKind.OWN, "ValueError: boom")]
            return []
        return None
    company.twist = faulty
    company.go()
    assert company.ended.ending is Ending.OWN_FAULT and "boom" in company.ended.text
    assert len(set(raised)) == 2 and company.ended.step == 3 and company.ended.saved


def test_below_min_nodes_copies_are_made_again_and_a_stop_while_it_waits_saves():
    company = Company(rules=Rules(min_nodes=3, silence_seconds=1.5, cool_down_seconds=10_000.0))
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


def test_a_coordinator_that_takes_over_believes_what_is_held():
    first = Company(goal=Goal(9))
    first.go(lambda: len(steps(first)) == 4)
    second = Company(goal=Goal(9), head=Head(4, first.run.generation, 1), left_behind=True)
    second.held, second.reduced = first.held, first.reduced
    second.go()
    assert second.ended.ending is Ending.DONE and steps(second) == [4, 5, 6, 7, 8]
    assert "coordinator_restarted" in second.kinds() and "state_lost" not in second.kinds()


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
