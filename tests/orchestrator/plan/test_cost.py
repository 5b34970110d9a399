"""Counts of parameters, operations and bytes: the published figures, and the real buffers of a tiny layout."""

from __future__ import annotations

import pytest
import torch

from actors.state.optimizer import Optimizer
from orchestrator.config.run_config import load, parse
from orchestrator.plan import cost
from orchestrator.state.ownership import buckets
from tests.cluster import REPOSITORY
from tests.orchestrator.layouts import DEEPSEEK, layout_of, small_model


def test_the_published_model():
    found = cost.parameters(DEEPSEEK)
    assert found.main / 1e9 == pytest.approx(671.03, abs=0.005)
    assert found.mtp / 1e9 == pytest.approx(11.61, abs=0.005)
    assert found.active / 1e9 == pytest.approx(37.55, abs=0.005)
    assert (found.active - 129280 * 7168) / 1e9 == pytest.approx(36.63, abs=0.005)


def test_operations_of_the_published_model():
    assert cost.flops_per_token(DEEPSEEK, 4096) / 1e9 == pytest.approx(250.5, abs=0.05)


def test_operations_by_hand():
    """Four layers (one dense), each matrix multiplied with 2 operations a weight forward and 4 backward."""
    model = small_model()
    attention = 6 * 7 + 7 * 3 * 7 + 6 * 6 + 4 * 3 * 8 + 3 * 3 * 6
    moe = 8 * 6 + (3 + 1) * 3 * 5 * 6  # gate, then three chosen experts and the shared one
    norms = 4 * (2 * 6 + 7 + 4) + 6
    matrices = 4 * attention + 3 * 10 * 6 + 3 * moe + 53 * 6
    causal = 4 * 3 * 3 * (7 + 3) * 100  # layers, passes, heads, dims of keys and values; half of a square, two operations each
    assert cost.flops_per_token(model, 100) == 6 * (matrices + norms) + causal


def test_without_multi_token_prediction():
    assert cost.parameters(small_model(num_nextn_predict_layers=0)).mtp == 0
    assert cost.parameters(small_model(num_nextn_predict_layers=0)).main == cost.parameters(small_model()).main


@pytest.mark.parametrize("ranks, pipeline", [((2, 2), 2), ((2, 2), 1), ((1,) * 4, 4), ((1, 3), 2)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_bytes_are_those_of_the_real_buffers(ranks, pipeline, dtype):
    torch.set_num_threads(1)
    model = small_model()
    config = parse({"model": model.model_dump(), "training": {"dtype": dtype}})
    layout = layout_of(ranks, pipeline, model)
    shared = buckets(model, layout, 1)
    estimates = cost.memory(config, layout, shared, [0] * pipeline)
    assert len(estimates) == layout.size
    for rank, estimate in enumerate(estimates):
        real = Optimizer(rank, shared, config.optimizer, getattr(torch, dtype), torch.device("cpu"))
        buffers = {part: {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors} for part, tensors in {
            "weights": [weight.value for weight in real.weights.values()],
            "held gradients": [weight.gradient for weight in real.weights.values()]}.items()}
        assert estimate.weights == sum(buffers["weights"].values())
        foreign = sum(b.shard_size * len(b.owners) for b in shared if rank in b.members and rank not in b.holders)
        exact = 8 if dtype == "float64" else 4
        assert estimate.gradients == sum(buffers["held gradients"].values()) + exact * foreign
        state = 0
        for owned in real.shards:
            owned.update(torch.ones_like(owned.master), 1e-3, config.optimizer)
            state += sum(t.nbytes for t in (owned.master, owned.moment("exp_avg"), owned.moment("exp_avg_sq")))
        assert estimate.optimizer == state
        assert estimate.total == estimate.weights + estimate.gradients + estimate.optimizer


def test_activations():
    """Grow with microbatches in flight and with the dtype, shrink with recomputation."""
    model, layout = small_model(), layout_of((2, 2), 2, small_model())

    def bytes_of(in_flight: int, **training) -> int:
        config = parse({"model": model.model_dump(), "training": training})
        return cost.memory(config, layout, buckets(model, layout, 1), [in_flight, 0])[0].activations

    assert bytes_of(0) == 0
    assert bytes_of(6) == 3 * bytes_of(2) == 6 * bytes_of(1)
    assert 0.5 < bytes_of(1, dtype="bfloat16") / bytes_of(1) < 0.7  # indices and what is never rounded stay as they are
    assert bytes_of(1, recompute="full") < bytes_of(1, recompute="selective") < bytes_of(1, recompute="none")
    assert bytes_of(1, microbatch_sequences=8) == 2 * bytes_of(1, microbatch_sequences=4)


@pytest.mark.parametrize("device, teraflops", [
    ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA H800", 989), ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA H20", 148),
    ("NVIDIA GeForce GTX 970", None), (None, None)])
def test_what_an_accelerator_can_do_is_known_by_its_name(device, teraflops):
    assert cost.peak_flops(device) == (None if teraflops is None else teraflops * 1e12)


def test_utilisation_of_deepseeks_own_run():
    """14.8 T tokens in 2.664 M hours of H800 (report, table 1): 1,543 tokens a second on each. 250 GFLOP a token (Insights, table 2)."""
    model, rate = load(REPOSITORY / "jobs/configs/deepseek_v3.yaml", []).model, 14.8e12 / (2.664e6 * 3600)
    assert cost.utilisation(model, 4096, 2048 * rate, [989e12] * 2048) == pytest.approx(rate * 250e9 / 989e12, rel=0.02)
    assert cost.utilisation(model, 4096, rate, [989e12, None]) is None and cost.utilisation(model, 4096, rate, []) is None
