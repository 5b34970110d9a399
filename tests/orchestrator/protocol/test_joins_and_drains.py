"""Those who join and those who drain, where something else happens at the same time."""

from __future__ import annotations

from itertools import pairwise

from company import Company, cuts, fenced, is_call, steps

from orchestrator.protocol import commands, events
from orchestrator.protocol.events import Ending, FailKind, Fault, Goal, Probed
from orchestrator.protocol.members import Member
from orchestrator.topology import Node

A, B, C, D = (Member(name, 0) for name in "abcd")


def test_two_newcomers_at_once_that_do_not_reach_one_who_serves():
    """`one that is about to join does not reach everybody: ... those who train notice nothing`."""
    company = Company(3)
    company.go(lambda: len(steps(company)) == 2)
    company.tell(events.NodeJoined(Node("d", 1)))
    company.tell(events.NodeJoined(Node("e", 1)))
    new = {D, Member("e", 0)}

    def apart(command):
        if is_call(command, commands.Probe):
            peers = command.request.peers
            bad = tuple(peer for peer in peers if command.member in new and peer == A or command.member == A and peer in new)
            return [events.Answered(command.call, command.member, Probed(bad))]
        return None
    company.twist = apart
    company.go()
    assert company.ended.ending is Ending.DONE
    assert not {A, B, C} & fenced(company), [(c.member, c.reason) for c in company.commands if isinstance(c, commands.Fence)]


def test_a_collect_that_ends_in_a_recovery_does_not_end_the_one_who_holds_all():
    """b drains, has handed over and still writes its pieces; a dies before the next step: b is what is left, and is chosen
    (Carry). Its piece is written then: the saver has it ended."""
    company = Company(2, goal=Goal(9, save_every=3))
    collects, finishes = [], []

    def slow(command):
        if is_call(command, commands.Collect):
            collects.append(command)
            return []
        if is_call(command, commands.Step) and company.run.seated == (A,):
            return []
        if is_call(command, commands.Finish) and company.run.seated == ():
            finishes.append(command)
            return []
        return None
    company.twist = slow
    company.go(lambda: len(collects) == 2)
    company.tell(events.NodeDraining("b"))
    company.go(lambda: company.run.base is not None and company.run.base.members == (A,))
    company.go(lambda: company.run.phase.name == "stepping")
    assert B not in fenced(company)
    company.die(A)
    company.go(lambda: bool(finishes), seconds=60)
    assert [call.member for call in finishes] == [B], "it goes on with what b holds"
    collect = next(call for call in collects if call.member == B)
    company.tell(events.Answered(collect.call, B, events.Done()))
    company.go(lambda: not company._queue, seconds=1)
    company.twist = lambda command: None
    if B in company.alive:
        for answer in company._answers(finishes[0]):
            company.tell(answer)
    company.go()
    assert not cuts(company) and "started_over" not in company.kinds(), (cuts(company), company.kinds())


def test_a_collect_that_ends_while_groups_are_made_does_not_end_a_newcomer_whose_node_began_to_drain():
    company = Company(2, goal=Goal(9, save_every=2))
    collects = []

    def slow(command):
        if is_call(command, commands.Collect):
            collects.append(command)
            return []
        return [] if is_call(command, commands.Form) and C in command.request.plan.members else None
    company.twist = slow
    company.go(lambda: len(collects) == 2)
    company.tell(events.NodeJoined(Node("c", 1)))
    company.go(lambda: company.run.phase.name == "moving" and C in company.run.taking_part)
    company.tell(events.NodeDraining("c"))
    for call in collects[:2]:
        company.tell(events.Answered(call.call, call.member, events.Done()))
    company.go(lambda: C in fenced(company), seconds=5)
    assert C not in fenced(company), (company.run.phase.name, fenced(company))


def test_who_left_by_drain_is_not_told_as_lost_instead_of_the_one_with_the_error():
    """b and c drain together and hand over (WorkerAssignment.leaving): taking_part still names them long after they were ended. The
    next interruption is put down to them; who raised the error stays."""
    company = Company(5, goal=Goal(9))
    company.go(lambda: len(steps(company)) == 2)
    company.tell(events.NodeDraining("b"))
    company.tell(events.NodeDraining("c"))
    company.go(lambda: len(steps(company)) == 5)
    e = Member("e", 0)
    assert company.run.base.members == (A, D, e) and not company.details("lost")
    raised = []

    def faulty(command):
        if is_call(command, commands.Step) and not raised and command.member == D:
            raised.append(command)
            company.faults[D] = Fault(FailKind.OWN, "ValueError: boom", command.call)
            return [events.Failed(command.call, D, FailKind.OWN, "ValueError: boom")]
        return None
    company.twist = faulty
    company.go()
    assert company.ended.ending is Ending.DONE
    assert [lost["members"] for lost in company.details("lost")] == [["d/0"]], company.details("lost")


def test_an_error_of_a_newcomer_that_its_peers_answer_with_errors_of_their_own_costs_it_its_place_not_the_run():
    """Table `Who is named`: `an error of its own: one that is on trial; else that one ...`."""
    company = Company(2, goal=Goal(9))
    company.go(lambda: len(steps(company)) == 2)
    company.tell(events.NodeJoined(Node("c", 1)))
    raised = []

    def garbage(command):
        if is_call(command, commands.Step) and C in company.run.seated and len(raised) < 2 and command.member in (B, C):
            raised.append(command)
            company.faults[command.member] = Fault(FailKind.OWN, f"{command.member}: shapes differ", command.call)
            return [events.Failed(command.call, command.member, FailKind.OWN, "shapes differ")]
        return None
    company.twist = garbage
    company.go()
    assert company.ended.ending is Ending.DONE, company.ended


