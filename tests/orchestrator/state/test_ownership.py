"""Buckets and shards: who holds a weight, who owns its optimizer state."""

from __future__ import annotations

from collections import Counter
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.config.run_config import ModelConfig
from orchestrator.layout.layout import Layout
from orchestrator.layout.placement import place_experts
from orchestrator.model.parameters import ParameterSpec, stage_layers, stage_parameters
from orchestrator.schedule.ir.stages import BOTH, LOOP, Stages, V
from orchestrator.state.ownership import Bucket, buckets
from tests.orchestrator.layouts import DEEPSEEK, clusters, layout_of, small_model

MODEL = small_model()


def needed_by(model: ModelConfig, layout: Layout, rank: int) -> set[str]:
    """Weights that the stages of a rank use, with its own share of the experts."""
    place, per_stage = layout.places[rank], stage_layers(model, layout.folding.count)
    mine = place_experts(model, layout, place.replica, place.position)[place.expert_rank]
    return {spec.name for stage in layout.stages(place.position)
            for spec in stage_parameters(model, per_stage[stage], first=stage == 0, last=stage == layout.folding.count - 1)
            if spec.expert is None or spec.expert in mine}


def check(model: ModelConfig, layout: Layout, copies: int) -> tuple[Bucket, ...]:
    found = buckets(model, layout, copies)
    assert [bucket.index for bucket in found] == list(range(len(found)))
    names = [spec.name for bucket in found for spec in bucket.specs]
    assert len(names) == len(set(names))
    holders = {spec.name: set(bucket.holders) for bucket in found for spec in bucket.specs}
    for rank in range(layout.size):
        assert {name for name, ranks in holders.items() if rank in ranks} == needed_by(model, layout, rank)
    for bucket in found:
        assert {(spec.decay, spec.precise) for spec in bucket.specs} == {(bucket.decay, bucket.precise)}
        check_members(layout, bucket, copies)
        check_pieces(bucket)
    return found


def check_members(layout: Layout, bucket: Bucket, copies: int) -> None:
    assert bucket.members[: len(bucket.holders)] == bucket.holders == tuple(sorted(bucket.holders))
    assert len(set(bucket.members)) == len(bucket.members)
    owning = {rank for owners in bucket.owners for rank in owners}
    assert owning == set(bucket.members)  # nobody takes part for nothing
    assert [owners[0] for owners in bucket.owners] == list(bucket.holders)
    for owners in bucket.owners:
        nodes = {layout.places[rank].node for rank in owners}
        assert len(nodes) == len(owners) == min(1 + copies, len(layout.nodes))
    for rank in bucket.members:
        assert bucket.shards_of(rank) == tuple(s for s, owners in enumerate(bucket.owners) if rank in owners)


def check_pieces(bucket: Bucket) -> None:
    """Put every shard's pieces where they say: each element of each weight comes from exactly one shard, in flat order."""
    flat = [(spec.name, element) for spec in bucket.specs for element in range(spec.size)]
    assert bucket.size == len(flat) <= bucket.shard_size * len(bucket.owners) < bucket.size + len(bucket.owners)
    for shard in range(len(bucket.owners)):
        got: list[tuple[str, int] | None] = [None] * bucket.shard_size
        for spec, start, stop, offset in bucket.pieces(shard):
            assert 0 <= start < stop <= spec.size and got[offset : offset + stop - start] == [None] * (stop - start)
            got[offset : offset + stop - start] = [(spec.name, element) for element in range(start, stop)]
        want = flat[shard * bucket.shard_size : (shard + 1) * bucket.shard_size]
        assert got == want + [None] * (bucket.shard_size - len(want))


@pytest.mark.parametrize("ranks, pipeline", [
    ((1,), 1), ((3,), 1), ((1, 1), 1), ((2, 2), 1), ((2, 2), 2), ((2,) * 4, 2), ((4, 4), 4), ((1,) * 4, 4), ((2,) * 5, 2),
    ((3,) * 3, 2), ((1, 3), 2), ((2, 1, 4), 2), ((1, 3), 4)])
