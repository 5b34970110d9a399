"""Experts on ranks: each once, groups whole on a node, and the two copies of a stage's experts on different nodes."""

from __future__ import annotations

from collections import Counter
from itertools import permutations, product
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.config.run_config import ModelConfig
from orchestrator.layout.balance import balanced, unevenness
from orchestrator.layout.layout import Layout
from orchestrator.layout.placement import ExpertMove, _apart, balanced_placement, default_placement, moves, place_experts
from orchestrator.model.parameters import stage_layers
from orchestrator.schedule.ir.stages import BOTH, LOOP, Stages, V
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


def measured(layers, experts: int, seed: int) -> dict[int, list[int]]:
    rng = Random(seed)
    return {layer: [int(100 * rng.lognormvariate(0, 0.7)) for _ in range(experts)] for layer in layers}


def layers_of(placement) -> set[int]:
    return {entry.layer for entry in placement.placed}


@pytest.mark.parametrize("folding", [Stages(BOTH, 2, 1), Stages(V, 2, 2), Stages(LOOP, 2, 2)])
def test_default_placement_is_place_experts_for_every_layer(folding):
    """Layers of the stages of a position; the first decoder layer is dense, the last stage has multi-token prediction."""
    model = small_model(num_hidden_layers=6, first_k_dense_replace=1, num_nextn_predict_layers=1)
    layout = layout_of((2, 2, 2), 2, model, folding)
    found = default_placement(model, layout)
    per_stage = stage_layers(model, folding.count)
    for replica, position in product(range(len(layout.replicas)), range(2)):
        here = {layer for stage in layout.stages(position) for layer in per_stage[stage] if layer >= 1}
        here |= {6} if folding.count - 1 in layout.stages(position) else set()
        assert {e.layer for e in found.placed if (e.replica, e.position) == (replica, position)} == here
        for layer in here:
            assert found.at(replica, position, layer) == place_experts(model, layout, replica, position)
    with pytest.raises(KeyError):
        found.at(0, 0, 0)


