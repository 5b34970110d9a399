"""Which weights a policy speaks of, and what it refuses."""

from __future__ import annotations

import pytest

from orchestrator.config.precision import KINDS, PRODUCTS, exact, kind_of
from orchestrator.config.run_config import ConfigError, ModelConfig, parse
from orchestrator.model.parameters import stage_parameters


def weights(**changes):
    model = ModelConfig(**changes)
    return [spec.name for spec in stage_parameters(model, range(model.num_hidden_layers), first=True, last=True)]


def test_every_weight_is_of_one_kind():
    found = {name: kind_of(name) for name in weights() + weights(q_lora_rank=None)}
    assert set(found.values()) == set(KINDS)
    assert found["model.layers.0.mlp.gate_proj.weight"] == "mlp" and found["model.layers.1.mlp.gate.weight"] == "gate"
    assert found["model.layers.1.mlp.experts.3.down_proj.weight"] == "experts"
    assert found["model.layers.1.mlp.shared_experts.up_proj.weight"] == "shared_experts"
    assert found["model.layers.4.eh_proj.weight"] == "mtp_projection" and found["model.layers.4.enorm.weight"] == "norms"
    assert {kind for name, kind in found.items() if name.endswith("_proj.weight")} == {*PRODUCTS, "mtp_projection"}
    assert found["model.layers.2.self_attn.kv_a_proj_with_mqa.weight"] == found["model.layers.2.self_attn.o_proj.weight"] == "attention"


def test_weights_are_exact_where_products_round_them_or_nobody_does():
    precision = parse({}, ["training.dtype=bfloat16", "precision.experts=fp8", "precision.head=fp32", "precision.mlp=bf16"]).precision
    told = {kind_of(name): exact(precision, name) for name in weights()}
    assert {kind for kind, is_exact in told.items() if is_exact} == {"experts", "head", "gate", "norms"}


@pytest.mark.parametrize("overrides, line", [
    (["precision.head=fp8"], "precision.head = fp8: same, bf16 or fp32: the loss is taken of what it gives"),
    (["precision.embedding=fp8"], "precision.embedding = fp8: same, bf16 or fp32: rows are looked up in it, nothing is multiplied"),
    (["precision.gate=bf16"], "precision.gate = bf16: fp32: rounding it costs accuracy and saves nothing"),
    (["precision.norms=fp8"], "precision.norms = fp8: same, bf16 or fp32: they multiply vectors, which costs next to nothing"),
    (["precision.attention=bf16"], "precision.attention = bf16: same, fp8 or fp32: activations are training.dtype = float32, and would "
                                   "be rounded on the way in alone"),
    (["training.dtype=float64", "precision.mlp=fp8"],
     "precision.mlp = fp8: same: training.dtype = float64 is for comparing, to the last digit"),
    (["precision.scales=tensor"], "precision.scales = tensor: tiles: no kind of module is fp8"),
    (["precision.mlp=int8"], "precision.mlp = int8: one of same, bf16, fp8, fp32")])
def test_refusal(overrides, line):
    with pytest.raises(ConfigError) as refused:
        parse({}, overrides)
    assert str(refused.value) == line
