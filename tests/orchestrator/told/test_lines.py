"""Lines of events.jsonl: as they always were, and whatever else may stand there."""

from __future__ import annotations

import json

import pytest

from orchestrator.told import kinds
from orchestrator.told.lines import Told, from_json, read, to_json
from tests.told_events import EVERY, told

WRITTEN = [
    '{"time": 1.5, "event": "lost", "members": ["a/0", "a/1"], "generation": 5, "reasons": ["its process or node ended (EOF)"]}',
    '{"time": 1.5, "event": "aborted", "ranks": 6, "slowest_rank_seconds": 0.0796, "unanswered": [], "seconds": 0.1031}',
    '{"time": 1.5, "event": "interrupted", "member": null, "reason": "it hangs", "generation": 2}',
    '{"time": 1.5, "event": "layout", "layout": "PP2 x EP3", "nodes": 3, "notes": ["a note"], "seconds": 0.5}',
    '{"time": 1.5, "event": "generation", "generation": 6, "layout": "PP2", "nodes": 3, "step": 41, "bytes": 23984096, '
    '"grouping_seconds": 0.1354, "moving_seconds": 0.1634, "seconds": 0.4032}',
    '{"time": 1.5, "event": "generation", "generation": 1, "layout": "PP2", "nodes": 3, "step": 0}',
    '{"time": 1.5, "event": "resumed", "step": 4, "checkpoint": "c/step-00000004", "steps_to_redo": 2}',
    '{"time": 1.5, "event": "started_over", "reason": "no checkpoint", "steps_to_redo": 3}',
    '{"time": 1.5, "event": "state_lost", "reason": "no owner is left", "step": 7}',
    '{"time": 1.5, "event": "draining", "members": ["b/0"], "nodes": ["b"]}',
    '{"time": 1.5, "event": "draining", "members": ["b/0"], "nodes": ["b"], "reason": "there is no other node yet"}',
    '{"time": 1.5, "event": "joining", "nodes": ["c"]}',
    '{"time": 1.5, "event": "idle", "node": "b", "reason": "on a cool-down", "seconds": 29.5}',
    '{"time": 1.5, "event": "barred", "member": "b/0", "node": "b", "reason": "out of memory", "tried": 3}',
    '{"time": 1.5, "event": "slow", "step": 9, "rank": 1, "node": "a", "peer": null, "peer_node": null, "lane": "compute", "factor": 2.5}',
    '{"time": 1.5, "event": "validation", "step": 6, "loss": 4.25, "accuracy": 0.125, "seconds": 0.75}',
    '{"time": 1.5, "event": "validation", "step": 6, "loss": 4.25, "seconds": 0.75}',
    '{"time": 1.5, "event": "not_finite", "step": 2, "gradient_norm": "nan", "loss": "inf", "mtp_loss": "1.5", "balance_loss": "0.5"}',
    '{"time": 1.5, "event": "checkpoint", "step": 4, "path": "c/step-00000004", "seconds": 0.125}',
    '{"time": 1.5, "event": "control_store_back", "seconds": 12.25}',
]
"""As runs wrote them before events had classes; the second validation is of an older version still."""


@pytest.mark.parametrize("line", WRITTEN, ids=lambda line: json.loads(line)["event"])
def test_what_was_written_is_read_and_written_the_same(line):
    found = from_json(json.loads(line))
    assert not isinstance(found.event, kinds.UnknownEvent) and json.dumps(to_json(found)) == line


@pytest.mark.parametrize("event", EVERY, ids=lambda event: type(event).__name__)
def test_every_kind_comes_back_from_its_line(event):
    told_ = Told(2.5, event)
    assert from_json(json.loads(json.dumps(to_json(told_)))) == told_


def test_each_name_stands_for_one_kind_but_for_generations():
    names = [kind.name for kind in kinds.KINDS]
    assert {name for name in names if names.count(name) > 1} == {"generation"}


@pytest.mark.parametrize("line", [
    {"event": "phase of the moon", "phase": 0.5, "of": {"the": ["moon"]}},  # of a newer version
    {"event": "lost", "members": ["a/0"]},  # it lacks fields
    {"event": "lost", "members": "a/0", "generation": 1, "reasons": ["gone"]},
    {"event": "lost", "members": [0], "generation": 1, "reasons": ["gone"]},
    {"event": "checkpoint", "step": True, "path": "there", "seconds": 1}, {"event": "checkpoint", "step": 1.5, "path": "there", "seconds": 1},
    {"event": "checkpoint", "step": 1, "path": None, "seconds": 1},
    {"event": "generation", "generation": 6, "layout": "PP2", "nodes": 3, "step": 41, "seconds": 0.5},  # formed, so not a loaded one
    {"event": ""}])
def test_what_has_no_class_is_kept_as_it_stands(line):
    found = from_json({"time": 3} | line)
    assert found.event == kinds.UnknownEvent(line["event"], {key: value for key, value in line.items() if key != "event"})
    assert to_json(found) == {"time": 3} | line and found.name == line["event"]


def test_fields_that_a_newer_version_has_are_passed_over():
    line = to_json(told("joining", 1.0, nodes=["c"]))
    assert from_json(line | {"planet": "earth"}) == from_json(line)


@pytest.mark.parametrize("line", [{}, {"event": "lost"}, {"time": 1.0}, {"time": "now", "event": "lost"}, {"time": True, "event": "lost"},
                                  {"time": 1.0, "event": 7}, {"time": 1.0, "event": ["lost"]}, {"time": None, "event": None}])
def test_what_is_no_event_is_refused_and_passed_over(line):
    with pytest.raises(ValueError, match="no event"):
        from_json(line)
    good = told("replayed", 1.0, steps=3)
    assert read([line, to_json(good), line]) == [good]
