"""Logits, loss and every gradient against the published model in transformers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from transformers import modeling_rope_utils
from transformers.modeling_layers import MtpLayer
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as published
from transformers.models.deepseek_v3.configuration_deepseek_v3 import DeepseekV3Config

from actors.model.chunk import LossScales
from orchestrator.config.model import ModelConfig, RopeScaling
from tests.actors.model.helpers import SCALES, Pipeline, biases_of, random_tokens, small_model, weights_of, worst_difference

YARN = RopeScaling(factor=4.0, original_max_position_embeddings=16, beta_fast=4.0, beta_slow=1.0, mscale=0.7, mscale_all_dim=1.3)
MODELS = {
    "groups": {},
    "no groups": dict(n_group=1, topk_group=1),
    "all groups": dict(topk_group=4, num_experts_per_tok=5),
    "direct queries": dict(q_lora_rank=None),
    "yarn": dict(rope_scaling=YARN, max_position_embeddings=64),
    "yarn without mscale": dict(rope_scaling=YARN.model_copy(update={"mscale": 0.0, "mscale_all_dim": 0.0})),
    "values as wide as keys": dict(v_head_dim=18, num_attention_heads=2),
    "values wider than keys": dict(v_head_dim=25, qk_nope_head_dim=7),
    "one dense layer more, two shared experts": dict(first_k_dense_replace=2, n_shared_experts=2),
    "weights not normed": dict(norm_topk_prob=False, routed_scaling_factor=1.7),
}


class ExactTorch:
    """torch, in which FP32 is FP64: lifts the casts that transformers does inside."""

    float32 = float = torch.float64

    def __getattr__(self, name):
        return getattr(torch, name)


@pytest.fixture
def exact(monkeypatch):
    for module in (published, modeling_rope_utils):
        monkeypatch.setattr(module, "torch", ExactTorch())


def published_config(model: ModelConfig) -> DeepseekV3Config:
    keys = model.model_dump(exclude={"rope_scaling", "rope_theta", "scoring_func", "topk_method", "num_nextn_predict_layers"})
    rope = {"rope_type": "default", "rope_theta": model.rope_theta}
    if model.rope_scaling:
        rope |= {**model.rope_scaling.model_dump(exclude={"type"}), "rope_type": "yarn"}
    config = DeepseekV3Config(**keys, num_key_value_heads=model.num_attention_heads, rope_parameters=rope, pad_token_id=None)
    config._attn_implementation, config._experts_implementation = "eager", "eager"
    return config


def published_names(model: ModelConfig, prefix: str, name: str) -> tuple[str, object]:
    """Where transformers keeps a weight: (its name, the part of that tensor)."""
    name = name.removeprefix(prefix)
    if ".experts." not in name:
        return name, slice(None)
    before, after = name.split(".experts.")
    expert, projection = int(after.split(".")[0]), after.split(".")[1]
    width = model.moe_intermediate_size
    part = {"gate_proj": slice(0, width), "up_proj": slice(width, 2 * width), "down_proj": slice(None)}[projection]
    return f"{before}.experts.{'down_proj' if projection == 'down_proj' else 'gate_up_proj'}", (expert, part)


def fill(module: torch.nn.Module, model: ModelConfig, names: list[str], prefix: str = "") -> dict[str, torch.nn.Parameter]:
    """Give the published module our values; returns its parameters by their names."""
    module.double()
    parameters, weights = dict(module.named_parameters()), weights_of(model, torch.float64)
    with torch.no_grad():
        for name in names:
            theirs, part = published_names(model, prefix, name)
            parameters[theirs][part] = weights[name].value
        for n, bias in biases_of(model, torch.float64).items():
            for owner, buffer in module.named_buffers():
                if owner.endswith("e_score_correction_bias") and (f"layers.{n}." in owner or prefix == f"model.layers.{n}."):
                    buffer.copy_(bias)
    return parameters


def compare(model: ModelConfig, stages: int) -> tuple[float, float]:
    """(difference of logits, worst relative difference of a gradient); losses are compared on the way."""
    ours, tokens = Pipeline(model, stages=stages), random_tokens(model, 2, 24)
    theirs = published.DeepseekV3ForCausalLM(published_config(model)).train()
    parameters = fill(theirs, model, list(ours.weights))
    logits = theirs(input_ids=tokens[:, :-1]).logits
    loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum")
    (loss * SCALES.next_token).backward()
    expected = {}
    for name in ours.weights:
        owner, part = published_names(model, "", name)
        expected[name] = parameters[owner].grad[part]

    tapes = ours.forward(tokens)
    found = published_logits(model, tokens)
    assert float(tapes[-1].loss_sum) == pytest.approx(float(loss.detach()), rel=1e-6)
    ours.scale(LossScales(SCALES.next_token, 0.0, 0.0))
    ours.backward(tapes)
    return float((found - logits.detach()).abs().max()), worst_difference(ours.gradients(), expected)


def published_logits(model: ModelConfig, tokens: torch.Tensor) -> torch.Tensor:
    """Our logits: the last activation that a pipeline passes on, through a head written here."""
    body = Pipeline(model)
    chunk = body.chunks[0]
    chunk.last = False
    (tape,) = body.forward(tokens, keep=False)
    normed = F.rms_norm(tape.output, tape.output.shape[-1:], body.weights["model.norm.weight"].value, model.rms_norm_eps)
    return F.linear(normed, body.weights["lm_head.weight"].value)


@pytest.mark.parametrize("stages", [1, 2])
@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS.keys())
def test_equal_to_the_published_model(exact, changes, stages):
    logits, gradient = compare(small_model(num_nextn_predict_layers=0, **changes), stages)
    assert logits < 1e-9 and gradient < 1e-9


@pytest.mark.parametrize("name", ["groups", "yarn"])
def test_close_to_the_published_model_as_it_is(name):
    """With its inner casts to FP32 left as they are."""
    logits, gradient = compare(small_model(num_nextn_predict_layers=0, **MODELS[name]), 1)
    assert logits < 1e-5 and gradient < 1e-5


def test_multi_token_prediction_is_the_published_layer(exact):
    model = small_model()
    ours, tokens = Pipeline(model), random_tokens(model, 2, 12)
    layer, prefix = model.num_hidden_layers, f"model.layers.{model.num_hidden_layers}."
    names = list(ours.weights)
    theirs = published.DeepseekV3ForCausalLM(published_config(model)).train()
    main = fill(theirs, model, [n for n in names if not n.startswith(prefix)])
    mtp = MtpLayer(published_config(model), published.DeepseekV3DecoderLayer, published.DeepseekV3RMSNorm, layer)
    inner = {n: n.replace(prefix, prefix + "mtp_block.") for n in names if n.startswith(prefix)}
    for n in inner:
        if any(part in n for part in ("enorm", "hnorm", "eh_proj")):
            inner[n] = n
        elif "shared_head.norm" in n:
            inner[n] = prefix + "post_norm.weight"
    weights, parameters = weights_of(model, torch.float64), dict(mtp.double().named_parameters())
    where = {n: published_names(model, prefix, renamed) for n, renamed in inner.items()}
    with torch.no_grad():
        for n, (owner, part) in where.items():
            parameters[owner][part] = weights[n].value
        mtp.mtp_block.mlp.gate.e_score_correction_bias.copy_(biases_of(model, torch.float64)[layer])

    hidden = theirs.model(input_ids=tokens[:, :-1]).last_hidden_state
    positions = torch.arange(hidden.shape[1]).unsqueeze(0)
    causal = torch.full((hidden.shape[1],) * 2, float("-inf"), dtype=torch.float64).triu(1)
    following, rotary = theirs.model.embed_tokens(tokens[:, 1:]), theirs.model.rotary_emb(hidden, positions)
    out = mtp(following, hidden, rotary, causal, positions, None)
    loss = F.cross_entropy(theirs.lm_head(out)[:, :-1].flatten(0, 1), tokens[:, 2:].flatten(), reduction="sum")
    first = F.cross_entropy(theirs.lm_head(hidden).flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum")
    (SCALES.next_token * first + SCALES.mtp * loss).backward()
    expected = {n: main[owner].grad[part] for n in names if not n.startswith(prefix)
                for owner, part in [published_names(model, "", n)]}
    expected |= {n: parameters[owner].grad[part] for n, (owner, part) in where.items()}

    tapes = ours.forward(tokens)
    assert float(tapes[0].mtp_loss_sum) == pytest.approx(float(loss.detach()), rel=1e-10)
    ours.scale(LossScales(SCALES.next_token, SCALES.mtp, 0.0))
    ours.backward(tapes)
    assert worst_difference(ours.gradients(), expected) < 1e-9
