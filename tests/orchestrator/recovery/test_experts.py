"""Experts in a new layout: complete, balanced, mirrors apart, and as few moved as that allows."""

from __future__ import annotations

import random
import time
from collections import Counter
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.layout.layout import Layout
from orchestrator.layout.placement import Placement, balanced_placement, default_placement
from orchestrator.model.parameters import moe_layers, stage_layers
from orchestrator.recovery.experts import relaid_placement
from orchestrator.recovery.relayout import relaid
from orchestrator.topology import Node
from tests.orchestrator.layouts import DEEPSEEK_CONFIG, nodes
from tests.orchestrator.recovery.test_relayout import PIPELINES, config

Has = dict[tuple[str, int, int], set[int]]
"""(node, local, layer) -> experts."""


def has(layout: Layout, placement: Placement) -> Has:
    found: Has = {}
    for entry in placement.placed:
        for rank, experts in zip(entry.ranks, entry.experts, strict=True):
            place = layout.places[rank]
            found.setdefault((place.node, place.local, entry.layer), set()).update(experts)
    return found


def moved_and_needed(before: Has, after: Has) -> tuple[int, int]:
    """Experts that arrive, and a number that no placement with the same numbers on each rank can be below: layer by layer what a
    rank must have more than it had, and what of each expert there must be more copies of than are left."""
    moved = sum(len(experts - before.get(key, set())) for key, experts in after.items())
    needed = 0
    for layer in {layer for *_, layer in after}:
        ranks = [key for key in after if key[2] == layer]
        grown = sum(max(0, len(after[key]) - len(before.get(key, ()))) for key in ranks)
        wanted = Counter(expert for key in ranks for expert in after[key])
        left = Counter(expert for key in ranks for expert in before.get(key, ()))
        needed += max(grown, sum((wanted - left).values()))
    return moved, needed


