"""Rules of membership, one by one."""

from __future__ import annotations

import time

import pytest

from orchestrator.config.run_config import parse
from orchestrator.protocol.members import ENDS_TOGETHER_SECONDS, STARTS_IN_VAIN, Decision, Member, MembershipRules
from orchestrator.protocol.membership import Membership
from orchestrator.topology import Node

RULES = MembershipRules(min_nodes=2, silence_seconds=1.0, cool_down_seconds=30.0)
A0, A1, B0, B1, C0, C1 = (Member(node, local) for node in "abc" for local in range(2))
ALL = (A0, A1, B0, B1, C0, C1)


def cluster(names: str = "abc", ranks: int = 2, rules: MembershipRules = RULES, now: float = 0.0) -> Membership:
    """All there, all ready."""
    state = Membership(rules)
    for name in names:
        state = state.node_joined(Node(name, ranks), now)
        for local in range(ranks):
            state = state.ready(Member(name, local), now)
    return state


def listened(state: Membership, until: float, members=ALL, since: float = 0.0, step: float = 0.1, last=None) -> Membership:
    """Beats of `members` at every step; `last`: of others, which are silent."""
    for tick in range(1, round((until - since) / step) + 1):
        now = since + tick * step
        state = state.listened(dict.fromkeys(members, now) | (last or {}), now)
    return state


def nodes(decision: Decision) -> str:
    return " ".join(f"{node.name}{node.ranks}" for node in decision.nodes)


def test_names():
    assert [str(Member("n", 1)), str(Member("n", 1, 2))] == ["n/1", "n/1#2"]
    assert sorted([Member("b", 0), Member("a", 1, 1), Member("a", 1), Member("a", 0, 9)]) == [
        Member("a", 0, 9), Member("a", 1), Member("a", 1, 1), Member("b", 0)]


def test_rules_of_a_configuration():
    assert MembershipRules.of(parse({}).elastic) == MembershipRules(1, None, 1.5, 30.0)
    assert MembershipRules.of(parse({}).elastic, one_host=True) == MembershipRules(1, None, 15.0, 30.0)
    assert MembershipRules.of(parse({}, ["elastic.beat_seconds=1"]).elastic) == MembershipRules(1, None, 4.0, 30.0)
    section = parse({"elastic": {"min_nodes": 2, "max_nodes": 3, "silence_seconds": 2, "cool_down_seconds": 0}}).elastic
    assert MembershipRules.of(section) == MembershipRules(2, 3, 2.0, 0.0)


def test_from_an_empty_cluster_to_the_first_layout():
    state = Membership(RULES)
    assert state.decide((), 0.0) == Decision((), (), (), (), False, (), (), "0 of at least 2 nodes can be used", {})
    state = state.node_joined(Node("a", 2), 0.0).node_joined(Node("b", 1), 0.0)
    assert state.decide((), 0.0).start == (A0, A1, B0)
    for member in (A0, A1, B0):
        state = state.started(member, 1.0)
    assert state.decide((), 1.0).start == () and state.decide((), 1.0).nodes == ()
    state = state.ready(A0, 9.0)
    assert nodes(state.decide((), 9.0)) == "a1"
    assert state.decide((), 9.0).wait == "1 of at least 2 nodes can be used; b: its rank 0 is not ready yet"
    state = state.ready(A1, 9.0).ready(B0, 9.5)
    found = state.decide((), 9.5)
    assert (nodes(found), found.wait, found.joining, found.reasons) == ("a2 b1", None, True, {})
    assert not state.decide((A0, A1, B0), 9.5).joining


def test_a_process_that_ends_is_lost_alone_and_started_at_once():
    state = cluster().ended(B1, 5.0, "SIGKILL")
    found = state.decide(ALL, 5.0)
    assert (found.lost, found.start, nodes(found), found.joining) == ((B1,), (Member("b", 1, 1),), "a2 b1 c2", False)
    assert found.reasons == {B1: "SIGKILL"}
    state = state.started(Member("b", 1, 1), 5.1).ended(B1, 5.2, "again") # of the old one
    assert state.decide(ALL, 5.2).start == ()
    state = state.ready(Member("b", 1, 1), 9.0)
    assert nodes(state.decide((A0, A1, B0, C0, C1), 9.0)) == "a2 b2 c2"
    assert state.decide((A0, A1, B0, C0, C1), 9.0).joining
    assert state.decide(ALL, 9.0).lost == (B1,)  # its place is taken, it is still lost
    assert state.trusts(Member("b", 1, 1)) and not state.trusts(B1) and not state.trusts(Member("b", 2))


