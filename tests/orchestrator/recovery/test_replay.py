"""What a ledger says of its generations comes back as it was; what is no whole ledger is refused with its line."""

from __future__ import annotations

import json
from dataclasses import asdict, fields, is_dataclass, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.config.run_config import ScheduleSection, parse
from orchestrator.data.ledger import LedgerLine
from orchestrator.layout.layout import Layout, choose
from orchestrator.layout.placement import Placement, balanced_placement, default_placement
from orchestrator.recovery import replay
from orchestrator.recovery.replay import ReplayRefused
from orchestrator.topology import Node

KINDS = ("dualpipe", "dualpipev", "1f1b", "zbv", "interleaved_1f1b", "gpipe")


def run(pipeline: int, ranks: tuple[int, ...], kind: str = "dualpipe", **changes):
    """(configuration, layout)."""
    config = parse({"model": {"num_hidden_layers": 8}, "layout": {"pipeline": pipeline}, "schedule": {"kind": kind}, **changes})
    nodes = tuple(Node(f"n{index}", count) for index, count in enumerate(ranks))
    return config, choose(nodes, config.layout, config.model, config.stages)


def record(config, layout: Layout, placement: Placement) -> dict:
    """What a trainer adds to the line of the first step of a generation."""
    return {"layout": asdict(layout) | {"pipeline": layout.pipeline, "nodes": list(layout.nodes)},
            "schedule": config.schedule.model_dump(mode="json"),
            "placement": [{"replica": e.replica, "position": e.position, "layer": e.layer, "experts": e.experts}
                          for e in placement.placed]}


def line(step: int, generation: int = 1, change: dict | None = None) -> str:
    return json.dumps(asdict(LedgerLine(step, generation, 8 * step, 8, "0" * 32, 5.0 - step / 7)) | (change or {}))


def skewed(config, layout: Layout) -> Placement:
    """A placement by load that differs from the default one."""
    default = default_placement(config.model, layout)
    load = {entry.layer: [float((7 * e + entry.layer) % 16 + 1) ** 2 for e in range(16)] for entry in default.placed}
    return balanced_placement(config.model, layout, default, load)


@pytest.fixture
def two_generations():
    """(configuration, lines, the two layouts with their placements): a run that lost a node after three steps."""
    config, first = run(2, (2, 2))
    changed, second = run(2, (2,))
    lines = [line(0, 1, record(config, first, skewed(config, first))), line(1), line(2),
             line(3, 2, record(changed, second, default_placement(config.model, second))), line(4, 2)]
    return config, lines, [(first, skewed(config, first)), (second, default_placement(config.model, second))]


def test_two_generations(two_generations):
    config, lines, expected = two_generations
    found = replay.read(lines, config)
    assert [(c.first_step, c.generation) for c in found.changes] == [(0, 1), (3, 2)] and found.steps == 5
    assert [(c.layout, c.placement) for c in found.changes] == expected
    assert all(c.config == config and c.schedule == config.schedule for c in found.changes)
    assert [found.at(step).generation for step in range(5)] == [1, 1, 1, 2, 2]
    assert [found.begins(step) is not None for step in range(5)] == [True, False, False, True, False]
    assert found.losses == tuple(5.0 - step / 7 for step in range(5))  # floats come back exactly as they were


@given(st.sampled_from(KINDS), st.sampled_from([1, 2, 4]), st.lists(st.integers(1, 4), min_size=1, max_size=8), st.booleans())
@settings(max_examples=150, deadline=None)
def test_any_layout_and_placement_come_back(kind, pipeline, ranks, by_load):
    if sum(ranks) < pipeline:
        ranks = [pipeline]
    config, layout = run(pipeline, tuple(ranks), kind)
    placement = skewed(config, layout) if by_load else default_placement(config.model, layout)
    (found,) = replay.read([line(0, 1, record(config, layout, placement))], config).changes
    assert (found.layout, found.placement, found.config) == (layout, placement, config)


def test_all_fields_of_a_layout_are_in_its_record():
    """A field that is added to Layout must come back, too."""
    _, layout = run(4, (2, 2, 1, 1))
    tree = json.loads(json.dumps(asdict(layout)))
    assert replay.layout_of(tree) == layout
    assert set(tree) == {field.name for field in fields(layout)} and is_dataclass(layout.folding)
    for name in tree:
        with pytest.raises(ValueError, match=f"no {name}"):
            replay.layout_of({key: value for key, value in tree.items() if key != name})


def test_a_pipeline_that_became_shorter():
    """Pipeline and kind are this generation's; pins that were given up do not stand in the way."""
    config, first = run(4, (2, 2), layout={"pipeline": 4, "expert": 1, "data": 1})
    shorter, second = run(3, (3,), "dualpipev")
    lines = [line(0, 1, record(config, first, default_placement(config.model, first))),
             line(1, 2, record(shorter, second, default_placement(config.model, second)))]
    before, after = replay.read(lines, config).changes
    assert (after.config.layout.pipeline, after.schedule.kind, after.layout) == (3, "dualpipev", second)
    assert (after.config.layout.expert, after.config.layout.data) == ("auto", "auto")
    assert after.config.stages == second.folding and (before.layout, before.schedule.kind) == (first, "dualpipe")
    assert after.config.model_copy(update={"layout": config.layout, "schedule": config.schedule}) == config  # nothing else


def test_layers_of_stages_that_are_recorded_go_before_those_configured():
    config, layout = run(2, (2,), layout={"pipeline": 2, "layers_per_stage": [3, 5]})
    placement = default_placement(config.model, layout, [3, 5])
    found = replay.read([line(0, 1, record(config, layout, placement))], config).changes[0]
    assert found.placement == placement and found.config.layout.layers_per_stage == [3, 5]
    placement = default_placement(config.model, layout, "auto")
    found = replay.read([line(0, 1, record(config, layout, placement) | {"layers_per_stage": "auto"})], config).changes[0]
    assert found.placement == placement and found.config.layout.layers_per_stage == "auto"


