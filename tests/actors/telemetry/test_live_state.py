"""What there is to see of a run, from what it told: by hand, event by event."""

from __future__ import annotations

import time

import pytest

from actors.telemetry.live_state import LiveStatus
from orchestrator.config.run_config import parse
from orchestrator.layout.layout import choose
from orchestrator.topology import virtual_nodes
from tests.told_events import told

CONFIG = parse({}, ["run.name=seen", "run.directory=somewhere", "training.steps=10", "layout.pipeline=2", "layout.expert=2",
                    "topology.virtual_nodes=2", "topology.ranks_per_node=2"])
LAYOUT = choose(virtual_nodes(2, 2), CONFIG.layout, CONFIG.model, CONFIG.stages)
STEP = {"step": 3, "time": 100.0, "loss": 2.5, "tokens_per_second": 1234.56, "seconds": 0.5,
        "spent": {"useful": 3.0, "recovery": 1.0}}
ANEW = [told("generation", generation=2), told("generation", generation=2, seconds=0.5)]
"""Its state was loaded, or was in memory."""


@pytest.fixture
def board():
    return LiveStatus(CONFIG, lambda: LAYOUT)


def tell(board, *events):
    for event in events:
        board.observe("event", event)


def slow(board):
    """Factors by rank, of those that are slow."""
    return {rank["rank"]: rank["slow"] for node in board.state()["grid"] for rank in node["ranks"] if rank["slow"] is not None}


@pytest.mark.parametrize("anew", [*ANEW, told("placement")], ids=["state loaded", "state in memory", "experts placed"])
def test_nobody_stays_slow_where_ranks_are_watched_anew(board, anew):
    """Rank 2 is another one then, or has other work."""
    tell(board, told("slow", rank=2, factor=3.5), told("slow", rank=1, peer=3, factor=9.0))
    assert slow(board) == {2: 3.5, 1: 9.0}
    tell(board, anew)
    assert slow(board) == {}
    tell(board, told("slow", rank=0, factor=2.5))
    assert slow(board) == {0: 2.5}


def test_of_what_a_rank_is_slow_in_the_worst_is_shown(board):
    for peer, lane, factor in ((None, "compute", 2.0), (1, "exchange", 9.0), (3, "exchange", 4.0)):
        tell(board, told("slow", rank=2, peer=peer, lane=lane, factor=factor))
    assert slow(board) == {2: 9.0}
    tell(board, told("slow_over", rank=2, peer=1, lane="exchange"))
    assert slow(board) == {2: 4.0}
    tell(board, told("slow_over", rank=2, peer=3, lane="exchange"))
    assert slow(board) == {2: 2.0}


def test_of_the_nodes_that_never_came_back_the_last_eight_are_shown(board):
    for number in range(20):
        tell(board, told("lost", time=float(number), members=[f"rack/lent-{number}/0", f"rack/lent-{number}/1"]))
    assert [row["node"] for row in board.state()["lost"]] == [f"rack/lent-{number}" for number in range(12, 20)]
    gone = [f"all-{number}/0" for number in range(11)]
    tell(board, told("lost", time=30.0, members=gone))
    assert [row["node"] for row in board.state()["lost"]] == [f"all-{number}" for number in range(3, 11)]


@pytest.mark.parametrize("anew", ANEW, ids=["state loaded", "state in memory"])
def test_a_node_that_is_back_is_not_shown_as_lost(board, anew):
    tell(board, told("lost", members=["gone/0", "virtual-1/0", "virtual-1/1"]))
    assert [row["node"] for row in board.state()["lost"]] == ["gone", "virtual-1"]
    tell(board, anew)
    assert [row["node"] for row in board.state()["lost"]] == ["gone"]


def test_how_long_ago_a_node_was_lost(board):
    before = time.time()
    tell(board, told("lost", time=before - 50.0, members=["gone/0"]))
    row, = board.state()["lost"]
    assert 49.9 <= row["seconds_ago"] <= 50.1 + time.time() - before


@pytest.mark.parametrize("goes_on", [*ANEW, "step"], ids=["state loaded", "state in memory", "a step"])
def test_a_run_waits_until_it_goes_on(board, goes_on):
    tell(board, told("waiting", reason="1 of at least 2 nodes can be used"))
    assert board.state()["waiting"] == "1 of at least 2 nodes can be used"
    board.observe("step", STEP) if goes_on == "step" else tell(board, goes_on)
    assert board.state()["waiting"] is None