def sound(model, layout: Layout, placement: Placement) -> None:
    """Every layer's experts once in each EP group, groups whole on a row, near-equally many, in the plain placement's order."""
    per_stage = stage_layers(model, layout.folding.count)
    expected = [(replica, position, layer) for replica, position in product(range(len(layout.replicas)), range(layout.pipeline))
                for stage in layout.stages(position)
                for layer in moe_layers(model, per_stage[stage], last=stage == layout.folding.count - 1)]
    assert [(entry.replica, entry.position, entry.layer) for entry in placement.placed] == expected
    for entry in placement.placed:
        assert entry.ranks == layout.expert_group(entry.replica, entry.position)
        assert sorted(expert for experts in entry.experts for expert in experts) == list(range(model.n_routed_experts))
        groups = []
        for row in range(len(entry.ranks) // layout.width):
            of_row = entry.experts[row * layout.width :][: layout.width]
            groups.append({expert // model.experts_per_group for experts in of_row for expert in experts})
            sizes = [len(experts) for experts in of_row]
            assert max(sizes) - min(sizes) <= 1 and all(list(experts) == sorted(experts) for experts in of_row)
        assert sum(map(len, groups)) == model.n_group and max(map(len, groups)) - min(map(len, groups)) <= 1


def on_one_node(layout: Layout, placement: Placement) -> int:
    """(replica, layer, expert) of a position and its mirror that are on one node only."""
    nodes_of: dict[tuple[int, int, int], list[str]] = {}
    for entry in placement.placed:
        for rank, experts in zip(entry.ranks, entry.experts):
            for expert in experts:
                nodes_of.setdefault((entry.replica, entry.layer, expert), []).append(layout.places[rank].node)
    return sum(len(found) > 1 and len(set(found)) == 1 for found in nodes_of.values())


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_every_single_loss_and_a_join(pipeline):
    ratios, totals = [], [0, 0]
    for count, each in product(range(1, 9), range(1, 5)):
        wanted, alive = config(pipeline), nodes(*[each] * count)
        first = relaid(wanted, alive, None)
        before = default_placement(wanted.model, first.layout)
        assert relaid_placement(wanted.model, first.layout, first.layout, before) == before
        changes = [alive[:lost] + alive[lost + 1 :] for lost in range(count) if count > 1]
        for left in (*changes, (*alive, Node("new", each))):
            after = relaid(wanted, left, first.layout).layout
            placement = relaid_placement(wanted.model, after, first.layout, before)
            sound(wanted.model, after, placement)
            assert on_one_node(after, placement) <= on_one_node(after, default_placement(wanted.model, after))
            if after.pipeline == pipeline and (after.positions_per_node, after.width) == (
                    first.layout.positions_per_node, first.layout.width):
                moved, needed = moved_and_needed(has(first.layout, before), has(after, placement))
                plain, _ = moved_and_needed(has(first.layout, before), has(after, default_placement(wanted.model, after)))
                assert moved <= plain
                totals[0], totals[1] = totals[0] + moved, totals[1] + needed
                if len(after.replicas) == len(first.layout.replicas):
                    assert moved <= 2 * needed
                    ratios.append(moved / needed if needed else 1.0)
    print(f"pipeline {pipeline}: moved / needed {totals[0] / max(1, totals[1]):.2f} in all, {max(ratios):.2f} at most "
          "where replicas stay as many")
    assert totals[0] <= 1.34 * totals[1]


@given(st.sampled_from(PIPELINES), st.sampled_from([1, 2]), st.data())
@settings(max_examples=40, deadline=None)
def test_a_chain_of_changes(pipeline, parts, data):
    """From placements by load too, and with groups that are cut."""
    wanted = config(pipeline, layout={"group_parts": parts})
    clusters = data.draw(st.lists(st.lists(st.integers(0, 4), min_size=5, max_size=5).filter(any), min_size=2, max_size=4))
    old, rng = None, data.draw(st.randoms(use_true_random=False))
    for ranks in clusters:
        layout = relaid(wanted, tuple(node for node in nodes(*ranks) if node.ranks), old and old[0]).layout
        default = default_placement(wanted.model, layout, parts=parts)
        placement = relaid_placement(wanted.model, layout, *old, parts=parts) if old else default
        if parts == 1:
            sound(wanted.model, layout, placement)
        for entry in placement.placed:
            assert sorted(expert for experts in entry.experts for expert in experts) == list(range(8))
            assert all(entry.experts)
        assert on_one_node(layout, placement) <= on_one_node(layout, default)
        again = relaid_placement(wanted.model, layout, layout, placement, parts=parts)
        assert again == placement or on_one_node(layout, again) < on_one_node(layout, placement)
        load = {layer: [rng.random() for _ in range(8)] for layer in range(wanted.model.num_hidden_layers)}
        old = layout, balanced_placement(wanted.model, layout, placement, load, parts=parts)


def test_an_orphaned_group_goes_where_there_is_room_and_the_others_stay():
    """Four rows of one rank, four groups of two experts; the third row is lost."""
    wanted = config(1)
    first = relaid(wanted, nodes(1, 1, 1, 1), None).layout
    before = default_placement(wanted.model, first)
    layer = before.placed[0].layer
    assert before.at(0, 0, layer) == ((0, 1), (2, 3), (4, 5), (6, 7))
    alive = tuple(Node(name, 1) for name in ("n0", "n1", "n3"))
    after = relaid(wanted, alive, first).layout
    found = relaid_placement(wanted.model, after, first, before).at(0, 0, layer)
    assert sorted(found) == sorted([(0, 1, 4, 5), (2, 3), (6, 7)]) or found[1:] == ((2, 3, 4, 5), (6, 7)) or (
        found == ((0, 1), (2, 3), (4, 5, 6, 7)))
    back = relaid(wanted, (*alive, Node("n9", 1)), after).layout
    again = relaid_placement(wanted.model, back, after, relaid_placement(wanted.model, after, first, before))
    moved, needed = moved_and_needed(has(after, relaid_placement(wanted.model, after, first, before)), has(back, again))
    assert moved == needed


def test_two_thousand_ranks_in_seconds():
    rng = random.Random(1)
    model, alive = DEEPSEEK_CONFIG.model, tuple(Node(f"n{n}", 8) for n in range(256))
    first = relaid(DEEPSEEK_CONFIG, alive, None).layout
    load = {layer: [rng.random() for _ in range(model.n_routed_experts)] for layer in range(model.num_hidden_layers)}
    before = balanced_placement(model, first, default_placement(model, first), load)
    left = alive[:100] + alive[101:]
    begin = time.process_time()
    after = relaid(DEEPSEEK_CONFIG, left, first).layout
    found = relaid_placement(model, after, first, before)
    seconds = time.process_time() - begin
    sound(model, after, found)
    moved, needed = moved_and_needed(has(first, before), has(after, found))
    print(f"{after.describe()}: {seconds:.2f} s; moved {moved}, needed {needed}")
    assert seconds < 2
