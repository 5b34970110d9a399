"""The difference of two ownerships, carried out value by value on plain dictionaries."""

from __future__ import annotations

from collections import Counter, defaultdict
from itertools import pairwise
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.layout.placement import balanced_placement, default_placement
from orchestrator.model.parameters import ParameterSpec
from orchestrator.state.ownership import Bucket, buckets, gates
from orchestrator.state.transfer import GateTransfer, OwnedRange, StateLost, TransferPlan, WeightTransfer, plan
from tests.orchestrator.layouts import DEEPSEEK, clusters, layout_of, small_model

MODEL = small_model(hidden_size=2, vocab_size=5, intermediate_size=3, moe_intermediate_size=2, num_hidden_layers=2,
                    first_k_dense_replace=1, num_attention_heads=1, q_lora_rank=2, kv_lora_rank=2, qk_nope_head_dim=2,
                    v_head_dim=2)


def owned(ownership) -> dict[int, set]:
    """rank -> (name, element) of all that it owns, counted from each bucket's flat buffer."""
    found = defaultdict(set)
    for bucket in ownership:
        flat = [(spec.name, element) for spec in bucket.specs for element in range(spec.size)]
        for shard, owners in enumerate(bucket.owners):
            for rank in owners:
                found[rank].update(flat[shard * bucket.shard_size : (shard + 1) * bucket.shard_size])
    return found


def elements(piece: OwnedRange | WeightTransfer) -> set:
    return {(piece.name, element) for element in range(piece.start, piece.stop)}


def carried_out(old, found: TransferPlan, came_from) -> list[dict]:
    """What every new rank has afterwards: element -> value. A rank can keep and send only what it had."""
    had = owned(old)
    before = [{element: hash(element) for element in had[former]} if former is not None else {} for former in came_from]
    after = [{element: before[rank][element] for piece in kept for element in elements(piece)}
             for rank, kept in enumerate(found.kept)]
    for transfer in found.weights:
        arriving = {element: before[transfer.source][element] for element in elements(transfer)}
        assert not arriving.keys() & after[transfer.target].keys(), "sent what was there already, or twice"
        after[transfer.target] |= arriving
    return after


def check(old, new, came_from, nodes, **more) -> TransferPlan:
    found = plan(old, new, came_from, nodes, **more)
    wanted = owned(new)
    assert carried_out(old, found, came_from) == [{e: hash(e) for e in wanted[rank]} for rank in range(len(came_from))]
    assert all(transfer.source != transfer.target for transfer in (*found.weights, *found.gates))
    assert found.bytes_moved >= found.bytes_needed
    check_one_shard(old, new, found, came_from)
    return found


def check_one_shard(old, new, found: TransferPlan, came_from) -> None:
    """Every range is in one shard of its source and in one of its target."""
    for ownership, rank_of in ((old, lambda transfer: came_from[transfer.source]), (new, lambda transfer: transfer.target)):
        pieces = defaultdict(list)
        for bucket in ownership:
            for shard, owners in enumerate(bucket.owners):
                for spec, start, stop, _ in bucket.pieces(shard):
                    pieces[spec.name].append((start, stop, owners))
        for transfer in found.weights:
            assert any(start <= transfer.start < transfer.stop <= stop and rank_of(transfer) in owners
                       for start, stop, owners in pieces[transfer.name])


def ownerships(draw, specs, ranks: int) -> tuple[Bucket, ...]:
    """Any ownership of these weights by these ranks: any buckets in any order, any number of owners of a shard."""
    mixed = draw(st.permutations(specs))
    cuts = sorted({0, len(mixed), *draw(st.lists(st.integers(0, len(mixed)), max_size=3))})
    found = []
    for index, (first, last) in enumerate(pairwise(cuts)):
        members = draw(st.permutations(range(ranks)))[: draw(st.integers(1, ranks))]
        holders = tuple(sorted(members[: draw(st.integers(1, len(members)))]))
        members = holders + tuple(rank for rank in members if rank not in holders)
        owners = tuple((primary, *draw(st.lists(st.sampled_from(members), unique=True, max_size=2).map(
            lambda more, primary=primary: [rank for rank in more if rank != primary]))) for primary in holders)
        found.append(Bucket(index, holders, members, tuple(mixed[first:last]), True, False, owners))
    return tuple(found)


