"""What users are told, where it can be written and where it cannot."""

from __future__ import annotations

import json
import queue

import pytest

from actors.files.run_folder import RunFolder
from actors.files.storage import StorageError
from actors.protocol.clerk import Clerk
from actors.protocol.tables import Tables
from actors.protocol.telling import Telling
from actors.telemetry.live_state import LiveStatus
from orchestrator.protocol.commands import FormedRef, LoadedRef, PlannedRef, StepLost
from orchestrator.told.kinds import RanksLost, Resumed, UnknownEvent
from orchestrator.told.lines import Told, to_json
from tests.actors.runtime import configured, placement_of

SECONDS = 20.0


class Desk:
    """A telling and its clerk on a folder; `told`: what was watched. run(): what was posted to the conductor's thread, here."""

    def __init__(self, tmp_path):
        self.config, self.layout = configured()
        self.folder, self.tables, self.told, self.posted = RunFolder(str(tmp_path), "run"), Tables(), [], queue.Queue()
        self.clerk = Clerk(self.folder, self.posted.put)
        self.telling = Telling(self.config, self.tables, self.folder, self.clerk, lambda kind, values: self.told.append((kind, values)),
                               post=self.posted.put, notes=lambda: ("a note",), scores=lambda: {}, utilisation=lambda speed: None)
        self.ref = self.tables.layout_ref(self.config, self.layout)
        self.placed = self.tables.placement_ref(placement_of(self.config, self.layout))

    def done(self):
        """Everything is written."""
        self.clerk.chore("the end", lambda: self.posted.put("done"))
        while (item := self.posted.get(timeout=SECONDS)) != "done":
            item()


@pytest.fixture
def desk(tmp_path):
    found = Desk(tmp_path)
    yield found
    found.clerk.close()


def test_events_are_in_the_words_of_users(desk, tmp_path):
    desk.telling.tell(PlannedRef(desk.ref, 0.5))
    desk.telling.tell(FormedRef(3, desk.ref, 4, 7, 0.25, 0.125, 0.7))
    desk.telling.tell(RanksLost(("a/0",), 3, ("gone",)))
    desk.done()
    assert [told for kind, told in desk.told if kind == "event"] == desk.folder.events()
    lines = map(json.loads, (tmp_path / "run" / "events.jsonl").read_text().splitlines())
    described, stripped = desk.layout.describe(), [{key: value for key, value in line.items() if key != "time"} for line in lines]
    assert stripped == [
        {"event": "layout", "layout": described, "nodes": 2, "notes": ["a note"], "seconds": 0.5},
        {"event": "generation", "generation": 3, "layout": described, "nodes": 2, "step": 4, "bytes": 7,
         "grouping_seconds": 0.25, "moving_seconds": 0.125, "seconds": 0.7, "ranks": desk.layout.size},
        {"event": "lost", "members": ["a/0"], "generation": 3, "reasons": ["gone"]}]
    assert list(stripped[1])[:5] == ["event", "generation", "layout", "nodes", "step"]


def test_a_lost_step_is_no_event(desk):
    desk.telling.tell(StepLost())
    desk.done()
    assert desk.told == [] and desk.folder.events() == []


def test_the_configuration_is_written_once_a_generation_stands(desk, tmp_path):
    desk.telling.tell(RanksLost((), 0, ()))
    desk.done()
    assert not (tmp_path / "run" / "config.yaml").exists()
    desk.telling.tell(LoadedRef(1, desk.ref, 0, None))
    desk.done()
    assert "vocab_size: 61" in (tmp_path / "run" / "config.yaml").read_text()


def test_a_configuration_that_could_not_be_written_is_written_later(desk, tmp_path, monkeypatch):
    def full(name, content):
        raise StorageError(name, "no space left on device")

    stands = LoadedRef(1, desk.ref, 0, None)
    with monkeypatch.context() as patch:
        patch.setattr(desk.folder, "write", full)
        desk.telling.tell(stands)
        desk.done()
    desk.telling.tell(stands)
    desk.done()
    assert "vocab_size: 61" in (tmp_path / "run" / "config.yaml").read_text()


def metrics(step: int) -> dict:
    return {"step": step, "spent": {"useful": 1.0}}


def test_void_steps_go_from_the_metrics_and_who_watches_is_told_what_is_left(desk):
    for step in range(4):
        desk.folder.metrics(metrics(step))
    desk.telling.undone(2)
    desk.telling.tell(Resumed(2, "there", 0))
    desk.done()
    assert [line["step"] for line in desk.folder.metric_lines()] == [0, 1]
    (first, resumed), (kind, history) = desk.told
    assert (first, resumed.name, kind) == ("event", "resumed", "history")
    assert [line["step"] for line in history["steps"]] == [0, 1] and history["events"] == [resumed]


def test_nothing_is_written_after_what_is_void(desk, monkeypatch):
    """The disk is full when it is to go: a step does not stand there twice for it."""
    for step in range(4):
        desk.folder.metrics(metrics(step))

    def full(step):
        raise StorageError("metrics", "no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(desk.folder, "trim_metrics", full)
        desk.telling.undone(2)
        desk.clerk.chore("metrics.jsonl", lambda: desk.telling._write_metrics(metrics(2)))
        desk.done()
    assert [line["step"] for line in desk.folder.metric_lines()] == [0, 1, 2, 3] and desk.told == []
    desk.clerk.chore("metrics.jsonl", lambda: desk.telling._write_metrics(metrics(3)))
    desk.done()
    assert [line["step"] for line in desk.folder.metric_lines()] == [0, 1, 3] and [kind for kind, _ in desk.told] == ["history"]


def test_lines_that_are_damaged_cost_nothing_else(desk, tmp_path):
    """A crash of the host, and a line that is no event: both journals are read when steps are void."""
    for step in range(4):
        desk.folder.metrics(metrics(step))
    good = [to_json(Told(time, UnknownEvent(name, {}))) for time, name in ((1, "a"), (2, "b"))]
    lines = [json.dumps(good[0]), "\0\0\0", '"generation"}', "0", json.dumps({"event": "lost"}), json.dumps(good[1])]
    (tmp_path / "run" / "events.jsonl").write_text("\n".join(lines) + "\n")
    board = LiveStatus(desk.config, lambda: None)
    desk.telling._watch = lambda kind, values: board.recall(values["steps"], values["events"])
    desk.telling.undone(2)
    desk.clerk.chore("metrics.jsonl", lambda: desk.telling._write_metrics(metrics(2)))
    desk.done()
    assert [line["step"] for line in desk.folder.metric_lines()] == [0, 1, 2]
    assert [event for event in board.state()["events"] if event in good] == good
