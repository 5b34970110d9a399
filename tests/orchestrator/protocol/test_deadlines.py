"""Bounds of docs/elastic.md: the figures, and what a run does when one has passed."""

from __future__ import annotations

from dataclasses import replace

import pytest
from company import Company, fenced, is_call, node, steps

from orchestrator.config.run_config import parse
from orchestrator.protocol import commands, events
from orchestrator.protocol.deadlines import Deadlines
from orchestrator.protocol.events import Ending, FailKind, Goal, Recalled
from orchestrator.protocol.members import Member
from orchestrator.refusal import ConfigError

A, B, C = (Member(name, 0) for name in "abc")
AUTO = Deadlines(
    silence=1.5, start=180.0, adopt=2.5, release=10.0, making=25.0, finish=15.0, form=180.0, load=600.0, step=630.0, stuck=10.0,
    stuck_times=10.0, files=600.0, probe=2.0, storage=300.0, give_up=1800.0, wait=None, first_pause=0.1,
    last_pause=30.0, recall=1.0)


@pytest.mark.parametrize("settings, found", [
    ([], {}),
    (["elastic.silence_seconds=30"], {"silence": 30.0, "adopt": 31.0, "release": 49.0, "finish": 54.0}),
    (["elastic.abort_seconds=10"], {"release": 22.25, "finish": 27.25}),
    (["elastic.form_seconds=60"], {"making": 300.0, "finish": 70.0}),
    (["elastic.form_seconds=200"], {"making": 1000.0, "finish": 210.0, "form": 210.0}),
    (["topology.virtual_nodes=4", "topology.ranks_per_node=1"],
     {"silence": 15.0, "adopt": 16.0, "release": 26.5, "finish": 31.5}),
    (["training.step_timeout_seconds=900"], {"load": 900.0, "step": 930.0, "files": 900.0}),
    (["training.step_timeout_seconds=60"], {"step": 90.0, "files": 60.0}),
    (["elastic.stuck_seconds=20"], {"stuck": 20.0, "stuck_times": 0.0}),
    (["elastic.storage_seconds=60", "elastic.give_up_seconds=700", "elastic.wait_seconds=50"],
     {"storage": 60.0, "give_up": 700.0, "wait": 50.0}),
], ids=lambda value: " ".join(value) if isinstance(value, list) else "")
def test_bounds_of_a_configuration(settings, found):
    assert Deadlines.of(parse({}, settings)) == replace(AUTO, **found)


def test_a_run_that_would_give_up_within_one_recovery_is_refused():
    with pytest.raises(ConfigError, match=r"elastic.give_up_seconds.*190"):
        Deadlines.of(parse({}, ["elastic.give_up_seconds=190"]))
    assert Deadlines.of(parse({}, ["elastic.give_up_seconds=191"])).give_up == 191.0


def _steps_of(company, seconds, number):
    """So many steps that take so long each; then the next one, of which nobody says anything."""
    held = []

    def holds(command):
        if is_call(command, commands.Step):
            held.append(command)
            return []
        return None
    company.twist = holds
    for _ in range(number):
        company.go(lambda: len(held) == len(company.run.seated) > 0)
        company.go(seconds=seconds)
        for command in held:
            for answer in company._answers(command):
                company.tell(answer)
        held.clear()
    company.go(lambda: len(held) == len(company.run.seated) > 0)
    return company.now


def _interrupted_after(company, began):
    company.go(lambda: bool(company.details("aborted")), seconds=2000.0)
    first = next(details for details in company.details("interrupted"))
    return company.now - began, first["reason"]


@pytest.mark.parametrize("lasted, bounds, stuck", [
    (0.5, Deadlines(), 10.0), (2.0, Deadlines(), 20.0), (2.0, Deadlines(stuck=4.0, stuck_times=0.0), 4.0)])
def test_nobody_finishes_anything_for_longer_than_ten_median_steps(lasted, bounds, stuck):
    """Ten seconds at least; or as long as was set, whatever steps last."""
    company = Company(goal=Goal(9), bounds=bounds)
    began = _steps_of(company, lasted, 3)
    seconds, reason = _interrupted_after(company, began)
    assert stuck < seconds <= stuck + 0.5 and "nobody finished anything for" in reason


@pytest.mark.parametrize("bounds, seconds, why", [
    (Deadlines(), 630.0, "no answer within 630 s"),
    (Deadlines(stuck=4.0, stuck_times=0.0), 4.25, "nobody finished anything for")])
def test_nobody_knows_how_long_the_first_step_takes(bounds, seconds, why):
    """So that only its own bound holds, or one that was set."""
    company = Company(bounds=bounds)
    began = _steps_of(company, 0.0, 0)
    after, reason = _interrupted_after(company, began)
    assert seconds <= after <= seconds + 0.5 and why in reason


def test_as_long_as_one_finishes_something_nobody_hangs():
    company = Company(goal=Goal(9))
    _steps_of(company, 0.5, 3)
    for number in range(1, 6):
        company.go(seconds=8.0)
        company.finished[B] = number
    assert not company.details("aborted")
    after, _ = _interrupted_after(company, company.now)
    assert 10.0 < after <= 11.0