def test_a_newcomer_that_does_not_answer_the_try_is_not_taken_in():
    """It beats, but answers no call: nobody waits for it."""
    company = Company(2, goal=Goal(9))
    company.go(lambda: len(steps(company)) == 2)
    generation = company.run.generation
    company.tell(events.NodeJoined(Node("c", 1)))
    company.deaf.add(C)
    began = company.now
    company.go(lambda: len(steps(company)) == 4, seconds=500.0)
    assert company.now - began < 30.0 and company.run.generation == generation, (company.now - began, company.run.generation)


def test_who_was_told_to_end_for_a_drain_is_not_taken_in_again():
    """NodeStays comes between the Fence of a drained member and the end of its process."""
    company = Company(3, goal=Goal(9))
    company.go(lambda: len(steps(company)) == 2)
    company.tell(events.NodeDraining("b"))
    pending = []

    def slowly(command):
        if isinstance(command, commands.Fence) and command.member == B:
            pending.append(command)
            return []
        return None
    company.twist = slowly
    company.go(lambda: bool(pending))
    company.tell(events.NodeStays("b"))
    company.go(lambda: B in company.run.seated or B in company.run.taking_part and company.run.phase.name == "moving", seconds=5)
    assert B not in company.run.seated and not (company.run.phase.name == "moving" and B in company.run.taking_part)


def test_a_drained_node_that_does_not_serve_has_its_processes_ended():
    """`a node drains: ... its ranks end`: c drains after it was asked for, before its hello: no change of layout and no
    checkpoint is waited for to end it."""
    company = Company(2, goal=Goal(30))
    company.go(lambda: len(steps(company)) == 2)
    spawned = []

    def slow(command):
        if isinstance(command, commands.Spawn):
            spawned.append(command.member)
            company.alive.add(command.member)
            company.held[command.member] = {}
            return []
        return None
    company.twist = slow
    company.tell(events.NodeJoined(Node("c", 1)))
    company.go(lambda: bool(spawned))
    company.tell(events.NodeDraining("c"))
    company.tell(events.Hello(C))
    company.go(lambda: len(steps(company)) == 25)
    assert C in fenced(company)


def test_a_newcomer_with_which_no_step_ends_for_the_second_time_loses_its_place_though_nobody_is_to_blame():
    """The first time it is anybody's; links are tried each time, and carry everything."""
    company = Company(2, goal=Goal(9))
    company.go(lambda: len(steps(company)) == 2)
    company.tell(events.NodeJoined(Node("c", 1)))
    broken = []

    def breaks_off(command):
        if is_call(command, commands.Step) and C in company.run.seated:
            broken.append(company.run.generation)
            return [events.Failed(command.call, command.member, FailKind.ABORTED, "a peer has gone")]
        return None
    company.twist = breaks_off
    company.go()
    assert company.ended.ending is Ending.DONE and company.run.base.members == (A, B) and fenced(company) == {C}
    assert len(set(broken)) == 2 and len(company.details("interrupted")) == 1
    lost, = company.details("lost")
    assert (lost["members"], lost["reasons"]) == (["c/0"], ["a generation with it does not stand"])
    assert len([command for command in company.commands if is_call(command, commands.Probe) and command.member == A]) == 2
    assert steps(company) == list(range(9)) and "waiting" not in company.kinds()


def test_one_that_fails_five_times_in_a_row_is_not_started_again_until_its_node_has_left_and_joined():
    """Each time after a cool-down that doubles. Steps take a quarter of a second, so that time passes."""
    company = Company(2, goal=Goal(2000))
    spawned, has_memory = [], []

    def poor(command):
        if isinstance(command, commands.Spawn):
            spawned.append(company.now)
        if is_call(command, commands.Step) and command.member == A:
            company.now += 0.25
            company.tell(events.Heard({member: events.Beat(company.now) for member in company.alive}))
        if is_call(command, commands.Form) and command.member.node == "c" and not has_memory:
            company.faults[command.member] = Fault(FailKind.NO_MEMORY, "out of memory", command.call)
            return [events.Failed(command.call, command.member, FailKind.NO_MEMORY, "out of memory")]
        return None
    company.twist = poor
    company.go(lambda: len(steps(company)) == 2)
    company.tell(events.NodeJoined(Node("c", 1)))
    company.go(lambda: "barred" in company.kinds(), seconds=300)
    pauses = [later - earlier for earlier, later in pairwise(spawned)]
    assert len(pauses) == 4 and all(limit <= pause < limit + 1.0 for limit, pause in zip((5, 10, 20, 40), pauses)), pauses
    barred, = company.details("barred")
    assert (barred["node"], barred["tried"]) == ("c", 5)
    company.go(seconds=320)  # longer than any cool-down
    assert len(spawned) == 5
    company.tell(events.NodeJoined(Node("c", 1)))  # it has not left
    company.go(seconds=5)
    assert len(spawned) == 5
    has_memory.append(True)
    company.tell(events.NodeLeft("c", "gone"))
    company.tell(events.NodeJoined(Node("c", 1)))
    company.go(lambda: any(member.node == "c" for member in company.run.base.members), seconds=300)
    assert len(spawned) == 6 and company.run.base.members[:2] == (A, B) and company.run.base.members[2].node == "c"
    assert company.ended is None and not {A, B} & fenced(company)