def test_a_run_that_was_started_again_counts_generations_anew(two_generations):
    config, lines, expected = two_generations
    again = line(5, 1, record(config, expected[0][0], expected[0][1]))
    found = replay.read([*lines, again, line(6, 1)], config)
    assert [(c.first_step, c.generation) for c in found.changes] == [(0, 1), (3, 2), (5, 1)]


@pytest.mark.parametrize("change, reason", [
    (lambda lines: [], "the ledger has no line"),
    (lambda lines: lines[1:], "line 1: step 1 where step 0 is due"),
    (lambda lines: lines[:1] + lines[2:], "line 2: step 2 where step 1 is due"),
    (lambda lines: lines[:2] + lines[1:], "line 3: step 1 where step 2 is due"),
    (lambda lines: [line(0)] + lines[1:], "line 1: the first step has no layout: this is no beginning of a ledger"),
    (lambda lines: [*lines[:3], line(3, 2), lines[4]], "line 4: generation 2 begins without its layout"),
    (lambda lines: [lines[0], "{", *lines[2:]], "line 2: not that of a committed step"),
    (lambda lines: [lines[0], "[1]", *lines[2:]], "line 2: not that of a committed step"),
    (lambda lines: [lines[0], lines[1].replace('"step": 1', '"step": "1"')], "line 2: not that of a committed step"),
])
def test_a_ledger_that_is_not_whole_is_refused(two_generations, change, reason):
    config, lines, _ = two_generations
    with pytest.raises(ReplayRefused) as refused:
        replay.read(change(lines), config)
    assert str(refused.value) == reason


def edited(text: str, path: str, value: object) -> str:
    """The line with the value at a dotted path replaced; None: removed."""
    tree = node = json.loads(text)
    *parents, leaf = [int(part) if part.isdigit() else part for part in path.split(".")]
    for part in parents:
        node = node[part]
    if value is None:
        del node[leaf]
    else:
        node[leaf] = value
    return json.dumps(tree)


@pytest.mark.parametrize("path, value, words", [
    ("layout.width", None, "layout: no width"),
    ("layout.width", "2", "layout: '2' where a whole number belongs"),
    ("layout.width", True, "layout: True where a whole number belongs"),
    ("layout.width", 2, "has experts of 2 ranks, the layout has 4"),
    ("layout.positions_per_node", 3, "layout: cells of 3 positions x 1 ranks do not make pipelines of 2 positions"),
    ("layout.positions_per_node", 1, "layout: a row that has not 2 cells"),
    ("layout.replicas", [[0]], "layout: replicas ((0,),) are not the 2 rows, each once"),
    ("layout.replicas", [[0, 1], [1]], "layout: replicas"),
    ("layout.replicas", [[0, 1], []], "layout: replicas"),
    ("layout.cells.1.0", ["n0", 1], "layout: two ranks have the same place on a node"),
    ("layout.cells", [], "layout: a row that has not 1 cells"),
    ("layout.folding.positions", 0, "layout: positions = 0: at least 1"),
    ("layout.folding.placement", "round", "layout: placement = round"),
    ("layout.folding", 7, "layout: "),
    ("layout", 7, "layout: "),
    ("schedule", None, "schedule: no schedule"),
    ("schedule", "dualpipe", "schedule: "),
    ("schedule.kind", "unheard", "schedule.kind: Input should be"),
    ("schedule.kind", "zbv", "schedule: zbv folds the stages as"),
    ("placement", None, "placement: no placement"),
    ("placement", [], "is missing"),
    ("placement.0.layer", 99, "is no place of the layout"),
    ("placement.0.experts.0.0", 99, "does not have each of 16 experts once"),
    ("placement.0.experts.0.0", "0", "placement: '0' where a whole number belongs"),
    ("placement.0.experts", [list(range(16))], "has experts of 1 ranks, the layout has 2"),
    ("placement.0.experts", None, "placement: no experts"),
])
def test_a_record_that_is_none_is_refused_by_name(two_generations, path, value, words):
    config, lines, _ = two_generations
    with pytest.raises(ReplayRefused) as refused:
        replay.read([edited(lines[0], path, value), *lines[1:]], config)
    assert str(refused.value).startswith("line 1: ") and words in str(refused.value) and "\n" not in str(refused.value)


def test_the_run_of_another_model_is_refused(two_generations):
    config, lines, _ = two_generations
    other = config.model_copy(update={"model": config.model.model_copy(update={"n_routed_experts": 32})})
    with pytest.raises(ReplayRefused, match="does not have each of 32 experts once"):
        replay.read(lines, other)
    deeper = config.model_copy(update={"model": config.model.model_copy(update={"num_hidden_layers": 9})})
    with pytest.raises(ReplayRefused, match="line 1: placement: .* is missing"):
        replay.read(lines, deeper)


def test_a_schedule_with_all_its_settings_comes_back():
    config, layout = run(2, (2,), schedule={"kind": "searched", "placement": "v", "chunks": 2, "most_activations": 3.5,
                                            "costs": {"dispatch": 0.5}, "overlap": False})
    found = replay.read([line(0, 1, record(config, layout, default_placement(config.model, layout)))], parse({
        "model": {"num_hidden_layers": 8}})).changes[0]
    assert isinstance(found.schedule, ScheduleSection) and found.schedule == config.schedule
    assert replace(found, config=config) == replay.Recorded(0, 1, layout, default_placement(config.model, layout), config)