@pytest.mark.parametrize("copies", [0, 1, 2])
def test_layouts(ranks, pipeline, copies):
    check(MODEL, layout_of(ranks, pipeline, MODEL), copies)


@given(st.sampled_from((1, 2, 4)), st.sampled_from((0, 1, 2)), st.data())
@settings(max_examples=30, deadline=None)
def test_any_cluster(pipeline, copies, data):
    model = small_model(num_nextn_predict_layers=data.draw(st.sampled_from((0, 1))))
    check(model, layout_of(data.draw(clusters(pipeline)), pipeline, model), copies)


@given(st.lists(st.integers(1, 12), min_size=1, max_size=6), st.integers(1, 9))
@settings(max_examples=100, deadline=None)
def test_any_bucket_is_cut_without_gap_or_overlap(sizes, shards):
    specs = tuple(ParameterSpec(f"w{index}", (size,)) for index, size in enumerate(sizes))
    ranks = tuple(range(shards))
    bucket = Bucket(0, ranks, ranks, specs, True, False, tuple((rank,) for rank in ranks))
    owned = Counter((spec.name, element) for shard in ranks for spec, start, stop, _ in bucket.pieces(shard)
                    for element in range(start, stop))
    assert owned == Counter((spec.name, element) for spec in specs for element in range(spec.size))
    check_pieces(bucket)


@pytest.mark.parametrize("pipeline, count, each", [(p, n, k) for p, n, k in product((1, 2, 4), range(2, 9), range(1, 5))
                                                   if n * k % p == 0 and n * k >= p])
def test_further_owners_share_the_load(pipeline, count, each):
    """Where the holders are spread evenly over nodes, each is a further owner of as many shards as the others, within one."""
    layout = layout_of((each,) * count, pipeline, MODEL)
    for copies in (1, 2):
        for bucket in buckets(MODEL, layout, copies):
            per_node = Counter(layout.places[rank].node for rank in bucket.holders)
            if len(per_node) > copies and len(set(per_node.values())) == 1:
                load = Counter({rank: 0 for rank in bucket.members})
                load.update(rank for owners in bucket.owners for rank in owners[1:])
                assert max(load.values()) - min(load.values()) <= 1


def test_ranks_that_only_own_share_the_load():
    """One position and one replica: each expert is held once. Its further owner has the same place in the next row."""
    layout = layout_of((2, 2, 2), 1, MODEL)
    assert (layout.rows, layout.width) == (3, 2)
    for bucket in buckets(MODEL, layout, 1):
        if len(bucket.holders) == 1:
            (holder,) = bucket.holders
            assert bucket.owners == ((holder, (holder + 2) % 6),)


def test_a_rank_that_only_owns_has_the_position_of_the_holder():
    """Two rows of two positions, a node for each rank: the other one of its position, not its neighbour in the row."""
    layout = layout_of((1,) * 4, 2, MODEL, Stages(LOOP, 2))
    assert [(place.row, place.position) for place in layout.places] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    found = {bucket.holders: bucket.owners for bucket in buckets(MODEL, layout, 1) if len(bucket.holders) == 1}
    assert found == {(0,): ((0, 2),), (1,): ((1, 3),), (2,): ((2, 0),), (3,): ((3, 1),)}


@pytest.mark.parametrize("folding, ends", [
    (Stages(BOTH, 1), [0]), (Stages(BOTH, 2), [0, 1]), (Stages(BOTH, 4), [0, 3]),
    (Stages(LOOP, 2), [0, 1]), (Stages(LOOP, 3), [0, 2]), (Stages(LOOP, 2, 2), [0, 1]), (Stages(V, 2, 2), [0]),
    (Stages(V, 1, 4), [0])])
