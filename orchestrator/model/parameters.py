"""Which weights exist, how they are called, and which stage they belong to.

Names and shapes are those of DeepSeek-V3's published checkpoint (one tensor per expert and projection), so a piece of
state is called the same on a rank, in a checkpoint and in a Hugging Face folder.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

from orchestrator.config.run_config import ModelConfig


@dataclass(frozen=True, slots=True)
class ParameterSpec:
    """One weight. `decay`: AdamW's weight decay applies. `precise`: never held below FP32 (norms, gate)."""

    name: str
    shape: tuple[int, ...]
    decay: bool = True
    precise: bool = False
    layer: int | None = None
    expert: int | None = None

    @property
    def size(self) -> int:
        return math.prod(self.shape)


def stage_layers(model: ModelConfig, stages: int, per_stage: list[int] | str = "auto") -> tuple[range, ...]:
    """Decoder layers of each of `stages` stages, contiguous. `auto`: as even as possible, the shorter stages at the end,
    where the head and the multi-token-prediction layer add work."""
    if per_stage == "auto":
        per_stage = [(model.num_hidden_layers + stages - 1 - s) // stages for s in range(stages)]
    starts = [sum(per_stage[:s]) for s in range(stages + 1)]
    return tuple(range(a, b) for a, b in pairwise(starts))


def mtp_layer(model: ModelConfig) -> int:
    """Index that the multi-token-prediction layer has in tensor names: one past the last decoder layer."""
    return model.num_hidden_layers


def moe_layers(model: ModelConfig, layers: range, *, last: bool) -> tuple[int, ...]:
    """Layers with routed experts among `layers`; the last stage adds the multi-token-prediction layer."""
    found = [n for n in layers if model.is_moe(n)]
    return tuple(found + [mtp_layer(model)] if last and model.num_nextn_predict_layers else found)


def stage_parameters(model: ModelConfig, layers: range, *, first: bool, last: bool) -> list[ParameterSpec]:
    """Weights of one stage in a fixed order. With multi-token prediction the last stage also uses the embedding."""
    h, specs = model.hidden_size, []
    if first or (last and model.num_nextn_predict_layers):
        specs.append(ParameterSpec("model.embed_tokens.weight", (model.vocab_size, h)))
    for n in layers:
        specs += layer_parameters(model, n)
    if last:
        specs.append(ParameterSpec("model.norm.weight", (h,), decay=False, precise=True))
        specs.append(ParameterSpec("lm_head.weight", (model.vocab_size, h)))
        if model.num_nextn_predict_layers:
            specs += _mtp_parameters(model)
    return specs


def layer_parameters(model: ModelConfig, n: int, *, moe: bool | None = None) -> list[ParameterSpec]:
    """Weights of decoder layer `n`. Gate and up projections of one MLP stand next to each other."""
    prefix, h, heads = f"model.layers.{n}.", model.hidden_size, model.num_attention_heads
    specs: list[ParameterSpec] = []

    def weight(name: str, *shape: int, expert: int | None = None, precise: bool = False) -> None:
        norm = len(shape) == 1
        specs.append(ParameterSpec(prefix + name, shape, decay=not norm, precise=norm or precise, layer=n, expert=expert))

    def mlp(name: str, width: int, expert: int | None = None) -> None:
        weight(f"{name}.gate_proj.weight", width, h, expert=expert)
        weight(f"{name}.up_proj.weight", width, h, expert=expert)
        weight(f"{name}.down_proj.weight", h, width, expert=expert)

    weight("input_layernorm.weight", h)
    if model.q_lora_rank is None:
        weight("self_attn.q_proj.weight", heads * model.qk_head_dim, h)
    else:
        weight("self_attn.q_a_proj.weight", model.q_lora_rank, h)
        weight("self_attn.q_a_layernorm.weight", model.q_lora_rank)
        weight("self_attn.q_b_proj.weight", heads * model.qk_head_dim, model.q_lora_rank)
    weight("self_attn.kv_a_proj_with_mqa.weight", model.kv_lora_rank + model.qk_rope_head_dim, h)
    weight("self_attn.kv_a_layernorm.weight", model.kv_lora_rank)
    weight("self_attn.kv_b_proj.weight", heads * (model.qk_nope_head_dim + model.v_head_dim), model.kv_lora_rank)
    weight("self_attn.o_proj.weight", h, heads * model.v_head_dim)
    weight("post_attention_layernorm.weight", h)
    if not (model.is_moe(n) if moe is None else moe):
        mlp("mlp", model.intermediate_size)
        return specs
    weight("mlp.gate.weight", model.n_routed_experts, h, precise=True)
    for expert in range(model.n_routed_experts):
        mlp(f"mlp.experts.{expert}", model.moe_intermediate_size, expert=expert)
    if model.n_shared_experts:
        mlp("mlp.shared_experts", model.moe_intermediate_size * model.n_shared_experts)
    return specs


def _mtp_parameters(model: ModelConfig) -> list[ParameterSpec]:
    n, h = mtp_layer(model), model.hidden_size
    prefix = f"model.layers.{n}."
    norms = [ParameterSpec(prefix + name, (h,), decay=False, precise=True, layer=n)
             for name in ("enorm.weight", "hnorm.weight", "shared_head.norm.weight")]
    return norms + [ParameterSpec(prefix + "eh_proj.weight", (h, 2 * h), layer=n)] + layer_parameters(model, n, moe=True)