def test_ranks_above_a_lost_one_wait_for_it():
    found = cluster().ended(B0, 5.0, "SIGKILL").decide(ALL, 5.0)
    assert (found.lost, nodes(found)) == ((B0,), "a2 c2")
    assert found.reasons == {B0: "SIGKILL", "b": "its rank 0 is not ready yet"}


def test_a_place_that_loses_processes_again_cools_down():
    state, starts = cluster(), []
    for n in range(4):
        now = 10.0 * n
        state = state.ended(Member("b", 1, n), now, "error")
        starts.append(next(wait for wait in (0, 29.9, 30, 59.9, 60, 119.9, 120)
                           if state.decide((), now + wait).start == (Member("b", 1, n + 1),)))
        state = state.ready(Member("b", 1, n + 1), now)
    assert starts == [0, 30, 60, 120]
    state = state.ended(Member("b", 1, 4), 30 + 120 + 32 * 30 + 1, "error")  # forgotten by now
    assert state.decide((), 30 + 120 + 32 * 30 + 1).start == (Member("b", 1, 5),)


def test_the_last_beat_of_one_that_ended_is_no_sign_of_life():
    state = listened(cluster(), 5.0).ended(B1, 5.05, "EOF").listened(dict.fromkeys(ALL, 5.0), 5.1)
    assert state.decide(ALL, 5.1).fence == ()
    assert state.listened(dict.fromkeys(ALL, 5.2), 5.2).decide(ALL, 5.2).fence == (B1,)  # blamed for an error, and still there


def test_why_rank_0_does_not_start():
    state = cluster().ended(B0, 1.0, "error").ready(Member("b", 0, 1), 5.0).ended(Member("b", 0, 1), 6.0, "bad memory")
    assert state.decide((), 6.0).reasons["b"] == "its rank 0 is on a cool-down after 2 losses (bad memory)"


@pytest.mark.parametrize("how", ["left", "ended", "ended, then left", "silent", "silent, then left"])
def test_a_node_is_lost_once_whatever_is_seen_of_it(how):
    state = listened(cluster(), 5.0)
    if "ended" in how:
        state = state.ended(B0, 5.0, "EOF").started(Member("b", 0, 1), 5.0).ended(B1, 5.0, "EOF")
    if "silent" in how:
        state = listened(state, 6.1, (A0, A1, C0, C1), since=5.0, last={B0: 5.0, B1: 4.9})
    if "left" in how:
        state = state.node_left("b", 6.1, "health check")
    found = state.decide(ALL, 6.1)
    assert (found.lost, nodes(found), found.start, found.fence) == ((B0, B1), "a2 c2", (), ())
    assert state.hosts["b"].losses == 1
    state = state.node_joined(Node("b", 2), 7.0)
    begin = 5.0 if "ended" in how else 6.1
    early, late = state.decide((), begin + 29.7), state.decide((), begin + 30.1)
    next_ = 2 if "ended" in how else 1
    assert early.start == () and "cool-down of 30 s" in early.reasons["b"]
    assert late.start == (Member("b", 0, next_), Member("b", 1, 1))
    assert state.ready(Member("b", 0, next_), 40.0).node_left("b", 41.0, "").hosts["b"].losses == 2
    again = state.ready(Member("b", 0, next_), 40.0).ready(Member("b", 1, 1), 40.0).ended(Member("b", 1, 1), 41.0, "kill")
    assert again.decide((), 41.0).start == (Member("b", 1, 2),)  # the process's own first loss


