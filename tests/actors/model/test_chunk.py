"""Losses and gradients of a whole step: stages, ranks, deferral, recomputation, precision."""

from __future__ import annotations

import gc
from itertools import zip_longest

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from actors.model.chunk import Microbatch
from actors.model.plain import PlainModel
from tests.actors.model.helpers import (
    SCALES,
    SEED,
    Pipeline,
    biases_of,
    losses,
    random_tokens,
    small_model,
    weights_of,
    worst_difference,
)
from tests.reference.exchange import on_ranks


def plain_run(model, batches, dtype=torch.float64):
    """(losses, gradients, counts) of the independent implementation over (tokens, valid) pairs."""
    plain = PlainModel(model, dtype, SEED)
    plain.biases = biases_of(model, dtype)
    with torch.no_grad():
        for name, weight in weights_of(model, dtype).items():
            plain.named[name].copy_(weight.value)
    totals = torch.zeros(3, dtype=torch.float64)
    for tokens, valid in batches:
        parts = plain.losses(tokens, valid)
        (SCALES.next_token * parts[0] + SCALES.mtp * parts[1] + SCALES.balance * parts[2]).backward()
        totals += torch.stack([part.detach().double() for part in parts])
    gradients = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in plain.named.items()}
    return totals.tolist(), gradients, plain.load()


def one_step(model, dtype=torch.float64, *, valid=None, flush=True, **options):
    pipeline = Pipeline(model, dtype, **options)
    tapes = pipeline.forward(random_tokens(model, 3, 16), valid)
    found = losses(tapes)
    pipeline.backward(tapes, flush=flush)
    return pipeline, tapes, found


@pytest.mark.parametrize("stages", [1, 3])
@pytest.mark.parametrize("changes", [{}, dict(q_lora_rank=None, n_shared_experts=0), dict(num_nextn_predict_layers=0),
                                     dict(first_k_dense_replace=0, n_group=1, topk_group=1)], ids=str)
def test_all_losses_gradients_and_counts_are_those_of_the_plain_model(changes, stages):
    model, valid = small_model(**changes), torch.tensor([17, 9, 2])
    pipeline, _, found = one_step(model, valid=valid, stages=stages)
    expected, gradients, counts = plain_run(model, [(random_tokens(model, 3, 16), valid)])
    assert found == pytest.approx(expected, rel=1e-12)
    assert worst_difference(pipeline.gradients(), gradients) < 1e-11
    assert worst_difference(pipeline.load(), {n: counts[n] for n in pipeline.load()}) == 0


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.layers.1.mlp.gate.weight",
                                  "model.layers.3.eh_proj.weight", "model.layers.3.self_attn.kv_b_proj.weight"])