@st.composite
def changes(draw):
    specs = [ParameterSpec(f"w{index}", (size,)) for index, size in enumerate(draw(st.lists(st.integers(1, 7), min_size=1,
                                                                                           max_size=5)))]
    before, after = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    survivors = draw(st.permutations(range(before)))[: draw(st.integers(0, before))]
    came_from = draw(st.permutations((survivors + [None] * after)[:after]))
    nodes = draw(st.lists(st.sampled_from("ab"), min_size=after, max_size=after))
    return ownerships(draw, specs, before), ownerships(draw, specs, after), came_from, nodes


@given(changes())
@settings(max_examples=400, deadline=None)
def test_any_change_of_owners(change):
    """All that new owners need arrives, or else it is lost: exactly if no old owner is left."""
    old, new, came_from, _ = change
    had = owned(old)
    left = set().union(*(had[former] for former in came_from if former is not None))
    every = {(spec.name, element) for bucket in new for spec in bucket.specs for element in range(spec.size)}
    if gone := every - left:
        with pytest.raises(StateLost) as caught:
            plan(*change)
        first = next(spec.name for bucket in new for spec in bucket.specs if any(name == spec.name for name, _ in gone))
        assert (caught.value.name, caught.value.values) == (first, len(gone))
        assert str(caught.value) == f"no owner is left of {len(gone)} values, the first of them {first}"
    else:
        check(*change)


@given(st.sampled_from((1, 2, 4)), st.integers(0, 2), st.integers(0, 999), st.data())
@settings(max_examples=40, deadline=None)
def test_another_placement_of_any_cluster(pipeline, copies, seed, data):
    """Only experts travel, only of layers that have moves; holders of the others keep their working weights."""
    model = MODEL.model_copy(update={"num_hidden_layers": 4})
    layout = layout_of(data.draw(clusters(pipeline)), pipeline, model)
    rng, current = Random(seed), default_placement(model, layout)
    load = {layer: [rng.lognormvariate(0, 1) for _ in range(8)] for layer in (1, 2)}
    wanted = balanced_placement(model, layout, current, load)
    old, new = buckets(model, layout, copies), buckets(model, layout, copies, placement=wanted)
    nodes, hosts = [place.node for place in layout.places], gates(model, layout)
    found = check(old, new, range(layout.size), nodes, old_gates=hosts, new_gates=hosts, gate_values=8)
    assert found.gates == ()
    if wanted == current:
        assert not found.weights and not found.fresh and found.bytes_moved == found.bytes_needed == 0
    assert all(".experts." in transfer.name for transfer in found.weights)
    assert all(spec.expert is not None for index in found.fresh for spec in new[index].specs)


def few_ranks(pipeline: int):
    return st.lists(st.integers(1, 3), min_size=1, max_size=4).map(tuple).filter(lambda ranks: pipeline <= sum(ranks) <= 8)


