"""Layouts after a change of nodes: what stays, what is mended, and what is chosen anew."""

from __future__ import annotations

import time
from collections import Counter
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.config.run_config import ConfigError, RunConfig, check, parse
from orchestrator.layout.layout import Layout
from orchestrator.plan import scheduling
from orchestrator.recovery.relayout import MOST_IDLE, predicted_duration, relaid
from orchestrator.schedule.ir.stages import V
from orchestrator.schedule.timing.durations import Durations
from orchestrator.schedule.timing.simulate import makespan
from orchestrator.topology import Node
from tests.orchestrator.layouts import DEEPSEEK_CONFIG, nodes, small_model

PIPELINES = (1, 2, 4, 8)


def config(pipeline: int, **sections) -> RunConfig:
    model = small_model(num_hidden_layers=8).model_dump()
    layout = {"pipeline": pipeline, **sections.pop("layout", {})}
    return parse({"model": {**model, **sections.pop("model", {})}, "layout": layout, **sections})


def sound(layout: Layout, alive: tuple[Node, ...], n_group: int = 4) -> None:
    """Each place once, on ranks that are there; every stage hosted; replicas near-equal."""
    ranks = {node.name: node.ranks for node in alive}
    assert len({(place.node, place.local) for place in layout.places}) == layout.size > 0
    assert all(place.local < ranks[place.node] for place in layout.places)
    assert all(layout.holders(stage) for stage in range(layout.folding.count))
    assert sorted(row for rows in layout.replicas for row in rows) == list(range(layout.rows))
    sizes = [len(rows) for rows in layout.replicas]
    assert max(sizes) - min(sizes) <= 1 and max(sizes) <= n_group and all(rows == tuple(sorted(rows)) for rows in layout.replicas)
    assert len(layout.cells[0]) * layout.positions_per_node == layout.pipeline