def test_the_gradient_is_the_slope_of_the_weighted_losses(name):
    model = small_model()
    pipeline, _, _ = one_step(model)
    direction = torch.randn(pipeline.weights[name].value.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    totals = []
    # steps too small to change a choice of experts
    for step in (1e-7, -1e-7):
        moved = Pipeline(model)
        moved.weights[name].value.add_(direction, alpha=step)
        parts = losses(moved.forward(random_tokens(model, 3, 16), keep=False))
        totals.append(SCALES.next_token * parts[0] + SCALES.mtp * parts[1] + SCALES.balance * parts[2])
    slope = (totals[0] - totals[1]) / 2e-7
    assert float((pipeline.weights[name].gradient * direction).sum()) == pytest.approx(slope, rel=1e-6, abs=1e-8)


def test_only_labels_of_real_tokens_count():
    model, tokens = small_model(), random_tokens(small_model(), 2, 8)
    valid = torch.tensor([9, 4])
    changed = tokens.clone()
    changed[1, 4:] = (changed[1, 4:] + 1) % model.vocab_size
    first, second = (losses(Pipeline(model).forward(t, valid)) for t in (tokens, changed))
    assert first[:2] == second[:2]


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_input_gradients_now_and_weight_gradients_later_are_the_same_bits(recompute):
    model = small_model()
    at_once, tapes, _ = one_step(model, torch.float32, stages=2, recompute=recompute)
    later, later_tapes, _ = one_step(model, torch.float32, stages=2, recompute=recompute, flush=False)
    assert not any(weight.gradient.any() for weight in later.weights.values())
    assert torch.equal(tapes[1].input_gradient, later_tapes[1].input_gradient)
    deferred = later.queue.take()
    assert len(later.queue) == 0
    for accumulate in deferred:
        accumulate()
    assert all(torch.equal(at_once.weights[n].gradient, later.weights[n].gradient) for n in at_once.weights)


class LiveBytes(TorchDispatchMode):
    """Counts the memory of everything computed under it that is still alive."""

    def __init__(self):
        super().__init__()
        self._storages = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        known = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        for tensor in tree_leaves(result):
            storage = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) else None
            if storage is not None and storage._cdata not in known:  # else a view: counted already, or not computed here
                self._storages[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return result

    def total(self) -> int:
        gc.collect()
        return sum(size for ref, size in self._storages.values() if not ref.expired())


def kept_bytes(model, recompute):
    pipeline, tokens = Pipeline(model, torch.float32, recompute=recompute), random_tokens(model, 3, 16)
    with LiveBytes() as live:
        tapes = pipeline.forward(tokens)
        after_forward = live.total()
        pipeline.backward(tapes)
        return after_forward, live.total()


def test_recomputation_keeps_less_and_changes_no_bit():
    model = small_model()
    steps = {recompute: one_step(model, torch.float32, recompute=recompute) for recompute in ("none", "selective", "full")}
    plain = steps["none"]
    for recompute in ("selective", "full"):
        assert steps[recompute][2] == plain[2]
        for name, weight in steps[recompute][0].weights.items():
            assert torch.equal(weight.gradient, plain[0].weights[name].gradient), f"{recompute}: {name}"
        assert all(torch.equal(load, plain[0].load()[n]) for n, load in steps[recompute][0].load().items())
    none, selective, full = (kept_bytes(model, recompute)[0] for recompute in steps)
    assert selective < 0.7 * none and full < 0.7 * selective


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_nothing_is_left_after_backward(recompute):
    # loss sums, and the rotary table that later microbatches use again
    model = small_model()
    table = 16 * model.qk_rope_head_dim // 2 * 8
    assert kept_bytes(model, recompute)[1] <= table + 3 * 8


def test_the_experts_of_the_first_run_are_kept_when_forward_runs_again():
    model = small_model()
    pipeline = Pipeline(model, recompute="full")
    tapes = pipeline.forward(random_tokens(model, 3, 16))
    for bias in pipeline.biases.values():
        bias.uniform_(-1, 1, generator=torch.Generator().manual_seed(0))  # would make another choice
    pipeline.backward(tapes)
    expected = one_step(model)[0]
    assert worst_difference(pipeline.gradients(), expected.gradients()) == 0


def test_evaluation_sums_the_same_losses_and_keeps_nothing():
    model = small_model()
    pipeline, tokens = Pipeline(model, stages=2), random_tokens(small_model(), 3, 16)
    with LiveBytes() as live:
        found = losses(pipeline.forward(tokens, keep=False))
        left = live.total()
    assert found == losses(Pipeline(model, stages=2).forward(tokens))
    assert left <= 2 * (16 * model.qk_rope_head_dim // 2 * 16)
    assert not any(load.any() for load in pipeline.load().values())


EXPERTS_OF_RANK = [[6, 1, 3], [0, 2, 4, 5, 7]]


@pytest.mark.parametrize("sequences", [[2, 3], [0, 3], [4, 0], [0, 0]])
@pytest.mark.parametrize("recompute, stages", [("none", 1), ("selective", 2), ("full", 2)])
def test_ranks_that_share_experts_do_the_work_of_one(sequences, recompute, stages):
    model = small_model()
    batches = [random_tokens(model, count, 12, seed=rank) for rank, count in enumerate(sequences)]

    def work(group):
        pipeline = Pipeline(model, stages=stages, recompute=recompute, group=group, experts_of_rank=EXPERTS_OF_RANK)
        tapes = pipeline.forward(batches[group.rank])
        found = losses(tapes)
        pipeline.backward(tapes)
        return found, pipeline.gradients(), pipeline.load()

    ranks = on_ranks(2, work)
    expected, gradients, counts = plain_run(model, [(tokens, None) for tokens in batches if len(tokens)])
    found = {n: sum(part[n] for _, part, _ in ranks if n in part) for n in gradients}
    assert [sum(part) for part in zip(*(values for values, _, _ in ranks))] == pytest.approx(expected, rel=1e-12)
    assert worst_difference(found, gradients) < 1e-11
    assert all(torch.equal(sum(load[n] for _, _, load in ranks), counts[n]) for n in counts)


def test_an_empty_microbatch_changes_nothing():
    pipeline = Pipeline(small_model(), stages=2)
    tapes = pipeline.forward(random_tokens(small_model(), 0, 8))
    pipeline.backward(tapes)
    assert losses(tapes) == [0, 0, 0] and tapes[0].output is None and tapes[1].input_gradient is None
    assert not any(weight.gradient.any() for weight in pipeline.weights.values())


def test_segments_of_two_microbatches_may_alternate():
    """Forward of one, step by step, between the backward segments of the other."""
    model = small_model()
    first, second = random_tokens(model, 2, 16), random_tokens(model, 2, 16, seed=1)
    expected = Pipeline(model)
    for tokens in (first, second):
        expected.backward(expected.forward(tokens))

    woven = Pipeline(model)
    chunk, tapes = woven.chunks[0], woven.forward(first)
    other = Microbatch(sequences=2, length=16, tokens=second)
    for segments in zip_longest(chunk.backward(tapes[0]), chunk.forward(other)):
        for segment in filter(None, segments):
            segment.run()
        woven.queue.flush()
    woven.backward([other])
    assert worst_difference(woven.gradients(), expected.gradients()) < 1e-12


def test_bfloat16_is_close_to_float32():
    model = small_model()
    rough, _, rough_losses = one_step(model, torch.bfloat16, recompute="selective")
    exact, _, exact_losses = one_step(model, torch.float32)
    assert rough.weights["lm_head.weight"].gradient.dtype == torch.float32
    assert rough_losses == pytest.approx(exact_losses, rel=2e-2)
    flat = [torch.cat([p.weights[n].gradient.flatten() for n in exact.weights]) for p in (rough, exact)]
    assert float(torch.cosine_similarity(*flat, dim=0)) > 0.99
