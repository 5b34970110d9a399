"""The picture shows every action once where the simulation has it, and what the lanes do; the JSON holds the same."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from itertools import pairwise
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.schedule.ir.actions import Pair, SplitAction, parse_csv
from orchestrator.schedule.ir.spans import Lane, Span
from orchestrator.schedule.ir.stages import SEARCHED, Stages
from orchestrator.schedule.kinds.forward_only import forward_only
from orchestrator.schedule.kinds.registry import generate
from orchestrator.schedule.pictures.bars import without
from orchestrator.schedule.pictures.render import as_json, svg
from orchestrator.schedule.timing.durations import UNIT, Durations, per_chunk, with_communication
from orchestrator.schedule.timing.measured import MeasuredStep
from orchestrator.schedule.timing.simulate import simulate

SVG = "{http://www.w3.org/2000/svg}"
EVERY_SHAPE = parse_csv("F0.0/2,F0.1|F0.2,I0.0,F0.3|I0.1,I0.2|W0.0,B0.3/2,W0.1,W0.2\n", SEARCHED, Stages("loop", 1))
SCHEDULES = [generate("dualpipe", 8, 20), generate("dualpipe", 1, 3), forward_only(Stages("both", 4), 6), generate("zb_h1", 3, 5),
             generate("zbv", 3, 4), generate("interleaved_1f1b", 4, 8, 4), generate("merged_interleaved_1f1b", 2, 4, 2),
             generate("gpipe", 2, 3), EVERY_SHAPE]
UNEVEN = Durations(0.0131, 0.011, (0.012, 0.02, 0.012, 0.011) * 4, dispatch=0.004, combine=0.007, hop=0.002)


class Picture:
    """An SVG read back. The axis says which pixel is which time."""

    def __init__(self, text: str):
        self.root = ElementTree.fromstring(text)
        self.width, self.height = (float(self.root.get(name)) for name in ("width", "height"))
        ticks = [(float(node.get("x")), float(node.text)) for node in self.root.findall(f"{SVG}text")
                 if node.get("text-anchor") == "middle" and float(node.get("y")) > self.height - 30]
        (x, time), (other_x, other_time) = ticks[0], ticks[-1]
        self.left, self.per_unit = x - time * (other_x - x) / (other_time - time), (other_x - x) / (other_time - time)

    def boxes(self):
        """(title, [(start, end, y, height) of each rectangle]) of every box."""
        for group in self.root.findall(f"{SVG}g"):
            places = []
            for rectangle in group.findall(f"{SVG}rect"):
                x, y, width, height = (float(rectangle.get(name)) for name in ("x", "y", "width", "height"))
                inset = 0.75 * (rectangle.get("fill") == "white")
                places.append((self.time(x - inset), self.time(x + width + inset), y - inset, height + 2 * inset))
            yield group.find(f"{SVG}title").text, places

    def lane(self, name):
        """Intervals of the paths of this class, by y."""
        found = defaultdict(list)
        for path in self.root.findall(f"{SVG}path[@class='{name}']"):
            for x, y, width in re.findall(r"M(\S+) (\S+?)h(\S+?)v", path.get("d")):
                found[float(y)].append((self.time(float(x)), self.time(float(x) + float(width))))
        return [found[y] for y in sorted(found)]

    def time(self, x):
        return (x - self.left) / self.per_unit


def swept(spans, wanted):
    """Length of time for which `wanted(compute, exchange)`: whether lanes are busy, between neighbouring ends of spans."""
    times = sorted({time for span in spans for time in (span.start, span.end)})
    total = 0.0
    for start, end in pairwise(times):
        busy = {span.lane for span in spans if span.start < (start + end) / 2 < span.end}
        total += (end - start) * wanted(Lane.COMPUTE in busy, Lane.EXCHANGE in busy)
    return total


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: f"{schedule.kind}-{schedule.positions}")
@pytest.mark.parametrize("durations", [UNIT, with_communication(UNIT, 0.9), UNEVEN], ids=["unit", "communication", "uneven"])
def test_every_action_is_drawn_to_scale(schedule, durations):
    timeline = simulate(schedule, durations)
    picture = Picture(svg(schedule, timeline))
    near = 0.03 / picture.per_unit                              # coordinates have two decimals
    boxes = iter(picture.boxes())
    bars = []
    for row, spans in zip(schedule.rows, timeline.rows, strict=True):
        tops = set()
        for action, span in zip(row, spans, strict=True):
            for index, compute in enumerate(action.computes):
                title, places = next(boxes)
                assert title.startswith(f"{action} (stage {action.computes[0].stage}") and f"stage {compute.stage}" in title
                assert len(places) == (2 if isinstance(action, SplitAction) else 1)
                assert (places[0][0], places[-1][1]) == pytest.approx((span.start, span.end), abs=near)
                assert all(a[1] == pytest.approx(b[0], abs=near) for a, b in pairwise(places))
                share = 2 if isinstance(action, Pair) else 1
                assert {place[3] for place in places} == {34 / share}
                tops |= {place[2] - index * 17 for place in places}
        assert len(tops) == 1
        bars += tops
    assert next(boxes, None) is None
    assert bars == sorted(set(bars)) and len(re.findall(r">rank \d+<", svg(schedule, timeline))) == schedule.positions


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: f"{schedule.kind}-{schedule.positions}")
def test_communication_is_a_strip_of_its_own_and_its_exposed_part_is_marked(schedule):
    timeline = simulate(schedule, with_communication(UNIT, 0.9))
    picture = Picture(svg(schedule, timeline))
    hidden, exposed, pale = (picture.lane(name) for name in ("hidden", "exposed", "pale"))
    assert pale == exposed and len(exposed) == schedule.positions
    for position, spans in enumerate(timeline.lanes):
        drawn = sum(end - start for start, end in exposed[position])
        assert drawn == pytest.approx(swept(spans, lambda compute, exchange: exchange and not compute), rel=5e-3)
    both = [swept(spans, lambda compute, exchange: exchange and compute) for spans in timeline.lanes]
    drawn = [sum(end - start for start, end in row) for row in hidden]
    assert drawn == pytest.approx([length for length in both if length > 1e-9], rel=5e-3)


def test_without_communication_there_is_no_strip():
    text = svg(SCHEDULES[0], simulate(SCHEDULES[0]))
    assert "communication" not in text and "<path" not in text


@given(*[st.lists(st.tuples(st.integers(0, 30), st.integers(0, 8)), max_size=8)] * 2)
def test_what_covers_leave(intervals, covers):
    intervals, covers = ([(start, start + length) for start, length in found] for found in (intervals, covers))
    left = {n for start, end in intervals for n in range(start, end)} - {n for start, end in covers for n in range(start, end)}
    found = list(without(intervals, covers))
    assert [n for start, end in found for n in range(start, end)] == sorted(left)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: f"{schedule.kind}-{schedule.positions}")
def test_legend_is_complete_and_within_the_picture(schedule):
    picture = Picture(svg(schedule, simulate(schedule, with_communication(UNIT, 0.5))))
    labels = [node for node in picture.root.findall(f"{SVG}text") if node.get("font-size") is None and not node.get("text-anchor")
              and not node.get("font-weight")]
    for node in labels:
        assert float(node.get("x")) + 7.2 * len(node.text) <= picture.width, node.text
    words = [node.text for node in labels]
    kinds = {compute.kind for row in schedule.rows for action in row for compute in action.computes}
    names = {"F": "forward", "B": "backward", "I": "backward, input only", "W": "backward, weights only"}
    assert {word.partition(";")[0] for word in words} & set(names.values()) == {names[kind] for kind in kinds}
    shapes = {type(action) for row in schedule.rows for action in row}
    assert ("pair" in words, "split in two halves" in words) == (Pair in shapes, SplitAction in shapes)
    assert {"communication, hidden", "communication, exposed", "idle"} <= set(words)
    right = max(float(node.get("x")) + float(node.get("width")) for node in picture.root.iter(f"{SVG}rect"))
    assert right <= picture.width


def test_a_legend_of_many_samples_takes_more_lines():
    schedule = generate("interleaved_1f1b", 2, 4, 40)
    few, many = (svg(s, simulate(s)) for s in (generate("interleaved_1f1b", 2, 4, 2), schedule))
    assert float(Picture(many).height) > float(Picture(few).height)
    assert all(f">{slot}</text>" in many for slot in range(40))


def test_title():
    picture = svg(generate("dualpipe", 8, 20), simulate(generate("dualpipe", 8, 20)))
    assert ">dualpipe: 8 ranks, 20 microbatches</text>" in picture and ">makespan 66, bubble 6 (9.1 %)</text>" in picture
    assert "direction" in picture
    schedule = generate("interleaved_1f1b", 4, 8, 2)
    durations = per_chunk(with_communication(UNIT, 1.0), schedule.stages)
    assert "4 ranks, 2 chunks, 8 microbatches" in svg(schedule, simulate(schedule, durations))
    figures = simulate(schedule, durations).figures()
    exposed = f"exposed communication {figures[0].exposed_communication_seconds:.4g} ("
    assert exposed in svg(schedule, simulate(schedule, durations))


def test_a_long_schedule_stays_a_picture():
    schedule = forward_only(Stages("both", 2), 2000)
    assert Picture(svg(schedule, simulate(schedule))).width < 12_000


def test_measured_beside_simulated_on_one_axis():
    schedule = parse_csv("F0.0,F0.1|B0.0,B0.1\n", SEARCHED, Stages("loop", 1))
    spans = [(Lane.COMPUTE, "F0.0 attention 0", 1, 4), (Lane.EXCHANGE, "F0.0 dispatch 0", 4, 6),
             (Lane.COMPUTE, "F0.0 experts 0", 6, 9),
             (Lane.COMPUTE, "F0.1 attention 0", 9, 12), (Lane.EXCHANGE, "F0.1 dispatch 0", 12, 15),
             (Lane.PIPELINE, "B0.0", 12, 13), (Lane.COMPUTE, "B0.0 experts 0", 13, 14), (Lane.COMPUTE, "B0.0", 14, 18),
             (Lane.COMPUTE, "B0.1 experts 0", 20, 30), (Lane.REDUCE, "REDUCE", 30, 34)]
    measured = MeasuredStep(7, (tuple(Span(0, *span) for span in spans),))
    timeline = simulate(schedule, Durations(10.0, 5.0, 5.0))
    text = svg(schedule, timeline, measured)
    picture = Picture(text)
    boxes = list(picture.boxes())
    drawn = {title.partition(" ")[0]: [(round(start, 1), round(end, 1)) for start, end, _, _ in places]
             for title, places in boxes[4:]}
    assert drawn == {"F0.0": [(1, 9)], "F0.1": [(9, 15)], "B0.0": [(13, 18)], "B0.1": [(20, 30)]}
    assert [(round(p[0][0]), round(p[0][1])) for _, p in boxes[:4]] == [(0, 10), (10, 30), (10, 30), (30, 40)]
    above, below = ([place[2] for _, places in half for place in places] for half in (boxes[:4], boxes[4:]))
    assert max(above) < min(below)
    assert [[(round(a), round(b)) for a, b in row] for row in picture.lane("exposed")] == [[(4, 6), (12, 13)]]
    assert [[(round(a), round(b)) for a, b in row] for row in picture.lane("hidden")] == [[(13, 15)]]
    assert [[(round(a), round(b)) for a, b in row] for row in picture.lane("reduce")] == [[(30, 34)]]
    assert "simulated: makespan 40 ms, bubble 0 ms (0.0 %)" in text
    assert "measured (step 7): makespan 30 ms, bubble 3 ms (10.0 %), exposed communication 3 ms (10.0 %)" in text
    for words in ("simulated", "measured", "gradient reduction", "ms"):
        assert f">{words}</text>" in text
    shown = json.loads(as_json(schedule, timeline, measured))["measured"]
    assert shown == {"step": 7, "makespan": 30, "bubble": [3.0], "exposed_communication": [3.0]}


def test_json():
    schedule = generate("dualpipe", 2, 4)
    data = json.loads(as_json(schedule, simulate(schedule)))
    assert data["rows"][0] == ["F0.0", "F1.0", "F0.1", "B1.0", "F1.1|B0.0", "B1.1", "I0.1", "W0.1"]
    assert data["spans"][1][:5] == [[0, 1], [1, 2], [2, 3], [3, 5], [5, 8]]
    assert {key: data[key] for key in data.keys() - {"rows", "spans"}} == {
        "kind": "dualpipe", "placement": "both", "ranks": 2, "chunks": 1, "microbatches": 4, "makespan": 12.0,
        "bubble": [0.0, 0.0], "bubble_ratio": 0.0, "exposed_communication": [0.0, 0.0], "peak_activations": [3, 3],
        "relative_activations": 3.0, "exchange": [[], []],
    }
    data = json.loads(as_json(schedule, simulate(schedule, Durations(2.0, 2.0, 2.0, dispatch=1.0, combine=1.0, layers=1))))
    assert data["spans"][0][0] == [0, 4] and data["exchange"][0][:2] == [[1, 2], [3, 4]]
    assert data["exposed_communication"][0] > 0
