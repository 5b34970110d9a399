"""Who is slow, from made-up steps."""

from __future__ import annotations

import random
import statistics
import time

import pytest
from layouts import layout_of, small_model

from orchestrator.schedule.ir.spans import Lane
from orchestrator.schedule.ir.stages import Stages, V
from orchestrator.telemetry import stragglers
from orchestrator.telemetry.stragglers import Flow, Straggler, Watch, Work

LAYOUT = layout_of((2, 2, 2, 2), 2, small_model())  # 4 nodes; position 0 and its mirror host the same stages
BYTES, RATE = 4_000_000, 20e6


def works(slow=None, noise=0.0, dice=None):
    """A second each; `slow`: factors by rank."""
    return {rank: Work((1 + noise * (dice.random() if dice else 0)) * (slow or {}).get(rank, 1.0), 4, 100)
            for rank in range(LAYOUT.size)}


def links(slow=None, noise=0.0, dice=None, size=BYTES):
    """All ranks of different nodes, and of the same node at ten times the rate; `slow`: factors by (rank, peer)."""
    found = {}
    for one in LAYOUT.places:
        for other in LAYOUT.places:
            if one.rank != other.rank:
                rate = RATE * (10 if one.node == other.node else 1) * (1 - noise * (dice.random() if dice else 0))
                found[one.rank, other.rank] = Flow(size, size / rate * (slow or {}).get((one.rank, other.rank), 1.0))
    return found


def told(steps, watch=None):
    """(step, rank, peer, lane, over) of every change, and the watch at the end."""
    found, watch = [], watch or Watch(LAYOUT)
    for step, (of_ranks, of_links) in enumerate(steps):
        watch, changes = watch.after(of_ranks, of_links)
        found += [(step, c.straggler.rank, c.straggler.peer, c.straggler.lane, c.over) for c in changes]
    return found, watch


def test_a_slow_rank_is_named_once_within_five_steps_and_when_it_is_over():
    steps = [(works(), {})] * 10 + [(works({3: 2.0}), {})] * 20 + [(works(), {})] * 10
    assert told(steps)[0] == [(12, 3, None, Lane.COMPUTE, False), (32, 3, None, Lane.COMPUTE, True)]


def test_its_factor_is_how_much_longer_it_takes():
    _, changes = told([(works({3: 2.0}), {})] * 2)[1].after(works({3: 2.0}), {})
    assert [change.straggler for change in changes] == [Straggler(3, None, Lane.COMPUTE, 2.0)]


def test_of_two_ranks_with_the_same_stages_the_slower_one_is_named():
    layout = layout_of((1, 1), 1, small_model())
    found, _ = told([({0: Work(1.0, 4, 9), 1: Work(2.0, 4, 9)}, {})] * 5, Watch(layout))
    assert found == [(2, 1, None, Lane.COMPUTE, False)]


def test_between_the_thresholds_nothing_changes():
    between = [(works({3: 1.4}), {})] * 10
    assert told(between)[0] == []
    found, watch = told([(works({3: 2.0}), {})] * 5)
    assert told(between, watch)[0] == [] and len(found) == 1


@pytest.mark.parametrize("steps", [
    [(works({rank: 5.0 for rank in range(8)}), links({ends: 10.0 for ends in links()}))] * 10,  # all alike
    [(works({3: 9.0}), links({(0, 7): 50.0}))] * 2 + [(works(), links())] * 10,  # shorter than a majority of the window
    [({rank: Work(0.001 * (5 if rank == 3 else 1), 4, 100) for rank in range(8)}, {})] * 10,  # 4 ms lost
    [(works(), links({(0, 7): 500.0}, size=8000))] * 10,  # too little to judge
    [({rank: Work(3.0, 12, 100) if rank == 3 else Work(1.0, 4, 100) for rank in range(8)}, {})] * 10,  # more sequences
    [({rank: Work(3.0, 4, 300) if rank == 3 else Work(1.0, 4, 100) for rank in range(8)}, {})] * 10,  # more rows
])
def test_nobody_is_named(steps):
    assert told(steps)[0] == []


def test_a_rank_that_alone_hosts_its_stages_is_never_judged():
    layout = layout_of((1, 1), 2, small_model(), Stages(V, 2, 2))
    assert told([({0: Work(1.0, 4, 9), 1: Work(9.0, 4, 9)}, {})] * 9, Watch(layout))[0] == []


def test_noise_names_nobody_and_hides_nobody():
    dice = random.Random(5)
    quiet = [(works(noise=0.3, dice=dice), links(noise=0.5, dice=dice)) for _ in range(200)]
    found, watch = told(quiet)
    assert found == []
    loud = [(works({5: 2.2}, noise=0.3, dice=dice), links({(0, 4): 10.0}, noise=0.5, dice=dice)) for _ in range(5)]
    assert sorted(change[1:] for change in told(loud, watch)[0]) == [
        (0, 4, Lane.EXCHANGE, False), (5, None, Lane.COMPUTE, False)]


