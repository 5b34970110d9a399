"""Names and shapes of weights, against the published checkpoint's table and transformers' own module."""

from __future__ import annotations

import re

import pytest
import torch
from transformers.models.deepseek_v3.configuration_deepseek_v3 import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3ForCausalLM

from orchestrator.config.run_config import ModelConfig
from orchestrator.model.parameters import moe_layers, stage_layers, stage_parameters
from tests.orchestrator.layouts import DEEPSEEK, small_model

EXPERT = {"gate_proj": (2048, 7168), "up_proj": (2048, 7168), "down_proj": (7168, 2048)}
DENSE = {"gate_proj": (18432, 7168), "up_proj": (18432, 7168), "down_proj": (7168, 18432)}
ATTENTION = {
    "input_layernorm": (7168,), "post_attention_layernorm": (7168,),
    "self_attn.q_a_proj": (1536, 7168), "self_attn.q_a_layernorm": (1536,), "self_attn.q_b_proj": (24576, 1536),
    "self_attn.kv_a_proj_with_mqa": (576, 7168), "self_attn.kv_a_layernorm": (512,), "self_attn.kv_b_proj": (32768, 512),
    "self_attn.o_proj": (7168, 16384)}


def all_specs(model: ModelConfig):
    return stage_parameters(model, range(model.num_hidden_layers), first=True, last=True)


def published() -> dict[str, tuple[int, ...]]:
    """The listing of the released 163-file checkpoint, without the gate's bias (state, not a weight) and the second copies
    of embedding and head under model.layers.61."""
    found = {"model.embed_tokens": (129280, 7168), "lm_head": (129280, 7168), "model.norm": (7168,)}
    for n in range(62):
        parts = dict(ATTENTION)
        if n < 3:
            parts |= {f"mlp.{name}": shape for name, shape in DENSE.items()}
        else:
            parts["mlp.gate"] = (256, 7168)
            for owner in ("shared_experts", *(f"experts.{e}" for e in range(256))):
                parts |= {f"mlp.{owner}.{name}": shape for name, shape in EXPERT.items()}
        if n == 61:
            parts |= {"enorm": (7168,), "hnorm": (7168,), "shared_head.norm": (7168,), "eh_proj": (7168, 14336)}
        found |= {f"model.layers.{n}.{name}": shape for name, shape in parts.items()}
    return {f"{name}.weight": shape for name, shape in found.items()}


def test_names_and_shapes_are_those_of_the_published_checkpoint():
    specs = all_specs(DEEPSEEK)
    assert {spec.name: spec.shape for spec in specs} == published()
    assert len(specs) == len(published())


@pytest.mark.parametrize("changes", [{}, {"q_lora_rank": None}, {"first_k_dense_replace": 0}, {"n_shared_experts": 2}])
def test_names_and_shapes_are_those_of_transformers(changes):
    model = small_model(**changes)
    keys = model.model_dump(exclude={"rope_scaling", "rope_theta", "scoring_func", "topk_method", "num_nextn_predict_layers"})
    with torch.device("meta"):
        module = DeepseekV3ForCausalLM(DeepseekV3Config(
            **keys, num_key_value_heads=model.num_attention_heads, pad_token_id=None,
            rope_parameters={"rope_type": "default", "rope_theta": model.rope_theta}))
    theirs = {}
    for name, value in module.state_dict().items():
        if ".experts." not in name:
            theirs[name] = tuple(value.shape)
            continue
        before, projection = name.rsplit(".", 1)  # fused: [experts, rows, columns]
        for expert in range(value.shape[0]):
            parts = {"gate_up_proj": {"gate_proj": 2, "up_proj": 2}, "down_proj": {"down_proj": 1}}[projection]
            for part, share in parts.items():
                theirs[f"{before}.{expert}.{part}.weight"] = (value.shape[1] // share, value.shape[2])
    theirs = {name: shape for name, shape in theirs.items() if not name.endswith("e_score_correction_bias")}
    n = model.num_hidden_layers
    assert {spec.name: spec.shape for spec in all_specs(model) if f"layers.{n}." not in spec.name} == theirs


def test_what_is_treated_how():
    for spec in all_specs(small_model()):
        norm = len(spec.shape) == 1
        assert spec.decay is not norm
        assert spec.precise is (norm or spec.name.endswith("mlp.gate.weight"))
        layer = re.search(r"layers\.(\d+)\.", spec.name)
        assert spec.layer == (int(layer[1]) if layer else None)
        expert = re.search(r"\.experts\.(\d+)\.", spec.name)
        assert spec.expert == (int(expert[1]) if expert else None)


@pytest.mark.parametrize("layers, pipeline, sizes", [
    (61, 16, [4] * 13 + [3] * 3), (4, 1, [4]), (4, 4, [1] * 4), (27, 4, [7, 7, 7, 6]), (5, 2, [3, 2])])
def test_layers_are_spread_evenly_with_the_shorter_stages_last(layers, pipeline, sizes):
    found = stage_layers(ModelConfig(num_hidden_layers=layers), pipeline)
    assert [len(stage) for stage in found] == sizes
    assert [n for stage in found for n in stage] == list(range(layers))


def test_layers_as_told():
    assert stage_layers(ModelConfig(num_hidden_layers=6), 3, [1, 3, 2]) == (range(1), range(1, 4), range(4, 6))


@pytest.mark.parametrize("pipeline", [1, 2, 4])
@pytest.mark.parametrize("mtp", [0, 1])
def test_stages_share_out_the_model(pipeline, mtp):
    model = small_model(num_nextn_predict_layers=mtp)
    stages = [[spec.name for spec in stage_parameters(model, layers, first=s == 0, last=s == pipeline - 1)]
              for s, layers in enumerate(stage_layers(model, pipeline))]
    names = [name for stage in stages for name in stage]
    assert set(names) == {spec.name for spec in all_specs(model)}
    twice = {name for name in names if names.count(name) > 1}
    assert twice == ({"model.embed_tokens.weight"} if mtp and pipeline > 1 else set())
    moe = [moe_layers(model, layers, last=s == pipeline - 1) for s, layers in enumerate(stage_layers(model, pipeline))]
    assert [n for found in moe for n in found] == list(range(1, 4 + mtp))