def test_two_processes_lost_one_after_the_other_are_no_lost_node():
    state = cluster().ended(B0, 5.0, "kill").started(Member("b", 0, 1), 5.0).ended(B1, 6.5, "kill")
    assert state.decide((), 6.5).start == (Member("b", 1, 1),)


def test_cool_down_doubles_and_is_bounded():
    state, waits, now = cluster("ab", 1), [], 0.0
    for _ in range(8):
        state = state.node_left("b", now, "spot").node_joined(Node("b", 1), now)
        waits.append(state.hosts["b"].until - now)
        now = state.hosts["b"].until
        assert state.decide((), now - 0.1).start == () != state.decide((), now).start
    assert waits == [30, 60, 120, 240, 480, 960, 960, 960]
    assert "lost 8 times in a row (spot)" in state.decide((), now - 1).reasons["b"]
    state = state.node_left("b", now + 961, "spot")
    assert state.hosts["b"].losses == 1


def test_silence_of_one_member_and_of_a_node():
    state = listened(cluster(), 5.0)
    alone = listened(state, 6.0, (A0, A1, B0, C0, C1), since=5.0, last={B1: 5.0})
    assert alone.decide(ALL, 6.0).lost == ()
    alone = listened(alone, 6.1, (A0, A1, B0, C0, C1), since=6.0, last={B1: 5.0})
    found = alone.decide(ALL, 6.1)
    assert (found.lost, found.start) == ((B1,), (Member("b", 1, 1),))
    assert found.reasons[B1] == "not heard from for 1.10 s, while others of its node were"
    both = listened(state, 6.1, (A0, A1, C0, C1), since=5.0, last={B0: 5.0, B1: 5.18})
    found = both.decide(ALL, 6.1)
    assert (found.lost, found.start) == ((B0, B1), ()) and found.reasons[B0] == found.reasons[B1] == (
        "cut off or frozen: not heard from for 1.10 s")


def test_a_thawed_member_is_fenced_and_comes_back_as_the_next():
    state = listened(listened(cluster(), 5.0), 6.1, (A0, A1, C0, C1), since=5.0, last={B0: 5.0, B1: 5.0})
    assert state.decide(ALL, 6.1).fence == ()
    state = listened(state, 8.0, ALL, since=6.1)
    found = state.decide((A0, A1, C0, C1), 8.0)
    assert (found.fence, found.start, nodes(found)) == ((B0, B1), (), "a2 c2")
    assert not state.ready(B0, 8.1).started(B0, 8.1).trusts(B0)  # not again
    state = state.ready(B0, 8.1).ready(Member("b", 0, 1), 8.1).ready(Member("b", 1, 1), 8.1)
    let_go = (A0, A1, C0, C1, Member("b", 0, 1), Member("b", 1, 1))
    state = listened(state, 9.0, let_go, since=8.1)
    assert state.decide((), 9.0).fence == () and nodes(state.decide((), 9.0)) == "a2 c2"
    state = listened(state, 36.2, let_go, since=9.0)
    assert nodes(state.decide((), 36.2)) == "a2 b2 c2" and state.decide((), 36.2).start == ()


def test_one_that_does_not_let_go_is_replaced_and_still_fenced():
    state = listened(listened(cluster(), 5.0), 6.1, (A0, A1, C0, C1), since=5.0, last={B0: 5.0, B1: 5.0})
    state = listened(state, 36.2, ALL, since=6.1)
    assert state.decide((), 36.2).start == (Member("b", 0, 1), Member("b", 1, 1))
    state = state.started(Member("b", 0, 1), 36.2)
    assert state.decide((), 36.2).fence == (B0, B1)


def test_a_node_that_left_but_whose_processes_live_on_is_fenced():
    state = listened(listened(cluster(), 5.0).node_left("b", 5.0, "raylet died"), 5.5, since=5.0)
    assert state.decide((), 5.5).fence == (B0, B1)


def test_a_listener_that_was_away_judges_nobody():
    state = listened(cluster(), 5.0)
    stale = dict.fromkeys(ALL, 5.0)
    state = state.listened(stale, 65.0)
    assert state.decide(ALL, 65.0).lost == ()
    state = listened(state, 66.0, (), since=65.0, last=stale)
    assert state.decide(ALL, 66.0).lost == ()
    state = listened(state, 66.1, (), since=66.0, last=stale)
    assert state.decide(ALL, 66.1).lost == ALL