def around(node, factor, back):
    """All links from a node to others, and back."""
    found = {}
    for one in LAYOUT.places:
        for other in LAYOUT.places:
            if one.node == node != other.node:
                found[one.rank, other.rank], found[other.rank, one.rank] = factor, back
    return found


@pytest.mark.parametrize("back", [10.0, 4.0])
def test_a_slow_node_is_named_by_its_ranks_alone(back):
    """Not their peers, of which each has slow links, nor every pair by itself."""
    steps = [(works(), links())] * 10 + [(works(), links(around("n1", 10.0, back)))] * 8 + [(works(), links())] * 10
    mine = [place.rank for place in LAYOUT.places if place.node == "n1"]
    found, _ = told(steps)
    assert found == [(step, rank, None, Lane.EXCHANGE, step == 20) for step in (12, 20) for rank in mine]


def test_one_slow_link_is_named_by_its_ends():
    rank, peer = next((one.rank, other.rank) for one in LAYOUT.places for other in LAYOUT.places
                      if one.node != other.node and one.position == other.position)
    assert told([(works(), links({(rank, peer): 10.0}))] * 5)[0] == [(2, rank, peer, Lane.EXCHANGE, False)]


def test_a_link_inside_a_node_is_compared_with_its_like_only():
    """At 8 times less than the others inside nodes it is faster than those across."""
    rank, peer = next((one.rank, other.rank) for one in LAYOUT.places for other in LAYOUT.places
                      if one.node == other.node and one.rank != other.rank)
    found, _ = told([(works(), links({(rank, peer): 8.0}))] * 5)
    assert [change[:3] for change in found] == [(2, rank, peer)]


def test_a_link_that_carries_nothing_stays_as_it_was():
    rank, peer = 0, LAYOUT.places[-1].rank
    _, watch = told([(works(), links({(rank, peer): 10.0}))] * 5)
    assert told([(works(), {})] * 10, watch)[0] == []


@pytest.mark.parametrize("seconds, named", [(0.026, False), (0.027, True)])
def test_what_a_slow_rank_costs_a_step_counts(seconds, named):
    """Beyond the 16 ms of all others it is 9.9 ms, which do not count, or 10.9, which do."""
    steps = [({rank: Work(seconds - 1e-4 if rank == 3 else 0.016, 4, 100) for rank in range(8)}, {})] * 5
    assert told(steps)[0] == ([(2, 3, None, Lane.COMPUTE, False)] if named else [])


@pytest.mark.parametrize("seconds, named", [(1.2, False), (2.0, True)])
@pytest.mark.parametrize("of_one, of_others", [((0, 100), (4, 100)), ((4, 0), (4, 100)), ((4, 100), (0, 0)), ((0, 0), (0, 0))])
def test_who_has_no_tokens_or_no_experts_is_judged_by_the_rest(seconds, named, of_one, of_others):
    """An empty stream, or experts that nobody chose: nothing to divide by."""
    steps = [({rank: Work(seconds, *of_one) if rank == 3 else Work(1.0, *of_others) for rank in range(8)}, {})] * 3
    assert told(steps)[0] == ([(2, 3, None, Lane.COMPUTE, False)] if named else [])


@pytest.mark.parametrize("line, position, lane", [
    (True, False, Lane.PIPELINE), (False, False, Lane.EXCHANGE), (False, True, Lane.EXCHANGE)])
def test_a_link_is_called_after_what_it_is_for(line, position, lane):
    """Ranks of one pipeline hand on activations; all others, of one position or not, only exchange tokens."""
    layout = layout_of((2, 2, 2, 2), 4, small_model())
    ends = [(one.rank, other.rank) for one in layout.places for other in layout.places if one.node != other.node
            and ((one.row, one.width) == (other.row, other.width)) == line and (one.position == other.position) == position]
    flows = {(one.rank, other.rank): Flow(BYTES, 0.1) for one in layout.places for other in layout.places if one.node != other.node}
    for rank, peer in ends:
        slow = flows | {(rank, peer): Flow(BYTES, 1.0)}
        assert told([({}, slow)] * 3, Watch(layout))[0] == [(2, rank, peer, lane, False)]
    assert ends


@pytest.mark.parametrize("seed", range(20))
def test_the_median_of_the_others_is_that_of_the_standard_library(seed):
    dice = random.Random(seed)
    values = sorted(float(dice.randrange(6)) for _ in range(dice.randrange(2, 12)))
    for index, value in enumerate(values):
        assert stragglers._median_of_others(values, value) == statistics.median(values[:index] + values[index + 1 :])


def test_a_step_of_many_links_is_looked_at_in_seconds():
    """All of 256 ranks exchange with one another: 65,280 links."""
    layout = layout_of((8,) * 32, 2, small_model())
    flows = {(one, other): Flow(BYTES, 0.2 * (1 + one / 1000 + other / 3000)) for one in range(256) for other in range(256) if one != other}
    began = time.monotonic()
    watch, changes = Watch(layout).after({}, flows)
    assert time.monotonic() - began < 20 and len(watch.recent) > len(flows) and not changes