@given(st.sampled_from((1, 2)), st.data())
@settings(max_examples=80, deadline=None)
def test_another_layout_of_any_cluster(pipeline, data):
    """Ranks that stay are any of the old ones; they take any place in the new layout."""
    old_layout, new_layout = (layout_of(data.draw(few_ranks(pipeline)), pipeline, MODEL) for _ in range(2))
    old, new = buckets(MODEL, old_layout, 1), buckets(MODEL, new_layout, 1)
    most_gone = max(0, old_layout.size - data.draw(st.integers(0, 2)))
    staying = data.draw(st.permutations(range(old_layout.size)))[: min(most_gone, new_layout.size)]
    came_from = data.draw(st.permutations(staying + [None] * (new_layout.size - len(staying))))
    old_gates, new_gates = gates(MODEL, old_layout), gates(MODEL, new_layout)
    nodes = [place.node for place in new_layout.places]
    had = owned(old)
    if set().union(*(had[former] for former in staying)) != set().union(*had.values()):
        with pytest.raises(StateLost):
            plan(old, new, came_from, nodes, old_gates=old_gates, new_gates=new_gates, gate_values=8)
        return
    found = check(old, new, came_from, nodes, old_gates=old_gates, new_gates=new_gates, gate_values=8)
    for layer, hosts in new_gates.items():
        arrived = {gate.target for gate in found.gates if gate.layer == layer}
        assert {rank for rank in hosts if came_from[rank] not in old_gates[layer]} == arrived
        assert all(came_from[gate.source] in old_gates[layer] for gate in found.gates if gate.layer == layer)


def bucket(index: int, specs: list[tuple[str, int]], owners: list[tuple[int, ...]]) -> Bucket:
    """Primary owners are the holders; the others only own."""
    holders = tuple(of_shard[0] for of_shard in owners)
    more = dict.fromkeys(rank for of_shard in owners for rank in of_shard if rank not in holders)
    return Bucket(index, holders, holders + tuple(more), tuple(ParameterSpec(name, (size,)) for name, size in specs), True, False,
                  tuple(owners))


def test_ranges_end_where_old_shards_border():
    old = [bucket(0, [("a", 4), ("b", 6)], [(0,), (1,)])]  # b's first value is rank 0's
    new = [bucket(0, [("b", 6)], [(2,)]), bucket(1, [("a", 4)], [(0,)])]
    found = check(old, new, [0, 1, None], "xyz")
    assert found.weights == (WeightTransfer("b", 0, 1, 0, 2), WeightTransfer("b", 1, 6, 1, 2))
    assert found.kept[0] == (OwnedRange("a", 0, 4),)
    assert found.bytes_moved == found.bytes_needed == 3 * 6 * 4
    assert plan(old, new, [0, 1, None], "xyz", number_bytes=8).bytes_moved == 3 * 6 * 8
    assert [(ends, len(message.weights)) for ends, message in found.messages.items()] == [((0, 2), 1), ((1, 2), 1)]


def test_what_the_old_ownership_did_not_have_is_lost():
    with pytest.raises(StateLost, match="no owner is left of 5 values, the first of them a"):
        plan([bucket(0, [("a", 4)], [(0,)])], [bucket(0, [("a", 6), ("b", 3)], [(0,)])], [0], "x")


def test_the_same_node_is_preferred_then_who_sends_least():
    old = [bucket(0, [("a", 5)], [(0, 1, 2)]), bucket(1, [("b", 7)], [(0, 1, 2)]), bucket(2, [("c", 3)], [(0, 1, 2)]),
           bucket(3, [("d", 1)], [(0, 1, 2)])]
    new = [bucket(index, [(name, size)], [(3,)]) for index, (name, size) in enumerate([("a", 5), ("b", 7), ("c", 3), ("d", 1)])]

    def sources(nodes):
        return [transfer.source for transfer in check(old, new, [0, 1, 2, None], nodes).weights]

    assert sources("wxyz") == [0, 1, 2, 2]
    assert sources("wxyy") == [2, 2, 2, 2]
    assert sources("zxxz") == [0, 0, 0, 0] and sources("xzxz") == [1, 1, 1, 1]
    assert sources("wxxx") == [1, 2, 1, 2]


