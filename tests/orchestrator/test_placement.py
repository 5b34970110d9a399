"""Experts on ranks: each once, groups whole on a node, and the two copies of a stage's experts on different nodes."""

from __future__ import annotations

from collections import Counter
from itertools import permutations, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.config import ModelConfig
from orchestrator.layout import Layout
from orchestrator.placement import _apart, place_experts
from tests.orchestrator.layouts import DEEPSEEK, clusters, layout_of, small_model

MODELS = [small_model(num_hidden_layers=8, n_routed_experts=8, n_group=groups, topk_group=1, num_experts_per_tok=1)
          for groups in (1, 2, 4)]
PIPELINES = (1, 2, 4, 8)


def check(model: ModelConfig, layout: Layout) -> None:
    """In each EP group every expert once, and no expert group on two nodes."""
    for replica, position in product(range(len(layout.replicas)), range(layout.pipeline)):
        placed = place_experts(model, layout, replica, position)
        assert sorted(e for experts in placed for e in experts) == list(range(model.n_routed_experts))
        homes = {}
        for rank, experts in zip(layout.expert_group(replica, position), placed, strict=True):
            assert experts and list(experts) == sorted(experts)
            for expert in experts:
                homes.setdefault(expert // model.experts_per_group, set()).add(layout.places[rank].node)
        assert all(len(found) == 1 for found in homes.values())


def nodes_with_copies(model: ModelConfig, layout: Layout) -> dict[tuple[int, int], set[str]]:
    """(stage, expert group) -> the nodes that hold it."""
    found: dict[tuple[int, int], set[str]] = {}
    for replica, position in product(range(len(layout.replicas)), range(layout.pipeline)):
        placed = place_experts(model, layout, replica, position)
        for rank, experts in zip(layout.expert_group(replica, position), placed):
            for expert, stage in product(experts, layout.stages(position)):
                found.setdefault((stage, expert // model.experts_per_group), set()).add(layout.places[rank].node)
    return found


def excusable(layout: Layout, stage: int) -> bool:
    """Whether in every replica one node has more than half of the places that host the stage: then it cannot be helped."""
    for replica in range(len(layout.replicas)):
        hosts = layout.nodes_of(replica, stage) + layout.nodes_of(replica, layout.mirror(stage))
        if max(Counter(hosts).values()) <= len(hosts) // 2:
            return False
    return True


@pytest.mark.parametrize("pipeline", PIPELINES)
@pytest.mark.parametrize("model", MODELS, ids=lambda model: f"{model.n_group} groups")
def test_even_clusters(pipeline, model):
    for count, each in product(range(1, 9), range(1, 5)):
        if count * each >= pipeline:
            layout = layout_of((each,) * count, pipeline, model)
            check(model, layout)
            if pipeline >= 2 and count >= 2:
                assert all(len(nodes) >= 2 for nodes in nodes_with_copies(model, layout).values()), (count, each)


@given(st.sampled_from(PIPELINES), st.sampled_from(MODELS), st.data())
@settings(max_examples=150, deadline=None)
def test_any_cluster(pipeline, model, data):
    layout = layout_of(data.draw(clusters(pipeline)), pipeline, model)
    check(model, layout)
    if pipeline >= 2 and len(layout.nodes) >= 2:
        for (stage, _), nodes in nodes_with_copies(model, layout).items():
            assert len(nodes) >= 2 or excusable(layout, stage)


@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from("abc")), min_size=1, max_size=5))
@settings(max_examples=150, deadline=None)
def test_rows_trade_as_well_as_any_permutation(rows):
    first, second = zip(*rows)

    def together(to) -> int:
        return sum(first[row] == second[target] for row, target in enumerate(to))

    to = _apart(first, second)
    assert sorted(to) == list(range(len(rows)))
    assert together(to) == min(map(together, permutations(range(len(rows)))))
    most = max(Counter(first + second).values())
    assert (together(to) == 0) == (most <= len(rows))


def test_later_half_goes_to_the_next_row_where_mirrors_share_a_node():
    model = small_model()
    layout = layout_of((2, 2, 2, 2), 2, model)
    assert place_experts(model, layout, 0, 0) == ((0, 1), (2, 3), (4, 5), (6, 7))
    assert place_experts(model, layout, 0, 1) == ((6, 7), (0, 1), (2, 3), (4, 5))


def test_deepseeks_own():
    """Four experts a rank, expert group g on row g of the replica, the same at every position: mirrors are never on one node."""
    layout = layout_of((8,) * 256, 16, DEEPSEEK, expert=64, data=2, shape=(1, 8))
    check(DEEPSEEK, layout)
    for replica, position in product(range(2), range(16)):
        placed = place_experts(DEEPSEEK, layout, replica, position)
        assert placed == tuple(tuple(range(4 * index, 4 * index + 4)) for index in range(64))


@pytest.mark.parametrize("count, groups_on_rows", [(3, [3, 3, 2]), (6, [2, 1, 1, 2, 1, 1]), (7, [2, 1, 1, 1, 1, 1, 1])])
def test_groups_are_spread_evenly_over_rows(count, groups_on_rows):
    model = small_model(n_routed_experts=16, n_group=8)
    layout = layout_of((2,) * count, 2, model)
    for position in range(2):
        sizes = [len(experts) // 2 for experts in place_experts(model, layout, 0, position)]
        assert sorted(sizes) == sorted(groups_on_rows)


@pytest.mark.parametrize("count", range(1, 9))
def test_groups_go_to_rows_in_order(count):
    """Group g to row floor(g * S / n_group), in the earlier half of the positions."""
    model = small_model(n_routed_experts=16, n_group=8)
    placed = place_experts(model, layout_of((2,) * count, 2, model, data=1, shape=(2, 1)), 0, 0)
    assert {e: row for row, experts in enumerate(placed) for e in experts} == {e: e // 2 * count // 8 for e in range(16)}
