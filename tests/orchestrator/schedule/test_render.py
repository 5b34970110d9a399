"""The picture shows every action once where the simulation has it; the JSON holds the same."""

from __future__ import annotations

import json
import re
from xml.etree import ElementTree

import pytest

from orchestrator.schedule.dualpipe import dualpipe
from orchestrator.schedule.forward_only import forward_only
from orchestrator.schedule.render import as_json, svg
from orchestrator.schedule.simulate import UNIT, Durations, simulate

SVG = "{http://www.w3.org/2000/svg}"


@pytest.mark.parametrize("schedule, durations", [
    (dualpipe(8, 20), UNIT), (dualpipe(1, 3), UNIT), (forward_only(4, 6), UNIT),
    (dualpipe(4, 10), Durations(0.0131, (0.03, 0.02, 0.02, 0.03), 0.012, 0.011, 0.031, 0.002)),
])
def test_every_action_is_drawn_to_scale(schedule, durations):
    timeline = simulate(schedule, durations)
    root = ElementTree.fromstring(svg(schedule, timeline))
    groups = root.findall(f"{SVG}g")
    actions = [(action, span) for row, spans in zip(schedule.rows, timeline.rows, strict=True)
               for action, span in zip(row, spans, strict=True)]
    assert len(groups) == len(actions)
    unit = float(groups[0].find(f"{SVG}rect").get("width")) / (actions[0][1].end - actions[0][1].start)
    left = float(groups[0].find(f"{SVG}rect").get("x"))
    for group, (action, span) in zip(groups, actions, strict=True):
        assert group.find(f"{SVG}title").text.startswith(f"{action} (stage")
        assert [text.text for text in group.findall(f"{SVG}text")] == [str(half.microbatch) for half in action.halves]
        box = group.findall(f"{SVG}rect")[-1]
        assert float(box.get("x")) == pytest.approx(left + span.start * unit, abs=1)
        assert float(box.get("x")) + float(box.get("width")) <= float(root.get("width"))
    assert len(re.findall(r">rank \d+<", svg(schedule, timeline))) == schedule.positions


def test_title_and_legend():
    picture = svg(dualpipe(8, 20), simulate(dualpipe(8, 20)))
    assert "dualpipe: 8 ranks, 20 microbatches, makespan 66, bubble 6 (9.1 %)" in picture
    for label in ("forward, direction 0", "forward, direction 1", "backward, direction 0", "backward, direction 1", "pair",
                  "backward, input only", "backward, weights only", "idle"):
        assert f">{label}</text>" in picture


def test_a_long_schedule_stays_a_picture():
    schedule = forward_only(2, 2000)
    assert float(ElementTree.fromstring(svg(schedule, simulate(schedule))).get("width")) < 10_000


def test_json():
    data = json.loads(as_json(dualpipe(2, 4), simulate(dualpipe(2, 4))))
    assert data["rows"][0] == ["F0.0", "F1.0", "F0.1", "B1.0", "F1.1|B0.0", "B1.1", "I0.1", "W0.1"]
    assert data["spans"][1][:5] == [[0, 1], [1, 2], [2, 3], [3, 5], [5, 8]]
    assert {key: data[key] for key in data.keys() - {"rows", "spans"}} == {
        "kind": "dualpipe", "ranks": 2, "microbatches": 4, "makespan": 12.0, "bubble": [0.0, 0.0], "bubble_ratio": 0.0,
        "peak_activations": [3, 3],
    }
