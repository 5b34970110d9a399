"""Rows, cells, replicas and EP groups on clusters of any form."""

from __future__ import annotations

from collections import Counter
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.config.run_config import ConfigError, LayoutSection
from orchestrator.layout.layout import Layout
from orchestrator.layout.placement import place_experts
from orchestrator.schedule.ir.stages import BOTH, LOOP, Stages, V
from tests.orchestrator.layouts import DEEPSEEK, DEEPSEEK_CONFIG, clusters, layout_of, small_model

MODEL = small_model(num_hidden_layers=8)
PIPELINES = (1, 2, 4, 8)


def check(layout: Layout, ranks: tuple[int, ...], pipeline: int) -> None:
    """What holds for every layout: each place once, the formula for node and local index, no accelerator used twice."""
    c, k = layout.positions_per_node, layout.width
    assert [place.rank for place in layout.places] == list(range(layout.size))
    found = [(place.row, place.position, place.width) for place in layout.places]
    assert found == list(product(range(layout.rows), range(pipeline), range(k)))
    for place in layout.places:
        node, first = layout.cells[place.row][place.position // c]
        assert (place.node, place.local) == (node, first + place.position % c * k + place.width)
        assert place.local < ranks[int(place.node[1:])]
        assert layout.rank_at(place.row, place.position, place.width) == place.rank
        assert layout.expert_group(place.replica, place.position)[place.expert_rank] == place.rank
        assert place.rank in layout.line(place.row, place.width)
        rail = layout.rail(place.replica, place.position, place.width)
        inside = layout.inside(place.row, place.position)
        assert rail.index(place.rank) * k + inside.index(place.rank) == place.expert_rank
        assert {layout.places[rank].width for rank in rail} == {place.width} and len(rail) == len(layout.replicas[place.replica])
        assert [(layout.places[rank].row, layout.places[rank].node) for rank in inside] == [(place.row, place.node)] * k
    assert len({(place.node, place.local) for place in layout.places}) == layout.size
    assert [row for rows in layout.replicas for row in rows] == list(range(layout.rows))
    sizes = [len(rows) for rows in layout.replicas]
    assert max(sizes) - min(sizes) <= 1 and max(sizes) <= MODEL.n_group


def test_a_second_hop_needs_ranks_beside_each_other_on_several_nodes():
    wide, alone, one_row = layout_of((2, 2), 1, MODEL), layout_of((1, 1), 1, MODEL), layout_of((2,), 1, MODEL)
    assert (wide.rows, wide.width, alone.width) == (2, 2, 1) and one_row.rows * one_row.width == 2
    assert [wide.two_hops(0, hops) for hops in ("auto", 1, 2)] == [True, False, True]
    assert not alone.two_hops(0, 2) and not one_row.two_hops(0, "auto")


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_even_clusters(pipeline):
    for count, each in product(range(1, 9), range(1, 5)):
        ranks = (each,) * count
        if count * each < pipeline:
            with pytest.raises(ConfigError, match=rf"^layout.pipeline = {pipeline}: needs {pipeline} .* has {count * each} "):
                layout_of(ranks, pipeline, MODEL)
            continue
        layout = layout_of(ranks, pipeline, MODEL)
        check(layout, ranks, pipeline)
        assert len(layout.nodes) >= min(2, count)
        assert layout.size >= most_ranks(ranks, pipeline)


def most_ranks(ranks: tuple[int, ...], pipeline: int) -> int:
    """By trying every shape: the most ranks in whole rows that reach two nodes, where there are two."""
    best = 0
    for c, k in product(range(1, pipeline + 1), range(1, max(ranks) + 1)):
        cells = [n // (c * k) for n in ranks]
        rows = sum(cells) * c // pipeline
        reached = max(pipeline // c if all(cells) else 1, min(rows, sum(map(bool, cells))))
        experts_of_smallest_row = MODEL.n_group // min(MODEL.n_group, max(1, rows)) * MODEL.experts_per_group
        if pipeline % c == 0 and rows and min(reached, len(ranks)) >= min(2, len(ranks)) and k <= experts_of_smallest_row:
            best = max(best, rows * pipeline * k)
    return best


@given(st.sampled_from(PIPELINES), st.data())
@settings(max_examples=150, deadline=None)
def test_any_cluster(pipeline, data):
    ranks = data.draw(clusters(pipeline))
    layout = layout_of(ranks, pipeline, MODEL)
    check(layout, ranks, pipeline)
    assert len(layout.nodes) >= min(2, len(ranks))


def test_two_nodes_come_before_more_ranks():
    assert layout_of((4, 1), 2, MODEL).nodes == ("n0", "n1")


def test_whole_nodes_are_cells_where_ranks_are_equal():
    layout = layout_of((4, 4), 2, MODEL)
    assert (layout.positions_per_node, layout.width, layout.rows) == (2, 2, 2)
    assert layout.describe() == "PP2 x EP4 x DP1: 8 ranks in 2 rows on 2 nodes, cells of 2 positions x 2 ranks"


def test_deepseeks_own():
    layout = layout_of((8,) * 256, 16, DEEPSEEK, expert=64, data=2, shape=(1, 8))
    assert (layout.size, layout.rows, len(layout.replicas), layout.streams) == (2048, 16, 2, 128)
    for replica, position in product(range(2), range(16)):
        members = [layout.places[rank] for rank in layout.expert_group(replica, position)]
        assert Counter(Counter(place.node for place in members).values()) == {8: 8}  # 64 ranks on 8 nodes, 8 each
    assert layout.cells[3] == tuple((f"n{node}", 0) for node in range(48, 64))
    assert layout_of((8,) * 256, 16, DEEPSEEK, shape=(1, 8)) == layout
    assert DEEPSEEK_CONFIG.layout.shape == (1, 8)


@pytest.mark.parametrize("count, rows", [(6, [3, 3]), (7, [3, 4]), (8, [4, 4])])
def test_uneven_replicas(count, rows):
    """Four expert groups fill at most four rows."""
    layout = layout_of((2,) * count, 2, MODEL)
    assert [len(found) for found in layout.replicas] == rows
    assert layout.size == 2 * count
    pinned = layout_of((2,) * count, 2, small_model(n_routed_experts=16, n_group=8), data=2)
    assert [len(found) for found in pinned.replicas] == rows


@given(st.sampled_from((1, 2, 4)), st.sampled_from(("auto", 1, 2, 3, 4, 6, 8, 9)), st.sampled_from(("auto", 1, 2, 3)), st.data())
@settings(max_examples=200, deadline=None)
def test_pins_are_honoured_or_refused_with_a_key_that_was_set(pipeline, expert, replicas, data):
    ranks = data.draw(clusters(pipeline))
    shapes = ["auto", (1, 1), (1, 2), (2, 1), (2, 2)]
    shape = data.draw(st.sampled_from([s for s in shapes if s == "auto" or pipeline % s[0] == 0]))
    pins = {"expert": expert, "data": replicas, "shape": shape}
    try:
        layout = layout_of(ranks, pipeline, MODEL, **pins)
    except ConfigError as error:
        key = error.key.removeprefix("layout.")
        assert pins.get(key) != "auto" and (key in pins or (key == "pipeline" and sum(ranks) < pipeline))
        assert str(error).isprintable()
        if "; auto gives " in str(error):  # then that alone helps
            layout_of(ranks, pipeline, MODEL, **{**pins, key: "auto"})
        return
    check(layout, ranks, pipeline)
    assert layout.meets(LayoutSection(pipeline=pipeline, **pins), Stages(BOTH, pipeline))
    if expert != "auto":
        assert {len(rows) * layout.width for rows in layout.replicas} == {expert}
    if replicas != "auto":
        assert len(layout.replicas) == replicas
    if shape != "auto":
        assert (layout.positions_per_node, layout.width) == shape


@pytest.mark.parametrize("pins, folding, met", [
    ({}, Stages(BOTH, 2), True), ({"expert": 2, "data": 1, "shape": (2, 1)}, Stages(BOTH, 2), True), ({"expert": 4}, Stages(BOTH, 2), False),
    ({"data": 2}, Stages(BOTH, 2), False), ({"shape": (1, 2)}, Stages(BOTH, 2), False), ({}, Stages(V, 2, 2), False),
    ({}, Stages(BOTH, 4), False)])
def test_whether_a_layout_is_as_configured(pins, folding, met):
    assert layout_of((2, 2), 2, MODEL).meets(LayoutSection(pipeline=folding.positions, **pins), folding) is met


@pytest.mark.parametrize("ranks, pins, line", [
    ((2, 2), {"expert": 9}, "layout.expert = 9: at most model.n_routed_experts = 8"),
    ((2, 2), {"expert": 4}, "layout.expert = 4: needs 8 ranks (pipeline x expert x data), the cluster has 4 ranks on 2 nodes"),
    ((2, 2), {"data": 3}, "layout.data = 3: needs 6 ranks (pipeline x expert x data), the cluster has 4 ranks on 2 nodes"),
    ((2, 2), {"shape": (2, 2)}, ("layout.shape = [2, 2]: does not fit layout.pipeline = 2 and model.n_group = 4, "
                                "the cluster has 4 ranks on 2 nodes; auto gives [2, 1]")),
    ((2,) * 6, {"expert": 5}, ("layout.expert = 5: does not fit layout.pipeline = 2 and model.n_group = 4, "
                              "the cluster has 12 ranks on 6 nodes; auto gives 3")),
    ((3, 3), {"shape": (1, 2), "data": 2}, ("layout.data = 2: does not fit layout.pipeline = 2 and model.n_group = 4, "
                                           "the cluster has 6 ranks on 2 nodes; auto gives 1")),
    ((3,) * 4, {"shape": (1, 4), "expert": 5}, ("layout.expert = 5: does not fit layout.pipeline = 2 and model.n_group = 4 "
                                               "with layout.shape = [1, 4], the cluster has 12 ranks on 4 nodes")),
])
def test_refusals(ranks, pins, line):
    with pytest.raises(ConfigError) as caught:
        layout_of(ranks, 2, MODEL, **pins)
    assert str(caught.value) == line


def test_a_model_of_one_expert_is_refused_for_what_was_set():
    with pytest.raises(ConfigError, match="^layout.pipeline = 4: needs 4 ranks .*, the cluster has 3 ranks on 1 node$"):
        layout_of((3,), 4, small_model(n_routed_experts=1, num_experts_per_tok=1, n_group=1, topk_group=1))


@pytest.mark.parametrize("count", range(1, 9))
def test_rows_beyond_the_expert_groups_of_one_replica_stay_out(count):
    layout = layout_of((1,) * count, 1, MODEL, data=1)
    assert layout.rows == min(count, MODEL.n_group)
    assert all(place_experts(MODEL, layout, 0, 0))


FOLDINGS = [Stages(BOTH, 1), Stages(BOTH, 2), Stages(BOTH, 4), Stages(V, 1, 2), Stages(V, 2, 2), Stages(V, 2, 4), Stages(V, 3, 2),
            Stages(LOOP, 1, 3), Stages(LOOP, 2), Stages(LOOP, 3), Stages(LOOP, 2, 3)]


@pytest.mark.parametrize("folding", FOLDINGS, ids=str)
def test_where_stages_are(folding):
    """Told by walking the paths of microbatches, place by place."""
    pipeline = folding.positions
    layout = layout_of((pipeline,) * 2, pipeline, MODEL, folding)
    hosted = {position: set() for position in range(pipeline)}
    for path in folding.paths:
        for stage, (position, slot) in enumerate(path):
            assert layout.stages(position)[slot] == stage
            hosted[position].add(stage)
    for position, stages in hosted.items():
        assert set(layout.stages(position)) == stages
        peers = {place.rank for place in layout.places if hosted[place.position] == stages}
        assert set(layout.peers(position)) == peers and all(set(layout.holders(stage)) == peers for stage in stages)
        assert hosted[layout.mirror(position)] == stages
    assert set(layout.ends) == {position for position, stages in hosted.items() if stages & {0, folding.count - 1}}


@pytest.mark.parametrize("folding", [Stages(V, 4, 2), Stages(LOOP, 4)], ids=str)
def test_without_mirrors_cells_and_experts_stay_in_order(folding):
    """A row whose first and last cell share a node: with mirrors it is put otherwise, without it need not."""
    rows = {placed: layout_of((2, 1, 1), 4, MODEL, placed, shape=(1, 1)).cells[0] for placed in (folding, Stages(BOTH, 4))}
    names = {placed: [node for node, _ in row] for placed, row in rows.items()}
    assert names[folding] == ["n0", "n1", "n2", "n0"] != names[Stages(BOTH, 4)]
    layout = layout_of((4, 4), 4, MODEL, folding, data=1)
    assert len({place_experts(MODEL, layout, 0, position) for position in range(4)}) == 1