def test_what_is_newest_is_shown_with_its_time(board):
    assert [board.state()[key] for key in ("newest", "goodput", "validation", "checkpoint", "timeline_step")] == [None] * 5
    board.observe("step", STEP | {"busiest_expert": 1.5, "rank_seconds": 0.4})
    for number in (2, 4):
        tell(board, told("validation", time=100.0 + number, step=number, loss=2.0 / number, seconds=0.5),
             told("checkpoint", time=200.0 + number, step=number, path=f"step-{number}", seconds=0.25))
        board.observe("timeline", {"step": number, "seconds": 0.5, "spans": [(0, "compute", 0.0, 0.1)]})
    state = board.state()
    assert state["newest"] == {"step": 3, "time": 100.0, "loss": 2.5, "tokens_per_second": 1234.56, "seconds": 0.5,
                               "busiest_expert": 1.5}
    assert state["validation"] == {"time": 104.0, "event": "validation", "step": 4, "loss": 0.5, "seconds": 0.5}
    assert state["checkpoint"] == {"time": 204.0, "event": "checkpoint", "step": 4, "path": "step-4", "seconds": 0.25}
    assert state["timeline_step"] == 4 and board.timeline() == {"step": 4, "seconds": 0.5, "spans": [(0, "compute", 0.0, 0.1)]}
    assert state["points"] == [(3, 100.0, 2.5, 1234.6)]
    assert (state["run"], state["folder"], state["steps"], state["goodput"]) == ("seen", "somewhere/seen", 10, 0.75)


def test_the_ranks_of_each_node_in_their_order_there(board):
    """Both positions of a pipeline of DualPipe host both stages, by direction."""
    assert board.state()["grid"] == [
        {"node": first.node, "ranks": [
            {"rank": place.rank, "position": place.position, "row": place.row, "width": place.width,
             "stages": [[0, 1], [1, 0]][place.position], "slow": None}
            for local in range(2) for place in LAYOUT.places if (place.node, place.local) == (first.node, local)]}
        for first in LAYOUT.places if first.local == 0]
    assert LiveStatus(CONFIG, lambda: None).state()["grid"] == []


def test_the_last_sixty_events_are_kept(board):
    tell(board, *(told("joining", time=float(number), nodes=[f"n{number}"]) for number in range(100)))
    assert [event["nodes"] for event in board.state()["events"]] == [[f"n{number}"] for number in range(40, 100)]


def test_older_steps_are_shown_at_half_the_density():
    """Every other one goes once there are 800, but for the newest."""
    found = LiveStatus(CONFIG, lambda: None)
    for number in range(800):
        found.observe("step", STEP | {"step": number})
    assert [point[0] for point in found.state()["points"]] == [*range(0, 799, 2), 799]
    for number in range(800, 1199):
        found.observe("step", STEP | {"step": number})
    steps = [point[0] for point in found.state()["points"]]
    assert steps == [*range(0, 797, 4), *range(799, 1198, 2), 1198]


def test_what_is_recalled_takes_the_place_of_what_was_there(board):
    tell(board, told("lost", members=["gone/0"]), told("slow", rank=2, factor=3.5))
    board.observe("step", STEP)
    board.recall([], [])
    state = board.state()
    assert (state["points"], state["events"], state["lost"], state["goodput"], slow(board)) == ([], [], [], None, {})
    board.recall([{"of": "another program"}, STEP | {"step": 5}], [told("slow", rank=1, factor=2.5)])
    state = board.state()
    assert [point[0] for point in state["points"]] == [5] and slow(board) == {1: 2.5}
    assert [event["event"] for event in state["events"]] == ["slow"]


def test_since_when_this_coordinator_has_it(monkeypatch):
    monkeypatch.setattr(time, "time", lambda: 1000.125)
    found = LiveStatus(CONFIG, lambda: None)
    assert (found.state()["since"], found.state()["now"]) == (1000.125, 1000.125)
    monkeypatch.setattr(time, "time", lambda: 1500.25)
    assert (found.state()["since"], found.state()["now"]) == (1000.125, 1500.25)
    found.recall([], [])
    assert found.state()["since"] == 1500.25