def test_what_nobody_finished_while_the_coordinator_was_away_counts_from_its_return():
    company = Company(goal=Goal(9))
    _steps_of(company, 0.5, 3)
    company.go(seconds=5.0)
    company.now += 100.0
    after, _ = _interrupted_after(company, company.now)
    assert 10.0 < after <= 11.0


def test_to_let_go_there_is_time_for_two_median_steps():
    company = Company(4, goal=Goal(9))
    _steps_of(company, 8.0, 3)
    company.twist = lambda command: [events.LetGo(member, command.generation) for member in command.members if member != B] if (
        isinstance(command, commands.Abort)) else None
    company.die(Member("d", 0))
    began = company.now
    company.go(lambda: B in fenced(company), seconds=100.0)
    assert 16.0 <= company.now - began <= 16.5 and "did not let go within 16 s" in company.run.membership.why_lost(B)


@pytest.mark.parametrize("forming, bound", [(False, 10.0), (True, 28.5)])
def test_who_makes_process_groups_when_it_is_to_let_go_has_the_time_that_gloo_takes(forming, bound):
    """Five times as long as for one connection, with which gloo tries over a link that is cut; who only computes has not."""
    company, busy = Company(4, goal=Goal(9)), []
    company.go(lambda: len(steps(company)) == 2)

    def is_busy(command):
        if is_call(command, commands.Recall) and command.member == B:
            busy.append(command)
            return []
        return None
    company.twist = is_busy
    company.die(Member("d", 0))
    began = company.now
    while B not in fenced(company) and company.now < 100.0:
        company.go(lambda: B in fenced(company), seconds=1.0)  # as long as one answer may take
        if busy:
            command = busy.pop()
            company.tell(events.Answered(command.call, B, Recalled((), busy=events.CallId(1, 1), forming=forming)))
    assert bound <= company.now - began <= bound + 1.25
    assert "its computing hangs" in company.run.membership.why_lost(B)


def test_newcomers_try_their_links_for_two_seconds_and_for_two_more():
    """If somebody is not reached. Who does not answer then has as long as for letting go besides; the newcomer stays outside."""
    company = Company(2, goal=Goal(9))
    company.go(lambda: len(steps(company)) == 2)
    probes = []

    def asleep(command):
        if is_call(command, commands.Probe):
            probes.append(command)
            return [events.Answered(command.call, command.member, events.Probed((A,)))] if command.member == C else []
        return None
    company.twist = asleep
    company.tell(events.NodeJoined(node(C)))
    company.go(lambda: len(probes) == 2)
    began = company.now
    assert [(command.member, command.request.peers, command.request.seconds) for command in probes] == [
        (C, (A, B), 2.0), (A, (C,), 2.0)]
    company.go(lambda: C in fenced(company), seconds=100.0)
    assert 12.0 <= company.now - began <= 12.5
    company.twist = lambda command: None
    company.go()
    assert company.ended.ending is Ending.DONE and fenced(company) == {C}


def test_a_process_that_does_not_start_is_given_up_and_asked_for_anew():
    company, spawned = Company(2, goal=Goal(9)), []

    def never(command):
        if isinstance(command, commands.Spawn):
            spawned.append(company.now)
            return []
        return [] if is_call(command, commands.Step) and len(steps(company)) == 2 else None
    company.run.bounds = Deadlines(stuck=1e6, stuck_times=0.0)
    company.twist = never
    company.go(lambda: len(steps(company)) == 2)
    company.tell(events.NodeJoined(node(C)))
    company.go(lambda: len(spawned) == 2)
    assert 185.0 <= spawned[1] - spawned[0] <= 186.0, "180 s, and its cool-down"
    assert "did not start within 180 s" in company.run.membership.why_lost(C) and not company.details("interrupted")


def test_a_checkpoint_whose_pieces_are_not_there_in_time_is_given_up_and_the_run_goes_on():
    company, collected = Company(goal=Goal(9, save_every=3), bounds=Deadlines(files=60.0, stuck=1e6, stuck_times=0.0)), []

    def slow(command):
        if is_call(command, commands.Collect) and command.request.step == 3:
            collected.append(company.now)
            return []
        return [] if is_call(command, commands.Step) and command.request.step == 5 else None
    company.twist = slow
    company.go(lambda: "checkpoint_failed" in company.kinds(), seconds=200.0)
    failed, = company.details("checkpoint_failed")
    assert (failed["step"], failed["reason"]) == (3, "not written within 60 s") and 60.0 <= company.now - collected[0] <= 60.5
    company.twist = lambda command: None
    for call, member in company.run.phase.calls.items():
        company.tell(events.Failed(call, member, FailKind.ABORTED, "a peer has gone"))
    company.go()
    assert company.ended.ending is Ending.DONE and [details["step"] for details in company.details("checkpoint")] == [6, 9]