def test_one_whose_connection_is_gone_is_silent_from_its_last_beat():
    state = listened(cluster(), 5.0)
    assert listened(state, 6.0, (A0, A1, B0, C0, C1), since=5.0).decide(ALL, 6.0).lost == ()
    state = listened(state, 6.1, (A0, A1, B0, C0, C1), since=5.0)
    assert state.decide(ALL, 6.1).lost == (B1,)


def test_draining():
    state = cluster().node_draining("b", 20.0, 5.0).node_draining("c", None, 5.0)
    found = state.decide(ALL, 5.0)
    assert (found.lost, found.leaving, nodes(found), found.start) == ((), (B0, B1, C0, C1), "a2", ())
    assert found.wait == "1 of at least 2 nodes can be used; b: drains; c: drains"
    assert found.reasons[B0] == "b drains"
    assert state.ended(B1, 6.0, "kill").decide((), 6.0).start == ()
    found = state.decide((A0, A1, B0, B1), 20.0)
    assert (found.lost, found.leaving, found.reasons["b"]) == ((B0, B1), (), "drains, and its deadline has passed")
    late = state.node_undrained("b", 25.0)
    assert late.decide((B0,), 25.0).lost == (B0,) and late.decide((), 50.0).start == (Member("b", 0, 1), Member("b", 1, 1))
    early = state.node_undrained("b", 19.0).node_undrained("c", 19.0)
    assert (early.decide(ALL, 30.0).lost, nodes(early.decide(ALL, 30.0))) == ((), "a2 b2 c2")
    assert state.node_draining("b", 40.0, 10.0).decide(ALL, 30.0).lost == ()


def test_a_node_that_drains_for_ever_comes_back_under_its_name():
    state = cluster().node_draining("b", None, 5.0).node_left("b", 9.0, "drained").node_joined(Node("b", 2), 50.0)
    assert state.decide((), 50.0).start == (Member("b", 0, 1), Member("b", 1, 1))


def test_most_nodes_prefers_the_seated_then_the_longest_present():
    rules = MembershipRules(max_nodes=2)
    state = cluster("ab", rules=rules).node_joined(Node("c", 2), 1.0).node_joined(Node("d", 2), 1.0)
    assert state.decide((), 2.0).start == ()
    for member in (C0, C1):
        state = state.ready(member, 2.0)
    assert nodes(state.decide((), 2.0)) == "a2 b2"
    assert state.decide((), 2.0).reasons == {"c": "elastic.max_nodes = 2", "d": "its rank 0 is not ready yet"}
    assert nodes(state.decide((B0, B1, C0, C1), 2.0)) == "b2 c2"
    state = state.node_left("b", 3.0, "gone")
    assert nodes(state.decide((A0, A1, B0, B1), 3.0)) == "a2 c2" and state.decide((A0, A1), 3.0).start == ()
    state = state.node_left("c", 3.0, "gone")
    assert state.decide((A0, A1), 3.0).start == (Member("d", 0), Member("d", 1))
    broken = cluster("abc", rules=rules).ended(B0, 5.0, "kill")
    assert nodes(broken.decide((A0, A1, B0, B1), 5.0)) == "a2 c2"  # a ready spare before a seated node that is not
    assert broken.decide((A0, A1, B0, B1), 5.0).start == (Member("b", 0, 1),)


def test_spares_are_not_always_joining():
    state = cluster()
    seated = (A0, A1, B0, B1)
    assert state.decide(seated, 1.0).joining
    planned = state.decide((), 1.0).nodes
    assert not state.decide(seated, 1.0, planned).joining
    assert not state.node_left("c", 1.0, "").decide(seated, 1.0, planned).joining
    assert state.node_joined(Node("d", 1), 2.0).ready(Member("d", 0), 2.0).decide(seated, 2.0, planned).joining