def kept_promises(model: ModelConfig, layout: Layout, placement, *, whole: bool = True) -> None:
    """Every expert once in each EP group, groups on one node, and copies as far apart as the default placement has them."""
    apart: dict[tuple[int, int], set[str]] = {}
    for entry in placement.placed:
        assert entry.ranks == layout.expert_group(entry.replica, entry.position)
        assert sorted(e for experts in entry.experts for e in experts) == list(range(model.n_routed_experts))
        homes = {}
        for rank, experts in zip(entry.ranks, entry.experts, strict=True):
            for expert in experts:
                homes.setdefault(expert // model.experts_per_group, set()).add(layout.places[rank].row)
                apart.setdefault((entry.layer, expert), set()).add(layout.places[rank].node)
        assert not whole or all(len(rows) == 1 for rows in homes.values())
    held_once = layout.folding.placement != BOTH or layout.pipeline == 1
    if not held_once and len(layout.nodes) >= 2:
        per_stage = stage_layers(model, layout.folding.count)
        for (layer, _), nodes in apart.items():
            stage = next((s for s, layers in enumerate(per_stage) if layer in layers), len(per_stage) - 1)
            assert len(nodes) >= 2 or excusable(layout, stage)


@given(st.sampled_from(PIPELINES), st.sampled_from(MODELS), st.integers(0, 99), st.integers(1, 2), st.data())
@settings(max_examples=100, deadline=None)
def test_balanced_placement_on_any_cluster(pipeline, model, seed, parts, data):
    layout = layout_of(data.draw(clusters(pipeline)), pipeline, model)
    current = default_placement(model, layout)
    load = measured(layers_of(current), model.n_routed_experts, seed)
    found = balanced_placement(model, layout, current, load, parts=parts)
    kept_promises(model, layout, current)
    kept_promises(model, layout, found, whole=parts == 1)
    for old, new in zip(current.placed, found.placed, strict=True):
        assert unevenness(load[old.layer], new.experts) <= unevenness(load[old.layer], old.experts) + 1e-12
    again = balanced_placement(model, layout, found, load, parts=parts)
    assert again == found and moves(found, again) == []


def test_a_layer_stays_without_load_or_gain():
    model = small_model()
    layout = layout_of((2, 2), 2, model)
    current = default_placement(model, layout)
    skewed = [40, 1, 1, 1, 30, 1, 1, 1]  # groups 0 and 2 are hot, on different nodes: no placement is better
    together = [40, 1, 30, 1, 1, 1, 1, 1]  # groups 0 and 1 are hot, on one node
    assert {1, 2, 3} <= layers_of(current)
    found = balanced_placement(model, layout, current, {1: [0] * 8, 2: skewed, 3: together})
    assert {move.layer for move in moves(current, found)} == {3}
    assert unevenness(together, current.at(0, 0, 3)) == 72 / 38 and unevenness(together, found.at(0, 0, 3)) == 43 / 38
    for layer in (1, 2):
        assert found.at(0, 1, layer) == current.at(0, 1, layer)
    assert balanced_placement(model, layout, current, {3: together}, least_gain=1.0) == current
    assert balanced_placement(model, layout, current, {3: together}, least_gain=0.5) != current


def test_moves_name_what_changes_with_the_mirrors():
    """PP2 x EP2, a mirror of every expert: groups 1 and 2 change places in one layer, the others stay where they are."""
    model = small_model()
    layout = layout_of((2, 2), 2, model)
    current = default_placement(model, layout)
    found = balanced_placement(model, layout, current, {2: [9, 9, 9, 9, 5, 5, 5, 5]})
    # node 0 has ranks 0 and 1 (positions 0 and 1), node 1 ranks 2 and 3; an expert of rank 0 is mirrored on rank 3, of 2 on 1
    assert current.holders[2, 0] == (0, 3) and current.holders[2, 4] == (1, 2)
    assert found.at(0, 0, 2) == ((0, 1, 4, 5), (2, 3, 6, 7)) and found.at(0, 1, 2) == ((2, 3, 6, 7), (0, 1, 4, 5))
    there, back = {"before": (0, 3), "after": (1, 2)}, {"before": (1, 2), "after": (0, 3)}
    listed = moves(current, found)
    assert listed == [ExpertMove(2, 2, **there), ExpertMove(2, 3, **there), ExpertMove(2, 4, **back), ExpertMove(2, 5, **back)]
    assert (listed[0].arrives_at, listed[0].leaves) == ((1, 2), (0, 3))
    assert moves(found, current) == [ExpertMove(m.layer, m.expert, m.after, m.before) for m in listed]


def test_a_placement_of_another_layout_is_refused():
    model = small_model()
    current = default_placement(model, layout_of((2, 2), 2, model))
    with pytest.raises(ValueError, match="position 0 of replica 0 was on ranks"):
        balanced_placement(model, layout_of((2, 2, 2), 2, model), current, {})


def staying(old, new) -> int:
    """Experts on the rank where they were."""
    return sum(len(set(a) & set(b)) for a, b in zip(old, new, strict=True))


def test_deepseeks_own_balanced():
    """Two replicas of 8 rows x 8 ranks, 16 positions: two layers have a load, and become as even as the packing makes them."""
    layout = layout_of((8,) * 256, 16, DEEPSEEK, expert=64, data=2, shape=(1, 8))
    current = default_placement(DEEPSEEK, layout)
    assert layers_of(current) == set(range(3, 62))
    load = measured({3, 61}, 256, 0)
    found = balanced_placement(DEEPSEEK, layout, current, load)
    kept_promises(DEEPSEEK, layout, found)
    changed = moves(current, found)
    assert {move.layer for move in changed} == {3, 61} and all(len(move.after) == 4 for move in changed)
    for replica, layer in product(range(2), (3, 61)):
        position = layout.folding.holders(0 if layer == 3 else layout.folding.count - 1)[0]
        assert found.at(replica, position, layer) == found.at(0, position, layer)
        packed, before = balanced(load[layer], 8, 8, 8), current.at(replica, position, layer)
        assert unevenness(load[layer], found.at(replica, position, layer)) == unevenness(load[layer], packed)
        assert staying(before, found.at(replica, position, layer)) > 1.5 * staying(before, packed)