def kept_in_order(old: Layout, new: Layout, alive: tuple[Node, ...]) -> None:
    """Rows all of whose places are there are rows again, in the same order."""
    ranks = {node.name: node.ranks for node in alive}
    size = old.positions_per_node * old.width
    whole = [row for row in old.cells if all(first + size <= ranks.get(node, 0) for node, first in row)]
    assert [row for row in new.cells if row in whole] == whole[: new.rows]


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_every_single_loss_and_a_join(pipeline):
    """On 1 to 8 nodes of 1 to 4 ranks."""
    taken, same = [], 0
    for count, each in product(range(1, 9), range(1, 5)):
        wanted, alive = config(pipeline), nodes(*[each] * count)
        first = relaid(wanted, alive, None)
        sound(first.layout, alive)
        changes = [alive[:lost] + alive[lost + 1 :] for lost in range(count) if count > 1]
        changes.append((*alive, Node("new", each)))
        for left in changes:
            begin = time.process_time()
            after = relaid(wanted, left, first.layout)
            taken.append(time.process_time() - begin)
            available = sum(node.ranks for node in left)
            sound(after.layout, left)
            check(after.config)
            assert after.config.stages == after.layout.folding
            assert after.layout.pipeline == min(pipeline, after.layout.pipeline)
            assert (after.layout.pipeline < pipeline) <= (available < pipeline), (count, each)
            if after.layout.pipeline == pipeline:
                assert len(after.layout.nodes) >= min(2, len(left))
                shapes = [(layout.folding, layout.positions_per_node, layout.width) for layout in (first.layout, after.layout)]
                if shapes[0] == shapes[1]:
                    kept_in_order(first.layout, after.layout, left)
                    same += 1
                fresh = relaid(wanted, left, None).layout
                assert predicted_duration(wanted, after.layout) <= predicted_duration(wanted, fresh) * 1.3
            again = relaid(wanted, left, after.layout)
            assert again.layout == after.layout, "what is best stays"
    print(f"pipeline {pipeline}: the shape stayed {same} of {len(taken)} times; {1000 * sorted(taken)[len(taken) // 2]:.1f} ms "
          f"median, {1000 * max(taken):.1f} ms at most")
    assert sorted(taken)[len(taken) // 2] < 0.05


@given(st.sampled_from(PIPELINES), st.data())
@settings(max_examples=60, deadline=None)
def test_a_chain_of_changes(pipeline, data):
    """Uneven nodes that come and go by several at once: always sound, and never more idle than rules allow."""
    clusters = data.draw(st.lists(st.lists(st.integers(0, 4), min_size=5, max_size=5).filter(any), min_size=2, max_size=4))
    wanted, old = config(pipeline), None
    for ranks in clusters:
        alive = tuple(node for node in nodes(*ranks) if node.ranks)
        found = relaid(wanted, alive, old)
        sound(found.layout, alive)
        fresh = relaid(wanted, alive, None).layout
        assert found.layout.pipeline == fresh.pipeline
        idle = sum(ranks) - found.layout.size
        longer = predicted_duration(found.config, found.layout) > predicted_duration(found.config, fresh) * (1 + 1e-6)
        assert not longer or idle <= MOST_IDLE * sum(ranks) or len(found.layout.nodes) > len(fresh.nodes)
        old = found.layout


def shaped(rows: list[str], alive: str, pipeline: int, **layout) -> list[str]:
    """Rows as strings of one-letter nodes, one rank a cell."""
    wanted = config(pipeline, layout={"shape": [1, 1], **layout})
    old = relaid(wanted, tuple(Node(name, 1) for name in "".join(rows)), None).layout
    assert ["".join(node for node, _ in row) for row in old.cells] == rows
    new = relaid(wanted, tuple(Node(name, 1) for name in alive), old).layout
    return ["".join(node for node, _ in row) for row in new.cells]


def test_rows_stay_spares_fill_and_broken_ones_pool():
    assert shaped(["ab", "cd", "ef"], "abcdef", 2) == ["ab", "cd", "ef"]
    assert shaped(["ab", "cd", "ef"], "abdef", 2) == ["ab", "ef"]  # d is spare
    assert shaped(["ab", "cd", "ef"], "abdefx", 2) == ["ab", "xd", "ef"]  # x fills the hole
    assert shaped(["ab", "cd", "ef"], "bcef", 2) == ["cb", "ef"]  # position 0 of the later row for that of the first
    assert shaped(["abcd", "efgh"], "abcefgh", 4) == ["efgh"]
    assert shaped(["abcd", "efgh"], "abcfgh", 4) == ["abch"]  # h was in the fourth place already
    assert shaped(["abcd", "efgh"], "abcdefgx", 4) == ["abcd", "efgx"]
    assert shaped(["abcd"], "yabcdxwz", 4) == ["abcd", "yxwz"]  # joined


def test_a_spare_keeps_mirrors_apart():
    """x has two cells, of which one is in the row: the other one must not host the same stages."""
    wanted = config(4, layout={"shape": [1, 1]})
    old = relaid(wanted, tuple(Node(name, 1) for name in "abcd"), None).layout
    alive = (Node("a", 2), Node("b", 1), Node("c", 1), Node("x", 1))
    assert [node for node, _ in relaid(wanted, alive, old).layout.cells[0]] == list("abcx")
    alive = (Node("a", 1), Node("b", 1), Node("x", 2))
    row = relaid(wanted, alive, old).layout.cells[0]
    assert [node for node, _ in row] == list("abxx")
    row = relaid(wanted, (Node("a", 2), Node("b", 1), Node("y", 1)), old).layout.cells[0]
    assert [node for node, _ in row] == list("abay")
    joined = (*(Node(name, 1) for name in "abcd"), Node("y", 2), Node("x", 1), Node("z", 1))
    new = [node for node, _ in relaid(wanted, joined, old).layout.cells[1]]
    assert sorted(new) == list("xyyz") and all(a != b for a, b in zip(new, new[::-1]))


def test_replicas_are_dealt_again_with_few_moves():
    """Eight rows in two replicas; one is lost, two are."""
    alive = tuple(Node(f"n{n}", 2) for n in range(8))
    wanted = config(2, layout={"shape": [2, 1]})
    old = relaid(wanted, alive, None).layout
    assert old.replicas == ((0, 1, 2, 3), (4, 5, 6, 7))
    assert relaid(wanted, alive[:7], old).layout.replicas == ((0, 1, 2, 3), (4, 5, 6))
    assert relaid(wanted, alive[1:], old).layout.replicas == ((0, 1, 2), (3, 4, 5, 6))  # the rows 1, 2, 3 and 4 to 7 of before
    assert relaid(wanted, alive[2:], old).layout.replicas == ((0, 1, 3), (2, 4, 5))  # row 5 moves over: it has what 1 had
    assert relaid(wanted, (*alive, Node("x", 2)), old).layout.replicas == ((0, 1, 2), (4, 5, 7), (3, 6, 8))
    seven = relaid(wanted, alive[1:], old).layout
    assert relaid(wanted, (*alive[1:], Node("x", 2)), seven).layout.replicas == ((0, 1, 2, 7), (3, 4, 5, 6))


def test_shape_is_chosen_anew_where_too_many_would_idle():
    """Two nodes of 4 ranks become one and a half: rows of 2 x 2 on a node would leave 2 of 6 idle."""
    wanted = config(2)
    old = relaid(wanted, nodes(4, 4), None).layout
    assert (old.positions_per_node, old.width, old.rows) == (2, 2, 2)
    after = relaid(wanted, nodes(4, 2), old).layout
    assert (after.positions_per_node, after.width, after.size) == (2, 1, 6)
    pinned = config(2, layout={"shape": [2, 2]})
    assert relaid(pinned, nodes(4, 2), old).layout.size == 4


def test_predicted_duration_looks_at_microbatches_and_at_uneven_experts():
    wanted = config(2, training={"batch_sequences": 96})
    two, three, four = (relaid(wanted, nodes(*[2] * count), None).layout for count in (2, 3, 4))
    times = [predicted_duration(wanted, layout) for layout in (two, three, four)]
    assert times == sorted(times, reverse=True)
    by_hand = predicted_duration(config(2, training={"batch_sequences": 96}, model={"n_group": 2, "topk_group": 2}), two)
    assert by_hand == pytest.approx(times[0])  # even both ways
    assert predicted_duration(config(2, model={"n_group": 3, "n_routed_experts": 9}), two) == pytest.approx(
        predicted_duration(config(2), two) * (1 + (6 / 4.5 - 1) / 2))


@pytest.mark.parametrize("kind", ["dualpipe", "dualpipev", "zbv", "zb_h1", "1f1b", "gpipe", "interleaved_1f1b",
                                  "merged_interleaved_1f1b"])
def test_predicted_duration_is_that_of_the_simulated_schedule(kind):
    costs = {"dispatch": 0, "combine": 0, "hop": 0}
    wanted = config(4, schedule={"kind": kind, "costs": costs}, training={"batch_sequences": 96, "microbatch_sequences": 2})
    layout = relaid(wanted, nodes(1, 1, 1, 1), None).layout
    schedule = scheduling.schedule_of(wanted, layout.folding, 48, training=True)
    stage = 1.0 / layout.folding.chunks
    assert predicted_duration(wanted, layout) == pytest.approx(
        makespan(schedule, Durations(forward=stage, backward_input=stage, backward_weight=stage)), rel=0.02)


def test_shorter_pipelines():
    wanted = config(8)
    seven = relaid(wanted, nodes(*[1] * 7), relaid(wanted, nodes(*[1] * 8), None).layout)
    assert (seven.layout.pipeline, seven.config.schedule.kind) == (7, "zb_h1")  # 14 stages are too many for 8 layers
    assert seven.notes == ("layout.pipeline = 8 does not fit: 7", "schedule.kind = dualpipe does not go with 7 positions: zb_h1")
    three = relaid(wanted, nodes(1, 1, 1), seven.layout)
    assert (three.layout.folding.placement, three.config.schedule.kind, three.layout.size) == (V, "dualpipev", 3)
    one = relaid(wanted, nodes(1), three.layout)
    assert (one.layout.size, one.config.schedule.kind, one.config.layout.pipeline) == (1, "dualpipe", 1)
    assert relaid(wanted, nodes(*[1] * 8), one.layout) == relaid(wanted, nodes(*[1] * 8), None)  # and back


def test_a_shorter_pipeline_stays_too():
    wanted = config(4, schedule={"kind": "1f1b"})
    old = relaid(wanted, (Node("b", 1), Node("a", 1), Node("c", 1)), None)
    assert old.layout.pipeline == 3
    assert relaid(wanted, (Node("a", 1), Node("b", 1), Node("c", 1)), old.layout).layout == old.layout


@pytest.mark.parametrize("sections, expected", [
    ({"layout": {"layers_per_stage": [1, 2, 2, 3]}}, {"layout.layers_per_stage": "auto", "schedule.kind": "dualpipev"}),
    ({"layout": {"shape": [2, 1]}}, {"layout.shape": "auto"}),
    ({"schedule": {"kind": "searched", "placement": "both"}}, {"schedule.placement": "auto", "schedule.kind": "searched"}),
    ({"schedule": {"kind": "interleaved_1f1b", "chunks": 2}}, {"schedule.chunks": 2, "schedule.kind": "interleaved_1f1b"}),
])
def test_settings_that_do_not_go_with_the_shorter_pipeline(sections, expected):
    found = relaid(config(4, **sections), nodes(2, 1), None)
    assert found.layout.pipeline == 3
    for key, value in expected.items():
        section, name = key.split(".")
        assert getattr(getattr(found.config, section), name) == value
    assert any("pipeline" in note for note in found.notes)


def test_pins_that_cannot_be_met_become_auto():
    wanted = config(2, layout={"expert": 4, "data": 2, "shape": [1, 2]}, training={"batch_sequences": 960})
    assert relaid(wanted, nodes(4, 4, 4, 4), None).notes == ()
    after = relaid(wanted, nodes(4, 4, 4), None)
    assert after.notes == ("layout.expert = 4 cannot be met: auto",)  # three rows instead of the two without `data`
    assert (after.layout.rows, len(after.layout.replicas), after.config.layout.expert) == (3, 2, "auto")
    less = relaid(wanted, nodes(2, 1), None)
    assert less.notes == ("layout.data = 2 cannot be met: auto", "layout.expert = 4 cannot be met: auto",
                          "layout.shape = [1, 2] cannot be met: auto")
    assert (less.layout.size, less.layout.pipeline) == (2, 2)


def test_no_rank_at_all_is_refused():
    for alive in ((), (Node("a", 0),)):
        with pytest.raises(ConfigError, match="layout"):
            relaid(config(2), alive, None)


def test_two_thousand_ranks_take_less_than_two_seconds():
    auto = DEEPSEEK_CONFIG.model_copy(update={"layout": DEEPSEEK_CONFIG.layout.model_copy(
        update={"shape": "auto", "expert": "auto", "data": "auto"})})
    alive = tuple(Node(f"n{n}", 8) for n in range(256))
    for wanted in (DEEPSEEK_CONFIG, auto):
        old = relaid(wanted, alive, None).layout
        begin = time.process_time()
        after = relaid(wanted, alive[:100] + alive[101:], old)
        seconds = time.process_time() - begin
        print(f"{after.layout.describe()}: {seconds:.2f} s")
        assert seconds < 2 and Counter(place.node for place in after.layout.places)["n0"] == 8
        assert after.layout.size >= 15 * 16 * 8
