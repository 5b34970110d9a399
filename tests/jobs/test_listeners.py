"""Whoever listens to a run says of every kind of event what it does with it."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import io
from pathlib import Path

import pytest

from actors.telemetry.exporter import RunMetrics
from actors.telemetry.live_state import LiveStatus
from actors.telemetry.tensorboard import EventFiles
from jobs import status
from jobs.benches.chaos import verdict
from jobs.benches.churn import bench as churn
from jobs.benches.recovery import times
from jobs.driver import live, summary
from jobs.driver.progress import Progress
from orchestrator.config.run_config import parse
from orchestrator.told import consumers, kinds
from orchestrator.told.consumers import Handlers, IncompleteListener, Listener, Selection
from orchestrator.told.lines import Told, to_json
from tests.told_events import EVERY, told

ROOT = Path(__file__).parents[2]
TABLES = {"metrics": RunMetrics._HANDLERS, "page": LiveStatus._HANDLERS, "TensorBoard": EventFiles._HANDLERS,
          "status": status._READ,
          "summary": summary._READ, "chaos": verdict.READ, "churn": churn._READ, "recovery": times.READ}
SOURCES = [path for folder in ("actors", "jobs", "orchestrator") for path in sorted((ROOT / folder).rglob("*.py"))]


@dataclasses.dataclass(frozen=True)
class MoonRose(kinds.Event):
    """Of a later version of this program."""

    name = "moon_rose"


@pytest.mark.parametrize("listener", TABLES)
def test_a_kind_of_which_nothing_is_said_is_missed(listener):
    assert TABLES[listener].missing([*kinds.KINDS, MoonRose]) == {MoonRose}


@pytest.mark.parametrize("listener", ["actors.telemetry.live_state", "jobs.driver.summary", "jobs.benches.recovery.times"])
def test_a_module_that_says_nothing_of_a_kind_is_not_imported(monkeypatch, listener):
    """As after a class was added: what is looked at are the tables that are made when a module is."""
    module = importlib.import_module(listener)
    monkeypatch.setattr(kinds, "KINDS", [*kinds.KINDS, MoonRose])
    with pytest.raises(IncompleteListener, match="neither taken nor left: MoonRose"):
        exec(compile(Path(module.__file__).read_text(), listener, "exec"), {"__name__": listener})


def test_no_kind_is_both_taken_and_left():
    with pytest.raises(IncompleteListener, match="taken and left: Replayed"):
        Selection((kinds.Replayed,), leaves=kinds.KINDS)


def test_what_is_not_said_to_be_taken_cannot_be_looked_up():
    with pytest.raises(IncompleteListener, match="not taken: Replayed"):
        summary._READ.of([], kinds.Replayed)


def made_at(path: Path) -> int:
    """How many tables a file makes."""
    return sum(isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in (Handlers.__name__, Selection.__name__)
               for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))))


def test_every_table_is_tried_here():
    assert sum(map(made_at, SOURCES)) == len(TABLES) and all(isinstance(table, Listener) for table in TABLES.values())


@pytest.mark.parametrize("path", [path for path in SOURCES if consumers.__name__.split(".")[1] not in path.parts],
                         ids=lambda path: str(path.relative_to(ROOT)))
def test_nobody_compares_the_word_of_an_event(path):
    """A word would be overlooked by all of the above."""
    words = {kind.name for kind in kinds.KINDS} - {""}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            asked = any(isinstance(one, ast.Subscript) and isinstance(one.slice, ast.Constant) and one.slice.value == "event"
                        or isinstance(one, ast.Attribute) and one.attr == "name" and isinstance(one.value, ast.Name) and one.value.id == "told"
                        for one in sides)
            said = {one.value for side in sides for one in ast.walk(side) if isinstance(one, ast.Constant) and isinstance(one.value, str)}
            assert not (asked and said & words), f"{path}:{node.lineno}"


# --- those who take all kinds alike ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("event", EVERY, ids=lambda event: type(event).__name__)
def test_every_kind_is_shown(event):
    stream, one = io.StringIO(), Told(90.0, event)
    with Progress(9, stream) as shown:
        shown.event(one)
    assert stream.getvalue().startswith(f"{one.name.replace('_', ' ')}: ")
    board = LiveStatus(parse({}, []), lambda: None)
    board.observe("event", one)
    assert board.state()["events"] == [to_json(one)] and one.name in live.lines(board.state())[-1]


@pytest.mark.parametrize("event", EVERY, ids=lambda event: type(event).__name__)
def test_every_kind_is_taken_by_metrics_and_tensorboard(event, tmp_path):
    metrics, files = RunMetrics(), EventFiles(str(tmp_path))
    if isinstance(event, kinds.SlowOver):
        metrics.observe("event", told("slow"))
    metrics.observe("event", Told(90.0, event))
    files.observe("event", Told(90.0, event))
    files.close()