def test_embedding_is_one_weight_of_first_and_last_stage(folding, ends):
    """Where these are on two ranks, both hold it; one bucket, so one reduction sums its gradients."""
    layout = layout_of((folding.positions,) * 2, folding.positions, MODEL, folding)
    holding = [bucket for bucket in buckets(MODEL, layout, 1) if "model.embed_tokens.weight" in {s.name for s in bucket.specs}]
    assert [bucket.holders for bucket in holding] == [tuple(place.rank for place in layout.places if place.position in ends)]
    assert list(layout.ends) == ends


@pytest.mark.parametrize("folding", [
    Stages(V, 2, 2), Stages(LOOP, 2), Stages(LOOP, 3), Stages(LOOP, 2, 2), Stages(V, 1, 2)], ids=str)
def test_a_stage_in_one_position_still_has_owners_on_two_nodes(folding):
    """Nothing is mirrored: further owners come from other replicas, or only own."""
    for count, each, copies in product(range(1, 7), range(1, 4), (0, 1, 2)):
        if count * each >= folding.positions:
            check(MODEL, layout_of((each,) * count, folding.positions, MODEL, folding), copies)


@given(st.sampled_from([Stages(V, 2, 2), Stages(LOOP, 4), Stages(LOOP, 3), Stages(LOOP, 1, 4)]), st.sampled_from([1, 2]),
       st.data())
@settings(max_examples=60, deadline=None)
def test_any_cluster_without_mirrors(folding, copies, data):
    check(MODEL, layout_of(data.draw(clusters(folding.positions)), folding.positions, MODEL, folding), copies)


@pytest.mark.parametrize("mtp", [0, 1])
def test_without_multi_token_prediction_only_the_first_stage_holds_the_embedding(mtp):
    layout = layout_of((1,) * 3, 3, MODEL, Stages(LOOP, 3))
    holders = {s.name: b.holders for b in buckets(small_model(num_nextn_predict_layers=mtp), layout, 1) for s in b.specs}
    assert holders["model.embed_tokens.weight"] == ((0, 2) if mtp else (0,)) and holders["lm_head.weight"] == (2,)


def test_gate_and_up_projections_stand_side_by_side():
    """The model joins them to one matrix in the flat buffer."""
    for bucket in buckets(MODEL, layout_of((2, 2), 2, MODEL), 1):
        names = [spec.name for spec in bucket.specs]
        for index, name in enumerate(names):
            if ".gate_proj." in name:
                assert names[index + 1] == name.replace(".gate_proj.", ".up_proj.")


def test_groups_reduce_in_one_order():
    """The order is the model's: it does not depend on who asks, and members are listed alike everywhere."""
    layout = layout_of((2, 2, 2), 2, MODEL)
    first, again = buckets(MODEL, layout, 1), buckets(MODEL, layout_of((2, 2, 2), 2, MODEL), 1)
    assert first == again
    per_rank = [[bucket.index for bucket in first if rank in bucket.members] for rank in range(layout.size)]
    assert all(order == sorted(order) for order in per_rank)


def test_layers_per_stage():
    layout = layout_of((2, 2), 2, MODEL)
    uneven = buckets(MODEL, layout, 1, [1, 3])
    assert {s.name for b in uneven for s in b.specs} == {s.name for b in buckets(MODEL, layout, 1) for s in b.specs}


def test_deepseeks_own():
    """2048 ranks: an expert of a stage pair has four holders (two replicas, two mirrors), all else 256."""
    layout = layout_of((8,) * 256, 16, DEEPSEEK, expert=64, data=2, shape=(1, 8))
    found = buckets(DEEPSEEK, layout, 1)
    assert {len(bucket.holders) for bucket in found if bucket.specs[0].expert is not None} == {4}
    assert {len(bucket.holders) for bucket in found if bucket.specs[0].expert is None} == {256}
    assert all(bucket.members == bucket.holders and {len(o) for o in bucket.owners} == {2} for bucket in found)
    assert sum(bucket.size for bucket in found) == pytest.approx(682.64e9, rel=1e-5)