def test_a_node_that_offers_fewer_ranks_and_more():
    state = cluster().node_joined(Node("b", 1), 3.0)
    assert (state.decide(ALL, 3.0).lost, nodes(state.decide(ALL, 3.0))) == ((B1,), "a2 b1 c2")
    assert state.node_joined(Node("b", 3), 4.0).decide((), 4.0).start == (Member("b", 1, 1), Member("b", 2))


def test_hello_before_the_cluster_says_anything():
    """A coordinator that was restarted hears of the ranks first."""
    state = Membership(RULES).ready(Member("a", 0, 3), 1.0)
    assert state.decide((), 1.0).nodes == () and state.decide((), 1.0).reasons == {"a": "not in the cluster"}
    state = state.node_joined(Node("a", 1), 2.0)
    assert nodes(state.decide((), 2.0)) == "a1" and state.trusts(Member("a", 0, 3))


def judged(nodes: int) -> float:
    """Seconds that it takes to hear of all members of so many nodes, and to decide: the least of twenty times."""
    names, members = [f"n{n}" for n in range(nodes)], [Member(f"n{n}", local) for n in range(nodes) for local in range(8)]
    state = Membership(MembershipRules())
    for name in names:
        state = state.node_joined(Node(name, 8), 0.0)
    for member in members:
        state = state.ready(member, 0.0)
    taken = []
    for tick in range(1, 21):
        heard, begin = dict.fromkeys(members, tick / 10), time.process_time()
        state = state.listened(heard, tick / 10)
        assert not state.decide(members, tick / 10).lost
        taken.append(time.process_time() - begin)
    return min(taken)


def test_two_thousand_members_cost_eight_times_as_much_as_250():
    """Not 64 times: it is done every few milliseconds. A ratio of one run, for machines differ."""
    few, many = judged(32), judged(250)
    assert many < 2 * 250 / 32 * few, (few, many)


def test_a_node_on_which_nothing_ever_starts_is_not_counted_on():
    """Ray's list may have for long what is gone. It is again when something is ready there, and no longer when it has left."""
    state, now = Membership(RULES).node_joined(Node("a", 1), 0.0).node_joined(Node("b", 1), 0.0).ready(Member("a", 0), 0.0), 1.0
    for incarnation in range(STARTS_IN_VAIN):
        assert state.promising() == ("a", "b")
        state = state.started(Member("b", 0, incarnation), now).ended(Member("b", 0, incarnation), now + 1, "there is no such node")
        now = max(now + 2, state.next_change(now + 1) or 0.0)
    assert state.promising() == ("a",)
    assert state.decide((), now).start == (Member("b", 0, STARTS_IN_VAIN),), "it is tried nevertheless"
    back = state.ready(Member("b", 0, STARTS_IN_VAIN), now)
    assert back.promising() == back.promising(barred=["a", "b"]) == ("a", "b")
    again = back.ended(Member("b", 0, STARTS_IN_VAIN), now + 1, "killed")
    assert again.promising() == ("a", "b") and again.promising(barred=["b"]) == ("a",)
    assert again.node_left("b", now + 2, "gone").promising() == ("a",)


def test_an_end_beside_others_may_be_that_of_the_node_for_a_moment():
    """A process that is started for the first of them would be lost with the last. Alone on its node, it is the node's at once."""
    state = Membership(RULES).node_joined(Node("a", 1), 0.0).node_joined(Node("b", 2), 0.0)
    for member in (Member("a", 0), Member("b", 0), Member("b", 1)):
        state = state.ready(member, 0.0)
    one, next_one = state.ended(Member("b", 1), 5.0, "killed"), Member("b", 1, 1)
    assert one.decide((), 5.0).start == (next_one,) and one.may_not_be_alone(next_one) == 5.0 + ENDS_TOGETHER_SECONDS
    assert one.may_not_be_alone(Member("b", 0)) is None
    assert state.ended(Member("a", 0), 5.0, "killed").may_not_be_alone(Member("a", 0, 1)) is None
    assert one.ended(Member("b", 0), 5.2, "killed").may_not_be_alone(next_one) is None, "it is on the node's cool-down"
