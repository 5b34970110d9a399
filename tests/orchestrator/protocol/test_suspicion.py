"""Who goes for a link that carries nothing, in the order that docs/elastic.md gives; and which links do."""

from __future__ import annotations

import pytest
from company import Company, fenced, is_call, steps

from orchestrator.protocol import commands, events
from orchestrator.protocol.events import FailKind, Goal, Probed
from orchestrator.protocol.members import Member
from orchestrator.protocol.suspicion import by_links, cut_links

A, B, C, D = (Member(name, 0) for name in "abcd")
ALL = (A, B, C, D)


@pytest.mark.parametrize("links, before, newcomers, safe, may_go, gone", [
    pytest.param([(A, B), (A, C)], {}, (B,), (B, C), ALL, A, id="who has more, before a newcomer and before what is lost"),
    pytest.param([(A, B)], {"a": {"c"}}, (B,), (B,), ALL, A, id="links that were cut earlier since the last step count"),
    pytest.param([(A, B)], {"a": {"b"}}, (B,), (), ALL, B, id="but none counts twice"),
    pytest.param([(A, B)], {"c": {"d"}, "d": {"c"}}, (), (), ALL, B, id="and none of others"),
    pytest.param([(A, B)], {}, (A,), (B,), ALL, A, id="a newcomer, before what is lost"),
    pytest.param([(A, B)], {}, (A, B), (A,), ALL, A, id="of two newcomers the one whose going loses no state"),
    pytest.param([(A, B)], {}, (), (A,), ALL, A, id="whose going loses no state"),
    pytest.param([(A, B)], {}, (), (A, B), ALL, B, id="the later by name"),
    pytest.param([(A, B), (A, C)], {}, (), ALL, (B, C), C, id="among those that may go"),
])
def test_which_end_goes(links, before, newcomers, safe, may_go, gone):
    found = by_links(links, before, newcomers, lambda member: member in safe, may_go)
    assert found.member == gone and not found.perhaps
    for order in (links, links[::-1]):
        assert by_links(order, before, newcomers, lambda member: member in safe, may_go) == found


def test_who_goes_is_told_with_all_whom_it_does_not_reach():
    assert by_links([(A, C), (A, B)], {"a": {"d"}}, (), lambda member: True, ALL).reason == "no way between it and b/0, c/0"


def test_where_all_links_carry_nobody_goes():
    assert by_links([], {"a": {"b"}}, ALL, lambda member: True, ALL) is None


@pytest.mark.parametrize("not_reached, cut", [
    ({A: (), B: ()}, []),
    ({A: (B,), B: (A,)}, [(A, B)]),
    ({A: (B,), B: ()}, []),
    ({A: (B,)}, [(A, B)]),
    ({C: (A, B), A: (C,), B: ()}, [(A, C)]),
    ({B: (C, A), C: (B,)}, [(A, B), (B, C)]),
], ids=["none", "both say so", "only one, though the other was asked", "only one, for the other did not answer",
        "one was asleep for a moment", "in order, each once"])
def test_a_link_is_cut_if_all_who_say_anything_of_it_say_so(not_reached, cut):
    assert cut_links(not_reached) == cut


@pytest.mark.parametrize("steps_between, gone", [(False, [C, B]), (True, [C, D])])
def test_cut_links_are_counted_until_a_step_is_committed(steps_between, gone):
    """First b and c, then b and d: without a step in between b is the one that both times have in common."""
    company = Company(4, goal=Goal(9))
    company.go(lambda: len(steps(company)) == 2)

    def apart(command):
        pair = {B, C} if C in company.run.seated else {B, D}
        if is_call(command, commands.Step) and pair <= set(company.run.seated):
            if steps_between and pair == {B, D} and len(steps(company)) < 4:
                return None
            return [events.Failed(command.call, command.member, FailKind.ABORTED, "a peer has gone")]
        if is_call(command, commands.Probe):
            return [events.Answered(command.call, command.member, Probed(tuple(
                peer for peer in command.request.peers if {peer, command.member} == pair)))]
        return None
    company.twist = apart
    company.go(lambda: len(fenced(company)) == 2)
    assert [lost["members"] for lost in company.details("lost")][:1] == [["c/0"]]
    assert fenced(company) == set(gone)
