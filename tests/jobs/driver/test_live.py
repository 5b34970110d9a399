"""What `jobs.status` says of a run that answers, and of one that does not."""

from __future__ import annotations

import json
import sys

import pytest
from prometheus_client import CollectorRegistry

from actors.telemetry.exporter import Exporter, json_route
from actors.telemetry.live_state import LiveStatus
from jobs import cli, status
from jobs.driver.live import ask, lines
from orchestrator.config.run_config import parse
from orchestrator.layout.layout import choose
from orchestrator.topology import virtual_nodes
from tests.told_events import told

CONFIG = parse({}, ["run.name=there", "training.steps=10", "layout.pipeline=2", "layout.expert=2", "topology.virtual_nodes=2",
                    "topology.ranks_per_node=2"])
LAYOUT = choose(virtual_nodes(2, 2), CONFIG.layout, CONFIG.model, CONFIG.stages)
STEP = {"step": 3, "time": 100.0, "loss": 2.5, "tokens_per_second": 1234.5, "seconds": 0.5, "overlap_ratio": 0.75, "bubble_ratio": 0.125,
        "spent": {"useful": 3.0, "recovery": 1.0}}


def board():
    found = LiveStatus(CONFIG, lambda: LAYOUT)
    found.observe("step", STEP)
    for event in (told("lost", time=90.0, members=["virtual-9/0", "virtual-9/1"]),
                  told("slow", time=91.0, rank=2, factor=3.5), told("checkpoint", time=92.0, step=2)):
        found.observe("event", event)
    return found


def served(folder, **options):
    exporter = Exporter(CollectorRegistry(), ("127.0.0.1",), 0, {"/status.json": json_route(board().state)}, **options)
    (folder / "live.json").write_text(json.dumps({"address": f"127.0.0.1:{exporter.port}"}))
    return exporter


def test_a_run_that_answers(tmp_path, monkeypatch):
    folder = tmp_path / "there"
    folder.mkdir()
    exporter = served(folder)
    try:
        state = ask(str(folder))
    finally:
        exporter.close()
    assert state["goodput"] == 0.75 and state["newest"]["loss"] == 2.5 and state["lost"][0]["node"] == "virtual-9"
    text = "\n".join(lines(state | {"now": 104.0}))
    for words in ("step 4 of 10", "4 s ago", "75.0% of 4 s trained; recovery 25.0%", "[2: stage ", "3.5x slow]", "virtual-9", "checkpoint: step 2"):
        assert words in text, text
    assert ask(str(folder)) is None  # it has ended


def test_of_many_nodes_those_with_a_slow_rank():
    layout = choose(virtual_nodes(64, 2), *(CONFIG.layout.model_copy(update={"expert": 8, "data": 8}), CONFIG.model, CONFIG.stages))
    many = LiveStatus(CONFIG, lambda: layout)
    many.observe("event", told("slow", time=91.0, rank=5, factor=3.5))
    text = "\n".join(lines(many.state()))
    assert "64 nodes with 128 ranks; with a slow rank: 1" in text and "3.5x slow]" in text and text.count("[") == 2, text


def test_a_rank_is_slow_until_nothing_of_it_is():
    found = board()
    for event in (told("slow", 93.0, rank=2, peer=1, lane="exchange", factor=9.0),
                  told("slow", 93.0, rank=2, peer=None, lane="compute", factor=2.0),
                  told("slow_over", 93.0, rank=2, peer=1, lane="exchange", factor=1.0), told("slow_over", 93.0, rank=2, factor=1.0)):
        found.observe("event", event)
    slow = {rank["rank"]: rank["slow"] for node in found.state()["grid"] for rank in node["ranks"]}
    assert slow == {0: None, 1: None, 2: 2.0, 3: None}


def test_a_run_that_has_not_committed_a_step(tmp_path, monkeypatch, capsys):
    """It is in its first step, or waits: that is when one asks."""
    folder = tmp_path / "there"
    folder.mkdir()
    empty = LiveStatus(CONFIG, lambda: LAYOUT)
    empty.observe("event", told("waiting", time=90.0, reason="1 of at least 2 nodes can be used"))
    exporter = Exporter(CollectorRegistry(), ("127.0.0.1",), 0, {"/status.json": json_route(empty.state)})
    (folder / "live.json").write_text(json.dumps({"address": f"127.0.0.1:{exporter.port}"}))
    monkeypatch.setattr(sys, "argv", ["jobs.status", str(folder)])
    try:
        assert cli.run(status.main) == 0
    finally:
        exporter.close()
    out = capsys.readouterr().out
    assert "0 of 10 committed" in out and "waiting      1 of at least 2 nodes" in out and "running" in out, out


def test_another_run_at_that_address_is_not_this_one(tmp_path):
    folder = tmp_path / "other"
    folder.mkdir()
    exporter = served(folder)
    try:
        assert ask(str(folder)) is None and ask(str(tmp_path / "nowhere")) is None
    finally:
        exporter.close()


def test_where_ray_asks_for_a_token_so_does_a_run(tmp_path, monkeypatch):
    folder = tmp_path / "there"
    folder.mkdir()
    exporter = served(folder, token="secret")
    try:
        monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "none"))
        assert ask(str(folder)) is None
        monkeypatch.setenv("RAY_AUTH_TOKEN", "secret")
        assert ask(str(folder)) is None  # Ray here asks for none, so it is shown to nobody
        monkeypatch.setenv("RAY_AUTH_MODE", "token")
        assert ask(str(folder))["run"] == "there"
        monkeypatch.setenv("RAY_AUTH_TOKEN", "another")
        assert ask(str(folder)) is None
    finally:
        exporter.close()


def test_a_lost_node_that_is_back_is_not_shown_as_lost():
    found = board()
    found.observe("event", told("lost", time=93.0, members=[f"{LAYOUT.nodes[0]}/0"]))
    assert [row["node"] for row in found.state()["lost"]] == ["virtual-9", LAYOUT.nodes[0]]
    found.observe("event", told("generation", time=94.0, generation=2))
    assert [row["node"] for row in found.state()["lost"]] == ["virtual-9"]


@pytest.mark.parametrize("count", [10, 800, 5000])
def test_the_whole_run_stays_in_sight(count):
    found = LiveStatus(CONFIG, lambda: None)
    for step in range(count):
        found.observe("step", STEP | {"step": step})
    points = [point[0] for point in found.state()["points"]]
    assert points[0] == 0 and points[-1] == count - 1 and points == sorted(points) and len(points) <= 800


def test_what_was_before_is_recalled_once():
    found = board()
    found.recall([STEP | {"step": 0}, STEP | {"step": 1}], [told("generation", time=1.0, generation=1)])
    found.observe("step", STEP | {"step": 2})
    state = found.state()
    assert [point[0] for point in state["points"]] == [0, 1, 2] and len(state["events"]) == 1 and state["spent"]["useful"] == 9.0