def test_more_is_moved_than_needed_where_borders_shift():
    """Two holders of 4 + 4 values; one of the first four goes, so that one more crosses the new border."""
    old = [bucket(0, [("a", 2), ("b", 2), ("c", 4)], [(0,), (1,)]), bucket(1, [("d", 2)], [(2,)])]
    new = [bucket(0, [("b", 2), ("c", 4)], [(0,), (1,)]), bucket(1, [("a", 2), ("d", 2)], [(2,)])]
    found = check(old, new, [0, 1, 2], "xyz")
    assert found.bytes_needed == 2 * 3 * 4 and found.bytes_moved == 3 * 3 * 4
    assert found.fresh == {0, 1}


def test_working_weights_that_are_there_are_not_published():
    old = [bucket(0, [("a", 4)], [(0,), (1,)]), bucket(1, [("b", 4)], [(0,), (2,)])]
    again = [bucket(0, [("b", 4)], [(0,), (2,)]), bucket(1, [("a", 4)], [(0,), (1,)])]
    assert plan(old, again, [0, 1, 2], "xyz").fresh == set()
    fewer = [bucket(0, [("a", 4)], [(0,)]), bucket(1, [("b", 4)], [(1,), (0,)])]
    mirrored = [bucket(0, [("a", 4)], [(0, 1), (1, 0)]), bucket(1, [("b", 4)], [(0, 2), (2, 0)])]
    assert plan(mirrored, fewer, [0, 2], "xz").fresh == set()  # rank 2 became rank 1: it holds b, as it did
    assert plan(mirrored, [bucket(0, [("a", 4)], [(1,)]), bucket(1, [("b", 4)], [(0,)])], [0, 2], "xz").fresh == {0}
    assert plan(mirrored, [bucket(0, [("a", 4)], [(2,)]), bucket(1, [("b", 4)], [(0,)])], [0, 2, None], "xzy").fresh == {0}


def test_gates():
    old, new = {3: (0, 1), 4: (2,)}, {3: (0, 2), 4: (2, 0)}
    weights = [bucket(0, [("a", 2)], [(0, 1, 2)])]
    found = plan(weights, weights, [0, 1, 2], "xyx", old_gates=old, new_gates=new, gate_values=16)
    assert found.gates == (GateTransfer(3, 0, 2), GateTransfer(4, 2, 0)) and found.bytes_moved == found.bytes_needed == 2 * 16 * 4
    with pytest.raises(StateLost, match="no owner is left of 1 biases of gates, the first of them layer 4"):
        plan(weights, [bucket(0, [("a", 2)], [(0, 1)])], [0, 1], "xy", old_gates=old, new_gates={3: (0,), 4: (0, 1)})


@pytest.mark.parametrize("came_from, nodes", [([0, 0], "xy"), ([0, 1], "x"), ([0, 1], "xyz")])
def test_ranks_that_cannot_be_are_refused(came_from, nodes):
    weights = [bucket(0, [("a", 2)], [(0,), (1,)])]
    with pytest.raises(ValueError, match="nodes' places"):
        plan(weights, weights, came_from, nodes)


def test_deepseeks_own():
    """2048 ranks, a load on all layers: moved is what is needed, within 2 %, and the sources share the work."""
    layout = layout_of((8,) * 256, 16, DEEPSEEK, expert=64, data=2, shape=(1, 8))
    current, rng = default_placement(DEEPSEEK, layout), Random(0)
    load = {layer: [rng.lognormvariate(0, 0.7) for _ in range(256)] for layer in range(3, 62)}
    wanted = balanced_placement(DEEPSEEK, layout, current, load)
    old, new = buckets(DEEPSEEK, layout, 1), buckets(DEEPSEEK, layout, 1, placement=wanted)
    found = plan(old, new, range(layout.size), [place.node for place in layout.places])
    assert 1 <= found.bytes_moved / found.bytes_needed < 1.02
    sent, received = Counter(), Counter()
    for transfer in found.weights:
        sent[transfer.source] += transfer.stop - transfer.start
        received[transfer.target] += transfer.stop - transfer.start
    assert max(sent.values()) < 3 * max(received.values())
